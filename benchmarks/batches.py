"""Compare our batches with those of a fixed number of battles, in a training epoch and in scoring.

    python benchmarks/batches.py [--rows 96] [--longest 512] [--rounds 2]

The battles are of made-up tokens and as long as those of the Chatbot Arena, with a long tail, cut at
`--longest`. The model is a random Llama of about a million weights, in float32 on one thread. Each side
runs the same sequences through the same model, forward and backward in training, so the ratio of seconds
is that of useful tokens per second. By tokens there are fewer forward passes, with some percent more
padding: on a CPU only the padding counts. What fewer passes spare on a GPU was not measured here.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from measured import by_turns, cpu, keep, ratio
from transformers import LlamaConfig, LlamaForSequenceClassification

from arena_distill.encoding.batching import token_batches
from arena_distill.encoding.sequences import Sequences, offsets_of
from arena_distill.training.examples import ByLength, Examples, collator, micro_batches
from arena_distill.verdicts import Votes

FIXED = 8
"""Battles of the Trainer's batches, and of our longest ones."""

STEP = 64
"""Battles of an optimizer step."""


def made_up(rows: int, longest: int) -> Examples:
    rng = np.random.default_rng(0)
    prompt = np.exp(rng.normal(np.log(20), 1.2, rows))
    answers = np.exp(rng.normal(np.log(140), 1.05, (2, rows))).sum(axis=0)
    lengths = np.clip(prompt + answers, 10, longest).astype(np.int64)
    ids = rng.integers(5, 1000, lengths.sum()).astype(np.int32)
    votes = np.eye(3, dtype=np.float32)[rng.integers(3, size=rows)]
    view = Sequences(ids, offsets_of(lengths))
    return Examples((view,), Votes(votes, np.ones(rows)), battles=rows)


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
            inputs = {name: batch[name][:, 0] for name in ("input_ids", "attention_mask")}
            logits = model(**inputs, use_cache=False).logits
            if training:
                torch.nn.functional.cross_entropy(logits, batch["votes"]).backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--longest", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=1000,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_labels=3,
            pad_token_id=0,
        )
    )
    examples = made_up(arguments.rows, arguments.longest)
    order = list(ByLength(examples.lengths, batch_size=STEP, processes=1, seed=0, epoch=lambda: 0))
    at_random = np.random.default_rng(1).permutation(len(examples)).tolist()
    scored = token_batches(examples.lengths, 16 * arguments.longest)

    def timed(batches: Iterable[dict[str, Any]], training: bool) -> float:
        return cpu(partial(run, model, batches, training))

    together = [collator(0)([examples[int(i)] for i in rows]) for rows in scored]
    seconds = by_turns(
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
            ratio(epoch, seconds, "by tokens", "8 at random"),
            ratio(epoch, seconds, "by tokens", "8 of like length"),
            ratio("scoring", seconds, "scored by tokens", "scored, 8 in the file's order"),
        ],
    )


if __name__ == "__main__":
    main()
