"""Mistakes in a configuration, or in a phase's settings, as lines for people."""

from __future__ import annotations

import difflib
import itertools
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from arena_distill.errors import shown

RENAMED: dict[tuple[str, ...], str] = {
    ("lora", "targets"): "this key is now called 'target_modules'",
    ("merge", "head"): "this key is now called 'heads'",
    ("studies", "drift_epochs"): "this key is now called 'averaging_epochs'",
    ("data", "fetch"): "each source now says itself where it comes from: {path: …, kaggle: …} or "
    "{path: …, hub: …, revision: …, files: […]}",
}
"""Section and key of earlier configurations → what to write today."""


def explain(error: ValidationError, of: type[BaseModel]) -> list[str]:
    """One line per mistake. A mistake in `defaults` shows up in every judge: it is told once."""
    problems: dict[tuple[str, ...], Any] = {}
    for item in error.errors(include_url=False):
        # The last parts may name a choice of types, such as `tuple[str, ...]`, or a `[key]`.
        parts = tuple(map(str, item["loc"]))
        where = tuple(itertools.takewhile(lambda part: "[" not in part, parts))
        if item["type"] == "extra_forbidden":  # the last part is the person's own, whatever it is
            where = (*itertools.takewhile(lambda part: "[" not in part, parts[:-1]), parts[-1])
        if where in problems:
            problems[where]["msg"] += f", or: {item['msg']}"
        else:
            problems[where] = dict(item)
    shared = {path[1:] for path in problems if path[:1] == ("defaults",)}
    lines = []
    for path, item in problems.items():
        if path[:1] == ("judges",) and path[2:] in shared:
            continue
        name = ".".join(map(shown, path))
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden" and path[-2:] in RENAMED:
            message = RENAMED[path[-2:]]
        elif item["type"] == "extra_forbidden":
            allowed = _keys_at(of, path[:-1])
            close = difflib.get_close_matches(path[-1], allowed, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(allowed)}"
            message = f"unknown key; {hint}"
        elif item["type"] == "missing":
            message = "missing: this key is required"
        elif item["type"] not in ("value_error", "assertion_error"):
            message += f", got {reprlib.repr(item['input'])}"
        lines.append(f"config: {name}: {message}" if name else f"config: {message}")
    return lines


def repeated_keys(file: Path) -> Iterator[str]:
    """One line per key that a YAML file gives twice: whoever reads it takes the last one without a word."""
    try:
        open_ = [("", yaml.compose(file.read_text(encoding="utf-8"), yaml.SafeLoader))]
    except (OSError, ValueError, yaml.YAMLError):
        return  # Snakemake has refused it
    walked = set()
    while open_:
        path, node = open_.pop(0)
        if id(node) in walked:  # an alias
            continue
        walked.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            open_ += [(f"{path}.{number}", item) for number, item in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                part = shown(str(key.value))
                name, line = f"{path}.{part}".removeprefix("."), key.start_mark.line + 1
                if first := lines.get(key.value):
                    yield (
                        f"config: {name}: {file}, line {line}: this key stands in line {first} already, "
                        "and the last one would win: remove one"
                    )
                lines[key.value] = line
                open_.append((name, value))


def _keys_at(model: type[BaseModel], path: tuple[str, ...]) -> list[str]:
    """The keys allowed at a path of the configuration."""
    schema = model.model_json_schema()
    node: dict[str, Any] = schema
    for part in path:
        node = _resolve(node, schema)
        if part.isdigit():  # one of a list
            continue
        named = node.get("patternProperties", {}).values()  # judges, by name
        node = node.get("properties", {}).get(part) or next(iter(named), {})
    return list(_resolve(node, schema).get("properties", {}))


def _resolve(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    for option in node.get("anyOf", []):
        if "$ref" in option:
            node = option
    if "$ref" in node:
        return schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return node
