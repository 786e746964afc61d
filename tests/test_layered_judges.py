"""Judges trained below a head on several layers: they start as frozen ones do, and keep that head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run
from safetensors.torch import load_file
from test_training import LORA, training_settings

from arena_distill.battles.folds import validation_rows
from arena_distill.config.encoding import Encoding
from arena_distill.config.head import Head
from arena_distill.config.phases.deployment import MergeSettings
from arena_distill.config.phases.scoring import LogitsSettings
from arena_distill.config.phases.training import PretrainingSettings
from arena_distill.config.run import load
from arena_distill.config.training import Lora, Pretraining
from arena_distill.deployment.fold_weights import FoldMerger
from arena_distill.deployment.merging import merge_folds
from arena_distill.encoding.sequences import Sequences, offsets_of, read_tokens
from arena_distill.encoding.views import encode_views
from arena_distill.errors import InputError
from arena_distill.files.artifacts import read_json, read_parquet
from arena_distill.files.keys import key, locate
from arena_distill.files.logits import read_logits
from arena_distill.models.heads import verdicts
from arena_distill.models.layer_reads import blocks
from arena_distill.models.loading import load_classifier
from arena_distill.models.scoring import score
from arena_distill.runtime.launch import Launch
from arena_distill.scoring.logits import predict_logits
from arena_distill.training import probe
from arena_distill.training.trainer import pretrain_adapter, train_fold

HEAD = Head(kind="pointwise", pooling="layers")
ENCODING = Encoding(template="markers", max_length=96)
WEIGHT = "score.linear.weight"
BOTH = pytest.mark.parametrize("lora", [LORA, None])


@pytest.fixture(autouse=True)
def weak_ridges(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few made-up battles would choose strong ones, and hardly read anything."""
    monkeypatch.setattr(probe, "ALONE", (0.1, 0.01))


def trained(
    run: Run, folder: Path, fold: int = 0, start: Path | None = None, **changes: Any
) -> Path:
    settings = training_settings(head=HEAD, encoding=ENCODING, fit_head=True, **changes)
    train_fold(run.backbone, start, run.tokens, run.folds, fold, folder / f"fold_{fold}",
               teachers={}, settings=settings, launch=Launch())  # fmt: skip
    return folder / f"fold_{fold}"


def weights_of(fold: Path) -> dict[str, torch.Tensor]:
    """By name as in the classifier."""
    (file,) = fold.glob("*model.safetensors")
    return {name.removeprefix("base_model.model."): w for name, w in load_file(file).items()}


def logits_of(run: Run, adapter: Path, fold: int) -> np.ndarray:
    settings = LogitsSettings(
        version=1, encoding=ENCODING, head=HEAD, precision="fp32", rows=("validation",)
    )
    output = adapter.parent / f"logits_{fold}.npy"
    predict_logits(run.backbone, adapter, run.tokens, run.folds, fold, output,
                   settings=settings, batch_tokens=500)  # fmt: skip
    return read_logits(output)[0]


def merge(average: str = "products") -> MergeSettings:
    return MergeSettings(
        version=1, judge="x", encoding=ENCODING, head=HEAD, precision="fp32", average=average,
        heads="average", weights="equal",
    )  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_the_adapter_is_trained_below_a_head_that_stays(
    make_run: Any, tmp_path: Path, family: str
) -> None:
    run = make_run(family)
    still, moved = (
        trained(run, tmp_path / name, epochs=4, lr=lr) for name, lr in (("a", 1e-12), ("b", 2e-3))
    )
    start, end = weights_of(still), weights_of(moved)
    torch.testing.assert_close(end[WEIGHT], start[WEIGHT])
    assert start[WEIGHT].abs().max() > 0
    depth = max(layer for layer, _ in read_json(still / "metrics.json")["reads"])
    adapted = {name for name in end if ".lora_B." in name}
    assert adapted
    assert all(end[name].abs().max() > 0 for name in adapted), "each layer that is kept is trained"
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in adapted} == set(range(depth))
    last = [
        np.mean(read_parquet(folder / "history.parquet")["loss"][-2:]) for folder in (still, moved)
    ]
    assert last[1] < last[0]
    assert np.abs(logits_of(run, still, 0) - logits_of(run, moved, 0)).max() > 0.01


@BOTH
def test_the_merged_judge_is_cut_and_says_what_its_folds_say(
    lora: Lora | None, make_run: Any, tmp_path: Path
) -> None:
    """Of folds that are alike: then any mean of what is trained is theirs, and only heads differ."""
    run = make_run("llama")
    folds = [trained(run, tmp_path, fold, lr=1e-12, lora=lora) for fold in range(3)]
    merge_folds(run.backbone, folds, tmp_path / "merged", settings=merge())
    model: Any = load_classifier(tmp_path / "merged", head=HEAD)
    assert len(blocks(model)) == max(layer for layer, _ in model.config.head_reads)
    heads = [weights_of(folder)[WEIGHT] for folder in folds]
    torch.testing.assert_close(model.score.linear.weight.detach(), torch.stack(heads).mean(0))
    table, tokens = read_parquet(run.folds), read_tokens(run.tokens)
    rows = table.take(validation_rows(table, 1))
    tokens = tokens.take(locate(key(rows), tokens.keys(), "tokens"))
    alone = load_classifier(run.backbone, head=HEAD, head_seed=0)
    assert len(blocks(alone)) >= len(blocks(model))
    pot = FoldMerger(run.backbone, folds, tokens, merge(), 500)
    one, _ = pot.logits([0, 1, 0])
    np.testing.assert_allclose(one, logits_of(run, folds[1], 1), atol=2e-5)
    together, _ = pot.logits([1 / 3] * 3)
    views = encode_views(tokens, ENCODING, HEAD)
    said = np.stack([score(model, view, batch_tokens=700) for view in views], axis=1)
    np.testing.assert_allclose(verdicts(said, HEAD), together, atol=2e-5)


@BOTH
def test_folds_go_on_from_a_pretrained_one(
    lora: Lora | None, make_run: Any, tmp_path: Path
) -> None:
    """Post-pretraining fits a head to UT's votes; then each fold fits its own, on what it reads now."""
    run = make_run("llama")
    settings = PretrainingSettings(
        version=1, encoding=ENCODING, head=HEAD, lora=lora, precision="fp32",
        pretraining=Pretraining(lr=1e-2, batch_size=8),
    )  # fmt: skip
    pretrain_adapter(run.backbone, run.tokens, tmp_path / "ut", settings=settings, launch=Launch())
    fold = trained(run, tmp_path, start=tmp_path / "ut", lr=1e-12, lora=lora)
    before, after = weights_of(tmp_path / "ut"), weights_of(fold)
    for name, weight in before.items():
        same = torch.allclose(weight, after[name], atol=1e-6)
        assert same == ("score" not in name), name
    assert np.isfinite(logits_of(run, fold, 0)).all()


def test_equal_rows_have_one_number() -> None:
    rows = [[1, 2], [1], [], [1, 2], [2, 1], [], [1, 2, 1]]
    lengths = np.array([len(row) for row in rows])
    sequences = Sequences(np.array(sum(rows, []), np.int32), offsets_of(lengths))
    numbers = sequences.alike()
    assert (numbers[:, None] == numbers).tolist() == [[a == b for b in rows] for a in rows]
    assert sequences.take(np.array([3, 0])).alike().tolist() == [0, 0]


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"head": {"kind": "joint", "pooling": "layers"}}, "head.kind: pointwise"),
        ({"training": {"fit_head": False}}, "training.fit_head: true"),
        ({"merge": {"heads": "first"}}, "merge.heads: average"),
        ({"compute": {"fsdp": True, "gpus": 2}}, "compute.fsdp: false"),
    ],
)
def test_what_a_fitted_head_needs_is_said(changes: dict[str, Any], missing: str) -> None:
    judge = {
        "backbone": {"tiny": "llama"},
        "head": {"kind": "pointwise", "pooling": "layers"},
        "training": {"fit_head": True},
        "merge": {"heads": "average"},
        **changes,
    }
    with pytest.raises(InputError, match=f"head.pooling: layers.*{missing}"):
        load({"data": {"arena": {}}, "judges": {"a": judge}, "final": "a"})
