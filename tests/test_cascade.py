"""The cascade: which battles continue to a longer length, what is stored for the others, and its gain."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import battles_table
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_run import LENGTHS, MadeUpRun, made_up_run
from test_encoding import tokens_of

from arena_distill.config.encoding import Encoding
from arena_distill.config.head import Head
from arena_distill.config.phases.encoding import TokensSettings
from arena_distill.config.phases.prediction import PredictionSettings, ScoringSettings
from arena_distill.config.prediction import Cascade, Swap
from arena_distill.config.run import load
from arena_distill.encoding.sequences import Sequences, read_tokens
from arena_distill.encoding.tokenization import tokenize_battles
from arena_distill.encoding.views import encode
from arena_distill.errors import InputError
from arena_distill.evaluation.cascade import THRESHOLDS, cascade_curve
from arena_distill.files.artifacts import provenance, read_parquet, read_provenance, write_parquet
from arena_distill.files.logits import ids_path, read_logits, write_logits
from arena_distill.metrics import softmax
from arena_distill.models.loading import load_classifier
from arena_distill.prediction.averages import averages
from arena_distill.prediction.test_time import (
    Passes,
    confidence,
    predict_test,
    score_test,
    score_variants,
)
from arena_distill.verdicts import Order, Votes

ORDERS: tuple[Order, ...] = ("AB", "BA")
HEADS = [Head(kind="joint"), Head(kind="pointwise")]
heads = st.sampled_from(HEADS)
max_lengths = st.permutations([40, 56, 90]).map(tuple)
TOKENS = tokens_of(
    [
        [[[20 + i] * (i % 5)], [[30 + i % 7, 31] * i], [[30 + i % 7, 31] * (i if i % 4 else 9)]]
        for i in range(24)
    ]
)


def scoring(
    head: Head, lengths: tuple[int, ...], threshold: float | None, swap: Swap = "always"
) -> ScoringSettings:
    return ScoringSettings(
        version=1,
        encoding=Encoding(),
        head=head,
        precision="fp32",
        max_lengths=lengths,
        orders=ORDERS,
        cascade=None if threshold is None else Cascade(threshold=threshold, swap=swap),
    )


class Judge:
    """Gives each sequence a score that depends on all its tokens, and counts the sequences it gets."""

    def __init__(self, head: Head) -> None:
        self.outputs = 3 if head.kind == "joint" else 2
        self.shown: list[Sequences] = []

    def __call__(self, sequences: Sequences) -> np.ndarray:
        self.shown.append(sequences)
        row = np.repeat(np.arange(len(sequences)), sequences.lengths)
        place = np.arange(len(row)) - sequences.offsets[:-1][row]
        said = np.empty((len(sequences), self.outputs))
        for i in range(self.outputs):
            angle = np.bincount(row, sequences.ids * np.cos(place * (i + 1)), len(sequences))
            said[:, i] = 2 * np.sin(angle)
        return said.astype(np.float32)


def score(
    head: Head, lengths: tuple[int, ...], threshold: float | None, swap: Swap = "always"
) -> tuple[np.ndarray, Passes, Judge]:
    judge = Judge(head)
    return *score_variants(TOKENS, scoring(head, lengths, threshold, swap), judge), judge


# --- who goes on ------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(heads, max_lengths, st.floats(0, 1))
def test_unsure_battles_go_on_and_sure_ones_repeat_the_shortest_length(
    head: Head, lengths: tuple[int, ...], threshold: float
) -> None:
    logits, costs, judge = score(head, lengths, threshold)
    every, needed, _ = score(head, lengths, None)
    short = int(np.argmin(lengths))
    sure = softmax(every[:, short].mean(axis=1, dtype=np.float64)).max(axis=1) >= threshold
    np.testing.assert_array_equal(logits[~sure], every[~sure])
    repeated = np.repeat(every[sure][:, [short]], len(lengths), axis=1)
    np.testing.assert_array_equal(logits[sure], repeated)
    np.testing.assert_array_equal(costs.tokens, needed.tokens)
    np.testing.assert_array_equal(costs.sequences, needed.sequences)
    longer = np.arange(len(lengths)) != short
    expected = needed.scored * ~(sure[:, None] & longer)
    np.testing.assert_array_equal(costs.scored, expected)
    for cost, shown in (
        (costs.sequences, sum(map(len, judge.shown))),
        (costs.tokens, sum(len(part.ids) for part in judge.shown)),
    ):
        assert (cost * costs.scored).sum() == shown


@settings(max_examples=40)
@given(heads, max_lengths, st.floats(0, 1))
def test_with_swap_unsure_a_sure_battle_is_read_in_one_order_alone(
    head: Head, lengths: tuple[int, ...], threshold: float
) -> None:
    logits, costs, judge = score(head, lengths, threshold, "unsure")
    if head.kind == "pointwise":  # both orders are the same two sequences
        np.testing.assert_array_equal(logits, score(head, lengths, threshold)[0])
        return
    every, needed, _ = score(head, lengths, None)
    short = int(np.argmin(lengths))
    first = every[:, short, :1]
    sure = softmax(first[:, 0]).max(axis=1) >= threshold
    np.testing.assert_array_equal(logits[~sure], every[~sure])
    np.testing.assert_array_equal(logits[sure], np.broadcast_to(first[:, None], every.shape)[sure])
    np.testing.assert_array_equal(costs.tokens, needed.tokens)
    assert (costs.scored[~sure] == needed.scored[~sure]).all()
    spent = sum(len(part.ids) for part in judge.shown)
    assert (costs.tokens * costs.scored).sum() == spent
    assert sum(map(len, judge.shown)) == (costs.sequences * costs.scored).sum()
    assert len(judge.shown[0]) == len(TOKENS)


@pytest.mark.parametrize("head", HEADS, ids=["joint", "pointwise"])
def test_the_ends_are_the_shortest_length_alone_and_no_cascade(head: Head) -> None:
    lengths = (40, 90)
    every, costs, _ = score(head, lengths, None)
    assert costs.scored[:, 1].any()
    assert not costs.scored[:, 1].all()
    all_on, _, judge = score(head, lengths, 1)
    np.testing.assert_array_equal(all_on, every)
    assert len(judge.shown) == 2
    none_on, _, judge = score(head, lengths, 0)
    np.testing.assert_array_equal(none_on, every[:, [0, 0]])
    assert sum(map(len, judge.shown)) == costs.sequences[:, 0].sum()


def test_costs_are_those_of_sequences_not_seen_before() -> None:
    _, costs, _ = score(HEADS[0], (40, 90), None)
    short, long = ([encode(TOKENS, Encoding(), o, n) for o in ORDERS] for n in (40, 90))
    for row in range(len(TOKENS)):
        seen: set[bytes] = set()
        for i, views in enumerate((short, long)):
            new = {view[row].tobytes() for view in views} - seen
            seen |= new
            assert costs.sequences[row, i] == len(new)
            assert costs.tokens[row, i] == sum(len(ids) // 4 for ids in new)
    assert 1 in costs.sequences, "a battle of two equal answers is shown once"


@settings(max_examples=30)
@given(heads, st.floats(0.34, 1), st.sampled_from(["logits", "probabilities"]))
def test_a_sure_battle_is_predicted_by_the_short_length_any_other_by_the_average(
    head: Head, threshold: float, average: Any
) -> None:
    lengths = (40, 90)
    logits, _, _ = score(head, lengths, threshold)
    every, _, _ = score(head, lengths, None)
    submitted = averages(logits, lengths, ORDERS, average)["40+90/AB+BA"]
    whole = averages(every, lengths, ORDERS, average)
    sure = confidence(every[:, 0]) >= threshold
    expected = np.where(sure[:, None], whole["40/AB+BA"], whole["40+90/AB+BA"])
    np.testing.assert_allclose(submitted, expected, rtol=1e-12)


def test_confidence_is_the_likeliest_verdicts_probability() -> None:
    logits = np.log(np.array([[[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]], [[0.7, 0.2, 0.1]] * 2]))
    np.testing.assert_allclose(confidence(logits), [0.5, 0.7])
    # Two orders that contradict each other are not sure together.
    contradictory = np.array([[[9.0, 0, 0], [0, 9.0, 0]]])
    assert confidence(contradictory)[0] < 0.5


# --- files ------------------------------------------------------------------------------------------


def test_costs_come_back_from_the_ids_they_are_written_to(tmp_path: Path) -> None:
    import pyarrow as pa

    logits, costs, _ = score(HEADS[0], (90, 40), 0.6)
    ids = pa.table({"id": TOKENS.ids, "source": TOKENS.sources, **costs.columns((90, 40))})
    write_logits(tmp_path / "x.npy", logits, ids, {})
    _, found = read_logits(tmp_path / "x.npy")
    back = Passes.read(found, (90, 40))
    assert back is not None
    for name, values in vars(costs).items():
        np.testing.assert_array_equal(getattr(back, name), values)
    assert back.scored.dtype == np.float32
    assert Passes.read(found.select(["id", "source"]), (90, 40)) is None


def test_scores_of_another_cascade_are_refused(tmp_path: Path) -> None:
    logits, costs, _ = score(HEADS[0], (40, 90), 0.6)
    path = tmp_path / "merged_test.npy"
    table = read_ids(costs)
    made = scoring(HEADS[0], (40, 90), 0.6).model_dump(mode="json")
    write_logits(path, logits, table, provenance("scoring", made))

    def predict(threshold: float | None) -> None:
        cascade = None if threshold is None else Cascade(threshold=threshold)
        asked = PredictionSettings(
            version=1, max_lengths=(40, 90), orders=ORDERS, average="logits",
            cascade=cascade,
        )  # fmt: skip
        predict_test(path, tmp_path / "test.parquet", model="merged", settings=asked)

    for other in (None, 0.5):
        with pytest.raises(
            InputError,
            match=r"prediction\.cascade \{'threshold': 0\.6, 'swap': 'always'\}, the conf",
        ):
            predict(other)
    predict(0.6)
    about = read_provenance(tmp_path / "test.parquet")
    assert about["settings"]["cascade"] == {"threshold": 0.6, "swap": "always"}
    write_logits(
        path, logits, table, provenance("scoring", {**made, "cascade": {"threshold": 0.6}})
    )
    predict(0.6)  # of a version without `swap`


def read_ids(costs: Passes) -> Any:
    import pyarrow as pa

    return pa.table({"id": TOKENS.ids, "source": ["test"] * len(TOKENS), **costs.columns((40, 90))})


@pytest.mark.parametrize("head", HEADS, ids=["joint", "pointwise"])
def test_a_models_file_says_who_was_scored_where(
    head: Head, backbones: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = [
        {
            "id": str(n),
            "source": "test",
            "prompt": "why",
            "response_a": "so " * n,
            "response_b": "no",
        }
        for n in (2, 30, 60, 90)
    ]
    write_parquet(battles_table(rows), tmp_path / "battles.parquet", {})
    tokens = tmp_path / "tokens.parquet"
    tokenize_battles(
        tmp_path / "battles.parquet", backbones("llama"), tokens, settings=TokensSettings(version=1)
    )
    model = tmp_path / "model"
    base = load_classifier(
        backbones("llama"), head=head, pad_token_id=read_tokens(tokens).vocabulary.pad, head_seed=0
    )
    base.save_pretrained(model)

    def scored(threshold: float | None) -> tuple[np.ndarray, pd.DataFrame]:
        path = tmp_path / "merged_test.npy"
        settings = scoring(head, (96, 256), threshold)
        score_test(model, tokens, path, quantized=False, settings=settings, batch_tokens=900)
        logits, ids = read_logits(path)
        return logits, ids.to_pandas()

    every, needed = scored(None)
    sure = np.sort(confidence(every[:, 0]))
    logits, ids = scored(float(sure[2]))  # two of the four are less sure than that
    goes_on = confidence(every[:, 0]) < sure[2]
    longer = needed["tokens_256"].to_numpy() > 0
    assert longer.tolist() == [False, False, True, True]
    assert ids["scored_96"].all()
    assert ids["scored_256"].tolist() == (goes_on & longer).tolist()
    assert ids["tokens_256"].tolist() == needed["tokens_256"].tolist()
    np.testing.assert_allclose(logits[goes_on], every[goes_on], atol=1e-5)
    np.testing.assert_array_equal(logits[~goes_on, 1], logits[~goes_on, 0])


# --- what it is worth -------------------------------------------------------------------------------


def curve(
    logits: np.ndarray,
    costs: Passes,
    threshold: float | None = None,
    votes: np.ndarray | None = None,
    swap: Swap = "always",
) -> list[dict[str, Any]]:
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 3, len(logits)) if votes is None else votes

    def predict(scores: np.ndarray) -> np.ndarray:
        return averages(scores, (40, 90), ORDERS, "logits")["40+90/AB+BA"]

    groups = np.arange(len(logits))
    return cascade_curve(
        logits, (40, 90), predict, costs, Votes.hard(labels), groups, threshold, swap=swap
    )


def test_the_curve_by_hand() -> None:
    """Three battles: sure, unsure with more to read, unsure with nothing more to read."""
    p = np.array([[0.8, 0.1, 0.1], [0.5, 0.3, 0.2], [0.4, 0.3, 0.3]])
    longer = np.array([[0.9, 0.05, 0.05], [0.2, 0.2, 0.6], [0.4, 0.3, 0.3]])
    logits = np.log(np.stack([p, longer], axis=1))[:, :, None].repeat(2, axis=2)
    tokens = np.array([[80, 180], [80, 120], [60, 0]])
    costs = Passes(np.array([[2, 2], [2, 2], [2, 0]]), tokens, tokens > 0)
    votes = np.array([0, 2, 1])
    points = curve(logits, costs, votes=votes)
    assert [point["threshold"] for point in points] == [0.0, 0.51, 0.81]
    assert [point["battles"] for point in points] == pytest.approx([0, 1 / 3, 2 / 3])
    assert [point["sequences"] for point in points] == [0, 0.5, 1]
    assert [point["tokens"] for point in points] == pytest.approx([0, 120 / 300, 1])
    assert [point["all_tokens"] for point in points] == pytest.approx([220 / 520, 340 / 520, 1])
    both = np.sqrt(p * longer)
    both /= both.sum(axis=1, keepdims=True)
    expected = -np.log([p[0, 0], both[1, 2], p[2, 1]]).mean()
    assert points[1]["log_loss"] == pytest.approx(expected)
    everything = -np.log([both[0, 0], both[1, 2], p[2, 1]]).mean()
    assert points[2]["log_loss"] == pytest.approx(everything)
    assert points[1]["versus_all"]["difference"] == pytest.approx(expected - everything)
    assert points[2]["versus_all"] == {"difference": 0, "low": 0, "high": 0}


@pytest.mark.parametrize(
    ("head", "swap"), [(HEADS[0], "always"), (HEADS[1], "always"), (HEADS[0], "unsure")]
)
def test_the_curve_predicts_a_cascade(head: Head, swap: Swap) -> None:
    every, costs, _ = score(head, (40, 90), None)
    points = curve(every, costs, swap=swap)
    for name in ("threshold", "battles", "sequences", "tokens", "all_tokens"):
        values = [point[name] for point in points]
        assert values == sorted(values)
        assert len(set(values)) == len(values) > 2
    for point in points:
        logits, spent, judge = score(head, (40, 90), point["threshold"], swap)
        scored = sum(len(part.ids) for part in judge.shown)
        assert scored / costs.tokens.sum() == pytest.approx(point["all_tokens"])
        (alone,) = curve(logits, spent, point["threshold"], swap=swap)
        assert alone.pop("versus_all") is None
        assert alone == pytest.approx({k: v for k, v in point.items() if k != "versus_all"})
    assert {p["threshold"] for p in points} <= set(THRESHOLDS)


def test_where_no_battle_is_longer_there_is_no_curve() -> None:
    logits, costs, _ = score(HEADS[0], (400, 900), None)
    predict = lambda scores: softmax(scores.mean(axis=(1, 2)))  # noqa: E731
    zeros = np.zeros(len(logits), np.int64)
    assert cascade_curve(logits, (400, 900), predict, costs, zeros, zeros) == []


@pytest.fixture
def run(tmp_path: Path) -> MadeUpRun:
    return made_up_run(tmp_path)


def test_a_runs_curve_ends_at_what_is_submitted(run: MadeUpRun) -> None:
    metrics = json.loads(run.evaluate().read_text())
    points = metrics["test"]["cascade"]
    variants = metrics["final"]["variants"]
    assert points[0]["log_loss"] == pytest.approx(variants["256/AB+BA"]["log_loss"])
    assert points[-1]["log_loss"] == pytest.approx(variants["256+512/AB+BA"]["log_loss"])
    assert points[-1]["all_tokens"] == 1
    table = pd.read_csv(run.folder / "tables" / "cascade.csv")
    assert table["log_loss"].tolist() == [point["log_loss"] for point in points]
    assert table["low"].tolist() == [point["versus_all"]["low"] for point in points]


def test_the_order_of_rows_in_the_file_changes_nothing(run: MadeUpRun) -> None:
    import pyarrow as pa

    before = json.loads(run.evaluate().read_text())["test"]["cascade"]
    path = run.folder / "logits" / "small" / "gptq_test.npy"
    logits, ids = read_logits(path)
    order = np.random.default_rng(1).permutation(len(ids))
    write_logits(path, logits[order], ids.take(pa.array(order)), read_provenance(ids_path(path)))
    after = json.loads(run.evaluate().read_text())["test"]["cascade"]
    assert [point["tokens"] for point in after] == pytest.approx([p["tokens"] for p in before])
    assert [p["log_loss"] for p in after] == pytest.approx([p["log_loss"] for p in before])


def test_scores_without_costs_give_no_curve(run: MadeUpRun) -> None:
    """Files as scoring wrote them before cascades existed."""
    path = run.folder / "logits" / "small" / "gptq_test.npy"
    logits, ids = read_logits(path)
    about = read_provenance(ids_path(path))
    write_logits(path, logits, ids.select(["id", "source"]), about)
    assert json.loads(run.evaluate().read_text())["test"]["cascade"] is None
    assert (run.folder / "tables" / "cascade.csv").read_text().startswith("swap,threshold,battles")
    assert read_parquet(ids_path(path)).column_names == ["id", "source"]


def test_the_report_of_a_run_with_a_cascade_says_so(run: MadeUpRun) -> None:
    from arena_distill.evaluation.report import render_report

    path = run.folder / "logits" / "small" / "gptq_test.npy"
    logits, ids = read_logits(path)
    about = read_provenance(ids_path(path))
    output = run.folder / "report.html"
    about["settings"]["head"] = {"kind": "joint"}
    write_logits(path, logits, ids, about)
    render_report(run.evaluate(), output)
    assert "A cascade scores a battle" in output.read_text()
    points = json.loads((run.folder / "metrics.json").read_text())["test"]["cascade"]
    assert {point["swap"] for point in points} == {"always", "unsure"}
    assert "swap: unsure" in (run.folder / "report" / "cascade.svg").read_text()
    about["settings"]["cascade"] = {"threshold": 0.7}
    sure = confidence(logits[:, 0]) >= 0.7
    logits[sure] = logits[sure][:, [0, 0]]
    write_logits(path, logits, ids, about)
    render_report(run.evaluate(), output)
    page = output.read_text()
    assert "A cascade was used" in page
    (point,) = json.loads((run.folder / "metrics.json").read_text())["test"]["cascade"]
    assert f"{100 * point['battles']:.1f}\u202f%" in page
    assert Passes.read(ids, LENGTHS) is not None


# --- the configuration ------------------------------------------------------------------------------


def config(**prediction: Any) -> Any:
    return load(
        {
            "data": {"train": ["a.csv"], "test": ["b.csv"]},
            "judges": {"small": {"backbone": {"tiny": "llama"}, "quantization": None}},
            "final": "small",
            "prediction": {"model": "merged", **prediction},
        }
    )


def test_settings_name_a_cascade_only_if_there_is_one() -> None:
    """Otherwise the new key would rebuild finished runs."""
    for phase in (ScoringSettings, PredictionSettings):
        assert "cascade" not in phase.of(config(), "small").as_params()
        told = phase.of(config(cascade={"threshold": 0.6}), "small")
        assert told.cascade == Cascade(threshold=0.6)
        assert phase.model_validate_json(told.as_params()) == told


@pytest.mark.parametrize(
    ("prediction", "message"),
    [
        ({"max_lengths": [256], "cascade": {"threshold": 0.6}}, "give several"),
        (
            {
                "max_lengths": [256],
                "orders": ["AB"],
                "cascade": {"threshold": 0.6, "swap": "unsure"},
            },
            "two orders",
        ),
        ({"cascade": {"threshold": 1.5}}, r"prediction\.cascade\.threshold: .* 1\.5"),
        ({"cascade": {"treshold": 0.5}}, "did you mean 'threshold'"),
    ],
)
def test_an_invalid_cascade_is_an_error(prediction: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config(**prediction)
