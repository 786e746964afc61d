"""Read and write the files between phases: atomically, with their provenance, without pickle.

A reader returns the complete content or raises an `InputError` that names the file. So no phase
reads a partial file that an interrupted job left behind.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from arena_distill import __version__
from arena_distill.errors import InputError, brief

StrPath = str | os.PathLike[str]

LIBRARIES = (
    *("torch", "transformers", "peft", "numpy", "pyarrow", "scikit-learn", "gptqmodel", "rensa"),
)

ROW_GROUP = 16_384
"""Rows per row group: few enough that their texts fit into one Arrow array."""

_PROVENANCE = b"arena_distill"
_COLUMNS = b"arena_distill.columns_sha256"
_SEALED = b"arena_distill.sealed"  # digests are at the file's end, where other programs drop them
_METADATA = ""
"""In place of a column's name, in the digests."""
DIGEST = b"arena_distill.npy_sha256"
REBUILD = "delete it and run the workflow again: it will be rebuilt"


def provenance(phase: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what made an artifact: its phase, its settings and the versions of libraries.

    `settings` holds JSON values only. There is no time stamp, so the same seed gives the same
    bytes. Libraries that are not installed are omitted; none is imported.
    """
    versions = {"python": platform.python_version(), "arena_distill": __version__}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return {"phase": phase, "settings": dict(settings), "versions": versions}


def write_parquet(table: pa.Table, path: StrPath, provenance: Mapping[str, Any]) -> None:
    """Write `table` to `path` with its provenance in the schema's metadata.

    Other metadata of the table is kept. Pages carry checksums, columns without lists (ids, folds, votes,
    probabilities) and the metadata also digests; `read_parquet` verifies both.
    """
    write_parquet_parts([table], path, provenance)


def write_parquet_parts(
    parts: Iterable[pa.Table], path: StrPath, provenance: Mapping[str, Any]
) -> None:
    """Write tables of one schema below one another, as `write_parquet` would write them together.

    Memory depends on a row group and on the longest part. There must be a part, which may be empty.
    """
    groups = _row_groups(parts)
    first = next(groups)
    metadata = {**(first.schema.metadata or {}), _PROVENANCE: dumps(provenance).encode()}
    metadata |= {_SEALED: b"1"}
    metadata.pop(_COLUMNS, None)  # of the file that the table was read from
    digests = _Digests()
    with (
        replacing(path) as temporary,
        pq.ParquetWriter(
            temporary,
            first.schema.with_metadata(metadata),
            compression="zstd",
            write_page_checksum=True,
        ) as writer,
    ):
        for group in chain([first], groups):
            digests.update(group)
            writer.write_table(group.replace_schema_metadata(metadata), ROW_GROUP)
        written = {_METADATA: _metadata_sha256(metadata), **digests.columns()}
        writer.add_key_value_metadata({_COLUMNS: dumps(written).encode()})


def _row_groups(parts: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The rows of all parts, `ROW_GROUP` at a time; the last table has fewer, or none if there are none."""
    waiting: pa.Table | None = None
    for part in parts:
        waiting = part if waiting is None else pa.concat_tables([waiting, part])
        while len(waiting) > ROW_GROUP:
            yield waiting.slice(0, ROW_GROUP)
            waiting = waiting.slice(ROW_GROUP)
    assert waiting is not None
    yield waiting


def read_parquet(path: StrPath, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a file of `write_parquet`: all columns, or `columns` in this order.

    Raises:
        InputError: the file is missing, damaged, edited, not of `write_parquet`, or lacks a column.
    """
    return pa.concat_tables(read_parquet_parts(path, columns))


def read_parquet_parts(path: StrPath, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Read a file as `read_parquet` does, one row group at a time; there is at least one part.

    Memory depends on a row group. Raises as `read_parquet`, at any part: digests are
    verified after the last one.
    """
    path, digests = Path(path), _Digests()
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            present = file.schema_arrow.names
            absent = [name for name in columns or () if name not in present]
            if absent:
                raise InputError(
                    f"{path}: no column {', '.join(absent)}; the file has {', '.join(present)}; "
                    f"{REBUILD}"
                )
            wanted = present if columns is None else list(columns)
            # Group by group: Arrow reads no nested texts of more than 2 GB at once.
            # The schema has not what was added when its rows had been written.
            metadata = dict(file.metadata.metadata or {})
            metadata.pop(b"ARROW:schema", None)
            written = json.loads(metadata.get(_COLUMNS, b"{}"))
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, wanted).select(wanted)
                table.validate()
                digests.update(table)
                yield table.replace_schema_metadata(metadata)
            if not file.num_row_groups:
                yield file.schema_arrow.empty_table().select(wanted)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: not a whole parquet file ({brief(error)}); {REBUILD}") from error
    if _PROVENANCE not in metadata:
        raise InputError(f"{path}: was not written by Arena Distill; {REBUILD}")
    if _SEALED in metadata and not written:
        raise InputError(f"{path}: was written again by another program; {REBUILD}")
    if written.pop(_METADATA, None) not in (None, _metadata_sha256(metadata)):
        raise InputError(f"{path}: its metadata are not what was written; {REBUILD}")
    found = digests.columns()
    for name in dict.fromkeys(wanted if columns else [*wanted, *written]):
        if written.get(name, found.get(name)) != found.get(name):
            raise InputError(f"{path}: column {name} is not what was written; {REBUILD}")


def fingerprint(table: pa.Table) -> str:
    """Name what a file of `write_parquet` holds, by the digests of its columns."""
    digests = json.loads((table.schema.metadata or {}).get(_COLUMNS, b"{}"))
    digests.pop(_METADATA, None)  # versions of libraries
    return hashlib.sha256(dumps(digests).encode()).hexdigest()[:16]


def check_made_from(origin: Mapping[str, Any], where: StrPath, **now: Any) -> None:
    """Refuse an artifact that was made from other files than there are now.

    Args:
        origin: its provenance; what its `made_from` does not name is not checked.
        where: the artifact, for the message.
        now: by name what it must have been made from, such as a :func:`fingerprint`.

    Raises:
        InputError: names the first that differs.
    """
    made_from = origin.get("made_from", {})
    for name, wanted in now.items():
        if (found := made_from.get(name, wanted)) != wanted:
            raise InputError(
                f"{where}: was made from another {name} ({found}) than there is now ({wanted}); {REBUILD}"
            )


class _Digests:
    """Digests of columns, however they are cut into chunks; a column with lists has none."""

    def __init__(self) -> None:
        self._parts: dict[str, dict[int, Any]] = {}

    def update(self, table: pa.Table) -> None:
        """Take in the next rows."""
        for name, column in zip(table.column_names, table.columns, strict=True):
            if pa.types.is_nested(column.type) and not pa.types.is_fixed_size_list(column.type):
                continue
            parts = self._parts.setdefault(name, {})
            for chunk in column.chunks:
                for number, values in enumerate(_parts(chunk) if len(chunk) else ()):
                    part = parts.setdefault(number, hashlib.sha256())
                    part.update(np.ascontiguousarray(values).data)

    def columns(self) -> dict[str, str]:
        """The digest of each column."""
        return {
            name: hashlib.sha256(b"".join(part.digest() for part in parts.values())).hexdigest()
            for name, parts in self._parts.items()
        }


def _metadata_sha256(metadata: Mapping[bytes, bytes]) -> str:
    told = sorted((k, v) for k, v in metadata.items() if k != _COLUMNS)
    return hashlib.sha256(repr(told).encode()).hexdigest()


def _parts(array: pa.Array) -> list[np.ndarray]:
    """Arrays that say what an Arrow array holds: which values are null, lengths, values."""
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_fixed_size_list(array.type):
        return [valid, *_parts(array.flatten())]
    if pa.types.is_null(array.type):
        return [valid]
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        texts = array.fill_null("").cast(pa.large_string())
        first, count = texts.offset, len(texts)
        offsets = np.frombuffer(texts.buffers()[1], np.int64)[first : first + count + 1]
        content = np.frombuffer(texts.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]
        return [valid, np.diff(offsets), content]
    return [valid, array.fill_null(False if pa.types.is_boolean(array.type) else 0).to_numpy(False)]


def read_provenance(path: StrPath) -> dict[str, Any]:
    """Return the provenance inside a parquet file; raises `InputError` if it has none."""
    try:
        return dict(json.loads((pq.read_schema(path).metadata or {})[_PROVENANCE]))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        why = brief(error)
        raise InputError(f"{path}: not written by Arena Distill ({why}); {REBUILD}") from error


class Spill:
    """Tables of one schema, set aside on disk while a process works, in a file that has no name."""

    def __init__(self, schema: pa.Schema, folder: Path | None = None) -> None:
        """Args: folder: where the file goes, which must be there; None: that of temporary files."""
        self._schema, self._folder = schema, folder or Path(tempfile.gettempdir())
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it goes with the object)
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        self._writer = pa.ipc.new_file(self._file, schema, options=options)
        self._batches = 0

    def add(self, table: pa.Table) -> Spilled:
        """Set a table aside; when it is read, no more can be added."""
        batches = table.cast(self._schema).to_batches()
        with report_full_disk(self._folder):
            for batch in batches:
                self._writer.write_batch(batch)
        self._batches += len(batches)
        return Spilled(self, range(self._batches - len(batches), self._batches))

    def batch(self, number: int) -> pa.RecordBatch:
        """Read a batch again."""
        return self._reader.get_batch(number)

    @cached_property
    def _reader(self) -> pa.ipc.RecordBatchFileReader:
        with report_full_disk(self._folder):
            self._writer.close()
        return pa.ipc.open_file(self._file)


@dataclass(frozen=True)
class Spilled:
    """A table that is set aside; its parts can be read again and again."""

    spill: Spill
    batches: range

    def __iter__(self) -> Iterator[pa.Table]:
        return (pa.Table.from_batches([self.spill.batch(number)]) for number in self.batches)


def file_sha256(path: StrPath) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(obj: Any, path: StrPath) -> None:
    """Write `obj` as JSON, keys in their order; NaN and infinity raise ValueError."""
    write_text(dumps(obj, indent=2) + "\n", path)


def read_json(path: StrPath) -> Any:
    """Read a JSON file; raises `InputError` if it is missing or invalid."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON file ({brief(error)}); {REBUILD}") from error


def write_text(text: str, path: StrPath) -> None:
    """Write `text` as UTF-8."""
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode())


@contextmanager
def atomic_directory(path: StrPath) -> Iterator[Path]:
    """Yield an empty directory that becomes `path` if the block succeeds, else remove it.

    An existing directory at `path` is unchanged until then, and is replaced as a whole.
    """
    path = Path(path)
    temporary = _temporary_path(path)
    try:
        with report_full_disk(path):
            temporary.mkdir(parents=True)
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _flush(file)
            if path.exists():
                # A directory cannot be renamed onto a full one: rename the old one first.
                old = _temporary_path(path)
                path.rename(old)
                temporary.rename(path)
                shutil.rmtree(old)
            else:
                temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def report_full_disk(path: StrPath) -> Iterator[None]:
    """Turn any library's error about a full disk, while writing `path`, into an InputError.

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
def replacing(path: StrPath) -> Iterator[Path]:
    """Yield a temporary path in the same folder; the file becomes `path` if the block succeeds."""
    path = Path(path)
    temporary = _temporary_path(path)
    try:
        with report_full_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _temporary_path(path: Path) -> Path:
    # tempfile would make the file private; results are often shared within a group.
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def dumps(obj: Any, indent: int | None = None) -> str:
    return json.dumps(obj, indent=indent, ensure_ascii=False, allow_nan=False)
