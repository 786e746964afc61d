"""Read the votes of the test battles: to score predictions with, and for nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arena_distill.battles.annotators import merge_annotators
from arena_distill.battles.formats.columns import Table, columns_found, resolve
from arena_distill.battles.formats.votes import read_votes
from arena_distill.battles.parts import duplicates, refuse_ties, votes_as_read
from arena_distill.battles.votes import vote_columns
from arena_distill.config.phases.battles import SolutionSettings
from arena_distill.config.source import Reading
from arena_distill.errors import InputError
from arena_distill.files.artifacts import (
    StrPath,
    provenance,
    read_parquet,
    write_parquet,
)
from arena_distill.files.keys import locate
from arena_distill.files.raw_tables import (
    column_texts,
    described,
)
from arena_distill.files.readers import read_table
from arena_distill.verdicts import Ties, Votes


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
    ids, votes = read_solution(solution, settings.ties, merge=settings.annotators == "merge")
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


def read_solution(
    path: StrPath, ties: Ties = "class", *, merge: bool = False
) -> tuple[pa.ChunkedArray, Votes]:
    """Read a file of votes on test battles.

    Args:
        ties: as in `read_battles`.
        merge: rows with the same id become one, see :func:`merge_annotators`.

    Returns:
        ids (string) and votes, in the file's order; no vote where ties are none.

    Raises:
        InputError: as `read_battles`; also if any row has no id or no vote, or, unless they are merged, an
            id seen before.
    """
    raw = read_table(Path(path))
    names = resolve(raw, {})
    if "id" not in names or not {"winner", "winner_model_a"} & set(names):
        raise InputError(f"{path}: columns id and winner_model_a, winner_model_b, winner_tie (or label, or "
                         f"winner) expected; {columns_found(raw)}")  # fmt: skip
    table = Table(raw, names, {}, Reading(), votes=True, keep_unreadable=False)
    as_read = votes_as_read(np.concatenate([read_votes(rows) for rows in table.pieces()]))
    if ties == "refuse":
        refuse_ties(raw.faults, as_read, np.arange(len(as_read)))
    ids = pc.fill_null(column_texts(raw, names["id"]), "")
    faults = raw.faults
    for nameless in np.flatnonzero(pc.equal(ids, "").to_numpy()):
        faults.add(int(nameless), "id", "no id")
    first, again = duplicates(ids)
    for position, seen in () if merge else zip(again, first, strict=True):
        faults.add(
            position,
            "id",
            f"id is taken: {ids[position]}, by row {raw.numbers[seen]}; where several people voted, give "
            "data.solution as a section: {path: …, annotators: merge}",
        )
    if lines := faults.lines("test"):
        raise InputError(
            f"{described(lines[0])}; every test battle needs one vote ({len(lines)} rows at fault)"
        )
    votes = as_read.among(ties)
    if not merge:
        return ids, votes
    battle = ids.combine_chunks().dictionary_encode().indices.to_numpy().astype(np.uint64)
    rows, votes = merge_annotators(np.stack([battle, battle], axis=1), votes)
    return ids.take(pa.array(rows)), votes
