"""Requests to an endpoint, and its answers on disk under a digest of their request."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from arena_distill.errors import InputError


class _Part(BaseModel):
    # Other fields are dropped and not stored.
    model_config = ConfigDict(extra="ignore", frozen=True, ser_json_inf_nan="constants")


class Alternative(_Part):
    token: str
    logprob: Annotated[float, Field(le=1e-3)]  # some servers round the logarithm of 1 up


class Token(Alternative):
    """A generated token, and the most probable ones at its position."""

    top_logprobs: tuple[Alternative, ...] = ()


class _Logprobs(_Part):
    content: tuple[Token, ...] | None = None


class _Choice(_Part):
    logprobs: _Logprobs | None = None


_Count = Annotated[int, Field(ge=0, le=10**9)]


class _Usage(_Part):
    prompt_tokens: _Count
    completion_tokens: _Count = 0


class Completion(_Part):
    """The stored part of an answer: the tokens' log-probabilities and the token counts."""

    choices: tuple[_Choice, ...] = Field(min_length=1)
    usage: _Usage | None = None

    def tokens(self) -> tuple[Token, ...] | None:
        """The generated tokens; None if the endpoint returns no log-probabilities."""
        logprobs = self.choices[0].logprobs
        return None if logprobs is None else logprobs.content

    def counts(self) -> tuple[int, int]:
        """Prompt and generated tokens; 0 if the endpoint does not count them."""
        return (self.usage.prompt_tokens, self.usage.completion_tokens) if self.usage else (0, 0)


@dataclass(frozen=True)
class Request:
    """One request.

    name: its battle and order, for messages.
    url: of the API.
    content: the request's body, JSON.
    most_tokens: the most tokens to generate.
    """

    name: str
    url: str
    content: bytes
    most_tokens: int

    @cached_property
    def key(self) -> bytes:
        """A digest of everything that determines the answer."""
        return hashlib.sha256(self.url.encode() + b"\n" + self.content).digest()


class Answers:
    """Answers on disk, by the key of their request."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "answers.sqlite"
        folder.mkdir(parents=True, exist_ok=True)
        with self._told():
            self._database = sqlite3.connect(self.path)
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, completion TEXT NOT NULL,"
                " prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL) WITHOUT ROWID"
            )

    def close(self) -> None:
        self._database.close()

    def tokens(self, key: bytes) -> tuple[int, int] | None:
        """Prompt and generated tokens of an answer; None if there is no answer."""
        return self._row("prompt_tokens, completion_tokens", key)

    def get(self, key: bytes) -> Completion:
        """Return a stored answer."""
        row = self._row("completion", key)
        if row is None:
            raise KeyError(key)
        return Completion.model_validate_json(row[0])

    def put(self, completions: Mapping[bytes, Completion]) -> None:
        """Store answers; they are on disk when this returns."""
        rows = [(key, c.model_dump_json(), *c.counts()) for key, c in completions.items()]
        with self._told(), self._database:  # a commit waits for the disk: one for all
            self._database.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)", rows)

    def _row(self, columns: str, key: bytes) -> Any:
        with self._told():
            found = self._database.execute(f"SELECT {columns} FROM answers WHERE key = ?", (key,))
            return found.fetchone()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:  # full disk, no write permission
            raise InputError(f"{self.path}: {error}") from error
        except sqlite3.DatabaseError as error:
            raise InputError(
                f"{self.path}: damaged ({error}); move it away and run again: all requests are sent again"
            ) from error
