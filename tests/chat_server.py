"""A real HTTP server on this machine that speaks the chat completions of OpenAI, faults included.

Its verdicts are invented but depend on every character of a question, so mixed-up answers are detected.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]
Reply = tuple[int, dict[str, str], bytes]
"""Status, headers, body."""


def log_probabilities(content: str) -> list[float]:
    """Log-probabilities of the tokens A, B, C and one other, for a question; the probabilities sum to 1."""
    digest = hashlib.sha256(content.encode()).digest()
    odds = [1 + digest[i] for i in range(4)]
    return [math.log(part / sum(odds)) for part in odds]


def completion(body: Body, tokens: tuple[str, ...] = ("A", "B", "C", "I")) -> Body:
    """An answer: the most probable tokens, at most as many as requested."""
    (message,) = body["messages"]
    scores = log_probabilities(message["content"])
    listed = [{"token": t, "logprob": x} for t, x in zip(tokens, scores, strict=True)]
    listed.sort(key=lambda entry: -float(entry["logprob"]))  # type: ignore[arg-type]
    first = listed[0] | {"top_logprobs": listed[: body["top_logprobs"]]}
    return {
        "choices": [{"index": 0, "message": {}, "logprobs": {"content": [first]}}],
        "usage": {"prompt_tokens": len(message["content"].split()), "completion_tokens": 1},
    }


def answer(body: Body) -> Reply:
    return 200, {}, json.dumps(completion(body)).encode()


def error(status: int, message: str = "so it is", **headers: str) -> Reply:
    return status, headers, json.dumps({"error": {"message": message}}).encode()


@dataclass
class ChatServer:
    """The requests that the server got, and its reply to the n-th request (from 0)."""

    reply: Callable[[int, Body], Reply] = lambda number, body: answer(body)
    bodies: list[Body] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    most_at_a_time: int = 0
    url: str = ""
    bytes_at_once: int = 1 << 30
    pause: float = 0.0
    """Seconds after each part of a reply."""
    _at_a_time: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def contents(self) -> list[str]:
        """The questions, in the order of their arrival."""
        return [body["messages"][0]["content"] for body in self.bodies]

    def handle(self, path: str, headers: dict[str, str], content: bytes) -> Reply:
        if path != "/v1/chat/completions":
            return error(404, f"no {path} here")
        body = json.loads(content)
        with self._lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.headers.append(headers)
            self.times.append(time.monotonic())
            self._at_a_time += 1
            self.most_at_a_time = max(self.most_at_a_time, self._at_a_time)
        try:
            return self.reply(number, body)
        finally:
            with self._lock:
                self._at_a_time -= 1


@contextmanager
def chat_server() -> Iterator[ChatServer]:
    """Run a server at a free port of this machine."""
    chat = ChatServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # a reply goes out as one packet, which nobody waits to acknowledge

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            status, headers, reply = chat.handle(self.path, dict(self.headers), content)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(reply)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            with suppress(ConnectionError):  # the client had enough
                for start in range(0, len(reply), chat.bytes_at_once):
                    self.wfile.write(reply[start : start + chat.bytes_at_once])
                    self.wfile.flush()
                    time.sleep(chat.pause)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    chat.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield chat
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
