"""Battles without votes: only students learn from them, with their teachers' logits."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from chat_server import chat_server
from checkouts import make_checkout
from conftest import ROOT, Run, battles_table, grouped, made_up_battles
from hypothesis import given
from hypothesis import strategies as st
from made_up_run import made_up_run

from arena_distill.battles.folds import (
    UNLABELLED,
    assign_folds,
    dropped_extra,
    fold_rows,
    held_out_rows,
    training_rows,
    unlabelled_rows,
    validation_rows,
    write_folds,
)
from arena_distill.battles.reading import read_battles
from arena_distill.battles.simulation import write_arena
from arena_distill.battles.votes import vote_columns, votes_of
from arena_distill.config.data import Arena
from arena_distill.config.derived import JudgeFamily
from arena_distill.config.encoding import Encoding
from arena_distill.config.external import EndpointLimits
from arena_distill.config.head import Head
from arena_distill.config.phases.battles import ArenaSettings, FoldsSettings
from arena_distill.config.phases.encoding import TokensSettings
from arena_distill.config.phases.evaluation import EvaluationSettings
from arena_distill.config.phases.scoring import ExternalSettings, LogitsSettings, QuerySettings
from arena_distill.config.phases.studies import CompareSettings, Entry
from arena_distill.config.phases.training import TrainingSettings
from arena_distill.config.prediction import Prediction
from arena_distill.config.run import Config, load, overlay
from arena_distill.config.source import Source
from arena_distill.config.training import Lora, Loss, Training
from arena_distill.encoding.sequences import read_tokens
from arena_distill.encoding.tokenization import tokenize_battles
from arena_distill.encoding.views import encode
from arena_distill.errors import InputError
from arena_distill.files.artifacts import read_json, read_parquet, write_parquet
from arena_distill.files.keys import key, locate
from arena_distill.files.logits import read_logits, write_logits
from arena_distill.phase_cli import battles as battle_commands
from arena_distill.runtime.launch import Launch
from arena_distill.scoring.external import (
    query_endpoint,
    split_external_logits,
)
from arena_distill.scoring.external_files import read_external_logits
from arena_distill.scoring.logits import predict_logits
from arena_distill.studies.comparison import compare
from arena_distill.training import trainer
from arena_distill.training.examples import Examples
from arena_distill.training.losses import battle_losses
from arena_distill.training.targets import (
    VOTE_LOSS,
    select_rows,
    teacher_logits,
    weighted_targets,
)
from arena_distill.training.trainer import train_fold
from arena_distill.verdicts import CLASSES, NO_VOTE, WINNERS, Votes, swap_classes

ENCODING = Encoding(max_length=96)
BARE, SHARING = 16, 12
"""Unlabelled battles; as many of them have a prompt of `train`, the others one of their own."""


def with_unlabelled(battles: pa.Table, rows: int = BARE) -> pa.Table:
    """The same battles, followed by some without votes whose ids also occur in other sources."""
    prompts = battles.filter(pc.equal(battles["source"], "train"))["prompt"].to_pylist()
    more = [
        {
            "id": str(i),
            "source": "unlabelled",
            "prompt": prompts[i] if i < SHARING else f"a question of its own {i}",
            "response_a": f"red {i}",
            "response_b": f"blue and green {i}",
            "label": None,
        }
        for i in range(rows)
    ]
    return grouped(pa.concat_tables([battles, battles_table(more)]))


@pytest.fixture(scope="module")
def make(
    backbones: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Run]:
    """The files before a training, with unlabelled battles or without, each made once."""
    made: dict[tuple[str, str, bool], Run] = {}

    def run(
        family: str = "llama", method: str = "stratified_group", *, unlabelled: bool = True
    ) -> Run:
        if (family, method, unlabelled) not in made:
            folder = tmp_path_factory.mktemp(f"run_{family}")
            battles = made_up_battles()
            if unlabelled:
                battles = with_unlabelled(battles)
            files = [folder / f"{name}.parquet" for name in ("battles", "tokens", "folds")]
            write_parquet(battles, files[0], {})
            tokenize_battles(
                files[0], backbones(family), files[1], settings=TokensSettings(version=1)
            )
            write_folds(
                files[0], files[2], settings=FoldsSettings(version=1, method=method, n=3, seed=3)
            )
            made[family, method, unlabelled] = Run(backbones(family), *files)
        return made[family, method, unlabelled]

    return run


# --- reading ----------------------------------------------------------------------------------------


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def battle(**cells: Any) -> dict[str, Any]:
    return {"id": 1, "prompt": "q", "response_a": "a", "response_b": "b"} | cells


@pytest.mark.parametrize("votes", [{}, {"winner": "nobody"}, dict.fromkeys(WINNERS, 1)])
def test_votes_are_neither_needed_nor_read(tmp_path: Path, votes: dict[str, Any]) -> None:
    path = write_csv(tmp_path / "u.csv", [battle(id=i, model_a="x", **votes) for i in range(3)])
    battles, rejected = read_battles({"unlabelled": [path]})
    assert rejected.num_rows == 0
    assert battles["vote"].to_pylist() == [None] * 3
    assert battles["model_a"].to_pylist() == ["x"] * 3
    assert set(battles["source"].to_pylist()) == {"unlabelled"}


def test_bad_rows_are_refused_with_their_reasons_as_extra_ones_are(tmp_path: Path) -> None:
    rows = [battle(id=1), battle(id=2, prompt='["cut'), battle(id=1), battle(id="")]
    path = write_csv(tmp_path / "u.csv", [row | {"winner": "tie"} for row in rows])
    turns = Source(path=str(path), text="turns")
    (found, refused), (_, as_extra) = (
        read_battles({source: [turns]}) for source in ("unlabelled", "extra")
    )
    assert found["id"].to_pylist() == ["1"]
    assert refused["row"].to_pylist() == [2, 3, 4]
    told = ["file", "row", "column", "reason"]
    assert refused.select(told).equals(as_extra.select(told))
    assert set(refused["source"].to_pylist()) == {"unlabelled"}


def test_the_command_reads_them_after_all_others(tmp_path: Path) -> None:
    """Rows of other sources keep their row numbers, and all that depends on them."""
    voted = write_csv(tmp_path / "t.csv", [battle(id=i, winner="tie") for i in range(4)])
    bare = write_csv(tmp_path / "u.csv", [battle(id=i) for i in range(3)])
    tables = []
    for name, options in {"without": {}, "with": {"unlabelled": [bare]}}.items():
        others = (tmp_path / "rejected.parquet", tmp_path / "reading.json", '{"version": 1}')
        battle_commands.read_battles(tmp_path / name, *others, [voted], [bare], **options)
        tables.append(read_parquet(tmp_path / name))
    assert tables[1].slice(0, 7).equals(tables[0])
    assert tables[1]["source"].to_pylist()[7:] == ["unlabelled"] * 3


# --- the synthetic arena ----------------------------------------------------------------------------


def test_an_arena_with_unlabelled_battles_changes_no_other(tmp_path: Path) -> None:
    sizes = {"train": 40, "extra": 10, "ut": 10, "test": 10}
    arena = ArenaSettings(version=1, seed=5, **sizes)
    more = arena.model_copy(update={"unlabelled": 30})
    write_arena(tmp_path / "without", settings=arena)
    write_arena(tmp_path / "with", settings=more)
    without = {path.name: path.read_bytes() for path in (tmp_path / "without").iterdir()}
    for name in set(without) - {"truth.parquet"}:
        assert (tmp_path / "with" / name).read_bytes() == without[name]
    assert {path.name for path in (tmp_path / "with").iterdir()} == {*without, "unlabelled.csv"}
    bare = pd.read_csv(tmp_path / "with/unlabelled.csv")
    assert len(bare) == 30
    assert not set(WINNERS) & set(bare)
    for source in sizes:  # a stream of its own
        other = pd.read_csv(tmp_path / f"with/{source}.csv")
        assert not set(other["id"]) & set(bare["id"])
        assert not set(other["response_a"][:3]) & set(bare["response_a"][:3])
    truth, before = (read_parquet(tmp_path / x / "truth.parquet") for x in ("with", "without"))
    assert truth.slice(0, 70).equals(before)
    assert truth.slice(70)["id"].to_pylist() == [str(id_) for id_ in bare["id"]]
    again = tmp_path / "again"
    write_arena(again, settings=more)
    assert (again / "unlabelled.csv").read_bytes() == (
        tmp_path / "with/unlabelled.csv"
    ).read_bytes()


def test_an_arena_without_them_has_the_same_params() -> None:
    """The params of the rule must not change: that would simulate the arena again."""
    assert "unlabelled" not in json.loads(Arena().as_params())
    assert json.loads(Arena(unlabelled=7).as_params())["unlabelled"] == 7


# --- folds ------------------------------------------------------------------------------------------

METHODS = ("kfold", "stratified", "stratified_group")


@pytest.mark.parametrize("method", METHODS)
def test_the_folds_of_all_others_stay_as_they_are(method: Any) -> None:
    battles = made_up_battles()
    before = assign_folds(battles, method=method, n=3, seed=1)
    after = assign_folds(with_unlabelled(battles), method=method, n=3, seed=1)
    assert after.slice(0, len(before)).equals(before)
    bare = after.slice(len(before))
    assert bare["id"].to_pylist() == [str(i) for i in range(BARE)]
    assert set(bare["fold"].to_pylist()) == {UNLABELLED}
    assert set(votes_of(bare).labels) == {NO_VOTE}
    np.testing.assert_array_equal(unlabelled_rows(after), np.arange(len(before), len(after)))
    for fold in range(3):
        for select in (training_rows, validation_rows):
            np.testing.assert_array_equal(select(after, fold), select(before, fold))
        assert dropped_extra(after, fold) == dropped_extra(before, fold)


def test_votes_that_are_there_do_not_come_into_the_folds() -> None:
    battles = with_unlabelled(made_up_battles())
    votes = vote_columns(Votes.hard(np.ones(len(battles), int)))["vote"]
    voted = battles.set_column(battles.column_names.index("vote"), "vote", votes)
    folds = assign_folds(voted, method="kfold", n=3, seed=1)
    labels = votes_of(folds).labels
    assert set(labels[unlabelled_rows(folds)]) == {NO_VOTE}
    assert set(labels[validation_rows(folds, 0)]) == {1}


@pytest.mark.parametrize("method", METHODS)
def test_students_get_them_but_for_prompts_that_validate(method: Any) -> None:
    folds = assign_folds(with_unlabelled(made_up_battles()), method=method, n=3, seed=1)
    bare, group = unlabelled_rows(folds), folds["group"].to_numpy()
    dropped = 0
    for fold in range(3):
        rows = training_rows(folds, fold, unlabelled=True)
        assert set(training_rows(folds, fold)) == set(rows) - set(bare)
        left_out = set(bare) - set(rows)
        sharing = bare[np.isin(group[bare], group[validation_rows(folds, fold)])]
        assert left_out == (set(sharing) if method == "stratified_group" else set())
        dropped += len(left_out)
    # Every prompt of train validates once.
    assert dropped == (SHARING if method == "stratified_group" else 0)


def test_prompts_by_which_something_is_chosen_train_no_student() -> None:
    """Held-out prompts stay out of all training, whatever the method."""
    battles = with_unlabelled(made_up_battles())
    folds = assign_folds(battles, method="kfold", n=3, seed=1, holdout=0.3)
    groups = folds["group"].to_numpy()
    held_out, bare = set(groups[held_out_rows(folds)]), unlabelled_rows(folds)
    assert held_out & set(groups[bare])
    for fold in range(3):
        rows = training_rows(folds, fold, unlabelled=True)
        assert not held_out & set(groups[rows])
        assert set(bare[~np.isin(groups[bare], list(held_out))]) <= set(rows)


@given(st.lists(st.tuples(st.integers(0, 12), st.sampled_from("txu")), min_size=20, max_size=60))
def test_prompts_never_leak_whatever_the_battles(rows: list[tuple[int, str]]) -> None:
    sources = {"t": "train", "x": "extra", "u": "unlabelled"}
    table = battles_table(
        [
            {"source": sources[s], "prompt": f"p{prompt}", "label": None if s == "u" else i % 3}
            for i, (prompt, s) in enumerate(rows)
        ]
    )
    try:
        folds = assign_folds(table, method="stratified_group", n=2, seed=0)
    except InputError:
        return
    groups = folds["group"].to_numpy()
    for fold in range(2):
        seen = groups[training_rows(folds, fold, unlabelled=True)]
        assert not set(seen) & set(groups[validation_rows(folds, fold)])


# --- targets ----------------------------------------------------------------------------------------


def logit_of(name: str, salt: float) -> np.ndarray:
    """Logits that identify their row and judge: (orders, 3)."""
    source, id_ = name.split(":")
    base = float(id_) + {"train": 0, "extra": 100, "unlabelled": 200}[source]
    return np.array([[base, salt, -base], [base + 0.5, salt, -base]], np.float32)


def write_teacher(
    folds: pa.Table,
    folder: Path,
    rows: tuple[str, ...] = ("validation", "extra", "unlabelled"),
    logits: Callable[[str, float], np.ndarray] = logit_of,
) -> list[Path]:
    """A teacher's files, each shuffled differently; the logits of fold k have the salt k."""
    settings = LogitsSettings(version=1, encoding=ENCODING, precision="fp32", rows=rows)
    files = []
    for fold in range(3):
        ids = fold_rows(folds, fold, settings)
        ids = ids.take(pa.array(np.random.default_rng(fold).permutation(len(ids))))
        values = np.stack([logits(name, float(fold)) for name in key(ids).to_pylist()])
        files.append(folder / f"fold_{fold}.npy")
        write_logits(files[-1], values.astype(np.float32), ids, {})
    return files


def test_out_of_fold_targets_are_the_mean_over_folds_by_key(
    make: Callable[..., Run], tmp_path: Path
) -> None:
    folds = read_parquet(make().folds)
    files = write_teacher(folds, tmp_path)
    rows = folds.take(training_rows(folds, 1, unlabelled=True))
    rows = rows.take(pa.array(np.random.default_rng(9).permutation(len(rows))))
    targets = teacher_logits(select_rows({"t": files}, rows, "out_of_fold"))[:, 0]
    own = dict(zip(key(folds).to_pylist(), folds["fold"].to_pylist(), strict=True))
    names = key(rows).to_pylist()
    assert {name.split(":")[0] for name in names} == {"train", "extra", "unlabelled"}
    salts = [1.0 if own[name] < 0 else float(own[name]) for name in names]  # (0 + 1 + 2) / 3
    expected = [logit_of(name, salt) for name, salt in zip(names, salts, strict=True)]
    np.testing.assert_allclose(targets, expected, rtol=1e-6)


def test_in_sample_targets_are_the_fold_own_teachers(
    make: Callable[..., Run], tmp_path: Path
) -> None:
    folds = read_parquet(make().folds)
    files = write_teacher(folds, tmp_path, ("validation", "training", "unlabelled"))
    rows = folds.take(training_rows(folds, 2, unlabelled=True))
    targets = teacher_logits(select_rows({"t": files[2:]}, rows, "in_sample"))[:, 0]
    np.testing.assert_array_equal(targets, [logit_of(name, 2.0) for name in key(rows).to_pylist()])


def test_unlabelled_targets_are_the_fold_own_teachers_of_these_battles_alone(
    make: Callable[..., Run], tmp_path: Path
) -> None:
    folds = read_parquet(make().folds)
    files = write_teacher(folds, tmp_path, ("validation", "unlabelled"))
    rows = folds.take(training_rows(folds, 2, unlabelled=True))
    loss = Loss(ce=1, kl=1, temperature=1, unlabelled_weight=0.25)
    _, votes, targets, weights = weighted_targets(
        {"t": files[2:]}, rows, read_parquet(make().folds), targets="unlabelled", loss=loss
    )
    bare = np.array(rows["source"]) == "unlabelled"
    assert 0 < bare.sum() < len(bare)
    expected = [logit_of(name, 2.0) for name in np.array(key(rows))[bare]]
    np.testing.assert_array_equal(targets[bare, 0], expected)
    np.testing.assert_array_equal(weights[:, 0], bare)
    np.testing.assert_array_equal(votes.weights, np.where(bare, 0.25, 1))
    shown = torch.zeros(len(rows), 3)
    tensors = [torch.from_numpy(a) for a in (targets.mean(axis=2), weights)]
    shares = torch.from_numpy(votes.probabilities.astype(np.float32))
    each = battle_losses(shown, shares, *tensors, loss)
    torch.testing.assert_close(each[~bare], torch.full(((~bare).sum(),), np.log(3)).float())
    alone = battle_losses(shown, shares, *tensors, loss.model_copy(update={"ce": 0.0}))
    assert (alone[~bare] == 0).all() and (alone[bare] > 0).all()


@pytest.mark.parametrize("targets", ["out_of_fold", "in_sample"])
def test_a_teacher_that_has_not_scored_them_is_an_error(
    targets: Any, make: Callable[..., Run], tmp_path: Path
) -> None:
    folds = read_parquet(make().folds)
    files = write_teacher(folds, tmp_path, ("validation", "training", "extra"))
    rows = folds.take(training_rows(folds, 0, unlabelled=True))
    files = files if targets == "out_of_fold" else files[:1]
    with pytest.raises(InputError, match="rows are missing, unlabelled:"):
        teacher_logits(select_rows({"t": files}, rows, targets))


# --- what reaches the Trainer -----------------------------------------------------------------------


def settings_of(*teachers: str, **changes: Any) -> TrainingSettings:
    whole: dict[str, Any] = {
        "version": 1,
        "encoding": ENCODING,
        "lora": Lora(r=4, alpha=8, dropout=0.0),
        "precision": "fp32",
        "training": Training(lr=1e-3, epochs=1, batch_size=8, warmup_steps=0),
        "keep_head": False,
        "loss": VOTE_LOSS,
    }
    if teachers:
        whole |= {"teachers": teachers, "targets": "out_of_fold", "loss": Loss()}
        whole |= {"pseudo_labels": True}
    return TrainingSettings(**(whole | changes))


def fit(
    run: Run,
    output: Path,
    settings: TrainingSettings,
    fold: int = 0,
    teachers: dict[str, list[Path]] | None = None,
) -> Path:
    train_fold(
        run.backbone, None, run.tokens, run.folds, fold, output, teachers=teachers or {},
        settings=settings, launch=Launch(),
    )  # fmt: skip
    return output


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Examples]:
    """The Examples that reach the Trainer; nothing is trained."""
    examples: list[Examples] = []
    monkeypatch.setattr(trainer, "_fit", lambda _, given, *rest: examples.append(given))
    return examples


def sequences(run: Run, rows: pa.Table) -> set[bytes]:
    """The encoded battles of some rows, in order AB."""
    read = read_tokens(run.tokens)
    read = read.take(locate(key(rows), read.keys(), "tokens"))
    return {ids.tobytes() for ids in encode(read, ENCODING, "AB")}


@pytest.mark.parametrize("fold", [0, 1, 2])
@pytest.mark.parametrize("method", ["kfold", "stratified_group"])
def test_a_student_sees_none_whose_prompt_validates(
    method: str, fold: int, make: Callable[..., Run], shown: list[Examples], tmp_path: Path
) -> None:
    run = make(method=method)
    folds = read_parquet(run.folds)
    files = write_teacher(folds, tmp_path)
    fit(run, tmp_path / "x", settings_of("t"), fold, {"t": files})
    seen = {ids.tobytes() for ids in shown[0].views[0]}
    bare, groups = unlabelled_rows(folds), folds["group"].to_numpy()
    validates = np.isin(groups[bare], groups[validation_rows(folds, fold)])
    assert 0 < validates.sum() < len(bare)
    assert sequences(run, folds.take(bare[~validates])) <= seen
    hidden = sequences(run, folds.take(bare[validates]))
    if method == "stratified_group":
        assert not hidden & seen
    else:  # assigns rows, as the historical recipes did
        assert hidden <= seen


def test_no_vote_reaches_the_loss_in_either_order(
    make: Callable[..., Run], shown: list[Examples], tmp_path: Path
) -> None:
    run = make()
    folds = read_parquet(run.folds)
    fit(run, tmp_path / "x", settings_of("t"), 0, {"t": write_teacher(folds, tmp_path)})
    (given,) = shown
    rows = folds.take(training_rows(folds, 0, unlabelled=True))
    votes = votes_of(rows)
    assert 0 < votes.known.sum() < len(votes)
    np.testing.assert_array_equal(
        given.votes.probabilities,
        np.concatenate([votes.probabilities, votes.probabilities[:, [1, 0, 2]]]),
    )
    np.testing.assert_array_equal(given.votes.known, np.tile(votes.known, 2))
    assert given.teachers is not None
    targets = teacher_logits(
        select_rows(
            {"t": sorted(tmp_path.glob("fold_*.npy"))}, rows.select(["id", "source"]), "out_of_fold"
        )
    )
    np.testing.assert_array_equal(given.teachers[: len(votes)], targets[:, :, 0])
    np.testing.assert_array_equal(given.teachers[len(votes) :], swap_classes(targets[:, :, 1]))


@given(st.floats(0, 50), st.integers(0, 2**32 - 1))
def test_the_loss_of_such_a_battle_has_no_cross_entropy(ce: float, seed: int) -> None:
    """The loss uses the teachers only, whatever the weight of votes in other battles."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(4, 3)))
    teachers = torch.from_numpy(rng.normal(size=(4, 2, 3)))
    votes = torch.tensor([[0, 0, 0], [1.0, 0, 0], [0, 0, 0], [0, 0, 1]])
    with_votes, alone = (
        battle_losses(logits, votes, teachers, None, Loss(ce=weight, kl=0.7, cosine=0.2))
        for weight in (ce, 0)
    )
    bare = votes.sum(1) == 0
    torch.testing.assert_close(with_votes[bare], alone[bare])
    if ce > 0.1:
        assert not torch.allclose(with_votes[~bare], alone[~bare])


@pytest.mark.parametrize("fold", [0, 2])
def test_teachers_and_students_without_pseudo_labels_learn_as_if_there_were_none(
    fold: int, make: Callable[..., Run], shown: list[Examples], tmp_path: Path
) -> None:
    for there in (False, True):
        run = make(unlabelled=there)
        files = write_teacher(read_parquet(run.folds), tmp_path / str(there))
        fit(run, tmp_path / "x", settings_of(), fold)
        fit(run, tmp_path / "x", settings_of("t", pseudo_labels=False), fold, {"t": files})
    for before, after in zip(shown[:2], shown[2:], strict=True):
        np.testing.assert_array_equal(after.votes.probabilities, before.votes.probabilities)
        np.testing.assert_array_equal(after.views[0].ids, before.views[0].ids)
        np.testing.assert_array_equal(after.views[0].offsets, before.views[0].offsets)
        for one, other in ((after.teachers, before.teachers), (after.weights, before.weights)):
            assert (one is None) == (other is None)
            if one is not None:
                np.testing.assert_array_equal(one, other)
    assert (shown[0].teachers is None, shown[1].teachers is None) == (True, False)


def test_fitted_weights_are_those_of_the_voted_battles(
    make: Callable[..., Run], shown: list[Examples], tmp_path: Path
) -> None:
    run = make()
    folds = read_parquet(run.folds)

    def noise(seed: int) -> Callable[[str, float], np.ndarray]:
        rng = np.random.default_rng(seed)
        return lambda name, salt: rng.normal(size=(2, 3))

    teachers = {
        name: write_teacher(folds, tmp_path / name, logits=noise(i)) for i, name in enumerate("tu")
    }
    loss = Loss(weights="fitted")
    for flag in (True, False):
        settings = settings_of("t", "u", loss=loss, pseudo_labels=flag)
        fit(run, tmp_path / "x", settings, 0, teachers)
    weights = [given.weights for given in shown]
    assert weights[0] is not None and weights[1] is not None
    assert len(weights[0]) > len(weights[1])
    np.testing.assert_array_equal(np.unique(weights[0], axis=0), np.unique(weights[1], axis=0))


# --- from end to end --------------------------------------------------------------------------------


def score(run: Run, adapter: Path, output: Path, fold: int, *rows: Any) -> Path:
    settings = LogitsSettings(
        version=1, encoding=ENCODING, precision="fp32", rows=("validation", *rows)
    )
    predict_logits(
        run.backbone, adapter, run.tokens, run.folds, fold, output, settings=settings,
        batch_tokens=900,
    )  # fmt: skip
    return output


def test_students_that_teach_score_them_too(make: Callable[..., Run], tmp_path: Path) -> None:
    """A student, and a student of that student with another family and head."""
    run, other = make("llama"), make("gemma2")
    folds = read_parquet(run.folds)
    files = write_teacher(folds, tmp_path / "teacher")
    scored = []
    for fold in range(3):
        adapter = fit(run, tmp_path / f"fold_{fold}", settings_of("t"), fold, {"t": files})
        battles = len(training_rows(folds, fold, unlabelled=True))
        assert read_json(adapter / "metrics.json")["sequences"] == 2 * battles
        output = tmp_path / "student" / f"fold_{fold}.npy"
        scored.append(score(run, adapter, output, fold, "extra", "unlabelled"))
        logits, ids = read_logits(output)
        bare = ids.filter(pc.equal(ids["source"], "unlabelled"))
        assert (len(bare), pc.any(bare["validation"]).as_py()) == (BARE, False)
        assert np.isfinite(logits).all()
    pointwise = settings_of("s", head=Head(kind="pointwise"))
    adapter = fit(other, tmp_path / "small", pointwise, 1, {"s": scored})
    history = read_parquet(adapter / "history.parquet")
    assert np.isfinite(history["loss"].to_numpy()).all()
    battles = len(training_rows(folds, 1, unlabelled=True))
    assert read_json(adapter / "metrics.json")["sequences"] == 2 * battles


def test_a_student_follows_its_teachers_where_nobody_voted(
    make: Callable[..., Run], tmp_path: Path
) -> None:
    """Teachers that predict ties for unlabelled battles and nothing for others."""
    run = make()

    def logits(name: str, _: float) -> np.ndarray:
        tie = 9.0 if name.startswith("unlabelled") else 0.0
        return np.tile([0.0, 0.0, tie], (2, 1))

    folds = read_parquet(run.folds)
    files = write_teacher(folds, tmp_path / "t", logits=logits)
    bare = []
    for flag in (True, False):
        settings = settings_of(
            "t",
            pseudo_labels=flag,
            loss=Loss(ce=0, kl=1, temperature=1),
            training=Training(lr=0.02, epochs=12, batch_size=8, warmup_steps=0, swap=False),
        )
        adapter = fit(run, tmp_path / str(flag), settings, 0, {"t": files})
        found, ids = read_logits(score(run, adapter, tmp_path / f"{flag}.npy", 0, "unlabelled"))
        mine = pc.equal(ids["source"], "unlabelled").to_numpy(zero_copy_only=False)
        odds = np.exp(found[mine, 0])
        bare.append((odds[:, 2] / odds.sum(axis=1)).mean())
    assert bare[0] > 0.6 > 0.5 > bare[1]


# --- external teachers ------------------------------------------------------------------------------


def judged_file(folder: Path, *sources: str) -> Path:
    """Verdicts for all battles of some sources that identify their battle."""
    table = with_unlabelled(made_up_battles())
    table = table.filter(pc.is_in(table["source"], pa.array(sources)))
    rows = table.select(["id", "source"]).to_pylist()
    logits = [{f"logit_{name}": i * n for n, name in enumerate(CLASSES)} for i in range(len(rows))]
    return write_csv(folder / "judged.csv", [a | b for a, b in zip(rows, logits, strict=True)])


def test_a_file_judges_those_that_students_learn(make: Callable[..., Run], tmp_path: Path) -> None:
    run = make()
    settings = LogitsSettings(
        version=1, encoding=ENCODING, precision="fp32", rows=("validation", "extra", "unlabelled")
    )
    for sources in (("train", "extra"), ("train", "extra", "unlabelled")):
        file = judged_file(tmp_path, *sources)
        read_external_logits(
            file, run.battles, tmp_path / "logits.npy", settings=ExternalSettings(version=1)
        )
        whole, ids = read_logits(tmp_path / "logits.npy")
        assert set(ids["source"].to_pylist()) == set(sources)
        output = tmp_path / "fold_1.npy"
        if len(sources) == 2:
            with pytest.raises(
                InputError, match=f"{BARE} unlabelled battles have no logits, but stud"
            ):
                split_external_logits(
                    tmp_path / "logits.npy", run.folds, 1, output, settings=settings
                )
            without = settings.model_copy(update={"rows": ("validation", "extra")})
            split_external_logits(tmp_path / "logits.npy", run.folds, 1, output, settings=without)
    split_external_logits(tmp_path / "logits.npy", run.folds, 1, output, settings=settings)
    logits, rows = read_logits(output)
    assert rows["source"].to_pylist().count("unlabelled") == BARE
    np.testing.assert_array_equal(logits, whole[locate(key(rows), key(ids), "logits")])


def test_an_endpoint_is_asked_about_those_that_students_learn(
    make: Callable[..., Run], tmp_path: Path
) -> None:
    endpoint = {"external": {"endpoint": {"url": "http://localhost/v1", "model": "m"}}}
    for wanted in (False, True):
        student = {"teachers": ["l", "e"], "pseudo_labels": wanted}
        config = configured(e=endpoint, s=student)
        settings = QuerySettings.of(config, "e")
        assert settings.unlabelled == wanted
        with chat_server() as server:
            query_endpoint(
                make().battles, tmp_path / f"{wanted}.npy", tmp_path / "cost", tmp_path / str(wanted),
                settings=settings.model_copy(update={"url": server.url}), limits=EndpointLimits(),
            )  # fmt: skip
        ids = read_logits(tmp_path / f"{wanted}.npy")[1]
        assert ids["source"].to_pylist().count("unlabelled") == (BARE if wanted else 0)


# --- figures ----------------------------------------------------------------------------------------


def test_every_figure_but_the_count_of_battles_stays(tmp_path: Path) -> None:
    run = made_up_run(tmp_path)
    before, tables = read_json(run.evaluate()), compared(tmp_path)
    more = with_unlabelled(run.battles.replace_schema_metadata(None), 12)
    write_parquet(more, tmp_path / "battles.parquet", {})
    folds = assign_folds(more, method="stratified_group", n=3, seed=1)
    assert len(folds) == len(run.folds) + 12
    write_parquet(folds, tmp_path / "folds.parquet", {})
    after = read_json(run.evaluate())
    assert after["battles"] == before["battles"] | {"unlabelled": 12}
    for name in set(before) - {"battles", "provenance"}:
        assert after[name] == before[name], name
    assert compared(tmp_path) == tables


def compared(run: Path) -> list[Any]:
    """The comparison of a made-up run's student, out of fold and on the test battles."""
    entry = Entry(
        label="small", judge="small", folds="small", teachers=(), against=None, tested=True,
        prediction=Prediction(),
    )  # fmt: skip
    settings = CompareSettings(version=1, run="x", entries=(entry,), runs=(), resamples=100)
    output, votes = run / "compare.json", run / "test_votes.parquet"
    compare(run, output, settings=settings, test_votes=votes, truth=run / "truth.parquet")
    figures = read_json(output)
    return [figures["out_of_fold"], figures["test"]]


# --- the configuration ------------------------------------------------------------------------------


def configured(unlabelled: bool = True, **judges: Any) -> Config:
    """Two teachers, a student and its student, with or without unlabelled battles."""
    data = {"train": "t.csv", "test": "p.csv", "extra": "x.csv", "ut": "u.csv"}
    if unlabelled:
        data["unlabelled"] = "bare.csv"
    nodes = {
        "l": {"backbone": {"tiny": "llama"}},
        "q": {"backbone": {"tiny": "qwen2"}},
        "s": {"backbone": {"tiny": "gemma2"}, "teachers": ["l", "q"]},
        "z": {"backbone": {"tiny": "gemma2", "layers": 1}, "teachers": ["s"]},
    }
    return load({"data": data, "judges": overlay(nodes, judges), "final": "z"})


def params(config: Config) -> dict[str, str]:
    """The settings of the judges' training and scoring jobs."""
    return {
        f"{phase.__name__} {name}": phase.of(config, name).as_params()
        for phase in (TrainingSettings, LogitsSettings)
        for name in config.judges
    }


def differing(one: Config, other: Config) -> set[str]:
    before, after = params(one), params(other)
    return {name for name in before | after if before.get(name) != after.get(name)}


def test_it_is_the_last_source() -> None:
    assert configured().data.sources() == ("train", "extra", "ut", "test", "unlabelled")
    arena = {"extra": 0, "ut": 0, "unlabelled": 5}
    config = load(
        {"data": {"arena": arena}, "judges": {"l": {"backbone": {"tiny": "llama"}}}, "final": "l"}
    )
    assert config.data.sources() == ("train", "test", "unlabelled")
    with pytest.raises(InputError, match="give files or `arena`, not both"):
        load({"data": {"arena": {}, "unlabelled": "u.csv"}, "judges": {}, "final": "l"})


def test_without_the_source_no_settings_mention_it() -> None:
    for text in params(configured(unlabelled=False)).values():
        assert "pseudo_labels" not in text
        assert "unlabelled" not in text
    off = configured(unlabelled=False, s={"pseudo_labels": False})
    assert not differing(configured(unlabelled=False), off)


def test_with_the_source_students_learn_and_their_teachers_score() -> None:
    assert differing(configured(unlabelled=False), configured()) == {
        "TrainingSettings s", "TrainingSettings z",
        "LogitsSettings l", "LogitsSettings q", "LogitsSettings s",
    }  # fmt: skip
    settings = {name: LogitsSettings.of(configured(), name) for name in "lqsz"}
    assert {name: "unlabelled" in s.rows for name, s in settings.items()} == {
        "l": True, "q": True, "s": True, "z": False,
    }  # fmt: skip
    assert TrainingSettings.of(configured(), "s").pseudo_labels
    assert not TrainingSettings.of(configured(), "l").pseudo_labels
    sampled = configured(s={"targets": "in_sample"})
    assert LogitsSettings.of(sampled, "l").rows == ("validation", "training", "unlabelled")


def test_who_judged_them_alone_teaches_them_alone() -> None:
    outside = {"external": {"file": "gpt.parquet", "battles": "unlabelled"}}
    taught = {"backbone": {"tiny": "gemma2"}, "teachers": ["l", "x"], "targets": "unlabelled"}
    found = configured(x=outside, s=taught)
    assert not found.is_optimistic("s")
    assert "x" not in found.scored() and "s" in found.scored()
    assert LogitsSettings.of(found, "x").rows == ("unlabelled",)
    assert LogitsSettings.of(found, "l").rows == ("validation", "unlabelled")
    assert "x" not in EvaluationSettings.of(found).judges
    with pytest.raises(InputError, match="x judged battles without votes alone: set targets: unl"):
        configured(x=outside, s=taught | {"targets": "in_sample"})
    with pytest.raises(InputError, match="targets: unlabelled, but it learns no battles without"):
        configured(x=outside, s=taught | {"pseudo_labels": False})
    with pytest.raises(InputError, match="x judged no battle with a vote"):
        configured(x=outside, s=taught, e={"stack": {"judges": ["l", "x"]}})


def test_a_student_without_them_is_the_only_one_that_changes() -> None:
    """Its teachers still score them if another student learns from them."""
    other = {"backbone": {"tiny": "gemma2"}, "teachers": ["l", "q"]}
    assert differing(configured(o=other), configured(o=other | {"pseudo_labels": False})) == {
        "TrainingSettings o"
    }
    alone = differing(configured(), configured(s={"pseudo_labels": False}))
    assert alone == {"TrainingSettings s", "LogitsSettings l", "LogitsSettings q"}


def test_a_loss_on_votes_alone_leaves_them_out_or_says_so() -> None:
    votes = {"loss": {"kl": 0, "cosine": 0, "ce": 1}}
    assert not TrainingSettings.of(configured(s=votes), "s").pseudo_labels
    assert "unlabelled" not in LogitsSettings.of(configured(s=votes), "l").rows
    with pytest.raises(
        InputError, match=r"judges\.s: pseudo_labels: true, but loss\.kl and"
    ) as told:
        configured(s=votes | {"pseudo_labels": True})
    assert len(str(told.value).splitlines()) == 1
    assert not TrainingSettings.of(
        configured(s=votes | {"pseudo_labels": False}), "s"
    ).pseudo_labels
    # For a judge without teachers the key has no effect: it may be in the defaults.
    assert not TrainingSettings.of(configured(l=votes | {"pseudo_labels": True}), "l").pseudo_labels
    follows = {"loss": {"kl": 0, "cosine": 1}, "pseudo_labels": True}
    assert TrainingSettings.of(configured(s=follows), "s").pseudo_labels


def test_a_comparison_separates_students_with_and_without_them() -> None:
    config = configured()
    family = JudgeFamily(dict(config.judges))
    student = config.judges["s"]
    assert family.add("s.same", student) == "s"
    without = student.model_copy(update={"pseudo_labels": False})
    assert family.add("s.without", without) == "s.without"
    teacher = config.judges["l"].model_copy(update={"pseudo_labels": False})
    assert family.add("l.without", teacher) == "l"


# --- the workflow -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_graph_has_the_same_jobs_with_one_file_more(tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path / "checkout")

    def planned() -> tuple[list[str], list[str]]:
        """Jobs per rule, and their commands."""
        told = checkout.snakemake("-n", "-p").stdout.splitlines()
        jobs = [line for line in told if re.fullmatch(r"\w+ +\d+", line)]
        return jobs, [line for line in told if "Shell command: arena" in line]

    jobs, commands = planned()
    assert len(jobs) > 10 and len(commands) > 10
    assert not [line for line in commands if "unlabelled" in line or "pseudo_labels" in line]
    checkout.edit("mini.yaml", "    ut: 64", "    ut: 64\n    unlabelled: 50")
    again, commands = planned()
    assert again == jobs
    (reading,) = (line for line in commands if "arena read-battles" in line)
    assert "--unlabelled results/mini/arena/unlabelled.csv" in reading
    learning = [line for line in commands if '"pseudo_labels":true' in line]
    assert len(learning) == 2
    assert all("arena train-fold" in line and "gemma2-student" in line for line in learning)
    scoring = [line for line in commands if "arena predict-logits" in line]
    of_teachers = [line for line in scoring if "-teacher/" in line]
    assert [line for line in scoring if '"unlabelled"]' in line] == of_teachers
    assert (len(scoring), len(of_teachers)) == (6, 4)


@pytest.mark.slow
def test_files_of_ones_own_are_read(tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path / "checkout")
    text = (ROOT / "tests/mini.yaml").read_text()
    arena = next(line for line in text.splitlines() if "arena:" in line)
    own = "  train: t.csv\n  test: p.csv\n  unlabelled: [one.csv, two.csv]"
    (checkout.folder / "mini.yaml").write_text(text.replace(arena, own))
    for name in ("t", "p", "one", "two"):
        (checkout.folder / f"{name}.csv").write_text("id\n")
    commands = checkout.snakemake("-n", "-p", "folds").stdout
    assert "--unlabelled one.csv --unlabelled two.csv" in commands
