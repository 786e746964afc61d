"""Copies of the checkout, in which tests act as users do."""

from __future__ import annotations

import atexit
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib.util import cache_from_source
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
GPTQ = Path(os.environ.get("ARENA_GPTQ_PYTHON", ROOT / ".venv-gptq/bin/python"))
WARM = ROOT / "tests/warm_python.py"
WORKFLOW = ("Snakefile", "rules", "workflow", "config", "profiles", "slurm", "local-gpu", "envs")


@cache
def warm_python(interpreter: str | Path = sys.executable) -> str:
    """An interpreter for `-m`, as long as these tests run; see warm_python.py."""
    folder = Path(tempfile.mkdtemp(prefix="warm"))
    atexit.register(shutil.rmtree, folder)
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(folder / "socket"))
        door.listen(64)
        words = [interpreter, "-I", WARM, "serve", folder / "python"]
        subprocess.Popen(words, stdin=door, stdout=subprocess.DEVNULL, start_new_session=True)
    call = shlex.join(map(str, [interpreter, "-IS", WARM, "call", folder / "socket"]))
    (folder / "python").write_text(f'#!/bin/sh\nexec {call} "$@"\n')
    (folder / "python").chmod(0o755)
    return str(folder / "python")


@dataclass
class Checkout:
    """A copy of the workflow that a test may edit, with its own results."""

    folder: Path

    @property
    def results(self) -> Path:
        return self.folder / "results/mini"

    def snakemake(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [warm_python(), "-m", "snakemake", *arguments, "--configfile", "mini.yaml"]
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True)

    def run(self, *arguments: str) -> str:
        done = self.snakemake(*arguments, "--cores", "2")
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        return done.stdout + done.stderr

    def would_run(self, *arguments: str) -> dict[str, int]:
        """Jobs per rule in a dry run, without aggregate targets."""
        done = self.snakemake("-n", *arguments)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr
        jobs = dict(re.findall(r"^(\w+) +(\d+)$", done.stdout + done.stderr, re.MULTILINE))
        return {rule: int(n) for rule, n in jobs.items() if rule not in ("all", "total")}

    def edit(self, path: str, old: str, new: str) -> None:
        file = self.folder / path
        text = file.read_text()
        assert old in text
        write(file, text.replace(old, new, 1).encode())


def write(file: Path, content: bytes) -> None:
    """Change a file of a checkout.

    Python takes a compiled module for current if the size and the second of its source are those that it
    knows: of a digit changed twice within a second it would see the first change alone.
    """
    file.write_bytes(content)
    Path(cache_from_source(str(file))).unlink(missing_ok=True)


def make_checkout(folder: Path) -> Checkout:
    folder.mkdir(parents=True, exist_ok=True)
    for name in WORKFLOW:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / name)
    config = yaml.safe_load((ROOT / "tests/mini.yaml").read_text())
    (folder / "mini.yaml").write_text(yaml.safe_dump(config))
    link_gptq(folder)
    return Checkout(folder)


def link_gptq(folder: Path) -> None:
    """The interpreter that configurations name by default; where there is none, only for dry runs."""
    there = folder / ".venv-gptq/bin/python"
    there.unlink(missing_ok=True)
    there.parent.mkdir(parents=True, exist_ok=True)
    there.symlink_to(warm_python(GPTQ) if GPTQ.exists() else sys.executable)
