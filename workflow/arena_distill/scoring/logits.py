"""Score the battles of a fold in both orders, for evaluation and for students: float32 logits.

The hidden states for students are written with them (see ``models.hidden_states``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arena_distill.battles.folds import fold_rows, validation_rows
from arena_distill.battles.votes import classes_of
from arena_distill.config.compute import Attention
from arena_distill.config.phases.scoring import LogitsSettings
from arena_distill.config.training import State
from arena_distill.encoding.batching import token_batches
from arena_distill.encoding.sequences import read_tokens
from arena_distill.encoding.views import encode_views
from arena_distill.errors import InputError
from arena_distill.files.artifacts import (
    check_made_from,
    fingerprint,
    provenance,
    read_json,
    read_parquet,
    read_provenance,
)
from arena_distill.files.keys import key, locate
from arena_distill.files.logits import ids_path, read_logits, read_states, write_logits
from arena_distill.models.heads import verdicts
from arena_distill.models.scoring import score_batches
from arena_distill.verdicts import ORDERS


def predict_logits(
    backbone: Path,
    adapter: Path,
    tokens: Path,
    folds: Path,
    fold: int,
    output: Path,
    *,
    settings: LogitsSettings,
    batch_tokens: int,
    shard: int = 0,
    shards: int = 1,
    attention: Attention = "auto",
) -> None:
    """Score a fold's rows with the fold's judge → `fold_<k>.npy` and its ids.

    The file holds float32 (rows, orders, classes) in the canonical frame. The ids mark the validation rows
    of this fold; only those are out of fold.

    A shard is every n-th batch of rows of similar length, so shards take equally long, and
    :func:`gather_logits` writes from them what one job would have written: a row's batch, and so its
    last bits, do not depend on the number of shards.

    Raises:
        InputError: a logit or a state is not finite.
    """
    from arena_distill.models.adapters import load_fold

    table = read_parquet(folds)
    rows = fold_rows(table, fold, settings)
    read = read_tokens(tokens)
    read = read.take(locate(key(rows), read.keys(), f"tokens in {tokens}"))
    views = encode_views(read, settings.encoding, settings.head)
    longest = np.max([view.lengths for view in views], axis=0)
    batches = list(token_batches(longest, batch_tokens))[shard::shards]
    ours = np.sort(np.concatenate(batches)) if batches else np.empty(0, np.int64)
    model = load_fold(
        backbone,
        adapter,
        made_from={"folds": fingerprint(table), "fold": fold},
        head=settings.head,
        precision=settings.precision,
        attention=attention,
        pad_token_id=read.vocabulary.pad,
    )
    states: dict[State, np.ndarray] = {}
    if settings.states:
        from arena_distill.models.hidden_states import capture, widths

        capture(model, settings.states)
        states = {
            name: np.zeros((len(rows), len(views), width), np.float16)
            for name, width in widths(model, settings).items()
        }
    outputs = np.stack(
        [
            score_batches(model, view, batches, {name: s[:, i] for name, s in states.items()})
            for i, view in enumerate(views)
        ],
        axis=1,
    )
    logits = verdicts(outputs[ours], settings.head)
    if not np.isfinite(logits).all():
        raise InputError(f"{adapter}: its logits are not finite: train it again with a lower lr")
    about, named = _about(settings, fold, table), rows.take(pa.array(ours))
    write_logits(output, logits, named, about, _checked(states, ours, adapter))
    print(f"{output}: {len(ours):,} battles in {len(ORDERS)} orders")


def score_probe(
    features: Path, probe: Path, folds: Path, fold: int, output: Path, *, settings: LogitsSettings
) -> None:
    """Score a fold's rows with a frozen judge's head → as :func:`predict_logits`.

    Args:
        features: the folder of ``training.features``.
        probe: the fold's head (``training.probe``).
    """
    from arena_distill.training.features import Features
    from arena_distill.training.probe import read_probe

    table = read_parquet(folds)
    rows = fold_rows(table, fold, settings)
    made_from = read_json(probe / "metrics.json")["provenance"]
    check_made_from(made_from, probe, folds=fingerprint(table), fold=fold)
    read = Features.read(features)
    outputs = read_probe(probe).outputs(read.of(rows), read.reads)
    write_logits(output, verdicts(outputs, settings.head), rows, _about(settings, fold, table))
    print(f"{output}: {len(rows):,} battles in {len(ORDERS)} orders")


def gather_logits(
    shards: Sequence[Path], folds: Path, fold: int, output: Path, *, settings: LogitsSettings
) -> None:
    """Join the shards of a fold into exactly the bytes that one job would have written.

    Raises:
        InputError: a shard is damaged, or a row is missing or duplicated.
    """
    table = read_parquet(folds)
    rows = fold_rows(table, fold, settings)
    parts = [read_logits(path) for path in shards]
    logits = np.concatenate([part for part, _ in parts])
    ids = pa.concat_tables([table.select(["id", "source"]) for _, table in parts])
    if len(logits) != len(rows):
        raise InputError(
            f"{shards[0].parent}: the shards hold {len(logits):,} rows, the fold has {len(rows):,}; "
            "delete them and run the workflow again"
        )
    place = locate(key(rows), key(ids), f"logits in {shards[0].parent}")
    states: dict[str, np.ndarray] = {
        name: np.concatenate([read_states(path, name) for path in shards])[place]
        for name in settings.states
    }
    write_logits(output, logits[place], rows, _about(settings, fold, table), states or None)
    print(f"{output}: {len(rows):,} battles of {len(shards)} shards")


def _checked(
    states: Mapping[State, np.ndarray], rows: np.ndarray, adapter: Path
) -> dict[str, np.ndarray] | None:
    """The states of these rows; None if there are none to write.

    Raises:
        InputError: a number is too large for float16. (States are not scaled, so that the head
            reproduces the logits from them; final norms keep hidden states far below the limit.)
    """
    for name, values in states.items():
        if not np.isfinite(values).all():
            raise InputError(
                f"{adapter}: its {name} exceed {np.finfo(np.float16).max:,.0f}, the largest number "
                f"in float16; students cannot learn from them: set loss.{name}: 0"
            )
    return {name: values[rows] for name, values in states.items()} or None


def _about(settings: LogitsSettings, fold: int, folds: pa.Table) -> dict[str, Any]:
    about = provenance("logits", settings.model_dump(mode="json") | {"fold": fold})
    return about | {"made_from": {"folds": fingerprint(folds), "fold": fold}}


def read_out_of_fold(folds: pa.Table, paths: Sequence[Path], judge: str) -> np.ndarray:
    """Read a judge's logits of the validation rows, each from the fold that did not train on it.

    Args:
        folds: `folds.parquet`.
        paths: the judge's files, one per fold, in the order of the folds.
        judge: its name, for messages.

    Returns:
        float32 (out-of-fold rows, orders, classes), in the canonical frame; rows in their order in `folds`.

    Raises:
        InputError: a fold has no logits, or a row is missing, duplicated or unknown.
    """
    logits = np.empty((len(folds), len(ORDERS), classes_of(folds)), np.float32)
    fold_of = folds["fold"].to_numpy()
    expected = np.unique(fold_of[fold_of >= 0]).tolist()
    if len(paths) != len(expected):
        given = ", ".join(map(str, paths)) or "none"
        raise InputError(f"judge {judge}: logits of the folds {expected} expected, got {given}")
    for fold, path in zip(expected, paths, strict=True):
        found, ids = read_logits(path)
        origin = read_provenance(ids_path(path))
        check_made_from(origin, path, folds=fingerprint(folds), fold=fold)
        if found.shape[1:] != logits.shape[1:]:
            raise InputError(f"{path}: {found.shape[1:]} logits a row, {logits.shape[1:]} expected")
        if "validation" not in ids.column_names:
            raise InputError(f"{ids_path(path)}: no column validation")
        # The file also holds training and extra rows for students; these validate no fold.
        mine = np.flatnonzero(ids["validation"].to_numpy())
        available = key(ids.take(pa.array(mine)))
        rows = validation_rows(folds, fold)
        wanted = key(folds.select(["id", "source"]).take(pa.array(rows)))
        logits[rows] = found[mine[locate(wanted, available, str(ids_path(path)))]]
        if len(available) != len(wanted):
            foreign = available.filter(pc.invert(pc.is_in(available, wanted)))
            raise InputError(
                f"{ids_path(path)}: {len(foreign)} validation rows are not of fold {fold}, "
                f"for example {foreign[0]}"
            )
    return logits[fold_of >= 0]
