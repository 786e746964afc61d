"""Compute the sizes of a judge: its parameters, its matrices, and its memory during a step.

It uses the same classes as the phases, without weights in memory. Parameters are counted on PyTorch's
meta device. The memory of a training step or a forward pass is traced on fake tensors, which have only
shapes and dtypes, with two layers and with three: each further layer adds the same amount.

If a backbone's own ``config.json`` is missing, that of the published model with its name is used: the
files in ``architectures/`` hold published sizes.
"""

from __future__ import annotations

import json
import re
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from arena_distill.config.backbone import TINY, Backbone
from arena_distill.config.compute import Precision
from arena_distill.config.head import Head
from arena_distill.config.training import Lora
from arena_distill.encoding.tokenization import load_tokenizer
from arena_distill.errors import InputError, refusing
from arena_distill.models.layer_reads import keep_layers
from arena_distill.models.loading import HEADS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PUBLISHED = Path(__file__).parent / "architectures"


@dataclass(frozen=True)
class Sizes:
    """The sizes of a judge; parameters are counted, not estimated.

    embedding: parameters of lookups, without multiplication.
    matrices: (inputs, outputs) of every linear layer of the blocks: what NF4 and GPTQ quantise.
    other: parameters of norms and biases.
    head: parameters of the classification head.
    lora: parameters of the adapter; 0 without one.
    adapted: sum of the inputs of all adapted layers: the numbers per token that LoRA's dropout draws.
    attention: heads times their width, per layer.
    """

    embedding: int
    matrices: tuple[tuple[int, int], ...]
    other: int
    head: int
    lora: int
    adapted: int
    layers: int
    hidden: int
    attention: int
    longest: int | None
    """The most tokens of a sequence; None: no known limit."""
    whole: bool = False
    """Whether all weights are trained."""

    @property
    def linear(self) -> int:
        """Parameters of the blocks' matrices."""
        return sum(inputs * outputs for inputs, outputs in self.matrices)

    @property
    def base(self) -> int:
        """Parameters of the backbone, without head and adapter."""
        return self.embedding + self.linear + self.other

    @property
    def learned(self) -> int:
        """Parameters that are trained."""
        return self.head + (self.base if self.whole else self.lora)

    def forward_flops(self, tokens: float, squares: float, *, lora: bool = True) -> float:
        """FLOPs of a forward pass: two per weight and token, and attention's two products per token pair.

        All pairs count: kernels that skip the masked half do less.

        Args:
            tokens: of all sequences.
            squares: the sum of the squared lengths.
        """
        weights = self.linear + self.head + (self.lora if lora else 0)
        return 2 * weights * tokens + 4 * self.attention * self.layers * squares

    def training_flops(self, tokens: float, squares: float, *, checkpointing: bool) -> float:
        """FLOPs of a training step: forward, backward, and a repeated forward.

        A frozen matrix needs its forward pass and the gradient of its input; what is trained also the
        gradient of its weights. Gradient checkpointing repeats the forward pass.
        """
        gradients = self.forward_flops(tokens, squares, lora=False)
        adapter = 2 * 2 * (self.lora + self.head) * tokens - 2 * self.head * tokens
        adapter += 2 * self.linear * tokens if self.whole else 0
        attention = 4 * self.attention * self.layers * squares  # two gradients per product
        again = self.forward_flops(tokens, squares) if checkpointing else 0.0
        return self.forward_flops(tokens, squares) + gradients + adapter + attention + again


@dataclass(frozen=True)
class Alive:
    """Peak bytes besides weights, their casts and gradients, as traced.

    traced: with two layers and with three (the first one is not typical), each with one sequence and
        with two (which share casts of weights). Each further layer, and each further sequence, adds
        the same amount.
    least: where all weights are trained: the last gradient, of the embeddings, when all else is freed.
    """

    traced: tuple[tuple[int, int], tuple[int, int]]
    least: float = 0.0

    def at(self, layers: int, sequences: float) -> float:
        two, three = (one + (sequences - 1) * (both - one) for one, both in self.traced)
        return max(two + (layers - 2) * (three - two), self.least)


# --- what a backbone is -----------------------------------------------------------------------------


def read_config(backbone: Backbone, prepared: Path) -> PreTrainedConfig:
    """Read the configuration of a backbone's model from its folder, or of the published model.

    Args:
        prepared: the output folder of `prepare_backbone`, which may not exist yet.

    Raises:
        InputError: neither exists.
    """
    from transformers import AutoConfig

    own = Path(backbone.path) if backbone.path else TINY / str(backbone.tiny)
    for folder in (prepared, own):
        if (folder / "config.json").is_file():
            with refusing(f"{folder}: no model's config.json"):
                config = AutoConfig.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=False
                )
            return config if folder == prepared else _rebuilt(config, backbone)
    if backbone.gguf and Path(backbone.gguf).is_file():
        file = Path(backbone.gguf)
        with refusing(f"{file}: cannot be read"):
            config = AutoConfig.from_pretrained(
                file.parent, gguf_file=file.name, local_files_only=True, trust_remote_code=False
            )
        return _rebuilt(config, backbone)
    source = backbone.hub or backbone.path or backbone.gguf or ""
    published = _published()
    name = Path(source).name.removesuffix(".gguf")
    found = published.get(_plain(source)) or published.get(_plain(name))
    if found is None:
        known = ", ".join(sorted(file.stem for file in PUBLISHED.glob("*.json")))
        raise InputError(
            f"{source}: the size of this model is unknown: it is missing, and no published model has its "
            f"name; put its config.json into a folder and set backbone.path to it. Known: {known}"
        )
    return _rebuilt(AutoConfig.for_model(**found), backbone)


@lru_cache
def _published() -> Mapping[str, dict[str, Any]]:
    """The published models' configurations by name, with and without the organisation."""
    found = {}
    for file in sorted(PUBLISHED.glob("*.json")):
        config = json.loads(file.read_text(encoding="utf-8"))
        for name in config.pop("names"):
            found[_plain(name)] = found[_plain(name.rpartition("/")[2])] = config
    return found


def _plain(name: str) -> str:
    """Normalise a name: folders differ from hub ids mostly in hyphens and capitals."""
    return re.sub(r"[^a-z0-9/]", "", name.lower())


def _rebuilt(config: Any, backbone: Backbone) -> Any:
    """Change a configuration as `prepare_backbone` does: fewer layers, another tokenizer."""
    if backbone.tokenizer and Path(backbone.tokenizer).is_dir():
        config.vocab_size = len(load_tokenizer(Path(backbone.tokenizer)))
    if backbone.layers:
        keep_layers(config, backbone.layers)
    return config


# --- counting ---------------------------------------------------------------------------------------


def measure(config: PreTrainedConfig, head: Head, lora: Lora | None) -> Sizes:
    """Count a judge's parameters, on the meta device.

    Raises:
        InputError: the model cannot classify sequences, or has none of the adapter's targets.
    """
    return _measure(config.to_json_string(use_diff=False), head, lora)


@lru_cache(maxsize=64)
def _measure(described: str, head: Head, lora: Lora | None) -> Sizes:
    from peft.tuners.lora import LoraLayer

    config = _parse(described)
    judge = _judge_on_meta(config, head, lora, torch.float32)
    matrices: list[tuple[int, int]] = []
    embedding = adapted = 0
    for name, module in judge.named_modules():
        if isinstance(module, LoraLayer):
            adapted += module.in_features or 0
        if isinstance(module, torch.nn.Embedding):
            embedding += module.weight.numel()
        elif isinstance(module, torch.nn.Linear) and not _of_head(name) and "lora_" not in name:
            matrices.append((module.in_features, module.out_features))
    weights = {name: p for name, p in judge.named_parameters() if not _of_head(name)}
    own = sum(p.numel() for n, p in judge.named_parameters() if _of_head(n) and p.requires_grad)
    adapter = sum(p.numel() for name, p in weights.items() if "lora_" in name)
    body = [p for name, p in weights.items() if "lora_" not in name]
    multiplied = sum(inputs * outputs for inputs, outputs in matrices)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Sizes(
        embedding=embedding,
        matrices=tuple(matrices),
        other=sum(p.numel() for p in body) - embedding - multiplied,
        head=own,
        lora=adapter,
        adapted=adapted,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        attention=heads * width,
        longest=getattr(config, "max_position_embeddings", None),
        whole=all(p.requires_grad for p in body),
    )


def _of_head(name: str) -> bool:
    return any(part in HEADS for part in name.split("."))


def _parse(described: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**json.loads(described))


def _judge_on_meta(
    config: Any, head: Head, lora: Lora | None, dtype: torch.dtype, attention: str | None = None
) -> Any:
    from transformers import AutoModelForSequenceClassification

    from arena_distill.models.adapters import new_judge

    config.num_labels = len(head.outputs)
    config.use_cache, config.pad_token_id = False, 0
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # peft uses a name that transformers changed
            model = AutoModelForSequenceClassification.from_config(
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
            )
            return new_judge(model, lora, seed=0)
    except ValueError as error:
        raise InputError(f"{config.model_type}: cannot be a judge: {error}") from None


# --- tracing ----------------------------------------------------------------------------------------


class AliveBytes(TorchDispatchMode):
    """Count the bytes of live tensors that operations create in this mode.

    Args:
        known: existing tensors, which do not count.
    """

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._seen:
            self._seen.add(storage)
            size = storage.nbytes()
            weakref.finalize(storage, self._freed, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _freed(self, size: int) -> None:
        self.now -= size


def alive(
    config: PreTrainedConfig,
    head: Head,
    lora: Lora | None,
    *,
    length: int,
    precision: Precision,
    training: bool,
    checkpointing: bool = False,
    eager: bool = False,
) -> Alive:
    """Trace the memory of a training step, or a forward pass, of sequences of `length` tokens.

    Args:
        eager: use the kernel that stores all attention scores of a layer; else transformers' default.
    """
    described = config.to_json_string(use_diff=False)

    def traced(layers: int, sequences: int) -> int:
        shape = sequences, length
        # NF4 matrices are unpacked to bfloat16, the dtype of all computation.
        how = precision != "fp32", training, checkpointing, eager
        return _traced(described, head, lora, layers, shape, *how)

    sizes = measure(config, head, lora)
    least = 4.0 * sizes.embedding if training and sizes.whole else 0.0
    return Alive(((traced(2, 1), traced(2, 2)), (traced(3, 1), traced(3, 2))), least)


@lru_cache(maxsize=256)
def _traced(
    described: str,
    head: Head,
    lora: Lora | None,
    layers: int,
    shape: tuple[int, int],
    half: bool,
    training: bool,
    checkpointing: bool,
    eager: bool,
) -> int:
    config = _parse(described)
    keep_layers(config, layers)
    dtype = torch.bfloat16 if half else torch.float32
    judge = _judge_on_meta(config, head, lora, dtype, "eager" if eager else None)
    judge.get_input_embeddings().requires_grad_(False)  # `Alive.least`
    for module in judge.modules() if lora is None else ():
        if isinstance(module, torch.nn.Linear):
            module.to(dtype)  # casts are counted, not traced
    with FakeTensorMode():
        for module in judge.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                fake = torch.nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype))
                setattr(module, name, fake.requires_grad_(weight.requires_grad))
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
        return step_bytes(judge, torch.ones(shape, dtype=torch.long), half, training, checkpointing)


def step_bytes(
    judge: Any, ids: torch.Tensor, half: bool, training: bool, checkpointing: bool
) -> int:
    """Peak bytes of a training step or a forward pass, besides weights and gradients.

    Args:
        ids: int64 (sequences, tokens).
        half: compute in bfloat16, by autocast.
    """
    judge.train(training)
    if not training:
        judge.requires_grad_(False)
    if checkpointing:
        judge.activation_checkpointing_enable({"use_reentrant": False})

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = judge(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        if training:
            torch.nn.functional.log_softmax(logits.float(), -1).sum().backward()

    with torch.set_grad_enabled(training):
        step()  # later steps have gradients already
        known = [*judge.parameters(), *judge.buffers(), ids]
        known += [p.grad for p in judge.parameters() if p.grad is not None]
        with AliveBytes(known) as counted:
            step()
    return counted.peak
