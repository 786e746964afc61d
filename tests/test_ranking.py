"""The ranking of models by votes and by a judge, on battles of models with known strengths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import kendalltau, spearmanr

from arena_distill.evaluation.ranking import (
    FEWEST_BATTLES,
    FEWEST_MODELS,
    describe_ranking,
    kendall,
    rank_models,
    spearman,
    strengths,
)
from arena_distill.metrics import softmax
from arena_distill.verdicts import NO_VOTE, Votes, swap_classes

STRENGTHS = np.linspace(1.5, -1.5, 7)


def battles_of(first: np.ndarray, second: np.ndarray) -> pa.Table:
    names = np.array([f"m{i}" for i in range(len(STRENGTHS))] + [None], object)
    return pa.table({"model_a": pa.array(names[first]), "model_b": pa.array(names[second])})


@pytest.fixture(scope="module")
def arena() -> tuple[np.ndarray, np.ndarray, np.ndarray, Votes]:
    """Models of each battle, the true probabilities, votes drawn from them (Davidson, ν = 1)."""
    rng = np.random.default_rng(3)
    first = rng.integers(0, len(STRENGTHS), 4000)
    second = (first + rng.integers(1, len(STRENGTHS), 4000)) % len(STRENGTHS)
    a, b = STRENGTHS[first], STRENGTHS[second]
    truth = softmax(np.column_stack([a, b, (a + b) / 2]))
    labels = (truth.cumsum(axis=1) < rng.random((4000, 1))).sum(axis=1).clip(max=2)
    return first, second, truth, Votes.hard(labels)


def test_two_models_differ_by_the_logarithm_of_their_odds() -> None:
    # 3,000 wins against 1,000; the prior is worth nothing beside them.
    found = strengths(np.array([[0.0, 3000.0], [1000.0, 0.0]]))
    assert found[0] - found[1] == pytest.approx(np.log(3), abs=2e-3)
    assert found.sum() == pytest.approx(0, abs=1e-9)
    always = strengths(np.array([[0.0, 50.0], [0.0, 0.0]]))
    assert 2 < always[0] - always[1] < 8, "the prior keeps who only wins finite"


def test_known_strengths_are_ranked_as_they_are(arena: Any) -> None:
    first, second, truth, votes = arena
    groups = np.arange(len(first)) // 4
    judged = {"judge": truth, "reversed": swap_classes(truth), "blind": np.full_like(truth, 1 / 3)}
    found = rank_models(battles_of(first, second), judged, votes, groups)
    assert found is not None
    assert [m["model"] for m in found["models"]] == [f"m{i}" for i in range(len(STRENGTHS))]
    assert sum(m["rows"] for m in found["models"]) == 2 * found["rows"] == 8000
    for measure in ("spearman", "kendall"):
        values = {name: found["agreement"][name][measure] for name in judged}
        assert values["judge"]["value"] == 1
        assert 0.8 < values["judge"]["low"] <= values["judge"]["high"] <= 1
        assert values["reversed"]["value"] == -1
        assert values["blind"] == {"value": 0, "low": 0, "high": 0}
    # A tie is half a win: P(i beats j) with ν = 1 is flatter than Bradley-Terry's, but as symmetric.
    by_votes, by_judge = ([m[k] for m in found["models"]] for k in ("votes", "judge"))
    assert np.corrcoef(by_votes, STRENGTHS)[0, 1] > 0.99
    assert by_votes == pytest.approx(by_judge, abs=0.15)


def test_battles_weigh_as_much_as_their_votes(arena: Any) -> None:
    first, second, truth, votes = arena
    rows, groups = np.arange(1000), np.arange(1000)
    twice = np.concatenate([rows, rows])
    weighted = Votes(votes.probabilities[rows], np.full(1000, 2.0))
    of_weights = rank_models(
        battles_of(first[rows], second[rows]), {"judge": truth[rows]}, weighted, groups
    )
    of_rows = rank_models(
        battles_of(first[twice], second[twice]),
        {"judge": truth[twice]},
        votes[twice],
        np.tile(groups, 2),
    )
    assert of_weights is not None
    assert of_rows is not None
    for weighed, repeated in zip(of_weights["models"], of_rows["models"], strict=True):
        assert {"rows": 0} | {k: weighed[k] for k in ("votes", "judge")} == pytest.approx(
            {"rows": 0} | {k: repeated[k] for k in ("votes", "judge")}
        )
    assert of_weights["agreement"] == of_rows["agreement"]


def test_what_names_no_two_models_or_no_vote_does_not_count(arena: Any) -> None:
    first, second, truth, votes = (values.copy() if isinstance(values, np.ndarray) else values
                                   for values in arena)  # fmt: skip
    known = Votes(votes.probabilities.copy(), votes.weights)
    first[0], second[1] = -1, first[1]
    known.probabilities[2] = Votes.hard(np.array([NO_VOTE])).probabilities
    found = rank_models(battles_of(first, second), {"judge": truth}, known, np.arange(4000))
    rest = rank_models(
        battles_of(first[3:], second[3:]), {"judge": truth[3:]}, known[np.arange(3, 4000)],
        np.arange(3997),
    )  # fmt: skip
    assert found == rest


def test_models_that_never_met_the_others_are_not_ranked(arena: Any) -> None:
    first, second, truth, votes = (values[:2000] if isinstance(values, np.ndarray) else
                                   values[np.arange(2000)] for values in arena)  # fmt: skip
    apart = np.isin(first, [5, 6]) == np.isin(second, [5, 6])  # 5 and 6 meet each other alone
    rows, groups = np.flatnonzero(apart), np.arange(apart.sum())
    found = rank_models(
        battles_of(first[rows], second[rows]), {"judge": truth[rows]}, votes[rows], groups
    )
    assert found is not None
    assert {m["model"] for m in found["models"]} == {"m0", "m1", "m2", "m3", "m4"}
    assert found["rows"] == (first[rows] < 5).sum()


def test_too_few_models_are_not_ranked() -> None:
    few = FEWEST_MODELS - 1
    first = np.tile(np.arange(few), FEWEST_BATTLES)
    # One more model, with one battle too few.
    second = np.where(np.arange(len(first)) < FEWEST_BATTLES - 1, few, (first + 1) % few)
    votes, judged = Votes.hard(first % 3), {"judge": np.full((len(first), 3), 1 / 3)}
    assert rank_models(battles_of(first, second), judged, votes, first) is None
    assert describe_ranking(None).startswith("Models are not ranked: fewer than 5")
    enough = np.append(first, 0), np.append(second, few)
    votes, judged = Votes.hard(enough[0] % 3), {"judge": np.full((len(enough[0]), 3), 1 / 3)}
    assert rank_models(battles_of(*enough), judged, votes, enough[0]) is not None


def test_correlations_are_scipys() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 5, (2, 20, 8)).astype(float)
    for ours, theirs in ((spearman, spearmanr), (kendall, kendalltau)):
        expected = [theirs(a, b).statistic for a, b in zip(first, second, strict=True)]
        assert ours(first, second) == pytest.approx(expected)
