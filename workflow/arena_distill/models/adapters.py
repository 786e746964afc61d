"""Add adapters and heads to a backbone: fresh ones or trained ones."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from transformers import set_seed

from arena_distill.config.judge import Lora
from arena_distill.errors import InputError
from arena_distill.models.loading import HEADS


def new_judge(model: torch.nn.Module, lora: Lora, seed: int) -> PeftModel:
    """Add a fresh adapter to a backbone with a fresh head; the seed determines both."""
    _head_in_float32(model)
    set_seed(seed)
    modules = lora.target_modules
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,  # the head is trained too, and saved with the adapter
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=modules if isinstance(modules, str) else list(modules),
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"config: lora.target_modules: {error}") from None


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
    _head_in_float32(model)
    try:
        judge = PeftModel.from_pretrained(model, adapter, is_trainable=trainable)
        with safe_open(weights, "pt") as file:
            stored = set(file.keys())
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{adapter}: no adapter for this backbone: {error}") from None
    except KeyError as error:  # PEFT expects the head
        raise InputError(
            f"{adapter}: no adapter for this backbone: the tensor {error} is missing"
        ) from None
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
    return judge


def _head_in_float32(model: torch.nn.Module) -> None:
    """Adapters are float32 by themselves; a head in bfloat16 would lose the small steps of AdamW."""
    for name in HEADS:
        head = getattr(model, name, None)
        if isinstance(head, torch.nn.Module):
            head.float()
