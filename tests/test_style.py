"""Style features of the answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import battles_table
from hypothesis import given
from hypothesis import strategies as st

from arena_distill.battles import style_features as module
from arena_distill.battles.style_features import LENGTHS, style_features
from arena_distill.files import artifacts
from arena_distill.files.artifacts import write_parquet
from arena_distill.files.keys import key

texts = st.text(st.sampled_from(["a", " ", "\n", "*", "#", "-", "1", ".", "é", "😀"]), max_size=40)


def features(a: str, b: str) -> np.ndarray:
    battle: np.ndarray = style_features(battles_table([{"response_a": a, "response_b": b}]))[0]
    return battle


def test_each_ornament_is_counted() -> None:
    ornate = "# One\n\n**two** and **three**\n\n- four\n  * five\n2. six\n### Seven"
    plain = "# no **header* here, no **bold\n** either -no list 1.no"
    counted = features(ornate, plain)[LENGTHS:]
    np.testing.assert_allclose(counted[1:], [1 / 3, 1, 1])  # "# no …" is a header too
    assert counted[0] == (len(ornate) - len(plain)) / (len(ornate) + len(plain))


@given(texts, texts)
def test_exchanging_the_answers_changes_every_sign(a: str, b: str) -> None:
    np.testing.assert_array_equal(features(a, b), -features(b, a))
    assert not features(a, a).any()
    assert np.isfinite(features(a, b)).all()


def test_no_battles_have_no_features() -> None:
    assert style_features(battles_table([]).cast(battles_table([{}]).schema)).shape == (0, 8)


def test_styles_are_read_a_part_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = battles_table(
        [{"response_a": "a " * (n % 5), "response_b": "**b**"} for n in range(40)]
    )
    monkeypatch.setattr(artifacts, "ROW_GROUP", 7)
    write_parquet(table, tmp_path / "battles.parquet", {"phase": "battles"})
    sizes = []

    def measured(part: pa.Table) -> np.ndarray:
        sizes.append(len(part))
        return style_features(part)

    monkeypatch.setattr(module, "style_features", measured)
    rows = np.random.default_rng(0).permutation(40)[:25]
    styles = module.read_styles(tmp_path / "battles.parquet", key(table).take(pa.array(rows)))
    np.testing.assert_array_equal(styles, style_features(table)[rows])
    assert sizes == [7, 7, 7, 7, 7, 5]
