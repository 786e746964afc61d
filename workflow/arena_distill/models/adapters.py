"""Add adapters and heads to a backbone: fresh ones or trained ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from transformers import set_seed

from arena_distill.config.judge import Lora
from arena_distill.config.model_files import ModelFolder
from arena_distill.errors import InputError, refusing
from arena_distill.files.artifacts import REBUILD, check_made_from, file_sha256, read_json
from arena_distill.models.layer_reads import LayerHead, attach_head_of
from arena_distill.models.loading import HEADS


def new_judge(model: torch.nn.Module, lora: Lora, seed: int) -> PeftModel:
    """Add a fresh adapter to a backbone with a fresh head; the seed determines both."""
    _float32_weights(model)
    set_seed(seed)
    modules = lora.target_modules
    layered = isinstance(getattr(model, "score", None), LayerHead)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,  # the head is trained too, and saved with the adapter
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=modules if isinstance(modules, str) else list(modules),
        exclude_modules=r"score\..*"
        if layered
        else None,  # PEFT only looks for a head that is a layer
    )
    try:
        return _head_stays(get_peft_model(model, config))
    except ValueError as error:
        raise InputError(f"config: lora.target_modules: {error}") from None


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def check_adapter(adapter: Path, backbone: Path, **made_from: Any) -> dict[str, Any]:
    """Refuse an adapter that is not what training wrote, or that was trained from other files.

    Args:
        backbone: the folder that it is to be added to.
        made_from: what else it must have been made from (``artifacts.check_made_from``).

    Returns:
        Its provenance; empty of one that was trained elsewhere, or before provenance said so.

    Raises:
        InputError: names the adapter, and what differs.
    """
    if not (adapter / "metrics.json").exists():
        return {}
    metrics = read_json(adapter / "metrics.json")
    for name, digest in metrics.get("sha256", {}).items():
        if not (adapter / name).is_file() or file_sha256(adapter / name) != digest:
            raise InputError(f"{adapter / name}: is not what training wrote; {REBUILD}")
    origin: dict[str, Any] = metrics.get("provenance", {})
    now = {"backbone": ModelFolder(backbone).fingerprint(), **made_from}
    check_made_from(origin, adapter, **now)
    return origin if "made_from" in origin else {}


def load_adapter(
    model: torch.nn.Module, adapter: Path, *, keep_head: bool = True, trainable: bool = False
) -> PeftModel:
    """Add a saved adapter to a backbone; without `keep_head` the backbone keeps its fresh head.

    Raises:
        InputError: the folder has no adapter, or one of another backbone.
    """
    weights = adapter / "adapter_model.safetensors"
    if not weights.is_file():  # PEFT would query the hub
        raise InputError(f"{adapter}: no adapter: {weights.name} is missing")
    attach_head_of(model, adapter)
    _float32_weights(model)
    with refusing(f"{adapter}: no adapter for this backbone"):
        judge = PeftModel.from_pretrained(model, adapter, is_trainable=trainable)
        with safe_open(weights, "pt") as file:
            stored = set(file.keys())
    # PEFT only warns about layers that the adapter or the backbone lacks.
    differing = stored ^ set(get_peft_model_state_dict(judge, save_embedding_layers=False))
    if differing:
        raise InputError(
            f"{adapter}: no adapter for this backbone: {len(differing)} tensors are in only one of "
            f"the two, for example {min(differing)}"
        )
    if not keep_head:
        for module in judge.modules():
            if isinstance(module, ModulesToSaveWrapper):
                fresh = module.original_module.state_dict()
                module.modules_to_save[judge.active_adapter].load_state_dict(fresh)
    return _head_stays(judge)


def _head_stays(judge: PeftModel) -> PeftModel:
    """A head on several layers is fitted, not trained: its inputs differ in size by orders of magnitude."""
    for module in judge.modules():
        if isinstance(module, LayerHead):
            module.requires_grad_(False)
    return judge


def head_of(judge: PeftModel) -> LayerHead | None:
    """The head on several layers that a judge is asked by, if it has one."""
    wrapped = getattr(judge.get_base_model(), "score", None)
    if isinstance(wrapped, ModulesToSaveWrapper):
        wrapped = wrapped.modules_to_save[judge.active_adapter]
    return wrapped if isinstance(wrapped, LayerHead) else None


def _float32_weights(model: torch.nn.Module) -> None:
    """Adapters are float32 by themselves; a head in bfloat16 would lose the small steps of AdamW."""
    for name in HEADS:
        head = getattr(model, name, None)
        if isinstance(head, torch.nn.Module):
            head.float()
