"""Measure what a job costs before its first own work: its imports, beside those of the libraries it needs.

    python benchmarks/fixed_cost.py [--rounds 3]

The aims are those beside `import torch, transformers`, which imports no model's code. That code alone, with
what it imports of torch, misses them.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from measured import by_turns, cpu_of, keep, ratio

JOB = """
from arena_distill import cli
def imports(**_):
    import {}
cli.app = imports  # what a command does first
cli.main()
"""

WAYS = {
    "training": JOB.format("arena_distill.training.trainer"),
    "scoring": JOB.format("arena_distill.scoring.logits, transformers.models.llama.modeling_llama"),
    "folds": JOB.format("arena_distill.battles.folds"),
    "torch, transformers": "import torch, transformers",
    "a model of transformers": "import transformers.models.llama.modeling_llama",
    "numpy, pyarrow, pydantic, typer": "import numpy, pyarrow.compute, pydantic, typer",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    ways = {name: partial(cpu_of, sys.executable, "-c", code) for name, code in WAYS.items()}
    ways["--help"] = partial(cpu_of, sys.executable, "-m", "arena_distill", "--help")
    taken = by_turns(ways, rounds)
    compared = [
        ("start of a training job", "training", "torch, transformers", 1.3),
        ("start of a training job", "training", "a model of transformers", None),
        ("start of a scoring job", "scoring", "torch, transformers", 1.2),
        ("start of a scoring job", "scoring", "a model of transformers", None),
        ("start of a job without torch", "folds", "numpy, pyarrow, pydantic, typer", None),
        ("arena-distill --help", "--help", "numpy, pyarrow, pydantic, typer", None),
    ]
    keep(__file__, [ratio(what, taken, ours, other, aim) for what, ours, other, aim in compared])


if __name__ == "__main__":
    main()
