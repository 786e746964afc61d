"""Let a judge's head read hidden states of several layers, pooled in several ways.

Middle layers of a language model know more of an answer's worth than the last one, whose states are made to
predict the next token. A `Read` is a layer (1: after the first block, before any final norm) and a pooling:

``mean``    the mean over all tokens of the sequence;
``answer``  the mean over the tokens after the last occurrence of the template's literal before the answer;
``last``    the last token.

A frozen judge (``judges.*.frozen``) has nothing else that is trained: features are read once
(:func:`read_features`), and a linear head on them is fitted per fold (``training.probe``). A judge with an
adapter and `head.pooling: layers` starts from such a head, which is kept while the adapter is trained.
A model folder holds the head as `score.linear`, and `head_reads` and `head_marker` in config.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, get_args

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from arena_distill.config.head import Pooling
from arena_distill.config.model_files import ModelFolder
from arena_distill.encoding.batching import pad, token_batches
from arena_distill.encoding.sequences import Sequences
from arena_distill.errors import InputError
from arena_distill.files.artifacts import read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Read = tuple[int, Pooling]

WEIGHT, BIAS = "score.linear.weight", "score.linear.bias"
"""The tensors of the head in a model; always float32, because inputs are large and sums nearly cancel."""


def default_layers(count: int) -> tuple[int, ...]:
    """The layers to read of so many: at 0.5, 0.6 and 0.7 of the depth, where most is known."""
    return tuple(dict.fromkeys(max(1, round(count * share)) for share in (0.5, 0.6, 0.7)))


def blocks(model: Any) -> nn.ModuleList:
    """The list of a model's blocks.

    Raises:
        InputError: it has none that is found.
    """
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise InputError(f"{model.config.name_or_path}: no list of {count} layers to read was found")


class Reader:
    """Note the hidden states of layers in each forward pass, and pool them.

    Args:
        reads: what to read, in the order of the features.
        marker: token ids before the answer.
    """

    def __init__(self, model: Any, reads: Sequence[Read], marker: Sequence[int]) -> None:
        self.reads = tuple(reads)
        self.marker = torch.tensor(marker)
        self._given: dict[str, Tensor] = {}
        self._states: dict[int, Tensor] = {}
        layers = blocks(model)
        model.register_forward_pre_hook(self._note_inputs, with_kwargs=True)
        for layer in {layer for layer, _ in self.reads}:
            layers[layer - 1].register_forward_hook(self._noting(layer))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # PEFT copies the head: the hooks note for this reader

    def features(self) -> Tensor:
        """Of the last forward pass: float32 (sequences, reads · hidden size)."""
        ids, mask = self._given["input_ids"], self._given["attention_mask"].bool()
        places = torch.arange(ids.shape[1], device=ids.device)
        last = (places * mask).argmax(-1)
        is_last = places == last[:, None]
        after = mask & (places >= self._starts(ids, mask)[:, None])
        chosen = {"mean": mask, "last": is_last, "answer": after | is_last}
        weights = {name: (m / m.sum(1, keepdim=True)).float() for name, m in chosen.items()}
        pooled = [
            torch.einsum("bt,bth->bh", weights[pooling], self._states[layer].to(ids.device).float())
            for layer, pooling in self.reads
        ]
        return torch.cat(pooled, dim=-1)

    def _starts(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Where each answer starts: int64 (sequences,), 0 where the marker is not found."""
        size = len(self.marker)
        if ids.shape[1] < size:
            return ids.new_zeros(len(ids))
        found = (ids.unfold(1, size, 1) == self.marker.to(ids.device)).all(-1)
        found &= mask[:, size - 1 :]
        ends = torch.arange(found.shape[1], device=ids.device) + size
        return (ends * found).amax(-1)

    def _note_inputs(self, _: nn.Module, args: Any, given: dict[str, Tensor]) -> None:
        self._given = {name: given[name] for name in ("input_ids", "attention_mask")}

    def _noting(self, layer: int) -> Any:
        def note(_: nn.Module, args: Any, output: Any) -> None:
            self._states[layer] = output[0] if isinstance(output, tuple) else output

        return note


class LayerHead(nn.Module):
    """A linear head on a reader's features, in float32, in the place of a classifier's `score`."""

    def __init__(self, reader: Reader, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.reader = reader
        self.linear = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            self.linear.weight.copy_(weight)
            self.linear.bias.copy_(bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """The same outputs for every token: float32 (sequences, tokens, outputs)."""
        with torch.autocast(hidden.device.type, enabled=False):
            outputs = self.linear(self.reader.features().to(hidden.device))
        return outputs[:, None].expand(-1, hidden.shape[1], -1)


def attach_head(
    model: Any, reads: Sequence[Read], marker: Sequence[int], weight: Tensor, bias: Tensor
) -> None:
    """Give a classifier a head on several layers, and note it in the model's configuration.

    Args:
        weight: float32 (outputs, reads · hidden size); `bias`: float32 (outputs,).
    """
    if not hasattr(model, "score"):
        raise InputError(
            f"{model.config.name_or_path}: config: judges.*.frozen and head.pooling: layers are for "
            f"decoders; a {model.config.model_type} has a head of its own: leave them out"
        )
    device = model.score.weight.device
    model.score = LayerHead(Reader(model, reads, marker), weight, bias).to(device)
    model.config.head_pooling = "layers"
    model.config.head_reads = [list(read) for read in reads]
    model.config.head_marker = list(marker)


def keep_layers(config: PretrainedConfig, layers: int) -> None:
    """Set the number of layers in a model's configuration (if more, they repeat the same types)."""
    config.num_hidden_layers = layers
    if kinds := getattr(config, "layer_types", None):
        config.layer_types = (kinds * layers)[:layers]


def cut_after(model: Any, layer: int) -> None:
    """Drop the blocks after a layer, the last one that is read."""
    del blocks(model)[layer:]
    keep_layers(model.config, layer)


def attach_unfitted_head(model: Any, marker: Sequence[int]) -> None:
    """Cut a classifier after the last of :func:`default_layers`, with a head of zeros on all its reads."""
    layers = default_layers(len(blocks(model)))
    _attach_zeros(model, [(n, pooling) for n in layers for pooling in get_args(Pooling)], marker)


def attach_head_of(model: Any, adapter: Path) -> None:
    """Cut a classifier, and give it the head that an adapter's weights are for, if it reads layers."""
    if not (adapter / "metrics.json").exists():
        return
    about = read_json(adapter / "metrics.json")
    if "reads" in about:
        reads = [(layer, pooling) for layer, pooling in about["reads"]]
        _attach_zeros(model, reads, about["marker"])


def _attach_zeros(model: Any, reads: Sequence[Read], marker: Sequence[int]) -> None:
    width = len(reads) * model.config.get_text_config().hidden_size
    outputs = model.config.num_labels
    attach_head(model, reads, marker, torch.zeros(outputs, width), torch.zeros(outputs))
    cut_after(model, max(layer for layer, _ in reads))


def load_head(model: Any, folder: Path) -> None:
    """Give a classifier the head on several layers that its folder holds.

    Raises:
        InputError: the folder holds none.
    """
    found: dict[str, Tensor] = {}
    for file, header in ModelFolder(folder).headers.items():
        with safe_open(file, "pt") as tensors:
            found |= {n: tensors.get_tensor(n) for n in (WEIGHT, BIAS) if n in (header or {})}
    reads = getattr(model.config, "head_reads", None)
    if not reads or len(found) < 2:
        raise InputError(f"{folder}: has no head on several layers; run the workflow again")
    attach_head(
        model,
        [(layer, pooling) for layer, pooling in reads],
        model.config.head_marker,
        found[WEIGHT].float(),
        found[BIAS].float(),
    )


def read_features(
    model: Any,
    views: Sequence[Sequences],
    reads: Sequence[Read],
    marker: Sequence[int],
    *,
    batch_tokens: int,
) -> np.ndarray:
    """Read every sequence once: float16 (rows, views, reads, hidden size).

    Args:
        model: without a head; its `config.pad_token_id` occurs in no sequence.
        batch_tokens: tokens per forward pass, padding included.

    Raises:
        InputError: a state is too large for half precision.
    """
    reader = Reader(model, reads, marker)
    width = model.config.get_text_config().hidden_size
    features = np.empty((len(views[0]), len(views), len(reads), width), np.float16)
    where = next(model.parameters()).device
    model.eval()
    with torch.inference_mode(), ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=features.shape[0] * len(views), desc="reading", mininterval=5)
        )
        batches = (
            (i, rows)
            for i, view in enumerate(views)
            for rows in token_batches(view.lengths, batch_tokens)
        )
        for i, rows in batches:
            ids, mask = pad([views[i][row] for row in rows], model.config.pad_token_id)
            model(
                input_ids=torch.from_numpy(ids).to(where),
                attention_mask=torch.from_numpy(mask).to(where),
            )
            found = reader.features().unflatten(1, (len(reads), width))
            features[rows, i] = found.half().cpu().numpy()
            bar.update(len(rows))
    if not np.isfinite(features).all():
        raise InputError(
            f"{model.config.name_or_path}: hidden states exceed {np.finfo(np.float16).max:,.0f}; read "
            "other layers (config: judges.*.frozen.layers)"
        )
    return features
