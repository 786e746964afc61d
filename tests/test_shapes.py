"""Every published shape of preferences: how a row is read, and what becomes of a damaged one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from test_formats import PREFERRED, PUBLISHED, VOTED, of_annotators, understood, write

from arena_distill.battles.reading import read_battles
from arena_distill.files.raw_tables import KEPT_AS_RAW_TEXT

Row = dict[str, Any]

SCORED = [
    {"response": text, "model": "m", "fine-grained_score": s} for text, s in (("x", 4), ("y", 2))
]
RANKED = [{"answer": text, "model": "m", "rank": rank} for rank, text in enumerate("xyz", 1)]
LISTS = {
    "id": 5,
    "prompt": "q",
    "chosen": ["a", "b", "c"],
    "rejected": ["d", "e", "f"],
    "subset": "chat",
}
STEER2 = {"prompt": "q", "response_1": "x", "response_2": "y", "preference_strength": 2}
WITHOUT_VOTE: dict[str, Row] = {
    "kaggle": {"winner_model_b": 0},
    "pku-saferlhf": {"better_response_id": None},
    "llmbar": {"label": None},
    "judgebench": {"label": None},
    "compar-ia": {"chosen_model_name": None},
    "compar-ia-equal": {"both_equal": False},
}
SHAPES: dict[str, tuple[Row, Row, Row]] = {
    # name → a row as published, what changes in a damaged one, how it is read
    **{name: (VOTED[name][1], WITHOUT_VOTE.get(name, {"winner": None}), {}) for name in VOTED},
    "helpsteer2": (STEER2, {"preference_strength": None}, {}),
    "helpsteer3": (of_annotators(-2, 1), {"overall_preference": None}, {}),
    "helpsteer3, `annotators: merge`": (
        of_annotators(-2, 1), {"individual_preference": [{"score": 9}]}, {"annotators": "merge"},
    ),
    **{name: (row, {"rejected": None}, {}) for name, (row, *_) in PREFERRED.items()},
    "ultrafeedback": (
        {"instruction": "q", "completions": SCORED}, {"completions": SCORED[:1]}, {},
    ),
    "nectar": ({"prompt": "\n\nHuman: q\n\nAssistant: ", "answers": RANKED}, {"answers": RANKED[:1]}, {}),
    "reward-bench-2": (LISTS | {"chosen": ["a"]}, {"rejected": []}, {}),
    "rm-bench": (LISTS, {"rejected": []}, {}),
}  # fmt: skip


def line(folder: Path, name: str) -> str:
    """The line of the table: what was found in a file of a good row and a damaged one."""
    row, damage, keys = SHAPES[name]
    found, raw = understood(folder / "t.jsonl", [row, row | damage], **keys)
    assert raw.faults.found.keys() == {1}
    good = found.row == 0
    told = "refused: `{}`: {}".format(*raw.faults.found[1])
    vote = found.vote[good]
    assert vote.sum(axis=1) == pytest.approx(1)
    shown = " ".join(f"{share:.2f}".rstrip("0").rstrip(".") for share in vote[0])
    # Sides are dealt by a hash: which answer is A says nothing.
    read = (
        shown if found.format in ("battles", "conversations", "graded") else "by the better answer"
    )
    _, _, rows, battles = PUBLISHED.get(name, (None, None, 0, 0))
    real = f"{rows:,} → {battles:,}" if rows else ""
    cells = [name, f"`{found.format}`", str(good.sum()), read, real, told]
    return f"| {' | '.join(cells)} |"


TEXTS = (
    "prompt",
    "response_a",
    "response_b",
    "conversation_a",
    "conversation_b",
    "chosen",
    "rejected",
)


def without_a_text(row: Row, names: dict[str, str]) -> dict[str, Row]:
    """By what is changed: the row with null instead of one of its texts."""
    found = {column: row | {column: None} for name, column in names.items() if name in TEXTS}
    for column, key in (("completions", "response"), ("answers", "answer")):
        if column in row:
            first, *others = row[column]
            found[column] = row | {column: [first | {key: None}, *others[:1]]}
    if isinstance(row.get("chosen"), list) and isinstance(row["chosen"][0], str):
        found["an answer of several"] = row | {"chosen": [None, *row["chosen"]]}
    return found


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_missing_text_is_no_empty_one(name: str, suffix: str, tmp_path: Path) -> None:
    row, _, keys = SHAPES[name]
    found, _ = understood(tmp_path / "t.jsonl", [row], **keys)
    damaged = without_a_text(row, found.names)
    assert len(damaged) >= 2
    whole = isinstance(row.get("chosen"), list) and found.format == "chosen_rejected"
    for what, other in damaged.items():
        _, raw = understood(tmp_path / f"t.{suffix}", [row, other], **keys)
        needless = whole and what == "prompt" and len(row["chosen"]) > 1  # a conversation asks
        assert raw.faults.found.keys() == (set() if needless else {1}), what
        if found.names.items() & {(name, what) for name in TEXTS} and raw.faults.found:
            column, reason = raw.faults.found[1]
            of_lists = "chosen and rejected are not both lists of texts"
            assert reason in ('missing; an empty text is written as ""', of_lists), what
            assert column == what or reason == of_lists


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_an_empty_text_is_one_and_a_test_battle_keeps_what_it_has(
    suffix: str, tmp_path: Path
) -> None:
    row = {"id": "0", "prompt": "q", "response_a": "x", "response_b": ""}
    rows = [row, {**row, "id": "1", "response_b": None}]
    read, rejected = read_battles({"test": [write(tmp_path / f"t.{suffix}", rows)]})
    assert read["response_b"].to_pylist() == [[""], [""]]
    assert rejected["row"].to_pylist() == [2]
    assert rejected["reason"][0].as_py().startswith(f"{KEPT_AS_RAW_TEXT}missing; an empty text")


def test_the_table_of_shapes_is_what_is_read(tmp_path: Path) -> None:
    page = ROOT / "docs" / "data.md"
    head = "| set | format | battles of a row | vote (A, B, tie) | real rows → battles | a damaged row |"
    table = [head, "|---|---|---|---|---|---|", *(line(tmp_path, name) for name in SHAPES)]
    before, _, rest = page.read_text().partition("<!-- shapes -->\n")
    written, _, after = rest.partition("<!-- /shapes -->\n")
    if os.environ.get("ARENA_WRITE_SHAPES"):
        lines = "\n".join(table)
        page.write_text(f"{before}<!-- shapes -->\n{lines}\n<!-- /shapes -->\n{after}")
    else:
        assert written.splitlines() == table


def test_every_format_and_every_file_that_was_read_is_in_the_table() -> None:
    from arena_distill.battles.formats.conversion import FORMATS

    assert PUBLISHED.keys() <= SHAPES.keys()
    written = (ROOT / "docs" / "data.md").read_text()
    table = written.partition("<!-- shapes -->")[2].partition("<!-- /shapes -->")[0]
    assert {name for name in FORMATS if f"| `{name}` |" in table} == set(FORMATS)
