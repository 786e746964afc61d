"""Exchanging the answers exchanges the verdict, and twice is nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from arena_distill.verdicts import CLASSES, ORDERS, swap_classes, swap_labels


@given(
    hnp.arrays(st.sampled_from([np.int8, np.int64]), st.integers(0, 9), elements=st.integers(0, 2))
)
def test_swapping_labels_twice_is_the_identity(labels: np.ndarray) -> None:
    swapped = swap_labels(labels)
    assert swapped.dtype == labels.dtype
    np.testing.assert_array_equal(swap_labels(swapped), labels)


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(0, 4), st.integers(1, 3), st.just(3)),
        elements=st.floats(-9, 9, width=32),
    )
)
def test_swapping_logits_twice_is_the_identity(logits: np.ndarray) -> None:
    np.testing.assert_array_equal(swap_classes(swap_classes(logits)), logits)
    np.testing.assert_array_equal(swap_classes(logits)[..., 2], logits[..., 2])


def test_swapping_exchanges_a_and_b_and_leaves_ties() -> None:
    assert CLASSES == ("model_a", "model_b", "tie")
    assert ORDERS == ("AB", "BA")
    assert swap_labels(np.array([0, 1, 2])).tolist() == [1, 0, 2]
    assert swap_classes(np.array([[0.1, 0.2, 0.7]])).tolist() == [[0.2, 0.1, 0.7]]


@pytest.mark.parametrize("label", [0, 1, 2])
def test_a_verdict_and_its_label_swap_together(label: int) -> None:
    verdict = np.eye(3)[label]
    assert swap_classes(verdict).argmax() == swap_labels(np.array([label]))[0]
