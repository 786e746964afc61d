"""Measure reading, folds, the leak audit and tokenisation of more and more battles.

    python benchmarks/sizes.py --keep                                # 10,000, 30,000 and 100,000 battles
    python benchmarks/sizes.py --rows 10000 100000 1000000 --tokenizer models/tokenizers/llama3
    python benchmarks/sizes.py --rows 100000 --profile               # and where the time goes

The battles are made up, the same ones for a seed: parquet shards of lists of texts, as long as those of
the Chatbot Arena, with a long tail; 15 % have several turns, and a fifth have a popular prompt, half of
these nearly the same one. Each phase is the command of its rule, in a process of its own. Its time should
grow with the battles (exponent 1), its memory should not. Memory is the resident set at its peak,
libraries included. The files are in a temporary folder, at one million battles about 12 GB.

Times depend on the machine, and on what else it does: compare CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import pstats
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from measured import Used, keep, used_by

TINY = Path(__file__).resolve().parents[1] / "workflow/arena_distill/models/tiny/llama"
SHARD = 20_000
"""Battles per file."""
SHARES = {"train": 0.85, "extra": 0.1, "test": 0.05}
"""Of the battles, by source."""
POPULAR = 0.05
"""Popular prompts per battle."""
WORDS = 20_000
PROMPT, ANSWER = (15, 1.2), (105, 1.05)
"""Median of a text's words, and the standard deviation of their logarithm."""
LONGEST = 3_000

HEADER = """\
                                                                           against the size before
    rows  phase                  wall s   CPU s  battles/s  peak MB  out MB  CPU×  exponent  peak×"""


# --- made-up battles ------------------------------------------------------------------------------


class Writer:
    """Writes texts of made-up words, some with letters beyond ASCII."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        begins, middles = list("bcdfghjklmnprstvw"), list("aeiou")
        syllables = [a + b + c for a in begins for b in middles for c in ("", "", "n", "r", "st")]
        words = ["".join(rng.choice(syllables, rng.integers(2, 5))) for _ in range(WORDS)]
        words[100::500] = (word + "né" for word in words[100::500])
        words[300::500] = (chr(0x4E00 + n) * 2 for n in range(len(words[300::500])))
        ends = ("", "", "", "", "", "", ",", ".", ".\n", "!")
        words = [word + ends[n % len(ends)] for n, word in enumerate(words)]
        self.words = pa.array(words)
        frequency = 1 / np.arange(3, WORDS + 3) ** 1.1
        times = np.ceil(2e6 * frequency / frequency.sum()).astype(int)
        self.drawn = np.repeat(np.arange(WORDS), times)

    def texts(self, rng: np.random.Generator, count: int, length: tuple[int, float]) -> pa.Array:
        median, spread = length
        words = np.exp(rng.normal(np.log(median), spread, count)).astype(np.int64)
        ends = np.cumsum(np.clip(words, 1, LONGEST))
        some = self.words.take(pa.array(rng.choice(self.drawn, ends[-1])))
        lists = pa.ListArray.from_arrays(np.concatenate([[0], ends]).astype(np.int32), some)
        return pc.binary_join(lists, " ")


def make_up(folder: Path, rows: int, seed: int) -> None:
    """Write the battles of each source, a shard at a time."""
    writer = Writer()
    popular = writer.texts(np.random.default_rng(seed), max(1, int(rows * POPULAR)), PROMPT)
    for number, (source, share) in enumerate(SHARES.items()):
        (folder / source).mkdir(parents=True)
        for start in range(0, size := round(rows * share), SHARD):
            rng = np.random.default_rng([seed, number, start])
            table = shard(writer, rng, min(SHARD, size - start), popular, f"{source}-{start}-")
            pq.write_table(table, folder / source / f"{start:08}.parquet")


def shard(
    writer: Writer, rng: np.random.Generator, rows: int, popular: pa.Array, name: str
) -> pa.Table:
    turns = np.where(rng.random(rows) < 0.15, rng.integers(2, 4, rows), 1)
    offsets = np.concatenate([[0], np.cumsum(turns)])
    kind = rng.random(rows)
    prompts = writer.texts(rng, offsets[-1], PROMPT).to_numpy(zero_copy_only=False)
    first = popular.take(pa.array(rng.integers(len(popular), size=rows))).to_numpy(False)
    likes = np.flatnonzero(kind < 0.2)
    prompts[offsets[likes]] = first[likes]
    nearly = np.flatnonzero(kind < 0.1)
    prompts[offsets[nearly]] += " please"
    models = pa.array([f"model-{n}" for n in range(20)])

    def lists(texts: pa.Array) -> pa.Array:
        return pa.LargeListArray.from_arrays(offsets, texts.cast(pa.large_string()))

    return pa.table(
        {
            "id": [f"{name}{n}" for n in range(rows)],
            "prompt": lists(pa.array(prompts, pa.string())),
            "response_a": lists(writer.texts(rng, offsets[-1], ANSWER)),
            "response_b": lists(writer.texts(rng, offsets[-1], ANSWER)),
            "model_a": models.take(pa.array(rng.integers(20, size=rows))),
            "model_b": models.take(pa.array(rng.integers(20, size=rows))),
            "winner": pa.array(["model_a", "model_b", "tie"]).take(
                pa.array(rng.integers(3, size=rows))
            ),
        }
    )


# --- phases ---------------------------------------------------------------------------------------


def row(rows: int, phase: str, used: Used, output: Path, smaller: Mapping[int, Used]) -> str:
    text = (
        f"{rows:9,} {phase:22} {used.wall:7.1f} {used.cpu:7.1f} {rows / used.wall:10,.0f}"
        f" {used.peak:8,.0f} {output.stat().st_size / 2**20:7,.0f}"
    )
    if smaller:
        fewer, before = list(smaller.items())[-1]
        growth = used.cpu / before.cpu
        exponent = math.log(growth) / math.log(rows / fewer)
        text += f" {growth:5.1f} {exponent:9.2f} {used.peak / before.peak:6.2f}"
    return text


def phases(folder: Path, tokenizers: list[Path]) -> dict[str, tuple[list[str], Path]]:
    """Each phase's options and its output."""
    battles, folds = folder / "battles.parquet", folder / "folds.parquet"
    near = {"version": 1, "method": "stratified_group"}
    near |= {"near_duplicates": True, "audit": {}}
    made = {
        "read-battles": (
            [
                *(f"--{s}={f}" for s in SHARES for f in sorted((folder / s).iterdir())),
                f"--rejected={folder / 'rejected.parquet'}",
                f"--reading={folder / 'reading.json'}",
            ],
            battles,
        ),
        "assign-folds": ([f"--battles={battles}"], folds),
        "assign-folds near": (
            [f"--battles={battles}", f"--settings={json.dumps(near)}"],
            folder / "near.parquet",
        ),
        "audit-leaks": (
            [f"--battles={battles}", f"--folds={folds}", f"--table={folder / 'leaks.csv'}"],
            folder / "audit.json",
        ),
    }
    for tokenizer in tokenizers:
        made[f"tokenize-battles {tokenizer.name}"] = (
            [f"--battles={battles}", f"--backbone={tokenizer}"],
            folder / f"tokens-{tokenizer.name}.parquet",
        )
    return {
        name: (
            [name.split()[0], f"--output={output}", '--settings={"version": 1}', *options],
            output,
        )
        for name, (options, output) in made.items()
    }


def print_profile(path: Path) -> None:
    """The functions that themselves took most of the time."""
    stats = pstats.Stats(str(path)).stats  # type: ignore[attr-defined]
    for (file, line, name), (_, calls, own, total, _) in sorted(
        stats.items(), key=lambda item: -item[1][2]
    )[:10]:
        where = "/".join(Path(file).parts[-2:])
        print(f"{own:8.1f} s ({total:7.1f} with calls) {calls:9,} × {where}:{line} {name}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, nargs="+", default=[TINY])
    parser.add_argument("--phases", nargs="+", help="only these, such as audit-leaks")
    parser.add_argument("--profile", action="store_true", help="run in Python's profiler")
    parser.add_argument("--keep", action="store_true", help="for docs/performance.md")
    parser.add_argument("--folder", type=Path, help="keep the files here, and use those there are")
    arguments = parser.parse_args()
    print(HEADER)
    taken: dict[str, dict[int, Used]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for rows in arguments.rows:
            folder = (arguments.folder or Path(temporary)) / str(rows)
            if not folder.exists():
                # In a process of its own: a child's peak counts what its parent held when it began.
                maker = multiprocessing.get_context("spawn").Process(
                    target=make_up, args=(folder, rows, arguments.seed)
                )
                maker.start()
                maker.join()
                if maker.exitcode:
                    sys.exit("no battles were made up")
            for name, (command, output) in phases(folder, arguments.tokenizer).items():
                if arguments.phases and not {name, name.split()[0]} & set(arguments.phases):
                    continue
                profile = ["-m", "cProfile", "-o", str(folder / "profile")]
                python = [sys.executable, *(profile if arguments.profile else [])]
                used = used_by(*python, "-m", "arena_distill", "phase", *command)
                growth = taken.setdefault(name, {})
                print(row(rows, name, used, output, growth), flush=True)
                growth[rows] = used
                if arguments.profile:
                    print_profile(folder / "profile")
    if arguments.keep:
        keep(__file__, [], growth=taken)


if __name__ == "__main__":
    main()
