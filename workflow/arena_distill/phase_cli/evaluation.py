"""Commands that compute the figures of a run, and show them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arena_distill.config import run
from arena_distill.config.phases.evaluation import BenchmarkSettings, EvaluationSettings
from arena_distill.config.phases.settings import parse
from arena_distill.phase_cli.options import (
    Attention,
    BatchTokens,
    Battles,
    Folds,
    Gpus,
    Output,
    Settings,
    TestVotes,
    by_judge,
)
from arena_distill.runtime import launch

app = typer.Typer()


@app.command()
def run_benchmarks(
    judge: Annotated[Path, typer.Option(help="The finished judge's folder.")],
    battles: Battles,
    output: Output,
    settings: Settings,
    files: Annotated[list[str], typer.Argument(help="<benchmark>=<file>, of every file.")],
    batch_tokens: BatchTokens = 16384,
    gpus: Gpus = 0,
    attention: Attention = "auto",
) -> None:
    """Count how often a finished judge prefers the better answer of benchmarks."""
    launch.claim_gpus(gpus)
    from arena_distill.evaluation.benchmarks import write_benchmarks
    from arena_distill.judging.judge import Judge

    sources = parse(BenchmarkSettings, settings).files_of(files)
    asked = Judge.from_pretrained(judge, attention=attention, batch_tokens=batch_tokens)
    write_benchmarks(asked.predict, sources, battles, output, judge)


@app.command()
def evaluate(
    folds: Folds,
    battles: Battles,
    surface: Annotated[Path, typer.Option(help="surface.parquet")],
    rejected: Annotated[Path, typer.Option(help="rejected.parquet")],
    predictions: Annotated[
        list[Path], typer.Option(help="predictions/<judge>/<model>.parquet (repeatable).")
    ],
    output: Output,
    tables: Annotated[Path, typer.Option(help="Folder of the flat tables.")],
    settings: Settings,
    logits: Annotated[
        list[str], typer.Argument(help="<judge>=logits/<judge>/fold_<k>.npy, in the folds' order.")
    ],
    test_votes: TestVotes = None,
    quantized: Annotated[Path | None, typer.Option(help="The quantised model.")] = None,
    truth: Annotated[Path | None, typer.Option(help="The arena's true probabilities.")] = None,
    audit: Annotated[Path | None, typer.Option(help="audit.json")] = None,
    calibrations: Annotated[
        list[Path] | None, typer.Option(help="calibration/<judge>/<model>.json (repeatable).")
    ] = None,
    stacks: Annotated[
        list[Path] | None, typer.Option(help="stacks/<judge>.json (repeatable).")
    ] = None,
    test_logits: Annotated[
        Path | None, typer.Option(help="logits/<judge>/<model>_test.npy of the submitted model.")
    ] = None,
    benchmarked: Annotated[
        Path | None, typer.Option(help="benchmarked/<judge>_<model>.json of the submitted model.")
    ] = None,
) -> None:
    """Compute every figure of the run."""
    from arena_distill.deployment.quantization_error import DRIFT
    from arena_distill.evaluation.evaluate import evaluate

    parsed = parse(EvaluationSettings, settings)
    evaluate(
        folds,
        battles,
        by_judge(logits, parsed.judges),
        output,
        tables,
        settings=parsed,
        surface=surface,
        rejected=rejected,
        predictions=predictions,
        test_votes=test_votes,
        drift=quantized / DRIFT if quantized else None,
        truth=truth,
        audit=audit,
        calibrations=calibrations or (),
        stacks=stacks or (),
        test_logits=test_logits,
        benchmarked=benchmarked,
    )


@app.command()
def write_config(
    output: Output,
    settings: Annotated[str, typer.Option(help="What of the configuration decides, as JSON.")],
) -> None:
    """Write the configuration of a run."""
    from arena_distill.files.artifacts import write_text

    write_text(parse(run.Config, settings).described(), output)


@app.command()
def render_report(
    metrics: Annotated[Path, typer.Option(help="metrics.json")],
    config: Annotated[Path, typer.Option(help="The run's config.yaml.")],
    output: Output,
    parts: Annotated[Path, typer.Option(help="Folder of the separate figures.")],
) -> None:
    """Write the report, one HTML file."""
    from arena_distill.evaluation.report import render_report

    render_report(metrics, output, parts=parts, configuration=config)


@app.command()
def write_plan(
    output: Output,
    settings: Annotated[str, typer.Option(help="The configuration, as JSON.")],
    snakefile: Annotated[Path, typer.Option(help="The workflow.")],
) -> None:
    """Write the forecast of the run's cost."""
    from arena_distill.planning.forecast import write_forecast

    write_forecast(settings, snakefile, output)
