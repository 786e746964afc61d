"""Start a job: take its lock, claim its GPUs, start its processes.

Snakemake or Slurm set the number of GPUs of a job. This module selects the devices, and starts one
process per device if there are several. On several nodes Slurm's srun starts this command once on each
node; there it starts the processes of its node.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from arena_distill.config.compute import Attention
from arena_distill.errors import InputError

CPU_ALLOWED = "ACCELERATE_USE_CPU"
"""accelerate's own variable: `true` lets a job that requests GPUs run on the CPU."""

LAST_WORDS = "ARENA_LAST_WORDS"
"""Names the file in which the processes of a job write why it ends."""

MEETING = "ARENA_MEETING"
"""host:port where the processes of a job on several nodes meet; set by the process that starts them."""

GRACE = 5.0
"""Seconds that the other processes of a job have to end after one has failed."""


@dataclass(frozen=True)
class Launch:
    """How a training job runs, as options of its command; the result does not depend on it."""

    micro_batch_size: Annotated[
        int, typer.Option(help="Longest examples per device and forward pass.", min=1)
    ] = 8
    gradient_checkpointing: Annotated[
        int, typer.Option(help="1: recompute activations to save memory.", min=0, max=1)
    ] = 0
    fsdp: Annotated[
        int, typer.Option(help="1: spread the backbone over the GPUs.", min=0, max=1)
    ] = 0
    checkpoints: Annotated[
        Path | None,
        typer.Option(help="Folder of this output's checkpoints; default: none."),
    ] = None
    checkpoint_minutes: Annotated[float, typer.Option(help="Their interval in minutes.", min=0)] = (
        30
    )
    attention: Annotated[Attention, typer.Option(help="transformers' attention kernel.")] = "auto"
    report_to: Annotated[str, typer.Option(help="trackio, wandb, mlflow or none.")] = "none"
    gpus: Annotated[int, typer.Option(help="GPUs of this job; 0: the CPU.", min=0)] = 0
    nodes: Annotated[int, typer.Option(help="Nodes that share them, of a Slurm job.", min=1)] = 1


def cpu_is_wanted() -> bool:
    """Whether jobs must run on the CPU even if there are GPUs."""
    return os.environ.get(CPU_ALLOWED, "").lower() in ("1", "true", "yes")


def in_slurm() -> bool:
    """Whether this process is part of a Slurm job."""
    return "SLURM_JOB_ID" in os.environ


def ignore_signals() -> None:
    """Ignore the signals that announce a job's end, also while modules are still being imported.

    Slurm warns with SIGUSR1 (see the profile). To end a job it sends SIGTERM, and kills it after a
    grace time; a preempted job that ends earlier would not be queued again.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if in_slurm():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def start(how: Launch) -> None:
    """Start a training job: lock its output, claim its GPUs, run one process per GPU.

    With several GPUs this process starts the same command once per GPU, waits for these processes and
    exits with their status; in them this function returns at once. With several nodes it starts the
    command once per node, and each of these starts the processes of its node.

    Raises:
        InputError: there are fewer GPUs than asked for, or several nodes without Slurm.
    """
    if "LOCAL_RANK" in os.environ:
        return
    if meeting := os.environ.get(MEETING):  # one of several nodes
        here = how.gpus // how.nodes
        claim_gpus(here)
        _run_processes(how, meeting, first=here * int(os.environ["SLURM_PROCID"]), count=here)
    if how.checkpoints:
        lock_output(how.checkpoints)
    if how.nodes > 1:
        if not in_slurm():
            raise InputError(
                f"the job needs {how.nodes} nodes (config: compute.nodes), which only Slurm gives it: "
                "snakemake --profile slurm"
            )
        _meet(how, _run_nodes)
    claim_gpus(how.gpus)
    if how.gpus > 1:
        _meet(how, partial(_run_processes, first=0, count=how.gpus))


def _meet(how: Launch, run: Callable[[Launch, str], NoReturn]) -> NoReturn:
    """Open the place where the processes of a job meet, run them, and print why they end."""
    from torch.distributed import TCPStore

    host = socket.gethostname() if how.nodes > 1 else "127.0.0.1"
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False)  # any free port
    sys.stdout.flush()
    # All nodes see the folder of the checkpoints, but not each other's temporary files.
    shared = how.checkpoints if how.nodes > 1 else None
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        last_words = Path(folder) / "last_words"
        os.environ[LAST_WORDS] = str(last_words)
        try:
            run(how, f"{host}:{store.port}")
        finally:
            if last_words.exists():
                print(last_words.read_text(), file=sys.stderr)


def _run_nodes(how: Launch, meeting: str) -> NoReturn:
    """Run this command once on each node of the Slurm job, and exit with its status."""
    # Without a number of cores per task, each node's task has all cores of the job there.
    step = [
        *("srun", f"--nodes={how.nodes}", f"--ntasks={how.nodes}", "--ntasks-per-node=1"),
        *(f"--gpus-per-node={how.gpus // how.nodes}", "--cpu-bind=none", "--kill-on-bad-exit=1"),
    ]
    process = subprocess.Popen(
        [*step, *_this_command()],
        env=os.environ | {MEETING: meeting},
        stdin=subprocess.DEVNULL,
        close_fds=False,
    )
    _pass_signals_on([process])
    sys.exit(process.wait())


def _this_command() -> list[str]:
    return [sys.executable, "-m", "arena_distill", *sys.argv[1:]]


def _run_processes(how: Launch, meeting: str, *, first: int, count: int) -> NoReturn:
    """Run this command in `count` of the job's connected processes, and exit with their status.

    torchrun would start them in new sessions, without Ctrl-C and without this process's locks, and
    print a page about each error.

    Args:
        meeting: host:port of the open store.
        first: rank of the first process here.
    """
    host, _, port = meeting.rpartition(":")
    shared = {"OMP_NUM_THREADS": "1"} | os.environ  # as in torchrun
    shared |= {
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is open already
        "WORLD_SIZE": str(how.gpus),
        "LOCAL_WORLD_SIZE": str(count),
    }
    processes = []
    for local in range(count):
        own = shared | {"RANK": str(first + local), "LOCAL_RANK": str(local)}
        # They inherit the locks, but not stdin.
        process = subprocess.Popen(
            _this_command(), env=own, stdin=subprocess.DEVNULL, close_fds=False
        )
        processes.append(process)
    _pass_signals_on(processes)
    while any(p.poll() is None for p in processes) and not any(p.returncode for p in processes):
        time.sleep(0.1)
    codes = _end(processes)
    killed = [rank for rank, code in enumerate(codes, first) if code and code < 0]
    if killed and not Path(os.environ[LAST_WORDS]).exists():
        name = signal.Signals(-(codes[killed[0] - first] or 0)).name
        print_error(f"error: process {killed[0]} of {how.gpus} ended by {name}")
    code = min((code for code in codes if code), default=0)
    sys.exit(code if code >= 0 else 128 - code)


def _pass_signals_on(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM):
        if number != signal.SIGTERM or not in_slurm():  # Slurm signals every process
            signal.signal(number, pass_on)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> list[int | None]:
    """End the processes that wait for a failed one; returns the status each had before."""
    until = time.monotonic() + GRACE
    while any(p.poll() is None for p in processes) and time.monotonic() < until:
        time.sleep(0.1)
    codes = [process.returncode for process in processes]
    for process in processes:
        process.kill()
        process.wait()
    return codes


def print_error(words: str) -> None:
    """Print on stderr why the job ends; if it has several processes, once, at the end."""
    if LAST_WORDS not in os.environ:
        print(words, file=sys.stderr)
        return
    with suppress(FileExistsError), open(os.environ[LAST_WORDS], "x") as file:
        file.write(words)


def lock_output(folder: Path) -> None:
    """Wait until no other job works on the output of `folder`, then lock it.

    The kernel releases the lock when the last process that holds it ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = _open(folder / "lock")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{folder}: another job is at work on this: waiting for it", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:  # a file system without locks
        print(f"{folder}: cannot be locked ({error.strerror})", flush=True)


def claim_gpus(count: int) -> None:
    """Make exactly `count` GPUs visible to this process.

    If the scheduler gave the job its own devices, it sees just as many. If jobs share a machine
    (profile `local-gpu`), it sees more and takes free ones: a locked file per device, in the
    machine's folder for temporary files, marks a device as taken.

    Raises:
        InputError: there are fewer GPUs than requested, or PyTorch cannot use them.
    """
    if count == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return
    on_cpu = cpu_is_wanted()
    devices = _visible_devices()
    if len(devices) < count:
        if on_cpu:
            return
        raise InputError(
            f"the job needs {count} GPUs (config: compute.gpus), but {len(devices)} are visible; "
            f"set {CPU_ALLOWED}=true to run on the CPU"
        )
    if len(devices) > count:
        devices = _take(devices, count)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    print(f"GPUs: {os.environ['CUDA_VISIBLE_DEVICES']}", flush=True)
    if not on_cpu:
        import torch

        if not torch.cuda.is_available():
            raise InputError(
                f"the job has GPUs, but PyTorch {torch.__version__} cannot use them: install a build "
                f"for them, or set {CPU_ALLOWED}=true to run on the CPU"
            )


def _visible_devices() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        devices = (device.strip() for device in named.split(","))
        return list(takewhile(lambda device: device not in ("", "-1"), devices))  # as CUDA reads it
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _take(devices: list[str], count: int) -> list[str]:
    folder = Path(tempfile.gettempdir()) / f"arena-distill-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    # One job at a time takes devices: otherwise two jobs could wait for each other's forever.
    door = _open(folder / "door")
    fcntl.flock(door, fcntl.LOCK_EX)
    taken: list[str] = []
    while len(taken) < count:
        for device in devices:
            if len(taken) < count and device not in taken:
                lock = _open(folder / device.replace("/", "_"))
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    taken.append(device)
                except BlockingIOError:
                    os.close(lock)
        if len(taken) < count:
            time.sleep(0.2)
    os.close(door)
    return sorted(taken, key=devices.index)


def _open(path: Path) -> int:
    """Open a file to lock; it stays open until this process and its children have ended."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    os.set_inheritable(descriptor, True)
    return descriptor
