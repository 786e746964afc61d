"""Compare our quantisation of a judge with GPTQModel's own of the same blocks.

    .venv-gptq/bin/python benchmarks/quantization.py [--model 4m] [--rows 32] [--rounds 2]

Both read a random Llama from its folder, quantise all linear layers to 8 bits in groups of 128 with the
same sequences, and write a folder. Ours is a classifier, and also measures its drift on eight other
sequences, before and after, as the workflow does; GPTQModel knows generating models only, so it gets one
with the same blocks.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path
from typing import Any

import made_up
import numpy as np
import torch
from measured import by_turns, keep, ratio, seconds
from transformers import AutoModelForCausalLM

from arena_distill.config.backbone import TINY
from arena_distill.config.encoding import Encoding
from arena_distill.config.head import JOINT
from arena_distill.config.phases.deployment import QuantizationSettings
from arena_distill.deployment.gptq import quantize_model
from arena_distill.encoding.sequences import Sequences
from arena_distill.encoding.tokenization import load_tokenizer

BITS, GROUP = 8, 128
HELD_OUT = 8


def by_hand(folder: Path, output: Path, calibration: Sequences) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=BITS, group_size=GROUP, offload_to_disk=False)
    model: Any = GPTQModel.load(str(folder), config)
    rows = [{"input_ids": ids.tolist(), "attention_mask": [1] * len(ids)} for ids in calibration]
    with contextlib.chdir(output.parent):  # it writes a log there
        model.quantize(rows, batch_size=1)
    model.save(str(output))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="4m")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--longest", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sequences = made_up.examples(arguments.rows + HELD_OUT, arguments.longest).views[0]
    calibration = sequences.take(np.arange(arguments.rows))
    others = sequences.take(np.arange(arguments.rows, len(sequences)))
    settings = QuantizationSettings(
        version=0,
        bits=BITS,
        group_size=GROUP,
        samples=None,
        encoding=Encoding(),
        head=JOINT,
        seed=0,
    )
    with tempfile.TemporaryDirectory() as scratch:
        judge, generator = Path(scratch, "judge"), Path(scratch, "generator")
        classifier = made_up.backbone(arguments.model)
        generating = AutoModelForCausalLM.from_config(classifier.config, trust_remote_code=False)
        for folder, model in ((judge, classifier), (generator, generating)):
            model.save_pretrained(folder)
            load_tokenizer(TINY / "llama").save_pretrained(folder)

        def ours() -> None:
            quantize_model(
                judge,
                Path(scratch, "ours"),
                settings=settings,
                calibration=calibration,
                validation=[others],
                batch_tokens=4096,
            )

        taken = by_turns(
            {
                "ours": lambda: seconds(ours),
                "GPTQModel": lambda: seconds(
                    lambda: by_hand(generator, Path(scratch, "by_hand"), calibration)
                ),
            },
            arguments.rounds,
        )
    what = f"GPTQ of a Llama of {arguments.model} weights"
    keep(__file__, [ratio(what, taken, "ours", "GPTQModel", aim=1.1)])


if __name__ == "__main__":
    main()
