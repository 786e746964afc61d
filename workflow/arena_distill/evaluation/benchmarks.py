"""Ask a judge which of two answers is better, where that is known: the accuracy on public benchmarks.

Such benchmarks (LLMBar, JudgeBench, RM-Bench, RewardBench, PPE) count how often a judge prefers the answer
that is right. A judge of two orders is also counted in each alone, and in both: a verdict that depends on
which answer is read first is luck.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from arena_distill.battles.parts import read_parts
from arena_distill.battles.prompts import number_digests, prompt_digests
from arena_distill.battles.votes import votes_of
from arena_distill.config.source import Source
from arena_distill.errors import InputError
from arena_distill.files.artifacts import read_parquet, write_json
from arena_distill.judging.card import add_to_card
from arena_distill.judging.verdicts import Verdicts
from arena_distill.metrics import Figures, share_interval
from arena_distill.verdicts import ORDERS, Order, Votes

ALL = "all"

BENCHMARK_COLUMNS = (
    *("benchmark", "subset", "battles", "ties", "accuracy", "low", "high"),
    *(*ORDERS, "consistent", "known"),
)

Ask = Callable[[pa.Table], Verdicts]


def benchmark(
    ask: Ask, benchmarks: Mapping[str, Sequence[Source]], learned: pa.ChunkedArray | None = None
) -> list[Figures]:
    """Score a judge on benchmarks.

    Args:
        ask: battles with `id`, `prompt`, `response_a`, `response_b` → verdicts.
        benchmarks: the files of each, by its name.
        learned: prompts (list<string>) of battles that the judge learned.

    Returns:
        Per benchmark one record per subset (its `category`, or else its file) and, of more than one, one of
        `ALL` its battles: `benchmark`, `subset`; `battles`, and `ties` that were left out; `accuracy` with
        its 95 % interval by prompt (`low`, `high`), where equal chances count half; `orders`, the
        accuracy from each order alone; `consistent`, right in every order; `known`, battles whose prompt
        the judge learned (null without `learned`).

    Raises:
        InputError: a file cannot be read, or has no battle with a winner.
    """
    known = None if learned is None else prompt_digests(learned)
    return [
        record
        for name, sources in benchmarks.items()
        for record in _scores(ask, name, sources, known)
    ]


def _scores(
    ask: Ask, name: str, sources: Sequence[Source], learned: pa.ChunkedArray | None
) -> Iterator[Figures]:
    """The records of one benchmark; `learned`: digests of the prompts."""
    battles, subsets = _read(sources)
    votes = votes_of(battles)
    lead = votes.probabilities[:, 0] - votes.probabilities[:, 1]
    won = np.flatnonzero(lead)
    if not len(won):
        raise InputError(f"{sources[0].path}: no battle has a winner: nothing to count")
    verdicts = ask(battles.take(pa.array(won)).select(["id", "prompt", "response_a", "response_b"]))
    better = np.sign(lead[won])
    right = _right(verdicts.probabilities, better)
    each = np.stack([_right(verdicts.by_order[:, i], better) for i in range(len(verdicts.orders))])
    prompts = prompt_digests(battles["prompt"])
    if learned is not None:
        prompts = pa.chunked_array([*prompts.chunks, *learned.chunks])
    groups = number_digests([prompts])
    known = None if learned is None else np.isin(groups[won], groups[len(battles) :])

    def record(subset: str, rows: np.ndarray) -> Figures:
        """Args: rows: bool (battles,)."""
        mine = rows[won]
        cast: Votes = votes[won[mine]]
        accuracy, low, high = share_interval(right[mine], cast, groups[won[mine]])
        orders: dict[Order, float] = {
            order: float(cast.mean(each[i, mine])) for i, order in enumerate(verdicts.orders)
        }
        return {
            "benchmark": name,
            "subset": subset,
            "battles": int(mine.sum()),
            "ties": int(rows.sum() - mine.sum()),
            "accuracy": accuracy,
            "low": low,
            "high": high,
            "orders": orders,
            "consistent": float(cast.mean((each[:, mine] == 1).all(axis=0))),
            "known": None if known is None else int(known[mine].sum()),
        }

    found = [s for s in dict.fromkeys(subsets.tolist()) if (subsets[won] == s).any()]
    if len(found) > 1:
        yield from (record(subset, subsets == subset) for subset in found)
    yield record(ALL, np.ones(len(battles), np.bool_))


def _read(sources: Sequence[Source]) -> tuple[pa.Table, np.ndarray]:
    """The battles of files, and the subset of each: str (rows,)."""
    tables, subsets = [], []
    for part in read_parts({"extra": sources}):
        for table in part.kept("class", "extra"):
            names = table["category"].fill_null(part.path.name.partition(".")[0])
            tables.append(table)
            subsets.append(names.to_numpy())
    if not tables:
        raise InputError(f"{sources[0].path}: no battle could be read: see arena-distill formats")
    return pa.concat_tables(tables), np.concatenate(subsets)


def _right(probabilities: np.ndarray, better: np.ndarray) -> np.ndarray:
    """1 where the better answer has the greater chance, ½ where both have the same: float64 (rows,).

    Args:
        probabilities: float (rows, classes), A first, then B.
        better: float (rows,), 1: A; -1: B.
    """
    prefers = np.sign(probabilities[:, 0] - probabilities[:, 1])
    return np.asarray((1 + prefers * better) / 2)


def learned_prompts(battles: Path) -> pa.ChunkedArray:
    """The prompts of a run's battles.parquet that it learned something from: all but those of `test`.

    Raises:
        InputError: it cannot be read.
    """
    table = read_parquet(battles, ["source", "prompt"])
    return table.filter(pc.not_equal(table["source"], "test"))["prompt"]


def write_benchmarks(
    ask: Ask, benchmarks: Mapping[str, Sequence[Source]], battles: Path, output: Path, judge: Path
) -> None:
    """Score a judge on benchmarks → JSON, the records of :func:`benchmark`, and a table in its card.

    Args:
        battles: the run's battles.parquet, whose prompts the judge learned.
        judge: its folder.
    """
    records = benchmark(ask, benchmarks, learned_prompts(battles))
    add_to_card(judge, "Benchmarks", _as_markdown(records))
    write_json(records, output)
    whole = (record for record in records if record["subset"] == ALL)
    told = ", ".join(f"{record['benchmark']} {record['accuracy']:.1%}" for record in whole)
    print(f"{output}: right answers: {told}")


def _as_markdown(records: Sequence[Figures]) -> str:
    rows = [
        f"| {r['benchmark']} | {r['subset']} | {r['battles']:,} | {r['accuracy']:.1%}"
        + ("" if r["low"] is None else f" ({r['low']:.1%} to {r['high']:.1%})")
        + f" | {r['known']:,} |"
        for r in records
    ]
    return "\n".join(
        [
            "How often the better answer of a benchmark has the greater probability; 95 % intervals over "
            "prompts. Known: battles\nwhose prompt the judge learned.\n",
            "| benchmark | subset | battles | accuracy | known |",
            "|---|---|---|---|---|",
            *rows,
        ]
    )


def print_benchmarks(records: Sequence[Figures], console: Console | None = None) -> None:
    """Print what :func:`benchmark` found, in eighty columns."""
    orders = list(records[0]["orders"])
    both = [*orders, "in both"] if len(orders) > 1 else []
    known = ["known"] if records[0]["known"] is not None else []
    table = Table("benchmark", "subset")
    for title in ("battles", "accuracy", *both, *known):
        table.add_column(title, justify="right")
    for record in records:
        half = "" if record["low"] is None else f" ±{(record['high'] - record['low']) / 2:.1%}"
        shares = [*record["orders"].values(), record["consistent"]] if both else []
        table.add_row(
            record["benchmark"],
            record["subset"],
            f"{record['battles']:,}",
            f"{record['accuracy']:.1%}{half}",
            *(f"{share:.1%}" for share in shares),
            *(f"{record[name]:,}" for name in known),
        )
    (console or Console()).print(table)
