"""Battles and tokenizers for several benchmarks: real ones where they are, else those of the arena."""

from __future__ import annotations

import json
from pathlib import Path

from measured import ROOT

from arena_distill.battles.simulation import simulate
from arena_distill.config.backbone import TINY

TOKENIZERS = sorted(ROOT.glob("models/tokenizers/*")) or [
    TINY / name for name in ("gemma2", "llama", "qwen2")
]
"""Those that `scripts/fetch_tokenizers.sh` fetched, else those of the tiny backbones."""


def battles(folder: Path) -> list[Path]:
    """The file `data/train.csv` where it is, else one of a thousand battles, written to a folder."""
    return [*ROOT.glob("data/train.csv")] or battle_files(folder, 1_000)


def battle_files(
    folder: Path, rows: int, files: int = 1, kind: str = "csv", seed: int = 0
) -> list[Path]:
    """Write battles of the synthetic arena in the Kaggle schema, as `csv` or `jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number in range(files):
        first, end = (rows * n // files for n in (number, number + 1))
        frame = simulate(
            rows=end - first, seed=seed + number, voters="arena", id_offset=first
        ).frame[["id", "prompt", "response_a", "response_b"]]
        for name in ("prompt", "response_a", "response_b"):
            frame[name] = frame[name].map(json.dumps)
        written.append(folder / f"{number:04}.{kind}")
        if kind == "csv":
            frame.to_csv(written[-1], index=False)
        else:
            frame.to_json(written[-1], orient="records", lines=True)
    return written
