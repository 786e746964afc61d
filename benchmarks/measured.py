"""Measure two ways to do the same by turns, and keep the ratios with the machine that gave them."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
LIBRARIES = ("torch", "transformers", "peft", "numpy", "pyarrow", "fastokens")


def seconds(work: Callable[[], object], device: str = "cpu") -> float:
    """CPU seconds of a call in this process; on a GPU seconds of the clock, until the GPU is done."""
    if device == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    import torch

    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


class Used(NamedTuple):
    """What a process took: seconds of the clock and of the CPU, and MB of memory at its peak."""

    wall: float
    cpu: float
    peak: float


def used_by(*command: str) -> Used:
    """Run a process from its start to its end.

    Its peak of memory counts what this process held when it began.

    Raises:
        SystemExit: it failed.
    """
    start = time.perf_counter()
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{' '.join(command)}: ended with {child.returncode}")
    unit = 2**20 if sys.platform == "darwin" else 2**10
    wall = time.perf_counter() - start
    return Used(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / unit)


def cpu_of(*command: str) -> float:
    """CPU seconds of a process."""
    return used_by(*command).cpu


def by_turns(ways: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The seconds that each way gives, once per round; a first round is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            given = way()
            if number:
                taken[name].append(round(given, 4))
    return taken


def ratio(
    what: str,
    taken: dict[str, list[float]],
    ours: str,
    other: str,
    aim: float | None = None,
) -> dict[str, Any]:
    """Compare two ways, round by round: below 1, ours is faster."""
    pairs = zip(taken[ours], taken[other], strict=True)
    ratios = sorted(round(a / b, 3) for a, b in pairs)
    found = {
        "what": what,
        "ours": ours,
        "other": other,
        "seconds": {name: statistics.median(taken[name]) for name in (ours, other)},
        "ratio": statistics.median(ratios),
        "least": ratios[0],
        "most": ratios[-1],
        "rounds": len(ratios),
        "aim": aim,
    }
    print(f"{what}: {found['ratio']:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)
    return found


def keep(
    script: str,
    ratios: list[dict[str, Any]],
    device: str = "cpu",
    growth: Mapping[str, Mapping[int, Used]] | None = None,
) -> None:
    """Write `results/<script>.json`, of a GPU `results/<script>-cuda.json`, for `write_performance.py`.

    Args:
        growth: by phase and number of battles.
    """
    RESULTS.mkdir(exist_ok=True)
    machine = {
        "processor": processor() if device == "cpu" else graphics(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "load": round(os.getloadavg()[1], 1),
        "python": platform.python_version(),
        **{name: found for name in LIBRARIES if (found := installed(name))},
    }
    stem = Path(script).stem + (f"-{device}" if device != "cpu" else "")
    found: dict[str, Any] = {"arguments": sys.argv[1:], "machine": machine, "ratios": ratios}
    if growth:
        found["growth"] = {
            phase: {
                rows: {"cpu": round(used.cpu, 2), "peak": round(used.peak)}
                for rows, used in of.items()
            }
            for phase, of in growth.items()
        }
    (RESULTS / f"{stem}.json").write_text(json.dumps(found, indent=2) + "\n")


def installed(name: str) -> str | None:
    """The version of a package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def graphics() -> str:
    """The model of the GPU."""
    import torch

    return torch.cuda.get_device_name()


def processor() -> str:
    """The model of the CPU, as Linux names it, else as Python does."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
