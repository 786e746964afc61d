"""Imports: the package itself loads no heavy library, and each lazy import saves loading one."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

import arena_distill

HEAVY = {
    "torch": {"torch"},
    "transformers": {"transformers", "torch"},
    "peft": {"peft", "transformers", "torch"},
    "accelerate": {"torch"},
    "sklearn": {"sklearn", "scipy"},
    "scipy": {"scipy"},
    "pandas": {"pandas"},
    "matplotlib": {"matplotlib"},
}
"""Libraries that take a good part of a second to import, and what they load of them."""

ELSEWHERE = {"gptqmodel", "kaggle", "kagglehub", "requests", "snakemake", "rensa", "tenacity"}
"""Libraries that one of the two environments, or a plain installation, lacks."""

ALONE = {"_print_findings", "_print_graph"}
"""Functions whose source is run without their module."""

PACKAGE = ROOT / "workflow" / "arena_distill"


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
        ".__init__"
    )


MODULES = {name_of(path): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}

DISPATCHERS = {
    "arena_distill.cli",
    *(m for m in MODULES if m.startswith("arena_distill.phase_cli.")),
}
"""A command imports what it runs, and nothing of the others."""


def imported(node: ast.AST) -> list[str]:
    """The modules that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        inner = [f"{node.module}.{alias.name}" for alias in node.names]
        return [name if name in MODULES else str(node.module) for name in inner]
    return []


@cache
def loaded(module: str) -> tuple[frozenset[str], frozenset[str]]:
    """The package's modules that are imported with one, itself included, and the heavy libraries."""
    own, heavy, todo = {module}, set[str](), [module]
    while todo:
        for name in (n for node in MODULES[todo.pop()].body for n in imported(node)):
            if name in MODULES and name not in own:
                own.add(name)
                todo.append(name)
            heavy |= HEAVY.get(name.partition(".")[0], set())
    return frozenset(own), frozenset(heavy)


def lazy_imports() -> dict[tuple[str, str, int, str], None]:
    """Module, function, line and imported module of every import inside a function."""
    return {
        (module, function.name, node.lineno, name): None
        for module, tree in MODULES.items()
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        for name in imported(node)
    }


def test_a_lazy_import_spares_something() -> None:
    """Some command loads the module but does not need all that the import would load."""
    lazy = lazy_imports()
    entries = DISPATCHERS | {name for *_, name in lazy if name in MODULES}
    wanted = []
    for module, function, line, name in lazy:
        root = name.partition(".")[0]
        heavy = loaded(name)[1] if name in MODULES else HEAVY.get(root, set())
        without = [loaded(entry)[1] for entry in entries if module in loaded(entry)[0]]
        spares = any(heavy - already for already in without)
        dispatched = module in DISPATCHERS and name in MODULES
        if not (spares or dispatched or root in ELSEWHERE or function in ALONE):
            wanted.append(f"{module}:{line}: import {name} at the top: it spares nothing")
    assert not wanted, "\n".join(wanted)


@pytest.mark.parametrize(
    ("module", "needed"),
    [
        *((module, set()) for module in ("cli", "battles.reading", "battles.folds", "layout")),
        *((module, set()) for module in ("battles.audit", "encoding.tokenization")),
        *((module, set()) for module in ("scoring.logits", "prediction.test_time")),
        ("training.trainer", {"torch", "transformers", "peft", "accelerate"}),
    ],
)
def test_a_job_starts_without_what_it_does_not_need(module: str, needed: set[str]) -> None:
    """Before the job's function is called; the backbone's libraries follow once one is loaded."""
    assert loaded(f"arena_distill.{module}")[1] <= needed


def test_importing_the_package_loads_nothing() -> None:
    code = (
        "import sys; before = set(sys.modules); import arena_distill;"
        "print({m.partition('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "{'arena_distill'}"


@pytest.mark.parametrize("name", arena_distill.__all__)
def test_public_names_are_there(name: str) -> None:
    assert name in dir(arena_distill)
    assert getattr(arena_distill, name) is not None


def test_another_name_is_an_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        arena_distill.nothing  # noqa: B018
