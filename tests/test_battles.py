"""Reading battles: allowed cells, rejected rows and their reasons, on invented and on real files."""

from __future__ import annotations

import csv
import gzip
import json
import math
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from arena_distill.battles.parts import SCHEMA
from arena_distill.battles.reading import REJECTED_SCHEMA, read_battles, write_battles
from arena_distill.battles.solution import read_solution, write_test_votes
from arena_distill.battles.votes import Solution
from arena_distill.config.phases.battles import BattlesSettings, SolutionSettings
from arena_distill.config.source import SOURCES, Source
from arena_distill.errors import InputError
from arena_distill.files.artifacts import read_json, read_parquet, read_provenance
from arena_distill.files.keys import key
from arena_distill.verdicts import NO_VOTE

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real battles in {DATA}")

Row = dict[str, Any]


def battle(id: Any = 1, **cells: Any) -> Row:
    """A row of the Kaggle schema, won by A."""
    row = {"id": id, "model_a": "x", "model_b": "y"}
    row |= {"prompt": '["q"]', "response_a": '["a"]', "response_b": '["b"]'}
    row |= {"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}
    return row | cells


def without(row: Row, *names: str) -> Row:
    return {name: cell for name, cell in row.items() if name not in names}


def write_csv(path: Path, rows: list[Row]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, source: str = "train", **keys: Any) -> tuple[list[Row], list[Row]]:
    battles, rejected = read_battles({source: [Source(path=str(path), **keys)]})
    assert battles.schema == SCHEMA
    assert rejected.schema == REJECTED_SCHEMA
    battles.validate(full=True)
    return battles.to_pylist(), rejected.to_pylist()


def labels(battles: list[Row]) -> list[int]:
    return [row["vote"].index(1) if row["vote"] else NO_VOTE for row in battles]


def write(files: dict[str, Any], folder: Path, max_refused: float = 1) -> None:
    """`write_battles` into battles.parquet, rejected.parquet and reading.json of a folder."""
    names = ("battles.parquet", "rejected.parquet", "reading.json")
    paths = (folder / name for name in names)
    write_battles(files, *paths, BattlesSettings(version=1, max_refused=max_refused))


def as_stored(text: str) -> str:
    """A text as it is stored: surrogate pairs joined, lone surrogates replaced."""
    joined = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
    return re.sub("[\ud800-\udfff]", "\ufffd", joined)


any_text = st.text(st.characters(exclude_categories=())) | st.text('\ud83d\ude00\x00"[,]\\\r\n a')
turns = st.lists(any_text | st.none() | st.booleans() | st.integers() | st.floats(), max_size=4)


def turn_text(turn: Any) -> str:
    if isinstance(turn, str):
        return as_stored(turn)
    missing = turn is None or (isinstance(turn, float) and not math.isfinite(turn))
    return "" if missing else json.dumps(turn)


# --- cells ----------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(turns, turns, turns), min_size=1, max_size=5))
@example([(["\ud83d"], ["\x00", None, True], [])])
def test_any_turns_survive_csv_and_json_lines(
    tmp_path_factory: pytest.TempPathFactory, texts: list[tuple[list[Any], ...]]
) -> None:
    folder = tmp_path_factory.mktemp("turns")
    names = ("prompt", "response_a", "response_b")
    lists = [battle(i, **dict(zip(names, row, strict=True))) for i, row in enumerate(texts)]
    cells = [row | {name: json.dumps(row[name]) for name in names} for row in lists]
    expected = [[[turn_text(turn) for turn in cell] for cell in row] for row in texts]
    for path in (
        write_csv(folder / "cells.csv", cells),
        write_jsonl(folder / "cells.jsonl", cells),
        write_jsonl(folder / "lists.jsonl", lists),
    ):
        battles, rejected = read(path, text="turns")
        assert [[row[name] for name in names] for row in battles] == expected
        assert not rejected


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(), min_size=1, max_size=5))
@example(["a,b", 'say "hi"\r\nto U+2028: \u2028', "", "\x00", "{}", "null", "3"])
def test_text_that_is_no_list_is_one_turn(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    texts = [text for text in texts if not text.lstrip().startswith("[")] or ["plain"]
    folder = tmp_path_factory.mktemp("plain")
    rows = [battle(i, prompt=text) for i, text in enumerate(texts)]
    for path in (write_csv(folder / "p.csv", rows), write_jsonl(folder / "p.jsonl", rows)):
        assert [row["prompt"] for row in read(path)[0]] == [[text] for text in texts]


@settings(max_examples=20, deadline=None)
@given(st.lists(turns, min_size=1, max_size=5))
def test_battles_survive_their_file(
    tmp_path_factory: pytest.TempPathFactory, texts: list[list[Any]]
) -> None:
    folder = tmp_path_factory.mktemp("file")
    rows = [battle(i, prompt=turns) for i, turns in enumerate(texts)]
    raw = {"train": [write_jsonl(folder / "t.jsonl", rows)]}
    write(raw, folder)
    assert read_parquet(folder / "battles.parquet").equals(read_battles(raw)[0])


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ('["cut', "Unterminated string"),
        ("[Verse 1] la la", "Expecting value"),
        ('["a"], ["b"]', "Extra data"),
        ('["a", ["b"]]', "a turn is a JSON list"),
        ('[{"role": "user"}]', "a turn is a JSON object"),
        ("[" * 100_000, "not a JSON list: too deep"),
    ],
)
@pytest.mark.parametrize("column", ["prompt", "response_a", "response_b"])
def test_unreadable_cell_refuses_its_row(
    tmp_path: Path, cell: str, reason: str, column: str
) -> None:
    rows = [battle(1), battle(2, **{column: cell}), battle(3)]
    path = write_csv(tmp_path / "t.csv", rows)
    battles, rejected = read(path, text="turns")
    assert [row["id"] for row in battles] == ["1", "3"]
    assert reason in rejected[0].pop("reason")
    assert rejected == [{"source": "train", "file": str(path), "row": 2, "column": column}]


def test_cells_are_never_evaluated(tmp_path: Path) -> None:
    mark = tmp_path / "touched"
    attack = f"__import__('os').system('touch {mark}')"
    rows = [battle(1, prompt=attack), battle(2, prompt=f"[{attack}]")]
    battles, rejected = read(write_csv(tmp_path / "t.csv", rows), text="turns")
    assert not mark.exists()
    assert [row["prompt"] for row in battles] == [[attack]]
    assert "not a JSON list" in rejected[0]["reason"]


def test_numbers_stay_as_written(tmp_path: Path) -> None:
    long = "9" * 5000
    path = write_csv(tmp_path / "t.csv", [battle(prompt=f"[3, 3.10, -1e3, {long}, true]")])
    assert read(path, text="turns")[0][0]["prompt"] == ["3", "3.10", "-1e3", long, "true"]


def test_line_breaks_inside_a_text_stay(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", [battle(prompt='["raw\nbreak\ttab"]')])
    assert read(path)[0][0]["prompt"] == ["raw\nbreak\ttab"]
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(battle(prompt=["a\u2028b\x85c"]), ensure_ascii=False), "utf-8")
    assert read(path)[0][0]["prompt"] == ["a\u2028b\x85c"]


def test_empty_and_identical_answers_are_battles(tmp_path: Path) -> None:
    rows = [
        battle(1, response_a='[""]', response_b='[""]'),
        battle(2, response_a="", response_b="[null]"),
        battle(3, prompt="[]", response_a="[]", response_b="[]"),
    ]
    battles, rejected = read(write_csv(tmp_path / "t.csv", rows))
    assert not rejected
    assert [row["response_a"] for row in battles] == [[""], [""], []]


# --- labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("yes, no", [(1, 0), (1.0, 0.0), (True, False), ("TRUE", " false ")])
def test_one_hot_votes(tmp_path: Path, yes: Any, no: Any) -> None:
    names = ("winner_model_a", "winner_model_b", "winner_tie")
    rows = [battle(i, **{n: yes if n == names[i] else no for n in names}) for i in range(3)]
    paths = [write_csv(tmp_path / "t.csv", rows), write_jsonl(tmp_path / "t.jsonl", rows)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    for path in [*paths, tmp_path / "t.parquet"]:
        assert labels(read(path)[0]) == [0, 1, 2]


@pytest.mark.parametrize(
    ("votes", "column", "reason"),
    [
        ((1, 1, 0), "winner_*", "several winners are set"),
        ((0, 0, 0), "winner_*", "no vote; to keep such rows: `missing_votes: keep`"),
        ((0.3, 0, 0), "winner_*", "shares that sum to 1 expected"),
        ((0, "", 1), "winner_model_b", "empty, 0, 1 or a share expected"),
    ],
)
def test_row_without_one_winner_is_refused(
    tmp_path: Path, votes: tuple[Any, ...], column: str, reason: str
) -> None:
    a, b, tie = votes
    bad = battle(2, winner_model_a=a, winner_model_b=b, winner_tie=tie)
    battles, rejected = read(write_csv(tmp_path / "t.csv", [battle(1), bad]))
    assert [row["id"] for row in battles] == ["1"]
    assert [(r["row"], r["column"], r["reason"]) for r in rejected] == [(2, column, reason)]


@pytest.mark.parametrize("column", ["label", "winner"])
def test_votes_in_one_column(tmp_path: Path, column: str) -> None:
    words = ["0", "model_a", "A", "1", "Model_B", "b", 2, "tie", "Tie (bothbad)", "both_bad"]
    bare = without(battle(), "winner_model_a", "winner_model_b", "winner_tie")
    rows = [{**bare, "id": i, column: word} for i, word in enumerate([*words, "neither", ""])]
    battles, rejected = read(write_csv(tmp_path / "t.csv", rows))
    assert labels(battles) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert [(row["row"], row["column"]) for row in rejected] == [(11, column), (12, column)]


def test_votes_of_test_are_not_read(tmp_path: Path) -> None:
    rows = [battle(1), without(battle(2, winner_model_a="?"), "model_a")]
    battles, rejected = read(write_csv(tmp_path / "t.csv", rows), "test")
    assert labels(battles) == [NO_VOTE, NO_VOTE]
    assert not rejected


def test_votes_are_probabilities_of_weight_one(tmp_path: Path) -> None:
    rows = [battle(1), battle(2, winner_model_a=0, winner_tie=1)]
    battles, _ = read(write_csv(tmp_path / "t.csv", rows))
    assert [row["vote"] for row in battles] == [[1, 0, 0], [0, 0, 1]]
    assert [row["weight"] for row in battles] == [1, 1]


# --- prompts, languages ---------------------------------------------------------------------------


def test_battles_of_one_prompt_share_its_group_whatever_their_source(tmp_path: Path) -> None:
    prompts = {
        "train": ["Hello  World", "other"],
        "extra": ["hello world"],
        "ut": ["new", "HELLO WORLD"],
        "test": ["other ", "only here"],
        "unlabelled": ["new"],
    }
    files = {
        source: [
            write_csv(tmp_path / f"{source}.csv", [battle(i, prompt=p) for i, p in enumerate(of)])
        ]
        for source, of in prompts.items()
    }
    battles, _ = read_battles(dict(reversed(files.items())))
    assert battles["group"].to_pylist() == [0, 1, 0, 2, 0, 1, 3, 2]


def test_language_and_category_come_along(tmp_path: Path) -> None:
    rows = [battle(1, language="German"), battle(2, language="")]
    battles, _ = read(write_csv(tmp_path / "t.csv", rows))
    assert [(row["language"], row["category"]) for row in battles] == [
        ("German", None),
        (None, None),
    ]


# --- ids, models, rows ----------------------------------------------------------------------------


def test_ids_are_text_without_a_fraction(tmp_path: Path) -> None:
    pq.write_table(pa.table({**{n: [v] * 2 for n, v in battle().items()}, "id": [1.0, 2.0]}),
                   tmp_path / "t.parquet")  # fmt: skip
    assert [row["id"] for row in read(tmp_path / "t.parquet")[0]] == ["1", "2"]
    path = write_csv(tmp_path / "t.csv", [battle("007"), battle("a:b")])
    assert [row["id"] for row in read(path)[0]] == ["007", "a:b"]


def test_rows_without_id_are_numbered_over_the_files_of_a_source(tmp_path: Path) -> None:
    rows = [without(battle(), "id"), without(battle(winner_tie=1), "id"), without(battle(), "id")]
    files = [write_csv(tmp_path / f"{i}.csv", rows) for i in range(2)]
    battles, _ = read_battles({"extra": files})
    assert battles["id"].to_pylist() == ["row1", "row3", "row4", "row6"]


def test_test_battles_need_ids(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", [without(battle(), "id")])
    assert read(path)[0][0]["id"] == "row1"
    with pytest.raises(
        InputError, match=r"t\.csv: no column id, by .*; columns found: model_a, mod"
    ):
        read(path, "test")


def test_later_row_with_a_taken_id_is_refused(tmp_path: Path) -> None:
    first = write_csv(tmp_path / "1.csv", [battle(5, winner_tie=1), battle(5), battle(6)])
    second = write_csv(tmp_path / "2.csv", [battle(7), battle(6), battle(5)])
    battles, rejected = read_battles({"train": [first, second], "ut": [first]})
    assert key(battles).to_pylist() == ["train:5", "train:6", "train:7", "ut:5", "ut:6"]
    lines = [(r["source"], r["file"], r["row"], r["reason"]) for r in rejected.to_pylist()]
    assert lines == [
        ("train", str(first), 1, "several winners are set"),
        ("train", str(second), 2, f"id is taken: 6, by row 3 of {first}"),
        ("train", str(second), 3, f"id is taken: 5, by row 2 of {first}"),
        ("ut", str(first), 1, "several winners are set"),
    ]


def test_models_are_optional(tmp_path: Path) -> None:
    rows = [without(battle(1, model_b=""), "model_a")]
    row = read(write_csv(tmp_path / "t.csv", rows))[0][0]
    assert (row["model_a"], row["model_b"]) == (None, None)


def test_rows_are_counted_as_battles_not_as_lines(tmp_path: Path) -> None:
    long = [battle(i, prompt="two\n\nlines") for i in range(1, 6)]
    path = write_csv(tmp_path / "t.csv", [*long[:4], long[4] | {"winner_tie": 1}])
    path.write_text(path.read_text().replace("\n3,", "\n3,an extra cell,"))
    battles, rejected = read(path)
    assert [row["id"] for row in battles] == ["1", "2", "4"]
    assert [(r["row"], r["column"], r["reason"]) for r in rejected] == [
        (3, None, "has 10 cells, the header 9"),
        (5, "winner_*", "several winners are set"),
    ]


def test_sources_come_in_their_order_and_may_be_missing(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", [battle()])
    battles, _ = read_battles({"ut": [path], "train": [path], "extra": []})
    assert battles["source"].to_pylist() == ["train", "ut"]
    with pytest.raises(ValueError, match="unknown source 'valid'"):
        read_battles({"valid": [path]})


# --- test battles are all predicted ---------------------------------------------------------------


def test_unreadable_test_battle_is_kept_as_raw_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = [battle(1, response_a='["cut'), battle(2), battle(3, prompt='[["x"]]')]
    files = {
        "train": [write_csv(tmp_path / "train.csv", [battle(1), battle(2, winner_tie=1)])],
        "test": [Source(path=str(write_csv(tmp_path / "test.csv", test)), text="turns")],
    }
    write(files, tmp_path)
    battles = read_parquet(tmp_path / "battles.parquet").to_pylist()
    assert [row["id"] for row in battles if row["source"] == "test"] == ["1", "2", "3"]
    assert [row["response_a"] for row in battles[1:]] == [['["cut'], ["a"], ["a"]]
    assert battles[3]["prompt"] == ['[["x"]]']
    reasons = read_parquet(tmp_path / "rejected.parquet")["reason"].to_pylist()
    assert [reason.startswith("kept as raw text: ") for reason in reasons] == [False, True, True]
    printed = capsys.readouterr().out
    assert "train (battles): 2 rows, 1 refused\n  1 battles by vote: A 1" in printed
    assert "test (battles): 3 rows, 2 kept as raw text\n  3 battles by vote: none 3\n" in printed
    assert read_provenance(tmp_path / "battles.parquet")["settings"]["max_refused"] == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([battle(1), battle(1)], "row 2, column id: id is taken: 1, by row 1"),
        (
            [battle(1, prompt="q"), battle(1, prompt="[")],
            "row 2, column id: id is taken: 1, by row 1",
        ),
        ([battle(1), battle("")], "row 2, column id: no id"),
    ],
)
def test_test_battle_that_cannot_be_predicted_is_an_error(
    tmp_path: Path, rows: list[Row], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read(write_csv(tmp_path / "t.csv", rows), "test")


def test_test_row_with_a_wrong_number_of_cells_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("id,prompt,response_a,response_b\n1,q,a,b\n2,q,a\n")
    with pytest.raises(InputError, match=r"row 2: has 3 cells, the header 4; every test battle"):
        read(path, "test")


# --- what is left out -------------------------------------------------------------------------------


def shown(number: int, prompt: str, a: str = "a", winner: str = "model_a") -> Row:
    return {
        "id": f"e{number}",
        "prompt": prompt,
        "response_a": a,
        "response_b": "b",
        "winner": winner,
    }


def test_prompts_of_other_sources_and_repeated_rows_are_left_out(tmp_path: Path) -> None:
    train = [shown(1, "Old  Prompt"), shown(2, "bad", winner="?"), shown(3, "bare")]
    extra = [
        shown(1, " old prompt "),
        shown(2, "new"),
        shown(3, "bad"),  # the row of train is refused
        shown(4, "new", winner="tie"),  # again
        shown(5, "new", "c"),  # another battle
    ]
    more = [shown(6, "NEW"), shown(7, "more"), shown(7, "more")]
    drop: dict[str, Any] = {"without": ("train",), "repeated": "drop"}
    files = {
        "train": [Source(path=str(write_jsonl(tmp_path / "train.jsonl", train)))],
        "extra": [
            Source(path=str(write_jsonl(tmp_path / f"{name}.jsonl", rows)), **drop)
            for name, rows in (("extra", extra), ("more", more))
        ],
        "ut": [
            Source(path=str(write_jsonl(tmp_path / "ut.jsonl", [*extra[:2], shown(7, "more")])),
                   without=("extra",))
        ],
    }  # fmt: skip
    battles, rejected = (table.to_pylist() for table in read_battles(files))
    kept = [(b["source"], b["id"]) for b in battles]
    assert kept == [
        *(("train", name) for name in ("e1", "e3")),
        *(("extra", name) for name in ("e2", "e3", "e5", "e7")),
        ("ut", "e1"),
    ]
    reasons = [(r["source"], r["row"], r["column"], r["reason"]) for r in rejected]
    again = "dropped: the same prompt and answers came before"
    assert reasons[1:] == [
        ("extra", 1, "prompt", "dropped: it is in train too"),
        ("extra", 4, "prompt", again),
        ("extra", 1, "prompt", again),
        ("extra", 3, "prompt", again),
        ("ut", 2, "prompt", "dropped: it is in extra too"),
        ("ut", 3, "prompt", "dropped: it is in extra too"),
    ]


def test_what_is_left_out_is_not_refused(tmp_path: Path) -> None:
    """Neither its share nor a kind of votes of which nothing is left stops the run."""
    rows = [shown(1, "x", winner="tie"), shown(2, "y")]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "extra.jsonl", [rows[0], shown(3, "z")])
    extra = Source(path=str(tmp_path / "extra.jsonl"), without=("train",))
    write({"train": [tmp_path / "train.jsonl"], "extra": [extra]}, tmp_path, max_refused=0)
    counts = read_json(tmp_path / "reading.json")["sources"]["extra"]
    assert (counts["dropped"], counts["refused"], counts["battles"]) == (1, 0, 1)


# --- what is counted ------------------------------------------------------------------------------


def test_all_votes_of_a_kind_may_be_dropped_on_purpose(tmp_path: Path) -> None:
    bare = without(battle(), "winner_model_a", "winner_model_b", "winner_tie")
    rows = [{**bare, "id": i, "winner": word} for i, word in enumerate(["model_a", "tie", "tie"])]
    path = write_csv(tmp_path / "t.csv", rows)
    write({"train": [Source(path=str(path), ties={"tie": "drop"})]}, tmp_path)
    assert read_json(tmp_path / "reading.json")["sources"]["train"]["dropped"] == 2


def test_rows_are_counted_by_source_vote_and_reason(tmp_path: Path) -> None:
    bare = without(battle(), "winner_model_a", "winner_model_b", "winner_tie")
    words = ["model_a"] * 5 + ["tie", "both_bad", "neither", "", "model_b"]
    rows = [{**bare, "id": i, "winner": word} for i, word in enumerate(words)]
    path = write_csv(tmp_path / "t.csv", [*rows, rows[0]])
    files = {"train": [Source(path=str(path), ties={"both_bad": "drop"})]}
    write(files, tmp_path)
    assert read_json(tmp_path / "reading.json")["sources"] == {
        "train": {
            "files": [{"path": str(path), "format": "battles", "rows": 11}],
            "rows": 11,
            "refused": 3,
            "dropped": 1,
            "raw_text": 0,
            "merged": 0,
            "battles": 7,
            "votes": {
                "A": {"kept": 5, "refused": 1},
                "B": {"kept": 1, "refused": 0},
                "tie": {"kept": 1, "refused": 1},
                "none": {"kept": 0, "refused": 2},
            },
            "reasons": {
                "winner: dropped: as `ties` says": {
                    "rows": 1,
                    "first": f"{path}, row 7, column winner: dropped: as `ties` says",
                },
                "winner: unexpected": {
                    "rows": 1,
                    "first": f"{path}, row 8, column winner: unexpected: 'neither', model_a, model_b, "
                    "tie, a model's name or 0, 1, 2 expected; more words: `ties`",
                },
                "winner: no vote; to keep such rows": {
                    "rows": 1,
                    "first": f"{path}, row 9, column winner: no vote; to keep such rows: "
                    "`missing_votes: keep`",
                },
                "id: id is taken": {
                    "rows": 1,
                    "first": f"{path}, row 11, column id: id is taken: 0, by row 1 of {path}",
                },
            },
        }
    }
    write(files, tmp_path, max_refused=3 / 11)
    with pytest.raises(
        InputError, match=r"train: 3 of 11 rows are refused, more than data\.max_ref"
    ):
        write(files, tmp_path, max_refused=0.27)


def test_a_kind_of_vote_may_not_be_refused_whole(tmp_path: Path) -> None:
    rows = [battle(i) for i in range(99)]
    tie = {"winner_model_a": 0, "winner_tie": 1, "prompt": '["cut'}
    path = write_csv(tmp_path / "t.csv", [*rows, battle(99, **tie)])
    with pytest.raises(
        InputError, match="train: every vote of kind tie is refused; .* not a JSON list"
    ):
        write({"train": [path]}, tmp_path)


def test_rows_without_a_vote_may_join_the_unlabelled_ones(tmp_path: Path) -> None:
    bare = without(battle(), "winner_model_a", "winner_model_b", "winner_tie")
    rows = [{**bare, "id": i, "winner": word} for i, word in enumerate(["tie", "", "model_a"])]
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    kept = Source(path=str(path), missing_votes="keep")
    battles, rejected = read_battles({"train": [kept], "unlabelled": [path]})
    assert key(battles).to_pylist() == [
        *("train:0", "train:2", "unlabelled:train-1"),
        *("unlabelled:0", "unlabelled:1", "unlabelled:2"),
    ]
    assert [vote is None for vote in battles["vote"].to_pylist()] == [False, False, *[True] * 4]
    assert not rejected.num_rows


def test_shards_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for number in (2, 0, 1):
        write_csv(tmp_path / f"part-{number}.csv", [battle(f"{number}")])
    for path in (str(tmp_path), f"{tmp_path}/part-*.csv"):
        assert read_battles({"ut": [path]})[0]["id"].to_pylist() == ["0", "1", "2"]
    with pytest.raises(InputError, match=r"none-\*\.csv: no such file"):
        read_battles({"ut": [f"{tmp_path}/none-*.csv"]})


@needs_data
def test_odd_words_are_told(tmp_path: Path) -> None:
    odd = {"train": [DATA / "cases" / "winner-odd.csv"]}
    with pytest.raises(InputError, match=r"10 of 12 rows .* winner: unexpected; .*row 1, .*'left'"):
        write(odd, tmp_path, max_refused=0.05)


# --- files ----------------------------------------------------------------------------------------


def test_every_format_gives_the_same_battles(tmp_path: Path) -> None:
    rows = [battle(i, prompt=json.dumps([f"é {i}", None, "x\ny"])) for i in range(5)]
    plain = write_csv(tmp_path / "t.csv", rows)
    lines = write_jsonl(tmp_path / "t.jsonl", rows)
    packed = [path.with_name(path.name + ".gz") for path in (plain, lines)]
    for path, gz in zip((plain, lines), packed, strict=True):
        gz.write_bytes(gzip.compress(path.read_bytes()))
    bom = tmp_path / "bom.csv"
    bom.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes())
    lists = [row | {"prompt": json.loads(row["prompt"]), "response_b": ["b"]} for row in rows]
    tables = {"cells": pa.Table.from_pylist(rows), "lists": pa.Table.from_pylist(lists)}
    wide = pa.list_(pa.string_view())
    tables["wide"] = tables["lists"].set_column(3, "prompt", tables["lists"]["prompt"].cast(wide))
    tables["coded"] = tables["cells"].set_column(
        4, "response_a", tables["cells"]["response_a"].dictionary_encode()
    )
    for name, table in tables.items():
        pq.write_table(table, tmp_path / f"{name}.parquet")
    expected, _ = read_battles({"train": [plain]})
    assert expected.num_rows == 5
    for path in [lines, *packed, bom, *(tmp_path / f"{name}.parquet" for name in tables)]:
        assert read_battles({"train": [path]})[0].equals(expected), path


def test_parquet_lists_of_anything_but_lists(tmp_path: Path) -> None:
    cells = {
        "prompt": [[True, None], []],
        "response_a": [[1], []],
        "response_b": [[None], [None]],
    }
    table = pa.table({"id": [1, 2], **cells, "label": [0, 2]})
    pq.write_table(table, tmp_path / "t.parquet")
    one, two = read(tmp_path / "t.parquet")[0]
    assert (one["prompt"], one["response_a"], one["response_b"]) == (["true", ""], ["1"], [""])
    assert (two["prompt"], two["response_a"], two["response_b"]) == ([], [], [""])
    nested = table.set_column(1, "prompt", pa.array([[["a"]], []]))
    pq.write_table(nested, tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"t\.parquet, column prompt: holds list<.*list<"):
        read(tmp_path / "t.parquet")


def test_pickle_named_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    path.write_bytes(pickle.dumps({"id": [1]}))
    with pytest.raises(InputError, match=r"train\.parquet: not a whole parquet file"):
        read(path)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(["t.csv", "t.jsonl", "t.parquet", "t.csv.gz"]),
    st.sampled_from(SOURCES),
    st.lists(
        st.sampled_from([*'",\n\r[]{}:012\0\u2028', "null", '"id"', '"prompt"', '"a"', "\\ud83d"])
        | st.just("\udcff"),  # a byte that is not UTF-8
        max_size=40,
    ),
)
@example("t.csv", "train", ["1,\udcff"])
def test_whatever_a_file_holds_it_is_read_or_named(
    tmp_path_factory: pytest.TempPathFactory, name: str, source: str, pieces: list[str]
) -> None:
    path = tmp_path_factory.mktemp("any") / name
    head = "" if name == "t.jsonl" else "id,prompt,response_a,response_b,label\n"
    content = (head + "".join(pieces)).encode(errors="surrogateescape")
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    try:
        battles, _ = read_battles({source: [path]})
        battles.validate(full=True)
    except InputError as error:
        assert str(path) in str(error)


def test_missing_file_is_named(tmp_path: Path) -> None:
    for name in ("t.csv", "t.jsonl.gz", "t.parquet"):
        with pytest.raises(InputError, match=f"{name}: no such file"):
            read(tmp_path / name)
    with pytest.raises(InputError, match="no train files"):
        write({"train": []}, tmp_path)


def test_broken_line_refuses_its_row(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [battle(1), battle(2)])
    path.write_text(path.read_text() + '[1]\n\n{"id": 3\n' + json.dumps(battle(4)))
    battles, rejected = read(path)
    assert [row["id"] for row in battles] == ["1", "2", "4"]
    assert [row["row"] for row in rejected] == [3, 4]


def test_a_stray_quote_is_not_a_cut_file(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('id,prompt,response_a,response_b,label\n1,a 5" disk,a,b,0\n')
    assert read(path)[0][0]["prompt"] == ['a 5" disk']


# --- solution -------------------------------------------------------------------------------------


def test_solution_needs_a_vote_for_every_id(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_text("id,winner_model_a,winner_model_b,winner_tie\n7,1,0,0\n8,0,0,1\n")
    ids, votes = read_solution(path)
    assert (ids.to_pylist(), votes.labels.tolist()) == (["7", "8"], [0, 2])
    faults = {
        "9,1,1,0": "row 2, column .*several winners",
        "7,1,0,0": "row 2, column id: id is taken: 7, by row 1",
        "9,1": "row 2: has 2 cells, the header 4",
    }
    for row, reason in faults.items():
        path.write_text(f"id,winner_model_a,winner_model_b,winner_tie\n7,1,0,0\n{row}\n")
        with pytest.raises(InputError, match=reason):
            read_solution(path)


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """The battles of a file with test battles 7, 8 and 9, and a training battle 7."""
    test = [battle(i, prompt=f"p{i % 2}") for i in (7, 8, 9)]
    files = {
        "train": [write_csv(tmp_path / "train.csv", [battle(7, prompt="P1")])],
        "test": [write_csv(tmp_path / "test.csv", test)],
    }
    write(files, tmp_path)
    return tmp_path / "battles.parquet"


def test_votes_of_test_battles_are_in_their_order_and_nowhere_else(asked: Path) -> None:
    solution = write_csv(
        asked.parent / "s.csv",
        [{"id": i, "winner": w} for i, w in ((9, "tie"), (7, "b"), (8, "a"))],
    )
    write_test_votes(solution, asked, asked.parent / "v.parquet", SolutionSettings(version=1))
    solved = Solution.read(asked.parent / "v.parquet")
    assert solved.ids.to_pylist() == ["7", "8", "9"]
    assert solved.keys.to_pylist() == ["test:7", "test:8", "test:9"]
    assert solved.votes.labels.tolist() == [1, 0, 2]
    assert solved.votes.weights.tolist() == [1, 1, 1]
    assert solved.groups.tolist() == [0, 1, 0]
    battles = read_parquet(asked)
    assert battles["vote"].is_valid().to_pylist() == [True, False, False, False]


def test_several_votes_on_a_test_battle_are_merged_when_asked(asked: Path) -> None:
    votes = ((9, "tie"), (7, "b"), (8, "a"), (7, "a"), (7, "b"), (7, "b"))
    solution = write_csv(asked.parent / "s.csv", [{"id": i, "winner": w} for i, w in votes])
    output, told = asked.parent / "v.parquet", SolutionSettings(version=1, annotators="merge")
    write_test_votes(solution, asked, output, told)
    solved = Solution.read(output)
    assert solved.ids.to_pylist() == ["7", "8", "9"]
    assert solved.votes.probabilities.tolist() == [[0.25, 0.75, 0], [1, 0, 0], [0, 0, 1]]
    assert solved.votes.weights.tolist() == [4, 1, 1]
    assert read_solution(solution, "drop", merge=True)[1].known.tolist() == [False, True, True]
    with pytest.raises(
        InputError, match=r"row 4, .* give data\.solution as a section: \{path: …, anno"
    ):
        read_solution(solution)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ((7, 8), "s.csv: 1 test battles have no vote in it: 9; "),
        ((7, 8, 9, 70, 80), "s.csv: 2 of its ids are no test battles: 70, 80; "),
        ((), "s.csv: holds no battle"),
        ((*range(7, 30),), "s.csv: 20 of its ids are no test battles: 10, 11, 12, 13, 14, …; "),
        (
            (7, 8, 8, 9),
            "s.csv, row 3, column id: id is taken: 8, by row 2; ",
        ),
    ],
)
def test_a_solution_of_other_battles_is_refused_in_one_line(
    asked: Path, ids: tuple[int, ...], message: str
) -> None:
    solution = asked.parent / "s.csv"
    solution.write_text("id,winner\n" + "".join(f"{i},a\n" for i in ids))
    with pytest.raises(InputError) as refused:
        write_test_votes(solution, asked, asked.parent / "v.parquet", SolutionSettings(version=1))
    assert str(refused.value).startswith(f"{asked.parent}/{message}")
    assert "\n" not in str(refused.value)
    assert not (asked.parent / "v.parquet").exists()


# --- real data, imports ---------------------------------------------------------------------------


@needs_data
def test_real_battles_are_all_read() -> None:
    battles, rejected = read_battles({s: [DATA / f"{s}.csv"] for s in SOURCES if s != "unlabelled"})
    assert rejected.num_rows == 0
    counts = {c["values"]: c["counts"] for c in battles["source"].value_counts().to_pylist()}
    assert counts == {"train": 1567, "extra": 1868, "ut": 2290, "test": 261}
    rows = battles.to_pylist()
    assert max(len(row["prompt"]) for row in rows) > 1
    with open(DATA / "train.csv", newline="", encoding="utf-8") as file:
        for row, raw in zip(rows, csv.DictReader(file), strict=False):
            assert row["id"] == raw["id"]
            assert row["response_a"] == [turn_text(turn) for turn in json.loads(raw["response_a"])]
            winners = (raw["winner_model_a"], raw["winner_model_b"], raw["winner_tie"])
            assert row["vote"].index(1) == winners.index("1")
    ids, _ = read_solution(DATA / "test_solution.csv")
    assert ids.to_pylist() == [row["id"] for row in rows if row["source"] == "test"]


def test_importing_is_light() -> None:
    heavy = {"torch", "pandas", "sklearn", "transformers"}
    code = f"""
import sys, arena_distill.battles.reading, arena_distill.battles.folds
assert not {heavy!r} & set(sys.modules), sorted({heavy!r} & set(sys.modules))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
