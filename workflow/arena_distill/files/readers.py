"""Files → columns: CSV, TSV, JSON (all of them also .gz and .zst) and parquet, read but not interpreted.

What a row lacks is noted in its file's :class:`Faults`, so that every refused row can be named by its
number; what makes a whole file unusable is an `InputError` that names it.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from arena_distill.config.source import EXPECTED, KINDS, PACKED
from arena_distill.config.vocabulary import Escape
from arena_distill.errors import InputError

KEPT_AS_RAW_TEXT = "kept as raw text: "
"""How the reason of a row begins that is faulty and used all the same (test battles only)."""

DROPPED = "dropped: "
"""How the reason of a row begins that is left out because the configuration says so."""

Column: TypeAlias = pa.ChunkedArray | list[Any]
"""An Arrow column (CSV, parquet) or Python values as JSON gives them (JSON lines)."""

# Numbers stay the text they were written as: "3.10" is not 3.1, and no number is too long. NaN is missing.
JSON_TEXTS = json.JSONDecoder(
    strict=False, parse_float=str, parse_int=str, parse_constant=lambda _: None
)

UNPACKED_BYTES = 1 << 30
UNPACKED_RATIO = 50
"""A packed file may unpack to the larger of `UNPACKED_BYTES` and this many times its own size."""

ROWS_AT_ONCE = 16_384
"""Texts are handled so many rows at a time: those of a whole file may be too long for one Arrow array."""
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class RawTable:
    """A file as read: its columns, uninterpreted."""

    path: Path
    columns: Mapping[str, Column]
    rows: int  # in the file, those lost in reading included
    faults: Faults

    @property
    def numbers(self) -> np.ndarray:
        return self.faults.numbers


@dataclass
class Faults:
    """What is wrong with the rows of one file: the first fault of each row."""

    path: Path
    numbers: np.ndarray  # int64 row number in the file, per row that could be read
    lost: list[tuple[int, str]] = field(default_factory=list)  # (row number, reason)
    found: dict[int, tuple[str, str]] = field(default_factory=dict)  # position → column, reason

    def add(self, position: int, column: str, reason: str) -> None:
        self.found.setdefault(position, (column, reason))

    def fatal(self) -> list[int]:
        """Positions of the rows that cannot be kept."""
        return [
            p for p, (_, reason) in self.found.items() if not reason.startswith(KEPT_AS_RAW_TEXT)
        ]

    def line(self, source: str, position: int) -> dict[str, Any]:
        """Return the line of the row at `position` in the table of rejected rows."""
        column, reason = self.found[position]
        return self._line(source, int(self.numbers[position]), column, reason)

    def lines(self, source: str) -> list[dict[str, Any]]:
        """Return the lines of all rows, in the file's order."""
        lines = [self._line(source, row, None, reason) for row, reason in self.lost]
        lines += [self.line(source, position) for position in self.found]
        return sorted(lines, key=lambda line: line["row"])

    def _line(self, source: str, row: int, column: str | None, reason: str) -> dict[str, Any]:
        file = str(self.path)
        return {"source": source, "file": file, "row": row, "column": column, "reason": reason}


def column_texts(raw: RawTable, name: str) -> pa.ChunkedArray:
    """Turn a column into texts: whole numbers without ".0", nulls and NaN stay null.

    Raises:
        InputError: it holds dates, decimals, maps, lists or other things that are no text.
    """
    column = raw.columns[name]
    where = f"{raw.path}, column {name}"
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    return pa.chunked_array([as_texts(chunk, where) for chunk in chunks], pa.string())


def as_texts(cells: pa.Array | list[Any], where: str) -> pa.Array:
    """Turn cells into an array of texts, as :func:`column_texts` does."""
    if isinstance(cells, list):
        if any(isinstance(cell, list | dict) for cell in cells):
            raise InputError(f"{where}: holds JSON lists or objects; write it as text")
        return strings([None if cell is None else plain_text(cell) for cell in cells])
    kind, types = cells.type, pa.types
    if types.is_floating(kind):
        # Many a writer turns a column of integers with a gap into one of floats.
        cells = pc.if_else(pc.is_finite(cells), cells, pa.scalar(None, kind))
        whole = pc.and_(pc.equal(cells, pc.trunc(cells)), pc.less(pc.abs(cells), 2.0**53))
        numbers = pc.if_else(whole, cells, pa.scalar(0, kind)).cast(pa.int64())
        return pc.if_else(whole, numbers.cast(pa.string()), cells.cast(pa.string()))
    if not any(
        check(kind)
        for check in (types.is_string, types.is_integer, types.is_boolean, types.is_null)
    ):
        raise InputError(f"{where}: holds {kind}, which is no text; write it as text")
    return cells.cast(pa.string())


def plain_text(value: Any) -> str:
    """Write a JSON value as a text: null is empty, and lists and objects are their JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def strings(values: Sequence[str | None]) -> pa.Array:
    """Make a string array, with U+FFFD for lone surrogates, which no UTF-8 file can hold."""
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError:
        return pa.array([v and _SURROGATE.sub("\ufffd", v) for v in values], pa.string())


def read_table(path: Path, *, escape: Escape = "none") -> RawTable:
    """Read one file by its suffix.

    Raises:
        InputError: it is missing, damaged, of an unknown kind or empty, unpacks to more than
            `UNPACKED_BYTES` and `UNPACKED_RATIO` allow, or is a CSV file that is not strictly one.
    """
    kind, _, packed = path.name.lower().rpartition(".")
    if packed in PACKED:
        kind = kind.rpartition(".")[2]
    else:
        kind, packed = packed, ""
    if kind not in KINDS or (packed and kind == "parquet"):
        raise InputError(f"{path}: unknown kind of file; {EXPECTED}")
    try:
        if kind == "parquet":
            raw = _read_parquet(path)
        elif kind in ("csv", "tsv"):
            delimiter = "," if kind == "csv" else "\t"
            raw = _read_csv(path, _content(path, packed), delimiter, escape)
        else:
            raw = _read_json(path, _decoded(_content(path, packed), path), kind)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if not raw.rows:
        raise InputError(f"{path}: holds no battle")
    return raw


def _content(path: Path, packed: str) -> bytes | bytearray:
    """Return the bytes of a file, unpacked; InputError where these are suspiciously many."""
    if not packed:
        return path.read_bytes()
    size = path.stat().st_size
    limit = max(UNPACKED_BYTES, UNPACKED_RATIO * size)
    content = bytearray()
    with pa.CompressedInputStream(pa.OSFile(str(path)), PACKED[packed]) as stream:
        while block := stream.read(1 << 24):
            content += block
            if len(content) > limit:
                raise InputError(
                    f"{path}: {size:,} bytes unpack to more than {limit:,}; if this is right, unpack it"
                )
    return content


# --- parquet --------------------------------------------------------------------------------------


def _read_parquet(path: Path) -> RawTable:
    with _whole_parquet(path), pq.ParquetFile(path) as file:
        rows, names = file.metadata.num_rows, file.schema_arrow.names
    _refuse_twice(names, path)
    columns = _ParquetColumns(path, names)
    return RawTable(path, columns, rows, Faults(path, np.arange(1, rows + 1)))


class _ParquetColumns(Mapping[str, Column]):
    """The columns of a parquet file, each read when it is first asked for.

    Published files have columns of many GB, such as images, that nobody needs here.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self._path = path
        self._columns: dict[str, pa.ChunkedArray | None] = dict.fromkeys(names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def __getitem__(self, name: str) -> pa.ChunkedArray:
        if (column := self._columns[name]) is None:
            where = f"{self._path}, column {name}"
            with _whole_parquet(self._path), pq.ParquetFile(self._path) as file:
                kind = _plain_type(file.schema_arrow.field(name).type)
                # In batches, as texts of more than 2 GB do not fit into one Arrow array.
                batches = file.iter_batches(ROWS_AT_ONCE, columns=[name])
                chunks = [_plain(batch.column(name), where) for batch in batches]
            column = self._columns[name] = pa.chunked_array(chunks, kind)
        return column


@contextmanager
def _whole_parquet(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: not a whole parquet file ({error}); "
            "a pickle or CSV must be converted, renaming it is not enough"
        ) from error


def _plain_type(kind: pa.DataType, *, in_struct: bool = False) -> pa.DataType:
    """The type that a column is turned into: one kind of text, one kind of list, no dictionaries.

    Bytes are texts, but for those inside a struct, such as an image's.
    """
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        uuid = kind.extension_name == "arrow.uuid"
        return pa.string() if uuid else _plain_type(kind.storage_type, in_struct=in_struct)
    if types.is_dictionary(kind):
        return _plain_type(kind.value_type, in_struct=in_struct)
    if types.is_large_string(kind) or types.is_string_view(kind):
        return pa.string()
    if not in_struct and (
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
        or types.is_fixed_size_binary(kind)
    ):
        return pa.string()
    if is_list(kind):
        return pa.list_(_plain_type(kind.value_type, in_struct=in_struct))
    if types.is_struct(kind):
        return pa.struct([pa.field(f.name, _plain_type(f.type, in_struct=True)) for f in kind])
    return kind


def _plain(column: pa.Array, where: str, *, in_struct: bool = False) -> pa.Array:
    """Undo what a parquet file may have been written with: dictionaries, views, bytes, UUIDs."""
    kind, target = column.type, _plain_type(column.type, in_struct=in_struct)
    if isinstance(kind, pa.BaseExtensionType):
        if kind.extension_name == "arrow.uuid":
            return _uuids(column)
        return _plain(column.storage, where, in_struct=in_struct)
    missing = column.is_null() if column.null_count else None
    if is_list(kind):
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        values = _plain(column.flatten(), where, in_struct=in_struct)
        return pa.ListArray.from_arrays(offsets, values, mask=missing)
    if pa.types.is_struct(kind) and len(target):
        fields = [_plain(values, where, in_struct=True) for values in column.flatten()]
        return pa.StructArray.from_arrays(fields, fields=list(target), mask=missing)
    if pa.types.is_dictionary(kind):
        return _plain(column.dictionary_decode(), where, in_struct=in_struct)
    try:
        if kind != target:
            if pa.types.is_fixed_size_binary(kind):
                column = column.cast(pa.binary())
            column = column.cast(target)
        # Parquet files may hold any bytes as text.
        column.validate(full=True)
        return column
    except pa.ArrowException as error:
        raise InputError(f"{where}: holds {kind} that is not UTF-8 text ({error})") from error


def _uuids(column: pa.ExtensionArray) -> pa.Array:
    """Write UUIDs as texts, such as 6af613b6-569c-5c22-9c37-2ed93f31d3af."""
    numbers = pc.fill_null(column.storage, bytes(16)).cast(pa.binary())
    digits = np.frombuffer(b"".join(numbers.to_pylist()).hex().encode(), np.uint8).reshape(-1, 32)
    texts = np.insert(digits, [8, 12, 16, 20], ord("-"), axis=1)
    offsets = pa.py_buffer(np.arange(0, texts.size + 1, 36, dtype=np.int32))
    named = pa.StringArray.from_buffers(len(column), offsets, pa.py_buffer(texts.tobytes()))
    return pc.if_else(column.is_valid(), named, pa.scalar(None, pa.string()))


def is_list(kind: pa.DataType) -> bool:
    types = pa.types
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view)
    return any(check(kind) for check in (*lists, types.is_large_list_view))


# --- CSV ------------------------------------------------------------------------------------------


def _read_csv(path: Path, content: bytes | bytearray, delimiter: str, escape: Escape) -> RawTable:
    _check_encoding(content, path)
    if escape == "backslash":
        # \" is a quote, \\ a backslash, any other backslash stays. No UTF-8 text has the byte FF.
        content = content.replace(rb"\\", b"\xff").replace(rb"\"", b'""').replace(b"\xff", b"\\")
    if not _plainly_quoted(content, delimiter):
        raw = _read_csv_slowly(path, content, delimiter, escape)
        if escape == "backslash":
            raise InputError(f"{path}: has quotes in cells that are not quoted; quote these cells")
        return raw
    ragged: list[pa_csv.InvalidRow] = []

    def skip(row: pa_csv.InvalidRow) -> str:
        ragged.append(row)
        return "skip"

    def parse(use_threads: bool) -> pa.Table:
        ragged.clear()
        return pa_csv.read_csv(
            pa.BufferReader(content),
            read_options=pa_csv.ReadOptions(use_threads=use_threads, block_size=64 << 20),
            parse_options=pa_csv.ParseOptions(
                delimiter=delimiter, newlines_in_values=True, invalid_row_handler=skip
            ),
            convert_options=pa_csv.ConvertOptions(default_column_type=pa.string()),
        )

    try:
        table = parse(use_threads=True)
        if ragged:  # Only a single thread knows the numbers of rows.
            table = parse(use_threads=False)
    except pa.ArrowException as error:
        raise InputError(f"{path}: not a CSV file ({error})") from error
    _refuse_twice(table.column_names, path)
    lost = [(row.number - 1, _ragged(row.actual_columns, row.expected_columns)) for row in ragged]
    rows = table.num_rows + len(lost)
    numbers = np.setdiff1d(np.arange(1, rows + 1), [number for number, _ in lost])
    columns = {name: table[name] for name in table.column_names}
    return RawTable(path, columns, rows, Faults(path, numbers, lost))


def _ragged(cells: int, expected: int) -> str:
    return f"has {cells} cells, the header {expected}"


def _check_encoding(content: bytes | bytearray, path: Path) -> None:
    # Seen as one long Arrow string, without the copy, up to four times as large, of decoding it.
    offsets = pa.py_buffer(np.array([0, len(content)], np.int64))
    try:
        pa.LargeStringArray.from_buffers(1, offsets, pa.py_buffer(content)).validate(full=True)
    except pa.ArrowException:
        _decoded(content, path)


def _plainly_quoted(content: bytes | bytearray, delimiter: str) -> bool:
    """Say whether every quote opens, closes or doubles as it does in a strict CSV file.

    Quotes open and close in turn, a doubled one closing and opening again. So the first, third … follow
    the start of a cell or a quote, the others come before the end of a cell or a quote. Where one does
    not, as in a cell that is never closed or has a backslash before a quote, the fast parser would take
    several rows for one.
    """
    text = np.frombuffer(content, np.uint8)
    start = 3 if bytes(content[:3]) == b"\xef\xbb\xbf" else 0
    edge = np.zeros(256, bool)
    edge[list(b'\r\n"' + delimiter.encode())] = True
    seen = 0
    for begin in range(0, len(text), 1 << 26):
        quotes = begin + np.flatnonzero(text[begin : begin + (1 << 26)] == ord('"'))
        opening, closing = quotes[seen % 2 :: 2], quotes[1 - seen % 2 :: 2]
        if not (edge[text[opening - 1]] | (opening == start)).all():
            return False
        if not (edge[text[(closing + 1) % len(text)]] | (closing == len(text) - 1)).all():
            return False
        seen += len(quotes)
    return seen % 2 == 0


def _read_csv_slowly(
    path: Path, content: bytes | bytearray, delimiter: str, escape: Escape
) -> RawTable:
    """Read a CSV file whose quotes are unusual by Python's strict parser, which decides what they mean."""
    text = _decoded(content, path).removeprefix("\ufeff")
    limit = csv.field_size_limit(len(text) + 1)
    kept: list[list[str]] = []
    numbers: list[int] = []
    lost: list[tuple[int, str]] = []
    count = 0
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        rows = (row for row in reader if row)
        header = next(rows)
        for count, row in enumerate(rows, 1):
            if len(row) == len(header):
                kept.append(row)
                numbers.append(count)
            else:
                lost.append((count, _ragged(len(row), len(header))))
    except csv.Error as error:
        hint = "double the quotes inside a cell"
        if escape == "none" and '\\"' in text:
            hint = "it has backslashes before quotes: if they escape them, set `escape: backslash`"
        what = (
            "ends inside a quoted cell: the file is cut off, or a quote is not closed"
            if "unexpected end of data" in str(error)
            else f"a quote inside a cell, or one that is not closed ({error}); {hint}"
        )
        raise InputError(f"{path}, row {count + 1}: {what}") from None
    finally:
        csv.field_size_limit(limit)
    _refuse_twice(header, path)
    cells = zip(*kept, strict=True) if kept else [()] * len(header)
    columns: dict[str, Column] = {
        name: pa.chunked_array([pa.array(values[i : i + ROWS_AT_ONCE], pa.string())
                                for i in range(0, len(values), ROWS_AT_ONCE)], pa.string())
        for name, values in zip(header, cells, strict=True)
    }  # fmt: skip
    return RawTable(path, columns, count, Faults(path, np.array(numbers, np.int64), lost))


def _refuse_twice(names: Sequence[str], path: Path) -> None:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"{path}: column {', '.join(twice)} appears twice in {', '.join(names)}")


# --- JSON -----------------------------------------------------------------------------------------


def _read_json(path: Path, text: str, kind: str) -> RawTable:
    """Read JSON lines, or one JSON list of objects."""
    text = text.removeprefix("\ufeff")
    if kind == "json" and text.lstrip().startswith("["):
        return _read_json_list(path, text)
    # Not splitlines(): a JSON text may hold U+2028 and its like.
    lines = [line for line in text.split("\n") if line and not line.isspace()]
    records: list[dict[str, Any]] = []
    numbers: list[int] = []
    lost: list[tuple[int, str]] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = JSON_TEXTS.decode(line)
            if not isinstance(record, dict):
                raise ValueError("a JSON object per line expected")
        except (ValueError, RecursionError) as error:
            lost.append((number, f"not a battle: {error}"))
            continue
        records.append(record)
        numbers.append(number)
    if lost and not records:
        raise InputError(f"{path}, row {lost[0][0]}: {lost[0][1]}; is it a JSON-lines file?")
    return _of_records(path, records, numbers, lost)


def _read_json_list(path: Path, text: str) -> RawTable:
    try:
        values = JSON_TEXTS.decode(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON list of objects: {error}") from None
    rows = list(enumerate(values, start=1))
    records = [(number, record) for number, record in rows if isinstance(record, dict)]
    lost = [(n, "not a battle: a JSON object expected") for n, r in rows if not isinstance(r, dict)]
    return _of_records(path, [r for _, r in records], [n for n, _ in records], lost)


def _of_records(
    path: Path, records: list[dict[str, Any]], numbers: list[int], lost: list[tuple[int, str]]
) -> RawTable:
    names = list(dict.fromkeys(name for record in records for name in record))
    columns: dict[str, Column] = {n: [record.get(n) for record in records] for n in names}
    faults = Faults(path, np.array(numbers, np.int64), lost)
    return RawTable(path, columns, len(records) + len(lost), faults)


def _decoded(content: bytes | bytearray, path: Path) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 at byte {error.start} ({error.reason}); save it as UTF-8"
        ) from None
