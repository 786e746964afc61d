"""A Python interpreter whose libraries are loaded already, for the many short jobs of the tests.

`python -m …` spends seconds on imports, and then does little. A server imports the libraries once
and forks a process per command. The command itself, a small script in the place of an interpreter, hands
its arguments, environment, folder and open files over, passes signals on, and ends as that process ends.
Of this package nothing is loaded in advance: each command has that of its own PYTHONPATH.

Tests of imports, of signals to a process group, or of inherited locks need a real interpreter.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
from contextlib import suppress
from functools import cache

LIBRARIES = (
    "snakemake.cli",
    "pandas",
    "pyarrow.parquet",
    "torch",
    "transformers.trainer",
    "transformers.models.gemma2.modeling_gemma2",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "peft",
    "sklearn.linear_model",
    "typer.rich_utils",
)
FOR_GPTQ = (
    "pandas",
    "pyarrow.parquet",
    "torch._dynamo.aot_compile",
    "transformers.trainer",
    "transformers.quantizers.auto",
    "transformers.models.gemma2.modeling_gemma2",
    "datasets",
    "typer.rich_utils",
)
"""Of the second environment, where gptqmodel itself would start threads, which are lost in a fork."""


def serve(python: str) -> None:
    """Fork a process for each command that connects to the socket on stdin, until the parent is gone.

    Args:
        python: what these processes take for their interpreter.
    """
    from multiprocessing import get_context

    sys.executable = python
    parent = os.getppid()
    door = socket.socket(fileno=os.dup(0))
    while os.getppid() == parent:
        if select.select([door], [], [], 1)[0]:
            load()  # not before a command asks for it
            command, _ = door.accept()
            get_context("fork").Process(target=attend, args=(command,)).start()
            command.close()


@cache
def load() -> None:
    """Import the libraries of the environment."""
    import gc
    from importlib import import_module, util

    for name in FOR_GPTQ if util.find_spec("gptqmodel") else LIBRARIES:
        import_module(name)
    gc.freeze()  # the collector would copy what is shared


def attend(command: socket.socket) -> None:
    """Fork the process of one command, and tell the command how it ended; kill it if that is gone."""
    from multiprocessing import connection, get_context

    _, files, *_ = socket.recv_fds(command, 1, 3)
    with command.makefile() as lines:
        request = json.loads(lines.readline())
    process = get_context("fork").Process(target=run, args=(files,), kwargs=request)
    process.start()
    for file in files:
        os.close(file)
    command.sendall(b"%d\n" % process.pid)
    if command in connection.wait([command, process.sentinel]):
        process.kill()
    process.join()
    with suppress(BrokenPipeError):
        command.sendall(b"%d\n" % process.exitcode)


def run(files: list[int], words: list[str], folder: str, environment: dict[str, str]) -> None:
    """Do what `python -m` and `python -c` do."""
    import random
    import runpy

    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdin = os.fdopen(0, closefd=False)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    random.seed()
    sys.path[:0] = [folder, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = [words[0], *words[2:]]
    if words[0] == "-c":
        exec(words[1], {"__name__": "__main__"})
    else:
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)


def call(address: str, words: list[str]) -> None:
    """Have the server at `address` run a command; end as it ends."""
    if words[:1] not in (["-m"], ["-c"]):
        os.execv(sys.executable, [sys.executable, *words])
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    socket.send_fds(server, [b"0"], [0, 1, 2])
    request = {"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}
    server.sendall(json.dumps(request).encode() + b"\n")
    answers = server.makefile()
    process = int(answers.readline())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: os.kill(process, number))
    status = int(answers.readline())
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        call(sys.argv[2], sys.argv[3:])
