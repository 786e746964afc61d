"""Made-up models and tokens for several benchmarks: random weights take the time of trained ones."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig

from arena_distill.config.backbone import Backbone
from arena_distill.encoding.sequences import Sequences, offsets_of
from arena_distill.planning.sizes import read_config
from arena_distill.training.examples import Examples
from arena_distill.verdicts import Votes

SMALL: dict[str, dict[str, Any]] = {
    "1m": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4},
    "4m": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4},
    "25m": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8},
}
"""Llamas of about so many weights, besides the published models of `planning/architectures`."""

IDS = 1000
"""Token ids are below."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def options(parser: argparse.ArgumentParser, model: str, longest: int) -> None:
    """Add the options of what is made up, and of where it runs."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=list(DTYPES), default="fp32")
    parser.add_argument(
        "--model", default=model, help="1m, 4m, 25m, or a published one: smollm2-135m"
    )
    parser.add_argument("--longest", type=int, default=longest, help="tokens of a sequence")


def backbone(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """A classifier of random weights: of a published model's shape (`smollm2-135m`), or a small Llama."""
    torch.manual_seed(0)
    config: Any = read_config(Backbone(path=name), Path(name)) if name not in SMALL else None
    if config is None:
        heads = SMALL[name]["hidden_size"] // 64
        config = LlamaConfig(vocab_size=IDS, num_attention_heads=heads, **SMALL[name])
    config.num_labels, config.pad_token_id, config.use_cache = 3, 0, False
    with torch.device(device):
        return AutoModelForSequenceClassification.from_config(
            config, dtype=dtype, trust_remote_code=False
        )


def examples(rows: int, longest: int) -> Examples:
    """Battles as long as those of the Chatbot Arena, with a long tail, cut at `longest` tokens."""
    rng = np.random.default_rng(0)
    prompt = np.exp(rng.normal(np.log(20), 1.2, rows))
    answers = np.exp(rng.normal(np.log(140), 1.05, (2, rows))).sum(axis=0)
    lengths = np.clip(prompt + answers, 10, longest).astype(np.int64)
    ids = rng.integers(5, IDS, lengths.sum()).astype(np.int32)
    votes = np.eye(3, dtype=np.float32)[rng.integers(3, size=rows)]
    view = Sequences(ids, offsets_of(lengths))
    return Examples((view,), Votes(votes, np.ones(rows)), battles=rows)
