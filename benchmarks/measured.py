"""Measure two ways to do the same by turns, and keep the ratios with the machine that gave them."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("torch", "transformers", "peft", "numpy", "pyarrow", "fastokens")


def cpu(work: Callable[[], object]) -> float:
    """CPU seconds of a call in this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def cpu_of(*command: str) -> float:
    """CPU seconds of a process, from its start to its end.

    Raises:
        SystemExit: it failed.
    """
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{' '.join(command)}: ended with {child.returncode}")
    return usage.ru_utime + usage.ru_stime


def by_turns(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The seconds that each way gives, once per round; a first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            taken = way()
            if number:
                seconds[name].append(round(taken, 4))
    return seconds


def ratio(
    what: str,
    seconds: dict[str, list[float]],
    ours: str,
    other: str,
    aim: float | None = None,
) -> dict[str, Any]:
    """Compare two ways, round by round: below 1, ours is faster."""
    pairs = zip(seconds[ours], seconds[other], strict=True)
    ratios = sorted(round(a / b, 3) for a, b in pairs)
    found = {
        "what": what,
        "ours": ours,
        "other": other,
        "seconds": {name: statistics.median(seconds[name]) for name in (ours, other)},
        "ratio": statistics.median(ratios),
        "least": ratios[0],
        "most": ratios[-1],
        "rounds": len(ratios),
        "aim": aim,
    }
    print(f"{what}: {found['ratio']:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)
    return found


def keep(script: str, ratios: list[dict[str, Any]]) -> None:
    """Write `results/<script>.json`, for `write_performance.py`."""
    RESULTS.mkdir(exist_ok=True)
    machine = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "load": round(os.getloadavg()[1], 1),
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
    }
    file = RESULTS / f"{Path(script).stem}.json"
    file.write_text(json.dumps({"machine": machine, "ratios": ratios}, indent=2) + "\n")


def processor() -> str:
    """The model of the CPU, as Linux names it, else as Python does."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
