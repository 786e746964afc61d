"""Trees over surface features: what they read, and what they never see."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from made_up_run import SIZES, MadeUpRun, made_up_run
from sklearn.ensemble import HistGradientBoostingClassifier

from arena_distill.battles import surface_features as features
from arena_distill.battles.folds import EVERY_FOLD, HELD_OUT, assign_folds
from arena_distill.battles.surface_features import ANSWER, PROMPT, read_surface, surface_features
from arena_distill.battles.votes import vote_columns, votes_of
from arena_distill.config.phases.settings import Settings
from arena_distill.errors import InputError
from arena_distill.files.artifacts import read_parquet, write_parquet
from arena_distill.files.keys import key
from arena_distill.files.probabilities import read_probabilities
from arena_distill.metrics import losses
from arena_distill.scoring import surface_trees as surface_trees_module
from arena_distill.scoring.surface_trees import (
    Surface,
    ask_surface,
    fit_surface,
    read_trees,
    write_surface,
)
from arena_distill.scoring.trees import Trees
from arena_distill.verdicts import Votes, swap_classes

RICH = """# Title
I am sorry, but I can't. **No** `code`!

- one
* two
1. three 42
| a | b |
See https://x.org? Я не знаю。"""


def surface_trees(training: Surface, votes: Votes, asked: Surface) -> np.ndarray:
    return ask_surface(fit_surface(training, votes), asked, votes.classes)


def predict(run: MadeUpRun, name: str = "trees.parquet") -> np.ndarray:
    """Probabilities of the out-of-fold rows."""
    output = run.folder / name
    folds, battles = run.folder / "folds.parquet", run.folder / "battles.parquet"
    write_surface(
        folds, battles, output, output.with_suffix(".safetensors"), settings=Settings(version=1)
    )
    table = read_parquet(folds)
    return read_probabilities(output, key(table.filter(pa.array(table["fold"].to_numpy() >= 0))))


def test_what_shows_of_an_answer_is_counted() -> None:
    battle = {"prompt": [["See one?", "two"]], "response_a": [[RICH]], "response_b": [[""]]}
    prompt, a, b = (array[0] for array in surface_features(pa.table(battle)))
    assert dict(zip(PROMPT, prompt.tolist(), strict=True)) == {
        "characters": 12, "words": 3, "lines": 1, "code": 0, "digits": 0, "questions": 1,
    }  # fmt: skip
    found = dict(zip(ANSWER, a.tolist(), strict=True))
    shown = {"characters": len(RICH), "words": len(RICH.split()), "paragraphs": 1, "lines": 6}
    shown |= {"headings": 1, "bold": 1, "bullets": 2, "numbered": 1, "tables": 1, "code": 1}
    shown |= {"links": 1, "digits": 3, "questions": 1, "exclamations": 1, "first": 2}
    for name, count in shown.items():
        assert found[name] == count, name
    assert found["refusals"] > 0
    words = [word.lower() for word in RICH.split()]
    assert found["distinct"] == pytest.approx(len(set(words)) / len(words))
    assert found["overlap"] == pytest.approx(2 / len(set(words)))  # see, two
    assert not b.any()


def test_parts_have_the_features_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made_up_run(tmp_path)
    monkeypatch.setattr(features, "ROWS", 7)
    keys, found = read_surface(tmp_path / "battles.parquet")
    assert keys.equals(key(run.battles))
    for part, whole in zip(found, surface_features(run.battles), strict=True):
        np.testing.assert_array_equal(part, whole)


def test_exchanging_the_answers_exchanges_the_prediction() -> None:
    rng = np.random.default_rng(0)
    prompt, a, b = (rng.normal(size=(300, n)).astype(np.float32) for n in (2, 5, 5))
    votes = Votes.hard((a[:, 0] < b[:, 0]).astype(int) + (rng.random(300) < 0.2))
    found = surface_trees((prompt, a, b), votes, (prompt, a, b))
    other = surface_trees((prompt, a, b), votes, (prompt, b, a))
    np.testing.assert_allclose(other, swap_classes(found), atol=1e-12)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    # Answers that are exchanged with their votes teach the same.
    swapped = Votes(swap_classes(votes.probabilities), votes.weights)
    again = surface_trees((prompt, b, a), swapped, (prompt, a, b))
    assert np.abs(again - found).mean() < 0.02
    assert losses(found, votes).mean() < 0.9


def test_a_soft_vote_is_learned_by_its_shares() -> None:
    none = np.zeros((80, 1), np.float32)
    shares = np.tile([0.5, 0.3, 0.2], (80, 1))
    found = surface_trees((none, none, none), Votes(shares, np.ones(80)), (none, none, none))
    np.testing.assert_allclose(found, [[0.4, 0.4, 0.2]] * 80, atol=1e-3)
    ties = Votes.hard(np.full(80, 2))
    assert (surface_trees((none, none, none), ties, (none, none, none)) == [0, 0, 1]).all()


def test_no_row_is_predicted_by_trees_that_saw_its_vote(tmp_path: Path) -> None:
    run = made_up_run(tmp_path)
    before = predict(run)
    fold, votes = run.folds["fold"].to_numpy(), votes_of(run.folds)
    other = np.where((fold == 1)[:, None], swap_classes(votes.probabilities), votes.probabilities)
    columns = {name: run.folds[name] for name in run.folds.column_names}
    columns |= vote_columns(Votes(other, votes.weights))
    changed = pa.table(columns).cast(run.folds.schema)
    write_parquet(changed.replace_schema_metadata(run.folds.schema.metadata),
                  tmp_path / "folds.parquet", {})  # fmt: skip
    after = predict(run, "after.parquet")
    fold = fold[fold >= 0]
    np.testing.assert_array_equal(after[fold == 1], before[fold == 1])
    assert (after[fold == 0] != before[fold == 0]).any()


def test_test_and_held_out_battles_are_predicted_too(tmp_path: Path) -> None:
    run = made_up_run(tmp_path, classes=2)
    folds = assign_folds(run.battles, method="stratified_group", n=3, seed=1, holdout=0.3)
    write_parquet(folds, tmp_path / "folds.parquet", {})
    run = MadeUpRun(tmp_path, run.battles, folds, run.truth, run.settings)
    fold = folds["fold"].to_numpy()
    assert (fold == HELD_OUT).any()
    predict(run)
    table = read_parquet(tmp_path / "trees.parquet")
    assert table.column_names == ["id", "source", "p_model_a", "p_model_b"]
    sources = table["source"].to_pylist()
    assert sources.count("test") == SIZES["test"]
    assert sources.count("train") == SIZES["train"]


def test_no_held_out_prompt_is_learned_from_extra_battles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made_up_run(tmp_path)
    folds = assign_folds(run.battles, method="stratified_group", n=2, seed=1, holdout=0.3)
    fold, groups = folds["fold"].to_numpy(), folds["group"].to_numpy().copy()
    held_out, extra = groups[fold == HELD_OUT], np.flatnonzero(fold == EVERY_FOLD)
    groups[extra[:5]] = held_out[:5]
    place = folds.column_names.index("group")
    folds = folds.set_column(place, folds.schema.field("group"), pa.array(groups))
    write_parquet(folds, tmp_path / "folds.parquet", {})
    learned = []

    def trees(training: Any, votes: Votes) -> Trees:
        learned.append(len(votes))
        return Trees.of([], np.zeros(3), np.arange(3))

    monkeypatch.setattr(surface_trees_module, "fit_surface", trees)
    predict(MadeUpRun(tmp_path, run.battles, folds, run.truth, run.settings))
    assert learned[-1] == len(folds) - len(held_out) - 5


# --- the file of trees ------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [3, 2])
def test_trees_are_those_of_scikit_learn(
    classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On rows that were not learned, some of them equal to a threshold, also when written and read."""
    rng = np.random.default_rng(classes)
    inputs = rng.integers(0, 60, (900, 5)).astype(np.float32) / 2
    kind = (inputs[:, 0] + rng.normal(0, 6, 900) > 15).astype(int) * (classes - 1)
    kind[inputs[:, 1] > 25] = 1
    fitted: list[Any] = []

    class Watched(HistGradientBoostingClassifier):  # type: ignore[misc]
        def fit(self, *given: Any) -> Any:
            fitted.append(super().fit(*given))
            return fitted[0]

    monkeypatch.setattr("sklearn.ensemble.HistGradientBoostingClassifier", Watched)
    Trees.fit(inputs[:600], kind[:600], rng.random(600)).write(tmp_path / "trees.safetensors")
    trees = Trees.read(tmp_path / "trees.safetensors", 5, classes)
    asked = np.concatenate([inputs[600:], trees.threshold[:50, :1].repeat(5, axis=1)])
    asked = asked.astype(np.float32)
    expected = fitted[0].predict_proba(asked)
    assert np.ptp(expected, axis=0).max() > 0.5
    np.testing.assert_allclose(trees.probabilities(asked, classes), expected, rtol=0, atol=1e-9)


def test_a_damaged_file_of_trees_is_one_line(tmp_path: Path) -> None:
    run = made_up_run(tmp_path)
    predict(run)
    path = tmp_path / "trees.safetensors"
    trees = read_trees(path, 3)
    whole = path.read_bytes()
    cases: list[tuple[str, Any]] = [
        ("not whole; copy it again: ", lambda: path.write_bytes(whole[:-100])),
        ("not whole; copy it again: ", lambda: path.write_bytes(b"")),
        ("trees of other than 63 features", lambda: replace(trees, feature=trees.feature + 63).write(path)),
        ("trees of other than 63 features", lambda: replace(trees, left=trees.left * 0).write(path)),
        ("trees of other than 63 features", lambda: replace(trees, value=trees.value[1:]).write(path)),
        ("no such file; copy the judge's whole folder again", path.unlink),
    ]  # fmt: skip
    for told, damage in cases:
        damage()
        with pytest.raises(InputError) as refused:
            read_trees(path, 3)
        assert told in str(refused.value) and "\n" not in str(refused.value)
    trees.write(path)
    with pytest.raises(InputError, match="63 features or 2 classes"):
        read_trees(path, 2)
