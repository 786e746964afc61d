"""Take battles as people hold them in memory: a list of dicts, columns, pandas or Arrow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arena_distill.battles.votes import VOTE_FIELDS
from arena_distill.encoding.sequences import FIELDS
from arena_distill.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    Battles: TypeAlias = (
        pa.Table | pd.DataFrame | Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]]
    )
    """Battles with `prompt`, `response_a` and `response_b`, each a text or a list of turns."""

TURNS = pa.list_(pa.string())


def battles_table(battles: Battles) -> pa.Table:
    """Bring battles into the canonical schema, without votes; an `id`, if there is one, is kept as text.

    Args:
        battles: each of the fields `prompt`, `response_a`, `response_b` is one text, or a list of turns.

    Raises:
        InputError: a field is missing, null or not text; it names the row and the column.
    """
    columns = _columns(battles)
    if missing := [name for name in FIELDS if name not in columns]:
        raise InputError(
            f"battles: no column {', '.join(missing)}; there are {', '.join(map(str, columns)) or 'none'}"
        )
    fields = {name: _turns(columns[name], name) for name in FIELDS}
    rows = len(fields["prompt"])
    if any(len(column) != rows for column in fields.values()):
        counts = ", ".join(f"{name} {len(column)}" for name, column in fields.items())
        raise InputError(f"battles: columns of different lengths: {counts}")
    ids = columns.get("id", np.arange(rows))
    return pa.table(
        {
            "id": _array(ids, "id").cast(pa.string()),
            "source": pa.repeat("test", rows),
            **fields,
            VOTE_FIELDS[0].name: pa.nulls(rows, VOTE_FIELDS[0].type),
            VOTE_FIELDS[1].name: pa.repeat(pa.scalar(1, pa.float32()), rows),
        }
    )


def _columns(battles: Any) -> Mapping[str, Any]:
    if isinstance(battles, pa.Table):
        return {name: battles[name] for name in battles.column_names}
    if hasattr(battles, "columns") and hasattr(battles, "to_numpy"):  # pandas
        return {str(name): battles[name].tolist() for name in battles.columns}
    if isinstance(battles, Mapping):
        if all(isinstance(battles.get(name), str) for name in FIELDS):
            raise InputError("battles: one battle; give a list of battles, or call `compare`")
        return battles
    rows = list(battles)
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise InputError(f"battles: row {number}: a dict expected, got {type(row).__name__}")
        if missing := [name for name in FIELDS if name not in row]:
            raise InputError(f"battles: row {number}: no {', '.join(missing)}")
    names = dict.fromkeys(name for row in rows for name in row if name in (*FIELDS, "id"))
    return {name: [row.get(name) for row in rows] for name in names or FIELDS}


def _turns(values: Any, name: str) -> pa.Array:
    """A column as lists of turns: list<string> (rows,)."""
    if isinstance(values, list | tuple):
        for number, value in enumerate(values):
            whole = [value] if isinstance(value, str) else value
            is_list = isinstance(whole, list | tuple | np.ndarray)
            if not is_list or not all(isinstance(turn, str) for turn in whole):
                raise InputError(
                    f"battles: row {number}, column {name}: a text or a list of texts expected, "
                    f"got {value!r:.60}"
                )
        values = [[value] if isinstance(value, str) else list(value) for value in values]
    column = _array(values, name)
    if pa.types.is_null(column.type) and not len(column):
        return pa.array([], TURNS)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        _refuse_nulls(column, name)
        return pa.ListArray.from_arrays(
            pa.array(np.arange(len(column) + 1, dtype=np.int32)), column.cast(pa.string())
        )
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise InputError(
            f"battles: column {name}: texts or lists of texts expected, got {column.type}"
        )
    _refuse_nulls(column, name)
    turns = column.cast(TURNS)
    if turns.flatten().null_count:
        row = np.flatnonzero(_has_null(turns))[0]
        raise InputError(f"battles: row {row}, column {name}: a turn is null")
    return turns


def _array(values: Any, name: str) -> pa.Array:
    try:
        found = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values)
    except (pa.ArrowException, TypeError, ValueError, UnicodeError) as error:
        raise InputError(f"battles: column {name}: {error}") from None
    return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found


def _refuse_nulls(column: pa.Array, name: str) -> None:
    if column.null_count:
        row = pc.index(column.is_null(), True).as_py()
        raise InputError(f"battles: row {row}, column {name}: null; a text expected")


def _has_null(turns: pa.ListArray) -> np.ndarray:
    """Which rows have a turn that is null: bool (rows,)."""
    rows = np.asarray(pc.list_parent_indices(turns))
    null = np.asarray(turns.flatten().is_null())
    return np.bincount(rows, null, minlength=len(turns)) > 0
