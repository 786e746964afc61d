"""Tables for people hold no formulas; the submission holds the ids as they are."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from arena_distill.battles.votes import vote_columns
from arena_distill.files.artifacts import write_parquet
from arena_distill.files.tables import FORMULA, guarded, table_csv
from arena_distill.prediction.submission import write_submission
from arena_distill.verdicts import WINNERS, Votes

FORMULAS = ["=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\t=1", " =1", "＝1", "\r=1"]


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_is_a_text(text: str) -> None:
    assert guarded(text) == f"'{text}"
    cell = f"'{text}".replace("\r", "\n")
    assert rows(table_csv([{"id": text, text.strip(): 1}]))[0]["id"] == cell
    assert table_csv([{text.strip(): 1}]).startswith(("'", "\"'"))


@pytest.mark.parametrize("text", ["", "a=b", "x-1", "-1.5", "+3", "-1e-05", "‘-‘", "é"])
def test_other_texts_and_numbers_stay(text: str) -> None:
    assert guarded(text) == text


def test_numbers_and_gaps() -> None:
    records: list[dict[str, Any]] = [
        {"a": -1, "b": np.float64(-0.1), "c": None},
        {"b": float("nan"), "d": True},
    ]
    assert table_csv(records) == "a,b,c,d\n-1,-0.1,,\n,,,True\n"
    assert table_csv(records, ["d", "a"]) == "d,a\n,-1\nTrue,\n"
    assert table_csv([], ["a", "b"]) == "a,b\n"


@given(st.lists(st.fixed_dictionaries({"id": st.text(), "prompt": st.text()}), min_size=1))
def test_no_text_begins_a_formula(records: list[dict[str, str]]) -> None:
    for record, row in zip(records, rows(table_csv(records)), strict=True):
        for name, cell in row.items():
            text = record[name].replace("\r\n", "\n").replace("\r", "\n")
            assert cell in (text, f"'{text}")
            assert not cell.startswith(FORMULA) or np.isreal(float(cell))


def test_the_submission_has_the_ids_as_they_are(tmp_path: Path) -> None:
    formulas = [text for text in FORMULAS if "\r" not in text]
    ids, third = pa.array(formulas), pa.array([1 / 3] * len(formulas))
    submitted = pa.array([True] * len(formulas))
    predictions = pa.table({"id": ids, **dict.fromkeys(WINNERS, third), "submitted": submitted})
    write_parquet(predictions, tmp_path / "p.parquet", {})
    source = pa.repeat("test", len(formulas))
    votes = vote_columns(Votes(np.zeros((len(formulas), 3)), np.ones(len(formulas))))
    write_parquet(pa.table({"id": ids, "source": source, **votes}), tmp_path / "b.parquet", {})
    write_submission(*(tmp_path / name for name in ("p.parquet", "b.parquet", "s.csv")))
    written = rows((tmp_path / "s.csv").read_bytes().decode())
    assert [row["id"] for row in written] == formulas


def test_only_tables_are_written_as_csv() -> None:
    """Beside them what programs read: the submission, predictions, and the simulated battles."""
    package = ROOT / "workflow/arena_distill"
    writers = re.compile(r"to_csv|csv\.(writer|DictWriter)|write_csv\(")
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if writers.search(path.read_text())
    }
    assert found == {
        "files/tables.py",
        "prediction/submission.py",
        "judging/predict.py",
        "battles/simulation.py",
    }
