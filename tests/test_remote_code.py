"""A model's folder is data: Python code in it never runs, even with `yes` on stdin."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkouts import GPTQ, ROOT, make_checkout, warm_python

from arena_distill.config.backbone import TINY

SOURCES = sorted(
    [*ROOT.glob("workflow/**/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("scripts/*.py")]
)
LOADS = {
    "load_classifier": "from arena_distill.models.loading import load_classifier as load",
    "load_tokenizer": "from arena_distill.encoding.tokenization import load_tokenizer as load",
    "prepare_backbone": """\
from arena_distill.models.preparation import prepare_backbone
from arena_distill.config.backbone import Backbone
from arena_distill.config.phases.encoding import BackboneSettings
def load(folder):
    settings = BackboneSettings.of(Backbone(path=str(folder), layers=1))
    prepare_backbone(Path("made"), settings=settings)""",
    "read_config": """\
from arena_distill.config.backbone import Backbone
from arena_distill.planning.sizes import read_config
def load(folder):
    read_config(Backbone(path=str(folder)), Path("nowhere"))""",
    "layer_sizes": "from arena_distill.deployment.gptq import _layer_sizes as load",
    "load_quantized": "from arena_distill.deployment.gptq import load_quantized as load",
}
ANSWERED = """\
from pathlib import Path
from arena_distill.errors import InputError
{load}
try:
    load(Path("model"))
except InputError as error:
    print("ended: refused:", error)
else:
    print("ended: loaded")
"""
CODE = """\
from pathlib import Path
Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "mine"
class Model(LlamaForSequenceClassification):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of a custom type, with Python code that defines it and creates `marker`."""
    folder = tmp_path / "model"
    shutil.copytree(TINY / "llama", folder)
    (folder / "mine.py").write_text(CODE.format(marker=str(tmp_path / "marker")))
    config = json.loads((folder / "config.json").read_text())
    named = {"AutoConfig": "mine.Config", "AutoModelForSequenceClassification": "mine.Model"}
    changed = {"model_type": "mine", "auto_map": named | {"AutoModel": "mine.Model"}}
    changed["quantization_config"] = {"quant_method": "gptq", "bits": 8, "group_size": 32}
    (folder / "config.json").write_text(json.dumps(config | changed))
    return folder


def said_yes(folder: Path, load: str) -> str:
    """The result of a load with `yes` on stdin."""
    python = GPTQ if load == "load_quantized" else warm_python()
    done = subprocess.run(
        [python, "-c", ANSWERED.format(load=LOADS[load])],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT / "workflow"), "HF_MODULES_CACHE": str(folder)},
        input="y\n" * 20,
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr
    return done.stdout[done.stdout.rindex("ended: ") :].strip()  # after gptqmodel's own output


@pytest.mark.parametrize(
    "load",
    [
        "load_classifier",
        "prepare_backbone",
        "read_config",
        "layer_sizes",
        pytest.param(
            "load_quantized",
            marks=[
                pytest.mark.slow,
                pytest.mark.gptq,
                pytest.mark.skipif(not GPTQ.exists(), reason=f"no environment at {GPTQ}"),
            ],
        ),
    ],
)
def test_a_models_own_code_is_not_run(model: Path, load: str) -> None:
    told = said_yes(model.parent, load)
    assert told.startswith("ended: refused: model: ") and "custom code" in told
    assert told.count("\n") == 0
    assert not (model.parent / "marker").exists()


def test_a_tokenizers_own_code_is_not_run(model: Path) -> None:
    shutil.copy(TINY / "llama/config.json", model)
    file = model / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    mine = {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": [None, "mine.Tokenizer"]}}
    file.write_text(json.dumps(settings | mine))
    told = said_yes(model.parent, "load_tokenizer")
    assert told.count("\n") == 0
    assert not (model.parent / "marker").exists()


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_every_load_refuses_a_folders_code(source: Path) -> None:
    """Without the argument, transformers asks the user."""
    for call in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Attribute)
            and call.func.attr in ("from_pretrained", "from_config")
            and not ast.unparse(call.func.value).startswith(
                ("Peft", "Lora", "Judge")
            )  # they run no code
        ):
            said = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert said.get("trust_remote_code") == "False", f"{source}:{call.lineno}"


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_processes_have_no_stdin(source: Path) -> None:
    for call in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(call, ast.Call) and ast.unparse(call.func) in (
            "subprocess.run",
            "subprocess.Popen",
        ):
            said = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert said.get("stdin") == "subprocess.DEVNULL", f"{source}:{call.lineno}"


@pytest.mark.slow
def test_a_job_has_no_stdin(tmp_path: Path) -> None:
    """Input to Snakemake's terminal or pipe does not reach a job."""
    checkout = make_checkout(tmp_path / "checkout")
    asking = "import sys; sys.exit(f'said: {sys.stdin.read()!r}')"
    (checkout.folder / "workflow/arena_distill/__main__.py").write_text(asking)
    command = [sys.executable, "-m", "snakemake", "folds", "--cores", "1"]
    done = subprocess.run(
        [*command, "--configfile", "mini.yaml"],
        cwd=checkout.folder,
        input="y\n" * 20,
        capture_output=True,
        text=True,
    )
    assert done.returncode
    told = (checkout.results / "logs/simulate_arena.log").read_text()
    assert told.strip() == "said: ''"
