"""Assign battles to folds: which labelled battles validate which model.

The folds' table has one row per battle of ``train``, with its fold, and of ``extra``, with fold
`EVERY_FOLD`: extra battles join the training rows of all folds and validate none. Battles of
``unlabelled`` have the fold `UNLABELLED` and no vote: only students with pseudo-labels
learn from them. Its metadata hold the method, so that every reader of the file selects the same rows.

Battles share prompts. ``kfold`` and ``stratified`` assign rows, so a prompt may be in training and
validation rows, as in the historical recipes; the
number of such rows is printed. ``stratified_group`` assigns prompts, and drops from a fold's training
the extra (and unlabelled) battles whose prompt validates it; with `near_duplicates` it treats nearly equal
prompts as one.

Two parts of ``train`` stay out of all folds, by whole prompts in any method. Held-out battles (`HELD_OUT`)
calibrate and score the deployed model, and decide nothing before. Choices by score (a soup's ingredients, a
checkpoint) use battles of their own (`CHOICE`), which score nothing: battles that made a choice never score
its result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
import pyarrow as pa

from arena_distill.battles.prompts import distinct_prompts
from arena_distill.battles.similarity import near_groups
from arena_distill.battles.votes import VOTE_FIELDS, vote_columns, votes_of, with_classes
from arena_distill.config.phases.battles import FoldsSettings
from arena_distill.config.phases.scoring import LogitsSettings, StackedLogitsSettings
from arena_distill.config.vocabulary import FoldMethod
from arena_distill.errors import InputError
from arena_distill.files.artifacts import StrPath, provenance, read_parquet, write_parquet

EVERY_FOLD = -1
"""The "fold" of extra battles: they train every model and validate none."""

HELD_OUT = -2
"""The "fold" of held-out battles: they calibrate and score the deployed model, and nothing else."""

UNLABELLED = -3
"""The "fold" of battles without votes: they validate none, and train only students with pseudo-labels."""

CHOICE = -4
"""The "fold" of battles that choices are made by: neither training nor scores use them."""

MOST_FOLDS = 127  # what int8 holds

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("fold", pa.int8(), nullable=False),
        *VOTE_FIELDS,
        pa.field("group", pa.int64(), nullable=False),
    ]
)
_NEAR_GROUP = pa.field("near_group", pa.int64(), nullable=False)
_SPLIT = b"arena_distill.split"


def write_folds(battles_path: StrPath, folds_path: StrPath, *, settings: FoldsSettings) -> None:
    """Assign the battles of a file to folds, write the table, and print the size of each fold.

    Args:
        battles_path: file of `arena_distill.battles.write_battles`.
        folds_path: file to write, the table of `assign_folds`.
    """
    # Texts only where they are compared: they may be much more than all the rest.
    columns = ["id", "source", "vote", "weight", "group", *(["prompt"] if settings.audit else [])]
    battles = read_parquet(battles_path, columns)
    method, n, seed = settings.method, settings.n, settings.seed
    folds = assign_folds(
        battles,
        method=method,
        n=n,
        seed=seed,
        holdout=settings.holdout,
        choices=settings.choices,
        near=settings.audit.model_dump() if settings.audit else None,
    )
    write_parquet(folds, folds_path, provenance("folds", settings.model_dump()))
    apart = {"held out": held_out_rows(folds), "for choices": choice_rows(folds)}
    told = "".join(f"; {len(rows):,} battles {what}" for what, rows in apart.items() if len(rows))
    print(f"{n} folds, {method}, seed {seed}: {_prompts(folds)} prompts{told}")
    for fold in range(n):
        training, validation = training_rows(folds, fold), validation_rows(folds, fold)
        dropped, shared = dropped_extra(folds, fold), shared_prompts(folds, fold)
        without_votes = len(training_rows(folds, fold, unlabelled=True)) - len(training)
        print(
            f"fold {fold}: {len(training)} training rows, {len(validation)} validation rows"
            + (
                f"; {dropped} extra rows dropped: validation rows have their prompts"
                if dropped
                else ""
            )
            + (f"; {shared} validation rows share a prompt with training rows" if shared else "")
            + (f"; {without_votes} unlabelled rows for students" if without_votes else "")
        )


def assign_folds(
    battles: pa.Table,
    *,
    method: FoldMethod,
    n: int,
    seed: int,
    holdout: float = 0.0,
    choices: float = 0.0,
    near: Mapping[str, Any] | None = None,
) -> pa.Table:
    """Assign the battles of ``train`` to `n` folds, shuffled by `seed`.

    Args:
        battles: columns ``id``, ``source``, ``vote``, ``weight`` and ``group``, as of
            `arena_distill.battles.parts.SCHEMA`, and with `near` also ``prompt``.
        method: scikit-learn's ``kfold`` (rows at random), ``stratified`` (equal shares of each
            vote) or ``stratified_group`` (as equal as possible, prompts kept whole).
        n: number of folds, 2 to 127.
        seed: same battles and seed, same folds.
        holdout: share of the prompts of ``train`` whose battles are held out.
        choices: share of these prompts whose battles are for choices.
        near: ``threshold``, ``permutations`` and ``seed`` of `arena_distill.similarity.near_groups`:
            prompts of these rows that are nearly the same, or linked by such, are one.

    Returns:
        Table of `SCHEMA`: the rows of ``train``, ``extra`` and ``unlabelled``, in the order of `battles`.
        With `near` it also has ``near_group``: prompts that are taken for one have the ``group`` of the
        first.

    Raises:
        ValueError: an unknown method.
        InputError: too few rows, votes of a kind, or prompts for `n` folds.
    """
    if method not in get_args(FoldMethod):
        raise ValueError(
            f"unknown method {method!r}: one of {', '.join(get_args(FoldMethod))} expected"
        )
    if not 2 <= n <= MOST_FOLDS:
        raise InputError(f"folds: n is {n}, 2 to {MOST_FOLDS} expected")
    source = battles["source"].cast(pa.string()).to_numpy()
    in_table = np.isin(source, ["train", "extra", "unlabelled"])
    rows = np.flatnonzero(in_table)
    is_train, is_unlabelled = source[rows] == "train", source[rows] == "unlabelled"
    # By a filter, chunk by chunk: the prompts of all may be too long for one Arrow array.
    selected = battles.filter(pa.array(in_table))
    votes = votes_of(selected)
    votes.probabilities[is_unlabelled] = 0  # their votes, if any, are not learned
    groups = selected["group"].to_numpy()
    if near is not None:
        groups = _joined(selected, near)
    fold = np.full(len(rows), EVERY_FOLD, np.int8)
    fold[is_unlabelled] = UNLABELLED
    labels = votes.labels
    held = _set_apart(groups, is_train, holdout, seed, "holdout")
    # Of what is left, so that the held-out battles do not depend on it.
    left = is_train & ~held
    chosen = _set_apart(groups, left, choices / (1 - holdout), seed, "choices")
    in_folds = left & ~chosen
    fold[held], fold[chosen] = HELD_OUT, CHOICE
    fold[in_folds] = _split_rows(labels[in_folds], groups[in_folds], method, n, seed)
    columns = {name: selected[name] for name in ("id", "source", "group")}
    columns |= {"fold": fold, **vote_columns(votes)}
    table = pa.table({name: columns[name] for name in SCHEMA.names})
    table = table.cast(with_classes(SCHEMA, votes.classes))
    if near is not None:
        table = table.append_column(_NEAR_GROUP, pa.array(groups))
    split: dict[str, Any] = {"method": method, "n": n, "seed": seed}
    split |= {} if near is None else {"near_duplicates": dict(near)}
    return table.replace_schema_metadata({_SPLIT: json.dumps(split).encode()})


def _set_apart(
    groups: np.ndarray, among: np.ndarray, share: float, seed: int, key: str
) -> np.ndarray:
    """Mask a share of the prompts `among` some rows, by all of these rows that have them."""
    mask = np.zeros(len(groups), bool)
    if share:
        from sklearn.model_selection import GroupShuffleSplit

        rows = np.flatnonzero(among)
        splitter = GroupShuffleSplit(1, test_size=share, random_state=seed)
        try:
            _, apart = next(splitter.split(rows, groups=groups[rows]))
        except ValueError as error:
            raise InputError(f"folds: {key} {share:g}: {error}") from None
        mask[rows[apart]] = True
    return mask


def undivided_groups(folds: pa.Table) -> np.ndarray:
    """What folds may keep whole: the prompts' ``group``, or ``near_group`` where there is one.

    Returns:
        int64 (rows of `folds`,).
    """
    near = _NEAR_GROUP.name
    return np.asarray(folds[near if near in folds.column_names else "group"])


def training_rows(
    folds: pa.Table,
    fold: int,
    *,
    drop_shared_groups: bool | None = None,
    unlabelled: bool = False,
) -> np.ndarray:
    """Select the rows that train the model of `fold`: other folds' and the extra battles.

    Args:
        folds: table of `assign_folds`, or read from its file.
        fold: 0 to n - 1.
        drop_shared_groups: leave out extra battles whose prompt is in the validation rows; by
            default, whether the method of the folds is ``stratified_group``.
        unlabelled: also select battles without votes, except those with the same prompts.

    Returns:
        int64 positions in `folds`, ascending.

    Raises:
        InputError: `folds` has no such fold, or does not hold its method.
    """
    column, groups = _fold_column(folds, fold), undivided_groups(folds)
    apart = np.isin(column, (HELD_OUT, CHOICE))
    keep = (column != fold) & ~apart
    # No model trains on prompts that score it or make choices.
    other_sources = np.isin(column, (EVERY_FOLD, UNLABELLED))
    keep &= ~(other_sources & np.isin(groups, groups[apart]))
    if drop_shared_groups is None:
        drop_shared_groups = fold_settings(folds)["method"] == "stratified_group"
    if drop_shared_groups:
        keep &= ~_shared_extra(folds, fold)
    if not unlabelled:
        keep &= column != UNLABELLED
    return np.flatnonzero(keep).astype(np.int64)


def validation_rows(folds: pa.Table, fold: int) -> np.ndarray:
    """Select the rows that validate the model of `fold`: int64 positions in `folds`, ascending."""
    return np.flatnonzero(_fold_column(folds, fold) == fold).astype(np.int64)


def dropped_extra(folds: pa.Table, fold: int) -> int:
    """Count the extra battles that `training_rows` leaves out of `fold`."""
    column = _fold_column(folds, fold)
    return int(
        (column == EVERY_FOLD).sum() - (column[training_rows(folds, fold)] == EVERY_FOLD).sum()
    )


def held_out_rows(folds: pa.Table) -> np.ndarray:
    """Select the rows that calibrate and score the deployed model: int64 positions, ascending."""
    return np.flatnonzero(folds["fold"].to_numpy() == HELD_OUT).astype(np.int64)


def choice_rows(folds: pa.Table) -> np.ndarray:
    """Select the rows that make choices: int64 positions in `folds`, ascending."""
    return np.flatnonzero(folds["fold"].to_numpy() == CHOICE).astype(np.int64)


def unlabelled_rows(folds: pa.Table) -> np.ndarray:
    """Select the rows without votes: int64 positions in `folds`, ascending."""
    return np.flatnonzero(folds["fold"].to_numpy() == UNLABELLED).astype(np.int64)


def shared_prompts(folds: pa.Table, fold: int) -> int:
    """Count the validation rows of `fold` whose prompt is also in its training rows: a leak."""
    groups = undivided_groups(folds)
    seen = groups[training_rows(folds, fold)]
    return int(np.isin(groups[validation_rows(folds, fold)], seen).sum())


def fold_settings(folds: pa.Table) -> dict[str, Any]:
    """Return the settings of `folds`: ``method``, ``n``, ``seed``, and ``near_duplicates`` if used."""
    try:
        return dict(json.loads(folds.schema.metadata[_SPLIT]))
    except (KeyError, TypeError):
        raise InputError("the table of folds does not hold its method: write it again") from None


def _split_rows(
    labels: np.ndarray, groups: np.ndarray, method: FoldMethod, n: int, seed: int
) -> np.ndarray:
    """Return the fold (int8) of each train row."""
    _check_enough(labels, groups, method, n)
    # Imported here: the module also serves jobs that only read folds.
    from sklearn.model_selection import KFold, StratifiedGroupKFold, StratifiedKFold

    splitters = {
        "kfold": KFold,
        "stratified": StratifiedKFold,
        "stratified_group": StratifiedGroupKFold,
    }
    splitter = splitters[method](n, shuffle=True, random_state=seed)
    by = groups if method == "stratified_group" else None
    fold = np.full(len(labels), EVERY_FOLD, np.int8)
    for number, (_, validation) in enumerate(splitter.split(labels, labels, by)):
        if not len(validation):
            raise InputError(
                f"folds: fold {number} of {n} would be empty, as few prompts hold most battles; "
                "lower n or choose another method"
            )
        fold[validation] = number
    return fold


def _joined(battles: pa.Table, near: Mapping[str, Any]) -> np.ndarray:
    """Give prompts that are nearly the same the ``group`` of the first of them: int64 (rows,)."""
    numbers, prompts = distinct_prompts(battles)
    linked = near_groups(prompts, **near)
    first = np.unique(linked, return_index=True)[1]
    joined: np.ndarray = np.unique(battles["group"])[first[linked]][numbers]
    return joined


def _check_enough(labels: np.ndarray, groups: np.ndarray, method: FoldMethod, n: int) -> None:
    """Raise InputError if a fold would lack rows, prompts, or votes of a kind."""
    advice = f"for {n} folds; lower n, give more battles or choose another method"
    if len(labels) < n:
        raise InputError(f"folds: {len(labels)} train battles {advice}")
    if method == "kfold":
        return
    for label in np.unique(labels):
        vote = ("A", "B", "tie")[label]
        mine = labels == label
        if mine.sum() < n:
            raise InputError(f"folds: {mine.sum()} train battles with the vote {vote} {advice}")
        prompts = len(np.unique(groups[mine]))
        if method == "stratified_group" and prompts < n:
            raise InputError(f"folds: {prompts} prompts of battles with the vote {vote} {advice}")


def _fold_column(folds: pa.Table, fold: int) -> np.ndarray:
    column: np.ndarray = folds["fold"].to_numpy()
    if fold < 0 or not (column == fold).any():
        raise InputError(f"no fold {fold}: the folds are 0 to {column.max(initial=-1)}")
    return column


def _shared_extra(folds: pa.Table, fold: int) -> np.ndarray:
    """Mask the extra and unlabelled battles whose prompt is among the validation rows of `fold`."""
    groups = undivided_groups(folds)
    extra = np.isin(folds["fold"].to_numpy(), (EVERY_FOLD, UNLABELLED))
    mask: np.ndarray = extra & np.isin(groups, groups[validation_rows(folds, fold)])
    return mask


def _prompts(folds: pa.Table) -> int:
    return len(np.unique(undivided_groups(folds)))


def fold_rows(
    folds: pa.Table, fold: int, settings: LogitsSettings | StackedLogitsSettings
) -> pa.Table:
    """The rows a fold's judge has to score: columns `id`, `source`, `validation` (bool)."""
    validation = validation_rows(folds, fold)
    wanted = [validation[:0] if "validation" not in settings.rows else validation]
    if "training" in settings.rows:
        wanted.append(training_rows(folds, fold))
    if "extra" in settings.rows:
        sources = folds["source"].cast(pa.string()).to_numpy(zero_copy_only=False)
        wanted.append(np.flatnonzero(sources == "extra"))
    if "unlabelled" in settings.rows:
        wanted.append(unlabelled_rows(folds))
    rows = np.unique(np.concatenate(wanted))
    flags = pa.array(np.isin(rows, validation))
    return folds.select(["id", "source"]).take(pa.array(rows)).append_column("validation", flags)
