"""What of a judge is trained: an adapter and the head, or all weights; its start, its folder, its loading.

With LoRA the backbone stays as it is, in the judge's precision; adapter and head are float32. Without
(`lora: null`) all weights are trained. They are held in float32, whatever they compute in: AdamW's steps
are often smaller than what bfloat16 can tell from a weight. That takes 16 bytes a weight, 4 each for the
weight, its gradient, and AdamW's two moments. Autocast adds a cast of the matrices, 2 bytes a weight.

A fold's folder holds what was trained, in float32: a PEFT adapter, or a whole model of transformers with
its head (``config.json``; shards above transformers' limit).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from transformers import PreTrainedModel, set_seed

from arena_distill.config.head import Head
from arena_distill.config.model_files import ModelFolder
from arena_distill.config.training import Lora
from arena_distill.errors import InputError, refusing
from arena_distill.files.artifacts import REBUILD, check_made_from, file_sha256, read_json
from arena_distill.models.layer_reads import LayerHead, attach_head_of, attach_unfitted_head
from arena_distill.models.loading import HEADS, load_classifier, start_head

Judge: TypeAlias = PeftModel | PreTrainedModel
"""A backbone with an adapter, or a model all of whose weights are trained."""


def start_judge(
    backbone: Path,
    pretrained: Path | None,
    lora: Lora | None,
    *,
    head: Head,
    marker: Sequence[int],
    seed: int,
    keep_head: bool = False,
    **how: Any,
) -> Judge:
    """Load what a training starts from.

    Args:
        pretrained: the folder of a post-pretraining; None: the backbone alone.
        marker: token ids before an answer, for a head on several layers.
        seed: of a fresh head and a fresh adapter.
        keep_head: start from the head in `pretrained`, not from a fresh one.
        how: how to load it (``loading.load_classifier``).

    Raises:
        InputError: `pretrained` is not what training wrote, or is of another backbone.
    """
    if pretrained:
        check_adapter(pretrained, backbone)
    weights = pretrained if pretrained and lora is None else backbone
    dtype = torch.float32 if lora is None else None
    model = load_classifier(weights, head=head, head_seed=seed, dtype=dtype, **how)
    if pretrained is None:
        if head.pooling == "layers":
            attach_unfitted_head(model, marker)
        return new_judge(model, lora, seed)
    if lora:
        return load_adapter(model, pretrained, keep_head=keep_head, trainable=True)
    attach_head_of(model, pretrained)
    if not keep_head:
        start_head(model, seed)
    return _head_stays(model)


def load_fold(
    backbone: Path, fold: Path, *, made_from: Mapping[str, Any] | None = None, **how: Any
) -> Judge:
    """Load the judge that a fold's training wrote, for scoring.

    Args:
        made_from: see :func:`check_adapter`.
        how: how to load it (``loading.load_classifier``).

    Raises:
        InputError: the folder holds neither a model nor an adapter of this backbone, or another fold's.
    """
    if is_whole(fold):
        check_adapter(fold, backbone, **(made_from or {}))
        return load_classifier(fold, **how)
    base = load_classifier(backbone, head_seed=0, **how)  # the fold has its own head
    # Not earlier: what is wrong with the backbone comes first.
    check_adapter(fold, backbone, **(made_from or {}))
    return load_adapter(base, fold)


def is_whole(fold: Path) -> bool:
    """Whether a fold's folder holds all weights of a model, not an adapter."""
    return (fold / "config.json").is_file()


def new_judge(model: Any, lora: Lora | None, seed: int) -> Judge:
    """Add a fresh adapter to a backbone with a fresh head; the seed determines both. Or train all of it."""
    if lora is None:
        return _head_stays(model.float())
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
        # PEFT itself leaves out a head only where that is a layer.
        exclude_modules=r"score\..*" if layered else None,
    )
    try:
        return _head_stays(get_peft_model(model, config))
    except ValueError as error:
        raise InputError(f"config: lora.target_modules: {error}") from None


def save_judge(judge: Judge, trained: Mapping[str, torch.Tensor], folder: Path) -> list[str]:
    """Write what was trained.

    Args:
        trained: weights by name, whole (not sharded).

    Returns:
        The names of the files.
    """
    if isinstance(judge, PeftModel):
        adapter: Any = judge.active_peft_config
        if isinstance(adapter.target_modules, set):  # its order differs between processes
            adapter.target_modules = sorted(adapter.target_modules)
        head = head_of(judge)
        fitted = {id(p) for p in head.parameters()} if head else set()  # not trained, but learned
        kept = {name: p for name, p in judge.named_parameters() if id(p) in fitted}
        judge.save_pretrained(str(folder), state_dict={**trained, **kept})
    else:
        judge.config.distributed_config = None  # the weights are whole
        state = {**judge.state_dict(), **trained}  # buffers too
        state = {name: w for name, w in state.items() if not name.startswith("projections.")}
        judge.save_pretrained(folder, state_dict=state, save_original_format=False)
    return sorted(p.name for p in folder.iterdir() if p.suffix in (".json", ".safetensors"))


def parameters_of(judge: Judge) -> tuple[int, int]:
    """How many parameters are trained, and how many there are."""
    if isinstance(judge, PeftModel):
        return judge.get_nb_trainable_parameters()  # counts packed NF4 weights
    return judge.num_parameters(only_trainable=True), judge.num_parameters()


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
) -> Judge:
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


def _head_stays(judge: Judge) -> Judge:
    """A head on several layers is fitted, not trained: its inputs differ in size by orders of magnitude."""
    for module in judge.modules():
        if isinstance(module, LayerHead):
            module.requires_grad_(False)
    return judge


def head_of(judge: Judge) -> LayerHead | None:
    """The head on several layers that a judge is asked by, if it has one."""
    base: Any = judge.get_base_model() if isinstance(judge, PeftModel) else judge
    wrapped = getattr(base, "score", None)
    if isinstance(wrapped, ModulesToSaveWrapper):
        wrapped = wrapped.modules_to_save[judge.active_adapter]
    return wrapped if isinstance(wrapped, LayerHead) else None


def _float32_weights(model: torch.nn.Module) -> None:
    """Adapters are float32 by themselves; a head in bfloat16 would lose the small steps of AdamW."""
    for name in HEADS:
        head = getattr(model, name, None)
        if isinstance(head, torch.nn.Module):
            head.float()
