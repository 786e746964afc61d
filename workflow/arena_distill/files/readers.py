"""Files → columns: CSV, JSON lines (both also gzipped) and parquet, read but not interpreted.

What a row lacks is noted in its file's :class:`Faults`, so that every refused row can be told by its
number; what makes a whole file unusable is an `InputError` that names it.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from arena_distill.errors import InputError

KEPT_AS_RAW_TEXT = "kept as raw text: "
"""How the reason of a row begins that is faulty and used all the same (test battles only)."""

Column: TypeAlias = pa.ChunkedArray | list[Any]
"""An Arrow column (CSV, parquet) or Python values as JSON gives them (JSON lines)."""

# Numbers stay the text they were written as: "3.10" is not 3.1, and no number is too long.
JSON_TEXTS = json.JSONDecoder(strict=False, parse_float=str, parse_int=str, parse_constant=str)


@dataclass
class RawTable:
    """A file as read: its columns, uninterpreted."""

    path: Path
    columns: dict[str, Column]
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


def read_table(path: Path) -> RawTable:
    """Read a file by its suffix; InputError if it is missing, damaged, unknown or empty."""
    name = path.name.lower()
    try:
        if name.endswith(".parquet"):
            raw = _read_parquet(path)
        elif name.endswith((".csv", ".csv.gz")):
            raw = _read_csv(path)
        elif name.endswith((".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")):
            raw = _read_jsonl(path)
        else:
            raise InputError(f"{path}: unknown kind of file; .csv, .jsonl (also .gz) or .parquet")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if not raw.rows:
        raise InputError(f"{path}: holds no battle")
    return raw


def _read_parquet(path: Path) -> RawTable:
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: not a whole parquet file ({error}); "
            "a pickle or CSV must be converted, renaming it is not enough"
        ) from error
    columns = {name: _plain_type(table[name]) for name in table.column_names}
    for name, column in columns.items():
        if column.type == pa.string():
            check_utf8(column, f"{path}, column {name}")
    numbers = np.arange(1, table.num_rows + 1)
    return RawTable(path, columns, table.num_rows, Faults(path, numbers))


def _read_csv(path: Path) -> RawTable:
    content = _content(path)
    _check_encoding(content, path)
    ragged: list[pa_csv.InvalidRow] = []

    def skip(row: pa_csv.InvalidRow) -> str:
        ragged.append(row)
        return "skip"

    def parse(use_threads: bool) -> pa.Table:
        ragged.clear()
        return pa_csv.read_csv(
            pa.BufferReader(content),
            read_options=pa_csv.ReadOptions(use_threads=use_threads, block_size=64 << 20),
            parse_options=pa_csv.ParseOptions(newlines_in_values=True, invalid_row_handler=skip),
            convert_options=pa_csv.ConvertOptions(default_column_type=pa.string()),
        )

    try:
        table = parse(use_threads=True)
        if ragged:  # Only a single thread knows the numbers of rows.
            table = parse(use_threads=False)
    except pa.ArrowException as error:
        raise InputError(f"{path}: not a CSV file ({error})") from error
    _check_quotes(content, path)
    if len(set(table.column_names)) < len(table.column_names):
        raise InputError(f"{path}: a column appears twice in {', '.join(table.column_names)}")
    lost = [
        (row.number - 1, f"has {row.actual_columns} cells, the header {row.expected_columns}")
        for row in ragged
    ]
    rows = table.num_rows + len(lost)
    numbers = np.setdiff1d(np.arange(1, rows + 1), [number for number, _ in lost])
    columns = {name: table[name] for name in table.column_names}
    return RawTable(path, columns, rows, Faults(path, numbers, lost))


def _check_encoding(content: bytes, path: Path) -> None:
    # Seen as one long Arrow string, without the copy, up to four times as large, of decoding it.
    offsets = pa.py_buffer(np.array([0, len(content)], np.int64))
    try:
        pa.LargeStringArray.from_buffers(1, offsets, pa.py_buffer(content)).validate(full=True)
    except pa.ArrowException:
        _decoded(content, path)


def _check_quotes(content: bytes, path: Path) -> None:
    """Refuse a CSV file that ends inside a quoted cell: it has been cut off.

    The fast parser takes the rest of such a file for one long cell. An odd number of quotes is
    the cheap sign of it, and the strict parser then decides.
    """
    if content.count(b'"') % 2 == 0:
        return
    limit = csv.field_size_limit(len(content) + 1)
    try:
        for _ in csv.reader(io.StringIO(_decoded(content, path), newline=""), strict=True):
            pass
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            raise InputError(
                f"{path}: ends inside a quoted cell: the file is cut off, or a quote is not closed"
            ) from None
    finally:
        csv.field_size_limit(limit)


def _read_jsonl(path: Path) -> RawTable:
    text = _decoded(_content(path), path).removeprefix("\ufeff")
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
    names = list(dict.fromkeys(name for record in records for name in record))
    columns: dict[str, Column] = {n: [record.get(n) for record in records] for n in names}
    return RawTable(path, columns, len(lines), Faults(path, np.array(numbers, np.int64), lost))


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    return gzip.decompress(content) if path.name.lower().endswith(".gz") else content


def _decoded(content: bytes, path: Path) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 at byte {error.start} ({error.reason}); save it as UTF-8"
        ) from None


def _plain_type(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Undo the dictionaries, views and wide offsets a parquet file may have been written with."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = column.type
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return column.cast(pa.string())
    return column


def check_utf8(texts: pa.ChunkedArray | pa.Array, where: str) -> None:
    # Parquet files may hold any bytes as text.
    try:
        texts.validate(full=True)
    except pa.ArrowException as error:
        raise InputError(f"{where}: not UTF-8 ({error})") from error
