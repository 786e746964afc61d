"""Judges learn from their training rows, reproducibly, and never from their validation rows."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from conftest import FAMILIES, Run, make_backbone
from safetensors.torch import load_file, save_file
from transformers import get_cosine_schedule_with_warmup

from arena_distill.battles.folds import training_rows, validation_rows
from arena_distill.battles.votes import votes_of
from arena_distill.config.encoding import Encoding
from arena_distill.config.phases.scoring import LogitsSettings
from arena_distill.config.phases.training import PretrainingSettings, TrainingSettings
from arena_distill.config.training import Lora, Loss, Pretraining, Schedule, Training
from arena_distill.encoding.sequences import Sequences, offsets_of, read_tokens
from arena_distill.encoding.views import encode_views
from arena_distill.errors import InputError
from arena_distill.files.artifacts import read_json, read_parquet
from arena_distill.files.keys import key, locate
from arena_distill.files.logits import write_logits
from arena_distill.models import adapters
from arena_distill.models.adapters import load_adapter, new_judge
from arena_distill.models.heads import battle_logits
from arena_distill.models.loading import load_classifier
from arena_distill.models.scoring import score
from arena_distill.runtime.launch import Launch
from arena_distill.scoring.logits import predict_logits
from arena_distill.training import judge_trainer, trainer
from arena_distill.training.examples import Examples, collator, make_examples, micro_batches
from arena_distill.training.targets import VOTE_LOSS
from arena_distill.training.trainer import pretrain_adapter, train_fold
from arena_distill.verdicts import Votes

LORA = Lora(r=4, alpha=8, dropout=0.0)
ENCODING = Encoding(max_length=96)
OPTIMIZATION: dict[str, Any] = {"lr": 1e-3, "epochs": 1, "batch_size": 8, "warmup_steps": 0}


def training_settings(**changes: Any) -> TrainingSettings:
    optimization = {k: changes.pop(k) for k in list(changes) if k in Training.model_fields}
    whole: dict[str, Any] = {
        "version": 1,
        "encoding": ENCODING,
        "lora": LORA,
        "precision": "fp32",
        "training": Training(**(OPTIMIZATION | optimization)),
        "keep_head": False,
        "loss": VOTE_LOSS,
    }
    return TrainingSettings(**(whole | changes))


def pretraining_settings(**changes: Any) -> PretrainingSettings:
    optimization = {k: changes.pop(k) for k in list(changes) if k in Pretraining.model_fields}
    whole: dict[str, Any] = {
        "version": 1,
        "encoding": ENCODING,
        "lora": LORA,
        "precision": "fp32",
        "pretraining": Pretraining(**(OPTIMIZATION | optimization)),
    }
    return PretrainingSettings(**(whole | changes))


def fit(
    run: Run,
    output: Path,
    fold: int = 0,
    *,
    pretrained: Path | None = None,
    teachers: dict[str, list[Path]] | None = None,
    launch: Launch | None = None,
    **changes: Any,
) -> dict[str, torch.Tensor]:
    train_fold(
        run.backbone,
        pretrained,
        run.tokens,
        run.folds,
        fold,
        output,
        teachers=teachers or {},
        settings=training_settings(**changes),
        launch=launch or Launch(),
    )
    return load_file(next(output.glob("*model.safetensors")))


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture(scope="module")
def llama(make_run: Callable[..., Run]) -> Run:
    return make_run("llama")


GENUINE_FIT = trainer._fit


class Spy:
    """Records the Examples that reach the Trainer, and the initial weights."""

    def __init__(self) -> None:
        self.examples: list[Examples] = []
        self.starts: list[dict[str, torch.Tensor]] = []

    def fit(self, model: Any, examples: Examples, *_: Any) -> None:
        self.examples.append(examples)
        named = model.named_parameters()
        self.starts.append({n: p.detach().clone() for n, p in named if p.requires_grad})


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    spy = Spy()
    monkeypatch.setattr(trainer, "_fit", spy.fit)
    return spy


# --- what reaches the Trainer -----------------------------------------------------------------------


def test_swap_shows_every_row_twice_with_vote_and_targets_exchanged(llama: Run) -> None:
    tokens = read_tokens(llama.tokens).take(np.arange(5))
    votes = Votes.hard(np.array([0, 1, 2, 0, 1]))
    targets = np.random.default_rng(0).normal(size=(5, 2, 2, 3)).astype(np.float32)
    shown = make_examples(tokens, votes, targets, None, training_settings(swap=True))
    assert len(shown) == 10
    assert shown.votes.labels.tolist() == [0, 1, 2, 0, 1, 1, 0, 2, 1, 0]
    assert shown.teachers is not None
    np.testing.assert_array_equal(shown.teachers[:5], targets[:, :, 0])
    np.testing.assert_array_equal(shown.teachers[5:], targets[:, :, 1][..., [1, 0, 2]])
    for row in range(5):
        assert sorted(shown.views[0][row]) == sorted(shown.views[0][row + 5])
    alone = make_examples(tokens, votes, targets, None, training_settings(swap=False))
    assert len(alone) == 5
    np.testing.assert_array_equal(alone.views[0].ids, shown.views[0].take(np.arange(5)).ids)


@pytest.mark.parametrize("method", ["kfold", "stratified", "stratified_group"])
@pytest.mark.parametrize("fold", [0, 1, 2])
def test_a_fold_never_reads_its_validation_rows(
    method: str, fold: int, make_run: Callable[..., Run], spy: Spy, tmp_path: Path
) -> None:
    run = make_run("llama", method)
    fit_spied(run, tmp_path, fold)
    folds, tokens = read_parquet(run.folds), read_tokens(run.tokens)
    (shown,) = spy.examples
    held_out = folds.take(validation_rows(folds, fold))
    mine = folds.take(training_rows(folds, fold))
    if method == "stratified_group":
        assert not set(held_out["group"].to_pylist()) & set(mine["group"].to_pylist())
    expected = make_examples(of_rows(tokens, mine), votes_of(mine), None, None, training_settings())
    np.testing.assert_array_equal(shown.views[0].ids, expected.views[0].ids)
    np.testing.assert_array_equal(shown.votes.probabilities, expected.votes.probabilities)
    hidden = make_examples(
        of_rows(tokens, held_out), votes_of(held_out), None, None, training_settings()
    )
    seen = {ids.tobytes() for ids in shown.views[0]}
    assert not seen & {ids.tobytes() for ids in hidden.views[0]}


def fit_spied(run: Run, output: Path, fold: int = 0, **options: Any) -> None:
    """Train with `_fit` replaced: nothing is written."""
    pretrained = options.pop("pretrained", None)
    train_fold(
        run.backbone, pretrained, run.tokens, run.folds, fold, output,
        teachers=options.pop("teachers", {}), settings=training_settings(**options),
        launch=Launch(),
    )  # fmt: skip


def of_rows(tokens: Any, rows: Any) -> Any:
    return tokens.take(locate(key(rows), tokens.keys(), "tokens"))


def test_post_pretraining_reads_the_ut_battles_and_their_votes(
    llama: Run, spy: Spy, tmp_path: Path
) -> None:
    pretrain_adapter(
        llama.backbone, llama.tokens, tmp_path / "x",
        settings=pretraining_settings(), launch=Launch(),
    )  # fmt: skip
    battles = read_parquet(llama.battles)
    ut = battles.filter(pc.equal(battles["source"], "ut"))
    (shown,) = spy.examples
    expected = make_examples(
        of_rows(read_tokens(llama.tokens), ut), votes_of(ut), None, None, training_settings()
    )
    np.testing.assert_array_equal(shown.views[0].ids, expected.views[0].ids)
    np.testing.assert_array_equal(shown.votes.probabilities, expected.votes.probabilities)


def test_without_ut_battles_post_pretraining_says_so(
    llama: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = read_tokens(llama.tokens)
    train = tokens.take(pc.equal(tokens.sources, "train").to_numpy(zero_copy_only=False))
    monkeypatch.setattr(trainer, "read_tokens", lambda path: train)
    with pytest.raises(InputError, match="no battle to train on"):
        pretrain_adapter(
            llama.backbone, llama.tokens, tmp_path / "x",
            settings=pretraining_settings(), launch=Launch(),
        )  # fmt: skip


# --- where training starts --------------------------------------------------------------------------


def test_all_folds_start_from_the_same_adapter_and_head(run: Run, spy: Spy, tmp_path: Path) -> None:
    for fold in range(3):
        torch.randn(fold + 1)  # what happened before in the process must not matter
        fit_spied(run, tmp_path, fold)
    assert any("score" in name for name in spy.starts[0])
    for other in spy.starts[1:]:
        assert distance(spy.starts[0], other) == 0


def test_another_seed_starts_elsewhere(llama: Run, spy: Spy, tmp_path: Path) -> None:
    fit_spied(llama, tmp_path, seed=1)
    fit_spied(llama, tmp_path, seed=2)
    assert all(
        not torch.equal(spy.starts[0][n], spy.starts[1][n])
        for n in spy.starts[0]
        if "lora_B" not in n
    )


def test_folds_with_starts_of_their_own(llama: Run, spy: Spy, tmp_path: Path) -> None:
    for fold in range(2):
        fit_spied(llama, tmp_path, fold, own_start=True)
    drawn = [n for n in spy.starts[0] if "lora_B" not in n]
    assert drawn
    assert all(not torch.equal(spy.starts[0][n], spy.starts[1][n]) for n in drawn)
    fit_spied(llama, tmp_path, 0)
    assert distance(spy.starts[0], spy.starts[2]) == 0


def test_larger_shares_of_the_battles_hold_the_smaller_ones(
    llama: Run, spy: Spy, tmp_path: Path
) -> None:
    for share in (0.25, 0.5, 1):
        fit_spied(llama, tmp_path, share=share, swap=False)
    quarter, half, whole = ({ids.tobytes() for ids in e.views[0]} for e in spy.examples)
    assert quarter < half < whole
    assert [e.battles for e in spy.examples[:2]] == [
        round(spy.examples[2].battles * share) for share in (0.25, 0.5)
    ]


@pytest.fixture(scope="module")
def pretrained(llama: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("adapters") / "pretrained"
    pretrain_adapter(
        llama.backbone, llama.tokens, output,
        settings=pretraining_settings(lr=0.01), launch=Launch(),
    )  # fmt: skip
    return output


@pytest.mark.parametrize("keep_head", [False, True])
def test_folds_start_from_the_post_pretrained_adapter(
    keep_head: bool, llama: Run, pretrained: Path, spy: Spy, tmp_path: Path
) -> None:
    for fold in range(2):
        fit_spied(llama, tmp_path, fold, pretrained=pretrained, keep_head=keep_head)
    fit_spied(llama, tmp_path)
    first, second, fresh = spy.starts
    assert distance(first, second) == 0
    saved = load_file(pretrained / "adapter_model.safetensors")
    for name, start in first.items():
        if "lora" in name:
            short = name.replace(".default", "")
            torch.testing.assert_close(start, saved[short], rtol=0, atol=0)
    (head,) = (name for name in first if "score" in name)
    kept = saved["base_model.model.score.weight"]
    expected = kept if keep_head else fresh[head]
    torch.testing.assert_close(first[head], expected, rtol=0, atol=0)
    assert not torch.equal(kept, fresh[head])


def test_no_adapter_to_start_from_is_an_error(llama: Run, tmp_path: Path) -> None:
    model = load_classifier(llama.backbone, pad_token_id=3, head_seed=0)
    with pytest.raises(InputError, match="no adapter"):
        load_adapter(model, tmp_path / "missing")


@pytest.mark.parametrize(("family", "layers"), [("llama", 1), ("bert", 2)])
def test_an_adapter_of_another_backbone_is_an_error(
    family: str, layers: int, pretrained: Path, tmp_path: Path
) -> None:
    """PEFT loads the tensors that fit and only warns of the rest: half a judge would go unnoticed."""
    other = load_classifier(make_backbone(family, tmp_path / "other", layers=layers), head_seed=0)
    with pytest.raises(InputError, match="no adapter for this backbone"):
        load_adapter(other, pretrained)


@pytest.mark.parametrize("lost", ["layers.1.self_attn.q_proj.lora_A", "score"])
def test_an_adapter_that_lacks_a_tensor_is_an_error(
    lost: str, llama: Run, pretrained: Path, tmp_path: Path
) -> None:
    shutil.copytree(pretrained, tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if lost not in name}
    save_file(kept, file, {"format": "pt"})
    model = load_classifier(llama.backbone, pad_token_id=3, head_seed=0)
    with pytest.raises(
        InputError, match=f"adapter: no adapter for this backbone: .*{lost}"
    ) as error:
        load_adapter(model, tmp_path / "adapter")
    assert "\n" not in str(error.value)


def test_unknown_lora_targets_are_an_error(llama: Run) -> None:
    with pytest.raises(InputError, match=r"lora\.target_modules"):
        new_judge(load_classifier(llama.backbone, head_seed=0), Lora(target_modules=("q_prok",)), 0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_trained_is_float32(precision: Any, llama: Run) -> None:
    """At 1e-5, steps of AdamW are too small for bfloat16 weights."""
    frozen = torch.bfloat16 if precision == "bf16" else torch.float32
    judge = new_judge(load_classifier(llama.backbone, dtype=frozen, head_seed=0), LORA, 0)
    for name, parameter in judge.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32, name
        elif "original_module" not in name:
            assert parameter.dtype == frozen, name


# --- training itself --------------------------------------------------------------------------------


def test_judges_of_every_family_train_and_are_written_whole(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = fit(run, tmp_path / "fold_0", epochs=2)
    assert "tokens/s" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "fold_0").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "metrics.json"} <= names
    assert "history.parquet" in names
    suffixes = {path.suffix for path in (tmp_path / "fold_0").rglob("*")}
    assert not suffixes & {".bin", ".pt", ".pth", ".pkl", ".pickle"}
    assert {path.name for path in tmp_path.iterdir()} == {"fold_0", "fold_0.tensorboard"}
    targets = read_json(tmp_path / "fold_0" / "adapter_config.json")["target_modules"]
    assert targets == sorted(targets)  # one order, whatever the process
    assert any("score" in name for name in weights)
    assert sum("lora_A" in name for name in weights) == 14  # q, k, v, o, gate, up, down of 2 layers
    metrics = read_json(tmp_path / "fold_0" / "metrics.json")
    assert metrics["steps"] == 2 * -(-metrics["sequences"] // 8)
    assert metrics["steps"] == Schedule(epochs=2, batch_size=8).steps(metrics["sequences"])
    assert metrics["epochs"] == 2
    assert metrics["trainable_parameters"] == sum(w.numel() for w in weights.values())
    assert metrics["provenance"]["phase"] == "training"
    assert metrics["provenance"]["settings"]["fold"] == 0
    history = read_parquet(tmp_path / "fold_0" / "history.parquet")
    assert history["step"].to_pylist() == list(range(1, metrics["steps"] + 1))
    assert np.isfinite(history["loss"].to_numpy()).all()
    assert np.isfinite(history["grad_norm"].to_numpy()).all()


def test_training_lowers_the_loss(llama: Run, tmp_path: Path) -> None:
    fit(llama, tmp_path / "x", epochs=20, lr=0.02, swap=False)
    loss = read_parquet(tmp_path / "x" / "history.parquet")["loss"].to_numpy()
    assert loss[-5:].mean() < 0.5 * loss[:5].mean()


def test_the_same_seed_gives_the_same_bytes(run: Run, tmp_path: Path) -> None:
    for name in ("one", "two"):
        torch.randn(3)
        fit(run, tmp_path / name, lora=Lora(r=4, alpha=8, dropout=0.1))
    one, two = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two")
    )
    assert one == two


@pytest.mark.parametrize("micro", [1, 3])
def test_accumulation_changes_nothing(micro: int, llama: Run, tmp_path: Path) -> None:
    """The mean is over the optimizer step, also in the last, shorter one."""
    folds = read_parquet(llama.folds)
    assert len(training_rows(folds, 0)) * 2 % 8 != 0
    whole = fit(llama, tmp_path / "whole", launch=Launch(micro_batch_size=8))
    parts = fit(llama, tmp_path / "parts", launch=Launch(micro_batch_size=micro))
    assert distance(whole, parts) < 1e-5
    losses = [
        read_parquet(tmp_path / name / "history.parquet")["loss"].to_numpy()
        for name in ("whole", "parts")
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_a_step_descends_the_exact_mean_of_its_battles(llama: Run, tmp_path: Path) -> None:
    """One optimizer step over all battles, compared with plain torch."""
    settings = training_settings(batch_size=1024, epochs=1)
    fit(llama, tmp_path / "x", batch_size=1024, launch=Launch(micro_batch_size=5))
    (reported,) = read_parquet(tmp_path / "x" / "history.parquet")["grad_norm"].to_pylist()
    folds, tokens = read_parquet(llama.folds), read_tokens(llama.tokens)
    mine = folds.take(training_rows(folds, 0))
    shown = make_examples(of_rows(tokens, mine), votes_of(mine), None, None, settings)
    seed = settings.training.seed
    base = load_classifier(llama.backbone, pad_token_id=tokens.vocabulary.pad, head_seed=seed)
    judge = new_judge(base, LORA, seed)
    total = torch.zeros(())
    for ids, label in zip(shown.views[0], shown.votes.labels, strict=True):
        logits = judge(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor([label]))
    (total / len(shown)).backward()
    squares = [p.grad.square().sum() for p in judge.parameters() if p.grad is not None]
    assert float(torch.stack(squares).sum().sqrt()) == pytest.approx(reported, rel=1e-4)


@pytest.mark.parametrize("kind", ["joint", "pointwise"])
def test_micro_batches_of_one_size_in_tokens_give_the_exact_gradients(
    kind: Literal["joint", "pointwise"], llama: Run, tmp_path: Path
) -> None:
    """The battles of a step differ in length 10 times: the short ones share a forward pass."""
    settings = training_settings(batch_size=16, head={"kind": kind})
    rng, sides = np.random.default_rng(0), 1 if kind == "joint" else 2
    lengths = rng.permutation(np.r_[np.full(3, 60), np.full(13, 6)])
    views = tuple(
        Sequences(rng.integers(5, 90, lengths.sum()).astype(np.int32), offsets_of(lengths))
        for _ in range(sides)
    )
    votes = Votes(np.eye(3, dtype=np.float32)[rng.integers(3, size=16)], rng.random(16) + 0.5)
    examples = Examples(views, votes, battles=16)
    base = load_classifier(llama.backbone, head=settings.head, pad_token_id=0, head_seed=0)
    judge = new_judge(base, LORA, 0)
    with torch.no_grad():  # else lora_B is zero, and so are the gradients of lora_A
        for name, p in judge.named_parameters():
            p.add_(0.05 * torch.randn_like(p)) if "lora_B" in name else None
    batch = collator(0)([examples[i] for i in range(16)])
    passes = []
    judge.register_forward_pre_hook(
        lambda _, args, given: passes.append(given["input_ids"].shape), with_kwargs=True
    )
    steps = judge_trainer.JudgeTrainer(
        model=judge,
        args=trainer._arguments(tmp_path, settings.training, "fp32", Launch(report_to="none")),
        train_dataset=examples,
        loss=settings.loss,
        head=settings.head,
        training=settings.training,
        micro_batch_tokens=2 * 60,
    )
    assert steps.args.train_batch_size == 16
    loss = steps.training_step(judge, batch, torch.tensor(16))
    found = {n: p.grad for n, p in judge.named_parameters() if p.grad is not None}
    assert passes == [(2 * sides, 60), (2 * sides, 60), (12 * sides, 6)]
    judge.zero_grad()
    inputs = {name: batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask")}
    logits = battle_logits(judge(**inputs).logits.unflatten(0, (16, sides)), settings.head)
    each = torch.nn.functional.cross_entropy(logits, batch["votes"], reduction="none")
    whole = (each * batch["counts"]).sum() / 16
    whole.backward()
    assert float(loss) == pytest.approx(whole.item(), rel=1e-6)
    assert any("lora_A" in name for name in found)
    for name, p in judge.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, atol=1e-6, rtol=1e-5)


def test_all_processes_make_as_many_micro_batches() -> None:
    """A backbone that is spread over them is gathered for each forward pass of any."""
    mask = torch.ones(6, 1, 4, dtype=torch.int64)
    batch = {"attention_mask": mask, "labels": torch.arange(6)}
    counts = [[len(part["labels"]) for part in micro_batches(batch, 12, least)]
              for least in (lambda n: n, lambda n: n + 2, lambda n: 6)]  # fmt: skip
    assert counts == [[3, 3], [2, 1, 2, 1], [1] * 6]
    parts = micro_batches(batch, 12, lambda n: n + 2)
    assert sorted(torch.cat([part["labels"] for part in parts]).tolist()) == list(range(6))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_nothing(
    family: str, make_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = make_run(family)
    plain = fit(run, tmp_path / "plain")
    saved = fit(run, tmp_path / "saved", launch=Launch(gradient_checkpointing=True))
    assert distance(plain, saved) < 1e-6
    start = new_judge(
        load_classifier(run.backbone, head_seed=0), LORA, training_settings().training.seed
    )
    names = [
        name for name, p in start.named_parameters() if "layers.0" in name and "lora_B" in name
    ]
    for name in names:  # the first layer learns too: gradients reach it
        assert float(saved[name.replace(".default", "")].abs().max()) > 0


def test_the_backbone_stays_as_it_is(
    llama: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judges = []
    original = adapters.new_judge

    def keep(*args: Any) -> Any:
        judges.append(original(*args))
        return judges[-1]

    before = (llama.backbone / "model.safetensors").read_bytes()
    monkeypatch.setattr(adapters, "new_judge", keep)
    fit(llama, tmp_path / "x", epochs=2, lr=0.05)
    assert (llama.backbone / "model.safetensors").read_bytes() == before
    seed = training_settings().training.seed
    start = original(load_classifier(llama.backbone, head_seed=seed), LORA, seed)
    after = dict(judges[0].named_parameters())
    moved = {n for n, p in start.named_parameters() if not torch.equal(p, after[n])}
    assert moved == {n for n, p in after.items() if p.requires_grad}


def test_a_loss_that_is_not_a_number_is_an_error(
    llama: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = judge_trainer.battle_losses
    calls = []

    def broken(*args: Any) -> torch.Tensor:
        calls.append(1)
        return original(*args) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(judge_trainer, "battle_losses", broken)
    with pytest.raises(InputError, match="lower the learning rate"):
        fit(llama, tmp_path / "x", epochs=50)
    assert not (tmp_path / "x").exists()
    assert len(calls) < 20  # reported while it happens, not days later


def test_half_precision_learns_like_full_precision(run: Run, tmp_path: Path) -> None:
    half = fit(run, tmp_path / "half", precision="bf16", epochs=2)
    full = fit(run, tmp_path / "full", precision="fp32", epochs=2)
    assert all(weight.dtype == torch.float32 for weight in half.values())
    moved = torch.cat([w.flatten() for n, w in full.items() if "lora_B" in n])
    other = torch.cat([w.flatten() for n, w in half.items() if "lora_B" in n])
    assert float(torch.nn.functional.cosine_similarity(moved, other, dim=0)) > 0.8


def test_half_precision_does_not_round_logits(run: Run) -> None:
    """Under autocast the head is outside: in bfloat16 logits would have three digits."""
    read = read_tokens(run.tokens)
    model = load_classifier(
        run.backbone, precision="bf16", pad_token_id=read.vocabulary.pad, head_seed=0
    )
    views = encode_views(read, ENCODING, training_settings().head)
    for judge in (model, new_judge(model, LORA, 0)):
        found = torch.from_numpy(score(judge, views[0], batch_tokens=2048, progress=False))
        assert found.dtype == torch.float32
        assert (found != found.bfloat16().float()).float().mean() > 0.9


def test_too_many_devices_for_a_batch_are_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(trainer.TrainingArguments, "world_size", property(lambda self: 3))
    with pytest.raises(InputError, match="batch_size 8 cannot be shared by 3 devices"):
        trainer._arguments(tmp_path, training_settings().training, "fp32", Launch())


@pytest.mark.parametrize(
    ("battles", "given", "steps"), [(160, None, 1), (46_000, None, 144), (160, 3, 3), (160, 0, 0)]
)
def test_the_learning_rate_reaches_its_peak(
    battles: int, given: int | None, steps: int, tmp_path: Path
) -> None:
    """By default also where battles are few: 100 steps of warm-up would end 10 steps at a tenth of it."""
    optimization = Training(warmup_steps=given)
    arguments = trainer._arguments(tmp_path, optimization, "fp32", Launch())
    total = optimization.steps(2 * battles)
    assert arguments.get_warmup_steps(total) == steps < total


# --- all weights ------------------------------------------------------------------------------------


def test_all_weights_learn_what_a_plain_loop_learns(llama: Run, tmp_path: Path) -> None:
    """Three steps of AdamW over all battles: every tensor moves, and as in plain torch."""
    how = {"lora": None, "batch_size": 1024, "epochs": 3, "lr": 1e-2, "weight_decay": 0.1}
    found = fit(llama, tmp_path / "x", launch=Launch(micro_batch_size=5), **how)
    settings = training_settings(**how)
    folds, tokens = read_parquet(llama.folds), read_tokens(llama.tokens)
    mine = folds.take(training_rows(folds, 0))
    shown = make_examples(of_rows(tokens, mine), votes_of(mine), None, None, settings)
    judge: Any = load_classifier(
        llama.backbone, pad_token_id=tokens.vocabulary.pad, head_seed=settings.training.seed
    )
    start = {name: p.detach().clone() for name, p in judge.named_parameters()}
    plain = [p for name, p in judge.named_parameters() if "norm" in name]
    decayed = [p for name, p in judge.named_parameters() if "norm" not in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=settings.training.betas)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, 3)
    judge.train()
    for _ in range(3):
        total = torch.zeros(())
        for ids, label in zip(shown.views[0], shown.votes.labels, strict=True):
            logits = judge(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits
            total = total + torch.nn.functional.cross_entropy(logits, torch.tensor([label]))
        (total / len(shown)).backward()
        torch.nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    expected = {name: p.detach() for name, p in judge.named_parameters()}
    assert distance(found, expected) < 1e-4
    assert all(not torch.equal(found[name], before) for name, before in start.items())
    assert min(float((expected[n] - b).abs().max()) for n, b in start.items()) > 1e-2
    metrics = read_json(tmp_path / "x/metrics.json")
    assert (
        metrics["trainable_parameters"]
        == metrics["parameters"]
        == sum(map(torch.numel, start.values()))
    )
    assert set(metrics["sha256"]) == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_weights_are_held_and_kept_in_float32(
    precision: Literal["fp32", "bf16"], run: Run, tmp_path: Path
) -> None:
    """Steps of 1e-6 are lost on a weight in bfloat16; in any precision the folds' scores are finite."""
    weights = fit(run, tmp_path / "fold_0", lora=None, precision=precision, lr=1e-6)
    assert {w.dtype for w in weights.values()} == {torch.float32}
    start = load_classifier(run.backbone, head_seed=training_settings().training.seed)
    assert weights.keys() == dict(start.named_parameters()).keys()
    for name, weight in start.named_parameters():
        assert 0 < float((weights[name] - weight.detach()).abs().max()) < 1e-4, name
    settings = LogitsSettings(
        version=1, encoding=ENCODING, precision=precision, rows=("validation",)
    )
    predict_logits(
        run.backbone, tmp_path / "fold_0", run.tokens, run.folds, 0, tmp_path / "x.npy",
        settings=settings, batch_tokens=512,
    )  # fmt: skip
    model = load_classifier(
        tmp_path / "fold_0",
        precision=precision,
        pad_token_id=read_tokens(run.tokens).vocabulary.pad,
    )
    folds, tokens = read_parquet(run.folds), read_tokens(run.tokens)
    read = of_rows(tokens, folds.take(validation_rows(folds, 0)))
    (view, _) = encode_views(read, ENCODING, training_settings().head)
    np.testing.assert_allclose(
        np.load(tmp_path / "x.npy")[:, 0], score(model, view, batch_tokens=512), atol=1e-2
    )


def test_float32_weights_are_read_in_half_precision_where_they_train_in_it(llama: Run) -> None:
    """A head is fitted to features as the training computes them; flash attention has no other way."""
    read = read_tokens(llama.tokens)
    views = encode_views(read, ENCODING, training_settings().head)
    how: dict[str, Any] = {"pad_token_id": read.vocabulary.pad, "head_seed": 0}
    half = load_classifier(llama.backbone, precision="bf16", dtype=torch.float32, **how)
    full = load_classifier(llama.backbone, precision="fp32", **how)
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    one, other = (score(m, views[0], batch_tokens=2048, progress=False) for m in (half, full))
    assert 1e-6 < np.abs(one - other).max() < 0.1 * np.abs(other).max()


@pytest.mark.parametrize("keep_head", [False, True])
def test_folds_start_from_all_post_pretrained_weights(
    keep_head: bool, llama: Run, spy: Spy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_fit", GENUINE_FIT)
        pretrain_adapter(
            llama.backbone, llama.tokens, tmp_path / "pretrained",
            settings=pretraining_settings(lora=None, lr=0.01), launch=Launch(),
        )  # fmt: skip
    how: dict[str, Any] = {"lora": None, "pretrained": tmp_path / "pretrained"}
    for fold in range(2):
        fit_spied(llama, tmp_path, fold, **how, keep_head=keep_head)
    fit_spied(llama, tmp_path, lora=None)
    first, second, fresh = spy.starts
    saved = load_file(tmp_path / "pretrained/model.safetensors")
    assert distance(first, second) == 0
    head = "score.weight"
    expected = saved if keep_head else saved | {head: fresh[head]}
    assert distance(first, expected) == 0
    assert min(float((saved[name] - fresh[name]).abs().max()) for name in saved) > 1e-3


# --- students ---------------------------------------------------------------------------------------


def test_a_student_follows_its_teachers(llama: Run, tmp_path: Path) -> None:
    """Teachers always predict a tie: the student follows them, not the votes."""
    folds = read_parquet(llama.folds)
    files = []
    for fold in range(3):
        extra = np.flatnonzero(pc.equal(folds["source"], "extra").to_numpy(zero_copy_only=False))
        rows = np.union1d(validation_rows(folds, fold), extra)
        flags = np.isin(rows, validation_rows(folds, fold))
        ids = folds.select(["id", "source"]).take(rows).append_column("validation", [flags])
        logits = np.tile(np.array([0, 0, 9], np.float32), (len(rows), 2, 1))
        files.append(tmp_path / "logits" / f"fold_{fold}.npy")
        write_logits(files[-1], logits, ids, {})
    loss = Loss(ce=0, kl=1, temperature=1)
    student = {"teachers": ("t",), "targets": "out_of_fold"}
    options = {"epochs": 20, "lr": 0.02, "swap": False}
    train_fold(
        llama.backbone, None, llama.tokens, llama.folds, 0, tmp_path / "fold_0",
        teachers={"t": files}, settings=training_settings(**student, loss=loss, **options),
        launch=Launch(),
    )  # fmt: skip
    metrics = read_json(tmp_path / "fold_0" / "metrics.json")
    assert metrics["provenance"]["phase"] == "distillation"
    predict_logits(
        llama.backbone, tmp_path / "fold_0", llama.tokens, llama.folds, 0, tmp_path / "x.npy",
        settings=LogitsSettings(
            version=1, encoding=ENCODING, precision="fp32", rows=("validation",)
        ),
        batch_tokens=512,
    )  # fmt: skip
    assert (np.load(tmp_path / "x.npy")[:, 0].argmax(-1) == 2).mean() > 0.8


# --- other architectures ----------------------------------------------------------------------------


def test_an_encoder_can_be_a_judge(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run("bert")
    weights = fit(run, tmp_path / "fold_0")
    heads = sorted(name for name in weights if "classifier" in name)
    assert [name.rsplit(".", 1)[1] for name in heads] == ["bias", "weight"]
    assert not any("lora" in name for name in heads)
    assert any("attention" in name and "lora_A" in name for name in weights)
    predict_logits(
        run.backbone, tmp_path / "fold_0", run.tokens, run.folds, 0, tmp_path / "x.npy",
        settings=LogitsSettings(
            version=1, encoding=ENCODING, precision="fp32", rows=("validation",)
        ),
        batch_tokens=512,
    )  # fmt: skip
    assert np.load(tmp_path / "x.npy").shape[1:] == (2, 3)
