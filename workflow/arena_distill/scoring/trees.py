"""Boosted trees as arrays: fitted by scikit-learn, written without pickle, asked by numpy alone.

The trees are those of Friedman 2001, Greedy function approximation, Ann. Statist. 29(5).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from threadpoolctl import threadpool_limits

from arena_distill.errors import InputError, refusing
from arena_distill.files.artifacts import replacing
from arena_distill.metrics import softmax

ROWS = 1_024
"""Rows that go down all trees at a time."""


@dataclass(frozen=True)
class Trees:
    """Trees whose leaves add to the logits of classes. Both children of a leaf are the leaf itself.

    feature: int32 (trees, nodes), the column of the inputs that a node looks at.
    threshold: float64 (trees, nodes); a row that is not above it goes to the left.
    left, right: int32 (trees, nodes), a node's children, which come after it.
    value: float64 (trees, nodes), what a leaf adds.
    column: int32 (trees,), to the logits of which of the `classes` a tree adds.
    baseline: float64 (classes,), the logits before all trees.
    classes: int32 (classes,), the classes that some row had, in rising order.
    """

    feature: np.ndarray
    threshold: np.ndarray
    left: np.ndarray
    right: np.ndarray
    value: np.ndarray
    column: np.ndarray
    baseline: np.ndarray
    classes: np.ndarray

    @classmethod
    def fit(cls, inputs: np.ndarray, kind: np.ndarray, weights: np.ndarray) -> Trees:
        """Fit trees, on one thread: the same rows give the same trees.

        Args:
            inputs: float (rows, features).
            kind: int (rows,), the class of each row.
            weights: float (rows,).
        """
        from sklearn.ensemble import HistGradientBoostingClassifier

        classes = np.unique(kind)
        if len(classes) < 2:  # nothing to learn
            return cls.of([], np.zeros(len(classes)), classes)
        fitted = HistGradientBoostingClassifier(
            learning_rate=0.03,
            max_iter=200,
            max_leaf_nodes=6,
            min_samples_leaf=40,
            max_features=0.1,
            l2_regularization=10.0,
            early_stopping=False,
            random_state=0,
        )
        with threadpool_limits(1):
            fitted.fit(inputs, kind, weights)
        nodes = [[tree.nodes for tree in step] for step in fitted._predictors]
        # Of two classes, scikit-learn has trees and a baseline for the second alone.
        baseline = np.zeros(len(classes))
        baseline[-fitted._baseline_prediction.size :] = fitted._baseline_prediction.ravel()
        return cls.of(nodes, baseline, classes)

    @classmethod
    def of(cls, steps: list[list[np.ndarray]], baseline: np.ndarray, classes: np.ndarray) -> Trees:
        """From scikit-learn's nodes: by step, the trees of the last classes."""
        trees = [nodes for step in steps for nodes in step]
        shape = (len(trees), max(map(len, trees), default=1))
        found = cls(
            np.zeros(shape, np.int32),
            np.zeros(shape),
            np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
            np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
            np.zeros(shape),
            np.array([len(classes) - len(s) + i for s in steps for i in range(len(s))], np.int32),
            baseline.astype(np.float64),
            classes.astype(np.int32),
        )
        for row, nodes in enumerate(trees):
            inner = np.flatnonzero(nodes["is_leaf"] == 0)
            found.feature[row, inner] = nodes["feature_idx"][inner]
            found.threshold[row, inner] = nodes["num_threshold"][inner]
            found.left[row, inner] = nodes["left"][inner]
            found.right[row, inner] = nodes["right"][inner]
            found.value[row, : len(nodes)] = nodes["value"]
        return found

    def probabilities(self, inputs: np.ndarray, classes: int) -> np.ndarray:
        """What the trees say of rows: float64 (rows, classes); 0 for a class that no row had.

        Args:
            inputs: float32 (rows, features).
            classes: how many there are.
        """
        found = np.zeros((len(inputs), classes))
        for start in range(0, len(inputs), ROWS):
            part = slice(start, start + ROWS)
            found[part, self.classes] = softmax(self._logits(inputs[part]))
        return found

    def _logits(self, inputs: np.ndarray) -> np.ndarray:
        """float64 (rows, the trees' classes)."""
        row, tree = np.arange(len(inputs))[:, None], np.arange(len(self.feature))
        at = np.zeros((len(inputs), len(tree)), np.int32)
        for _ in range(self.feature.shape[1]):
            left = inputs[row, self.feature[tree, at]] <= self.threshold[tree, at]
            below = np.where(left, self.left[tree, at], self.right[tree, at])
            if (below == at).all():
                break
            at = below
        share = self.column[:, None] == np.arange(len(self.classes))
        added: np.ndarray = self.value[tree, at] @ share.astype(np.float64)
        return self.baseline + added

    def write(self, path: Path) -> None:
        """Write them as safetensors."""
        with replacing(path) as temporary:
            save_file({name: np.ascontiguousarray(a) for name, a in vars(self).items()}, temporary)

    @classmethod
    def read(cls, path: Path, features: int, classes: int) -> Trees:
        """Read a file of :meth:`write`.

        Args:
            features: the columns that inputs have.
            classes: the classes that there are.

        Raises:
            InputError: it is missing, damaged, or of other inputs or classes.
        """
        if not path.is_file():
            raise InputError(f"{path}: no such file; copy the judge's whole folder again")
        with refusing(f"{path}: not the trees of a stack, or not whole; copy it again"):
            found = cls(**load_file(path))
            if not found._fit(features, classes):
                raise ValueError(f"trees of other than {features} features or {classes} classes")
        return found

    def _fit(self, features: int, classes: int) -> bool:
        """Whether the arrays belong together, and to inputs of so many features and classes."""
        shape, count = self.feature.shape, len(self.classes)
        if not (
            len(shape) == 2 and self.column.shape == shape[:1] and self.baseline.shape == (count,)
        ):
            return False
        if any(a.shape != shape for a in (self.threshold, self.left, self.right, self.value)):
            return False
        own = np.arange(shape[1])
        children = np.stack([self.left, self.right])
        return bool(
            ((self.feature >= 0) & (self.feature < features)).all()
            and ((self.column >= 0) & (self.column < count)).all()
            and ((self.classes >= 0) & (self.classes < classes)).all()
            and ((children >= own) & (children < shape[1])).all()
            and np.isfinite(self.value).all()
            and np.isfinite(self.baseline).all()
        )
