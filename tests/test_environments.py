"""The conda environments name the same versions as the locks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


def pins(lines: list[str]) -> dict[str, str]:
    pairs = (line.split("==") for line in lines if "==" in line)
    return {re.sub(r"[-_.]+", "-", name).lower(): version.strip() for name, version in pairs}


@pytest.mark.parametrize(
    ("environment", "lock"),
    [("arena.yaml", "requirements.lock"), ("gptq.yaml", "requirements-gptq.lock")],
)
def test_conda_environments_agree_with_the_locks(environment: str, lock: str) -> None:
    parsed = yaml.safe_load((ROOT / "envs" / environment).read_text())
    named = next(part["pip"] for part in parsed["dependencies"] if isinstance(part, dict))
    locked = pins((ROOT / lock).read_text().splitlines())
    assert all("==" in requirement for requirement in named)
    for name, version in pins(named).items():
        assert locked.get(name) == version, name


def test_bitsandbytes_is_locked_by_itself() -> None:
    """PEFT imports it whenever it is installed: only jobs that need it should take that time."""
    locked = pins((ROOT / "requirements-qlora.lock").read_text().splitlines())
    assert list(locked) == ["bitsandbytes"]
    assert "bitsandbytes" not in pins((ROOT / "requirements.lock").read_text().splitlines())
    offered = (ROOT / "envs/arena.yaml").read_text()
    assert f"# - bitsandbytes=={locked['bitsandbytes']}" in offered


def test_locks_pin_every_requirement_of_the_package() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = project["dependencies"] + project["optional-dependencies"]["dev"]
    locked = pins((ROOT / "requirements.lock").read_text().splitlines())
    for requirement in required:
        name = re.sub(r"[-_.]+", "-", re.split(r"[<>=\[]", requirement)[0]).lower()
        assert name in locked, name
