"""Commands that read battles and deal them to folds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arena_distill.config.phases.battles import (
    ArenaSettings,
    AuditSettings,
    BattlesSettings,
    CountSettings,
    FetchSettings,
    FoldsSettings,
    SolutionSettings,
)
from arena_distill.config.phases.settings import parse
from arena_distill.phase_cli.options import Battles, Folds, Output, Settings

app = typer.Typer()


@app.command()
def fetch_battles(output: Output, settings: Settings) -> None:
    """Fetch a file of battles from Kaggle, or a folder of them from the Hugging Face hub."""
    from arena_distill.battles.fetching import fetch_battles

    fetch_battles(output, settings=parse(FetchSettings, settings))


@app.command()
def simulate_arena(output: Output, settings: Settings) -> None:
    """Write the synthetic arena: train, extra, ut and test battles, and their true probabilities."""
    from arena_distill.battles.simulation import write_arena

    write_arena(output, settings=parse(ArenaSettings, settings))


@app.command()
def read_battles(
    output: Output,
    rejected: Annotated[Path, typer.Option(help="Where refused rows go.")],
    reading: Annotated[Path, typer.Option(help="Where the counts go, as JSON.")],
    settings: Settings,
    train: Annotated[list[Path], typer.Option(help="Labelled battles (repeatable).")],
    test: Annotated[list[Path], typer.Option(help="Battles to predict (repeatable).")],
    extra: Annotated[list[Path] | None, typer.Option(help="More labelled battles.")] = None,
    ut: Annotated[list[Path] | None, typer.Option(help="Battles for post-pretraining.")] = None,
    unlabelled: Annotated[
        list[Path] | None, typer.Option(help="Battles that students learn from teachers alone.")
    ] = None,
) -> None:
    """Read published preferences into canonical battles."""
    from arena_distill.battles.reading import write_battles

    parsed = parse(BattlesSettings, settings)
    given = {"train": train, "extra": extra, "ut": ut, "test": test, "unlabelled": unlabelled}
    files = {name: parsed.files_of(name, some or []) for name, some in given.items()}
    write_battles(files, output, rejected, reading, parsed)


@app.command()
def read_solution(
    battles: Battles,
    solution: Annotated[Path, typer.Option(help="The test battles' votes, as Kaggle has them.")],
    output: Output,
    settings: Settings,
) -> None:
    """Read the votes of the test battles, which nothing is trained on."""
    from arena_distill.battles.solution import write_test_votes

    write_test_votes(solution, battles, output, parse(SolutionSettings, settings))


@app.command()
def assign_folds(battles: Battles, output: Output, settings: Settings) -> None:
    """Assign the training battles to folds."""
    from arena_distill.battles.folds import write_folds

    write_folds(battles, output, settings=parse(FoldsSettings, settings))


@app.command()
def check_counts(battles: Battles, folds: Folds, output: Output, settings: Settings) -> None:
    """Count what each training learns from, and refuse what the battles are too few for."""
    from arena_distill.battles.counts import write_counts

    write_counts(battles, folds, output, settings=parse(CountSettings, settings))


@app.command()
def audit_leaks(
    battles: Battles,
    folds: Folds,
    output: Output,
    table: Annotated[Path, typer.Option(help="CSV file for the worst examples.")],
    settings: Settings,
) -> None:
    """Count battles whose prompt is also in a judge's training battles."""
    from arena_distill.battles.audit import write_audit

    write_audit(battles, folds, output, table, settings=parse(AuditSettings, settings))
