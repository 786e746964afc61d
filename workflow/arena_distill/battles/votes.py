"""Read and write votes as columns of tables: battles, folds, tokens, test battles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from arena_distill.files.artifacts import read_parquet
from arena_distill.files.keys import key
from arena_distill.verdicts import CLASSES, Votes


def _vote_field(classes: int) -> pa.Field:
    return pa.field("vote", pa.list_(pa.float32(), classes))  # A, B, tie; null without a vote


VOTE_FIELDS = [_vote_field(len(CLASSES)), pa.field("weight", pa.float32(), nullable=False)]
"""The columns of votes in every table that has them; of a run of two classes a vote is two numbers."""


def with_classes(schema: pa.Schema, classes: int) -> pa.Schema:
    """The schema of a table with the columns of `VOTE_FIELDS` whose votes have so many classes."""
    return schema.set(schema.get_field_index("vote"), _vote_field(classes))


def vote_columns(votes: Votes) -> dict[str, pa.Array]:
    """The columns of `VOTE_FIELDS`."""
    flat = pa.array(votes.probabilities.ravel(), pa.float32())
    vote = pa.FixedSizeListArray.from_arrays(flat, votes.classes, mask=pa.array(~votes.known))
    return {"vote": vote, "weight": pa.array(votes.weights, pa.float32())}


def classes_of(table: pa.Table) -> int:
    """How many classes the votes of a table have."""
    return int(table["vote"].type.list_size)


def votes_of(table: pa.Table) -> Votes:
    """The votes of a table with the columns of `VOTE_FIELDS`, in the order of its rows."""
    column, classes = table["vote"].combine_chunks(), classes_of(table)
    probabilities = np.zeros((len(table), classes))
    known = column.is_valid().to_numpy(zero_copy_only=False)
    probabilities[known] = column.flatten().to_numpy().reshape(-1, classes)
    return Votes(probabilities, table["weight"].to_numpy().astype(np.float64))


@dataclass(frozen=True)
class Solution:
    """The test battles that have a vote, in the order of `battles.parquet`.

    table: `test_votes.parquet`.
    """

    table: pa.Table

    @classmethod
    def read(cls, path: Path) -> Solution:
        """Read `test_votes.parquet`; raises `InputError` if it is missing or damaged."""
        return cls(read_parquet(path))

    @property
    def ids(self) -> pa.Array:
        return self.table["id"].combine_chunks()

    @property
    def keys(self) -> pa.Array:
        return key(self.table)

    @property
    def votes(self) -> Votes:
        return votes_of(self.table)

    @property
    def groups(self) -> np.ndarray:
        """Their prompt groups: int64 (rows,)."""
        return np.asarray(self.table["group"])
