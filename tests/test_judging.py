"""A finished judge says the same wherever it is asked: phases of the workflow, class, files, plain code."""

from __future__ import annotations

import gzip
import io
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judges import Finished, finished_judge
from safetensors.torch import load_file, save_file

from arena_distill import Judge
from arena_distill.battles.formats import columns
from arena_distill.battles.formats.conversion import convert
from arena_distill.battles.votes import Solution, vote_columns
from arena_distill.cli import app
from arena_distill.config.encoding import Encoding
from arena_distill.config.head import JOINT, Head
from arena_distill.config.phases.prediction import PredictionSettings
from arena_distill.config.source import Reading
from arena_distill.errors import InputError
from arena_distill.files import csv_files, parquet_files
from arena_distill.files.artifacts import file_sha256, read_json, write_json, write_parquet
from arena_distill.files.readers import read_table
from arena_distill.judging.contract import FILE, read_contract
from arena_distill.judging.finish import for_other_programs, score_predictions
from arena_distill.judging.predict import predict_files
from arena_distill.judging.vectors import compare_with_vectors
from arena_distill.judging.verdicts import Verdicts
from arena_distill.prediction.test_time import predict_test, score_test
from arena_distill.verdicts import CLASSES, ORDERS, WINNERS, Votes, swap_classes

KINDS = {
    "joint": (JOINT, Encoding()),
    "mean": (
        Head(kind="joint", pooling="mean"),
        Encoding(template="winners", truncation="winners"),
    ),
    "sizes": (JOINT, Encoding(sizes=True, template="winners")),
    "budget": (JOINT, Encoding(tokens_per_battle=75)),
    "pointwise": (Head(kind="pointwise"), Encoding(template="winners")),
    "two classes": (Head(kind="joint", classes=2), Encoding(truncation="middle")),
    "bradley_terry": (Head(kind="pointwise", classes=2), Encoding(truncation="middle")),
    "frozen": (Head(kind="pointwise", pooling="layers"), Encoding(template="winners", sizes=True)),
    "rao_kupper": (Head(kind="pointwise", ties="rao_kupper"), Encoding(sizes=True)),
}
Make = Callable[..., Finished]


@pytest.fixture(scope="module")
def make(backbones: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Finished judges by family and kind, each made once; those with changed settings each time."""
    made: dict[tuple[str, str], Finished] = {}

    def of(family: str = "gemma2", kind: str = "joint", **changes: Any) -> Finished:
        if changes or (family, kind) not in made:
            head, encoding = KINDS[kind]
            folder = tmp_path_factory.mktemp(f"{family}_{kind}")
            found = finished_judge(
                folder, backbones(family), head=head, encoding=encoding, **changes
            )
            if changes:
                return found
            made[family, kind] = found
        return made[family, kind]

    return of


# --- the same numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_class_says_what_the_workflow_says(
    family: str, kind: str, make: Make, tmp_path: Path
) -> None:
    judge = make(family, kind)
    score_test(
        judge.weights, judge.tokens, tmp_path / "test.npy", quantized=False, settings=judge.scoring,
        batch_tokens=512,
    )  # fmt: skip
    asked = judge.settings.model_dump(include={"max_lengths", "orders", "average"})
    how = PredictionSettings(version=1, **asked)
    predict_test(tmp_path / "test.npy", tmp_path / "p.parquet", model="merged", settings=how)
    table = pq.read_table(tmp_path / "p.parquet")
    expected = table.filter(table["submitted"])

    found = Judge.from_pretrained(judge.folder, batch_tokens=512).predict(judge.test)
    assert found.ids.to_pylist() == expected["id"].to_pylist()
    names = WINNERS[: judge.settings.head.classes]
    probabilities = np.column_stack([expected[name] for name in names])
    np.testing.assert_array_equal(found.probabilities, probabilities)
    assert np.ptp(probabilities, axis=0).max() > 0.02, "a judge without an opinion shows nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_a_judge_is_its_own_test_vectors(family: str, kind: str, make: Make) -> None:
    folder = make(family, kind).folder
    contract = read_contract(folder)
    assert len(contract.vectors) >= 5
    longest = max(len(ids) for vector in contract.vectors for ids in vector.ids.values())
    assert longest == max(contract.lengths), "one is cut"
    found = compare_with_vectors(Judge.from_pretrained(folder))
    assert (found.ids, found.logits) == ([], pytest.approx(0, abs=1e-5))


@pytest.mark.parametrize("kind", sorted({*KINDS} - {"budget"}))
def test_the_code_on_the_card_says_the_same(family: str, kind: str, make: Make) -> None:
    judge = make(family, kind, max_lengths=(512,))
    battle = {"prompt": " what is\n one ?<eos>", "answer_a": "", "answer_b": "one and [PROMPT] two"}
    card = (judge.folder / "README.md").read_text()
    _, code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {"folder": str(judge.folder), **battle}
    exec(code, names)
    said = Judge.from_pretrained(judge.folder).compare(*battle.values())
    assert bool(re.search(r"\btie\b", card)) == (judge.settings.head.classes == 3)
    assert said.cut == {"prompt": 0, "response_a": 0, "response_b": 0}
    np.testing.assert_allclose(
        names["probabilities"].tolist(), list(said.probabilities.values()), atol=1e-5
    )


def test_a_calibration_is_part_of_the_judge(make: Make, tmp_path: Path) -> None:
    parameters = {
        "scale": [0.5, 0.5, 0.8], "bias": [0.0, 0.0, 0.3],
        "lead": [0.1 * i for i in range(8)], "tie": [0.05] * 8,
    }  # fmt: skip
    score = {"value": 0.9, "low": 0.8, "high": 1.0}
    figures: dict[str, Any] = {"method": "style", "methods": {"style": {"parameters": parameters}}}
    deployed = {"rows": 250, "log_loss": score, "accuracy": score, "ece": 0.02}
    write_json({**figures, "rows": 250, "deployed": deployed}, tmp_path / "calibration.json")
    plain = make()
    calibrated = make(files={"calibration": tmp_path / "calibration.json"})
    score_test(
        calibrated.weights, calibrated.tokens, tmp_path / "test.npy", quantized=False,
        settings=calibrated.scoring, batch_tokens=512,
    )  # fmt: skip
    write_parquet(calibrated.battles, tmp_path / "battles.parquet", {})
    how = PredictionSettings(
        version=1, max_lengths=(96, 140), orders=("AB", "BA"), average="logits", calibration="style"
    )
    predict_test(
        tmp_path / "test.npy", tmp_path / "p.parquet", model="merged", settings=how,
        calibration=tmp_path / "calibration.json", battles=tmp_path / "battles.parquet",
    )  # fmt: skip
    table = pq.read_table(tmp_path / "p.parquet")
    expected = np.column_stack([table.filter(table["submitted"])[name] for name in WINNERS])
    found = Judge.from_pretrained(calibrated.folder).predict(calibrated.test).probabilities
    np.testing.assert_allclose(found, expected, atol=1e-6)
    raw = Judge.from_pretrained(plain.folder).predict(plain.test).probabilities
    assert np.abs(raw - expected).max() > 0.01


# --- battles in memory --------------------------------------------------------------------------------


ROWS: list[dict[str, Any]] = [
    {"prompt": "what is one ?", "response_a": "two", "response_b": "one and two"},
    {"prompt": ["what", "and now ?"], "response_a": ["x", "y z"], "response_b": ["", "the sea"]},
    {"prompt": "", "response_a": "", "response_b": "🌊 the waves are high"},
]
FORMS: dict[str, Callable[[], Any]] = {
    "list": lambda: ROWS,
    "columns": lambda: {name: [row[name] for row in ROWS] for name in ROWS[0]},
    "pandas": lambda: pd.DataFrame(ROWS),
    "arrow": lambda: pa.table(
        {n: [[r[n]] if isinstance(r[n], str) else r[n] for r in ROWS] for n in ROWS[0]}
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_battles_may_be_held_in_any_way(form: str, make: Make) -> None:
    judge = Judge.from_pretrained(make().folder)
    one_by_one = [judge.compare(*row.values()) for row in ROWS]
    found = judge.predict(FORMS[form]())
    assert [verdict.winner for verdict in found] == [verdict.winner for verdict in one_by_one]
    np.testing.assert_allclose(
        found.probabilities, [list(v.probabilities.values()) for v in one_by_one], atol=1e-5
    )
    assert found.to_pandas()["winner"].tolist() == found.winners.tolist()
    assert found.ids.to_pylist() == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("battles", "words"),
    [
        ([{"prompt": "p", "response_a": "a"}], "row 0: no response_b"),
        ([ROWS[0], {**ROWS[0], "prompt": None}], "row 1, column prompt: a text or a list"),
        ([{**ROWS[0], "response_a": ["x", 3]}], "row 0, column response_a"),
        ([{**ROWS[0], "response_a": 7}], "row 0, column response_a"),
        (["text"], "row 0: a dict expected, got str"),
        (ROWS[0], "one battle; give a list of battles, or call `compare`"),
        ({"prompt": ["p"]}, "no column response_a, response_b; there are prompt"),
        ({"prompt": ["p"], "response_a": ["a", "b"], "response_b": ["c"]}, "different lengths"),
        (pa.table({"prompt": ["p", None], "response_a": ["a", "b"], "response_b": ["c", "d"]}),
         "row 1, column prompt: null"),
        (pa.table({n: pa.array([["p"], [None]]) for n in ROWS[0]}), "row 1, column prompt: a turn is"),
        (pa.table({n: [1, 2] for n in ROWS[0]}), "column prompt: texts or lists of texts expected"),
        ([{**ROWS[0], "prompt": "\ud800"}], "column prompt"),
    ],
)  # fmt: skip
def test_what_is_no_battle_is_refused(battles: Any, words: str, make: Make) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        Judge.from_pretrained(make().folder).predict(battles)


def test_verdicts_that_depend_on_the_order_are_told() -> None:
    by_order = np.array([[[0.6, 0.3, 0.1], [0.5, 0.4, 0.1]], [[0.6, 0.3, 0.1], [0.3, 0.6, 0.1]]])
    whole = by_order.mean(axis=1)
    said = Verdicts(pa.array(["x", "y"]), CLASSES, ORDERS, whole, by_order, by_order[:, None], {})
    assert said.disputed.tolist() == [False, True]


def test_a_pointwise_judge_does_not_depend_on_the_order(make: Make) -> None:
    assert not make(kind="pointwise").judge.predict(ROWS).disputed.any()


def test_what_is_no_number_is_no_verdict(make: Make) -> None:
    broken = make().judge.answered_by(lambda rows: np.full((len(rows), 3), np.nan, np.float32))
    for ask in (lambda: broken.predict(ROWS), lambda: compare_with_vectors(broken)):
        with pytest.raises(InputError, match="^judge: its logits are not finite: its weights are"):
            ask()


def test_no_battles_are_no_verdicts(make: Make) -> None:
    found = Judge.from_pretrained(make().folder).predict([])
    assert (len(found), found.probabilities.shape, len(found.to_arrow())) == (0, (0, 3), 0)


texts = st.text(max_size=30)


@settings(max_examples=15)
@given(prompt=texts, a=texts, b=texts)
@pytest.mark.parametrize("kind", ["joint", "rao_kupper"])
def test_exchanged_answers_exchange_the_verdict(
    kind: str, prompt: str, a: str, b: str, make: Make
) -> None:
    judge = make(kind=kind).judge
    found = judge.predict([
        {"prompt": prompt, "response_a": a, "response_b": b},
        {"prompt": prompt, "response_a": b, "response_b": a},
    ]).probabilities  # fmt: skip
    np.testing.assert_allclose(found[0], swap_classes(found[1]), atol=1e-5)


# --- many answers -------------------------------------------------------------------------------------


ANSWERS = ["one", "", "the waves are high and the sea is deep", "one"]


@pytest.mark.parametrize("kind", ["joint", "pointwise"])
def test_answers_are_ranked(kind: str, make: Make) -> None:
    judge = make(kind=kind).judge
    ranking = judge.rank("what is one ?", ANSWERS)
    assert sorted(ranking.order) == [0, 1, 2, 3]
    assert (np.diff(ranking.scores[ranking.order]) <= 1e-6).all()
    assert ranking.scores[0] == pytest.approx(ranking.scores[3], abs=1e-5), "equal answers"
    if kind == "joint":
        assert ranking.scores.sum() == pytest.approx(len(ANSWERS) / 2), "each pair shares one point"
    with pytest.raises(InputError, match="two or more answers expected, got 1"):
        judge.rank("p", ["a"])


def test_a_reward_is_the_strength_of_an_answer(make: Make) -> None:
    judge = make(kind="pointwise").judge
    rewards = [judge.reward("what is one ?", answer) for answer in ANSWERS]
    np.testing.assert_allclose(rewards, judge.rank("what is one ?", ANSWERS).scores, atol=1e-5)
    verdict = judge.compare("what is one ?", ANSWERS[0], ANSWERS[2]).probabilities
    odds = np.log(verdict["model_a"] / verdict["model_b"])
    assert odds == pytest.approx(rewards[0] - rewards[2], abs=1e-4), "Davidson, without the tie"
    with pytest.raises(InputError, match="a joint judge compares two answers"):
        make().judge.reward("p", "a")


# --- the folder -----------------------------------------------------------------------------------------


def test_the_folder_says_what_other_programs_need(family: str, make: Make) -> None:
    plain = read_json(make(family).folder / "config.json")
    rope = plain["rope_parameters"]
    assert plain["rope_theta"] == rope["rope_theta"]
    assert "problem_type" not in plain
    pointwise = read_json(make(family, "pointwise").folder / "config.json")
    assert pointwise["problem_type"] == "regression"


def test_another_kind_of_rope_is_told_in_both_ways() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0}
    said = for_other_programs({"rope_parameters": rope}, pointwise=False)
    assert "_attn_implementation" not in said
    capped = for_other_programs({"attn_logit_softcapping": 50.0}, pointwise=False)
    assert capped["_attn_implementation"] == "eager"
    assert said["rope_theta"] == 500000.0
    assert said["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}


def test_the_weights_are_shared_and_untouched(make: Make) -> None:
    judge = make()
    here, there = (folder / "model.safetensors" for folder in (judge.folder, judge.weights))
    assert here.samefile(there), "linked"
    assert not (judge.weights / FILE).exists()
    assert "rope_theta" not in read_json(judge.weights / "config.json")
    contract = read_contract(judge.folder)
    for name, digest in contract.fingerprints.items():
        assert file_sha256(judge.folder / name) == digest
    assert {"model.safetensors", "tokenizer.json"} <= set(contract.fingerprints)


def test_scores_are_those_of_the_submitted_predictions(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 200)
    given = random.dirichlet((2, 2, 2), 200)
    ids = pa.array([str(i) for i in range(200)])
    columns = {name: given[:, i] for i, name in enumerate(WINNERS)}
    table = pa.table({"id": ids, **columns, "submitted": pa.repeat(True, 200)})
    other = table.set_column(4, "submitted", pa.repeat(False, 200))
    shuffled = pa.concat_tables([other, table.take(pa.array(random.permutation(200)))])
    write_parquet(shuffled, tmp_path / "p.parquet", {})
    votes = {"id": ids, "source": pa.repeat("test", 200), **vote_columns(Votes.hard(labels))}
    solution = Solution(pa.table({**votes, "group": pa.array(np.arange(200) // 2)}))
    found = score_predictions(tmp_path / "p.parquet", solution)
    loss = -np.log(given[np.arange(200), labels])
    assert found.log_loss.value == pytest.approx(loss.mean())
    assert found.accuracy.value == pytest.approx((given.argmax(axis=1) == labels).mean())
    assert found.log_loss.low < found.log_loss.value < found.log_loss.high
    width = found.log_loss.high - found.log_loss.low
    assert width == pytest.approx(2 * 1.96 * loss.std() / 200**0.5, rel=0.3)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / FILE).unlink(), "has no judge.json, so nothing says how this model is asked"),
        (lambda f: (f / FILE).write_text("{"), "judge.json: not a JSON file"),
        (lambda f: (f / FILE).write_text("[]"), "judge.json: format None, and this version"),
        (lambda f: edit(f, format=2), "judge.json: format 2, and this version of arena-distill reads 1"),
        (lambda f: edit(f, lengths="long"), "judge.json: damaged: lengths"),
        (lambda f: (f / "model.safetensors").unlink(), "has no weights (model.safetensors)"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "cannot load a tokenizer"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_one_line(
    damage: Callable[[Path], Any], words: str, make: Make, tmp_path: Path
) -> None:
    folder = copied(make().folder, tmp_path / "judge")
    damage(folder)
    with pytest.raises(InputError, match=re.escape(words)) as told:
        Judge.from_pretrained(folder)
    assert str(folder) in str(told.value) and "\n" not in str(told.value)


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def edit(folder: Path, **changes: Any) -> None:
    write_json(read_json(folder / FILE) | changes, folder / FILE)


def test_another_model_or_tokenizer_is_told_by_the_vectors(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(make().folder) == 0
    assert "the same judge" in capsys.readouterr().out
    folder = copied(make().folder, tmp_path / "weights")
    tensors = load_file(folder / "model.safetensors")
    tensors["score.weight"] *= 1.1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert verify(folder) == 1
    assert "NOT the same judge" in capsys.readouterr().out
    assert verify(folder, "--tolerance", "1") == 1
    assert "not the file of its fingerprint: model.safetensors" in capsys.readouterr().out
    weights = {"model.safetensors": file_sha256(folder / "model.safetensors")}
    edit(folder, fingerprints=read_json(folder / FILE)["fingerprints"] | weights)
    assert verify(folder, "--tolerance", "1") == 0
    capsys.readouterr()
    folder = copied(make().folder, tmp_path / "tokenizer")
    tokenizer = read_json(folder / "tokenizer.json")
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:5]
    write_json(tokenizer, folder / "tokenizer.json")
    assert verify(folder) == 1
    assert "other token ids: short, 96/AB" in capsys.readouterr().out


def verify(folder: Path, *options: str) -> int:
    result = app(["verify", str(folder), *options], standalone_mode=False)
    return int(result or 0)


# --- files ------------------------------------------------------------------------------------------------


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    rows = {
        "id": [f"b{i}" for i in range(11)],
        "prompt": [json.dumps([f"what is {i} ?"]) for i in range(11)],
        "response_a": [json.dumps(["one", "two"][: 1 + i % 2]) for i in range(11)],
        "response_b": [json.dumps(["the sea " * i]) for i in range(11)],
    }
    rows["response_a"][4] = '["cut off'
    pa_csv.write_csv(pa.table(rows), tmp_path / "battles.csv")
    return tmp_path / "battles.csv"


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_files_are_judged_as_battles_in_memory_are(
    suffix: str, make: Make, csv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / f"out{suffix}"
    predict(make(), csv, output)
    told = capsys.readouterr().err
    assert f"{csv}, row 5, column response_a: " in told and "1 rows refused" in told
    rejected = pq.read_table(f"{output}.rejected.parquet").to_pylist()
    assert [(line["row"], line["column"]) for line in rejected] == [(5, "response_a")]
    read: dict[str, Callable[[Path], pa.Table]] = {
        ".parquet": pq.read_table,
        ".csv": pa_csv.read_csv,
        ".jsonl": lambda p: pa.Table.from_pylist([*map(json.loads, p.read_text().splitlines())]),
    }
    found = read[suffix](output)
    kept = [i for i in range(11) if i != 4]
    battles = [
        {"prompt": f"what is {i} ?", "response_a": ["one", "two"][: 1 + i % 2],
         "response_b": "the sea " * i}
        for i in kept
    ]  # fmt: skip
    expected = make().judge.predict(battles)
    assert found["id"].to_pylist() == [f"b{i}" for i in kept]
    for i, name in enumerate(WINNERS):
        np.testing.assert_allclose(found[name], expected.probabilities[:, i], atol=1e-5)
    assert found["winner"].to_pylist() == expected.winners.tolist()


def predict(judge: Finished, battles: Path | str, output: Path | str) -> None:
    app(
        ["predict", str(judge.folder), str(battles), "-o", str(output)],
        standalone_mode=False,
    )


def test_a_killed_prediction_goes_on_where_it_was(make: Make, csv: Path, tmp_path: Path) -> None:
    judge, asked = make().judge, []

    def ask(battles: pa.Table) -> Any:
        if len(asked) == 2 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        asked.append(battles["id"].to_pylist())
        return judge.predict(battles)

    stopped: list[bool] = []
    where, output = (str(csv), Reading()), str(tmp_path / "out.parquet")
    with pytest.raises(KeyboardInterrupt):
        predict_files(judge.contract, ask, *where, output, part=3)
    assert not Path(output).exists()
    done = predict_files(judge.contract, ask, *where, output, part=3)
    assert (done.battles, done.refused) == (10, 1)
    assert [len(ids) for ids in asked] == [3, 3, 3, 1], "each battle once"
    found = pq.read_table(output)
    at_once = str(tmp_path / "at_once.parquet")
    predict_files(judge.contract, judge.predict, *where, at_once, part=3)
    whole = pq.read_table(at_once)
    assert found["id"].to_pylist() == [i for ids in asked for i in ids]
    assert whole.equals(found)
    assert not list(tmp_path.glob("*.parts"))


@dataclass(frozen=True)
class Said:
    """Of each battle, what was read of it."""

    battles: pa.Table

    def to_arrow(self) -> pa.Table:
        return self.battles


@pytest.mark.parametrize("packed", [".csv", ".csv.gz", ".tsv", ".parquet", ".jsonl"])
def test_a_file_is_read_in_pieces_as_it_is_as_a_whole(
    packed: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": json.dumps([f"é {i}", None]), "response_a": "ü" * (i % 50), "response_b": "b"}
        for i in range(300)
    ]
    rows[131]["prompt"] = '["cut off'
    table, path = pa.Table.from_pylist(rows), tmp_path / f"battles{packed}"
    if packed == ".parquet":
        pq.write_table(table, path, row_group_size=70)
    elif packed == ".tsv":  # with quotes in cells that are not quoted
        lines = ["\t".join(table.column_names), "ragged", *map("\t".join, map(dict.values, rows))]
        path.write_text("\n".join(lines))
    elif packed == ".jsonl":
        path.write_text("no battle\n" + "".join(json.dumps(row) + "\n" for row in rows))
    else:
        text = io.BytesIO()
        pa_csv.write_csv(table, text)
        head, first, *rest = text.getvalue().splitlines(keepends=True)
        content = b"".join([head, first, b"ragged\n", *rest])
        path.write_bytes(gzip.compress(content) if packed.endswith(".gz") else content)
    raw = read_table(path)
    whole = convert(raw, Reading(), votes=False)
    expected = whole.battles.filter(pa.array(raw.faults.kept()[whole.row]))
    for module, name, value in (
        (columns, "ROWS_AT_ONCE", 16), (parquet_files, "ROWS_AT_ONCE", 16), (csv_files, "BLOCK", 999),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    output, contract = tmp_path / "out.parquet", make().judge.contract
    done = predict_files(contract, Said, str(path), Reading(), str(output), part=50)  # type: ignore[arg-type]
    lost = packed != ".parquet"
    assert (done.battles, done.refused) == (299, 1 + lost)
    found = pq.read_table(output)
    assert found.equals(expected.select(found.column_names))
    refused = pq.read_table(f"{output}.rejected.parquet").to_pylist()
    assert refused == raw.faults.lines("predict")
    assert refused[-1]["row"] == 132 + lost
    assert not list(tmp_path.glob("*.parts"))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_memory_does_not_depend_on_the_rows_of_a_file(
    kind: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, path = 1_000, tmp_path / f"battles.{kind}"
    answers = [f"{i} " * 500 for i in range(rows)]
    table = pa.table({"prompt": ["?"] * rows, "response_a": answers, "response_b": answers})
    (pq.write_table if kind == "parquet" else pa_csv.write_csv)(table, path)
    whole = table.nbytes
    del table, answers
    for module, name, value in (
        (columns, "ROWS_AT_ONCE", 16), (parquet_files, "ROWS_AT_ONCE", 16), (csv_files, "BLOCK", 1 << 16),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    before, most = pa.total_allocated_bytes(), [0]

    def ask(battles: pa.Table) -> Any:
        most.append(pa.total_allocated_bytes() - before)
        return Said(battles.select(["id"]))

    output, contract = str(tmp_path / "out.parquet"), make().judge.contract
    assert predict_files(contract, ask, str(path), Reading(), output, part=32).battles == rows
    assert max(most) < whole / 10, (max(most), whole)


def test_parts_of_other_files_or_another_judge_are_not_taken(
    make: Make, csv: Path, tmp_path: Path
) -> None:
    where, output = (str(csv), Reading()), str(tmp_path / "out.parquet")
    first = make().judge

    def fail(_: pa.Table) -> Any:
        raise KeyboardInterrupt

    def once(battles: pa.Table) -> Any:
        if (tmp_path / "out.parquet.parts/000000.parquet").exists():
            raise KeyboardInterrupt
        return first.predict(battles)

    with pytest.raises(KeyboardInterrupt):
        predict_files(first.contract, once, *where, output, part=3)
    other = make("qwen2").judge
    predict_files(other.contract, other.predict, *where, output, part=3)
    found = pq.read_table(output)
    assert len(found) == 10
    expected = other.compare("what is 0 ?", "one", "").probabilities
    assert found["winner_model_a"][0].as_py() == pytest.approx(expected["model_a"], abs=1e-5)


@pytest.mark.parametrize(
    "text",
    [
        b'{"id": "x", "prompt": "p", "response_a": "a", "response_b": "b"}\n',
        b'[{"id": "x", "prompt": "p", "response_a": "a", "response_b": "b"}]',
        b"id,prompt,response_a,response_b\nx,p,a,b\n",
    ],
    ids=["jsonl", "json", "csv"],
)
def test_battles_come_from_stdin_and_verdicts_go_to_stdout(
    text: bytes, make: Make, monkeypatch: pytest.MonkeyPatch, capfdbinary: Any
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    with io.TextIOWrapper(io.BytesIO()) as out:
        monkeypatch.setattr(sys, "stdout", out)
        predict(make(), "-", "-")
        out.flush()
        said = out.buffer.getvalue()  # type: ignore[attr-defined]
    table = pa_csv.read_csv(io.BytesIO(said))
    assert table["id"].to_pylist() == ["x"]
    assert table.column_names[:4] == ["id", *WINNERS]


def test_what_cannot_be_predicted_is_one_line(make: Make, csv: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"out\.txt: unknown kind of output; \.parquet, \.csv"):
        predict(make(), csv, tmp_path / "out.txt")
    with pytest.raises(InputError, match="no such file"):
        predict(make(), tmp_path / "nothing.csv", tmp_path / "out.csv")
    bad = tmp_path / "bad.csv"
    bad.write_text("prompt,response_a,response_b\np,a\n")
    with pytest.raises(InputError, match="no battle could be read"):
        predict(make(), bad, tmp_path / "out.csv")


def test_one_battle_on_the_command_line(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare-answers", str(make().folder), "--prompt", "p", "--a", "one", "--b", "two"]
    app(words, standalone_mode=False)
    said = json.loads(capsys.readouterr().out)
    expected = make().judge.compare("p", "one", "two")
    assert said["winner"] == expected.winner
    assert said["probabilities"] == pytest.approx(expected.probabilities, abs=1e-6)
