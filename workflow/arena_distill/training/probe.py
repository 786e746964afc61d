"""Fit the head of a frozen judge: logistic regression on hidden states of several layers.

Which layers and poolings it reads, and the ridge, have the least log loss on votes in a cross-validation
that does not split prompts: each read alone first, then the best two, three, … side by side, until one more
does not help twice. What teachers say only trains: to agree with them is not the aim. Votes that validate
the fold take no part in the choice. A head is linear, so the mean of the folds' heads gives the mean of
their outputs exactly, whatever each of them reads.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load_file, save_file

from arena_distill.battles.folds import training_rows, undivided_groups
from arena_distill.battles.votes import votes_of
from arena_distill.config.head import Head
from arena_distill.config.phases.training import ProbeSettings
from arena_distill.config.training import Loss
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
from arena_distill.models.adapters import Judge, head_of
from arena_distill.models.layer_reads import Read
from arena_distill.training.answer_pairs import Objective, RotatedReads
from arena_distill.training.examples import Examples, part_of
from arena_distill.training.features import Features
from arena_distill.training.linear_probe import PARTS, RIDGES, objective_of, read_features
from arena_distill.training.targets import VOTE_LOSS, weighted_targets
from arena_distill.verdicts import Votes

FILE = "probe.safetensors"

ALONE = RIDGES[4:13]
"""Ridges for each read alone: 10 to 0.001."""


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

    def over(self, reads: Sequence[Read]) -> torch.Tensor:
        """Its weights of all these reads, 0 where it reads nothing: (outputs, reads · hidden size)."""
        outputs, width = len(self.bias), self.weight.shape[1] // len(self.reads)
        every = torch.zeros(outputs, len(reads), width)
        every[:, [list(reads).index(r) for r in self.reads]] = self.weight.view(outputs, -1, width)
        return every.flatten(1)


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
    votes, groups = votes_of(rows), undivided_groups(rows)
    number, own = np.asarray(rows["fold"]), teachers
    others: list[int] = np.unique(number[number >= 0]).tolist()
    if apart := settings.targets == "unlabelled":
        own = _of_fold(teachers, fold)
    objective, weights = _objective(rows, table, own, settings)
    if apart and len(others) > 1:
        # Teachers pass on what they know: a fold is predicted by what those taught that never saw it.
        parts = [
            _part(groups, number == n, _objective(rows, table, _of_fold(teachers, n), settings)[0])
            for n in others
        ]
    else:
        parts = split(votes, groups, objective)
    asked = objective_of(votes, None, None, loss=VOTE_LOSS, head=settings.head)
    read = Features.read(features)
    probe, ridge, loss = choose(
        read.reads, read.marker, read.of(rows), objective, asked, parts, len(settings.head.outputs)
    )
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
    shares = torch.tensor(weights)[:, None]
    bias = (shares * torch.stack([probe.bias for probe in probes])).sum(0)
    weight = (shares[..., None] * torch.stack([probe.over(reads) for probe in probes])).sum(0)
    return Probe(reads, probes[0].marker, weight, bias)


@dataclass(frozen=True)
class Part:
    """Of the cross-validation: battles that are learned by `objective`, and whose votes are then asked."""

    known: torch.Tensor
    held_out: torch.Tensor
    objective: Objective


def split(votes: Votes, groups: np.ndarray, objective: Objective) -> list[Part]:
    """Split the battles with votes by prompt; each part learns all others of other prompts.

    Args:
        groups: int (rows,); none is on both sides.
    """
    from sklearn.model_selection import GroupKFold

    voted = np.flatnonzero(votes.known)
    count = min(PARTS, len(np.unique(groups[voted])))
    if count < 2:
        return []
    asked = (voted[part] for _, part in GroupKFold(count).split(voted, groups=groups[voted]))
    every = np.arange(len(votes))
    return [_part(groups, np.isin(every, rows), objective) for rows in asked]


def _part(groups: np.ndarray, held_out: np.ndarray, objective: Objective) -> Part:
    """
    Args:
        held_out: bool (rows,), with votes.
    """
    others = ~np.isin(groups, groups[held_out])
    known, asked = (torch.from_numpy(np.flatnonzero(some)) for some in (others, held_out))
    return Part(known, asked, objective)


def _of_fold(teachers: Mapping[str, Sequence[Path]], fold: int) -> dict[str, Sequence[Path]]:
    return {name: files[fold : fold + 1] for name, files in teachers.items()}


def _objective(
    rows: pa.Table, table: pa.Table, teachers: Mapping[str, Sequence[Path]], settings: ProbeSettings
) -> tuple[Objective, np.ndarray | None]:
    """A head's own loss, and the teachers' weights: float32 (rows, teachers)."""
    votes, targets, weights = votes_of(rows), None, None
    if settings.teachers and settings.targets:
        _, votes, targets, weights = weighted_targets(
            teachers, rows, table, targets=settings.targets, loss=settings.loss
        )
        targets = targets.mean(axis=2)  # of both orders
    return objective_of(votes, targets, weights, loss=settings.loss, head=settings.head), weights


def fit_layer_head(
    judge: Judge, examples: Examples, *, loss: Loss, head: Head, batch_tokens: int
) -> None:
    """Give a judge that is to be trained the head of a frozen one, as :func:`linear_probe.fit_head`."""
    layered = head_of(judge)
    assert layered is not None and examples.groups is not None
    objective = objective_of(
        examples.votes, examples.teachers, examples.weights, loss=loss, head=head
    )
    asked = objective_of(examples.votes, None, None, loss=VOTE_LOSS, head=head)
    reads = layered.reader.reads
    values = read_features(judge, examples.views, batch_tokens)
    values = values.reshape(*values.shape[:2], len(reads), -1)
    parts = split(examples.votes, examples.groups, objective)
    marker, outputs = layered.reader.marker.tolist(), len(head.outputs)
    probe, ridge, found = choose(reads, marker, values, objective, asked, parts, outputs)
    with torch.no_grad():
        layered.linear.weight.copy_(probe.over(reads))
        layered.linear.bias.copy_(probe.bias)
    shown = ", ".join(f"{pooling} at {layer}" for layer, pooling in probe.reads)
    print(f"head fitted to {shown}: ridge {ridge:.3g}, loss {found:.4f} cross-validated")


def choose(
    reads: Sequence[Read],
    marker: Sequence[int],
    values: np.ndarray,
    objective: Objective,
    votes: Objective,
    parts: Sequence[Part],
    outputs: int,
) -> tuple[Probe, float, float]:
    """The head that predicts the votes of battles left out best, its ridge and its loss there.

    Args:
        reads: what can be read; `marker`: the token ids before an answer.
        values: float32 (rows, answers, reads, hidden size).
        objective: what the head is fitted by in the end.
        votes: what it is chosen by: the log loss of the votes, 0 without one.
        parts: of the cross-validation; none: the strongest ridge, of the first read.
    """
    rotated = RotatedReads(values, outputs)
    rows = torch.arange(len(values))
    asked = sum(len(part.held_out) for part in parts)

    def tried(some: Sequence[int], ridges: Sequence[float]) -> tuple[float, float]:
        """The best ridge, and its loss; weaker ones are tried until one is worse."""
        pairs = rotated.of(some)
        starts: list[torch.Tensor | None] = [None] * len(parts)
        best = ridges[0], np.inf
        for ridge in ridges if parts else ():
            loss = 0.0
            for i, part in enumerate(parts):
                starts[i] = weights = pairs.fit(part.known, part.objective, ridge, starts[i])
                found = pairs.outputs(weights, part.held_out)
                loss += float(votes(found, part.held_out).sum()) / asked
            if loss >= best[1]:
                break
            best = ridge, loss
        return best

    alone = {i: tried([i], ALONE) for i in range(len(reads))}
    order = sorted(alone, key=lambda i: (alone[i][1], i))
    best, best_reads, worse = alone[order[0]], order[:1], 0
    for count in range(2, len(order) + 1 if parts else 0):
        ridges = [best[0] * 10**power for power in (1, 0.5, 0, -0.5)]
        found = tried(order[:count], ridges)
        worse = 0 if found[1] < best[1] else worse + 1
        if not worse:
            best, best_reads = found, order[:count]
        if worse == 2:
            break
    weights = rotated.of(best_reads).fit(rows, objective, best[0], None)
    weight, bias = rotated.head(weights, best_reads)
    chosen = tuple(reads[i] for i in best_reads)
    return Probe(chosen, tuple(marker), weight.contiguous(), bias), *best
