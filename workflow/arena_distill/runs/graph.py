"""Read the jobs of a run, as Snakemake plans them for a command line, without starting any.

``status`` and ``planning`` call Snakemake in a separate process, with the arguments that a user would pass
to `snakemake`: the same Snakefile, profile and configuration, and so the same jobs, threads and resources.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arena_distill.config.checks import Finding
from arena_distill.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A job of the graph.

    File names are those of the rules, relative to Snakemake's working folder.
    """

    rule: str
    wildcards: dict[str, str]
    outputs: list[str]
    logs: list[str]
    needed: bool
    """Whether Snakemake would run it now."""
    after: list[int] = field(default_factory=list)
    """The indices of the jobs whose outputs it reads."""
    threads: int = 1
    resources: dict[str, int | str] = field(default_factory=dict)
    """The resources that its rule requests at the first attempt."""
    original: str = ""
    """The name of its rule in this workflow, if another workflow imports it under another name."""

    @property
    def phase(self) -> str:
        """The name of its rule in this workflow."""
        return self.original or self.rule

    @property
    def name(self) -> str:
        """The wildcards of the job, such as ``llama-teacher fold_1``; may be empty."""
        parts = self.wildcards.items()
        return " ".join(f"{key}_{value}" if value.isdigit() else value for key, value in parts)


@dataclass(frozen=True)
class Graph:
    """The jobs in the order of their rules, and their configuration.

    folder: Snakemake's working folder.
    run: the folder of the run, relative to it.
    config: the configuration of this workflow, merged from all files and `--config`; if another
        workflow imports it as a module, the part that is passed to the module.
    findings: what is known to fail.
    """

    folder: Path
    run: Path
    config: dict[str, Any]
    jobs: list[Planned]
    findings: list[Finding]


def read_graph(arguments: Sequence[str], *, without_inputs: bool = False) -> Graph:
    """Return the graph for the `arguments` of a `snakemake` command.

    Targets without files, such as ``all``, are not jobs.

    Args:
        without_inputs: files that no job makes may be missing; their readers are planned anyway.

    Raises:
        InputError: Snakemake fails; with its own message.
    """
    # A dry run leaves no log behind in .snakemake/log, a summary alone does.
    call = f"_print_graph({without_inputs})"
    graph = _ask(_print_graph, call, ["--dry-run", "--detailed-summary", *arguments])
    jobs = [Planned(**job) for job in graph["jobs"]]
    found = [Finding(**finding) for finding in graph["findings"]]
    return Graph(Path(graph["folder"]), Path(graph["run"]), graph["config"], jobs, found)


def read_findings(arguments: Sequence[str]) -> tuple[list[Finding], list[str]]:
    """What will fail in the run that `arguments` ask for, and what was checked; no graph is built.

    Args:
        arguments: those of a `snakemake` command.

    Raises:
        InputError: the configuration has mistakes, one line each, or Snakemake fails.
    """
    told = _ask(_print_findings, "_print_findings()", ["--dry-run", "--list-rules", *arguments])
    return [Finding(**finding) for finding in told["findings"]], told["checked"]


def _ask(printer: Callable[..., None], call: str, arguments: Sequence[str]) -> Any:
    """Run Snakemake with `printer` in place of one of its own outputs, and return what that prints."""
    parts = [inspect.getsource(part) for part in (_own_names, printer)]
    source = "\n".join(["from __future__ import annotations", *parts, call])
    command = [sys.executable, "-c", source, *arguments]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    found = [line for line in done.stdout.splitlines() if line.startswith('{"arena_distill": ')]
    if done.returncode or not found:
        raise InputError(_refusal(done.stdout, done.stderr))
    return json.loads(found[-1])["arena_distill"]


def _own_names(workflow: Any) -> dict[str, Any]:
    """The names of this workflow in Snakemake's, also where another one uses it as a module."""
    names = [rule.module_globals for rule in workflow.rules]
    return next((n for n in names if {"STUDIES", "RUN"} <= n.keys()), workflow.globals)


def _print_findings() -> None:
    """Run Snakemake, and print what the workflow's own checks find instead of its rules."""
    import json
    import sys

    from snakemake import cli
    from snakemake.workflow import Workflow

    def findings(workflow: Any, only_targets: bool = False) -> None:
        own = _own_names(workflow)
        if "findings" not in own:
            sys.exit("nothing to check: this Snakefile does not use the rules of Arena Distill")
        found = [vars(finding) for finding in own["findings"]()]
        checked = own["checks"].looked_at(own["CONFIG"])
        print(json.dumps({"arena_distill": {"findings": found, "checked": checked}}))

    Workflow.list_rules = findings
    sys.argv[0] = "snakemake"
    cli.main()


def _print_graph(without_inputs: bool) -> None:
    """Run Snakemake, and print a line of JSON in place of the table of its summary.

    Snakemake's own table has no logs of jobs that never ended, and does not group outputs by job.
    This function runs in a separate interpreter that does not import this package: the Snakefile
    imports the one in its own folder.
    """
    import json
    import os
    import re
    import sys

    from snakemake import cli
    from snakemake.dag import DAG
    from snakemake.workflow import Workflow

    async def summary(dag: Any, detailed: bool = False) -> Any:
        rules = {rule.name: number for number, rule in enumerate(dag.workflow.rules)}

        def place(job: Any) -> tuple[int, list[int | str]]:
            parts = re.split(r"(\d+)", "\n".join(job.output))
            return rules[job.rule.name], [int(p) if i % 2 else p for i, p in enumerate(parts)]

        jobs = sorted((job for job in dag.jobs if job.output), key=place)
        number = {job: i for i, job in enumerate(jobs)}
        own = _own_names(dag.workflow)
        proxies = vars(own["rules"]).get("_rules", {})
        originals = {proxy.rule.name: name for name, proxy in proxies.items()}
        battles = proxies["read_battles"].output.battles if "read_battles" in proxies else ""
        shown = [
            {
                "rule": job.rule.name,
                "wildcards": {key: str(value) for key, value in job.wildcards.items()},
                "outputs": [str(file) for file in job.output],
                "logs": [str(file) for file in job.log],
                "needed": bool(dag.needrun(job)),
                "after": sorted(number[other] for other in dag.dependencies[job] if other.output),
                "threads": job.threads,
                "resources": {
                    key: value
                    for key, value in job.resources.items()
                    if isinstance(value, (int, str)) and key not in ("_cores", "_nodes", "tmpdir")
                },
                "original": originals.get(job.rule.name, ""),
            }
            for job in jobs
        ]
        graph = {
            "folder": os.getcwd(),
            "run": os.path.dirname(str(battles)),
            "config": own["config"],
            "jobs": shown,
            "findings": [vars(finding) for finding in own.get("findings", list)()],
        }
        yield json.dumps({"arena_distill": graph})

    DAG.summary = summary
    if without_inputs:
        # Only the main process insists that a file is there which no job makes.
        Workflow.is_main_process = property(lambda workflow: False)
    sys.argv[0] = "snakemake"
    cli.main()


def _refusal(stdout: str, stderr: str) -> str:
    """Snakemake's last messages, without progress, tracebacks and usage."""
    lines = [line for line in plain(f"{stdout}\n{stderr}").split("\n") if line.strip()]
    if any(line.startswith("usage:") for line in lines):
        lines = [line for line in lines if not line.startswith(("usage:", " "))]
    noise = ("Building DAG", "Using profile", "Using workflow specific", "Config file ", '  File "')
    told = [line.rstrip() for line in lines if not line.startswith(noise)]
    insides = any(line.startswith("Traceback (most recent call last)") for line in told)
    return "\n".join(told[-1:] if insides else told[-12:]) or "Snakemake failed without a message"


def plain(text: str) -> str:
    """Text without colours, and with only the last state of progress bars."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return re.sub(r"^[^\n]*\r(?=[^\r\n])", "", text.replace("\r\n", "\n"), flags=re.MULTILINE)
