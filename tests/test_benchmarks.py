"""`arena-distill benchmark`: the share of right answers, by subset, order and prompt."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from judges import finished_judge
from typer.testing import CliRunner

from arena_distill import Judge
from arena_distill.cli import app
from arena_distill.config.encoding import Encoding
from arena_distill.config.head import JOINT
from arena_distill.config.source import Source
from arena_distill.errors import InputError
from arena_distill.evaluation.benchmarks import benchmark, write_benchmarks
from arena_distill.files.artifacts import write_parquet
from arena_distill.judging.verdicts import Verdicts
from arena_distill.verdicts import Order

ROWS = [  # prompt, label (1: the first answer is better), category
    ("one", 1, "easy"),
    ("one", 2, "easy"),
    ("two", 2, "easy"),
    ("three", 1, "hard"),
    ("four", 1, "hard"),
]


def llmbar(path: Path, rows: list[tuple[str, int, str]] = ROWS) -> Source:
    """Battles as LLMBar publishes them, with a category more."""
    battles = [
        {
            "input": p,
            "output_1": f"{p} yes {i}",
            "output_2": f"{p} no {i}",
            "label": label,
            "category": of,
        }
        for i, (p, label, of) in enumerate(rows)
    ]
    path.write_text(json.dumps(battles))
    return Source(path=str(path))


def saying(first: list[list[float]], second: list[list[float]]) -> Callable[[pa.Table], Verdicts]:
    """A judge with these probabilities in either order."""

    def ask(battles: pa.Table) -> Verdicts:
        by_order = np.stack([np.array(first), np.array(second)], axis=1)
        assert len(battles) == len(by_order)
        orders: tuple[Order, Order] = ("AB", "BA")
        classes = ("model_a", "model_b", "tie")
        mean, none = by_order.mean(axis=1), np.zeros((len(battles), 1, 2, 3), np.float32)
        return Verdicts(battles["id"], classes, orders, mean, by_order, none, {})

    return ask


A, B, EVEN = [0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.3, 0.3, 0.4]


def test_right_answers_are_counted_by_subset_and_order(tmp_path: Path) -> None:
    source = llmbar(tmp_path / "bar.json")
    ask = saying([A, A, B, EVEN, A], [A, B, A, EVEN, A])
    easy, hard, whole = benchmark(ask, {"bar": [source]}, pa.chunked_array([[["Two "], ["five"]]]))
    assert [r["subset"] for r in (easy, hard, whole)] == ["easy", "hard", "all"]
    # AB right, wrong, right; BA right, right, wrong; their mean A, B (0.4 < 0.5), B (0.4 < 0.5).
    assert easy["orders"] == {"AB": pytest.approx(2 / 3), "BA": pytest.approx(2 / 3)}
    assert (easy["accuracy"], easy["consistent"]) == (1, pytest.approx(1 / 3))
    assert (hard["accuracy"], hard["consistent"]) == (0.75, 0.5), "even chances count half"
    assert (whole["battles"], whole["ties"], whole["known"]) == (5, 0, 1)
    # By hand: four prompts, residuals 0.1 · (2, 1, -4, 1), standard error √(4/3 · 0.22) / 5: 7.7 battles by
    # 0.9 · 0.1: counted as five. Wilson: (0.9 + z²/10 ± z √(0.09/5 + z²/100)) / (1 + z²/5).
    assert whole["accuracy"] == pytest.approx(0.9)
    assert (whole["low"], whole["high"]) == pytest.approx((0.4629, 0.9895), abs=1e-4)


def test_ties_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": "x", "response_a": "a", "response_b": "b", "winner": "model_b"},
        {"prompt": "y", "response_a": "a", "response_b": "b", "winner": "tie"},
    ]
    file = tmp_path / "votes.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    (found,) = benchmark(saying([B], [A]), {"votes": [Source(path=str(file))]})
    assert (found["subset"], found["battles"], found["ties"]) == ("all", 1, 1)
    assert (found["accuracy"], found["low"], found["known"]) == (1, None, None)
    file.write_text(json.dumps(rows[1]))
    with pytest.raises(InputError, match=r"votes\.jsonl: no battle has a winner"):
        benchmark(saying([], []), {"votes": [Source(path=str(file))]})


def test_files_of_a_folder_are_its_subsets(tmp_path: Path) -> None:
    for name in ("natural", "hostile"):
        llmbar(tmp_path / f"{name}.json", [("p " + name, 1, "")])
    found = benchmark(saying([A, B], [A, B]), {"bar": [Source(path=str(tmp_path))]})
    right = {record["subset"]: record["accuracy"] for record in found}
    assert right == {"hostile": 1, "natural": 0, "all": 0.5}


def answered(asked: list[int], battles: pa.Table) -> Verdicts:
    asked.append(len(battles))
    return saying([A] * len(battles), [A] * len(battles))(battles)


def test_the_command_asks_a_real_judge(
    backbones: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = finished_judge(tmp_path / "j", backbones("llama"), head=JOINT, encoding=Encoding())
    source, out = llmbar(tmp_path / "bar.json"), tmp_path / "found.json"
    command = ["benchmark", str(judge.folder), f"bar={source.path}", "--output", str(out)]
    learned = ["--learned", str(judge.folder.parent / "battles.parquet")]
    done = CliRunner().invoke(app, [*command, *learned])
    assert done.exit_code == 0, done.output
    whole = json.loads(out.read_text())[-1]
    battles = [
        {"prompt": p, "response_a": f"{p} yes {i}", "response_b": f"{p} no {i}"}
        for i, (p, _, _) in enumerate(ROWS)
    ]
    verdicts = judge.judge.predict(battles)
    prefers = np.where(verdicts.probabilities[:, 0] > verdicts.probabilities[:, 1], 1, 2)
    assert whole["accuracy"] == pytest.approx((prefers == [label for _, label, _ in ROWS]).mean())
    assert whole["known"] == 0
    assert f"{whole['accuracy']:.1%}" in done.output and "in both" in done.output
    other = llmbar(tmp_path / "other.json", ROWS[:2])
    asked: list[int] = []
    answer = partial(answered, asked)
    monkeypatch.setattr(Judge, "from_pretrained", lambda *_, **__: SimpleNamespace(predict=answer))
    done = CliRunner().invoke(app, [*command[:3], f"bar={other.path}"])
    assert done.exit_code == 0 and asked == [len(ROWS) + 2], "both files of one name"
    wrong = CliRunner().invoke(app, ["benchmark", str(judge.folder), source.path])
    assert "NAME=PATH expected" in str(wrong.exception)


def test_the_card_has_the_latest_scores_once(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# j\n\n## Scores\n\nx\n\n## Limits\n\n- y\n")
    source, battles = llmbar(tmp_path / "bar.json"), tmp_path / "battles.parquet"
    write_parquet(pa.table({"source": ["train"], "prompt": [["four"]]}), battles, {})
    for said in (B, A):
        ask = saying([said] * 5, [said] * 5)
        write_benchmarks(ask, {"bar": [source]}, battles, tmp_path / "found.json", tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("# j\n\n## Scores\n\nx\n\n## Benchmarks\n\nHow often")
    assert card.endswith(" |\n\n## Limits\n\n- y\n")
    assert card.count("## Benchmarks") == 1
    whole = json.loads((tmp_path / "found.json").read_text())[-1]
    half = f"{whole['accuracy']:.1%} ({whole['low']:.1%} to {whole['high']:.1%})"
    assert f"\n| bar | all | 5 | {half} | 1 |\n" in card
    (tmp_path / "README.md").write_text("something else")
    with pytest.raises(InputError, match=r"README\.md: not a model card of this package"):
        write_benchmarks(ask, {"bar": [source]}, battles, tmp_path / "found.json", tmp_path)
