"""Dry runs of the full-scale configuration: a new clone without data or models lists all jobs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkouts import ROOT, Checkout, make_checkout, warm_python

from arena_distill.config.run import Config, load, overlay

CONFIG = "config/lmsys.yaml"
RECIPES: dict[str, list[str]] = {
    "alone": [],
    "summary": ["config/recipes/summary.yaml", "config/recipes/lmsys/summary.yaml"],
    "blackpearl": ["config/recipes/blackpearl.yaml"],
    "best": ["config/recipes/best.yaml"],
}
TEACHERS = ("llama3-70b", "qwen2-72b")

JOBS = {
    "fetch_battles": 2,
    "fetch_data_set": 2,
    "download_backbone": 3,
    "tokenize_battles": 3,
    "pretrain_adapter": 3,
    "train_teacher": 10,
    "distill_student": 5,
    "predict_shard": 2 * 5 * 8 + 5 * 4,
    "gather_logits": 15,
    "merge_folds": 1,
    "quantize_model": 1,
    "check_drift": 1,
    "score_test_merged": 1,
    "score_test_gptq": 1,
    "write_submission": 1,
}


def configuration(recipe: str) -> Config:
    raw: dict[str, Any] = {}
    for path in (CONFIG, *RECIPES[recipe]):
        raw = overlay(raw, yaml.safe_load((ROOT / path).read_text()))
    return load(raw)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return make_checkout(tmp_path_factory.mktemp("fullscale") / "clone")


def dry_run(clone: Checkout, recipe: str) -> str:
    files = [CONFIG, *RECIPES[recipe]]
    command = [
        warm_python(),
        "-m",
        "snakemake",
        "-n",
        "--profile",
        "slurm",
        "--configfile",
        *files,
    ]
    done = subprocess.run(command, cwd=clone.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_fresh_clone_shows_the_whole_graph(clone: Checkout, recipe: str) -> None:
    output = dry_run(clone, recipe)
    counted = dict(re.findall(r"^(\w+) +(\d+)$", output, re.MULTILINE))
    assert JOBS.items() <= {rule: int(n) for rule, n in counted.items()}.items()
    assert not (clone.folder / "data").exists()


@pytest.mark.slow
def test_jobs_say_what_they_ask_for(clone: Checkout) -> None:
    told = set(re.findall(r"^Job \d+: (.*)$", dry_run(clone, "blackpearl"), re.MULTILINE))
    large = "320000 MB, 200000 MB of disk, 2880 min"
    small = "120000 MB, 60000 MB of disk, 1440 min"
    assert told >= {
        f"Post-pretraining qwen2-72b on UT battles (8 GPUs, {large})",
        f"Training teacher llama3-70b, fold 4 (8 GPUs, {large})",
        f"Scoring battles with llama3-70b, fold 0, shard 7 (1 GPUs, {large})",
        f"Distilling student gemma2-9b, fold 0 (8 GPUs, {small})",
        f"Scoring battles with gemma2-9b, fold 4, shard 3 (1 GPUs, {small})",
        f"Merging 5 folds of gemma2-9b (0 GPUs, {small})",
        f"Quantising gemma2-9b with GPTQ (1 GPUs, {small})",
        f"Scoring test battles with the quantised gemma2-9b (1 GPUs, {small})",
        "Downloading backbone Meta-Llama-3-70B-Instruct (200000 MB of disk)",
        "Downloading backbone gemma-2-9b-it (60000 MB of disk)",
        "Fetching data/lmsys/train.csv",
    }


@pytest.mark.slow
def test_a_part_of_a_model_is_cut_from_one_download(clone: Checkout) -> None:
    """A teacher and a smaller student cut from the same model: one download."""
    raw = yaml.safe_load((ROOT / CONFIG).read_text())
    raw["judges"] = {
        "whole": {"backbone": raw["judges"]["gemma2-9b"]["backbone"]},
        "small": {"backbone": raw["judges"]["gemma2-9b"]["backbone"] | {"layers": 12}},
    }
    raw["final"] = "small"
    (clone.folder / "parts.yaml").write_text(yaml.safe_dump(raw))
    command = [warm_python(), "-m", "snakemake", "-n", "--configfile", "parts.yaml"]
    done = subprocess.run(command, cwd=clone.folder, capture_output=True, text=True)
    counted = dict(re.findall(r"^(\w+) +(\d+)$", done.stdout, re.MULTILINE))
    assert (counted["download_backbone"], counted["cut_download"]) == ("1", "1"), done.stderr
    assert "prepare_backbone" not in counted


@pytest.mark.parametrize("recipe", RECIPES)
def test_models_and_data_are_pinned(recipe: str) -> None:
    config = configuration(recipe)
    revisions = [judge.backbone.revision for judge in config.judges.values() if judge.backbone]
    assert all(source.is_remote for source in config.data.files())
    revisions += [source.revision for source in config.data.files() if source.hub]
    assert all(re.fullmatch("[0-9a-f]{40}", str(revision)) for revision in revisions)


@pytest.mark.parametrize(
    ("recipe", "lr", "epochs", "targets", "folds"),
    [
        ("summary", 5e-5, 2, "out_of_fold", ("kfold", 42)),
        ("blackpearl", 1e-5, 1, "in_sample", ("stratified", 2025)),
    ],
)
def test_both_historical_recipes_are_reached(
    recipe: str, lr: float, epochs: float, targets: str, folds: tuple[str, int]
) -> None:
    config = configuration(recipe)
    assert (config.folds.method, config.folds.seed, config.folds.n) == (*folds, 5)
    for name in TEACHERS:
        teacher = config.judges[name]
        assert (teacher.training.lr, teacher.training.epochs) == (lr, epochs)
        assert teacher.precision == "nf4"
    student = config.judges["gemma2-9b"]
    assert student.teachers == TEACHERS
    assert (student.training.lr, student.training.epochs) == (5e-5, 2)
    assert student.targets == targets
    assert (student.lora.r, student.lora.alpha, student.precision) == (64, 128, "bf16")
    for judge in config.judges.values():
        assert (judge.training.batch_size, judge.encoding.max_length) == (64, 1024)
        assert judge.pretraining and judge.pretraining.lr == 1e-5
        assert judge.training.betas == (0.9, 0.95)
        assert judge.compute.gradient_checkpointing


def test_the_shipped_file_names_no_machine() -> None:
    text = Path(ROOT / CONFIG).read_text()
    assert not re.search(r"(?m)[: \[]/(home|scratch|work|mnt)\b", text)
