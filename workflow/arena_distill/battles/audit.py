"""Audit leaks: battles whose prompt, or prompt and answer, are also among a judge's training battles.

An out-of-fold log loss is honest only if the validation battles of a fold differ from its training
battles. The same is true of test battles with ``train``, ``extra`` and ``ut``, and of held-out battles.
For each such relation between two sets of battles, the audit counts the battles of the first with

- ``same``: a prompt of the second (as in :func:`arena_distill.battles.prompts.distinct_prompts`);
- ``near``: not the same, but a near-duplicate prompt (see :mod:`arena_distill.battles.similarity`);
- ``answers``: such a prompt, and also one of its answers: a near-duplicate battle.

Each distinct prompt is compared once, and only for relations that need it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from os.path import commonprefix
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arena_distill.battles.folds import (
    fold_settings,
    held_out_rows,
    training_rows,
    validation_rows,
)
from arena_distill.battles.prompts import distinct_prompts, normalised
from arena_distill.battles.similarity import banding, near_pairs, recall, within
from arena_distill.config.phases.battles import AuditSettings
from arena_distill.files.artifacts import (
    provenance,
    read_parquet,
    read_parquet_parts,
    write_json,
    write_text,
)
from arena_distill.files.keys import key, locate
from arena_distill.files.tables import table_csv
from arena_distill.metrics import Figures

EXAMPLES = 5
"""The number of worst pairs to report per relation and kind."""

EXCERPT = 160
"""The number of characters of a prompt to report."""

SLICE = 2_048  # battles whose answers are read together

KINDS = SAME, NEAR = "same", "near"

COUNTS = ("of", "among", "battles", "same", "near", "answers")
COLUMNS = (
    *("of", "among", "kind", "similarity", "answer"),
    *("source", "id", "other_source", "other_id", "prompt", "other_prompt"),
)


@dataclass(frozen=True)
class Relation:
    """Two sets of battles that should have nothing in common.

    of, among: their names.
    left, right: bool (rows of battles,), their members.
    """

    of: str
    among: str
    left: np.ndarray
    right: np.ndarray


def write_audit(
    battles: Path, folds: Path, output: Path, table: Path, *, settings: AuditSettings
) -> None:
    """Audit a run's battles → `audit.json`, and the worst examples → `leaks.csv`.

    Args:
        battles: `battles.parquet`.
        folds: `folds.parquet`.
        output: the file for the result of :func:`audit`, with its provenance.
        table: the file for the table of examples.

    Raises:
        InputError: a file is missing or damaged, or a row of `folds` has no battle.
    """
    chosen = settings.model_dump()
    about = provenance("audit", chosen)
    del chosen["version"]
    answers = number_answers(read_parquet_parts(battles, ["response_a", "response_b"]))
    prompts = read_parquet(battles, ["id", "source", "prompt", "group"])
    figures = audit(prompts, answers, read_parquet(folds), **chosen)
    write_json(figures | {"provenance": about}, output)
    write_text(table_csv(figures["examples"], COLUMNS), table)
    for counts in figures["relations"]:
        print(
            "{of} among {among}: of {battles:,} battles, {same:,} have the same prompt and {near:,}"
            " nearly the same; {answers:,} share an answer too".format(**counts)
        )


def audit(
    battles: pa.Table,
    given: np.ndarray,
    folds: pa.Table,
    *,
    threshold: float,
    permutations: int,
    seed: int,
) -> Figures:
    """Count the leaking battles of each relation, and list the worst.

    Args:
        battles: columns `id`, `source`, `prompt` and `group`.
        given: int64 (rows, 2), the numbers of their answers.
        folds: table of `assign_folds`.
        threshold, permutations, seed: of :func:`arena_distill.similarity.near_pairs`.

    Returns:
        `prompts`: their number; `recall`: the least share of near-duplicates that is found;
        `relations`: a record of `COUNTS` each; `examples`: at most `EXAMPLES` records of `COLUMNS` for
        each relation and kind. The result does not depend on the order of the battles.
    """
    groups, texts = distinct_prompts(battles)
    texts, groups = _sorted(texts, groups)
    related = relations(battles, folds)
    several = int(given.max(initial=0)) + 1
    nodes, of_row = np.unique(groups[:, None] * several + given, return_inverse=True)
    prompts = _Items.of(groups[:, None], np.arange(len(texts)), related)
    answers = _Items.of(of_row.reshape(given.shape), nodes // several, related)
    for items in (prompts, answers):
        each = np.arange(len(items.prompt))
        items.remember(SAME, each, each, np.ones(len(each)))
    pairs = near_pairs(
        texts,
        threshold=threshold,
        permutations=permutations,
        seed=seed,
        wanted=prompts.are_related,
    )
    for first, second, similarity in pairs:
        prompts.meet(first, second, similarity)
        one, other, pair = _common(nodes, several, first, second)
        answers.meet(one, other, similarity[pair])
    return {
        "threshold": threshold,
        "prompts": len(texts),
        "recall": float(recall(threshold, *banding(threshold, permutations))),
        "relations": [_counts(r, i, prompts, answers) for i, r in enumerate(related)],
        "examples": _examples(battles, related, prompts, answers),
    }


def relations(battles: pa.Table, folds: pa.Table) -> list[Relation]:
    """The relations to audit: each fold's validation battles, held-out battles, then the sources."""
    rows = locate(key(folds), key(battles), "battles")
    found = []
    for fold in range(fold_settings(folds)["n"]):
        left, right = np.zeros((2, len(battles)), np.bool_)
        left[rows[validation_rows(folds, fold)]] = True
        right[rows[training_rows(folds, fold)]] = True
        found.append(Relation(f"fold {fold}", "its training", left, right))
    held_out = np.zeros(len(battles), np.bool_)
    held_out[rows[held_out_rows(folds)]] = True
    if held_out.any():
        training = np.any([relation.right for relation in found], axis=0)
        found.append(Relation("held out", "any training", held_out, training))
    source = battles["source"].cast(pa.string()).to_numpy()
    for of, among in (
        *(("test", "train"), ("test", "extra"), ("test", "ut")),
        *(("train", "extra"), ("train", "ut")),
    ):
        left, right = source == of, source == among
        if left.any() and right.any():
            found.append(Relation(of, among, left, right))
    return found


def number_answers(parts: Iterable[pa.Table]) -> np.ndarray:
    """Number the distinct answers of battles, compared by a 64-bit hash of their normalised text.

    Args:
        parts: tables with the columns `response_a` and `response_b`.

    Returns:
        int64 (rows of all parts, 2).
    """
    from pandas.util import hash_array

    hashes = [np.zeros((0, 2), np.uint64)]
    for part in parts:
        for start in range(0, len(part), SLICE):
            some = part.slice(start, SLICE)
            both = (pc.binary_join(some[name], " ") for name in ("response_a", "response_b"))
            forms = [np.array([normalised(t) for t in side.to_pylist()], object) for side in both]
            hashes.append(np.stack([hash_array(side, categorize=False) for side in forms], axis=1))
    every = np.concatenate(hashes)
    numbers: np.ndarray = np.unique(every, return_inverse=True)[1]
    return numbers.reshape(every.shape).astype(np.int64)


# --- prompts, and answers to them -------------------------------------------------------------------


@dataclass
class _Items:
    """The prompts of battles, or the answers to prompts, and their sides in the relations.

    of_row: int64 (rows, 1 or 2), the items of each battle.
    prompt: int64 (items,), the prompt that an item is or belongs to.
    battles: int64 (items,), the number of battles with it.
    left, right: bool (items, relations).
    near: bool (items, relations), whether a near-duplicate is on the right.
    worst: the worst pairs of a relation and kind: first and second item, similarity.
    """

    of_row: np.ndarray
    prompt: np.ndarray
    battles: np.ndarray
    left: np.ndarray
    right: np.ndarray
    near: np.ndarray
    worst: dict[tuple[int, str], tuple[np.ndarray, np.ndarray, np.ndarray]] = field(
        default_factory=dict
    )

    @classmethod
    def of(cls, of_row: np.ndarray, prompt: np.ndarray, related: Sequence[Relation]) -> _Items:
        left, right, near = np.zeros((3, len(prompt), len(related)), np.bool_)
        for i, relation in enumerate(related):
            left[of_row[relation.left], i] = True
            right[of_row[relation.right], i] = True
        battles = np.bincount(of_row.ravel(), minlength=len(prompt))
        return cls(of_row, prompt, battles, left, right, near)

    def are_related(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Whether any relation has one item on its left and the other on its right: bool (pairs,)."""
        related = self.left[first] & self.right[second] | self.left[second] & self.right[first]
        answer: np.ndarray = related.any(axis=1)
        return answer

    def meet(self, first: np.ndarray, second: np.ndarray, similarity: np.ndarray) -> None:
        """Record near-duplicate items."""
        for a, b in ((first, second), (second, first)):
            for i in range(self.near.shape[1]):
                self.near[a[self.right[b, i]], i] = True
            self.remember(NEAR, a, b, similarity)

    def remember(self, kind: str, a: np.ndarray, b: np.ndarray, similarity: np.ndarray) -> None:
        """Keep the worst pairs: the most similar, then those of most battles; one per two prompts."""
        for i in range(self.near.shape[1]):
            hit = self.left[a, i] & self.right[b, i]
            known = self.worst.get((i, kind), (a[:0], b[:0], similarity[:0]))
            u, v, s = (
                np.concatenate([k, new[hit]])
                for k, new in zip(known, (a, b, similarity), strict=True)
            )
            order = np.lexsort((v, u, -self.battles[u], -s))
            between = self.prompt[u[order]] * len(self.prompt) + self.prompt[v[order]]
            order = order[np.sort(np.unique(between, return_index=True)[1])][:EXAMPLES]
            self.worst[i, kind] = u[order], v[order], s[order]


def _counts(relation: Relation, i: int, prompts: _Items, answers: _Items) -> Figures:
    prompt = prompts.of_row[relation.left, 0]
    same = prompts.right[prompt, i]
    both = answers.of_row[relation.left]
    shared = (answers.right[both, i] | answers.near[both, i]).any(axis=1)
    return {
        "of": relation.of,
        "among": relation.among,
        "battles": len(prompt),
        "same": int(same.sum()),
        "near": int((prompts.near[prompt, i] & ~same).sum()),
        "answers": int(shared.sum()),
    }


def _sorted(
    texts: pa.LargeStringArray, groups: np.ndarray
) -> tuple[pa.LargeStringArray, np.ndarray]:
    """Number prompts by their text, so that the numbers do not depend on the battles' order."""
    order = pc.sort_indices(texts)
    place = np.empty(len(texts), np.int64)
    place[order.to_numpy()] = np.arange(len(texts))
    return texts.take(order), place[groups]


def _common(
    nodes: np.ndarray, several: int, first: np.ndarray, second: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the common answers of each pair of prompts.

    Args:
        nodes: prompt * `several` + answer, for each answer to a prompt, ascending.

    Returns:
        Positions in `nodes` of the answer to the first and to the second prompt, and of the pairs.
    """
    sides = np.stack((first, second))
    begin = np.searchsorted(nodes, sides * several)
    count = np.searchsorted(nodes, (sides + 1) * several) - begin
    fewer, each = count.argmin(axis=0), np.arange(len(first))
    counts = count[fewer, each]
    pair = np.repeat(each, counts)
    one = np.repeat(begin[fewer, each], counts) + within(counts)
    wanted = sides[1 - fewer, each][pair] * several + nodes[one] % several
    other = np.searchsorted(nodes, wanted)
    found = nodes[np.minimum(other, len(nodes) - 1)] == wanted
    return one[found], other[found], pair[found]


# --- examples ---------------------------------------------------------------------------------------


def _examples(
    battles: pa.Table, related: Sequence[Relation], prompts: _Items, answers: _Items
) -> list[Figures]:
    """The worst pairs of each relation: those that share an answer first."""
    place = pc.sort_indices(key(battles)).to_numpy().argsort()
    found = []
    for i, relation in enumerate(related):
        for kind in KINDS:
            shown: dict[tuple[int, int], Figures] = {}
            for items, answer in ((answers, True), (prompts, False)):
                worst = items.worst.get((i, kind), ((), (), ()))
                for u, v, similarity in zip(*worst, strict=True):
                    rows = (
                        _first(items.of_row, u, relation.left, place),
                        _first(items.of_row, v, relation.right, place),
                    )
                    record = {
                        "of": relation.of,
                        "among": relation.among,
                        "kind": kind,
                        "similarity": round(float(similarity), 4),
                        "answer": answer,
                        **_pair(battles, *rows),
                    }
                    shown.setdefault((items.prompt[u], items.prompt[v]), record)
            found += list(shown.values())[:EXAMPLES]
    return found


def _first(of_row: np.ndarray, item: int, side: np.ndarray, place: np.ndarray) -> int:
    """The row of a side that has an item, the first by its key."""
    rows = np.flatnonzero(side & (of_row == item).any(axis=1))
    return int(rows[place[rows].argmin()])


def _pair(battles: pa.Table, row: int, other: int) -> Figures:
    columns = battles.select(["source", "id", "prompt"])
    pair = [columns.slice(at, 1).to_pylist()[0] for at in (row, other)]
    one, two = (_printable(" ".join(battle["prompt"])) for battle in pair)
    # If prompts have a common start, the excerpts begin where they differ.
    alike = len(commonprefix([one, two]))
    start = max(alike - EXCERPT // 4, 0) if EXCERPT // 2 < alike < max(len(one), len(two)) else 0
    return {
        "source": pair[0]["source"],
        "id": pair[0]["id"],
        "other_source": pair[1]["source"],
        "other_id": pair[1]["id"],
        "prompt": _excerpt(one, start),
        "other_prompt": _excerpt(two, start),
    }


def _printable(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _excerpt(text: str, start: int) -> str:
    before, after = "…" * (start > 0), "…" * (start + EXCERPT < len(text))
    return f"{before}{text[start : start + EXCERPT]}{after}"
