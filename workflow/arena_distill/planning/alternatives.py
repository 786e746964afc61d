"""Find other settings of a run that cost less, each computed as the plan itself.

Some settings change how jobs run, and nothing else: GPUs per job, recomputed activations, the model of the
GPU. Others train another judge: the plan shows what they would cost, and a run has to show that the judge
is as good. For both kinds there is a best combination.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from arena_distill.config.judge import Judge
from arena_distill.errors import InputError
from arena_distill.planning.costs import Cost, Costs
from arena_distill.planning.devices import DEVICES
from arena_distill.planning.fit import fits
from arena_distill.planning.schedule import HOUR, simulate
from arena_distill.planning.workload import Battles
from arena_distill.runs.graph import Planned

KEPT_LAYERS = 2 / 3
"""The part of a teacher's layers that a cheaper teacher keeps: the first ones."""

LEAST_GAIN = 0.005
"""A change that saves less of the cost is not taken into a combination."""


@dataclass(frozen=True)
class Change:
    """Other settings of one judge.

    key: changes of one key exclude each other.
    resources: of its training jobs.
    judge: fields of the judge.
    same: whether the judge learns the same, but for rounding.
    first: whether only the first change of this key that fits is of interest.
    """

    key: str
    text: str
    resources: Mapping[str, int | str] = field(default_factory=dict)
    judge: Mapping[str, Any] = field(default_factory=dict)
    device: str | None = None
    same: bool = True
    first: bool = False


@dataclass(frozen=True)
class Alternative:
    """What a run would cost with other settings.

    changes: as keys of the configuration; empty: the plan itself.
    gpu_hours, makespan_hours: of the whole run.
    cost: its price; None where none is known.
    """

    changes: tuple[str, ...]
    same: bool
    gpu_hours: float
    makespan_hours: float
    cost: float | None


def alternatives(jobs: Sequence[Planned], found: Sequence[Cost], costs: Costs) -> list[Alternative]:
    """Compute the cost of the run with other settings.

    Args:
        jobs: of the run.
        found: their costs as planned.
        costs: that estimated them.

    Returns:
        The plan itself; each single change that fits and costs less, or ends earlier, with the cheapest
        first; the cheapest combination of those that train the same judges; and that of all.
    """
    search = _Search(jobs, found, costs)
    single = [
        search.total({name: (change,)})
        for name, choices in search.choices.items()
        for change in choices
    ]
    plan = search.total({})
    told = [one for one in single if search.is_cheaper(one, plan) or search.is_earlier(one, plan)]
    told.sort(key=lambda one: (search.worth(one), one.makespan_hours))
    together = [search.cheapest(same_alone=same) for same in (True, False)]
    return [plan, *told, *(search.total(chosen) for chosen in together if chosen)]


class _Search:
    """The jobs of a run, and their costs under changes of each judge."""

    def __init__(self, jobs: Sequence[Planned], found: Sequence[Cost], costs: Costs) -> None:
        self.jobs = jobs
        self.found = list(found)
        self.costs = costs
        self._known: dict[tuple[str, tuple[str, ...]], dict[int, Cost] | None] = {}
        self.choices: dict[str, list[Change]] = {}
        for name, judge in costs.config.judges.items():
            mine = [job for job in jobs if job.wildcards.get("judge") == name]
            if any(_is_training(job) and job.resources.get("gpu") for job in mine):
                self.choices[name] = list(self._that_fit(name, self._changes(name, judge, mine)))

    def _that_fit(self, name: str, changes: Iterator[Change]) -> Iterator[Change]:
        """The changes with which every job fits; of those of one size, the first."""
        sized = set()
        for change in changes:
            if change.key not in sized and self._jobs_of(name, (change,)) is not None:
                if change.first:
                    sized.add(change.key)
                yield change

    def _changes(self, name: str, judge: Judge, jobs: Sequence[Planned]) -> Iterator[Change]:
        plan, here = self.costs.config.plan, f"judges.{name}"
        training = next(job.resources for job in jobs if _is_training(job))
        batches = [how.batch_size for how in (judge.training, judge.pretraining) if how]
        for count in (1, 2, 4, 8):
            fits = count <= plan.gpus_per_node and not any(size % count for size in batches)
            if fits and count != training["gpu"] and (count > 1 or not training.get("fsdp")):
                asked = {"gpu": count, "devices": count, "nodes": 1}
                yield Change("gpus", f"{here}.compute.gpus: {count}", asked)
        if training.get("gradient_checkpointing"):
            micro = int(training["micro_batch_size"])
            for size in (micro >> halved for halved in range(micro.bit_length())):
                text = (
                    f"{here}.compute: {{gradient_checkpointing: false, micro_batch_size: {size}}}"
                )
                asked = {"gradient_checkpointing": 0, "micro_batch_size": size}
                yield Change("checkpointing", text, asked, first=True)
        for device in DEVICES:
            if plan.price(device) is not None and device != plan.accelerator:
                yield Change("device", f"{here} on {device}", device=device)
        if judge.precision == "nf4":
            for count in (n for n in (2, 4, 8) if n <= plan.gpus_per_node):
                text = f"{here}: {{precision: bf16, compute: {{fsdp: true, gpus: {count}}}}}"
                asked = {"fsdp": 1, "gpu": count, "devices": count}
                yield Change(
                    "precision", text, asked, {"precision": "bf16"}, same=False, first=True
                )
        elif judge.precision == "bf16" and judge.lora:
            text = f"{here}.precision: nf4"
            yield Change("precision", text, {"fsdp": 0}, {"precision": "nf4"}, same=False)
        if judge.head.kind == "joint":
            head = judge.head.model_copy(update={"kind": "pointwise"})
            yield Change("head", f"{here}.head: pointwise", {}, {"head": head}, same=False)
        if judge.backbone and judge.backbone.layers is None and name != self.costs.config.final:
            layers = math.ceil(KEPT_LAYERS * self.costs.model_config(name).num_hidden_layers)
            backbone = judge.backbone.model_copy(update={"layers": layers})
            text = f"{here}.backbone.layers: {layers}"
            yield Change("layers", text, {}, {"backbone": backbone}, same=False)

    def _jobs_of(self, name: str, changes: tuple[Change, ...]) -> dict[int, Cost] | None:
        """The costs of a judge's jobs under changes, by index; None if one does not fit."""
        key = name, tuple(sorted(change.text for change in changes))
        if key not in self._known:
            self._known[key] = self._compute(name, changes)
        return self._known[key]

    def _compute(self, name: str, changes: tuple[Change, ...]) -> dict[int, Cost] | None:
        config = self.costs.config
        update = {key: value for change in changes for key, value in change.judge.items()}
        asked = {key: value for change in changes for key, value in change.resources.items()}
        device = next((c.device for c in changes if c.device), config.plan.accelerator)
        costs = self.costs
        if update:
            config = config.with_judges({name: config.judges[name].model_copy(update=update)})
            costs = Costs(config, Battles(config, self.costs.run), self.costs.run)
        found = {}
        for i, job in enumerate(self.jobs):
            if job.wildcards.get("judge") == name:
                resources = job.resources | asked if _is_training(job) else job.resources
                try:
                    cost = costs.of(replace(job, resources=resources), device=DEVICES[device])
                except InputError:  # a size that its family does not have
                    return None
                if not fits(cost, DEVICES[device], config.plan):
                    return None
                found[i] = cost
        return found

    def total(self, chosen: Mapping[str, tuple[Change, ...]]) -> Alternative:
        """The cost of the run with changes of judges, all of which fit."""
        plan, found = self.costs.config.plan, list(self.found)
        prices = [plan.price(plan.accelerator)] * len(found)
        for name, changes in chosen.items():
            computed = self._jobs_of(name, changes)
            assert computed is not None
            device = next((c.device for c in changes if c.device), plan.accelerator)
            for i, cost in computed.items():
                found[i], prices[i] = cost, plan.price(device)
        hours = [cost.gpus * cost.seconds / HOUR for cost in found]
        known = all(price is not None for price, spent in zip(prices, hours, strict=True) if spent)
        starts = simulate(self.jobs, found, plan)
        ends = [start + cost.seconds for start, cost in zip(starts, found, strict=True)]
        every = [change for changes in chosen.values() for change in changes]
        return Alternative(
            changes=tuple(change.text for change in every),
            same=all(change.same for change in every),
            gpu_hours=sum(hours),
            makespan_hours=max(ends, default=0.0) / HOUR,
            cost=sum((p or 0) * h for p, h in zip(prices, hours, strict=True)) if known else None,
        )

    def worth(self, alternative: Alternative) -> float:
        """What is to be small: the price, or else the GPU-hours."""
        return alternative.gpu_hours if alternative.cost is None else alternative.cost

    def is_cheaper(self, one: Alternative, other: Alternative) -> bool:
        return self.worth(one) < self.worth(other) * (1 - LEAST_GAIN)

    def is_earlier(self, one: Alternative, other: Alternative) -> bool:
        """Whether it ends earlier, for about the same cost."""
        return one.makespan_hours < other.makespan_hours * (1 - LEAST_GAIN) and self.worth(
            one
        ) <= self.worth(other) * (1 + LEAST_GAIN)

    def cheapest(self, *, same_alone: bool) -> dict[str, tuple[Change, ...]]:
        """The changes that together cost least, found one by one; then GPUs per job for an early end."""
        chosen: dict[str, tuple[Change, ...]] = {}
        best = self.total(chosen)
        while True:
            more = [
                {**chosen, name: (*chosen.get(name, ()), change)}
                for name, choices in self.choices.items()
                for change in choices
                if (change.same or not same_alone) and _goes_with(change, chosen.get(name, ()))
            ]
            fitting = [
                (total, each)
                for each in more
                if all(self._jobs_of(n, changes) is not None for n, changes in each.items())
                and self.is_cheaper(total := self.total(each), best)
            ]
            if not fitting:
                break
            best, chosen = min(fitting, key=lambda pair: self.worth(pair[0]))
        for name, choices in self.choices.items():
            for change in choices:
                if change.key == "gpus" and _goes_with(change, chosen.get(name, ())):
                    each = {**chosen, name: (*chosen.get(name, ()), change)}
                    if self._jobs_of(name, each[name]) is None:
                        continue
                    total = self.total(each)
                    if self.is_earlier(total, best):
                        best, chosen = total, each
        return chosen


def _is_training(job: Planned) -> bool:
    return "micro_batch_size" in job.resources


def _goes_with(change: Change, others: Sequence[Change]) -> bool:
    """Whether a change and others set different keys."""
    keys = {name for other in others for name in (other.key, *other.resources)}
    return not keys & {change.key, *change.resources}
