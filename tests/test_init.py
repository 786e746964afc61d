"""`arena-distill init`: a configuration for somebody's battles that loads, checks clean and can be run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Literal

import pytest
import yaml
from checkouts import ROOT, warm_python

from arena_distill.battles.reading import read_battles
from arena_distill.battles.simulation import write_arena
from arena_distill.battles.solution import read_solution
from arena_distill.battles.votes import votes_of
from arena_distill.config.backbone import TINY
from arena_distill.config.checks import findings
from arena_distill.config.phases.battles import ArenaSettings
from arena_distill.config.run import Config, load
from arena_distill.errors import InputError
from arena_distill.planning import proposal
from arena_distill.planning.proposal import Machine, propose


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with 200 battles of somebody, and 40 to predict."""
    settings = ArenaSettings(version=1, seed=3, train=200, extra=0, ut=0, test=40)
    write_arena(tmp_path / "arena", settings=settings)
    (tmp_path / "arena/train.csv").rename(tmp_path / "it's mine.csv")
    (tmp_path / "arena/test.csv").rename(tmp_path / "test.csv")
    monkeypatch.chdir(tmp_path)
    return tmp_path


BATTLES, OUTPUT = "it's mine.csv", Path("arena.yaml")
SPLIT = [f"it's mine-{part}.parquet" for part in ("train", "test", "solution")]


def written() -> Config:
    config = load(yaml.safe_load(OUTPUT.read_text()))
    assert not findings(config, lambda path: False, str)
    return config


def test_without_test_battles_nothing_is_split_or_written(here: Path) -> None:
    before = set(here.iterdir())
    with pytest.raises(
        InputError, match=r"no test battles: give either --test FILE .* --holdout-test"
    ):
        propose(BATTLES, OUTPUT)
    assert set(here.iterdir()) == before


@pytest.mark.parametrize("classes", [3, 2])
def test_battles_without_ties_make_a_run_of_two_classes(classes: Literal[3, 2]) -> None:
    write_arena(Path("new"), settings=ArenaSettings(version=1, train=80, test=9, classes=classes))
    propose("new/train.csv", OUTPUT, holdout_test=0.2)
    assert written().classes == classes


def test_prompts_are_held_out_whole_and_votes_kept(here: Path) -> None:
    propose(BATTLES, OUTPUT, holdout_test=0.1)
    config = written()
    given = (config.data.train[0], config.data.test[0], config.data.solution)
    assert [file and file.path for file in given] == SPLIT
    whole, _ = read_battles({"train": [BATTLES]})
    parts, rejected = read_battles({"train": [SPLIT[0]], "test": [SPLIT[1]]})
    assert not len(rejected)
    groups = parts["group"].to_numpy()
    train = parts["source"].to_numpy() == "train"
    assert not set(groups[train]) & set(groups[~train])
    assert 10 <= (~train).sum() <= 40
    votes = dict(zip(whole["id"].to_pylist(), votes_of(whole).labels.tolist(), strict=True))
    kept = dict(zip(parts["id"].to_pylist(), votes_of(parts).labels.tolist(), strict=True))
    ids, solution = read_solution(SPLIT[2])
    kept |= dict(zip(ids.to_pylist(), solution.labels.tolist(), strict=True))
    assert kept == votes


def test_nothing_is_overwritten(here: Path) -> None:
    propose(BATTLES, OUTPUT, holdout_test=0.1)
    stamps = {path: path.read_bytes() for path in here.iterdir() if path.is_file()}
    for output in (OUTPUT, Path("other.yaml")):
        with pytest.raises(InputError, match="exists: remove it"):
            propose(BATTLES, output, holdout_test=0.2)
    assert {path: path.read_bytes() for path in here.iterdir() if path.is_file()} == stamps


def test_a_model_of_ones_own(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(TINY / "llama", here / "my model")
    monkeypatch.setattr(proposal, "_machine", lambda: Machine(cores=8, gpus=2, memory_mb=64000))
    propose(BATTLES, OUTPUT, test="test.csv", backbone="my model")
    config = written()
    assert config.final == "judge"
    judge = config.judges["judge"]
    assert judge.backbone and judge.backbone.path == "my model"
    assert (judge.compute.gpus, judge.precision) == (1, "bf16")
    assert config.data.solution is None


def test_a_model_that_cannot_be_a_judge_is_told_before_anything_is_written(here: Path) -> None:
    shutil.copytree(TINY / "llama", here / "model")
    (here / "model/model.safetensors").rename(here / "model/pytorch_model.bin")
    with pytest.raises(InputError, match="has weights as pytorch_model.bin alone"):
        propose(BATTLES, OUTPUT, holdout_test=0.1, backbone="model")
    assert not OUTPUT.exists()
    assert not any(Path(name).exists() for name in SPLIT)


@pytest.mark.parametrize("share", [0, 1, -0.1])
def test_a_share_that_is_none(share: float) -> None:
    with pytest.raises(InputError, match="a share between 0 and 1 expected"):
        propose(BATTLES, OUTPUT, holdout_test=share)


def test_too_few_battles(here: Path) -> None:
    lines = Path(BATTLES).read_text().splitlines(keepends=True)
    Path("few.csv").write_text("".join(lines[:31]))
    with pytest.raises(InputError, match=r"few\.csv: 30 battles; at least 50 are needed"):
        propose("few.csv", OUTPUT, test="test.csv")


def test_the_commands_from_a_csv_to_a_planned_run(here: Path) -> None:
    def run(*command: str) -> str:
        done = subprocess.run([warm_python(), "-m", *command], capture_output=True, text=True)
        assert not done.returncode, done.stderr
        return done.stdout + done.stderr

    shown = run("arena_distill", "init", BATTLES, "--holdout-test", "0.1")
    assert f"{BATTLES}: 200 battles, 0 rows refused" in shown
    assert "arena-distill check --configfile arena.yaml" in shown
    given = ["--snakefile", str(ROOT / "Snakefile"), "--configfile", "arena.yaml"]
    assert "nothing found" in run("arena_distill", "check", *given)
    planned = run("snakemake", "-n", *given)
    assert "train_teacher" in planned
    assert "write_submission" in planned
