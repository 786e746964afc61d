"""Commands that make one model of the folds, and quantise it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arena_distill.config.phases.deployment import (
    DriftSettings,
    MergeSettings,
    QuantizationSettings,
)
from arena_distill.config.phases.settings import parse
from arena_distill.phase_cli.options import (
    Backbone,
    BatchTokens,
    Gpus,
    Output,
    Settings,
    Tokens,
    folder_of,
)
from arena_distill.runtime import launch

app = typer.Typer()


@app.command()
def merge_folds(
    backbone: Backbone,
    output: Output,
    settings: Settings,
    adapters: Annotated[list[Path], typer.Argument(help="The folds' adapters.")],
    tokens: Annotated[Path | None, typer.Option(help="For greedy weights.")] = None,
    folds: Annotated[Path | None, typer.Option(help="For weights other than equal.")] = None,
    logits: Annotated[
        list[Path] | None, typer.Option(help="The folds' logits, for validation weights.")
    ] = None,
    batch_tokens: BatchTokens = 16384,
    gpus: Gpus = 0,
) -> None:
    """Average what the folds learned, and their heads, and merge it into the backbone."""
    launch.claim_gpus(gpus)
    from arena_distill.deployment import fold_weights
    from arena_distill.deployment.merging import merge_folds

    parsed = parse(MergeSettings, settings)
    weights = None
    if parsed.weights == "validation":
        assert folds and logits
        weights = fold_weights.validation_weights(logits, folds)
    elif parsed.weights == "greedy":
        assert folds and tokens
        weights = fold_weights.greedy_weights(
            folder_of(backbone), adapters, tokens, folds, settings=parsed, batch_tokens=batch_tokens
        )
    merge_folds(
        folder_of(backbone),
        adapters,
        output,
        settings=parsed,
        weights=weights,
    )


@app.command()
def merge_probes(
    backbone: Backbone,
    output: Output,
    settings: Settings,
    probes: Annotated[list[Path], typer.Argument(help="The folds' heads.")],
) -> None:
    """Put the mean of a frozen judge's heads on its backbone."""
    from arena_distill.deployment.frozen import merge_probes

    parsed = parse(MergeSettings, settings)
    merge_probes(folder_of(backbone), probes, output, settings=parsed)


@app.command()
def quantize_model(
    model: Annotated[Path, typer.Option(help="The merged model.")],
    tokens: Tokens,
    output: Output,
    settings: Settings,
    batch_tokens: BatchTokens = 16384,
    gpus: Gpus = 0,
) -> None:
    """Quantise the merged model with GPTQ and measure its drift."""
    launch.claim_gpus(gpus)
    from arena_distill.deployment.gptq import quantize_judge

    quantize_judge(
        model,
        tokens,
        output,
        settings=parse(QuantizationSettings, settings),
        batch_tokens=batch_tokens,
    )


@app.command()
def check_drift(
    model: Annotated[Path, typer.Option(help="The quantised model.")],
    output: Output,
    settings: Settings,
) -> None:
    """Fail if quantisation changed the model by more than the configured bound."""
    from arena_distill.deployment.quantization_error import DRIFT, check_drift

    check_drift(model / DRIFT, output, settings=parse(DriftSettings, settings))
