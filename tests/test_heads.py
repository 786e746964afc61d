"""Joint and pointwise judges: their inputs, and the verdicts from their outputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from arena_distill.battles.folds import training_rows
from arena_distill.battles.votes import votes_of
from arena_distill.config.encoding import Encoding
from arena_distill.config.head import Head
from arena_distill.config.phases.deployment import MergeSettings
from arena_distill.config.phases.prediction import ScoringSettings
from arena_distill.config.phases.scoring import LogitsSettings
from arena_distill.config.phases.training import PretrainingSettings, TrainingSettings
from arena_distill.config.training import Lora, Loss, Pretraining, Training
from arena_distill.deployment.merging import merge_folds
from arena_distill.encoding.sequences import read_tokens
from arena_distill.encoding.views import encode, encode_views, views
from arena_distill.files.artifacts import read_json, read_parquet
from arena_distill.files.keys import key, locate
from arena_distill.files.logits import read_logits
from arena_distill.models.adapters import load_adapter
from arena_distill.models.heads import battle_logits, verdicts
from arena_distill.models.loading import load_classifier
from arena_distill.prediction.test_time import score_variants
from arena_distill.runtime.launch import Launch
from arena_distill.scoring.logits import predict_logits
from arena_distill.training.examples import make_examples
from arena_distill.training.losses import battle_losses
from arena_distill.training.targets import VOTE_LOSS
from arena_distill.training.trainer import pretrain_adapter, train_fold
from arena_distill.verdicts import Votes, swap_classes

JOINT = Head(kind="joint")
DAVIDSON = Head(kind="pointwise")
MEAN = Head(kind="pointwise", pooling="mean")
RAO_KUPPER = Head(kind="pointwise", ties="rao_kupper")
ENCODING = Encoding(max_length=96, sizes=True)
LORA = Lora(r=4, alpha=8)

outputs_of_battles = arrays(
    np.float32, (5, 2, 2), elements=st.floats(-20, 20, width=32, allow_nan=False)
)


def probabilities(outputs: Any, head: Head) -> np.ndarray:
    logits = battle_logits(torch.as_tensor(outputs), head)
    return logits.softmax(-1).numpy()


# --- the verdict ------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [DAVIDSON, RAO_KUPPER])
@given(outputs=outputs_of_battles)
def test_exchanging_the_answers_exchanges_the_verdict(head: Head, outputs: np.ndarray) -> None:
    exchanged = probabilities(outputs[:, ::-1].copy(), head)
    np.testing.assert_allclose(exchanged, swap_classes(probabilities(outputs, head)), atol=1e-6)


@pytest.mark.parametrize("head", [DAVIDSON, RAO_KUPPER])
@given(outputs=outputs_of_battles)
def test_logits_are_finite_and_only_the_difference_of_strengths_counts(
    head: Head, outputs: np.ndarray
) -> None:
    assert np.isfinite(battle_logits(torch.from_numpy(outputs), head).numpy()).all()
    shifted = outputs.copy()
    shifted[..., 0] += 3
    np.testing.assert_allclose(
        probabilities(shifted, head), probabilities(outputs, head), atol=1e-4
    )


def test_davidson_by_hand() -> None:
    # Strengths 1 and 0, ν = e^(0.2 + 0.1): odds e : 1 : e^0.3 e^0.5.
    p = probabilities([[[1.0, 0.2], [0.0, 0.1]]], DAVIDSON)[0]
    odds = np.array([np.e, 1, np.exp(0.8)])
    np.testing.assert_allclose(p, odds / odds.sum(), rtol=1e-6)


@pytest.mark.parametrize("log_nu", [-150.0, -104.5, -60.0, 0.0, 44.5, 90.0, 150.0])
def test_rao_kupper_is_exact_for_any_threshold(log_nu: float) -> None:
    """P(tie) = (e^2η − 1) P(a) P(b) overflows float32 from log ν = 44 on, and e^2η − 1 is 0 below −104."""
    outputs = torch.tensor([[[0.7, log_nu / 2], [-0.4, log_nu / 2]]], requires_grad=True)
    logits = battle_logits(outputs, RAO_KUPPER)
    logits.log_softmax(-1).sum().backward()
    assert outputs.grad is not None
    assert torch.isfinite(outputs.grad).all()
    assert outputs.grad[..., 1].abs().min() > 0, "it can be learned"
    nu, d = np.exp(np.longdouble(log_nu)), np.longdouble(0.7 + 0.4)
    a, b = 1 / (1 + (1 + nu) * np.exp(-d)), 1 / (1 + (1 + nu) * np.exp(d))
    expected = np.log([a, b, ((1 + nu) ** 2 - 1) * a * b if log_nu > -30 else 2 * nu * a * b])
    np.testing.assert_allclose(logits[0].detach(), expected.astype(float), rtol=1e-5, atol=1e-4)


def test_rao_kupper_by_hand() -> None:
    # θ = e^η = 1 + ν, with π_a = e^1, π_b = 1: their formulas (Rao and Kupper 1967).
    theta, a, b = 1 + np.exp(0.3), np.e, 1.0
    expected = [a / (a + theta * b), b / (theta * a + b)]
    expected.append((theta**2 - 1) * a * b / ((a + theta * b) * (theta * a + b)))
    p = probabilities([[[1.0, 0.2], [0.0, 0.1]]], RAO_KUPPER)[0]
    np.testing.assert_allclose(p, expected, rtol=1e-5)
    assert sum(expected) == pytest.approx(1)


@pytest.mark.parametrize("head", [DAVIDSON, RAO_KUPPER])
def test_equal_strengths_and_no_pull_tie_in_a_third(head: Head) -> None:
    np.testing.assert_allclose(probabilities(np.zeros((1, 2, 2)), head), 1 / 3, rtol=1e-6)
    tied = [probabilities([[[0.0, t], [0.0, t]]], head)[0, 2] for t in (-2.0, 0.0, 2.0)]
    assert tied == sorted(tied)


def test_verdicts_are_canonical_in_every_order() -> None:
    outputs = np.random.default_rng(0).normal(size=(4, 2, 3)).astype(np.float32)
    joint = verdicts(outputs, JOINT)
    np.testing.assert_array_equal(joint[:, 0], outputs[:, 0])
    np.testing.assert_array_equal(joint[:, 1], swap_classes(outputs[:, 1]))
    only_swapped = verdicts(outputs[:, 1:], JOINT, ("BA",))
    np.testing.assert_array_equal(only_swapped[:, 0], swap_classes(outputs[:, 1]))
    pointwise = verdicts(outputs[..., :2], DAVIDSON)
    np.testing.assert_array_equal(pointwise[:, 0], pointwise[:, 1])


# --- what is shown ----------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["markers", "winners"])
@pytest.mark.parametrize("truncation", ["rounds", "winners", "middle"])
def test_an_answer_is_shown_with_its_prompt_and_nothing_of_the_other(
    template: str, truncation: str, make_run: Callable[..., Run]
) -> None:
    tokens = read_tokens(make_run("gemma2").tokens)
    encoding = Encoding(template=template, truncation=truncation, max_length=2000)
    for name, view in (("response_a", "A"), ("response_b", "B")):
        before, between, after = tokens.vocabulary.one_answer[template]
        for row, ids in enumerate(encode(tokens, encoding, view)):
            prompt, answer = (tokens.fields[f].tokens[row] for f in ("prompt", name))
            whole = [*before, *prompt, *between, *answer, *after]
            assert ids.tolist() == whole


@pytest.mark.parametrize("truncation", ["rounds", "winners", "middle"])
@given(max_length=st.integers(40, 120))
def test_one_answer_is_cut_to_the_length(
    truncation: str, max_length: int, make_run: Callable[..., Run]
) -> None:
    tokens = read_tokens(make_run("llama").tokens)
    encoding = Encoding(truncation=truncation, max_length=max_length)
    for view in ("A", "B"):
        made = encode(tokens, encoding, view)
        before, _, after = tokens.vocabulary.one_answer["markers"]
        assert made.lengths.max() <= max_length
        for ids in made:
            assert tuple(ids[: len(before)]) == before
            assert not after or tuple(ids[-len(after) :]) == after


def test_a_pointwise_judge_sees_each_battle_once(make_run: Callable[..., Run]) -> None:
    tokens = read_tokens(make_run("llama").tokens).take(np.arange(4))
    votes = Votes.hard(np.array([0, 1, 2, 0]))
    targets = np.arange(24, dtype=np.float32).reshape(4, 1, 2, 3)
    shown = make_examples(tokens, votes, targets, None, training_settings(DAVIDSON))
    assert (len(shown), len(shown.views)) == (4, 2)
    assert shown.teachers is not None
    np.testing.assert_array_equal(shown.teachers, targets.mean(axis=2))
    assert views(DAVIDSON, ("BA",)) == ("A", "B")
    item = shown[2]
    assert [ids.tobytes() for ids in item["input_ids"]] == [
        encode(tokens, ENCODING, view)[2].tobytes() for view in ("A", "B")
    ]


# --- a pointwise judge from end to end ----------------------------------------------------------------


def training_settings(head: Head, **changes: Any) -> TrainingSettings:
    training = Training(lr=2e-3, epochs=1, batch_size=8, warmup_steps=1)
    whole: dict[str, Any] = {"version": 1, "encoding": ENCODING, "head": head, "lora": LORA}
    whole |= {"precision": "fp32", "training": training, "keep_head": False, "loss": VOTE_LOSS}
    return TrainingSettings(**(whole | changes))


def trained(run: Run, head: Head, output: Path, fold: int = 0, **options: Any) -> Path:
    train_fold(
        run.backbone, options.pop("pretrained", None), run.tokens, run.folds, fold, output,
        teachers=options.pop("teachers", {}), settings=training_settings(head, **options),
        launch=Launch(micro_batch_size=4),
    )  # fmt: skip
    return output


def scored(run: Run, head: Head, adapter: Path, output: Path, fold: int = 0) -> np.ndarray:
    settings = LogitsSettings(
        version=1, encoding=ENCODING, head=head, precision="fp32", rows=("validation", "extra")
    )
    predict_logits(
        run.backbone, adapter, run.tokens, run.folds, fold, output, settings=settings,
        batch_tokens=600,
    )  # fmt: skip
    return read_logits(output)[0]


@pytest.mark.parametrize("head", [DAVIDSON, RAO_KUPPER])
def test_the_first_loss_is_that_of_the_untrained_judge(
    head: Head, make_run: Callable[..., Run], tmp_path: Path
) -> None:
    """The Trainer's batches pair the two answers of a battle with its vote."""
    run = make_run("llama")
    tokens, folds = read_tokens(run.tokens), read_parquet(run.folds)
    rows = folds.take(training_rows(folds, 0))
    whole = Training(lr=1e-3, epochs=1, batch_size=1024, warmup_steps=1)
    trained(run, head, tmp_path / "x", training=whole)
    (reported,) = read_parquet(tmp_path / "x" / "history.parquet")["loss"].to_pylist()
    model = load_classifier(
        run.backbone, head=head, pad_token_id=tokens.vocabulary.pad, head_seed=whole.seed
    ).eval()
    read = tokens.take(locate(key(rows), tokens.keys(), "tokens"))
    with torch.inference_mode():
        outputs = [
            torch.cat([model(torch.from_numpy(ids[None].astype(np.int64))).logits for ids in view])
            for view in encode_views(read, ENCODING, head)
        ]
    votes = torch.from_numpy(votes_of(rows).probabilities)
    each = battle_losses(battle_logits(torch.stack(outputs, 1), head), votes, None, None, VOTE_LOSS)
    # (An adapter starts as nothing; dropout touches its input alone.)
    assert float(each.mean()) == pytest.approx(reported, rel=1e-4)


@pytest.mark.parametrize(
    ("family", "head"),
    [("llama", DAVIDSON), ("qwen2", MEAN), ("gemma2", DAVIDSON), ("gemma2", MEAN)],
)
def test_a_pointwise_judge_passes_every_phase(
    family: str, head: Head, make_run: Callable[..., Run], tmp_path: Path
) -> None:
    """Each phase handles a pointwise judge."""
    run = make_run(family)
    pretraining = PretrainingSettings(
        version=1, encoding=ENCODING, head=head, lora=LORA, precision="fp32",
        pretraining=Pretraining(lr=1e-3, epochs=1, batch_size=8, warmup_steps=1),
    )  # fmt: skip
    start = tmp_path / "pretrained"
    pretrain_adapter(
        run.backbone, run.tokens, start, settings=pretraining,
        launch=Launch(micro_batch_size=4),
    )  # fmt: skip
    adapter = trained(run, head, tmp_path / "fold_0", pretrained=start)
    assert read_json(adapter / "metrics.json")["sequences"] % 2 == 0
    logits = scored(run, head, adapter, tmp_path / "fold_0.npy")
    np.testing.assert_array_equal(logits[:, 0], logits[:, 1])
    assert np.isfinite(logits).all()

    merging = MergeSettings(
        version=1, judge="j", encoding=ENCODING, head=head, precision="fp32", heads="average"
    )
    merge_folds(run.backbone, [adapter], tmp_path / "m", settings=merging)
    tokens = read_tokens(run.tokens)
    settings = ScoringSettings(
        version=1, encoding=ENCODING, head=head, precision="fp32", max_lengths=(96, 1500),
        orders=("AB", "BA"),
    )  # fmt: skip
    from arena_distill.models.scoring import score

    merged = load_classifier(tmp_path / "m", head=head, pad_token_id=tokens.vocabulary.pad)
    unmerged = load_adapter(
        load_classifier(run.backbone, head=head, pad_token_id=tokens.vocabulary.pad, head_seed=0),
        adapter,
    )
    one, other = (
        score_variants(tokens, settings, lambda s, m=m: score(m, s, batch_tokens=900))[0]
        for m in (merged, unmerged)
    )
    np.testing.assert_allclose(one, other, atol=2e-4)
    np.testing.assert_array_equal(one[:, :, 0], one[:, :, 1])


@pytest.fixture(scope="module")
def taught_by(
    make_run: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Head], list[Path]]:
    """The logits of a teacher's three folds."""
    run = make_run("llama")

    @cache
    def of(head: Head) -> list[Path]:
        folder = tmp_path_factory.mktemp("teacher")
        files = [folder / "teacher" / f"fold_{fold}.npy" for fold in range(3)]
        for fold, file in enumerate(files):
            scored(run, head, trained(run, head, folder / str(fold), fold), file, fold)
        return files

    return of


@pytest.mark.parametrize(
    ("teacher", "student"), [(DAVIDSON, JOINT), (JOINT, RAO_KUPPER), (DAVIDSON, DAVIDSON)]
)
def test_heads_teach_each_other(
    teacher: Head,
    student: Head,
    make_run: Callable[..., Run],
    taught_by: Callable[[Head], list[Path]],
    tmp_path: Path,
) -> None:
    run = make_run("llama")
    train_fold(
        run.backbone, None, run.tokens, run.folds, 0, tmp_path / "student",
        teachers={"teacher": taught_by(teacher)},
        settings=training_settings(
            student, teachers=("teacher",), targets="out_of_fold", loss=Loss()
        ),
        launch=Launch(micro_batch_size=4),
    )  # fmt: skip
    assert np.isfinite(scored(run, student, tmp_path / "student", tmp_path / "s.npy")).all()
