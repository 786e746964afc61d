"""Write docs/performance.md from the measurements in benchmarks/results.

    python benchmarks/write_performance.py [--check]

With `--check` write nothing, and exit with an error if the page is out of date.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from pathlib import Path
from typing import Any

from measured import LIBRARIES, RESULTS

PAGE = Path(__file__).resolve().parents[1] / "docs/performance.md"

INTRO = """\
# Performance

`make bench` measures each pair below and writes this page. Both sides run by turns in one run. Seconds are
of the CPU, on a GPU of the clock; median of the rounds. The ratio is ours to the other: below 1, ours is
faster. In brackets are the least and the most of the rounds. A missed aim is in **bold**."""


def page() -> str:
    files = sorted(RESULTS.glob("*.json"), key=lambda file: file.stem)
    return "\n\n".join([INTRO, *map(section, files)]) + "\n"


def section(file: Path) -> str:
    """What a script measured; of `SCRIPT-cuda` what it measured on a GPU, below what it did on the CPU."""
    found, script = json.loads(file.read_text()), f"{file.stem.partition('-')[0]}.py"
    about = ast.get_docstring(ast.parse(Path(__file__).with_name(script).read_text())) or ""
    told = "\n\n".join(text for text in about.split("\n\n") if not text.startswith(" "))
    machine = found["machine"]
    libraries = ", ".join(f"{name} {machine[name]}" for name in LIBRARIES if name in machine)
    return "\n".join(
        [
            *([f"## `{file.stem}`", "", told, ""] if file.stem == Path(script).stem else []),
            f"```sh\n{' '.join(['python', f'benchmarks/{script}', *found['arguments']])}\n```",
            "",
            "| | ours | s | other | s | ratio | aim |",
            "|---|---|---|---|---|---|---|",
            *map(row, found["ratios"]),
            "",
            f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gb']} GB; load "
            f"{machine['load']}; Python {machine['python']}, {libraries}.",
        ]
    )


def row(found: dict[str, Any]) -> str:
    ours, other, seconds, aim = found["ours"], found["other"], found["seconds"], found["aim"]
    ratio = f"{found['ratio']:.2f} ({found['least']:.2f} to {found['most']:.2f})"
    if aim and found["ratio"] > aim:
        ratio = f"**{ratio}**"
    return (
        f"| {found['what']} | {ours} | {seconds[ours]:.2f} | {other} | {seconds[other]:.2f} | {ratio} | "
        f"{aim or ''} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        PAGE.write_text(page())
    elif not PAGE.exists() or PAGE.read_text() != page():
        sys.exit(f"{PAGE}: not up to date; run {Path(__file__).name}")


if __name__ == "__main__":
    main()
