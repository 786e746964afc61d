"""Define what a judge says of battles, and make it of the logits of all views."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from arena_distill.battles.style_features import style_features
from arena_distill.errors import InputError
from arena_distill.judging.contract import Contract
from arena_distill.prediction.averages import mean_of_views
from arena_distill.verdicts import Order


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one battle.

    probabilities: by class (`model_a`, `model_b`, `tie`); their sum is 1.
    winner: the likeliest class.
    cut: tokens that the judge did not read, by field, at its greatest length.
    orders: by order of the answers, the probabilities from it alone.
    """

    probabilities: dict[str, float]
    winner: str
    cut: dict[str, int]
    orders: dict[Order, dict[str, float]]


@dataclass(frozen=True)
class Verdicts:
    """What a judge says of battles, in their order.

    ids: the battles' own, or their numbers; string (rows,).
    classes: `model_a`, `model_b` and, if the judge knows ties, `tie`.
    orders: those in which the judge sees the answers.
    probabilities: float64 (rows, classes), after average and calibration.
    by_order: float64 (rows, orders, classes), the same from one order alone.
    logits: float32 (rows, lengths, orders, classes), in the canonical frame, before calibration.
    cut: tokens that the judge did not read, by field, at its greatest length; int64 (rows,) each.
    """

    ids: pa.Array
    classes: tuple[str, ...]
    orders: tuple[Order, ...]
    probabilities: np.ndarray
    by_order: np.ndarray
    logits: np.ndarray
    cut: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.probabilities)

    def __getitem__(self, row: int) -> Verdict:
        probabilities = self.probabilities[row]
        return Verdict(
            self._named(probabilities),
            self.classes[int(probabilities.argmax())],
            {name: int(count[row]) for name, count in self.cut.items()},
            dict(zip(self.orders, map(self._named, self.by_order[row]), strict=True)),
        )

    def _named(self, probabilities: np.ndarray) -> dict[str, float]:
        return dict(zip(self.classes, probabilities.tolist(), strict=True))

    def __iter__(self) -> Iterator[Verdict]:
        return (self[row] for row in range(len(self)))

    @property
    def winners(self) -> np.ndarray:
        """The likeliest class of each battle: str (rows,)."""
        return np.array(self.classes)[self.probabilities.argmax(axis=1)]

    @property
    def disputed(self) -> np.ndarray:
        """Whether the likeliest class depends on which answer is read first: bool (rows,)."""
        likeliest = self.by_order.argmax(axis=2)
        return (likeliest != likeliest[:, :1]).any(axis=1)

    def to_arrow(self) -> pa.Table:
        """Columns `id`, a probability per class (as in submissions), `winner`, `cut_<field>`."""
        return pa.table(
            {
                "id": self.ids,
                **{f"winner_{c}": self.probabilities[:, i] for i, c in enumerate(self.classes)},
                "winner": pa.array(self.winners.tolist(), pa.string()),
                **{f"cut_{name}": count for name, count in self.cut.items()},
            }
        )

    def to_pandas(self) -> Any:
        """:meth:`to_arrow` as a pandas data frame."""
        return self.to_arrow().to_pandas()


@dataclass(frozen=True)
class Ranking:
    """Answers to one prompt, the best first.

    order: positions in the list of answers.
    scores: float64 (answers,), in the order of the list. A pointwise judge: the strengths. A joint one:
        the mean over the other answers of P(wins) + P(tie) / 2.
    """

    order: list[int]
    scores: np.ndarray


def averaged(
    contract: Contract, battles: pa.Table, logits: np.ndarray, cut: dict[str, np.ndarray]
) -> Verdicts:
    """Average and calibrate the logits of battles as a judge does.

    Args:
        battles: canonical battles.
        logits: float32 (rows, lengths, orders, classes), in the canonical frame.
        cut: tokens that are not read, by field, int64 (rows,) each.

    Raises:
        InputError: the logits are not finite.
    """
    if not np.isfinite(logits).all():
        raise InputError(
            f"{contract.judge}: its logits are not finite: its weights are damaged, or too large for "
            "their dtype; `arena-distill verify` compares its files"
        )
    orders = contract.orders
    calibrate = contract.calibration.map() if contract.calibration else None
    styles = style_features(battles) if calibrate and len(calibrate.lead) else None

    def together(seen: np.ndarray) -> np.ndarray:
        """Logits of some views (rows, views, classes) → probabilities (rows, classes)."""
        mean = mean_of_views(seen, contract.average)
        return calibrate.probabilities(mean, styles) if calibrate else mean

    by_order = [together(logits[:, :, i]) for i in range(len(orders))]
    rows, lengths, _, classes = logits.shape
    flat = logits.reshape(rows, lengths * len(orders), classes)
    return Verdicts(
        battles["id"],
        contract.classes,
        orders,
        together(flat),
        np.stack(by_order, axis=1),
        logits,
        cut,
    )
