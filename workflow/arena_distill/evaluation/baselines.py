"""Compute the baselines of a judge, on the battles that score the judge.

`class_prior` predicts the shares of the votes, `length_regression` uses the lengths of the answers, and the
true probabilities, if known, give the Bayes limit. The first two are fitted to training rows and predict
others. The trees over surface features are in ``scoring.surface_trees``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from arena_distill.verdicts import Votes

Baseline = Callable[[np.ndarray, Votes, np.ndarray], np.ndarray]
"""(features of the training rows, their votes, features of the rows to predict) → probabilities."""


def class_prior(training: np.ndarray, votes: Votes, rows: np.ndarray) -> np.ndarray:
    """Predict the shares of the training votes: float64 (rows, classes)."""
    return np.tile(votes.mean(votes.probabilities), (len(rows), 1))


def length_regression(training: np.ndarray, votes: Votes, rows: np.ndarray) -> np.ndarray:
    """Predict by logistic regression on the lengths of the answers: float64 (rows, classes)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    # The regression knows hard votes with weights only: a soft vote is one of each class.
    battle, kind = np.nonzero(votes.probabilities)
    if len(np.unique(kind)) < 2:
        return class_prior(training, votes, rows)
    counts = votes.weights[battle] * votes.probabilities[battle, kind]
    scale = StandardScaler().fit(training)
    model = LogisticRegression(max_iter=1000)
    model.fit(scale.transform(training)[battle], kind, counts)
    probabilities = np.zeros((len(rows), votes.classes))
    probabilities[:, model.classes_] = model.predict_proba(scale.transform(rows))
    return probabilities
