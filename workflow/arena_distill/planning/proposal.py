"""A first configuration for somebody's battles and this machine."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import yaml
from jinja2 import Template

from arena_distill.battles.reading import read_battles
from arena_distill.battles.votes import votes_of
from arena_distill.config.backbone import TINY
from arena_distill.config.checks import findings
from arena_distill.config.model_files import ModelFolder
from arena_distill.config.run import load
from arena_distill.config.source import SUFFIXES
from arena_distill.errors import InputError
from arena_distill.files.artifacts import provenance, write_parquet, write_text
from arena_distill.verdicts import WINNERS

TEMPLATE = Path(__file__).parent / "templates/arena.yaml"

FEWEST, FEW = 50, 1000
"""Battles: with fewer than the first nothing can be measured; fewer than the second are few."""


@dataclass(frozen=True)
class Files:
    """The files of a run's battles; `solution` where the votes of the test battles are known."""

    train: str
    test: str
    solution: str | None = None


@dataclass(frozen=True)
class Machine:
    """What jobs may use of this machine."""

    cores: int
    gpus: int
    memory_mb: int


def propose(
    battles: str,
    output: Path,
    *,
    test: str | None = None,
    holdout_test: float | None = None,
    backbone: str | None = None,
) -> None:
    """Write a commented configuration, and print what to do with it.

    Args:
        battles: labelled battles: a file, a folder of shards or a pattern.
        test: battles to predict.
        holdout_test: in its place, the share of the prompts whose battles become test battles; three files
            are written beside `battles`.
        backbone: the folder of a local model; None: tiny models of the package.

    Raises:
        InputError: `output` exists; there are no test battles; the battles cannot be read, or are too few;
            the model cannot be a judge.
    """
    if output.exists():
        raise InputError(f"{output} exists: remove it, or give another --output")
    if (test is None) == (holdout_test is None):
        raise InputError(
            f"{battles}: no test battles: give either --test FILE with the battles to predict, or "
            "--holdout-test 0.1 to hold out a tenth of the prompts and write both files beside this one"
        )
    table, refused = read_battles({"train": [battles]})
    print(f"{battles}: {len(table):,} battles, {len(refused):,} rows refused")
    if len(refused):
        print(
            f"  why, and how the others are understood: arena-distill formats {shlex.quote(battles)}"
        )
    if len(table) < FEWEST:
        raise InputError(f"{battles}: {len(table)} battles; at least {FEWEST} are needed")
    files, held = Files(battles, test or ""), np.zeros(len(table), bool)
    if holdout_test is not None:
        files, held = _beside(battles), _hold_out(table, holdout_test)
    run = re.sub(r"[^A-Za-z0-9._-]+", "-", output.stem).strip("._-") or "arena"
    ties = bool(votes_of(table).probabilities[:, 2].any())
    text = _render(files, int((~held).sum()), run, backbone, _machine(), ties=ties)
    written = vars(files).values() if holdout_test else ()
    found = findings(load(yaml.safe_load(text)), lambda path: path in written, os.path.abspath)
    if found:
        raise InputError("\n".join(finding.line for finding in found))
    if holdout_test:
        _split(table, held, files)
    write_text(text, output)
    print(f"wrote {output}. Next:")
    print(f"  arena-distill check --configfile {shlex.quote(str(output))}")
    print(f"  snakemake --cores all --configfile {shlex.quote(str(output))}")


def _beside(battles: str) -> Files:
    """The files that some battles are split into, beside them.

    Raises:
        InputError: one of them exists.
    """
    stem = battles
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        stem = stem.removesuffix(suffix)
    stem = re.sub(r"[*?\[\]]+", "", stem).rstrip("/-_.") or "battles"
    files = Files(*(f"{stem}-{part}.parquet" for part in ("train", "test", "solution")))
    for path in vars(files).values():
        if Path(path).exists():
            raise InputError(f"{path} exists: remove it, or use it by --test")
    return files


def _hold_out(table: pa.Table, share: float) -> np.ndarray:
    """Which battles are for the test: those of a share of the prompts; bool (rows,)."""
    if not 0 < share < 1:
        raise InputError(f"--holdout-test {share:g}: a share between 0 and 1 expected")
    prompts = np.random.default_rng(2025).permutation(np.unique(table["group"].to_numpy()))
    return np.isin(table["group"].to_numpy(), prompts[: max(1, round(share * len(prompts)))])


def _split(table: pa.Table, held: np.ndarray, files: Files) -> None:
    """Write the battles to train on, those to predict, and the votes of these."""
    texts = table.select(["id", "prompt", "response_a", "response_b"])
    voted = texts
    for name, shares in zip(WINNERS, votes_of(table).probabilities.T, strict=True):
        voted = voted.append_column(name, pa.array(shares))
    for name in ("weight", "model_a", "model_b", "language", "category"):
        if table[name].null_count < len(table):
            voted = voted.append_column(name, table[name])
    parts = {
        files.train: voted.filter(pa.array(~held)),
        files.test: texts.filter(pa.array(held)),
        str(files.solution): voted.select(["id", *WINNERS]).filter(pa.array(held)),
    }
    for path, rows in parts.items():
        write_parquet(rows, path, provenance("split", {}))
        print(f"wrote {path}: {len(rows):,} battles")


def _machine() -> Machine:
    gpus = 0
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(
            ["nvidia-smi", "-L"], stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        gpus = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    return Machine(len(os.sched_getaffinity(0)), gpus, psutil.virtual_memory().total // 1_000_000)


def _render(
    files: Files, battles: int, run: str, backbone: str | None, machine: Machine, *, ties: bool
) -> str:
    """The configuration.

    Args:
        battles: to train on.
        ties: whether some of them are ties.
    """
    few = battles < FEW
    model = ModelFolder(Path(backbone) if backbone else TINY / "gemma2")
    gpus = 1 if backbone and machine.gpus else 0
    positions = model.config.get("max_position_embeddings") or 1024
    weights = sum(file.stat().st_size for file in model.files or () if file.is_file())
    return Template(
        TEMPLATE.read_text(encoding="utf-8"), trim_blocks=True, keep_trailing_newline=True
    ).render(
        files=files,
        battles=battles,
        run=run,
        backbone=backbone,
        machine=machine,
        few=few,
        ties=ties,
        longest=min(positions, 1024 if gpus else 256),
        batch_size=8 if few else 64,
        threads=machine.cores if backbone and not gpus else 1,
        gpus=gpus,
        memory=min(machine.memory_mb, 2000 + 4 * weights // 1_000_000),
    )
