"""The baseline to beat, and a member of stacks: boosted trees over what shows on the surface of a battle.

The trees (``scoring.trees``) read the features of ``battles.surface_features``, of each answer, their
differences and those of the prompt. They learn every
battle in both orders, and their prediction is the mean of both orders: exchanging the answers exchanges it
exactly. Rows of a fold are predicted by trees that never saw its prompts, if the folds keep these whole;
test and held-out battles by trees that learned no held-out prompt.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arena_distill.battles.folds import HELD_OUT, training_rows, undivided_groups, validation_rows
from arena_distill.battles.surface_features import ANSWER, PROMPT, read_surface
from arena_distill.battles.votes import votes_of
from arena_distill.config.phases.settings import Settings
from arena_distill.files.artifacts import provenance, read_parquet, write_parquet
from arena_distill.files.keys import key, locate
from arena_distill.files.probabilities import PROBABILITIES
from arena_distill.scoring.trees import Trees
from arena_distill.verdicts import ORDERS, Order, Votes, exchange, swap_classes

Surface = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Features of prompts, answers A and answers B: float32 (rows, features) each."""


def write_surface(
    folds: Path, battles: Path, output: Path, kept: Path, *, settings: Settings
) -> None:
    """Predict every labelled and test battle from its surface → parquet (`source`, `id`, `p_…`).

    Args:
        folds: `folds.parquet`.
        battles: `battles.parquet`.
        kept: where the trees go that predict test and held-out battles.
    """
    table = read_parquet(folds)
    votes, fold = votes_of(table), table["fold"].to_numpy()
    keys, surface = read_surface(battles)
    known = locate(key(table), keys, str(battles))
    probabilities = np.full((len(keys), votes.classes), np.nan)
    for number in np.unique(fold[fold >= 0]).tolist():
        training, asked = training_rows(table, number), validation_rows(table, number)
        trees = fit_surface(_of(surface, known[training]), votes[training])
        probabilities[known[asked]] = ask_surface(trees, _of(surface, known[asked]), votes.classes)
    groups = undivided_groups(table)  # extra battles may have a held-out prompt
    training = np.flatnonzero(votes.known & ~np.isin(groups, groups[fold == HELD_OUT]))
    columns = ["id", "source"]
    named = read_parquet(battles, columns)
    test = np.flatnonzero(pc.equal(named["source"], "test").to_numpy())
    asked = np.concatenate([known[fold == HELD_OUT], test])
    trees = fit_surface(_of(surface, known[training]), votes[training])
    probabilities[asked] = ask_surface(trees, _of(surface, asked), votes.classes)
    trees.write(kept)
    rows = np.flatnonzero(~np.isnan(probabilities[:, 0]))
    found = {name: named[name].take(pa.array(rows)) for name in columns}
    found |= dict(zip(PROBABILITIES, probabilities[rows].T, strict=False))
    write_parquet(pa.table(found), output, provenance("surface", settings.model_dump()))
    print(f"{output}: {len(rows):,} battles by trees over their surface")


def score_surface(folds: pa.Table, battles: Path, fold: int, wanted: pa.Array) -> np.ndarray:
    """Predict any battles by trees that learned what a fold's judges do: float64 (rows, classes).

    Args:
        folds: the table of `folds.parquet`.
        battles: `battles.parquet`.
        wanted: keys of the rows to predict.

    Raises:
        InputError: `battles` lacks a row.
    """
    keys, surface = read_surface(battles)
    training = training_rows(folds, fold)
    learned = locate(key(folds.take(pa.array(training))), keys, str(battles))
    asked = locate(wanted, keys, str(battles))
    votes = votes_of(folds)
    trees = fit_surface(_of(surface, learned), votes[training])
    return ask_surface(trees, _of(surface, asked), votes.classes)


def fit_surface(training: Surface, votes: Votes) -> Trees:
    """Fit trees to battles in both orders.

    Args:
        training: features of the rows to learn; `votes`: of these rows.
    """
    swapped = Votes(swap_classes(votes.probabilities), votes.weights)
    seen = [
        (_inputs(training, order), v) for order, v in zip(ORDERS, (votes, swapped), strict=True)
    ]
    inputs = np.concatenate([x for x, _ in seen])
    shares = np.concatenate([v.probabilities for _, v in seen])
    # Trees know hard votes with weights only: a soft vote is one of each class.
    battle, kind = np.nonzero(shares)
    counts = np.tile(votes.weights, 2)[battle] * shares[battle, kind]
    return Trees.fit(inputs[battle], kind, counts)


def ask_surface(trees: Trees, asked: Surface, classes: int) -> np.ndarray:
    """Predict battles from their surface, the mean of both orders: float64 (rows, classes)."""
    views = [trees.probabilities(_inputs(asked, order), classes) for order in ORDERS]
    return exchange(np.stack(views, axis=1)).mean(axis=1)


def read_trees(path: Path, classes: int) -> Trees:
    """Read the trees of :func:`write_surface`.

    Raises:
        InputError: the file is missing or damaged, or of other features or classes.
    """
    return Trees.read(path, len(PROMPT) + 3 * len(ANSWER), classes)


def _inputs(surface: Surface, order: Order) -> np.ndarray:
    """What the trees read of battles in an order: float32 (rows, 63)."""
    prompt, a, b = surface
    first, second = (a, b) if order == "AB" else (b, a)
    return np.concatenate([prompt, first, second, first - second], axis=1)


def _of(surface: Surface, rows: np.ndarray) -> Surface:
    prompt, a, b = surface
    return prompt[rows], a[rows], b[rows]
