"""Reading files into columns: every kind of file, what a strict CSV file is, limits, types of parquet."""

from __future__ import annotations

import csv
import gzip
import io
import json
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arena_distill.config.source import Source
from arena_distill.errors import InputError
from arena_distill.files import raw_tables
from arena_distill.files.raw_tables import RawTable
from arena_distill.files.readers import read_table

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no files in {DATA}")


def files(path: Any) -> list[Path]:
    return Source(path=str(path)).shards()


def cells(raw: RawTable) -> dict[str, list[Any]]:
    return {n: c if isinstance(c, list) else c.to_pylist() for n, c in raw.columns.items()}


def packed(content: bytes, suffix: str) -> bytes:
    if suffix == "gz":
        return gzip.compress(content)
    return pa.Codec("zstd").compress(content, asbytes=True)


# --- kinds of files -------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_every_kind_of_text_file_is_read(tmp_path: Path, suffix: str) -> None:
    rows = [{"id": "1", "text": 'a, "b"\n\tc'}, {"id": "2", "text": "é"}]
    contents = {}
    for kind, delimiter in (("csv", ","), ("tsv", "\t")):
        file = io.StringIO()
        writer = csv.DictWriter(file, ["id", "text"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
        contents[kind] = file.getvalue()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    contents |= {"jsonl": lines, "ndjson": lines, "json": lines, "list.json": json.dumps(rows)}
    for kind, content in contents.items():
        path = tmp_path / f"t.{kind}{suffix}"
        data = content.encode()
        path.write_bytes(packed(data, suffix[1:]) if suffix else data)
        assert cells(read_table(path)) == {"id": ["1", "2"], "text": [r["text"] for r in rows]}


def test_folders_and_patterns_are_sorted_shards(tmp_path: Path) -> None:
    for name in ("b.csv", "a.jsonl", "_SUCCESS", "notes.txt", ".hidden.csv"):
        (tmp_path / name).write_text("")
    assert files(tmp_path) == [tmp_path / "a.jsonl", tmp_path / "b.csv"]
    assert files(f"{tmp_path}/*.csv") == [tmp_path / "b.csv"]
    assert files(tmp_path / "gone.csv") == [tmp_path / "gone.csv"]
    assert files(tmp_path / "x*") == [tmp_path / "x*"]
    literal = tmp_path / "odd[1].csv"
    literal.write_text("")
    assert files(literal) == [literal]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_bomb_is_refused_before_it_is_unpacked(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw_tables, "UNPACKED_BYTES", 1 << 20)
    path = tmp_path / f"t.csv.{suffix}"
    path.write_bytes(packed(b"id\n" + b"1\n" * (1 << 26), suffix))
    with pytest.raises(InputError, match=r"bytes unpack to more than [\d,]+; if this is right"):
        read_table(path)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_cut_packed_file_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t.csv.{suffix}"
    path.write_bytes(packed(b"id,prompt" * 999, suffix)[:-8])
    with pytest.raises(InputError, match=rf"t\.csv\.{suffix}: cannot be read"):
        read_table(path)


def test_a_column_twice_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,x,id\n1,2,3\n")
    table = pa.Table.from_arrays([pa.array([1])] * 2, ["id", "id"])
    pq.write_table(table, tmp_path / "t.parquet")
    for name in ("t.csv", "t.parquet"):
        with pytest.raises(InputError, match="column id appears twice"):
            read_table(tmp_path / name)


def test_numbers_that_are_none_are_missing(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"a": NaN, "b": Infinity, "c": 1.50}\n')
    assert cells(read_table(tmp_path / "t.jsonl")) == {"a": [None], "b": [None], "c": ["1.50"]}


# --- strict CSV -----------------------------------------------------------------------------------

hostile = st.text(st.sampled_from('",\n\r\t\\ a[é')) | st.text(
    st.characters(exclude_categories=("Cs",))
)


@given(st.lists(st.tuples(hostile, hostile), min_size=1, max_size=6), st.sampled_from([",", "\t"]))
def test_any_text_survives_csv(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], delimiter: str
) -> None:
    path = tmp_path_factory.mktemp("csv") / ("t.csv" if delimiter == "," else "t.tsv")
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL)
        writer.writerows([("x", "y"), *rows])
    assert cells(read_table(path)) == {"x": [x for x, _ in rows], "y": [y for _, y in rows]}


@given(st.lists(st.tuples(hostile, hostile), min_size=1, max_size=6))
def test_any_text_survives_csv_with_backslashes(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]
) -> None:
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    quoted = [['"' + c.replace("\\", "\\\\").replace('"', '\\"') + '"' for c in r] for r in rows]
    path.write_bytes("\n".join(map(",".join, [["x", "y"], *quoted])).encode())
    raw = read_table(path, escape="backslash")
    assert cells(raw) == {"x": [x for x, _ in rows], "y": [y for _, y in rows]}


@pytest.mark.parametrize("fast", [True, False])
def test_both_parsers_read_the_same(tmp_path: Path, fast: bool) -> None:
    stray = '"5"' if fast else 'a 5" disk'
    path = tmp_path / "t.csv"
    path.write_text(f'\ufeffx,"y"\n\n{stray},"two\n\n""lines"""\n1,2,3\n,\n', "utf-8")
    raw = read_table(path)
    assert cells(raw) == {"x": [stray.strip('"'), ""], "y": ['two\n\n"lines"', ""]}
    assert raw.faults.lost == [(2, "has 3 cells, the header 2")]
    assert raw.numbers.tolist() == [1, 3]


def test_quotes_of_unquoted_cells_with_backslashes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('x,y\n1,say \\"hi\\"\n')
    with pytest.raises(InputError, match="quotes in cells that are not quoted"):
        read_table(tmp_path / "t.csv", escape="backslash")


@needs_data
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("spark-plain", "row 1: .*escape: backslash"),
        ("spark-comma", "row 1: .*escape: backslash"),
        ("even-quote", "row 3: a quote inside a cell, or one that is not closed"),
    ],
)
def test_cases_of_csv(name: str, message: str) -> None:
    path = DATA / "cases" / f"{name}.csv"
    with pytest.raises(InputError, match=message):
        read_table(path)
    if name.startswith("spark"):
        text = 'He said "hi, there" to her' if name == "spark-comma" else 'He said "hi" to her'
        raw = read_table(path, escape="backslash")
        assert cells(raw)["response_a"] == [text] * 12


# --- parquet --------------------------------------------------------------------------------------


def test_every_type_of_text_in_parquet_becomes_text(tmp_path: Path) -> None:
    texts = ["a", None, "é"]
    plain = pa.array(texts)
    ids = [uuid.UUID(int=7).bytes, None, uuid.UUID(int=1 << 127).bytes]
    kinds = (pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view())
    columns = {str(kind): plain.cast(kind) for kind in kinds}
    columns["dictionary"] = plain.dictionary_encode()
    columns["fixed"] = pa.array([b"abc", None, b"xyz"], pa.binary(3))
    columns["uuid"] = pa.ExtensionArray.from_storage(pa.uuid(), pa.array(ids, pa.binary(16)))
    columns["list"] = pa.array([["a", None], None, []], pa.large_list(pa.large_string()))
    columns["fixed_list"] = pa.array([["a"], None, ["b"]], pa.list_(pa.string(), 1))
    turn = pa.struct(
        [("role", pa.large_string()), ("content", pa.dictionary(pa.int8(), pa.string()))]
    )
    columns["messages"] = pa.array([[{"role": "user", "content": "hi"}], [], None], pa.list_(turn))
    columns["nothing"] = pa.nulls(3)
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    raw = read_table(tmp_path / "t.parquet")
    read = cells(raw)
    assert all(read[str(kind)] == texts for kind in kinds) and read["dictionary"] == texts
    assert read["fixed"] == ["abc", None, "xyz"]
    assert read["uuid"] == [str(uuid.UUID(int=7)), None, str(uuid.UUID(int=1 << 127))]
    assert read["list"] == [["a", None], None, []] and read["fixed_list"] == [["a"], None, ["b"]]
    assert read["messages"] == [[{"role": "user", "content": "hi"}], [], None]
    assert read["nothing"] == [None] * 3
    types = {str(column.type) for column in raw.columns.values()}  # type: ignore[union-attr]
    message = "struct<role: string, content: string>"
    assert types == {"string", "list<item: string>", f"list<item: {message}>", "null"}


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": pa.array([b"\xff"])}), tmp_path / "t.parquet")
    raw = read_table(tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"column x: holds binary that is not UTF-8 text"):
        raw.columns["x"]


def test_columns_that_nobody_asks_for_are_not_read(tmp_path: Path) -> None:
    """Such as images, dates and maps: what cannot be understood does no harm there."""
    image = pa.array([[{"bytes": b"\xff", "text": "a"}]])
    others = {"map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), "raw": [b"\xff"]}
    pq.write_table(pa.table({"x": ["a"], "image": image, **others}), tmp_path / "t.parquet")
    raw = read_table(tmp_path / "t.parquet")
    assert list(raw.columns) == ["x", "image", "map", "raw"]
    assert raw.columns["x"].to_pylist() == ["a"]  # type: ignore[union-attr]
    assert raw.columns["image"].to_pylist() == image.to_pylist()  # type: ignore[union-attr]
    assert raw.columns["map"].to_pylist() == [[("a", 1)]]  # type: ignore[union-attr]
