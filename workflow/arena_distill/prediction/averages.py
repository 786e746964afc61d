"""Average a judge's scores of a battle: every length and order, and all averages of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from arena_distill.config.phases.prediction import StackedViewsSettings, Views
from arena_distill.config.prediction import Cascade
from arena_distill.config.vocabulary import ViewAverage
from arena_distill.errors import InputError
from arena_distill.files.artifacts import REBUILD, read_provenance
from arena_distill.files.logits import ids_path, read_logits
from arena_distill.metrics import mean_over_views, softmax
from arena_distill.verdicts import Order


def averages(
    logits: np.ndarray,
    lengths: Sequence[int],
    orders: Sequence[Order],
    average: ViewAverage,
) -> dict[str, np.ndarray]:
    """Probabilities of every variant: each length and all of them × each order and all of them.

    Args:
        logits: float (rows, lengths, orders, classes), in the canonical frame.
        average: average logits or probabilities; equal for variants of a single view.

    Returns:
        Name, such as ``256+512/AB+BA``, → float64 (rows, classes); every row sums to 1.
    """
    variants = {}
    for length_name, i in _choices(lengths):
        for order_name, j in _choices(orders):
            chosen = logits[:, i][:, :, j].reshape(len(logits), len(i) * len(j), -1)
            variants[f"{length_name}/{order_name}"] = mean_of_views(chosen, average)
    return variants


def mean_of_views(logits: np.ndarray, average: ViewAverage) -> np.ndarray:
    """Average the views of each battle: logits (rows, views, classes) → float64 (rows, classes)."""
    if average == "logits":
        return mean_over_views(logits)
    return np.asarray(softmax(logits).mean(axis=1))


def read_views(path: Path, settings: Views | StackedViewsSettings) -> tuple[np.ndarray, pa.Table]:
    """Read a file of `score_test`, and check its lengths, orders and cascade against `settings`.

    Returns:
        logits: float32 (rows, lengths, orders, classes), in the canonical frame.
        ids: columns `id` and `source`.

    Raises:
        InputError: the file was made with other lengths, orders or another cascade.
    """
    scores, rows = read_logits(path)
    made_with = read_provenance(ids_path(path)).get("settings", {})
    asked = settings.model_dump(mode="json")
    for name in ("max_lengths", "orders", "cascade"):
        wanted, found = asked.get(name), made_with.get(name)
        if name == "cascade" and found:  # of an older file, without a key that has a default
            found = Cascade.model_validate(found).model_dump(mode="json")
        if wanted != found:
            raise InputError(
                f"{path}: made with prediction.{name} {found}, the configuration says {wanted}; "
                f"{REBUILD}"
            )
    expected = (len(rows), len(settings.max_lengths), len(settings.orders), scores.shape[-1])
    if scores.shape != expected:
        raise InputError(f"{path}: logits have shape {scores.shape}, {expected} expected")
    return scores, rows


def _choices(values: Sequence[object]) -> list[tuple[str, list[int]]]:
    """Each value alone, then all of them: (name, positions)."""
    single = [(str(value), [i]) for i, value in enumerate(values)]
    return single if len(values) == 1 else [*single, (joined(values), list(range(len(values))))]


def joined(values: Sequence[object]) -> str:
    """Values in the name of a variant."""
    return "+".join(map(str, values))
