"""Print the status of a run on the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from arena_distill.runs.status import STATES, Job, JobState, Status


def print_status(status: Status, console: Console | None = None, most: int = 20) -> None:
    """Print a row per rule, then why jobs failed or were interrupted: the first `most` of them."""
    console = console or Console()
    console.print(_table(status))
    counts = status.counts
    work = "Snakemake is running" if status.at_work else "Snakemake is not running"
    if not status.at_work and counts["running"] + counts["queued"]:
        work += ", but its Slurm jobs continue"
    console.print(f"\n{counts['done']} of {len(status.jobs)} jobs are done; {work}")
    told = [job for job in status.jobs if job.state in ("failed", "interrupted")]
    for job in told[:most]:
        title, *lines = _describe(job, status.folder)
        style = "red" if job.state == "failed" else "yellow"
        text = Text.assemble("\n", (title, style), *(f"\n{line}" for line in lines))
        console.print(text, soft_wrap=True)
    if len(told) > most:
        console.print(f"\n… and {len(told) - most} more: --json lists them all")
    if counts["interrupted"] and not status.at_work:
        console.print(
            "\nContinue an interrupted run with `snakemake --rerun-incomplete`; "
            "after a kill, run `snakemake --unlock` first."
        )


def _describe(job: Job, folder: Path) -> Iterator[str]:
    yield f"{' '.join(filter(None, [job.state, job.rule, job.name]))}: {job.outputs[0]}"
    yield from (f"  log: {log}" for log in job.logs if (folder / log).exists())
    if job.slurm_job:
        yield f"  Slurm job {job.slurm_job}: {job.slurm_log or 'no log'}"
    yield from (f"    {line}" for line in job.error)


def _table(status: Status) -> Table:
    counts = status.counts
    shown = [state for state in STATES if state != "interrupted" or counts[state]]
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="underline")
    table.add_column("rule", no_wrap=True)
    for state in shown:
        table.add_column(state, justify="right", no_wrap=True)
    if counts["running"]:
        table.add_column("now", overflow="fold")
    rules: dict[str, list[Job]] = {}
    for job in status.jobs:
        rules.setdefault(job.rule, []).append(job)
    for rule, jobs in rules.items():
        of_rule = Counter(job.state for job in jobs)
        now = [Text(_now(jobs), style="green")] if counts["running"] else []
        table.add_row(rule, *_cells(of_rule, shown), *now)
    table.add_row("total", *_cells(counts, shown), style="bold")
    return table


def _cells(counts: Mapping[JobState, int], states: Sequence[JobState]) -> list[Text]:
    styles: dict[JobState, str] = {"running": "green", "failed": "red", "interrupted": "yellow"}
    return [
        Text(str(counts[state]), style=styles.get(state, ""))
        if counts[state]
        else Text("·", style="dim")
        for state in states
    ]


def _now(jobs: Sequence[Job], most: int = 3) -> str:
    """The running jobs of a rule."""
    names = [job.name for job in jobs if job.state == "running" and job.name]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
