"""Servers of one judge, as processes: ours, and a real vLLM on the CPU (`make vllm`)."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import httpx2
import pytest
from checkouts import ROOT

PYTHON = ROOT / ".venv-vllm/bin/python"
ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
START = 600.0
"""Seconds that a server may take to start; vLLM takes half a minute on two cores of its own."""


def documented_options() -> list[str]:
    """Those of the command for vLLM in docs/serving.md."""
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^vllm serve (.*)$", page, re.MULTILINE)
    _folder, *options = shlex.split(line)
    return options


def our_server(folder: Path, log: Path) -> AbstractContextManager[str]:
    """`arena-distill serve`; gives the address."""
    words = [sys.executable, "-m", "arena_distill", "serve", str(folder)]
    return _running(words, dict(os.environ), log)


def vllm_server(folder: Path, log: Path, *options: str) -> AbstractContextManager[str]:
    """vLLM as docs/serving.md says; gives the address.

    Args:
        log: a file for what the server prints.
        options: further ones; the later of two that are equal counts.
    """
    if not PYTHON.exists():
        pytest.skip(f"no {PYTHON}: `make vllm` sets that environment up")
    # The module behind `vllm serve`, which does not start where the package is called vllm-cpu.
    words = [str(PYTHON), "-m", "vllm.entrypoints.launchers.api_server.entry"]
    words += ["--model", str(folder), *documented_options(), "--enforce-eager", *options]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return _running(words, kept | ENVIRONMENT, log)


@contextmanager
def _running(words: list[str], environment: dict[str, str], log: Path) -> Iterator[str]:
    """A server, from its first answer of health on; the log is told if that never comes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    with log.open("wb") as out:
        server = subprocess.Popen(
            [*words, "--port", port],
            env=environment,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START
        while not _is_well(address):
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"no server:\n{log.read_text(errors='replace')[-4000:]}")
            time.sleep(1)
        yield address
    finally:
        server.terminate()
        try:
            server.wait(60)
        finally:  # and its own processes
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)


def _is_well(address: str) -> bool:
    try:
        return httpx2.get(f"{address}/health", timeout=10, trust_env=False).status_code == 200
    except httpx2.HTTPError:
        return False
