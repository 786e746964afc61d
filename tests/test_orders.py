"""Swapping the answers swaps the verdict; two swaps change nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from arena_distill.verdicts import CLASSES, NO_VOTE, ORDERS, Order, Votes, exchange, swap_classes


@given(hnp.arrays(np.int64, st.integers(0, 9), elements=st.integers(NO_VOTE, 2)))
def test_a_hard_vote_and_its_label_are_one(labels: np.ndarray) -> None:
    votes = Votes.hard(labels)
    np.testing.assert_array_equal(votes.labels, labels)
    np.testing.assert_array_equal(votes.known, labels != NO_VOTE)
    np.testing.assert_array_equal(votes.probabilities.sum(axis=1), votes.known)
    np.testing.assert_array_equal(votes.weights, 1)


def test_the_label_of_a_soft_vote_is_its_likeliest_class() -> None:
    soft = Votes(np.array([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2], [0, 0, 0]]), np.array([1.0, 3, 2]))
    assert soft.labels.tolist() == [1, 0, NO_VOTE]
    assert soft[np.array([True, False, True])].labels.tolist() == [1, NO_VOTE]
    assert soft.mean(np.array([6.0, 2, 0])) == 2


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


@given(
    hnp.arrays(np.float32, (2, 3, 2, 3), elements=st.floats(-9, 9, width=32)),
    st.permutations(ORDERS),
)
def test_what_was_stored_is_shown_to_students_as_the_judge_saw_it(
    seen: np.ndarray, orders: list[Order]
) -> None:
    stored = exchange(seen, orders)
    ab, ba = orders.index("AB"), orders.index("BA")
    assert stored.dtype == seen.dtype
    np.testing.assert_array_equal(stored[..., ab, :], seen[..., ab, :])
    np.testing.assert_array_equal(stored[..., ba, :], swap_classes(seen[..., ba, :]))
    np.testing.assert_array_equal(exchange(stored, orders), seen)


def test_swapping_exchanges_a_and_b_and_leaves_ties() -> None:
    assert CLASSES == ("model_a", "model_b", "tie")
    assert ORDERS == ("AB", "BA")
    assert swap_classes(np.array([[0.1, 0.2, 0.7]])).tolist() == [[0.2, 0.1, 0.7]]


@pytest.mark.parametrize("label", [0, 1, 2])
def test_a_vote_and_its_label_swap_together(label: int) -> None:
    votes = Votes.hard(np.array([label]))
    swapped = Votes(swap_classes(votes.probabilities), votes.weights)
    assert swapped.labels.tolist() == [[1, 0, 2][label]]
