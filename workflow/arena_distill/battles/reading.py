"""Raw files → canonical battles: read, convert, and say of every refused row why.

What a file may look like is in ``battles.formats``. Here its battles get a source, ids that are unique
in it and prompt groups, and all rows are counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arena_distill.battles.annotators import hash_sides, merge_annotators
from arena_distill.battles.formats.canonical import hash_texts
from arena_distill.battles.formats.columns import Table, columns_found, resolve
from arena_distill.battles.formats.conversion import convert
from arena_distill.battles.formats.votes import read_votes
from arena_distill.battles.prompts import number_digests, prompt_digests
from arena_distill.battles.votes import VOTE_FIELDS, vote_columns, with_classes
from arena_distill.config.phases import BattlesSettings, SolutionSettings
from arena_distill.config.source import SOURCES, Reading, Source
from arena_distill.config.vocabulary import BattleFormat
from arena_distill.errors import InputError
from arena_distill.files.artifacts import (
    Spill,
    StrPath,
    provenance,
    read_parquet,
    write_json,
    write_parquet,
    write_parquet_parts,
)
from arena_distill.files.keys import key, locate
from arena_distill.files.raw_tables import DROPPED, KEPT_AS_RAW_TEXT, Faults, column_texts
from arena_distill.files.readers import read_table
from arena_distill.verdicts import CLASSES, NO_VOTE, Ties, Votes

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
_TEXTS = pa.schema([field.with_nullable(True) for field in list(SCHEMA)[:-3]])
"""What waits on disk, faulty rows among it."""
REJECTED_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("file", pa.string()),
        ("row", pa.int64()),  # the first battle of the file is row 1
        ("column", pa.string()),  # null where the row as a whole is at fault
        ("reason", pa.string()),
    ]
)

VOTE_KINDS = ("A", "B", "tie", "none")
"""Kinds of votes, by the likeliest class."""

Files = Mapping[str, Sequence[StrPath | Source]]
"""Source, one of `SOURCES`, → its files, read by default or as they say. Sources may be left out."""


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
        _check(source, mine, count, settings.max_refused)
    origin = provenance("battles", settings.model_dump(mode="json"))
    rejected = _rejected(parts)
    write_json({"provenance": origin, "sources": counts}, reading_path)
    write_parquet(rejected, rejected_path, origin)
    write_parquet_parts(_battles(parts, settings.ties), battles_path, origin)
    if rejected.num_rows:
        print(f"each row and its reason: {rejected_path}")


def write_test_votes(
    solution: StrPath, battles_path: StrPath, output: StrPath, settings: SolutionSettings
) -> None:
    """Write the votes of the test battles: to score predictions with, and for nothing else.

    Args:
        solution: a file of votes in the Kaggle schema, such as Kaggle's own.
        battles_path: file of `write_battles`.
        output: where the table of ``id``, ``source``, ``vote``, ``weight`` and ``group`` goes; rows
            in the order of the test battles, without those whose tie is no vote.

    Raises:
        InputError: as `read_solution`; also if it lacks a test battle or has a vote on another.
    """
    battles = read_parquet(battles_path, ["id", "source", "group"])
    test = battles.filter(pc.equal(battles["source"], "test"))
    ids, votes = read_solution(solution, settings.ties)
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
    table = pa.table(columns).filter(pa.array(votes[rows].known))
    write_parquet(table, output, provenance("solution", settings.model_dump()))
    left_out = f", without {len(test) - len(table)} ties" if len(table) < len(test) else ""
    print(f"{output}: {len(table)} votes of {solution}{left_out}")


def read_solution(path: StrPath, ties: Ties = "class") -> tuple[pa.ChunkedArray, Votes]:
    """Read a file of votes on test battles.

    Args:
        ties: as in `read_battles`.

    Returns:
        ids (string) and votes, in the file's order; no vote where ties are none.

    Raises:
        InputError: as `read_battles`; also if any row has no id, an id seen before, or no vote.
    """
    raw = read_table(Path(path))
    names = resolve(raw, {})
    if "id" not in names or not {"winner", "winner_model_a"} & set(names):
        raise InputError(f"{path}: columns id and winner_model_a, winner_model_b, winner_tie (or label, or "
                         f"winner) expected; {columns_found(raw)}")  # fmt: skip
    table = Table(raw, names, {}, Reading(), votes=True, keep_unreadable=False)
    as_read = _votes(np.concatenate([read_votes(rows) for rows in table.pieces()]))
    if ties == "refuse":
        _refuse_ties(raw.faults, as_read, np.arange(len(as_read)))
    ids = pc.fill_null(column_texts(raw, names["id"]), "")
    faults = raw.faults
    for nameless in np.flatnonzero(pc.equal(ids, "").to_numpy()):
        faults.add(int(nameless), "id", "no id")
    first, again = _duplicates(ids)
    for position, seen in zip(again, first, strict=True):
        faults.add(position, "id", f"id is taken: {ids[position]}, by row {raw.numbers[seen]}")
    if lines := faults.lines("test"):
        raise InputError(
            f"{_described(lines[0])}; every test battle needs one vote ({len(lines)} rows at fault)"
        )
    return ids, as_read.among(ties)


# --- files ----------------------------------------------------------------------------------------


@dataclass
class Part:
    """The battles of one file, those of faulty rows still among them."""

    source: str
    format: BattleFormat
    names: dict[str, str]  # our names of columns → the file's
    rows: int  # in the file, those lost in reading included
    faults: Faults
    keys: pa.Table  # `id`, `source`, and `prompt`, of `prompt_digests`
    texts: Iterable[pa.Table]  # its battles as SCHEMA has them, but for the last three columns
    votes: Votes  # as read: of three classes
    row: np.ndarray  # int64, the position of each battle's row among those that could be read
    dropped: np.ndarray  # bool (battles,): those that are left out on purpose
    merged: np.ndarray  # bool (battles,): those whose votes another row of the same battle has
    reading: Reading

    @property
    def path(self) -> Path:
        return self.faults.path

    def good(self, source: str | None = None) -> np.ndarray:
        """Which battles are kept, of all sources or of one: bool (battles,)."""
        good = self.faults.kept()[self.row] & ~self.dropped & ~self.merged
        if source is not None:
            good &= pc.equal(self.keys["source"], source).to_numpy()
        return np.asarray(good)

    def kept(self, ties: Ties, source: str | None = None) -> Iterator[pa.Table]:
        """The battles that are `good`, a few at a time: tables of SCHEMA without `group`."""
        good, votes, start = self.good(source), self.votes.among(ties), 0
        if not good.any():
            return
        for texts in self.texts:
            mine = good[start : start + len(texts)]
            cast = vote_columns(votes[start + np.flatnonzero(mine)])
            kept = texts.filter(pa.array(mine))
            yield pa.table({name: kept[name] for name in kept.column_names} | cast)
            start += len(texts)

    def answers(self) -> np.ndarray:
        """What tells the two answers of each battle from others: int64 (battles,)."""
        batches = (batch for texts in self.texts for batch in texts.to_batches())
        hashes = [hash_texts(batch["response_a"], batch["response_b"]) for batch in batches]
        return np.concatenate([np.zeros(0, np.uint64), *hashes]).view(np.int64)

    def drop(self, battles: np.ndarray, column: str, reason: str) -> None:
        """Drop battles: bool (battles,). A row of which no battle is left gets its line."""
        battles = battles & self.good()
        self.dropped = self.dropped | battles
        for row in np.setdiff1d(self.row[battles], self.row[self.good()]):
            self.faults.add(int(row), self.names.get(column, column), DROPPED + reason)


def read_parts(files: Files, ties: Ties = "class", folder: Path | None = None) -> list[Part]:
    """Read the files of each source; other arguments and errors are those of `read_battles`.

    Args:
        folder: where the texts wait; None: where temporary files are.
    """
    unknown = [source for source in files if source not in SOURCES]
    if unknown:
        raise ValueError(f"unknown source {unknown[0]!r}: one of {', '.join(SOURCES)} expected")
    parts: list[Part] = []
    spill = Spill(_TEXTS, folder)
    for source in SOURCES:
        rows = 0
        for given in files.get(source, ()):
            entry = given if isinstance(given, Source) else Source(path=str(given))
            for file in entry.shards():
                parts.append(_read_part(source, file, entry, rows, ties, spill))
                rows += parts[-1].rows
    for source in SOURCES:
        mine = [p for p in parts if p.source == source and p.reading.annotators == "merge"]
        _merge_annotators(mine)
    _drop_known(parts)
    _refuse_duplicates(parts)
    train = [part for part in parts if part.source == "train"]
    if train and not any(part.good().any() for part in train):
        lines = [line for part in train for line in part.faults.lines("train")]
        raise InputError(
            f"no usable train battle: all {len(lines)} rows are rejected, the first one as "
            f"{_described(lines[0])}"
        )
    return parts


def _read_part(
    source: str, file: Path, reading: Reading, rows_before: int, ties: Ties, spill: Spill
) -> Part:
    is_test = source == "test"
    raw = read_table(file, escape=reading.escape)
    read = convert(
        raw,
        reading,
        votes=source not in WITHOUT_VOTES,
        keep_unreadable=is_test,
        rows_before=rows_before,
    )
    if is_test and "id" not in read.names:
        raise InputError(
            f"{file}: no column id, by which test battles are predicted; {columns_found(raw)}"
        )
    if is_test and (raw.faults.lost or raw.faults.fatal()):
        bad = {raw.numbers[p] for p in raw.faults.fatal()} | {row for row, _ in raw.faults.lost}
        _refuse_test_row(next(line for line in raw.faults.lines(source) if line["row"] in bad))
    as_read = _votes(read.vote, read.weight)
    votes = as_read.among(ties)
    if ties == "refuse":
        _refuse_ties(raw.faults, as_read, read.row)
    no_vote = as_read.known & ~votes.known if ties == "drop" else np.zeros(len(votes), bool)
    dropped = _dropped(raw.faults, no_vote, read.row)
    battles = read.battles
    sources = pa.repeat(source, len(battles)).cast(pa.string())
    if source not in WITHOUT_VOTES and reading.missing_votes == "keep":
        known = pa.array(as_read.known)
        named = pc.binary_join_element_wise(source, battles["id"], "-")
        battles = battles.set_column(0, "id", pc.if_else(known, battles["id"], named))
        sources = pc.if_else(known, source, "unlabelled")
    columns = {"id": battles["id"], "source": sources}
    columns |= {name: battles[name] for name in battles.column_names[1:]}
    keys = {"id": columns["id"], "source": sources, "prompt": prompt_digests(battles["prompt"])}
    about = source, read.format, read.names, raw.rows, raw.faults, pa.table(keys)
    texts, merged = spill.add(pa.table(columns)), np.zeros(len(battles), bool)
    return Part(*about, texts, as_read, read.row, dropped, merged, reading)


def _refuse_ties(faults: Faults, votes: Votes, row: np.ndarray) -> None:
    """Add a fault to every row with a vote, or a share of one, for a tie."""
    for position in np.unique(row[votes.probabilities[:, 2] > 0]).tolist():
        faults.add(
            position,
            "winner",
            "a tie, or a share of one, but the run has two classes; set data.ties",
        )


def _dropped(faults: Faults, ties: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Which battles are left out on purpose: these ties, and all of the rows that are.

    A row of nothing but ties gets its line; of a row of several battles the others stay.

    Args:
        ties: bool (battles,).
        row: int64 (battles,), ascending.
    """
    rest = np.bincount(row[~ties], minlength=len(faults.numbers))
    for position in np.flatnonzero((rest == 0) & (np.bincount(row[ties], minlength=len(rest)) > 0)):
        faults.add(int(position), "winner", f"{DROPPED}a tie, as `data.ties` says")
    rows = [p for p, (_, reason) in faults.found.items() if reason.startswith(DROPPED)]
    return ties | np.isin(row, rows)


def _votes(shares: np.ndarray, weights: np.ndarray | None = None) -> Votes:
    """Votes of shares (rows, 3) that are NaN where there is no vote."""
    return Votes(np.nan_to_num(shares), np.ones(len(shares)) if weights is None else weights)


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


def _merge_annotators(parts: Sequence[Part]) -> None:
    """Keep one row of each battle of some files, with the mean of all its rows' votes."""
    if not parts:
        return
    good = [part.good() for part in parts]
    sides = [
        np.concatenate([np.zeros((0, 2), np.uint64), *map(hash_sides, part.texts)])[mine]
        for part, mine in zip(parts, good, strict=True)
    ]
    given = [part.votes[mine] for part, mine in zip(parts, good, strict=True)]
    shares = np.concatenate([votes.probabilities for votes in given])
    weights = np.concatenate([votes.weights for votes in given])
    rows, votes = merge_annotators(np.concatenate(sides), Votes(shares, weights))
    part_of = np.repeat(np.arange(len(parts)), list(map(len, sides)))[rows]
    battle_of = np.concatenate([np.flatnonzero(mine) for mine in good])[rows]
    for number, (part, mine) in enumerate(zip(parts, good, strict=True)):
        here = part_of == number
        kept = battle_of[here]
        part.merged = mine
        part.merged[kept] = False
        part.votes.probabilities[kept] = votes.probabilities[here]
        part.votes.weights[kept] = votes.weights[here]


def _drop_known(parts: Sequence[Part]) -> None:
    """Drop battles whose prompt is in a source that `without` names, and battles that come again.

    Parts are taken in their order: of two sources without each other the first keeps what both have.
    """
    if not any(part.reading.without or part.reading.repeated == "drop" for part in parts):
        return
    ends = np.cumsum([len(part.keys) for part in parts])
    prompts = np.split(number_digests(part.keys["prompt"] for part in parts), ends[:-1])
    for part, prompt in zip(parts, prompts, strict=True):
        for name in part.reading.without:
            known = [p[other.good()] for other, p in zip(parts, prompts, strict=True)
                     if other.source == name]  # fmt: skip
            there = np.isin(prompt, np.concatenate([prompt[:0], *known]))
            part.drop(there, "prompt", f"it is in {name} too")
    for source in {part.source for part in parts if part.reading.repeated == "drop"}:
        mine = [(part, p) for part, p in zip(parts, prompts, strict=True) if part.source == source]
        good = np.concatenate([part.good() for part, _ in mine])
        texts_of = np.concatenate([np.column_stack([p, part.answers()]) for part, p in mine])
        _, first = np.unique(texts_of[good], axis=0, return_index=True)
        again = good.copy()
        again[np.flatnonzero(good)[first]] = False
        for part, prompt in mine:
            here, again = np.split(again, [len(prompt)])
            if part.reading.repeated == "drop":
                part.drop(here, "prompt", "the same prompt and answers came before")


def _refuse_duplicates(parts: Sequence[Part]) -> None:
    """Add a fault to every row of a battle whose id an earlier good one of its source has."""
    good = [np.flatnonzero(part.good()) for part in parts]
    part_of = np.repeat(np.arange(len(parts)), [len(battles) for battles in good])
    battle_of = np.concatenate([np.zeros(0, np.int64), *good])
    named = [part.keys.select(["id", "source"]).take(pa.array(battles))
             for part, battles in zip(parts, good, strict=True)]  # fmt: skip
    if not named:
        return
    ids = pa.concat_tables(named)
    first, again = _duplicates(pa.chunked_array([key(ids)]))
    for seen, late in zip(first, again, strict=True):
        taken, part = parts[part_of[seen]], parts[part_of[late]]
        row = taken.faults.numbers[taken.row[battle_of[seen]]]
        reason = f"id is taken: {ids['id'][late]}, by row {row} of {taken.path}"
        position = int(part.row[battle_of[late]])
        # Good rows have no fault so far, but for test battles that are kept as raw text.
        part.faults.found[position] = ("id", reason)
        if part.source == "test":
            _refuse_test_row(part.faults.line(part.source, position))


def _duplicates(ids: pa.ChunkedArray) -> tuple[list[int], list[int]]:
    """Find ids seen before: positions of their first rows, and of the later rows, aligned."""
    codes = ids.combine_chunks().dictionary_encode().indices.to_numpy()
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    first = first[inverse]
    again = np.flatnonzero(first != np.arange(len(codes)))
    return first[again].tolist(), again.tolist()


def _refuse_test_row(line: dict[str, Any]) -> NoReturn:
    raise InputError(
        f"{_described(line)}; every test battle needs a prediction, so correct the row"
    )


def _described(line: dict[str, Any]) -> str:
    column = f", column {line['column']}" if line["column"] else ""
    return f"{line['file']}, row {line['row']}{column}: {line['reason']}"


# --- counts ---------------------------------------------------------------------------------------


def count_rows(parts: Sequence[Part]) -> dict[str, Any]:
    """The counts of one source, as `write_battles` writes them."""
    lines = [line for part in parts for line in part.faults.lines(part.source)]
    dropped = [line for line in lines if line["reason"].startswith(DROPPED)]
    raw_text = [line for line in lines if line["reason"].startswith(KEPT_AS_RAW_TEXT)]
    refused = len(lines) - len(dropped) - len(raw_text)
    kinds = np.concatenate([part.votes.labels for part in parts])
    good = np.concatenate([part.good() for part in parts])
    merged = np.concatenate([part.merged for part in parts])
    reasons: dict[str, dict[str, Any]] = {}
    for line in lines:
        kind = f"{line['column'] or 'row'}: {_kind(line['reason'])}"
        found = reasons.setdefault(kind, {"rows": 0, "first": _described(line)})
        found["rows"] += 1
    return {
        "files": [
            {"path": str(part.path), "format": part.format, "rows": part.rows} for part in parts
        ],
        "rows": sum(part.rows for part in parts),
        "refused": refused,
        "dropped": len(dropped),
        "raw_text": len(raw_text),
        "merged": int(merged.sum()),
        "battles": int(good.sum()),
        "votes": {
            kind: {"kept": int((good & mine).sum()), "refused": int((~good & mine).sum())}
            for number, kind in enumerate(VOTE_KINDS)
            if (mine := ~merged & (kinds == (number if kind != "none" else -1))).any()
        },
        "reasons": dict(sorted(reasons.items(), key=lambda item: -item[1]["rows"])),
    }


def _kind(reason: str) -> str:
    """A reason without its example, so that rows may be counted by it."""
    known = next((sign for sign in (KEPT_AS_RAW_TEXT, DROPPED) if reason.startswith(sign)), "")
    return known + re.split(r": |, by row ", reason.removeprefix(known))[0]


def print_counts(source: str, counts: Mapping[str, Any]) -> None:
    """Print what `count_rows` has counted."""
    formats = ", ".join(sorted({file["format"] for file in counts["files"]}))
    left = [f"{counts[name]:,} {text}" for name, text in _LEFT.items() if counts[name]]
    print(f"{source} ({formats}): {counts['rows']:,} rows" + "".join(f", {x}" for x in left))
    votes = [f"{kind} {count['kept']:,}" for kind, count in counts["votes"].items()]
    print(f"  {counts['battles']:,} battles by vote: {', '.join(votes)}")
    for reason, found in counts["reasons"].items():
        print(f"  {found['rows']:,} × {reason}; first: {found['first']}")


_LEFT = {
    "refused": "refused",
    "dropped": "dropped",
    "raw_text": "kept as raw text",
    "merged": "merged with another annotator's",
}


def _check(
    source: str, parts: Sequence[Part], counts: Mapping[str, Any], max_refused: float
) -> None:
    """Refuse a source of which too much was refused; what is dropped was not."""
    kept, given = (
        np.concatenate([part.votes.labels[rows] for part, rows in zip(parts, of, strict=True)])
        for of in (
            [part.good() for part in parts],
            [~part.dropped & ~part.merged for part in parts],
        )
    )
    lost = [VOTE_KINDS[kind] for kind in np.setdiff1d(given, [*kept, NO_VOTE])]
    share = counts["refused"] / counts["rows"]
    if share <= max_refused and not lost:
        return
    reason, found = next(iter(counts["reasons"].items()))
    what = (
        f"{counts['refused']:,} of {counts['rows']:,} rows are refused, more than data.max_refused "
        f"({max_refused:g})"
        if share > max_refused
        else f"every vote of kind {lost[0]} is refused"
    )
    raise InputError(
        f"{source}: {what}; most often ({found['rows']:,} rows): {reason}; first: {found['first']}"
    )
