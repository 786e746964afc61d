"""Report the status of a run: which jobs are done, running, queued, failed or waiting, and why they failed.

There are four sources. Snakemake lists the jobs of the graph, and which of them are still to run. Its
folder ``.snakemake`` shows which jobs were started and have not ended (a marker per output) and, in its
logs, which failed. Slurm's ``squeue`` lists the submitted jobs that are alive. The jobs' own logs, and
Slurm's logs of them, hold the errors. Nothing is changed and no lock is taken, so this works while
Snakemake runs and after it was killed.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import time
from base64 import urlsafe_b64decode
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import psutil

from arena_distill.runs.graph import Planned, plain, read_graph
from arena_distill.runs.job_errors import error_lines, slurm_lines

JobState = Literal["done", "running", "queued", "failed", "interrupted", "waiting"]
STATES: tuple[JobState, ...] = get_args(JobState)

# States of `squeue` for a job that has not started, or that has just ended; in all others it runs.
_QUEUED = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD"}
_ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"}
_ENDED |= {"OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"}

# The times of two files written together differ by less, also on a shared file system.
_SLACK = 5.0
# An error is at the end of its log; a log of many megabytes is not read completely.
_TAIL = 1 << 18
# Signs that a user, or Slurm for another job, stopped a job: this is not a failure.
_STOPPED = re.compile(
    r"^stopped: |CANCELLED AT \S+( DUE TO (PREEMPTION|JOB REQUEUE|SIGNAL.*))? \*", re.I
)
# Snakemake's format of a failure. A message may have many lines.
_FAILURE = re.compile(
    r"^\[(?P<time>\w{3} \w{3} [ \d]\d [\d:]{8} \d{4})\]\nError in rule (?P<rule>\w+):\n"
    r"    message: (?P<message>(?s:.*?))\n    jobid: .*\n(?P<fields>(?:    .*\n)*)",
    re.MULTILINE,
)
# The useless text after an executor's message.
_CHATTER = r" Detailed failure reason unavailable|For further error details|\n    sbatch call:"
# The number of Snakemake's newest logs to search for failures; each start writes one.
_RUNS = 50


@dataclass(frozen=True, kw_only=True)
class Job(Planned):
    """A job and its state; for `failed` and `interrupted` jobs also the error."""

    state: JobState
    slurm_job: str | None = None
    slurm_log: str | None = None
    error: list[str] = field(default_factory=list)
    """The lines that say why: Slurm's first, then the last ones of the job's log."""


@dataclass(frozen=True)
class Marker:
    """Snakemake's marker that an output's job was started and has not ended."""

    time: float
    slurm_job: str | None
    """Only until the job starts: then the node writes another marker, without it."""


@dataclass(frozen=True)
class File:
    """A file in Snakemake's working folder, and when it was last written."""

    path: str
    time: float


@dataclass(frozen=True)
class Failure:
    """A failure in Snakemake's log."""

    time: float
    message: str | None
    """From the executor; a local job has none."""
    slurm_job: str | None


@dataclass(frozen=True)
class Status:
    """The jobs of a graph in the order of its rules, and whether a Snakemake works on them."""

    folder: Path
    at_work: bool
    jobs: list[Job]

    @property
    def counts(self) -> dict[JobState, int]:
        counts = Counter(job.state for job in self.jobs)
        return {state: counts[state] for state in STATES}

    def as_json(self) -> dict[str, Any]:
        """JSON values: ``folder``, ``at_work``, ``counts`` by state, ``jobs`` with their fields."""
        jobs = [{"name": job.name, **asdict(job)} for job in self.jobs]
        for job in jobs:
            # For a running job, `needed` is Snakemake's view after the job has ended.
            for key in ("needed", "after", "threads", "resources"):
                del job[key]
        counts = {str(state): number for state, number in self.counts.items()}
        return {"folder": str(self.folder), "at_work": self.at_work, "counts": counts, "jobs": jobs}


def read_status(arguments: Sequence[str]) -> Status:
    """Return the state of every job for the `arguments` of a `snakemake` command.

    Raises:
        InputError: Snakemake cannot plan the graph; with its own message.
    """
    graph = read_graph(arguments)
    at_work = snakemake_at_work(graph.folder)
    evidence = Evidence.of(graph.folder, graph.jobs)
    return Status(graph.folder, at_work, [evidence.judge(job, at_work) for job in graph.jobs])


# --- the folder .snakemake --------------------------------------------------------------------------


def snakemake_at_work(folder: Path) -> bool:
    """Whether a Snakemake runs in `folder`: it holds locks there, and is alive.

    A killed Snakemake leaves its locks. On this host its process is searched for; a Snakemake that
    was started on another host is assumed to be alive.
    """
    owners = set()
    for lock in (folder / ".snakemake/locks").glob("*.lock"):
        with suppress(FileNotFoundError):
            owners.add(lock.stat().st_uid)
    for process in psutil.process_iter(["cmdline", "cwd", "uids"]):
        words, place = process.info["cmdline"] or [], process.info["cwd"]
        # The folder of another user's process is not visible: assume that it is this one.
        here = place == str(folder) or (place is None and process.info["uids"].real in owners)
        if here and _works(words) and (owners or "--nolock" in words):
            return True
    return bool(owners) and _host_of_last_run(folder) not in (None, platform.node())


def _works(words: Sequence[str]) -> bool:
    """Whether this command line is a Snakemake that runs a graph: not a single job, not a query."""
    called = any(Path(word).name == "snakemake" for word in words[:4])
    looks = {"-n", "--dry-run", "--dryrun", "-S", "--summary", "-D", "--detailed-summary", "--mode"}
    return called and looks.isdisjoint(words)


def _host_of_last_run(folder: Path) -> str | None:
    for log in _snakemake_logs(folder):
        with suppress(FileNotFoundError), log.open(errors="replace") as file:
            if found := re.search(r"^  Host: (.+)$", file.read(4096), re.MULTILINE):
                return found[1]
    return None


def _snakemake_logs(folder: Path) -> list[Path]:
    """Snakemake's logs, newest first (their names are dates)."""
    return sorted((folder / ".snakemake/log").glob("*.snakemake.log"), reverse=True)[:_RUNS]


def read_markers(folder: Path) -> dict[str, Marker]:
    """Return the markers of started jobs under ``folder/.snakemake``, by output."""
    root = folder / ".snakemake/incomplete"
    markers = {}
    for directory, _, names in os.walk(root):
        for name in names:
            path = Path(directory, name)
            # A name too long for a file continues in folders, each with an @ before its part.
            parts = [part.removeprefix("@") for part in path.relative_to(root).parts]
            try:
                output = urlsafe_b64decode("".join(parts)).decode()
                written = path.stat().st_mtime
                content = path.read_text()
            except (OSError, ValueError):  # the job has ended, or not a marker
                continue
            try:
                job = json.loads(content)["external_jobid"]
            except (ValueError, KeyError):  # being written
                job = None
            markers[output] = Marker(written, str(job) if job else None)
    return markers


def read_failures(folder: Path) -> dict[tuple[str, str], Failure]:
    """Return the last failure of each job in Snakemake's logs, by rule and outputs joined."""
    failures: dict[tuple[str, str], Failure] = {}
    for log in reversed(_snakemake_logs(folder)):
        with suppress(FileNotFoundError):
            failures.update(parse_failures(log.read_text(errors="replace")))
    return failures


def parse_failures(text: str) -> Iterator[tuple[tuple[str, str], Failure]]:
    """Yield the failures in a log of Snakemake: rule and joined outputs, and the failure."""
    for found in _FAILURE.finditer(plain(text)):
        fields = dict(re.findall(r"^    ([\w-]+): (.*)$", found["fields"], re.MULTILINE))
        message = re.split(_CHATTER, found["message"])[0]
        yield (
            (found["rule"], fields.get("output", "")),
            Failure(
                time=time.mktime(time.strptime(found["time"])),
                message=None if message == "None" else message.strip(),
                slurm_job=fields.get("external_jobid"),
            ),
        )


# --- Slurm ------------------------------------------------------------------------------------------


def ask_squeue(jobs: Iterable[str]) -> dict[str, JobState] | None:
    """Return which of these Slurm jobs are running or queued; None if squeue cannot answer."""
    ids = sorted(set(jobs))
    if not ids or not shutil.which("squeue"):
        return {} if not ids else None
    command = ["squeue", "--noheader", "--array", f"--jobs={','.join(ids)}", "--format=%i|%T"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    # Slurm forgets a job some minutes after its end; a query for that job only then fails.
    if done.returncode and "Invalid job id" not in done.stderr:
        return None
    return parse_squeue(done.stdout)


def parse_squeue(text: str) -> dict[str, JobState]:
    """Parse lines ``<id>|<state>``; return the jobs that are alive."""
    pairs = [line.strip().split("|") for line in text.splitlines() if "|" in line]
    return {
        job: "queued" if state in _QUEUED else "running"
        for job, state in pairs
        if state not in _ENDED
    }


def find_slurm_logs(folder: Path) -> dict[str, dict[str, File]]:
    """Return Slurm's logs under ``folder/.snakemake``, by the folder's name and the job's id.

    The plugin's folders are ``rule_<rule>/<wildcards joined by _>``, those of array jobs without
    wildcards; it removes the logs of jobs that succeeded. The oldest log of a folder comes first.
    """
    root = folder / ".snakemake/slurm_logs"
    logs: dict[str, dict[str, File]] = {}
    for directory, _, names in os.walk(root):
        found = []
        for path in (Path(directory, name) for name in names):
            with suppress(FileNotFoundError):
                found.append(File(str(path.relative_to(folder)), path.stat().st_mtime))
        found.sort(key=lambda log: log.time)
        logs[Path(directory).relative_to(root).as_posix()] = {Path(f.path).stem: f for f in found}
    return logs


# --- the verdict ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evidence:
    """The records of a folder about its jobs."""

    folder: Path
    markers: dict[str, Marker]
    failures: dict[tuple[str, str], Failure]
    slurm_logs: dict[str, dict[str, File]]
    alive: dict[str, JobState] | None
    """The Slurm jobs that are alive; None if `squeue` does not answer."""

    @classmethod
    def of(cls, folder: Path, jobs: Iterable[Planned]) -> Evidence:
        """Gather the records of `jobs`; `squeue` is called once."""
        found = cls(
            folder, read_markers(folder), read_failures(folder), find_slurm_logs(folder), None
        )
        ids = [slurm_job for job in jobs if (slurm_job := found._slurm(job)[0])]
        return replace(found, alive=ask_squeue(ids))

    def judge(self, job: Planned, at_work: bool) -> Job:
        """Return `job` with its state; `at_work`: a Snakemake runs in the folder."""
        marker = self._marker(job)
        if not marker and not job.needed:
            return Job(**vars(job), state="done")
        slurm_job, slurm_log = self._slurm(job)
        slurm = (slurm_job, slurm_log.path if slurm_log else None)
        if alive := (self.alive or {}).get(slurm_job or ""):
            return Job(**vars(job), state=alive, slurm_job=slurm[0], slurm_log=slurm[1])
        if marker and at_work and (self.alive is None or not slurm_job):
            state: JobState = "queued" if marker.slurm_job else "running"
            return Job(**vars(job), state=state, slurm_job=slurm[0], slurm_log=slurm[1])
        state, error = self._end(job, slurm_log)
        if state == "waiting":
            return Job(**vars(job), state=state)
        return Job(**vars(job), state=state, slurm_job=slurm[0], slurm_log=slurm[1], error=error)

    def _end(self, job: Planned, slurm_log: File | None) -> tuple[JobState, list[str]]:
        """How the last attempt ended, if it is not alive and did not succeed; and its error lines."""
        marker, failure, log = self._marker(job), self._failure(job), self._log(job)
        if log and marker and log.time < marker.time - _SLACK:
            log = None  # an earlier attempt's
        own, slurm = error_lines(self._tail(log)), slurm_lines(self._tail(slurm_log))
        unmade = marker or any(self._time(output) is None for output in job.outputs)
        # The messages of a cancelled job's processes do not give the cause.
        causes = own + ([line for line in slurm if "CANCELLED AT" in line] or slurm)
        fatal = any(not _STOPPED.search(line) for line in causes)
        if not (failure or (fatal and unmade)):
            # No record: its input is missing or has changed, or the output was removed.
            return ("interrupted" if marker or (causes and unmade) else "waiting"), slurm + own
        said = failure.message.split("\n") if failure and failure.message else []
        if own + slurm:  # they say more than that the Slurm job has failed
            said = [line for line in said if "'FAILED'" not in line]
        if said + own + slurm:
            return "failed", said + slurm + own
        return "failed", [line for line in plain(self._tail(log)).split("\n") if line.strip()][-5:]

    def _marker(self, job: Planned) -> Marker | None:
        found = [self.markers[output] for output in job.outputs if output in self.markers]
        return max(found, key=lambda marker: marker.time, default=None)

    def _failure(self, job: Planned) -> Failure | None:
        """The job's last failure, unless it was started again or finished since."""
        failure = self.failures.get((job.rule, ", ".join(job.outputs)))
        if failure is None or self._marker(job):
            return None
        later = [self._time(name) or 0 for name in [*job.outputs, *job.logs]]
        return failure if max(later) <= failure.time + _SLACK else None

    def _slurm(self, job: Planned) -> tuple[str | None, File | None]:
        """The Slurm job of the last attempt and its log, if any."""
        task = self.slurm_logs.get(f"rule_{job.rule}", {})  # array tasks have no wildcards
        wildcards = "_".join(job.wildcards.values()).replace("/", "_")
        own = self.slurm_logs.get(f"rule_{job.rule}/{wildcards}", {}) if wildcards else task
        marker, failure = self._marker(job), self._failure(job)
        known = marker.slurm_job if marker else failure.slurm_job if failure else None
        if known:
            return known, own.get(known) or task.get(known)
        if marker:
            fitting = [i for i, log in own.items() if log.time >= marker.time - _SLACK][-1:]
        elif not failure and job.needed and (log := self._log(job)):
            # The same job of another run writes its Slurm logs into the same folder.
            later = [i for i, slurm in own.items() if slurm.time >= log.time - _SLACK][:1]
            fitting = [i for i in later if self._may_tell_of(job, own[i])]
        else:
            fitting = []
        return (fitting[0], own[fitting[0]]) if fitting else (None, None)

    def _may_tell_of(self, job: Planned, slurm_log: File) -> bool:
        outputs = re.findall(r"^    output: (.*)$", self._tail(slurm_log), re.MULTILINE)
        return not outputs or ", ".join(job.outputs) in outputs

    def _log(self, job: Planned) -> File | None:
        found = [File(log, time) for log in job.logs if (time := self._time(log)) is not None]
        return found[0] if found else None

    def _time(self, name: str) -> float | None:
        try:
            return (self.folder / name).stat().st_mtime
        except OSError:
            return None

    def _tail(self, file: File | None) -> str:
        if file is None:
            return ""
        try:
            with (self.folder / file.path).open("rb") as stream:
                stream.seek(max(0, stream.seek(0, os.SEEK_END) - _TAIL))
                return stream.read().decode(errors="replace")
        except OSError:
            return ""
