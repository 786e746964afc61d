"""How big a judge is: its parameters, its matrices, and what it keeps of a sequence while it works.

Everything is asked of the classes that the phases use, without a weight in memory. Parameters are counted
on PyTorch's meta device. What is alive during a training step, or a forward pass, is traced on fake
tensors, which have shapes and dtypes and nothing else, with two layers and with three: each further one
adds as much again.

Where a backbone's own ``config.json`` is not there yet, that of a published model is taken, by its name:
the files in ``architectures/`` hold published sizes.
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
from arena_distill.config.judge import Head, Lora, Precision
from arena_distill.encoding.tokenization import load_tokenizer
from arena_distill.errors import InputError
from arena_distill.files.hub import brief
from arena_distill.models.heads import OUTPUTS
from arena_distill.models.loading import HEADS
from arena_distill.models.preparation import keep_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PUBLISHED = Path(__file__).parent / "architectures"


@dataclass(frozen=True)
class Sizes:
    """Of a judge; parameters are counted, not estimated.

    embedding: parameters that are looked up, not multiplied by.
    matrices: (inputs, outputs) of every linear layer of the blocks: what NF4 and GPTQ quantise.
    other: parameters of norms and biases.
    head: parameters of the classification head.
    lora: parameters of the adapter.
    adapted: inputs of all adapted layers together: as many numbers per token does LoRA's dropout draw.
    attention: heads times their width, of a layer.
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
    """Positions; None: no limit is known."""

    @property
    def linear(self) -> int:
        """Parameters of the blocks' matrices."""
        return sum(inputs * outputs for inputs, outputs in self.matrices)

    @property
    def base(self) -> int:
        """Parameters of the backbone, without head and adapter."""
        return self.embedding + self.linear + self.other

    def forward_flops(self, tokens: float, squares: float, *, lora: bool = True) -> float:
        """Of a forward pass: two per weight and token, and attention's two products per pair of tokens.

        Pairs are counted whole: kernels that skip the masked half do less.

        Args:
            tokens: of all sequences.
            squares: of all sequences' lengths, summed.
        """
        weights = self.linear + self.head + (self.lora if lora else 0)
        return 2 * weights * tokens + 4 * self.attention * self.layers * squares

    def training_flops(self, tokens: float, squares: float, *, checkpointing: bool) -> float:
        """Of a training step of adapter and head: forward, the gradients, and forward again.

        A frozen matrix costs its forward pass and the gradient of its input; adapter and head that of
        their weights as well. With gradient checkpointing everything is computed once more.
        """
        gradients = self.forward_flops(tokens, squares, lora=False)
        adapter = 2 * 2 * (self.lora + self.head) * tokens - 2 * self.head * tokens
        attention = 4 * self.attention * self.layers * squares  # two gradients per product
        again = self.forward_flops(tokens, squares) if checkpointing else 0.0
        return self.forward_flops(tokens, squares) + gradients + adapter + attention + again


@dataclass(frozen=True)
class Alive:
    """Bytes alive at most beside weights and gradients, as traced.

    traced: with two layers and with three (what the first one adds is no rule for the others), each
        with one sequence and with two (which share casts of weights and the like). Each further layer,
        and each further sequence, adds as much again.
    """

    traced: tuple[tuple[int, int], tuple[int, int]]

    def at(self, layers: int, sequences: float) -> float:
        two, three = (one + (sequences - 1) * (both - one) for one, both in self.traced)
        return two + (layers - 2) * (three - two)


# --- what a backbone is -----------------------------------------------------------------------------


def read_config(backbone: Backbone, prepared: Path) -> PreTrainedConfig:
    """The configuration of a backbone's model: of its folder, or of the published model of its name.

    Args:
        prepared: the folder that `prepare_backbone` makes, which may not be there yet.

    Raises:
        InputError: neither is there.
    """
    from transformers import AutoConfig

    own = Path(backbone.path) if backbone.path else TINY / str(backbone.tiny)
    for folder in (prepared, own):
        if (folder / "config.json").is_file():
            try:
                config = AutoConfig.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=False
                )
            except (OSError, ValueError) as error:
                raise InputError(f"{folder}: no model's config.json: {brief(error)}") from None
            return config if folder == prepared else _rebuilt(config, backbone)
    if backbone.gguf and Path(backbone.gguf).is_file():
        file = Path(backbone.gguf)
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
            f"{source}: how big this model is cannot be told: it is not there, and no published one has "
            f"its name; put its config.json into a folder and name that as backbone.path. Known: {known}"
        )
    return _rebuilt(AutoConfig.for_model(**found), backbone)


@lru_cache
def _published() -> Mapping[str, dict[str, Any]]:
    """The published models' configurations by name, with and without who published it."""
    found = {}
    for file in sorted(PUBLISHED.glob("*.json")):
        config = json.loads(file.read_text(encoding="utf-8"))
        for name in config.pop("names"):
            found[_plain(name)] = found[_plain(name.rpartition("/")[2])] = config
    return found


def _plain(name: str) -> str:
    """Names differ in hyphens and capitals, folders from hub ids in little else."""
    return re.sub(r"[^a-z0-9/]", "", name.lower())


def _rebuilt(config: Any, backbone: Backbone) -> Any:
    """As `prepare_backbone` changes it: fewer layers, another tokenizer's embeddings."""
    if backbone.tokenizer and Path(backbone.tokenizer).is_dir():
        config.vocab_size = len(load_tokenizer(Path(backbone.tokenizer)))
    if backbone.layers:
        keep_layers(config, backbone.layers)
    return config


# --- counting ---------------------------------------------------------------------------------------


def measure(config: PreTrainedConfig, head: Head, lora: Lora) -> Sizes:
    """Count a judge's parameters, on the meta device.

    Raises:
        InputError: the model cannot classify sequences, or has none of the adapter's targets.
    """
    return _measure(config.to_json_string(use_diff=False), head, lora)


@lru_cache(maxsize=64)
def _measure(described: str, head: Head, lora: Lora) -> Sizes:
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
    learned = {name: p.numel() for name, p in judge.named_parameters() if p.requires_grad}
    own = sum(count for name, count in learned.items() if _of_head(name))
    frozen = sum(
        p.numel() for n, p in judge.named_parameters() if not (p.requires_grad or _of_head(n))
    )
    multiplied = sum(inputs * outputs for inputs, outputs in matrices)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Sizes(
        embedding=embedding,
        matrices=tuple(matrices),
        other=frozen - embedding - multiplied,
        head=own,
        lora=sum(learned.values()) - own,
        adapted=adapted,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        attention=heads * width,
        longest=getattr(config, "max_position_embeddings", None),
    )


def _of_head(name: str) -> bool:
    return any(part in HEADS for part in name.split("."))


def _parse(described: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**json.loads(described))


def _judge_on_meta(
    config: Any, head: Head, lora: Lora, dtype: torch.dtype, attention: str | None = None
) -> Any:
    from transformers import AutoModelForSequenceClassification

    from arena_distill.models.adapters import new_judge

    config.num_labels = len(OUTPUTS[head.kind])
    config.use_cache, config.pad_token_id = False, 0
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # peft asks for what transformers renamed
            model = AutoModelForSequenceClassification.from_config(
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
            )
            return new_judge(model, lora, seed=0)
    except ValueError as error:
        raise InputError(f"{config.model_type}: cannot be a judge: {error}") from None


# --- tracing ----------------------------------------------------------------------------------------


class AliveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations under it make, as long as these live.

    Args:
        known: tensors that were there before and do not count.
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
    lora: Lora,
    *,
    length: int,
    precision: Precision,
    training: bool,
    checkpointing: bool = False,
    eager: bool = False,
) -> Alive:
    """Trace what is alive during a training step, or a forward pass, of sequences of `length` tokens.

    Args:
        eager: the kernel that holds all scores of a layer's attention; else the one transformers chooses.
    """
    described = config.to_json_string(use_diff=False)

    def traced(layers: int, sequences: int) -> int:
        shape = sequences, length
        # NF4's matrices are unpacked to bfloat16, in which all else is computed.
        how = precision != "fp32", training, checkpointing, eager
        return _traced(described, head, lora, layers, shape, *how)

    return Alive(((traced(2, 1), traced(2, 2)), (traced(3, 1), traced(3, 2))))


@lru_cache(maxsize=256)
def _traced(
    described: str,
    head: Head,
    lora: Lora,
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
    """Bytes alive at most in a training step or a forward pass beside weights and gradients.

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
        step()  # gradients are there in every later one
        known = [*judge.parameters(), *judge.buffers(), ids]
        known += [p.grad for p in judge.parameters() if p.grad is not None]
        with AliveBytes(known) as counted:
            step()
    return counted.peak
