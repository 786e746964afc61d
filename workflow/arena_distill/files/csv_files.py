"""Read CSV and TSV files strictly: a misplaced quote is an error with its row, never a swallowed row."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from arena_distill.config.vocabulary import Escape
from arena_distill.errors import InputError, brief
from arena_distill.files.raw_tables import (
    ROWS_AT_ONCE,
    Column,
    Content,
    Faults,
    InMemory,
    RawTable,
    decoded,
    refuse_twice,
)

BLOCK = 64 << 20
"""Bytes that are looked at together."""


def read_csv_file(
    path: Path, content: Content, delimiter: str, escape: Escape, store: InMemory
) -> RawTable:
    _check_encoding(content, path, store)
    if escape == "backslash":
        # \" is a quote, \\ a backslash, any other backslash stays. No UTF-8 text has the byte FF.
        content = (
            bytes(content).replace(rb"\\", b"\xff").replace(rb"\"", b'""').replace(b"\xff", b"\\")
        )
    if not _plainly_quoted(content, delimiter, store):
        raw = _read_csv_slowly(path, content, delimiter, escape)
        if escape == "backslash":
            raise InputError(f"{path}: has quotes in cells that are not quoted; quote these cells")
        return raw
    ragged: list[pa_csv.InvalidRow] = []

    def skip(row: pa_csv.InvalidRow) -> str:
        ragged.append(row)
        return "skip"

    try:
        with pa_csv.open_csv(
            pa.BufferReader(pa.py_buffer(content)),
            # Only a single thread knows the numbers of rows.
            read_options=pa_csv.ReadOptions(use_threads=False, block_size=BLOCK),
            parse_options=pa_csv.ParseOptions(
                delimiter=delimiter, newlines_in_values=True, invalid_row_handler=skip
            ),
            convert_options=pa_csv.ConvertOptions(default_column_type=pa.string()),
        ) as reader:
            refuse_twice(reader.schema.names, path)
            table = store.table(reader, reader.schema)
    except pa.ArrowException as error:
        raise InputError(f"{path}: not a CSV file ({brief(error)})") from error
    lost = [(row.number - 1, _ragged(row.actual_columns, row.expected_columns)) for row in ragged]
    rows = table.num_rows + len(lost)
    numbers = np.setdiff1d(np.arange(1, rows + 1), [number for number, _ in lost])
    columns = {name: table[name] for name in table.column_names}
    return RawTable(path, columns, rows, Faults(path, numbers, lost), store)


def _ragged(cells: int, expected: int) -> str:
    return f"has {cells} cells, the header {expected}"


def _check_encoding(content: Content, path: Path, store: InMemory) -> None:
    # Seen as long Arrow strings, without the copy, up to four times as large, of decoding it.
    whole, start = pa.py_buffer(content), 0
    while start < len(content):
        end = min(start + BLOCK, len(content))
        while end < len(content) and end > start + BLOCK - 4 and content[end] & 0xC0 == 0x80:
            end -= 1  # not within a character
        offsets = pa.py_buffer(np.array([0, end - start], np.int64))
        text = pa.LargeStringArray.from_buffers(1, offsets, whole.slice(start, end - start))
        try:
            text.validate(full=True)
        except pa.ArrowException:
            decoded(content, path)
        store.release()
        start = end


def _plainly_quoted(content: Content, delimiter: str, store: InMemory) -> bool:
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
    for begin in range(0, len(text), BLOCK):
        quotes = begin + np.flatnonzero(text[begin : begin + BLOCK] == ord('"'))
        opening, closing = quotes[seen % 2 :: 2], quotes[1 - seen % 2 :: 2]
        if not (edge[text[opening - 1]] | (opening == start)).all():
            return False
        if not (edge[text[(closing + 1) % len(text)]] | (closing == len(text) - 1)).all():
            return False
        seen += len(quotes)
        store.release()
    return seen % 2 == 0


def _read_csv_slowly(path: Path, content: Content, delimiter: str, escape: Escape) -> RawTable:
    """Read a CSV file whose quotes are unusual by Python's strict parser, which decides what they mean."""
    text = decoded(content, path).removeprefix("\ufeff")
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
    refuse_twice(header, path)
    cells = zip(*kept, strict=True) if kept else [()] * len(header)
    columns: dict[str, Column] = {
        name: pa.chunked_array([pa.array(values[i : i + ROWS_AT_ONCE], pa.string())
                                for i in range(0, len(values), ROWS_AT_ONCE)], pa.string())
        for name, values in zip(header, cells, strict=True)
    }  # fmt: skip
    return RawTable(path, columns, count, Faults(path, np.array(numbers, np.int64), lost))
