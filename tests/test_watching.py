"""Training is watched by the battles for choices: looking changes nothing, choosing does what it says."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import Run
from safetensors.torch import load_file
from tensorboardX.proto.event_pb2 import Event
from test_checkpoints import WEIGHTS, at_batch, history, interrupted, train  # noqa: F401
from test_training import training_settings

from arena_distill import layout
from arena_distill.battles.folds import assign_folds, choice_rows, training_rows
from arena_distill.battles.votes import votes_of
from arena_distill.config.run import load
from arena_distill.encoding.sequences import read_tokens
from arena_distill.encoding.views import encode_views
from arena_distill.errors import InputError
from arena_distill.files.artifacts import read_json, read_parquet, write_parquet
from arena_distill.files.keys import key, locate
from arena_distill.metrics import log_loss, softmax
from arena_distill.models.adapters import load_fold
from arena_distill.models.heads import battle_logits
from arena_distill.models.scoring import score
from arena_distill.runtime.launch import Launch
from arena_distill.training.trainer import train_fold

TOO_FAST: dict[str, Any] = {"lr": 0.05, "epochs": 6, "eval_steps": 2}
"""Training that soon makes the judge worse on battles that it does not learn."""


@pytest.fixture(scope="module")
def watched(make_run: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with battles for choices, which weigh differently."""
    run = make_run("llama")
    battles = read_parquet(run.battles)
    weights = np.where(np.arange(len(battles)) % 2, 1.0, 3.0)
    at, field = battles.schema.get_field_index("weight"), battles.schema.field("weight")
    battles = battles.set_column(at, field, pa.array(weights, field.type))
    folds = assign_folds(battles, method="stratified_group", n=2, seed=3, choices=0.3)
    path = tmp_path_factory.mktemp("watched") / "folds.parquet"
    write_parquet(folds, path, {"phase": "folds"})
    return replace(run, folds=path)


def measured(adapter: Path) -> dict[int, float]:
    """The log loss on the battles for choices by step, where it was measured."""
    rows = history(adapter).to_pylist()
    return {row["step"]: row["choice_loss"] for row in rows if row["choice_loss"] is not None}


def loss_of(adapter: Path, run: Run) -> float:
    """The log loss of a fold on the battles for choices, in the order AB."""
    folds = read_parquet(run.folds)
    rows = folds.take(choice_rows(folds))
    every = read_tokens(run.tokens)
    read = every.take(locate(key(rows), every.keys(), "tokens"))
    settings = training_settings()
    how: dict[str, Any] = {"precision": "fp32", "pad_token_id": read.vocabulary.pad}
    judge = load_fold(run.backbone, adapter, head=settings.head, **how)
    (view,) = encode_views(read, settings.encoding, settings.head, ("AB",))
    outputs = score(judge, view, batch_tokens=4096, progress=False)
    import torch

    logits = battle_logits(torch.from_numpy(outputs)[:, None], settings.head).numpy()
    return log_loss(softmax(logits), votes_of(rows))


def test_looking_changes_nothing(watched: Run, tmp_path: Path) -> None:
    """With dropout, whose random numbers a look must not use up."""
    seen = train(watched, tmp_path / "seen", None, eval_steps=2)
    unseen = train(watched, tmp_path / "unseen", None, eval_steps=None)
    assert (seen / WEIGHTS).read_bytes() == (unseen / WEIGHTS).read_bytes()
    assert history(seen).drop(["choice_loss"]).equals(history(unseen).drop(["choice_loss"]))
    assert not measured(unseen)
    steps = read_json(seen / "metrics.json")["steps"]
    assert set(measured(seen)) == {*range(2, steps + 1, 2), steps}


def test_the_figure_is_the_log_loss_of_the_battles_for_choices(
    watched: Run, tmp_path: Path
) -> None:
    adapter = train(watched, tmp_path / "x", None, eval_steps=0.5)
    metrics = read_json(adapter / "metrics.json")
    assert len(measured(adapter)) == 2
    assert metrics["kept_step"] == metrics["steps"] == max(measured(adapter))
    assert metrics["choice_loss"] == measured(adapter)[metrics["steps"]]
    assert metrics["choice_loss"] == pytest.approx(loss_of(adapter, watched), abs=1e-5)


def test_training_reads_no_battle_for_choices(watched: Run) -> None:
    folds = read_parquet(watched.folds)
    for fold in (0, 1):
        assert not {*choice_rows(folds)} & {*training_rows(folds, fold)}


@pytest.mark.parametrize("changes", [{}, {"lora": None}])
def test_the_best_weights_are_kept(changes: dict[str, Any], watched: Run, tmp_path: Path) -> None:
    changes = TOO_FAST | changes
    last = train(watched, tmp_path / "last", None, **changes)
    best = train(watched, tmp_path / "best", None, keep="best", **changes)
    seen = measured(best)
    assert seen == measured(last), "they are trained alike"
    metrics = read_json(best / "metrics.json")
    assert metrics["kept_step"] == min(seen, key=lambda step: seen[step]) < metrics["steps"]
    assert metrics["choice_loss"] == min(seen.values())
    assert loss_of(best, watched) == pytest.approx(min(seen.values()), abs=1e-5)
    assert loss_of(last, watched) == pytest.approx(seen[metrics["steps"]], abs=1e-5)


def test_training_stops_if_it_does_not_get_better(watched: Run, tmp_path: Path) -> None:
    whole = read_json(train(watched, tmp_path / "x", None, **TOO_FAST) / "metrics.json")
    adapter = train(watched, tmp_path / "y", None, keep="best", patience=2, **TOO_FAST)
    metrics, seen = read_json(adapter / "metrics.json"), measured(adapter)
    assert metrics["steps"] < whole["steps"]
    assert metrics["steps"] == metrics["kept_step"] + 2 * TOO_FAST["eval_steps"]
    assert min(seen, key=lambda step: seen[step]) == metrics["kept_step"]


def test_a_killed_training_remembers_its_best_weights(
    watched: Run,
    tmp_path: Path,
    at_batch: Callable[..., None],  # noqa: F811
) -> None:
    how = {**TOO_FAST, "keep": "best", "patience": 3}
    whole = train(watched, tmp_path / "whole", None, **how)
    checkpoints = interrupted(watched, tmp_path, at_batch, batch=12, **how)
    assert (checkpoints[-1] / "best.safetensors").exists()
    again = train(watched, tmp_path / "x", tmp_path / "kept", **how)
    one, other = (load_file(adapter / WEIGHTS) for adapter in (whole, again))
    assert all((one[name] == other[name]).all() for name in one)
    assert history(again).equals(history(whole))


def events(adapter: Path) -> dict[str, list[float]]:
    """The scalars of an adapter's TensorBoard files: records of a length, a sum, an event, a sum."""
    found: dict[str, list[float]] = {}
    for file in sorted(Path(layout.tensorboard(str(adapter))).glob("events.*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            for value in Event.FromString(data[at + 12 : at + 12 + size]).summary.value:
                found.setdefault(value.tag, []).append(value.simple_value)
            at += size + 16
    return found


def test_tensorboard_shows_every_training(watched: Run, tmp_path: Path) -> None:
    for lr in (1e-3, 2e-3):  # the second removes the files of the first
        adapter = train(watched, tmp_path / "x", None, lr=lr, eval_steps=2)
        shown, kept = events(adapter), history(adapter)
        np.testing.assert_allclose(shown["train/loss"], kept["loss"].to_numpy(), rtol=1e-6)
        np.testing.assert_allclose(shown["eval/loss"], list(measured(adapter).values()), rtol=1e-6)


def test_a_service_that_is_not_installed_is_one_line(
    watched: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arena_distill.training.trainer.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"report_to: trackio is not installed: pip install track"):
        train_fold(
            watched.backbone, None, watched.tokens, watched.folds, 0, tmp_path / "x",
            teachers={}, settings=training_settings(), launch=Launch(report_to="trackio"),
        )  # fmt: skip


@pytest.mark.parametrize("asked", [{"keep": "best"}, {"patience": 2}])
def test_choices_need_battles_and_measurements(asked: dict[str, Any]) -> None:
    def config(**changes: Any) -> dict[str, Any]:
        judge = {"backbone": {"tiny": "llama"}, "training": asked | changes.pop("training", {})}
        return {"data": {"arena": {}}, "judges": {"x": judge}, "final": "x", **changes}

    with pytest.raises(InputError, match=r"judges\.x\.training\..* set folds\.choices"):
        load(config())
    with pytest.raises(InputError, match=r"set training\.eval_steps"):
        load(config(folds={"choices": 0.1}, training={"eval_steps": None}))
    load(config(folds={"choices": 0.1}))
