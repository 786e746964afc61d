"""Run a model for many callers at a time: their sequences wait in one queue and run in common batches."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from arena_distill.encoding.sequences import Sequences
from arena_distill.errors import InputError
from arena_distill.judging.judge import Forward


class Busy(Exception):
    """The queue is full, or the server stops: ask again later."""


class Late(Exception):
    """The time that a caller had is over."""


class Gone(Exception):
    """The caller went away before its answer."""


class TooLarge(InputError):
    """A request that can never be answered, for its size."""


@dataclass(eq=False)
class _Call:
    """Sequences of one caller: how many are taken out of the queue, and the outputs so far."""

    sequences: Sequences
    outputs: np.ndarray
    taken: int = 0
    filled: int = 0
    done: Future[np.ndarray] = field(default_factory=Future)

    @property
    def waiting(self) -> int:
        """Tokens that are still in the queue."""
        return int(self.sequences.offsets[-1] - self.sequences.offsets[self.taken])


Part = tuple[_Call, slice]
"""Some rows of a call."""


@dataclass(frozen=True)
class Ran:
    """One batch. sequences, tokens: of the callers; distinct: sequences that the model read."""

    sequences: int
    tokens: int
    distinct: int
    seconds: float


class Batcher:
    """A model in a thread of its own. Batches hold the oldest sequences, each distinct one once.

    Args:
        run: the model.
        outputs: of its head.
        batch_tokens: tokens of a batch; a longer sequence is a batch of its own.
        queue_tokens: the most tokens that wait.
        ran: is told of every batch.
    """

    def __init__(
        self,
        run: Forward,
        outputs: int,
        *,
        batch_tokens: int,
        queue_tokens: int,
        ran: Callable[[Ran], None] = lambda _: None,
    ) -> None:
        self._run, self._outputs, self._ran = run, outputs, ran
        self._batch_tokens, self._queue_tokens = batch_tokens, queue_tokens
        self._queue: deque[_Call] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Tokens in the queue."""
        with self._changed:
            return self._waiting()

    def _waiting(self) -> int:
        return sum(call.waiting for call in self._queue)

    def forward(
        self, sequences: Sequences, until: float, gone: Future[None] | None = None
    ) -> np.ndarray:
        """The model's outputs, float32 (rows, outputs), by the time `until` of `time.monotonic`.

        Args:
            gone: is done once the caller has gone away; what still waits then leaves the queue.

        Raises:
            Busy: the queue is full.
            Gone: `gone` is done.
            Late: it is `until`.
            TooLarge: the queue could never hold these sequences.
        """
        call = _Call(sequences, np.zeros((len(sequences), self._outputs), np.float32))
        if not len(sequences):
            return call.outputs
        if call.waiting > self._queue_tokens:
            raise TooLarge(
                f"the request has {call.waiting:,} tokens in {len(sequences):,} sequences, and the queue "
                f"holds {self._queue_tokens:,}: send fewer battles at a time"
            )
        with self._changed:
            if self._closed:
                raise Busy("the server stops")
            if self._waiting() + call.waiting > self._queue_tokens:
                raise Busy("the queue is full: ask again later")
            self._queue.append(call)
            self._changed.notify()
        if gone:
            gone.add_done_callback(lambda _: self._drop(call))
        try:
            return call.done.result(max(0.0, until - time.monotonic()))
        except CancelledError:
            raise Gone from None
        except TimeoutError:
            if not self._drop(call):
                return call.done.result()
            raise Late from None

    def _drop(self, call: _Call) -> bool:
        """Take a call out of the queue; false if it is answered already."""
        with self._changed:
            if not call.done.cancel():
                return False
            if call in self._queue:
                self._queue.remove(call)
            return True

    def close(self) -> None:
        """Answer what waits, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while parts := self._take():
            try:
                self._answer(parts)
            except (
                Exception
            ) as error:  # of the model, of memory: the callers of this batch are told
                with self._changed:
                    for call, _ in parts:
                        if call in self._queue:
                            self._queue.remove(call)
                        if not call.done.done():
                            call.done.set_exception(error)

    def _take(self) -> list[Part]:
        """Wait for sequences, and take a batch of the oldest; none, if it is the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            parts: list[Part] = []
            room = self._batch_tokens
            while self._queue:
                call, offsets = self._queue[0], self._queue[0].sequences.offsets
                fits = int(np.searchsorted(offsets, offsets[call.taken] + room, "right")) - 1
                end = max(fits, call.taken + (not parts))
                if end == call.taken:
                    break
                parts.append((call, slice(call.taken, end)))
                room -= int(offsets[end] - offsets[call.taken])
                call.taken = end
                if end < len(call.sequences):
                    break
                self._queue.popleft()
            return parts

    def _answer(self, parts: list[Part]) -> None:
        began = time.monotonic()
        sequences = Sequences.concatenate([c.sequences.take(np.r_[rows]) for c, rows in parts])
        first, which = distinct(sequences)
        outputs = self._run(sequences.take(first))[which]
        if not np.isfinite(outputs).all():
            raise ArithmeticError("the model's outputs are not finite")
        took = time.monotonic() - began
        self._ran(Ran(len(sequences), int(sequences.offsets[-1]), len(first), took))
        start = 0
        with self._changed:
            for call, rows in parts:
                size = rows.stop - rows.start
                call.outputs[rows] = outputs[start : start + size]
                start += size
                call.filled += size
                if call.filled == len(call.sequences) and not call.done.cancelled():
                    call.done.set_result(call.outputs)


def distinct(sequences: Sequences) -> tuple[np.ndarray, np.ndarray]:
    """The first row of each distinct sequence: int64 (distinct,); which of them each row is: (rows,)."""
    buffers = [None, pa.py_buffer(sequences.offsets * 4), pa.py_buffer(sequences.ids)]
    whole = pa.Array.from_buffers(pa.large_binary(), len(sequences), buffers)
    which = whole.dictionary_encode().indices.to_numpy()
    return np.unique(which, return_index=True)[1], which
