"""`arena-distill status`: every state of a job, and the reason of a failure."""

from __future__ import annotations

import io
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from checkouts import warm_python
from rich.console import Console

from arena_distill.errors import InputError
from arena_distill.runs import status
from arena_distill.runs.graph import Planned
from arena_distill.runs.job_errors import error_lines, slurm_lines
from arena_distill.runs.status import (
    Evidence,
    Job,
    JobState,
    Status,
    parse_failures,
    parse_squeue,
    read_markers,
    snakemake_at_work,
)
from arena_distill.runs.status_table import print_status

ROOT = Path(__file__).resolve().parents[1]
TIME_LIMIT = (
    "slurmstepd: error: *** JOB 7 ON gpu1 CANCELLED AT 2026-03-01T12:00:00 DUE TO TIME LIMIT ***"
)
CANCELLED = "slurmstepd: error: *** JOB 7 ON gpu1 CANCELLED AT 2026-03-01T12:00:00 ***"
STARTED = 1_800_000_000.0
"""When the jobs of these tests were started, seconds since the epoch."""

JOB = Planned(
    rule="train_teacher",
    wildcards={"judge": "llama", "fold": "1"},
    outputs=["adapters/llama/fold_1"],
    logs=["logs/train_teacher/llama_fold_1.log"],
    needed=True,
)


@dataclass
class Run:
    """A folder as Snakemake, Slurm and jobs leave it; times are seconds after the start."""

    folder: Path

    def write(self, name: str, text: str = "", at: float = 0) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        os.utime(path, (STARTED + at, STARTED + at))

    def log(self, text: str, at: float = 10) -> None:
        self.write(JOB.logs[0], text, at)

    def slurm_log(self, text: str, at: float = 11, job: str = "7") -> None:
        self.write(f".snakemake/slurm_logs/rule_train_teacher/llama_1/{job}.log", text, at)

    def started(self, slurm_job: str | None = None) -> None:
        """Write what Snakemake itself notes when it starts the job."""
        persistence(self.folder)._mark_incomplete(JOB.outputs[0], slurm_job)
        for path in (self.folder / ".snakemake/incomplete").iterdir():
            os.utime(path, (STARTED, STARTED))

    def failed(self, message: str = "None", at: float = 12, more: str = "") -> None:
        """Write the job's failure as in Snakemake's log."""
        stamp = time.asctime(time.localtime(STARTED + at))
        text = (
            f"[{stamp}]\nError in rule {JOB.rule}:\n    message: {message}\n    jobid: 3\n"
            f"    output: {JOB.outputs[0]}\n"
            f"    log: {JOB.logs[0]} (check log file(s) for error details)\n    shell:\n"
            f"        train\n        (command exited with non-zero exit code)\n{more}"
        )
        self.write(".snakemake/log/2027-01-15T080000.000000.snakemake.log", text, at)

    def judge(
        self,
        *,
        at_work: bool = False,
        alive: dict[str, JobState] | None = None,
        job: Planned = JOB,
    ) -> Job:
        evidence = Evidence.of(self.folder, [job])
        return replace(evidence, alive=alive).judge(job, at_work)


def persistence(folder: Path) -> Any:
    from snakemake.persistence.file import FilePersistence

    return FilePersistence(path=folder / ".snakemake")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    # The test sets the states of Slurm jobs, whatever is installed on this machine.
    monkeypatch.setattr(status, "ask_squeue", lambda jobs: None)
    return Run(tmp_path)


# --- jobs nobody works on ---------------------------------------------------------------------------


def test_what_snakemake_would_not_run_is_done(run: Run) -> None:
    run.log("error: an old one\n")
    assert run.judge(job=replace(JOB, needed=False)).state == "done"


def test_what_was_never_started_waits(run: Run) -> None:
    assert run.judge(at_work=True) == Job(**vars(JOB), state="waiting")


def test_an_output_removed_by_hand_waits(run: Run) -> None:
    run.log("epoch 1\nepoch 2\n")
    assert run.judge().state == "waiting"


def test_a_stale_output_waits_whatever_its_log_mentions(run: Run) -> None:
    run.log("Traceback (most recent call last):\n  caught\nValueError: and survived\n")
    run.write(JOB.outputs[0], at=11)
    assert run.judge().state == "waiting"


def test_a_log_with_an_error_and_no_output_is_a_failure(run: Run) -> None:
    run.log("epoch 1\nerror: no battles\n")
    job = run.judge(at_work=True)
    assert job.state == "failed"
    assert job.error == ["error: no battles"]


def test_a_job_that_was_told_to_stop_has_not_failed(run: Run) -> None:
    run.log("stopped: SIGTERM, a checkpoint is written\n")
    assert run.judge().state == "interrupted"


# --- jobs that were started -------------------------------------------------------------------------


def test_a_started_job_runs_while_snakemake_is_at_work(run: Run) -> None:
    run.started()
    run.log("Traceback (most recent call last):\n  caught\nValueError: and survived\n")
    assert run.judge(at_work=True).state == "running"


def test_a_started_job_is_interrupted_once_snakemake_is_gone(run: Run) -> None:
    run.started()
    run.log("epoch 1\n")
    run.write(JOB.outputs[0], "half")
    assert run.judge(job=replace(JOB, needed=False)).state == "interrupted"


def test_a_started_job_may_have_failed_since_snakemake_is_gone(run: Run) -> None:
    run.started()
    run.log("error: no space left\n")
    run.write(JOB.outputs[0], "half")
    job = run.judge()
    assert (job.state, job.error) == ("failed", ["error: no space left"])


def test_the_log_of_an_earlier_attempt_says_nothing_about_this_one(run: Run) -> None:
    run.started()
    run.log("error: of the first attempt\n", at=-60)
    job = run.judge()
    assert (job.state, job.error) == ("interrupted", [])


def test_an_interrupt_is_no_failure_though_snakemake_notes_one(run: Run) -> None:
    run.started()  # Ctrl-C leaves the marker
    run.failed()
    run.log("Traceback (most recent call last):\n  File x\nKeyboardInterrupt\n")
    assert run.judge().state == "interrupted"


# --- Slurm ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("says", "state"), [({"7": "queued"}, "queued"), (None, "queued")])
def test_a_submitted_job_is_queued(
    run: Run, says: dict[str, JobState] | None, state: JobState
) -> None:
    run.started("7")
    job = run.judge(at_work=True, alive=says)
    assert (job.state, job.slurm_job, job.slurm_log) == (state, "7", None)


def test_a_submitted_job_that_slurm_does_not_know_is_interrupted(run: Run) -> None:
    run.started("7")
    assert run.judge(at_work=True, alive={}).state == "interrupted"


@pytest.mark.parametrize("at_work", [True, False])
def test_squeue_knows_better_than_the_marker(run: Run, at_work: bool) -> None:
    run.started()  # on the node, where the Slurm job's id is not noted
    run.log("epoch 1\n")
    run.slurm_log("Building DAG of jobs...\n", at=0)
    job = run.judge(at_work=at_work, alive={"7": "running"})
    assert (job.state, job.slurm_job) == ("running", "7")
    assert run.judge(at_work=at_work, alive={"7": "queued"}).state == "queued"
    assert run.judge(at_work=at_work, alive={"8": "running"}).state == "interrupted"


def test_a_local_job_is_not_taken_for_an_earlier_slurm_job(run: Run) -> None:
    run.slurm_log(TIME_LIMIT, at=-600)
    run.started()
    run.log("epoch 1\n")
    job = run.judge(at_work=True, alive={})
    assert (job.state, job.slurm_job) == ("running", None)


def test_a_job_that_slurm_requeued_is_queued(run: Run) -> None:
    run.log("stopped: SIGTERM\n")
    run.slurm_log(CANCELLED.replace(" ***", " DUE TO PREEMPTION ***"))
    assert run.judge(at_work=True, alive={"7": "queued"}).state == "queued"
    assert run.judge(at_work=True, alive={}).state == "interrupted"


@pytest.mark.parametrize("marked", [True, False])
def test_slurm_reports_a_time_limit(run: Run, marked: bool) -> None:
    if marked:
        run.started()
    run.log("stopped: SIGTERM\n")
    run.slurm_log(f"srun: error: gpu1: task 0: Exited with exit code 1\n{TIME_LIMIT}\n")
    job = run.judge(alive={})
    assert job.state == "failed"
    assert job.error == [TIME_LIMIT, "stopped: SIGTERM"]
    assert job.slurm_log == ".snakemake/slurm_logs/rule_train_teacher/llama_1/7.log"


def test_a_cancelled_job_is_interrupted(run: Run) -> None:
    run.log("epoch 1\n")
    run.slurm_log(f"{CANCELLED}\nsrun: error: gpu1: task 0: Killed\n")
    job = run.judge(alive={})
    assert job.state == "interrupted"
    assert CANCELLED in job.error


def test_the_slurm_log_of_another_run_is_not_this_ones(run: Run) -> None:
    run.log("epoch 1\n")
    run.slurm_log(f"Error in rule train_teacher:\n    output: other/adapters\n{TIME_LIMIT}\n")
    assert run.judge(alive={}).state == "waiting"


def test_the_first_slurm_log_after_the_jobs_own_is_its_own(run: Run) -> None:
    run.log("epoch 1\n")
    run.slurm_log("srun: error: of an earlier attempt", at=-60, job="5")
    run.slurm_log(TIME_LIMIT, at=11)
    run.slurm_log("srun: error: of another run", at=500, job="9")
    assert run.judge(alive={}).error == [TIME_LIMIT]


def test_array_tasks_have_their_logs_in_the_rules_folder(run: Run) -> None:
    run.started("40_2")
    run.write(".snakemake/slurm_logs/rule_train_teacher/40_2.log", TIME_LIMIT, at=9)
    job = run.judge(alive={})
    assert (job.state, job.error) == ("failed", [TIME_LIMIT])


# --- failures that Snakemake saw --------------------------------------------------------------------


def test_a_refused_submission_is_a_failure_without_a_log(run: Run) -> None:
    run.failed("SLURM sbatch failed. The error message was 'sbatch: error: no\nsuch partition'.\n"
               "    sbatch call:\n        sbatch --parsable")  # fmt: skip
    job = run.judge(at_work=True)
    assert job.state == "failed"
    assert job.error == [
        "SLURM sbatch failed. The error message was 'sbatch: error: no",
        "such partition'.",
    ]


def test_slurms_reason_comes_before_the_jobs(run: Run) -> None:
    run.failed(
        "SLURM-job '7' failed, SLURM status is: 'OUT_OF_MEMORY'. For further error details see",
        more="    external_jobid: 7\n",
    )
    run.log("error: last words\n")
    run.slurm_log("slurmstepd: error: Detected 1 oom_kill event in StepId=7.0.\n")
    assert run.judge(at_work=True).error == [
        "SLURM-job '7' failed, SLURM status is: 'OUT_OF_MEMORY'.",
        "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0.",
        "error: last words",
    ]


def test_slurms_bare_failure_is_shown_only_without_another_reason(run: Run) -> None:
    run.failed("SLURM-job '7' failed, SLURM status is: 'FAILED'.")
    run.log("epoch 1\n")
    assert run.judge().error == ["SLURM-job '7' failed, SLURM status is: 'FAILED'."]
    run.log("error: no battles\n")
    assert run.judge().error == ["error: no battles"]


def test_a_failure_without_a_message_shows_the_end_of_the_log(run: Run) -> None:
    run.failed()
    run.log("".join(f"epoch {n}\n\n" for n in range(9)))
    job = run.judge()
    assert (job.state, job.error) == ("failed", [f"epoch {n}" for n in range(4, 9)])


@pytest.mark.parametrize("later", [JOB.logs[0], JOB.outputs[0]])
def test_a_later_attempt_makes_a_failure_history(run: Run, later: str) -> None:
    run.failed()
    run.write(later, "fine\n", at=12)
    assert run.judge().state == "failed"
    run.write(later, "fine\n", at=120)
    assert run.judge().state == "waiting"


def test_a_job_that_is_tried_again_runs(run: Run) -> None:
    run.failed(at=-60)
    run.started()
    assert run.judge(at_work=True).state == "running"


def test_the_newest_of_snakemakes_logs_counts(run: Run) -> None:
    run.failed("of the second run")
    second = run.folder / ".snakemake/log/2027-01-15T080000.000000.snakemake.log"
    text = second.read_text().replace("second", "first")
    run.write(".snakemake/log/2026-12-31T080000.000000.snakemake.log", text)
    assert run.judge().error == ["of the second run"]


def test_failures_are_read_from_a_log_of_snakemake() -> None:
    text = """\
[Sun Nov 22 21:08:07 2026]
Finished jobid: 4 (Rule: train)
[Sun Nov  1 21:09:17 2026]
Error in rule train:
    message: None
    jobid: 2
    input: out/ok.txt
    output: out/a.npy, out/a.ids.parquet
    log: logs/a.log (check log file(s) for error details)
    shell:
        train --settings 'a:
  b' > logs/a.log
        (command exited with non-zero exit code)
Logfile logs/a.log:
error: x
[Sun Nov 22 21:09:18 2026]
Error in rule merge:
    message: SLURM-job '4' failed.For further error details see the cluster/cloud log
    jobid: 5
    output: out/b
    external_jobid: 4
"""
    (train, first), (merge, second) = parse_failures(text)
    assert train == ("train", "out/a.npy, out/a.ids.parquet")
    assert time.localtime(first.time)[:6] == (2026, 11, 1, 21, 9, 17)
    assert (first.message, first.slurm_job) == (None, None)
    assert merge == ("merge", "out/b")
    assert (second.message, second.slurm_job) == ("SLURM-job '4' failed.", "4")


# --- logs -------------------------------------------------------------------------------------------

TRACEBACK = """\
Traceback (most recent call last):
  File "a.py", line 1, in main
    train()
  File "b.py", line 22, in train
    step(batch)
    ^^^^^^^^^^^
torch.OutOfMemoryError: CUDA out of memory.
Tried to allocate 2 GiB

"""
PLACE = ['  File "b.py", line 22, in train', "    step(batch)"]
MESSAGE = ["torch.OutOfMemoryError: CUDA out of memory.", "Tried to allocate 2 GiB"]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("epoch 1\nan error: not at the start\n", []),
        ("epoch 1\nerror: one\nerror: two\n", ["error: one", "error: two"]),
        ("error: of every rank\nerror: of every rank\n", ["error: of every rank"]),
        (f"{TRACEBACK}error: in a word\n", ["error: in a word"]),
        ("\x1b[31merror: in red\x1b[0m\r\n", ["error: in red"]),
        ("10%|#  |\r100%|###|\rerror: after a bar\n", ["error: after a bar"]),
        ("stopped: SIGTERM\n", ["stopped: SIGTERM"]),
        (f"epoch 1\n{TRACEBACK}bye\n", [*PLACE, *MESSAGE]),
        (f"{TRACEBACK}During handling, another:\n\n{TRACEBACK.replace('22', '33')}",
         [PLACE[0].replace("22", "33"), PLACE[1], *MESSAGE]),
        ("\n".join(f"[rank1]: {line}" for line in TRACEBACK.split("\n"))
         + "\n" + TRACEBACK.replace(MESSAGE[0], "torch…errors.ChildFailedError:"),
         [*PLACE, *MESSAGE]),
        (TRACEBACK.replace(MESSAGE[0], "KeyboardInterrupt"), []),
        ("Traceback (most recent call last):\n  File", []),
        ("/usr/bin/bash: line 1: 17 Killed        python train\n",
         ["/usr/bin/bash: line 1: 17 Killed        python train"]),
        ("/usr/bin/bash: line 1: 17 Terminated        python train\n", []),
    ],
)  # fmt: skip
def test_lines_of_an_error_are_found(text: str, lines: list[str]) -> None:
    assert error_lines(text) == lines


def test_the_end_of_a_long_log_is_enough(run: Run) -> None:
    run.log("epoch\n" * 200_000 + "error: at the end\n")
    assert run.judge().error == ["error: at the end"]


def test_lines_of_slurm_are_found_once() -> None:
    killed = "srun: error: gpu1: task 0: Out Of Memory"
    text = f"Building DAG\nsrun: job 7 queued\n{killed}\n{killed}\nslurmstepd-gpu1: error: x\n"
    assert slurm_lines(text) == [killed, "slurmstepd-gpu1: error: x"]


def test_states_of_slurm() -> None:
    text = "5|RUNNING\n6|PENDING\n7_12|COMPLETING\n8|TIMEOUT\n9|REQUEUED\n"
    assert parse_squeue(text) == {"5": "running", "6": "queued", "7_12": "running", "9": "queued"}


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Put a `squeue` of these shell commands first in PATH; returns the file with its arguments."""

    def make(commands: str) -> Path:
        calls = tmp_path / "calls"
        script = tmp_path / "bin/squeue"
        script.parent.mkdir()
        script.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n{commands}\n')
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
        return calls

    return make


def test_squeue_is_asked_once_for_all_jobs(tmp_path: Path, squeue: Callable[[str], Path]) -> None:
    calls = squeue("echo '2|RUNNING'; echo '5|PENDING'")
    store = persistence(tmp_path)
    jobs = [replace(JOB, wildcards={"n": str(n)}, outputs=[f"out/{n}"]) for n in range(9)]
    for n in range(9):
        store._mark_incomplete(f"out/{n}", str(n))
    evidence = Evidence.of(tmp_path, jobs)
    states = [evidence.judge(job, at_work=True).state for job in jobs]
    assert (states.count("running"), states.count("queued")) == (1, 1)
    assert (states[2], states[5], states[0]) == ("running", "queued", "interrupted")
    assert len(calls.read_text().splitlines()) == 1
    assert "--jobs=0,1,2,3,4,5,6,7,8" in calls.read_text()


def test_a_job_that_slurm_does_not_know_is_not_alive(squeue: Callable[[str], Path]) -> None:
    squeue("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert status.ask_squeue(["5"]) == {}


def test_a_squeue_that_fails_gives_no_states(squeue: Callable[[str], Path]) -> None:
    squeue("echo 'Unable to contact slurm controller' >&2; exit 1")
    assert status.ask_squeue(["5"]) is None


def test_squeue_is_not_asked_about_local_runs(squeue: Callable[[str], Path]) -> None:
    calls = squeue("exit 1")
    assert status.ask_squeue([]) == {}
    assert not calls.exists()


# --- .snakemake -------------------------------------------------------------------------------------


def test_markers_are_read_as_snakemake_writes_them(tmp_path: Path) -> None:
    long = "results/" + "a_very_long_name/" * 30 + "fold_1.npy"
    store = persistence(tmp_path)
    store._mark_incomplete(long, "12_3")
    store._mark_incomplete("ünïcode", None)
    (tmp_path / ".snakemake/incomplete/migration_underway").touch()
    markers = read_markers(tmp_path)
    assert set(markers) == {long, "ünïcode"}
    assert (markers[long].slurm_job, markers["ünïcode"].slurm_job) == ("12_3", None)


def test_a_marker_that_is_being_written_counts(tmp_path: Path) -> None:
    persistence(tmp_path)._mark_incomplete("out", "5")
    (marker,) = (tmp_path / ".snakemake/incomplete").iterdir()
    marker.write_text("")
    assert read_markers(tmp_path)["out"].slurm_job is None


@pytest.mark.parametrize(
    ("words", "place", "works"),
    [
        (["/venv/bin/python", "/venv/bin/snakemake", "--cores", "2"], "here", True),
        (["python", "-m", "snakemake", "--cores", "2"], "here", True),
        (["python", "-m", "snakemake", "--cores", "2"], "elsewhere", False),
        (["python", "-m", "snakemake", "--cores", "2"], None, True),
        (["python", "-m", "snakemake", "-n"], "here", False),
        (["python", "-m", "snakemake", "--target-jobs", "x", "--mode", "remote"], "here", False),
        (["tail", "-f", "results/snakemake.log"], "here", False),
        (None, "here", False),
    ],
)
def test_a_snakemake_at_work_is_a_process(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str] | None,
    place: str | None,
    works: bool,
) -> None:
    cwd = str(tmp_path) if place == "here" else place
    info = {"cmdline": words, "cwd": cwd, "uids": SimpleNamespace(real=os.getuid())}
    monkeypatch.setattr(psutil, "process_iter", lambda names: [SimpleNamespace(info=info)])
    assert not snakemake_at_work(tmp_path)  # it plans, and holds no lock yet
    locks = tmp_path / ".snakemake/locks"
    locks.mkdir(parents=True)
    (locks / "0.output.lock").touch()
    assert snakemake_at_work(tmp_path) == works


def test_a_snakemake_of_another_host_is_believed_to_live(run: Run) -> None:
    run.write(".snakemake/locks/0.input.lock")
    run.write(".snakemake/log/1.snakemake.log", f"SNAKEMAKE\n  Host: {platform.node()}\n")
    assert not snakemake_at_work(run.folder)
    run.write(".snakemake/log/2.snakemake.log", "SNAKEMAKE\n  Host: login2.cluster\n")
    run.write(".snakemake/log/3.snakemake.log", "Building DAG of jobs...\n")
    assert snakemake_at_work(run.folder)


# --- on the terminal --------------------------------------------------------------------------------


def printed(found: Status, most: int = 20) -> str:
    console = Console(file=io.StringIO(), width=80)
    print_status(found, console, most=most)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_row_per_rule_and_a_paragraph_per_failure(tmp_path: Path) -> None:
    (tmp_path / "logs/train_teacher").mkdir(parents=True)
    (tmp_path / JOB.logs[0]).touch()
    error = ["error: bad [/bold] row [0]", "x" * 200]
    jobs = [
        Job(
            rule="read_battles",
            wildcards={},
            outputs=["battles"],
            logs=[],
            needed=False,
            state="done",
        ),
        Job(**vars(replace(JOB, wildcards={"fold": "0"})), state="running"),
        Job(**vars(JOB), state="failed", error=error, slurm_job="7", slurm_log="7.log"),
        Job(**vars(JOB), state="waiting"),
    ]
    text = printed(Status(tmp_path, True, jobs))
    rows = [line.split() for line in text.splitlines()]
    assert ["read_battles", "1", "·", "·", "·", "·"] in rows
    assert ["train_teacher", "·", "1", "·", "1", "1", "fold_0"] in rows
    assert ["total", "1", "1", "·", "1", "1"] in rows
    assert "1 of 4 jobs are done; Snakemake is running" in text
    assert (
        f"failed train_teacher llama fold_1: {JOB.outputs[0]}\n"
        f"  log: {JOB.logs[0]}\n  Slurm job 7: 7.log\n"
        f"    error: bad [/bold] row [0]\n    {'x' * 200}\n"
    ) in text
    assert "interrupted" not in text
    assert "log:" not in printed(Status(tmp_path / "elsewhere", True, jobs))


def test_many_failures_are_cut(tmp_path: Path) -> None:
    jobs = [Job(**vars(JOB), state="interrupted", error=["why"])] * 5
    text = printed(Status(tmp_path, False, jobs), most=2)
    assert text.count("why") == 2
    assert "3 more" in text
    assert "--rerun-incomplete" in text


def test_jobs_that_outlive_snakemake_are_reported(tmp_path: Path) -> None:
    jobs = [Job(**vars(JOB), state="running", slurm_job="7")]
    assert "Slurm jobs continue" in printed(Status(tmp_path, False, jobs))
    assert "Slurm jobs continue" not in printed(Status(tmp_path, True, jobs))


@pytest.mark.parametrize(
    ("stdout", "stderr", "message"),
    [
        ("Building DAG of jobs...\nMissingInputException: a.csv\n    affected: b\n", "",
         "MissingInputException: a.csv\n    affected: b"),
        ("", "usage: snakemake [-h]\n   [--cores N]\nsnakemake: error: no --such\n",
         "snakemake: error: no --such"),
        ("Traceback (most recent call last):\n  File x\n  y\nOSError: nope.yaml\n",
         "Using profile p for setting default command line arguments.\n", "OSError: nope.yaml"),
        ("", "", "Snakemake failed without a message"),
    ],
)  # fmt: skip
def test_an_error_of_snakemake_is_printed_in_its_words(
    monkeypatch: pytest.MonkeyPatch, stdout: str, stderr: str, message: str
) -> None:
    refused = subprocess.CompletedProcess([], 1, stdout, stderr)
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: refused)
    with pytest.raises(InputError) as caught:
        status.read_graph([])
    assert str(caught.value) == message


# --- with a real Snakemake --------------------------------------------------------------------------

SNAKEFILE = """
configfile: "config.yaml"

rule all:
    input: "last", "bad", expand("good_{n}", n=[10, 9])
rule last:
    input: "slow"
    output: "last"
    log: "logs/last.log"
    shell: "touch {output} > {log} 2>&1"
rule good:
    output: "good_{n}", "good_{n}.ids"
    log: "logs/good_{n}.log"
    message: "Good"
    shell: "touch {output} > {log} 2>&1"
rule bad:
    output: "bad"
    log: "logs/bad.log"
    message: "Bad"
    shell: "[ -e fixed ] && touch {output} || {{ echo error: x; false; }} > {log} 2>&1"
rule slow:
    output: directory("slow")
    log: "logs/slow.log"
    message: "Slow"
    shell: "( mkdir {output}; until [ -e go ]; do sleep 0.1; done ) > {log} 2>&1"
"""


@dataclass
class Workflow:
    folder: Path

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "snakemake", "--cores", "3", *arguments]

    def snakemake(self, *arguments: str) -> None:
        command = [warm_python(), *self.command(*arguments)[1:]]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def status(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [warm_python(), "-m", "arena_distill", "status", *arguments],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT / "workflow"), "COLUMNS": "80"},
            capture_output=True,
            text=True,
        )

    def states(self, *arguments: str) -> tuple[dict[str, str], dict[str, Any], int]:
        """States by first output, everything, and the exit status."""
        done = self.status("--json", *arguments)
        assert not done.stderr
        found = json.loads(done.stdout)
        return {j["outputs"][0]: j["state"] for j in found["jobs"]}, found, done.returncode


@pytest.mark.slow
def test_a_run_from_its_start_over_its_death_to_its_end(tmp_path: Path) -> None:
    flow = Workflow(tmp_path)
    (tmp_path / "Snakefile").write_text(SNAKEFILE)

    refused = flow.status("--keep-going")
    assert refused.returncode == 1
    assert "config.yaml" in refused.stderr
    assert all(line.startswith("error: ") for line in refused.stderr.splitlines())

    (tmp_path / "config.yaml").write_text("{}")
    states, found, code = flow.states()
    assert list(states) == ["last", "good_9", "good_10", "bad", "slow"]
    assert (set(states.values()), found["at_work"], code) == ({"waiting"}, False, 0)

    with (tmp_path / "snakemake.log").open("w") as log:
        main = subprocess.Popen(flow.command("--keep-going"), cwd=tmp_path, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while "Error in rule bad" not in (tmp_path / "snakemake.log").read_text() or not (
            (tmp_path / "slow").exists() and (tmp_path / "good_10.ids").exists()
        ):
            assert time.monotonic() < deadline, (tmp_path / "snakemake.log").read_text()
            time.sleep(0.2)
        failed = time.time()
        expected = {
            "last": "waiting",
            "good_9": "done",
            "good_10": "done",
            "bad": "failed",
            "slow": "running",
        }
        states, found, code = flow.states()
        assert (states, found["at_work"], code) == (expected, True, 1)
        assert found["counts"]["done"] == 2
        (bad,) = (job for job in found["jobs"] if job["rule"] == "bad")
        assert (bad["error"], bad["logs"]) == (["error: x"], ["logs/bad.log"])
        main.kill()
        main.wait()
        # Its locks are left, and so is the job, which nobody waits for.
        states, found, code = flow.states()
        assert (states, found["at_work"], code) == ({**expected, "slow": "interrupted"}, False, 1)
        told = flow.status()
        assert told.returncode == 1
        assert "failed bad: bad\n  log: logs/bad.log\n    error: x\n" in told.stdout
        assert "interrupted slow: slow\n" in told.stdout
    finally:
        main.kill()
        (tmp_path / "go").touch()

    (tmp_path / "fixed").touch()
    flow.snakemake("--unlock")
    # Later than the slack that the times of files have: else the failure may be the new run's.
    time.sleep(max(0.0, failed + status._SLACK + 1 - time.time()))
    flow.snakemake("--rerun-incomplete")
    states, found, code = flow.states()
    assert (set(states.values()), code) == ({"done"}, 0)
    (tmp_path / "bad").unlink()
    states, _, code = flow.states("all", "--rerun-triggers", "mtime")
    assert ({name for name in states if states[name] == "waiting"}, code) == ({"bad"}, 0)
    assert len(list((tmp_path / ".snakemake/log").iterdir())) == 3  # none of a status


@pytest.mark.slow
def test_the_folder_and_the_targets_are_snakemakes_arguments(tmp_path: Path) -> None:
    flow = Workflow(tmp_path)
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config.yaml").write_text("{}")
    states, found, code = flow.states("--directory", "elsewhere", "last")
    assert (states, found["folder"], code) == (
        {"last": "waiting", "slow": "waiting"},
        str(elsewhere.resolve()),
        0,
    )
