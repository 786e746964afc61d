"""Files that the configuration names have to exist, even if an earlier run left all outputs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkouts import Checkout, make_checkout

from arena_distill.config.backbone import TINY
from arena_distill.config.checks import missing_paths
from arena_distill.config.run import load
from arena_distill.runs.graph import read_graph

RAW: dict[str, Any] = {
    "run": "mini",
    "data": {
        "train": "mine/train.csv",
        "ut": ["mine/ut.csv", "mine/fetched.parquet"],
        "test": "mine/test.csv",
        "solution": "mine/solution.csv",
        "fetch": {
            "mine/fetched.parquet": {
                "hub": "org/battles",
                "revision": "1",
                "files": ["x.parquet"],
                "format": "arena",
                "without": ["mine/test.csv"],
            }
        },
    },
    "folds": {"n": 2},
    "judges": {
        "path": {"backbone": {"path": "models/llama"}},
        "again": {"backbone": {"path": "models/llama"}},
        "gguf": {"backbone": {"gguf": "models/x.gguf", "tokenizer": "models/tokenizer"}},
        "hub": {"backbone": {"hub": "org/model", "revision": "1"}},
        "asked": {"external": {"file": "mine/judged.csv"}},
        "student": {
            "backbone": {"tiny": "qwen2"},
            "teachers": ["path", "again", "gguf", "hub", "asked"],
            "quantization": None,
        },
    },
    "prediction": {"model": "merged"},
    "final": "student",
}
NAMED = {
    "mine/train.csv": "data.train",
    "mine/ut.csv": "data.ut",
    "mine/test.csv": "data.test",
    "mine/solution.csv": "data.solution",
    "mine/judged.csv": "judges.asked.external.file",
    "models/llama/config.json": "judges.path.backbone.path",
    "models/x.gguf": "judges.gguf.backbone.gguf",
    "models/tokenizer": "judges.gguf.backbone.tokenizer",
}


def provide(folder: Path) -> None:
    for name in NAMED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_each_missing_path_is_a_line_with_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = missing_paths(load(RAW), lambda path: path == "mine/fetched.parquet")
    assert lines.keys() == NAMED.keys()
    for path, key in NAMED.items():
        assert lines[path].startswith(f"config: {key}: {path} is not there; ")
        assert "\n" not in lines[path]
    provide(tmp_path)
    assert not missing_paths(load(RAW), lambda path: path == "mine/fetched.parquet")


# --- in the workflow --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """The files that a run leaves, empty."""
    checkout = make_checkout(tmp_path_factory.mktemp("left") / "checkout")
    provide(checkout.folder)
    shutil.copy(TINY / "llama/config.json", checkout.folder / "models/llama")
    (checkout.folder / "mini.yaml").write_text(yaml.safe_dump(RAW, sort_keys=False))
    arguments = ["--snakefile", str(checkout.folder / "Snakefile")]
    arguments += ["--directory", str(checkout.folder), "--configfile"]
    for job in read_graph([*arguments, str(checkout.folder / "mini.yaml")]).jobs:
        for output in job.outputs:
            path = checkout.folder / output
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch() if path.suffix else path.mkdir(exist_ok=True)
    checkout.run("--touch")
    assert "Nothing to be done" in checkout.run()
    return checkout


@pytest.mark.slow
@pytest.mark.parametrize("path", NAMED)
def test_existing_outputs_do_not_replace_missing_inputs(left: Checkout, path: str) -> None:
    (left.folder / path).rename(left.folder / "renamed")
    try:
        for how in (["-n"], ["--cores", "1"]):
            done = left.snakemake(*how)
            assert done.returncode
            told = [line.strip() for line in done.stderr.splitlines() if "config: " in line]
            assert len(told) == 1, done.stderr
            assert re.match(rf"config: {NAMED[path]}: {path} is not there; ", told[0])
            assert "Traceback" not in done.stderr
        assert not left.snakemake("--summary").returncode  # who looks is shown
    finally:
        (left.folder / "renamed").rename(left.folder / path)


@pytest.mark.slow
def test_only_needed_inputs_must_exist(left: Checkout) -> None:
    """Battles can be read before the models exist."""
    (left.folder / "models").rename(left.folder / "renamed")
    try:
        assert not left.snakemake("-n", "folds").returncode
        assert left.snakemake("-n", "logits").returncode
    finally:
        (left.folder / "renamed").rename(left.folder / "models")
