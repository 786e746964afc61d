"""Uninterpreted tables: columns as a file has them, the faults of its rows, and cells as texts."""

from __future__ import annotations

import json
import mmap
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arena_distill.errors import InputError, shown
from arena_distill.files.artifacts import report_full_disk

KEPT_AS_RAW_TEXT = "kept as raw text: "
"""How the reason of a row begins that is faulty and used all the same (test battles only)."""

DROPPED = "dropped: "
"""How the reason of a row begins that is left out because the configuration says so."""

Content: TypeAlias = bytes | bytearray | mmap.mmap

Column: TypeAlias = pa.ChunkedArray | list[Any]
"""An Arrow column (CSV, parquet) or Python values as JSON gives them (JSON lines)."""

ROWS_AT_ONCE = 16_384
"""Texts are handled so many rows at a time: those of a whole file may be too long for one Arrow array."""
UNPACKED_BYTES = 1 << 30
UNPACKED_RATIO = 50

_SURROGATE = re.compile("[\ud800-\udfff]")


class InMemory:
    """Where a file's content and its columns wait until they are used: in memory."""

    def content(self, blocks: Iterable[bytes]) -> Content:
        content = bytearray()
        for block in blocks:
            content += block
        return content

    def table(self, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> pa.Table:
        return pa.Table.from_batches(list(batches), schema)

    def release(self) -> None:
        """Give back memory; what waits is there all the same."""


class OnDisk(InMemory):
    """The same in files without names, mapped into memory: only what is used between releases takes any."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._maps: list[mmap.mmap] = []

    def content(self, blocks: Iterable[bytes]) -> Content:
        with self._file() as file:
            for block in blocks:
                file.write(block)
            if not file.tell():
                return b""
        return self._maps[-1]

    def table(self, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> pa.Table:
        with self._file() as file, pa.ipc.new_file(file, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
                self.release()
        return pa.ipc.open_file(pa.py_buffer(self._maps[-1])).read_all()

    def release(self) -> None:
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)

    @contextmanager
    def _file(self) -> Iterator[IO[bytes]]:
        """A file to write, mapped at the end."""
        with tempfile.TemporaryFile(dir=self._folder) as file:
            with report_full_disk(self._folder):
                yield file
                file.flush()
            self._maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


@dataclass
class RawTable:
    """A file as read: its columns, uninterpreted."""

    path: Path
    columns: Mapping[str, Column]
    rows: int  # in the file, those lost in reading included
    faults: Faults
    store: InMemory = field(default_factory=InMemory)

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

    def kept(self) -> np.ndarray:
        """Which rows can be kept: bool (rows that could be read,)."""
        keep = np.ones(len(self.numbers), bool)
        keep[self.fatal()] = False
        return keep

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


def described(line: dict[str, Any]) -> str:
    """A line of the table of rejected rows, as people read it."""
    column = f", column {line['column']}" if line["column"] else ""
    return f"{line['file']}, row {line['row']}{column}: {line['reason']}"


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


def is_list(kind: pa.DataType) -> bool:
    types = pa.types
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view)
    return any(check(kind) for check in (*lists, types.is_large_list_view))


def most_unpacked(path: Path) -> int:
    """To how many bytes a packed file may unpack: more is a bomb."""
    return max(UNPACKED_BYTES, UNPACKED_RATIO * path.stat().st_size)


def refuse_twice(names: Sequence[str], path: Path) -> None:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"{path}: column {', '.join(map(shown, twice[:9]))} appears twice")


def decoded(content: Content, path: Path) -> str:
    try:
        return str(content, "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 at byte {error.start} ({error.reason}); save it as UTF-8"
        ) from None
