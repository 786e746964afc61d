"""Raw files → canonical battles: read, validate, and say of every refused row why.

Battles come as CSV or JSON lines (both also gzipped) or parquet, in the Kaggle schema: ``id``,
``model_a``, ``model_b``, ``prompt``, ``response_a``, ``response_b`` and either ``winner_model_a``,
``winner_model_b``, ``winner_tie`` or one column ``label`` or ``winner``. ``language`` and ``category`` are
kept where a file has them.

A prompt or response is a list of turns. In text files it is a cell that starts with ``[`` and holds
a JSON list; any other text is one turn, as it stands. A turn that is null becomes the empty
text (as does a missing cell), ``true`` becomes "true" and 3 becomes "3": all three occur in real
answers. Lone surrogates, which no UTF-8 file can hold, become U+FFFD. Cells are only ever parsed,
never evaluated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arena_distill.battles.prompts import prompt_groups
from arena_distill.battles.votes import VOTE_FIELDS, vote_columns
from arena_distill.config.phases import Settings
from arena_distill.errors import InputError
from arena_distill.files.artifacts import StrPath, provenance, read_parquet, write_parquet
from arena_distill.files.keys import locate
from arena_distill.files.readers import (
    JSON_TEXTS,
    KEPT_AS_RAW_TEXT,
    Faults,
    RawTable,
    read_table,
)
from arena_distill.verdicts import NO_VOTE, Votes

SOURCES = ("train", "extra", "ut", "test", "unlabelled")
WITHOUT_VOTES = ("test", "unlabelled")

_TURNS = pa.list_(pa.string())
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("prompt", _TURNS, nullable=False),
        pa.field("response_a", _TURNS, nullable=False),
        pa.field("response_b", _TURNS, nullable=False),
        ("model_a", pa.string()),
        ("model_b", pa.string()),
        ("language", pa.string()),
        ("category", pa.string()),
        *VOTE_FIELDS,  # of test battles too: null, since nothing that is trained may see them
        pa.field("group", pa.int64(), nullable=False),  # of the prompt, over all sources
    ]
)
REJECTED_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("file", pa.string()),
        ("row", pa.int64()),  # the first battle of the file is row 1
        ("column", pa.string()),  # null where the row as a whole is at fault
        ("reason", pa.string()),
    ]
)

_TEXTS = ("prompt", "response_a", "response_b")
_NAMES = ("model_a", "model_b", "language", "category")
_WINNERS = ("winner_model_a", "winner_model_b", "winner_tie")
_ONE_LABEL = ("label", "winner")

_FLAGS = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}
_LABELS = {
    **{"0": 0, "0.0": 0, "a": 0, "model_a": 0},
    **{"1": 1, "1.0": 1, "b": 1, "model_b": 1},
    **{"2": 2, "2.0": 2, "tie": 2, "tie (bothbad)": 2, "both_bad": 2, "bothbad": 2},
}


def read_battles(files: Mapping[str, Sequence[StrPath]]) -> tuple[pa.Table, pa.Table]:
    """Read the files of each source.

    Args:
        files: source, one of `SOURCES`, → its files. Sources may be left out.

    Returns:
        battles: table of `SCHEMA`; sources in the order of `SOURCES`, rows in the order of files.
        rejected: table of `REJECTED_SCHEMA`, one line per refused row with its first fault. `row`
            counts battles from 1: the header and blank lines are not counted, and a row whose text
            runs over many lines is one. Rows of ``test`` whose text cannot be read are listed too,
            but kept as raw text, since every test battle must be predicted; their reason starts
            with `KEPT_AS_RAW_TEXT`.

    Without an ``id`` column (which ``train`` and ``test`` must have), the n-th row of a source is
    called ``row<n>``. The votes of ``test`` and ``unlabelled`` are not read, even if they are there.
    Of rows that share an id within a source the first is kept. ``group`` is of
    :func:`arena_distill.battles.prompts.prompt_groups`, over all sources.

    Raises:
        InputError: a file is missing, empty, damaged, not UTF-8 or lacks columns; no row of
            ``train`` is usable; an id of ``test`` is missing or appears twice.
        ValueError: an unknown source.
    """
    unknown = [source for source in files if source not in SOURCES]
    if unknown:
        raise ValueError(f"unknown source {unknown[0]!r}: one of {', '.join(SOURCES)} expected")
    parts = [_read_source(source, files[source]) for source in SOURCES if files.get(source)]
    no_group = pa.schema([field for field in SCHEMA if field.name != "group"])
    battles = pa.concat_tables([no_group.empty_table(), *(battles for battles, _ in parts)])
    battles = battles.append_column(SCHEMA.field("group"), [prompt_groups(battles["prompt"])])
    lines = [line for _, rejected in parts for line in rejected]
    return battles, pa.Table.from_pylist(lines, schema=REJECTED_SCHEMA)


def write_battles(
    files: Mapping[str, Sequence[StrPath]],
    battles_path: StrPath,
    rejected_path: StrPath,
    settings: Settings,
) -> None:
    """Read `files`, write both tables of `read_battles`, and print the counts of each source.

    Args:
        files: as for `read_battles`; ``train`` must be among them.
        battles_path: where the battles go.
        rejected_path: where the refused rows and their reasons go.
    """
    if not files.get("train"):
        raise InputError("no train files: give at least one file of labelled battles")
    battles, rejected = read_battles(files)
    origin = provenance("battles", settings.model_dump())
    write_parquet(rejected, rejected_path, origin)
    write_parquet(battles, battles_path, origin)
    raw = pc.starts_with(rejected["reason"], KEPT_AS_RAW_TEXT)
    for source in SOURCES:
        if not files.get(source):
            continue
        kept = _count(pc.equal(battles["source"], source))
        mine = pc.equal(rejected["source"], source)
        as_text = _count(pc.and_(mine, raw))
        refused = _count(mine) - as_text
        note = f", {as_text} kept as raw text" if as_text else ""
        print(f"{source}: {kept + refused} read, {kept} kept, {refused} rejected{note}")
    if rejected.num_rows:
        print(f"reasons: {rejected_path}")


def write_test_votes(
    solution: StrPath, battles_path: StrPath, output: StrPath, settings: Settings
) -> None:
    """Write the votes of the test battles: to score predictions with, and for nothing else.

    Args:
        solution: a file of votes in the Kaggle schema, such as Kaggle's own.
        battles_path: file of `write_battles`.
        output: where the table of ``id``, ``source``, ``vote``, ``weight`` and ``group`` goes; rows
            in the order of the test battles.

    Raises:
        InputError: as `read_solution`; also if it lacks a test battle or has a vote on another.
    """
    battles = read_parquet(battles_path, ["id", "source", "group"])
    test = battles.filter(pc.equal(battles["source"], "test"))
    ids, votes = read_solution(solution)
    for problem, of, among in (
        ("of its ids are no test battles", ids, test["id"]),
        ("test battles have no vote in it", test["id"], ids),
    ):
        if len(odd := of.filter(pc.invert(pc.is_in(of, pc.unique(among))))):
            some = ", ".join(odd.slice(0, 5).to_pylist()) + (", …" if len(odd) > 5 else "")
            raise InputError(
                f"{solution}: {len(odd)} {problem}: {some}; give the solution of these test battles, or "
                "remove data.solution"
            )
    rows = locate(test["id"].combine_chunks(), ids.combine_chunks(), str(solution))
    columns = {"id": test["id"], "source": test["source"]}
    columns |= {**vote_columns(votes[rows]), "group": test["group"]}
    write_parquet(pa.table(columns), output, provenance("solution", settings.model_dump()))
    print(f"{output}: {len(test)} votes of {solution}")


def read_solution(path: StrPath) -> tuple[pa.ChunkedArray, Votes]:
    """Read a file of votes on test battles.

    Returns:
        ids (string) and votes, in the file's order.

    Raises:
        InputError: as `read_battles`; also if any row has no id, an id seen before, or no vote.
    """
    raw = read_table(Path(path))
    _require(raw, ["id"], labelled=True)
    faults = raw.faults
    ids = _ids(raw, "test", 0, faults)
    votes = Votes.hard(_labels(raw, faults))
    first, again = _duplicates(ids)
    for position, seen in zip(again, first, strict=True):
        faults.add(position, "id", f"id {ids[position]} is taken by row {raw.numbers[seen]}")
    if lines := faults.lines("test"):
        raise InputError(
            f"{_described(lines[0])}; every test battle needs one vote ({len(lines)} rows at fault)"
        )
    return ids, votes


# --- one source -----------------------------------------------------------------------------------


def _read_source(source: str, paths: Sequence[StrPath]) -> tuple[pa.Table, list[dict[str, Any]]]:
    """Return the battles of one source and the lines of its rejected rows."""
    parts: list[_Part] = []
    for path in paths:
        parts.append(_read_part(source, Path(path), sum(part.rows for part in parts)))
    _reject_duplicates(source, parts)
    lines = [line for part in parts for line in part.faults.lines(source)]
    battles = pa.concat_tables([part.kept() for part in parts])
    if source == "train" and not battles.num_rows:
        raise InputError(
            f"no usable train battle: all {len(lines)} rows are rejected, the first one as "
            f"{_described(lines[0])}"
        )
    return battles, lines


def _read_part(source: str, path: Path, rows_before: int) -> _Part:
    """Turn one file into canonical columns, faulty rows still among them."""
    labelled = source not in WITHOUT_VOTES
    raw = read_table(path)
    required = [*(["id"] if source in ("train", "test") else []), *_TEXTS]
    _require(raw, required, labelled=labelled)
    if source == "test" and (lost := raw.faults.lines(source)):
        _refuse_test_row(lost[0])
    ids = _ids(raw, source, rows_before, raw.faults)
    if source == "test" and (nameless := raw.faults.lines(source)):
        _refuse_test_row(nameless[0])
    rows = len(raw.numbers)
    columns: dict[str, Any] = {"id": ids, "source": pa.repeat(source, rows)}
    for name in _TEXTS:
        columns[name] = _turns(raw, name, keep_unreadable=source == "test")
    for name in _NAMES:
        columns[name] = _names(raw, name)
    labels = _labels(raw, raw.faults) if labelled else np.full(rows, NO_VOTE, np.int8)
    columns |= vote_columns(Votes.hard(labels))
    battles = pa.table(columns).cast(pa.schema([SCHEMA.field(name) for name in columns]))
    return _Part(path, raw.rows, battles, raw.numbers, raw.faults)


def _refuse_test_row(line: dict[str, Any]) -> NoReturn:
    raise InputError(
        f"{_described(line)}; every test battle needs a prediction, so correct the row"
    )


def _described(line: dict[str, Any]) -> str:
    column = f", column {line['column']}" if line["column"] else ""
    return f"{line['file']}, row {line['row']}{column}: {line['reason']}"


def _reject_duplicates(source: str, parts: Sequence[_Part]) -> None:
    """Add a fault to every row whose id an earlier good row of the source has."""
    good = [part.good() for part in parts]
    part_of = np.repeat(np.arange(len(parts)), [len(positions) for positions in good])
    position_of = np.concatenate(good)
    ids = pa.concat_tables([part.kept().select(["id"]) for part in parts])["id"]
    first, again = _duplicates(ids)
    for seen, late in zip(first, again, strict=True):
        taken, part = parts[part_of[seen]], parts[part_of[late]]
        reason = (
            f"id {ids[late]} is taken by row {taken.numbers[position_of[seen]]} of {taken.path}"
        )
        position = int(position_of[late])
        # Good rows have no fault so far, but for test battles that are kept as raw text.
        part.faults.found[position] = ("id", reason)
        if source == "test":
            _refuse_test_row(part.faults.line(source, position))


@dataclass
class _Part:
    """The canonical columns of one file, with its faulty rows still among them."""

    path: Path
    rows: int  # in the file, those lost in reading included
    battles: pa.Table
    numbers: np.ndarray  # int64 row number in the file, per row of `battles`
    faults: Faults

    def good(self) -> np.ndarray:
        """Positions (int64) of the rows to keep."""
        keep = np.ones(self.battles.num_rows, bool)
        keep[self.faults.fatal()] = False
        return np.flatnonzero(keep)

    def kept(self) -> pa.Table:
        good = self.good()
        whole = len(good) == self.battles.num_rows
        return self.battles if whole else self.battles.take(pa.array(good))


# --- columns --------------------------------------------------------------------------------------

_SURROGATE = re.compile("[\ud800-\udfff]")
_CELLS_AT_ONCE = 16_384


def _turns(raw: RawTable, name: str, *, keep_unreadable: bool) -> pa.ChunkedArray:
    """Read a column of prompts or responses into lists of turns (list<string>)."""
    column = raw.columns[name]
    if isinstance(column, pa.ChunkedArray) and _is_list(column.type):
        return _turns_of_lists(column, f"{raw.path}, column {name}")
    chunks = []
    for start in range(0, len(column), _CELLS_AT_ONCE):
        cells = column[start : start + _CELLS_AT_ONCE]
        cells = cells.to_pylist() if isinstance(cells, pa.ChunkedArray) else cells
        # Flat values and offsets, not lists of lists: three times faster, as thousands of live
        # lists keep the garbage collector busy.
        values: list[str] = []
        offsets = np.zeros(len(cells) + 1, np.int32)
        for position, cell in enumerate(cells):
            try:
                values += _turns_of_cell(cell)
            except ValueError as error:
                reason = str(error)
                if keep_unreadable:
                    reason = KEPT_AS_RAW_TEXT + reason
                    values.append(_plain_text(cell))
                raw.faults.add(start + position, name, reason)
            offsets[position + 1] = len(values)
        chunks.append(pa.ListArray.from_arrays(offsets, _strings(values)))
    return pa.chunked_array(chunks, _TURNS)


def _turns_of_cell(cell: Any) -> list[str]:
    """Return the turns of one cell; ValueError says why it has none."""
    if isinstance(cell, str):
        if not cell.lstrip().startswith("["):
            return [cell]
        try:
            cell = JSON_TEXTS.decode(cell)
        except RecursionError:
            raise ValueError("lists too deep") from None
        except ValueError as error:
            raise ValueError(f"starts with [ but is not a JSON list: {error}") from None
    if isinstance(cell, list):
        return [turn if type(turn) is str else _turn(turn) for turn in cell]
    return [_turn(cell)]


def _turn(value: Any) -> str:
    if isinstance(value, list | dict):
        kind = "list" if isinstance(value, list) else "object"
        raise ValueError(f"a turn is a JSON {kind}, text expected")
    return _plain_text(value)


def _turns_of_lists(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """Turn Arrow lists of whatever text or numbers into lists of texts without nulls."""
    if pa.types.is_nested(column.type.value_type):
        raise InputError(f"{where}: holds {column.type}, a text or a list of texts expected")
    column = column.cast(pa.list_(column.type.value_type))
    chunks = []
    for chunk in column.chunks:
        chunk = pc.if_else(chunk.is_valid(), chunk, pa.scalar([None], chunk.type))
        values = pc.fill_null(chunk.flatten().cast(pa.string()), "")
        lengths = chunk.value_lengths().to_numpy(zero_copy_only=False)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        chunks.append(pa.ListArray.from_arrays(offsets, values))
    return pa.chunked_array(chunks, _TURNS)


def _labels(raw: RawTable, faults: Faults) -> np.ndarray:
    """Read the votes: int8 per row, 0 = A, 1 = B, 2 = tie, NO_VOTE where there is a fault."""
    if _one_hot(raw):
        texts = [column_texts(raw, name) for name in _WINNERS]
        flags = np.stack([_coded(text, _FLAGS) for text in texts], axis=1)
        for name, text, codes in zip(_WINNERS, texts, flags.T, strict=True):
            for position in _where(codes < 0):
                faults.add(position, name, _unexpected(text[position], "0 or 1"))
        readable = (flags >= 0).all(axis=1)
        votes = flags.sum(axis=1)
        for position in _where(readable & (votes != 1)):
            reason = "several winners are set" if votes[position] else "no winner is set"
            faults.add(position, "winner_*", reason)
        winner = flags.argmax(axis=1)
        return np.where(readable & (votes == 1), winner, NO_VOTE).astype(np.int8)
    name = next(name for name in _ONE_LABEL if name in raw.columns)
    text = column_texts(raw, name)
    labels = _coded(text, _LABELS)
    for position in _where(labels < 0):
        faults.add(position, name, _unexpected(text[position], "model_a, model_b, tie or 0, 1, 2"))
    return labels


def _coded(texts: pa.ChunkedArray, codes: Mapping[str, int]) -> np.ndarray:
    """Look texts up in `codes`, whatever their case: int8 per row, -1 where unknown or null."""
    words = pc.utf8_lower(pc.utf8_trim_whitespace(texts))
    index = pc.index_in(words, pa.array(list(codes)), skip_nulls=True)
    # One more value at the end, which the index -1 of an unknown word selects.
    values = np.array([*codes.values(), -1], np.int8)
    coded: np.ndarray = values[pc.fill_null(index, -1).to_numpy()]
    return coded


def _unexpected(value: pa.Scalar, expected: str) -> str:
    text = value.as_py()
    return f"is {repr(text[:60]) if text else 'empty'}, {expected} expected"


def _ids(raw: RawTable, source: str, rows_before: int, faults: Faults) -> pa.ChunkedArray:
    """Read ids as texts; without the column, the row's number within the source makes one."""
    if "id" not in raw.columns:
        numbers = pa.array(raw.numbers + rows_before).cast(pa.string())
        return pa.chunked_array([pc.binary_join_element_wise("row", numbers, "")])
    ids = pc.fill_null(column_texts(raw, "id"), "")
    for position in _where(pc.equal(ids, "").to_numpy()):
        faults.add(position, "id", "no id")
    return ids


def _names(raw: RawTable, name: str) -> pa.ChunkedArray:
    """Read a column of names, such as those of models; null where unknown."""
    if name not in raw.columns:
        return pa.chunked_array([pa.nulls(len(raw.numbers), pa.string())])
    names = column_texts(raw, name)
    return pc.if_else(pc.equal(names, ""), pa.scalar(None, pa.string()), names)


def column_texts(raw: RawTable, name: str) -> pa.ChunkedArray:
    """Turn a column into texts: whole numbers without ".0", nulls stay null."""
    column = raw.columns[name]
    if isinstance(column, list):
        return pa.chunked_array(
            [_strings([None if cell is None else _plain_text(cell) for cell in column])]
        )
    try:
        if pa.types.is_floating(column.type):
            # Many a writer turns a column of integers with a gap into one of floats.
            column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
            if pc.all(pc.equal(column, pc.trunc(column))).as_py() is not False:
                column = column.cast(pa.int64())
        return column.cast(pa.string())
    except pa.ArrowException as error:
        raise InputError(f"{raw.path}, column {name}: holds {column.type} ({error})") from error


def _plain_text(value: Any) -> str:
    """Write a JSON value as a text: null is empty, and lists and objects are their JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _strings(values: list[Any]) -> pa.Array:
    """Make a string array, with U+FFFD for lone surrogates."""
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError:
        return pa.array([v and _SURROGATE.sub("\ufffd", v) for v in values], pa.string())


def _duplicates(ids: pa.ChunkedArray) -> tuple[list[int], list[int]]:
    """Find ids seen before: positions of their first rows, and of the later rows, aligned."""
    codes = ids.combine_chunks().dictionary_encode().indices.to_numpy()
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    first = first[inverse]
    again = np.flatnonzero(first != np.arange(len(codes)))
    return first[again].tolist(), again.tolist()


def _where(mask: np.ndarray) -> list[int]:
    positions: list[int] = np.flatnonzero(mask).tolist()
    return positions


def _count(mask: pa.ChunkedArray) -> int:
    return int(pc.sum(mask).as_py() or 0)


def _require(raw: RawTable, names: Sequence[str], *, labelled: bool) -> None:
    """Raise InputError unless the file has the columns `names` and, if asked, the votes."""
    absent = [name for name in names if name not in raw.columns]
    if labelled and not _one_hot(raw) and not any(name in raw.columns for name in _ONE_LABEL):
        absent.append(f"{', '.join(_WINNERS)} (or label, or winner)")
    if absent:
        present = ", ".join(islice(raw.columns, 20)) or "none"
        raise InputError(f"{raw.path}: no column {', '.join(absent)}; columns found: {present}")


def _one_hot(raw: RawTable) -> bool:
    return all(name in raw.columns for name in _WINNERS)


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view)
    return any(is_list(kind) for is_list in (*lists, types.is_large_list_view))
