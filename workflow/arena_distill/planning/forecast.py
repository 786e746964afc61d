"""Forecast what a run will cost: each job, the total, and the time until it is done.

Snakemake lists the jobs (``graph``), ``costs`` estimates each of them, and a simulated schedule on the
machines of the configuration's section ``plan`` gives their total time. A job that does not fit on its GPUs
is reported before it starts, with changes that would make it fit, each of which is computed in the same
way.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from arena_distill.config import run as configuration
from arena_distill.config.derived import JudgeFamily, derive
from arena_distill.config.run import Config
from arena_distill.files.artifacts import write_json
from arena_distill.planning.alternatives import Alternative, alternatives
from arena_distill.planning.costs import Cost, Costs
from arena_distill.planning.devices import GIB
from arena_distill.planning.fit import refuse_what_does_not_fit
from arena_distill.planning.schedule import HOUR, critical_path, simulate
from arena_distill.planning.workload import Battles
from arena_distill.runs.graph import Planned, read_graph


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
    parameters: by judge, of backbone, adapter (0: all are trained) and head.
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
    alternatives: list[Alternative] = field(default_factory=list)
    """The plan and cheaper settings, if they were asked for."""

    @property
    def totals(self) -> dict[str, Any]:
        """Totals over all jobs: hours, GPU-hours, FLOPs, bytes, and the price."""
        plan = self.config.plan
        gpu_hours = sum(each.cost.gpus * each.cost.seconds for each in self.jobs) / HOUR
        price = plan.price(plan.accelerator)
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
            "checkpoint_bytes": max(map(self._checkpoints, left), default=0.0),
            "cost": None if price is None else price * gpu_hours,
            "fees": sum(each.cost.fee for each in self.jobs),
        }

    def _checkpoints(self, now: Estimate) -> float:
        """Bytes of all checkpoints when a job starts."""
        return sum(e.cost.checkpoints for e in self.jobs if e.start <= now.start < e.end)

    def as_json(self) -> dict[str, Any]:
        """JSON values: ``totals``, ``assumptions``, ``battles``, ``judges``, ``jobs``, ``notes`` and
        ``alternatives``.
        """
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
            "alternatives": [asdict(each) for each in self.alternatives],
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


def forecast(arguments: Sequence[str], *, cheaper: bool = False) -> Forecast:
    """Forecast what a run will cost.

    Args:
        arguments: those of a `snakemake` command. Files of battles and of models may be missing.
        cheaper: also look for settings that cost less.

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
    refuse_what_does_not_fit(graph.jobs, found, costs)
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
        alternatives=alternatives(graph.jobs, found, costs) if cheaper else [],
    )


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
            f"{name}: {counts['base']:,} parameters, "
            + (f"adapter {counts['adapter']:,}" if counts["adapter"] else "all trained")
            + f", head {counts['head']:,}",
            highlight=False,
        )
    machines = f"{plan.nodes} × {plan.cores_per_node} cores"
    spent = ""
    if totals["gpu_hours"]:
        machines = f"{plan.nodes} × {plan.gpus_per_node} {plan.accelerator}"
        spent = f"{_short(totals['gpu_hours'])} GPU-hours, "
        if totals["cost"] is not None:
            spent += f"{totals['cost']:,.0f} at {plan.price(plan.accelerator):g} an hour, "
    checkpoints = ""
    if totals["checkpoint_bytes"]:
        held = _short(totals["checkpoint_bytes"] / 1e9)
        checkpoints = f"\ncheckpoints take {held} GB at most; those of a training go when it ends"
    if totals["fees"]:
        spent += f"{totals['fees']:,.2f} for endpoints, "
    console.print(
        f"\n{totals['jobs']} jobs, {totals['jobs_left']} of them to be done: {spent}"
        f"{_short(totals['flops'] / 1e15)} PFLOP, {_short(totals['stored_bytes'] / 1e9)} GB stored\n"
        f"{_duration(totals['makespan_hours'])} on {machines}; the longest chain of jobs takes "
        f"{_duration(totals['critical_path_hours'])}{checkpoints}",
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
    if found.alternatives:
        _print_alternatives(found.alternatives, console)


def _print_alternatives(found: Sequence[Alternative], console: Console) -> None:
    """Print the plan, then a row per change or combination that costs less."""
    priced = any(each.cost is not None for each in found)
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="underline")
    table.add_column("settings")
    for heading in ("GPU-h", "days", *(["price"] if priced else []), "judges"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in found:
        price = [] if not priced else ["–" if each.cost is None else f"{each.cost:,.0f}"]
        table.add_row(
            "\n".join(each.changes) or "as planned",
            _short(each.gpu_hours),
            f"{each.makespan_hours / 24:.1f}",
            *price,
            "the same" if each.same else "others",
        )
    console.print()
    console.print(table)


def _short(value: float) -> str:
    """Format for a table, with the significant digits only."""
    if value < 0.005:
        return "–" if not value else "0.00"
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _duration(hours: float) -> str:
    return f"{hours / 24:.1f} days" if hours >= 48 else f"{hours:.1f} hours"
