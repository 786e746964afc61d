"""Jobs share devices and outputs without conflicts, and survive the signals that they should survive.

The devices are simulated: no test here needs a GPU. Locks are in a temporary folder of the test.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from arena_distill.errors import InputError
from arena_distill.runs.cleanup import clean_up, wait_for_orphans
from arena_distill.runtime.launch import claim_gpus

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch can use GPUs here")


class Job:
    """A process that runs some lines after `from arena_distill.runtime.launch import *`."""

    def __init__(self, lines: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"import sys, time\nfrom arena_distill.runtime.launch import *\n{lines}",
            ],
            env=os.environ | {"PYTHONPATH": str(ROOT / "workflow")} | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # what is not read yet is in the pipe, where `is_silent` looks
        )

    def read(self) -> str:
        """The next line of output; empty at the end."""
        assert self.process.stdout
        return self.process.stdout.readline().decode().strip()

    def says(self, line: str) -> None:
        assert self.read() == line

    def end(self) -> str:
        """Close its input; return the rest of its output."""
        return self.process.communicate(timeout=60)[0].decode().strip()

    @property
    def is_silent(self) -> bool:
        """Check that it neither prints nor ends for half a second."""
        assert self.process.stdout
        return not select.select([self.process.stdout], [], [], 0.5)[0]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Job]]:
    """Start jobs; none is left at the end of the test."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    jobs: list[Job] = []

    def start(lines: str, **environment: str) -> Job:
        jobs.append(Job(lines, TMPDIR=str(tmp_path), ACCELERATE_USE_CPU="true", **environment))
        return jobs[-1]

    yield start
    for job in jobs:
        job.process.kill()
        job.process.communicate()


# --- devices ----------------------------------------------------------------------------------------

CLAIM = """
claim_gpus({count})
began = time.monotonic()
time.sleep({seconds})
import json
print(json.dumps([began, time.monotonic(), os.environ["CUDA_VISIBLE_DEVICES"].split(",")]))
"""
KEEP = "claim_gpus({count})\nsys.stdin.read()"


def test_a_job_without_gpus_sees_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    claim_gpus(0)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_the_schedulers_own_devices_are_taken_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    claim_gpus(2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,1"
    assert capsys.readouterr().out == "GPUs: 3,1\n"
    assert not list(tmp_path.iterdir())  # nothing to share, nothing to lock


def test_jobs_that_share_a_machine_never_share_a_device(start: Callable[..., Job]) -> None:
    """Six jobs request nine devices but there are four; a job that waits for two holds none."""
    counts = [2, 1, 2, 1, 2, 1]
    lines = [CLAIM.format(count=count, seconds=1) for count in counts]
    jobs = [start(part, CUDA_VISIBLE_DEVICES="0,1,2,3") for part in lines]
    claims = [json.loads(job.end().splitlines()[-1]) for job in jobs]
    assert [len(set(devices)) for _, _, devices in claims] == counts
    for device in "0123":
        turns = sorted(claim[:2] for claim in claims if device in claim[2])
        assert all(ended <= began for (_, ended), (began, _) in zip(turns, turns[1:], strict=False))
    at_once = max(sum(b <= began < e for b, e, _ in claims) for began, _, _ in claims)
    assert at_once >= 2  # they did run at the same time


def test_a_job_that_gathers_devices_is_not_robbed_of_them(start: Callable[..., Job]) -> None:
    """Two jobs with one device each that both wait for a second would wait for ever."""
    visible = {"CUDA_VISIBLE_DEVICES": "0,1,2"}
    holders = [start(KEEP.format(count=1), **visible) for _ in range(3)]
    by_device = {holder.read(): holder for holder in holders}
    by_device["GPUs: 0"].end()
    gathering = start("print(flush=True)" + CLAIM.format(count=2, seconds=0), **visible)
    gathering.read()
    assert gathering.is_silent  # it has device 0
    later = start("print(flush=True)" + CLAIM.format(count=2, seconds=0), **visible)
    later.read()
    gathering.process.send_signal(signal.SIGSTOP)
    by_device["GPUs: 1"].end()
    assert later.is_silent  # although it alone is there to take device 1
    gathering.process.send_signal(signal.SIGCONT)
    for job in (gathering, later):
        assert json.loads(job.end().splitlines()[-1])[2] == ["0", "1"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("0", "1"),
        ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "GPU-0a1b2c3d-d72c-4106-c12f-20bd9faed9f6"),
        ("MIG-GPU-8932f937/1/0", "MIG-GPU-8932f937/2/0"),
    ],
)
def test_a_killed_job_frees_its_device(first: str, second: str, start: Callable[..., Job]) -> None:
    visible = {"CUDA_VISIBLE_DEVICES": f"{first}, {second}"}
    one = start(KEEP.format(count=1), **visible)
    one.says(f"GPUs: {first}")
    other = start(KEEP.format(count=1), **visible)
    other.says(f"GPUs: {second}")
    third = start(KEEP.format(count=1), **visible)
    assert third.is_silent
    one.process.kill()
    third.says(f"GPUs: {first}")


@pytest.mark.parametrize("visible", ["0", "0,", " 0 , -1, 1"])  # as CUDA reads them
def test_too_few_gpus_are_an_error(visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    with pytest.raises(InputError, match=r"needs 2 GPUs .*compute\.gpus.* but 1 are visible"):
        claim_gpus(2)


@no_gpu
def test_without_gpus_at_all_the_error_says_how_to_run_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    with pytest.raises(InputError, match="but 0 are visible; set ACCELERATE_USE_CPU=true"):
        claim_gpus(1)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    claim_gpus(1)


@no_gpu
def test_a_pytorch_that_cannot_use_the_gpus_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    with pytest.raises(InputError, match=f"PyTorch {torch.__version__.split('+')[0]}.* cannot use"):
        claim_gpus(1)


# --- outputs ----------------------------------------------------------------------------------------


def keep(folder: Path) -> str:
    return f"lock_output(Path({str(folder)!r}))\nprint('at work', flush=True)\nsys.stdin.read()"


@pytest.mark.parametrize("killed", [False, True])
def test_a_second_job_waits_for_the_first_to_end_however_it_ends(
    killed: bool, tmp_path: Path, start: Callable[..., Job]
) -> None:
    folder = tmp_path / "judge" / "fold_0"
    first = start(keep(folder))
    first.says("at work")
    second = start(keep(folder))
    second.says(f"{folder}: another job is at work on this: waiting for it")
    assert second.is_silent
    if killed:
        first.process.kill()
    else:
        first.end()
    second.says("at work")


def test_a_job_that_is_gone_still_holds_its_output_while_its_processes_run(
    tmp_path: Path, start: Callable[..., Job]
) -> None:
    lines = [
        f"lock_output(Path({str(tmp_path)!r}))",
        "child = subprocess.Popen(['sleep', '60'], close_fds=False)",
        "print(child.pid, flush=True)",
        "sys.stdin.read()",
    ]
    first = start("\n".join(lines))
    child = int(first.read())
    first.process.kill()
    first.process.wait()
    second = start(keep(tmp_path))
    second.says(f"{tmp_path}: another job is at work on this: waiting for it")
    assert second.is_silent
    os.kill(child, signal.SIGKILL)
    second.says("at work")


def test_jobs_of_two_outputs_do_not_wait_for_each_other(
    tmp_path: Path, start: Callable[..., Job]
) -> None:
    first, second = (start(keep(tmp_path / name)) for name in ("fold_0", "fold_1"))
    first.says("at work")
    second.says("at work")


# --- Slurm jobs that were left ----------------------------------------------------------------------


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A fake squeue that gives one answer after another; returns the file that counts them."""

    def arrange(*answers: str, error: str = "") -> Path:
        folder = tmp_path / "squeue_answers"
        folder.mkdir()
        (folder / "squeue").write_text(
            f'#!/bin/sh\ncd "{folder}"\nn=$(wc -l < asked)\necho "$@" >> asked\n'
            'test -f "error" && cat error >&2 && exit 1\ncat "$n"\n'
        )
        (folder / "squeue").chmod(0o755)
        (folder / "asked").write_text("")
        for n, answer in enumerate(answers):
            (folder / str(n)).write_text(answer)
        if error:
            (folder / "error").write_text(error)
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
        return folder / "asked"

    return arrange


def asked(file: Path) -> int:
    return len(file.read_text().splitlines())


def test_jobs_that_were_left_are_waited_for(
    squeue: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    here = os.getcwd()
    mine = f"12_3|{here}|rule_train_teacher_wildcards_llama_0\n"
    file = squeue(mine + f"13|{here}|rule_train_teacher_wildcards_llama_1\n", mine, "")
    wanted = [f"rule_train_teacher_wildcards_llama_{fold}" for fold in (0, 1)]
    wait_for_orphans(wanted, every=0)
    assert asked(file) == 3
    said = capsys.readouterr().err
    assert said.count("Waiting for Slurm jobs that an earlier Snakemake left: 12_3, 13 ") == 1
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    "line",
    [
        "",
        "12|/elsewhere|rule_assign_folds\n",  # of a run in another folder
        "12|{here}|rule_train_teacher_wildcards_llama_0\n",  # not to be run now
        "12|{here}|(null)\n",
        "12|{here}|a | comment with | bars\n",
    ],
)
def test_other_jobs_are_not_waited_for(
    line: str, squeue: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = squeue(line.format(here=os.getcwd()))
    wait_for_orphans(["rule_assign_folds"], every=0)
    assert asked(file) == 1
    assert capsys.readouterr() == ("", "")


def test_a_slurm_that_does_not_answer_is_an_error(squeue: Callable[..., Path]) -> None:
    squeue(error="slurm_load_jobs error: Unable to contact slurm controller")
    with pytest.raises(InputError, match="squeue: .*Unable to contact slurm controller"):
        wait_for_orphans(["rule_assign_folds"], every=0)


def test_without_slurm_there_is_nothing_to_wait_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    wait_for_orphans(["rule_assign_folds"], every=0)
    assert capsys.readouterr() == ("", "")


# --- what a run leaves ------------------------------------------------------------------------------


def training(results: Path, judge: str, fold: int, *, finished: bool) -> Path:
    folder = results / ".checkpoints" / judge / f"fold_{fold}"
    (folder / "0123456789abcdef" / ("finished" if finished else "checkpoint-3")).mkdir(parents=True)
    (folder / "lock").touch()
    return folder


def test_finished_trainings_are_swept_away_and_others_stay(tmp_path: Path) -> None:
    done = training(tmp_path, "llama", 0, finished=True)
    begun = training(tmp_path, "llama", 1, finished=False)
    again = training(tmp_path, "qwen2", 0, finished=True)
    with open(again / "lock") as lock:  # by another Snakemake
        fcntl.flock(lock, fcntl.LOCK_EX)
        clean_up(tmp_path)
    assert not done.exists()
    assert (begun / "0123456789abcdef/checkpoint-3").is_dir()
    assert (again / "0123456789abcdef/finished").is_dir()
    clean_up(tmp_path)
    assert not again.exists()
    assert not again.parent.exists()
    assert begun.exists()


def test_nothing_is_left_where_every_training_has_finished(tmp_path: Path) -> None:
    training(tmp_path, "llama", 0, finished=True)
    training(tmp_path, "qwen2", 0, finished=True)
    clean_up(tmp_path)
    assert not list(tmp_path.iterdir())
    clean_up(tmp_path)
    clean_up(tmp_path / "missing")


def test_files_half_written_long_ago_are_swept_away(tmp_path: Path) -> None:
    young, old = tmp_path / ".metrics.json.0a1b2c3d.tmp", tmp_path / "adapters/.fold_0.0a1b2c3d.tmp"
    old.mkdir(parents=True)
    (old / "adapter_model.safetensors").touch()
    young.touch()
    whole = [tmp_path / "metrics.json", tmp_path / "notes.tmp"]
    days_ago = time.time() - 2 * 24 * 3600
    for path in whole:
        path.touch()
    for path in (old, *whole):
        os.utime(path, (days_ago, days_ago))
    clean_up(tmp_path)
    assert not old.exists()
    assert young.exists()
    assert all(path.exists() for path in whole)


# --- signals ----------------------------------------------------------------------------------------

MIND = "ignore_signals()\nprint('ready', flush=True)\nsys.stdin.read()"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_slurm_job_outlives_the_signals_that_announce_its_end(
    number: signal.Signals, start: Callable[..., Job]
) -> None:
    job = start(MIND, SLURM_JOB_ID="1")
    job.says("ready")
    job.process.send_signal(number)
    assert job.is_silent


def test_outside_of_slurm_a_job_can_be_terminated(start: Callable[..., Job]) -> None:
    job = start(MIND)
    job.says("ready")
    job.process.send_signal(signal.SIGUSR1)
    assert job.is_silent
    job.process.send_signal(signal.SIGTERM)
    assert job.process.wait(10) == -signal.SIGTERM
