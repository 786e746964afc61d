"""Commands that prepare backbones and tokenise battles."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arena_distill.config.phases.encoding import BackboneSettings, TokensSettings
from arena_distill.config.phases.settings import parse
from arena_distill.phase_cli.options import Backbone, Battles, Output, Settings, folder_of

app = typer.Typer()


@app.command()
def prepare_backbone(
    output: Output,
    settings: Settings,
    source: Annotated[
        Path | None, typer.Argument(help="The folder of the whole model from the hub.")
    ] = None,
) -> None:
    """Make a Hugging Face folder from a hub model, a GGUF file or a model's first layers."""
    from arena_distill.models.preparation import prepare_backbone

    prepare_backbone(output, settings=parse(BackboneSettings, settings), source=source)


@app.command()
def tokenize_battles(
    battles: Battles, backbone: Backbone, output: Output, settings: Settings
) -> None:
    """Tokenise every field of every battle, once per tokenizer."""
    from arena_distill.encoding.tokenization import tokenize_battles

    parsed = parse(TokensSettings, settings)
    tokenize_battles(battles, folder_of(backbone), output, settings=parsed)
