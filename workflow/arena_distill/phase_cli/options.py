"""Options and arguments that the commands of several phases share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from arena_distill.config import compute

Settings = Annotated[str, typer.Option(help="The phase's settings, as JSON.")]
Backbone = Annotated[Path, typer.Option(help="Hugging Face folder, or its config.json.")]
Tokens = Annotated[Path, typer.Option(help="tokens/<tokenizer>/battles.parquet")]
Battles = Annotated[Path, typer.Option(help="battles.parquet")]
Folds = Annotated[Path, typer.Option(help="folds.parquet")]
TestVotes = Annotated[Path | None, typer.Option(help="test_votes.parquet, where they are known.")]
Features = Annotated[Path, typer.Option(help="features/<judge>")]
MembersLogits = Annotated[
    list[Path], typer.Argument(help="The members' .npy files, in their order.")
]
StackWeights = Annotated[Path, typer.Option(help="stacks/<judge>.json")]
TeacherLogits = Annotated[
    list[str] | None,
    typer.Option(help="A student's targets: <teacher>=logits/<teacher>/fold_<k>.npy"),
]
Fold = Annotated[int, typer.Option(help="0 to n - 1.", min=0)]
Output = Annotated[Path, typer.Option(help="What to write.")]
BatchTokens = Annotated[int, typer.Option(help="Tokens per forward pass, padding included.", min=1)]
Gpus = Annotated[int, typer.Option(help="GPUs of this job; 0: the CPU.", min=0)]
Attention = Annotated[compute.Attention, typer.Option(help="transformers' attention kernel.")]


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command with a parameter `how`, of a dataclass: the fields of that are options in its place."""
    own = inspect.signature(command, eval_str=True).parameters
    kind = own["how"].annotation
    options = inspect.signature(kind, eval_str=True).parameters

    @functools.wraps(command)
    def run(**given: Any) -> None:
        how = kind(**{name: given.pop(name) for name in options})
        command(**given, how=how)

    shown = [*(p for p in own.values() if p.name != "how"), *options.values()]
    shown.sort(key=lambda option: option.default is not option.empty)  # what must be given first
    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    return run


def by_judge(pairs: Sequence[str], judges: Iterable[str]) -> dict[str, list[Path]]:
    """The files of each judge, from arguments ``<judge>=<file>``."""
    files = [pair.split("=", 1) for pair in pairs]
    return {judge: [Path(file) for name, file in files if name == judge] for judge in judges}


def folder_of(path: Path) -> Path:
    return path.parent if path.is_file() else path
