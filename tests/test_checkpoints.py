"""An interrupted training ends with the same weights as an uninterrupted one."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import Run
from test_training import training_settings

from arena_distill.config.training import Lora
from arena_distill.errors import Stopped
from arena_distill.files.artifacts import read_json, read_parquet
from arena_distill.runtime.launch import Launch
from arena_distill.training import judge_trainer
from arena_distill.training.checkpoints import SEAL, Checkpoints, digest
from arena_distill.training.trainer import train_fold

SETTINGS: dict[str, Any] = {"epochs": 2, "lora": Lora(r=4, alpha=8, dropout=0.2), "warmup_steps": 2}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def llama(make_run: Callable[..., Run]) -> Run:
    return make_run("llama")


def train(
    run: Run, output: Path, checkpoints: Path | None, *, minutes: float = 60, **changes: Any
) -> Path:
    train_fold(
        run.backbone,
        None,
        run.tokens,
        run.folds,
        0,
        output,
        teachers={},
        settings=training_settings(**(SETTINGS | changes)),
        launch=Launch(4, checkpoints=checkpoints, checkpoint_minutes=minutes),
    )
    return output


@pytest.fixture(scope="module")
def whole(make_run: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(make_run("llama"), tmp_path_factory.mktemp("whole") / "adapter", None)


class Interruption(BaseException):
    """Like a kill: no `except Exception` catches it."""


def calls_at_batch(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Call a function in the middle of a training: at its n-th micro batch."""
    genuine = judge_trainer.battle_losses

    def arrange(batch: int, action: Callable[[], None]) -> None:
        seen = 0

        def spy(*arguments: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == batch:
                action()
            return genuine(*arguments)

        monkeypatch.setattr(judge_trainer, "battle_losses", spy)

    return arrange


at_batch = pytest.fixture(calls_at_batch)


def raise_signal(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def interrupt() -> None:
    raise Interruption


def checkpoints_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/checkpoint-*"), key=lambda c: int(c.name.split("-")[1]))


def history(adapter: Path) -> pa.Table:
    return read_parquet(adapter / "history.parquet")


def assert_same(adapter: Path, whole: Path) -> None:
    (weights,) = whole.glob("*model.safetensors")
    assert (adapter / weights.name).read_bytes() == weights.read_bytes()
    assert history(adapter).equals(history(whole))
    assert read_json(adapter / "metrics.json")["train_loss"] == pytest.approx(
        read_json(whole / "metrics.json")["train_loss"]
    )


def test_checkpoints_change_nothing(llama: Run, whole: Path, tmp_path: Path) -> None:
    assert_same(train(llama, tmp_path / "x", tmp_path / "kept", minutes=0), whole)


@pytest.mark.parametrize(
    ("number", "batch"),
    [
        (signal.SIGTERM, 1),  # in the first step
        (signal.SIGINT, 6),
        (signal.SIGTERM, 9),
        (signal.SIGINT, 14),  # in the second epoch
    ],
)
def test_a_stopped_training_goes_on_where_it_was(
    number: signal.Signals,
    batch: int,
    llama: Run,
    whole: Path,
    tmp_path: Path,
    at_batch: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    at_batch(batch, raise_signal(number))
    with pytest.raises(Stopped, match=f"{number.name} received: stopped after step"):
        train(llama, tmp_path / "x", tmp_path / "kept")
    assert not (tmp_path / "x").exists()
    (checkpoint,) = checkpoints_of(tmp_path / "kept")
    at_batch(-1, interrupt)
    train(llama, tmp_path / "x", tmp_path / "kept")
    assert f"{checkpoint}: going on from there" in capsys.readouterr().out
    assert_same(tmp_path / "x", whole)


def test_a_stop_between_epochs_goes_on_with_the_next(
    llama: Run, whole: Path, tmp_path: Path, at_batch: Callable[..., None]
) -> None:
    steps = history(whole)["step"].to_pylist()
    epochs = history(whole)["epoch"].to_pylist()
    last = steps[epochs.index(1.0)]
    batches = read_json(whole / "metrics.json")["sequences"] // 4 + 1
    at_batch(batches, raise_signal(signal.SIGTERM))
    with pytest.raises(Stopped, match=f"after step {last} of"):
        train(llama, tmp_path / "x", tmp_path / "kept")
    at_batch(-1, interrupt)
    assert_same(train(llama, tmp_path / "x", tmp_path / "kept"), whole)


@pytest.mark.parametrize("changes", [{}, {"lora": None}])
def test_a_killed_training_goes_on_from_its_last_checkpoint(
    changes: dict[str, Any],
    llama: Run,
    whole: Path,
    tmp_path: Path,
    at_batch: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    if changes:
        whole = train(llama, tmp_path / "whole", None, **changes)
    for batch in (9, 5):  # twice: the second attempt is killed as well
        at_batch(batch, interrupt)
        with pytest.raises(Interruption):
            train(llama, tmp_path / "x", tmp_path / "kept", minutes=0, **changes)
    assert len(checkpoints_of(tmp_path / "kept")) == 2  # no more are kept
    at_batch(-1, interrupt)
    assert_same(train(llama, tmp_path / "x", tmp_path / "kept", **changes), whole)
    assert capsys.readouterr().out.count("going on from there") == 2


def test_the_warning_before_a_time_limit_saves_and_training_goes_on(
    llama: Run,
    whole: Path,
    tmp_path: Path,
    at_batch: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    at_batch(5, raise_signal(signal.SIGUSR1))
    assert_same(train(llama, tmp_path / "x", tmp_path / "kept"), whole)
    assert capsys.readouterr().out.count(": saved") == 1


def interrupted(
    run: Run, folder: Path, at_batch: Callable[..., None], batch: int = 11, **changes: Any
) -> list[Path]:
    """The checkpoints that a killed training has left in `folder / "kept"`."""
    at_batch(batch, interrupt)
    with pytest.raises(Interruption):
        train(run, folder / "x", folder / "kept", minutes=0, **changes)
    at_batch(-1, interrupt)
    return checkpoints_of(folder / "kept")


@pytest.fixture(scope="module")
def killed(make_run: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    with pytest.MonkeyPatch.context() as patch:
        interrupted(make_run("llama"), folder, calls_at_batch(patch))
    return folder / "kept"


@pytest.fixture
def left(killed: Path, tmp_path: Path) -> list[Path]:
    """The two checkpoints of a killed training, in `tmp_path / "kept"`."""
    shutil.copytree(killed, tmp_path / "kept")
    return checkpoints_of(tmp_path / "kept")


def test_a_checkpoint_that_was_never_whole_is_removed(
    llama: Run, whole: Path, tmp_path: Path, left: list[Path]
) -> None:
    _, newer = left
    (newer / SEAL).unlink()
    assert_same(train(llama, tmp_path / "x", tmp_path / "kept"), whole)
    assert not list((tmp_path / "kept").glob("*/*checkpoint*"))


def damage(file: Path, harm: str) -> None:
    content = file.read_bytes()
    middle = len(content) // 2
    if harm == "gone":
        file.unlink()
    elif harm == "cut":
        file.write_bytes(content[:middle])
    else:
        file.write_bytes(content[:middle] + b"!" + content[middle + 1 :])


@pytest.mark.parametrize(
    "file", [WEIGHTS, "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", SEAL]
)
@pytest.mark.parametrize("harm", ["cut", "changed", "gone"])
def test_a_damaged_checkpoint_is_set_aside(
    file: str, harm: str, left: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    if (file, harm) == (SEAL, "gone"):
        pytest.skip("tells of a checkpoint that was never whole")
    older, newer = left
    damage(newer / file, harm)
    assert Checkpoints(newer.parent, every=60).latest() == older
    said = capsys.readouterr().out
    assert f"{newer}: not whole (" in said
    if (file, harm) != (SEAL, "changed"):  # it may accuse another file then
        assert file in said.split("not whole (")[1].splitlines()[0]


def test_training_goes_on_from_the_checkpoint_before_a_damaged_one(
    llama: Run, whole: Path, tmp_path: Path, left: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    older, newer = left
    damage(newer / "optimizer.pt", "changed")
    train(llama, tmp_path / "x", tmp_path / "kept")
    assert f"{older}: going on from there" in capsys.readouterr().out
    assert_same(tmp_path / "x", whole)


def test_without_a_whole_checkpoint_training_starts_anew(
    llama: Run, whole: Path, tmp_path: Path, left: list[Path]
) -> None:
    for checkpoint in left:
        (checkpoint / SEAL).unlink()  # killed while it was being written
    assert_same(train(llama, tmp_path / "x", tmp_path / "kept"), whole)


@pytest.mark.parametrize("change", [{"seed": 1}, {"lora": Lora(r=2, alpha=8, dropout=0.2)}])
def test_a_checkpoint_of_other_settings_is_left_alone(
    change: dict[str, Any],
    llama: Run,
    whole: Path,
    tmp_path: Path,
    at_batch: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    stale = interrupted(llama, tmp_path, at_batch, batch=5, **change)
    assert_same(train(llama, tmp_path / "x", tmp_path / "kept"), whole)
    assert "going on" not in capsys.readouterr().out
    assert all((checkpoint / SEAL).exists() for checkpoint in stale)


def test_a_checkpoint_of_other_battles_is_left_alone(
    llama: Run, make_run: Callable[..., Run], tmp_path: Path, at_batch: Callable[..., None]
) -> None:
    other = Run(llama.backbone, llama.battles, llama.tokens, make_run("llama", "kfold").folds)
    interrupted(other, tmp_path, at_batch)
    train(llama, tmp_path / "x", tmp_path / "kept")
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_what_was_trained_is_not_trained_again_until_the_run_has_succeeded(
    llama: Run, whole: Path, tmp_path: Path, at_batch: Callable[..., None]
) -> None:
    train(llama, tmp_path / "x", tmp_path / "kept")
    assert not checkpoints_of(tmp_path / "kept")
    shutil.rmtree(tmp_path / "x")  # as Snakemake does before it runs a job again
    at_batch(1, interrupt)
    assert_same(train(llama, tmp_path / "x", tmp_path / "kept"), whole)


def test_the_time_of_all_attempts_is_counted(llama: Run, tmp_path: Path, left: list[Path]) -> None:
    before = read_json(left[-1] / SEAL)["seconds"]
    assert before > 0
    train(llama, tmp_path / "x", tmp_path / "kept")
    assert read_json(tmp_path / "x/metrics.json")["seconds"] > before


def test_a_digest_depends_on_content_shape_and_type() -> None:
    import numpy as np

    zeros = np.zeros((2, 3), np.float32)
    digests = {
        digest(about, arrays)
        for about, arrays in [
            ({}, []),
            ({"a": 1}, []),
            ({"a": 1}, [zeros]),
            ({"a": 1}, [zeros + 1]),
            ({"a": 1}, [zeros.reshape(3, 2)]),
            ({"a": 1}, [zeros.astype(np.int32)]),
        ]
    }
    assert len(digests) == 6
