"""Estimate how many battles jobs read, and their lengths.

They are counted and measured if the run has its battles, folds and tokens; until then they are
assumptions of the configuration's section ``plan``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arena_distill.battles.folds import fold_rows, training_rows
from arena_distill.config.encoding import Encoding
from arena_distill.config.head import Head
from arena_distill.config.phases.scoring import LogitsSettings
from arena_distill.config.plan import Plan
from arena_distill.config.run import Config
from arena_distill.encoding.sequences import Tokens, read_tokens
from arena_distill.encoding.views import encode, views
from arena_distill.files.artifacts import read_parquet


@dataclass(frozen=True)
class Work:
    """The sequences that a job reads.

    tokens: of all sequences.
    squares: the sum of the squared lengths.
    longest: tokens of the longest sequence.
    """

    sequences: float = 0.0
    tokens: float = 0.0
    squares: float = 0.0
    longest: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.sequences + other.sequences,
            self.tokens + other.tokens,
            self.squares + other.squares,
            max(self.longest, other.longest),
        )

    def __mul__(self, times: float) -> Work:
        return Work(self.sequences * times, self.tokens * times, self.squares * times, self.longest)


class Battles:
    """The number and lengths of battles that jobs read: counted if the run has them, else assumed.

    Args:
        config: with the judges of studies.
        run: the run's folder, which may be empty or missing.
    """

    def __init__(self, config: Config, run: Path) -> None:
        self.config = config
        self.run = run
        self.folds = _if_there(run / "folds.parquet", read_parquet)
        self.counted = _if_there(run / "battles.parquet", _count_sources)
        self.counts = self.counted or self._assumed_counts()
        self._tokens: dict[str, Tokens | None] = {}
        self.measured = True
        """Whether all lengths so far were measured on existing tokens."""
        self._mean: dict[tuple[Any, ...], Work] = {}

    def _assumed_counts(self) -> dict[str, int]:
        given: Any = self.config.data.arena or self.config.plan.battles
        return {source: getattr(given, source) for source in self.config.data.sources()}

    def training(self, judge: str, fold: int) -> dict[str, float]:
        """Training battles of a judge's fold, by source."""
        node = self.config.judges[judge]
        unlabelled = self.config.learns_unlabelled(judge)
        if self.folds is not None:
            rows = training_rows(self.folds, fold, unlabelled=unlabelled)
            found: dict[str, float] = _sources(self.folds.take(rows))
        else:
            found = {"train": self._in_folds() * (1 - 1 / self.config.folds.n)}
            found |= {"extra": self.counts.get("extra", 0)}
            if unlabelled:
                found["unlabelled"] = self.counts["unlabelled"]
        return {source: count * node.training.share for source, count in found.items()}

    def scored(self, judge: str, fold: int) -> dict[str, float]:
        """Battles that a judge's fold scores, by source."""
        settings = LogitsSettings.of(self.config, judge)
        if self.folds is not None:
            return _sources(fold_rows(self.folds, fold, settings))
        own = self._in_folds() / self.config.folds.n
        found = {"train": self._in_folds() if "training" in settings.rows else own}
        if {"training", "extra"} & set(settings.rows):
            found["extra"] = self.counts.get("extra", 0)
        if "unlabelled" in settings.rows:
            found["unlabelled"] = self.counts["unlabelled"]
        return found

    def held_out(self) -> dict[str, float]:
        """Held-out battles, by source."""
        return {"train": self.counts["train"] * self.config.folds.holdout}

    def for_choices(self) -> dict[str, float]:
        """Battles that choices are made by, by source."""
        return {"train": self.counts["train"] * self.config.folds.choices}

    def _in_folds(self) -> float:
        folds = self.config.folds
        return self.counts["train"] * (1 - folds.holdout - folds.choices)

    def work(
        self, judge: str, battles: dict[str, float], shown: int, max_length: int | None = None
    ) -> Work:
        """The sequences of `battles` (by source), with `shown` sequences per battle."""
        total = Work()
        for source, count in battles.items():
            if count:
                total += self._of_one(source, judge, max_length) * (count * shown)
        return total

    def _of_one(self, source: str, judge: str, max_length: int | None) -> Work:
        """The mean sequence of a source."""
        node, tokenizer = self.config.judges[judge], self.config.tokenizer_name(judge)
        head = self.config.head_of(judge)
        what = node.encoding, head, max_length or node.encoding.max_length
        if tokenizer not in self._tokens:
            path = self.run / "tokens" / tokenizer / "battles.parquet"
            self._tokens[tokenizer] = _if_there(path, read_tokens)
        tokens = self._tokens[tokenizer]
        if tokens is None:
            self.measured = False
            return assumed_sequence(self.config.plan, *what)
        if (source, tokenizer, *what) not in self._mean:
            self._mean[source, tokenizer, *what] = _measured_sequence(tokens, source, *what)
        return self._mean[source, tokenizer, *what]


def assumed_sequence(plan: Plan, encoding: Encoding, head: Head, max_length: int) -> Work:
    """The mean sequence if lengths are log-normal and cut at `max_length`."""
    mean = plan.tokens_per_battle * (plan.one_answer if head.kind == "pointwise" else 1)
    normal = NormalDist(math.log(mean) - plan.tokens_spread**2 / 2, plan.tokens_spread)
    if encoding.tokens_per_battle is not None:
        # All are cut at the length that gives this average.
        while max_length > 32 and _moment(normal, 1, max_length) > encoding.tokens_per_battle:
            max_length -= 1
    return Work(1, _moment(normal, 1, max_length), _moment(normal, 2, max_length), max_length)


def _moment(normal: NormalDist, power: int, limit: int) -> float:
    """E[min(X, limit)^power] of a log-normal X, whose logarithm is `normal`."""
    mu, sigma, end = normal.mean, normal.stdev, math.log(limit)
    below = math.exp(power * mu + (power * sigma) ** 2 / 2)
    below *= NormalDist(mu + power * sigma**2, sigma).cdf(end)
    return below + limit**power * (1 - normal.cdf(end))


def _measured_sequence(
    tokens: Tokens, source: str, encoding: Encoding, head: Head, max_length: int
) -> Work:
    rows = pc.equal(tokens.sources, source).to_numpy(zero_copy_only=False)
    some = tokens.take(np.flatnonzero(rows))
    if not len(some):
        return Work()
    if some.fields["response_a"].name is None:  # of a run before the key was set
        encoding = encoding.model_copy(update={"privileged": ()})
    seen = views(head)[: 2 if head.kind == "pointwise" else 1]  # both orders are equally long
    lengths = np.concatenate([encode(some, encoding, v, max_length).lengths for v in seen])
    squares = float(np.mean(lengths.astype(np.float64) ** 2))
    return Work(1, float(lengths.mean()), squares, int(lengths.max()))


def _if_there(path: Path, read: Callable[[Path], Any]) -> Any:
    return read(path) if path.exists() else None


def _count_sources(path: Path) -> dict[str, int]:
    return {name: int(n) for name, n in _sources(read_parquet(path, ["source"])).items()}


def _sources(table: pa.Table) -> dict[str, float]:
    counts = pc.value_counts(table["source"].cast(pa.string()).combine_chunks())
    return {str(pair["values"]): pair["counts"].as_py() for pair in counts}
