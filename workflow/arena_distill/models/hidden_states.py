"""What a judge's last token knows: for students that learn more of their teachers than logits.

``features``   the hidden state that the head's last layer reads of a sequence: of a decoder the final
               one of its last token (or their mean, ``head.pooling``), of an encoder what it pools.
``attention``  where a decoder's last layer looks from that token: its attention over the sequence,
               the mean over the heads.

A judge that is watched says them with its logits, in scoring and in training alike. Teachers' states
lie beside their logits (``files.logits.write_logits``), float16, a view after another:

    logits/<judge>/fold_<k>.states/features.npy      (rows, views, hidden size)
    logits/<judge>/fold_<k>.states/attention.npy     (rows, views, max_length), 0 behind a sequence's end
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput

from arena_distill.config.judge import State
from arena_distill.config.phases import LogitsSettings
from arena_distill.errors import InputError
from arena_distill.models.loading import HEADS


@dataclass
class Outputs(ModelOutput):
    """What a watched judge says of a batch of sequences, what was not asked for None."""

    logits: Tensor | None = None
    features: Tensor | None = None
    """float32 (batch, hidden size)"""
    projected: tuple[Tensor, ...] | None = None
    """The features in each teacher's space: float32 (batch, hidden size of the teacher)."""
    attention: Tensor | None = None
    """float32 (batch, tokens)"""


def capture(judge: Any, wanted: Collection[State]) -> tuple[RemovableHandle, ...]:
    """Have a judge say more than logits: from now on its outputs are :class:`Outputs`.

    Attention costs one row of one layer's scores. (Eager attention, which would tell all of it, costs
    all rows of every layer.) The layer itself runs as it did, whatever kernel it uses, so the logits
    stay the same to the last bit.

    Returns:
        Handles: with all of them removed, features are not said any more.

    Raises:
        InputError: this kind of model has no attention of a last token that could be read.
    """
    seen: dict[str, Any] = {}
    handles = []
    if "features" in wanted:
        head = head_layer(judge)
        note = head.register_forward_pre_hook(lambda _, inputs: seen.update(features=inputs[0]))
        handles.append(note)
    if "attention" in wanted:
        _capture_last_attention(judge, seen)

    def say(_: nn.Module, args: Any, given: dict[str, Tensor], outputs: Any) -> Outputs:
        last = _last_token(given["input_ids"], judge.config.pad_token_id)
        said = Outputs(logits=outputs.logits)
        with torch.autocast(last.device.type, enabled=False):
            if "features" in wanted:
                said.features = _pooled(seen.pop("features"), last).float()
                if projections := projections_of(judge):
                    said.projected = projections(said.features)
            if "attention" in wanted:
                said.attention = _attention(last, given["attention_mask"], *seen.pop("attention"))
        return said

    handles.append(judge.register_forward_hook(say, with_kwargs=True))
    return tuple(handles)


def widths(judge: Any, settings: LogitsSettings) -> dict[State, int]:
    """How many numbers each of the states that are asked for has per sequence.

    (Attention as many as a sequence may have tokens: so each shard and fold writes the same shape.)
    """
    known: dict[State, int] = {
        "features": head_layer(judge).in_features,
        "attention": settings.encoding.max_length,
    }
    return {name: known[name] for name in settings.states}


class Projections(nn.ModuleList):
    """From a student's features into the space of each teacher's: learned, and thrown away at the end.

    They stand in the judge as its `projections`, beside what PEFT knows, trains and saves.
    """

    def __init__(self, features: int, teachers: Sequence[int], *, seed: int) -> None:
        """
        Args:
            features: the student's hidden size.
            teachers: the hidden size of each.
        """
        layers = [nn.utils.skip_init(nn.Linear, features, size) for size in teachers]
        # From a generator of their own: whatever else draws numbers draws the same ones without them.
        rng = torch.Generator().manual_seed(seed)
        for layer in layers:
            nn.init.normal_(layer.weight, std=features**-0.5, generator=rng)
            nn.init.zeros_(layer.bias)
        super().__init__(layers)

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(features) for layer in self)


def project(judge: Any, teachers: Sequence[int], *, seed: int) -> None:
    """Give a student its projections; teachers: the hidden size of each."""
    reads = head_layer(judge)
    judge.projections = Projections(reads.in_features, teachers, seed=seed).to(reads.weight.device)


def projections_of(judge: Any) -> Projections | None:
    """A student's projections, if it has any."""
    found = getattr(judge, "projections", None)
    return found if isinstance(found, Projections) else None


def head_layer(judge: Any) -> nn.Linear:
    """The layer whose outputs are the logits; in an adapter the copy that is trained."""
    *_, last = (
        module
        for name, module in judge.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == judge.config.num_labels
        and set(name.split(".")) & set(HEADS)
        and "original_module" not in name
    )
    return last


def _last_token(ids: Tensor, pad_token_id: int) -> Tensor:
    """Where the last token that is not padding stands, as the classifiers pool: int (batch,)."""
    places = torch.arange(ids.shape[1], device=ids.device)
    return (places * (ids != pad_token_id)).argmax(-1)


def _pooled(read: Tensor, last: Tensor) -> Tensor:
    """What the head read of each sequence: a decoder's head reads every token."""
    return read if read.ndim == 2 else read[torch.arange(len(read), device=read.device), last]


# --- attention ----------------------------------------------------------------------------------------


def _capture_last_attention(judge: Any, seen: dict[str, Any]) -> None:
    """Note what the last layer's attention is computed from, on its way to the kernel that computes it."""
    layers = [
        module
        for module in judge.modules()
        if type(module).__name__.endswith("Attention") and getattr(module, "is_causal", False)
    ]
    if not layers:
        raise InputError(
            f"{judge.config.name_or_path}: config: loss.attention: no decoder whose attention could be "
            "read; set it to 0"
        )
    last = layers[-1]
    eager: Any = getattr(sys.modules[type(last).__module__], "eager_attention_forward", None)
    kernel = ALL_ATTENTION_FUNCTIONS.get_interface(last.config._attn_implementation, eager)

    def noting(module: nn.Module, query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Any:
        seen["attention"] = query, key, options
        return kernel(module, query, key, *rest, **options)

    name = f"watched {id(last)}"
    AttentionInterface.register(name, noting)
    # A configuration of its own, for this layer alone: masks are made as the model's own one says.
    last.config = copy.copy(last.config)
    last.config._attn_implementation_internal = name


def _attention(
    last: Tensor, mask: Tensor, query: Tensor, key: Tensor, options: dict[str, Any]
) -> Tensor:
    """Attention of each sequence's last token, from what a layer's kernel was given.

    Args:
        last: int (batch,), where that token stands.
        mask: (batch, tokens), 1 where there is a token.
        query: (batch, heads, tokens, head size), rotated.
        key: (batch, key heads, tokens, head size), rotated; heads in groups share one.
        options: `scaling`; `softcap` (Gemma-2) and `sliding_window` where the layer has them.

    Returns:
        float32 (batch, tokens): the mean over the heads, each row's sum 1.
    """
    rows, places = torch.arange(len(last), device=last.device), torch.arange(key.shape[2])
    asked = query[rows, :, last].float().unflatten(1, (key.shape[1], -1))
    scores = torch.einsum("bkgd,bktd->bkgt", asked, key.float())
    scores = scores * (options.get("scaling") or key.shape[-1] ** -0.5)
    if softcap := options.get("softcap"):
        scores = softcap * torch.tanh(scores / softcap)
    behind = last[:, None] - places.to(last.device)
    visible = mask.bool() & (behind >= 0)
    if window := options.get("sliding_window"):
        visible = visible & (behind < window)
    return scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1).mean((1, 2))
