"""Ask a judge whose weights a server holds: vLLM, or `arena-distill serve`.

The judge's folder gives tokenizer and contract; the server gets token ids, so it sees exactly the
sequences of training. It answers with the outputs of the head.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from arena_distill.encoding.batching import token_batches
from arena_distill.encoding.sequences import Sequences
from arena_distill.encoding.tokenization import load_tokenizer
from arena_distill.errors import InputError
from arena_distill.judging.contract import StackContract, read_contract
from arena_distill.judging.judge import ModelJudge, local_folder
from arena_distill.judging.server.guard import TOKEN
from arena_distill.judging.server.messages import OURS
from arena_distill.scoring.endpoint import NO_PROXY

REQUEST_TOKENS = 16384
"""Tokens per request."""

AT_ONCE = 4
"""Requests that wait for the server at the same time."""

SECONDS = 600.0
"""For one answer."""

ATTEMPTS = 4


class _Busy(Exception):
    """The server is busy, or the connection broke."""


def judge_on(folder: str | Path, server: str) -> ModelJudge:
    """A judge that asks a server for the outputs of its model.

    Args:
        folder: the judge's folder; its weights are not read.
        server: the server's address, such as http://127.0.0.1:8000.

    Raises:
        InputError: the folder is not a finished judge, or a stack, or the server cannot run its head.
    """
    folder = local_folder(folder)
    contract = read_contract(folder)
    if isinstance(contract, StackContract):
        raise InputError(
            f"{server}: {contract.judge} is a stack, which needs `Judge`: ask it without --server, or ask "
            "/v1/judge of its own `arena-distill serve`"
        )
    client = Client(server, len(contract.head.outputs))
    if contract.head.pooling == "layers" and client.owner() != OURS:
        raise InputError(
            f"{server}: {contract.judge} reads several layers, which only `arena-distill serve` runs"
        )
    return ModelJudge(contract, load_tokenizer(folder), client.forward)


class Client:
    """The client of a server with vLLM's ``/classify``; it sends the token of the environment.

    Args:
        server: its address.
        outputs: the number of outputs of the judge's head.
    """

    def __init__(self, server: str, outputs: int) -> None:
        self._server = server.rstrip("/")
        self._url = f"{self._server}/classify"
        self._outputs = outputs
        token = os.environ.get(TOKEN)
        self._http = httpx2.Client(
            headers={"authorization": f"Bearer {token}"} if token else {},
            timeout=httpx2.Timeout(SECONDS, connect=10),
            mounts=NO_PROXY,
        )

    def owner(self) -> Any:
        """What the server calls itself, in OpenAI's list of models; None if it says nothing.

        Raises:
            InputError: it cannot be reached, or refuses.
        """
        url = f"{self._server}/v1/models"
        try:
            response = self._http.get(url)
        except httpx2.HTTPError as error:
            raise InputError(f"{url}: no answer: {error or type(error).__name__}") from None
        if response.status_code != 200:
            raise InputError(f"{url}: status {response.status_code}: {response.text[:300]!r}")
        try:
            return response.json()["data"][0]["owned_by"]
        except (KeyError, IndexError, TypeError, ValueError):
            return None

    def forward(self, sequences: Sequences) -> np.ndarray:
        """The outputs of the head: float32 (rows, outputs).

        Raises:
            InputError: the server cannot be reached, refuses, or is another model's.
        """
        outputs = np.zeros((len(sequences), self._outputs), np.float32)
        batches = list(token_batches(sequences.lengths, REQUEST_TOKENS))
        with ThreadPoolExecutor(AT_ONCE) as pool:
            asked = [[sequences[row].tolist() for row in rows] for rows in batches]
            for rows, answer in zip(batches, pool.map(self._ask, asked), strict=True):
                outputs[rows] = answer
        return outputs

    def _ask(self, ids: list[list[int]]) -> np.ndarray:
        retrying = Retrying(
            retry=retry_if_exception_type(_Busy),
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_exponential(max=10),
            reraise=True,
        )
        try:
            return retrying(self._ask_once, ids)
        except _Busy as error:
            raise InputError(f"{self._url}: {error}") from None

    def _ask_once(self, ids: list[list[int]]) -> np.ndarray:
        # No activation: outputs as they are. Servers differ in the name of the key.
        body = {"input": ids, "use_activation": False}
        try:
            response = self._http.post(self._url, json=body)
        except httpx2.HTTPError as error:
            raise _Busy(f"no answer: {error or type(error).__name__}") from None
        if response.status_code in (429, 502, 503, 504):
            raise _Busy(f"busy: status {response.status_code}")
        if response.status_code != 200:
            raise InputError(
                f"{self._url}: status {response.status_code}: {response.text[:300]!r}; is it a server of "
                "this judge (docs/serving.md)?"
            )
        return self._outputs_of(response, len(ids))

    def _outputs_of(self, response: Any, rows: int) -> np.ndarray:
        try:
            data: Sequence[Any] = sorted(response.json()["data"], key=lambda item: item["index"])
            found = np.array([item["probs"] for item in data], np.float32)
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{self._url}: not an answer to /classify") from None
        if found.shape != (rows, self._outputs) or not np.isfinite(found).all():
            raise InputError(
                f"{self._url}: outputs of the shape {found.shape}, expected {(rows, self._outputs)}: the "
                "server holds another model"
            )
        return found
