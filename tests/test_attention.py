"""The attention kernel with which a model is loaded, and the devices of its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, Run, make_config

from arena_distill.config.run import load
from arena_distill.encoding.sequences import read_tokens
from arena_distill.encoding.views import encode_views
from arena_distill.errors import InputError
from arena_distill.models.loading import choose_attention, load_classifier, placement
from arena_distill.models.scoring import score
from arena_distill.runtime.launch import CPU_ALLOWED


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine that seems to have GPUs."""

    def pretend(capability: tuple[int, int] = (8, 0), flash: str = "2.8.3", count: int = 1) -> None:
        def newer(version: str) -> bool:
            return [int(n) for n in flash.split(".")] >= [int(n) for n in version.split(".")]

        monkeypatch.setattr("transformers.utils.is_flash_attn_greater_or_equal", newer)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")

    return pretend


def config(family: str) -> Any:
    return make_config(family, 300)


# --- attention ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_uses_flash_attention_where_it_can(family: str, gpus: Callable[..., None]) -> None:
    gpus()
    assert choose_attention(config(family), "auto", torch.bfloat16) == "flash_attention_2"


@pytest.mark.parametrize(
    ("machine", "dtype"),
    [
        (None, torch.bfloat16),
        ({"capability": (7, 5)}, torch.bfloat16),
        ({"flash": "0.0"}, torch.bfloat16),
        ({}, torch.float32),
        ({"flash": "2.5.9"}, torch.bfloat16),
    ],
    ids=["no GPU", "old GPU", "no package", "fp32", "package without soft-capping"],
)
def test_auto_lets_transformers_choose_elsewhere(
    machine: dict[str, Any] | None, dtype: torch.dtype, gpus: Callable[..., None]
) -> None:
    if machine is not None:
        gpus(**machine)
    assert choose_attention(config("gemma2"), "auto", dtype) is None


def test_the_default_of_transformers_soft_caps(run: Run, family: str) -> None:
    model = load_classifier(run.backbone, precision="fp32", attention="auto", head_seed=0)
    expected = "eager" if family == "gemma2" else "sdpa"
    assert model.config._attn_implementation == expected


@pytest.mark.parametrize(
    ("machine", "wanted", "message"),
    [
        (None, "flash_attention_2", "needs a GPU"),
        (None, "flex_attention", "needs a GPU"),
        ({"flash": "0.0"}, "flash_attention_2", "flash-attn 2.6.0 or newer is not installed"),
        ({"capability": (7, 5)}, "flash_attention_2", "Some GPU is older than Ampere"),
        (None, "sdpa", "transformers has none for gemma2"),
    ],
)
def test_a_missing_kernel_is_an_error_of_one_line(
    machine: dict[str, Any] | None, wanted: Any, message: str, gpus: Callable[..., None]
) -> None:
    if machine is not None:
        gpus(**machine)
    with pytest.raises(InputError, match=message) as error:
        choose_attention(config("gemma2"), wanted, torch.bfloat16)
    assert str(error.value).startswith("config: compute.attention: ")
    assert "\n" not in str(error.value)


def test_flash_attention_is_for_half_precision(gpus: Callable[..., None]) -> None:
    gpus()
    with pytest.raises(InputError, match="needs half precision"):
        choose_attention(config("llama"), "flash_attention_2", torch.float32)


def test_short_sequences_have_the_flex_kernel_of_long_ones(
    gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's kernel for generation refuses more than 128 queries of a key (100 tokens, 2 heads)."""
    from transformers import AttentionInterface
    from transformers.integrations import flex_attention

    gpus()
    monkeypatch.setattr(AttentionInterface, "_global_mapping", {})
    assert choose_attention(config("llama"), "flex_attention", torch.bfloat16) == "flex_attention"
    asked: list[Any] = []

    def attend(query: Any, key: Any, value: Any, *, kernel_options: Any, **_: Any) -> Any:
        asked.append(kernel_options)
        return query

    monkeypatch.setattr(flex_attention, "compile_friendly_flex_attention", attend)
    query, key = torch.zeros(1, 4, 100, 16), torch.zeros(1, 2, 100, 16)
    AttentionInterface()["flex_attention"](torch.nn.Module(), query, key, key, None)
    assert asked == [{"BACKEND": "TRITON"}]


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_kernels_agree(kernel: Any, make_run: Callable[..., Run]) -> None:
    run = make_run("llama")
    tokens = read_tokens(run.tokens)
    settings = load(
        {"data": {"arena": {}}, "judges": {"j": {"backbone": {"tiny": "llama"}}}, "final": "j"}
    )
    judge = settings.judges["j"]
    sequences = encode_views(tokens, judge.encoding, judge.head)[0]
    options: Any = {"precision": "fp32", "pad_token_id": tokens.vocabulary.pad}
    model = load_classifier(run.backbone, attention=kernel, **options, head_seed=0)
    assert model.config._attn_implementation == kernel
    expected = score(
        load_classifier(run.backbone, **options, head_seed=0), sequences, batch_tokens=512
    )
    torch.testing.assert_close(
        torch.from_numpy(score(model, sequences, batch_tokens=512)), torch.from_numpy(expected)
    )


# --- where weights go -----------------------------------------------------------------------------------


def test_weights_go_where_the_process_computes(
    monkeypatch: pytest.MonkeyPatch, gpus: Callable[..., None]
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert placement() is None
    gpus(count=1)
    assert placement() == {"": 0}
    gpus(count=4)
    assert placement() == "auto"  # one process, several GPUs: they share the layers
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert placement() == {"": 3}
    monkeypatch.setenv(CPU_ALLOWED, "true")
    assert placement() is None


def test_a_judge_spread_over_devices_has_the_same_logits(run: Run, tmp_path: Path) -> None:
    """Layers on several devices: here the CPU and, of the last layer, the disk."""
    tokens = read_tokens(run.tokens)
    judge = load(
        {"data": {"arena": {}}, "judges": {"j": {"backbone": {"tiny": "llama"}}}, "final": "j"}
    )
    encoding, head = judge.judges["j"].encoding, judge.judges["j"].head
    sequences = encode_views(tokens, encoding, head)[0]
    options: Any = {"precision": "fp32", "pad_token_id": tokens.vocabulary.pad, "head_seed": 4}
    whole = load_classifier(run.backbone, **options)
    whole.save_pretrained(tmp_path / "judge")
    places: dict[str, Any] = {name: "cpu" for name, _ in whole.model.named_children()}
    places = {f"model.{name}": place for name, place in places.items() if name != "layers"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "score": "cpu"}
    spread = load_classifier(tmp_path / "judge", device_map=places, **options)
    assert set(spread.hf_device_map.values()) == {"cpu", "disk"}
    expected = score(whole, sequences, batch_tokens=512)
    torch.testing.assert_close(
        torch.from_numpy(score(spread, sequences, batch_tokens=512)), torch.from_numpy(expected)
    )
    assert not torch.equal(torch.from_numpy(expected[0]), torch.from_numpy(expected[1]))


@pytest.mark.parametrize(
    ("judge", "expected"),
    [
        ({}, 0),
        ({"compute": {"gpus": 8}}, 1),
        ({"compute": {"gpus": 8}, "logits": {"gpus": 4}}, 4),
        ({"compute": {"gpus": 8, "fsdp": True}}, 8),
        ({"compute": {"gpus": 8, "fsdp": True}, "logits": {"gpus": 2}}, 2),
    ],
)
def test_a_scoring_job_takes_the_gpus_it_can_use(judge: dict[str, Any], expected: int) -> None:
    raw = {"data": {"arena": {}}, "judges": {"j": {"backbone": {"tiny": "llama"}, **judge}}}
    assert load(raw | {"final": "j"}).judges["j"].scoring_gpus() == expected
