"""Capture a judge's hidden states and attention, from which students learn more than from logits.

``features``   the hidden state that the head's last layer reads of a sequence: for a decoder, the final
               one of its last token (or the mean, ``head.pooling``); for an encoder, its pooled state.
``attention``  the attention of that token over the sequence in a decoder's last layer, the mean over
               the heads.

After :func:`capture`, a judge outputs them with its logits, in scoring and in training. The states of
teachers are stored with their logits (``files.logits.write_logits``), as float16:

    logits/<judge>/fold_<k>.states/features.npy      (rows, views, hidden size)
    logits/<judge>/fold_<k>.states/attention.npy     (rows, views, max_length), 0 after the sequence
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

from arena_distill.config.phases.scoring import LogitsSettings
from arena_distill.config.training import State
from arena_distill.errors import InputError
from arena_distill.models.loading import HEADS


@dataclass
class Outputs(ModelOutput):
    """The outputs of a judge with captured states, for a batch of sequences; None if not captured."""

    logits: Tensor | None = None
    features: Tensor | None = None
    """float32 (batch, hidden size)"""
    projected: tuple[Tensor, ...] | None = None
    """The features in each teacher's space: float32 (batch, hidden size of the teacher)."""
    attention: Tensor | None = None
    """float32 (batch, tokens)"""


def capture(judge: Any, wanted: Collection[State]) -> tuple[RemovableHandle, ...]:
    """Add states to a judge's outputs: from now on they are :class:`Outputs`.

    Attention costs one row of one layer's scores. (Eager attention would compute all rows of every
    layer.) The layer itself runs unchanged, with any kernel, so the logits stay bit-identical.

    Returns:
        Handles; remove all of them to stop the output of features.

    Raises:
        InputError: the attention of a last token cannot be read in this type of model.
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
    """The width of each requested state.

    (For attention, the longest sequence allowed: so each shard and fold writes the same shape.)
    """
    known: dict[State, int] = {
        "features": head_layer(judge).in_features,
        "attention": settings.encoding.max_length,
    }
    return {name: known[name] for name in settings.states}


class Projections(nn.ModuleList):
    """Map a student's features into the space of each teacher's: learned, discarded after training.

    They are the judge's `projections`; PEFT neither trains nor saves them.
    """

    def __init__(self, features: int, teachers: Sequence[int], *, seed: int) -> None:
        """
        Args:
            features: the student's hidden size.
            teachers: the hidden size of each.
        """
        layers = [nn.utils.skip_init(nn.Linear, features, size) for size in teachers]
        # A separate generator: all other random numbers stay the same without projections.
        rng = torch.Generator().manual_seed(seed)
        for layer in layers:
            nn.init.normal_(layer.weight, std=features**-0.5, generator=rng)
            nn.init.zeros_(layer.bias)
        super().__init__(layers)

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(features) for layer in self)


def project(judge: Any, teachers: Sequence[int], *, seed: int) -> None:
    """Add projections to a student; teachers: the hidden size of each."""
    reads = head_layer(judge)
    judge.projections = Projections(reads.in_features, teachers, seed=seed).to(reads.weight.device)


def projections_of(judge: Any) -> Projections | None:
    """A student's projections, if it has any."""
    found = getattr(judge, "projections", None)
    return found if isinstance(found, Projections) else None


def head_layer(judge: Any) -> nn.Linear:
    """The layer that outputs the logits; with an adapter, the trained copy."""
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
    """The position of the last token that is not padding, as in the classifiers: int (batch,)."""
    places = torch.arange(ids.shape[1], device=ids.device)
    return (places * (ids != pad_token_id)).argmax(-1)


def _pooled(read: Tensor, last: Tensor) -> Tensor:
    """The head's input for each sequence; a decoder's head reads every token."""
    return read if read.ndim == 2 else read[torch.arange(len(read), device=read.device), last]


# --- attention ----------------------------------------------------------------------------------------


def _capture_last_attention(judge: Any, seen: dict[str, Any]) -> None:
    """Record the inputs of the last layer's attention kernel."""
    layers = [
        module
        for module in judge.modules()
        if type(module).__name__.endswith("Attention") and getattr(module, "is_causal", False)
    ]
    if not layers:
        raise InputError(
            f"{judge.config.name_or_path}: config: loss.attention: the attention of this model cannot "
            "be read; set it to 0"
        )
    last = layers[-1]
    eager: Any = getattr(sys.modules[type(last).__module__], "eager_attention_forward", None)
    kernel = ALL_ATTENTION_FUNCTIONS.get_interface(last.config._attn_implementation, eager)

    def noting(module: nn.Module, query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Any:
        seen["attention"] = query, key, options
        return kernel(module, query, key, *rest, **options)

    name = f"watched {id(last)}"
    AttentionInterface.register(name, noting)
    # A separate configuration for this layer: masks still follow the model's own configuration.
    last.config = copy.copy(last.config)
    last.config._attn_implementation_internal = name


def _attention(
    last: Tensor, mask: Tensor, query: Tensor, key: Tensor, options: dict[str, Any]
) -> Tensor:
    """Compute the attention of each sequence's last token from the inputs of a layer's kernel.

    Args:
        last: int (batch,), the position of that token.
        mask: (batch, tokens), 1 for a token, 0 for padding.
        query: (batch, heads, tokens, head size), rotated.
        key: (batch, key heads, tokens, head size), rotated; heads in groups share one.
        options: `scaling`; `softcap` (Gemma-2) and `sliding_window` if the layer has them.

    Returns:
        float32 (batch, tokens): the mean over the heads; each row sums to 1.
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
