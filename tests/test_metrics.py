"""Scores of predictions: by hand on a few rows, by properties on many."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import log_loss

from arena_distill.metrics import (
    adaptive_calibration_error,
    brier_score,
    calibration_error,
    calibration_scores,
    class_reliability,
    classwise_calibration_error,
    deployed_score,
    gap_closed,
    losses,
    mean_interval,
    paired_difference,
    position_bias,
    reliability,
    right_verdicts,
    scores,
    share_interval,
    softmax,
    truth_scores,
)
from arena_distill.verdicts import Votes, swap_classes

seeds = st.integers(0, 2**32 - 1)


# --- scores ---------------------------------------------------------------------------------------


def test_log_loss_and_accuracy_by_hand() -> None:
    probabilities = np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1]])
    found = scores(probabilities, Votes.hard(np.array([0, 2, 1])))
    assert found["rows"] == 3
    assert found["accuracy"] == pytest.approx(2 / 3)
    by_hand = -(np.log(0.5) + np.log(0.7) + np.log(0.3)) / 3
    assert found["log_loss"] == pytest.approx(by_hand, abs=1e-15)


@given(seeds, st.integers(1, 50))
def test_log_loss_is_scikit_learns(seed: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    probabilities, votes = rng.dirichlet(np.ones(3), rows), Votes.hard(rng.integers(0, 3, rows))
    expected = log_loss(votes.labels, probabilities, labels=[0, 1, 2])
    assert scores(probabilities, votes)["log_loss"] == pytest.approx(expected, rel=1e-12)


def test_an_impossible_vote_costs_much_but_not_infinitely_much() -> None:
    probabilities, votes = np.array([[1.0, 0.0, 0.0]]), Votes.hard(np.array([1]))
    expected = log_loss(votes.labels, probabilities, labels=[0, 1, 2])
    assert losses(probabilities, votes)[0] == pytest.approx(expected)


def test_calibration_error_by_hand() -> None:
    # Two verdicts of confidence 0.9, one right; two of 0.5 (bin 0.467 to 0.533), both right.
    probabilities = np.array([[0.9, 0.1, 0], [0, 0.9, 0.1], [0.5, 0.3, 0.2], [0.3, 0.2, 0.5]])
    bins = reliability(probabilities, Votes.hard(np.array([0, 0, 0, 2])))
    assert [b["rows"] for b in bins] == [2, 2]
    assert [b["accuracy"] for b in bins] == [1.0, 0.5]
    assert calibration_error(bins) == pytest.approx((2 * 0.5 + 2 * 0.4) / 4)


def test_a_confidence_on_the_edge_of_two_bins_is_in_the_lower() -> None:
    (only,) = reliability(np.array([[0.6, 0.3, 0.1]]), Votes.hard(np.array([0])))
    assert (only["lower"], only["upper"]) == (8 / 15, 9 / 15)
    (sure,) = reliability(np.array([[1.0, 0.0, 0.0]]), Votes.hard(np.array([0])))
    assert sure["upper"] == 1


@given(seeds)
def test_the_bins_hold_every_verdict_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probabilities, votes = rng.dirichlet(np.full(3, 0.3), 60), Votes.hard(rng.integers(0, 3, 60))
    bins = reliability(probabilities, votes)
    assert sum(b["rows"] for b in bins) == 60
    assert all(b["lower"] < b["confidence"] <= b["upper"] + 1e-12 for b in bins)
    right = sum(b["rows"] * b["accuracy"] for b in bins)
    assert right / 60 == pytest.approx(scores(probabilities, votes)["accuracy"])


def test_gap_closed_runs_from_the_prior_to_the_bayes_limit() -> None:
    baselines = {"class_prior": {"log_loss": 1.1}, "bayes": {"log_loss": 0.9}}
    assert gap_closed(1.1, baselines) == 0
    assert gap_closed(0.9, baselines) == 1
    assert gap_closed(1.05, baselines) == pytest.approx(0.25)
    assert gap_closed(1.05, {**baselines, "bayes": None}) is None


def test_paired_difference_by_hand() -> None:
    loss, reference = np.array([1.0, 2.0, 3.0, 2.0]), np.array([1.0, 1.0, 1.0, 1.0])
    found = paired_difference(loss, reference, Votes.hard(np.zeros(4, int)), np.arange(4))
    assert found["difference"] == 1
    # Every row a prompt of its own: the textbook standard error.
    error = np.std(loss - reference, ddof=1) / 2
    assert found["high"] - found["difference"] == pytest.approx(1.96 * error)
    same = paired_difference(reference, reference, Votes.hard(np.zeros(4, int)), np.arange(4))
    assert same == {"difference": 0, "low": 0, "high": 0}


def test_repeated_prompts_make_a_difference_less_sure() -> None:
    rng = np.random.default_rng(0)
    loss, reference = np.repeat(rng.random(100), 5), np.zeros(500)
    votes = Votes.hard(np.zeros(500, int))
    alone = paired_difference(loss, reference, votes, np.arange(500))
    grouped = paired_difference(loss, reference, votes, np.repeat(np.arange(100), 5))
    width = grouped["high"] - grouped["low"]
    assert width == pytest.approx(5**0.5 * (alone["high"] - alone["low"]), rel=0.02)


# --- calibration ----------------------------------------------------------------------------------


def test_brier_score_by_hand() -> None:
    probabilities = np.array([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    first = 0.5**2 + 0.25**2 + 0.25**2
    assert brier_score(probabilities, Votes.hard(np.array([0, 1, 2]))) == pytest.approx(
        (first + 0 + 2) / 3
    )


def test_classwise_error_by_hand() -> None:
    # A: 0.9 (vote) and 0.1 (none): bins of their own. B: 0.05 and 0.7. Tie: 0.05 and 0.2 (vote).
    probabilities = np.array([[0.9, 0.05, 0.05], [0.1, 0.7, 0.2]])
    diagrams = class_reliability(probabilities, Votes.hard(np.array([0, 2])))
    assert [b["confidence"] for b in diagrams["model_b"]] == [0.05, 0.7]
    assert [b["accuracy"] for b in diagrams["tie"]] == [0, 1]
    by_class = [(0.1 + 0.1) / 2, (0.05 + 0.7) / 2, (0.05 + 0.8) / 2]
    assert classwise_calibration_error(diagrams) == pytest.approx(np.mean(by_class))


def test_adaptive_error_by_hand() -> None:
    # 30 verdicts, two to a bin of 15, all within one bin of equal width: right and wrong by turns.
    confidence = 0.5 + np.arange(30) / 1000
    rest = (1 - confidence) / 2
    probabilities = np.column_stack([confidence, rest, rest])
    votes = Votes.hard(np.arange(30) % 2)
    gaps = [abs(2 * 0.5 - confidence[i : i + 2].sum()) for i in range(0, 30, 2)]
    assert adaptive_calibration_error(probabilities, votes) == pytest.approx(sum(gaps) / 30)
    # The lower ones are always right, the upper ones never: one wide bin does not see it.
    votes = Votes.hard((np.arange(30) >= 14).astype(int))
    by_hand = ((1 - confidence[:14]).sum() + confidence[14:].sum()) / 30
    assert adaptive_calibration_error(probabilities, votes) == pytest.approx(by_hand)
    assert calibration_error(reliability(probabilities, votes)) < 0.1


@given(seeds)
def test_equal_confidences_share_a_bin_whatever_the_order_of_rows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    few = rng.dirichlet(np.ones(3), 4)
    probabilities, votes = few[rng.integers(0, 4, 50)], Votes.hard(rng.integers(0, 3, 50))
    shuffled = rng.permutation(50)
    assert adaptive_calibration_error(probabilities, votes) == pytest.approx(
        adaptive_calibration_error(probabilities[shuffled], votes[shuffled]), abs=1e-12
    )
    # A constant judge has one bin, however many rows.
    same = np.tile([0.5, 0.3, 0.2], (50, 1))
    assert adaptive_calibration_error(same, votes) == pytest.approx(
        abs((votes.labels == 0).mean() - 0.5)
    )


@given(seeds)
def test_every_class_diagram_holds_every_battle_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probabilities, votes = rng.dirichlet(np.full(3, 0.3), 60), Votes.hard(rng.integers(0, 3, 60))
    for i, bins in enumerate(class_reliability(probabilities, votes).values()):
        assert sum(b["rows"] for b in bins) == 60
        votes_for = sum(b["rows"] * b["accuracy"] for b in bins)
        assert votes_for == pytest.approx((votes.labels == i).sum())


def test_the_truth_is_calibrated_by_every_measure() -> None:
    rng = np.random.default_rng(0)
    truth = rng.dirichlet(np.ones(3), 100_000)
    drawn = (truth.cumsum(axis=1) < rng.random(len(truth))[:, None]).sum(axis=1).clip(max=2)
    votes = Votes.hard(drawn)
    for name in ("ece", "adaptive_ece", "classwise_ece"):
        assert calibration_scores(truth, votes)[name] < 0.006, name
        assert calibration_scores(softmax(2 * np.log(truth)), votes)[name] > 0.03, name


# --- the truth ------------------------------------------------------------------------------------


def test_distance_from_the_truth_by_hand() -> None:
    truth = np.array([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]])
    judged = np.array([[0.25, 0.5, 0.25], [0.5, 0.5, 0.0]])
    found = truth_scores(truth, judged, Votes.hard(np.array([0, 0])))
    first = 0.5 * np.log(2) - 0.25 * np.log(2)
    assert found["kl"] == pytest.approx((first + np.log(2)) / 2)
    assert found["mean_absolute_error"] == pytest.approx((0.25 + 0.25 + 0.5 + 0.5) / 6)
    assert found["excess_log_loss"] == pytest.approx(np.log(2))
    assert set(truth_scores(truth, truth, Votes.hard(np.array([1, 0]))).values()) == {0.0}


@given(seeds)
def test_kl_is_the_excess_log_loss_to_be_expected(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, judged = rng.dirichlet(np.ones(3), (2, 20))
    # The expectation over votes, class by class, instead of the draw.
    votes = [Votes.hard(np.full(20, k)) for k in range(3)]
    expected = sum(
        (truth[:, k] * (losses(judged, v) - losses(truth, v))).mean() for k, v in enumerate(votes)
    )
    found = truth_scores(truth, judged, votes[0])["kl"]
    assert found == pytest.approx(expected)
    assert found >= 0


# --- the order of the answers ---------------------------------------------------------------------


@given(seeds)
def test_a_swap_equivariant_judge_has_no_position_bias(seed: int) -> None:
    """The logits of such a judge are the same in both orders after those of BA are swapped back."""
    rng = np.random.default_rng(seed)
    logits, votes = rng.normal(size=(30, 3)), Votes.hard(rng.integers(0, 3, 30))
    found = position_bias(np.stack([logits, logits], axis=1), votes)
    loss = found.pop("log_loss")
    assert set(found.values()) == {0.0}
    assert loss["AB"] == loss["BA"] == pytest.approx(loss["both"])


def test_logits_that_are_not_exchanged_back_look_biased() -> None:
    rng = np.random.default_rng(0)
    logits, votes = rng.normal(size=(300, 3)), Votes.hard(rng.integers(0, 3, 300))
    found = position_bias(np.stack([logits, swap_classes(logits)], axis=1), votes)
    assert found["flip_rate"] > 0.5
    assert found["total_variation"] > 0.1


def test_position_bias_by_hand() -> None:
    p = [
        [[0.6, 0.3, 0.1], [0.2, 0.7, 0.1]],  # the first answer in both orders
        [[0.2, 0.7, 0.1], [0.6, 0.3, 0.1]],  # the second in both
        [[0.6, 0.3, 0.1], [0.1, 0.3, 0.6]],  # the first, then a tie
        [[0.6, 0.3, 0.1], [0.6, 0.3, 0.1]],  # A in both
    ]
    votes = Votes.hard(np.array([0, 0, 2, 1]))
    found = position_bias(np.log(p), votes)
    assert found["flip_rate"] == 3 / 4
    assert found["total_variation"] == pytest.approx((0.4 + 0.4 + 0.5 + 0) / 4)
    # First: 2 + 0 + 1 + 1, second: 0 + 2 + 0 + 1, of eight verdicts.
    assert found["first_place_preference"] == pytest.approx((4 - 3) / 8)
    by_hand = -np.log([0.6, 0.2, 0.1, 0.3]).mean()
    assert found["log_loss"]["AB"] == pytest.approx(by_hand)
    assert found["log_loss"]["BA"] == pytest.approx(-np.log([0.2, 0.6, 0.6, 0.3]).mean())


def test_a_judge_that_always_prefers_the_first_answer() -> None:
    logits = np.tile(np.array([[1.0, 0, 0], [0, 1, 0]]), (5, 1, 1))
    votes = Votes.hard(np.zeros(5, int))
    found = position_bias(logits, votes)
    assert found["first_place_preference"] == 1
    assert position_bias(logits[:, ::-1], votes)["first_place_preference"] == -1
    assert found["log_loss"]["both"] < found["log_loss"]["BA"]


# --- what one prompt and equal answers show ---------------------------------------------------------


def test_one_prompt_has_no_interval() -> None:
    """Battles with the same prompt are one draw: how much luck it had, nobody can see."""
    p, votes = np.full((4, 3), 1 / 3), Votes.hard(np.array([0, 1, 2, 0]))
    one, several = np.zeros(4, int), np.arange(4)
    assert mean_interval(np.arange(4.0), votes, one) == (1.5, None, None)
    assert paired_difference(np.arange(4.0), np.zeros(4), votes, one)["low"] is None
    assert deployed_score(p, votes, one)["accuracy"] == {"value": 1 / 3, "low": None, "high": None}
    low, high = mean_interval(np.arange(4.0), votes, several)[1:]
    assert low is not None
    assert high is not None
    assert low < 1.5 < high


@given(
    right=st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=40),
    of=st.integers(1, 5),
)
def test_the_interval_of_a_share_stays_between_0_and_1(right: list[float], of: int) -> None:
    values, votes = np.array(right), Votes.hard(np.zeros(len(right), int))
    groups = np.arange(len(right)) // of
    share, low, high = share_interval(values, votes, groups)
    if low is None or high is None:
        assert len(np.unique(groups)) == 1
        return
    assert share == pytest.approx(values.mean())
    assert -1e-9 <= low <= share + 1e-9
    assert share - 1e-9 <= high <= 1 + 1e-9
    assert high - low > 1e-3, "without any spread too"
    _, mirrored, _ = share_interval(1 - values, votes, groups)
    assert mirrored == pytest.approx(1 - high)


def test_the_interval_of_a_share_is_wilsons() -> None:
    votes, groups = Votes.hard(np.zeros(400, int)), np.arange(400)
    none = share_interval(np.zeros(400), votes, groups)[1:]
    exact = stats.binomtest(0, 400).proportion_ci(method="wilson")
    assert none == pytest.approx((exact.low, exact.high), abs=1e-5)
    right = (groups < 120).astype(float)
    found = share_interval(right, votes, groups)[1:]
    exact = stats.binomtest(120, 400).proportion_ci(method="wilson")
    assert found == pytest.approx((exact.low, exact.high), abs=1e-4)
    # Four battles of each prompt that fare alike are as one.
    apart = share_interval(right[::4], votes[:100], groups[:100])[1:]
    assert share_interval(right, votes, groups // 4)[1:] == pytest.approx(apart)


def test_a_judge_to_whom_both_answers_are_equal_does_not_say_a() -> None:
    p = np.array([[0.4, 0.4, 0.2], [0.4, 0.4, 0.2], [0.4, 0.4, 0.2], [0.3, 0.5, 0.2]])
    votes = Votes.hard(np.array([0, 1, 2, 1]))
    assert right_verdicts(p, votes).tolist() == [0.5, 0.5, 0, 1]
    exchanged = Votes.hard(np.array([1, 0, 2, 0]))
    assert scores(swap_classes(p), exchanged) == scores(p, votes)
    assert reliability(p, votes)[0]["accuracy"] == pytest.approx(1 / 3)
