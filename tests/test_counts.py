"""What the battles are too few for is one line, before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from checkouts import ROOT

from arena_distill.battles.counts import count
from arena_distill.config.derived import RECIPES
from arena_distill.config.phases.battles import CountSettings
from arena_distill.config.run import load, overlay
from arena_distill.errors import InputError

RAW: dict[str, Any] = {
    "data": {"train": "x", "ut": "x", "test": "x", "unlabelled": "x"},
    "folds": {"n": 2},
    "judges": {
        "l": {"backbone": {"tiny": "llama"}},
        "p": {"backbone": {"tiny": "qwen2"}, "head": "pointwise", "training": {"share": 0.5}},
        "s": {"backbone": {"tiny": "gemma2"}, "teachers": ["l", "p"], "pretraining": None},
    },
    "final": "s",
}


def folds(train: int = 200, unlabelled: int = 60) -> pa.Table:
    """Half of the battles in each of two folds, then some without votes."""
    rows = train + unlabelled
    split = {b"arena_distill.split": json.dumps({"method": "kfold", "n": 2, "seed": 0}).encode()}
    return pa.table(
        {
            "source": ["train"] * train + ["unlabelled"] * unlabelled,
            "fold": np.array([i % 2 for i in range(train)] + [-3] * unlabelled, np.int8),
            "group": np.arange(rows),
        }
    ).replace_schema_metadata(split)


def counted(changes: dict[str, Any] | None = None, **rows: int) -> dict[str, Any]:
    settings = CountSettings.of(load(overlay(RAW, changes or {})))
    return count(folds(**rows), 70, settings)


def test_steps_and_rows_are_counted() -> None:
    counts = counted()
    # 100 of 200 battles train a fold, twice shown, twice: 2 * ceil(200 / 64).
    assert counts["steps"]["l"] == {"training": 8, "pretraining": 3}
    assert counts["steps"]["p"] == {"training": 2, "pretraining": 2}  # 50, once shown
    assert counts["steps"]["s"] == {"training": 10}  # 160, of which 60 without votes
    assert counts["quantization"] == {"samples": 100, "validation_rows": 100}
    assert counted(train=57477)["quantization"] == {"samples": 128, "validation_rows": 512}
    bare = {"defaults": {"quantization": None}, "prediction": {"model": "merged"}}
    assert counted(bare)["quantization"] is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"judges": {"l": {"training": {"warmup_steps": 8}}}},
            "config: judges.l.training.warmup_steps: 8, but 100 battles make 8 steps: lr would never",
        ),
        (
            {"judges": {"p": {"pretraining": {"warmup_steps": 100}}}},
            "config: judges.p.pretraining.warmup_steps: 100, but 70 battles make 2 steps",
        ),
        (
            {"defaults": {"quantization": {"samples": 128, "validation_rows": 512}}},
            "config: judges.*.quantization: samples 128 and validation_rows 512, but there are only 200",
        ),
    ],
)
def test_too_few_battles_are_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as error:
        counted(changes)
    (line,) = str(error.value).splitlines()
    assert line.startswith(words)


def test_all_of_it_is_told_at_once() -> None:
    changes = {"defaults": {"training": {"warmup_steps": 99}, "quantization": {"samples": 400}}}
    with pytest.raises(InputError) as error:
        counted(changes)
    assert len(str(error.value).splitlines()) == 4


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_published_recipes_keep_their_warm_up(recipe: Path) -> None:
    """Of full scale; that of the defaults is a share of the steps."""
    raw = yaml.safe_load((ROOT / "config/lmsys.yaml").read_text())
    config = load(overlay(raw, yaml.safe_load(recipe.read_text())))
    for judge in config.judges.values():
        assert judge.pretraining
        assert judge.training.warmup_steps == judge.pretraining.warmup_steps == 100
