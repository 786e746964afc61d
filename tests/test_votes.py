"""Votes are three probabilities and a weight, from the battles to the scores: by hand, end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from conftest import battles_table
from hypothesis import given
from hypothesis import strategies as st
from test_encoding import tokens_of
from test_training import training_settings

from arena_distill.battles.folds import assign_folds
from arena_distill.battles.votes import vote_columns, votes_of
from arena_distill.config.head import Head
from arena_distill.config.training import Loss
from arena_distill.config.vocabulary import CalibrationMethod
from arena_distill.deployment.fold_weights import validation_weights
from arena_distill.evaluation.baselines import class_prior, length_regression
from arena_distill.evaluation.out_of_fold import Run
from arena_distill.files.artifacts import write_parquet
from arena_distill.files.keys import key, locate
from arena_distill.files.logits import write_logits
from arena_distill.metrics import (
    adaptive_calibration_error,
    bootstrap,
    brier_score,
    calibration_error,
    losses,
    mean_over_views,
    paired_difference,
    reliability,
    scores,
)
from arena_distill.prediction.calibration import METHODS, fit
from arena_distill.training import losses as training_loss
from arena_distill.training.examples import FILLER, collator, make_examples
from arena_distill.training.targets import VOTE_LOSS, teacher_weights
from arena_distill.verdicts import NO_VOTE, Votes

LOG = np.log
SOFT = {"id": "soft", "vote": [0.5, 0.25, 0.25], "weight": 2, "prompt": "soft"}


@pytest.fixture
def battles() -> pa.Table:
    """A soft vote of weight 2 among hard ones."""
    hard = [{"id": str(i), "prompt": f"p{i}", "label": i % 3} for i in range(6)]
    return battles_table([SOFT, *hard])


def test_columns_keep_votes_and_their_absence(tmp_path: Path) -> None:
    votes = Votes(np.array([[0.5, 0.25, 0.25], [0, 0, 0], [0, 1, 0]]), np.array([2.0, 1, 0.5]))
    pq.write_table(pa.table(vote_columns(votes)), tmp_path / "v.parquet")
    table = pq.read_table(tmp_path / "v.parquet")
    assert table["vote"].to_pylist() == [[0.5, 0.25, 0.25], None, [0, 1, 0]]
    for rows in ([0, 1, 2], [2, 1], [1], []):
        found = votes_of(table.take(pa.array(rows, pa.int64())))
        np.testing.assert_array_equal(found.probabilities, votes.probabilities[rows])
        np.testing.assert_array_equal(found.weights, votes.weights[rows])
        assert found.labels.tolist() == [[0, NO_VOTE, 1][row] for row in rows]


# --- training -------------------------------------------------------------------------------------


def test_a_soft_vote_reaches_the_loss_by_way_of_the_folds(battles: pa.Table) -> None:
    folds = assign_folds(battles, method="kfold", n=2, seed=0)
    (row,) = np.flatnonzero(np.equal(folds["id"].to_pylist(), "soft"))
    votes = votes_of(folds.take([row]))
    tokens = tokens_of([[[[5]], [[6, 7]], [[8]]]])
    shown = make_examples(tokens, votes, None, None, training_settings(swap=True))
    np.testing.assert_array_equal(shown.votes.probabilities, [[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]])
    batch = collator(0)([shown[0], shown[1], shown[2]])  # the third is a filler
    assert batch["counts"].tolist() == [2, 2, 0]
    assert batch["labels"].ne(FILLER).tolist() == [True, True, False]
    logits = torch.tensor([[LOG(2), 0, LOG(5)]] * 3, dtype=torch.float32)  # 1/4, 1/8, 5/8
    each = (
        training_loss.battle_losses(logits, batch["votes"], None, None, VOTE_LOSS) * batch["counts"]
    )
    of_ab = -2 * (LOG(1 / 4) / 2 + LOG(1 / 8) / 4 + LOG(5 / 8) / 4)
    of_ba = -2 * (LOG(1 / 4) / 4 + LOG(1 / 8) / 2 + LOG(5 / 8) / 4)
    np.testing.assert_allclose(each.numpy(), [of_ab, of_ba, 0], rtol=1e-6)
    alone = training_settings(head=Head(kind="pointwise"))
    assert make_examples(tokens, votes, None, None, alone).votes.weights.tolist() == [2]


@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_of_one_hot_votes_the_loss_is_cross_entropy_to_the_last_bit(smoothing: float) -> None:
    random = torch.Generator().manual_seed(1)
    start = torch.randn(200, 3, generator=random) * 4
    labels = torch.randint(0, 3, (200,), generator=random)
    ours, torchs = (start.clone().requires_grad_() for _ in range(2))
    loss = VOTE_LOSS.model_copy(update={"label_smoothing": smoothing})
    found = training_loss.battle_losses(ours, torch.eye(3)[labels], None, None, loss)
    expected = F.cross_entropy(torchs, labels, reduction="none", label_smoothing=smoothing)
    assert torch.equal(found, expected)
    found.sum().backward()
    expected.sum().backward()
    assert ours.grad is not None and torchs.grad is not None
    if smoothing:
        torch.testing.assert_close(ours.grad, torchs.grad, rtol=0, atol=2e-7)
    else:
        assert torch.equal(ours.grad, torchs.grad)


@pytest.mark.parametrize(
    "loss",
    [VOTE_LOSS, Loss(ce=1, kl=0, cosine=0, label_smoothing=0.2, focal=1.5), Loss(ce=0.3, kl=0.7)],
)
def test_the_loss_of_a_soft_vote_is_the_mean_of_its_classes(loss: Loss) -> None:
    random = torch.Generator().manual_seed(2)
    logits, teachers = torch.randn(1, 3, generator=random), torch.randn(1, 2, 3, generator=random)
    share = torch.tensor([[0.5, 0.2, 0.3]])
    soft = training_loss.battle_losses(logits, share, teachers, None, loss)
    hard = training_loss.battle_losses(
        logits.expand(3, 3), torch.eye(3), teachers.expand(3, 2, 3), None, loss
    )
    torch.testing.assert_close(soft, share @ hard)


def test_a_sure_and_wrong_judge_has_finite_gradients_under_a_weak_focal_loss() -> None:
    logits = torch.tensor([[60.0, 0, 0], [0, 60, 0]], requires_grad=True)
    loss = VOTE_LOSS.model_copy(update={"focal": 0.5})
    training_loss.battle_losses(logits, torch.eye(3)[[1, 1]], None, None, loss).sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("asked", ["own_terms", "all_terms"])
def test_a_battle_without_a_vote_counts_as_the_key_says(asked: Any) -> None:
    logits, teachers = torch.zeros(2, 3), torch.tensor([[[2.0, 0, 0]]] * 2)
    votes = torch.eye(3)[[0, 0]] * torch.tensor([[1.0], [0.0]])
    kl_alone = Loss(ce=0, kl=0.7, temperature=1)
    loss = Loss(ce=0.3, kl=0.7, temperature=1, unlabelled=asked)
    _, bare = training_loss.battle_losses(logits, votes, teachers, None, loss).tolist()
    whole, _ = training_loss.battle_losses(logits, votes, teachers, None, kl_alone).tolist()
    assert bare == pytest.approx(whole * (1 if asked == "own_terms" else 0.7))


@pytest.mark.parametrize("combine", ["mean_logits", "mean_probabilities"])
def test_teachers_are_weighted_by_soft_votes_as_by_their_shares(combine: str) -> None:
    """A vote (1/2, 1/2, 0) of weight 2 is a vote for A and one for B."""
    rng = np.random.default_rng(0)
    targets = rng.normal(0, 2, (40, 2, 1, 3)).astype(np.float32)
    soft = Votes(np.tile([0.5, 0.5, 0], (40, 1)), np.full(40, 2.0))
    hard = Votes.hard(np.repeat([0, 1], 40))
    loss = Loss(combine=combine, weights="fitted")
    found = teacher_weights(targets, soft, np.ones(40, bool), loss)
    expected = teacher_weights(np.tile(targets, (2, 1, 1, 1)), hard, np.ones(80, bool), loss)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)


def test_confidence_in_a_teacher_is_by_its_cross_entropy_with_the_vote() -> None:
    p = np.array([[[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]])
    targets = np.log(p)[:, :, None].astype(np.float32)
    votes = Votes(np.array([[0.5, 0, 0.5]]), np.ones(1))
    weights = teacher_weights(targets, votes, np.ones(1, bool), Loss(weights="confidence"))
    np.testing.assert_allclose(weights, [[0.5, 0.5]], rtol=1e-6)


# --- scores ---------------------------------------------------------------------------------------


def test_scores_out_of_fold_by_hand(battles: pa.Table, tmp_path: Path) -> None:
    folds = assign_folds(battles, method="kfold", n=2, seed=0)
    write_parquet(battles, tmp_path / "battles.parquet", {})
    write_parquet(folds, tmp_path / "folds.parquet", {})
    p = {"soft": [0.25, 0.5, 0.25]} | {str(i): [0.5, 0.3, 0.2] for i in range(6)}
    logits = np.log([p[name] for name in folds["id"].to_pylist()]).astype(np.float32)
    paths = []
    for fold in range(2):
        mine = np.flatnonzero(folds["fold"].to_numpy() == fold)
        ids = folds.select(["id", "source"]).take(pa.array(mine))
        ids = ids.append_column("validation", pa.array(np.ones(len(mine), bool)))
        paths.append(tmp_path / f"fold_{fold}.npy")
        write_logits(paths[-1], np.stack([logits[mine]] * 2, axis=1), ids, {})
    run = Run.read(tmp_path / "folds.parquet", tmp_path / "battles.parquet")
    seen, votes = mean_over_views(run.judge_logits("j", paths)), run.votes()
    # Of the weight 8: two of each hard vote, and 2 · (1/2, 1/4, 1/4).
    total = 2 * (LOG(0.5) + LOG(0.3) + LOG(0.2)) + LOG(0.25) + 0.5 * LOG(0.5) + 0.5 * LOG(0.25)
    found = scores(seen, votes)
    assert found["rows"] == 7
    assert found["log_loss"] == pytest.approx(-total / 8, rel=1e-6)
    assert found["accuracy"] == pytest.approx(2 / 8)  # the soft vote is for A, its verdict is B
    brier = 2 * (0.25**2 + 0.25**2) + 2 * (0.38 + 0.78 + 0.98)
    assert brier_score(seen, votes) == pytest.approx(brier / 8, rel=1e-6)
    prior = class_prior(np.empty((7, 1)), votes, np.empty((1, 1)))
    np.testing.assert_allclose(prior, [[3 / 8, 2.5 / 8, 2.5 / 8]])
    by_fold = {f["fold"]: f for f in run.by_fold(seen)}
    assert sum(f["rows"] for f in by_fold.values()) == 7
    weights = validation_weights(paths, tmp_path / "folds.parquet")
    better = min(by_fold, key=lambda k: by_fold[k]["log_loss"])
    assert weights[better] == max(weights)
    assert sum(weights) == pytest.approx(1)
    assert locate(run.keys(), key(folds), "folds").tolist() == list(range(7))


@given(st.integers(0, 2**32 - 1))
def test_a_weight_of_two_is_the_battle_twice(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p, rival = rng.dirichlet(np.ones(3), (2, 30))
    counts = rng.integers(1, 4, 30)
    once = Votes(rng.dirichlet(np.ones(3), 30), counts.astype(float))
    rows, prompts = np.repeat(np.arange(30), counts), np.arange(30) // 2
    often = Votes(once.probabilities[rows], np.ones(len(rows)))
    for name, found in scores(p, once).items():
        assert name == "rows" or found == pytest.approx(scores(p[rows], often)[name])
    assert brier_score(p, once) == pytest.approx(brier_score(p[rows], often))
    one, other = (calibration_error(reliability(*x)) for x in ((p, once), (p[rows], often)))
    assert one == pytest.approx(other)
    loss, reference = losses(p, once), losses(rival, once)
    assert paired_difference(loss, reference, once, prompts) == pytest.approx(
        paired_difference(loss[rows], reference[rows], often, prompts[rows])
    )
    np.testing.assert_allclose(
        bootstrap(loss[None], once, prompts, resamples=20),
        bootstrap(loss[rows][None], often, prompts[rows], resamples=20),
    )


def test_a_judge_that_says_the_shares_is_calibrated() -> None:
    shares = np.random.default_rng(0).dirichlet(np.ones(3), 50)
    votes = Votes(shares, np.linspace(0.5, 2, 50))
    assert calibration_error(reliability(shares, votes)) == pytest.approx(0, abs=1e-12)
    assert adaptive_calibration_error(shares, votes) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_calibration_to_soft_votes_is_one_to_their_shares(method: CalibrationMethod) -> None:
    rng = np.random.default_rng(3)
    logits, styles = rng.normal(0, 2, (60, 3)), rng.normal(size=(60, 2))
    soft = Votes(np.tile([0.5, 0.25, 0.25], (60, 1)), np.full(60, 4.0))
    rows = np.repeat(np.arange(60), 4)
    hard = Votes.hard(np.tile([0, 0, 1, 2], 60))
    found, expected = (
        fit(method, logits, soft, styles),
        fit(method, logits[rows], hard, styles[rows]),
    )
    np.testing.assert_allclose(found(logits, styles), expected(logits, styles), atol=1e-4)


def test_the_length_regression_learns_soft_votes_by_their_shares() -> None:
    rng = np.random.default_rng(4)
    lengths = rng.normal(size=(50, 4))
    soft = Votes(np.tile([0.25, 0.25, 0.5], (50, 1)), np.full(50, 4.0))
    rows = np.repeat(np.arange(50), 4)
    hard = Votes.hard(np.tile([0, 1, 2, 2], 50))
    np.testing.assert_allclose(
        length_regression(lengths, soft, lengths),
        length_regression(lengths[rows], hard, lengths),
        atol=1e-3,
    )
