"""Compare the dry run of a large graph with that of empty rules for as many jobs.

    python benchmarks/large_graph.py [--teachers 8] [--folds 20] [--shards 8]

Both sides are a fresh `snakemake -n --quiet rules` in an empty folder. The empty rules have the trainings,
shards and logits of the same judges, with the files that these read of one another as inputs, and nothing
else: no configuration, no resources, params, logs or messages. So the ratio is what validation, settings,
resources and checks cost. Each fold of a student reads every fold of its teachers: these inputs grow with
the square of the folds.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from measured import ROOT, by_turns, cpu_of, keep, ratio

from arena_distill.config.backbone import TINY

EMPTY = """\
JUDGES, FOLDS, SHARDS = config["judges"], range(config["folds"]), range(config["shards"])


rule all:
    input: expand("logits/{judge}/{fold}", judge=JUDGES, fold=FOLDS)


rule train:
    input: lambda w: expand("logits/{judge}/{fold}", judge=JUDGES[w.judge], fold=FOLDS)
    output: "adapters/{judge}/{fold}"
    shell: ""


rule score:
    input: "adapters/{judge}/{fold}"
    output: "shards/{judge}/{fold}/{shard}"
    shell: ""


rule gather:
    input: lambda w: expand("shards/{judge}/{fold}/{shard}", **w, shard=SHARDS)
    output: "logits/{judge}/{fold}"
    shell: ""
"""


def judges_of(teachers: int) -> dict[str, list[str]]:
    """The teachers of each judge: the first student has all of them, the second half of them."""
    names = [f"teacher-{n}" for n in range(teachers)]
    return {name: [] for name in names} | {"student-0": names, "student-1": names[::2]}


def ours(judges: dict[str, list[str]], folds: int, shards: int) -> dict[str, Any]:
    """A configuration of the workflow."""
    tiny = itertools.cycle(sorted(folder.name for folder in TINY.iterdir()))
    return {
        "data": {"arena": {}},
        "folds": {"n": folds},
        "defaults": {"logits": {"shards": shards}, "quantization": {"group_size": 32}},
        # Other ranks, other adapters: no two judges share their post-pretraining.
        "judges": {
            name: {"backbone": {"tiny": next(tiny)}, "lora": {"r": rank}, "teachers": teachers}
            for rank, (name, teachers) in enumerate(judges.items(), 8)
        },
        "final": "student-0",
    }


def dry_run(snakefile: Path, config: dict[str, Any]) -> float:
    """CPU seconds of a dry run in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.yaml")
        file.write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "snakemake", "--snakefile", str(snakefile), "-n"]
        command += ["--quiet", "rules", "--directory", folder, "--configfile", str(file)]
        return cpu_of(*command)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--teachers", type=int, default=8)
    parser.add_argument("--folds", type=int, default=20)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    judges, folds, shards = judges_of(arguments.teachers), arguments.folds, arguments.shards
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder, "Snakefile")
        empty.write_text(EMPTY)
        sizes = {"judges": judges, "folds": folds, "shards": shards}
        taken = by_turns(
            {
                "this workflow": partial(dry_run, ROOT / "Snakefile", ours(judges, folds, shards)),
                "empty rules": partial(dry_run, empty, sizes),
            },
            arguments.rounds,
        )
    what = f"dry run, {len(judges)} judges × {folds} folds × {shards} shards"
    keep(__file__, [ratio(what, taken, "this workflow", "empty rules")])


if __name__ == "__main__":
    main()
