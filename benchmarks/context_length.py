"""Compare `encoding.tokens_per_battle` with one fixed length, and with two other ways to spend a budget.

    python benchmarks/context_length.py TOKENIZER_FOLDER BATTLES.csv [--budgets 192 256 384]

Each line is a rule: mean and greatest length of a sequence, share of battles that are cut, share of all
tokens that are lost, mean share that a battle keeps, and the cost of attention (mean square) relative to
`tokens_per_battle`. `root` and `share` spend the same budget differently: `root` gives lengths that grow
with the square root of a battle's size, `share` keeps the same share of every battle.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from tokenized import tokenized

from arena_distill.config.judge import Encoding
from arena_distill.encoding.truncation import length_budget
from arena_distill.encoding.views import encode

WHOLE = 10**7
"""Longer than any battle."""

RULES: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "root": lambda size, c: np.minimum(size, np.sqrt(size * c)),
    "share": lambda size, c: np.minimum(size, size * c / WHOLE),
}


def spend(
    rule: Callable[[np.ndarray, float], np.ndarray], size: np.ndarray, mean: float
) -> np.ndarray:
    """A rule's lengths with the given mean, by bisection on the rule's parameter."""
    low, high = 0.0, float(WHOLE)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if rule(size, middle).mean() <= mean else (low, middle)
    return rule(size, low)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("battles", type=Path)
    parser.add_argument("--budgets", type=int, nargs="+", default=[192, 256, 384])
    parser.add_argument("--truncation", choices=["rounds", "winners"], default="rounds")
    parser.add_argument("--view", choices=["AB", "A"], default="AB")
    arguments = parser.parse_args()
    view: Literal["AB", "A"] = arguments.view
    tokens = tokenized(arguments.tokenizer, arguments.battles)
    whole = Encoding(truncation=arguments.truncation)
    size = encode(tokens, whole, view, WHOLE).lengths
    print(f"sizes: mean {size.mean():.0f}, median {np.median(size):.0f}, longest {size.max()}")
    print(f"{'':28}{'mean':>7}{'longest':>9}{'cut':>8}{'lost':>8}{'kept':>8}{'squares':>9}")
    for budget in arguments.budgets:
        encoding = whole.model_copy(update={"tokens_per_battle": budget})
        line = length_budget(tokens, encoding, view, WHOLE)
        kept = encode(tokens, whole, view, line).lengths
        lengths = {
            f"max_length {budget}": encode(tokens, whole, view, budget).lengths,
            f"tokens_per_battle {budget}": kept,
            **{name: spend(rule, size, kept.mean()) for name, rule in RULES.items()},
        }
        for name, length in lengths.items():
            # A loss of at most one token does not count as a cut.
            cut, lost = (length < size - 1).mean(), 1 - length.sum() / size.sum()
            squares = (length.astype(float) ** 2).mean() / (kept.astype(float) ** 2).mean()
            share = (length / size).mean()
            print(
                f"{name:28}{length.mean():7.0f}{length.max():9.0f}{cut:8.1%}{lost:8.1%}{share:8.1%}"
                f"{squares:9.2f}"
            )


if __name__ == "__main__":
    main()
