"""What the configuration names and is not there.

Snakemake asks for a missing input only where outputs are missing too: where an earlier run left its own, a
file that was renamed would mean that there is nothing to be done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from arena_distill.config.backbone import Backbone
from arena_distill.config.run import Config
from arena_distill.config.source import SOURCES


def backbone_files(backbone: Backbone) -> Iterator[tuple[str, str]]:
    """Files and folders that a backbone is made of, each after its key; not what is downloaded."""
    if backbone.path:
        yield "path", f"{backbone.path}/config.json"
    if backbone.gguf:
        yield "gguf", backbone.gguf
    if backbone.tokenizer:
        yield "tokenizer", backbone.tokenizer


def missing_paths(config: Config, is_made: Callable[[str], bool]) -> dict[str, str]:
    """Files and folders of the configuration that are not there, relative to the working directory.

    Args:
        is_made: whether a rule makes a path.

    Returns:
        By path, a line with its key and what to do.
    """
    lines: dict[str, str] = {}
    for key, path, advice in _named(config):
        if path not in lines and not Path(path).exists() and not is_made(path):
            lines[path] = f"config: {key}: {path} is not there; {advice}"
    return lines


def _named(config: Config) -> Iterator[tuple[str, str, str]]:
    """Keys, paths, and what to do where one is missing."""
    battles = "put the file there, mend the path, or say in data.fetch where it comes from"
    for name in SOURCES:
        for source in getattr(config.data, name):
            for file in source.files():
                yield f"data.{name}", str(file), battles
    if config.data.solution:
        yield "data.solution", config.data.solution, battles
    for fetched, origin in config.data.fetch.items():
        for path in origin.without:
            yield f"data.fetch.{fetched}.without", path, battles
    for name, judge in config.judges.items():
        if judge.external and judge.external.file:
            yield (
                f"judges.{name}.external.file",
                judge.external.file,
                "put it there or mend the path",
            )
        if judge.backbone:
            for key, path in backbone_files(judge.backbone):
                advice = "put the model there, mend the path, or set backbone.hub and revision"
                if key == "tokenizer":
                    advice = "put the tokenizer there or mend the path"
                yield f"judges.{name}.backbone.{key}", path, advice
