"""Commands that train judges, or fit heads to frozen ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arena_distill.config.phases.settings import parse
from arena_distill.config.phases.training import (
    FeatureSettings,
    PretrainingSettings,
    ProbeSettings,
    TrainingSettings,
)
from arena_distill.phase_cli.options import (
    Attention,
    Backbone,
    BatchTokens,
    Features,
    Fold,
    Folds,
    Gpus,
    Output,
    Settings,
    TeacherLogits,
    Tokens,
    by_judge,
    folder_of,
    with_options,
)
from arena_distill.runtime import launch
from arena_distill.runtime.launch import Launch

app = typer.Typer()


@app.command()
@with_options
def pretrain_adapter(
    backbone: Backbone,
    tokens: Tokens,
    output: Output,
    settings: Settings,
    how: Launch,
) -> None:
    """Post-pretrain a judge's adapter on UT battles."""
    launch.start(how)
    from arena_distill.training.trainer import pretrain_adapter

    pretrain_adapter(
        folder_of(backbone),
        tokens,
        output,
        settings=parse(PretrainingSettings, settings),
        launch=how,
    )


@app.command()
@with_options
def train_fold(
    backbone: Backbone,
    tokens: Tokens,
    folds: Folds,
    fold: Fold,
    output: Output,
    settings: Settings,
    how: Launch,
    pretrained: Annotated[Path | None, typer.Option(help="Post-pretrained adapter.")] = None,
    teacher_logits: TeacherLogits = None,
) -> None:
    """Train one fold's judge: on votes, or distilled from its teachers' logits."""
    launch.start(how)
    from arena_distill.training.trainer import train_fold

    parsed = parse(TrainingSettings, settings)
    train_fold(
        folder_of(backbone),
        pretrained,
        tokens,
        folds,
        fold,
        output,
        teachers=by_judge(teacher_logits or (), parsed.teachers),
        settings=parsed,
        launch=how,
    )


@app.command()
def read_features(
    backbone: Backbone,
    tokens: Tokens,
    output: Output,
    settings: Settings,
    batch_tokens: BatchTokens = 16384,
    gpus: Gpus = 0,
    attention: Attention = "auto",
) -> None:
    """Read every battle once with the backbone of a frozen judge."""
    launch.claim_gpus(gpus)
    from arena_distill.training.features import write_features

    write_features(
        folder_of(backbone),
        tokens,
        output,
        settings=parse(FeatureSettings, settings),
        batch_tokens=batch_tokens,
        attention=attention,
    )


@app.command()
def fit_probe(
    features: Features,
    folds: Folds,
    fold: Fold,
    output: Output,
    settings: Settings,
    teacher_logits: TeacherLogits = None,
) -> None:
    """Fit the head of a frozen judge's fold: on votes, or on its teachers' logits."""
    from arena_distill.training.probe import fit_probe

    parsed = parse(ProbeSettings, settings)
    teachers = by_judge(teacher_logits or (), parsed.teachers)
    fit_probe(features, folds, fold, output, teachers=teachers, settings=parsed)
