"""Read and write logits as `.npy`, with the ids of their rows and the hidden states for students."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa

from arena_distill import layout
from arena_distill.errors import InputError, brief
from arena_distill.files.artifacts import (
    DIGEST,
    REBUILD,
    StrPath,
    atomic_directory,
    dumps,
    file_sha256,
    read_parquet,
    replacing,
    write_parquet,
)
from arena_distill.verdicts import Classes

_STATES = b"arena_distill.states_sha256"


def ids_path(path: StrPath) -> Path:
    """Return the path of a logits file's ids: ``fold_0.npy`` → ``fold_0.ids.parquet``."""
    return Path(layout.ids(str(path)))


def states_path(path: StrPath) -> Path:
    """Return the folder of a logits file's states: ``fold_0.npy`` → ``fold_0.states``."""
    return Path(layout.states(str(path)))


def write_logits(
    path: StrPath,
    logits: np.ndarray,
    ids: pa.Table,
    provenance: Mapping[str, Any],
    states: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write logits as ``.npy``, and the ids of their rows next to it.

    Args:
        path: ends in ``.npy``.
        logits: float32 (rows, orders, classes), further axes between the first and the last allowed.
        ids: one row per row of `logits`, in the same order.
        provenance: written into the file of the ids.
        states: float16 (rows, views, width) by name, one file each in the folder `states_path(path)`
            (see ``models.hidden_states``); None writes no folder.

    The ids are written before the logits and hold the digests of the other files, and of themselves. So
    files that do not belong together are never read, even if a job was interrupted between the renames.

    Raises:
        ValueError: shape, dtype or row counts are wrong, or a number is not finite.
    """
    path = Path(path)
    if path.suffix != ".npy":
        raise ValueError(f"logits are written as .npy, got {path}")
    if fault := _logits_fault(logits, ids.num_rows):
        raise ValueError(f"{path}: {fault}")
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(logits), allow_pickle=False)
    content = buffer.getvalue()
    digests = {DIGEST: hashlib.sha256(content).hexdigest().encode()}
    if states is not None:
        digests[_STATES] = dumps(_write_states(states_path(path), states, ids.num_rows)).encode()
    ids = ids.replace_schema_metadata({**(ids.schema.metadata or {}), **digests})
    write_parquet(ids, ids_path(path), provenance)
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def read_logits(path: StrPath) -> tuple[np.ndarray, pa.Table]:
    """Read the two files of `write_logits`.

    Returns:
        logits: float32 (rows, orders, classes).
        ids: a table with the same rows.

    Raises:
        InputError: a file is missing or damaged, or the two do not belong together.
    """
    path = Path(path)
    ids = read_parquet(ids_path(path))
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    digest = (ids.schema.metadata or {}).get(DIGEST)
    if digest != hashlib.sha256(content).hexdigest().encode():
        raise InputError(f"{path}: damaged, or not the logits of {ids_path(path)}; {REBUILD}")
    try:
        logits = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(
            f"{path}: not a .npy file of numbers ({brief(error)}); {REBUILD}"
        ) from error
    if fault := _logits_fault(logits, ids.num_rows):
        raise InputError(f"{path}: {fault}; {REBUILD}")
    return logits, ids


def read_states(path: StrPath, name: str) -> np.ndarray:
    """Read states that `write_logits` wrote with the logits at `path`.

    Returns:
        float16 (rows, views, width), rows as in the logits' ids.

    Raises:
        InputError: the file is missing, damaged, or not of these logits.
    """
    file = states_path(path) / f"{name}.npy"
    ids = ids_path(path)
    try:
        digest = file_sha256(file)
        states: np.ndarray = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{file}: cannot be read ({brief(error)}); {REBUILD}") from error
    written = (read_parquet(ids).schema.metadata or {}).get(_STATES, b"{}")
    if json.loads(written).get(name) != digest:
        raise InputError(f"{file}: damaged, or not of the rows of {ids}; {REBUILD}")
    return states


def _logits_fault(logits: np.ndarray, rows: int) -> str | None:
    """Say why `logits` are not the float32 logits of `rows` battles; None if they are."""
    if logits.dtype != np.float32:
        return f"logits are {logits.dtype}, float32 expected"
    if logits.ndim < 3 or logits.shape[-1] not in get_args(Classes):
        return f"logits have shape {logits.shape}, (rows, orders, 3 or 2 classes) expected"
    if logits.shape[0] != rows:
        return f"{logits.shape[0]} rows of logits for {rows} ids"
    if not np.isfinite(logits).all():
        bad = np.flatnonzero(~np.isfinite(logits).reshape(rows, -1).all(axis=1))
        return f"{len(bad)} rows of logits are not finite, the first at position {bad[0]}"
    return None


def _write_states(folder: Path, states: Mapping[str, np.ndarray], rows: int) -> dict[str, str]:
    """Write one file per name; returns their digests."""
    for name, values in states.items():
        if values.dtype != np.float16 or values.ndim != 3 or len(values) != rows:
            raise ValueError(
                f"{folder}: {name} is {values.dtype} {values.shape}, float16 ({rows}, views, width) "
                "expected"
            )
        if not np.isfinite(values).all():
            raise ValueError(f"{folder}: {name} is not finite")
    with atomic_directory(folder) as temporary:
        files = {name: temporary / f"{name}.npy" for name in states}
        for name, file in files.items():
            np.save(file, np.ascontiguousarray(states[name]), allow_pickle=False)
        return {name: file_sha256(file) for name, file in files.items()}
