"""What surrounds a run: jobs that an earlier Snakemake left, and files that are not needed any more."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from arena_distill.errors import InputError


def wait_for_orphans(comments: Iterable[str], *, every: float = 10) -> None:
    """Wait for Slurm jobs that a Snakemake which was killed has left in this folder.

    Starting their rules again beside them would do everything twice. (Snakemake's own notes do not
    help: a job that has begun overwrites the note of its number.)

    Args:
        comments: what the Slurm plugin calls the jobs that are to be run.
        every: seconds between questions.

    Raises:
        InputError: Slurm does not answer.
    """
    if not shutil.which("squeue"):
        return
    wanted, here = set(comments), os.getcwd()
    said = False
    while True:
        command = ["squeue", "--noheader", "--format=%i|%Z|%k"]
        answer = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if answer.returncode:
            raise InputError(f"squeue: {answer.stderr.strip()}")
        jobs = [line.split("|", 2) for line in answer.stdout.splitlines()]
        left = [number for number, folder, comment in jobs if folder == here and comment in wanted]
        if not left:
            return
        if not said:
            print(
                f"Waiting for Slurm jobs that an earlier Snakemake left: {', '.join(left)} "
                "(scancel them to go on at once: training resumes at its last checkpoint)",
                file=sys.stderr,
                flush=True,
            )
            said = True
        time.sleep(every)


def clean_up(results: Path) -> None:
    """Remove what a run that has succeeded needs no more: finished trainings, files half written.

    What another Snakemake may be working on stays.
    """
    for lock in results.glob(".checkpoints/*/*/lock"):
        with open(lock, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            if any(lock.parent.glob("*/finished")):
                shutil.rmtree(lock.parent)
    for folder in (*results.glob(".checkpoints/*"), results / ".checkpoints"):
        with suppress(OSError):  # not empty, or not there
            folder.rmdir()
    yesterday = time.time() - 24 * 3600
    for path in results.rglob(".*.tmp"):
        if path.stat().st_mtime < yesterday:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
