"""Read a file of battles by its suffix: CSV, TSV, JSON (all of them also .gz and .zst) or parquet."""

from __future__ import annotations

import stat
from pathlib import Path

import pyarrow as pa

from arena_distill.config.source import EXPECTED, KINDS, PACKED
from arena_distill.config.vocabulary import Escape
from arena_distill.errors import InputError, brief
from arena_distill.files.csv_files import read_csv_file
from arena_distill.files.json_files import read_json_file
from arena_distill.files.parquet_files import read_parquet_file
from arena_distill.files.raw_tables import RawTable, decoded, most_unpacked


def read_table(path: Path, *, escape: Escape = "none") -> RawTable:
    """Read one file by its suffix.

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
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe or device may never end
            raise InputError(f"{path}: is no ordinary file; give a file")
        if kind == "parquet":
            raw = read_parquet_file(path)
        elif kind in ("csv", "tsv"):
            delimiter = "," if kind == "csv" else "\t"
            raw = read_csv_file(path, _content(path, packed), delimiter, escape)
        else:
            raw = read_json_file(path, decoded(_content(path, packed), path), kind)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, MemoryError) as error:
        raise InputError(f"{path}: cannot be read: {brief(error)}") from error
    if not raw.rows:
        raise InputError(f"{path}: holds no battle")
    return raw


def _content(path: Path, packed: str) -> bytes | bytearray:
    """Return the bytes of a file, unpacked; InputError where these are suspiciously many."""
    if not packed:
        return path.read_bytes()
    limit = most_unpacked(path)
    content = bytearray()
    with pa.CompressedInputStream(pa.OSFile(str(path)), PACKED[packed]) as stream:
        while block := stream.read(1 << 24):
            content += block
            if len(content) > limit:
                size = path.stat().st_size
                raise InputError(
                    f"{path}: {size:,} bytes unpack to more than {limit:,}; if this is right, unpack it"
                )
    return content
