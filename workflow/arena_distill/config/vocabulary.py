"""Every choice that a configuration offers and that more than one module names."""

from __future__ import annotations

from typing import Literal

Family = Literal["llama", "qwen2", "gemma2"]
"""The families of the tiny backbones that ship with the package."""

FoldMethod = Literal["kfold", "stratified", "stratified_group"]
"""How battles are assigned to folds."""

FoldAverage = Literal["factors", "products"]
"""What the folds' adapters are averaged by: LoRA's A and B apart, or B·A."""

FoldHeads = Literal["average", "first"]
"""The head of a merged model: the mean of the folds' heads, or the first fold's."""

ModelKind = Literal["merged", "gptq"]
"""The two models that can be deployed."""

Bits = Literal[2, 3, 4, 8]
"""Of a weight in GPTQ."""

GroupSize = Literal[16, 32, 64, 128, 256, 512, 1024]
"""Weights that share a scale in GPTQ."""

ViewAverage = Literal["logits", "probabilities"]
"""What is averaged over the views of a battle."""

CalibrationMethod = Literal["temperature", "vector", "style"]
"""What can be fitted to a judge's logits."""

Calibration = Literal["none"] | CalibrationMethod
"""A calibration, or none."""

AskedCalibration = Literal["auto"] | Calibration
"""`auto`: what the held-out battles suffice for."""

SourceName = Literal["train", "extra", "ut", "test", "unlabelled"]
"""The sources of battles: the keys of `data` with files, in the order of the canonical file."""

BattleFormat = Literal[
    "battles", "conversations", "chosen_rejected", "graded", "ratings", "ranking"
]
"""The shapes in which preferences are published (see ``battles.formats``)."""

Escape = Literal["none", "backslash"]
"""How a quote inside a quoted cell of a CSV file is written: doubled, or with a backslash before it."""
