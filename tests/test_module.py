"""The workflow as a module: examples/module as another repository beside a checkout of this one."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from checkouts import GPTQ, ROOT, make_checkout, warm_python

from arena_distill.config.run import overlay

pytestmark = pytest.mark.slow


def snakemake(folder: Path, *arguments: str) -> str:
    command = [warm_python(), "-m", "snakemake", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def make_wheel(folder: Path) -> Path:
    """The package as it is installed: unpacked from its wheel."""
    source = folder / "source"
    (source / "workflow").mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "workflow/arena_distill",
        source / "workflow/arena_distill",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", folder, source], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True)
    return folder / "site"


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1, old
    file.write_text(text.replace(old, new))


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The example, with fewer battles and a shell prefix, as a repository beside a checkout."""
    make_checkout(tmp_path / "arena-distill")
    folder = tmp_path / "support"
    made = shutil.ignore_patterns("judges", "results", ".snakemake")
    shutil.copytree(ROOT / "examples/module", folder, ignore=made)
    replace(folder / "Snakefile", "../../Snakefile", "../arena-distill/Snakefile")
    replace(folder / "config/config.yaml", "voted: 240", "voted: 64")
    replace(folder / "config/config.yaml", "unvoted: 60", "unvoted: 16")
    with (folder / "Snakefile").open("a") as file:
        file.write('\n\nshell.prefix("echo here >> prefixed.txt; ")\n')
    return folder


def use_the_other_recipe(config: Path) -> None:
    """The recipe that no other whole run of these tests follows, and a quantised judge."""
    given = yaml.safe_load(config.read_text())
    recipe = yaml.safe_load((ROOT / "config/recipes/blackpearl.yaml").read_text())
    sizes = {"bits": 8, "group_size": 32, "samples": 16, "validation_rows": 16}
    mine = {
        "defaults": {"quantization": sizes},
        "prediction": {"model": "gptq"},
        "environments": {"gptq": warm_python(GPTQ)},
    }
    given["arena"] = overlay(overlay(given["arena"], recipe), mine)
    config.write_text(yaml.safe_dump(given))


@pytest.mark.gptq
@pytest.mark.skipif(not GPTQ.exists(), reason=f"no quantisation environment at {GPTQ}")
def test_another_repository_uses_it_as_a_module(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the package from its wheel: beside the rules there is none. And with the other recipe."""
    use_the_other_recipe(repository / "config/config.yaml")
    site = make_wheel(tmp_path / "wheel")
    monkeypatch.setenv("PYTHONPATH", str(site))
    checkout = repository.parent / "arena-distill"
    shutil.rmtree(checkout / "workflow/arena_distill")
    before = set(checkout.rglob("*"))
    where = [warm_python(), "-c", "import arena_distill; print(arena_distill.__file__)"]
    found = subprocess.run(where, cwd=repository, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()).is_relative_to(site)
    snakemake(repository, "--cores", "2")

    judge = repository / "judges/results/support"
    made = {path.name for path in repository.iterdir()}
    assert {"judges", "results"} <= made
    assert {path.name for path in (repository / "judges").iterdir()} == {"results"}
    for name in (
        "submission.csv",
        "metrics.json",
        "report/log_loss.svg",
        "adapters/student/fold_1/adapter_model.safetensors",
        "weights/student/merged/model.safetensors",
        "weights/student/gptq/drift.json",
        "logs/evaluate.log",
        "benchmarks/evaluate.tsv",
    ):
        assert (judge / name).is_file(), name
    metrics = json.loads((judge / "metrics.json").read_text())
    assert metrics["folding"]["method"] == "stratified"
    assert not (judge / ".checkpoints").exists()
    assert all("__pycache__" in path.parts for path in set(checkout.rglob("*")) - before)

    assert {path.name for path in (repository / "results").iterdir()} == {
        "battles",
        "ranking.csv",
        "judge.html",
    }
    with (repository / "results/ranking.csv").open() as file:
        assert {row["bot"] for row in csv.DictReader(file)} == {"kind", "curt", "lost"}
    page = (repository / "results/judge.html").read_bytes()
    assert page == (judge / "report.html").read_bytes()
    # Of all rules only this repository's own three had this repository's prefix.
    assert (repository / "prefixed.txt").read_text() == "here\n" * 3

    assert "Nothing to be done" in snakemake(repository, "--cores", "2")
    assert "backbones/" not in snakemake(repository, "-n"), "tiny backbones come with the package"
    log = (judge / "logs/evaluate.log").read_text()
    assert "Traceback" not in log


def test_without_a_prefix_the_same_battles_are_read(repository: Path) -> None:
    replace(repository / "Snakefile", '    prefix:\n        "judges"\n', "")
    announced = snakemake(repository, "-n")
    assert "Reading battles: results/battles/train.csv results/battles/test.csv" in announced
    assert "judges/" not in announced


def test_the_checkout_beside_it_is_a_workflow_still(repository: Path) -> None:
    checkout = repository.parent / "arena-distill"
    assert "good condition" in snakemake(checkout, "--lint")
    assert "Job stats" in snakemake(checkout, "-n")


def test_a_plan_of_another_repository_prices_the_jobs_of_the_module(repository: Path) -> None:
    command = [warm_python(), "-m", "arena_distill", "plan", "--json"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    jobs = {job["rule"]: job for job in json.loads(done.stdout)["jobs"]}
    assert jobs["arena_train_teacher"]["flops"] > 0
    assert jobs["rank_bots"]["flops"] == 0
