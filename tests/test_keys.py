"""Files are joined by key: order does not matter; missing or repeated keys are errors."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arena_distill.errors import InputError
from arena_distill.files.keys import key, locate


@given(st.permutations([str(i) for i in range(12)]), st.integers(0, 12))
def test_locate_finds_every_row_wherever_it_is(shuffled: list[str], count: int) -> None:
    wanted = pa.array([str(i) for i in range(count)], pa.string())
    position = locate(wanted, pa.array(shuffled), "there")
    assert position.dtype == np.int64
    assert [shuffled[i] for i in position] == wanted.to_pylist()


def test_the_same_id_in_two_sources_is_two_rows() -> None:
    table = pa.table({"id": ["1", "1"], "source": ["train", "extra"]})
    assert key(table).to_pylist() == ["train:1", "extra:1"]


def test_keys_do_not_depend_on_how_the_file_stores_text() -> None:
    source = pa.array(["train", "extra"]).dictionary_encode()
    large = pa.table({"id": pa.array(["1", "2"], pa.large_string()), "source": source})
    plain = pa.table({"id": ["1", "2"], "source": ["train", "extra"]})
    assert key(large).equals(key(plain))
    assert locate(key(large), key(plain), "there").tolist() == [0, 1]


def test_key_of_chunks_and_of_nothing() -> None:
    one = pa.table({"id": ["1"], "source": ["ut"]})
    assert key(pa.concat_tables([one, one.slice(0, 0), one])).to_pylist() == ["ut:1", "ut:1"]
    nothing = key(one.schema.empty_table())
    assert len(nothing) == 0
    assert locate(nothing, nothing, "there").shape == (0,)
    assert locate(nothing, key(one), "there").shape == (0,)


def test_missing_rows_name_the_file_their_number_and_an_example() -> None:
    with pytest.raises(InputError, match=r"x\.npy: 2 of 3 rows are missing, b among them"):
        locate(pa.array(["a", "b", "c"]), pa.array(["a"]), "logits in x.npy")


def test_rows_there_twice_are_an_error() -> None:
    with pytest.raises(InputError, match=r"x\.npy: a is there more than once"):
        locate(pa.array(["b"]), pa.array(["a", "b", "a"]), "logits in x.npy")
