"""Read GPTQ folders with auto-gptq's own layers, for test_quantization.py, in an environment of their own.

    python tests/read_in_auto_gptq.py FOLDER…

writes beside each folder `NAME.auto_gptq.safetensors`: the dense weight, float32 (out, in), of every
quantised layer, as auto-gptq's QuantLinear multiplies by it. Needs nothing of this project.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from auto_gptq.utils.import_utils import dynamically_import_QuantLinear
from safetensors.torch import load_file, save_file

PACKED = ("qweight", "qzeros", "scales", "g_idx")


def main(folder: Path) -> None:
    how = json.loads((folder / "config.json").read_text())["quantization_config"]
    bits, group_size, act_order = how["bits"], how["group_size"], how["desc_act"]
    layer = dynamically_import_QuantLinear(
        use_triton=False, desc_act=act_order, group_size=group_size, bits=bits
    )
    tensors = load_file(folder / "model.safetensors")
    dense = {}
    for name in (key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")):
        packed = {part: tensors[f"{name}.{part}"] for part in PACKED}
        inputs, outputs = len(packed["g_idx"]), packed["qweight"].shape[1]
        linear = layer(bits, group_size, inputs, outputs, bias=False, weight_dtype=torch.float32)
        linear.load_state_dict(packed, strict=True)
        # In float32: what is read is compared, not how an accelerator rounds.
        dense[name] = linear.float()(torch.eye(inputs)).T.contiguous()
    save_file(dense, f"{folder}.auto_gptq.safetensors")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        main(Path(argument))
