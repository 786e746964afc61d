"""`arena-distill serve`: the judge's own numbers, bounded in every way, and a page for people."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import uvicorn
from browser import CHROMIUM, tab
from checkouts import ROOT, warm_python
from hypothesis import given
from hypothesis import strategies as st
from judges import Finished, finished_judge
from prometheus_client.parser import text_string_to_metric_families

from arena_distill import Judge
from arena_distill.cli import app as command
from arena_distill.config.encoding import Encoding
from arena_distill.config.head import JOINT, Head
from arena_distill.encoding.sequences import FIELDS, Sequences, offsets_of
from arena_distill.encoding.views import encode
from arena_distill.errors import InputError
from arena_distill.judging.battles import battles_table
from arena_distill.judging.clients import judge_on
from arena_distill.judging.kept import characters_kept
from arena_distill.judging.server.batching import Batcher, Busy, Late, TooLarge, distinct
from arena_distill.judging.server.guard import TOKEN, Limits
from arena_distill.judging.server.messages import Model
from arena_distill.judging.server.serving import application, serve, settings
from arena_distill.judging.vectors import compare_with_vectors
from arena_distill.metrics import softmax
from arena_distill.scoring.endpoint import NO_PROXY

KINDS = {
    "joint": (JOINT, Encoding()),
    "winners": (JOINT, Encoding(template="winners", truncation="winners")),
    "pointwise": (Head(kind="pointwise"), Encoding(template="winners")),
    "two classes": (Head(kind="joint", classes=2), Encoding(truncation="middle")),
    "frozen": (Head(kind="pointwise", pooling="layers"), Encoding(template="winners")),
}
LIMITS = Limits(requests=80, items=40, body_bytes=200_000, body_seconds=1.0, seconds=60)
BATTLES: list[dict[str, Any]] = [
    {"prompt": "what is one ?", "response_a": "two", "response_b": "one and two"},
    {"prompt": ["what", "now ?"], "response_a": ["x", "y"], "response_b": ["", "sea"]},
    {"prompt": "", "response_a": "the sea is deep " * 30, "response_b": "🌊" * 70},
]


@pytest.fixture(scope="module")
def make(
    backbones: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Finished]:
    """Finished judges by kind, each made once."""
    made: dict[str, Finished] = {}

    def of(kind: str) -> Finished:
        if kind not in made:
            head, encoding = KINDS[kind]
            folder = tmp_path_factory.mktemp(kind.replace(" ", "_"))
            made[kind] = finished_judge(folder, backbones("gemma2"), head=head, encoding=encoding)
        return made[kind]

    return of


@contextmanager
def running(judge: Judge, limits: Limits = LIMITS, **changes: Any) -> Iterator[httpx2.Client]:
    """A real server on this machine, in a thread, and a client of it."""
    options = {"batch_tokens": 512, "queue_tokens": 100_000} | changes
    with application(judge, limits, **options) as app, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(settings(app))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            with httpx2.Client(base_url=address, mounts=NO_PROXY, timeout=60) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def served(make: Callable[[str], Finished]) -> Iterator[Callable[[str], httpx2.Client]]:
    """Clients of running servers by kind of judge."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        clients: dict[str, httpx2.Client] = {}

        def of(kind: str) -> httpx2.Client:
            if kind not in clients:
                clients[kind] = stack.enter_context(running(make(kind).judge))
            return clients[kind]

        yield of


def asked(client: httpx2.Client, battles: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    response = client.post("/v1/judge", json={"battles": battles, **more})
    assert response.status_code == 200, response.text
    return dict(response.json())


def why(response: httpx2.Response) -> str:
    """The line of a refusal."""
    error = response.json()["error"]
    assert error["code"] == response.status_code
    assert error["message"] and "\n" not in error["message"]
    return str(error["message"])


# --- the same numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_says_what_the_judge_says(
    kind: str, make: Callable[[str], Finished], served: Callable[[str], httpx2.Client]
) -> None:
    expected = make(kind).judge.predict(BATTLES)
    given = [BATTLES[0], {**BATTLES[1], "id": "x"}, {**BATTLES[2], "id": 7, "model_a": "unread"}]
    said = asked(served(kind), given)
    assert said["classes"] == list(expected.classes)
    assert [verdict["id"] for verdict in said["verdicts"]] == ["0", "x", "7"]
    for verdict, own in zip(said["verdicts"], expected, strict=True):
        assert verdict["probabilities"] == pytest.approx(own.probabilities, abs=1e-5)
        assert (verdict["winner"], verdict["cut"]) == (own.winner, own.cut)
        for order, probabilities in own.orders.items():
            assert verdict["orders"][order] == pytest.approx(probabilities, abs=1e-5)
    own = expected[0].orders
    assert (own["AB"] == own["BA"]) == (KINDS[kind][0].kind == "pointwise")


@pytest.mark.parametrize("kind", KINDS)
def test_it_says_which_characters_were_read(kind: str, make: Callable[[str], Finished]) -> None:
    """The characters between the marks are those of the ids in the judge's sequences."""
    judge = make(kind).judge
    long = {
        "prompt": ["what " * 40, "now 🌊 ?" * 9],
        "response_a": ["x y " * 50, "the sea " * 60],
        "response_b": ["", "the waves are high " * 20],
    }
    battles = [*BATTLES, long]
    kept = characters_kept(judge, battles)
    assert kept is not None
    contract, table, verdicts = judge.contract, battles_table(battles), judge.predict(battles)
    tokens = judge.encode(table)
    view = "A" if contract.head.kind == "pointwise" else "AB"
    sequences = encode(tokens, contract.encoding, view, max(contract.lengths))  # type: ignore[arg-type]
    for row, ranges in enumerate(kept):
        for name in FIELDS:
            texts = table[name][row].as_py()
            parts = [
                "".join(text[a:b] for a, b in pieces)
                for text, pieces in zip(texts, ranges[name], strict=True)
            ]
            assert (verdicts.cut[name][row] > 0) == (parts != texts)
        answers = [table["response_a"][row].as_py(), ranges["response_a"]]
        shown = judge.tokenizer.decode(sequences[row].tolist())
        for text, pieces in zip(*answers, strict=True):
            for a, b in pieces:
                assert text[a:b].strip("🌊") in shown, (
                    "but for a character of which some bytes are cut"
                )
    assert any(verdicts.cut["response_a"] > 0)


def test_the_same_over_http_for_a_cut_battle(
    make: Callable[[str], Finished], served: Callable[[str], httpx2.Client]
) -> None:
    said = asked(served("joint"), BATTLES, kept=True)
    own = characters_kept(make("joint").judge, BATTLES)
    assert own is not None
    for verdict, ranges in zip(said["verdicts"], own, strict=True):
        assert verdict["kept"] == json.loads(json.dumps(ranges))
    assert asked(served("joint"), BATTLES[:1])["verdicts"][0]["kept"] is None


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_server_of_the_models_part(
    kind: str, make: Callable[[str], Finished], served: Callable[[str], httpx2.Client], tmp_path: Path
) -> None:  # fmt: skip
    judge, url = make(kind), str(served(kind).base_url)
    found = compare_with_vectors(judge_on(judge.folder, url))
    assert (found.ids, found.probabilities) == ([], pytest.approx(0, abs=1e-5))
    rows = {name: [json.dumps([f"{name} {i}"]) for i in range(5)] for name in FIELDS}
    (tmp_path / "battles.jsonl").write_text(
        "".join(json.dumps({n: rows[n][i] for n in FIELDS}) + "\n" for i in range(5))
    )
    outputs = [tmp_path / "here.parquet", tmp_path / "there.parquet"]
    for output, more in zip(outputs, ([], ["--server", url]), strict=True):
        words = ["predict", str(judge.folder), str(tmp_path / "battles.jsonl"), "-o", str(output)]
        command([*words, *more], standalone_mode=False)
    here, there = map(pq.read_table, outputs)
    assert here["winner"].equals(there["winner"])
    np.testing.assert_allclose(here["winner_model_a"], there["winner_model_a"], atol=1e-5)


OTHERS = ("mean of all tokens", "softmax", "other weights")


@pytest.mark.parametrize("fault", OTHERS)
def test_another_judge_behind_a_server_is_refused_before_any_row(
    fault: str, make: Callable[[str], Finished], tmp_path: Path
) -> None:
    folder = make("joint").folder
    served = make("joint").judge
    if fault == OTHERS[0]:
        mean = shutil.copytree(folder, tmp_path / "mean")
        contract = json.loads((mean / "judge.json").read_text())
        contract["head"]["pooling"] = "mean"
        (mean / "judge.json").write_text(json.dumps(contract))
        served = Judge.from_pretrained(mean)
    asked: list[int] = []

    def run(sequences: Sequences) -> np.ndarray:
        asked.append(len(sequences))
        outputs = served.forward(sequences)
        if fault == "softmax":
            outputs = softmax(outputs).astype(np.float32)
        return outputs[:, ::-1] if fault == "other weights" else outputs

    (tmp_path / "battles.csv").write_text("prompt,response_a,response_b\n1 + 1?,2,3\n")
    words = ["predict", str(folder), str(tmp_path / "battles.csv"), "-o", str(tmp_path / "p.csv")]
    with running(served.answered_by(run)) as client:
        url = str(client.base_url)
        with pytest.raises(InputError, match="differ by .*run `arena-distill verify ") as refused:
            command([*words, "--server", url], standalone_mode=False)
        assert f"verify {folder} --server {url}`" in str(refused.value)
        assert "\n" not in str(refused.value)
        assert not [*tmp_path.glob("p.csv*")], "no row was asked"
        count = sum(asked)
        command([*words, "--server", url, "--tolerance", "1"], standalone_mode=False)
        assert sum(asked) > 2 * count, "a tolerance that is asked for is granted"
    assert (tmp_path / "p.csv").exists()


def test_classify_answers_as_vllm_does(
    make: Callable[[str], Finished], served: Callable[[str], httpx2.Client]
) -> None:
    judge, client = make("joint").judge, served("joint")
    ids = [list(vector.ids["96/AB"]) for vector in judge.contract.vectors]
    raw, soft = (
        client.post("/classify", json={"input": ids, "use_activation": use, "model": "judge"})
        for use in (False, None)
    )
    logits = [vector.logits[0][0] for vector in judge.contract.vectors]
    said = raw.json()
    assert [item["index"] for item in said["data"]] == list(range(len(ids)))
    np.testing.assert_allclose([item["probs"] for item in said["data"]], logits, atol=1e-4)
    assert said["data"][0]["label"] == ("model_a", "model_b", "tie")[int(np.argmax(logits[0]))]
    assert said["usage"]["prompt_tokens"] == sum(map(len, ids))
    exp = np.exp(logits)
    expected = exp / exp.sum(axis=1, keepdims=True)
    np.testing.assert_allclose([i["probs"] for i in soft.json()["data"]], expected, atol=1e-4)
    one = client.post("/classify", json={"input": ids[0], "use_activation": False}).json()
    assert one["data"][0]["probs"] == pytest.approx(said["data"][0]["probs"], abs=1e-5)
    text = "what is one ?"
    by_text, by_ids = (
        client.post("/classify", json={"input": given}).json()["data"]
        for given in (text, judge.tokenizer(text)["input_ids"])
    )
    assert by_text[0]["probs"] == pytest.approx(by_ids[0]["probs"], abs=1e-5)
    models = client.get("/v1/models").json()
    assert [model["id"] for model in models["data"]] == ["judge"]


def test_rewards_as_openrlhf_asks_for_them(
    make: Callable[[str], Finished], served: Callable[[str], httpx2.Client]
) -> None:
    judge = make("pointwise").judge
    prompts, answers = ["what is one ?", "", "p"], ["two", "the sea", ""]
    queries = [p + a for p, a in zip(prompts, answers, strict=True)]
    body = {"query": queries, "prompts": prompts, "labels": ["", "", ""]}
    said = served("pointwise").post("/get_reward", json=body).json()
    expected = [judge.reward(p, a) for p, a in zip(prompts, answers, strict=True)]
    assert said["rewards"] == said["scores"] == pytest.approx(expected, abs=1e-5)
    refused = served("joint").post("/get_reward", json=body)
    assert refused.status_code == 422 and "has no reward of one" in why(refused)


# --- what is no request -------------------------------------------------------------------------------

GOOD = {"prompt": "p", "response_a": "a", "response_b": "b"}
JSON = {"content-type": "application/json"}


def battle(**changes: Any) -> str:
    return json.dumps({"battles": [{**GOOD, **changes}]})


def ids(*rows: Any) -> str:
    return json.dumps({"input": list(rows)})


JUDGE, CLASSIFY, REWARD = "/v1/judge", "/classify", "/get_reward"
HOSTILE: dict[str, tuple[str, str | bytes, int, str]] = {
    "empty body": (JUDGE, "", 422, "the body"),
    "no JSON": (JUDGE, "{'battles': []}", 400, "no JSON"),
    "half a JSON": (JUDGE, '{"battles": [', 400, "no JSON"),
    "two JSONs": (JUDGE, "{}{}", 400, "no JSON"),
    "not UTF-8": (JUDGE, b'{"battles": "\xff\xfe"}', 400, "no JSON"),
    "NUL bytes": (JUDGE, b"\x00" * 1000, 400, "no JSON"),
    "a bomb of brackets": (JUDGE, "[" * 100_000, 400, "nested too deeply"),
    "a bomb of objects": (JUDGE, '{"a":' * 30_000, 400, "nested too deeply"),
    "closed brackets": (JUDGE, "[" * 60_000 + "]" * 60_000, 400, "nested too deeply"),
    "deep turns": (JUDGE, battle(prompt=[[["x"]]]), 422, "battles.0.prompt"),
    "a number of 5,000 digits": (JUDGE, '{"battles": ' + "9" * 5000 + "}", 400, "no JSON"),
    "null": (JUDGE, "null", 422, "the body"),
    "a list": (JUDGE, "[]", 422, "the body"),
    "a text": (JUDGE, '"battles"', 422, "the body"),
    "a number": (JUDGE, "1e999", 422, "the body"),
    "no battles": (JUDGE, "{}", 422, "battles: Field required"),
    "zero battles": (JUDGE, '{"battles": []}', 422, "battles"),
    "one battle, no list": (JUDGE, json.dumps({"battles": GOOD}), 422, "battles: "),
    "battles null": (JUDGE, '{"battles": null}', 422, "battles: "),
    "a battle is a text": (JUDGE, '{"battles": ["x"]}', 422, "battles.0: "),
    "no prompt": (JUDGE, '{"battles": [{"response_a": "", "response_b": ""}]}', 422, "prompt: Field"),
    "prompt null": (JUDGE, battle(prompt=None), 422, "battles.0.prompt"),
    "prompt a number": (JUDGE, battle(prompt=7), 422, "battles.0.prompt"),
    "prompt true": (JUDGE, battle(prompt=True), 422, "battles.0.prompt"),
    "prompt an object": (JUDGE, battle(prompt={"a": "b"}), 422, "battles.0.prompt"),
    "a turn is null": (JUDGE, battle(response_a=["x", None]), 422, "battles.0.response_a"),
    "a turn is a number": (JUDGE, battle(response_b=["x", 1.5]), 422, "battles.0.response_b"),
    "half a surrogate": (JUDGE, battle(prompt="\ud800"), 422, "battles.0.prompt: "),
    "half a surrogate in a turn": (JUDGE, battle(prompt=["x", "\udfff"]), 422, "battles.0.prompt: "),
    "half a surrogate as id": (JUDGE, battle(id="\ud800"), 422, "battles.0.id: "),
    "half a surrogate to classify": (CLASSIFY, ids("\ud800"), 422, "input: "),
    "an id that is a list": (JUDGE, battle(id=[]), 422, "battles.0.id"),
    "NaN": (JUDGE, '{"battles": NaN}', 422, "battles"),
    "kept a text": (JUDGE, json.dumps({"battles": [GOOD], "kept": "yes"}), 422, "kept"),
    "the second is wrong": (JUDGE, json.dumps({"battles": [GOOD, {}]}), 422, "battles.1"),
    "too many battles": (JUDGE, json.dumps({"battles": [GOOD] * 41}), 413, "at most 40"),
    "too many bytes": (JUDGE, battle(prompt="x" * 200_000), 413, "200,000 bytes"),
    "ids missing": (CLASSIFY, "{}", 422, "input: Field required"),
    "ids empty": (CLASSIFY, ids(), 422, "input"),
    "an empty sequence": (CLASSIFY, ids([1], []), 422, "input.1: 0 tokens"),
    "an id below 0": (CLASSIFY, ids([5, -1]), 422, "input"),
    "an id beyond the vocabulary": (CLASSIFY, ids([5, 10**6]), 422, "ids from 0 to"),
    "an id beyond 64 bits": (CLASSIFY, ids([5, 2**70]), 422, "input"),
    "an id that is a fraction": (CLASSIFY, ids([5, 1.5]), 422, "input"),
    "an id that is a text": (CLASSIFY, ids([5, "6"]), 422, "input"),
    "an id that is true": (CLASSIFY, ids([True]), 422, "input"),
    "texts and ids": (CLASSIFY, ids("x", [5]), 422, "input"),
    "too long a sequence": (CLASSIFY, ids([5] * 141), 422, "141 tokens; from 1 to 140"),
    "too long a text": (CLASSIFY, ids("sea " * 2000), 422, "tokens; from 1 to 140"),
    "too many sequences": (CLASSIFY, ids(*[[5]] * 41), 413, "at most 40"),
    "another model": (CLASSIFY, '{"model": "gpt", "input": [5]}', 404, "'judge'"),
    "rewards without prompts": (REWARD, '{"query": ["x"]}', 422, "prompts: Field required"),
    "other numbers of them": (REWARD, '{"query": ["x"], "prompts": []}', 422, "one each"),
    "another prompt": (REWARD, '{"query": ["x"], "prompts": ["y"]}', 422, "query.0"),
    "no queries": (REWARD, '{"query": [], "prompts": []}', 422, "query"),
    "no such path": ("/v2/judge", "{}", 404, "Not Found"),
    "not a method": ("/health", "{}", 405, "Method Not Allowed"),
    "out of the folder": ("/page/../app.py", "{}", 404, "Not Found"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_bad_request_has_its_status_and_a_line(
    what: str, served: Callable[[str], httpx2.Client]
) -> None:
    path, body, status, words = HOSTILE[what]
    response = served("joint").post(path, content=body, headers=JSON)
    assert (response.status_code, words in why(response)) == (status, True), response.text
    assert len(response.content) < 1000
    assert served("joint").get("/health").json() == {"status": "ok", "judge": "judge"}


def test_pad_is_no_token_of_a_sequence(
    make: Callable[[str], Finished], served: Callable[[str], httpx2.Client]
) -> None:
    response = served("joint").post(
        "/classify", json={"input": [5, make("joint").judge.contract.pad]}
    )
    assert (response.status_code, "which pads" in why(response)) == (422, True)


def test_only_json_is_read(served: Callable[[str], httpx2.Client]) -> None:
    body = json.dumps({"battles": [GOOD]})
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        response = served("joint").post("/v1/judge", content=body, headers={"content-type": kind})
        assert (response.status_code, "application/json" in why(response)) == (415, True)


def raw(client: httpx2.Client, *parts: bytes, pause: float = 0) -> bytes:
    """What a server says to bytes, which may be no HTTP."""
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        connection.settimeout(20)
        for part in parts:
            connection.sendall(part)
            time.sleep(pause)
        said = connection.recv(1 << 16)
        while said.startswith(b"HTTP/1.1 4") and not said.endswith((b"}}", b"received.")):
            said += connection.recv(1 << 16)
        return said


def test_a_body_that_does_not_come_or_end_is_refused(
    served: Callable[[str], httpx2.Client],
) -> None:
    head = b"POST /v1/judge HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    slow = raw(served("joint"), head + b"content-length: 100\r\n\r\n", b"{", b'"', pause=0.1)
    assert slow.startswith(b"HTTP/1.1 408 ") and b"in 1 seconds" in slow
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    endless = raw(served("joint"), head + b"transfer-encoding: chunked\r\n\r\n", *[chunk] * 5)
    assert endless.startswith(b"HTTP/1.1 413 ") and b"200,000 bytes" in endless
    assert raw(served("joint"), b"GARBAGE\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    with socket.create_connection(
        (served("joint").base_url.host, served("joint").base_url.port)
    ) as gone:
        gone.sendall(head + b"content-length: 100\r\n\r\n{")
    assert asked(served("joint"), [GOOD])["verdicts"]


# --- batches ------------------------------------------------------------------------------------------


def sequences_of(rows: list[list[int]]) -> Sequences:
    return Sequences(
        np.array(sum(rows, []), np.int32), offsets_of(np.array([*map(len, rows)], int))
    )


def sums(sequences: Sequences) -> np.ndarray:
    """A model whose outputs depend on every id and its place."""
    return np.array(
        [[row.sum(), (row * np.arange(1, len(row) + 1)).sum()] for row in sequences], np.float32
    ).reshape(-1, 2)


rows_of_ids = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9), max_size=12)


@given(calls=st.lists(rows_of_ids, min_size=1, max_size=6), batch=st.integers(1, 20))
def test_every_caller_gets_its_own_outputs(calls: list[list[list[int]]], batch: int) -> None:
    seen: list[Sequences] = []

    def run(sequences: Sequences) -> np.ndarray:
        seen.append(sequences)
        return sums(sequences)

    told: list[Any] = []
    batcher = Batcher(run, 2, batch_tokens=batch, queue_tokens=10_000, ran=told.append)
    given = [sequences_of(rows) for rows in calls]
    with ThreadPoolExecutor(len(calls)) as pool:
        found = list(pool.map(lambda s: batcher.forward(s, time.monotonic() + 60), given))
    batcher.close()
    for sequences, outputs in zip(given, found, strict=True):
        np.testing.assert_array_equal(outputs, sums(sequences))
    for sequences in seen:
        assert len(sequences) == len(distinct(sequences)[0]), "each distinct one once"
        assert len(sequences) == 1 or sequences.offsets[-1] <= batch
    assert sum(ran.sequences for ran in told) == sum(map(len, given))
    assert sum(ran.tokens for ran in told) == sum(int(s.offsets[-1]) for s in given)


class Held:
    """A model that waits for its release."""

    def __init__(self) -> None:
        self.began, self.go = threading.Event(), threading.Event()

    def __call__(self, sequences: Sequences) -> np.ndarray:
        self.began.set()
        assert self.go.wait(30)
        return sums(sequences)


def test_callers_share_a_batch_and_a_full_queue_is_told() -> None:
    model, told = Held(), []
    batcher = Batcher(model, 2, batch_tokens=8, queue_tokens=8, ran=told.append)
    one, soon = sequences_of([[1, 2]]), time.monotonic() + 30
    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(batcher.forward, one, soon)
        assert model.began.wait(10)
        others = [pool.submit(batcher.forward, one, soon) for _ in range(3)]
        while batcher.waiting < 6:
            time.sleep(0.01)
        with pytest.raises(Busy, match="the queue is full"):
            batcher.forward(sequences_of([[1, 2, 3]]), soon)
        with pytest.raises(TooLarge, match="has 9 tokens in 1 sequences, and the queue holds 8"):
            batcher.forward(sequences_of([[1] * 9]), soon)
        with pytest.raises(Late):
            batcher.forward(one, time.monotonic() + 0.05)
        assert batcher.waiting == 6, "who is gone waits no longer"
        model.go.set()
        for found in (first, *others):
            np.testing.assert_array_equal(found.result(10), sums(one))
    batcher.close()
    assert [(ran.sequences, ran.distinct) for ran in told] == [(1, 1), (3, 1)]
    with pytest.raises(Busy, match="the server stops"):
        batcher.forward(one, soon)
    assert not batcher.alive


def test_a_fault_is_told_to_its_callers_and_the_thread_lives() -> None:
    def run(sequences: Sequences) -> np.ndarray:
        if (sequences.ids == 9).any():
            raise RuntimeError("boom")
        return np.full((len(sequences), 2), np.nan if (sequences.ids == 8).any() else 1, np.float32)

    batcher = Batcher(run, 2, batch_tokens=2, queue_tokens=100)
    soon = time.monotonic() + 30
    with pytest.raises(RuntimeError, match="boom"):
        batcher.forward(sequences_of([[1], [9], [9, 9], [1, 1]]), soon)
    with pytest.raises(ArithmeticError, match="not finite"):
        batcher.forward(sequences_of([[8]]), soon)
    assert batcher.forward(sequences_of([[1, 2, 3]]), soon).tolist() == [[1, 1]]
    assert batcher.waiting == 0
    batcher.close()


def test_busy_late_and_failed_have_their_status(make: Callable[[str], Finished]) -> None:
    judge, held = make("joint").judge, Held()
    held.go.set()

    def run(sequences: Sequences) -> np.ndarray:
        held(sequences)
        if len(sequences) == 3:
            raise MemoryError
        return judge.forward(sequences)

    limits = Limits(requests=2, seconds=0.5)
    with running(judge.answered_by(run), limits, queue_tokens=400) as client:
        assert asked(client, [GOOD])
        failed = client.post("/classify", json={"input": [[5], [6], [7]]})
        assert (failed.status_code, "out of memory" in why(failed)) == (500, True)
        large = client.post("/v1/judge", json={"battles": [{**GOOD, "prompt": "sea " * 99}] * 20})
        assert (large.status_code, "the queue holds 400" in why(large)) == (413, True)
        held.go.clear()
        with ThreadPoolExecutor(3) as pool:
            body = {"input": [[5]]}
            late = [pool.submit(client.post, "/classify", json=body) for _ in range(2)]
            time.sleep(0.2)
            third = client.post("/classify", json=body)
            assert (third.status_code, third.headers["retry-after"]) == (503, "1")
            assert "2 requests are at work" in why(third)
            assert {r.result().status_code for r in late} == {504}
            assert "no answer in time" in why(late[0].result())
        held.go.set()
        assert asked(client, [GOOD])


def test_who_has_gone_away_is_not_computed(make: Callable[[str], Finished]) -> None:
    judge, held, read = make("joint").judge, Held(), set[int]()

    def run(sequences: Sequences) -> np.ndarray:
        read.update(sequences.ids.tolist())
        held(sequences)
        return judge.forward(sequences)

    def wait_for(client: httpx2.Client, figure: str) -> None:
        deadline = time.monotonic() + 10
        while f"\n{figure}\n" not in client.get("/metrics").text:
            assert time.monotonic() < deadline, figure
            time.sleep(0.01)

    with running(judge.answered_by(run)) as client, ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.post, "/classify", json={"input": [[5]]})
        assert held.began.wait(10)
        body = json.dumps({"input": [[6], [7, 7]]}).encode()
        head = f"POST /classify HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        address = client.base_url.host, client.base_url.port
        with socket.create_connection(address) as leaving:
            leaving.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + body)
            wait_for(client, "arena_queue_tokens 3.0")
        wait_for(client, "arena_queue_tokens 0.0")
        stays = pool.submit(client.post, "/classify", json={"input": [[8]]})
        held.go.set()
        assert {first.result(10).status_code, stays.result(10).status_code} == {200}
        wait_for(client, 'arena_requests_total{path="/classify",status="499"} 1.0')
    assert read == {5, 8}


def test_many_clients_get_the_answers_of_one(
    make: Callable[[str], Finished], served: Callable[[str], httpx2.Client]
) -> None:
    """And memory does not grow with the requests."""
    judge, client = make("joint").judge, served("joint")
    battles = [
        {**GOOD, "prompt": f"what is {i % 8} ?", "response_a": "sea " * (i % 5)} for i in range(64)
    ]
    expected = judge.predict(battles).probabilities

    def ask(i: int) -> list[float]:
        return list(asked(client, [battles[i]])["verdicts"][0]["probabilities"].values())

    with ThreadPoolExecutor(64) as pool:
        np.testing.assert_allclose(list(pool.map(ask, range(64))), expected, atol=1e-5)
        process = psutil.Process()
        before = process.memory_info().rss
        list(pool.map(ask, list(range(64)) * 3))
    assert process.memory_info().rss - before < 30 << 20


def test_a_frozen_judge_is_asked_of_our_server_alone(
    make: Callable[[str], Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM, which has no such head, lists its model as its own."""
    judge = make("frozen")
    refusal = pytest.raises(InputError, match="^http.*/v1/models: status 401")
    with running(judge.judge, token="sesame") as client, refusal:
        judge_on(judge.folder, str(client.base_url))
    monkeypatch.setattr("arena_distill.judging.server.app.Model", partial(Model, owned_by="vllm"))
    with running(judge.judge) as client:
        address = str(client.base_url)
        with pytest.raises(InputError, match="reads several layers, which only") as refused:
            judge_on(judge.folder, address)
        assert "\n" not in str(refused.value)
        assert judge_on(make("pointwise").folder, address), "another one needs no such question"
    with pytest.raises(InputError, match="/v1/models: no answer"):
        judge_on(judge.folder, address)


# --- who may ask --------------------------------------------------------------------------------------


def test_a_token_is_asked_for(
    make: Callable[[str], Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make("joint").folder
    with running(make("joint").judge, token="säsame") as client:
        for given in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Basic c8Okc2FtZQ=="},
        ):
            for path in ("/v1/judge", "/metrics", "/docs", "/openapi.json", "/nothing"):
                response = client.get(path, headers=given)
                assert (response.status_code, "bearer token" in why(response)) == (401, True)
                assert response.headers["www-authenticate"] == "Bearer"
        for path in ("/", "/page/page.js", "/health"):
            assert client.get(path).status_code == 200
        right = {"authorization": "bearer säsame".encode()}
        assert client.post("/v1/judge", json={"battles": [GOOD]}, headers=right).status_code == 200
    with running(make("joint").judge, token="sesame") as client:
        with pytest.raises(InputError, match="status 401"):
            judge_on(folder, str(client.base_url)).compare("p", "a", "b")
        monkeypatch.setenv(TOKEN, "sesame")
        assert judge_on(folder, str(client.base_url)).compare("p", "a", "b")


def test_a_page_of_another_name_is_refused(make: Callable[[str], Finished]) -> None:
    with running(make("joint").judge, hosts=("localhost", "127.0.0.1")) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/health", headers={"host": "evil.example"}).status_code == 400


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "judge.example"])
def test_others_are_not_served_without_a_token(
    host: str, make: Callable[[str], Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    with pytest.raises(InputError, match=rf"^--host {re.escape(host)}: .* set {TOKEN} to a token"):
        serve(
            make("joint").folder, host=host, port=0, limits=LIMITS, queue_tokens=1, batch_tokens=1
        )


def test_an_address_that_is_taken_is_told_at_once(make: Callable[[str], Finished]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            InputError, match=f"--port {port}: Address already in use; choose others"
        ):
            serve(
                "/nothing", host="127.0.0.1", port=port, limits=LIMITS, queue_tokens=1, batch_tokens=1
            )  # fmt: skip


# --- figures, and the end ------------------------------------------------------------------------------


def figures(client: httpx2.Client) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
    }


def test_prometheus_can_read_the_figures(make: Callable[[str], Finished]) -> None:
    with running(make("joint").judge) as client:
        asked(client, [GOOD, GOOD])
        client.post("/v1/judge", content="x", headers=JSON)
        client.get("/a/path/of/an/attacker")
        samples = figures(client)
    assert samples["arena_requests_total", "/v1/judge", "200"] == 1
    assert samples["arena_requests_total", "/v1/judge", "400"] == 1
    assert samples["arena_requests_total", "404", "other"] == 1
    assert samples["arena_batch_sequences_count",] == 1
    assert samples["arena_batch_sequences_sum",] == 4, "both orders of two battles"
    assert samples["arena_repeated_sequences_total",] == 2, "they are equal"
    assert samples["arena_queue_tokens",] == 0
    assert samples["process_resident_memory_bytes",] > 0


def test_the_address_can_be_reached_when_it_is_printed(
    make: Callable[[str], Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = []

    def run(_: uvicorn.Server, sockets: list[socket.socket]) -> None:
        with socket.create_connection(sockets[0].getsockname(), timeout=10):
            reached.append(True)

    monkeypatch.setattr(uvicorn.Server, "run", run)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        serve(
            make("joint").folder,
            host="127.0.0.1",
            port=0,
            limits=LIMITS,
            queue_tokens=1000,
            batch_tokens=512,
        )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert reached


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_the_last_answer(
    number: signal.Signals, make: Callable[[str], Finished]
) -> None:
    words = [
        warm_python(),
        "-m",
        "arena_distill",
        "serve",
        str(make("joint").folder),
        "--port",
        "0",
        "--batch-tokens",
        "512",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "workflow"), TOKEN: "sesame"}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        headers = {"authorization": "Bearer sesame"}
        with httpx2.Client(
            base_url=address, headers=headers, mounts=NO_PROXY, timeout=60
        ) as client:
            asked(client, [GOOD])
            many = [{**GOOD, "prompt": f"{i} sea " * 40} for i in range(200)]
            with ThreadPoolExecutor(1) as pool:
                last = pool.submit(asked, client, many)
                while not figures(client)["arena_queue_tokens",]:
                    assert not last.done()
                    time.sleep(0.01)
                process.send_signal(number)
                assert len(last.result()["verdicts"]) == 200
        assert process.wait(60) == 0
        assert process.stdout.read() == "stopped\n"
    finally:
        process.kill()
        process.wait()


# --- the page -------------------------------------------------------------------------------------------

SECURE = ("default-src 'none'", "script-src 'self'", "frame-ancestors 'none'")


def test_pages_may_load_nothing_from_elsewhere(served: Callable[[str], httpx2.Client]) -> None:
    for path in ("/", "/docs", "/page/page.css", "/page/page.js"):
        response = served("joint").get(path)
        assert response.status_code == 200
        assert all(part in response.headers["content-security-policy"] for part in SECURE)
        assert "http://www.w3.org/2000/svg" in response.text or "://" not in response.text
    docs = served("joint").get("/docs").text
    schema = served("joint").get("/openapi.json").json()
    assert len(schema["paths"]) == 6
    for path in schema["paths"]:
        assert path in docs
    links = re.findall(r'href="#(\w+)"', docs)
    assert links and all(f'id="{link}"' in docs for link in links)


FILL = """(() => {
  const texts = %s;
  for (const [name, text] of Object.entries(texts)) document.querySelector(`[name=${name}]`).value = text;
  document.getElementById("ask").click();
})()"""
READY = """!document.getElementById("ask").disabled
  && !(document.getElementById("result").hidden && document.getElementById("error").hidden)"""
TEXT = 'document.getElementById("%s").innerText'
EVIL = (
    "<img src=https://elsewhere.example/x onerror='window.hacked = 1'><script>hacked = 1</script>"
)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_people_judge_a_battle_in_a_browser(
    width: int,
    make: Callable[[str], Finished],
    served: Callable[[str], httpx2.Client],
    tmp_path: Path,
) -> None:
    judge, address = make("joint").judge, str(served("joint").base_url).rstrip("/")
    battles = [
        {"prompt": "what is one ?", "response_a": EVIL, "response_b": "one 🌊"},
        {"prompt": "what ?", "response_a": f"🌊 {EVIL} " + "the sea " * 90, "response_b": "no"},
    ]
    expected = judge.predict(battles)
    with tab(tmp_path / "profile") as page:
        page.open(f"{address}/", width)
        page.wait('document.getElementById("example").options.length > 1')
        for text, verdict in zip(battles, expected, strict=True):
            page.run(FILL % json.dumps(text))
            page.wait(READY)
            shown = [f"{100 * p:.1f}\u202f%" for p in verdict.probabilities.values()]
            assert re.findall(r"[\d.]+\u202f%", page.run(TEXT % "bars")) == shown
            both = [p for order in verdict.orders.values() for p in order.values()]
            found = re.findall(r"[\d.]+\u202f%", page.run(TEXT % "orders"))
            assert found == [f"{100 * p:.1f}\u202f%" for p in both]
            assert page.run("document.documentElement.scrollWidth") <= width
            page.run('document.getElementById("result").hidden = true')
        assert f"{expected[1].cut['response_a']} tokens of answer A" in page.run(
            'document.getElementById("cut").textContent'
        )
        ranges = characters_kept(judge, battles)
        assert ranges is not None
        end = ranges[1]["response_a"][0][-1][1]
        assert (
            page.run('document.querySelector("#read del").textContent')
            == battles[1]["response_a"][end:]
        )
        assert page.run("window.hacked === undefined && !document.querySelector('main img')")
        page.run('document.getElementById("example").value = "1"')
        page.run('document.getElementById("example").dispatchEvent(new Event("change"))')
        assert page.run('document.querySelectorAll("#rounds fieldset").length') == 3, "its turns"
        page.open(f"{address}/docs", width)
        assert page.run("document.documentElement.scrollWidth") <= width
    assert page.complaints == []
    assert page.requests and all(url.startswith(f"{address}/") for url in page.requests)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_the_page_asks_for_the_token(make: Callable[[str], Finished], tmp_path: Path) -> None:
    with (
        running(make("pointwise").judge, token="sesame") as client,
        tab(tmp_path / "profile") as page,
    ):
        page.open(str(client.base_url), 390)
        page.wait('!document.getElementById("error").hidden')
        assert "a bearer token is needed" in page.run(TEXT % "error")
        page.run('document.getElementById("token").value = "sesame"')
        page.run('document.querySelector("#token-form button").click()')
        page.wait('document.getElementById("example").options.length > 1')
        page.run(FILL % json.dumps(GOOD))
        page.wait(READY)
        assert page.run('document.getElementById("error").hidden')
        assert "the order has no effect" in page.run(TEXT % "order-note")
