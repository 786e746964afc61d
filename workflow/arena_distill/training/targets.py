"""Select the targets of a student: the logits and hidden states of its teachers, and their weights.

Targets are joined by key: the order of rows in a teacher's file does not matter, and a missing row is an
error.

`in_sample` targets come from a teacher that was trained on the same rows, so they are over-confident.
`out_of_fold` targets come from a teacher that was not. But it was trained on the votes of the student's
validation rows, and every fold's teacher was trained on the extra rows. So a student's score out of fold is
optimistic (``Config.is_optimistic``), more so if its teachers remember votes well; its test score is not.

Unlabelled battles have no votes that a teacher could have seen. Out of fold they get the mean of all folds'
teachers, like extra rows: a better target, but its teachers have learned from the votes of the student's
validation rows. In sample they get the teacher of their fold, which has not. With `unlabelled` targets so
they do too, and battles with votes learn these alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arena_distill.battles.votes import votes_of
from arena_distill.config.training import Loss, State, Targets
from arena_distill.errors import InputError
from arena_distill.files.artifacts import (
    check_made_from,
    fingerprint,
    read_parquet,
    read_provenance,
)
from arena_distill.files.keys import key, locate
from arena_distill.files.logits import ids_path, read_logits, read_states
from arena_distill.verdicts import Votes

VOTE_LOSS = Loss(ce=1.0, kl=0.0, cosine=0.0)
"""The loss of a judge without teachers: cross-entropy with the vote."""


@dataclass(frozen=True)
class Part:
    """The rows of one teacher's file that are targets of a student's training rows.

    positions: int64 (n,), rows of the file.
    rows: int64 (n,), the training rows of which these are the targets.
    shared: int64, rows of the file that are in every file of the teacher, in the same order.
    """

    path: Path
    positions: np.ndarray
    rows: np.ndarray
    shared: np.ndarray


@dataclass(frozen=True)
class Selection:
    """The places of a student's training rows in a teacher's files.

    count: number of training rows.
    shared: int64, training rows in every file (out of fold: extra and unlabelled); they get the mean.
    """

    count: int
    shared: np.ndarray
    parts: tuple[Part, ...]

    def of(self, read: Callable[[Path], np.ndarray]) -> np.ndarray:
        """Read each file with `read`, and select the training rows: (rows, ...), of the files' dtype.

        Rows without a target are 0.
        """
        chosen = total = np.zeros(0)
        for part in self.parts:
            found = read(part.path)  # one file at a time: states are large
            if part is self.parts[0]:
                chosen = np.zeros((self.count, *found.shape[1:]), found.dtype)
                total = np.zeros((len(self.shared), *found.shape[1:]), np.float32)
            chosen[part.rows] = found[part.positions]
            total += found[part.shared]
        chosen[self.shared] = total / len(self.parts)
        return chosen


def select_rows(
    teachers: Mapping[str, Sequence[Path]], rows: pa.Table, targets: Targets
) -> list[Selection]:
    """Find a student's training rows in its teachers' files.

    Args:
        teachers: each teacher's `fold_<k>.npy` files. For `out_of_fold` those of all its folds: a row's
            targets come from the fold that did not train on it; extra and unlabelled rows get the mean over
            folds. For `in_sample` the file of the student's own fold, whose teacher learned these rows; for
            `unlabelled` the same, of unlabelled rows alone.
        rows: the training rows; columns `id` and `source`.

    Raises:
        InputError: a file is missing, or a row is in no file.
    """
    wanted = key(rows)
    if targets == "out_of_fold":
        return [_out_of_fold(name, files, wanted) for name, files in teachers.items()]
    taught = np.arange(len(rows))
    if targets == "unlabelled":
        taught = taught[_of_source(rows, "unlabelled")]
    return [_in_sample(name, files, wanted, taught) for name, files in teachers.items()]


def _of_source(rows: pa.Table, source: str) -> np.ndarray:
    """Which rows are of a source: bool (rows,)."""
    return np.asarray(pc.equal(rows["source"], source).to_numpy(zero_copy_only=False))


def weighted_targets(
    teachers: Mapping[str, Sequence[Path]],
    rows: pa.Table,
    folds: pa.Table,
    *,
    targets: Targets,
    loss: Loss,
) -> tuple[list[Selection], Votes, np.ndarray, np.ndarray]:
    """A student's targets: their places, the votes, the teachers' logits, and their weights per battle.

    Args:
        teachers: see :func:`select_rows`.
        rows: the training rows, of `folds`.

    Returns:
        the selections; the votes as they count (:func:`trusted_votes`, `loss.unlabelled_weight`);
        :func:`teacher_logits`; and :func:`teacher_weights`, 0 for battles that teachers do not teach.

    Raises:
        InputError: a file is missing, damaged or of other folds, or a row is in no file.
    """
    for file in chain.from_iterable(teachers.values()):
        check_made_from(read_provenance(ids_path(file)), file, folds=fingerprint(folds))
    selected = select_rows(teachers, rows, targets)
    logits = teacher_logits(selected)
    # Every fold's teacher was trained on the extra battles: they do not enter the fit of weights.
    # (Battles without a vote do not either.)
    held_out = _of_source(rows, "train")
    votes = votes_of(rows)
    weights = teacher_weights(logits, votes, held_out, loss)
    unlabelled = _of_source(rows, "unlabelled")
    if targets == "unlabelled":
        weights[~unlabelled] = 0
    votes = replace(votes, weights=np.where(unlabelled, loss.unlabelled_weight, votes.weights))
    return selected, trusted_votes(logits, votes, held_out, loss), logits, weights


def trusted_votes(targets: np.ndarray, votes: Votes, held_out: np.ndarray, loss: Loss) -> Votes:
    """Make votes count less that every teacher contradicts: `loss.contradicted_weight` times.

    A teacher contradicts a vote if it gives it a probability below `loss.contradicted_below`, of its mean
    logits of both orders. At weight 0 the battle is as one without a vote.

    Args:
        targets: float32 (rows, J, orders, classes).
        votes: of these rows.
        held_out: bool (rows,), where the teachers' logits are out of fold: other votes count whole.
    """
    from scipy.special import softmax

    if loss.contradicted_weight == 1:
        return votes
    seen = softmax(targets.mean(axis=2, dtype=np.float64), axis=-1)
    given = np.einsum("rjc,rc->rj", seen, votes.probabilities).max(axis=1)
    contradicted = held_out & votes.known & (given < loss.contradicted_below)
    counts = np.where(contradicted, loss.contradicted_weight, 1.0)
    return replace(votes, probabilities=votes.probabilities * counts[:, None])


def teacher_logits(selected: Sequence[Selection]) -> np.ndarray:
    """Read teachers' logits: float32 (rows, teachers, orders, classes), classes in the canonical frame.

    Raises:
        InputError: a file is damaged.
    """
    return np.stack([teacher.of(lambda path: read_logits(path)[0]) for teacher in selected], axis=1)


def teacher_states(selected: Sequence[Selection], state: State) -> tuple[np.ndarray, ...]:
    """Read each teacher's states (see ``models.hidden_states``): float16 (rows, views, width).

    Extra rows get the mean over folds, like their logits: a teacher's folds start from one adapter and stay
    close. (For the tiny teachers, the cosine of two folds' features is 0.98 for the same row, 0.72 to 0.79
    for different rows.)

    Raises:
        InputError: a file is missing or damaged.
    """
    return tuple(teacher.of(lambda path: read_states(path, state)) for teacher in selected)


def _out_of_fold(teacher: str, files: Sequence[Path], wanted: pa.Array) -> Selection:
    tables = [read_parquet(ids_path(file)) for file in files]
    keys = [key(ids) for ids in tables]
    held_out = [np.flatnonzero(ids["validation"]) for ids in tables]
    shared_by_all = pa.array(["extra", "unlabelled"])
    extra = [
        np.flatnonzero(pc.is_in(ids["source"].cast(pa.string()), shared_by_all)) for ids in tables
    ]
    if any(map(len, extra)) and not all(map(len, extra)):
        raise InputError(
            f"{files[0].parent}: only some folds of {teacher} hold extra rows (or unlabelled)"
        )

    found = [k.take(pa.array(rows)) for k, rows in zip(keys, held_out, strict=True)]
    place = locate(
        wanted,
        pa.concat_arrays([*found, keys[0].take(pa.array(extra[0]))]),
        f"{teacher}'s out-of-fold logits in {files[0].parent}",
    )
    ends = np.cumsum([len(rows) for rows in held_out])
    of_file = np.searchsorted(ends, place, side="right")  # past the last: an extra row
    shared = np.flatnonzero(of_file == len(files))
    parts = []
    for number, file in enumerate(files):
        rows = np.flatnonzero(of_file == number)
        positions = held_out[number][place[rows] - ends[number] + len(held_out[number])]
        these = keys[number].take(pa.array(extra[number]))
        again = locate(wanted.take(pa.array(shared)), these, f"{teacher}'s logits in {file}")
        parts.append(Part(file, positions, rows, extra[number][again]))
    return Selection(len(wanted), shared, tuple(parts))


def _in_sample(
    teacher: str, files: Sequence[Path], wanted: pa.Array, taught: np.ndarray
) -> Selection:
    (file,) = files
    ids = read_parquet(ids_path(file))
    found = wanted.take(pa.array(taught))
    positions = locate(found, key(ids), f"{teacher}'s in-sample logits in {file}")
    none = np.empty(0, np.int64)
    return Selection(len(wanted), none, (Part(file, positions, taught, none),))


def teacher_weights(
    targets: np.ndarray, votes: Votes, held_out: np.ndarray, loss: Loss
) -> np.ndarray:
    """Compute the weight of each teacher for each battle.

    `equal`       1 / J.
    `fitted`      the weights on the simplex with the least log loss on the held-out rows: of the
                  weighted mean of logits or of probabilities, whichever `combine` makes (separate terms:
                  of probabilities). Both are convex. The rows are the student's training rows, never
                  those that validate it.
    `confidence`  (1 − softmax(CE)_j) / (J − 1), where CE_j is teacher j's cross-entropy with the vote:
                  a teacher that missed this battle's vote counts less in it. Zhang, Chen and Wang 2022,
                  Confidence-Aware Multi-Teacher Knowledge Distillation, arXiv:2201.00007, equation 3.

    Args:
        targets: float32 (rows, J, orders, classes).
        votes: of these rows; those without a vote weigh teachers equally.
        held_out: bool (rows,), where the teachers' logits are out of fold.

    Returns:
        float32 (rows, J), each row's sum 1.

    Raises:
        InputError: weights are to be fitted, but no row is held out.
    """
    from scipy.special import log_softmax

    rows, count = targets.shape[:2]
    equal = np.full((rows, count), 1 / count, np.float32)
    if count == 1 or loss.weights == "equal":
        return equal
    logits = targets.mean(axis=2, dtype=np.float64)
    if loss.weights == "confidence":
        surprise = votes.cross_entropy(log_softmax(logits, axis=-1))
        share = np.exp(surprise - surprise.max(axis=1, keepdims=True))
        share /= share.sum(axis=1, keepdims=True)
        return np.where(votes.known[:, None], (1 - share) / (count - 1), equal).astype(np.float32)
    fit = held_out & votes.known
    if not fit.any():
        raise InputError(
            "loss.weights: fitted, but no training battle has teachers' logits out of fold"
        )
    pooled = _fitted_weights(logits[fit], votes[fit], of_logits=loss.combine == "mean_logits")
    return np.tile(pooled.astype(np.float32), (rows, 1))


def _fitted_weights(logits: np.ndarray, votes: Votes, *, of_logits: bool) -> np.ndarray:
    """The weights on the simplex whose weighted mean has the least log loss: float64 (J,)."""
    from scipy.optimize import minimize
    from scipy.special import log_softmax, softmax

    count = logits.shape[1]
    p = softmax(logits, axis=-1).clip(min=np.finfo(np.float64).tiny)

    def of_probabilities(weights: np.ndarray) -> tuple[float, np.ndarray]:
        mixed = np.einsum("rjc,j->rc", p, weights)
        slope = np.einsum("rc,rjc->rj", votes.probabilities / mixed, p)
        return float(votes.mean(votes.cross_entropy(np.log(mixed)))), -votes.mean(slope)

    def of_mean_logits(weights: np.ndarray) -> tuple[float, np.ndarray]:
        mean = np.einsum("rjc,j->rc", logits, weights)
        error = softmax(mean, axis=-1) - votes.probabilities
        slope = np.einsum("rc,rjc->rj", error, logits)
        return float(votes.mean(votes.cross_entropy(log_softmax(mean, axis=-1)))), votes.mean(slope)

    found = minimize(
        of_mean_logits if of_logits else of_probabilities,
        np.full(count, 1 / count),
        jac=True,
        method="SLSQP",
        bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-12},
    )
    weights = np.clip(found.x, 0, 1)
    return np.asarray(weights / weights.sum())
