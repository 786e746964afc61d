"""Commands that finish judges."""

from __future__ import annotations

from dataclasses import dataclass
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
    with_options,
)
from arena_distill.runtime import launch

app = typer.Typer()


@dataclass(frozen=True)
class Finish:
    """What judges and stacks are finished with alike: options of commands, arguments of functions."""

    kind: Annotated[ModelKind, typer.Option(help="What the weights are.")]
    predictions: Annotated[
        Path | None, typer.Option(help="predictions/<judge>/<model>.parquet")
    ] = None
    test_votes: TestVotes = None
    calibration: Annotated[
        Path | None, typer.Option(help="calibration/<judge>/<model>.json, with held-out battles.")
    ] = None
    batch_tokens: BatchTokens = 16384
    attention: Attention = "auto"


@app.command()
@with_options
def finish_judge(
    weights: Annotated[Path, typer.Option(help="The merged or quantised model.")],
    tokens: Tokens,
    output: Output,
    settings: Settings,
    how: Finish,
    gpus: Gpus = 0,
) -> None:
    """Finish a judge: link its weights, add judge.json with test vectors, and the model card."""
    launch.claim_gpus(gpus)
    from arena_distill.judging.finish import finish_judge

    parsed = parse(JudgeSettings, settings)
    finish_judge(weights, tokens, output, settings=parsed, **vars(how))


@app.command()
@with_options
def finish_stack(
    stack: StackWeights,
    output: Output,
    settings: Settings,
    members: Annotated[list[Path], typer.Argument(help="The finished members, in their order.")],
    how: Finish,
    trees: Annotated[Path | None, typer.Option(help="surface.safetensors")] = None,
    gpus: Gpus = 0,
) -> None:
    """Finish a stack: link its members' folders, add trees, judge.json with test vectors, and the card."""
    launch.claim_gpus(gpus)
    from arena_distill.judging.finish import finish_stack

    parsed = parse(StackedJudgeSettings, settings)
    finish_stack(members, stack, output, settings=parsed, trees=trees, **vars(how))
