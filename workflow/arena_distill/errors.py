"""Define the exceptions whose messages are for users."""

from __future__ import annotations

from signal import Signals


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
