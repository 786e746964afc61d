"""Fit the head of a frozen judge: logistic regression on hidden states of several layers.

Which layers and poolings it reads, and the ridge, have the least loss in a cross-validation that does not
split prompts: each read alone first, then the best two, three, … side by side, until one more does not help
twice. Votes that validate the fold take no part in the choice. A head is linear, so the mean of the folds'
heads gives the mean of their outputs exactly, whatever each of them reads.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from arena_distill.battles.folds import training_rows, undivided_groups
from arena_distill.battles.votes import votes_of
from arena_distill.config.phases.training import ProbeSettings
from arena_distill.errors import InputError
from arena_distill.files.artifacts import (
    REBUILD,
    atomic_directory,
    file_sha256,
    fingerprint,
    provenance,
    read_json,
    read_parquet,
    write_json,
)
from arena_distill.models.layer_reads import Read
from arena_distill.training.examples import part_of
from arena_distill.training.features import Features
from arena_distill.training.linear_probe import RIDGES, Objective, cross_validate, objective_of
from arena_distill.training.targets import weighted_targets

FILE = "probe.safetensors"

ALONE = RIDGES[4:13:2]
"""Ridges for each read alone: 10 to 0.001."""

CONSTANT = 10.0
"""The value of a constant feature, whose weight gives the bias: large, so the ridge hardly holds it."""


@dataclass(frozen=True)
class Probe:
    """A fold's head.

    reads: what it reads, in the order of its weights.
    marker: the token ids before an answer.
    weight: float32 (outputs, reads · hidden size); bias: float32 (outputs,).
    """

    reads: tuple[Read, ...]
    marker: tuple[int, ...]
    weight: torch.Tensor
    bias: torch.Tensor

    def outputs(self, features: np.ndarray, of: Sequence[Read]) -> np.ndarray:
        """The head's outputs: float32 (rows, answers, outputs).

        Args:
            features: float32 (rows, answers, reads, hidden size), of the reads `of`.
        """
        mine = torch.from_numpy(features[:, :, [list(of).index(read) for read in self.reads]])
        return (mine.flatten(2) @ self.weight.T + self.bias).numpy()


def fit_probe(
    features: Path,
    folds: Path,
    fold: int,
    output: Path,
    *,
    teachers: Mapping[str, Sequence[Path]],
    settings: ProbeSettings,
) -> None:
    """Fit one fold's head → a folder with `probe.safetensors` and metrics.json.

    Args:
        features: the folder of ``training.features``.
        teachers: each teacher's logits files (see ``targets.select_rows``).

    Raises:
        InputError: a file is damaged, or a row is missing.
    """
    started = time.monotonic()
    table = read_parquet(folds)
    chosen = training_rows(table, fold, unlabelled=settings.pseudo_labels)
    rows = part_of(table.take(chosen), settings.share, settings.seed)
    votes, targets, weights = votes_of(rows), None, None
    if settings.teachers and settings.targets:
        _, votes, targets, weights = weighted_targets(
            teachers, rows, table, targets=settings.targets, loss=settings.loss
        )
        targets = targets.mean(axis=2)  # of both orders
    objective = objective_of(votes, targets, weights, loss=settings.loss, head=settings.head)
    read = Features.read(features)
    outputs, groups = len(settings.head.outputs), undivided_groups(rows)
    probe, ridge, loss = _choose(read, read.of(rows), objective, outputs, groups)
    about = provenance("probe", settings.model_dump(mode="json") | {"fold": fold})
    about["made_from"] = {"folds": fingerprint(table), "fold": fold}
    about["made_from"]["backbone"] = read.about["backbone"]
    with atomic_directory(output) as folder:
        save_file({"weight": probe.weight, "bias": probe.bias}, folder / FILE)
        metrics = {
            "battles": len(rows),
            "sequences": 2 * len(rows),
            "tokens": read.about["tokens"],
            "epochs": 1,
            "reads": probe.reads,
            "marker": probe.marker,
            "ridge": ridge,
            "loss": loss if np.isfinite(loss) else None,
            "trainable_parameters": probe.weight.numel() + probe.bias.numel(),
            "parameters": read.about["parameters"],
            "seconds": round(time.monotonic() - started, 3),
            "sha256": {FILE: file_sha256(folder / FILE)},
            "provenance": about,
        }
        if weights is not None:
            metrics["teacher_weights"] = weights.mean(axis=0, dtype=np.float64).tolist()
        write_json(metrics, folder / "metrics.json")
    shown = ", ".join(f"{pooling} at {layer}" for layer, pooling in probe.reads)
    print(f"{output}: reads {shown}; ridge {ridge:.3g}, loss {loss:.4f} cross-validated")


def read_probe(folder: Path) -> Probe:
    """Read what :func:`fit_probe` wrote.

    Raises:
        InputError: it is missing or damaged.
    """
    metrics = read_json(folder / "metrics.json")
    if not (folder / FILE).is_file() or file_sha256(folder / FILE) != metrics["sha256"][FILE]:
        raise InputError(f"{folder / FILE}: is not what the fit wrote; {REBUILD}")
    reads = tuple((layer, pooling) for layer, pooling in metrics["reads"])
    tensors = load_file(folder / FILE)
    return Probe(reads, tuple(metrics["marker"]), tensors["weight"], tensors["bias"])


def mean_probe(probes: Sequence[Probe], weights: Sequence[float]) -> Probe:
    """The head whose outputs are the weighted mean of the probes'; it reads what any of them reads."""
    reads = tuple(sorted({read for probe in probes for read in probe.reads}))
    first = probes[0]
    width = first.weight.shape[1] // len(first.reads)
    weight = torch.zeros(len(first.bias), len(reads), width)
    for probe, share in zip(probes, weights, strict=True):
        for i, read in enumerate(probe.reads):
            weight[:, reads.index(read)] += share * probe.weight[:, i * width : (i + 1) * width]
    bias = sum((share * p.bias for p, share in zip(probes, weights, strict=True)), 0 * first.bias)
    return Probe(reads, first.marker, weight.flatten(1), bias)


def _choose(
    read: Features, values: np.ndarray, objective: Objective, outputs: int, groups: np.ndarray
) -> tuple[Probe, float, float]:
    """The best head by cross-validation, its ridge and its loss.

    Args:
        values: float32 (rows, answers, reads, hidden size).
    """
    features = torch.from_numpy(values)
    centre = features.mean((0, 1))
    features -= centre

    def fitted(
        reads: Sequence[int], ridges: tuple[float, ...]
    ) -> tuple[torch.Tensor, float, float]:
        some = features[:, :, list(reads)].flatten(2)
        constant = some.new_full((*some.shape[:2], 1), CONSTANT)
        return cross_validate(
            torch.cat([some, constant], -1), objective, outputs, groups, ridges=ridges
        )

    alone = {i: fitted([i], ALONE) for i in range(len(read.reads))}
    order = sorted(alone, key=lambda i: (alone[i][2], i))
    best, best_reads, worse = alone[order[0]], order[:1], 0
    for count in range(2, len(order) + 1):
        ridges = tuple(best[1] * 10**power for power in (1, 0.5, 0, -0.5))
        found = fitted(order[:count], ridges)
        worse = 0 if found[2] < best[2] else worse + 1
        if not worse:
            best, best_reads = found, order[:count]
        if worse == 2:
            break
    weights, ridge, loss = best
    weight, bias = weights[:, :-1], CONSTANT * weights[:, -1]
    bias = bias - weight @ centre[best_reads].flatten()
    reads = tuple(read.reads[i] for i in best_reads)
    return Probe(reads, read.marker, weight.contiguous(), bias), ridge, loss
