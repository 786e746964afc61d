"""Bad and hostile inputs: each gets one line with the words that a person needs, never a traceback.

Commands run in this process, by the command line's own `main`. Battles, configurations, models, artifacts,
endpoints: a list each, with what is wrong, and a regular expression of the words.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import re
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import test_external
import torch
from chat_server import Body, ChatServer, Reply, answer, chat_server, error
from checkouts import Checkout
from conftest import Run, made_up_battles
from judges import Finished, finished_judge
from made_up_run import MadeUpRun, made_up_run
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_checks import RAW
from test_config import FILES, judged, raw
from test_external import ENDPOINT, KEY, asking
from test_training import training_settings

from arena_distill import cli
from arena_distill.battles.folds import assign_folds
from arena_distill.config.encoding import Encoding
from arena_distill.config.head import JOINT
from arena_distill.config.phases.deployment import MergeSettings
from arena_distill.config.phases.prediction import ScoringSettings
from arena_distill.config.phases.scoring import LogitsSettings
from arena_distill.config.run import load, overlay
from arena_distill.deployment import gptq
from arena_distill.errors import InputError
from arena_distill.evaluation.report import render_report
from arena_distill.evaluation.terminal import print_table
from arena_distill.files.artifacts import (
    file_sha256,
    read_json,
    read_parquet,
    write_json,
    write_parquet,
)
from arena_distill.files.logits import read_logits, write_logits
from arena_distill.models.loading import load_classifier
from arena_distill.runtime import launch
from arena_distill.runtime.launch import Launch
from arena_distill.training.trainer import train_fold

Arena = Callable[..., str]
Damage = Callable[[Path], object]


@pytest.fixture
def arena(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Arena:
    """Run a command that must be refused, and return its one line; any other error fails the test."""
    monkeypatch.setattr(launch, "ignore_signals", lambda: None)  # they would stay ignored
    monkeypatch.setattr(launch, "lock_output", lambda folder: None)  # this process would keep it
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["arena-distill", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capfd.readouterr().err
        lines = [line for line in printed.split("\n") if line.startswith("error: ")]
        assert ended.value.code == 1, printed
        assert len(lines) == 1 and "Traceback" not in printed, printed
        assert lines[0].isprintable() and len(lines[0]) < 2000
        return lines[0].removeprefix("error: ")

    return run


def parametrized(cases: list[Any]) -> Any:
    """One test per case, named by its first part, or else by its words."""
    names = [
        f"{case[0]}: {case[-1]}"[:90] if isinstance(case[0], str) else str(case[-1])[:90]
        for case in cases
    ]
    return pytest.mark.parametrize("case", cases, ids=names)


# --- battles ----------------------------------------------------------------------------------------

HEAD = b"id,prompt,response_a,response_b,label\n"
GOOD = HEAD + b"1,q,a,b,0\n2,q,a,b,1\n3,q,a,b,2\n"


def parquet(table: pa.Table | dict[str, Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), sink)
    return sink.getvalue().to_pybytes()


def zst(content: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(content, asbytes=True))


BATTLE: dict[str, Any] = {
    "id": ["1"],
    "prompt": ["q"],
    "response_a": ["a"],
    "response_b": ["b"],
    "label": [0],
}
BATTLES: list[tuple[str, bytes, str]] = [
    ("t.csv", b"", "t.csv: not a CSV file"),
    ("t.csv", b"id,prompt,response_a,response_b,label\n", "t.csv: holds no battle"),
    ("t.csv", b"id;prompt\n1;x\n", "of no known format; columns found: id;prompt; formats"),
    ("t.csv", b"id,id,prompt,response_a,response_b,label\n1,1,q,a,b,0\n", "appears twice"),
    ("t.csv", b"id,prompt,response_a,response_b\n1,q,a,b\n", "no column of votes"),
    ("t.csv", b"id,prompt,response_a,response_b,label\n1,q\xff,a,b,0\n", "UTF-8 at byte 41"),
    ("t.csv", b'id,prompt,response_a,response_b,label\n1,q,a,b,"0\n2,q,a', "inside a quoted"),
    ("t.csv", b"id,prompt,response_a,response_b,label\n1,q,a,b,3\n", "no usable train battle"),
    ("t.csv.gz", gzip.compress(b"id,prompt" * 99, mtime=0)[:30], "t.csv.gz: cannot be read"),
    ("t.csv.gz", b"id,prompt", "t.csv.gz: cannot be read"),
    ("t.jsonl", b"", "t.jsonl: holds no battle"),
    ("t.jsonl", b"id,prompt\n1,2\n", "t.jsonl, row 1: not a battle: .* JSON-lines file"),
    ("t.jsonl", b'{"id": "\xff"}\n', "UTF-8 at byte 8"),
    ("t.xlsx", b"", "unknown kind of file"),
    ("t.parquet", b"PAR1", "not a whole parquet file"),
    ("t.csv", b'x,y\n1,2\n"open,2\n3,4\n', r"t.csv, row 2: ends inside a quoted cell"),
    ("t.csv", b'x,y\n1,2\n"open,2\n3,"4\n',
     r"t.csv, row 2: a quote inside a cell, or one that is not closed"),
    ("t.csv", b'x,y\n1,"say \\"hi\\""\n', r"t.csv, row 1: a quote .* set `escape: backslash`"),
    ("t.csv", b'x,y\n1,"a"b\n', r"t.csv, row 1: a quote .*; double the quotes"),
    ("t.csv.zst", zst(GOOD)[:20], "t.csv.zst: cannot be read"),
    ("t.csv.zst", GOOD, "t.csv.zst: cannot be read"),
    ("t.csv.gz", gzip.compress(GOOD)[:-4], "t.csv.gz: cannot be read"),
    ("t.csv.gz", gzip.compress(GOOD)[:-8] + bytes(8), "t.csv.gz: cannot be read"),
    ("t.csv.gz", gzip.compress(b""), "t.csv.gz: not a CSV file"),
    ("t.jsonl.gz", gzip.compress(b"["), "t.jsonl.gz, row 1: not a battle"),
    ("t.csv", GOOD.decode().encode("utf-16"), "not UTF-8 at byte 0"),
    ("t.csv", HEAD + b"1,q\x00\x1b[2J,a,b,7\n", "no usable train battle: .* row 1, column label"),
    ("t.csv", b"\x00" * 4096, r"t\.csv"),
    ("t.csv", b'"' * 4095, r"t\.csv"),
    ("t.csv", b"," * 100_000, r"t\.csv: not a CSV file"),
    ("t.csv", HEAD + b"\n\n\n", "holds no battle"),
    ("t.csv", HEAD.replace(b"prompt", b"\x1b]0;prompt"), r"t\.csv"),
    ("t.tsv", HEAD + b"1,q,a,b,0\n", "of no known format"),
    ("t.jsonl", b"[" * 200_000, "row 1: not a battle: "),
    ("t.jsonl", b'{"a":' * 200_000, "row 1: not a battle: "),
    ("t.jsonl", b"\xef\xbb\xbf\xef\xbb\xbf{}", "row 1: not a battle"),
    ("t.jsonl", b"{}\n{}\n", "of no known format; columns found: none|t.jsonl"),
    ("t.jsonl", b"null\ntrue\n1\n", "row 1: not a battle: a JSON object per line"),
    ("t.json", b"[" * 200_000, "not a JSON list of objects"),
    ("t.json", b"[1, 2, null]", r"t\.json"),
    ("t.json", b"[]", "holds no battle"),
    ("t.json", b'[{"id": 1}', "not a JSON list of objects"),
    ("t.json", b'{"rows": [{"id": 1}]}', "of no known format"),
    ("t.ndjson", b"\xff\xfe", "not UTF-8 at byte 0"),
    ("t.parquet", b"", "not a whole parquet file"),
    ("t.parquet", pickle.dumps({"id": [1]}), "a pickle or CSV must be converted"),
    ("t.parquet", GOOD, "a pickle or CSV must be converted"),
    ("t.parquet", b"PAR1" + bytes(64) + b"PAR1", "not a whole parquet file"),
    ("t.parquet", b"PAR1" + struct.pack("<I", 1 << 31) + b"PAR1", "not a whole parquet file"),
    ("t.parquet", parquet(BATTLE)[:-20], "not a whole parquet file"),
    ("t.parquet", parquet({"x": [1]}), "of no known format; columns found: x"),
    ("t.parquet", parquet(pa.table(BATTLE).slice(0, 0)), "holds no battle"),
    ("t.parquet", parquet(BATTLE | {"prompt": [b"\xff"]}), "column prompt: holds binary that is not UTF-8"),
    ("t.parquet", parquet(BATTLE | {"prompt": [{"a": 1}]}), "column prompt: holds struct"),
    ("t.parquet", parquet(BATTLE | {"prompt": [[["q"]]]}), "column prompt: holds list"),
    ("t.parquet", parquet(BATTLE | {"label": [[0]]}), "column label: holds list"),
    ("t.parquet", parquet(BATTLE | {"prompt": pa.array([0], pa.timestamp("s"))}),
     "column prompt: holds timestamp"),
    ("t.parquet", parquet(BATTLE | {"label": [9]}), "no usable train battle: all 1 rows"),
    ("t.parquet.gz", gzip.compress(parquet(BATTLE)), "unknown kind of file"),
    ("t.pkl", pickle.dumps({"id": [1]}), "unknown kind of file"),
    ("t.csv.bz2", b"BZh9", "unknown kind of file"),
    ("t", GOOD, "unknown kind of file"),
]  # fmt: skip


@pytest.fixture
def read(tmp_path: Path, arena: Arena) -> Callable[[Path], str]:
    """The line with which a file of training battles is refused."""
    (tmp_path / "test.csv").write_bytes(GOOD)
    outputs = ("output", "rejected", "reading")
    options = [part for name in outputs for part in (f"--{name}", tmp_path / f"{name}.parquet")]
    options += ["--settings", json.dumps({"version": 1, "max_refused": 0.5})]
    return lambda file: arena(
        *("phase", "read-battles", *options, "--train", file, "--test", tmp_path / "test.csv")
    )


@parametrized(BATTLES)
def test_battles(case: tuple[str, bytes, str], tmp_path: Path, read: Callable[[Path], str]) -> None:
    name, content, words = case
    (tmp_path / name).write_bytes(content)
    told = read(tmp_path / name)
    assert re.search(words, told), told
    assert str(tmp_path / name) in told or name in told
    assert not (tmp_path / "output.parquet").exists()


def folder(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").touch()


STRANGE: list[tuple[str, Damage, str]] = [
    ("a folder", folder, "no ordinary file|unknown kind of file"),
    ("a pipe that nobody writes to", os.mkfifo, "is no ordinary file"),
    ("a device without an end", lambda p: p.symlink_to("/dev/zero"), "is no ordinary file"),
    ("a link to itself", lambda p: p.symlink_to(p), "cannot be read|no such file"),
    ("a link to nothing", lambda p: p.symlink_to(p.with_name("gone")), "no such file"),
    ("missing", lambda p: None, "no such file"),
    ("a terabyte of holes", lambda p: (p.touch(), os.truncate(p, 1 << 42)),
     "cannot be read|not a whole parquet"),
    ("holes after its header",
     lambda p: (p.write_bytes(b"id,prompt\n" * (1 << 21)), os.truncate(p, 1 << 42)),
     "cannot be read|not a whole parquet"),
]  # fmt: skip


@parametrized(STRANGE)
@pytest.mark.parametrize("kind", ["csv", "jsonl.gz", "parquet"])
def test_what_is_no_file_of_battles(
    case: tuple[str, Damage, str], kind: str, tmp_path: Path, read: Callable[[Path], str]
) -> None:
    _, make, words = case
    make(tmp_path / f"t.{kind}")
    told = read(tmp_path / f"t.{kind}")
    assert re.search(words, told), told


# --- configuration ----------------------------------------------------------------------------------


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    return overlay(RAW, changes)


def big(judge: dict[str, Any]) -> dict[str, Any]:
    """The configuration of another external judge."""
    return test_external.raw(big=judge)


def endpoint(**changes: Any) -> dict[str, Any]:
    return {"external": {"endpoint": {**ENDPOINT, **changes}}}


DEEP: Any = "x"
for _ in range(60):  # printed whole, it would have 10**18 letters
    DEEP = [DEEP, DEEP]

CONFIGURATIONS: list[tuple[Any, str]] = [
    (raw(finale="s"), "config: finale: unknown key; did you mean 'final'?"),
    (raw(folds={"methods": "kfold"}), "config: folds.methods: unknown key; did you mean 'method'?"),
    (
        judged(l={"lora": {"dropuot": 0.1}}),
        "config: judges.l.lora.dropuot: unknown key; did you mean 'dropout'?",
    ),
    (
        judged(l={"lora": {"rr": 4}}),
        "config: judges.l.lora.rr: unknown key; did you mean 'r'?",
    ),
    (
        judged(l={"lora": {"zzz": 4}}),
        "config: judges.l.lora.zzz: unknown key; known keys: r, alpha, dropout, target_modules",
    ),
    (
        judged(l={"pretraining": {"keephead": True}}),
        "config: judges.l.pretraining.keephead: unknown key; did you mean 'keep_head'?",
    ),
    (
        judged(l={"techers": ["q"]}),
        "config: judges.l.techers: unknown key; did you mean 'teachers'?",
    ),
    (
        raw(data={**FILES, "arena": {"trains": 3}}),
        "config: data.arena.trains: unknown key; did you mean 'train'?",
    ),
    (raw(folds={"n": "five"}), "config: folds.n: "),
    (raw(folds={"n": 1}), "config: folds.n: "),
    (raw(folds={"method": "random"}), "config: folds.method: "),
    (judged(l={"lora": {"r": 0}}), "config: judges.l.lora.r: "),
    (judged(l={"lora": {"dropout": 1.5}}), "config: judges.l.lora.dropout: "),
    (
        judged(l={"lora": {"target_modules": "q_proj"}}),
        "config: judges.l.lora.target_modules: ",
    ),
    (judged(l={"training": {"lr": 0}}), "config: judges.l.training.lr: "),
    (judged(l={"training": {"lr": float("nan")}}), "config: judges.l.training.lr: "),
    (judged(l={"training": {"epochs": float("inf")}}), "config: judges.l.training.epochs: "),
    (judged(l={"training": {"betas": [0.9, 1.0]}}), "config: judges.l.training.betas.1: "),
    (judged(l={"loss": {"ce": 0, "kl": 0}}), "config: judges.l.loss: at least one of ce"),
    (judged(l={"encoding": {"max_length": 31}}), "config: judges.l.encoding.max_length: "),
    (judged(l={"training": None}), "config: judges.l.training: "),
    (judged(l="llama"), "config: judges.l: "),
    (raw(judges={}), "config: judges: "),
    (raw(judges=None), "config: judges: "),
    (raw(judges={"a b": {"backbone": {"tiny": "llama"}}}), "config: judges.a b: "),
    (raw(run="../up"), "config: run: "),
    (raw(prediction={"orders": []}), "config: prediction.orders: "),
    (raw(data={"train": "x.csv"}), "config: data: give `train` and `test`"),
    (raw(data={**FILES, "arena": {}}), "config: data: give files or `arena`, not both"),
    (
        raw(data={**FILES, "extra": [{"path": "x", "txt": "plain"}]}),
        "config: data.extra.0.txt: unknown key; did you mean 'text'?",
    ),
    (raw(data={**FILES, "ut": {"text": "plain"}}), "config: data.ut.0.path: missing: this key"),
    (raw(data={**FILES, "ut": [3]}), "config: data.ut.0: Input should be a valid dictionary"),
    ({k: v for k, v in raw().items() if k != "final"}, "config: final: missing"),
    (judged(l={"backbone": {"path": "x"}}), "config: judges.l.backbone: needs exactly one of"),
    (raw(judges={"l": {"backbone": {"hub": "a/b"}}}), "config: judges.l.backbone: `hub` and"),
    (raw(judges={"l": {"backbone": {}}}), "config: judges.l.backbone: needs exactly one"),
    (raw(judges={"l": {}}), "config: judges.l.backbone: missing"),
    ({}, "data: missing: this key is required"),
    ([], "config: Input should be"),
    (None, "config: Input should be"),
    ("x", "config: Input should be"),
    (raw(folds=DEEP), "config: folds: Input should be"),
    (raw(run=DEEP), "config: run: "),
    (raw(run="x" * 10_000), "config: run: "),
    (raw(**{"a\nb": 1}), "config: a\\nb: unknown key"),
    (raw(**{"\x1b[2J": 1}), "config: \\x1b[2J: unknown key"),
    (raw(**{"k" * 100_000: 1}), "config: kkk"),
    (raw(folds={1: 2}), "config: folds"),
    (raw(folds={"n": 10**400}), "config: folds.n: "),
    (raw(folds={"n": "5\n6"}), "config: folds.n: "),
    (raw(judges={"\ud800": {"backbone": {"tiny": "llama"}}}, final="x"), "config: judges"),
    (judged(l={"backbone": {"tiny": "llama", "layers": -1}}), "backbone.layers: "),
    (judged(l={"backbone": {"tiny": "llama", "path": "x"}}), "backbone: needs exactly one of"),
    (judged(s={"teachers": "l"}), "config: judges.s.teachers: "),
    (judged(s={"teachers": ["s"]}), "cycle"),
]
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"folds": {"seed": -1}}, "folds.seed: Input should be greater than or equal to 0"),
    ({"folds": {"seed": 1 << 32}}, "folds.seed: Input should be less than 4294967296"),
    ({"audit": {"seed": 1 << 32}}, "audit.seed: Input should be less than 4294967296"),
    ({"compare": {"seeds": [1, 1 << 32]}}, "compare.seeds.1: Input should be less"),
    ({"defaults": {"training": {"seed": -1}}}, "defaults.training.seed: Input should be greater"),
    ({"defaults": {"quantization": {"seed": -1}}}, "defaults.quantization.seed: Input should be"),
    ({"prediction": {"orders": ["AB", "AB"]}}, "prediction.orders: AB is named twice"),
    ({"prediction": {"max_lengths": [64, 64]}}, "prediction.max_lengths: 64 is named twice"),
    ({"compare": {"recipes": ["best", "best"]}}, "compare.recipes: best is named twice"),
    ({"defaults": {"training": {"lr": True}}}, "training.lr: this key is no switch"),
    ({"defaults": {"training": {"betas": [0.9, True]}}}, "training.betas: this key is no switch"),
    ({"folds": {"n": True}}, "folds.n: this key is no switch"),
    ({"defaults": {"training": {"fit_head": 1}}}, "fit_head: true or false expected, got 1"),
    ({"folds": {"near_duplicates": "no"}}, "near_duplicates: true or false expected, got 'no'"),
    ({"results": ""}, "results: a path expected, got nothing"),
    ({"results": " "}, "results: a path expected, got nothing"),
    ({"results": "~/results"}, f"results: ~ is not expanded: write {Path.home()}/results"),
    ({"results": "re{sults}"}, "results: { and } are wildcards of Snakemake"),
    ({"results": "a\nb"}, "results: a character that cannot be printed"),
    ({"results": "-n"}, "results: what starts with - is taken for an option: write ./-n"),
    ({"run": ""}, "run: String should match"),
    ({"run": "a\x00"}, "run: String should match"),
    ({"data": {"train": ["mine/train.csv", ""]}}, "data.train.1.path: a path expected"),
    ({"data": {"solution": "~/x.csv"}}, "data.solution.path: ~ is not expanded"),
    ({"data": {"extra": {"path": "x", "without": ["all"]}}}, "without.0: Input should be 'train', "),
    ({"environments": {"gptq": "~/gptq"}}, "environments.gptq: ~ is not expanded"),
    ({"compare": {"runs": ["{x}"]}}, "compare.runs.0: { and } are wildcards"),
    ({"judges": {"path": {"backbone": {"path": ""}}}}, "path.backbone.path: a path expected"),
    ({"judges": {"gguf": {"backbone": {"gguf": "~/x"}}}}, "backbone.gguf: ~ is not expanded"),
    ({"judges": {"hub": {"backbone": {"revision": ""}}}}, "backbone.revision: String should match"),
    ({"judges": {"asked": {"external": {"file": "{x}"}}}}, "external.file: { and } are wildcards"),
    ({"defaults": {"quantization": {"group_size": 100}}}, "group_size: Input should be 16, 32, 64"),
    ({"defaults": {"quantization": {"samples": 15}}}, "samples: Input should be greater than"),
    ({"defaults": {"lora": {"target_modules": []}}}, "target_modules: Tuple should have at least 1"),
]  # fmt: skip
EXTERNAL: list[tuple[dict[str, Any], str]] = [
    ({}, "judges.big.backbone: missing: give `backbone`, or `external`"),
    ({"external": {"file": "x"}, "backbone": {"tiny": "llama"}}, "judges.big: give `backbone` or"),
    ({"external": {"file": "x"}, "teachers": ["gpt"]}, "judges.big: teachers: an external judge"),
    (
        {"external": {"file": "x"}, "training": {"lr": 1}, "lora": {"r": 1}},
        "judges.big: an external judge is not trained or run here: remove lora, training",
    ),
    ({"external": {}}, "judges.big.external: needs exactly one of file, endpoint"),
    ({"external": {"file": "x", "endpoint": ENDPOINT}}, "judges.big.external: needs exactly one"),
    (endpoint(retires=3), "endpoint.retires: unknown key; did you mean 'retries'?"),
    (endpoint(url="host/v1"), "endpoint.url: an address such as"),
    (endpoint(url="https://me:secret@host/v1"), "endpoint.url: an address such as"),
    (endpoint(url="https://host/v1?key=secret"), "endpoint.url: an address such as"),
    (endpoint(verdicts=["A", "B"]), "endpoint.verdicts: two, but with classes: 3 a verdict may"),
    (endpoint(verdicts=["A", "B", " a"]), "endpoint: verdicts: three different tokens"),
    (endpoint(instructions="{a} or {b}"), "endpoint: instructions: say when to answer {tie}"),
    (endpoint(parameters={"stream": True}), "endpoint: parameters: stream cannot be set here"),
    (endpoint(parameters={"max_tokens": "few"}), "endpoint: parameters: max_tokens is a number"),
    (endpoint(max_cost=1), "endpoint: max_cost needs prompt_price"),
    (endpoint(prompt_price=1), "endpoint: prompt_price and completion_price go together"),
    (endpoint(api_key_env="sk-0123"), "endpoint.api_key_env: "),
]  # fmt: skip
CONFIGURATIONS += [(changed(changes), words) for changes, words in MISTAKES]
CONFIGURATIONS += [(big(judge), words) for judge, words in EXTERNAL]


@parametrized(CONFIGURATIONS)
def test_configurations(case: tuple[Any, str]) -> None:
    broken, words = case
    with pytest.raises(InputError) as refused:
        load(broken)
    lines = str(refused.value).split("\n")
    assert len(lines) == 1 or broken == {}
    for line in lines:
        assert line.startswith("config: ") and line.isprintable() and len(line) < 2000
    assert words in "\n".join(lines)
    assert "secret" not in "\n".join(lines)


# --- an endpoint ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[ChatServer]:
    with chat_server() as running:
        yield running


def listed(logprob: object, **usage: object) -> Reply:
    token = {"token": "A", "logprob": logprob, "top_logprobs": []}
    body: Body = {"choices": [{"logprobs": {"content": [token]}}]}
    return 200, {}, json.dumps(body | ({"usage": usage} if usage else {})).encode()


ANSWERS: list[tuple[Reply, str]] = [
    (error(401, f"wrong key {KEY}"), r"401 Unauthorized: wrong key \*\*\*; check the key in THE_KEY"),
    (error(403, f"{'x' * 295} {KEY}"), r"x \*\*\*; check the permissions of the key in THE_KEY"),
    (error(404, "no model m"), r"404 Not Found: no model m; check `url` .* and `model`"),
    (error(400, "too\nlong"), r"battle \w+:\d+, order (AB|BA): 400 .*: too long; .*max_characters"),
    (error(302), "302 Found: so it is; check `url`"),
    (error(429, "insufficient_quota: pay"), "insufficient_quota: pay; add credit to the account"),
    ((418, {}, b"a <b>teapot</b>"), "418 I'm a Teapot: a <b>teapot</b>;"),
    ((200, {}, b'{"choices": [{"logprobs": null}]}'), "returns no log-probabilities"),
    (listed(0.5), r"choices\.0\.logprobs\.content\.0\.logprob: .* less than or equal to 0\.001"),
    (listed("low"), r"content\.0\.logprob: .*valid number"),
    (listed(-1.0, prompt_tokens=-1), r"usage\.prompt_tokens: .*greater than or equal to 0"),
    (listed(-1.0, prompt_tokens=10**30), r"usage\.prompt_tokens: "),
    ((200, {}, b'{"choices": [{"logprobs": {"content": ' + b"[" * 100_000), "not a chat completion"),
    ((200, {}, b'{"choices": "\\ud800"}'), "not a chat completion"),
    ((200, {}, b"\xff\xfe"), "not a chat completion"),
    ((200, {}, b" " * (4 << 20) + b" "), "more than 4,194,304 bytes"),
    ((200, {"Content-Encoding": "gzip"}, gzip.compress(bytes(1 << 20))), r"compressed \(gzip\)"),
    ((400, {}, b"\x1b[2Jred\x07\x00"), r"400 Bad Request:  *\[2Jred"),
    ((200, {}, b""), "not a chat completion"),
    ((200, {}, b"null"), "not a chat completion"),
    ((200, {}, b"{}"), "not a chat completion"),
    ((200, {}, b'{"choices": []}'), "not a chat completion"),
    ((200, {}, b"<html>welcome</html>"), "not a chat completion"),
    (listed(float("nan")), "not a chat completion|logprob"),
    ((500, {}, b"\x00" * 999), "500"),
]  # fmt: skip


@parametrized(ANSWERS)
def test_answers_of_an_endpoint(
    case: tuple[Reply, str],
    server: ChatServer,
    tmp_path: Path,
    arena: Arena,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The job ends with a line, without the key in it; the answers before are kept."""
    fault, words = case
    monkeypatch.setenv("THE_KEY", KEY)
    write_parquet(made_up_battles(4, 1, 0, 0), tmp_path / "battles.parquet", {"phase": "battles"})
    limits = {"api_key_env": "THE_KEY", "retries": 0, "concurrency": 1}
    files = {"output": "logits.npy", "cost": "cost.json", "answers": "answers"}
    options = [part for name, file in files.items() for part in (f"--{name}", tmp_path / file)]
    options += ["--battles", tmp_path / "battles.parquet", "--limits", json.dumps(limits)]
    options += ["--settings", asking(server.url).model_dump_json()]
    server.bodies.clear()
    server.reply = lambda number, body: answer(body) if number < 3 else fault
    told = arena("phase", "query-endpoint", *options)
    assert re.search(words, told), told
    assert KEY not in told
    assert len(server.bodies) == 4
    server.reply = lambda number, body: answer(body)
    monkeypatch.setattr(
        sys, "argv", ["arena-distill", "phase", "query-endpoint", *map(str, options)]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert len(server.bodies) == 2 * (4 + 1) + 1  # the bad one again, and no other


# --- a judge's file ---------------------------------------------------------------------------------

FRAMES: list[tuple[Callable[[pd.DataFrame], pd.DataFrame], str]] = [
    (lambda f: f.iloc[2:], r"judged.csv: 1 of 23 labelled battles are missing, for example \w+:\d+;"),
    (lambda f: f.drop(columns="id"), "`id` and exactly one of these triples"),
    (lambda f: f.drop(columns="logit_tie"), "exactly one of these triples .* columns found: id,"),
    (lambda f: f.assign(p_model_a=1, p_model_b=0, p_tie=0), "exactly one of these triples"),
    (lambda f: pd.concat([f, f.iloc[:1]]), r"order (AB|BA): \w+:\d+ is there more than once"),
    (lambda f: f.assign(order="BB"), r"row 1, column order: AB or BA expected \(46 such rows\)"),
    (lambda f: f.assign(logit_tie="1,5"), "row 1, column logit_tie: a number expected"),
    (lambda f: f.assign(logit_tie=np.inf), "row 1, column logit_tie: a number expected"),
    (lambda f: f.assign(logit_tie=np.nan), "row 1, column logit_tie: a number expected"),
    (lambda f: f.assign(logit_tie="1e999"), r"row 1, column logit_model_a, .*: logits expected"),
    (lambda f: f.assign(logit_tie="NaN"), "row 1, column logit_tie: a number expected"),
    (lambda f: f.assign(id=None), "labelled battles are missing"),
    (lambda f: f.iloc[:0], "holds no battle"),
]  # fmt: skip


@parametrized(FRAMES)
def test_files_of_an_external_judge(
    case: tuple[Callable[[pd.DataFrame], pd.DataFrame], str], tmp_path: Path, arena: Arena
) -> None:
    spoil, words = case
    write_parquet(made_up_battles(), tmp_path / "battles.parquet", {"phase": "battles"})
    frame = test_external.judged(tmp_path / "battles.parquet").sort_values(["source", "id"])
    spoil(frame).to_csv(tmp_path / "judged.csv", index=False)
    told = arena(
        *("phase", "read-external-logits", "--battles", tmp_path / "battles.parquet"),
        *("--file", tmp_path / "judged.csv", "--output", tmp_path / "x.npy"),
        *("--settings", '{"version": 1}'),
    )
    assert re.search(words, told), told


# --- artifacts --------------------------------------------------------------------------------------


def replaced(content: bytes) -> Damage:
    return lambda path: path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0x10
    path.write_bytes(content)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def edited(column: str, change: Callable[[pa.Table], Any]) -> Damage:
    """Write a table by hand, with its metadata, as somebody might who wants other folds."""

    def edit(path: Path) -> None:
        table = pq.read_table(path)
        number = table.column_names.index(column)
        values = pa.array(change(table), table.schema.field(column).type)
        written_with_digests(table.set_column(number, table.schema.field(column), values), path)

    return edit


def written_with_digests(table: pa.Table, path: Path) -> None:
    """Write a table over a file, and take over the digests at its end."""
    digests = pq.read_metadata(path).metadata
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({k: v for k, v in digests.items() if b"sha256" in k})


def by_arrow(path: Path) -> None:
    pq.write_table(pq.read_table(path), path)


def reversed_(name: str) -> Damage:
    return edited(name, lambda table: table[name].to_pylist()[::-1])


def by_pandas(path: Path) -> None:
    pd.read_parquet(path).to_parquet(path)


def without(column: str) -> Damage:
    def drop(path: Path) -> None:
        written_with_digests(pq.read_table(path).drop_columns(column), path)

    return drop


def shorter(path: Path) -> None:
    """Without a row of everything in it."""
    table = read_parquet(path)
    write_parquet(table.slice(1, len(table) - 2), path, {"phase": "edited"})


PARQUET: dict[str, tuple[Damage, str]] = {
    "missing": (lambda path: path.unlink(), "no such file"),
    "empty": (replaced(b""), "not a whole parquet file"),
    "a pickle": (replaced(pickle.dumps([1])), "not a whole parquet file"),
    "cut": (cut, "not a whole parquet file"),
    "a folder": (a_folder, "not a whole parquet file"),
    "written by Arrow": (by_arrow, "was written again by another program"),
    "written by pandas": (by_pandas, "not written by Arena Distill|not the logits of"),
}
TABLES = ("folds", "battles", "truth", "rejected", "test_votes", "merged", "logits/big/fold_1.ids")
JSON: dict[str, tuple[Damage, str]] = {
    "missing": (lambda path: path.unlink(), "no such file"),
    "empty": (replaced(b""), "not a JSON file"),
    "cut": (cut, "not a JSON file"),
    "deep": (replaced(b"[" * 200_000), "not a JSON file"),
    "a list": (replaced(b"[]"), "not the figures|holds no|no kl"),
    "a text": (replaced(b'"x"'), "not the figures|holds no|no kl"),
    "no keys": (replaced(b"{}"), "not the figures|holds no|no kl"),
    "not UTF-8": (replaced(b"\xff"), "not a JSON file"),
}
EVALUATED: list[tuple[str, Damage, str]] = [
    *((f"{t}.parquet", damage, words) for t in TABLES for damage, words in PARQUET.values()),
    *(("drift.json", damage, words) for damage, words in JSON.values()),
    ("folds.parquet", reversed_("fold"), r"folds\.parquet: column fold is not what was written"),
    ("folds.parquet", reversed_("vote"), r"folds\.parquet: column vote is not what was written"),
    ("folds.parquet", reversed_("id"), r"folds\.parquet: column id is not what was written"),
    ("battles.parquet", reversed_("id"), r"battles\.parquet: column id is not what was written"),
    ("test_votes.parquet", reversed_("vote"), "column vote is not what was written"),
    ("merged.parquet", reversed_("winner_tie"), "column winner_tie is not what was written"),
    ("truth.parquet", reversed_("p_tie"), "column p_tie is not what was written"),
    ("folds.parquet", without("fold"), "column fold is not what was written"),
    ("battles.parquet", without("response_a"), "no column response_a"),
    ("battles.parquet", shorter, r"battles\.parquet: \d of \d+ rows are missing"),
    ("truth.parquet", shorter, r"truth\.parquet: \d of \d+ rows are missing"),
    ("logits/big/fold_1.ids.parquet", reversed_("id"), "column id is not what was written"),
    ("logits/big/fold_1.ids.parquet", reversed_("validation"), "column validation is not what"),
    ("logits/big/fold_1.npy", lambda path: path.unlink(), r"fold_1\.npy: cannot be read"),
    ("logits/big/fold_1.npy", replaced(b""), r"fold_1\.npy: damaged, or not the logits of"),
    ("logits/big/fold_1.npy", replaced(pickle.dumps(1)), r"fold_1\.npy: damaged, or not the logits of"),
    ("logits/big/fold_1.npy", flipped, r"fold_1\.npy: damaged, or not the logits of"),
    ("logits/big/fold_1.npy", a_folder, r"fold_1\.npy: cannot be read"),
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> MadeUpRun:
    run = made_up_run(tmp_path_factory.mktemp("whole"))
    run.evaluate()
    return run


@pytest.fixture
def run(whole: MadeUpRun, tmp_path: Path) -> MadeUpRun:
    """A copy of a run, to be damaged."""
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    return MadeUpRun(folder, whole.battles, whole.folds, whole.truth, whole.settings)


@parametrized(EVALUATED)
def test_artifacts_in_an_evaluation(
    case: tuple[str, Damage, str], run: MadeUpRun, arena: Arena
) -> None:
    """The line names the file at fault."""
    name, damage, words = case
    damage(run.folder / name)
    given = {"folds": "folds.parquet", "battles": "battles.parquet", "rejected": "rejected.parquet"}
    given |= {
        "truth": "truth.parquet",
        "surface": "surface.parquet",
        "test-votes": "test_votes.parquet",
        "output": "x.json",
    }
    given |= {"test-logits": "logits/small/gptq_test.npy", "quantized": "", "tables": "tables"}
    options = [part for key, file in given.items() for part in (f"--{key}", run.folder / file)]
    for model in ("merged", "gptq"):
        options += ["--predictions", run.folder / f"{model}.parquet"]
    logits = [f"{judge}={path}" for judge, paths in run.logits.items() for path in paths]
    if name.endswith(".npy") and not (run.folder / name).exists():
        logits.insert(1, f"big={run.folder / name}")
    settings = run.settings.model_dump_json()
    told = arena("phase", "evaluate", *options, "--settings", settings, *logits)
    assert re.search(words, told), told
    assert Path(name).stem.removesuffix(".ids") in told
    assert not (run.folder / "x.json").exists()


def set_json(**changes: Any) -> Damage:
    return lambda path: write_json(overlay(json.loads(path.read_text()), changes), path)


SETTINGS = {
    "VERSION": '{"version": 1}',
    "BOUNDS": '{"version": 1, "max_kl": 1, "max_flip_rate": 1}',
    "KFOLD": '{"version": 1, "method": "kfold", "n": 3, "seed": 1}',
}


def of_an_older_version(path: Path) -> None:
    figures = json.loads(path.read_text())
    figures["provenance"]["evaluation"]["settings"]["version"] = 4
    del figures["baselines"], figures["test"]
    path.write_text(json.dumps(figures))


ONE_FILE: list[tuple[str, str, Damage, str]] = [
    ("show-results FILE", "metrics.json", of_an_older_version,
     "figures of version 4, and this program prints version"),
    *(("show-results FILE", "metrics.json", damage, words) for damage, words in JSON.values()),
    *(("phase render-report --metrics FILE --config FILE --output OUT --parts OUT", "metrics.json",
       damage, words) for damage, words in JSON.values()),
    *(("phase check-drift --model FOLDER --output OUT --settings BOUNDS",
       "drift.json", damage, words) for damage, words in JSON.values()),
    *(("phase write-submission --predictions FILE --battles FOLDER/battles.parquet --output OUT",
       "gptq.parquet", damage, words) for damage, words in PARQUET.values()),
    *(("phase assign-folds --battles FILE --output OUT --settings KFOLD",
       "battles.parquet", damage, words) for damage, words in PARQUET.values()),
    ("phase write-submission --predictions FILE --battles FOLDER/battles.parquet --output OUT",
     "gptq.parquet", shorter, "rows are missing"),
    ("phase write-submission --predictions FOLDER/gptq.parquet --battles FILE --output OUT",
     "battles.parquet", lambda p: write_parquet(read_parquet(p).slice(0, 150), p, {}), "to no test battle"),
    ("phase assign-folds --battles FILE --output OUT --settings {", "battles.parquet",
     lambda p: None, "config: Invalid JSON"),
    ("phase assign-folds --battles FILE --output OUT --settings []", "battles.parquet",
     lambda p: None, "config: "),
    *(("phase read-solution --battles FOLDER/battles.parquet --solution FILE --output OUT "
       "--settings VERSION", "solution.csv", replaced(content), words) for content, words in [
        (b"", "not a CSV file"),
        (b"id,winner_model_a,winner_model_b,winner_tie\n", "holds no battle"),
        (b"id,winner\n1,model_a\n",
         r"solution\.csv: \d+ (of its ids are no test battles|test battles have no vote)"),
        (b"id,winner\n1,model_a\n1,model_a\n", "id is taken: 1, by row 1; where several people"),
        (b"id,winner\n,model_a\n", "row 1, column id: no id"),
        (b"id,prompt\n1,a\n", "columns id and winner_model_a"),
        (b"id,winner_model_a,winner_model_b,winner_tie\n1,1,1,0\n", "several winners"),
        (b"id,winner_model_a,winner_model_b,winner_tie\n1,nan,0,0\n", r"row 1, column"),
        (b"id,winner_model_a,winner_model_b,winner_tie\n1,1e999,0,0\n", r"row 1, column"),
    ]),
]  # fmt: skip


@pytest.mark.parametrize("case", ONE_FILE, ids=[f"{c[0][:24]}: {c[3]}" for c in ONE_FILE])
def test_artifacts_of_one_command(
    case: tuple[str, str, Damage, str], run: MadeUpRun, arena: Arena
) -> None:
    command, name, damage, words = case
    damage(run.folder / name)
    places = {"FILE": run.folder / name, "FOLDER": run.folder, "OUT": run.folder / "out"} | SETTINGS
    told = arena(*(re.sub("|".join(places), lambda m: str(places[m[0]]), part)
                   for part in command.split()))  # fmt: skip
    assert re.search(words, told), told
    assert not (run.folder / "out").exists()


# --- what is told of a judge that knows nothing -------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (np.zeros_like, "gives every battle the same verdict"),
        (
            lambda x: np.tile(np.float32([2, 1, 0]), (*x.shape[:2], 1)),
            "gives every battle the same",
        ),
        (lambda x: -x, "predicts worse than the class prior: log loss"),
        (lambda x: x * 30, "predicts worse than the class prior: log loss"),
    ],
    ids=["zeros", "constant", "perverse", "far too sure"],
)
def test_a_judge_that_knows_nothing_is_named(
    spoil: Callable[[np.ndarray], np.ndarray],
    words: str,
    run: MadeUpRun,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On the console, in the table and in the report; the others are not."""
    for path in run.logits["big"]:
        logits, ids = read_logits(path)
        write_logits(path, spoil(logits), ids, {})
    metrics = run.evaluate()
    assert f"warning: big {words}" in capsys.readouterr().out
    print_table(read_json(metrics), Console(width=200))
    assert f"warning: big {words}" in capsys.readouterr().out
    render_report(metrics, run.folder / "report.html", parts=run.folder / "parts")
    assert f"<strong>Warning: big</strong> {words}" in (run.folder / "report.html").read_text()
    table = pd.read_csv(run.folder / "parts/judges.csv").set_index("name")["warning"]
    assert table["big"].startswith(words) and table.drop("big").isna().all()


# --- models -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judge:
    """What a command reads of a judge: copies, to be damaged."""

    run: Run
    folder: Path

    def command(self, name: str, *more: object) -> list[object]:
        return ["phase", name, "--backbone", self.folder / "backbone", *more]

    def scoring(self, fold: int = 0) -> list[object]:
        settings = LogitsSettings(
            version=1, encoding=Encoding(max_length=96), precision="fp32", rows=("validation",)
        )
        return self.command(
            *("predict-logits", "--adapter", self.folder / "fold_0", "--fold", fold),
            *("--tokens", self.run.tokens, "--folds", self.folder / "folds.parquet"),
            *("--output", self.folder / "x.npy", "--settings", settings.model_dump_json()),
        )

    def merging(self, *adapters: str) -> list[object]:
        settings = MergeSettings(
            version=1, judge="j", encoding=Encoding(max_length=96), average="products",
            heads="average", precision="fp32",
        )  # fmt: skip
        options = ("--output", self.folder / "out", "--settings", settings.model_dump_json())
        return self.command("merge-folds", *options, *(self.folder / name for name in adapters))

    def tokenizing(self) -> list[object]:
        return self.command(
            *("tokenize-battles", "--battles", self.run.battles),
            *("--output", self.folder / "tokens.parquet", "--settings", '{"version": 1}'),
        )

    def preparing(self, **backbone: object) -> list[object]:
        settings = {"version": 1, "backbone": backbone}
        output = self.folder / "prepared"
        return ["phase", "prepare-backbone", "--output", output, "--settings", json.dumps(settings)]


@pytest.fixture(scope="module")
def trained(make_run: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Judge:
    run, folder = make_run("llama"), tmp_path_factory.mktemp("trained")
    shutil.copytree(run.backbone, folder / "backbone")
    shutil.copy(run.folds, folder / "folds.parquet")
    for fold in (0, 1):
        train_fold(
            *(run.backbone, None, run.tokens, run.folds, fold, folder / f"fold_{fold}"),
            teachers={},
            settings=training_settings(batch_size=64),
            launch=Launch(),
        )
    return Judge(run, folder)


@pytest.fixture
def judge(trained: Judge, tmp_path: Path) -> Judge:
    shutil.copytree(trained.folder, tmp_path / "judge")
    return Judge(trained.run, tmp_path / "judge")


def config(**changes: Any) -> Damage:
    return lambda folder: set_json(**changes)(folder / "config.json")


def inside(name: str, damage: Damage) -> Damage:
    return lambda folder: damage(folder / name)


def no(*names: str) -> Damage:
    return lambda folder: [(folder / name).unlink() for name in names]


def tensors(change: Callable[[dict[str, Any]], Any], name: str = "model.safetensors") -> Damage:
    def edit(folder: Path) -> None:
        weights = load_file(folder / name)
        change(weights)
        save_file(weights, folder / name, {"format": "pt"})

    return edit


def index(weight_map: object) -> Damage:
    """Name shards instead of the file of weights."""
    named = json.dumps({"weight_map": weight_map})

    def write(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(named)

    return write


def as_pickle(folder: Path) -> None:
    """The same weights as a pickle that runs code when it is read."""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(bomb(folder))


def bomb(folder: Path) -> bytes:
    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (folder / "exploded",)

    return pickle.dumps(Bomb())


def with_code(folder: Path) -> None:
    (folder / "mine.py").write_text(
        f"from pathlib import Path\nPath({str(folder)!r}, 'exploded').touch()"
    )
    named = {
        "AutoConfig": "mine.C",
        "AutoModel": "mine.M",
        "AutoModelForSequenceClassification": "mine.M",
    }
    config(model_type="mine", auto_map=named)(folder)


NORM = "norm.weight"
Q = "layers.0.self_attn.q_proj"
WEIGHTS: list[tuple[str, Damage, str]] = [
    ("no config", no("config.json"), "cannot be loaded as a judge"),
    ("config is no JSON", inside("config.json", replaced(b"{")), "cannot be loaded as a judge"),
    ("config is a list", inside("config.json", replaced(b"[]")), "cannot be loaded as a judge"),
    ("config is deep", inside("config.json", replaced(b"[" * 99_999)), "cannot be loaded as a judge"),
    ("config is not UTF-8", inside("config.json", replaced(b"\xff")), "cannot be loaded as a judge"),
    ("config is empty", inside("config.json", replaced(b"{}")), "cannot be loaded as a judge"),
    ("unknown type", config(model_type="x"), "cannot be loaded as a judge"),
    ("a type without classifier", config(model_type="mamba"), "cannot be loaded as a judge"),
    ("Python code", with_code, "cannot be loaded as a judge"),
    ("no heads", config(num_attention_heads=0), "cannot be loaded as a judge"),
    ("no width", config(hidden_size=0), r"shapes than the model: 20 .* is \[305, 32\], not \[305, 0\]"),
    ("negative width", config(hidden_size=-4), "cannot be loaded as a judge"),
    ("width as text", config(hidden_size="wide"), "cannot be loaded as a judge"),
    ("another width", config(hidden_size=64), "tensors have other shapes than the model: 20"),
    ("absurd width", config(intermediate_size=10**12), "cannot be loaded as a judge"),
    ("absurd vocabulary", config(vocab_size=10**12), "cannot be loaded as a judge"),
    ("absurd layers", config(num_hidden_layers=10**9), "says 1000000000 layers, but its weights have"),
    ("a layer less", config(num_hidden_layers=1),
     r"tensors are unused: 9 \(layers\.1|unused: 9 \(model\.layers\.1"),
    ("a layer more", config(num_hidden_layers=3), r"tensors are missing: 9 \(model\.layers\.2"),
    ("unknown activation", config(hidden_act="boom"), "cannot be loaded as a judge"),
    ("NaN as range", config(initializer_range="NaN"), "cannot be loaded as a judge"),
    ("no weights", no("model.safetensors"), "has no weights"),
    ("weights are a pickle", as_pickle, r"pytorch_model\.bin alone, which is not read"),
    ("a pickle named safetensors", lambda f: (f / "model.safetensors").write_bytes(bomb(f)),
     "is not whole"),
    ("weights are cut", inside("model.safetensors", cut), "is not whole, or no safetensors"),
    ("weights are empty", inside("model.safetensors", replaced(b"")), "is not whole, or no safetensors"),
    ("a pointer", inside("model.safetensors", replaced(b"version https://git-lfs")), "is not whole"),
    ("an endless header", inside("model.safetensors", replaced(b"\xff" * 8 + b"{}")), "is not whole"),
    ("a header of text", inside("model.safetensors", replaced(struct.pack("<Q", 2) + b"xx")),
     "is not whole"),
    ("a header of depth", inside("model.safetensors", replaced(struct.pack("<Q", 50_000) + b"[" * 50_000)),
     "is not whole"),
    ("shards of nothing", index({"a": "b"}), "b is not there"),
    ("shards elsewhere", index(3), "has no weights"),
    ("shards without a name", index({"a": "b", "c": 1}), "has no weights"),
    ("no shards", index({}), "has no weights"),
    ("a tensor less", tensors(lambda w: w.pop(NORM)), r"tensors are missing: 1 \(model\.norm\.weight"),
    ("another name", tensors(lambda w: w.update(x=w.pop(NORM))), r"missing: 1 .* 1 \(x\) are unknown"),
    ("a bias more", tensors(lambda w: w.update({f"{Q}.bias": w[f"{Q}.weight"][0].clone()})),
     r"tensors are unused: 1 \(\S*q_proj\.bias"),
    ("another shape", tensors(lambda w: w.update({NORM: w[NORM][:3].clone()})),
     r"other shapes than the model: 1 \(model\.norm\.weight\); model\.norm\.weight is \[3\], not \[32\]:"),
    ("another dtype", tensors(lambda w: w.update({NORM: w[NORM].bool()})), r"backbone|not finite|judge"),
    ("NaN", tensors(lambda w: w[NORM].fill_(float("nan"))), "its logits are not finite"),
    ("another architecture", config(model_type="qwen2", architectures=["Qwen2Model"]),
     "missing|another backbone"),
]  # fmt: skip


BY_OTHERS = (
    "no config",
    "Python code",
    "weights are a pickle",
    "a pickle named safetensors",
    "a tensor less",
)
"""What merging and cutting a model have to refuse too: all load it in one way."""


@parametrized(WEIGHTS)
def test_weights(case: tuple[str, Damage, str], judge: Judge, arena: Arena) -> None:
    name, damage, words = case
    damage(judge.folder / "backbone")
    commands = [judge.scoring()]
    if name in BY_OTHERS:
        cut = judge.preparing(path=str(judge.folder / "backbone"), layers=1)
        commands += [judge.merging("fold_0", "fold_1"), cut]
    for command in commands:
        told = arena(*command)
        assert str(judge.folder) in told
        if command is commands[0]:
            assert re.search(words, told), told
    assert not (judge.folder / "backbone/exploded").exists()
    assert not {"x.npy", "out", "prepared"} & set(os.listdir(judge.folder))


TOKENIZER: list[tuple[str, Damage, str]] = [
    ("missing", no("tokenizer.json"), "cannot load a tokenizer"),
    ("empty", inside("tokenizer.json", replaced(b"")), "cannot load a tokenizer"),
    ("cut", inside("tokenizer.json", cut), "cannot load a tokenizer"),
    ("no keys", inside("tokenizer.json", replaced(b"{}")), "cannot load a tokenizer"),
    ("a list", inside("tokenizer.json", replaced(b"[]")), "cannot load a tokenizer"),
    ("deep", inside("tokenizer.json", replaced(b"[" * 99_999)), "cannot load a tokenizer"),
    ("a pickle", lambda f: (f / "tokenizer.json").write_bytes(bomb(f)), "cannot load a tokenizer"),
    ("unknown model", inside("tokenizer.json", set_json(model={"type": "X"})), "cannot load a tokenizer"),
    ("vocabulary of text", inside("tokenizer.json", set_json(model={"vocab": "x"})),
     "cannot load a tokenizer"),
    ("negative ids", inside("tokenizer.json", set_json(model={"vocab": {"a": -1}})),
     "cannot load a tokenizer"),
    ("impossible merges", inside("tokenizer.json", set_json(model={"merges": [["x", "yy"]]})),
     "cannot load a tok"),
    ("a broken pattern", inside("tokenizer.json", set_json(pre_tokenizer={"type": "Split",
     "pattern": {"Regex": "("},
     "behavior": "Isolated", "invert": False})), "cannot load a tokenizer"),
    ("settings are no JSON", inside("tokenizer_config.json", replaced(b"{")), "cannot load a tokenizer"),
    ("settings are a list", inside("tokenizer_config.json", replaced(b"[]")), "cannot load a tokenizer"),
    ("unknown special token", inside("tokenizer_config.json", set_json(eos_token=7)),
     "cannot load a tokenizer"),
]  # fmt: skip


@parametrized(TOKENIZER)
def test_tokenizers(case: tuple[str, Damage, str], judge: Judge, arena: Arena) -> None:
    _, damage, words = case
    damage(judge.folder / "backbone")
    told = arena(*judge.tokenizing())
    assert re.search(words, told), told
    assert not (judge.folder / "backbone/exploded").exists()
    assert not (judge.folder / "tokens.parquet").exists()


WEIGHTS_OF_ADAPTER = "adapter_model.safetensors"


def resealed(damage: Damage) -> Damage:
    """Damage that training itself seems to have written: its digests are those of the files."""

    def edit(adapter: Path) -> None:
        damage(adapter)
        names = ("adapter_config.json", WEIGHTS_OF_ADAPTER)
        set_json(sha256={name: file_sha256(adapter / name) for name in names})(
            adapter / "metrics.json"
        )

    return edit


ADAPTERS: list[tuple[str, Damage, str]] = [
    ("no weights", no(WEIGHTS_OF_ADAPTER), r"adapter_model\.safetensors: is not what training wrote"),
    ("a pickle", lambda f: ((f / WEIGHTS_OF_ADAPTER).unlink(), (f / "metrics.json").unlink(),
     (f / "adapter_model.bin").write_bytes(bomb(f))), r"adapter_model\.safetensors is missing"),
    ("a pickle named safetensors", lambda f: ((f / "metrics.json").unlink(),
     (f / WEIGHTS_OF_ADAPTER).write_bytes(bomb(f))), "no adapter for this backbone"),
    ("cut", inside(WEIGHTS_OF_ADAPTER, cut), "is not what training wrote"),
    ("cut, resealed", resealed(inside(WEIGHTS_OF_ADAPTER, cut)), "no adapter for this backbone"),
    ("another scaling", inside("adapter_config.json", set_json(lora_alpha=99)),
     r"adapter_config\.json: is not what training wrote"),
    ("a tensor less", resealed(tensors(lambda w: w.pop(next(iter(w))), WEIGHTS_OF_ADAPTER)),
     "no adapter for this"),
    ("no config", no("adapter_config.json"), "is not what training wrote"),
    ("config is no JSON", resealed(inside("adapter_config.json", replaced(b"{"))),
     "no adapter for this backbone"),
    ("config is a list", resealed(inside("adapter_config.json", replaced(b"[]"))),
     "no adapter for this backbone"),
    ("another kind", resealed(inside("adapter_config.json", set_json(peft_type="X"))),
     "no adapter for this backbone"),
    ("another rank", resealed(inside("adapter_config.json", set_json(r=2))),
     "no adapter for this backbone"),
    ("metrics are no JSON", inside("metrics.json", replaced(b"{")), r"metrics\.json: not a JSON file"),
    ("of another fold", lambda f: (shutil.rmtree(f), shutil.copytree(f.with_name("fold_1"), f)),
     r"was made from another fold \(1\)"),
    ("of another family", lambda f: tensors(lambda w: w.update({f"layers.{n}.self_attn.{p}_proj.bias":
     w[f"layers.{n}.self_attn.{p}_proj.weight"][:, 0].clone() for n in (0, 1) for p in "qkv"}))(
     set_family(f.with_name("backbone"))), "was made from another backbone"),
    ("of other folds", lambda f: write_parquet(assign_folds(made_up_battles(), method="kfold", n=3,
     seed=99), f.with_name("folds.parquet"), {}), "was made from another folds"),
]  # fmt: skip


def set_family(backbone: Path) -> Path:
    config(model_type="qwen2", architectures=["Qwen2Model"])(backbone)
    return backbone


@parametrized(ADAPTERS)
def test_adapters(case: tuple[str, Damage, str], judge: Judge, arena: Arena) -> None:
    _, damage, words = case
    damage(judge.folder / "fold_0")
    told = arena(*judge.scoring())
    assert re.search(words, told), told
    if "folds" not in words:
        arena(*judge.merging("fold_0", "fold_1"))
    assert not (judge.folder / "fold_0/exploded").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("fold_0", "fold_0"), "one judge, in their order: fold differs"),
        (("fold_1", "fold_0"), "one judge, in their order: fold differs"),
        (("fold_0", "other"), "one judge, in their order: lora differs"),
        (("fold_0", "gone"), "cannot read an adapter"),
    ],
    ids=["one twice", "in another order", "of another rank", "one missing"],
)
def test_folds_that_are_not_of_one_judge(
    given: tuple[str, ...], words: str, judge: Judge, arena: Arena
) -> None:
    shutil.copytree(judge.folder / "fold_1", judge.folder / "other")
    set_json(provenance={"settings": {"lora": {"r": 99}}})(judge.folder / "other/metrics.json")
    told = arena(*judge.merging(*given))
    assert re.search(words, told), told


GGUF: list[tuple[str, bytes, str]] = [
    ("empty", b"", "cannot be made a backbone"),
    ("magic alone", b"GGUF", "cannot be made a backbone"),
    ("no magic", b"xxxx" + bytes(64), "cannot be made a backbone"),
    ("a pickle", pickle.dumps([1]), "cannot be made a backbone"),
    ("version 0", b"GGUF" + struct.pack("<IQQ", 0, 0, 0), "cannot be made a backbone"),
    ("nothing in it", b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "cannot be made a backbone"),
    ("absurd tensors", b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "cannot be made a backbone"),
    ("absurd keys", b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "cannot be made a backbone"),
    ("a key of no end", b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62), "cannot be made a backbone"),
    ("an unknown kind", b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<I", 99),
     "cannot be made"),
    ("an array of no end", b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a"
     + struct.pack("<IIQ", 9, 4, 1 << 60), "cannot be made"),
]  # fmt: skip


@parametrized(GGUF)
def test_gguf_files(case: tuple[str, bytes, str], judge: Judge, arena: Arena) -> None:
    _, content, words = case
    (judge.folder / "x.gguf").write_bytes(content)
    told = arena(*judge.preparing(gguf=str(judge.folder / "x.gguf")))
    assert re.search(words, told), told
    assert not (judge.folder / "prepared").exists()


def merged_without_head(folder: Path) -> None:
    load_classifier(folder, head_seed=0).save_pretrained(folder)
    tensors(lambda w: w.pop("score.weight"))(folder)


def merged_with_more(folder: Path) -> None:
    load_classifier(folder, head_seed=0).save_pretrained(folder)
    tensors(lambda w: w.update(other=w["score.weight"].clone()))(folder)


MERGED: list[tuple[str, Damage, str]] = [
    ("a backbone", lambda f: None, r"tensors are missing: 1 \(score\.weight"),
    ("no head", merged_without_head, r"tensors are missing: 1 \(score\.weight"),
    ("a tensor more", merged_with_more, r"tensors are unused: 1 \(other\)"),
    ("a pickle", as_pickle, r"pytorch_model\.bin alone"),
    ("missing", shutil.rmtree, "has no weights"),
]  # fmt: skip


@parametrized(MERGED)
def test_merged_models(case: tuple[str, Damage, str], judge: Judge, arena: Arena) -> None:
    _, damage, words = case
    damage(judge.folder / "backbone")
    settings = ScoringSettings(
        version=1,
        encoding=Encoding(max_length=96),
        precision="fp32",
        max_lengths=(64,),
        orders=("AB",),
    )
    told = arena(
        *(
            "phase",
            "score-test",
            "--model",
            judge.folder / "backbone",
            "--tokens",
            judge.run.tokens,
        ),
        *("--output", judge.folder / "x.npy", "--settings", settings.model_dump_json()),
    )
    assert re.search(words, told), told


# --- finished judges, quantised -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(backbones: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A finished judge with tensors of GPTQ's names, shapes and types: 8 bits, groups of 16."""
    judge = finished_judge(
        tmp_path_factory.mktemp("packed"), backbones("llama"), head=JOINT, encoding=Encoding()
    )
    about = {"quant_method": "gptq", "checkpoint_format": "gptq", "bits": 8, "group_size": 16}
    config(quantization_config=about)(judge.folder)
    set_json(kind="gptq")(judge.folder / "judge.json")

    def pack(weights: dict[str, Any]) -> None:
        for name in [name for name in weights if name.endswith("_proj.weight")]:
            (outputs, inputs), layer = weights.pop(name).shape, name.removesuffix(".weight")
            weights[f"{layer}.qweight"] = torch.zeros(inputs // 4, outputs, dtype=torch.int32)
            weights[f"{layer}.qzeros"] = torch.zeros(inputs // 16, outputs // 4, dtype=torch.int32)
            weights[f"{layer}.scales"] = torch.zeros(inputs // 16, outputs)
            weights[f"{layer}.g_idx"] = torch.arange(inputs, dtype=torch.int32) // 16

    tensors(pack)(judge.folder)
    return judge


def packing(**changes: object) -> Damage:
    return config(quantization_config=changes)


def part(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return tensors(lambda w: w.update({DOWN + name: change(w[DOWN + name]).contiguous()}))


DOWN = "model.layers.1.mlp.down_proj."
MISFIT = r"/judge: model\.layers\.\d\.\S+_proj is not of {} bits in groups of {}, as .*: quantise"
AS_IT_IS = MISFIT.format(8, 16)
QUANTIZED: list[tuple[str, Damage, str]] = [
    ("whole", lambda f: None, "gptqmodel is not installed"),
    ("no config", no("config.json"), r"config\.json has no quantization_config of GPTQ: quantise"),
    ("config is a list", inside("config.json", replaced(b"[]")), r"config\.json has no quantization_conf"),
    ("config is cut", inside("config.json", cut), r"config\.json has no quantization_config"),
    ("not said to be packed", config(quantization_config=None), "no quantization_config of GPTQ"),
    ("packed by a word", config(quantization_config="gptq"), "no quantization_config of GPTQ"),
    ("packed by others", packing(quant_method="awq"), "no quantization_config of GPTQ"),
    ("packed in another way", packing(checkpoint_format="gptq_v2"),
     r"config\.json: quantization_config\.checkpoint_format: one of gptq expected, not 'gptq_v2': quan"),
    ("no bits", packing(bits=None), r"config\.json: quantization_config\.bits: one of 2, 3, 4, 8 exp"),
    ("5 bits", packing(bits=5), r"config\.json: .*\.bits: one of 2, 3, 4, 8 expected, not '5'"),
    ("a list of bits", packing(bits=[8]), r"config\.json: quantization_config\.bits: one of 2, 3, 4, 8"),
    ("other bits", packing(bits=4), MISFIT.format(4, 16)),
    ("other groups", packing(group_size=32), MISFIT.format(8, 32)),
    ("groups of 0", packing(group_size=0), r"config\.json: quantization_config\.group_size: one of 16, 32"),
    ("qweight is shorter", part("qweight", lambda w: w[:-1]), AS_IT_IS),
    ("qweight is flat", part("qweight", torch.Tensor.flatten), AS_IT_IS),
    ("qweight is no integer", part("qweight", torch.Tensor.float), AS_IT_IS),
    ("qzeros of other groups", part("qzeros", lambda w: w[:1]), AS_IT_IS),
    ("scales of other outputs", part("scales", lambda w: w[:, 1:]), AS_IT_IS),
    ("scales are flat", part("scales", torch.Tensor.flatten), AS_IT_IS),
    ("g_idx is shorter", part("g_idx", lambda w: w[:-1]), AS_IT_IS),
    ("g_idx is a number", part("g_idx", lambda w: w[0]), AS_IT_IS),
    ("weights are cut", inside("model.safetensors", cut), r"model\.safetensors is not whole, .*: fetch it"),
    ("no weights", no("model.safetensors"), r"has no weights \(model\.safetensors\): fetch"),
    ("a shard is not there", index({"a": "model-1.safetensors"}),
     r"judge/model-1\.safetensors is not there: fetch"),
    ("a pickle", as_pickle, r"pytorch_model\.bin alone, which is not read: save"),
]  # fmt: skip
JUDGE: list[tuple[str, Damage, str]] = [
    ("no tokenizer", no("tokenizer.json"), "cannot load a tokenizer from this folder"),
    ("no judge.json", no("judge.json"), r"has no judge\.json, .*; give a folder that"),
    ("judge.json is cut", inside("judge.json", cut), r"judge\.json: not a JSON file"),
    ("judge.json is a list", inside("judge.json", replaced(b"[]")), r"judge\.json: format None"),
    ("judge.json of later", inside("judge.json", set_json(format=2)),
     r"judge\.json: format 2, and this version of arena-distill reads 1; install"),
    ("judge.json lacks a key", inside("judge.json", set_json(pad="x")), r"judge\.json: damaged: pad: "),
    ("not a folder", lambda f: (shutil.rmtree(f), f.touch()), "judge: no such folder"),
]  # fmt: skip
DOORS = (
    "verify JUDGE",
    "phase score-test --quantized --model JUDGE --tokens TOKENS --output OUT --settings SCORING",
    "predict JUDGE BATTLES --output OUT",
    "serve JUDGE --port 0",
    "compare-answers JUDGE --prompt p --a x --b y",
)
BY_ALL_DOORS = (
    "whole",
    "no config",
    "other bits",
    "weights are cut",
    "no tokenizer",
    "no judge.json",
)


@parametrized(QUANTIZED + JUDGE)
def test_quantized_judges(
    case: tuple[str, Damage, str],
    packed: Finished,
    tmp_path: Path,
    arena: Arena,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Told before GPTQModel is imported: what it makes of a whole folder, test_quantization.py shows."""
    name, damage, words = case
    monkeypatch.setattr(gptq.importlib.util, "find_spec", lambda name: None)
    shutil.copytree(packed.folder, tmp_path / "judge")
    damage(tmp_path / "judge")
    (tmp_path / "battles.csv").write_bytes(GOOD)
    places = {"JUDGE": tmp_path / "judge", "BATTLES": tmp_path / "battles.csv", "OUT": tmp_path / "out.csv",
              "TOKENS": packed.tokens, "SCORING": packed.scoring.model_dump_json()}  # fmt: skip
    for door in DOORS if name in BY_ALL_DOORS else DOORS[:2]:
        if case in JUDGE and "score-test" in door:
            continue  # it reads neither tokenizer nor judge.json
        told = arena(*(places.get(word, word) for word in door.split()))
        assert re.search(words, told), (door, told)
        assert name == "whole" or str(tmp_path / "judge") in told
    assert not (tmp_path / "judge/exploded").exists() and not (tmp_path / "out.csv").exists()


def test_a_nan_before_the_first_update_blames_the_backbone(judge: Judge, arena: Arena) -> None:
    tensors(lambda w: w[NORM].fill_(float("nan")))(judge.folder / "backbone")
    told = arena(
        *judge.command("train-fold", "--tokens", judge.run.tokens, "--folds", judge.run.folds),
        *("--fold", 0, "--output", judge.folder / "out"),
        *("--settings", training_settings().model_dump_json()),
    )
    assert re.search(
        "step 1: loss is nan: no step was taken yet, .* backbone's weights are broken", told
    )


# --- the machine --------------------------------------------------------------------------------------

MACHINE: list[tuple[str, Exception, str]] = [
    ("memory", MemoryError(), "out of memory"),
    ("memory of a GPU", torch.OutOfMemoryError("CUDA out of memory"), "out of memory .*micro_batch_size"),
    ("recursion", RecursionError("maximum recursion depth"), "nested too deeply"),
    ("permission", PermissionError(13, "Permission denied", "/x/y"),
     "^/x/y: Permission denied for this user: change"),
    ("read only", OSError(30, "Read-only file system", "/x/y"), "^/x/y: Read-only file system$"),
    ("safetensors", SafetensorError("header too large"), "a file is damaged, .*: header too large"),
    ("Arrow", pa.ArrowInvalid("bad\nlines"), "a file is damaged, .*: bad$"),
    ("Arrow's memory", pa.ArrowMemoryError("malloc"), "out of memory"),
    ("escapes", InputError("a\x1b[2Jb\u202ec"), r"^a\\x1b\[2Jb\\u202ec$"),
]  # fmt: skip


@parametrized(MACHINE)
def test_errors_of_the_machine(
    case: tuple[str, Exception, str], arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, error, words = case

    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    told = arena("plan")
    assert re.search(words, told), told


def test_a_fault_of_ours_keeps_its_traceback(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise ValueError("ours")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(ValueError, match="ours"):
        cli.main()


def test_the_corpus_is_large() -> None:
    parts = (BATTLES, STRANGE, CONFIGURATIONS, ANSWERS, FRAMES, EVALUATED, ONE_FILE)
    models = (WEIGHTS, TOKENIZER, ADAPTERS, GGUF, MERGED, QUANTIZED, JUDGE, MACHINE)
    count = sum(map(len, (*parts, *models)))
    print(f"{count} bad and hostile inputs")
    assert count >= 400


@pytest.mark.slow
@pytest.mark.gptq
def test_a_failed_evaluation_costs_no_earlier_figure(finished: Checkout, tmp_path: Path) -> None:
    """Snakemake deletes the outputs of a job before it starts; those of `evaluate` come back."""
    checkout = Checkout(tmp_path / "run")
    shutil.copytree(finished.folder, checkout.folder, symlinks=True)
    kept = [checkout.results / "metrics.json", *(checkout.results / "tables").iterdir()]
    before = [path.read_bytes() for path in kept]
    (logits,) = (checkout.results / "logits/gemma2-student").glob("fold_0.ids.parquet")
    whole = logits.read_bytes()
    reversed_("id")(logits)
    again = ("results/mini/metrics.json", "--allowed-rules", "evaluate", "--forcerun", "evaluate")
    done = checkout.snakemake(*again, "--cores", "1")
    assert done.returncode
    log = (checkout.results / "logs/evaluate.log").read_text()
    assert re.search(r"^error: .*fold_0\.ids\.parquet: column id is not what was", log, re.M)
    assert [path.read_bytes() for path in kept] == before
    logits.write_bytes(whole)
    checkout.run(*again)
