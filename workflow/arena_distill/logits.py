"""Judges score battles: logits per fold, both orders, float32, for evaluation and for students; and
beside them what students want to know of the judge's last token (see ``states``)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arena_distill.artifacts import (
    ids_path,
    provenance,
    read_logits,
    read_parquet,
    read_states,
    write_logits,
)
from arena_distill.batching import pad, token_batches
from arena_distill.encoding import Sequences, read_tokens
from arena_distill.errors import InputError
from arena_distill.folds import training_rows, unlabelled_rows, validation_rows
from arena_distill.heads import encode_views, verdicts
from arena_distill.judge import Attention, State
from arena_distill.keys import key, locate
from arena_distill.orders import CLASSES, ORDERS
from arena_distill.settings import LogitsSettings


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

    The file holds float32 (rows, orders, 3) in the canonical frame. The ids say of each row whether it
    is a validation row of this fold: those alone are out-of-fold.

    A shard is every n-th batch of rows that have like length, so shards take equally long and
    :func:`gather_logits` makes of them what one job would have written: a row's batch, and so its last
    bits, do not depend on the number of shards.

    Raises:
        InputError: a logit or a state is not finite.
    """
    from arena_distill.backbones import load_classifier
    from arena_distill.training import load_adapter

    rows = fold_rows(read_parquet(folds), fold, settings)
    read = read_tokens(tokens)
    read = read.take(locate(key(rows), read.keys(), f"tokens in {tokens}"))
    views = encode_views(read, settings.encoding, settings.head)
    longest = np.max([view.lengths for view in views], axis=0)
    batches = list(token_batches(longest, batch_tokens))[shard::shards]
    ours = np.sort(np.concatenate(batches)) if batches else np.empty(0, np.int64)
    base = load_classifier(
        backbone,
        head=settings.head,
        precision=settings.precision,
        attention=attention,
        pad_token_id=read.vocabulary.pad,
    )
    model: Any = load_adapter(base, adapter)
    states: dict[State, np.ndarray] = {}
    if settings.states:
        from arena_distill.states import watch, widths

        watch(model, settings.states)
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
    about, named = _about(settings, fold), rows.take(pa.array(ours))
    write_logits(output, logits, named, about, _checked(states, ours, adapter))
    print(f"{output}: {len(ours):,} battles in {len(ORDERS)} orders")


def gather_logits(
    shards: Sequence[Path], folds: Path, fold: int, output: Path, *, settings: LogitsSettings
) -> None:
    """Put the shards of a fold together, exactly: the bytes that one job would have written.

    Raises:
        InputError: a shard is damaged, or a row is in none of them or in two.
    """
    rows = fold_rows(read_parquet(folds), fold, settings)
    parts = [read_logits(path) for path in shards]
    logits = np.concatenate([part for part, _ in parts])
    ids = pa.concat_tables([table.select(["id", "source"]) for _, table in parts])
    if len(logits) != len(rows):
        raise InputError(
            f"{shards[0].parent}: the shards hold {len(logits):,} rows, the fold has {len(rows):,}; "
            "delete them and run the workflow again: they will be rebuilt"
        )
    place = locate(key(rows), key(ids), f"logits in {shards[0].parent}")
    states: dict[str, np.ndarray] = {
        name: np.concatenate([read_states(path, name) for path in shards])[place]
        for name in settings.states
    }
    write_logits(output, logits[place], rows, _about(settings, fold), states or None)
    print(f"{output}: {len(rows):,} battles of {len(shards)} shards")


def _checked(
    states: Mapping[State, np.ndarray], rows: np.ndarray, adapter: Path
) -> dict[str, np.ndarray] | None:
    """The states of these rows; None where nobody wants any.

    Raises:
        InputError: a number is too large for float16. (Nothing is scaled, so that the head gives
            the logits of what is stored; and final norms keep hidden states far below.)
    """
    for name, values in states.items():
        if not np.isfinite(values).all():
            raise InputError(
                f"{adapter}: its {name} reach beyond {np.finfo(np.float16).max:,.0f}, the largest "
                f"number that is stored; students have to do without them: loss.{name}: 0"
            )
    return {name: values[rows] for name, values in states.items()} or None


def _about(settings: LogitsSettings, fold: int) -> dict[str, Any]:
    return provenance("logits", settings.model_dump(mode="json") | {"fold": fold})


def fold_rows(folds: pa.Table, fold: int, settings: LogitsSettings) -> pa.Table:
    """The rows a fold's judge has to score: columns `id`, `source`, `validation` (bool)."""
    validation = validation_rows(folds, fold)
    wanted = [validation]
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


def score(model: Any, sequences: Sequences, *, batch_tokens: int) -> np.ndarray:
    """What a model says of every sequence.

    Args:
        model: a classifier whose `config.pad_token_id` stands in no sequence.
        batch_tokens: tokens per forward pass, padding included.

    Returns:
        float32 (rows, outputs of its head).

    Raises:
        InputError: a sequence is longer than the model has positions for.
    """
    return score_batches(model, sequences, list(token_batches(sequences.lengths, batch_tokens)))


def score_batches(
    model: Any,
    sequences: Sequences,
    batches: Sequence[np.ndarray],
    states: Mapping[State, np.ndarray] | None = None,
) -> np.ndarray:
    """As :func:`score`, for the rows of the batches alone; the others stay NaN.

    Args:
        states: arrays (rows, width) by name, filled with what a watched judge says beside logits.
    """
    import torch
    from tqdm.auto import tqdm

    from arena_distill.backbones import check_length

    check_length(model, int(sequences.lengths.max(initial=0)))
    model.eval()
    weight = next(model.parameters())
    scores = np.full((len(sequences), model.config.num_labels), np.nan, np.float32)
    # A model in half precision has its head and adapters in float32: autocast lets them meet.
    half = weight.dtype if weight.dtype in (torch.bfloat16, torch.float16) else None
    with (
        torch.no_grad(),  # inference_mode would leave FSDP buffers that training cannot write to
        torch.autocast(weight.device.type, dtype=half, enabled=half is not None),
        tqdm(total=sum(map(len, batches)), desc="scoring", unit="seq", mininterval=5) as progress,
    ):
        for rows in batches:
            ids, mask = pad([sequences[row] for row in rows], model.config.pad_token_id)
            outputs = model(
                input_ids=torch.from_numpy(ids).to(weight.device),
                attention_mask=torch.from_numpy(mask).to(weight.device),
            )
            scores[rows] = outputs.logits.float().cpu().numpy()
            for name, room in (states or {}).items():
                values = getattr(outputs, name).cpu()
                room[rows, : values.shape[1]] = values.half().numpy()
            progress.update(len(rows))
    return scores


def read_out_of_fold(folds: pa.Table, paths: Sequence[Path], judge: str) -> np.ndarray:
    """A judge's logits of the validation rows, each by the fold model that never saw it.

    Args:
        folds: `folds.parquet`.
        paths: the judge's files `fold_<k>.npy`, one per fold, in any order.
        judge: its name, for messages.

    Returns:
        float32 (out-of-fold rows, orders, 3), in the canonical frame; rows in their order in `folds`.

    Raises:
        InputError: a fold has no logits, or a row is missing, there twice, or unknown.
    """
    logits = np.empty((len(folds), len(ORDERS), len(CLASSES)), np.float32)
    fold_of = folds["fold"].to_numpy()
    files = {_fold_number(path): path for path in paths}
    expected = np.unique(fold_of[fold_of >= 0]).tolist()
    if len(files) < len(paths) or sorted(files) != expected:
        given = ", ".join(map(str, paths)) or "none"
        raise InputError(f"judge {judge}: logits of the folds {expected} expected, got {given}")
    for fold, path in files.items():
        found, ids = read_logits(path)
        if found.shape[1:] != logits.shape[1:]:
            raise InputError(f"{path}: {found.shape[1:]} logits a row, {logits.shape[1:]} expected")
        if "validation" not in ids.column_names:
            raise InputError(f"{ids_path(path)}: no column validation")
        # Training and extra rows lie in the same file for students; they are no fold's validation.
        mine = np.flatnonzero(ids["validation"].to_numpy())
        available = key(ids.take(pa.array(mine)))
        rows = validation_rows(folds, fold)
        wanted = key(folds.select(["id", "source"]).take(pa.array(rows)))
        logits[rows] = found[mine[locate(wanted, available, str(ids_path(path)))]]
        if len(available) != len(wanted):
            foreign = available.filter(pc.invert(pc.is_in(available, wanted)))
            raise InputError(
                f"{ids_path(path)}: {len(foreign)} validation rows are not of fold {fold}, "
                f"{foreign[0]} among them"
            )
    return logits[fold_of >= 0]


def _fold_number(path: Path) -> int:
    match = re.fullmatch(r"fold_(\d+)\.npy", path.name)
    if match is None:
        raise InputError(f"{path}: logits of a fold are named fold_<k>.npy")
    return int(match[1])
