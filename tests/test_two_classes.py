"""`classes: 2`: no ties from the data to the submission, by hand and end to end."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from checkouts import GPTQ, make_checkout
from conftest import battles_table
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from made_up_run import made_up_run
from test_comparison import settings_of
from test_config import changed, judged, lines, raw

from arena_distill.battles.formats.votes import A, B
from arena_distill.battles.reading import read_battles, write_battles
from arena_distill.battles.simulation import simulate
from arena_distill.battles.solution import write_test_votes
from arena_distill.battles.votes import Solution, classes_of, votes_of
from arena_distill.config.backbone import TINY
from arena_distill.config.checks import findings
from arena_distill.config.external import EndpointLimits
from arena_distill.config.head import Head
from arena_distill.config.phases.battles import BattlesSettings, SolutionSettings
from arena_distill.config.phases.scoring import ExternalSettings, QuerySettings
from arena_distill.config.run import load
from arena_distill.config.source import Source
from arena_distill.config.training import Loss
from arena_distill.errors import InputError
from arena_distill.evaluation.report import render_report
from arena_distill.evaluation.terminal import print_table
from arena_distill.files.artifacts import read_json, read_parquet, write_json, write_parquet
from arena_distill.files.keys import key, locate
from arena_distill.files.logits import read_logits
from arena_distill.metrics import (
    calibration_scores,
    class_reliability,
    position_bias,
    scores,
    softmax,
)
from arena_distill.models.heads import battle_logits, verdicts
from arena_distill.models.loading import load_classifier
from arena_distill.prediction.calibration import fit, methods
from arena_distill.prediction.held_out import read_calibration
from arena_distill.prediction.submission import write_submission
from arena_distill.scoring.external import query_endpoint
from arena_distill.scoring.external_files import read_external_logits
from arena_distill.studies.comparison import compare
from arena_distill.training.losses import battle_losses
from arena_distill.verdicts import Ties, Votes, exchange, logits_among, swap_classes

from chat_server import chat_server  # isort: skip

JOINT, POINTWISE = Head(kind="joint", classes=2), Head(kind="pointwise", classes=2)

numbers = st.floats(-8, 8)
shares = arrays(np.float64, (6, 3), elements=st.floats(0.01, 1)).map(
    lambda x: x / x.sum(axis=1, keepdims=True)
)


def pairs(rows: int) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.float64, (rows, 2), elements=numbers)


def exchanged(votes: Votes) -> Votes:
    return Votes(swap_classes(votes.probabilities), votes.weights)


# --- votes ----------------------------------------------------------------------------------------


def test_what_becomes_of_ties_by_hand() -> None:
    three = Votes(
        np.array([A, B, [0, 0, 1], [0.5, 0.25, 0.25], [0, 0, 0]]), np.array([1, 2, 3, 4, 5])
    )
    assert three.among("class") is three
    half = three.among("half")
    assert half.probabilities.tolist() == [[1, 0], [0, 1], [0.5, 0.5], [0.625, 0.375], [0, 0]]
    assert half.weights.tolist() == [1, 2, 3, 4, 5]
    assert half.halves.tolist() == [False, False, True, False, False]
    drop = three.among("drop")
    np.testing.assert_allclose(drop.probabilities, [[1, 0], [0, 1], [0, 0], [2 / 3, 1 / 3], [0, 0]])
    np.testing.assert_allclose(drop.weights, [1, 2, 3, 3, 5])  # 4 votes, of which one is a tie
    assert drop.known.tolist() == [True, True, False, True, False]


@given(p=shares, z=pairs(6))
def test_a_soft_vote_counts_as_the_hard_votes_it_stands_for(p: np.ndarray, z: np.ndarray) -> None:
    votes, log_p = Votes(p, np.ones(6)), np.log(softmax(z))
    drop, half = votes.among("drop"), votes.among("half")
    winners = -(p[:, :2] * log_p).sum(axis=1)
    np.testing.assert_allclose(drop.weights * drop.cross_entropy(log_p), winners)
    np.testing.assert_allclose(half.cross_entropy(log_p), winners - p[:, 2] * log_p.mean(axis=1))
    for ties in ("drop", "half"):
        one, other = votes.among(ties), exchanged(votes).among(ties)
        np.testing.assert_allclose(exchanged(one).probabilities, other.probabilities)


@given(z=arrays(np.float64, (4, 2, 3), elements=numbers))
def test_without_its_third_logit_a_judge_says_who_wins_if_somebody_does(z: np.ndarray) -> None:
    p, two = softmax(z), softmax(logits_among(z, 2))
    np.testing.assert_allclose(two, p[..., :2] / p[..., :2].sum(axis=-1, keepdims=True))
    np.testing.assert_array_equal(exchange(logits_among(z, 2)), logits_among(exchange(z), 2))
    assert logits_among(z, 3) is not None and logits_among(z, 3).shape == z.shape


# --- reading --------------------------------------------------------------------------------------

TEXTS = {"prompt": "p", "response_a": "x", "response_b": "y"}


def voted(path: Path, *winners: str) -> Path:
    rows = [{"id": i, **TEXTS, "prompt": f"p{i}", "winner": w} for i, w in enumerate(winners)]
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def write(folder: Path, train: Path, ties: Ties, **settings: Any) -> Any:
    paths = [folder / name for name in ("battles.parquet", "rejected.parquet", "reading.json")]
    told = BattlesSettings(version=1, ties=ties, **settings)
    write_battles({"train": [train]}, *paths, told)
    return read_parquet(paths[0]), read_json(paths[2])["sources"]["train"]


def test_ties_are_refused_unless_the_configuration_says_what_they_are(tmp_path: Path) -> None:
    train = voted(tmp_path / "t.csv", *["model_a", "model_b"] * 30, "tie")
    with pytest.raises(InputError, match=r"every vote of kind tie is refused; .*data\.ties"):
        write(tmp_path, train, "refuse")


def test_dropped_ties_are_counted(tmp_path: Path) -> None:
    battles, counts = write(
        tmp_path, voted(tmp_path / "t.csv", "model_a", "tie", "model_b"), "drop"
    )
    assert battles["id"].to_pylist() == ["0", "2"]
    assert battles["vote"].to_pylist() == [[1, 0], [0, 1]]
    assert (counts["battles"], counts["dropped"], counts["refused"]) == (2, 1, 0)
    assert list(counts["reasons"]) == ["winner: dropped: a tie, as `data.ties` says"]


def test_a_halved_tie_is_kept_and_counted_as_read(tmp_path: Path) -> None:
    battles, counts = write(tmp_path, voted(tmp_path / "t.csv", "model_a", "tie"), "half")
    assert battles["vote"].to_pylist() == [[1, 0], [0.5, 0.5]]
    assert counts["votes"]["tie"] == {"kept": 1, "refused": 0}


def test_of_a_row_of_several_battles_only_the_tied_one_is_dropped(tmp_path: Path) -> None:
    answers = [{"answer": text, "rank": rank} for text, rank in (("x", 1), ("y", 2), ("z", 2))]
    alike = [{"answer": text, "rank": 1} for text in "uv"]
    rows = [
        {"id": "r", "prompt": "p", "answers": answers},
        {"id": "s", "prompt": "q", "answers": alike},
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    battles, counts = write(tmp_path, tmp_path / "t.jsonl", "drop")
    assert battles["id"].to_pylist() == ["r-1-2", "r-1-3"]
    assert counts["votes"]["tie"] == {"kept": 0, "refused": 2}
    assert counts["dropped"] == 1  # the row of nothing but ties
    assert votes_of(battles).weights.sum() == pytest.approx(2 * 2 / 3)


def test_rows_without_a_vote_are_kept_as_before(tmp_path: Path) -> None:
    path = voted(tmp_path / "t.csv", "model_a", "tie", "")
    source = Source(path=str(path), missing_votes="keep")
    battles, _ = read_battles({"train": [source]}, "drop")
    assert battles["source"].to_pylist() == ["train", "unlabelled"]
    assert battles["vote"].to_pylist() == [[1, 0], None]


@pytest.mark.parametrize(("ties", "kept"), [("drop", ["2", "0"]), ("half", ["2", "1", "0"])])
def test_a_tied_test_battle_is_scored_only_if_it_has_a_vote(
    ties: Ties, kept: list[str], tmp_path: Path
) -> None:
    test = [{"id": i, "source": "test", "label": None} for i in ("2", "1", "0")]
    write_parquet(battles_table(test), tmp_path / "b.parquet", {"phase": "battles"})
    solution = voted(tmp_path / "s.csv", "model_a", "tie", "model_b")
    told = SolutionSettings(version=1, ties=ties)
    write_test_votes(solution, tmp_path / "b.parquet", tmp_path / "v.parquet", told)
    solved = Solution.read(tmp_path / "v.parquet")
    assert solved.ids.to_pylist() == kept
    assert solved.votes.classes == 2
    with pytest.raises(InputError, match=r"row 2, column winner: a tie, or a share of one"):
        write_test_votes(
            solution, tmp_path / "b.parquet", tmp_path / "v.parquet",
            SolutionSettings(version=1, ties="refuse"),
        )  # fmt: skip


def test_the_simulated_arena_without_ties_is_that_of_a_winner() -> None:
    two, three = (simulate(rows=400, seed=3, voters="arena", classes=n) for n in (2, 3))
    assert two.frame["response_a"].equals(three.frame["response_a"])
    expected = three.probabilities[:, :2] / three.probabilities[:, :2].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(two.probabilities, expected)
    assert "winner_tie" not in two.frame
    assert two.frame["winner_model_a"].mean() == pytest.approx(expected[:, 0].mean(), abs=0.06)


# --- heads and losses -----------------------------------------------------------------------------


def test_outputs_of_a_head() -> None:
    assert JOINT.outputs == ("model_a", "model_b")
    assert POINTWISE.outputs == ("strength",)
    assert Head(kind="pointwise").outputs == ("strength", "tie")


@given(s=arrays(np.float32, (5, 2, 1), elements=st.floats(-20, 20, width=32)))
def test_two_strengths_are_bradley_and_terrys(s: np.ndarray) -> None:
    logits = battle_logits(torch.from_numpy(s), POINTWISE)
    odds = torch.sigmoid(torch.from_numpy(s[:, 0, 0] - s[:, 1, 0]))
    torch.testing.assert_close(logits.softmax(-1)[:, 0], odds, atol=1e-6, rtol=1e-5)
    both = verdicts(s, POINTWISE)
    np.testing.assert_array_equal(both[:, 0], both[:, 1])
    np.testing.assert_array_equal(verdicts(s[:, ::-1], POINTWISE), swap_classes(both))


LOSSES = [
    Loss(ce=1, kl=0, cosine=0),
    Loss(ce=1, kl=0, cosine=0, label_smoothing=0.2),
    Loss(ce=0.3, kl=0.7, cosine=0.4, temperature=2),
    Loss(ce=0.3, kl=0.7, combine="separate"),
    Loss(ce=1, kl=0.5, combine="mean_probabilities", focal=1.5),
]


def test_the_loss_by_hand() -> None:
    """Of two classes only the lead d counts: CE is log(1 + e^∓d), KL that of two Bernoullis."""
    d, t, temperature = np.array([0.7, -1.2]), np.array([2.0, 0.5]), 2.0
    logits, teacher = (torch.tensor(np.stack([x, 0 * x], axis=1)) for x in (d, t))
    vote = torch.tensor([[1, 0], [0.25, 0.75]])
    loss = Loss(ce=0.3, kl=0.7, cosine=0, temperature=temperature, label_smoothing=0.1)
    found = battle_losses(logits, vote, teacher[:, None], None, loss)
    share = 0.9 * vote[:, 0].numpy() + 0.05
    ce = share * np.log1p(np.exp(-d)) + (1 - share) * np.log1p(np.exp(d))
    p, q = (1 / (1 + np.exp(-x / temperature)) for x in (t, d))
    kl = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    np.testing.assert_allclose(found, 0.3 * ce + 0.7 * temperature**2 * kl, rtol=1e-5)


@pytest.mark.parametrize("loss", LOSSES, ids=range(len(LOSSES)))
@given(z=pairs(4), t=arrays(np.float64, (4, 3, 2), elements=numbers), p=shares)
def test_exchanging_the_answers_changes_no_loss(
    loss: Loss, z: np.ndarray, t: np.ndarray, p: np.ndarray
) -> None:
    votes = Votes(p[:4], np.ones(4)).among("half").probabilities
    one, other = (
        battle_losses(*(torch.tensor(f(x)) for x in (z, votes, t)), None, loss)
        for f in (lambda x: x, lambda x: np.ascontiguousarray(swap_classes(x)))
    )
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


# --- metrics and calibration ----------------------------------------------------------------------


@given(z=pairs(6), p=shares)
def test_exchanging_the_answers_changes_no_score(z: np.ndarray, p: np.ndarray) -> None:
    z[:, 0] += abs(z[:, 0] - z[:, 1]) < 1e-6  # the verdict of equal probabilities is A
    half = Votes(np.vstack([p[:5], [[0, 0, 1]]]), np.arange(1.0, 7)).among("half")
    for score in (scores, calibration_scores):
        one, other = score(softmax(z), half), score(softmax(swap_classes(z)), exchanged(half))
        assert one == pytest.approx(other, abs=1e-9)
    assert list(class_reliability(softmax(z), half)) == ["model_a", "model_b"]


def test_a_halved_tie_is_half_right_for_any_verdict() -> None:
    votes = Votes(np.array([[0.5, 0.5], [1, 0]]), np.array([3.0, 1]))
    for p, right in (([[0.9, 0.1], [0.6, 0.4]], 1), ([[0.1, 0.9], [0.4, 0.6]], 0)):
        assert scores(np.array(p), votes)["accuracy"] == pytest.approx((3 * 0.5 + right) / 4)


def test_a_judge_that_prefers_the_first_place_is_seen() -> None:
    logits = np.array([[[2.0, 0], [0, 2]]] * 3)  # canonical: A in order AB, B in order BA
    figures = position_bias(logits, Votes.hard(np.array([0, 1, 1]), 2))
    assert (figures["flip_rate"], figures["first_place_preference"]) == (1, 1)


def drawn(z: np.ndarray, rng: np.random.Generator) -> Votes:
    return Votes.hard((rng.random(len(z)) > softmax(z)[:, 0]).astype(int), 2)


def test_a_known_temperature_and_a_known_style_are_found() -> None:
    rng = np.random.default_rng(1)
    z, styles = rng.normal(0, 1.5, (60_000, 2)), rng.normal(0, 1, (60_000, 1))
    plain = fit("temperature", 3 * z, drawn(z, rng))
    assert plain.parameters["temperature"] == pytest.approx(3, rel=0.03)
    assert plain.parameters["bias"] == [0, 0]
    led = z + 0.4 * styles * np.array([1, -1])
    found = fit("style", 3 * z, drawn(led, rng), styles)
    np.testing.assert_allclose(found.lead, [0.8], rtol=0.05)
    np.testing.assert_allclose(softmax(found(3 * z, styles)), softmax(led), atol=0.02)
    assert len(found.tie) == 0


@given(seed=st.integers(0, 2**32 - 1))
def test_exchanging_the_answers_changes_no_calibration(seed: int) -> None:
    rng = np.random.default_rng(seed)
    z, styles = rng.normal(0, 2, (80, 2)), rng.normal(0, 1, (80, 3))
    votes = drawn(z, rng)
    for method in methods(2):
        one = fit(method, z, votes, styles)
        other = fit(method, swap_classes(z), exchanged(votes), -styles)
        np.testing.assert_allclose(one.scale, other.scale, rtol=1e-3)
        np.testing.assert_allclose(one.lead, other.lead, atol=1e-3)
        shown = one(swap_classes(z), -styles)
        np.testing.assert_allclose(shown, swap_classes(one(z, styles)), atol=1e-9)


# --- a run's figures ------------------------------------------------------------------------------


def test_figures_report_and_submission_of_two_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made_up_run(tmp_path, classes=2)
    metrics = read_json(run.evaluate())
    small = metrics["judges"]["small"]
    assert list(small["calibration"]) == ["temperature", "style"]
    assert list(small["class_reliability"]) == ["model_a", "model_b"]
    assert metrics["baselines"]["bayes"]["log_loss"] < np.log(2)
    render_report(tmp_path / "metrics.json", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    test = metrics["test"]
    best = test["models"]["gptq"][test["submitted"]["variant"]]["accuracy"]
    assert f"<dt>test accuracy, as deployed</dt><dd>{100 * best:.1f}" in page
    assert "Two equal probabilities score 0.6931" in page
    assert "vector" not in page
    print_table(metrics)
    assert f"({best:.1%})" in capsys.readouterr().out

    write_submission(tmp_path / "gptq.parquet", tmp_path / "battles.parquet", tmp_path / "s.csv")
    predicted = read_parquet(tmp_path / "gptq.parquet").to_pandas()
    assert "winner_tie" not in predicted
    chosen = predicted[predicted.submitted].set_index("id")
    with (tmp_path / "s.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "winner"]
    for row in rows:
        a, b = chosen.loc[row["id"], ["winner_model_a", "winner_model_b"]]
        assert row["winner"] == ("model_a" if a >= b else "model_b")
    solution = pd.read_csv(tmp_path / "solution.csv", dtype={"id": str}).set_index("id")
    right = [solution.loc[row["id"], f"winner_{row['winner']}"] for row in rows]
    assert np.mean(right) == pytest.approx(best)


def test_a_calibration_comes_back_from_its_file(tmp_path: Path) -> None:
    run = made_up_run(tmp_path, classes=2, holdout=0.3)
    for method in methods(2):
        output = run.calibrate(calibration=method)
        name, found = read_calibration(output)
        assert (name, found and found.parameters) == (
            method,
            read_json(output)["methods"][method]["parameters"],
        )
    write_json({**read_json(output), "method": "vector"}, output)
    with pytest.raises(InputError, match="holds no calibration by vector"):
        read_calibration(output)


def test_a_run_with_ties_can_be_compared_with_one_without(tmp_path: Path) -> None:
    two, three = (made_up_run(tmp_path / str(n), classes=n) for n in (2, 3))
    told = settings_of("small").model_copy(update={"runs": (str(three.folder),)})
    files = [two.folder / name for name in ("test_votes.parquet", "truth.parquet")]
    compare(two.folder, tmp_path / "c.json", settings=told, test_votes=files[0], truth=files[1])
    figures = read_json(tmp_path / "c.json")
    assert {"small, style", "style alone", "Bayes limit"} <= set(figures["test"]["judges"])
    (theirs,) = (part for part in figures["runs"] if part["judge"] == "big")
    assert theirs["run"] == str(three.folder)
    votes, losses = votes_of(two.folds), []
    for file in three.logits["big"]:
        logits, ids = read_logits(file)
        mine = ids["validation"].to_numpy()
        log_p = np.log(softmax(logits.mean(axis=1))[mine])
        given = log_p[:, :2] - np.logaddexp(*log_p[:, :2].T)[:, None]  # if there is a winner
        places = locate(key(ids.filter(ids["validation"])), key(two.folds), "folds")
        losses += votes[places].cross_entropy(given).tolist()
    assert theirs["judges"]["3: big"]["log_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    told = told.model_copy(update={"runs": (str(two.folder),)})
    with pytest.raises(InputError, match=r"compare\.runs: .* knows no ties"):
        compare(three.folder, tmp_path / "c.json", settings=told, test_votes=None, truth=None)


# --- external judges ------------------------------------------------------------------------------


@pytest.fixture
def battles(tmp_path: Path) -> Path:
    rows = [
        {"id": str(i), "prompt": f"question {i}", "vote": [i % 2, 1 - i % 2, 0]} for i in range(4)
    ]
    three = battles_table(rows)
    pd.DataFrame(
        {
            "id": three["id"],
            **TEXTS,
            "winner": ["model_a" if i % 2 else "model_b" for i in range(4)],
        }
    ).to_csv(tmp_path / "t.csv", index=False)
    write(tmp_path, tmp_path / "t.csv", "refuse")
    return tmp_path / "battles.parquet"


def external(battles: Path, columns: dict[str, Any]) -> np.ndarray:
    file, output = battles.parent / "judge.csv", battles.parent / "external/logits.npy"
    pd.DataFrame({"id": range(4), **columns}).to_csv(file, index=False)
    read_external_logits(file, battles, output, settings=ExternalSettings(version=1))
    return read_logits(output)[0]


@pytest.mark.parametrize("kind", ["logit", "p", "winner"])
def test_an_external_judge_of_three_classes_loses_its_tie(kind: str, battles: Path) -> None:
    z = np.random.default_rng(0).normal(0, 2, (4, 3))
    said, prefix = (z, "logit") if kind == "logit" else (softmax(z), kind)
    of_three = {
        f"{prefix}_{name}": said[:, i] for i, name in enumerate(("model_a", "model_b", "tie"))
    }
    found = external(battles, of_three)
    assert found.shape == (4, 2, 2)
    p = softmax(z)[:, :2]
    expected = p / p.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(found), np.repeat(expected[:, None], 2, axis=1), atol=1e-6)
    del of_three[f"{prefix}_tie"]
    if kind != "logit":  # they have to sum to 1
        of_three = {name: expected[:, i] for i, name in enumerate(of_three)}
    np.testing.assert_allclose(external(battles, of_three), found, atol=1e-6)


@pytest.mark.parametrize("verdicts", [("A", "B", "C"), ("A", "B")])
def test_an_endpoint_is_asked_for_two_or_three_verdicts(
    verdicts: tuple[str, ...], battles: Path
) -> None:
    with chat_server() as server:
        settings = QuerySettings(version=1, url=server.url, model="m", verdicts=verdicts)
        output = battles.parent / "asked/logits.npy"
        query_endpoint(
            battles, output, battles.parent / "cost.json", battles.parent / "answers",
            settings=settings, limits=EndpointLimits(),
        )  # fmt: skip
        content = server.bodies[0]["messages"][0]["content"]
    assert content.endswith(f"Verdict ({'A, B or C' if len(verdicts) == 3 else 'A or B'}):")
    assert ("tie" in content) == (len(verdicts) == 3)
    logits, _ = read_logits(output)
    assert logits.shape == (4, 2, 2)
    np.testing.assert_allclose(np.exp(logits).sum(axis=-1), 1, atol=1e-6)


# --- configuration --------------------------------------------------------------------------------

ENDPOINT = {"url": "http://h/v1", "model": "m"}


def test_without_ties_an_endpoint_is_asked_for_a_or_b_by_default() -> None:
    def query(classes: int, **endpoint: Any) -> Any:
        asked = judged(e={"external": {"endpoint": ENDPOINT | endpoint}}) | {"classes": classes}
        external: Any = load(asked).judges["e"].external
        return external.endpoint

    assert query(2).verdicts == ("A", "B") and "{tie}" not in query(2).instructions
    assert query(3).verdicts == ("A", "B", "C") and "{tie}" in query(3).instructions
    assert query(2, verdicts=["X", "Y", "Z"]).verdicts == ("X", "Y", "Z")
    own = "{a}, {b} or {tie}?"
    assert query(2, instructions=own).verdicts == ("A", "B", "C")
    assert query(2, instructions=own).instructions == own


@pytest.mark.parametrize(
    ("broken", "line"),
    [
        (raw(classes=4), "classes: Input should be 3 or 2, got 4"),
        (raw(data={**raw()["data"], "ties": "drop"}), "data.ties: drop, but ties are a class: set"),
        (
            raw(classes=2, data={"arena": {}, "ties": "half"}),
            "data.ties: half, but the simulated battles then have no ties, or leave it out",
        ),
        (
            raw(classes=2, prediction={"calibration": "vector"}, folds={"holdout": 0.1}),
            "prediction.calibration: vector scales ties apart",
        ),
        (
            judged(l={"head": {"kind": "pointwise", "ties": "davidson"}}) | {"classes": 2},
            "judges.l.head.ties: davidson is a model of ties, and with classes: 2 there are none",
        ),
        (
            judged(e={"external": {"endpoint": {**ENDPOINT, "verdicts": ["A", "B"]}}}),
            "judges.e.external.endpoint.verdicts: two, but with classes: 3 a verdict may be a tie",
        ),
        (
            judged(e={"external": {"endpoint": {**ENDPOINT, "verdicts": ["A", "a"]}}}),
            "judges.e.external.endpoint: verdicts: two different tokens expected",
        ),
        (
            judged(e={"external": {"endpoint": {
                **ENDPOINT, "verdicts": ["A", "B"], "instructions": "{a} {b} {tie}"}}}),
            "judges.e.external.endpoint: instructions: {tie} is no verdict",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(broken: dict[str, Any], line: str) -> None:
    (told,) = lines(broken)
    assert line in told


def test_two_classes_reach_what_they_change_and_no_more() -> None:
    heads = {(phase, judge) for phase in ("pretraining", "training", "logits", "merge", "soup",
             "quantization", "scoring", "judge") for judge in "lqs"}  # fmt: skip
    assert changed(classes=2) == heads | {("battles", ""), ("solution", "")}
    arena = raw(data={"arena": {}})
    assert changed(arena, classes=2) == heads | {(n, "") for n in ("battles", "solution", "arena")}
    for phase in (BattlesSettings, SolutionSettings):
        assert phase.of(load(raw())).as_params() == f'{{"version":{phase.of(load(raw())).version}}}'


def test_a_backbone_with_a_head_of_other_classes_is_found_at_once(tmp_path: Path) -> None:
    shutil.copytree(TINY / "llama", tmp_path / "judge")
    load_classifier(tmp_path / "judge", head_seed=0).save_pretrained(tmp_path / "judge")
    config = judged(l={"backbone": {"tiny": None, "path": str(tmp_path / "judge")}})
    config |= {"prediction": {"model": "merged"}, "defaults": {"quantization": None}}
    told = (
        f"config: judges.l.backbone: {tmp_path}/judge has a head of 3 outputs, with classes: 2 and head: "
        "joint this judge's has 2: take the model without a head"
    )
    for classes, expected in ((3, []), (2, [told])):
        found = findings(load(config | {"classes": classes}), lambda path: "csv" in path, str)
        assert [finding.line for finding in found] == expected


# --- the whole graph ------------------------------------------------------------------------------

WSDM = """
run: mini
classes: 2
data:
  train: {path: mine/train.parquet}
  test: mine/test.csv
  solution: mine/solution.csv
folds: {n: 2, holdout: 0.2}
defaults:
  encoding: {max_length: 128}
  lora: {r: 2, alpha: 4}
  precision: fp32
  pretraining: null
  targets: in_sample
  training: {lr: 2.0e-3, epochs: 0.5, batch_size: 8, warmup_steps: 1}
  quantization: {group_size: 32, samples: 16, validation_rows: 16, max_kl: 0.01}
  compute: {mem_mb: 2000, runtime: 15, micro_batch_size: 8}
judges:
  with-ties: {external: {file: mine/judge.csv}}
  pointwise: {backbone: {tiny: llama}, head: pointwise}
  student: {backbone: {tiny: qwen2}, teachers: [with-ties, pointwise], lora: null}
final: student
prediction: {max_lengths: [96, 128], model: gptq, calibration: style}
"""


@pytest.mark.slow
@pytest.mark.gptq
@pytest.mark.skipif(not GPTQ.exists(), reason=f"no quantisation environment at {GPTQ}")
def test_a_run_on_battles_of_wsdm(tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path / "checkout")
    _write_wsdm(checkout.folder / "mine")
    (checkout.folder / "mini.yaml").write_text(WSDM)
    checkout.run()
    assert "Nothing to be done" in checkout.run()
    results = checkout.results
    assert classes_of(pq.read_table(results / "battles.parquet")) == 2
    for name in ("with-ties/fold_0", "pointwise/fold_1", "student/fold_0", "student/gptq_test"):
        assert np.load(results / f"logits/{name}.npy").shape[-1] == 2
    assert json.loads((results / "gptq/student/config.json").read_text())["id2label"] == {
        "0": "model_a", "1": "model_b",
    }  # fmt: skip
    with (results / "submission.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "winner"]
    assert {row["winner"] for row in rows} <= {"model_a", "model_b"}
    solution = pd.read_csv(checkout.folder / "mine/solution.csv").set_index("id")["winner"]
    assert [int(row["id"]) for row in rows] == solution.index.tolist()
    metrics = json.loads((results / "metrics.json").read_text())
    (best,) = [v for n, v in metrics["final"]["variants"].items() if n == "96+128/AB+BA/style"]
    assert best["accuracy"] == pytest.approx(
        np.mean([row["winner"] == solution[int(row["id"])] for row in rows])
    )
    assert "test accuracy, as deployed" in (results / "report.html").read_text()
    merged = json.loads((results / "weights/student/merged/merge.json").read_text())
    assert (merged["average"], merged["folds"]) == ("weights", 2)
    assert "all of which were trained" in (results / "merged/student/README.md").read_text()


def _write_wsdm(folder: Path) -> None:
    """Battles as WSDM Cup 2025 has them: plain texts, a winner always; and a judge that knows ties."""
    folder.mkdir()
    battles = simulate(rows=80, seed=5, voters="arena", classes=2)
    frame = battles.frame
    texts = {name: frame[name].map("\n\n".join) for name in TEXTS}
    winner = np.where(frame.pop("winner_model_a") == 1, "model_a", "model_b")
    whole = pd.DataFrame({"id": frame["id"], **texts, "winner": winner})
    whole["language"] = "English"
    whole[["model_a", "model_b"]] = frame[["model_a", "model_b"]]
    whole[:64].to_parquet(folder / "train.parquet")
    whole.loc[64:, ["id", *TEXTS]].to_csv(folder / "test.csv", index=False)
    whole.loc[64:, ["id", "winner"]].to_csv(folder / "solution.csv", index=False)
    said = np.column_stack([battles.probabilities * 0.7, np.full(80, 0.3)])[:64]
    names = ("p_model_a", "p_model_b", "p_tie")
    pd.DataFrame(said, columns=names).assign(id=whole["id"][:64]).to_csv(
        folder / "judge.csv", index=False
    )
