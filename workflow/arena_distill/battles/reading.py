"""Raw files → canonical battles: read, convert, and say of every refused row why.

What a file may look like is in ``battles.formats``; ``battles.parts`` decides which battles are kept. Here
they get prompt groups and are written, with the refused rows and the counts of all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from arena_distill.battles.parts import SCHEMA, Files, Part, read_parts
from arena_distill.battles.prompts import number_digests
from arena_distill.battles.row_counts import check_refused, count_rows, print_counts
from arena_distill.battles.votes import with_classes
from arena_distill.config.phases.battles import BattlesSettings
from arena_distill.config.source import SOURCES
from arena_distill.errors import InputError
from arena_distill.files.artifacts import (
    StrPath,
    provenance,
    write_json,
    write_parquet,
    write_parquet_parts,
)
from arena_distill.verdicts import CLASSES, Ties

REJECTED_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("file", pa.string()),
        ("row", pa.int64()),  # the first battle of the file is row 1
        ("column", pa.string()),  # null where the row as a whole is at fault
        ("reason", pa.string()),
    ]
)


def read_battles(files: Files, ties: Ties = "class") -> tuple[pa.Table, pa.Table]:
    """Read the files of each source.

    Args:
        ties: what a tie is. Unless it is a class, votes have two: see ``Votes.among``.

    Returns:
        battles: table of `SCHEMA` (of two classes a vote is two numbers); sources in the order of
            `SOURCES`, rows in the order of files.
        rejected: table of `REJECTED_SCHEMA`, one line per refused row with its first fault. `row`
            counts rows from 1: the header and blank lines are not counted, and a row whose text
            runs over many lines is one. Rows of ``test`` whose text cannot be read are listed too,
            but kept as raw text, since every test battle must be predicted; their reason starts
            with `KEPT_AS_RAW_TEXT`. Rows that are left out on purpose are listed with `DROPPED`.

    Without a column of ids (which ``test`` must have), the n-th row of a source is called ``row<n>``; of a
    row of several answers the battle of answers i and j is called ``<id>-i-j``. The votes of ``test`` and
    ``unlabelled`` are not read, even if they are there. Rows of other sources that have no vote and are
    kept become battles of ``unlabelled``, called ``<source>-<id>``. With ``annotators: merge``, rows of one
    battle in a source's files become one, see :func:`merge_annotators`. Of battles that share an id in a
    source the first is kept. ``group`` is of :func:`arena_distill.battles.prompts.prompt_groups`, over
    all sources.

    Raises:
        InputError: a file is missing, empty, damaged, not UTF-8, of no known format or lacks columns; no
            row of ``train`` is usable; an id of ``test`` is missing or appears twice.
        ValueError: an unknown source.
    """
    parts = read_parts(files, ties)
    return pa.concat_tables(_battles(parts, ties)), _rejected(parts)


def write_battles(
    files: Files,
    battles_path: StrPath,
    rejected_path: StrPath,
    reading_path: StrPath,
    settings: BattlesSettings,
) -> None:
    """Read `files`, write both tables of `read_battles` and their counts, and print the counts.

    Memory depends on the longest file; texts wait on the disk of `battles_path`.

    Args:
        files: ``train`` must be among them.
        battles_path: where the battles go.
        rejected_path: where the refused rows and their reasons go.
        reading_path: where the counts go, as JSON: per source its files and their formats, rows,
            refused, dropped and raw-text rows, battles by kind of vote as read, reasons.
        settings: `max_refused` is the largest share of a source's rows that may be refused.

    Raises:
        InputError: as `read_battles`; also if more rows of a source are refused, or all of a kind of vote.
    """
    if not files.get("train"):
        raise InputError("no train files: give at least one file of labelled battles")
    folder = Path(battles_path).parent
    folder.mkdir(parents=True, exist_ok=True)
    parts = read_parts(files, settings.ties, folder)
    counts = {
        source: count_rows([part for part in parts if part.source == source])
        for source in SOURCES
        if files.get(source)
    }
    for source, count in counts.items():
        print_counts(source, count)
    for source, count in counts.items():
        mine = [part for part in parts if part.source == source]
        check_refused(source, mine, count, settings.max_refused)
    origin = provenance("battles", settings.model_dump(mode="json"))
    rejected = _rejected(parts)
    write_json({"provenance": origin, "sources": counts}, reading_path)
    write_parquet(rejected, rejected_path, origin)
    write_parquet_parts(_battles(parts, settings.ties), battles_path, origin)
    if rejected.num_rows:
        print(f"each row and its reason: {rejected_path}")


def _battles(parts: Sequence[Part], ties: Ties) -> Iterator[pa.Table]:
    """The battles that are kept, in the order of `SOURCES`: tables of `SCHEMA`, the first one empty."""
    schema = with_classes(SCHEMA, len(CLASSES) if ties == "class" else 2)
    yield schema.empty_table()
    ordered = [(source, part) for source in SOURCES for part in parts]
    groups = number_digests(
        part.keys["prompt"].filter(pa.array(part.good(source))) for source, part in ordered
    )
    done = 0
    for source, part in ordered:
        for battles in part.kept(ties, source):
            group = groups[done : done + len(battles)]
            yield battles.append_column("group", [group]).cast(schema)
            done += len(battles)


def _rejected(parts: Sequence[Part]) -> pa.Table:
    lines = [line for part in parts for line in part.faults.lines(part.source)]
    return pa.Table.from_pylist(lines, schema=REJECTED_SCHEMA)
