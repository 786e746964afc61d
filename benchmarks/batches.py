"""Compare our batches with those of a fixed number of battles, in a training epoch and in scoring.

    python benchmarks/batches.py [--rows 96] [--longest 512] [--rounds 2]
    python benchmarks/batches.py --device cuda --precision bf16 --model smollm2-135m --rows 768 \\
        --longest 1024

The battles are of made-up tokens and as long as those of the Chatbot Arena, with a long tail, cut at
`--longest`. The model has random weights: about a million, a Llama's, unless `--model` names another. Each
side runs the same sequences through the same model, forward and backward in training, so the ratio of
seconds is that of useful tokens per second. By tokens there are fewer forward passes, with some percent
more padding: on a CPU only the padding counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import made_up
import numpy as np
import torch
from measured import by_turns, keep, ratio, seconds

from arena_distill.encoding.batching import token_batches
from arena_distill.training.examples import ByLength, Examples, collator, micro_batches

FIXED = 8
"""Battles of the Trainer's batches, and of our longest ones."""

STEP = 64
"""Battles of an optimizer step."""


def fixed(examples: Examples, order: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Batches of as many battles each, in an order."""
    rows = list(order)
    for start in range(0, len(rows), FIXED):
        yield collator(0)([examples[i] for i in rows[start : start + FIXED]])


def ours(examples: Examples, order: Iterable[int]) -> Iterator[dict[str, Any]]:
    """The micro-batches of a training."""
    rows = list(order)
    for start in range(0, len(rows), STEP):
        batch = collator(0)([examples[i] for i in rows[start : start + STEP]])
        yield from micro_batches(batch, FIXED * int(examples.lengths.max()))


def run(model: Any, batches: Iterable[dict[str, Any]], training: bool) -> None:
    with torch.set_grad_enabled(training):
        for batch in batches:
            names = ("input_ids", "attention_mask")
            inputs = {name: batch[name][:, 0].to(model.device) for name in names}
            logits = model(**inputs, use_cache=False).logits
            if training:
                loss = torch.nn.functional.cross_entropy
                loss(logits.float(), batch["votes"].to(model.device)).backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=2)
    made_up.options(parser, model="1m", longest=512)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = arguments.device
    model = made_up.backbone(arguments.model, made_up.DTYPES[arguments.precision], device)
    examples = made_up.examples(arguments.rows, arguments.longest)
    order = list(ByLength(examples.lengths, batch_size=STEP, processes=1, seed=0, epoch=lambda: 0))
    at_random = np.random.default_rng(1).permutation(len(examples)).tolist()
    scored = token_batches(examples.lengths, 16 * arguments.longest)

    def timed(batches: Iterable[dict[str, Any]], training: bool) -> float:
        return seconds(partial(run, model, batches, training), device)

    together = [collator(0)([examples[int(i)] for i in rows]) for rows in scored]
    taken = by_turns(
        {
            "by tokens": lambda: timed(ours(examples, order), True),
            "8 of like length": lambda: timed(fixed(examples, order), True),
            "8 at random": lambda: timed(fixed(examples, at_random), True),
            "scored by tokens": lambda: timed(together, False),
            "scored, 8 in the file's order": lambda: timed(fixed(examples, range(len(examples))), False),
        },
        arguments.rounds,
    )  # fmt: skip
    epoch = "training epoch, forward and backward"
    keep(
        __file__,
        [
            ratio(epoch, taken, "by tokens", "8 at random"),
            ratio(epoch, taken, "by tokens", "8 of like length"),
            ratio("scoring", taken, "scored by tokens", "scored, 8 in the file's order"),
        ],
        device,
    )


if __name__ == "__main__":
    main()
