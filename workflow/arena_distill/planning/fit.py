"""Refuse jobs that do not fit on their GPUs or nodes, and find changes that would make them fit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from arena_distill.config.judge import Judge
from arena_distill.config.plan import Plan
from arena_distill.errors import InputError
from arena_distill.planning.costs import Cost, Costs
from arena_distill.planning.devices import DEVICES, GIB, USABLE, Device
from arena_distill.runs.graph import Planned

# The most changes to combine for a job that does not fit, and the most remedies to report.
_TOGETHER, _REMEDIES = 3, 6


def fits(cost: Cost, device: Device, plan: Plan) -> bool:
    """Whether a job fits on its GPUs and nodes."""
    return not cost.gpus or (
        cost.gpus <= plan.gpus_per_node * cost.nodes
        and cost.nodes <= plan.nodes
        and cost.peak <= USABLE * device.memory
    )


def refuse_what_does_not_fit(jobs: Sequence[Planned], found: Sequence[Cost], costs: Costs) -> None:
    """Raise InputError for the jobs that cannot run, one of each rule and judge, with remedies."""
    plan = costs.config.plan
    device = DEVICES[plan.accelerator]
    problems: dict[tuple[str, str], str] = {}
    for job, cost in zip(jobs, found, strict=True):
        judge = job.wildcards.get("judge", "")
        if (job.rule, judge) in problems or fits(cost, device, plan):
            continue
        if cost.gpus > plan.gpus_per_node * cost.nodes:
            problems[job.rule, judge] = (
                f"{job.rule} {judge}: needs {cost.gpus // cost.nodes} GPUs, a node has "
                f"{plan.gpus_per_node}; lower judges.{judge}.compute.gpus, raise its compute.nodes, or "
                "raise plan.gpus_per_node"
            )
        elif cost.nodes > plan.nodes:
            problems[job.rule, judge] = (
                f"{job.rule} {judge}: needs {cost.nodes} nodes, there are {plan.nodes}; lower "
                f"judges.{judge}.compute.nodes, or raise plan.nodes"
            )
        else:
            remedies = list(itertools.islice(_remedies(job, costs), _REMEDIES))
            problems[job.rule, judge] = _does_not_fit(job, judge, cost, device, remedies)
    if problems:
        raise InputError("\n".join(problems.values()))


def _does_not_fit(
    job: Planned, judge: str, cost: Cost, device: Device, remedies: Sequence[tuple[str, float]]
) -> str:
    parts = sorted(cost.memory.items(), key=lambda part: -part[1])
    shown = ", ".join(f"{what} {size / GIB:.1f}" for what, size in parts if size > 0.05 * GIB)
    would = "; ".join(f"{what} ({peak / GIB:.1f} GiB)" for what, peak in remedies)
    return (
        f"{job.rule} {judge}: needs {cost.peak / GIB:.1f} GiB on a GPU ({shown}), {device.name} has "
        f"{USABLE * device.memory / GIB:.1f} to use. "
        + (f"What would fit: {would}" if would else "No change that this planner tries would fit")
    )


def _remedies(job: Planned, costs: Costs) -> Iterator[tuple[str, float]]:
    """Yield changes that make a job fit, and its peak with each: single ones, else combinations."""
    judge = costs.config.judges[job.wildcards["judge"]]
    device = DEVICES[costs.config.plan.accelerator]
    # A stack has no keys of its own to change.
    choices = [] if judge.stack else list(_changes(job, judge, costs.config.plan))
    for size in range(1, _TOGETHER + 1):
        reported = set()
        for changes in itertools.combinations(choices, size):
            # For each key, the first value that fits is enough.
            keys = tuple(change.text.partition(":")[0] for change in changes)
            if keys in reported or len({change.key for change in changes}) < size:
                continue
            changed, node, on = job, judge, device
            for change in changes:
                changed = replace(changed, resources=changed.resources | change.resources)
                node = node.model_copy(update=change.judge)
                on = change.device or on
            peak = costs.of(changed, judge=node, device=on).peak
            if peak <= USABLE * on.memory:
                reported.add(keys)
                yield " and ".join(change.text for change in changes), peak
        if reported:
            return


@dataclass(frozen=True)
class _Change:
    """A possible change of a job; only one per key at a time."""

    key: str
    text: str
    resources: dict[str, int | str]
    judge: dict[str, Any]
    device: Device | None = None


def _changes(job: Planned, judge: Judge, plan: Plan) -> Iterator[_Change]:
    """Changes that reduce a job's memory, the least intrusive first."""
    asked = job.resources
    compute = f"judges.{job.wildcards['judge']}.compute"
    if "gradient_checkpointing" in asked and not asked["gradient_checkpointing"]:
        text = f"{compute}.gradient_checkpointing: true"
        yield _Change("checkpointing", text, {"gradient_checkpointing": 1}, {})
    for key in ("micro_batch_size", "batch_tokens"):
        value = int(asked.get(key, 0) or 0) // 2
        least = 1 if key == "micro_batch_size" else 1024
        while value >= least:
            yield _Change(key, f"{compute}.{key}: {value}", {key: value}, {})
            value //= 2
    # Weights in NF4 cannot be sharded: only one of the two changes.
    if judge.precision != "nf4":
        if judge.lora and not job.phase.startswith(("score_test", "quantize")):
            text = f"judges.{job.wildcards['judge']}.precision: nf4"
            yield _Change("weights", text, {"fsdp": 0}, {"precision": "nf4"})
        if "fsdp" in asked:
            for count in (n for n in (2, 4, 8) if n <= plan.gpus_per_node):
                text = f"{compute}.fsdp: true, gpus: {count}"
                yield _Change("weights", text, {"fsdp": 1, "gpu": count}, {})
            for nodes in (n for n in (2, 4, 8) if n <= plan.nodes):
                count = nodes * plan.gpus_per_node
                text = f"{compute}.fsdp: true, gpus: {count}, nodes: {nodes}"
                yield _Change("weights", text, {"fsdp": 1, "gpu": count, "nodes": nodes}, {})
    if job.phase.startswith(("predict", "score_test_merged")):
        for count in (n for n in (2, 4, 8) if int(asked["gpu"]) < n <= plan.gpus_per_node):
            text = f"judges.{job.wildcards['judge']}.logits.gpus: {count}"
            yield _Change("spread", text, {"gpu": count}, {})
    for other in DEVICES.values():
        if other.memory > DEVICES[plan.accelerator].memory:
            yield _Change("accelerator", f"plan.accelerator: {other.name}", {}, {}, other)
