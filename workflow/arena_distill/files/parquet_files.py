"""Read the columns of parquet files, each when it is first needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from arena_distill.errors import InputError, brief
from arena_distill.files.raw_tables import (
    ROWS_AT_ONCE,
    Column,
    Faults,
    InMemory,
    RawTable,
    is_list,
    most_unpacked,
    refuse_twice,
)

BUFFER = 1 << 20
"""Bytes of a column that are read at a time; by default all of a row group are."""


def read_parquet_file(path: Path, store: InMemory) -> RawTable:
    with _whole_parquet(path), pq.ParquetFile(path) as file:
        about, names = file.metadata, file.schema_arrow.names
        rows, limit = about.num_rows, most_unpacked(path)
        groups = (about.row_group(i).total_byte_size for i in range(about.num_row_groups))
        if not 0 <= rows < limit / 8 or sum(groups) > limit:
            raise InputError(
                f"{path}: says that it unpacks to {rows:,} rows, or to more than {limit:,} bytes; if this "
                "is right, split it"
            )
    refuse_twice(names, path)
    columns = _ParquetColumns(path, names, rows, store)
    return RawTable(path, columns, rows, Faults(path, np.arange(1, rows + 1)), store)


class _ParquetColumns(Mapping[str, Column]):
    """The columns of a parquet file, each read when it is first asked for.

    Published files have columns of many GB, such as images, that nobody needs here.
    """

    def __init__(self, path: Path, names: Sequence[str], rows: int, store: InMemory) -> None:
        self._path, self._store = path, store
        self._rows = rows
        self._columns: dict[str, pa.ChunkedArray | None] = dict.fromkeys(names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def __getitem__(self, name: str) -> pa.ChunkedArray:
        if (column := self._columns[name]) is None:
            where = f"{self._path}, column {name}"
            with (
                _whole_parquet(self._path),
                pq.ParquetFile(self._path, buffer_size=BUFFER) as file,
            ):
                schema = pa.schema([(name, _plain_type(file.schema_arrow.field(name).type))])
                # In batches, as texts of more than 2 GB do not fit into one Arrow array.
                batches = file.iter_batches(ROWS_AT_ONCE, columns=[name])
                plain = (
                    pa.record_batch([_plain(batch.column(name), where)], schema=schema)
                    for batch in batches
                )
                column = self._store.table(plain, schema)[name]
            if len(column) != self._rows:
                raise InputError(
                    f"{where}: has {len(column):,} of {self._rows:,} rows: not a whole parquet file"
                )
            self._columns[name] = column
        return column


@contextmanager
def _whole_parquet(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: not a whole parquet file ({brief(error)}); "
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
        raise InputError(
            f"{where}: holds {kind} that is not UTF-8 text ({brief(error)})"
        ) from error


def _uuids(column: pa.ExtensionArray) -> pa.Array:
    """Write UUIDs as texts, such as 6af613b6-569c-5c22-9c37-2ed93f31d3af."""
    numbers = pc.fill_null(column.storage, bytes(16)).cast(pa.binary())
    digits = np.frombuffer(b"".join(numbers.to_pylist()).hex().encode(), np.uint8).reshape(-1, 32)
    texts = np.insert(digits, [8, 12, 16, 20], ord("-"), axis=1)
    offsets = pa.py_buffer(np.arange(0, texts.size + 1, 36, dtype=np.int32))
    named = pa.StringArray.from_buffers(len(column), offsets, pa.py_buffer(texts.tobytes()))
    return pc.if_else(column.is_valid(), named, pa.scalar(None, pa.string()))
