"""Forecast what a run will cost: each job, the total, and the time until it is done.

Snakemake lists the jobs (``graph``), ``costs`` estimates each of them, and a simulated schedule on the
machines of the configuration's section ``plan`` gives their total time. A job that does not fit on its GPUs
is reported before it starts, with changes that would make it fit, each of which is computed in the same
way.
"""

from __future__ import annotations

import heapq
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from arena_distill.config import run as configuration
from arena_distill.config.derived import JudgeFamily, derive
from arena_distill.config.judge import Judge
from arena_distill.config.plan import Plan
from arena_distill.config.run import Config
from arena_distill.errors import InputError
from arena_distill.files.artifacts import write_json
from arena_distill.planning.costs import Cost, Costs
from arena_distill.planning.devices import DEVICES, GIB, USABLE, Device
from arena_distill.planning.workload import Battles
from arena_distill.runs.graph import Planned, read_graph

HOUR = 3600.0

# The most changes to combine for a job that does not fit, and the most remedies to report.
_TOGETHER, _REMEDIES = 3, 6


@dataclass(frozen=True)
class Estimate:
    """A job, its cost and its time in the schedule.

    start, end: seconds after the start of the run.
    """

    job: Planned
    cost: Cost
    start: float
    end: float


@dataclass(frozen=True)
class Forecast:
    """The forecast of a run: its jobs, their judges, and the assumptions.

    critical: the indices of the jobs of the longest chain, in their order.
    parameters: by judge, of backbone, adapter and head.
    notes: warnings for the user.
    """

    config: Config
    jobs: list[Estimate]
    critical: list[int]
    parameters: dict[str, dict[str, int]]
    notes: list[str]
    counted: bool
    """Whether battles were counted, not assumed."""
    measured: bool
    """Whether lengths of sequences were measured."""
    battles: dict[str, int]

    @property
    def totals(self) -> dict[str, Any]:
        """Totals over all jobs: hours, GPU-hours, FLOPs, bytes, and the price."""
        plan = self.config.plan
        gpu_hours = sum(each.cost.gpus * each.cost.seconds for each in self.jobs) / HOUR
        price = plan.price_per_gpu_hour
        left = [each for each in self.jobs if each.job.needed]
        return {
            "jobs": len(self.jobs),
            "jobs_left": len(left),
            "gpu_hours": gpu_hours,
            "gpu_hours_left": sum(e.cost.gpus * e.cost.seconds for e in left) / HOUR,
            "flops": sum(each.cost.flops for each in self.jobs),
            "critical_path_hours": sum(self.jobs[i].cost.seconds for i in self.critical) / HOUR,
            "makespan_hours": max((each.end for each in self.jobs), default=0.0) / HOUR,
            "stored_bytes": sum(each.cost.stored for each in self.jobs),
            "cost": None if price is None else price * gpu_hours,
            "fees": sum(each.cost.fee for each in self.jobs),
        }

    def as_json(self) -> dict[str, Any]:
        """JSON values: ``totals``, ``assumptions``, ``battles``, ``judges``, ``jobs``, ``notes``."""
        jobs = [
            {
                "rule": each.job.rule,
                "name": each.job.name,
                "outputs": each.job.outputs,
                "needed": each.job.needed,
                **asdict(each.cost),
                "peak": each.cost.peak,
                "start": each.start,
                "end": each.end,
            }
            for each in self.jobs
        ]
        return {
            "run": self.config.run,
            "totals": self.totals,
            "assumptions": self.config.plan.model_dump(mode="json"),
            "battles": {"counted": self.counted, "measured": self.measured, **self.battles},
            "judges": self.parameters,
            "critical_path": [self.jobs[i].job.outputs[0] for i in self.critical],
            "notes": self.notes,
            "jobs": jobs,
        }


def write_forecast(configuration: str, snakefile: Path, output: Path) -> None:
    """Write the forecast of a run, and print it.

    Args:
        configuration: as JSON, as Snakemake has read it.

    Raises:
        InputError: as :func:`forecast`.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "config.json"
        given.write_text(configuration, encoding="utf-8")
        found = forecast(["--snakefile", str(snakefile), "--configfile", str(given)])
    write_json(found.as_json(), output)
    print_forecast(found)


def forecast(arguments: Sequence[str]) -> Forecast:
    """Forecast what a run will cost.

    Args:
        arguments: those of a `snakemake` command. Files of battles and of models may be missing.

    Raises:
        InputError: Snakemake cannot plan the graph, a backbone's size is unknown, or a job does not
            fit on its GPUs or nodes; then with remedies.
    """
    graph = read_graph(arguments, without_inputs=True)
    read = configuration.load(graph.config)
    family = JudgeFamily(dict(read.judges))
    derive(read, graph.config, family)
    config = read.with_judges(family.judges)
    run = graph.folder / graph.run
    told = [finding.line for finding in graph.findings if not finding.is_missing]
    costs = Costs(config, battles := Battles(config, run), run)
    found = [costs.of(job) for job in graph.jobs]
    _refuse_what_does_not_fit(graph.jobs, found, costs)
    schedule = simulate(graph.jobs, found, config.plan)
    jobs = [
        Estimate(job, cost, start, start + cost.seconds)
        for job, cost, start in zip(graph.jobs, found, schedule, strict=True)
    ]
    working = dict.fromkeys(job.wildcards.get("judge", "") for job in graph.jobs)
    trained = [name for name in working if name and config.judges[name].backbone]
    parameters = {
        name: {"base": sizes.base, "adapter": sizes.lora, "head": sizes.head}
        for name in trained
        if (sizes := costs.sizes(name))
    }
    return Forecast(
        config=config,
        jobs=jobs,
        critical=critical_path(graph.jobs, found),
        parameters=parameters,
        notes=list(dict.fromkeys([*told, *_notes(jobs)])),
        counted=battles.counted is not None or config.data.arena is not None,
        measured=battles.measured,
        battles=battles.counts,
    )


# --- does it fit? -----------------------------------------------------------------------------------


def _refuse_what_does_not_fit(jobs: Sequence[Planned], found: Sequence[Cost], costs: Costs) -> None:
    """Raise InputError for the jobs that cannot run, one of each rule and judge, with remedies."""
    plan = costs.config.plan
    device = DEVICES[plan.accelerator]
    problems: dict[tuple[str, str], str] = {}
    for job, cost in zip(jobs, found, strict=True):
        judge = job.wildcards.get("judge", "")
        if (job.rule, judge) in problems or not cost.gpus:
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
        elif cost.peak > USABLE * device.memory:
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
    choices = list(_changes(job, judge, costs.config.plan))
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
        if not job.phase.startswith(("score_test", "quantize")):
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


def _notes(jobs: Sequence[Estimate]) -> Iterator[str]:
    """Warn about jobs that request less from the cluster than they probably need."""
    for each in jobs:
        asked, judge = each.job.resources, each.job.wildcards.get("judge", "")
        what = f"{each.job.rule} {judge}".strip()
        if each.cost.flops and each.cost.host > (room := float(asked.get("mem_mb", 0)) * 1e6):
            yield (
                f"{what}: about {each.cost.host / 1e9:.0f} GB of host memory, "
                f"compute.mem_mb allows {room / 1e9:.0f}"
            )
        if (
            each.cost.flops
            and each.cost.seconds > (limit := 60.0 * float(asked.get("runtime", 0))) > 0
        ):
            yield (
                f"{what}: about {each.cost.seconds / HOUR:.1f} hours, compute.runtime allows "
                f"{limit / HOUR:.1f}"
            )


# --- when? ------------------------------------------------------------------------------------------


def _following(jobs: Sequence[Planned]) -> list[list[int]]:
    """For each job, the jobs that read its outputs."""
    following: list[list[int]] = [[] for _ in jobs]
    for i, job in enumerate(jobs):
        for before in job.after:
            following[before].append(i)
    return following


def _seconds_to_end(jobs: Sequence[Planned], costs: Sequence[Cost]) -> list[float]:
    """Seconds from each job's start to the end of the longest chain from it."""
    longest = [0.0] * len(jobs)
    waiting = list(map(len, _following(jobs)))  # readers not yet visited
    ready = [i for i, count in enumerate(waiting) if not count]
    while ready:
        i = ready.pop()
        longest[i] += costs[i].seconds
        for before in jobs[i].after:
            longest[before] = max(longest[before], longest[i])
            waiting[before] -= 1
            if not waiting[before]:
                ready.append(before)
    return longest


def critical_path(jobs: Sequence[Planned], costs: Sequence[Cost]) -> list[int]:
    """The jobs of the longest chain, in order; more machines cannot make it shorter."""
    longest, following = _seconds_to_end(jobs, costs), _following(jobs)
    chain: list[int] = []
    candidates = [i for i, job in enumerate(jobs) if not job.after]
    while candidates:
        chain.append(max(candidates, key=lambda i: longest[i]))
        candidates = following[chain[-1]]
    return chain


def simulate(jobs: Sequence[Planned], costs: Sequence[Cost], plan: Plan) -> list[float]:
    """Return the start of each job in seconds: list scheduling, longest path to the end first.

    A job holds its cores, and an equal part of its GPUs, on each of its nodes. (R. L. Graham 1969, Bounds
    on multiprocessing timing anomalies, SIAM J. Appl. Math. 17(2).)
    """
    longest, following = _seconds_to_end(jobs, costs), _following(jobs)
    gpus, cores = [plan.gpus_per_node] * plan.nodes, [plan.cores_per_node] * plan.nodes
    start = [0.0] * len(jobs)
    left = [len(job.after) for job in jobs]
    ready = [(-longest[i], i) for i, count in enumerate(left) if not count]
    running: list[tuple[float, int, list[int]]] = []

    def part(i: int) -> tuple[int, int]:
        """GPUs and cores on each of its nodes."""
        return costs[i].gpus // costs[i].nodes, min(costs[i].cores, plan.cores_per_node)

    now = 0.0
    while ready or running:
        still = []
        for rank, i in sorted(ready):
            asked = part(i)
            fitting = [n for n in range(plan.nodes) if gpus[n] >= asked[0] and cores[n] >= asked[1]]
            if len(fitting) < costs[i].nodes:
                still.append((rank, i))
                continue
            # The fullest nodes with room, so that whole nodes stay free for jobs that need one.
            fitting.sort(key=lambda n: (gpus[n], cores[n]))
            taken = fitting[: costs[i].nodes]
            for node in taken:
                gpus[node] -= asked[0]
                cores[node] -= asked[1]
            start[i] = now
            heapq.heappush(running, (now + costs[i].seconds, i, taken))
        ready = still
        now, i, taken = heapq.heappop(running)
        for node in taken:
            gpus[node] += part(i)[0]
            cores[node] += part(i)[1]
        for after in following[i]:
            left[after] -= 1
            if not left[after]:
                ready.append((-longest[after], after))
    return start


# --- on the terminal --------------------------------------------------------------------------------


def print_forecast(found: Forecast, console: Console | None = None) -> None:
    """Print a row per rule and judge, and the run's totals.

    In each row, GiB on a GPU and on the host, and hours, are of the largest job; the rest are sums.
    """
    console = console or Console()
    plan, totals = found.config.plan, found.totals
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="underline")
    table.add_column("rule", no_wrap=True)
    table.add_column("judge", no_wrap=True)
    for heading in ("jobs", "GPUs", "GiB", "host", "PFLOP", "hours", "GPU-h", "GB"):
        table.add_column(heading, justify="right", no_wrap=True)
    groups: dict[tuple[str, str], list[Cost]] = {}
    for each in found.jobs:
        judge = each.job.wildcards.get("judge", "") if each.cost.flops else ""
        groups.setdefault((each.job.rule, judge), []).append(each.cost)
    for (rule, judge), costs in groups.items():
        gpus = max(cost.gpus for cost in costs)
        table.add_row(
            rule,
            judge,
            str(len(costs)),
            str(gpus or "–"),
            _short(max(cost.peak for cost in costs) / GIB if gpus else 0),
            _short(max(cost.host for cost in costs) / GIB),
            _short(sum(cost.flops for cost in costs) / 1e15),
            _short(max(cost.seconds for cost in costs) / HOUR),
            _short(sum(cost.gpus * cost.seconds for cost in costs) / HOUR),
            _short(sum(cost.stored for cost in costs) / 1e9),
        )
    console.print(table)
    for name, counts in found.parameters.items():
        console.print(
            f"{name}: {counts['base']:,} parameters, adapter {counts['adapter']:,}, "
            f"head {counts['head']:,}",
            highlight=False,
        )
    machines = f"{plan.nodes} × {plan.cores_per_node} cores"
    spent = ""
    if totals["gpu_hours"]:
        machines = f"{plan.nodes} × {plan.gpus_per_node} {plan.accelerator}"
        spent = f"{_short(totals['gpu_hours'])} GPU-hours, "
        if totals["cost"] is not None:
            spent += f"{totals['cost']:,.0f} at {plan.price_per_gpu_hour:g} an hour, "
    if totals["fees"]:
        spent += f"{totals['fees']:,.2f} for endpoints, "
    console.print(
        f"\n{totals['jobs']} jobs, {totals['jobs_left']} of them to be done: {spent}"
        f"{_short(totals['flops'] / 1e15)} PFLOP, {_short(totals['stored_bytes'] / 1e9)} GB stored\n"
        f"{_duration(totals['makespan_hours'])} on {machines}; the longest chain of jobs takes "
        f"{_duration(totals['critical_path_hours'])}",
        highlight=False,
    )
    battles = ", ".join(f"{source} {count:,}" for source, count in found.battles.items())
    lengths = "measured" if found.measured else f"assumed, {plan.tokens_per_battle:g} before cuts"
    console.print(
        f"battles {'counted' if found.counted else 'assumed'}: {battles}; tokens {lengths}; "
        f"{plan.utilisation:.0%} of the peak assumed",
        highlight=False,
    )
    for note in found.notes:
        console.print(f"note: {note}", style="yellow", highlight=False, soft_wrap=True)


def _short(value: float) -> str:
    """Format for a table, with the significant digits only."""
    if value < 0.005:
        return "–" if not value else "0.00"
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _duration(hours: float) -> str:
    return f"{hours / 24:.1f} days" if hours >= 48 else f"{hours:.1f} hours"
