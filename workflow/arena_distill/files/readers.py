"""Read a file of battles by its suffix: CSV, TSV, JSON (all of them also .gz and .zst) or parquet."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from arena_distill.config.source import EXPECTED, KINDS, PACKED
from arena_distill.config.vocabulary import Escape
from arena_distill.errors import InputError, brief
from arena_distill.files.csv_files import read_csv_file
from arena_distill.files.json_files import read_json_file
from arena_distill.files.parquet_files import read_parquet_file
from arena_distill.files.raw_tables import InMemory, OnDisk, RawTable, decoded, most_unpacked


def read_table(path: Path, *, escape: Escape = "none", folder: Path | None = None) -> RawTable:
    """Read one file by its suffix.

    Args:
        folder: where the columns of CSV and parquet files wait on disk; None: in memory.

    Raises:
        InputError: it is missing, no ordinary file, damaged, of an unknown kind or empty, unpacks to
            more than :func:`most_unpacked`, or is a CSV file that is not strictly one.
    """
    kind, _, packed = path.name.lower().rpartition(".")
    if packed in PACKED:
        kind = kind.rpartition(".")[2]
    else:
        kind, packed = packed, ""
    if kind not in KINDS or (packed and kind == "parquet"):
        raise InputError(f"{path}: unknown kind of file; {EXPECTED}")
    store = OnDisk(folder) if folder else InMemory()
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe or device may never end
            raise InputError(f"{path}: is no ordinary file; give a file")
        if kind == "parquet":
            raw = read_parquet_file(path, store)
        elif kind in ("csv", "tsv"):
            delimiter = "," if kind == "csv" else "\t"
            raw = read_csv_file(
                path, store.content(_blocks(path, packed)), delimiter, escape, store
            )
        else:
            text = decoded(InMemory().content(_blocks(path, packed)), path)
            raw = read_json_file(path, text, kind)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, MemoryError) as error:
        raise InputError(f"{path}: cannot be read: {brief(error)}") from error
    if not raw.rows:
        raise InputError(f"{path}: holds no battle")
    return raw


def _blocks(path: Path, packed: str) -> Iterator[bytes]:
    """The bytes of a file, unpacked; InputError where these are suspiciously many, or never written."""
    limit, seen = most_unpacked(path), 0
    file = pa.OSFile(str(path))
    with pa.CompressedInputStream(file, PACKED[packed]) if packed else file as stream:
        while block := stream.read(1 << 24):
            seen += len(block)
            if packed and seen > limit:
                size = path.stat().st_size
                raise InputError(
                    f"{path}: {size:,} bytes unpack to more than {limit:,}; if this is right, unpack it"
                )
            if not block.strip(b"\0"):
                raise InputError(
                    f"{path}: cannot be read: from byte {seen - len(block):,} on it holds zeros: it was "
                    "not wholly written or copied; copy it again"
                )
            yield block
