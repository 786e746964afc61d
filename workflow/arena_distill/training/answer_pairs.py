"""What a pointwise head can read of battles, in coordinates in which it is fitted in few steps.

A verdict depends on the difference of two strengths and on the sum of two tie parameters, see
``models.heads``. So the strength reads the differences of both answers' features, the tie parameter their
sums. Features are standardised and, read by read, rotated to their principal axes: the ridge does not
notice. Along them the curvature of the loss is nearly known, so each weight is fitted on its own scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

Objective = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(outputs of some battles, their rows) → each one's loss."""

CONSTANT = 10.0
"""The value of a constant feature, whose weight gives the bias: large, so the ridge hardly holds it."""

CURVATURE = 0.2
"""About that of the log loss by a strength's difference; a wrong value costs steps, no accuracy."""

SIGNS = torch.tensor([[1.0, -1.0], [1.0, 1.0]])
"""How an output of answer A and of answer B enters the verdict: the strength, the tie parameter."""


@dataclass(frozen=True)
class AnswerPairs:
    """Features of battles for heads that read some of the reads.

    columns: by output float32 (rows, features), rotated differences or sums; those of ties end with a
        constant.
    scales: float32 (all features,), the step along each, without a ridge: their mean squares.
    """

    columns: tuple[torch.Tensor, ...]
    scales: torch.Tensor

    def fit(
        self, rows: torch.Tensor, objective: Objective, ridge: float, start: torch.Tensor | None
    ) -> torch.Tensor:
        """Minimise mean loss plus ridge over some battles by L-BFGS: float32 (all features,).

        Args:
            ridge: weight of half the squared norm of the head, relative to the mean loss.
            start: where to start, such as the solution for another ridge; None: 0.
        """
        known = [columns[rows] for columns in self.columns]
        steps = (CURVATURE * self.scales + ridge).rsqrt()
        found = torch.zeros_like(steps) if start is None else start / steps
        found.requires_grad_(True)
        solver = torch.optim.LBFGS(
            [found],
            max_iter=100,
            tolerance_grad=1e-5,
            tolerance_change=1e-6,
            line_search_fn="strong_wolfe",
        )

        def loss() -> torch.Tensor:
            solver.zero_grad()
            weights = found * steps
            value = objective(_outputs(known, weights), rows).mean()
            value = value + ridge / 2 * weights.square().sum()
            value.backward()
            return value

        solver.step(loss)
        return (found * steps).detach()

    def outputs(self, weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """A head's outputs, up to what changes no verdict: float32 (rows, answers, outputs)."""
        return _outputs([columns[rows] for columns in self.columns], weights)


class RotatedReads:
    """The rotated features of each read; :meth:`of` combines some."""

    def __init__(self, values: np.ndarray, outputs: int) -> None:
        """
        Args:
            values: float32 (rows, answers, reads, hidden size).
            outputs: of the head: the strength, or the strength and the tie parameter.
        """
        features = torch.from_numpy(values)
        self.centre = features.mean((0, 1))
        features = features - self.centre
        self.spread = features.flatten(0, 1).std(0)
        self.spread[self.spread < 1e-6] = 1.0  # of a constant
        features /= self.spread
        a, b = features.unbind(1)
        reads = range(values.shape[2])
        self.parts = [
            [_rotated(a[:, read] + sign * b[:, read]) for read in reads]
            for _, sign in SIGNS[:outputs].tolist()
        ]

    def of(self, reads: Sequence[int]) -> AnswerPairs:
        """The features of some reads, side by side."""
        columns = [torch.cat([part[read][0] for read in reads], 1) for part in self.parts]
        scales = [torch.cat([part[read][1] for read in reads]) for part in self.parts]
        if len(columns) == 2:
            constant = columns[1].new_full((len(columns[1]), 1), 2 * CONSTANT)
            columns[1] = torch.cat([columns[1], constant], 1)
            scales[1] = torch.cat([scales[1], constant[0].square()])
        return AnswerPairs(tuple(columns), torch.cat(scales))

    def head(
        self, weights: torch.Tensor, reads: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A head of the features as they were read: weight float32 (outputs, reads · hidden), bias."""
        width, count = self.centre.shape[1], len(self.parts)
        each = weights[: count * len(reads) * width].view(count, len(reads), width)
        weight = torch.stack(
            [
                torch.cat([part[r][2] @ mine[i] / self.spread[r] for i, r in enumerate(reads)])
                for part, mine in zip(self.parts, each, strict=True)
            ]
        )
        bias = -weight @ self.centre[list(reads)].flatten()
        if count == 2:
            bias[1] += CONSTANT * weights[-1]
        return weight, bias


def _rotated(columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Columns along their principal axes, their mean squares, and the axes (hidden, hidden)."""
    squares, axes = torch.linalg.eigh(columns.T @ columns / len(columns))
    return columns @ axes, squares.clamp(min=0), axes


def _outputs(columns: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    parts = weights.split([part.shape[1] for part in columns])
    halves = [part @ mine / 2 for part, mine in zip(columns, parts, strict=True)]
    signs = SIGNS[: len(columns)].T  # (answers, outputs)
    return torch.stack(halves, -1)[:, None] * signs
