"""Students learn from their teachers' hidden states and attention, which these write."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from checkouts import make_checkout
from conftest import FAMILIES, Run, make_config
from safetensors.torch import load_file
from test_checkpoints import WEIGHTS, at_batch, checkpoints_of, interrupt  # noqa: F401
from test_config import judged, lines, raw
from test_training import LORA, training_settings
from transformers import AutoModelForSequenceClassification

from arena_distill.config.encoding import Encoding
from arena_distill.config.head import Head
from arena_distill.config.phases.scoring import LogitsSettings
from arena_distill.config.phases.training import TrainingSettings
from arena_distill.config.run import load, overlay
from arena_distill.config.training import Lora, Loss
from arena_distill.encoding.batching import pad
from arena_distill.encoding.sequences import read_tokens
from arena_distill.encoding.views import encode_views
from arena_distill.errors import InputError
from arena_distill.files.artifacts import read_parquet
from arena_distill.files.keys import key, locate
from arena_distill.files.logits import read_logits, read_states, write_logits
from arena_distill.models import adapters
from arena_distill.models.adapters import load_adapter, load_fold, new_judge
from arena_distill.models.heads import verdicts
from arena_distill.models.hidden_states import Projections, capture
from arena_distill.models.loading import load_classifier
from arena_distill.runtime.launch import Launch
from arena_distill.scoring.logits import gather_logits, predict_logits
from arena_distill.training import examples, judge_trainer, trainer
from arena_distill.training.checkpoints import SEAL
from arena_distill.training.examples import make_examples
from arena_distill.training.losses import attention_divergences, battle_losses, feature_distances
from arena_distill.training.targets import select_rows, teacher_states
from arena_distill.training.trainer import train_fold
from arena_distill.verdicts import Votes

ENCODING = Encoding(max_length=96)
BOTH = ("features", "attention")
LAST_LAYER = re.compile(r"^(base_model\.model\.)?(score|classifier)(\.modules_to_save\.default)?$")


def last_layer(judge: Any) -> torch.nn.Linear:
    """The head, found in another way than in the package."""
    return [m for name, m in judge.named_modules() if LAST_LAYER.search(name)][-1]


# --- captured states ----------------------------------------------------------------------------------


@pytest.fixture(params=[*FAMILIES, "bert"])
def any_run(request: pytest.FixtureRequest, make_run: Callable[..., Run]) -> Run:
    return make_run(request.param)


def batch_of(run: Run) -> tuple[Any, dict[str, torch.Tensor]]:
    tokens = read_tokens(run.tokens).take(np.arange(7))
    base = load_classifier(run.backbone, pad_token_id=tokens.vocabulary.pad, head_seed=0)
    (sequences,) = encode_views(tokens, ENCODING, Head(kind="joint"), ("AB",))
    assert len(set(sequences.lengths)) > 3
    ids, mask = map(torch.from_numpy, pad(list(sequences), tokens.vocabulary.pad))
    return new_judge(base, LORA, 4).eval(), {"input_ids": ids, "attention_mask": mask}


@torch.inference_mode()
def test_the_head_makes_the_logits_of_the_features(any_run: Run) -> None:
    judge, batch = batch_of(any_run)
    logits = judge(**batch).logits
    capture(judge, ["features"])
    said = judge(**batch)
    torch.testing.assert_close(said.logits, logits, rtol=0, atol=0)
    torch.testing.assert_close(last_layer(judge)(said.features), logits, rtol=0, atol=1e-5)
    assert said.features.std(0).min() > 0  # of each sequence its own
    assert said.attention is None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [1, 2])
@torch.inference_mode()
def test_attention_is_what_plain_transformers_say_it_is(family: str, layers: int) -> None:
    """Grouped heads, soft-capping, windows shorter than the sequence, padding."""
    config = make_config(family, 300, layers=layers)
    config.pad_token_id, config.sliding_window = 3, 16
    if family == "qwen2":
        config.layer_types = ["sliding_attention"] * layers
    if family == "gemma2":
        config.attn_logit_softcapping = 2.0
    torch.manual_seed(0)
    judge = AutoModelForSequenceClassification.from_config(config).eval()
    plain = copy.deepcopy(judge)
    plain.set_attn_implementation("eager")
    lengths = torch.tensor([40, 31, 16, 7, 1])
    ids = torch.randint(4, 300, (5, 40)).where(torch.arange(40) < lengths[:, None], 3)
    batch = {"input_ids": ids, "attention_mask": (ids != 3).long()}
    logits = judge(**batch).logits
    capture(judge, ["attention"])
    said = judge(**batch)
    torch.testing.assert_close(said.logits, logits, rtol=0, atol=0)
    of_last_layer = plain(**batch, output_attentions=True).attentions[-1]
    expected = of_last_layer[torch.arange(5), :, lengths - 1].mean(1)
    torch.testing.assert_close(said.attention, expected, rtol=0, atol=1e-6)
    sliding = getattr(config, "layer_types", [""])[-1] == "sliding_attention"
    visible = lengths.clamp(max=16) if sliding else lengths
    assert (said.attention > 0).sum(-1).tolist() == visible.tolist()
    assert not torch.allclose(expected[0, :16], torch.full((16,), 1 / 40))


def test_an_encoder_has_no_last_token_that_attends(make_run: Callable[..., Run]) -> None:
    judge, _ = batch_of(make_run("bert"))
    with pytest.raises(InputError, match=r"loss\.attention: the attention"):
        capture(judge, ["attention"])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_the_backbone_through_states(
    family: str, make_run: Callable[..., Run]
) -> None:
    judge, batch = batch_of(make_run(family))
    capture(judge, BOTH)
    for state in BOTH:
        judge.zero_grad(set_to_none=True)
        getattr(judge(**batch), state).square().sum().backward()
        moved = {n for n, p in judge.named_parameters() if p.grad is not None and p.grad.any()}
        assert any("layers.1.self_attn.q_proj.lora_B" in name for name in moved)
        assert not any("score" in name for name in moved)


# --- the files ----------------------------------------------------------------------------------------


def logits_settings(*states: Any, head: str = "joint") -> LogitsSettings:
    return LogitsSettings(
        version=1, encoding=ENCODING, head=Head(kind=head), precision="fp32",
        rows=("validation", "extra"), states=states,
    )  # fmt: skip


def adapter_of(run: Run, folder: Path, head: str = "joint", lora: Lora | None = LORA) -> Path:
    """A judge whose adapter, or all of whose weights, change the output."""
    pad_id = read_tokens(run.tokens).vocabulary.pad
    base = load_classifier(run.backbone, head=Head(kind=head), pad_token_id=pad_id, head_seed=0)
    judge = new_judge(base, lora, 4)
    torch.manual_seed(1)
    for name, parameter in judge.named_parameters():
        if "lora_B" in name or (lora is None and parameter.ndim > 1):
            torch.nn.init.normal_(parameter, std=0.1 if lora else 0.3)
    judge.save_pretrained(str(folder))
    return folder


def score(
    run: Run, adapter: Path, output: Path, settings: LogitsSettings, fold: int = 1, **shard: int
) -> Path:
    predict_logits(
        run.backbone, adapter, run.tokens, run.folds, fold, output, settings=settings,
        batch_tokens=300, **shard,
    )  # fmt: skip
    return output


@pytest.mark.parametrize(("head", "lora"), [("joint", LORA), ("pointwise", LORA), ("joint", None)])
def test_stored_features_are_what_the_head_reads(
    any_run: Run, head: Any, lora: Lora | None, tmp_path: Path
) -> None:
    adapter = adapter_of(any_run, tmp_path / "adapter", head, lora)
    settings = logits_settings("features", head=head)
    path = score(any_run, adapter, tmp_path / "fold_1.npy", settings)
    logits, ids = read_logits(path)
    features = read_states(path, "features")
    assert features.dtype == np.float16
    assert features.shape == (len(ids), 2, 32)
    pad_id = read_tokens(any_run.tokens).vocabulary.pad
    judge = load_fold(any_run.backbone, adapter, head=Head(kind=head), pad_token_id=pad_id)
    with torch.inference_mode():
        outputs = last_layer(judge)(torch.from_numpy(features).float()).numpy()
    spread = np.ptp(logits, axis=0).max()
    assert spread > 0.05
    np.testing.assert_allclose(verdicts(outputs, Head(kind=head)), logits, atol=0.03 * spread)


def test_stored_attention_ends_with_its_sequence(run: Run, tmp_path: Path) -> None:
    adapter = adapter_of(run, tmp_path / "adapter")
    path = score(run, adapter, tmp_path / "fold_1.npy", logits_settings("attention"))
    attention, (_, ids) = read_states(path, "attention"), read_logits(path)
    assert attention.dtype == np.float16
    assert attention.shape == (len(ids), 2, ENCODING.max_length)
    np.testing.assert_allclose(attention.sum(-1, dtype=np.float32), 1, atol=2e-3)
    tokens = read_tokens(run.tokens)
    tokens = tokens.take(locate(key(ids), tokens.keys(), "tokens"))
    for view, sequences in enumerate(encode_views(tokens, ENCODING, Head(kind="joint"))):
        behind = np.arange(ENCODING.max_length) >= sequences.lengths[:, None]
        assert not attention[:, view][behind].any()
        assert (attention[np.arange(len(ids)), view, sequences.lengths - 1] > 0).all()
    assert {file.name for file in (tmp_path / "fold_1.states").iterdir()} == {"attention.npy"}


def test_logits_do_not_depend_on_what_else_is_asked_for(run: Run, tmp_path: Path) -> None:
    adapter = adapter_of(run, tmp_path / "adapter")
    plain = score(run, adapter, tmp_path / "plain.npy", logits_settings())
    asked = score(run, adapter, tmp_path / "asked.npy", logits_settings(*BOTH))
    assert plain.read_bytes() == asked.read_bytes()
    assert not (tmp_path / "plain.states").exists()


@pytest.mark.parametrize("count", [2, 6])
def test_shards_make_the_states_that_one_job_would_have_written(
    count: int, make_run: Callable[..., Run], tmp_path: Path
) -> None:
    run, settings = make_run("gemma2"), logits_settings(*BOTH)
    adapter = adapter_of(run, tmp_path / "adapter")
    whole = score(run, adapter, tmp_path / "whole.npy", settings)
    shards = [
        score(run, adapter, tmp_path / f"shards/{n}.npy", settings, shard=n, shards=count)
        for n in range(count)
    ]
    gathered = tmp_path / "gathered.npy"
    gather_logits(shards[::-1], run.folds, 1, gathered, settings=settings)
    for suffix in (".npy", ".ids.parquet", ".states/features.npy", ".states/attention.npy"):
        one, other = (p.parent.joinpath(p.stem + suffix) for p in (whole, gathered))
        assert one.read_bytes() == other.read_bytes(), suffix


def test_what_float16_cannot_hold_is_an_error(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run("llama")
    adapter = adapter_of(run, tmp_path / "adapter")

    def loud(base: Any, adapter: Path) -> Any:
        judge = load_adapter(base, adapter)
        with torch.no_grad():
            judge.base_model.model.model.norm.weight *= 1e5
        return judge

    monkeypatch.setattr(adapters, "load_adapter", loud)
    with pytest.raises(InputError, match=r"adapter: its features exceed 65,504.*features: 0"):
        score(run, adapter, tmp_path / "x.npy", logits_settings("features"))
    assert not list(tmp_path.glob("x*"))


# --- which rows ---------------------------------------------------------------------------------------

FOLDS = [["0", "3", "6"], ["1", "4", "7"], ["2", "5", "8"]]
EXTRA = ["0", "1", "2"]
ROWS = [("train", i) for i in ["8", "0", "4", "7"]] + [("extra", "2"), ("extra", "0")]


def table(names: list[tuple[str, str]]) -> pa.Table:
    return pa.table({"id": [i for _, i in names], "source": [s for s, _ in names]})


def state_of(source: str, id_: str, salt: float) -> np.ndarray:
    """States that identify their row and judge: float16 (views, width)."""
    base = int(id_) + (100 if source == "extra" else 0) + salt
    return np.array([[base, 1], [-base, 2]], np.float16)


def write_fold(folder: Path, fold: int, seed: int, leave_out: str = "") -> Path:
    names = [("train", i) for i in FOLDS[fold] if i != leave_out] + [("extra", i) for i in EXTRA]
    names = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    ids = table(names).append_column("validation", pa.array([s == "train" for s, _ in names]))
    values = np.stack([state_of(*name, salt=10 * fold) for name in names])
    logits = np.zeros((len(names), 2, 3), np.float32)
    write_logits(folder / f"fold_{fold}.npy", logits, ids, {}, {"features": values})
    return folder / f"fold_{fold}.npy"


@pytest.mark.parametrize("seed", [1, 2])
def test_states_are_joined_by_key(seed: int, tmp_path: Path) -> None:
    """Out of fold from the one fold that never saw the row; extra rows the mean over folds."""
    files = [write_fold(tmp_path, fold, seed + fold) for fold in range(3)]
    (found,) = teacher_states(select_rows({"t": files}, table(ROWS), "out_of_fold"), "features")
    folds = {i: fold for fold, own in enumerate(FOLDS) for i in own}
    expected = [state_of(s, i, 10 * folds[i] if s == "train" else 10) for s, i in ROWS]
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.float16
    held = [("train", "6"), ("extra", "1"), ("train", "0")]
    (own,) = teacher_states(select_rows({"t": files[:1]}, table(held), "in_sample"), "features")
    np.testing.assert_array_equal(own, [state_of(*name, salt=0) for name in held])


@pytest.mark.parametrize("targets", ["out_of_fold", "in_sample"])
def test_a_missing_row_is_an_error(targets: Any, tmp_path: Path) -> None:
    files = [write_fold(tmp_path, 0, 3, leave_out="3")]
    with pytest.raises(InputError, match=r"t's .* rows are missing, train:3"):
        select_rows({"t": files}, table([("train", "0"), ("train", "3")]), targets)


@pytest.mark.parametrize("harm", ["gone", "cut", "changed", "of another"])
def test_damaged_states_are_an_error_that_names_their_file(harm: str, tmp_path: Path) -> None:
    file, other = write_fold(tmp_path, 0, 1), write_fold(tmp_path, 1, 1)
    states = tmp_path / "fold_0.states/features.npy"
    content = states.read_bytes()
    if harm == "gone":
        states.unlink()
    elif harm == "of another":
        states.write_bytes((tmp_path / "fold_1.states/features.npy").read_bytes())
    else:
        states.write_bytes(content[:-2] + (b"!!" if harm == "changed" else b""))
    with pytest.raises(InputError, match=re.escape(f"{states}: ")):
        read_states(file, "features")
    assert len(read_states(other, "features")) == 6
    with pytest.raises(InputError, match="attention.npy: cannot be read"):
        read_states(other, "attention")


# --- the loss -----------------------------------------------------------------------------------------


def test_distances_by_hand() -> None:
    # Unit vectors (1, 0) and (0.6, 0.8): 0.4² + 0.8² = 0.8; opposite ones: 4. Lengths do not count.
    student = [torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[0.0, 2.0, 0.0]]])]
    teacher = [torch.tensor([[[6.0, 8.0]]]), torch.tensor([[[0.0, -1.0, 0.0]]])]
    torch.testing.assert_close(feature_distances(student, teacher), torch.tensor([[0.8, 4.0]]))
    two_answers = [torch.tensor([[[3.0, 0.0], [1.0, 0.0]]])]
    of_teacher = [torch.tensor([[[6.0, 8.0], [-5.0, 0.0]]])]
    torch.testing.assert_close(feature_distances(two_answers, of_teacher), torch.tensor([[2.4]]))


def test_divergences_by_hand() -> None:
    student = torch.tensor([[[0.25, 0.75, 0.0]]], requires_grad=True)  # the last one is padding
    teachers = [torch.tensor([[[0.5, 0.5, 0.0]]]), torch.tensor([[[0.0, 2.0, 0.0]]])]
    found = attention_divergences(student, teachers)
    first = 0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75)
    expected = torch.tensor([[first, np.log(1 / 0.75)]], dtype=torch.float32)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_states_enter_the_weighted_mean_of_the_loss_by_hand() -> None:
    logits, votes = torch.zeros(1, 3), torch.tensor([[1.0, 0, 0]])
    teachers = torch.tensor([[[np.log(2.0), 0, 0], [0, 0, 0]]], dtype=torch.float32)
    loss = Loss(ce=1, kl=2, temperature=1, features=3, attention=0.5, combine="separate")
    states = {"features": torch.tensor([[0.8, 0.2]]), "attention": torch.tensor([[0.1, 0.3]])}
    weights = torch.tensor([[0.75, 0.25]])  # J w = 1.5 and 0.5
    kl = 0.5 * np.log(1.5) + 0.5 * np.log(0.75)
    total = np.log(3) + 1.5 * 2 * kl + 3 * (1.5 * 0.8 + 0.5 * 0.2) + 0.5 * (1.5 * 0.1 + 0.5 * 0.3)
    found = battle_losses(logits, votes, teachers, weights, loss, states)
    assert float(found) == pytest.approx(total / (1 + 2 * (2 + 3 + 0.5)), rel=1e-5)
    # Logits as one target: still a term of states per teacher.
    one = loss.model_copy(update={"combine": "mean_logits", "kl": 0.0})
    total = np.log(3) + 3 * (0.8 + 0.2) + 0.5 * (0.1 + 0.3)
    found = battle_losses(logits, votes, teachers, None, one, states)
    assert float(found) == pytest.approx(total / (1 + 2 * 3.5), rel=1e-5)


def test_without_states_the_loss_is_what_it_was() -> None:
    rng = torch.Generator().manual_seed(0)
    logits, teachers = torch.randn(5, 3, generator=rng), torch.randn(5, 2, 3, generator=rng)
    votes = torch.eye(3)[[0, 1, 2, 0, 1]]
    for loss in (Loss(), Loss(ce=1, kl=1, cosine=1, combine="separate")):
        plain = battle_losses(logits, votes, teachers, None, loss)
        torch.testing.assert_close(
            battle_losses(logits, votes, teachers, None, loss, {}), plain, rtol=0, atol=0
        )


# --- configuration ------------------------------------------------------------------------------------


def test_features_need_the_same_views() -> None:
    (line,) = lines(judged(s={"loss": {"features": 1}}, q={"head": "pointwise"}))
    assert line == (
        "config: judges.s.loss.features: s and its teacher q have to be shown the same views of a "
        "battle, but differ in head (joint / pointwise)"
    )
    load(judged(s={"loss": {"features": 0}}, q={"head": "pointwise"}))
    both = {"head": {"kind": "pointwise", "ties": "rao_kupper"}}
    load(judged(s={"head": "pointwise", "loss": {"features": 1}}, q=both, l=both))
    # In the defaults it concerns students alone.
    load(raw(defaults={"loss": {"features": 1, "attention": 0}}))


@pytest.mark.parametrize(
    ("teacher", "differs"),
    [
        ({}, ""),
        ({"backbone": {"tiny": "gemma2", "layers": 2}}, ""),
        ({"backbone": {"tiny": "llama"}}, "tokenizer (tiny-gemma2 / tiny-llama)"),
        ({"encoding": {"max_length": 64}}, "encoding (template='markers'"),
        ({"head": "pointwise"}, "head (joint / pointwise)"),
    ],
)
def test_attention_needs_the_very_same_tokens(teacher: dict[str, Any], differs: str) -> None:
    judges: dict[str, Any] = {
        "t": {"backbone": {"tiny": "gemma2"}} | teacher,
        "s": {"backbone": {"tiny": "gemma2"}, "teachers": ["t"], "loss": {"attention": 1}},
    }
    if not differs:
        load(raw(judges=judges))
        return
    (line,) = lines(raw(judges=judges))
    assert "config: judges.s.loss.attention: s and its teacher t have to be shown the very" in line
    assert f"differ in {differs}" in line


def test_a_judge_writes_only_the_states_of_its_students() -> None:
    more = {"backbone": {"tiny": "llama"}, "teachers": ["l"], "loss": {"attention": 1}}
    config = load(judged(s={"loss": {"features": 0.5}}, t=more))
    states = {name: LogitsSettings.of(config, name).states for name in config.judges}
    assert states == {"l": BOTH, "q": ("features",), "s": (), "t": ()}
    assert TrainingSettings.of(config, "l").loss.states() == ()
    assert all(LogitsSettings.of(load(raw()), name).states == () for name in "lqs")


def test_states_alone_would_leave_the_head_untaught() -> None:
    (line,) = lines(judged(s={"loss": {"ce": 0, "kl": 0, "features": 1}}))
    assert "at least one of ce, kl, cosine" in line


@pytest.mark.slow
def test_only_requested_states_are_planned(tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path / "checkout")
    mini = yaml.safe_load((checkout.folder / "mini.yaml").read_text())

    def planned(**judges: Any) -> dict[str, int]:
        changed = mini | {"judges": overlay(mini["judges"], judges)}
        (checkout.folder / "mini.yaml").write_text(yaml.safe_dump(changed))
        jobs = checkout.would_run("students")
        return {rule: n for rule, n in jobs.items() if re.match("predict|gather", rule)}

    asking = {"gemma2-student": {"loss": {"features": 1}}}
    assert planned() == {"predict_logits": 4}
    assert planned(**asking) == {"predict_logits_states": 4}
    assert planned(**asking, **{"qwen2-teacher": {"logits": {"shards": 3}}}) == {
        "predict_logits_states": 2,
        "predict_shard_states": 6,
        "gather_logits_states": 2,
    }


# --- a student ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teachers(
    make_run: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Path]]:
    """Logits and states of every fold of two judges of one family with different hidden sizes."""
    run, folder = make_run("llama"), tmp_path_factory.mktemp("teachers")
    adapter = adapter_of(run, folder / "adapter")
    files: dict[str, list[Path]] = {"one": [], "two": []}
    for fold in range(3):
        settings = logits_settings(*BOTH)
        one = score(run, adapter, folder / f"one/fold_{fold}.npy", settings, fold)
        logits, ids = read_logits(one)
        features = read_states(one, "features")
        wide = {
            "features": np.concatenate([-features, features[..., :8]], axis=-1),
            "attention": read_states(one, "attention"),
        }
        two = folder / f"two/fold_{fold}.npy"
        write_logits(two, -logits, ids, {}, wide)
        files["one"].append(one)
        files["two"].append(two)
    return files


def student_settings(loss: Loss, **changes: Any) -> TrainingSettings:
    student = {"teachers": ("one", "two"), "targets": "out_of_fold", "loss": loss}
    return training_settings(**(student | changes))


def distil(
    run: Run, files: dict[str, list[Path]], output: Path, loss: Loss, launch: Launch | None = None,
    **changes: Any,
) -> dict[str, torch.Tensor]:  # fmt: skip
    train_fold(
        run.backbone, None, run.tokens, run.folds, 0, output, teachers=files,
        settings=student_settings(loss, **changes), launch=launch or Launch(4),
    )  # fmt: skip
    return load_file(output / WEIGHTS)


def test_examples_have_the_states_of_their_own_battles(
    make_run: Callable[..., Run], teachers: dict[str, list[Path]]
) -> None:
    run = make_run("llama")
    rows = read_parquet(run.folds).slice(0, 6)
    tokens = read_tokens(run.tokens)
    tokens = tokens.take(locate(key(rows), tokens.keys(), "tokens"))
    selected = select_rows(teachers, rows, "out_of_fold")
    states = {name: teacher_states(selected, name) for name in BOTH}
    targets, votes = np.zeros((6, 2, 2, 3), np.float32), Votes.hard(np.zeros(6, int))
    weights = np.full((6, 2), 0.5, np.float32)
    swapped = make_examples(tokens, votes, targets, weights, student_settings(Loss()), states)
    for each, given in zip(swapped.states["features"], states["features"], strict=True):
        np.testing.assert_array_equal(each[:6, 0], given[:, 0])
        np.testing.assert_array_equal(each[6:, 0], given[:, 1])
    assert [values.shape for values in swapped[7]["features"]] == [(1, 32), (1, 40)]
    alone = student_settings(Loss(), head=Head(kind="pointwise"))
    pointwise = make_examples(tokens, votes, targets, weights, alone, states)
    np.testing.assert_array_equal(pointwise[2]["features"][1], states["features"][1][2])
    assert pointwise[2]["attention"][0].shape == (2, ENCODING.max_length)
    # What stands behind a sequence's end is padding, of the batch or of the file.
    batch = examples.collator(tokens.vocabulary.pad)([pointwise[1], pointwise[2]])
    assert batch["attention"][0].shape == batch["input_ids"].shape


def test_the_adapter_holds_nothing_else_and_starts_the_same(
    make_run: Callable[..., Run], teachers: dict[str, list[Path]], tmp_path: Path
) -> None:
    run = make_run("llama")
    plain = distil(run, teachers, tmp_path / "plain", Loss())
    taught = distil(run, teachers, tmp_path / "taught", Loss(features=1, attention=1))
    assert taught.keys() == plain.keys()
    assert {p.name for p in (tmp_path / "plain").iterdir()} == {
        p.name for p in (tmp_path / "taught").iterdir()
    }
    configs = [(tmp_path / n / "adapter_config.json").read_bytes() for n in ("plain", "taught")]
    assert configs[0] == configs[1]
    moved = max(float((plain[n] - taught[n]).abs().max()) for n in plain)
    assert moved > 1e-4
    # Neither drawing projections nor watching changes what else is drawn.
    still = Loss(features=1e-30, attention=1e-30)
    same = distil(run, teachers, tmp_path / "still", still, lora=LORA)
    assert max(float((plain[n] - same[n]).abs().max()) for n in plain) < 1e-6


def test_without_states_nothing_is_captured(
    make_run: Callable[..., Run],
    teachers: dict[str, list[Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trainer, "capture", lambda *_: pytest.fail("watched"))
    monkeypatch.setattr(trainer, "project", lambda *_, **__: pytest.fail("projected"))
    for path in (file for files in teachers.values() for file in files):
        assert path.with_suffix(".states").is_dir()
    distil(make_run("llama"), teachers, tmp_path / "x", Loss())


@pytest.mark.parametrize("state", BOTH)
def test_a_student_approaches_its_teachers_states(
    state: Any, make_run: Callable[..., Run], teachers: dict[str, list[Path]], tmp_path: Path
) -> None:
    run = make_run("llama")
    loss = Loss(ce=1e-6, kl=0, **{state: 1})
    options: dict[str, Any] = {"epochs": 6, "lr": 0.02, "swap": False, "teachers": ("one",)}
    only = {"one": teachers["one"]}
    distil(run, only, tmp_path / "x", loss, **options)
    course = read_parquet(tmp_path / "x/history.parquet")["loss"].to_numpy()
    assert course[-3:].mean() < 0.4 * course[:2].mean()


@pytest.mark.slow
def test_a_pointwise_student_learns_from_each_answer(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    run, head = make_run("gemma2"), "pointwise"
    adapter = adapter_of(run, tmp_path / "adapter", head)
    settings = logits_settings(*BOTH, head=head)
    files = [score(run, adapter, tmp_path / f"t/fold_{k}.npy", settings, k) for k in range(3)]
    options: dict[str, Any] = {"epochs": 4, "lr": 0.02, "head": Head(kind=head)}
    loss = Loss(ce=1e-6, kl=0, features=1, attention=1)
    distil(run, {"t": files}, tmp_path / "x", loss, teachers=("t",), **options)
    course = read_parquet(tmp_path / "x/history.parquet")["loss"].to_numpy()
    assert course[-3:].mean() < 0.4 * course[:2].mean()


@pytest.mark.slow
def test_an_encoder_learns_features(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run("bert")
    adapter = adapter_of(run, tmp_path / "adapter")
    settings = logits_settings("features")
    files = [score(run, adapter, tmp_path / f"t/fold_{k}.npy", settings, k) for k in range(3)]
    weights = distil(run, {"t": files}, tmp_path / "x", Loss(features=1), teachers=("t",))
    assert not any("projection" in name for name in weights)


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(
    make_run: Callable[..., Run], teachers: dict[str, list[Path]], tmp_path: Path
) -> None:
    run, loss = make_run("llama"), Loss(features=1, attention=1)
    plain, saved = (
        distil(run, teachers, tmp_path / str(again), loss, Launch(4, gradient_checkpointing=again))
        for again in (False, True)
    )
    assert max(float((plain[name] - saved[name]).abs().max()) for name in plain) < 1e-6


def test_projections_start_from_their_seed_alone() -> None:
    before = torch.get_rng_state()
    one, again, other = (Projections(4, [3, 5], seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    assert not torch.equal(one[0].weight, other[0].weight)
    assert [p.shape for p in one(torch.ones(2, 4))] == [(2, 3), (2, 5)]


# --- interruptions ------------------------------------------------------------------------------------


def test_a_killed_student_goes_on_to_the_same_bytes(
    make_run: Callable[..., Run],
    teachers: dict[str, list[Path]],
    tmp_path: Path,
    at_batch: Callable[..., None],  # noqa: F811
) -> None:
    run, loss = make_run("llama"), Loss(features=1, attention=0.5)
    options: dict[str, Any] = {"epochs": 2, "warmup_steps": 2}
    distil(run, teachers, tmp_path / "whole", loss, **options)
    launch = Launch(4, checkpoints=tmp_path / "kept", checkpoint_minutes=0)
    at_batch(11, interrupt)
    with pytest.raises(BaseException, match="^$"):
        distil(run, teachers, tmp_path / "x", loss, launch, **options)
    at_batch(-1, interrupt)
    latest = checkpoints_of(tmp_path / "kept")[-1]
    assert judge_trainer.PROJECTIONS in (latest / SEAL).read_text()  # damage to it would be seen
    distil(run, teachers, tmp_path / "x", loss, launch, **options)
    assert (tmp_path / "x" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    histories = [read_parquet(tmp_path / name / "history.parquet") for name in ("x", "whole")]
    assert histories[0].equals(histories[1])
    assert not (tmp_path / "x" / judge_trainer.PROJECTIONS).exists()


@pytest.mark.slow
def test_a_checkpoint_of_other_states_is_left_alone(
    make_run: Callable[..., Run],
    teachers: dict[str, list[Path]],
    tmp_path: Path,
    at_batch: Callable[..., None],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, loss = make_run("llama"), Loss(features=1)
    launch = Launch(4, checkpoints=tmp_path / "kept", checkpoint_minutes=0)
    at_batch(5, interrupt)
    with pytest.raises(BaseException, match="^$"):
        distil(run, teachers, tmp_path / "x", loss, launch)
    at_batch(-1, interrupt)
    exchanged = {"one": teachers["two"], "two": teachers["one"]}
    distil(run, exchanged, tmp_path / "x", loss, launch)
    assert "going on" not in capsys.readouterr().out
    assert len(list((tmp_path / "kept").iterdir())) == 2
