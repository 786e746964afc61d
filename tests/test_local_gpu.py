"""The profile `local-gpu`: jobs on one machine each have their own GPU."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
import yaml
from checkouts import Checkout, make_checkout

pytestmark = pytest.mark.slow

TRAININGS = [f"{judge}_fold_{fold}" for judge in ("llama", "qwen2") for fold in (0, 1)]


class Turn(NamedTuple):
    """The time in which a job had its device, in seconds since the epoch."""

    device: str
    began: float
    ended: float

    def is_beside(self, other: Turn) -> bool:
        """Whether they overlap for more than half of the shorter one: the times in logs are inexact."""
        shared = min(self.ended, other.ended) - max(self.began, other.began)
        return shared > min(self.ended - self.began, other.ended - other.began) / 2


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """The folds of two teachers, trained on two fake devices."""
    folder = tmp_path_factory.mktemp("local_gpu")
    checkout = make_checkout(folder / "checkout")
    config = yaml.safe_load((checkout.folder / "mini.yaml").read_text())
    config["defaults"]["compute"] |= {"gpus": 1, "threads": 1}
    config["defaults"] |= {"pretraining": None, "quantization": None}
    config["judges"] = {name: {"backbone": {"tiny": name}} for name in ("llama", "qwen2")}
    config |= {"final": "llama", "prediction": {"model": "merged"}}
    (checkout.folder / "mini.yaml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("TMPDIR", str(folder))
        options = ["--profile", "local-gpu", "--resources", "gpu=2", "mem_mb=100000"]
        checkout.run("teachers", *options)
    return checkout


def turn(checkout: Checkout, training: str) -> Turn:
    log = checkout.results / f"logs/train_teacher/{training}.log"
    claimed = re.findall(r"^GPUs: (.*)$", log.read_text(), re.MULTILINE)
    assert len(claimed) == 1, log.read_text()
    benchmark: Any = pd.read_csv(
        log.parents[2] / f"benchmarks/train_teacher/{training}.tsv", sep="\t"
    )
    ended = log.stat().st_mtime
    return Turn(claimed[0], ended - float(benchmark["s"][0]), ended)


def test_folds_are_trained_beside_each_other_on_devices_of_their_own(checkout: Checkout) -> None:
    turns = [turn(checkout, training) for training in TRAININGS]
    assert {turn.device for turn in turns} == {"0", "1"}
    beside = [pair for pair in itertools.combinations(turns, 2) if pair[0].is_beside(pair[1])]
    assert beside
    assert all(one.device != other.device for one, other in beside)


def test_nothing_but_the_adapters_is_left(checkout: Checkout) -> None:
    folds: list[Path] = sorted(checkout.results.glob("adapters/*/fold_?"))
    assert len(folds) == len(TRAININGS)
    assert not (checkout.results / ".checkpoints").exists()
