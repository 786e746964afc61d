"""Judges are published, and submissions sent, by the real clients, to a hub and a Kaggle of our own."""

from __future__ import annotations

import base64
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from conftest import ROOT
from huggingface_hub import constants
from judges import finished_judge
from typer.testing import CliRunner

from arena_distill import Judge
from arena_distill.cli import app
from arena_distill.config.encoding import Encoding
from arena_distill.config.head import JOINT
from arena_distill.errors import InputError
from arena_distill.files import kaggle
from arena_distill.judging.contract import FILE

CLIENTS = Path(os.environ.get("ARENA_PUBLISH", ROOT / ".venv/publish"))
COMMIT = "a" * 40


class Server(ThreadingHTTPServer):
    """Both services in one, as far as their clients ask.

    repos: of the hub, by name: whether it is private, and its files.
    models: of Kaggle, by OWNER/MODEL: whether it is private, and the files of each version.
    blobs: what was sent, by address.
    submitted: of Kaggle, what `CreateSubmission` was asked.
    asked: the address of every request; tokens: what each was authorised with.
    refuses: the status of every answer, if it refuses.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, tuple[bool, dict[str, bytes]]] = {}
        self.models: dict[str, tuple[bool, list[dict[str, bytes]]]] = {}
        self.blobs: dict[str, bytes] = {}
        self.submitted: list[dict[str, Any]] = []
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()
        self.refuses: int | None = None

    @property
    def sent(self) -> list[str]:
        """The requests that change something."""
        looks = re.compile(r"GET|HEAD|.*/(GetModel|IntrospectToken)$")
        return [asked for asked in self.asked if not looks.match(asked)]


class Answer(BaseHTTPRequestHandler):
    server: Server

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.command == "PUT":
            self.server.blobs[path] = body
            return self.send({})
        if path == "/api/agent-harnesses":  # the hub's client wants to know by itself, once
            return self.send({}, 404)
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.server.refuses:
            return self.send({"error": "no", "message": "no"}, self.server.refuses)
        if service := re.fullmatch(r"/v1/[\w.]+/(\w+)", path):
            return self.kaggle(service[1], json.loads(body))
        self.hub(path, body)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def hub(self, path: str, body: bytes) -> None:
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.server.repos:
                return self.send({"error": "exists"}, 409)
            self.server.repos[name] = (asked["visibility"] == "private", {".gitattributes": b""})
            return self.send({"url": f"{self.server.url}/{name}"})
        if path == "/api/validate-yaml":
            return self.send({"errors": [], "warnings": []})
        found = re.search(r"(?:/api/models)?/([\w-]+/[\w-]+?)(?:\.git)?(?:/(.*))?$", path)
        assert found, path
        name, rest = found[1], found[2] or ""
        if name not in self.server.repos:
            return self.send({}, 404, {"X-Error-Code": "RepoNotFound"})
        private, files = self.server.repos[name]
        what, _, about = rest.partition("/")
        if what == "preupload":
            modes = [
                {"path": f["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(body)["files"]
            ]  # fmt: skip
            return self.send({"files": modes})
        if what == "info":
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self.send({"objects": objects, "transfer": "basic"})
        if what == "commit":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.server.blobs[f"/lfs/{value['oid']}"]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            url = f"{self.server.url}/{name}/commit/{COMMIT}"
            return self.send({"success": True, "commitOid": COMMIT, "commitUrl": url})
        if what == "resolve":
            content = files[about.removeprefix(f"{COMMIT}/")]
            headers = {"ETag": f'"{hash(content):x}"', "X-Repo-Commit": COMMIT}
            return self.send(content, 200, headers)
        if what == "tree":
            return self.send(
                [
                    {"type": "file", "path": n, "size": len(c), "oid": "0" * 40}
                    for n, c in files.items()
                ]
            )
        if what == "revision" and about not in ("main", COMMIT):
            return self.send({}, 404, {"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": n} for n in files]
        self.send({"id": name, "sha": COMMIT, "private": private, "siblings": siblings})

    def kaggle(self, method: str, asked: dict[str, Any]) -> None:
        model = f"{asked.get('ownerSlug')}/{asked.get('modelSlug') or asked.get('slug')}"
        if method == "IntrospectToken":
            return self.send({"active": asked["token"] == "k_mine", "username": "me"})
        if method in ("StartBlobUpload", "StartSubmissionUpload"):
            name = asked.get("name") or asked["fileName"]
            address = f"/blobs/{name}"
            return self.send({"token": name, "createUrl": self.server.url + address})
        if method == "CreateSubmission":
            self.server.submitted.append(asked)
            return self.send({"message": "Successfully submitted to LMSYS", "ref": 1})
        if method == "CreateModel":
            self.server.models[model] = (asked["isPrivate"], [])
            return self.send({"id": 1})
        if model not in self.server.models:
            return self.send({"message": "no such model"}, 404)
        private, versions = self.server.models[model]
        if method == "GetModel":
            return self.send({"id": 1, "isPrivate": private})
        if method == "CreateModelInstance" and versions:
            return self.send({"error": "it exists", "errorCode": 409})
        sent = [file["token"] for file in asked["body"]["files"]]
        versions.append({name: self.server.blobs[f"/blobs/{name}"] for name in sent})
        self.send({"id": 1})

    def send(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        kind = {} if isinstance(value, bytes) else {"Content-Type": "application/json"}
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **kind, **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY"):
        monkeypatch.delenv(name, raising=False)
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_TOKEN", "hf_mine")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE
        path = template[template.index("/{repo_id}") :]
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + path)
        yield server
        server.shutdown()


@pytest.fixture
def clients(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Kaggle's own clients, with a token, talking to the stand-in."""
    if not CLIENTS.is_dir():
        pytest.skip(f"no clients of Kaggle in {CLIENTS} (make setup)")
    monkeypatch.setattr(sys, "path", [*sys.path, str(CLIENTS)])
    monkeypatch.setenv("KAGGLE_API_TOKEN", "k_mine")
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path / "nobody"))
    from kagglesdk import kaggle_env

    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, server.url)


@pytest.fixture(scope="module")
def made(backbones: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    return finished_judge(folder, backbones("llama"), head=JOINT, encoding=Encoding()).folder


@pytest.fixture
def judge(made: Path, tmp_path: Path) -> Path:
    """A folder that a test may change."""
    folder = tmp_path / "judge"
    folder.mkdir()
    for file in made.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / ".snakemake_timestamp").touch()
    return folder


def call(*words: object, answer: str | None = None) -> str:
    """Run a command; its output. Raises what it raises."""
    done = CliRunner().invoke(app, [str(w) for w in words], input=answer)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def contents(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir() if not f.name.startswith(".")}


# --- the hub ------------------------------------------------------------------------------------------


def test_a_judge_is_sent_and_is_the_same_for_whoever_loads_it(server: Server, judge: Path) -> None:
    told = call("push", judge, "--to", "hub:o/small-judge", answer="y\n")
    assert "hub:o/small-judge (new, private)" in told and f"/commit/{COMMIT}" in told
    size = (judge / "model.safetensors").stat().st_size
    assert re.search(rf" {size:,} bytes  model\.safetensors\n", told)
    private, files = server.repos["o/small-judge"]
    assert private
    assert {n: c for n, c in files.items() if n != ".gitattributes"} == contents(judge)
    assert server.tokens == {"Bearer hf_mine"}
    loaded = Judge.from_pretrained(f"hub:o/small-judge@{COMMIT}")
    said = loaded.compare("what is one ?", "one", "two and the sea")
    assert said == Judge.from_pretrained(judge).compare("what is one ?", "one", "two and the sea")


def test_a_revision_that_is_not_there_is_one_line(server: Server) -> None:
    server.repos["o/j"] = (True, {FILE: b"{}"})
    with pytest.raises(InputError, match=r"hub:o/j@v9: cannot be downloaded: .*404") as told:
        Judge.from_pretrained("hub:o/j@v9")
    assert "\n" not in str(told.value)
    assert "GET /api/models/o/j/revision/v9" in server.asked


def test_a_second_judge_replaces_the_first(server: Server, judge: Path) -> None:
    old = {FILE: b"{}", "model-00001-of-00002.safetensors": b"", ".gitattributes": b"x"}
    server.repos["o/j"] = (True, {**old, "README.md": b"old"})
    told = call("push", judge, "--to", "hub:o/j", "--yes")
    assert "hub:o/j (private)" in told
    assert "is removed  model-00001-of-00002.safetensors" in told
    assert server.repos["o/j"][1] == {**contents(judge), ".gitattributes": b"x"}


@pytest.mark.parametrize(
    ("public", "there", "words"),
    [
        ([], None, "(new, private)"),
        (["--public"], None, "(new, PUBLIC)"),
        (["--public"], False, "(PUBLIC)"),
        (["--public"], True, "(private)"),
    ],
)
def test_only_who_says_public_publishes_to_everybody(
    public: list[str], there: bool | None, words: str, server: Server, judge: Path
) -> None:
    if there is not None:
        server.repos["o/j"] = (there, {FILE: b"{}"})
    assert words in call("push", judge, "--to", "hub:o/j", "--yes", *public)
    assert server.repos["o/j"][0] == ("PUBLIC" not in words)


@pytest.mark.parametrize(
    ("answer", "words"),
    [("n\n", "hub:o/j: nothing was sent"), ("\n", "nothing was sent"), ("", "nobody answered")],
)
def test_without_a_yes_nothing_is_sent(
    answer: str, words: str, server: Server, judge: Path
) -> None:
    with pytest.raises(InputError, match=words):
        call("push", judge, "--to", "hub:o/j", answer=answer)
    assert server.sent == [] and server.asked


def rewrite(file: Path, old: bytes, new: bytes) -> None:
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new, 1))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / FILE).unlink(), "has no judge.json"),
        (lambda f: (f / "notes").mkdir(), "notes: no part of a judge"),
        (lambda f: (f / "battles.csv").touch(), "battles.csv: no part of a judge"),
        (lambda f: (f / "key.json").symlink_to("/etc/hostname"), "key.json: no part of a judge"),
        (lambda f: (f / "other.safetensors").touch(), "does not know these weights"),
        (lambda f: rewrite(f / "tokenizer.json", b"{", b"{ "), "not the judge of its judge.json"),
        (lambda f: rewrite(f / "config.json", b'"rms_norm_eps": 1e-0', b'"rms_norm_eps": 9e-0'),
         "not the judge of its judge.json"),
    ],
)  # fmt: skip
def test_what_is_not_the_judge_of_its_vectors_is_not_sent(
    damage: Callable[[Path], Any], words: str, server: Server, judge: Path
) -> None:
    damage(judge)
    with pytest.raises(InputError, match=re.escape(words)) as told:
        call("push", judge, "--to", "hub:o/j", "--yes")
    assert str(judge) in str(told.value) and "\n" not in str(told.value)
    assert server.sent == []


def test_a_place_of_something_else_is_left_alone(server: Server, judge: Path) -> None:
    server.repos["o/other"] = (True, {".gitattributes": b"", "pytorch_model.bin": b""})
    server.repos["o/open"] = (False, {FILE: b"{}"})
    with pytest.raises(InputError, match=r"holds something else than a judge \(pytorch_model\.bin"):
        call("push", judge, "--to", "hub:o/other", "--yes")
    with pytest.raises(InputError, match=r"hub:o/open is public: give another name, or --public"):
        call("push", judge, "--to", "hub:o/open", "--yes")
    assert server.sent == []


def test_a_refusal_of_the_hub_is_one_line(
    server: Server, judge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.refuses = 403
    with pytest.raises(InputError, match=r"hub:o/j: cannot be published: .*403.*HF_TOKEN") as told:
        call("push", judge, "--to", "hub:o/j", "--yes")
    assert "\n" not in str(told.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="hub:o/j needs a token that may write: export HF_TOKEN"):
        call("push", judge, "--to", "hub:o/j", "--yes")


@pytest.mark.parametrize("to", ["o/j", "hub:j", "hub:../j/k", "kaggle:o/j", "s3:o/j", "hub:o/j k"])
def test_an_address_is_one_of_two_forms(to: str, judge: Path) -> None:
    with pytest.raises(InputError, match="hub:ORG/NAME or kaggle:OWNER/MODEL/VARIATION expected"):
        call("push", judge, "--to", to, "--yes")


# --- Kaggle -------------------------------------------------------------------------------------------


def test_a_model_of_kaggle_gets_versions(clients: None, server: Server, judge: Path) -> None:
    told = call("push", judge, "--to", "kaggle:me/judges/small", answer="y\n")
    assert "kaggle:me/judges/small (new, private)" in told
    assert "(private)" in call("push", judge, "--to", "kaggle:me/judges/small", "--yes")
    assert server.models == {"me/judges": (True, [contents(judge), contents(judge)])}
    assert server.tokens == {"Bearer k_mine"}


def test_kaggle_is_asked_before_something_is_sent(
    clients: None, server: Server, judge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.models["me/open"] = (False, [])
    for words, message in [
        (["kaggle:me/open/small"], "kaggle:me/open/small is public"),
        (["kaggle:me/new/small", "--public"], "new models of Kaggle are private"),
    ]:
        with pytest.raises(InputError, match=message):
            call("push", judge, "--yes", "--to", *words)
    with pytest.raises(InputError, match="nothing was sent"):
        call("push", judge, "--to", "kaggle:me/new/small", answer="n\n")
    server.refuses = 500
    with pytest.raises(InputError, match="Kaggle refused it, or does not answer: 500"):
        call("push", judge, "--to", "kaggle:me/new/small", "--yes")
    server.refuses = None
    monkeypatch.setenv("KAGGLE_API_TOKEN", "k_old")
    with pytest.raises(InputError, match="it does not know this token"):
        call("push", judge, "--to", "kaggle:me/new/small", "--yes")
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    with pytest.raises(InputError, match="needs a token of Kaggle"):
        call("push", judge, "--to", "kaggle:me/new/small", "--yes")
    assert server.sent == []


def test_a_missing_client_is_told(judge: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kaggle.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'arena-distill\[publish\]'"):
        call("push", judge, "--to", "kaggle:me/judges/small", "--yes")


# --- submissions --------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "results/mine"
    folder.mkdir(parents=True)
    rows = "id,winner_model_a,winner_model_b,winner_tie\n7,0.2,0.3,0.5\n8,0.1,0.1,0.8\n"
    (folder / "submission.csv").write_text(rows)
    return folder


def test_a_submission_is_sent_as_it_is(clients: None, server: Server, run: Path) -> None:
    told = call("submit", run, "--to", "kaggle:lmsys", answer="y\n")
    assert "2 battles" in told and "Successfully submitted to LMSYS" in told
    assert server.blobs["/blobs/submission.csv"] == (run / "submission.csv").read_bytes()
    (asked,) = server.submitted
    assert (asked["competitionName"], asked["submissionDescription"]) == (
        "lmsys",
        "arena-distill, mine",
    )
    assert server.tokens == {"Bearer k_mine"}


def test_what_is_no_submission_is_not_sent(clients: None, server: Server, run: Path) -> None:
    with pytest.raises(InputError, match="nothing was sent"):
        call("submit", run, "--to", "kaggle:lmsys", answer="")
    with pytest.raises(InputError, match="--to lmsys: kaggle:COMPETITION expected"):
        call("submit", run, "--to", "lmsys", "--yes")
    assert server.asked == []
    server.refuses = 403
    with pytest.raises(InputError, match="Kaggle refused it.*have you accepted the rules at"):
        call("submit", run, "--to", "kaggle:lmsys", "--yes")
    asked = len(server.asked)
    (run / "submission.csv").write_text("id,secret\n1,2\n")
    with pytest.raises(InputError, match="no submission of a run: it has the columns id, secret"):
        call("submit", run, "--to", "kaggle:lmsys", "--yes")
    (run / "submission.csv").unlink()
    with pytest.raises(InputError, match="no such file; give the folder of a whole run"):
        call("submit", run, "--to", "kaggle:lmsys", "--yes")
    assert len(server.asked) == asked
