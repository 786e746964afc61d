"""Quantise, reload and score, for test_quantization.py, in the second environment.

    python tests/quantize_in_gptq.py FOLDER

reads FOLDER/cases.json and FOLDER/sequences.npz, and writes per case a GPTQ folder, the logits of
the dense model, of the quantised one in plain transformers, and of `load_quantized`, and the dense
weights, float32 (out, in), that the quantised layers stand for.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification

from arena_distill.config.encoding import Encoding
from arena_distill.config.phases.deployment import QuantizationSettings
from arena_distill.deployment.gptq import load_quantized, quantize_model
from arena_distill.encoding.sequences import Sequences
from arena_distill.errors import InputError
from arena_distill.models.scoring import score
from arena_distill.verdicts import Votes


def main(folder: Path) -> None:
    torch.compiler.set_stance("force_eager")  # plain transformers would compile a kernel
    with np.load(folder / "sequences.npz") as stored:
        sequences = Sequences(stored["ids"], stored["offsets"])
        votes = Votes.hard(stored["labels"])
    half = len(sequences) // 2
    calibration, validation = (
        sequences.take(np.arange(half)),
        sequences.take(np.arange(half, len(sequences))),
    )
    for case in json.loads((folder / "cases.json").read_text()):
        model, output = folder / case["model"], folder / case["name"]
        try:
            quantize_model(
                model,
                output,
                settings=QuantizationSettings(
                    version=1,
                    encoding=Encoding(),
                    samples=48,
                    bits=case["bits"],
                    group_size=case["group_size"],
                    seed=case.get("seed", 0),
                    validation_rows=len(validation),
                ),
                calibration=calibration,
                validation=[validation],
                batch_tokens=2048,
                votes=votes,
            )
        except InputError as error:
            (folder / f"{case['name']}.error").write_text(str(error))
            continue
        plain = AutoModelForSequenceClassification.from_pretrained
        loaded = load_quantized(output)
        weights = {
            name: module.dequantize_weight().T.float().contiguous()
            for name, module in loaded.named_modules()
            if hasattr(module, "dequantize_weight")
        }
        save_file(weights, f"{output}.weights.safetensors")
        for name, judge in (
            ("dense", plain(model, dtype="auto")),
            ("plain", plain(output)),
            ("loaded", loaded),
        ):
            np.save(
                folder / f"{output.name}.{name}.npy", score(judge, validation, batch_tokens=2048)
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
