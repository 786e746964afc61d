"""Weights and AdamW's moments that several processes share (FSDP2): checkpoints, and one whole copy.

Adapters and heads are whole in each process: only where all weights are trained are these sharded. Each
process writes its own moments, so none holds those of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from arena_distill.errors import InputError


def local(weight: Tensor) -> Tensor:
    """This process's part of a weight, which shares its memory; all of it, if it is whole."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def whole(weight: Tensor, *, keep: bool) -> Tensor | None:
    """A weight that is not sharded; all processes must ask for it, and those that `keep` it get it."""
    if not isinstance(weight, DTensor):
        return weight
    full = weight.full_tensor()
    return full.cpu() if keep else None


def load_weights(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Set weights to those of a model's folder, each process its part, one after another.

    Raises:
        InputError: the folder lacks one.
    """
    lacking = set(weights)
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in lacking.intersection(tensors.keys()):
                weight = weights[name].data
                local(weight).copy_(local(_like(weight, tensors.get_tensor(name))))
                lacking.remove(name)
    if lacking:
        raise InputError(
            f"{folder}: lacks {min(lacking)}: delete this checkpoint, and train it again"
        )


def save_moments(optimizer: torch.optim.Optimizer, file: Path) -> None:
    """Write an optimizer's states of this process."""
    save_file(
        {
            f"{i}.{name}": local(value).contiguous()
            for i, weight in enumerate(_weights(optimizer))
            for name, value in optimizer.state[weight].items()
        },
        file,
    )


def load_moments(optimizer: torch.optim.Optimizer, file: Path) -> None:
    """Put the states that :func:`save_moments` wrote into an optimizer of the same weights."""
    weights = _weights(optimizer)
    for key, value in load_file(file).items():
        number, _, name = key.partition(".")
        weight = weights[int(number)]
        part = local(weight.data)
        if isinstance(weight.data, DTensor) and value.shape == part.shape and name != "step":
            value = DTensor.from_local(
                value.to(part.device),
                weight.data.device_mesh,
                weight.data.placements,
                run_check=False,
                shape=weight.shape,
                stride=weight.stride(),
            )
        optimizer.state[weight][name] = value


def _weights(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def _like(weight: Tensor, value: Tensor) -> Tensor:
    """A whole tensor, sharded as a weight is."""
    if not isinstance(weight, DTensor):
        return value
    value = value.to(weight.device)
    return distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None)
