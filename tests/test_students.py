"""What students learn from: their teachers' logits and weights, computed again row by row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import Run
from scipy.special import log_softmax, softmax
from test_training import LORA, of_rows, training_settings

from arena_distill.battles.folds import EVERY_FOLD, training_rows
from arena_distill.battles.votes import votes_of
from arena_distill.config.head import Head
from arena_distill.config.training import Loss
from arena_distill.encoding.sequences import read_tokens
from arena_distill.files.artifacts import read_parquet
from arena_distill.files.logits import write_logits
from arena_distill.models.adapters import new_judge
from arena_distill.models.loading import load_classifier
from arena_distill.runtime.launch import Launch
from arena_distill.training import trainer
from arena_distill.training.examples import Examples, make_examples
from arena_distill.training.trainer import train_fold
from arena_distill.verdicts import Votes

Files = dict[str, list[Path]]


@pytest.fixture(scope="module")
def run(make_run: Callable[..., Run]) -> Run:
    return make_run("llama")


@pytest.fixture(scope="module")
def taught(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Files, np.ndarray]:
    """Files of two teachers, their rows in any order, and the targets of fold 0's training rows.

    `t` knows something of the votes in order AB, `u` in order BA; and `u` knows those of the extra battles.

    Returns:
        float64 (training rows, teachers, orders, classes).
    """
    rng = np.random.default_rng(0)
    folds, folder = read_parquet(run.folds), tmp_path_factory.mktemp("teachers")
    column, votes = folds["fold"].to_numpy(), votes_of(folds).probabilities
    extra = column == EVERY_FOLD
    found: Files = {}
    targets = []
    for name, skill in {"t": (3.0, 0.0), "u": (0.0, 2.5)}.items():
        each = np.array(skill)[None, :, None] * votes[:, None]
        each = np.stack([each + rng.normal(0, 2, each.shape) for _ in range(3)])  # of each fold
        if name == "u":
            each[:, extra] = 8 * votes[extra, None]
        for fold in range(3):
            rows = rng.permutation(np.flatnonzero((column == fold) | extra))
            ids = folds.select(["id", "source"]).take(pa.array(rows))
            ids = ids.append_column("validation", pa.array(column[rows] == fold))
            path = folder / name / f"fold_{fold}.npy"
            write_logits(path, each[fold][rows].astype(np.float32), ids, {})
            found.setdefault(name, []).append(path)
        own = each[np.clip(column, 0, None), np.arange(len(folds))]
        targets.append(np.where(extra[:, None, None], each.mean(0), own))
    return found, np.stack(targets, axis=1)[training_rows(folds, 0)]


@pytest.fixture(scope="module")
def votes(run: Run) -> Votes:
    folds = read_parquet(run.folds)
    return votes_of(folds.take(training_rows(folds, 0)))


def train(run: Run, output: Path, files: Files, loss: Loss) -> None:
    """One step on all battles of fold 0."""
    settings = training_settings(
        teachers=tuple(files), targets="out_of_fold", loss=loss, batch_size=1024
    )
    train_fold(
        run.backbone, None, run.tokens, run.folds, 0, output, teachers=files, settings=settings,
        launch=Launch(),
    )  # fmt: skip


@pytest.mark.parametrize("combine", ["mean_logits", "mean_probabilities"])
def test_weights_are_fitted_to_both_orders_and_never_to_extra_battles(
    combine: Any,
    run: Run,
    taught: tuple[Files, np.ndarray],
    votes: Votes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files, targets = taught
    folds = read_parquet(run.folds)
    own = folds["fold"].to_numpy()[training_rows(folds, 0)] != EVERY_FOLD
    loss = Loss(combine=combine, weights="fitted")
    given: list[Examples] = []
    monkeypatch.setattr(trainer, "_fit", lambda _, examples, *__: given.append(examples))
    train(run, tmp_path, files, loss)
    t = np.linspace(0, 1, 1001)
    both = np.stack([t, 1 - t], axis=1)

    def best(logits: np.ndarray, rows: np.ndarray) -> float:
        if combine == "mean_logits":
            log_p = log_softmax(np.einsum("rjc,wj->wrc", logits, both), axis=-1)
        else:
            log_p = np.log(np.einsum("rjc,wj->wrc", softmax(logits, axis=-1), both))
        return float(t[(votes.probabilities * log_p)[:, rows].sum((1, 2)).argmax()])

    expected, everywhere = best(targets.mean(2), own), np.ones_like(own)
    wrong = [best(targets.mean(2), everywhere), *(best(targets[:, :, i], own) for i in (0, 1))]
    assert min(abs(expected - other) for other in wrong) > 0.05
    (shown,) = given
    assert shown.weights is not None
    assert np.ptp(shown.weights, axis=0).max() == 0
    assert shown.weights[0] == pytest.approx([expected, 1 - expected], abs=2e-3)


def test_votes_that_all_teachers_contradict_count_less_in_both_orders(
    run: Run,
    taught: tuple[Files, np.ndarray],
    votes: Votes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files, targets = taught
    folds = read_parquet(run.folds)
    own = folds["fold"].to_numpy()[training_rows(folds, 0)] != EVERY_FOLD
    said = np.einsum("rjc,rc->rj", softmax(targets.mean(2), axis=-1), votes.probabilities)
    few = own & (said < 0.3).all(axis=1)
    assert 0 < few.sum() < own.sum()
    given: list[Examples] = []
    monkeypatch.setattr(trainer, "_fit", lambda _, examples, *__: given.append(examples))
    train(run, tmp_path, files, Loss(contradicted_weight=0.5, contradicted_below=0.3))
    (shown,) = given
    assert shown.votes.probabilities.sum(axis=1).tolist() == np.tile(1 - few / 2, 2).tolist()


@pytest.mark.parametrize("combine", ["separate", "mean_logits"])
def test_the_first_loss_is_that_of_each_battles_targets_and_weights(
    combine: Any, run: Run, taught: tuple[Files, np.ndarray], votes: Votes, tmp_path: Path
) -> None:
    """Confidence weighs each row's teachers otherwise: every row must meet its own."""
    files, targets = taught
    loss = Loss(combine=combine, weights="confidence", ce=0.5, kl=1, temperature=2)
    train(run, tmp_path / "x", files, loss)
    (found,) = read_parquet(tmp_path / "x" / "history.parquet")["loss"].to_pylist()
    folds, tokens = read_parquet(run.folds), read_tokens(run.tokens)
    settings = training_settings()
    mine = of_rows(tokens, folds.take(training_rows(folds, 0)))
    pad, seed = tokens.vocabulary.pad, settings.training.seed
    judge = new_judge(load_classifier(run.backbone, pad_token_id=pad, head_seed=seed), LORA, seed)
    views = make_examples(mine, votes, None, None, settings).views[0]
    with torch.inference_mode():
        rows = [torch.from_numpy(ids.astype(np.int64))[None] for ids in views]
        shown = np.concatenate([judge.eval()(input_ids=ids).logits.numpy() for ids in rows])
    n = len(votes)
    # In order BA the first answer is B: its logits are exchanged back.
    students = np.stack([shown[:n], shown[n:][:, [1, 0, 2]]], axis=1).astype(np.float64)
    surprise = np.exp(
        -np.einsum("rc,rjc->rj", votes.probabilities, log_softmax(targets.mean(2), -1))
    )
    weights = 1 - surprise / surprise.sum(1, keepdims=True)
    assert np.ptp(weights[:, 0]) > 0.3
    log_s = log_softmax(students / 2, axis=-1)[:, None]
    ce = -np.einsum("rc,roc->ro", votes.probabilities, log_softmax(students, -1))
    if combine == "separate":
        log_t = log_softmax(targets / 2, axis=-1)
        kl = (np.exp(log_t) * (log_t - log_s)).sum(-1)
        each = (0.5 * ce + 2 * np.einsum("rj,rjo->ro", weights, 4 * kl)) / 2.5
    else:
        log_t = log_softmax(np.einsum("rj,rjoc->roc", weights, targets) / 2, axis=-1)
        each = (0.5 * ce + 4 * (np.exp(log_t) * (log_t - log_s[:, 0])).sum(-1)) / 1.5
    assert found == pytest.approx(each.mean(), rel=1e-4)


def test_a_pointwise_student_learns_the_mean_of_both_orders(run: Run) -> None:
    tokens = read_tokens(run.tokens).take(np.arange(5))
    rng = np.random.default_rng(0)
    targets = rng.normal(size=(5, 2, 2, 3)).astype(np.float32)
    weights = rng.dirichlet(np.ones(2), 5).astype(np.float32)
    votes = Votes(rng.dirichlet(np.ones(3), 5), rng.random(5))
    settings = training_settings(head=Head(kind="pointwise"))
    shown = make_examples(tokens, votes, targets, weights, settings)
    for row in range(5):
        item = shown[row]
        np.testing.assert_allclose(item["teachers"], (targets[row, :, 0] + targets[row, :, 1]) / 2)
        np.testing.assert_array_equal(item["weights"], weights[row])
        np.testing.assert_allclose(item["votes"], votes.probabilities[row], rtol=1e-6)
        assert item["counts"] == pytest.approx(votes.weights[row])
        assert len(item["input_ids"]) == 2
    assert len(shown) == 5
