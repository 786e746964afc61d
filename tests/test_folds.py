"""Folds: which battles train, which validate, and which prompts leak."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest
from conftest import battles_table
from hypothesis import given, settings
from hypothesis import strategies as st

from arena_distill.battles import reading as raw
from arena_distill.battles.folds import (
    SCHEMA,
    assign_folds,
    choice_rows,
    dropped_extra,
    fold_settings,
    held_out_rows,
    shared_prompts,
    training_rows,
    validation_rows,
    write_folds,
)
from arena_distill.battles.prompts import prompt_groups
from arena_distill.battles.votes import votes_of
from arena_distill.config.phases.battles import FoldsSettings
from arena_distill.config.vocabulary import FoldMethod
from arena_distill.errors import InputError
from arena_distill.files.artifacts import read_parquet, read_provenance, write_parquet

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real battles in {DATA}")

METHODS: tuple[FoldMethod, ...] = get_args(FoldMethod)


def made_up(prompts: int = 40, per_prompt: int = 3, extra: int = 30) -> pa.Table:
    """Train battles of repeated prompts, extra ones of which some share them, ut and test."""
    rows: list[dict[str, Any]] = []

    def add(source: str, prompt: str, label: int | None) -> None:
        rows.append({"id": str(len(rows)), "source": source, "prompt": prompt, "label": label})

    for i in range(prompts * per_prompt):
        add("train", f"question {i % prompts}", i % 3)
    for i in range(extra):
        add("extra", f"QUESTION  {i}", i % 3)
    add("ut", "question 0", 1)
    add("test", "question 1", None)
    return battles_table(rows)


def in_fold(folds: pa.Table, fold: int) -> tuple[set[int], set[int]]:
    """Prompts of the training and of the validation rows of a fold."""
    groups = folds["group"].to_numpy()
    return set(groups[training_rows(folds, fold)]), set(groups[validation_rows(folds, fold)])


def battles_of(prompts: list[list[str]]) -> pa.Table:
    return pa.table({"prompt": pa.array(prompts, pa.list_(pa.string()))})


@pytest.mark.parametrize("method", METHODS)
def test_every_train_battle_validates_once(method: FoldMethod) -> None:
    folds = assign_folds(made_up(), method=method, n=5, seed=1)
    assert folds.schema == SCHEMA
    source = folds["source"].to_numpy()
    validated = np.concatenate([validation_rows(folds, fold) for fold in range(5)])
    assert sorted(validated) == list(np.flatnonzero(source == "train"))
    assert set(folds["fold"].to_numpy()[source == "extra"]) == {-1}
    assert set(source) == {"train", "extra"}
    for fold in range(5):
        training, validation = training_rows(folds, fold), validation_rows(folds, fold)
        assert training.dtype == validation.dtype == np.int64
        assert not set(training) & set(validation)
        assert len(training) + len(validation) + dropped_extra(folds, fold) == folds.num_rows


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_folds(method: FoldMethod) -> None:
    first, again, other = (
        assign_folds(made_up(), method=method, n=4, seed=seed) for seed in (2025, 2025, 42)
    )
    assert first.equals(again)
    assert not first.equals(other)


def test_stratified_is_scikit_learns() -> None:
    from sklearn.model_selection import StratifiedKFold

    battles = made_up(extra=0)
    folds = assign_folds(battles, method="stratified", n=5, seed=2025)
    labels = votes_of(folds).labels
    splits = StratifiedKFold(5, shuffle=True, random_state=2025).split(labels, labels)
    for fold, (training, validation) in enumerate(splits):
        np.testing.assert_array_equal(training_rows(folds, fold), training)
        np.testing.assert_array_equal(validation_rows(folds, fold), validation)


def test_no_prompt_is_in_several_folds() -> None:
    folds = assign_folds(made_up(), method="stratified_group", n=5, seed=0)
    for fold in range(5):
        training, validation = in_fold(folds, fold)
        assert not training & validation
        assert shared_prompts(folds, fold) == 0
    # Every one of the 30 extra battles shares its prompt with train, hence with one fold.
    assert sum(dropped_extra(folds, fold) for fold in range(5)) == 30


@pytest.mark.parametrize("method", METHODS)
def test_held_out_rows_are_neither_trained_on_nor_scored(method: FoldMethod) -> None:
    folds = assign_folds(made_up(), method=method, n=4, seed=3, holdout=0.2)
    groups = folds["group"].to_numpy()
    held = held_out_rows(folds)
    assert len(set(groups[held])) == 8, "a fifth of the 40 prompts"
    for fold in range(4):
        training, validation = in_fold(folds, fold)
        assert not set(groups[held]) & (training | validation)
    without = assign_folds(made_up(), method=method, n=4, seed=3)
    assert not len(held_out_rows(without))


@pytest.mark.parametrize("method", METHODS)
def test_battles_for_choices_are_others_than_those_that_score(method: FoldMethod) -> None:
    folds = assign_folds(made_up(), method=method, n=4, seed=3, holdout=0.2, choices=0.1)
    groups = folds["group"].to_numpy()
    held, chosen = set(groups[held_out_rows(folds)]), set(groups[choice_rows(folds)])
    assert (len(held), len(chosen)) == (8, 4), "a fifth and a tenth of the 40 prompts"
    assert not held & chosen
    for fold in range(4):
        training, validation = in_fold(folds, fold)
        assert not chosen & (training | validation)
    without = assign_folds(made_up(), method=method, n=4, seed=3, holdout=0.2)
    np.testing.assert_array_equal(held_out_rows(without), held_out_rows(folds))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2)), min_size=20), st.integers(2, 4))
def test_prompts_never_leak_whatever_the_battles(rows: list[tuple[int, int]], n: int) -> None:
    half = len(rows) // 2
    table = battles_table(
        [
            {"source": "train" if i < half else "extra", "prompt": f"p{prompt}", "label": label}
            for i, (prompt, label) in enumerate(rows)
        ]
    )
    try:
        folds = assign_folds(table, method="stratified_group", n=n, seed=0)
    except InputError:
        return
    for fold in range(n):
        training, validation = in_fold(folds, fold)
        assert validation
        assert not training & validation


@pytest.mark.parametrize("method", ["kfold", "stratified"])
def test_leak_of_the_historical_folds_is_counted(method: FoldMethod) -> None:
    folds = assign_folds(made_up(), method=method, n=5, seed=0)
    assert all(dropped_extra(folds, fold) == 0 for fold in range(5))
    for fold in range(5):
        training, validation = in_fold(folds, fold)
        groups = folds["group"].to_numpy()[validation_rows(folds, fold)]
        expected = sum(group in training & validation for group in groups)
        assert shared_prompts(folds, fold) == expected > 0
    strict = training_rows(folds, 0, drop_shared_groups=True)
    assert set(strict) < set(training_rows(folds, 0))


def test_same_prompt_whatever_its_case_and_spaces() -> None:
    same = [["Straße ﬁn"], ["STRASSE  fin\n"], ["strasse", "fin"], [" strasse\u00a0ﬁn "]]
    groups = prompt_groups(battles_of([*same, ["strasse"], [], [""], ["Straße ﬁn"]])["prompt"])
    assert groups.dtype == np.int64
    assert groups.tolist() == [0, 0, 0, 0, 1, 2, 2, 0]


@given(st.lists(st.lists(st.text(st.characters(codec="utf-8")), max_size=2), max_size=8))
def test_groups_number_prompts_in_order_of_appearance(prompts: list[list[str]]) -> None:
    groups = prompt_groups(battles_of(prompts)["prompt"]).tolist()
    again = prompt_groups(battles_of(prompts + prompts)["prompt"]).tolist()
    assert again == groups + groups
    assert list(dict.fromkeys(groups)) == list(range(len(set(groups))))


@pytest.mark.parametrize(
    ("method", "n", "message"),
    [
        ("kfold", 13, "12 train battles for 13 folds"),
        ("stratified", 5, "4 train battles with the vote A for 5 folds"),
        ("stratified_group", 3, "2 prompts of battles with the vote A for 3 folds"),
        ("kfold", 1, "n is 1, 2 to 127 expected"),
        ("kfold", 128, "n is 128, 2 to 127 expected"),
    ],
)
def test_too_many_folds(method: FoldMethod, n: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        assign_folds(made_up(prompts=2, per_prompt=6), method=method, n=n, seed=0)


def test_as_many_folds_as_int8_holds() -> None:
    folds = assign_folds(made_up(prompts=130, per_prompt=1), method="kfold", n=127, seed=0)
    assert folds["fold"].to_numpy().max() == 126
    assert len(validation_rows(folds, 126)) == 1


def test_unknown_method_and_fold() -> None:
    with pytest.raises(ValueError, match="unknown method 'random'"):
        assign_folds(made_up(), method="random", n=5, seed=0)  # type: ignore[arg-type]
    folds = assign_folds(made_up(), method="kfold", n=5, seed=0)
    for fold in (-1, 5):
        with pytest.raises(InputError, match=f"no fold {fold}: the folds are 0 to 4"):
            validation_rows(folds, fold)
        with pytest.raises(InputError, match=f"no fold {fold}"):
            training_rows(folds, fold)
    with pytest.raises(InputError, match="does not hold its method"):
        training_rows(folds.replace_schema_metadata(None), 0)


def test_the_file_holds_its_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_parquet(made_up(), tmp_path / "battles.parquet", {})
    chosen = FoldsSettings(version=1, method="stratified_group", n=3, seed=7)
    for name in ("a", "b"):
        write_folds(tmp_path / "battles.parquet", tmp_path / name, settings=chosen)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    folds = read_parquet(tmp_path / "a")
    assert folds.schema == SCHEMA
    assert read_provenance(tmp_path / "a")["settings"] == chosen.model_dump()
    assert fold_settings(folds) == {"method": "stratified_group", "n": 3, "seed": 7}
    assert not set.intersection(*in_fold(folds, 0))
    printed = capsys.readouterr().out
    assert f"{dropped_extra(folds, 0)} extra rows dropped" in printed
    by_row = chosen.model_copy(update={"method": "kfold"})
    write_folds(tmp_path / "battles.parquet", tmp_path / "c", settings=by_row)
    assert "validation rows share a prompt with training rows" in capsys.readouterr().out


@needs_data
def test_real_battles_leak_by_row_and_not_by_prompt() -> None:
    battles, _ = raw.read_battles({s: [DATA / f"{s}.csv"] for s in ("train", "extra")})
    by_row = assign_folds(battles, method="stratified", n=5, seed=2025)
    by_prompt = assign_folds(battles, method="stratified_group", n=5, seed=2025)
    assert sum(shared_prompts(by_row, fold) for fold in range(5)) > 500
    assert sum(shared_prompts(by_prompt, fold) for fold in range(5)) == 0
    for fold in range(5):
        assert not set.intersection(*in_fold(by_prompt, fold))
        labels = votes_of(by_prompt).labels[validation_rows(by_prompt, fold)]
        assert np.bincount(labels, minlength=3).min() > 40
