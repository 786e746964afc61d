"""Judge the battles of files: read as the workflow reads them, in parts that survive a kill.

Each part of `PART` battles is written as it is done, to a folder beside the output. A second start with
the same judge and the same files goes on after the last whole part. At the end the parts become one
file.

Columns of CSV and parquet files wait on disk, and `ROWS_AT_ONCE` of their rows are in memory; JSON is read
whole, and so is a CSV file with backslashes or unusual quotes. A file is converted twice: before its first
battle is judged, all that is wrong with it is known.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from arena_distill.battles.formats.conversion import convert_pieces
from arena_distill.battles.reading import REJECTED_SCHEMA
from arena_distill.config.source import Reading, Source
from arena_distill.errors import InputError
from arena_distill.files.artifacts import (
    file_sha256,
    read_json,
    replacing,
    write_json,
    write_parquet,
)
from arena_distill.files.raw_tables import RawTable, described
from arena_distill.files.readers import read_table
from arena_distill.judging.contract import Contract
from arena_distill.judging.verdicts import Verdicts

PART = 2_048
"""Battles per part: as many are done again after a kill, at most."""

SHOWN = 5
"""Refused rows that are printed; the file of refused rows has all."""

STREAM = "-"

Ask = Callable[[pa.Table], Verdicts]
"""Battles with `id`, `prompt`, `response_a`, `response_b` → verdicts: a judge, or a client of a server."""


@dataclass(frozen=True)
class Predicted:
    """battles: rows that were judged. refused: rows that could not be read."""

    battles: int
    refused: int


def predict_files(
    contract: Contract,
    ask: Ask,
    path: str,
    reading: Reading,
    output: str,
    *,
    part: int = PART,
) -> Predicted:
    """Judge the battles of a file, a folder or a pattern → one table.

    The table has the columns of :meth:`arena_distill.judging.verdicts.Verdicts.to_arrow`, rows in the order
    of the files. Refused rows go to ``<output>.rejected.parquet``, with file, row, column and reason.

    Args:
        path: a file, a folder of shards or a pattern; ``-`` is stdin: CSV, JSON or JSON lines.
        reading: how they are understood.
        output: ``.parquet``, ``.csv`` or ``.jsonl``; ``-`` is stdout, CSV.

    Raises:
        InputError: a file cannot be read, no row can, or the output's suffix is unknown.
    """
    if output == STREAM:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "predictions.csv"
            done = predict_files(contract, ask, path, reading, str(file), part=part)
            sys.stdout.buffer.write(file.read_bytes())
        return done
    target = Path(output)
    if target.suffix not in _WRITERS:
        raise InputError(f"{target}: unknown kind of output; {', '.join(_WRITERS)} or - expected")
    parts = target.with_name(target.name + ".parts")
    with _input(path) as files:
        _start(parts, contract, reading, files, part)
        rows, rejected = _judge_all(ask, reading, files, parts, part)
    if not rows:
        raise InputError(f"{path}: no battle could be read: {_first(rejected)}")
    _join(parts, target)
    told = target.with_name(target.name + ".rejected.parquet")
    if rejected:
        write_parquet(pa.Table.from_pylist(rejected, REJECTED_SCHEMA), told, {"phase": "predict"})
        for line in rejected[:SHOWN]:
            print(f"refused: {described(line)}", file=sys.stderr)
        print(f"{len(rejected):,} rows refused: {told}", file=sys.stderr)
    else:
        told.unlink(missing_ok=True)
    shutil.rmtree(parts)
    return Predicted(rows, len(rejected))


def _judge_all(
    ask: Ask, reading: Reading, files: Sequence[Path], parts: Path, size: int
) -> tuple[int, list[dict[str, Any]]]:
    """Judge all battles that have no part yet; their number, and the refused rows."""
    rejected: list[dict[str, Any]] = []
    rows = number = 0
    with tqdm(unit="battle", mininterval=1, disable=not sys.stderr.isatty()) as bar:
        for file in files:
            raw = read_table(file, escape=reading.escape, folder=parts)
            bar.total = (bar.total or 0) + sum(map(len, _battles(raw, reading, rows)))
            for piece in _cut(_battles(raw, reading, rows), size):
                made = parts / f"{number:06}.parquet"
                if not made.exists():
                    write_parquet(ask(piece).to_arrow(), made, {"phase": "predict"})
                number += 1
                bar.update(len(piece))
            rejected += raw.faults.lines("predict")
            rows += raw.rows
    return sum(pq.read_metadata(p).num_rows for p in sorted(parts.glob("*.parquet"))), rejected


def _battles(raw: RawTable, reading: Reading, before: int) -> Iterator[pa.Table]:
    """The battles of one file that could be read, a few at a time."""
    for found in convert_pieces(raw, reading, votes=False, rows_before=before):
        battles = found.battles.select(["id", "prompt", "response_a", "response_b"])
        yield battles.filter(pa.array(raw.faults.kept()[found.row]))


def _cut(tables: Iterator[pa.Table], size: int) -> Iterator[pa.Table]:
    """The rows of tables in others of `size` rows; the last one may have fewer."""
    rest: list[pa.Table] = []
    for table in tables:
        rows = pa.concat_tables([*rest, table])
        whole = len(rows) - len(rows) % size
        for start in range(0, whole, size):
            yield rows.slice(start, size)
        rest = [rows.slice(whole)]
    if rest and len(rest[0]):
        yield rest[0]


@contextmanager
def _input(path: str) -> Iterator[list[Path]]:
    """The files to read; stdin becomes one whose suffix its first character gives."""
    if path != STREAM:
        yield Source(path=path).shards()
        return
    first = sys.stdin.buffer.read(1 << 16)
    kind = {b"{": "jsonl", b"[": "json"}.get(first.lstrip()[:1], "csv")
    with tempfile.TemporaryDirectory() as folder:
        stored = Path(folder) / f"stdin.{kind}"
        with stored.open("wb") as file:
            file.write(first)
            shutil.copyfileobj(sys.stdin.buffer, file)
        yield [stored]


def _start(
    parts: Path, contract: Contract, reading: Reading, files: Sequence[Path], size: int
) -> None:
    """Keep the parts of an earlier start if judge, content of the files and size of a part are the same."""
    about = {
        "judge": contract.model_dump(mode="json", exclude={"vectors", "provenance"}),
        "files": [file_sha256(file) if file.exists() else "" for file in files],
        "reading": reading.model_dump(mode="json", include={*Reading.model_fields}),
        "rows": size,
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    told = parts / "of.json"
    if told.exists() and read_json(told) == digest:
        if done := len(list(parts.glob("*.parquet"))):
            print(f"{parts}: {done} parts are done already", file=sys.stderr)
        return
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir(parents=True)
    write_json(digest, told)


def _join(parts: Path, output: Path) -> None:
    """Write all parts, in their order, as one file."""
    with replacing(output) as temporary, temporary.open("wb") as stream:
        _WRITERS[output.suffix](stream, (pq.read_table(p) for p in sorted(parts.glob("*.parquet"))))


def _write_parquet(stream: IO[bytes], tables: Iterator[pa.Table]) -> None:
    first = next(tables)
    schema = first.schema.remove_metadata()
    with pq.ParquetWriter(stream, schema, compression="zstd") as writer:
        for table in (first, *tables):
            writer.write_table(table.replace_schema_metadata(None))


def _write_csv(stream: IO[bytes], tables: Iterator[pa.Table]) -> None:
    first = next(tables)
    with pa_csv.CSVWriter(stream, first.schema) as writer:
        for table in (first, *tables):
            writer.write_table(table)


def _write_json_lines(stream: IO[bytes], tables: Iterator[pa.Table]) -> None:
    for table in tables:
        for row in table.to_pylist():
            stream.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


_WRITERS = {".parquet": _write_parquet, ".csv": _write_csv, ".jsonl": _write_json_lines}


def _first(rejected: Sequence[dict[str, Any]]) -> str:
    return described(rejected[0]) if rejected else "it has no row"
