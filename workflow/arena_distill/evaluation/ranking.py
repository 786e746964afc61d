"""Rank the models that battle by votes and by a judge, and compare the two rankings.

A leaderboard ranks models by a Bradley-Terry model of votes. A judge in the place of people is to rank them
alike, which a log loss does not show: errors on single battles may cancel, or favour one model.

The strengths θ maximise the likelihood of P(i beats j) = 1 / (1 + exp(θ_j − θ_i)), where a tie is half a
win for either and a probability a share of a win (Chatbot Arena: Chiang et al. 2024, arXiv:2403.04132). A
standard normal prior keeps the strength of a model that only wins finite; many battles outweigh it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arena_distill.metrics import RESAMPLES_AT_ONCE, Figures
from arena_distill.verdicts import Votes

FEWEST_MODELS = 5
"""Of fewer models a rank correlation says nothing."""

FEWEST_BATTLES = 20
"""A model with fewer battles is not ranked; its battles still count for the others."""

RESAMPLES = 256

RANKING_COLUMNS = ("battles", "model", "rows", "votes", "judge")


def strengths(wins: np.ndarray) -> np.ndarray:
    """Fit Bradley-Terry strengths by Newton's method: float64 (..., models), in nats, of mean zero.

    Args:
        wins: float64 (..., models, models), how often the model of the row beat that of the column; zeros
            on the diagonal.

    References:
        Bradley and Terry 1952, Rank Analysis of Incomplete Block Designs: the Method of Paired Comparisons.
    """
    theta = np.zeros(wins.shape[:-1])
    games, own = wins + wins.swapaxes(-1, -2), np.eye(wins.shape[-1])
    for _ in range(100):
        expected = 1 / (1 + np.exp(theta[..., None, :] - theta[..., :, None]))
        slope = (wins - games * expected).sum(axis=-1) - theta
        curvature = games * expected * (1 - expected)
        information = own * (1 + curvature.sum(axis=-1, keepdims=True)) - curvature
        step = np.linalg.solve(information, slope[..., None])[..., 0]
        theta += step
        if abs(step).max(initial=0) < 1e-8:
            break
    return theta


def rank_models(
    battles: pa.Table, judged: Mapping[str, np.ndarray], votes: Votes, groups: np.ndarray
) -> Figures | None:
    """Compare the ranking of models by votes with that by probabilities of the same battles.

    Args:
        battles: string columns `model_a` and `model_b`, null where unknown: these battles do not count,
            nor do those of a model with itself. Of groups of models that never met, the one with the most
            battles counts: strengths in different groups cannot be compared.
        judged: probabilities (rows, classes) by name; the first are those of the judge.
        votes: of these battles; their weights count.
        groups: int (rows,), the battle's prompt.

    Returns:
        None if fewer than `FEWEST_MODELS` models have `FEWEST_BATTLES` battles with a vote. Else `rows`,
        the battles; `models`, those ranked, the strongest by votes first: `model`, `rows`, and its
        strengths by `votes` and `judge`, in nats; `agreement` by name of `judged`: `spearman` and `kendall`
        (τ-b), each `value`, `low` and `high`, the 95 % percentiles over `RESAMPLES` resamples of prompts.
        Votes drawn again are noisier than the votes: the value lies in the upper part of its interval.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    sides = [battles[name].combine_chunks().cast(pa.string()) for name in ("model_a", "model_b")]
    coded = pa.concat_arrays(sides).dictionary_encode()
    names, place = np.unique(np.array(coded.dictionary.to_pylist(), str), return_inverse=True)
    codes = np.append(place, -1)[pc.fill_null(coded.indices, len(place)).to_numpy()]
    first, second = codes.reshape(2, -1)
    count = len(names)
    rows = np.flatnonzero((first >= 0) & (second >= 0) & (first != second) & votes.known)
    met = coo_array((np.ones(len(rows)), (first[rows], second[rows])), shape=(count, count))
    part = connected_components(met, directed=False)[1][first[rows]]
    rows = rows[part == np.bincount(part, minlength=1).argmax()]
    first, second, votes = first[rows], second[rows], votes[rows]
    seen = np.bincount(np.concatenate([first, second]), minlength=count)
    ranked = np.flatnonzero(seen >= FEWEST_BATTLES)
    if len(ranked) < FEWEST_MODELS:
        return None
    group = np.unique(groups[rows], return_inverse=True)[1]
    prompts = int(group.max()) + 1
    pairs = np.concatenate([first * count + second, second * count + first])

    def wins_of(probabilities: np.ndarray) -> coo_array:
        """The wins of every pair of models by prompt: (models², prompts)."""
        ties = probabilities[:, 2:].sum(axis=1) / 2
        shares = [votes.weights * (probabilities[:, side] + ties) for side in (0, 1)]
        cells = np.concatenate(shares), (pairs, np.tile(group, 2))
        return coo_array(cells, shape=(count**2, prompts)).tocsr()

    wins = {"votes": wins_of(votes.probabilities)}
    wins |= {name: wins_of(probabilities[rows]) for name, probabilities in judged.items()}

    def fitted(draws: np.ndarray) -> dict[str, np.ndarray]:
        """Strengths of the ranked models, (draws, ranked), from counts of prompts (draws, prompts)."""
        shape = (len(draws), count, count)
        return {n: strengths((w @ draws.T).T.reshape(shape))[:, ranked] for n, w in wins.items()}

    whole = fitted(np.ones((1, prompts)))
    rng = np.random.default_rng(0)
    drawn = [
        fitted(rng.multinomial(prompts, np.full(prompts, 1 / prompts), RESAMPLES_AT_ONCE))
        for _ in range(RESAMPLES // RESAMPLES_AT_ONCE)
    ]
    agreement: Figures = {name: {} for name in judged}
    for name, found in agreement.items():
        for measure, correlate in (("spearman", spearman), ("kendall", kendall)):
            value, *values = np.concatenate(
                [correlate(part["votes"], part[name]) for part in [whole, *drawn]]
            )
            low, high = np.quantile(values, [0.025, 0.975])
            found[measure] = {"value": float(value), "low": float(low), "high": float(high)}
    (by_votes,), (by_judge,) = whole["votes"], whole[next(iter(judged))]
    models = [
        {"model": str(names[ranked[i]]), "rows": int(seen[ranked[i]])}
        | {"votes": float(by_votes[i]), "judge": float(by_judge[i])}
        for i in np.argsort(-by_votes, kind="stable")
    ]
    return {"rows": len(rows), "models": models, "agreement": agreement}


def spearman(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Spearman's ρ of each row: float64 (rows,) of float (rows, models); 0 where one ranks all alike."""
    from scipy.stats import rankdata

    ranks = [rankdata(values, axis=1) for values in (first, second)]
    return _cosine(*(values - values.mean(axis=1, keepdims=True) for values in ranks))


def kendall(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Kendall's τ-b of each row: float64 (rows,) of float (rows, models); 0 where one ranks all alike."""
    return _cosine(
        *(
            np.sign(values[:, :, None] - values[:, None]).reshape(len(values), -1)
            for values in (first, second)
        )
    )


def _cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    norms = np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1))
    return np.asarray((first * second).sum(axis=1) / np.where(norms > 0, norms, 1))


def ranking_records(metrics: Figures) -> list[Figures]:
    """One record per ranked model, with the battles that it is ranked by."""
    found = shown_ranking(metrics)
    return [{"battles": found["battles"], **model} for model in found["models"]] if found else []


def shown_ranking(metrics: Figures) -> Figures | None:
    """The ranking on test battles, or else out of fold; None if neither has enough models."""
    for battles, figures in (("test", metrics["test"] or {}), ("out of fold", metrics)):
        if found := figures.get("ranking"):
            final = metrics["judges"][metrics["final"]["judge"]]
            optimistic = battles != "test" and bool(final.get("optimistic"))
            return {"battles": battles, "optimistic": optimistic, **found}
    return None


def describe_ranking(found: Figures | None) -> str:
    """The agreement of the rankings in a sentence, or why there is none."""
    if found is None:
        return (
            f"Models are not ranked: fewer than {FEWEST_MODELS} have {FEWEST_BATTLES} battles "
            "with a vote"
        )
    told = " and ".join(
        f"{name} {value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
        for name, value in (
            ("Spearman’s ρ", found["agreement"]["judge"]["spearman"]),
            ("Kendall’s τ", found["agreement"]["judge"]["kendall"]),
        )
    )
    return (
        f"{len(found['models'])} models ranked by votes and by the judge, {found['rows']:,} battles "
        f"{'of the test' if found['battles'] == 'test' else 'out of fold'}: {told}"
        f"{' (optimistic: its teachers learned these votes)' if found['optimistic'] else ''}"
    )
