"""A finished stack: one folder that says what the graph says of it, and refuses what is damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from judges import LENGTHS, Finished, finished_judge
from test_publishing import Server
from test_publishing import server as a_server
from test_server import asked, running, why

from arena_distill import Judge
from arena_distill.battles.surface_features import read_surface
from arena_distill.config.encoding import Encoding
from arena_distill.config.head import JOINT, Head
from arena_distill.config.phases.judging import StackedJudgeSettings
from arena_distill.config.phases.prediction import StackedViewsSettings
from arena_distill.errors import InputError
from arena_distill.files.artifacts import read_json, write_json, write_parquet
from arena_distill.files.logits import read_logits
from arena_distill.judging.clients import judge_on
from arena_distill.judging.contract import FILE, MEMBERS, TREES
from arena_distill.judging.finish import finish_stack
from arena_distill.judging.publishing import Address, judge_files, push
from arena_distill.judging.vectors import compare_with_vectors, print_verification
from arena_distill.prediction.averages import mean_of_views
from arena_distill.prediction.stacked import combine_views
from arena_distill.prediction.test_time import score_test
from arena_distill.scoring.surface_trees import ask_surface, fit_surface
from arena_distill.verdicts import Votes

hub = a_server
"""A stand-in for the hub."""

MEMBERS_OF = {
    "reader": ("gemma2", JOINT, Encoding()),
    "frozen": ("llama", Head(kind="pointwise", pooling="layers"), Encoding(template="winners")),
}


@dataclass(frozen=True)
class Stack:
    """folder: the finished one; logits: what the graph makes of the test battles."""

    folder: Path
    members: dict[str, Finished]
    battles: pa.Table
    logits: np.ndarray


@pytest.fixture(scope="module")
def stack(backbones: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Stack:
    """Two judges with tokenizers of their own, and trees, by the functions of the phases."""
    folder = tmp_path_factory.mktemp("stack")
    members = {
        name: finished_judge(folder / name, backbones(family), head=head, encoding=encoding)
        for name, (family, head, encoding) in MEMBERS_OF.items()
    }
    first = members["reader"]
    _, surface = read_surface(folder / "reader/battles.parquet")
    votes = np.random.default_rng(0).integers(0, 3, len(first.battles))
    trees = fit_surface(surface, Votes.hard(votes))
    trees.write(folder / "surface.safetensors")
    said = ask_surface(trees, surface, 3)
    table = {name: first.battles[name] for name in ("id", "source")}
    table |= dict(zip(("p_model_a", "p_model_b", "p_tie"), said.T, strict=True))
    write_parquet(pa.table(table), folder / "surface.parquet", {})
    shares = {"reader": 0.5, "frozen": 0.3, "surface trees": 0.2}
    figures = {"members": {name: {"weight": w} for name, w in shares.items()}, "temperature": 0.8}
    write_json(figures, folder / "stack.json")
    files = []
    for name, member in members.items():
        files.append(folder / f"{name}.npy")
        score_test(
            member.weights, member.tokens, files[-1], quantized=False, settings=member.scoring,
            batch_tokens=512,
        )  # fmt: skip
    views: dict[str, Any] = {"members": tuple(members), "surface": True, "orders": ("AB", "BA")}
    combine_views(
        files, folder / "stack.json", folder / "stack.npy", surface=folder / "surface.parquet",
        settings=StackedViewsSettings(version=1, max_lengths=LENGTHS, **views),
    )  # fmt: skip
    finish_stack(
        [member.folder for member in members.values()], folder / "stack.json", folder / "judge",
        settings=StackedJudgeSettings(version=1, run="tests", judge="both", average="logits", **views),
        kind="merged", trees=folder / "surface.safetensors", batch_tokens=512,
    )  # fmt: skip
    logits, ids = read_logits(folder / "stack.npy")
    assert ids["id"].to_pylist() == first.test["id"].to_pylist()
    return Stack(folder / "judge", members, first.test, logits)


@pytest.fixture(scope="module")
def judge(stack: Stack) -> Judge:
    return Judge.from_pretrained(stack.folder, batch_tokens=512)


@pytest.fixture
def copied(stack: Stack, tmp_path: Path) -> Path:
    """A folder that a test may change."""
    return Path(shutil.copytree(stack.folder, tmp_path / "both"))


def test_the_folder_says_what_the_graph_says(stack: Stack, judge: Judge) -> None:
    found = judge.predict(stack.battles)
    np.testing.assert_allclose(found.logits, stack.logits, rtol=0, atol=1e-6)
    expected = mean_of_views(stack.logits.reshape(len(stack.logits), -1, 3), "logits")
    np.testing.assert_allclose(found.probabilities, expected, rtol=0, atol=1e-6)
    for order in range(2):
        expected = mean_of_views(stack.logits[:, :, order], "logits")
        np.testing.assert_allclose(found.by_order[:, order], expected, rtol=0, atol=1e-6)
    assert len(judge.predict(stack.battles.slice(0, 0))) == 0


def test_exchanged_answers_exchange_the_verdict(stack: Stack, judge: Judge) -> None:
    columns = ["id", "prompt", "response_b", "response_a"]
    swapped = stack.battles.select(columns).rename_columns(
        ["id", "prompt", "response_a", "response_b"]
    )
    found, back = judge.predict(stack.battles), judge.predict(swapped)
    np.testing.assert_allclose(back.probabilities[:, [1, 0, 2]], found.probabilities, atol=1e-5)
    ranked = judge.rank("what ?", ["a", "the sea is deep", ""])
    assert sorted(ranked.order) == [0, 1, 2]


def test_a_stack_is_one_of_its_test_vectors(
    stack: Stack, judge: Judge, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare_with_vectors(judge).within(1e-6)
    ids = judge.contract.vectors[0].ids
    assert {name.partition("/")[0] for name in ids} == {"reader", "frozen"}
    assert print_verification(judge, folder=stack.folder)
    name = f"{MEMBERS}/reader/tokenizer.json"
    (copied / name).write_bytes((copied / name).read_bytes() + b"\n")
    assert not print_verification(judge, folder=copied)
    assert f"not the file of its fingerprint: {name}" in capsys.readouterr().out


def test_the_card_names_the_members_and_what_is_needed(stack: Stack) -> None:
    card = (stack.folder / "README.md").read_text()
    assert "reader 0.50, frozen 0.30, trees over the surface of a battle 0.20; " in card
    assert "is divided by 0.8." in card
    assert "A stack needs `Judge`" in card
    assert "AutoModel" not in card
    assert "AutoModel" in (stack.folder / MEMBERS / "reader/README.md").read_text()


@pytest.mark.parametrize("name", ["reader", "frozen", "surface"])
def test_a_damaged_folder_is_one_line(copied: Path, name: str) -> None:
    path = copied / MEMBERS / name
    if name == "reader":
        shutil.rmtree(path)
        told = f"{path}: a member of the stack is missing; copy its whole folder again"
    elif name == "frozen":
        weights = path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        told = f"{weights} is not whole"
    else:
        trees = copied / TREES
        trees.write_bytes(trees.read_bytes()[:-100])
        told = f"{trees}: not the trees of a stack, or not whole"
    with pytest.raises(InputError) as refused:
        Judge.from_pretrained(copied)
    assert str(refused.value).startswith(told) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"members": {"reader": 0.5}}, "members: weights of at least 0 whose sum is 1 expected"),
        ({"members": {"reader": 1.1, "frozen": -0.3}}, "members: weights of at least 0 whose sum"),
        ({"members": {"../reader": 0.8}}, "members"),
        ({"surface": None}, "weights of at least 0 whose sum is 1 expected"),
        ({"temperature": 0}, "temperature"),
        ({"classes": ["model_a", "model_b"]}, "other than 63 features or 2 classes"),
        ({"orders": ["AB"]}, "not the member that"),
    ],
)
def test_weights_that_do_not_fit_are_one_line(
    copied: Path, changed: dict[str, Any], told: str
) -> None:
    write_json(read_json(copied / FILE) | changed, copied / FILE)
    with pytest.raises(InputError) as refused:
        Judge.from_pretrained(copied)
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_a_server_answers_as_the_folder_does(stack: Stack, judge: Judge) -> None:
    battles = [{"prompt": "what is one ?", "response_a": "two", "response_b": "one and two"}]
    with running(judge) as client:
        assert client.get("/v1/judge").json()["kind"] == "stack"
        assert client.get("/health").status_code == 200
        (said,) = asked(client, battles, kept=True)["verdicts"]
        expected = judge.predict(battles)
        found = [said["probabilities"][name] for name in expected.classes]
        np.testing.assert_allclose(found, expected.probabilities[0], atol=1e-5)
        assert said["kept"] is None
        for path, body in (
            ("/classify", {"input": [1, 2]}),
            ("/get_reward", {"query": ["a b"], "prompts": ["a"]}),
        ):
            refused = client.post(path, json=body)
            assert refused.status_code == 422
            assert "a stack" in why(refused)
    with pytest.raises(
        InputError, match="both is a stack, which needs `Judge`: ask it without --server"
    ):
        judge_on(stack.folder, "http://127.0.0.1:1")


def test_a_stack_is_sent_whole_and_nothing_else(
    copied: Path,
    hub: Server,
    stack: Stack,
) -> None:
    push(copied, Address.parse("hub:me/both"), public=False, agree=lambda _: True)
    names = set(judge_files(copied))
    assert {TREES, FILE, f"{MEMBERS}/frozen/model.safetensors"} <= names
    assert set(hub.repos["me/both"][1]) == names | {".gitattributes"}
    found = Judge.from_pretrained("hub:me/both").predict(stack.battles)
    np.testing.assert_allclose(found.logits, stack.logits, rtol=0, atol=1e-5)
    (copied / MEMBERS / "mine").mkdir()
    with pytest.raises(InputError, match="mine: no member of this stack; nothing was sent"):
        judge_files(copied)
