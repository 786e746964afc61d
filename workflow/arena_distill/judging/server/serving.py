"""Serve a judge over HTTP until a signal ends it."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from arena_distill.errors import InputError
from arena_distill.judging.judge import Judge
from arena_distill.judging.server.app import Server, make_app
from arena_distill.judging.server.batching import Batcher
from arena_distill.judging.server.guard import TOKEN, Limits
from arena_distill.judging.server.metrics import Metrics

STOPPING = 30
"""Seconds that requests have to end after a signal."""


def serve(
    folder: str | Path,
    *,
    host: str,
    port: int,
    limits: Limits,
    queue_tokens: int,
    batch_tokens: int,
    device: str | None = None,
) -> None:
    """Serve a judge until SIGINT or SIGTERM; requests that are at work are answered first.

    Args:
        folder: a finished judge.
        host: the address to listen at. One that others reach needs a token in the environment.
        port: 0: any free one, which is printed.
        queue_tokens: the most tokens that wait for the model.
        batch_tokens: tokens per forward pass, padding included.
        device: such as ``cuda:1``; by default a GPU if there is one.

    Raises:
        InputError: the folder is not a finished judge, others would reach a server without a token, or the
            address cannot be had.
    """
    token = os.environ.get(TOKEN)
    local = _is_loopback(host)
    if not local and not token:
        raise InputError(
            f"--host {host}: others would reach the server; set {TOKEN} to a token that requests need, "
            "or leave --host out and use a tunnel"
        )
    with _listening(host, port) as listener:
        judge = Judge.from_pretrained(folder, device=device, batch_tokens=batch_tokens)
        # Without a token a page of another site could ask: it would come by a name of its own.
        own = ("localhost", "127.0.0.1", "::1", host) if local and not token else ("*",)
        with application(
            judge,
            limits,
            batch_tokens=batch_tokens,
            queue_tokens=queue_tokens,
            token=token,
            hosts=own,
        ) as app:
            server = uvicorn.Server(settings(app))

            def stop(*_: Any) -> None:
                server.should_exit = True

            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(
                    number, stop
                )  # until uvicorn has its own, which raise these at the end
            name, bound = f"[{host}]" if ":" in host else host, listener.getsockname()[1]
            listener.listen(server.config.backlog)  # who reads the address may come at once
            print(f"{judge.contract.judge}: http://{name}:{bound}/", flush=True)
            server.run([listener])
    print("stopped", flush=True)


@contextmanager
def application(
    judge: Judge,
    limits: Limits,
    *,
    batch_tokens: int,
    queue_tokens: int,
    token: str | None = None,
    hosts: Sequence[str] = ("*",),
) -> Iterator[FastAPI]:
    """The application of a judge, whose models have a thread each until the end; see :func:`serve`."""
    metrics = Metrics()
    batchers = {
        model: Batcher(
            model.forward,
            len(model.contract.head.outputs),
            batch_tokens=batch_tokens,
            queue_tokens=queue_tokens,
            ran=metrics.ran,
        )
        for model in judge.models
    }
    metrics.watch(lambda: sum(batcher.waiting for batcher in batchers.values()))
    try:
        yield make_app(Server(judge, batchers, limits), metrics, token=token, hosts=hosts)
    finally:
        for batcher in batchers.values():
            batcher.close()


def settings(app: FastAPI) -> uvicorn.Config:
    """How uvicorn runs an application."""
    return uvicorn.Config(
        app,
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=STOPPING,
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listening(host: str, port: int) -> socket.socket:
    """A socket that has its address before minutes go into loading a model."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        raise InputError(
            f"--host {host} --port {port}: {error.strerror or error}; choose others"
        ) from None
    return found
