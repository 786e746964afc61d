"""A run that is killed again and again, at any moment, ends with the files of one that was not.

And so the same seed gives the same files: the two runs share nothing else.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from checkouts import GPTQ, Checkout, make_checkout

KILLS = int(os.environ.get("ARENA_KILLS", "0"))
"""Kills of a whole run. Twenty (`make soak`) take a quarter of an hour on two idle cores; none: one kill of
a run that makes the logits of one fold alone."""

TARGETS = [] if KILLS else ["results/mini/logits/qwen2-teacher/fold_1.npy"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.gptq,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(not GPTQ.exists(), reason=f"no quantisation environment at {GPTQ}"),
]


@pytest.fixture
def victim(tmp_path: Path) -> Checkout:
    """A run of tests/mini.yaml that saves a checkpoint after every step."""
    checkout = make_checkout(tmp_path / "checkout")
    config = yaml.safe_load((checkout.folder / "mini.yaml").read_text())
    config["defaults"]["compute"]["checkpoint_minutes"] = 0
    (checkout.folder / "mini.yaml").write_text(yaml.safe_dump(config))
    return checkout


def done(checkout: Checkout) -> int:
    """Jobs that have ended well, over all attempts: each leaves its benchmark."""
    return len(list(checkout.results.glob("benchmarks/**/*.tsv")))


def kill_at(checkout: Checkout, jobs: float, rng: random.Random) -> bool:
    """Start the run, and kill it some seconds after as many jobs are done; False: it was through."""
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--cores",
        "2",
        *TARGETS,
        "--configfile",
        "mini.yaml",
    ]
    with open(checkout.folder / "snakemake.log", "a") as log:
        snakemake = subprocess.Popen(
            command, cwd=checkout.folder, stdout=log, stderr=log, start_new_session=True
        )
    while snakemake.poll() is None and done(checkout) < jobs:
        time.sleep(0.2)
    deadline = time.monotonic() + rng.uniform(0, 6)
    while snakemake.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    if snakemake.poll() is not None:
        assert snakemake.returncode == 0, (checkout.folder / "snakemake.log").read_text()[-5000:]
        return False
    # The power fails; or Snakemake alone dies, and its jobs go on while their successors start.
    if rng.random() < 0.5:
        os.killpg(snakemake.pid, signal.SIGKILL)
    else:
        snakemake.kill()
    snakemake.wait()
    locks = checkout.folder / ".snakemake/locks"
    shutil.rmtree(locks, ignore_errors=True)  # what --unlock does, in no time
    return True


ALWAYS = [
    "battles.parquet",
    "folds.parquet",
    "adapters/qwen2-teacher/pretrained/adapter_model.safetensors",
    "adapters/qwen2-teacher/fold_1/adapter_model.safetensors",
    "logits/qwen2-teacher/fold_1.npy",
]
WHOLE = [
    "submission.csv",
    "adapters/llama-teacher/fold_0/adapter_model.safetensors",
    "adapters/gemma2-student/fold_1/adapter_model.safetensors",
    "logits/gemma2-student/gptq_test.npy",
    "merged/gemma2-student/model.safetensors",
]


def assert_same(victim: Checkout, finished: Checkout) -> None:
    for name in [*ALWAYS, *(WHOLE if KILLS else [])]:
        assert (victim.results / name).read_bytes() == (finished.results / name).read_bytes(), name


def test_kills_at_random_moments_change_nothing(victim: Checkout, finished: Checkout) -> None:
    rng = random.Random(20)
    jobs, kills, wanted = sum(victim.would_run(*TARGETS).values()), 0, max(KILLS, 1)
    while kills < wanted:
        if kill_at(victim, jobs * (kills + 0.5) / wanted, rng):
            kills += 1
        else:  # through before its turn to be killed came: once more
            assert_same(victim, finished)
            shutil.rmtree(victim.results)
    victim.run(*TARGETS)
    assert_same(victim, finished)
    assert "Nothing to be done" in victim.run(*TARGETS)
