"""Several processes learn the same as one process, through the command line that a rule calls.

Those that are stopped or killed are started by a real interpreter; see warm_python.py.

On the CPU with gloo: what differs on GPUs is the transport. Weights of one process and of several may
differ by rounding alone, because sums are made in another order: MOST bounds it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkouts import warm_python
from conftest import ROOT, made_up_battles
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_training import distance, training_settings

from arena_distill.battles.folds import assign_folds, fold_rows
from arena_distill.config.head import Head
from arena_distill.config.phases.encoding import TokensSettings
from arena_distill.config.phases.scoring import LogitsSettings
from arena_distill.config.phases.training import TrainingSettings
from arena_distill.config.training import Loss
from arena_distill.encoding.tokenization import tokenize_battles
from arena_distill.files.artifacts import read_json, read_parquet, write_parquet
from arena_distill.files.logits import write_logits
from arena_distill.runtime.launch import Launch
from arena_distill.training.examples import ByLength
from arena_distill.training.trainer import train_fold

TINY = ROOT / "workflow/arena_distill/models/tiny"
WEIGHTS = "adapter_model.safetensors"
MOST = 3e-5  # 2.2e-5 was seen, where training moved weights by 3.5e-3
BATCH, MICRO = 16, 4  # a step of two processes: 8 rows each, in two micro-batches or more

slow = pytest.mark.slow


@dataclass(frozen=True)
class Files:
    """The files that exist before a fold is trained, and the command line."""

    family: str
    folder: Path

    @property
    def backbone(self) -> Path:
        return TINY / self.family

    @property
    def logits(self) -> list[Path]:
        return [self.folder / f"logits/teacher/fold_{fold}.npy" for fold in range(3)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Files]:
    """Files by family and by the number of battles to train on."""
    made: dict[tuple[str, int], Files] = {}

    def of(family: str, battles: int) -> Files:
        if (family, battles) not in made:
            folder = tmp_path_factory.mktemp(f"{family}_{battles}")
            table = made_up_battles(train=54, extra=battles - 36)  # of train two folds of three
            write_parquet(table, folder / "battles.parquet", {})
            here = folder / "tokens.parquet"
            tokenize_battles(
                folder / "battles.parquet", TINY / family, here, settings=TokensSettings(version=1)
            )
            folds = assign_folds(table, method="kfold", n=3, seed=3)
            write_parquet(folds, folder / "folds.parquet", {})
            made[family, battles] = Files(family, folder)
            write_teacher(made[family, battles])
        return made[family, battles]

    return of


def write_teacher(files: Files) -> None:
    """Logits as from a teacher: for the validation rows of each fold and for extra rows."""
    rng = np.random.default_rng(5)
    settings = LogitsSettings(
        version=1,
        encoding=training_settings().encoding,
        precision="fp32",
        rows=("validation", "extra"),
    )
    for fold, path in enumerate(files.logits):
        rows = fold_rows(read_parquet(files.folder / "folds.parquet"), fold, settings)
        logits = rng.normal(0, 2, (len(rows), 2, 3)).astype(np.float32)
        features = rng.normal(0, 2, (len(rows), 2, 24)).astype(np.float16)
        attention = np.zeros((len(rows), 2, settings.encoding.max_length), np.float16)
        attention[..., :4] = [0.125, 0.5, 0.25, 0.125]
        write_logits(path, logits, rows, {}, {"features": features, "attention": attention})


STUDENT = {
    "teachers": ("teacher",),
    "targets": "out_of_fold",
    "loss": Loss(ce=1, kl=1, cosine=1, temperature=2),
}
LAYERS = Head(kind="pointwise", pooling="layers")
STATES = STUDENT | {"loss": Loss(ce=1, kl=1, temperature=2, features=2, attention=0.5)}


def settings_of(**changes: Any) -> TrainingSettings:
    return training_settings(**({"epochs": 2, "batch_size": BATCH, "swap": False} | changes))


def in_one_process(files: Files, output: Path, pretrained: Path | None, **changes: Any) -> Path:
    """The same training as :func:`command`, here."""
    settings = settings_of(**changes)
    train_fold(
        files.backbone,
        pretrained,
        files.folder / "tokens.parquet",
        files.folder / "folds.parquet",
        0,
        output,
        teachers=dict.fromkeys(settings.teachers, files.logits),
        settings=settings,
        launch=Launch(MICRO),
    )
    return output


def command(files: Files, output: Path, *options: str, gpus: int = 2, **changes: Any) -> list[str]:
    """As words after an interpreter."""
    settings = settings_of(**changes)
    named: dict[str, Any] = {
        "--backbone": files.backbone,
        "--tokens": files.folder / "tokens.parquet",
        "--folds": files.folder / "folds.parquet",
        "--fold": 0,
        "--output": output,
        "--settings": settings.model_dump_json(),
        "--micro-batch-size": MICRO,
        "--gpus": gpus,
    }
    words = [str(word) for option in named.items() for word in option]
    teachers = [
        part
        for name in settings.teachers
        for file in files.logits
        for part in ("--teacher-logits", f"{name}={file}")
    ]
    return ["-m", "arena_distill", "phase", "train-fold", *words, *options, *teachers]


def environment() -> dict[str, str]:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return outside | {
        "PYTHONPATH": str(ROOT / "workflow"),
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
    }


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    command = [warm_python(), *command]
    return subprocess.run(command, env=environment(), capture_output=True, text=True)


def in_two_processes(files: Files, output: Path, *options: str, **changes: Any) -> Path:
    done = run(command(files, output, *options, **changes))
    assert done.returncode == 0, done.stdout + done.stderr
    return output


def weights_apart(one: Path, other: Path) -> float:
    return distance(load_file(weights_of(one)), load_file(weights_of(other)))


def weights_of(fold: Path) -> Path:
    """An adapter, or a whole model."""
    (file,) = fold.glob("*model.safetensors")
    return file


def assert_same_training(two: Path, one: Path, *, most: float, loss: float = 1e-5) -> None:
    """Compare the adapters, the counts, and the loss of each step."""
    assert weights_apart(two, one) <= most
    (about,) = (path.name for path in one.glob("*config.json"))
    assert (two / about).read_bytes() == (one / about).read_bytes()
    histories = [read_parquet(adapter / "history.parquet") for adapter in (two, one)]
    for name in ("step", "learning_rate"):
        assert histories[0][name].equals(histories[1][name]), name
    # Within an epoch it counts rounds, and fillers make another number of them.
    epochs = [h["epoch"].to_numpy() for h in histories]
    np.testing.assert_allclose(epochs[0], epochs[1], atol=0.1)
    losses = [h["loss"].to_numpy() for h in histories]
    np.testing.assert_allclose(losses[0], losses[1], atol=loss, rtol=0)
    norms = [h["grad_norm"].to_numpy() for h in histories]
    np.testing.assert_allclose(norms[0], norms[1], rtol=10 * loss)
    metrics, expected = (read_json(adapter / "metrics.json") for adapter in (two, one))
    assert metrics.pop("train_loss") == pytest.approx(expected.pop("train_loss"), abs=loss)
    for made in (metrics, expected):
        del made["seconds"], made["sha256"]  # of weights that differ by rounding
    assert metrics == expected


def moved(fold: Path, backbone: Path) -> float:
    """How far training moved the weights: two untrained judges would also be equal."""
    weights, before = load_file(weights_of(fold)), load_file(backbone / "model.safetensors")
    before = {f"model.{name}": w for name, w in before.items()}
    before |= {name: torch.zeros_like(w) for name, w in weights.items() if "lora_B" in name}
    return max(float((w - before[n]).abs().max()) for n, w in weights.items() if n in before)


# --- several processes learn what one learns ----------------------------------------------------------


@slow
@pytest.mark.parametrize(
    ("family", "battles", "changes", "fsdp"),
    [
        ("llama", 48, {"head": LAYERS, "fit_head": True}, 0),  # no fillers
        ("llama", 41, {}, 1),  # the last round is one battle and fillers
        ("qwen2", 47, {"swap": True}, 0),
        ("gemma2", 45, {"fit_head": True}, 1),
        ("llama", 45, STUDENT, 0),
        ("qwen2", 45, STATES, 0),
        ("gemma2", 41, STATES, 1),
        ("llama", 41, {"lora": None}, 0),
        ("qwen2", 41, STATES | {"lora": None}, 1),
    ],
)
def test_two_processes_learn_what_one_learns(
    family: str,
    battles: int,
    changes: dict[str, Any],
    fsdp: int,
    files: Callable[..., Files],
    tmp_path: Path,
) -> None:
    mine = files(family, battles)
    one = in_one_process(mine, tmp_path / "one", None, **changes)
    two = in_two_processes(mine, tmp_path / "two", "--fsdp", str(fsdp), **changes)
    shown = battles * (2 if changes.get("swap") else 1)
    metrics = read_json(two / "metrics.json")
    assert metrics["sequences"] == shown * (2 if "head" in changes else 1)
    assert metrics["steps"] == 2 * -(-shown // BATCH)
    assert moved(one, mine.backbone) > 100 * MOST
    assert_same_training(two, one, most=MOST)


@slow
@pytest.mark.parametrize("options", [("--fsdp", "1")])
def test_half_precision_learns_the_same_but_for_its_rounding(
    options: tuple[str, ...], files: Callable[..., Files], tmp_path: Path
) -> None:
    one = in_one_process(files("llama", 45), tmp_path / "one", None, precision="bf16")
    two = in_two_processes(files("llama", 45), tmp_path / "two", *options, precision="bf16")
    losses = [
        read_parquet(adapter / "history.parquet")["loss"].to_numpy() for adapter in (two, one)
    ]
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-3, rtol=0)
    # Gradients of other micro-batches are rounded otherwise, and AdamW makes steps of the smallest ones.
    learned, expected = (
        torch.cat([w.flatten() for n, w in load_file(f / WEIGHTS).items() if "lora_B" in n])
        for f in (two, one)
    )
    assert float(torch.nn.functional.cosine_similarity(learned, expected, dim=0)) > 0.99


@slow
@pytest.mark.parametrize(("family", "fsdp"), [("gemma2", 1)])
def test_gradient_checkpointing_learns_the_same(
    family: str, fsdp: int, files: Callable[..., Files], tmp_path: Path
) -> None:
    one = in_one_process(files(family, 45), tmp_path / "one", None)
    options = ["--fsdp", str(fsdp), "--gradient-checkpointing", "1"]
    two = in_two_processes(files(family, 45), tmp_path / "two", *options)
    assert_same_training(two, one, most=MOST)


@slow
@pytest.mark.parametrize(("fsdp", "keep_head"), [(0, True), (1, False)])
def test_a_post_pretrained_adapter_is_where_all_processes_start(
    fsdp: int, keep_head: bool, files: Callable[..., Files], tmp_path: Path
) -> None:
    mine = files("llama", 45)
    pretrained = in_one_process(mine, tmp_path / "pretrained", None, lr=0.01, seed=5)
    one = in_one_process(mine, tmp_path / "one", pretrained, keep_head=keep_head)
    options = ["--fsdp", str(fsdp), "--pretrained", str(pretrained)]
    two = in_two_processes(mine, tmp_path / "two", *options, keep_head=keep_head)
    fresh = in_one_process(mine, tmp_path / "fresh", None)

    assert weights_apart(one, fresh) > 100 * MOST
    assert_same_training(two, one, most=MOST)


# --- the order of the battles -------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=120),
    processes=st.integers(1, 4),
    share=st.integers(1, 12),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 5),
)
def test_an_epoch_shows_each_battle_once_in_an_order_of_seed_and_epoch_alone(
    lengths: list[int], processes: int, share: int, seed: int, epoch: int
) -> None:
    batch = processes * share

    def order(**changes: Any) -> list[int]:
        known: dict[str, Any] = {"batch_size": batch, "processes": processes, "seed": seed}
        sampler = ByLength(np.array(lengths), epoch=lambda: epoch, **(known | changes))
        positions = list(sampler)
        assert len(positions) == len(sampler)
        return positions

    shown, alone, rows = order(), order(processes=1), len(lengths)
    assert sorted(alone) == list(range(rows))
    assert sorted(shown) == list(range(len(shown)))
    assert len(shown) == rows if processes == 1 else len(shown) % batch == 0
    assert len(shown) - rows < batch
    for start in range(0, rows, batch):
        step, together = shown[start : start + batch], alone[start : start + batch]
        for process in range(processes):  # none has all the long battles
            mine = step[process * share :][: share if processes > 1 else None]
            assert [row for row in mine if row < rows] == together[process::processes]
    # The longest battle comes first: a batch that does not fit into memory fails at once.
    assert lengths[shown[0]] == max(lengths)


def test_the_order_changes_with_seed_and_epoch() -> None:
    lengths = np.arange(100) % 7

    def order(seed: int, epoch: int) -> tuple[int, ...]:
        rng = {"batch_size": 8, "processes": 1, "seed": seed}
        return tuple(ByLength(lengths, epoch=lambda: epoch, **rng))

    assert len({order(0, 0), order(0, 1), order(7, 0)}) == 3
    assert order(0, 1) == order(0, 1)


# --- interruptions ------------------------------------------------------------------------------------

LONG: dict[str, Any] = {"epochs": 16}  # 48 steps, all of them in the log
LAST = 48


@dataclass
class Training:
    """A training of two processes, in its own process group; its output is read line by line."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def wait_for(self, text: str) -> None:
        until = time.monotonic() + 120
        while not any(text in line for line in self.lines):
            assert self.reader.is_alive(), "\n".join(self.lines)
            assert time.monotonic() < until, "\n".join(self.lines)
            time.sleep(0.01)

    def end(self) -> int:
        code = self.process.wait(120)
        self.reader.join(30)  # its end: no process holds the other end of the pipe
        return code

    def workers(self) -> list[int]:
        listed = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True
        )
        return [int(word) for word in listed.stdout.split()]


@pytest.fixture
def begin(files: Callable[..., Files], tmp_path: Path) -> Iterator[Callable[..., Training]]:
    """Begin the long training; `tmp_path / "two"` is its output."""
    begun: list[Training] = []

    def begin(*options: str, python: str = sys.executable, **changes: Any) -> Training:
        known = ["--checkpoints", str(tmp_path / "kept"), *options]
        words = command(files("llama", 45), tmp_path / "two", *known, **LONG, **changes)
        process = subprocess.Popen(
            [python, *words],
            env=environment() | {"TMPDIR": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        begun.append(Training(process))
        return begun[-1]

    yield begin
    for training in begun:
        with suppress(ProcessLookupError):
            os.killpg(training.process.pid, signal.SIGKILL)
        training.end()


@pytest.fixture(scope="module")
def whole(
    files: Callable[..., Files], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """The long training without an interruption."""
    made: dict[str, Path] = {}

    def of(fsdp: str, **changes: Any) -> Path:
        if (name := f"{fsdp} {changes}") not in made:
            output, how = tmp_path_factory.mktemp("whole") / "two", LONG | changes
            made[name] = in_two_processes(files("llama", 45), output, "--fsdp", fsdp, **how)
        return made[name]

    return of


def assert_bytes(adapter: Path, whole: Path) -> None:
    assert weights_of(adapter).read_bytes() == weights_of(whole).read_bytes()
    histories = [read_parquet(path / "history.parquet") for path in (adapter, whole)]
    assert histories[0].equals(histories[1])


@slow
@pytest.mark.parametrize(
    ("number", "to_all", "changes"),
    [
        (signal.SIGINT, True, {"lora": None}),  # Ctrl-C; each has its part of weights and moments
        (signal.SIGTERM, False, {}),  # as a scheduler that knows the first process alone
    ],
)
def test_stopped_processes_go_on_where_they_were(
    number: signal.Signals,
    to_all: bool,
    changes: dict[str, Any],
    begin: Callable[..., Training],
    whole: Callable[..., Path],
    tmp_path: Path,
) -> None:
    first = begin("--fsdp", "1", **changes)
    first.wait_for("step 7/")
    (os.killpg if to_all else os.kill)(first.process.pid, number)
    assert first.end() == 128 + number
    said = [line for line in first.lines if line.startswith("stopped: ")]
    assert len(said) == 1
    assert said[0] == first.lines[-1]
    assert f"{number.name} received: stopped after step" in said[0]
    assert not (tmp_path / "two").exists()
    second = begin("--fsdp", "1", python=warm_python(), **changes)
    assert second.end() == 0, second.lines
    assert sum(line.endswith(": going on from there") for line in second.lines) in (1, 2)
    assert not any("step 7/" in line for line in second.lines)
    assert_bytes(tmp_path / "two", whole("1", **changes))


@slow
def test_a_warning_saves_all_go_on_and_after_a_kill_the_next_attempt_begins_there(
    begin: Callable[..., Training], whole: Callable[..., Path], tmp_path: Path
) -> None:
    first = begin()
    first.wait_for("step 7/")
    os.killpg(first.process.pid, signal.SIGUSR1)
    first.wait_for(": saved")
    first.wait_for("step 12/")
    os.kill(first.workers()[1], signal.SIGKILL)
    assert first.end() == 128 + signal.SIGKILL
    assert first.lines[-1] == "error: process 1 of 2 ended by SIGKILL"
    second = begin(python=warm_python())
    assert second.end() == 0
    assert any(line.endswith(": going on from there") for line in second.lines)
    assert not any("step 7/" in line for line in second.lines)
    assert_bytes(tmp_path / "two", whole("0"))


@slow
def test_processes_whose_parent_was_killed_keep_the_next_attempt_waiting(
    begin: Callable[..., Training], whole: Callable[..., Path], tmp_path: Path
) -> None:
    first = begin()
    first.wait_for("step 3/")
    first.process.kill()
    second = begin(python=warm_python())
    second.wait_for("another job is at work on this: waiting for it")
    assert second.end() == 0
    assert any(f"step {LAST}/" in line for line in first.lines)
    assert not any("step" in line for line in second.lines)  # it found the work done
    assert_bytes(tmp_path / "two", whole("0"))


# --- what is wrong ------------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize(
    ("gpus", "options", "message"),
    [
        (3, (), f"config: batch_size {BATCH} cannot be shared by 3 devices; make it a multiple"),
        (2, ("--pretrained", "/missing"), "/missing: no adapter: adapter_model.safetensors is "),
    ],
)
def test_an_error_of_all_processes_is_printed_once_and_last(
    gpus: int, options: tuple[str, ...], message: str, files: Callable[..., Files], tmp_path: Path
) -> None:
    done = run(command(files("llama", 45), tmp_path / "x", *options, gpus=gpus))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {message}")
    assert done.stderr.count(message) == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()
