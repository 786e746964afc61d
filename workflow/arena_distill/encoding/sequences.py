"""Hold token ids of many battles in flat arrays, which tokenisation writes and encoding reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from arena_distill.battles.similarity import slices
from arena_distill.battles.votes import votes_of
from arena_distill.errors import InputError
from arena_distill.files.artifacts import read_parquet, read_provenance
from arena_distill.files.keys import key
from arena_distill.verdicts import Votes

FIELDS = ("prompt", "response_a", "response_b")

TOKENS = 1 << 22
"""The most tokens (or those of one row) whose positions are in memory at once."""


@dataclass(frozen=True)
class Sequences:
    """Ragged token sequences: `ids` int32 (tokens,), `offsets` int64 (rows + 1,)."""

    ids: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.ids[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[row] for row in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per row: int64 (rows,)."""
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> Sequences:
        """The given rows (int positions, or a bool mask), in that order."""
        rows = np.arange(len(self))[rows]
        return gather(self.ids, self.offsets[rows], self.lengths[rows])

    def alike(self) -> np.ndarray:
        """Number the rows so that equal ones have the same number: int64 (rows,)."""
        bounds = pa.py_buffer(self.offsets.astype(np.int64) * 4)
        ids = pa.py_buffer(np.ascontiguousarray(self.ids, np.int32))
        rows = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(self), [None, bounds, ids])
        return rows.dictionary_encode().indices.to_numpy().astype(np.int64)

    @staticmethod
    def concatenate(parts: list[Sequences]) -> Sequences:
        lengths = np.concatenate([part.lengths for part in parts])
        return Sequences(np.concatenate([part.ids for part in parts]), offsets_of(lengths))


@dataclass(frozen=True)
class Field:
    """One field of every battle.

    tokens: all turns of a row joined by a newline.
    turns: where each turn starts within its row.
    cap: int64 (rows,), the number of tokens within the winners' word cap.
    size: for an answer, its :data:`SIZE`.
    name: for an answer, the :data:`NAME` of its model, if the file has names.
    """

    tokens: Sequences
    turns: Sequences
    cap: np.ndarray
    size: Sequences | None = None
    name: Sequences | None = None

    def take(self, rows: np.ndarray) -> Field:
        """The given rows, in that order."""
        return replace(self.extent(rows), tokens=self.tokens.take(rows))

    def extent(self, rows: np.ndarray) -> Field:
        """What truncation needs of the given rows: their lengths and the starts of turns, but no ids."""
        empty = Sequences(np.zeros(0, np.int32), offsets_of(self.tokens.lengths[rows]))
        size, name = (part if part is None else part.take(rows) for part in (self.size, self.name))
        return Field(empty, self.turns.take(rows), self.cap[rows], size, name)


@dataclass(frozen=True)
class Vocabulary:
    """The token ids that the templates need."""

    pad: int
    newline: tuple[int, ...]
    frames: Mapping[str, tuple[tuple[int, ...], ...]]
    """By template, its four literals, with begin and end of sequence if the tokenizer has them."""
    one_answer: Mapping[str, tuple[tuple[int, ...], ...]]
    """By template, the three literals of sequences with one answer."""

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Vocabulary:
        """From the JSON values that the tokenisation stores."""
        frames, one_answer = (
            {t: tuple(tuple(ids) for ids in frame) for t, frame in stored[name].items()}
            for name in ("frames", "one_answer")
        )
        return cls(stored["pad"], tuple(stored["newline"]), frames, one_answer)


@dataclass(frozen=True)
class Tokens:
    """A tokenised set of battles: ids, sources and votes (rows,), three fields, and the vocabulary.

    training: the fields of all training battles of the file, without token ids; they give the lengths
        of battles, whatever rows are selected (see :func:`length_budget`).
    """

    ids: pa.Array
    sources: pa.Array
    votes: Votes
    fields: Mapping[str, Field]
    vocabulary: Vocabulary
    training: Mapping[str, Field] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def keys(self) -> pa.Array:
        """The key of each row, to join other files (see ``keys``)."""
        return key(pa.table({"id": self.ids, "source": self.sources}))

    def take(self, rows: np.ndarray) -> Tokens:
        """The given rows (int positions, or a bool mask), in that order."""
        rows = np.arange(len(self))[rows]
        fields = {name: field.take(rows) for name, field in self.fields.items()}
        ids, sources = self.ids.take(rows), self.sources.take(rows)
        return Tokens(ids, sources, self.votes[rows], fields, self.vocabulary, self.training)


def read_tokens(path: Path) -> Tokens:
    """Read `tokens.parquet`.

    Raises:
        InputError: the file is missing, damaged or not written by :func:`tokenize_battles`.
    """
    stored, names = read_provenance(path).get("vocabulary"), pq.read_schema(path).names
    if stored is None or "vote" not in names:
        raise InputError(f"{path}: not a file of tokens; delete it and the workflow rebuilds it")
    return _tokens(partial(read_parquet, path), names, Vocabulary.of(stored))


def tokens_of(table: pa.Table, vocabulary: Vocabulary) -> Tokens:
    """A table of tokens (:func:`arena_distill.encoding.tokenization.tokenize`) in flat arrays."""
    return _tokens(table.select, table.column_names, vocabulary)


def _tokens(
    select: Callable[[list[str]], pa.Table], names: list[str], vocabulary: Vocabulary
) -> Tokens:
    """Tokens of the table of which `select` gives columns: long ones singly, as each is copied."""

    def sequences(name: str) -> Sequences:
        return _sequences(select([name])[name])

    caps = {name: f"{name}_cap" for name in FIELDS}
    table = select(["id", "source", "vote", "weight", *caps.values()])
    fields = {
        name: Field(
            sequences(name),
            sequences(f"{name}_turns"),
            table[cap].to_numpy().astype(np.int64),
            *(
                sequences(f"{name}_{part}") if f"{name}_{part}" in names else None
                for part in ("size", "name")
            ),
        )
        for name, cap in caps.items()
    }
    sources = table["source"].combine_chunks().cast(pa.string())
    rows = np.flatnonzero(pc.equal(sources, "train").to_numpy(zero_copy_only=False))
    return Tokens(
        table["id"].combine_chunks(),
        sources,
        votes_of(table),
        fields,
        vocabulary,
        {name: field.extent(rows) for name, field in fields.items()},
    )


def gather(pool: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Sequences:
    """Concatenate slices of a pool."""
    offsets = offsets_of(lengths)
    ids = np.empty(offsets[-1], pool.dtype)
    for part in slices(offsets[1:], TOKENS):
        some = slice(offsets[part.start], offsets[part.stop])
        shift = np.repeat(starts[part] - offsets[part], lengths[part])
        ids[some] = pool[np.arange(some.start, some.stop) + shift]
    return Sequences(ids, offsets)


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def list_array(sequences: Sequences) -> pa.LargeListArray:
    return pa.LargeListArray.from_arrays(sequences.offsets, pa.array(sequences.ids, pa.int32()))


def _sequences(column: pa.ChunkedArray) -> Sequences:
    lists = column.combine_chunks()
    if isinstance(lists, pa.ChunkedArray):  # an empty table has no chunk to combine into
        lists = pa.concat_arrays(lists.chunks) if lists.num_chunks else pa.array([], lists.type)
    lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
    return Sequences(lists.flatten().to_numpy(), offsets_of(lengths))
