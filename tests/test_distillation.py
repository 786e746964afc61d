"""Students learn from the right rows of their teachers, with the documented loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from arena_distill.config.training import Loss
from arena_distill.errors import InputError
from arena_distill.files.logits import write_logits
from arena_distill.training.linear_probe import fit_weights
from arena_distill.training.losses import battle_losses
from arena_distill.training.targets import (
    VOTE_LOSS,
    select_rows,
    teacher_logits,
    teacher_weights,
    trusted_votes,
)
from arena_distill.verdicts import NO_VOTE, Votes

SUMMARY = Loss()
BLACKPEARL = Loss(
    ce=1, kl=1, cosine=1, temperature=1, temperature_squared=False, combine="separate"
)

# --- the loss, in numpy and float64 -----------------------------------------------------------------


def softmax(z: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    e = np.exp((z - z.max(-1, keepdims=True)) / temperature)
    return np.asarray(e / e.sum(-1, keepdims=True))


def cross_entropy(z: np.ndarray, y: np.ndarray) -> float:
    return float(-np.log(softmax(z)[np.arange(len(y)), y]).mean())


def kl(teacher: np.ndarray, student: np.ndarray, temperature: float) -> float:
    t, s = softmax(teacher, temperature), softmax(student, temperature)
    return float((t * (np.log(t) - np.log(s))).sum(-1).mean())  # "batchmean"


def cosine_distance(teacher: np.ndarray, student: np.ndarray) -> float:
    t, s = softmax(teacher), softmax(student)
    norms = np.linalg.norm(t, axis=-1) * np.linalg.norm(s, axis=-1)
    return float((1 - (t * s).sum(-1) / norms).mean())


@pytest.fixture
def batch() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(5)
    return random.normal(0, 2, (7, 3)), random.integers(0, 3, 7), random.normal(0, 2, (7, 2, 3))


def mean_loss(z: np.ndarray, y: np.ndarray, teachers: np.ndarray | None, loss: Loss) -> float:
    given = None if teachers is None else torch.tensor(teachers)
    return float(
        battle_losses(
            torch.tensor(z), torch.tensor(Votes.hard(y).probabilities), given, None, loss
        ).mean()
    )


def test_summary_loss_is_the_written_one(batch: tuple[np.ndarray, ...]) -> None:
    z, y, teachers = batch
    expected = 0.7 * 9 * kl(teachers.mean(1), z, 3.0) + 0.3 * cross_entropy(z, y)
    assert mean_loss(z, y, teachers, SUMMARY) == pytest.approx(expected, rel=1e-5)


def test_blackpearl_loss_is_the_written_one(batch: tuple[np.ndarray, ...]) -> None:
    z, y, teachers = batch
    terms = [cross_entropy(z, y)]
    for j in range(2):
        terms += [kl(teachers[:, j], z, 1.0), cosine_distance(teachers[:, j], z)]
    assert mean_loss(z, y, teachers, BLACKPEARL) == pytest.approx(sum(terms) / 5, rel=1e-5)


def test_losses_by_hand() -> None:
    """One battle with numbers to check by hand."""
    z, y = np.array([[0.0, 0.0, 0.0]]), np.array([0])
    teacher = np.array([[[np.log(2.0), 0.0, 0.0]]])  # probabilities 1/2, 1/4, 1/4
    assert mean_loss(z, y, None, VOTE_LOSS) == pytest.approx(np.log(3))
    only_kl = Loss(ce=0, kl=1, cosine=0, temperature=1, combine="separate")
    expected = 0.5 * np.log(1.5) + 0.5 * np.log(0.75)
    assert mean_loss(z, y, teacher, only_kl) == pytest.approx(expected, rel=1e-5)
    only_cosine = Loss(ce=0, kl=0, cosine=1, temperature=1)
    distance = 1 - (1 / 3) / (np.sqrt(1 / 3) * np.sqrt(3 / 8))
    assert mean_loss(z, y, teacher, only_cosine) == pytest.approx(distance, rel=1e-5)


def test_temperature_squared_multiplies_the_divergence_alone(
    batch: tuple[np.ndarray, ...],
) -> None:
    z, y, teachers = batch
    with_it = mean_loss(z, y, teachers, Loss(temperature=3, temperature_squared=True))
    without = mean_loss(z, y, teachers, Loss(temperature=3, temperature_squared=False))
    assert with_it - without == pytest.approx(0.7 * 8 * kl(teachers.mean(1), z, 3.0), rel=1e-5)


def test_the_mean_of_logits_is_one_teacher(batch: tuple[np.ndarray, ...]) -> None:
    z, y, teachers = batch
    one = teachers.mean(1, keepdims=True)
    for loss in (SUMMARY, Loss(ce=1, kl=1, cosine=1, combine="mean_logits")):
        assert mean_loss(z, y, teachers, loss) == pytest.approx(mean_loss(z, y, one, loss))


logits = hnp.arrays(np.float64, (4, 3), elements=st.floats(-30, 30))


@settings(max_examples=40)
@given(logits, st.sampled_from([1.0, 3.0]))
def test_a_student_like_its_teachers_has_nothing_left_to_learn(
    z: np.ndarray, temperature: float
) -> None:
    same = np.stack([z, z], axis=1)
    for combine in ("mean_logits", "separate"):
        loss = Loss(ce=0, kl=1, cosine=1, temperature=temperature, combine=combine)
        assert mean_loss(z, np.zeros(4, int), same, loss) == pytest.approx(0, abs=1e-5)


@settings(max_examples=40)
@given(logits, logits, st.sampled_from([SUMMARY, BLACKPEARL, VOTE_LOSS]))
def test_losses_and_gradients_are_finite_and_not_negative(
    z: np.ndarray, teacher: np.ndarray, loss: Loss
) -> None:
    student = torch.tensor(z, requires_grad=True)
    given = torch.tensor(np.stack([teacher, z], axis=1))
    total = battle_losses(student, torch.eye(3)[[0, 1, 2, 0]], given, None, loss)
    assert total.shape == (4,)
    assert torch.isfinite(total).all()
    assert (total > -1e-5).all()
    total.sum().backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize(
    "loss", [SUMMARY, BLACKPEARL, VOTE_LOSS], ids=["summary", "blackpearl", "votes"]
)
def test_softmax_is_float32_also_for_half_precision_logits(loss: Loss) -> None:
    """The same numbers in bfloat16 and in float32 have exactly the same loss."""
    random = torch.Generator().manual_seed(3)
    half = (torch.randn(64, 3, generator=random) * 2).bfloat16()
    teachers = (torch.randn(64, 2, 3, generator=random) * 2).bfloat16()
    votes = torch.eye(3)[torch.randint(0, 3, (64,), generator=random)]
    low = battle_losses(half, votes, teachers, None, loss)
    high = battle_losses(half.float(), votes, teachers.float(), None, loss)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, high, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = battle_losses(half, votes, teachers, None, loss)
    assert under_autocast.dtype == torch.float32
    torch.testing.assert_close(under_autocast, high, rtol=0, atol=1e-7)


def test_smoothing_and_focal_by_hand() -> None:
    z, y = np.log([[0.7, 0.2, 0.1]]), np.array([0])
    smooth = Loss(ce=1, kl=0, cosine=0, label_smoothing=0.3)
    # 0.7 + 0.3/3 for the vote, 0.1 for each other class.
    expected = -(0.8 * np.log(0.7) + 0.1 * np.log(0.2) + 0.1 * np.log(0.1))
    assert mean_loss(z, y, None, smooth) == pytest.approx(expected, rel=1e-6)
    focal = Loss(ce=1, kl=0, cosine=0, focal=2)
    assert mean_loss(z, y, None, focal) == pytest.approx(-(0.3**2) * np.log(0.7), rel=1e-6)


def test_without_teachers_the_votes_are_left() -> None:
    left = Loss(ce=0.3, kl=0.7, cosine=2, label_smoothing=0.1, focal=1).on_votes()
    assert (left.ce, left.kl, left.cosine) == (1, 0, 0)
    assert (left.label_smoothing, left.focal) == (0.1, 1)


# --- several teachers -------------------------------------------------------------------------------


def test_the_mean_of_probabilities_is_one_teacher(batch: tuple[np.ndarray, ...]) -> None:
    z, y, teachers = batch
    loss = Loss(ce=0, kl=1, cosine=1, temperature=2, combine="mean_probabilities")
    pooled = 2 * np.log(softmax(teachers, 2.0).mean(1, keepdims=True))
    assert mean_loss(z, y, teachers, loss) == pytest.approx(mean_loss(z, y, pooled, loss), rel=1e-5)


@pytest.mark.parametrize("combine", ["mean_logits", "mean_probabilities", "separate"])
def test_a_teacher_with_all_the_weight_is_the_only_one(
    combine: str, batch: tuple[np.ndarray, ...]
) -> None:
    z, y, teachers = batch
    loss = Loss(ce=1, kl=1, cosine=1, combine=combine)
    alone = np.tile(np.array([1.0, 0.0]), (7, 1))
    given = (torch.tensor(a) for a in (z, np.eye(3)[y], teachers, alone))
    twice = np.stack([teachers[:, 0]] * 2, axis=1)
    weighted = float(battle_losses(*given, loss).mean())
    assert weighted == pytest.approx(mean_loss(z, y, twice, loss), rel=1e-5)


def noisy_teachers(noise: tuple[float, ...], rows: int = 4000) -> tuple[np.ndarray, Votes]:
    """Targets (rows, J, orders, 3) whose teachers see the truth through noise, and the votes."""
    rng = np.random.default_rng(8)
    truth = rng.normal(0, 1.5, (rows, 3))
    labels = (softmax(truth).cumsum(1) < rng.random((rows, 1))).sum(1).clip(max=2)
    seen = [truth + rng.normal(0, error, truth.shape) for error in noise]
    return np.repeat(np.stack(seen, axis=1)[:, :, None], 2, axis=2).astype(np.float32), Votes.hard(
        labels
    )


@pytest.mark.parametrize("combine", ["mean_logits", "mean_probabilities"])
def test_fitted_weights_have_the_least_log_loss_of_all(combine: str) -> None:
    targets, votes = noisy_teachers((0.5, 1.5, 4.0))
    held_out = np.arange(len(votes)) % 4 > 0
    loss = Loss(combine=combine, weights="fitted")
    weights = teacher_weights(targets, votes, held_out, loss)
    assert weights.shape == (len(votes), 3)
    assert (weights == weights[0]).all()
    best = weights[0].astype(np.float64)
    assert best.sum() == pytest.approx(1, abs=1e-6)
    assert best[0] > best[1] > best[2] >= 0

    def log_loss(w: np.ndarray) -> float:
        z = targets[held_out, :, 0].astype(np.float64)
        if combine == "mean_logits":
            p = softmax(np.einsum("rjc,j->rc", z, w))
        else:
            p = np.einsum("rjc,j->rc", softmax(z), w)
        return float(-np.log(p[np.arange(len(p)), votes.labels[held_out]]).mean())

    for other in np.random.default_rng(0).dirichlet([1, 1, 1], 200):
        assert log_loss(best) <= log_loss(other) + 1e-6


def test_weights_are_fitted_on_held_out_rows_alone() -> None:
    targets, votes = noisy_teachers((0.5, 3.0))
    held_out = np.arange(len(votes)) < 3000
    loss = Loss(weights="fitted")
    expected = teacher_weights(targets, votes, held_out, loss)[0]
    cheating = targets.copy()
    cheating[~held_out, 1] = 50 * votes.probabilities[~held_out, None]  # it knows their votes
    np.testing.assert_array_equal(teacher_weights(cheating, votes, held_out, loss)[0], expected)
    with pytest.raises(InputError, match="out of fold"):
        teacher_weights(targets, votes, np.zeros(len(votes), bool), loss)


def test_confidence_weights_by_hand() -> None:
    """Zhang et al. 2022, equation 3: w_j = (1 - exp(CE_j) / sum exp(CE)) / (J - 1)."""
    p = np.array([[[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.125, 0.375, 0.5]]])
    targets = np.log(p)[:, :, None].repeat(2, axis=2).astype(np.float32)
    loss = Loss(weights="confidence")
    weights = teacher_weights(targets, Votes.hard(np.array([0])), np.array([True]), loss)
    surprise = 1 / np.array([0.5, 0.25, 0.125])  # exp(CE)
    np.testing.assert_allclose(weights[0], (1 - surprise / surprise.sum()) / 2, rtol=1e-5)
    assert weights.sum() == pytest.approx(1)
    nobody = teacher_weights(targets, Votes.hard(np.array([NO_VOTE])), np.array([False]), loss)
    np.testing.assert_allclose(nobody, 1 / 3, rtol=1e-6)


def test_votes_that_all_teachers_contradict_count_less_by_hand() -> None:
    """Votes for A: both teachers say 0.05; one says 0.05; both say 0.05, but have learned the vote."""
    sure, unsure = np.log([0.05, 0.9, 0.05]), np.log([0.2, 0.6, 0.2])
    targets = np.array([[sure, sure], [sure, unsure], [sure, sure]], np.float32)[:, :, None]
    votes, held_out = Votes.hard(np.zeros(3, int)), np.array([True, True, False])
    loss = Loss(ce=0.3, kl=0.7, temperature=1, contradicted_weight=0.25)
    counted = trusted_votes(targets, votes, held_out, loss)
    assert counted.probabilities.tolist() == [[0.25, 0, 0], [1, 0, 0], [1, 0, 0]]
    assert counted.weights.tolist() == [1, 1, 1]
    assert trusted_votes(targets, votes, held_out, Loss()) is votes
    stricter = loss.model_copy(update={"contradicted_below": 0.04})
    assert (
        trusted_votes(targets, votes, held_out, stricter).probabilities.tolist() == [[1, 0, 0]] * 3
    )
    # A student that says 1/3 of each: 0.3 · 1/4 · log 3 + 0.7 · KL of the teachers' mean.
    found = battle_losses(
        torch.zeros(3, 3),
        torch.tensor(counted.probabilities, dtype=torch.float32),
        torch.tensor(targets[:, :, 0]),
        None,
        loss,
    )
    divergence = 0.9 * np.log(0.9 * 3) + 2 * 0.05 * np.log(0.05 * 3)
    assert float(found[0]) == pytest.approx(0.3 * 0.25 * np.log(3) + 0.7 * divergence, rel=1e-5)
    assert float(found[2]) == pytest.approx(0.3 * np.log(3) + 0.7 * divergence, rel=1e-5)


def test_a_contradicted_vote_of_weight_0_is_none(batch: tuple[np.ndarray, ...]) -> None:
    z, y, teachers = batch
    loss = BLACKPEARL.model_copy(update={"contradicted_weight": 0, "contradicted_below": 0.999})
    every = trusted_votes(teachers[:, :, None], Votes.hard(y), np.ones(len(y), bool), loss)
    given = torch.tensor(z), torch.tensor(every.probabilities), torch.tensor(teachers), None, loss
    nobody = mean_loss(z, np.full(7, NO_VOTE), teachers, BLACKPEARL)
    assert float(battle_losses(*given).mean()) == pytest.approx(nobody)
    with pytest.raises(ValueError, match="nothing is left to learn"):
        Loss(ce=1, kl=0, contradicted_weight=0)


def test_a_battle_without_a_vote_is_learned_from_teachers_alone(
    batch: tuple[np.ndarray, ...],
) -> None:
    z, _, teachers = batch
    nobody = np.full(7, NO_VOTE)
    assert mean_loss(z, nobody, teachers, BLACKPEARL) == pytest.approx(
        mean_loss(z, np.zeros(7, int), teachers, BLACKPEARL.model_copy(update={"ce": 0.0})),
        rel=1e-6,
    )


# --- which rows -------------------------------------------------------------------------------------

Write = Callable[..., Path]


def logit_of(source: str, id_: str, salt: float = 0.0) -> np.ndarray:
    """Logits that identify their row: (orders, 3)."""
    base = float(id_) + (1000.0 if source == "extra" else 0.0) + salt
    return np.array([[base, base + 0.25, -base], [base + 0.5, base + 0.75, -base]], np.float32)


def table(names: list[tuple[str, str]]) -> pa.Table:
    return pa.table({"id": [id_ for _, id_ in names], "source": [source for source, _ in names]})


def write(
    folder: Path,
    fold: int,
    rows: list[tuple[str, str, bool]],
    salt: float = 0.0,
    seed: int | None = None,
) -> Path:
    """A fold's file: (source, id, validation) per row, in a shuffled order if there is a seed."""
    rows = list(rows)
    if seed is not None:
        np.random.default_rng(seed).shuffle(rows)
        rows = [(str(s), str(i), str(v) == "True") for s, i, v in rows]
    values = np.stack([logit_of(source, id_, salt) for source, id_, _ in rows])
    ids = table([(source, id_) for source, id_, _ in rows]).append_column(
        "validation", pa.array([flag for *_, flag in rows])
    )
    path = folder / f"fold_{fold}.npy"
    write_logits(path, values, ids, {})
    return path


def teacher_targets(teachers: dict[str, list[Path]], rows: pa.Table, targets: Any) -> np.ndarray:
    return teacher_logits(select_rows(teachers, rows, targets))


FOLDS = [["0", "3", "6"], ["1", "4", "7"], ["2", "5", "8"]]
EXTRA = ["0", "1", "2"]
STUDENT = [("train", i) for i in ["8", "0", "4", "7"]] + [("extra", "2"), ("extra", "0")]


def out_of_fold_files(folder: Path, seed: int | None = None) -> list[Path]:
    """A file per fold: its own rows, and the extra rows of all folds."""
    files = []
    for fold, own in enumerate(FOLDS):
        rows: list[tuple[str, str, bool]] = [("train", i, True) for i in own]
        rows += [("extra", i, False) for i in EXTRA]
        files.append(write(folder, fold, rows, seed=None if seed is None else seed + fold))
    return files


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_out_of_fold_targets_are_joined_by_key(tmp_path: Path, seed: int | None) -> None:
    targets = teacher_targets(
        {"teacher": out_of_fold_files(tmp_path, seed)}, table(STUDENT), "out_of_fold"
    )
    assert targets.shape == (6, 1, 2, 3)
    assert targets.dtype == np.float32
    np.testing.assert_array_equal(targets[:, 0], [logit_of(*name) for name in STUDENT])


def test_out_of_fold_takes_the_model_that_never_saw_the_row(tmp_path: Path) -> None:
    """Files that also hold in-sample rows, as for a teacher of both kinds of student."""
    files = []
    everyone = [i for own in FOLDS for i in own]
    for fold, own in enumerate(FOLDS):
        true = {("train", i, True) for i in own}
        rows = [("train", i, i in own) for i in everyone]
        values = [logit_of(s, i, 0.0 if (s, i, v) in true else 500.0) for s, i, v in rows]
        ids = table([(s, i) for s, i, _ in rows]).append_column(
            "validation", pa.array([v for *_, v in rows])
        )
        files.append(tmp_path / f"fold_{fold}.npy")
        write_logits(files[-1], np.stack(values), ids, {})
    names = [("train", i) for i in everyone]
    targets = teacher_targets({"teacher": files}, table(names), "out_of_fold")
    np.testing.assert_array_equal(targets[:, 0], [logit_of(*name) for name in names])


def test_extra_rows_get_the_mean_over_folds(tmp_path: Path) -> None:
    files = []
    for fold, own in enumerate(FOLDS):
        rows: list[tuple[str, str, bool]] = [("train", i, True) for i in own]
        rows += [("extra", i, False) for i in EXTRA]
        files.append(write(tmp_path, fold, rows, salt=float(fold), seed=fold))
    targets = teacher_targets({"teacher": files}, table([("extra", "1")]), "out_of_fold")
    np.testing.assert_allclose(targets[0, 0], logit_of("extra", "1", salt=1.0))


def test_in_sample_targets_come_from_the_fold_own_file(tmp_path: Path) -> None:
    rows = [("train", i, False) for i in ("0", "4", "7", "8")]
    rows += [("extra", i, False) for i in EXTRA]
    file = write(tmp_path, 0, rows, salt=9.0, seed=4)
    targets = teacher_targets({"teacher": [file]}, table(STUDENT), "in_sample")
    np.testing.assert_array_equal(targets[:, 0], [logit_of(*name, salt=9.0) for name in STUDENT])


def test_teachers_stay_in_the_order_given(tmp_path: Path) -> None:
    files = {}
    for number, name in enumerate(["zebra", "ant"]):
        rows = [("train", "0", True)]
        (tmp_path / name).mkdir()
        files[name] = [write(tmp_path / name, 0, rows, salt=float(number))]
    targets = teacher_targets(files, table([("train", "0")]), "out_of_fold")
    np.testing.assert_array_equal(targets[0, 0], logit_of("train", "0", 0.0))
    np.testing.assert_array_equal(targets[0, 1], logit_of("train", "0", 1.0))


@pytest.mark.parametrize("targets", ["out_of_fold", "in_sample"])
def test_a_missing_row_names_teacher_and_file(tmp_path: Path, targets: Any) -> None:
    file = write(tmp_path, 0, [("train", "0", True)])
    with pytest.raises(InputError, match=rf"teacher's .*{tmp_path}.* rows are missing, train:5"):
        teacher_targets({"teacher": [file]}, table([("train", "0"), ("train", "5")]), targets)


def test_extra_rows_missing_in_one_fold_are_an_error(tmp_path: Path) -> None:
    full: list[tuple[str, str, bool]] = [("train", "0", True), ("extra", "0", False)]
    files = [write(tmp_path, 0, full), write(tmp_path, 1, [("train", "1", True)])]
    with pytest.raises(InputError, match="only some folds of teacher hold extra rows"):
        teacher_targets({"teacher": files}, table([("extra", "0")]), "out_of_fold")


def test_two_folds_that_both_validate_a_row_are_an_error(tmp_path: Path) -> None:
    files = [write(tmp_path, fold, [("train", "0", True)]) for fold in range(2)]
    with pytest.raises(InputError, match="train:0 is there more than once"):
        teacher_targets({"teacher": files}, table([("train", "0")]), "out_of_fold")


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    file = write(tmp_path, 0, [("train", "0", True)])
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"fold_0\.npy"):
        teacher_targets({"teacher": [file]}, table([("train", "0")]), "in_sample")


# --- what targets know --------------------------------------------------------------------------------


def test_targets_out_of_fold_make_scores_optimistic_and_those_in_sample_do_not(
    tmp_path: Path,
) -> None:
    """Votes are random: a student predicts them only if its teachers have learned from them."""
    rng, rows, folds = np.random.default_rng(0), 240, 3
    features = torch.from_numpy(rng.normal(size=(rows, 1, 120)).astype(np.float32))
    votes = torch.from_numpy(rng.integers(0, 3, rows))
    fold = np.arange(rows) % folds
    names = table([("train", str(i)) for i in range(rows)])

    def learn(known: np.ndarray, teacher: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of all battles from a linear judge that learned from some of them."""
        loss = VOTE_LOSS if teacher is None else Loss(ce=0, kl=1, temperature=1)
        own = torch.eye(3)[votes[torch.from_numpy(known)]]

        def objective(outputs: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
            target = None if teacher is None else teacher[part]
            return battle_losses(outputs[:, 0], own[part], target, None, loss)

        chosen = features[torch.from_numpy(known)]
        (weights,) = fit_weights(chosen, objective, 3, np.arange(len(known)), (0.03,))
        return features[:, 0] @ weights.T

    files = []
    for k in range(folds):
        logits = learn(np.flatnonzero(fold != k)).numpy()[:, None].repeat(2, axis=1)
        ids = names.append_column("validation", pa.array(fold == k))
        files.append(tmp_path / f"fold_{k}.npy")
        write_logits(files[-1], logits, ids, {})

    def score(targets: Any) -> float:
        """The out-of-fold score of a student that learned each fold only from its targets."""
        each = np.empty(rows)
        for k in range(folds):
            known, held_out = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
            given = files[k : k + 1] if targets == "in_sample" else files
            selected = select_rows({"t": given}, names.take(pa.array(known)), targets)
            logits = learn(known, torch.from_numpy(teacher_logits(selected)[:, :, 0]))
            each[held_out] = torch.nn.functional.cross_entropy(
                logits[held_out], votes[held_out], reduction="none"
            )
        return float(each.mean())

    assert score("out_of_fold") < 0.8 < np.log(3) < score("in_sample")
