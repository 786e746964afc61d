"""Calibration: it finds known parameters, keeps its constraints, and is never scored on its own fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from checkouts import Checkout, make_checkout
from conftest import battles_table
from hypothesis import given
from hypothesis import strategies as st
from made_up_run import FOLDS, MadeUpRun, made_up_run

from arena_distill.battles.folds import assign_folds
from arena_distill.battles.style_features import read_styles, style_features
from arena_distill.battles.votes import votes_of
from arena_distill.config.phases import PredictionSettings, Settings
from arena_distill.config.vocabulary import CalibrationMethod
from arena_distill.errors import InputError
from arena_distill.files.artifacts import provenance, read_parquet, read_provenance, write_parquet
from arena_distill.files.keys import key
from arena_distill.files.logits import write_logits
from arena_distill.metrics import losses, softmax
from arena_distill.prediction.calibration import (
    COLDEST,
    HOTTEST,
    METHODS,
    CalibrationMap,
    cross_fit,
    fit,
    fit_calibration,
    parts_of,
    read_calibration,
)
from arena_distill.prediction.test_time import predict_test
from arena_distill.verdicts import WINNERS, Order, Votes, swap_classes

seeds = st.integers(0, 2**32 - 1)
each_method = pytest.mark.parametrize("method", METHODS)


def drawn(probabilities: np.ndarray, rng: np.random.Generator) -> Votes:
    """Hard votes drawn from their probabilities."""
    below = probabilities.cumsum(axis=1) < rng.random(len(probabilities))[:, None]
    return Votes.hard(below.sum(axis=1).clip(max=2))


def exchanged_votes(votes: Votes) -> Votes:
    return Votes(swap_classes(votes.probabilities), votes.weights)


def loss(logits: np.ndarray, votes: Votes) -> float:
    return float(losses(softmax(logits), votes).mean())


# --- what is found --------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_a_known_temperature_is_found(temperature: float) -> None:
    rng = np.random.default_rng(1)
    honest = rng.normal(0, 1.5, (60_000, 3))
    votes = drawn(softmax(honest), rng)
    found = fit("temperature", honest * temperature, votes).parameters
    assert found["temperature"] == pytest.approx(temperature, rel=0.02)
    assert found["scale"] == [pytest.approx(1 / temperature, rel=0.02)] * 3
    assert found["bias"] == [0, 0, 0]


def test_known_scales_and_a_known_bias_are_found() -> None:
    rng = np.random.default_rng(2)
    seen = rng.normal(0, 1.5, (100_000, 3))
    known = CalibrationMap(np.array([0.6, 0.6, 1.7]), np.array([0.0, 0.0, -0.8]))
    found = fit("vector", seen, drawn(softmax(known(seen)), rng))
    np.testing.assert_allclose(found.scale, known.scale, rtol=0.04)
    np.testing.assert_allclose(found.bias, known.bias, atol=0.03)
    assert "temperature" not in found.parameters


@each_method
@given(seed=seeds)
def test_the_fit_is_where_the_gradient_is_zero(method: CalibrationMethod, seed: int) -> None:
    rng = np.random.default_rng(seed)
    seen = rng.normal(0, 2, (200, 3))
    votes = drawn(softmax(seen / 2), rng)
    found = fit(method, seen, votes)
    best = loss(found(seen), votes)
    for factor in (0.99, 1.01):
        assert loss(CalibrationMap(found.scale * factor, found.bias)(seen), votes) > best
        moved = np.array([0.0, 0.0, factor - 1])
        assert method == "temperature" or loss(found(seen) + moved, votes) > best


@each_method
@given(seed=seeds, rows=st.integers(1, 40), size=st.sampled_from([0.0, 1e-3, 1.0, 30.0]))
def test_a_fit_is_never_worse_on_its_own_rows(
    method: CalibrationMethod, seed: int, rows: int, size: float
) -> None:
    rng = np.random.default_rng(seed)
    seen, votes = rng.normal(0, size, (rows, 3)), Votes.hard(rng.integers(0, 3, rows))
    found = fit(method, seen, votes)
    assert loss(found(seen), votes) <= loss(seen, votes) + 1e-9
    assert np.isfinite(found(seen)).all()
    assert (found.scale >= 1 / HOTTEST).all()
    assert (found.scale <= 1 / COLDEST).all()


@each_method
def test_parameters_that_votes_do_not_decide_keep_their_start(method: CalibrationMethod) -> None:
    none, no_votes = np.empty((0, 3)), Votes.hard(np.empty(0, int))
    empty = fit(method, none, no_votes)
    assert empty.scale.tolist() == [1, 1, 1]
    assert empty.bias.tolist() == [0, 0, 0]
    # A judge with the same logits for every battle: no temperature is better than another.
    constant = fit(method, np.full((9, 3), 4.0), Votes.hard(np.arange(9) % 3))
    np.testing.assert_allclose(constant.scale, 1)
    np.testing.assert_allclose(constant.bias, 0, atol=1e-6)


def test_a_perfect_judge_and_a_perverse_one_have_a_temperature() -> None:
    seen, right = np.eye(3)[np.arange(30) % 3], np.arange(30) % 3
    assert fit("temperature", seen, Votes.hard(right)).parameters["temperature"] < 0.2
    perverse = fit("temperature", seen, Votes.hard((right + 1) % 3)).parameters["temperature"]
    assert perverse == pytest.approx(HOTTEST)


def test_a_kind_of_vote_that_is_absent_becomes_rare_not_impossible() -> None:
    rng = np.random.default_rng(3)
    seen = rng.normal(size=(500, 3))
    found = fit("vector", seen, Votes.hard(rng.integers(0, 2, 500)))
    ties = softmax(found(seen))[:, 2]
    assert 0 < ties.max() < 0.01


# --- what is respected ----------------------------------------------------------------------------


@each_method
@given(seed=seeds)
def test_exchanging_the_answers_exchanges_the_calibrated_verdict(
    method: CalibrationMethod, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    seen, votes = rng.normal(0, 2, (50, 3)), Votes.hard(rng.integers(0, 3, 50))
    found = fit(method, seen, votes)
    np.testing.assert_allclose(found(swap_classes(seen)), swap_classes(found(seen)), atol=1e-12)
    # And the fit does not care which answer is called A.
    exchanged = fit(method, swap_classes(seen), exchanged_votes(votes))
    np.testing.assert_allclose(exchanged.scale, found.scale, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(exchanged.bias, found.bias, rtol=1e-3, atol=1e-3)


@each_method
@given(seed=seeds)
def test_a_constant_on_all_logits_changes_nothing(method: CalibrationMethod, seed: int) -> None:
    rng = np.random.default_rng(seed)
    seen, votes = rng.normal(0, 2, (50, 3)), Votes.hard(rng.integers(0, 3, 50))
    found, shift = fit(method, seen, votes), rng.normal(0, 5, (50, 1))
    np.testing.assert_allclose(found(seen + shift), found(seen), atol=1e-10)


@given(seeds)
def test_a_temperature_changes_no_verdict(seed: int) -> None:
    rng = np.random.default_rng(seed)
    seen, votes = rng.normal(0, 2, (50, 3)), Votes.hard(rng.integers(0, 3, 50))
    found = fit("temperature", seen, votes)
    assert (found(seen).argmax(axis=1) == seen.argmax(axis=1)).all()


@each_method
def test_the_same_rows_give_the_same_bits(method: CalibrationMethod) -> None:
    rng = np.random.default_rng(4)
    seen, votes = rng.normal(0, 2, (300, 3)), Votes.hard(rng.integers(0, 3, 300))
    assert fit(method, seen, votes).parameters == fit(method, seen, votes).parameters


# --- cross-fitting --------------------------------------------------------------------------------


@each_method
def test_cross_fitting_shows_no_gain_on_noise(method: CalibrationMethod) -> None:
    """A judge that knows the truth needs no calibration: a fit to noise scores worse on other battles."""
    own, crossed = [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        seen, parts = rng.normal(0, 1, (60, 3)), np.arange(60) % 3
        votes = drawn(softmax(seen), rng)
        own.append(loss(fit(method, seen, votes)(seen), votes) - loss(seen, votes))
        crossed.append(loss(cross_fit(method, seen, votes, parts), votes) - loss(seen, votes))
    assert np.mean(own) < -0.003
    assert np.mean(crossed) > 0.003


@each_method
def test_votes_of_a_part_do_not_move_its_own_probabilities(method: CalibrationMethod) -> None:
    rng = np.random.default_rng(5)
    seen, votes, parts = (
        rng.normal(size=(90, 3)),
        Votes.hard(rng.integers(0, 3, 90)),
        rng.integers(0, 4, 90),
    )
    before = cross_fit(method, seen, votes, parts)
    for part in range(4):
        mine = parts == part
        changed = Votes.hard(np.where(mine, (votes.labels + 1) % 3, votes.labels))
        after = cross_fit(method, seen, changed, parts)
        np.testing.assert_array_equal(after[mine], before[mine])
        assert not np.allclose(after[~mine], before[~mine])


def battles(prompts: list[str], extra: int = 0) -> pa.Table:
    rows: list[dict[str, Any]] = [
        {"prompt": prompt, "label": i % 3} for i, prompt in enumerate(prompts)
    ]
    rows += [{"id": f"x{i}", "source": "extra", "label": 0} for i in range(extra)]
    return battles_table(rows)


@pytest.mark.parametrize("method", ["kfold", "stratified", "stratified_group"])
def test_parts_share_no_prompt(method: Any) -> None:
    prompts = [f"p{i % 20}" for i in range(60)]
    folds = assign_folds(battles(prompts, extra=7), method=method, n=4, seed=0)
    parts = parts_of(folds)
    groups = folds["group"].to_numpy()[folds["fold"].to_numpy() >= 0]
    assert len(parts) == 60
    assert set(parts) == set(range(4))
    assert all(len(np.unique(parts[groups == group])) == 1 for group in groups)
    own = folds["fold"].to_numpy()[:60]
    assert (parts == own).all() == (method == "stratified_group")


@pytest.mark.parametrize(("prompts", "parts"), [(["p"], 1), (["p", "q"], 2)])
def test_few_prompts_make_few_parts(prompts: list[str], parts: int) -> None:
    folds = assign_folds(battles(prompts * 12), method="kfold", n=4, seed=0)
    assert len(np.unique(parts_of(folds))) == parts
    seen = np.random.default_rng(0).normal(size=(12 * parts, 3))
    votes = Votes.hard(np.arange(12 * parts) % 3)
    calibrated = cross_fit("vector", seen, votes, parts_of(folds))
    # One prompt leaves nothing to fit to: the logits stay as they are, but for their mean.
    assert np.allclose(softmax(calibrated), softmax(seen)) == (parts == 1)


# --- style ----------------------------------------------------------------------------------------


def styled(rows: int, seed: int) -> tuple[np.ndarray, Votes, np.ndarray]:
    """Logits, the style of the answers, and votes that depend on both."""
    rng = np.random.default_rng(seed)
    seen = rng.normal(0, 1.2, (rows, 3))
    styles = rng.normal(0, [1, 300, 0.2], (rows, 3))
    lead = styles @ [1.0, -0.002, 0]
    true = seen + np.column_stack([lead / 2, -lead / 2, -0.5 * np.abs(styles[:, 0])])
    return seen, drawn(softmax(true), rng), styles


def test_a_known_effect_of_style_is_found() -> None:
    seen, votes, styles = styled(60_000, 1)
    found = fit("style", seen, votes, styles)
    np.testing.assert_allclose(found.lead * [1, 300, 0.2], [1, -0.6, 0], atol=0.08)
    np.testing.assert_allclose(found.tie * [1, 300, 0.2], [-0.5, 0, 0], atol=0.08)
    np.testing.assert_allclose(found.scale, 1, atol=0.05)
    raw, vector = loss(seen, votes), loss(fit("vector", seen, votes)(seen), votes)
    assert loss(found(seen, styles), votes) < vector - 0.05 < raw


def test_without_styles_it_is_vector() -> None:
    seen, votes, styles = styled(500, 2)
    vector = fit("vector", seen, votes)
    assert fit("style", seen, votes).parameters == vector.parameters
    assert fit("vector", seen, votes, styles).parameters == vector.parameters
    with pytest.raises(ValueError, match="needs the style"):
        fit("style", seen, votes, styles)(seen)


@given(seeds)
def test_exchanging_the_answers_exchanges_the_verdict_by_style(seed: int) -> None:
    seen, votes, styles = styled(80, seed)
    found = fit("style", seen, votes, styles)
    np.testing.assert_allclose(
        found(swap_classes(seen), -styles), swap_classes(found(seen, styles)), atol=1e-12
    )
    exchanged = fit("style", swap_classes(seen), exchanged_votes(votes), -styles)
    np.testing.assert_allclose(exchanged(seen, styles), found(seen, styles), atol=1e-3)


def test_an_uninformative_style_adds_almost_nothing() -> None:
    """Five useless features and a hundred battles: cross-fitted, the loss hardly rises."""
    seen, votes, _ = styled(100, 3)
    noise = np.random.default_rng(4).normal(size=(100, 5))
    parts = np.arange(100) % 5
    plain, with_noise = (
        loss(cross_fit("style", seen, votes, parts, s), votes) for s in (None, noise)
    )
    assert with_noise < plain + 0.1


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> MadeUpRun:
    return made_up_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def calibration(run: MadeUpRun) -> Path:
    output = run.folder / "calibration" / "small.json"
    fit_calibration(
        run.folder / "folds.parquet",
        run.folder / "battles.parquet",
        run.logits["small"],
        output,
        judge="small",
        settings=Settings(version=1),
    )
    return output


def test_the_file_and_the_evaluation_agree(run: MadeUpRun, calibration: Path) -> None:
    written = json.loads(calibration.read_text())
    judge = json.loads(run.evaluate().read_text())["judges"]["small"]
    assert written["judge"] == "small"
    assert written["rows"] == judge["oof"]["rows"]
    assert written["raw"] == judge["oof"]
    for method in METHODS:
        shown = judge["calibration"][method]
        assert written[method] == {k: v for k, v in shown.items() if "reliability" not in k}
    assert written["provenance"]["phase"] == "calibration"


def test_the_file_is_cross_fitted_by_the_folds_and_fitted_to_all(
    run: MadeUpRun, calibration: Path
) -> None:
    from arena_distill.scoring.logits import read_out_of_fold

    seen = read_out_of_fold(run.folds, run.logits["small"], "small").mean(axis=1, dtype=np.float64)
    fold = run.folds["fold"].to_numpy()
    votes = votes_of(run.folds)[fold >= 0]
    fold = fold[fold >= 0]  # stratified_group: they keep prompts together
    whole = json.loads(calibration.read_text())
    styles = read_styles(
        run.folder / "battles.parquet",
        key(run.folds.filter(pc.greater_equal(run.folds["fold"], 0))),
    )
    assert whole["style"]["parameters"] == fit("style", seen, votes, styles).parameters
    written = whole["temperature"]
    by_hand = np.empty(len(fold))
    for k in range(FOLDS):
        mine = fold == k
        others = fit("temperature", seen[~mine], votes[~mine])
        by_hand[mine] = losses(softmax(others(seen[mine])), votes[mine])
    assert written["log_loss"] == pytest.approx(by_hand.mean(), abs=1e-12)
    assert written["parameters"] == fit("temperature", seen, votes).parameters
    read = read_calibration(calibration, "temperature")
    np.testing.assert_array_equal(read(seen), fit("temperature", seen, votes)(seen))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([1, 2], r"judge small: logits of the folds \[0, 1, 2\]"),
        ([1, 0, 2], r"fold_1\.ids\.parquet: 40 of 40 rows are missing"),
    ],
    ids=["a fold is missing", "folds in another order"],
)
def test_every_fold_is_read_in_its_place(
    run: MadeUpRun, tmp_path: Path, files: list[int], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        fit_calibration(
            run.folder / "folds.parquet",
            run.folder / "battles.parquet",
            [run.logits["small"][number] for number in files],
            tmp_path / "x.json",
            judge="small",
            settings=Settings(version=1),
        )


@pytest.mark.parametrize(
    "spoiled",
    [
        {},
        {"vector": {}},
        {"vector": {"parameters": {"scale": [1, 1, 1]}}},
        {"vector": {"parameters": {"scale": [1, 1], "bias": [0, 0]}}},
        {"vector": {"parameters": {"scale": [1, 1, "x"], "bias": [0, 0, 0]}}},
        {"vector": {"parameters": {"scale": [1, 1, 0], "bias": [0, 0, 0]}}},
        {"vector": {"parameters": {"scale": [1, 1, None], "bias": [0, 0, 0]}}},
        [],
    ],
)
def test_a_file_without_the_calibration_is_an_error(spoiled: Any, tmp_path: Path) -> None:
    (tmp_path / "small.json").write_text(json.dumps(spoiled))
    with pytest.raises(InputError, match=r"small\.json: holds no calibration by vector"):
        read_calibration(tmp_path / "small.json", "vector")


@pytest.mark.parametrize("style", [{}, {"lead": [1.0]}, {"lead": [1.0], "tie": [1.0, 2.0]}])
def test_a_calibration_by_style_needs_its_weights(style: Any, tmp_path: Path) -> None:
    spoiled = {"style": {"parameters": {"scale": [1, 1, 1], "bias": [0, 0, 0], **style}}}
    (tmp_path / "small.json").write_text(json.dumps(spoiled))
    with pytest.raises(InputError, match=r"small\.json: holds no calibration by style"):
        read_calibration(tmp_path / "small.json", "style")


# --- predictions ----------------------------------------------------------------------------------

ORDERS: tuple[Order, ...] = ("AB", "BA")


def asked(rows: int) -> pa.Table:
    """Test battles whose answers differ in length and formatting."""
    answers = {
        f"response_{x}": ["**so** " * (i * k % 7) for i in range(rows)]
        for x, k in (("a", 3), ("b", 5))
    }
    return pa.table({"id": [f"b{i}" for i in range(rows)], "source": ["test"] * rows, **answers})


def predict(folder: Path, logits: np.ndarray, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """The predictions of one model as a frame, and their provenance."""
    ids, battles = asked(len(logits)), folder / "battles.parquet"
    write_parquet(battles_table(ids.to_pylist()), battles, {"phase": "battles"})
    ids = ids.select(["id", "source"])
    about = provenance("scoring", {"max_lengths": [40, 64], "orders": list(ORDERS)})
    write_logits(folder / "merged_test.npy", logits, ids, about)
    calibration = changes.pop("file", None)
    settings = PredictionSettings(version=1, max_lengths=(40, 64), orders=ORDERS, **changes)
    output = folder / "test.parquet"
    predict_test(
        folder / "merged_test.npy",
        output,
        model="merged",
        settings=settings,
        calibration=calibration,
        battles=battles,
    )
    return read_parquet(output).to_pandas(), read_provenance(output)


@each_method
@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_every_variant_is_there_raw_and_calibrated(
    method: CalibrationMethod, average: str, calibration: Path, tmp_path: Path
) -> None:
    logits = np.random.default_rng(6).normal(size=(8, 2, 2, 3)).astype(np.float32)
    raw, _ = predict(tmp_path / "raw", logits, average=average)
    frame, _ = predict(
        tmp_path / "calibrated", logits, average=average, calibration=method, file=calibration
    )
    assert len(frame) == 2 * len(raw)
    plain = frame[~frame["variant"].str.endswith(method)].reset_index(drop=True)
    np.testing.assert_array_equal(plain[list(WINNERS)], raw[list(WINNERS)])
    assert set(frame.loc[frame["submitted"], "variant"]) == {f"40+64/AB+BA/{method}"}
    known = read_calibration(calibration, method)
    styles = style_features(battles_table(asked(8).to_pylist()))
    assert bool(len(known.lead)) == (method == "style")

    def mend(scores: np.ndarray) -> np.ndarray:
        return known(scores, styles)

    views = logits.astype(np.float64).reshape(8, 4, 3)
    if average == "logits":
        expected = softmax(mend(views.mean(axis=1)))
    else:
        expected = softmax(mend(views)).mean(axis=1)
    found = frame.loc[frame["submitted"], list(WINNERS)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    one = frame.loc[frame["variant"] == f"64/BA/{method}", list(WINNERS)]
    np.testing.assert_allclose(one, softmax(mend(logits[:, 1, 1])), rtol=1e-12)


def test_without_calibration_a_file_changes_nothing(calibration: Path, tmp_path: Path) -> None:
    logits = np.zeros((3, 2, 2, 3), np.float32)
    _, about = predict(tmp_path / "a", logits, average="logits")
    assert about["settings"]["calibration"] == "none"
    predict(tmp_path / "b", logits, average="logits", file=calibration)
    one, other = (tmp_path / name / "test.parquet" for name in "ab")
    assert one.read_bytes() == other.read_bytes()


def test_calibrating_takes_a_file(tmp_path: Path) -> None:
    logits = np.zeros((3, 2, 2, 3), np.float32)
    with pytest.raises(InputError, match=r"prediction\.calibration: vector, but no file"):
        predict(tmp_path, logits, average="logits", calibration="vector")


# --- the workflow ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_calibration_is_a_job_where_it_is_asked_for_alone(tmp_path: Path) -> None:
    checkout: Checkout = make_checkout(tmp_path / "checkout")
    checkout.edit("mini.yaml", "  precision: fp32", "  precision: fp32\n  targets: in_sample")
    plain = checkout.would_run()
    checkout.edit("mini.yaml", "average: logits", "average: logits\n  calibration: vector")
    assert checkout.would_run() == {**plain, "fit_calibration": 1}
    assert "fit_calibration" not in plain
    target = "results/mini/calibration/llama-teacher.json"
    assert checkout.would_run(target)["fit_calibration"] == 1
