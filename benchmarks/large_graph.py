"""Measure dry runs of growing graphs: time, memory, and the share of time in this repository's code.

    python benchmarks/large_graph.py                                     # 10 judges × 20 folds × 8 shards
    python benchmarks/large_graph.py --folds 20 --shards 2 4 8           # any option can grow
    python benchmarks/large_graph.py --folds 5 --teachers 8 16 32

Every size is a fresh `snakemake -n --quiet rules` in a temporary folder, run twice: once for time and
memory, once in Python's profiler for the time spent in `rules/` and in the package. Each row is compared
with the row above it. The cost of a further job should be constant: if it grows with the graph, some code
visits the whole graph for every job. One growth is by design: each fold of a student reads every fold of
its teachers, so these inputs grow with the square of the folds.

Times depend on the machine, and the profiler slows down code with many calls: compare CPU seconds and
shares.
"""

from __future__ import annotations

import argparse
import itertools
import os
import pstats
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
OURS = tuple(str(ROOT / name) for name in ("Snakefile", "rules", "workflow"))
STUDENTS = 2
"""One is taught by all teachers, the next by half of them, and so on in turn."""

HEADER = """\
                             student                        ours, share and ms   against the row above
judges folds shards   jobs    inputs  wall s  CPU s    MB    once   jobs ms/job  jobs×  CPU×    ms/job"""

Function = tuple[str, int, str]
"""File, line and name, as the profiler gives them."""


@dataclass
class Graph:
    """A size and what a dry run of it took."""

    teachers: int
    folds: int
    shards: int
    jobs: int = 0
    wall: float = 0.0
    """Seconds."""
    cpu: float = 0.0
    """Seconds, of user and system."""
    memory: float = 0.0
    """MB, at its peak."""
    profiled: float = 0.0
    """Seconds, in the profiler."""
    loading: float = 0.0
    """Of those, what our code takes once: imports, validation, constants of the rules."""
    calls: dict[str, float] = field(default_factory=dict)
    """Of those, by function, what our code takes when Snakemake calls it for jobs."""

    def config(self, folder: Path) -> dict[str, object]:
        backbones = itertools.cycle([{"tiny": tiny} for tiny in ("llama", "qwen2", "gemma2")])
        teachers = [f"teacher-{n}" for n in range(self.teachers)]
        judges = {
            # Other ranks, other adapters: no two judges share their post-pretraining.
            name: {"backbone": next(backbones), "lora": {"r": rank}}
            for rank, name in enumerate([*teachers, *(f"student-{n}" for n in range(STUDENTS))], 8)
        }
        for n in range(STUDENTS):
            judges[f"student-{n}"]["teachers"] = teachers[:: 1 + n % 2]
        return {
            "results": str(folder / "results"),
            "data": {"arena": {}},
            "folds": {"n": self.folds},
            "defaults": {"logits": {"shards": self.shards}, "quantization": {"group_size": 32}},
            "judges": judges,
            "final": "student-0",
        }

    def student_inputs(self) -> int:
        """Files of teachers' logits that students' folds read."""
        taught_by = (len(range(0, self.teachers, 1 + n % 2)) for n in range(STUDENTS))
        return self.folds**2 * sum(taught_by)

    def measure(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "config.yaml").write_text(yaml.safe_dump(self.config(folder)))
            snakemake = ["-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "-n"]
            snakemake += ["--quiet", "rules", "--directory", name, "--configfile", "config.yaml"]
            self._time([sys.executable, *snakemake], folder)
            profile = ["-m", "cProfile", "-o", "profile", *snakemake]
            run([sys.executable, *profile], folder)
            self._attribute(pstats.Stats(str(folder / "profile")))

    def _time(self, command: list[str], folder: Path) -> None:
        start = time.perf_counter()
        printed, usage = run(command, folder)
        self.wall = time.perf_counter() - start
        self.cpu = usage.ru_utime + usage.ru_stime
        self.memory = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        self.jobs = int(re.findall(r"^total +(\d+)$", printed, re.MULTILINE)[-1])

    def _attribute(self, stats: pstats.Stats) -> None:
        """Split the profile in two, ours and Snakemake's, by the calls from one into the other.

        Cumulative times of our functions would count what one calls of another twice, and their own
        times would miss what they call of pydantic and Python. So time is ours from where Snakemake
        calls a function of ours until that returns. The exception are the files of rules: they run
        inside one another's `include`, and mostly call Snakemake back. There, own time is ours and
        the calls to anything but Snakemake.
        """
        self.profiled = stats.total_tt  # type: ignore[attr-defined]
        for function, (_, _, own, _, callers) in stats.stats.items():  # type: ignore[attr-defined]
            if of_rules_file(function):
                self.loading += own
                continue
            for caller, (_, _, _, cumulative) in callers.items():
                if of_rules_file(caller) and not of_snakemake(function):
                    self.loading += cumulative
                elif of_snakemake(caller) and function[0].startswith(OURS):
                    place = f"{os.path.relpath(function[0], ROOT)}:{function[1]} {function[2]}"
                    self.calls[place] = self.calls.get(place, 0.0) + cumulative


def of_rules_file(function: Function) -> bool:
    return function[0].startswith(OURS[:2]) and function[2] == "<module>"


def of_snakemake(function: Function) -> bool:
    return f"site-packages{os.sep}snakemake" in function[0]


def run(command: list[str], folder: Path) -> tuple[str, resource.struct_rusage]:
    """Run a command to its end: what it printed, and what it used."""
    with open(folder / "output", "w+") as output:
        child = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        printed = output.read()
    if child.returncode:
        sys.exit(printed)
    return printed, usage


def row(graph: Graph, smaller: Graph | None) -> str:
    calls = sum(graph.calls.values())
    text = (
        f"{graph.teachers + STUDENTS:6} {graph.folds:5} {graph.shards:6} {graph.jobs:6,}"
        f" {graph.student_inputs():9,} {graph.wall:7.1f} {graph.cpu:6.1f} {graph.memory:5.0f}"
        f" {graph.loading / graph.profiled:7.1%} {calls / graph.profiled:6.1%}"
        f" {1e3 * calls / graph.jobs:6.2f}"
    )
    if smaller and graph.jobs != smaller.jobs:
        further = 1e3 * (graph.cpu - smaller.cpu) / (graph.jobs - smaller.jobs)
        text += f" {graph.jobs / smaller.jobs:6.2f} {graph.cpu / smaller.cpu:5.2f} {further:9.2f}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teachers", type=int, nargs="+", default=[8])
    parser.add_argument("--folds", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument("--shards", type=int, nargs="+", default=[8])
    arguments = parser.parse_args()
    print(HEADER)
    graph = None
    for size in itertools.product(arguments.teachers, arguments.folds, arguments.shards):
        smaller, graph = graph, Graph(*size)
        graph.measure()
        print(row(graph, smaller), flush=True)
    assert graph
    print(
        f"\nOurs, called for jobs of the last graph, seconds of {graph.profiled:.1f} in the profiler:"
    )
    for place, seconds in sorted(graph.calls.items(), key=lambda call: -call[1])[:8]:
        print(f"{seconds:8.3f}  {place}")


if __name__ == "__main__":
    main()
