"""Test-time augmentation and the submission: each variant is the average in its name, in every frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from conftest import battles_table
from hypothesis import given
from hypothesis import strategies as st
from made_up_run import SIZES, MadeUpRun, made_up_run

from arena_distill.config.encoding import Encoding
from arena_distill.config.phases.encoding import TokensSettings
from arena_distill.config.phases.prediction import PredictionSettings, ScoringSettings
from arena_distill.encoding.sequences import Sequences, Tokens, read_tokens
from arena_distill.encoding.tokenization import tokenize_battles
from arena_distill.encoding.views import encode
from arena_distill.errors import InputError
from arena_distill.files.artifacts import provenance, read_parquet, read_provenance, write_parquet
from arena_distill.files.keys import key
from arena_distill.files.logits import ids_path, read_logits, write_logits
from arena_distill.metrics import softmax
from arena_distill.models.loading import load_classifier
from arena_distill.prediction import test_time
from arena_distill.prediction.averages import averages
from arena_distill.prediction.submission import write_submission
from arena_distill.prediction.test_time import (
    identical,
    predict_test,
    score_test,
    score_variants,
    submitted_variant,
)
from arena_distill.verdicts import WINNERS, Order, swap_classes

ORDERS: tuple[Order, ...] = ("AB", "BA")
LENGTHS = (40, 64)
seeds = st.integers(0, 2**32 - 1)


def prediction_settings(**changes: Any) -> PredictionSettings:
    values = {"max_lengths": LENGTHS, "orders": ORDERS, "average": "logits"}
    return PredictionSettings(version=1, **(values | changes))


def scoring_settings(**changes: Any) -> ScoringSettings:
    values = {"max_lengths": LENGTHS, "orders": ORDERS, "precision": "fp32", "encoding": Encoding()}
    return ScoringSettings(version=1, **(values | changes))


# --- averages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_every_variant_is_the_average_that_its_name_says(
    average: Literal["logits", "probabilities"],
) -> None:
    logits = np.random.default_rng(0).normal(size=(7, 2, 2, 3))
    variants = averages(logits, (256, 512), ORDERS, average)
    for name, probabilities in variants.items():
        lengths, orders = (part.split("+") for part in name.split("/"))
        views = [
            logits[:, ["256", "512"].index(n), ORDERS.index(o)] for n in lengths for o in orders
        ]
        if average == "logits":
            expected = softmax(np.mean(views, axis=0))
        else:
            expected = np.mean([softmax(view) for view in views], axis=0)
        np.testing.assert_allclose(probabilities, expected, rtol=1e-12)
    assert len(variants) == 9
    assert list(averages(logits[:, :1, :1], (256,), ("AB",), average)) == ["256/AB"]


@given(seeds, st.sampled_from(["logits", "probabilities"]))
def test_probabilities_sum_to_one(seed: int, average: Literal["logits", "probabilities"]) -> None:
    logits = np.random.default_rng(seed).normal(0, 30, (5, 2, 2, 3)).astype(np.float32)
    for probabilities in averages(logits, LENGTHS, ORDERS, average).values():
        assert probabilities.dtype == np.float64
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-12)


@given(seeds)
def test_swapping_commutes_with_softmax_and_is_its_own_inverse(seed: int) -> None:
    logits = np.random.default_rng(seed).normal(size=(4, 3))
    np.testing.assert_array_equal(swap_classes(swap_classes(softmax(logits))), softmax(logits))
    np.testing.assert_allclose(softmax(swap_classes(logits)), swap_classes(softmax(logits)))


def test_softmax_is_not_taken_in_the_precision_of_the_logits() -> None:
    # In bfloat16 the two logits, and any probabilities this close, would be the same.
    logits = np.array([[5.0, 5.001, 0.0], [500.0, 0.0, -500.0]], np.float32)
    probabilities = softmax(logits)
    exact = np.exp(logits[0].astype(np.float64)) / np.exp(logits[0].astype(np.float64)).sum()
    np.testing.assert_allclose(probabilities[0], exact, rtol=1e-14)
    assert probabilities[0, 0] < probabilities[0, 1]
    assert np.isfinite(probabilities).all()


# --- a made-up run's files ------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> MadeUpRun:
    return made_up_run(tmp_path)


@pytest.mark.parametrize("model", ["merged", "gptq"])
def test_predictions_hold_every_variant_of_every_battle(run: MadeUpRun, model: str) -> None:
    frame = read_parquet(run.folder / f"{model}.parquet").to_pandas()
    assert len(frame) == 9 * SIZES["test"]
    assert set(frame["model"]) == {model}
    assert frame.groupby("variant").size().eq(SIZES["test"]).all()
    submitted = frame[frame["submitted"]]
    assert set(submitted["variant"]) == {"256+512/AB+BA"}
    assert len(submitted) == SIZES["test"]
    logits, ids = read_logits(run.folder / "logits" / "small" / f"{model}_test.npy")
    expected = pd.DataFrame(softmax(logits[:, 1, 0]), ids["id"].to_pylist())
    found = frame[frame["variant"] == "512/AB"].set_index("id")
    np.testing.assert_allclose(found[list(WINNERS)], expected.loc[found.index], rtol=1e-12)


def write_test_logits(path: Path, logits: np.ndarray, **settings: Any) -> Path:
    ids = pa.table({"id": [f"b{i}" for i in range(len(logits))], "source": ["test"] * len(logits)})
    about = {"max_lengths": LENGTHS, "orders": ORDERS} | settings
    write_logits(path, logits.astype(np.float32), ids, provenance("scoring", about))
    return path


def average_test(path: Path, folder: Path, settings: PredictionSettings) -> None:
    predict_test(path, folder / "test.parquet", model="merged", settings=settings)


def test_a_file_made_with_other_lengths_or_orders_is_refused(tmp_path: Path) -> None:
    path = write_test_logits(
        tmp_path / "merged_test.npy", np.zeros((3, 2, 2, 3)), orders=["BA", "AB"]
    )
    with pytest.raises(InputError, match=r"prediction\.orders \['BA', 'AB'\]"):
        average_test(path, tmp_path, prediction_settings())


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_the_submitted_variant_is_all_lengths_and_all_orders(tmp_path: Path, average: str) -> None:
    logits = np.random.default_rng(3).normal(size=(6, 2, 2, 3))
    path = write_test_logits(tmp_path / "merged_test.npy", logits)
    settings = prediction_settings(average=average)
    average_test(path, tmp_path, settings)
    frame = read_parquet(tmp_path / "test.parquet").to_pandas()
    assert set(frame.loc[frame["submitted"], "variant"]) == {submitted_variant(settings)}
    views = logits.astype(np.float32).astype(np.float64).reshape(6, 4, 3)
    expected = softmax(views.mean(axis=1)) if average == "logits" else softmax(views).mean(axis=1)
    np.testing.assert_allclose(frame.loc[frame["submitted"], list(WINNERS)], expected, rtol=1e-12)


# --- submission -----------------------------------------------------------------------------------


def submit(run: MadeUpRun) -> Path:
    output = run.folder / "submission.csv"
    write_submission(run.folder / "gptq.parquet", run.folder / "battles.parquet", output)
    return output


def test_the_submission_is_the_submitted_variant_in_the_battles_order(run: MadeUpRun) -> None:
    frame = pd.read_csv(submit(run), dtype={"id": str})
    assert list(frame) == ["id", "winner_model_a", "winner_model_b", "winner_tie"]
    battles = run.battles.to_pandas()
    assert frame["id"].tolist() == battles.loc[battles["source"] == "test", "id"].tolist()
    predictions = read_parquet(run.folder / "gptq.parquet").to_pandas()
    expected = predictions[predictions["submitted"]].set_index("id").loc[frame["id"]]
    np.testing.assert_array_equal(frame[list(WINNERS)], expected[list(WINNERS)])
    np.testing.assert_allclose(frame[list(WINNERS)].sum(axis=1), 1, atol=1e-6)


def test_ids_that_look_like_numbers_or_hold_commas_survive(tmp_path: Path) -> None:
    ids = ["007", "1e5", 'a,"b"', "NA"]
    battles = battles_table([{"id": i, "source": "test", "label": None} for i in ids])
    third = [1 / 3] * 4
    predictions = pa.table(
        {"id": ids[::-1], **dict.fromkeys(WINNERS, third), "submitted": [True] * 4}
    )
    write_parquet(battles, tmp_path / "battles.parquet", {})
    write_parquet(predictions, tmp_path / "test.parquet", {})
    output = tmp_path / "submission.csv"
    write_submission(tmp_path / "test.parquet", tmp_path / "battles.parquet", output)
    assert pd.read_csv(output, dtype=str, keep_default_na=False)["id"].tolist() == ids


def spoil(run: MadeUpRun, name: str) -> None:
    """Damage the submitted predictions of a run in one way."""
    path = run.folder / "gptq.parquet"
    frame = read_parquet(path).to_pandas()
    frame = frame[frame["submitted"]].reset_index(drop=True)
    if name == "missing":
        frame = frame.iloc[1:]
    elif name == "twice":
        frame = pd.concat([frame, frame.iloc[:1]])
    elif name == "foreign":
        frame = pd.concat([frame, frame.iloc[:1].assign(id="nobody")])
    else:
        column = "winner_tie" if name == "sum" else "winner_model_a"
        frame.loc[3, column] = {"nan": np.nan, "negative": -0.1, "sum": 0.999}[name]
    write_parquet(pa.Table.from_pandas(frame, preserve_index=False), path, {})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "1 of 40 rows are missing"),
        ("twice", "is there more than once"),
        ("foreign", "1 predictions belong to no test battle, for example that of nobody"),
        ("nan", "1 test battles are not finite; id"),
        ("negative", "1 test battles are negative; id"),
        ("sum", "1 test battles do not sum to 1; id"),
    ],
)
def test_a_submission_that_cannot_be_right_is_refused(
    run: MadeUpRun, name: str, message: str
) -> None:
    spoil(run, name)
    with pytest.raises(InputError, match=message) as error:
        submit(run)
    assert "gptq.parquet" in str(error.value)
    assert not (run.folder / "submission.csv").exists()


# --- forward passes -------------------------------------------------------------------------------


@pytest.fixture
def tokens(backbone: Path, tmp_path: Path) -> Path:
    """Four test battles, and a training battle with the id of one of them."""
    answers: list[dict[str, Any]] = [
        {"prompt": "hi", "response_a": "yes", "response_b": "no, no"},  # short
        {"prompt": "why " * 30, "response_a": "as " * 90, "response_b": "well " * 60},  # long
        {"prompt": "so " * 40, "response_a": "same " * 20, "response_b": "same " * 20},  # a tie
        {"prompt": ["a", "b"], "response_a": ["c", "d " * 90], "response_b": ["e", "f"]},
    ]
    rows = [{**row, "id": str(i), "source": "test"} for i, row in enumerate(answers)]
    table = battles_table([{"id": "0", "source": "train"}, *rows])
    write_parquet(table, tmp_path / "battles.parquet", {})
    tokenize_battles(
        tmp_path / "battles.parquet",
        backbone,
        tmp_path / "tokens.parquet",
        settings=TokensSettings(version=1),
    )
    return tmp_path / "tokens.parquet"


@pytest.fixture
def merged(backbone: Path, tmp_path: Path) -> Path:
    load_classifier(backbone, head_seed=0).save_pretrained(tmp_path / "merged")
    return tmp_path / "merged"


LONG = (96, 256)


def only_test(tokens: Path) -> Tokens:
    read = read_tokens(tokens)
    return read.take(np.arange(1, len(read)))


def test_scores_are_those_of_each_sequence_alone_in_the_canonical_frame(
    merged: Path, tokens: Path, tmp_path: Path
) -> None:
    import torch

    settings = scoring_settings(max_lengths=LONG)
    output = tmp_path / "merged_test.npy"
    score_test(merged, tokens, output, quantized=False, settings=settings, batch_tokens=700)
    logits, ids = read_logits(output)
    assert logits.shape == (4, 2, 2, 3)
    assert ids_path(output).exists()
    assert key(ids).to_pylist() == [f"test:{i}" for i in range(4)]
    read = only_test(tokens)
    judge = load_classifier(merged, pad_token_id=read.vocabulary.pad).eval()
    for i, length in enumerate(LONG):
        for j, order in enumerate(ORDERS):
            for row, sequence in enumerate(encode(read, settings.encoding, order, length)):
                with torch.inference_mode():
                    alone = judge(torch.from_numpy(sequence).long()[None]).logits[0].numpy()
                expected = alone if order == "AB" else swap_classes(alone)
                np.testing.assert_allclose(logits[row, i, j], expected, atol=1e-5)
    assert not np.allclose(logits[1, 0], logits[1, 1]), "a long battle is cut differently"


def test_identical_sequences_are_scored_once(
    merged: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[Sequences] = []
    original = test_time.score

    def counting(judge: Any, sequences: Sequences, **options: Any) -> np.ndarray:
        scored.append(sequences)
        return original(judge, sequences, **options)

    monkeypatch.setattr(test_time, "score", counting)
    settings = scoring_settings(max_lengths=(*LONG, 64))
    output = tmp_path / "merged_test.npy"
    score_test(merged, tokens, output, quantized=False, settings=settings, batch_tokens=700)
    read = only_test(tokens)
    shown = [encode(read, Encoding(), o, n) for n in settings.max_lengths for o in ORDERS]
    distinct = {(row, part[row].tobytes()) for part in shown for row in range(len(part))}
    assert len(scored) == 1
    assert len(scored[0]) == len(distinct) < 4 * 6
    logits, _ = read_logits(output)
    assert (logits[0, 0] == logits[0, 1]).all(), "the short battle is the same at every length"
    np.testing.assert_array_equal(logits[2, :, 1], swap_classes(logits[2, :, 0]))


def test_a_swap_equivariant_judge_scores_both_orders_alike(tokens: Path) -> None:
    read = only_test(tokens)
    _, before_a, before_b, end = read.vocabulary.frames["markers"]

    def strengths(sequences: Sequences) -> np.ndarray:
        """Logits from the length of each answer, in the form of a pointwise judge."""
        rows = []
        for sequence in sequences:
            starts = [position(sequence, marker) for marker in (before_a, before_b)]
            a = starts[1] - starts[0] - len(before_a)
            b = len(sequence) - len(end) - starts[1] - len(before_b)
            rows.append([a, b, (a + b) / 2])
        return np.array(rows, np.float32)

    logits, _ = score_variants(read, scoring_settings(max_lengths=LONG), strengths)
    np.testing.assert_array_equal(logits[:, :, 0], logits[:, :, 1])
    assert logits[0, 0, 0, 1] > logits[0, 0, 0, 0]


def position(sequence: np.ndarray, part: tuple[int, ...]) -> int:
    windows = np.lib.stride_tricks.sliding_window_view(sequence, len(part))
    return int((windows == part).all(axis=1).argmax())


def test_half_precision_scores_are_near_those_of_full_precision(
    merged: Path, tokens: Path, tmp_path: Path
) -> None:
    found = {}
    for precision in ("fp32", "bf16"):
        settings = scoring_settings(max_lengths=LONG, precision=precision)
        path = tmp_path / f"{precision}_test.npy"
        score_test(merged, tokens, path, quantized=False, settings=settings, batch_tokens=700)
        found[precision], _ = read_logits(path)
    np.testing.assert_allclose(found["bf16"], found["fp32"], atol=0.2)
    assert not (found["bf16"] == found["fp32"]).all()


def test_a_quantized_model_is_loaded_by_the_loader_for_it(
    merged: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []

    def load(folder: Path, *, attention: str) -> Any:
        loaded.append(folder)
        return load_classifier(folder, pad_token_id=read_tokens(tokens).vocabulary.pad)

    monkeypatch.setattr(test_time, "load_quantized", load)
    path = tmp_path / "gptq_test.npy"
    settings = scoring_settings(max_lengths=LONG)
    score_test(merged, tokens, path, quantized=True, settings=settings, batch_tokens=700)
    assert loaded == [merged]
    assert read_provenance(ids_path(path))["settings"]["quantized"] is True


@given(seeds)
def test_identical_compares_rows_whole(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = (
        [rng.integers(0, 2, rng.integers(0, 4)).astype(np.int32) for _ in range(12)]
        for _ in range(2)
    )
    expected = [np.array_equal(a, b) for a, b in zip(first, second, strict=True)]
    assert identical(ragged(first), ragged(second)).tolist() == expected


def ragged(rows: list[np.ndarray]) -> Sequences:
    return Sequences(np.concatenate(rows), np.cumsum([0, *map(len, rows)]))


def test_without_test_battles_nothing_is_scored(
    backbone: Path, tokens: Path, tmp_path: Path
) -> None:
    only_train = read_parquet(tokens).slice(0, 1)
    write_parquet(only_train, tmp_path / "tokens.parquet", read_provenance(tokens))
    with pytest.raises(InputError, match="holds no test battle"):
        score_test(
            backbone,
            tmp_path / "tokens.parquet",
            tmp_path / "x.npy",
            quantized=False,
            settings=scoring_settings(),
            batch_tokens=100,
        )
