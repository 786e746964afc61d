"""Published battles become files of the Kaggle schema; only requested files are fetched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from checkouts import make_checkout

from arena_distill.battles import fetching
from arena_distill.battles.fetching import (
    arena_battles,
    check_access,
    fetch_battles,
    ultrafeedback_battles,
)
from arena_distill.battles.reading import read_battles
from arena_distill.config.data import Fetch
from arena_distill.config.phases import FetchSettings
from arena_distill.config.run import load
from arena_distill.errors import InputError
from arena_distill.files import hub
from arena_distill.files.artifacts import read_provenance

COMMIT = "a" * 40


# --- UltraFeedback ----------------------------------------------------------------------------------


def rated(prompt: str, *ratings: float | None) -> dict[str, Any]:
    """A prompt with one answer per rating, as in openbmb/UltraFeedback."""
    completions = [
        {
            "model": f"model {rating}",
            "response": f"answer {i} of {rating}",
            "overall_score": 1.0,  # the column that is not to be trusted
            "fine-grained_score": rating,
        }
        for i, rating in enumerate(ratings)
    ]
    return {"source": "x", "instruction": prompt, "completions": completions}


def test_the_better_rated_answer_wins_and_equal_ratings_are_ties() -> None:
    rows = [rated(f"p{i}", 1.0, 2.5, 2.5, 4.75) for i in range(200)]
    battles = ultrafeedback_battles(rows, seed=1).to_pylist()
    assert len(battles) == 200
    winners = set()
    for battle in battles:
        a, b = (float(battle[f"model_{side}"].split()[1]) for side in "ab")
        expected = "tie" if a == b else "model_a" if a > b else "model_b"
        assert battle["winner"] == expected
        assert battle["response_a"] != battle["response_b"]
        winners.add(expected)
    assert winners == {"model_a", "model_b", "tie"}
    ties = sum(battle["winner"] == "tie" for battle in battles)
    assert 15 <= ties <= 55  # one pair of six


def test_pairs_depend_on_seed_and_prompt_only() -> None:
    rows = [rated(f"p{i}", 1, 2, 3, 4) for i in range(20)]
    battles = ultrafeedback_battles(rows, seed=1)
    part = ultrafeedback_battles(rows[10:], seed=1)
    columns = ["prompt", "response_a", "response_b", "winner"]
    assert battles.slice(10).select(columns).equals(part.select(columns))
    assert not ultrafeedback_battles(rows, seed=2).equals(battles)


def test_the_binarized_kind_is_read_too() -> None:
    def turns(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": "p"}, {"role": "assistant", "content": text}]

    rows = [
        {
            "prompt": f"p{i}", "prompt_id": "x", "chosen": turns("good"), "rejected": turns("bad"),
            "score_chosen": 8.0, "score_rejected": 8.0 if i == 0 else 3.0,
        }
        for i in range(20)
    ]  # fmt: skip
    battles = ultrafeedback_battles(rows, seed=1).to_pylist()
    assert battles[0]["winner"] == "tie"
    for battle in battles[1:]:
        assert battle["winner"] == ("model_a" if battle["response_a"] == ["good"] else "model_b")
    assert {battle["winner"] for battle in battles} == {"model_a", "model_b", "tie"}


def test_prompts_without_two_rated_answers_are_left_out() -> None:
    rows = [rated("p", 3, None, None, None), rated("q", 3, None, 2, None), rated("r")]
    (battle,) = ultrafeedback_battles(rows, seed=0).to_pylist()
    assert battle["prompt"] == ["q"]


def test_other_rows_are_an_error() -> None:
    with pytest.raises(
        InputError, match="row 1 has neither completions nor chosen and rejected: x"
    ):
        ultrafeedback_battles([{"x": 1}], seed=0)


# --- conversations ------------------------------------------------------------------------------------


def voted(
    number: int, prompts: list[str], a: str, b: str, winner: str = "model_b"
) -> dict[str, Any]:
    def conversation(answer: str) -> list[dict[str, str]]:
        return [
            {"role": role, "content": text}
            for i, prompt in enumerate(prompts)
            for role, text in (("user", prompt), ("assistant", f"{answer} {i}"))
        ]

    return {
        "question_id": f"q{number}", "model_a": "x", "model_b": "y", "winner": winner,
        "conversation_a": conversation(a), "conversation_b": conversation(b), "turn": len(prompts),
    }  # fmt: skip


def test_conversations_become_turns() -> None:
    rows = [voted(1, ["hi", "and?"], "a", "b"), voted(2, ["q"], "a", "b", "tie (bothbad)")]
    first, second = arena_battles(rows).to_pylist()
    assert first["prompt"] == ["hi", "and?"]
    assert (first["response_a"], first["response_b"]) == (["a 0", "a 1"], ["b 0", "b 1"])
    assert (first["winner"], second["winner"]) == ("model_b", "tie")
    assert first["id"] == "q1"


def test_prompts_that_are_there_already_and_repetitions_are_left_out() -> None:
    rows = [
        voted(1, ["Old  Prompt"], "a", "b"),
        voted(2, ["new"], "a", "b"),
        voted(3, ["new"], "a", "b"),  # again
        voted(4, ["new"], "a", "c"),  # another battle
    ]
    kept = arena_battles(rows, without={"old prompt"})
    assert kept["id"].to_pylist() == ["q2", "q4"]


def test_a_row_without_conversations_is_an_error() -> None:
    with pytest.raises(InputError, match="row 1 cannot be read"):
        arena_battles([{"winner": "tie"}])


# --- the hub ------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[dict[str, Any]], None]:
    """A hub with one data set of these files (rows by name)."""

    def publish(files: dict[str, Any]) -> None:
        def download(
            repo: str, *, local_dir: Path, allow_patterns: list[str], **options: Any
        ) -> None:
            assert (repo, options["revision"], options["repo_type"]) == ("o/d", COMMIT, "dataset")
            for name, rows in files.items():
                if not any(Path(name).match(pattern) for pattern in allow_patterns):
                    continue
                path = Path(local_dir, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.suffix == ".parquet":
                    pq.write_table(pa.Table.from_pylist(rows), path)
                else:
                    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", lambda *_, **__: None)
        monkeypatch.setattr(
            huggingface_hub.HfApi, "repo_info", lambda *_, **__: SimpleNamespace(sha=COMMIT)
        )

    return publish


def test_ultrafeedback_is_fetched_and_read(
    dataset: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    dataset({"b.jsonl": [rated("q \ud800", 1, 2)], "a.jsonl": [rated("p", 2, 2)], "README.md": []})
    origin = Fetch(hub="o/d", revision="main", files=("*.jsonl",), format="ultrafeedback")
    fetch_battles(tmp_path / "in/ut.parquet", without=[], settings=FetchSettings.of(origin))
    battles, rejected = read_battles({"ut": [tmp_path / "in/ut.parquet"]})
    assert not len(rejected)
    assert battles["prompt"].to_pylist() == [["p"], ["q ?"]]
    assert battles["vote"].to_pylist()[0] == [0, 0, 1]
    made = read_provenance(tmp_path / "in/ut.parquet")["settings"]
    assert (made["revision"], made["commit"]) == ("main", COMMIT)
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["ut.parquet"]


def test_conversations_are_fetched_without_what_train_has(
    dataset: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    rows = [voted(1, ["old"], "a", "b"), voted(2, ["new"], "a", "b", "model_a")]
    dataset({"data/train-0.parquet": rows})
    train = tmp_path / "train.csv"
    train.write_text('id,prompt,response_a,response_b,winner\n7,"[""Old""]",x,y,tie\n')
    origin = Fetch(
        hub="o/d", revision=COMMIT, files=("data/train-*.parquet",), format="arena", without=("t",)
    )
    fetch_battles(tmp_path / "extra.parquet", without=[train], settings=FetchSettings.of(origin))
    battles, rejected = read_battles({"extra": [tmp_path / "extra.parquet"]})
    assert (battles["id"].to_pylist(), battles["vote"].to_pylist()) == (["q2"], [[1, 0, 0]])
    assert not len(rejected)


def test_a_data_set_without_the_file_is_an_error(
    dataset: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    dataset({"other.jsonl": []})
    origin = Fetch(hub="o/d", revision=COMMIT, files=("a.jsonl",))
    with pytest.raises(InputError, match=r"o/d@a+ has no file a\.jsonl"):
        fetch_battles(tmp_path / "x.jsonl", without=[], settings=FetchSettings.of(origin))
    assert not list(tmp_path.iterdir())


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
    archive.writestr(given["-f"], "id,prompt\\n1,x\\n")
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


def kaggle(competition: str = "lmsys") -> Fetch:
    return Fetch(kaggle=competition, files=("train.csv",))


def test_a_file_of_a_competition_is_taken_as_it_is(
    client: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAGGLE_API_TOKEN", "t")
    fetch_battles(client / "in/battles.csv", without=[], settings=FetchSettings.of(kaggle()))
    assert (client / "in/battles.csv").read_text() == "id,prompt\n1,x\n"
    assert [path.name for path in (client / "in").iterdir()] == ["battles.csv"]


def test_a_refusal_is_an_error_of_one_line(client: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAGGLE_USERNAME", "u")
    monkeypatch.setenv("KAGGLE_KEY", "k")
    with pytest.raises(
        InputError, match="403 - Forbidden; have you accepted the rules at"
    ) as error:
        fetch_battles(client / "train.csv", without=[], settings=FetchSettings.of(kaggle("closed")))
    assert "\n" not in str(error.value)


def test_a_missing_token_is_reported_first(client: Path) -> None:
    with pytest.raises(InputError, match=r"export KAGGLE_API_TOKEN, or KAGGLE_USERNAME") as error:
        check_access([kaggle(), kaggle()], [])
    assert "\n" not in str(error.value)
    (client / "nobody").mkdir()
    (client / "nobody/kaggle.json").touch()
    check_access([kaggle()], [])


def test_a_missing_client_is_reported_first(client: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'arena-distill\[fetch\]'"):
        check_access([kaggle()], [])


# --- the configuration --------------------------------------------------------------------------------


def raw(**fetch: Any) -> dict[str, Any]:
    data = {"train": "d/train.csv", "ut": "d/ut.parquet", "test": "d/test.csv", "fetch": fetch}
    return {
        "data": data,
        "judges": {"j": {"backbone": {"tiny": "llama"}, "quantization": {"group_size": 32}}},
        "final": "j",
    }


def test_a_file_of_kaggle_has_the_same_name_there() -> None:
    config = load(raw(**{"d/train.csv": {"kaggle": "lmsys"}}))
    assert config.data.fetch["d/train.csv"].files == ("train.csv",)


def test_without_fetch_the_params_do_not_mention_it() -> None:
    assert "fetch" not in load(raw()).as_params()


@pytest.mark.parametrize(
    ("path", "origin", "message"),
    [
        ("d/other.csv", {"kaggle": "x"}, "no source reads this file; known: d/train.csv"),
        ("d/train.csv", {}, "exactly one of kaggle, hub"),
        ("d/train.csv", {"hub": "o/d"}, "`hub` and `revision` go together"),
        ("d/train.csv", {"hub": "o/d", "revision": "main"}, "files: say which"),
        ("d/train.csv", {"kaggle": "x", "format": "arena"}, "is taken as it is"),
        (
            "d/train.csv",
            {"hub": "o/d", "revision": "main", "files": ["*"], "format": "arena"},
            "is parquet: name it so",
        ),
        (
            "d/ut.parquet",
            {"hub": "o/d", "revision": "main", "files": ["*"], "without": ["d/train.csv"]},
            "only of format arena",
        ),
    ],
)
def test_a_wrong_origin_is_an_error(path: str, origin: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(raw(**{path: origin}))


@pytest.mark.slow
def test_a_run_without_a_token_ends_before_its_first_job(
    client: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = make_checkout(client / "checkout")
    config = raw(**{"d/train.csv": {"kaggle": "lmsys"}})
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
def test_a_run_fetches_what_is_not_there(client: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAGGLE_API_TOKEN", "t")
    checkout = make_checkout(client / "checkout")
    shutil.copytree(client / "site/kaggle", checkout.folder / "workflow/kaggle")  # on jobs' path
    config = raw(**{"d/train.csv": {"kaggle": "lmsys"}, "d/test.csv": {"kaggle": "lmsys"}})
    (checkout.folder / "mini.yaml").write_text(yaml.safe_dump(config))
    (checkout.folder / "d").mkdir()
    (checkout.folder / "d/test.csv").write_text("mine")
    done = checkout.snakemake("d/train.csv", "d/test.csv", "--cores", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (checkout.folder / "d/train.csv").read_text() == "id,prompt\n1,x\n"
    assert (checkout.folder / "d/test.csv").read_text() == "mine"
