"""Query an OpenAI-compatible endpoint: many requests in parallel, and each only until it is answered.

Answers are written as they arrive, under a digest of their request. When a job ends (by a refusal, a
signal or the cost limit), it waits for open requests and keeps their answers, and the next attempt sends
only the rest. Only a kill, or a second signal, loses the answers to open requests.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import FrameType
from typing import Any

import httpx2
from pydantic import ValidationError
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_attempt,
    stop_when_event_set,
    wait_exponential_jitter,
)
from tqdm.auto import tqdm

from arena_distill.config.external import EndpointLimits
from arena_distill.errors import InputError, Stopped
from arena_distill.scoring.answers import Answers, Completion, Request

PASSING = (408, 409, 425, 429)
"""Statuses to retry, besides those from 500 on."""

ADVICE = {
    400: "is it too long for the model (max_characters), or a field it does not know (parameters)?",
    401: "check the key",
    402: "add credit to the account",
    403: "check the permissions of the key",
    404: "check `url` (most end in /v1) and `model`",
    413: "lower max_characters",
    429: "add credit to the account",  # insufficient_quota; other 429s are retried
    422: "is it too long for the model (max_characters), or a field it does not know (parameters)?",
}

MOST_BYTES = 4 << 20
"""An answer with more bytes is refused: its verdict is one token."""

LONGEST_PAUSE = 600.0
"""Seconds. A server that asks to wait for longer (``Retry-After``) is asked again after these."""

NO_PROXY = dict.fromkeys(("all://localhost", "all://127.0.0.1", "all://[::1]"))
"""For a client's `mounts`: no proxy of the environment leads to this machine."""

_BACKOFF = wait_exponential_jitter(initial=0.5, max=60, jitter=0.5)  # seconds: 0.5, 1, 2, … 60


def cost(prompt_tokens: int, completion_tokens: int, limits: EndpointLimits) -> float:
    """The cost of tokens, in the currency of the prices; 0 without prices."""
    prompt, completion = limits.prompt_price or 0.0, limits.completion_price or 0.0
    return (prompt_tokens * prompt + completion_tokens * completion) / 1e6


def ask(
    requests: Iterable[Request],
    answers: Answers,
    *,
    limits: EndpointLimits,
    spent: float,
    total: int,
) -> None:
    """Send all requests and store the answers.

    Args:
        requests: those without an answer.
        answers: the store of the answers.
        spent: the cost of earlier answers, for `max_cost`. A request is sent only if it cannot exceed
            that; its prompt is assumed to have a token per byte. A failed attempt is assumed to cost
            nothing.
        total: the number of all requests, for the progress.

    Raises:
        InputError: the endpoint refuses a request, keeps failing, or returns no log-probabilities; or
            `max_cost` is reached. Answers are kept.
        Stopped: by SIGINT or SIGTERM. Answers are kept.
    """
    left, stop = total, threading.Event()
    failures: list[InputError] = []
    under_way: dict[Future[Completion], Request] = {}

    def most(request: Request) -> float:
        return cost(len(request.content), request.most_tokens, limits)

    def too_much(request: Request) -> bool:
        expected = spent + sum(map(most, under_way.values())) + most(request)
        return limits.max_cost is not None and expected > limits.max_cost

    def settle(until: int) -> None:
        """Collect answers until at most `until` requests are open."""
        nonlocal spent, left
        while len(under_way) > until:
            arrived: dict[bytes, Completion] = {}
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                request = under_way.pop(future)
                try:
                    arrived[request.key] = future.result()
                except Exception as error:  # first keep the other answers
                    failures.append(_failure(request, error, limits))
                    stop.set()
            answers.put(arrived)
            spent += sum(cost(*completion.counts(), limits) for completion in arrived.values())
            left -= len(arrived)
            bar.update(len(arrived))

    with (
        closing(_Client(limits, stop)) as client,
        _listening(stop) as heard,
        ThreadPoolExecutor(limits.concurrency) as pool,
        tqdm(total=total, desc="asking", unit="request", mininterval=5, disable=not total) as bar,
    ):
        try:
            for request in requests:
                settle(limits.concurrency - 1)
                if too_much(request):
                    settle(0)  # open requests cost less than their bound
                if stop.is_set():
                    break
                if too_much(request):
                    failures.append(_too_dear(spent, limits))
                    break
                under_way[pool.submit(client.ask, request)] = request
            settle(0)
        finally:
            stop.set()  # no thread waits for another attempt any more
    if heard and left:
        raise Stopped(
            f"{heard[0].name} received: {left:,} of {total:,} requests are left; the next attempt sends "
            "only these",
            heard[0],
        )
    if failures:
        raise InputError(f"{failures[0]}; all answers are kept: run again to request the rest")


class _Passing(Exception):
    """Another attempt may succeed, after `retry_after` seconds if the server sent it."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class _Refused(Exception):
    """Another attempt would not help."""


class _Client:
    """Sends requests from several threads, limits their rate, and retries them."""

    def __init__(self, limits: EndpointLimits, stop: threading.Event) -> None:
        self._traffic, self._stop = limits, stop
        self._key = _api_key(limits.api_key_env)
        # Compressed, a small answer could unpack to one that fills the memory.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        connections = httpx2.Limits(
            max_connections=limits.concurrency, max_keepalive_connections=limits.concurrency
        )
        self._http = httpx2.Client(
            headers=headers,
            timeout=limits.timeout,
            limits=connections,
            follow_redirects=False,  # the key is for this host alone
            mounts=NO_PROXY,
        )
        self._pace = _Pace(limits.requests_per_minute, stop)

    def close(self) -> None:
        self._http.close()

    def ask(self, request: Request) -> Completion:
        attempts = Retrying(
            retry=retry_if_exception_type(_Passing),
            stop=stop_after_attempt(self._traffic.retries + 1) | stop_when_event_set(self._stop),
            wait=_seconds_to_wait,
            sleep=sleep_using_event(self._stop),
            before_sleep=lambda state: print(
                f"{request.name}: {_error(state)}; retry in {state.upcoming_sleep:.1f} s",
                flush=True,
            ),
            reraise=True,
        )
        return attempts(self._attempt, request)

    def _attempt(self, request: Request) -> Completion:
        self._pace.wait()
        if self._stop.is_set():
            raise _Passing("stopped before it was sent")
        try:
            response = self._post(request)
        except httpx2.TimeoutException:
            raise _Passing(f"no answer within {self._traffic.timeout:g} s (timeout)") from None
        except httpx2.InvalidURL as error:
            raise _Refused(f"{request.url}: {error}; check `url`") from None
        except httpx2.RequestError as error:
            raise _Passing(self._safe(f"{request.url} cannot be reached: {error}")) from None
        if response.status_code != httpx2.codes.OK:
            raise self._fault(response)
        try:
            completion = Completion.model_validate_json(response.content)
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            where = ".".join(map(str, fault["loc"])) or "the whole"
            raise _Passing(
                f"not a chat completion ({where}: {fault['msg']}): {self._said(response)}"
            ) from None
        if completion.tokens() is None:
            raise _Refused(
                "the endpoint returns no log-probabilities: this model cannot be a judge"
            )
        if completion.usage is None and self._traffic.max_cost is not None:
            raise _Refused(
                "the endpoint counts no tokens, but max_cost depends on them: remove max_cost"
            )
        return completion

    def _post(self, request: Request) -> httpx2.Response:
        """Send a request; its answer is read whole, within the limits of bytes and of time."""
        end = time.monotonic() + self._traffic.timeout
        address, content = f"{request.url}/chat/completions", bytearray()
        with self._http.stream("POST", address, content=request.content) as response:
            coding = response.headers.get("Content-Encoding", "identity")
            if coding != "identity":
                raise _Refused(f"the answer is compressed ({coding}), which was not asked for")
            for part in response.iter_raw():
                content += part
                if len(content) > MOST_BYTES:
                    raise _Refused(f"the answer has more than {MOST_BYTES:,} bytes; check `url`")
                if time.monotonic() > end:
                    raise httpx2.ReadTimeout("the answer does not end")
            extensions = {"reason_phrase": response.reason_phrase.encode()}
            return httpx2.Response(
                response.status_code,
                headers=response.headers,
                content=bytes(content),
                extensions=extensions,
            )

    def _fault(self, response: httpx2.Response) -> Exception:
        status = response.status_code
        said = self._safe(f"{status} {response.reason_phrase}: {self._said(response)}")
        if (status in PASSING or status >= 500) and "insufficient_quota" not in response.text:
            pause = _retry_after(response)
            if status == 429:
                self._pace.pause(pause)  # all threads are too fast
            return _Passing(said, pause)
        advice = ADVICE.get(status, "check `url`")
        if status in (401, 403):
            name = self._traffic.api_key_env
            advice += f" in {name}" if name else ": api_key_env names no variable with a key"
        return _Refused(f"{said}; {advice}")

    def _said(self, response: httpx2.Response) -> str:
        """The server's error message, in one line."""
        try:
            said = response.json()
            for name in ("error", "message", "detail"):
                said = said.get(name, said) if isinstance(said, dict) else said
        except (ValueError, RecursionError):
            said = response.text
        return self._safe(" ".join(str(said).split()))[:300] or "nothing"

    def _safe(self, text: str) -> str:
        """The text without the key, which some servers repeat, nor what would steer a terminal."""
        text = text.replace(self._key, "***") if self._key else text
        return "".join(character if character.isprintable() else " " for character in text)


class _Pace:
    """When the next request may be sent: one clock for all threads."""

    def __init__(self, per_minute: float | None, stop: threading.Event) -> None:
        self._interval = 60 / per_minute if per_minute else 0.0
        self._stop = stop
        self._lock = threading.Lock()
        self._next = time.monotonic()

    def wait(self) -> None:
        with self._lock:
            mine = max(self._next, time.monotonic())
            self._next = mine + self._interval
        self._stop.wait(mine - time.monotonic())

    def pause(self, seconds: float) -> None:
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


def _api_key(variable: str | None) -> str:
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise InputError(
            f"the environment variable {variable} (api_key_env) holds no key: export it"
        )
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"the environment variable {variable} (api_key_env) holds no valid key")
    return key


def _retry_after(response: httpx2.Response) -> float:
    """Seconds to wait from the server's Retry-After, a number or a date (RFC 9110, 10.2.3); else 0."""
    value = response.headers.get("Retry-After", "")
    try:
        if re.fullmatch(r"[0-9]+(\.[0-9]*)?", value):
            seconds = float(value)
        else:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return min(max(seconds, 0.0), LONGEST_PAUSE)


def _seconds_to_wait(state: RetryCallState) -> float:
    error = _error(state)
    asked = error.retry_after if isinstance(error, _Passing) else 0.0
    return max(asked, _BACKOFF(state))


def _error(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


def _failure(request: Request, error: Exception, limits: EndpointLimits) -> InputError:
    if isinstance(error, _Refused):
        return InputError(f"{request.name}: {error}")
    if not isinstance(error, _Passing):
        return InputError(f"{request.name}: {type(error).__name__}: {error}")
    times = f"{limits.retries + 1} attempts" if limits.retries else "one attempt"
    return InputError(f"{request.name}: no answer in {times}, the last: {error}")


def _too_dear(spent: float, limits: EndpointLimits) -> InputError:
    return InputError(
        f"{spent:.6g} is spent, and another request could exceed max_cost: {limits.max_cost:g}; "
        "raise max_cost to continue"
    )


@contextmanager
def _listening(stop: threading.Event) -> Iterator[list[signal.Signals]]:
    """Set `stop` on a signal that ends the job; a second signal ends it at once."""
    heard: list[signal.Signals] = []
    before: dict[int, Any] = {}

    def hear(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        # Not with `print`, which the signal may have interrupted.
        if heard:
            os.write(2, f"\n{name}: stopped without waiting for open requests\n".encode())
            os._exit(128 + number)  # answers are on disk
        heard.append(signal.Signals(number))
        stop.set()
        os.write(2, f"\n{name}: waiting for open requests; again: stop at once\n".encode())

    for ending in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(ending) != signal.SIG_IGN:  # see `jobs.ignore_signals`
            before[ending] = signal.signal(ending, hear)
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
