"""Write and resume checkpoints, under a key of everything that determines the weights.

They are under `R/.checkpoints`, which Snakemake does not delete when a job fails, a folder per output:

    llama-teacher/fold_0/
        lock                    held by the job that trains this output
        <key>/checkpoint-120/   the Trainer's files and `seal.json`, which marks it as complete
        <key>/finished/         what was trained, until the run has succeeded
        <key>/damaged-…/        incomplete checkpoints

The key is a digest of all that determines the weights. Other settings, battles or targets have another
key. So training never resumes from a checkpoint of different inputs, and a return to earlier settings
finds the earlier checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, reduce
from torch import Tensor, int64, tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from arena_distill.errors import InputError, Stopped
from arena_distill.files.artifacts import atomic_directory, file_sha256, read_json, write_json
from arena_distill.runtime import launch

SEAL = "seal.json"


def digest(about: Mapping[str, Any], arrays: Iterable[np.ndarray | Tensor]) -> str:
    """Compute a key of `about` (JSON values) and the content of arrays."""
    sha = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for array in arrays:
        values = array.detach().cpu().numpy() if isinstance(array, Tensor) else array
        sha.update(f"{values.dtype}{values.shape}".encode())
        sha.update(np.ascontiguousarray(values).data)
    return sha.hexdigest()[:16]


def file_identities(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of a model's files; reading 140 GB for a digest would take minutes."""
    files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("config.json"))
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]


class Checkpoints(TrainerCallback):
    """The checkpoints of one training job: written at intervals and when the job must end.

    On SIGUSR1, Slurm's warning before a time limit, it saves and training continues. On SIGINT it saves
    and stops, also on SIGTERM outside Slurm; in a Slurm job training continues until Slurm kills it,
    because a preempted job that ends by itself is not queued again. All processes act at the same step.
    """

    def __init__(self, folder: Path, every: float) -> None:
        """
        Args:
            folder: for this output and key.
            every: seconds between checkpoints.
        """
        self.folder = folder
        self.every = every
        self.finished = folder / "finished"
        self.seconds_before = 0.0
        self._started = self._saved = time.monotonic()
        self._save_asked = False
        self._stop: signal.Signals | None = None

    # --- reading --------------------------------------------------------------------------------

    def latest(self) -> Path | None:
        """Return the newest complete checkpoint; rank 0 renames incomplete ones."""
        found = [self._newest_whole() if PartialState().is_main_process else None]
        checkpoint, self.seconds_before = broadcast_object_list(found)[0]
        return checkpoint

    def _newest_whole(self) -> tuple[Path | None, float]:
        every = self.folder.glob("checkpoint-*")
        for checkpoint in sorted(every, key=lambda c: -int(c.name.rpartition("-")[2])):
            if not (checkpoint / SEAL).exists():  # its job ended too early
                shutil.rmtree(checkpoint)
                continue
            fault = _fault(checkpoint)
            if fault is None:
                return checkpoint, float(read_json(checkpoint / SEAL)["seconds"])
            aside = checkpoint.with_name(f"damaged-{checkpoint.name}-{time.time_ns()}")
            checkpoint.rename(aside)
            print(f"{checkpoint}: not whole ({fault}): set aside as {aside.name}", flush=True)
        return None, 0.0

    @property
    def seconds(self) -> float:
        """Training time over all attempts."""
        return self.seconds_before + time.monotonic() - self._started

    # --- writing --------------------------------------------------------------------------------

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals during training.

        Raises:
            Stopped: at the end of the block, if a signal stopped training before its end.
        """
        before = {
            number: signal.signal(number, self._hear)
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
        }
        self._started = self._saved = time.monotonic()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1 or (number == signal.SIGTERM and launch.in_slurm()):
            self._save_asked = True
        else:
            self._stop = signal.Signals(number)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        due = time.monotonic() - self._saved >= self.every
        wishes = tensor([due or self._save_asked, self._stop is not None], dtype=int64)
        if args.world_size > 1:  # so that all processes act at the same step
            wishes = reduce(wishes.to(args.device), "sum").cpu()
        save, stop = wishes.bool().tolist()
        if state.global_step < state.max_steps:  # after the last step the result itself is written
            control.should_save |= save or stop
            control.should_training_stop |= stop
            self._stop = self._stop or (signal.SIGTERM if stop else None)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        processes = PartialState()
        processes.wait_for_everyone()  # each writes its random state
        if processes.is_main_process:
            checkpoint = self.folder / f"checkpoint-{state.global_step}"
            sums = {path.name: file_sha256(path) for path in checkpoint.iterdir()}
            write_json({"seconds": self.seconds, "sha256": sums}, checkpoint / SEAL)
            print(f"{checkpoint}: saved", flush=True)
        processes.wait_for_everyone()  # none may end, and so end the others, before it is complete
        self._saved, self._save_asked = time.monotonic(), False

    def raise_if_stopped(self, state: TrainerState) -> None:
        if self._stop is not None and state.global_step < state.max_steps:
            raise Stopped(
                f"{self._stop.name} received: stopped after step {state.global_step} of "
                f"{state.max_steps}; the next attempt continues from there",
                self._stop,
            )

    # --- the end ----------------------------------------------------------------------------------

    def publish(self, output: Path) -> None:
        """Move what was trained to its place, and remove the checkpoints."""
        with atomic_directory(output) as folder:
            shutil.copytree(self.finished, folder, copy_function=_link, dirs_exist_ok=True)
        for checkpoint in self.folder.glob("*checkpoint-*"):
            shutil.rmtree(checkpoint)


def _fault(checkpoint: Path) -> str | None:
    try:
        sums = read_json(checkpoint / SEAL)["sha256"]
        for name, expected in sums.items():
            if file_sha256(checkpoint / name) != expected:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (InputError, KeyError, OSError) as error:
        return f"{SEAL} is missing or broken" if isinstance(error, InputError) else str(error)
    return None


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
