"""Find what will fail, from the configuration and the files it names, before anything runs.

No model is loaded and no battle is read, so this takes milliseconds. When Snakemake builds the graph, it
refuses a job whose files have findings; ``arena-distill check`` prints all findings.

Snakemake asks for a missing input only where outputs are missing too: where an earlier run left its own, a
file that was renamed would mean that there is nothing to be done.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import get_args

from arena_distill.config.backbone import Backbone
from arena_distill.config.model_files import ModelFolder
from arena_distill.config.run import Config
from arena_distill.config.vocabulary import GroupSize


@dataclass(frozen=True)
class Named:
    """A file or folder of the configuration.

    key: where it is named.
    advice: what to do if it is not there.
    """

    key: str
    path: str
    advice: str
    is_folder: bool = False


@dataclass(frozen=True)
class Finding:
    """Something that will fail.

    path: the file that no job may use before the problem is solved.
    line: the key, what is wrong, what to do.
    is_missing: whether the problem is only that the file does not exist.
    """

    path: str
    line: str
    is_missing: bool = False


def findings(
    config: Config, is_made: Callable[[str], bool], interpreter: Callable[[str], str]
) -> list[Finding]:
    """Find everything that will fail: files, interpreters, then judges.

    Args:
        is_made: whether a rule makes a path; such files are not checked.
        interpreter: returns the path of an interpreter that the configuration names.
    """
    found: dict[str, Finding] = {}  # by path and problem: several judges may share a backbone

    def add(key: str, path: str, problem: str, *, is_missing: bool = False) -> None:
        found.setdefault(
            f"{path} {problem}", Finding(path, f"config: {key}: {problem}", is_missing)
        )

    for named in named_files(config):
        if is_made(named.path):
            continue
        if problem := _file_problem(named):
            missing = not Path(named.path).exists()
            add(named.key, named.path, problem, is_missing=missing)
    for key, path, advice in _interpreters(config):
        python = interpreter(path)
        if os.sep in python and not os.access(python, os.X_OK):
            add(key, path, f"{python} is not an interpreter that can be run: {advice}")
    broken = {finding.path for finding in found.values()}
    folder_of = cache(ModelFolder)  # judges may share one, and its tokenizer takes time to read
    for name, judge in config.judges.items():
        file = judge.backbone and judge.backbone.described_by()
        if judge.backbone and file and file not in broken and not is_made(file):
            folder = folder_of(Path(file).parent)
            for problem in folder.problems():
                add(f"judges.{name}.backbone", file, problem)
            for key, problem in _judge_problems(config, name, folder):
                add(key, file, problem)
        if judge.backbone and (tokenizer := judge.backbone.tokenizer) and tokenizer not in broken:
            for problem in folder_of(Path(tokenizer)).tokenizer_problems():
                add(f"judges.{name}.backbone.tokenizer", tokenizer, problem)
    return list(found.values())


def backbone_files(backbone: Backbone) -> Iterator[tuple[str, str]]:
    """Files and folders that a backbone is made of, each after its key; not what is downloaded."""
    if file := backbone.described_by():
        yield "path" if backbone.path else "tiny", file
    if backbone.gguf:
        yield "gguf", backbone.gguf
    if backbone.tokenizer:
        yield "tokenizer", backbone.tokenizer


def named_files(config: Config) -> Iterator[Named]:
    """The files and folders that the configuration names and that must exist."""
    battles = "put the file there, correct the path, or say with hub or kaggle where it comes from"
    for key, sources in config.sources().items():
        for source in sources:
            for file in source.inputs():
                yield Named(key, str(file), battles)
    if config.data.solution:
        yield Named("data.solution", config.data.solution.path, battles)
    correct = "put it there or correct the path"
    for name, judge in config.judges.items():
        if judge.external and judge.external.file:
            yield Named(f"judges.{name}.external.file", judge.external.file, correct)
        for key, path in backbone_files(judge.backbone) if judge.backbone else ():
            model = "put the model there, correct the path, or set backbone.hub and revision"
            is_tokenizer = key == "tokenizer"
            advice = correct if is_tokenizer else model
            yield Named(f"judges.{name}.backbone.{key}", path, advice, is_tokenizer)


def looked_at(config: Config) -> list[str]:
    """What :func:`findings` checks, as lines for people."""
    files = [(named.key, named.path) for named in named_files(config)]
    files += [(key, path) for key, path, _ in _interpreters(config)]
    judges = ", ".join(config.judges)
    return [f"run {config.run}: judges {judges}", *dict.fromkeys(f"{k}: {p}" for k, p in files)]


def _file_problem(named: Named) -> str | None:
    path = Path(named.path)
    if not path.exists():
        return f"{path} is not there; {named.advice}"
    if path.is_dir() != named.is_folder:
        wanted = "a folder" if named.is_folder else "a file"
        return f"{path} is {'a folder' if path.is_dir() else 'a file'}; give {wanted}"
    if not os.access(path, os.R_OK):
        return f"{path} cannot be read: change its permissions"
    if not named.is_folder and not path.stat().st_size:
        return f"{path} is empty; {named.advice}"
    if named.key.endswith(".gguf"):
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                return f"{path} is no GGUF file (a pointer of Git LFS?): fetch it again"
    return None


def _interpreters(config: Config) -> Iterator[tuple[str, str, str]]:
    """Keys and paths of the interpreters that jobs run with, and what to do where one is not there."""
    if config.environments.main:
        yield (
            "environments.main",
            config.environments.main,
            "correct the path, or leave the key out",
        )
    if config.is_quantized(config.final):
        yield (
            "environments.gptq",
            config.environments.gptq,
            "make setup; or name one that has gptqmodel; or set `quantization: null` and "
            "`prediction: {model: merged}`",
        )


def _judge_problems(config: Config, name: str, folder: ModelFolder) -> Iterator[tuple[str, str]]:
    """Settings of a judge that do not fit its backbone: their keys, and lines without them."""
    judge, model = config.judges[name], folder.config
    assert judge.backbone
    layers = model.get("num_hidden_layers")
    if judge.backbone.layers and layers and judge.backbone.layers > layers:
        yield (
            f"judges.{name}.backbone.layers",
            f"{judge.backbone.layers}, but {folder.path} has {layers} layers: lower it",
        )
    deepest = max(judge.frozen.layers or (0,)) if judge.frozen else 0
    if layers and deepest > min(layers, judge.backbone.layers or layers):
        yield (
            f"judges.{name}.frozen.layers",
            f"{deepest}, but {folder.path} has {judge.backbone.layers or layers} layers: lower it",
        )
    for own in {"score", "classifier"} & set(folder.matrices):  # of decoders, of encoders
        outputs, ours = folder.matrices[own][0], len(config.head_of(name).outputs)
        if outputs != ours:
            yield (
                f"judges.{name}.backbone",
                f"{folder.path} has a head of {outputs} outputs, with classes: {config.classes} and head: "
                f"{judge.head.kind} this judge's has {ours}: take the model without a head",
            )
    positions = model.get("max_position_embeddings")
    lengths = {f"judges.{name}.encoding.max_length": judge.encoding.max_length}
    if name in config.deployed():
        lengths["prediction.max_lengths"] = max(config.prediction.max_lengths)
    for key, longest in lengths.items():
        if positions and longest > positions:
            yield (
                key,
                f"{longest}, but {folder.path} has positions for {positions} tokens: lower it",
            )
    if judge.lora and judge.lora.target_modules != "all-linear" and not judge.frozen:
        for target in folder.lacking(judge.lora.target_modules):
            names = sorted(folder.linear_layers())
            yield (
                f"judges.{name}.lora.target_modules",
                f"{target}: {folder.path} has no such module; it has {', '.join(names)}",
            )
    if name in config.deployed() and judge.quantization:
        inputs, size = folder.linear_layers(), judge.quantization.group_size
        uneven = [layer for layer, width in inputs.items() if width % size]
        if uneven:
            fitting = [g for g in get_args(GroupSize) if not any(n % g for n in inputs.values())]
            advice = f"use {max(fitting)}" if fitting else "no size does: set quantization: null"
            yield (
                f"judges.{name}.quantization.group_size",
                f"{size} does not divide the {inputs[uneven[0]]} inputs of {uneven[0]} in "
                f"{folder.path}; {advice}",
            )
