"""Scores by slice: which battles a slice has, and that its figures are those of these battles alone."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_run import MadeUpRun, made_up_run
from rich.console import Console

from arena_distill.battles.votes import votes_of
from arena_distill.evaluation import slices as module
from arena_distill.evaluation.out_of_fold import Run
from arena_distill.evaluation.report import render_report
from arena_distill.evaluation.slices import OTHER, SLICE_COLUMNS, UNKNOWN, slices_of
from arena_distill.evaluation.terminal import print_table
from arena_distill.files.artifacts import provenance, read_parquet, write_parquet
from arena_distill.metrics import (
    calibration_error,
    mean_interval,
    mean_over_views,
    paired_difference,
    reliability,
    scores,
)
from arena_distill.verdicts import Votes

NAMES = st.one_of(st.none(), st.sampled_from(["m", "n", "o", OTHER, UNKNOWN, ""]))


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FEWEST", 3)


def found(rows: list[tuple[str | None, ...]]) -> dict[tuple[str, str], list[int]]:
    columns = zip(*rows, strict=True) if rows else [()] * 4
    table = pa.table([pa.array(c, pa.string()) for c in columns], list(module.SLICED))
    return {(by, name): mine.tolist() for by, name, mine in slices_of(table)}


def slowly(rows: list[tuple[str | None, ...]]) -> dict[tuple[str, str], list[int]]:
    """The rule as it is written, battle by battle."""
    expected: dict[tuple[str, str], list[int]] = {}
    for by, places in (("language", (0,)), ("category", (1,)), ("model", (2, 3))):
        named = [{UNKNOWN if row[i] is None else str(row[i]) for i in places} for row in rows]
        kept = {n for n in set().union(*named) if sum(n in names for names in named) >= 3}
        parts: dict[str, list[int]] = {}
        for number, names in enumerate(named):
            for name in {n if n in kept else OTHER for n in names}:
                parts.setdefault(name, []).append(number)
        if set(parts) - {OTHER, UNKNOWN}:
            expected |= {(by, name): mine for name, mine in parts.items()}
    return expected


@given(st.lists(st.tuples(NAMES, NAMES, NAMES, NAMES), max_size=20))
def test_a_slice_has_the_battles_of_its_name(rows: list[tuple[str | None, ...]]) -> None:
    assert found(rows) == slowly(rows)


def test_the_largest_slice_is_first_and_what_is_pooled_last() -> None:
    languages = [*["de"] * 3, *["en"] * 4, "fr", "it", *[None] * 9]
    names = [name for _, name in found([(name, None, None, None) for name in languages])]
    assert names == ["en", "de", UNKNOWN, OTHER]


def test_the_interval_of_a_mean_is_that_of_a_difference_from_nothing() -> None:
    rng = np.random.default_rng(0)
    values, groups = rng.random(50), rng.integers(0, 9, 50)
    votes = Votes(np.eye(3)[rng.integers(0, 3, 50)], rng.random(50) + 0.5)
    paired = paired_difference(values, np.zeros(50), votes, groups)
    assert mean_interval(values, votes, groups) == tuple(paired.values())


# --- a run ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> MadeUpRun:
    """A run in three languages, one of them rare, with rows in two categories."""
    run = made_up_run(tmp_path_factory.mktemp("run"))
    table = read_parquet(run.folder / "battles.parquet")
    language = ["rare" if i % 60 == 7 else "[bold]en" if i % 3 else None for i in range(len(table))]
    category = [f"c{i % 2}" for i in range(len(table))]
    for name, values in (("language", language), ("category", category)):
        at = table.column_names.index(name)
        table = table.set_column(at, name, pa.array(values, pa.string()))
    write_parquet(table, run.folder / "battles.parquet", provenance("edited", {}))
    return run


@pytest.fixture
def metrics(run: MadeUpRun) -> dict[str, Any]:
    return json.loads(run.evaluate().read_text())


def test_figures_of_a_slice_are_those_of_its_battles(
    run: MadeUpRun, metrics: dict[str, Any]
) -> None:
    data = Run.read(run.folder / "folds.parquet", run.folder / "battles.parquet")
    seen = mean_over_views(data.judge_logits("small", run.logits["small"]))
    names = data.names_of(data.keys()).to_pydict()
    by = {(record["by"], record["slice"]): record for record in metrics["slices"]}
    assert set(by) == {
        *(("language", name) for name in ("[bold]en", UNKNOWN, OTHER)),
        *(("category", name) for name in ("c0", "c1")),
        *(("model", name) for name in ("x", "y")),
    }
    for (kind, name), record in by.items():
        if kind == "model":
            assert record["rows"] == metrics["rows"], "every battle is between these two"
            assert record["log_loss"] == metrics["judges"]["small"]["oof"]["log_loss"]
            assert record["length"] == metrics["baselines"]["length"]["log_loss"]
            continue
        wanted = {UNKNOWN: None, OTHER: "rare"}.get(name, name)
        mine = np.array([value == wanted for value in names[kind]])
        votes = votes_of(data.folds)[data.validation][mine]
        expected = scores(seen[mine], votes)
        assert {k: record[k] for k in expected} == pytest.approx(expected)
        assert record["ece"] == pytest.approx(calibration_error(reliability(seen[mine], votes)))
        assert record["low"] < record["log_loss"] < record["high"]
        assert record["accuracy_low"] <= record["accuracy"] <= record["accuracy_high"]


def test_slices_of_test_battles_are_of_what_is_submitted(
    run: MadeUpRun, metrics: dict[str, Any]
) -> None:
    test = metrics["test"]
    best = test["models"]["gptq"][test["submitted"]["variant"]]
    whole = [record for record in test["slices"] if record["by"] == "model"]
    for record in whole:
        assert {k: record[k] for k in best} == best
        assert record["class_prior"] == test["baselines"]["class_prior"]["log_loss"]
        assert record["bayes"] == test["baselines"]["bayes"]["log_loss"]
    assert sum(r["rows"] for r in test["slices"] if r["by"] == "category") == test["rows"]


def test_slices_are_a_table_and_part_of_the_report(
    run: MadeUpRun, metrics: dict[str, Any], tmp_path: Path
) -> None:
    flat = pd.read_csv(run.folder / "tables" / "slices.csv")
    assert tuple(flat.columns) == SLICE_COLUMNS
    assert len(flat) == len(metrics["slices"]) + len(metrics["test"]["slices"])
    render_report(run.folder / "metrics.json", tmp_path / "report.html")
    assert "[bold]en" in (tmp_path / "report.html").read_text()
    assert len(pd.read_csv(tmp_path / "report" / "slices.csv")) == len(flat)


def test_the_terminal_shows_slices_of_test_battles_else_out_of_fold(
    run: MadeUpRun, metrics: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown(figures: dict[str, Any]) -> str:
        console = Console(width=80, record=True, file=io.StringIO())
        print_table(figures, console)
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= 80
        return text

    text = shown(metrics)
    assert "small: by slice, test" in text
    assert "[bold]en" in text, "a name is data"
    assert f"{metrics['test']['slices'][0]['log_loss']:.4f}" in text
    assert "by slice, out of fold" in shown(json.loads(run.evaluate(test=False).read_text()))
    monkeypatch.setattr(module, "FEWEST", 1000)
    assert "by slice" not in shown(json.loads(run.evaluate().read_text()))
