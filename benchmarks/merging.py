"""Compare the merge of five folds with PEFT's merge of one.

    python benchmarks/merging.py [--rounds 5]

Both read adapters of rank 16 on all linear layers from their files, and write into a random Llama of 25
million weights in memory. Ours takes the exact mean of the folds' products and measures how far the mean of
their factors is from it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import made_up
import torch
from measured import by_turns, keep, ratio, seconds
from peft import PeftModel

from arena_distill.config.training import Lora
from arena_distill.deployment.merging import merge_into, read_adapters
from arena_distill.models.adapters import new_judge

FOLDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    base = made_up.backbone("25m")
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch, f"fold_{fold}") for fold in range(FOLDS)]
        for seed, folder in enumerate(folders):
            new_judge(made_up.backbone("25m"), Lora(r=16, alpha=16), seed).save_pretrained(
                str(folder)
            )

        def ours() -> None:
            folds = read_adapters(folders)
            merge_into(base, folds, [1 / FOLDS] * FOLDS, "products", "average", torch.float32)

        def one() -> None:
            PeftModel.from_pretrained(base, folders[0]).merge_and_unload()

        ways = {"five folds": lambda: seconds(ours), "PEFT, one": lambda: seconds(one)}
        taken = by_turns(ways, rounds)
    keep(__file__, [ratio("merge", taken, "five folds", "PEFT, one")])


if __name__ == "__main__":
    main()
