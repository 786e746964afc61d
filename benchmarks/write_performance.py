"""Write docs/performance.md and docs/memory.svg from the measurements in benchmarks/results.

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

from measured import LIBRARIES, RESULTS, ROOT

PAGE = ROOT / "docs/performance.md"
DRAWING = ROOT / "docs/memory.svg"

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
    python = about.split("\n    ")[1].split()[0]
    told = "\n\n".join(text for text in about.split("\n\n") if not text.startswith(" "))
    machine = found["machine"]
    libraries = ", ".join(f"{name} {machine[name]}" for name in LIBRARIES if name in machine)
    return "\n".join(
        [
            *([f"## `{file.stem}`", "", told, ""] if file.stem == Path(script).stem else []),
            f"```sh\n{' '.join([python, f'benchmarks/{script}', *found['arguments']])}\n```",
            "",
            *(table(found["ratios"]) if found["ratios"] else growth(found["growth"])),
            "",
            f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gb']} GB; load "
            f"{machine['load']}; Python {machine['python']}, {libraries}.",
        ]
    )


def table(ratios: list[dict[str, Any]]) -> list[str]:
    header = ["| | ours | s | other | s | ratio | aim |", "|---|---|---|---|---|---|---|"]
    return [*header, *map(row, ratios)]


def growth(phases: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """A table of the phases, a column for each number of battles, and the picture of their memory."""
    sizes = [f"{int(rows):,}" for rows in next(iter(phases.values()))]
    used = {
        name: [f"{one['cpu']:.1f} s, {one['peak']:,} MB" for one in of.values()]
        for name, of in phases.items()
    }
    return [
        f"| battles | {' | '.join(sizes)} |",
        "|---" * (len(sizes) + 1) + "|",
        *(f"| `{name}` | {' | '.join(cells)} |" for name, cells in used.items()),
        "",
        f"![Peak memory of each phase against the number of battles]({DRAWING.name})",
    ]


def draw(phases: dict[str, dict[str, dict[str, float]]]) -> None:
    """Draw peak memory against battles, both on logarithmic axes."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "growth", "font.size": 9}
    figure = Figure(figsize=(7.5, 3), layout="constrained")
    axes = figure.subplots()
    for name, of in phases.items():
        axes.plot(list(map(int, of)), [one["peak"] for one in of.values()], marker=".", label=name)
    rows = list(map(int, next(iter(phases.values()))))
    line = {"color": "0.6", "linestyle": ":", "label": "as the battles"}
    axes.plot(rows, [200 * n / rows[0] for n in rows], **line)
    axes.set(
        xscale="log", yscale="log", xlabel="battles", ylabel="MB at the peak", ylim=(100, 4000)
    )
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(DRAWING, metadata={"Date": None})


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
        draw(json.loads((RESULTS / "sizes.json").read_text())["growth"])
    elif not PAGE.exists() or PAGE.read_text() != page():
        sys.exit(f"{PAGE}: not up to date; run {Path(__file__).name}")


if __name__ == "__main__":
    main()
