"""Calibration: it finds known parameters, keeps its constraints, and is never scored on its own fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from checkouts import Checkout, make_checkout
from conftest import battles_table
from hypothesis import given
from hypothesis import strategies as st
from made_up_run import MadeUpRun, made_up_run

from arena_distill.battles.folds import assign_folds
from arena_distill.battles.style_features import style_features
from arena_distill.battles.votes import votes_of
from arena_distill.config.phases.prediction import PredictionSettings
from arena_distill.config.vocabulary import CalibrationMethod
from arena_distill.errors import InputError
from arena_distill.evaluation.out_of_fold import Run
from arena_distill.files.artifacts import provenance, read_parquet, read_provenance, write_parquet
from arena_distill.files.keys import key, locate
from arena_distill.files.logits import read_logits, write_logits
from arena_distill.metrics import losses, softmax
from arena_distill.prediction.calibration import (
    COLDEST,
    HOTTEST,
    METHODS,
    CalibrationMap,
    cross_fit,
    fit,
    parts_of,
)
from arena_distill.prediction.held_out import FEWEST, choose, read_calibration
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
    parts = run_of(folds).parts()
    groups = folds["group"].to_numpy()[folds["fold"].to_numpy() >= 0]
    assert len(parts) == 60
    assert set(parts) == set(range(4))
    assert all(len(np.unique(parts[groups == group])) == 1 for group in groups)
    own = folds["fold"].to_numpy()[:60]
    assert (parts == own).all() == (method == "stratified_group")


def run_of(folds: pa.Table) -> Run:
    """A run of these folds, as the evaluation reads it."""
    styles = np.zeros((len(folds), 8))
    return Run(folds, folds, styles, styles, np.flatnonzero(folds["fold"].to_numpy() >= 0))


@pytest.mark.parametrize(("prompts", "parts"), [(["p"], 1), (["p", "q"], 2)])
def test_few_prompts_make_few_parts(prompts: list[str], parts: int) -> None:
    groups = np.tile(np.arange(len(prompts)), 12)
    assert len(np.unique(parts_of(groups, 4))) == parts
    seen = np.random.default_rng(0).normal(size=(12 * parts, 3))
    votes = Votes.hard(np.arange(12 * parts) % 3)
    calibrated = cross_fit("vector", seen, votes, parts_of(groups, 4))
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


# --- what is chosen -------------------------------------------------------------------------------


def test_too_few_battles_are_not_calibrated() -> None:
    seen, votes, styles = styled(FEWEST, 6)
    groups = np.arange(FEWEST)
    assert choose(seen * 3, votes, groups, styles) != "none"
    fewer = groups[:-1]
    assert choose(seen[fewer] * 3, votes[fewer], fewer, styles[fewer]) == "none"


def test_a_richer_map_is_chosen_only_where_it_pays() -> None:
    rng = np.random.default_rng(7)
    rows = 4000
    groups, seen = np.arange(rows), rng.normal(0, 1.5, (rows, 3))
    noise = rng.normal(size=(rows, 3))
    assert choose(2 * seen, drawn(softmax(seen), rng), groups, noise) == "temperature"
    skewed = CalibrationMap(np.array([0.6, 0.6, 1.5]), np.array([0.0, 0.0, -0.8]))
    assert choose(seen, drawn(softmax(skewed(seen)), rng), groups, noise) == "vector"
    of_style, votes, styles = styled(rows, 8)
    assert choose(of_style, votes, groups, styles) == "style"


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> MadeUpRun:
    return made_up_run(tmp_path_factory.mktemp("run"), holdout=0.4)


def seen_by(run: MadeUpRun, model: str) -> tuple[np.ndarray, Votes, np.ndarray]:
    """What a deployed model says of the held-out battles (mean logits), their votes and prompts."""
    path = run.folder / "logits" / "small" / f"{model}_held_out.npy"
    logits, ids = read_logits(path)
    rows = locate(key(ids), key(run.folds), "folds")
    seen = logits.reshape(len(ids), -1, 3).mean(axis=1, dtype=np.float64)
    return seen, votes_of(run.folds)[rows], run.folds["group"].to_numpy()[rows]


def test_the_deployed_model_is_calibrated_on_held_out_battles(run: MadeUpRun) -> None:
    seen, votes, groups = seen_by(run, "merged")
    written = json.loads(run.calibrate("merged", calibration="temperature").read_text())
    assert (written["judge"], written["model"], written["rows"]) == ("small", "merged", len(seen))
    assert written["provenance"]["phase"] == "calibration"
    temperature = written["methods"]["temperature"]
    fitted = fit("temperature", seen, votes)
    assert temperature["parameters"]["temperature"] == pytest.approx(
        fitted.parameters["temperature"], rel=1e-6
    )
    assert fitted.parameters["temperature"] > 1.3, "the model is too sure"
    parts = parts_of(groups)
    crossed = losses(softmax(cross_fit("temperature", seen, votes, parts)), votes)
    assert temperature["log_loss"] == pytest.approx(crossed.mean(), abs=1e-9)
    deployed = written["deployed"]
    assert deployed["log_loss"]["value"] == pytest.approx(crossed.mean(), abs=1e-9)
    assert deployed["log_loss"]["low"] < crossed.mean() < deployed["log_loss"]["high"]
    assert written["raw"]["log_loss"] == pytest.approx(losses(softmax(seen), votes).mean())
    assert temperature["log_loss"] < written["raw"]["log_loss"]
    name, found = read_calibration(run.folder / "calibration" / "merged.json")
    assert name == "temperature"
    assert found is not None
    np.testing.assert_allclose(found(seen), fitted(seen), rtol=1e-5, atol=1e-7)


def test_few_held_out_battles_score_the_model_as_it_is(run: MadeUpRun) -> None:
    assert len(seen_by(run, "gptq")[0]) < FEWEST
    path = run.calibrate()
    written = json.loads(path.read_text())
    assert written["method"] == "none"
    assert written["deployed"]["log_loss"]["value"] == pytest.approx(written["raw"]["log_loss"])
    assert read_calibration(path) == ("none", None)


def test_probabilities_are_calibrated_as_they_were_averaged(run: MadeUpRun) -> None:
    path = run.calibrate(calibration="temperature", average="probabilities")
    logits, ids = read_logits(run.folder / "logits" / "small" / "gptq_held_out.npy")
    votes = votes_of(run.folds)[locate(key(ids), key(run.folds), "folds")]
    mean = softmax(logits.reshape(len(ids), -1, 3)).mean(axis=1)
    fitted = fit("temperature", np.log(mean), votes)
    _, found = read_calibration(path)
    assert found is not None
    np.testing.assert_allclose(found.scale, fitted.scale, rtol=1e-6)


def test_the_headline_is_the_score_of_the_deployed_model(run: MadeUpRun) -> None:
    files = [run.calibrate(model) for model in ("merged", "gptq")]
    deployed = json.loads(files[1].read_text())["deployed"]
    metrics = json.loads(run.evaluate(test=False, calibrations=files).read_text())
    headline = metrics["headline"]
    assert (headline["battles"], headline["model"]) == ("held_out", "gptq")
    assert {name: headline[name] for name in deployed} == deployed
    assert headline["log_loss"]["value"] != metrics["judges"]["small"]["oof"]["log_loss"]
    assert headline["baselines"]["class_prior"] > 0
    tested = json.loads(run.evaluate(calibrations=files).read_text())
    variant = tested["test"]["models"]["gptq"]["256+512/AB+BA"]
    assert tested["headline"]["battles"] == "test"
    assert tested["headline"]["log_loss"]["value"] == variant["log_loss"]
    assert tested["held_out"]["models"]["gptq"]["deployed"] == deployed
    assert json.loads(run.evaluate(test=False).read_text())["headline"] is None


def test_scores_of_other_held_out_battles_are_refused(run: MadeUpRun, tmp_path: Path) -> None:
    figures = json.loads(run.calibrate().read_text())
    (tmp_path / "gptq.json").write_text(json.dumps({**figures, "rows": 7}))
    with pytest.raises(InputError, match=r"gptq\.json: scores of 7 battles, but \d+ are held out"):
        run.evaluate(test=False, calibrations=[tmp_path / "gptq.json"])


def test_a_run_without_held_out_battles_has_nothing_to_fit_to(tmp_path: Path) -> None:
    other = made_up_run(tmp_path)
    with pytest.raises(InputError, match=r"no battle is held out; set folds\.holdout"):
        other.calibrate()


def with_method(path: Path, figures: Any) -> Path:
    path.write_text(json.dumps(figures))
    return path


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
    ],
)
def test_a_file_without_its_calibration_is_an_error(spoiled: Any, tmp_path: Path) -> None:
    path = with_method(tmp_path / "small.json", {"method": "vector", "methods": spoiled})
    with pytest.raises(InputError, match=r"small\.json: holds no calibration by vector"):
        read_calibration(path)


@pytest.mark.parametrize("spoiled", [{}, []])
def test_a_file_without_a_method_is_an_error(spoiled: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"small\.json: holds no calibration"):
        read_calibration(with_method(tmp_path / "small.json", spoiled))


@pytest.mark.parametrize("style", [{}, {"lead": [1.0]}, {"lead": [1.0], "tie": [1.0, 2.0]}])
def test_a_calibration_by_style_needs_its_weights(style: Any, tmp_path: Path) -> None:
    spoiled = {"style": {"parameters": {"scale": [1, 1, 1], "bias": [0, 0, 0], **style}}}
    path = with_method(tmp_path / "small.json", {"method": "style", "methods": spoiled})
    with pytest.raises(InputError, match=r"small\.json: holds no calibration by style"):
        read_calibration(path)


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
    method: CalibrationMethod, average: Any, run: MadeUpRun, tmp_path: Path
) -> None:
    calibration = run.calibrate("merged", calibration=method)
    logits = np.random.default_rng(6).normal(size=(8, 2, 2, 3)).astype(np.float32)
    raw, _ = predict(tmp_path / "raw", logits, average=average)
    frame, _ = predict(
        tmp_path / "calibrated", logits, average=average, calibration=method, file=calibration
    )
    assert len(frame) == 2 * len(raw)
    plain = frame[~frame["variant"].str.endswith(method)].reset_index(drop=True)
    np.testing.assert_array_equal(plain[list(WINNERS)], raw[list(WINNERS)])
    assert set(frame.loc[frame["submitted"], "variant"]) == {f"40+64/AB+BA/{method}"}
    _, known = read_calibration(calibration)
    assert known is not None
    styles = style_features(battles_table(asked(8).to_pylist()))
    assert bool(len(known.lead)) == (method == "style")

    def mended(probabilities: np.ndarray) -> np.ndarray:
        assert known is not None
        return softmax(known(np.log(probabilities), styles))

    views = logits.astype(np.float64).reshape(8, 4, 3)
    averaged = softmax(views.mean(axis=1)) if average == "logits" else softmax(views).mean(axis=1)
    found = frame.loc[frame["submitted"], list(WINNERS)]
    np.testing.assert_allclose(found, mended(averaged), rtol=1e-12)
    one = frame.loc[frame["variant"] == f"64/BA/{method}", list(WINNERS)]
    np.testing.assert_allclose(one, mended(softmax(logits[:, 1, 1])), rtol=1e-12)


def test_without_calibration_a_file_changes_nothing(run: MadeUpRun, tmp_path: Path) -> None:
    calibration = run.calibrate("merged", calibration="temperature")
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
def test_held_out_battles_are_scored_and_calibrate_where_there_are_some(tmp_path: Path) -> None:
    checkout: Checkout = make_checkout(tmp_path / "checkout")
    plain = checkout.would_run()
    assert "fit_calibration" not in plain
    checkout.edit("mini.yaml", "seed: 42", "seed: 42\n  holdout: 0.2")
    scored = {"score_held_out_merged": 1, "score_held_out_gptq": 1, "fit_calibration": 2}
    assert checkout.would_run() == {**plain, **scored}
    checkout.edit("mini.yaml", "average: logits", "average: logits\n  calibration: auto")
    assert checkout.would_run() == {**plain, **scored}
