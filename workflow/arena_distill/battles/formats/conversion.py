"""A raw table → canonical battles, by the format that its columns show or the configuration names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arena_distill.battles.formats import (
    battles,
    chosen_rejected,
    conversations,
    graded,
    ranking,
    ratings,
)
from arena_distill.battles.formats.canonical import Battles
from arena_distill.battles.formats.columns import Rows, Table, columns_found, resolve
from arena_distill.battles.formats.texts import text_kind
from arena_distill.config.source import TEXT_COLUMNS, Reading
from arena_distill.config.vocabulary import BattleFormat
from arena_distill.errors import InputError
from arena_distill.files.raw_tables import RawTable, column_texts, is_list, plain_text


@dataclass(frozen=True)
class Format:
    """A shape of published preferences.

    Args:
        convert: rows → battles; what is wrong with a row goes to the table's faults.
        needs: the columns it has, by our names; one of the lists.
        votes: the columns of which it needs one where votes are read.
    """

    convert: Callable[[Rows], Battles]
    needs: tuple[tuple[str, ...], ...]
    votes: tuple[str, ...] = ()


FORMATS: dict[BattleFormat, Format] = {
    "battles": Format(
        battles.convert,
        (("prompt", "response_a", "response_b"),),
        ("winner", "winner_model_a", "both_equal"),
    ),
    "conversations": Format(
        conversations.convert,
        (("conversation_a", "conversation_b"),),
        ("winner", "winner_model_a", "both_equal"),
    ),
    "chosen_rejected": Format(chosen_rejected.convert, (("chosen", "rejected"),)),
    "graded": Format(graded.convert, (("prompt", "response_a", "response_b"),), ("grade",)),
    "ratings": Format(ratings.convert, (("prompt", "completions"),)),
    "ranking": Format(ranking.convert, (("prompt", "answers"), ("prompt", "chosen", "rejected"))),
}


@dataclass(frozen=True)
class Converted:
    """The battles of one file.

    Args:
        format: what the file was taken for.
        names: our names of the columns → the file's.
        battles: ``id``, ``prompt``, ``response_a``, ``response_b``
            (list<string>), ``model_a``, ``model_b``, ``language``, ``category`` (string); faulty rows
            still among them.
        vote: float64 (battles, 3), shares of A, B and tie; NaN without a vote.
        weight: float64 (battles,).
        row: int64 (battles,), the row of each in the raw table.
    """

    format: BattleFormat
    names: dict[str, str]
    battles: pa.Table
    vote: np.ndarray
    weight: np.ndarray
    row: np.ndarray


def convert(
    raw: RawTable,
    reading: Reading,
    *,
    votes: bool = True,
    keep_unreadable: bool = False,
    rows_before: int = 0,
) -> Converted:
    """Convert a file.

    Args:
        reading: how it is understood.
        votes: whether votes are read.
        keep_unreadable: keep the raw text of a cell that cannot be read instead of refusing its row.
        rows_before: of the files before; where there are no ids, rows are numbered from there.

    What is wrong with a row is added to `raw.faults`.

    Raises:
        InputError: the format is unknown or ambiguous, a column is missing or holds no text, or a column
            is neither nearly all turns nor nearly all plain texts.
    """
    parts = list(
        convert_pieces(
            raw, reading, votes=votes, keep_unreadable=keep_unreadable, rows_before=rows_before
        )
    )
    return Converted(
        parts[0].format,
        parts[0].names,
        pa.concat_tables([part.battles for part in parts]),
        np.concatenate([part.vote for part in parts]),
        np.concatenate([part.weight for part in parts]),
        np.concatenate([part.row for part in parts]),
    )


def convert_pieces(
    raw: RawTable,
    reading: Reading,
    *,
    votes: bool = True,
    keep_unreadable: bool = False,
    rows_before: int = 0,
) -> Iterator[Converted]:
    """Convert a file, `ROWS_AT_ONCE` rows at a time; arguments and errors are those of :func:`convert`.

    What is decided for a column as a whole is decided before the first of them.
    """
    names = resolve(raw, reading.columns)
    kind = detect(raw, names, votes=votes) if reading.format == "auto" else reading.format
    _require(raw, kind, names, votes=votes)
    texts = {}
    for name in TEXT_COLUMNS:
        if name in names and not (kind == "ranking" and name in ("chosen", "rejected")):
            where = f"{raw.path}, column {names[name]}"
            column = raw.columns[names[name]]
            texts[name] = text_kind(column, reading.text, where, raw.store.release)
    table = Table(raw, names, texts, reading, votes, keep_unreadable)
    ids = _ids(raw, names, reading, rows_before)
    for rows in table.pieces():
        part = FORMATS[kind].convert(rows)
        yield Converted(
            kind,
            names,
            pa.Table.from_batches([_columns(rows, part, ids)]),
            part.vote,
            _weights(rows, part),
            rows.start + part.row,
        )


_TURNS = pa.list_(pa.string())
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        *((name, _TURNS) for name in ("prompt", "response_a", "response_b")),
        *((name, pa.string()) for name in ("model_a", "model_b", "language", "category")),
    ]
)
"""Of `Converted.battles`."""


def detect(raw: RawTable, names: dict[str, str], *, votes: bool) -> BattleFormat:
    """Say which format the columns show; InputError where that is none of them or more than one."""
    shown = list(_shown(raw, names))
    if len(shown) == 1:
        return shown[0]
    if shown:
        raise InputError(
            f"{raw.path}: may be {' or '.join(shown)}; {columns_found(raw)}; set `format` to one of these"
        )
    known = "; ".join(f"{name} ({_needs(of)})" for name, of in FORMATS.items())
    raise InputError(
        f"{raw.path}: of no known format; {columns_found(raw)}; formats: {known}; "
        "other names of columns go into `columns`"
    )


def _shown(raw: RawTable, names: dict[str, str]) -> Iterator[BattleFormat]:
    there = set(names)
    if {"prompt", "completions"} <= there:
        yield "ratings"
    if {"prompt", "answers"} <= there:
        yield "ranking"
    if {"chosen", "rejected"} <= there:
        lists = "prompt" in there and _lists_of_texts(raw, names["chosen"])
        yield "ranking" if lists else "chosen_rejected"
    if {"conversation_a", "conversation_b"} <= there:
        yield "conversations"
    if {"prompt", "response_a", "response_b"} <= there:
        voted = bool(there & set(FORMATS["battles"].votes))
        if "grade" in there:
            yield "graded"
        if voted or "grade" not in there:
            yield "battles"


def _lists_of_texts(raw: RawTable, name: str) -> bool:
    column = raw.columns[name]
    if isinstance(column, pa.ChunkedArray):
        return is_list(column.type) and not pa.types.is_nested(column.type.value_type)
    first = next((cell for cell in column if cell), None)
    return isinstance(first, list) and isinstance(first[0], str)


def _needs(of: Format) -> str:
    return " or ".join(", ".join(names) for names in of.needs)


def _require(raw: RawTable, kind: BattleFormat, names: dict[str, str], *, votes: bool) -> None:
    """Raise InputError unless the file has the columns of its format."""
    of = FORMATS[kind]
    if not any(set(needed) <= set(names) for needed in of.needs):
        absent = [name for name in of.needs[-1] if name not in names]
        raise InputError(
            f"{raw.path}: no column {', '.join(absent)} for format {kind}; {columns_found(raw)}"
        )
    if votes and of.votes and not set(of.votes) & set(names):
        raise InputError(
            f"{raw.path}: no column of votes ({', '.join(of.votes)}) for format {kind}; "
            f"{columns_found(raw)}"
        )


def _ids(
    raw: RawTable, names: dict[str, str], reading: Reading, rows_before: int
) -> pa.ChunkedArray:
    """The ids of the rows; those of questions that come again are joined to what else names a vote.

    Where annotators are merged, a battle is not named by its judge.
    """
    if "id" not in names:
        numbers = pa.array(raw.numbers + rows_before).cast(pa.string())
        return pa.chunked_array([pc.binary_join_element_wise("row", numbers, "")])
    ids = pc.fill_null(column_texts(raw, names["id"]), "")
    for position in np.flatnonzero(pc.equal(ids, "").to_numpy()):
        raw.faults.add(int(position), names["id"], "no id")
    if names["id"].lower() == "id" or pc.count_distinct(ids, "all").as_py() == len(ids):
        return ids
    apart = ("model_a", "model_b", "turn", *(["judge"] if reading.annotators == "keep" else []))
    others = [names[name] for name in apart if name in names]
    texts = [pc.fill_null(_plainly(raw, name), "") for name in others]
    return pc.binary_join_element_wise(ids, *texts, "-") if texts else ids


def _plainly(raw: RawTable, name: str) -> pa.ChunkedArray:
    """A column of texts; of JSON lists, such as a judge's name and settings, the parts joined."""
    column = raw.columns[name]
    if isinstance(column, list):
        cells = [c if not isinstance(c, list) else "-".join(map(plain_text, c)) for c in column]
        return column_texts(replace(raw, columns={name: cells}), name)
    return pc.binary_join(column, "-") if is_list(column.type) else column_texts(raw, name)


def _columns(rows: Rows, part: Battles, ids: pa.ChunkedArray) -> pa.RecordBatch:
    take = pa.array(part.row)
    named = ids.slice(rows.start, rows.count).combine_chunks().take(take)
    if part.pair is not None:
        named = pc.binary_join_element_wise(named, part.pair, "-")
    about = [_names(rows, name).take(take) for name in ("language", "category")]
    columns = [part.prompt, part.response_a, part.response_b, part.model_a, part.model_b, *about]
    return pa.RecordBatch.from_arrays([named, *columns], schema=SCHEMA)


def _names(rows: Rows, name: str) -> pa.Array:
    """Texts of a column; null if it holds something else, and `columns` does not ask for it."""
    try:
        return rows.texts(name)
    except InputError:
        if name in rows.reading.columns:
            raise
        return pa.nulls(rows.count, pa.string())


def _weights(rows: Rows, part: Battles) -> np.ndarray:
    given = np.ones(rows.count)
    if "weight" in rows:
        given = rows.numbers("weight")
        rows.refuse(~(given > 0), "weight", "a weight greater than 0 expected")
    return given[part.row] * (1.0 if part.weight is None else part.weight)
