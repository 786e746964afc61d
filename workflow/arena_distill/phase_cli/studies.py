"""Commands of the studies: comparison, learning curves, averaging."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arena_distill.config.phases.deployment import SoupSettings
from arena_distill.config.phases.settings import parse
from arena_distill.config.phases.studies import AveragingSettings, CompareSettings, CurveSettings
from arena_distill.phase_cli.options import (
    Backbone,
    BatchTokens,
    Folds,
    Gpus,
    Output,
    Settings,
    TestVotes,
    Tokens,
    folder_of,
)
from arena_distill.runtime import launch

app = typer.Typer()


@app.command()
def compare_soups(
    backbone: Backbone,
    tokens: Tokens,
    folds: Folds,
    output: Output,
    settings: Settings,
    adapters: Annotated[list[Path], typer.Argument(help="The folds' adapters.")],
    logits: Annotated[list[Path], typer.Option(help="The folds' logits, in their order.")],
    test_votes: TestVotes = None,
    batch_tokens: BatchTokens = 16384,
    gpus: Gpus = 0,
) -> None:
    """Score every way to make one model from a judge's folds."""
    launch.claim_gpus(gpus)
    from arena_distill.studies.averaging import compare_soups

    compare_soups(
        folder_of(backbone),
        adapters,
        logits,
        tokens,
        folds,
        test_votes,
        output,
        settings=parse(SoupSettings, settings),
        batch_tokens=batch_tokens,
    )


@app.command()
def draw_averaging(
    output: Annotated[
        Path, typer.Option(help="Folder of averaging.json, averaging.csv, averaging.svg.")
    ],
    settings: Settings,
    soups: Annotated[list[Path], typer.Argument(help="soups/<judge>.json")],
) -> None:
    """Draw the gap between the means of factors and of products as the folds drift apart."""
    from arena_distill.studies.averaging import draw_averaging

    draw_averaging(soups, output, settings=parse(AveragingSettings, settings))


@app.command()
def draw_curves(
    run: Annotated[Path, typer.Option(help="The run's folder.")],
    output: Annotated[Path, typer.Option(help="Folder of curves.json, curves.csv, curves.svg.")],
    settings: Settings,
    truth: Annotated[Path | None, typer.Option(help="The arena's true probabilities.")] = None,
) -> None:
    """Draw the scores of judges against the number of training battles."""
    from arena_distill.studies.learning_curves import draw_curves

    draw_curves(run, output, settings=parse(CurveSettings, settings), truth=truth)


@app.command()
def compare(
    run: Annotated[Path, typer.Option(help="The run's folder.")],
    output: Annotated[Path, typer.Option(help="Folder of compare.json, tables and the report.")],
    settings: Settings,
    test_votes: TestVotes = None,
    truth: Annotated[Path | None, typer.Option(help="The arena's true probabilities.")] = None,
) -> None:
    """Compare judges on the same battles, with an interval for every difference."""
    from arena_distill.studies.comparison import compare
    from arena_distill.studies.comparison_report import render_comparison

    figures = output / "compare.json"
    compare(
        run,
        figures,
        settings=parse(CompareSettings, settings),
        test_votes=test_votes,
        truth=truth,
    )
    render_comparison(figures, output)
