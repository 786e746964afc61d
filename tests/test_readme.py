"""What the README tells people to type is typed here, as dry runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from checkouts import ROOT, make_checkout

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    re.sub(r"\s+#.*", "", line).strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("snakemake ") and "--report" not in line
]

pytestmark = pytest.mark.slow


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 5


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with the configuration and the files that the README supposes."""
    folder = make_checkout(tmp_path_factory.mktemp("readme") / "checkout").folder
    mine = next(b for b in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if "mine.yaml" in b)
    (folder / "mine.yaml").write_text(mine)
    for name in re.findall(r"(?:mine|models)/[\w.-]+", mine):
        if name != "mine.yaml":
            path = folder / name if name.endswith(".csv") else folder / name / "config.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_readme(checkout: Path, command: str) -> None:
    words = [sys.executable, "-m", *shlex.split(command), "-n"]
    done = subprocess.run(words, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_configuration_reference_is_up_to_date() -> None:
    script = [sys.executable, "scripts/write_config_reference.py", "--check"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
