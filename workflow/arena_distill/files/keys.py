"""Join files by the key ``source:id`` of their rows, never by position."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arena_distill.errors import InputError


def key(table: pa.Table) -> pa.Array:
    """Return each row's key ``source:id``; an id is unique within its source only.

    Args:
        table: columns `source` and `id`.
    """
    source = table["source"].cast(pa.string())
    joined = pc.binary_join_element_wise(source, table["id"].cast(pa.string()), ":")
    return joined.combine_chunks()


def locate(wanted: pa.Array, available: pa.Array, where: str) -> np.ndarray:
    """Find the positions of the wanted keys among the available ones: int64 (wanted,).

    Args:
        where: the name of `available` in error messages.

    Raises:
        InputError: a wanted key is missing, or an available one is duplicated.
    """
    counts = pc.value_counts(available)
    twice = pc.greater(counts.field("counts"), 1)
    if pc.any(twice).as_py():
        example = counts.field("values").filter(twice)[0]
        raise InputError(f"{where}: {example} is there more than once")
    positions = pc.index_in(wanted, available)
    if positions.null_count:
        example = wanted.filter(pc.is_null(positions))[0]
        raise InputError(
            f"{where}: {positions.null_count} of {len(wanted)} rows are missing, {example} among them: it "
            "and the file that names these rows are not of one run; run the workflow again, which makes "
            "anew what is older than its inputs"
        )
    return positions.to_numpy(zero_copy_only=False).astype(np.int64)
