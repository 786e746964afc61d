"""QLoRA: adapters over a frozen 4-bit backbone learn as over the same weights unpacked.

bitsandbytes is no part of the environment that runs the other tests, as PEFT would import it in each of
their jobs: these run in a process of their own that finds it in .venv/qlora, where `make setup` puts it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, Run
from test_training import LORA, fit, training_settings

from arena_distill.config.encoding import Encoding
from arena_distill.config.phases.deployment import MergeSettings
from arena_distill.config.phases.prediction import ScoringSettings
from arena_distill.config.phases.scoring import LogitsSettings
from arena_distill.config.run import load
from arena_distill.deployment.merging import merge_folds
from arena_distill.encoding.sequences import read_tokens
from arena_distill.errors import InputError
from arena_distill.files.artifacts import read_json
from arena_distill.files.logits import read_logits
from arena_distill.models.adapters import load_adapter, new_judge
from arena_distill.models.loading import load_classifier
from arena_distill.runtime.launch import Launch
from arena_distill.scoring.logits import predict_logits

QLORA = Path(os.environ.get("ARENA_QLORA", ROOT / ".venv/qlora"))
HERE = importlib.util.find_spec("bitsandbytes") is not None

needs_bitsandbytes = pytest.mark.skipif(not HERE, reason="bitsandbytes is not installed here")


@pytest.mark.slow
@pytest.mark.skipif(HERE, reason="these tests run here")
@pytest.mark.skipif(not QLORA.is_dir(), reason=f"no bitsandbytes in {QLORA} (make setup)")
def test_all_of_this_where_bitsandbytes_is() -> None:
    path = os.pathsep.join([str(QLORA), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        __file__,
    ]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]


# --- the configuration ------------------------------------------------------------------------------


def config(**judge: Any) -> dict[str, Any]:
    data = {"train": "t.csv", "test": "t.csv"}
    return {"data": data, "judges": {"j": {"backbone": {"path": "m"}, **judge}}, "final": "j"}


def test_what_is_merged_and_deployed_is_dense() -> None:
    loaded = load(config(precision="nf4"))
    assert LogitsSettings.of(loaded, "j").precision == "nf4"
    assert MergeSettings.of(loaded, "j").precision == "bf16"
    assert ScoringSettings.of(loaded, "j").precision == "bf16"


def test_nf4_is_not_spread_over_gpus() -> None:
    with pytest.raises(InputError, match=r"judges\.\S+: precision: nf4 and lora: null exclude"):
        load(config(precision="nf4", lora=None))
    with pytest.raises(InputError, match=r"nf4 and compute\.fsdp: true exclude each other"):
        load(config(precision="nf4", compute={"gpus": 2, "fsdp": True}))


@pytest.mark.skipif(HERE, reason="bitsandbytes is installed here")
def test_without_bitsandbytes_one_line_says_so(make_run: Callable[..., Run]) -> None:
    with pytest.raises(InputError, match=r"needs bitsandbytes.*pip install") as error:
        load_classifier(make_run("llama").backbone, precision="nf4", head_seed=0)
    assert "\n" not in str(error.value)


# --- the weights --------------------------------------------------------------------------------------


def packed(model: Any) -> dict[str, Any]:
    import bitsandbytes as bnb

    return {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}


@pytest.fixture
def unpacked(run: Run) -> Callable[[Any], Any]:
    """A dense copy of a judge in NF4, with the values of its 4-bit weights."""

    def twin(model: Any) -> Any:
        from bitsandbytes.functional import dequantize_4bit

        dense: Any = load_classifier(run.backbone, precision="bf16", pad_token_id=0, head_seed=0)
        layers = dict(dense.named_modules())
        for name, layer in packed(model).items():
            weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            layers[name].weight.data = weight.to(torch.bfloat16)
        return dense

    return twin


@needs_bitsandbytes
def test_all_but_embeddings_norms_and_head_have_four_bits(run: Run) -> None:
    model = load_classifier(run.backbone, precision="nf4", head_seed=3)
    dense = load_classifier(run.backbone, precision="bf16", head_seed=3)
    linear = {n for n, m in dense.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(packed(model)) == linear - {"score"}
    for layer in packed(model).values():
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.weight.quant_state.nested  # double quantisation
        assert layer.compute_dtype == torch.bfloat16
    assert torch.equal(model.score.weight, dense.score.weight)
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16


def gradients(judge: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a loss for adapter and head, after an evaluation, which once broke them."""
    judge.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        judge(input_ids=ids)
    judge.train()
    judge.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        logits = judge(input_ids=ids).logits
    torch.nn.functional.cross_entropy(logits.float(), torch.tensor([0, 1, 2, 0])).backward()
    return {
        n.replace(".base_layer", ""): p.grad.clone()
        for n, p in judge.named_parameters()
        if p.grad is not None
    }


@needs_bitsandbytes
def test_gradients_after_an_evaluation_are_those_over_the_unpacked_weights(
    run: Run, unpacked: Callable[[Any], Any]
) -> None:
    packed_base = load_classifier(run.backbone, precision="nf4", pad_token_id=0, head_seed=0)
    dense = new_judge(unpacked(packed_base), LORA, 0)
    judge = new_judge(packed_base, LORA, 0)
    for one in (dense, judge):  # LoRA's B starts at zero, and so would the gradients of A
        for name, weight in one.named_parameters():
            if "lora_B" in name:
                noise = torch.Generator().manual_seed(len(name))
                weight.data.normal_(std=0.1, generator=noise)
    ids = torch.randint(5, 200, (4, 24), generator=torch.Generator().manual_seed(1))
    mine, expected = gradients(judge, ids), gradients(dense, ids)
    assert mine.keys() == expected.keys()
    assert all(g.dtype == torch.float32 for g in mine.values())
    for name, gradient in expected.items():
        if gradient.norm() > 1e-6:
            likeness = torch.cosine_similarity(mine[name].flatten(), gradient.flatten(), dim=0)
            assert likeness > 0.99, (name, float(likeness))


# --- the phases ---------------------------------------------------------------------------------------


@needs_bitsandbytes
def test_a_fold_learns_scores_and_is_merged_into_the_dense_backbone(
    run: Run, tmp_path: Path
) -> None:
    weights = fit(run, tmp_path / "fold_0", precision="nf4", epochs=2)
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    metrics = read_json(tmp_path / "fold_0/metrics.json")
    dense = sum(p.numel() for p in load_classifier(run.backbone, head_seed=0).parameters())
    assert metrics["parameters"] - metrics["trainable_parameters"] == dense

    predict_logits(
        run.backbone,
        tmp_path / "fold_0",
        run.tokens,
        run.folds,
        0,
        tmp_path / "fold_0.npy",
        settings=LogitsSettings(
            version=1, encoding=Encoding(max_length=96), precision="nf4", rows=("validation",)
        ),
        batch_tokens=512,
    )
    logits, _ = read_logits(tmp_path / "fold_0.npy")
    assert np.isfinite(logits).all()

    merge_folds(
        run.backbone,
        [tmp_path / "fold_0"],
        tmp_path / "merged",
        settings=MergeSettings(
            version=1,
            judge="j",
            encoding=Encoding(),
            precision="bf16",
            average="products",
            heads="average",
        ),
    )
    pad = read_tokens(run.tokens).vocabulary.pad
    merged = load_classifier(tmp_path / "merged", pad_token_id=pad)
    backbone = load_classifier(run.backbone, dtype=torch.float32, pad_token_id=pad, head_seed=0)
    judge: Any = load_adapter(backbone, tmp_path / "fold_0").merge_and_unload()
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, judge.state_dict()[name], rtol=0.01, atol=0.01)
    assert not packed(merged)


@needs_bitsandbytes
def test_recomputed_activations_change_nothing(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = make_run("llama")
    plain = fit(run, tmp_path / "a", precision="nf4")
    again = fit(run, tmp_path / "b", precision="nf4", launch=Launch(8, gradient_checkpointing=True))
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value)


def test_training_settings_take_nf4() -> None:
    assert training_settings(precision="nf4").precision == "nf4"
