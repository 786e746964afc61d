"""Commands that give the logits of folds: trained judges, external ones, stacks, surface trees."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arena_distill.config.external import EndpointLimits
from arena_distill.config.phases.scoring import (
    ExternalSettings,
    LogitsSettings,
    QuerySettings,
    StackedLogitsSettings,
    StackSettings,
)
from arena_distill.config.phases.settings import Settings as VersionSettings
from arena_distill.config.phases.settings import parse
from arena_distill.phase_cli.options import (
    Attention,
    Backbone,
    BatchTokens,
    Battles,
    Features,
    Fold,
    Folds,
    Gpus,
    MembersLogits,
    Output,
    Settings,
    StackWeights,
    Tokens,
    by_judge,
    folder_of,
)
from arena_distill.runtime import launch

app = typer.Typer()


@app.command()
def score_probe(
    features: Features,
    probe: Annotated[Path, typer.Option(help="The fold's head.")],
    folds: Folds,
    fold: Fold,
    output: Output,
    settings: Settings,
) -> None:
    """Score a fold's battles with a frozen judge's head, in both orders."""
    from arena_distill.scoring.logits import score_probe

    parsed = parse(LogitsSettings, settings)
    score_probe(features, probe, folds, fold, output, settings=parsed)


@app.command()
def predict_logits(
    backbone: Backbone,
    adapter: Annotated[Path, typer.Option(help="The fold's adapter folder.")],
    tokens: Tokens,
    folds: Folds,
    fold: Fold,
    output: Output,
    settings: Settings,
    shard: Annotated[int, typer.Option(help="0 to --shards - 1.", min=0)] = 0,
    shards: Annotated[int, typer.Option(help="Jobs that share the fold.", min=1)] = 1,
    batch_tokens: BatchTokens = 16384,
    gpus: Gpus = 0,
    attention: Attention = "auto",
) -> None:
    """Score a fold's battles, or one shard of them, in both orders."""
    launch.claim_gpus(gpus)
    from arena_distill.scoring.logits import predict_logits

    predict_logits(
        folder_of(backbone),
        adapter,
        tokens,
        folds,
        fold,
        output,
        settings=parse(LogitsSettings, settings),
        batch_tokens=batch_tokens,
        shard=shard,
        shards=shards,
        attention=attention,
    )


@app.command()
def gather_logits(
    folds: Folds,
    fold: Fold,
    output: Output,
    settings: Settings,
    shards: Annotated[list[Path], typer.Argument(help="The shards' .npy files.")],
) -> None:
    """Join the shards of a fold."""
    from arena_distill.scoring.logits import gather_logits

    gather_logits(shards, folds, fold, output, settings=parse(LogitsSettings, settings))


@app.command()
def query_endpoint(
    battles: Battles,
    output: Output,
    cost: Annotated[Path, typer.Option(help="File for token counts and cost.")],
    answers: Annotated[Path, typer.Option(help="Folder of the stored answers.")],
    settings: Settings,
    limits: Annotated[str, typer.Option(help="Limits of the requests, as JSON.")],
) -> None:
    """Query an OpenAI-compatible endpoint for all labelled battles in both orders."""
    launch.lock_output(answers)
    from arena_distill.scoring.external import query_endpoint

    query_endpoint(
        battles,
        output,
        cost,
        answers,
        settings=parse(QuerySettings, settings),
        limits=parse(EndpointLimits, limits),
    )


@app.command()
def read_external_logits(
    battles: Battles,
    file: Annotated[Path, typer.Option(help="A judge's logits: parquet, CSV or JSONL.")],
    output: Output,
    settings: Settings,
) -> None:
    """Read the logits of all labelled battles from a file."""
    from arena_distill.scoring.external_files import read_external_logits

    read_external_logits(file, battles, output, settings=parse(ExternalSettings, settings))


@app.command()
def split_external_logits(
    logits: Annotated[Path, typer.Option(help="external/<judge>/logits.npy")],
    folds: Folds,
    fold: Fold,
    output: Output,
    settings: Settings,
) -> None:
    """Write a fold's rows of an external judge's logits."""
    from arena_distill.scoring.external import split_external_logits

    split_external_logits(logits, folds, fold, output, settings=parse(LogitsSettings, settings))


@app.command()
def fit_stack(
    folds: Folds,
    output: Output,
    settings: Settings,
    logits: Annotated[
        list[str], typer.Argument(help="<judge>=logits/<judge>/fold_<k>.npy, in the folds' order.")
    ],
    surface: Annotated[Path | None, typer.Option(help="surface.parquet")] = None,
) -> None:
    """Fit the weights of a stack's members, and score it out of fold."""
    from arena_distill.scoring.stacks import fit_stack

    parsed = parse(StackSettings, settings)
    fit_stack(by_judge(logits, parsed.members), folds, output, settings=parsed, surface=surface)


@app.command()
def combine_fold(
    stack: StackWeights,
    folds: Folds,
    fold: Fold,
    output: Output,
    settings: Settings,
    logits: MembersLogits,
    battles: Annotated[Path | None, typer.Option(help="battles.parquet, for trees.")] = None,
) -> None:
    """Combine a fold's logits of a stack's members."""
    from arena_distill.scoring.stacks import combine_fold

    parsed = parse(StackedLogitsSettings, settings)
    combine_fold(logits, stack, folds, fold, output, settings=parsed, battles=battles)


@app.command()
def predict_surface(
    folds: Folds,
    battles: Battles,
    output: Output,
    trees: Annotated[Path, typer.Option(help="Where the trees of the test battles go.")],
    settings: Settings,
) -> None:
    """Predict battles by trees over what shows on their surface."""
    from arena_distill.scoring.surface_trees import write_surface

    write_surface(folds, battles, output, trees, settings=parse(VersionSettings, settings))
