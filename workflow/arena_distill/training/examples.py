"""Build the training examples of a judge, and their order and batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import Dataset, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from arena_distill.config.phases.training import PretrainingSettings, TrainingSettings
from arena_distill.config.training import Optimization, State
from arena_distill.encoding.batching import pad, token_batches
from arena_distill.encoding.sequences import Sequences, Tokens
from arena_distill.encoding.views import encode_views
from arena_distill.verdicts import ORDERS, Votes, exchange

FILLER = -100
"""The label that the Trainer ignores when it counts battles."""


LOWER = "lower the learning rate (lr) or max_grad_norm"
UNTRAINED = (
    "no step was taken yet, so it is not the learning rate: the backbone's weights are broken, or too "
    "large for the precision: fetch the backbone again, or set precision: fp32"
)


@dataclass(frozen=True)
class Examples(Dataset):
    """The Trainer's data set. An example is a battle in one order, or, for a pointwise judge, in both.

    A position past the end is a filler (see `ByLength`): a short battle of weight 0. The Trainer only uses
    `labels` to count battles: 0 for a battle, -100 for a filler.

    views: the sequences of each example: one for a joint judge, two for a pointwise one.
    votes: of the examples, in the order of their answers.
    teachers: float32 (examples, J, classes), logits in the order of the answers, or None.
    weights: float32 (examples, J), of the teachers, or None without teachers.
    battles: number of battles, whatever number of examples each has.
    states: by name, of each teacher float16 (examples, sequences of each, width).
    groups: int64 (examples,), of their prompts; None if not needed.
    """

    views: tuple[Sequences, ...]
    votes: Votes
    teachers: np.ndarray | None = None
    weights: np.ndarray | None = None
    battles: int = 0
    states: Mapping[State, tuple[np.ndarray, ...]] = field(default_factory=dict)
    groups: np.ndarray | None = None

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example's longest sequence: int64 (examples,)."""
        return np.max([view.lengths for view in self.views], axis=0)

    def __len__(self) -> int:
        return len(self.votes)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = i if i < len(self) else int(np.argmin(self.lengths))
        item = {
            "input_ids": [view[row] for view in self.views],
            "labels": np.int64(0 if row == i else FILLER),
            "votes": self.votes.probabilities[row].astype(np.float32),
            "counts": np.float32(self.votes.weights[row] if row == i else 0),
        }
        if self.teachers is None or self.weights is None:
            return item
        states = {name: [values[row] for values in each] for name, each in self.states.items()}
        return item | {"teachers": self.teachers[row], "weights": self.weights[row]} | states


class ByLength(Sampler[int]):
    """Order examples in batches of similar length; the order depends only on seed and epoch.

    All processes compute this order and take their shares of each batch, of the same lengths, so a batch
    holds the same examples for any number of processes. With several, fillers without loss complete the
    last batch: the sampler of accelerate would repeat battles instead.

    Args:
        lengths: int (examples,), tokens.
        batch_size: examples per optimizer step, over all processes.
        processes: a divisor of `batch_size`; a batch consists of their shares, one after the other.
        epoch: returns the number of the epoch; called at its start.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        batch_size: int,
        processes: int,
        seed: int,
        epoch: Callable[[], int],
    ) -> None:
        self.lengths: list[int] = lengths.tolist()
        self.batch_size = batch_size
        self.processes = processes
        self.fillers = -len(self.lengths) % batch_size if processes > 1 else 0
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) + self.fillers

    def __iter__(self) -> Iterator[int]:
        rng = torch.Generator().manual_seed(self.seed + self.epoch())
        order = get_length_grouped_indices(self.lengths, self.batch_size, generator=rng)
        order += range(len(self.lengths), len(self))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for process in range(self.processes):
                yield from batch[process :: self.processes]


def make_examples(
    tokens: Tokens,
    votes: Votes,
    targets: np.ndarray | None,
    weights: np.ndarray | None,
    settings: PretrainingSettings | TrainingSettings,
    states: Mapping[State, tuple[np.ndarray, ...]] | None = None,
) -> Examples:
    """Make an example of each battle in order AB, and with `swap` one in order BA.

    A pointwise judge has one example per battle, with the mean of its teachers' logits of both orders.

    Args:
        votes: of `tokens`, canonical.
        targets: float32 (rows, teachers, orders, classes), canonical, or None.
        weights: float32 (rows, teachers), or None.
        states: by name, of each teacher float16 (rows, views, width), or None.
    """
    states = states or {}
    if settings.head.kind == "pointwise":
        # The two verdicts of a joint teacher make one target.
        both = None if targets is None else targets.mean(axis=2)
        shown = tuple(encode_views(tokens, settings.encoding, settings.head))
        return Examples(shown, votes, both, weights, len(tokens), states)
    orders = ORDERS if optimization(settings).swap else ORDERS[:1]

    def as_shown(values: np.ndarray) -> np.ndarray:
        """Canonical (rows, ..., orders, classes) → (battles as shown, ..., classes)."""
        return np.concatenate(np.moveaxis(exchange(values), -2, 0)[: len(orders)])

    def by_order(values: np.ndarray) -> np.ndarray:
        return np.concatenate([values[:, i : i + 1] for i, _ in enumerate(orders)])

    return Examples(
        (Sequences.concatenate(encode_views(tokens, settings.encoding, settings.head, orders)),),
        Votes(as_shown(votes.probabilities[:, None]), np.tile(votes.weights, len(orders))),
        None if targets is None else as_shown(targets),
        None if weights is None else np.concatenate([weights] * len(orders)),
        len(tokens),
        {name: tuple(map(by_order, each)) for name, each in states.items()},
    )


def part_of(rows: pa.Table, share: float, seed: int) -> pa.Table:
    """The battles to train on: the fold's, or the first of a shuffle of them."""
    if share == 1:
        return rows
    shuffled = np.random.default_rng(seed).permutation(len(rows))
    return rows.take(pa.array(np.sort(shuffled[: max(1, round(share * len(rows)))])))


def optimization(settings: PretrainingSettings | TrainingSettings) -> Optimization:
    """The phase's settings of optimization."""
    return settings.pretraining if isinstance(settings, PretrainingSettings) else settings.training


def collator(pad_token_id: int) -> Any:
    def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids, mask = pad([ids for item in items for ids in item["input_ids"]], pad_token_id)
        shape = len(items), -1, ids.shape[1]  # battles, sequences of each, tokens
        batch = {"input_ids": ids.reshape(shape), "attention_mask": mask.reshape(shape)}
        for name in ("labels", "votes", "counts", "teachers", "weights"):
            if name in items[0]:
                batch[name] = np.stack([item[name] for item in items])
        tensors: dict[str, Any] = {n: torch.from_numpy(values) for n, values in batch.items()}
        for name in get_args(State):
            if name in items[0]:  # a tensor per teacher: their hidden sizes differ
                per_teacher = zip(*(item[name] for item in items), strict=True)
                tensors[name] = [torch.from_numpy(np.stack(values)) for values in per_teacher]
        if "attention" in tensors:
            tensors["attention"] = [a[..., : shape[2]] for a in tensors["attention"]]
        return tensors

    return collate


def micro_batches(
    batch: Mapping[str, Any], most_tokens: int, least: Callable[[int], int] = lambda count: count
) -> list[dict[str, Any]]:
    """Split a batch of :func:`collator` into batches of similar lengths, the longest battles first.

    Args:
        most_tokens: of a battle's longest sequence, padding included, summed over a micro-batch; a longer
            battle forms a micro-batch of its own.
        least: from the number of micro-batches that the bound needs, the number to make at the least.
    """
    lengths = batch["attention_mask"].sum(-1).amax(-1).cpu().numpy()
    parts = list(token_batches(lengths, most_tokens))
    for _ in range(least(len(parts)) - len(parts)):
        at = max(range(len(parts)), key=lambda i: len(parts[i]))
        parts[at : at + 1] = np.array_split(parts[at], 2)
    return [_take(batch, rows, int(lengths[rows[0]])) for rows in parts]


def _take(batch: Mapping[str, Any], rows: np.ndarray, longest: int) -> dict[str, Any]:
    """Rows of a batch, without the columns where all of them are padding."""

    def take(name: str, values: torch.Tensor) -> torch.Tensor:
        taken = values[torch.from_numpy(rows).to(values.device)]
        return (
            taken[..., :longest] if name in ("input_ids", "attention_mask", "attention") else taken
        )

    return {
        name: [take(name, each) for each in values]
        if isinstance(values, list)
        else take(name, values)
        for name, values in batch.items()
    }
