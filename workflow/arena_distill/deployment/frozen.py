"""Make one model of a frozen judge's folds: the backbone's first layers, and the mean of the heads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from arena_distill.config.phases.deployment import MergeSettings
from arena_distill.deployment.merging import check_folds, padded_tokenizer, save_merged
from arena_distill.models.layer_reads import attach_head, cut_after
from arena_distill.models.loading import load_classifier
from arena_distill.training.probe import mean_probe, read_probe


def merge_probes(
    backbone: Path, probes: Sequence[Path], output: Path, *, settings: MergeSettings
) -> None:
    """Put the mean of the folds' heads on the backbone, cut after the last layer that it reads → a folder.

    Args:
        backbone: the folder whose features the heads were fitted to.
        probes: the folds' folders (see ``training.probe``), in the order of the folds.
        output: the folder to write: model, tokenizer, ``merge.json``.

    Raises:
        InputError: they are not the folds of one judge, or of another backbone.
    """
    check_folds(probes, backbone)
    weights = [1 / len(probes)] * len(probes)
    probe = mean_probe([read_probe(folder) for folder in probes], weights)
    tokenizer, pad = padded_tokenizer(backbone)
    dtype = torch.float32 if settings.precision == "fp32" else torch.bfloat16
    model: Any = load_classifier(
        backbone, head=settings.head, dtype=dtype, pad_token_id=pad, head_seed=0
    )
    count = max(layer for layer, _ in probe.reads)
    cut_after(model, count)
    attach_head(model, probe.reads, probe.marker, probe.weight, probe.bias)
    about = {
        "backbone": backbone.name,
        "folds": len(probes),
        "average": "heads",
        "heads": "average",
        "weights": weights,
        "dtype": str(dtype).removeprefix("torch."),
        "reads": probe.reads,
    }
    save_merged(output, model, tokenizer, about, settings)
    print(f"{output}: the mean head of {len(probes)} folds on the first {count} layers")
