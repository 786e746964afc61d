"""Find the error in the log of a job, and in Slurm's log of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile

from arena_distill.runs.graph import plain


def slurm_lines(text: str) -> list[str]:
    """Return Slurm's own lines about a job's end from its Slurm log."""
    told = re.compile(r"^(?:slurmstepd|slurmd|srun)\S*: (?:error|fatal): .+$", re.MULTILINE)
    lines = dict.fromkeys(told.findall(plain(text)))
    # These lines say only that a task ended; others, and the job's own log, say why.
    return [line for line in lines if not re.search("Exited with exit|task .*Terminated$", line)]


def error_lines(text: str, most: int = 5) -> list[str]:
    """Return the lines of a job's log with its error, at most `most`; none without an error.

    These are the command line's own last lines (``error: …``, ``stopped: …``), else the place and the
    message of the last traceback, else the shell's message about a command that was killed or not
    found. A keyboard interrupt is not an error.
    """
    lines = [re.sub(r"^\[rank\d+\]:\s?", "", line) for line in plain(text).split("\n")]
    for start in ("error: ", "stopped: "):
        if told := [line for line in lines if line.startswith(start)]:
            return list(dict.fromkeys(told))[-most:]
    starts = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call")]
    blocks = [lines[i + 1 : end] for i, end in zip(starts, [*starts, None][1:], strict=True)]
    tracebacks = [found for block in blocks if (found := _end_of_traceback(block, most))]
    # The launcher of several processes fails last, and only because a process failed.
    own = [found for found in tracebacks if not any("ChildFailedError" in line for line in found)]
    if last := (own or tracebacks)[-1:]:
        return [] if any(line.startswith("KeyboardInterrupt") for line in last[0]) else last[0]
    shell = [line for line in lines if re.match(r"\S*sh: line \d+: ", line)]
    return [line for line in shell if not re.search(r"\b(Terminated|Interrupt)\b", line)][-most:]


def _end_of_traceback(lines: Sequence[str], most: int) -> list[str]:
    """From the lines after a traceback's head: the innermost place and the exception's message."""
    end = next((i for i, line in enumerate(lines) if line[:1].strip()), None)
    if end is None:  # cut off
        return []
    message = list(takewhile(str.strip, lines[end:]))[: most - 2]
    frames = [i for i, line in enumerate(lines[:end]) if line.startswith('  File "')]
    place = lines[frames[-1] : end][:2] if frames else []
    return [*place, *message]
