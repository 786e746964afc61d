"""Commands that finish judges."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arena_distill.config.phases.judging import JudgeSettings, StackedJudgeSettings
from arena_distill.config.phases.settings import parse
from arena_distill.config.vocabulary import ModelKind
from arena_distill.phase_cli.options import (
    Attention,
    BatchTokens,
    Gpus,
    Output,
    Settings,
    StackWeights,
    TestVotes,
    Tokens,
)
from arena_distill.runtime import launch

app = typer.Typer()

Kind = Annotated[ModelKind, typer.Option(help="What the weights are.")]
Predictions = Annotated[Path | None, typer.Option(help="predictions/<judge>/<model>.parquet")]
Calibration = Annotated[
    Path | None, typer.Option(help="calibration/<judge>/<model>.json, with held-out battles.")
]


@app.command()
def finish_judge(
    weights: Annotated[Path, typer.Option(help="The merged or quantised model.")],
    tokens: Tokens,
    output: Output,
    settings: Settings,
    kind: Kind,
    predictions: Predictions = None,
    test_votes: TestVotes = None,
    calibration: Calibration = None,
    batch_tokens: BatchTokens = 16384,
    gpus: Gpus = 0,
    attention: Attention = "auto",
) -> None:
    """Finish a judge: link its weights, add judge.json with test vectors, and the model card."""
    launch.claim_gpus(gpus)
    from arena_distill.judging.finish import finish_judge

    finish_judge(
        weights,
        tokens,
        output,
        settings=parse(JudgeSettings, settings),
        kind=kind,
        calibration=calibration,
        predictions=predictions,
        test_votes=test_votes,
        batch_tokens=batch_tokens,
        attention=attention,
    )


@app.command()
def finish_stack(
    stack: StackWeights,
    output: Output,
    settings: Settings,
    kind: Kind,
    members: Annotated[list[Path], typer.Argument(help="The finished members, in their order.")],
    trees: Annotated[Path | None, typer.Option(help="surface.safetensors")] = None,
    predictions: Predictions = None,
    test_votes: TestVotes = None,
    calibration: Calibration = None,
    batch_tokens: BatchTokens = 16384,
    gpus: Gpus = 0,
    attention: Attention = "auto",
) -> None:
    """Finish a stack: link its members' folders, add trees, judge.json with test vectors, and the card."""
    launch.claim_gpus(gpus)
    from arena_distill.judging.finish import finish_stack

    finish_stack(
        members,
        stack,
        output,
        settings=parse(StackedJudgeSettings, settings),
        kind=kind,
        trees=trees,
        calibration=calibration,
        predictions=predictions,
        test_votes=test_votes,
        batch_tokens=batch_tokens,
        attention=attention,
    )
