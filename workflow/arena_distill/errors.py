"""Define the exceptions whose messages are for users, and turn libraries' errors into such messages."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from signal import Signals

LONGEST_NAME = 100


class InputError(Exception):
    """Bad input from a person: a file, the configuration, the data.

    The message says what is wrong, where (file, row, column, key) and what to do. The command
    line prints it as ``error: <message>`` and exits with 1, without a traceback.
    """


class Stopped(Exception):
    """A signal stopped the job after its work was saved; exits with 128 + the signal."""

    def __init__(self, message: str, received: Signals) -> None:
        super().__init__(message)
        self.received = received


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Read files of other people with a library, which may raise anything at damaged or strange ones.

    Raises:
        InputError: `what`, and the first line of the library's message.
    """
    try:
        yield
    except (InputError, Stopped):
        raise
    except Exception as error:
        raise InputError(f"{what}: {brief(error)}") from error


def brief(error: BaseException) -> str:
    """The first line of a library's message; the rest is advice about hubs and caches."""
    lines = str(error).strip().splitlines()
    # The message of others, such as a KeyError, is often a bare name.
    tells = lines and isinstance(error, OSError | ValueError | RuntimeError)
    told = lines[0] if tells else ": ".join([type(error).__name__, *lines[:1]])
    return told[:300]


def shown(name: str) -> str:
    """A name from a file as a part of a line: nothing that breaks it, and not too much."""
    return name if name.isprintable() and len(name) <= LONGEST_NAME else reprlib.repr(name)[1:-1]


def foreign(error: Exception) -> str | None:
    """A line for an error of the machine or of a file, wherever it is met; None: it is a fault of ours."""
    kinds = [kind for kind in type(error).__mro__ if kind not in (Exception, object)]
    if isinstance(error, MemoryError) or any(k.__name__ == "OutOfMemoryError" for k in kinds):
        return (
            f"out of memory ({brief(error)}): give the job more, or lower micro_batch_size or "
            "batch_tokens (config: judges.*.compute)"
        )
    if isinstance(error, RecursionError):
        return f"what it read is nested too deeply ({brief(error)}): correct the file"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        owner = (
            " for this user: change its permissions" if isinstance(error, PermissionError) else ""
        )
        return f"{where}{error.strerror or brief(error)}{owner}"
    if any(kind.__module__.partition(".")[0] in ("pyarrow", "safetensors") for kind in kinds):
        return f"a file is damaged, or not what its name says: {brief(error)}"
    return None
