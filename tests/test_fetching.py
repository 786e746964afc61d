"""Published battles are fetched as they are, from a hub and a Kaggle of our own; only where asked."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
import yaml
from checkouts import make_checkout
from huggingface_hub import constants

from arena_distill.battles.fetching import ORIGIN, check_access, fetch_battles
from arena_distill.battles.reading import read_battles
from arena_distill.config.phases.battles import FetchSettings
from arena_distill.config.run import load
from arena_distill.config.source import Source
from arena_distill.errors import InputError
from arena_distill.files import hub
from arena_distill.files import kaggle as kaggle_client

COMMIT = "a" * 40


# --- the hub ------------------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """A hub with one data set, `o/d`, for huggingface_hub itself to talk to.

    Args:
        files: by name, their contents.
        refuses: the status and the hub's code of each answer, if it refuses.
        sums: SHA-256 that it publishes, by name; else the right ones.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {}
        self.refuses: tuple[int, str] | None = None
        self.sums: dict[str, str] = {}
        self.asked: list[str] = []

    def entry(self, name: str) -> dict[str, Any]:
        content = self.files[name]
        digest = self.sums.get(name) or hashlib.sha256(content).hexdigest()
        lfs = {"oid": digest, "size": len(content), "pointerSize": 100}
        return {"type": "file", "path": name, "size": len(content), "oid": "0" * 40, "lfs": lfs}


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        if self.server.refuses:
            status, code = self.server.refuses
            return self.send(b"{}", status, {"X-Error-Code": code})
        about, _, rest = path.removeprefix("/api").removeprefix("/datasets/o/d/").partition("/")
        if about == "revision" and rest not in ("main", COMMIT):
            return self.send(b"{}", 404, {"X-Error-Code": "RevisionNotFound"})
        if about == "revision":
            siblings = [{"rfilename": name} for name in self.server.files]
            return self.send_json({"id": "o/d", "sha": COMMIT, "siblings": siblings})
        if about == "tree":
            return self.send_json([self.server.entry(name) for name in self.server.files])
        if about == "resolve":
            content = self.server.files[rest.removeprefix(f"{COMMIT}/")]
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            return self.send(content, 200, {"ETag": etag, "X-Repo-Commit": COMMIT})
        self.send(b"", 200 if about == "auth-check" else 404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        size = int(self.headers["Content-Length"])
        wanted = parse_qs(self.rfile.read(size).decode())["paths"]
        self.send_json([self.server.entry(name) for name in wanted])

    def send_json(self, value: Any) -> None:
        self.send(json.dumps(value).encode(), 200, {"Content-Type": "application/json"})

    def send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setenv("HF_ENDPOINT", address)  # of jobs
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE
        path = template[template.index("/{repo_id}") :]
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + path)
        yield server
        server.shutdown()


def lines(*rows: dict[str, Any]) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


PAIR = {"prompt": "q", "chosen": "yes", "rejected": "no"}


def data_set(path: Path | str, *files: str, revision: str = "main") -> Source:
    return Source(path=str(path), hub="o/d", revision=revision, files=files)


def fetch(source: Source) -> None:
    fetch_battles(Path(source.path), settings=FetchSettings.of(source))


def test_files_of_a_data_set_are_stored_as_they_are(server: Hub, tmp_path: Path) -> None:
    server.files = {
        "data/train-1.jsonl": lines(PAIR | {"prompt": "second"}),
        "data/train-0.jsonl": lines(PAIR | {"prompt": "first \ud800"}),
        "data/test-0.jsonl": lines(PAIR),
        "README.md": b"# a card",
    }
    source = data_set(tmp_path / "in/extra", "data/train-*.jsonl")
    fetch(source)
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["extra"]
    found = {p.relative_to(source.path).as_posix(): p for p in Path(source.path).rglob("*.*")}
    assert found.keys() == {ORIGIN, "data/train-0.jsonl", "data/train-1.jsonl"}
    assert found["data/train-1.jsonl"].read_bytes() == server.files["data/train-1.jsonl"]
    made = json.loads(found[ORIGIN].read_text())["settings"]
    assert (made["hub"], made["revision"], made["commit"]) == ("o/d", "main", COMMIT)
    assert made["sha256"] == {
        name: hashlib.sha256(server.files[name]).hexdigest()
        for name in ("data/train-0.jsonl", "data/train-1.jsonl")
    }
    battles, rejected = read_battles({"extra": [source]})
    assert battles["prompt"].to_pylist() == [["first \ufffd"], ["second"]]
    assert not len(rejected)


def test_a_folder_is_replaced_as_a_whole(server: Hub, tmp_path: Path) -> None:
    source = data_set(tmp_path / "extra", "*.jsonl")
    server.files = {"old.jsonl": lines(PAIR)}
    fetch(source)
    server.files = {"new.jsonl": lines(PAIR)}
    server.sums = {"new.jsonl": "0" * 64}
    with pytest.raises(InputError, match=r"new\.jsonl did not arrive as it is published: .*again"):
        fetch(source)
    assert source.shards() == [tmp_path / "extra/old.jsonl"]
    server.sums = {}
    fetch(source)
    assert source.shards() == [tmp_path / "extra/new.jsonl"]
    assert [path.name for path in tmp_path.iterdir()] == ["extra"]


@pytest.mark.parametrize(
    ("refuses", "source", "message"),
    [
        ((403, "GatedRepo"), data_set("x", "*"), "has not accepted the terms"),
        ((401, "RepoNotFound"), data_set("x", "*"), "it is not there, or private"),
        (None, data_set("x", "*", revision="v9"), "o/d@v9: cannot .* it has no such revision"),
        (None, data_set("x", "b.jsonl"), r"o/d@main has no file b\.jsonl"),
    ],
)
def test_a_refusal_of_the_hub_is_one_line(
    server: Hub,
    tmp_path: Path,
    refuses: tuple[int, str] | None,
    source: Source,
    message: str,
) -> None:
    server.files, server.refuses = {"a.jsonl": lines(PAIR)}, refuses
    with pytest.raises(InputError, match=message) as error:
        fetch(source.model_copy(update={"path": str(tmp_path / "x")}))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_no_network_is_one_line(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"o/d: no access on the hub: .*; check the netw") as error:
        fetch(data_set(tmp_path / "x", "*"))
    assert "\n" not in str(error.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        fetch(data_set(tmp_path / "x", "*"))
    assert server.asked == []


def test_a_connection_that_breaks_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = []

    def download(*_: Any, **__: Any) -> None:
        calls.append(1)
        if len(calls) < 3:
            raise ConnectionError("reset by peer")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert hub.download("o/d", COMMIT, tmp_path, patterns=["*"], advice="") == COMMIT
    assert len(calls) == 3


def test_what_is_not_there_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = []

    def download(*_: Any, **__: Any) -> None:
        calls.append(1)
        raise ValueError("no such thing\nand a page of advice")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(InputError, match=r"o/d@a+: cannot be downloaded: no such thing; check"):
        hub.download("o/d", COMMIT, tmp_path, patterns=["*"], advice="do that")
    assert len(calls) == 1


# --- Kaggle -------------------------------------------------------------------------------------------

CLIENT = """
import sys, zipfile
from pathlib import Path

_, competitions, download, name, *options = sys.argv
assert (competitions, download) == ("competitions", "download")
given = dict(zip(options[::2], options[1::2]))
if name == "closed":
    sys.exit("403 - Forbidden")
with zipfile.ZipFile(Path(given["-p"], given["-f"] + ".zip"), "w") as archive:
    archive.writestr(given["-f"], "id,prompt,response_a,response_b\\n1,x,y,z\\n")
"""


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A fake client of Kaggle, without tokens."""
    package = tmp_path / "site/kaggle"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(CLIENT)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.syspath_prepend(str(package.parent))
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path / "nobody"))
    return tmp_path


def kaggle(path: Path | str = "train.csv", competition: str = "lmsys") -> Source:
    return Source(path=str(path), kaggle=competition, files=("train.csv",))


def test_a_file_of_a_competition_is_taken_as_it_is(
    client: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAGGLE_API_TOKEN", "t")
    fetch(kaggle(client / "in/battles.csv"))
    assert (client / "in/battles.csv").read_text().endswith("\n1,x,y,z\n")
    assert [path.name for path in (client / "in").iterdir()] == ["battles.csv"]


def test_a_refusal_is_an_error_of_one_line(client: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAGGLE_USERNAME", "u")
    monkeypatch.setenv("KAGGLE_KEY", "k")
    with pytest.raises(
        InputError, match="403 - Forbidden; have you accepted the rules at"
    ) as error:
        fetch(kaggle(client / "train.csv", "closed"))
    assert "\n" not in str(error.value)


def test_a_missing_token_is_reported_first(client: Path) -> None:
    with pytest.raises(InputError, match=r"export KAGGLE_API_TOKEN, or KAGGLE_USERNAME") as error:
        check_access([kaggle(), kaggle()], [])
    assert "\n" not in str(error.value)
    (client / "nobody").mkdir()
    (client / "nobody/kaggle.json").touch()
    check_access([kaggle()], [])


def test_a_missing_client_is_reported_first(client: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kaggle_client.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'arena-distill\[fetch\]'"):
        check_access([kaggle()], [])


# --- the configuration --------------------------------------------------------------------------------


def raw(**data: Any) -> dict[str, Any]:
    return {
        "data": {"train": "d/train.csv", "ut": "d/ut.parquet", "test": "d/test.csv"} | data,
        "judges": {"j": {"backbone": {"tiny": "llama"}, "quantization": {"group_size": 32}}},
        "final": "j",
    }


TRAIN = {"path": "d/train.csv", "kaggle": "lmsys"}
EXTRA = {"path": "d/extra", "hub": "o/d", "revision": "main", "files": ["*.jsonl"]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": TRAIN | EXTRA}, "one of kaggle, hub, not both"),
        ({"train": {"path": "d/x", "hub": "o/d"}}, "`hub` and `revision` go together"),
        ({"train": EXTRA | {"files": []}}, "files: say which"),
        ({"train": {"path": "d/x", "files": ["a"]}}, "files: only with hub or kaggle"),
        ({"train": TRAIN | {"files": ["a", "b"]}}, "from Kaggle comes one file"),
        ({"train": EXTRA | {"path": "d/*"}}, "needs a name, not a pattern"),
        ({"ut": [EXTRA, EXTRA | {"revision": "v1"}]}, "ut: d/extra: two sources have this path"),
        ({"ut": {"path": "d/x", "without": ["extra"]}}, "there are no extra battles"),
        ({"ut": {"path": "d/x", "without": ["ut"]}}, "all its prompts are in ut itself"),
        ({"test": {"path": "d/x", "without": ["ut"]}}, "every test battle needs a prediction"),
        ({"fetch": {"d/train.csv": {"kaggle": "lmsys"}}}, "each source now says itself where"),
    ],
)
def test_a_wrong_origin_is_an_error(data: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(raw(**data))


@pytest.mark.slow
def test_a_run_without_a_token_ends_before_its_first_job(
    client: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = make_checkout(client / "checkout")
    config = raw(train=TRAIN)
    (checkout.folder / "mini.yaml").write_text(yaml.safe_dump(config | {"run": "r"}))
    (checkout.folder / "d").mkdir()
    for name in ("ut.parquet", "test.csv"):
        (checkout.folder / "d" / name).write_text("id\n")
    done = checkout.snakemake("--cores", "1")
    assert done.returncode == 1
    assert "needs a token of Kaggle" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert not (checkout.folder / "d/train.csv").exists()
    assert not (checkout.folder / "results/r/logs").exists()


@pytest.mark.slow
def test_a_run_fetches_what_is_not_there(
    client: Path, server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after it is fetched a data set is one input: its shards rebuild nothing."""
    server.files = {"data/a.jsonl": lines(PAIR)}
    monkeypatch.setenv("KAGGLE_API_TOKEN", "t")
    folder = make_checkout(client / "checkout").folder
    shutil.copytree(client / "site/kaggle", folder / "workflow/kaggle")  # on jobs' path
    mine = "prompt,chosen,rejected\nq,a,b\n"
    (folder / "d").mkdir()
    (folder / "d/ut.csv").write_text(mine)
    config = raw(
        train=EXTRA,
        ut={"path": "d/ut.csv", "kaggle": "lmsys"},
        test={"path": "d/test.csv", "kaggle": "lmsys"},
    )

    def snakemake(*options: str) -> str:
        (folder / "mini.yaml").write_text(yaml.safe_dump(config | {"run": "r"}))
        battles = "results/r/battles.parquet"
        command = [sys.executable, "-m", "snakemake", battles, "--configfile", "mini.yaml"]
        done = subprocess.run([*command, *options], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    snakemake("--cores", "1")
    assert (folder / "d/test.csv").read_text().endswith("\n1,x,y,z\n")
    assert (folder / "d/ut.csv").read_text() == mine
    assert (folder / "d/extra/data/a.jsonl").read_bytes() == lines(PAIR)
    assert "Nothing to be done" in snakemake("-n")
    config["data"]["train"] = EXTRA | {"revision": COMMIT}
    counted = dict(re.findall(r"^(\w+) +(\d+)$", snakemake("-n"), re.MULTILINE))
    assert counted == {"fetch_data_set": "1", "read_battles": "1", "total": "2"}
