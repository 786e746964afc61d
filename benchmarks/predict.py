"""Measure `arena-distill predict` on more and more battles, and kill it twice on the way.

    python benchmarks/predict.py results/default/merged/gemma2-student                  # 10,000 and 100,000
    python benchmarks/predict.py JUDGE --rows 100000 --files 10 --kind jsonl --batch-tokens 8192

The battles are those of the synthetic arena. Each size is judged at once, and a second time by a process
that is killed (SIGKILL) after a third and after two thirds of the parts, and started again. Both must write
the same bytes. Memory is the resident set at its peak, libraries included; it should not grow with the
battles, but for JSON lines, which are read whole. The command reads `--files` files, whose battles
together are the size.

Times depend on the machine, and on what else it does: compare CPU seconds.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import inputs
from measured import used_by

from arena_distill.judging.predict import PART


def killed(command: list[str], output: Path, parts: int) -> int:
    """Start, and kill once there are `parts` parts; how many there are then."""
    done = output.with_name(f"{output.name}.parts")
    command = [*command, "--output", str(output)]
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(found := list(done.glob("*.parquet"))) < parts:
        if child.poll() is not None:
            sys.exit(f"predict ended with {child.returncode} before it was killed")
        time.sleep(0.05)
    child.kill()
    child.wait()
    return len(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("judge", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--files", type=int, default=1)
    parser.add_argument("--kind", choices=("csv", "jsonl"), default="csv")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-tokens", type=int, default=16_384)
    arguments = parser.parse_args()
    print(
        f"{'battles':>9}{'wall s':>9}{'CPU s':>9}{'battles/s':>11}{'peak MB':>9}  killed at parts"
    )
    with tempfile.TemporaryDirectory() as temporary:
        for rows in arguments.rows:
            folder = Path(temporary, str(rows))
            # In a process of its own: a child's peak counts what its parent held when it began.
            maker = multiprocessing.get_context("spawn").Process(
                target=inputs.battle_files,
                args=(folder, rows, arguments.files, arguments.kind, arguments.seed),
            )
            maker.start()
            maker.join()
            command = [sys.executable, "-m", "arena_distill", "predict", str(arguments.judge)]
            command += [str(folder), "--batch-tokens", str(arguments.batch_tokens)]
            at_once, resumed = Path(temporary, "at_once.csv"), Path(temporary, "resumed.csv")
            wall, cpu, peak = used_by(*command, "--output", str(at_once))
            parts = math.ceil(rows / PART)
            kills = [killed(command, resumed, max(1, parts * n // 3)) for n in (1, 2)]
            used_by(*command, "--output", str(resumed))
            if at_once.read_bytes() != resumed.read_bytes():
                sys.exit(f"{rows:,} battles: another result after {len(kills)} kills")
            print(
                f"{rows:9,}{wall:9.1f}{cpu:9.1f}{rows / wall:11,.0f}{peak:9,.0f}"
                f"  {kills[0]} and {kills[1]} of {parts}: the same bytes",
                flush=True,
            )


if __name__ == "__main__":
    main()
