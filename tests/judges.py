"""A finished judge in a moment: a tiny model with a random head, its tokens, judge.json and card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from conftest import made_up_battles

from arena_distill import Judge
from arena_distill.config.encoding import Encoding
from arena_distill.config.head import Head
from arena_distill.config.phases.encoding import TokensSettings
from arena_distill.config.phases.judging import JudgeSettings
from arena_distill.config.phases.prediction import ScoringSettings
from arena_distill.encoding.sequences import read_tokens
from arena_distill.encoding.tokenization import load_tokenizer, safe_pad_id, tokenize_battles
from arena_distill.files.artifacts import write_parquet
from arena_distill.judging.finish import finish_judge
from arena_distill.models.layer_reads import Read, attach_head
from arena_distill.models.loading import load_classifier

LENGTHS = (96, 140)


@dataclass(frozen=True)
class Finished:
    """A finished judge and the files that it was made from."""

    folder: Path
    weights: Path
    tokens: Path
    battles: pa.Table
    settings: JudgeSettings

    @cached_property
    def judge(self) -> Judge:
        """Loaded once."""
        return Judge.from_pretrained(self.folder, batch_tokens=512)

    @property
    def test(self) -> pa.Table:
        return self.battles.filter(pc.equal(self.battles["source"], "test"))

    @property
    def scoring(self) -> ScoringSettings:
        names = {"encoding", "head", "max_lengths", "orders", "cascade"}
        return ScoringSettings(
            version=1, precision="fp32", **self.settings.model_dump(include=names)
        )


def finished_judge(
    folder: Path,
    backbone: Path,
    *,
    head: Head,
    encoding: Encoding,
    files: Mapping[str, Path] | None = None,
    **changes: Any,
) -> Finished:
    """Make one; `changes` are settings, `files` those of `finish_judge`."""
    folder.mkdir(parents=True, exist_ok=True)
    battles = made_up_battles(test=9)
    write_parquet(battles, folder / "battles.parquet", {})
    tokens = folder / "tokens.parquet"
    tokenize_battles(
        folder / "battles.parquet", backbone, tokens, settings=TokensSettings(version=1)
    )
    tokenizer = load_tokenizer(backbone)
    pad = safe_pad_id(tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    model: Any = load_classifier(backbone, head=head, pad_token_id=pad, head_seed=1)
    if head.pooling == "layers":
        reads: list[Read] = [(1, "answer"), (2, "mean"), (2, "last")]
        marker = read_tokens(tokens).vocabulary.one_answer[encoding.template][1]
        rng, width = torch.Generator().manual_seed(1), model.config.hidden_size
        weight = torch.randn(len(head.outputs), 3 * width, generator=rng) / width**0.5
        attach_head(model, reads, marker, weight, torch.ones(len(head.outputs)))
    else:
        with torch.no_grad():
            model.score.weight.mul_(8)  # decided judges: what is wrong with an input shows
    weights = folder / "weights"
    model.save_pretrained(weights)
    tokenizer.save_pretrained(weights)
    values = {
        "run": "tests",
        "judge": "judge",
        "backbone": backbone.name,
        "head": head,
        "encoding": encoding,
        "max_lengths": LENGTHS,
        "orders": ("AB", "BA"),
        "average": "logits",
    }
    settings = JudgeSettings(version=1, **values | changes)
    finish_judge(
        weights,
        tokens,
        folder / "judge",
        settings=settings,
        kind="merged",
        batch_tokens=512,
        **(files or {}),
    )
    return Finished(folder / "judge", weights, tokens, battles, settings)
