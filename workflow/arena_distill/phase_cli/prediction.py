"""Commands that score battles with the deployed model, and calibrate it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arena_distill.config.phases.prediction import (
    CalibrationSettings,
    PredictionSettings,
    ScoringSettings,
    StackedViewsSettings,
)
from arena_distill.config.phases.settings import parse
from arena_distill.config.vocabulary import ModelKind
from arena_distill.phase_cli.options import (
    Attention,
    BatchTokens,
    Battles,
    Folds,
    Gpus,
    MembersLogits,
    Output,
    Settings,
    StackWeights,
    Tokens,
)
from arena_distill.runtime import launch

app = typer.Typer()


@app.command()
def score_test(
    model: Annotated[Path, typer.Option(help="The merged or quantised model.")],
    tokens: Tokens,
    output: Output,
    settings: Settings,
    quantized: Annotated[bool, typer.Option(help="The model is a GPTQ checkpoint.")] = False,
    folds: Annotated[
        Path | None, typer.Option(help="folds.parquet: score the held-out battles.")
    ] = None,
    batch_tokens: BatchTokens = 16384,
    gpus: Gpus = 0,
    attention: Attention = "auto",
) -> None:
    """Score the test battles, or the held-out ones, at every length and in every order."""
    launch.claim_gpus(gpus)
    from arena_distill.prediction.test_time import score_test

    parsed = parse(ScoringSettings, settings)
    score_test(
        model,
        tokens,
        output,
        quantized=quantized,
        settings=parsed,
        batch_tokens=batch_tokens,
        attention=attention,
        folds=folds,
    )


@app.command()
def combine_views(
    stack: StackWeights,
    output: Output,
    settings: Settings,
    logits: MembersLogits,
    surface: Annotated[Path | None, typer.Option(help="surface.parquet")] = None,
) -> None:
    """Combine the final scores of a stack's members."""
    from arena_distill.prediction.stacked import combine_views

    parsed = parse(StackedViewsSettings, settings)
    combine_views(logits, stack, output, settings=parsed, surface=surface)


@app.command()
def fit_calibration(
    folds: Folds,
    battles: Battles,
    judge: Annotated[str, typer.Option(help="The judge's name.")],
    model: Annotated[ModelKind, typer.Option(help="The model of these logits.")],
    logits: Annotated[Path, typer.Option(help="logits/<judge>/<model>_held_out.npy")],
    output: Output,
    settings: Settings,
) -> None:
    """Calibrate a deployed model on the held-out battles, and score it there."""
    from arena_distill.prediction.held_out import fit_calibration

    parsed = parse(CalibrationSettings, settings)
    fit_calibration(folds, battles, logits, output, judge=judge, model=model, settings=parsed)


@app.command()
def predict_test(
    output: Output,
    settings: Settings,
    logits: Annotated[Path, typer.Option(help="logits/<judge>/<model>_test.npy")],
    model: Annotated[ModelKind, typer.Option(help="The model of these logits.")],
    calibration: Annotated[
        Path | None, typer.Option(help="calibration/<judge>/<model>.json")
    ] = None,
    battles: Annotated[Path | None, typer.Option(help="battles.parquet, to calibrate")] = None,
) -> None:
    """Average the test logits over lengths and orders in every variant, and calibrate them."""
    from arena_distill.prediction.test_time import predict_test

    parsed = parse(PredictionSettings, settings)
    predict_test(
        logits, output, model=model, settings=parsed, calibration=calibration, battles=battles
    )


@app.command()
def write_submission(
    predictions: Annotated[Path, typer.Option(help="predictions/<judge>/<model>.parquet")],
    battles: Battles,
    output: Output,
) -> None:
    """Write the submission, and check it against the test battles."""
    from arena_distill.prediction.submission import write_submission

    write_submission(predictions, battles, output)
