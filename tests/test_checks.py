"""Every fault that the configuration or its files show is one line, before any job."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkouts import ROOT, Checkout, make_checkout

from arena_distill.config.backbone import TINY
from arena_distill.config.checks import findings
from arena_distill.config.mistakes import repeated_keys
from arena_distill.config.model_files import classifiers
from arena_distill.config.run import load, overlay
from arena_distill.errors import InputError
from arena_distill.runs.graph import read_graph

RAW: dict[str, Any] = {
    "run": "mini",
    "environments": {"gptq": sys.executable},
    "data": {
        "train": "mine/train.csv",
        "ut": [
            "mine/ut.csv",
            {"path": "mine/fetched", "hub": "org/battles", "revision": "1", "files": ["*.parquet"]},
        ],
        "test": "mine/test.csv",
        "solution": "mine/solution.csv",
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
            "quantization": {"group_size": 32},
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
    (folder / "mine").mkdir(exist_ok=True)
    for name in NAMED:
        if name.startswith("mine/"):
            (folder / name).write_text("id\n")
    shutil.copytree(TINY / "llama", folder / "models/llama")
    shutil.copytree(TINY / "llama", folder / "models/tokenizer")
    (folder / "models/x.gguf").write_bytes(b"GGUF")


def is_made(path: str) -> bool:
    return path == "mine/fetched"


def told(raw: dict[str, Any]) -> list[str]:
    """The lines that a configuration is refused with."""
    try:
        config = load(raw)
    except InputError as error:
        return str(error).splitlines()
    return [finding.line for finding in findings(config, is_made, os.path.abspath)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with all that `RAW` names."""
    provide(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert told(RAW) == []
    return tmp_path


def test_each_missing_path_is_a_line_with_its_key(here: Path) -> None:
    for name in ("mine", "models"):
        shutil.rmtree(here / name)
    found = {finding.path: finding for finding in findings(load(RAW), is_made, os.path.abspath)}
    assert found.keys() == NAMED.keys()
    for path, key in NAMED.items():
        assert found[path].line.startswith(f"config: {key}: {path} is not there; ")
        assert "\n" not in found[path].line
        assert found[path].is_missing


def change_json(file: str, **changes: Any) -> Callable[[], object]:
    return lambda: Path(file).write_text(
        json.dumps(overlay(json.loads(Path(file).read_text()), changes))
    )


def bare(*patterns: str) -> Callable[[], object]:
    """Take files away from the model."""
    return lambda: [f.unlink() for p in patterns for f in Path("models/llama").glob(p)]


def pickled() -> None:
    Path("models/llama/model.safetensors").rename("models/llama/pytorch_model.bin")


def sharded() -> None:
    bare("*.safetensors")()
    index = {"weight_map": {"model.norm.weight": "model-1.safetensors"}}
    Path("models/llama/model.safetensors.index.json").write_text(json.dumps(index))


def cut_off() -> None:
    os.truncate("models/llama/model.safetensors", 2000)


def a_folder() -> None:
    Path("mine/judged.csv").unlink()
    Path("mine/judged.csv").mkdir()


MODEL, CONFIG = "judges.path.backbone: models/llama", "models/llama/config.json"
CHECKED: list[tuple[Callable[[], object], dict[str, Any], str]] = [
    (lambda: Path("mine/train.csv").write_text(""), {}, "data.train: mine/train.csv is empty; put"),
    (a_folder, {}, "judges.asked.external.file: mine/judged.csv is a folder; give a file"),
    (lambda: None, {"judges": {"gguf": {"backbone": {"tokenizer": "mine/ut.csv"}}}},
     "judges.gguf.backbone.tokenizer: mine/ut.csv is a file; give a folder"),
    (lambda: Path("models/tokenizer/tokenizer.json").unlink(), {},
     "judges.gguf.backbone.tokenizer: models/tokenizer has no tokenizer"),
    (lambda: Path("models/x.gguf").write_text("version https://git-lfs"), {},
     "judges.gguf.backbone.gguf: models/x.gguf is no GGUF file"),
    (lambda: Path(CONFIG).write_text("["), {}, f"{MODEL}/config.json is no JSON object"),
    (change_json(CONFIG, model_type="mamba"), {}, f"{MODEL} is a mamba, of which transformers has no"),
    (change_json(CONFIG, model_type="own", auto_map={}), {}, "code of its own, which is never run"),
    (pickled, {}, f"{MODEL} has weights as pytorch_model.bin alone, which is not read: save the model"),
    (bare("*.safetensors"), {}, f"{MODEL} has no weights (model.safetensors): fetch the model again"),
    (sharded, {}, "judges.path.backbone: models/llama/model-1.safetensors is not there: fetch"),
    (cut_off, {}, f"{MODEL}/model.safetensors is not whole"),
    (bare("tokenizer*"), {}, f"{MODEL} has no tokenizer (tokenizer.json"),
    (change_json(CONFIG, vocab_size=500), {}, "the model has 500 embeddings: this tokenizer is not"),
    (change_json(CONFIG, max_position_embeddings=512),
     {"judges": {"again": {"encoding": {"max_length": 512}}}},
     "judges.path.encoding.max_length: 1024, but models/llama has positions for 512 tokens: lower it"),
    (lambda: None, {"prediction": {"max_lengths": [9000]}},
     "prediction.max_lengths: 9000, but "),
    (lambda: None, {"judges": {"path": {"backbone": {"layers": 99}}}},
     "judges.path.backbone.layers: 99, but models/llama has 4 layers: lower it"),
    (lambda: None, {"judges": {"path": {"lora": {"target_modules": ["q_proj", "query"]}}}},
     "lora.target_modules: query: models/llama has no such module; it has down_proj, gate_proj, k_proj"),
    (lambda: None, {"judges": {"student": {"quantization": {"group_size": 128}}}},
     "judges.student.quantization.group_size: 128 does not divide the 96 inputs of "),
    (lambda: None,
     {"environments": {"gptq": "venv/bin/python"},
      "judges": {"student": {"quantization": {"group_size": 32}}}},
     "venv/bin/python is not an interpreter that can be run: make setup; or name one"),
    (lambda: None, {"environments": {"main": "venv/bin/python"}},
     "environments.main: "),
]  # fmt: skip


@pytest.mark.parametrize(("breaks", "changes", "words"), CHECKED, ids=[c[2][:60] for c in CHECKED])
def test_what_the_files_show_to_fail_is_one_line(
    breaks: Callable[[], object], changes: dict[str, Any], words: str, here: Path
) -> None:
    breaks()
    (line,) = told(overlay(RAW, changes))
    assert line.startswith("config: ")
    assert words in line
    assert "\n" not in line


def test_a_group_size_that_fits_is_named(here: Path) -> None:
    (line,) = told(overlay(RAW, {"judges": {"student": {"quantization": {"group_size": 128}}}}))
    advised = int(line.rpartition("use ")[2])
    assert (
        told(overlay(RAW, {"judges": {"student": {"quantization": {"group_size": advised}}}})) == []
    )


def test_a_key_that_stands_twice_is_told_with_its_lines(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "run: a\n"
        "folds: &same {n: 2}\n"
        "judges:\n"
        "  j: {training: {lr: 1.0, lr: 2.0}}\n"
        "again: *same\n"
        "both: [{k: 1}, {k: 1}]\n"
        "run: b\n"
    )
    first, second = repeated_keys(file)
    assert first.startswith(f"config: run: {file}, line 7: this key stands in line 1 already, ")
    assert second.startswith(
        f"config: judges.j.training.lr: {file}, line 4: this key stands in line 4"
    )
    with pytest.raises(InputError, match="line 7"):
        load(RAW, [file])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "gemma3_text", "bert"])
def test_known_kinds_of_models_are_those_of_transformers(kind: str) -> None:
    from transformers.models.auto import modeling_auto

    known = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    assert classifiers() == set(known)
    assert kind in known


# --- in the workflow --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """The files that a run leaves, empty."""
    checkout = make_checkout(tmp_path_factory.mktemp("left") / "checkout")
    provide(checkout.folder)
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
def test_existing_outputs_do_not_replace_missing_inputs(left: Checkout) -> None:
    away = {path: left.folder / path for path in NAMED}
    for file in away.values():
        file.rename(f"{file}-renamed")
    try:
        for how in (["-n"], ["--cores", "1"]):
            done = left.snakemake(*how)
            assert done.returncode
            lines = [line.strip() for line in done.stderr.splitlines() if "config: " in line]
            assert len(lines) == len(NAMED), done.stderr
            for path, key in NAMED.items():
                missing = f"config: {key}: {path} is not there; "
                assert any(line.startswith(missing) for line in lines), (path, lines)
            assert "Traceback" not in done.stderr
        assert not left.snakemake("--summary").returncode  # who looks is shown
    finally:
        for file in away.values():
            Path(f"{file}-renamed").rename(file)


@pytest.mark.slow
def test_only_needed_inputs_must_exist(left: Checkout) -> None:
    """Battles can be read before the models exist."""
    (left.folder / "models").rename(left.folder / "renamed")
    try:
        assert not left.snakemake("-n", "folds").returncode
        assert left.snakemake("-n", "logits").returncode
    finally:
        (left.folder / "renamed").rename(left.folder / "models")


@pytest.mark.slow
def test_counting_battles_trains_nothing_again(left: Checkout) -> None:
    fewer = "judges={student: {quantization: {samples: 20}}}"
    left.run("--touch", "--forcerun", "check_counts")
    assert left.would_run("students", "--config", fewer) == {"check_counts": 1, "students": 1}
    needed = left.would_run("all", "--config", fewer)
    assert {"check_counts", "quantize_model", "evaluate"} <= needed.keys()
    assert not {"train_teacher", "distill_student", "merge_folds"} & needed.keys()


PLACES = {
    "data": "my data's $(touch ran)",
    "models": 'a "model"; exit 1',
    "results": "$(touch ran) & 'it'",
}
"""Folders of a run, by what is in them."""


@pytest.mark.slow
def test_spaces_quotes_and_dollars_in_every_path(tmp_path: Path) -> None:
    """Nothing of a path is run, and the rules that need no model read and write below such folders."""
    checkout = make_checkout(tmp_path / "a checkout's folder")
    provide(checkout.folder)
    for kind in ("data", "models"):
        (checkout.folder / PLACES[kind]).mkdir()
    battles = [
        {"id": n, "prompt": f"q{n}", "response_a": "a", "response_b": "b", "winner": "model_a"}
        for n in range(20)
    ]
    file, model = f"{PLACES['data']}/it's.jsonl", f"{PLACES['models']}/llama $HOME"
    (checkout.folder / file).write_text("".join(json.dumps(b) + "\n" for b in battles))
    shutil.copytree(TINY / "llama", checkout.folder / model)
    raw = {
        "results": PLACES["results"],
        "environments": {"gptq": sys.executable},
        "data": {"train": file, "test": file},
        "folds": {"n": 2},
        "judges": {"j": {"backbone": {"path": model}, "quantization": {"group_size": 32}}},
        "final": "j",
    }
    (checkout.folder / "mini.yaml").write_text(yaml.safe_dump(raw))
    checkout.run("-n")
    tokens = f"{PLACES['results']}/default/tokens/llama-HOME/battles.parquet"
    checkout.run(tokens, "folds")
    assert (checkout.folder / tokens).is_file()
    assert not list(checkout.folder.rglob("ran"))


# --- the command ------------------------------------------------------------------------------------


def check(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command where importing PyTorch is an error."""
    (folder / "torch.py").write_text("raise RuntimeError('torch was imported')")
    command = [sys.executable, "-m", "arena_distill", "check", *arguments]
    path = os.pathsep.join([str(folder), str(ROOT / "workflow")])
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_command_tells_everything_at_once_and_loads_no_torch(here: Path) -> None:
    raw = overlay(RAW, {"judges": {"path": {"backbone": {"layers": 99}}}})
    (here / "mine.yaml").write_text(yaml.safe_dump(raw))
    (here / "mine/train.csv").unlink()
    given = ["--snakefile", str(ROOT / "Snakefile"), "--configfile", "mine.yaml"]
    done = check(here, *given)
    assert done.returncode == 1
    train, layers = done.stderr.splitlines()
    assert train.startswith("error: config: data.train: mine/train.csv is not there; ")
    assert layers.startswith("error: config: judges.path.backbone.layers: 99, but ")
    done = check(here, *given, "--config", "results=~/x", "folds={n: 1}")
    assert done.returncode == 1
    assert len([line for line in done.stderr.splitlines() if "config: " in line]) == 2
    (here / "mine/train.csv").write_text("id\n")
    (here / "mine.yaml").write_text(yaml.safe_dump(RAW))
    done = check(here, *given)
    assert not done.returncode, done.stderr
    assert done.stdout.startswith("nothing found. Looked at:\n  run mini: judges ")
    assert "  data.train: mine/train.csv\n" in done.stdout
    assert not (here / "results").exists()
    assert not (here / ".snakemake/log").exists()


def test_a_dry_run_refuses_a_key_that_stands_twice(here: Path) -> None:
    text = yaml.safe_dump(RAW) + "run: other\n"
    (here / "mine.yaml").write_text(text)
    done = check(here, "--snakefile", str(ROOT / "Snakefile"), "--configfile", "mine.yaml")
    assert done.returncode == 1
    assert "config: run: " in done.stderr
    assert f"line {text.count(chr(10))}: this key stands in line" in done.stderr


def test_another_workflow_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "Snakefile").write_text('rule all:\n    output: "x"\n    shell: "touch x"\n')
    done = check(tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: nothing to check: this Snakefile does not use the rules of Arena Distill"
    ]
