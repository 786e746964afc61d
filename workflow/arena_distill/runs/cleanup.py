"""Wait for jobs that an earlier Snakemake left, and remove files that a run no longer needs."""

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
    """Wait for Slurm jobs that a killed Snakemake has left in this folder.

    Otherwise the new run would start the same jobs a second time. (Snakemake's own markers do not
    help: a job that has started overwrites the one with its number.)

    Args:
        comments: the Slurm plugin's comments of the jobs to run.
        every: seconds between queries.

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
                "(scancel them to continue at once: training resumes from its last checkpoint)",
                file=sys.stderr,
                flush=True,
            )
            said = True
        time.sleep(every)


def clean_up(results: Path) -> None:
    """Remove what a successful run no longer needs: checkpoints of finished training, partial files.

    Files that another Snakemake may be writing are kept.
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
