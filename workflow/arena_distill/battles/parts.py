"""Read the files of each source: which of their battles are kept, and why the others are not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arena_distill.battles.annotators import hash_sides, merge_annotators
from arena_distill.battles.formats.canonical import hash_texts
from arena_distill.battles.formats.columns import columns_found
from arena_distill.battles.formats.conversion import convert
from arena_distill.battles.prompts import number_digests, prompt_digests
from arena_distill.battles.votes import VOTE_FIELDS, vote_columns
from arena_distill.config.source import SOURCES, Reading, Source
from arena_distill.config.vocabulary import BattleFormat
from arena_distill.errors import InputError
from arena_distill.files.artifacts import (
    Spill,
    StrPath,
)
from arena_distill.files.keys import key
from arena_distill.files.raw_tables import (
    DROPPED,
    Faults,
    described,
)
from arena_distill.files.readers import read_table
from arena_distill.verdicts import Ties, Votes

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
Files = Mapping[str, Sequence[StrPath | Source]]
"""Source, one of `SOURCES`, → its files, read by default or as they say. Sources may be left out."""


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
            f"{described(lines[0])}"
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
    as_read = votes_as_read(read.vote, read.weight)
    votes = as_read.among(ties)
    if ties == "refuse":
        refuse_ties(raw.faults, as_read, read.row)
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


def refuse_ties(faults: Faults, votes: Votes, row: np.ndarray) -> None:
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


def votes_as_read(shares: np.ndarray, weights: np.ndarray | None = None) -> Votes:
    """Votes of shares (rows, 3) that are NaN where there is no vote."""
    return Votes(np.nan_to_num(shares), np.ones(len(shares)) if weights is None else weights)


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
    first, again = duplicates(pa.chunked_array([key(ids)]))
    for seen, late in zip(first, again, strict=True):
        taken, part = parts[part_of[seen]], parts[part_of[late]]
        row = taken.faults.numbers[taken.row[battle_of[seen]]]
        reason = f"id is taken: {ids['id'][late]}, by row {row} of {taken.path}"
        position = int(part.row[battle_of[late]])
        # Good rows have no fault so far, but for test battles that are kept as raw text.
        part.faults.found[position] = ("id", reason)
        if part.source == "test":
            _refuse_test_row(part.faults.line(part.source, position))


def duplicates(ids: pa.ChunkedArray) -> tuple[list[int], list[int]]:
    """Find ids seen before: positions of their first rows, and of the later rows, aligned."""
    codes = ids.combine_chunks().dictionary_encode().indices.to_numpy()
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    first = first[inverse]
    again = np.flatnonzero(first != np.arange(len(codes)))
    return first[again].tolist(), again.tolist()


def _refuse_test_row(line: dict[str, Any]) -> NoReturn:
    raise InputError(f"{described(line)}; every test battle needs a prediction, so correct the row")
