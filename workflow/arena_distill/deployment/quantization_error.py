"""Measure how much quantisation changed a judge, and stop if it is too much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from arena_distill.config.phases.deployment import DriftSettings
from arena_distill.errors import InputError, refusing
from arena_distill.files.artifacts import REBUILD, read_json, write_json
from arena_distill.verdicts import Votes

DRIFT = "drift.json"


def drift(before: np.ndarray, after: np.ndarray, votes: Votes | None = None) -> dict[str, Any]:
    """Compare logits before and after quantisation.

    Args:
        before: float32 or float64 (rows, classes), the dense model's.
        after: alike, the quantised model's.
        votes: of these rows, or None.

    Returns:
        Mean `kl` and `kl_max` over rows, KL(before ‖ after) in nats; `flip_rate`, the share of rows
        whose most probable class changed; `logit_change`, the mean absolute change; `log_loss_before`,
        `log_loss` and `log_loss_change`, None without votes.
    """
    old, new = _log_softmax(before), _log_softmax(after)
    kl = np.maximum((np.exp(old) * (old - new)).sum(-1), 0)
    losses: list[float | None] = [None, None, None]
    if votes is not None:
        losses = [float(votes.mean(votes.cross_entropy(x))) for x in (old, new, new - old)]
    return {
        "rows": len(before),
        "kl": float(kl.mean()),
        "kl_max": float(kl.max()),
        "flip_rate": float((before.argmax(-1) != after.argmax(-1)).mean()),
        "logit_change": float(np.abs(after - before).mean(dtype=np.float64)),
        **dict(zip(("log_loss_before", "log_loss", "log_loss_change"), losses, strict=True)),
    }


def check_drift(drift: Path, output: Path, *, settings: DriftSettings) -> None:
    """Write a small file if the drift is within bounds, else raise.

    Args:
        drift: the ``drift.json`` inside the folder of a quantised model.

    Raises:
        InputError: a bound is exceeded. The quantised model is kept.
    """
    report = read_json(drift)
    with refusing(f"{drift}: holds no drift of a model; {REBUILD}"):
        bounds = {
            "kl": ("mean KL", "max_kl", settings.max_kl),
            "flip_rate": ("share of changed verdicts", "max_flip_rate", settings.max_flip_rate),
        }
        beyond = [
            f"{what} {report[name]:.3g} > {bound:g} (config: judges.*.quantization.{option})"
            for name, (what, option, bound) in bounds.items()
            if not report[name] <= bound
        ]
    if beyond:
        raise InputError(
            f"quantisation drift on {report['rows']} rows: {'; '.join(beyond)}. Raise the bound, "
            f"use more bits (now {report['bits']}), smaller groups (now {report['group_size']}) "
            f"or more samples (now {report['samples']}). "
            f"The quantised model is kept in {drift.parent}"
        )
    within = {name: {"value": report[name], "bound": bound} for name, (*_, bound) in bounds.items()}
    write_json({"within_bounds": within}, output)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64, because float32 cannot resolve a KL of 1e-8."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
