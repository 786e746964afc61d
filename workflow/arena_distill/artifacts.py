"""Files between phases: written beside and renamed, with their origin inside, never pickled.

A reader of this module either returns what was written, whole, or raises an `InputError` that
names the file: no phase ever works on half a file that an interrupted job left behind.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import platform
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from arena_distill.errors import InputError

StrPath = str | os.PathLike[str]

LIBRARIES = (
    *("torch", "transformers", "peft", "numpy", "pyarrow", "scikit-learn", "gptqmodel", "rensa"),
)

_PROVENANCE = b"arena_distill"
_DIGEST = b"arena_distill.npy_sha256"
_STATES = b"arena_distill.states_sha256"
_REBUILD = "delete it and run the workflow again: it will be rebuilt"


def provenance(phase: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What made an artifact: its phase, the settings it was given, the versions it ran with.

    `settings` holds JSON values only. There is no time stamp, so that the same seed gives the
    same bytes. Libraries that are not installed are left out; none is imported.
    """
    versions = {"python": platform.python_version(), "arena_distill": _own_version()}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return {"phase": phase, "settings": dict(settings), "versions": versions}


def write_parquet(table: pa.Table, path: StrPath, provenance: Mapping[str, Any]) -> None:
    """Write `table` to `path` with its provenance in the schema's metadata.

    Other metadata of the table is kept. Pages carry checksums, which `read_parquet` verifies.
    """
    origin = {_PROVENANCE: _dumps(provenance).encode()}
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **origin})
    with _replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def read_parquet(path: StrPath, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a file of `write_parquet`: all of it, or `columns` in the order asked for.

    Raises:
        InputError: the file is missing, damaged or no parquet file, or lacks a column.
    """
    path = Path(path)
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            present = file.schema_arrow.names
            absent = [name for name in columns or () if name not in present]
            if absent:
                raise InputError(
                    f"{path}: no column {', '.join(absent)}; the file has {', '.join(present)}; "
                    f"{_REBUILD}"
                )
            table = file.read(columns=None if columns is None else list(columns))
            return table if columns is None else table.select(list(columns))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a whole parquet file ({error}); {_REBUILD}") from error


def read_provenance(path: StrPath) -> dict[str, Any]:
    """Return the provenance inside a parquet file; raises `InputError` where it has none."""
    try:
        origin = (pq.read_schema(path).metadata or {})[_PROVENANCE]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError, KeyError) as error:
        raise InputError(f"{path}: not written by Arena Distill ({error}); {_REBUILD}") from error
    return dict(json.loads(origin))


def ids_path(path: StrPath) -> Path:
    """Return where the ids of a logits file lie: ``fold_0.npy`` → ``fold_0.ids.parquet``."""
    return Path(path).with_suffix(".ids.parquet")


def states_path(path: StrPath) -> Path:
    """Return where the states of a logits file's rows lie: ``fold_0.npy`` → ``fold_0.states``."""
    return Path(path).with_suffix(".states")


def write_logits(
    path: StrPath,
    logits: np.ndarray,
    ids: pa.Table,
    provenance: Mapping[str, Any],
    states: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write logits as ``.npy`` and, beside it, the ids of their rows.

    Args:
        path: ends in ``.npy``.
        logits: float32 (rows, orders, 3), further axes between the first and the last allowed.
        ids: one row per row of `logits`, in the same order.
        provenance: goes into the ids' file.
        states: float16 (rows, views, width) by name, a file each in the folder `states_path(path)`
            (see ``states``); None writes no folder.

    The ids are written before the logits and carry the digests of the other files: whatever
    interrupts the renames, files that do not belong together are never read.

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
    digests = {_DIGEST: hashlib.sha256(content).hexdigest().encode()}
    if states is not None:
        digests[_STATES] = _dumps(_write_states(states_path(path), states, ids.num_rows)).encode()
    ids = ids.replace_schema_metadata({**(ids.schema.metadata or {}), **digests})
    write_parquet(ids, ids_path(path), provenance)
    with _replacing(path) as temporary:
        temporary.write_bytes(content)


def read_logits(path: StrPath) -> tuple[np.ndarray, pa.Table]:
    """Read a pair of files of `write_logits`.

    Returns:
        logits: float32 (rows, orders, 3).
        ids: table of as many rows.

    Raises:
        InputError: one of the files is missing, damaged, or does not belong to the other.
    """
    path = Path(path)
    ids = read_parquet(ids_path(path))
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    digest = (ids.schema.metadata or {}).get(_DIGEST)
    if digest != hashlib.sha256(content).hexdigest().encode():
        raise InputError(f"{path}: damaged, or not the logits of {ids_path(path)}; {_REBUILD}")
    try:
        logits = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{path}: not a .npy file of numbers ({error}); {_REBUILD}") from error
    if fault := _logits_fault(logits, ids.num_rows):
        raise InputError(f"{path}: {fault}; {_REBUILD}")
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
        raise InputError(f"{file}: cannot be read ({error}); {_REBUILD}") from error
    written = (read_parquet(ids).schema.metadata or {}).get(_STATES, b"{}")
    if json.loads(written).get(name) != digest:
        raise InputError(f"{file}: damaged, or not of the rows of {ids}; {_REBUILD}")
    return states


def file_sha256(path: StrPath) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(obj: Any, path: StrPath) -> None:
    """Write `obj` as JSON, keys in their order; NaN and infinity raise ValueError."""
    write_text(_dumps(obj, indent=2) + "\n", path)


def read_json(path: StrPath) -> Any:
    """Read a JSON file; raises `InputError` where it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a JSON file ({error}); {_REBUILD}") from error


def write_text(text: str, path: StrPath) -> None:
    """Write `text` as UTF-8."""
    with _replacing(path) as temporary:
        temporary.write_bytes(text.encode())


@contextmanager
def atomic_directory(path: StrPath) -> Iterator[Path]:
    """Yield an empty directory that becomes `path` if the block succeeds, else is removed.

    A directory already at `path` stays as it is until then, and is replaced as a whole.
    """
    path = Path(path)
    temporary = _beside(path)
    try:
        with full_disk_told(path):
            temporary.mkdir(parents=True)
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _flush(file)
            if path.exists():
                # A directory cannot be renamed onto a full one: step the old one aside first.
                old = _beside(path)
                path.rename(old)
                temporary.rename(path)
                shutil.rmtree(old)
            else:
                temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def full_disk_told(path: StrPath) -> Iterator[None]:
    """Say of what is written below `path` that the disk was full, whichever library met it.

    Raises:
        InputError: no space was left.
    """
    try:
        yield
    except Exception as error:
        # safetensors and torch.save raise errors of their own, torch.save without a reason.
        signs = ("No space left on device", "Disk quota exceeded", "inline_container.cc")
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or any(sign in str(error) for sign in signs):
            raise InputError(
                f"{path}: no space left on its disk: free some and run again; what was finished is kept"
            ) from error
        raise


@contextmanager
def _replacing(path: StrPath) -> Iterator[Path]:
    """Yield a name beside `path`; what is written there becomes `path` if the block succeeds."""
    path = Path(path)
    temporary = _beside(path)
    try:
        with full_disk_told(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _beside(path: Path) -> Path:
    # tempfile would make it private to its owner; results are often shared within a group.
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _dumps(obj: Any, indent: int | None = None) -> str:
    return json.dumps(obj, indent=indent, ensure_ascii=False, allow_nan=False)


def _logits_fault(logits: np.ndarray, rows: int) -> str | None:
    """Say what keeps `logits` from being the float32 logits of `rows` battles, if anything."""
    if logits.dtype != np.float32:
        return f"logits are {logits.dtype}, float32 expected"
    if logits.ndim < 3 or logits.shape[-1] != 3:
        return f"logits have shape {logits.shape}, (rows, orders, 3) expected"
    if logits.shape[0] != rows:
        return f"{logits.shape[0]} rows of logits for {rows} ids"
    if not np.isfinite(logits).all():
        bad = np.flatnonzero(~np.isfinite(logits).reshape(rows, -1).all(axis=1))
        return f"{len(bad)} rows of logits are not finite, the first at position {bad[0]}"
    return None


def _write_states(folder: Path, states: Mapping[str, np.ndarray], rows: int) -> dict[str, str]:
    """Write a file per name; their digests."""
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


def _own_version() -> str:
    import arena_distill

    version = getattr(arena_distill, "__version__", None)
    if version is None:
        try:
            version = metadata.version("arena-distill")
        except metadata.PackageNotFoundError:
            version = "unknown"
    return str(version)
