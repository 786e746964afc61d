"""Assemble the commands of the rules, `arena-distill phase …`: one per rule, in the order of the data flow.

Each can be run by hand. `--settings` takes the rule's settings: JSON of one of the models in
``config.phases`` (``snakemake -n -p`` prints it). A command imports its phase when it runs, so `--help`
and small jobs start fast, without torch.
"""

from __future__ import annotations

import typer

from arena_distill.phase_cli import (
    battles,
    deployment,
    encoding,
    evaluation,
    judging,
    prediction,
    scoring,
    studies,
    training,
)

app = typer.Typer(
    help="The phases of the workflow, as the rules run them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for package in (
    battles,
    encoding,
    training,
    scoring,
    deployment,
    prediction,
    judging,
    evaluation,
    studies,
):
    app.add_typer(package.app)
