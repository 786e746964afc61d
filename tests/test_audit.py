"""The leak audit: it finds the near-duplicates that a comparison of all pairs finds, and counts leaks."""

from __future__ import annotations

import csv
import functools
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import DATA, ROOT, battles_table, made_up_battles
from hypothesis import given, settings
from hypothesis import strategies as st

from arena_distill.battles import audit as module
from arena_distill.battles import reading as raw
from arena_distill.battles.audit import COLUMNS, EXAMPLES, EXCERPT, number_answers, write_audit
from arena_distill.battles.folds import (
    assign_folds,
    dropped_extra,
    fold_settings,
    shared_prompts,
    training_rows,
    undivided_groups,
    validation_rows,
    write_folds,
)
from arena_distill.battles.prompts import distinct_prompts, normalised
from arena_distill.battles.similarity import (
    RECALL,
    SHINGLE,
    banding,
    jaccard,
    near_groups,
    near_pairs,
    recall,
)
from arena_distill.config.data import Audit
from arena_distill.config.phases.battles import AuditSettings, FoldsSettings
from arena_distill.config.phases.settings import VERSIONS, parse
from arena_distill.config.run import Config, load
from arena_distill.config.source import SOURCES
from arena_distill.errors import InputError
from arena_distill.files.artifacts import write_parquet

HOW: dict[str, Any] = {"threshold": 0.8, "permutations": 128, "seed": 2025}

LONG = "Explain to a child of nine, in no more than forty words, why the sea is salt"


def audit(battles: pa.Table, folds: pa.Table, **how: Any) -> Any:
    return module.audit(battles, number_answers([battles]), folds, **how)


# --- by comparing all pairs -------------------------------------------------------------------------


@functools.cache
def shingles(text: str) -> frozenset[str]:
    windows = range(max(len(text) - SHINGLE + 1, 1))
    return frozenset(text[i : i + SHINGLE] for i in windows if text)


def similarity(one: str, other: str) -> float:
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b) if a | b else 0.0


def all_pairs(texts: Sequence[str], threshold: float) -> dict[frozenset[str], float]:
    similar = {frozenset((a, b)): similarity(a, b) for a in texts for b in texts if a < b}
    return {pair: s for pair, s in similar.items() if s >= threshold}


def found_pairs(texts: Sequence[str], **how: Any) -> dict[frozenset[str], float]:
    found: dict[frozenset[str], float] = {}
    for first, second, similar in near_pairs(pa.array(texts, pa.string()), **HOW | how):
        assert (first < second).all()
        for i, j, s in zip(first, second, similar, strict=True):
            pair = frozenset((texts[i], texts[j]))
            assert pair not in found
            found[pair] = s
    return found


def edited(text: str, rng: np.random.Generator, edits: int) -> str:
    for place in rng.integers(0, len(text), edits):
        text = text[:place] + chr(int(rng.integers(97, 123))) + text[place + 1 :]
    return text


def prompts(seed: int = 0, n: int = 200, alphabet: str = "abcdefghijklmnop  ") -> list[str]:
    """Random texts, and variants of each with a similarity above and below 0.8."""
    rng = np.random.default_rng(seed)
    texts = ["".join(rng.choice(list(alphabet), rng.integers(6, 200))) for _ in range(n)]
    texts += [edited(text, rng, int(rng.integers(1, 4))) for text in texts for _ in range(4)]
    return list(dict.fromkeys(texts))


# --- near-duplicates --------------------------------------------------------------------------------

SCRIPTS = "abcdef éßñ の詩春天请写一首関西 жщыя ०१२हिन्दी 👩‍🚀🚀 \u0301\x00"


@given(
    st.lists(st.text(SCRIPTS, max_size=60), max_size=12, unique=True),
    st.sampled_from([0.5, 0.8, 1.0]),
)
def test_found_pairs_are_similar(texts: list[str], threshold: float) -> None:
    texts = list(dict.fromkeys([*texts, *(text + "!" for text in texts if text)]))
    expected = all_pairs(texts, threshold)
    found = found_pairs(texts, threshold=threshold)
    assert found.items() <= expected.items()
    # Well above the threshold nothing is missed, but by a chance of 1 in 10^15.
    assert {p for p, s in expected.items() if s >= (1 + threshold) / 2} <= found.keys()


@pytest.mark.parametrize("alphabet", ["abcdefghijklmnop  ", "春天的诗请写一首关于西湖"])
@pytest.mark.parametrize(("threshold", "permutations"), [(0.6, 128), (0.8, 64), (0.8, 128)])
def test_recall_is_at_least_the_promised_one(
    alphabet: str, threshold: float, permutations: int
) -> None:
    texts = prompts(1, 60, alphabet)
    expected = all_pairs(texts, threshold)
    found = found_pairs(texts, threshold=threshold, permutations=permutations)
    assert len(expected) > 150
    assert found.items() <= expected.items()
    assert len(found) >= 0.99 * len(expected)


@pytest.mark.parametrize("permutations", [64, 128, 500, 1024])
@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.95, 1.0])
def test_bands_keep_the_recall_and_are_no_shorter_than_needed(
    threshold: float, permutations: int
) -> None:
    bands, rows = banding(threshold, permutations)
    assert bands * rows <= permutations
    assert recall(threshold, bands, rows) >= RECALL
    if rows < permutations:
        assert recall(threshold, permutations // (rows + 1), rows + 1) < RECALL


def test_neither_order_nor_other_texts_change_the_pairs() -> None:
    texts = prompts(2, 60)
    found = found_pairs(texts)
    assert found_pairs(texts[::-1]) == found
    some = texts[::3]
    assert found_pairs(some) == {p: s for p, s in found.items() if p <= set(some)}


@pytest.mark.parametrize(
    ("one", "other", "near"),
    [
        (LONG, LONG + "?", True),
        (LONG, LONG.replace("nine", "ten"), True),
        (LONG, LONG.replace("sea", "sky").replace("salt", "blue"), False),
        ("write a poem", "write a poem.", True),
        ("请写一首关于春天的诗", "请写一首关于春天的诗。", True),
        ("请写一首关于春天的诗", "请写一首关于冬天的歌", False),
        ("напиши стихотворение о весне", "напиши стихотворение о весне!", True),
        ("वसंत के बारे में एक कविता लिखो", "वसंत के बारे में एक कविता लिखो।", True),
        ("เขียนบทกวีเกี่ยวกับฤดูใบไม้ผลิ", "เขียนบทกวีเกี่ยวกับฤดูหนาว", False),
        ("aaaaaaaa", "aaaaaaaaaaaa", True),
        ("abcd", "abcde", False),
        ("abcd", "abcd\x00", False),
        ("", "a", False),
    ],
)
def test_near_duplicates_are_found_in_every_script(one: str, other: str, near: bool) -> None:
    assert bool(found_pairs([one, other])) == near == (similarity(one, other) >= 0.8)


def test_empty_texts_have_no_similarity() -> None:
    assert found_pairs([]) == found_pairs([""]) == {}
    assert near_groups(pa.array([], pa.string()), **HOW).tolist() == []
    assert jaccard(pa.array(["", "x"]), np.array([0]), np.array([1])).tolist() == [0.0]


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_groups_are_connected_components(seed: int) -> None:
    texts = prompts(seed, 6)
    group = {text: {text} for text in texts}
    for pair in found_pairs(texts):
        joined = set().union(*(group[text] for text in pair))
        group |= dict.fromkeys(joined, joined)
    numbers = near_groups(pa.array(texts), **HOW)
    assert numbers.dtype == np.int64
    for i, text in enumerate(texts):
        assert {texts[j] for j in np.flatnonzero(numbers == numbers[i])} == group[text]
    assert set(numbers) == set(range(len({id(members) for members in group.values()})))


def test_prompts_of_one_template_are_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    # In pieces, as if there were many more.
    monkeypatch.setattr("arena_distill.battles.similarity.PAIRS", 1000)
    monkeypatch.setattr("arena_distill.battles.similarity.SHINGLES", 20_000)
    texts = pa.array([f"{LONG}? {number}" for number in range(100, 300)])
    assert near_groups(texts, **HOW).max() == 0
    pairs = list(near_pairs(texts, **HOW))
    assert len(pairs) > 10
    assert sum(len(first) for first, _, _ in pairs) == 200 * 199 / 2


# --- leaks ------------------------------------------------------------------------------------------


def clean(n: int = 12) -> list[dict[str, Any]]:
    """Battles of all sources, no two of them alike."""
    rng = np.random.default_rng(4)
    rows = []
    for source in ("train", "extra", "ut", "test"):
        for i in range(n):
            texts = ["".join(rng.choice(list("abcdefghijkl "), 50)) for _ in range(3)]
            fields = dict(zip(("prompt", "response_a", "response_b"), texts, strict=True))
            rows.append({"id": f"{i}", "source": source, "label": i % 3, **fields})
    return rows


def audited(rows: Sequence[dict[str, Any]], method: Any = "kfold", **how: Any) -> dict[str, Any]:
    battles = battles_table(rows)
    folds = assign_folds(battles, method=method, n=3, seed=0)
    return audit(battles, folds, **HOW | how)


def leaks(figures: dict[str, Any]) -> dict[tuple[str, str], tuple[int, int, int]]:
    """(same, near, answers) of the relations that have any."""
    counts = {
        (r["of"], r["among"]): (r["same"], r["near"], r["answers"]) for r in figures["relations"]
    }
    return {names: count for names, count in counts.items() if any(count)}


def test_clean_battles_leak_nothing() -> None:
    figures = audited(clean())
    assert leaks(figures) == {}
    assert figures["examples"] == []
    assert figures["prompts"] == 48
    battles = {(r["of"], r["among"]): r["battles"] for r in figures["relations"]}
    assert battles == {
        **{(f"fold {fold}", "its training"): 4 for fold in range(3)},
        ("test", "train"): 12,
        ("test", "extra"): 12,
        ("test", "ut"): 12,
        ("train", "extra"): 12,
        ("train", "ut"): 12,
    }


@pytest.mark.parametrize("answer", [False, True])
@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize(
    ("of", "among"),
    [("test", "train"), ("test", "extra"), ("test", "ut"), ("train", "extra"), ("train", "ut")],
)
def test_an_injected_leak_is_found(of: str, among: str, near: bool, answer: bool) -> None:
    rows = clean()
    victim = next(row for row in rows if row["source"] == of)
    copy = next(row for row in rows if row["source"] == among)
    copy["prompt"] = victim["prompt"] + "?" if near else victim["prompt"].upper()
    if answer:
        copy["response_b"] = f" {victim['response_a']}\n"
    figures = audited(rows)
    expected = (int(not near), int(near), int(answer))
    found = leaks(figures)
    assert found.pop((of, among)) == expected
    if (of, among) == ("train", "extra"):  # extra battles train every fold
        (fold,) = found
        assert found.pop(fold) == expected
    assert found == {}
    example = figures["examples"][-1]
    assert (example["of"], example["among"]) == (of, among)
    assert example["kind"] == ("near" if near else "same")
    assert example["answer"] == answer
    assert (example["source"], example["id"]) == (of, victim["id"])
    assert (example["other_source"], example["other_id"]) == (among, copy["id"])
    assert example["similarity"] == round(
        similarity(normalised(victim["prompt"]), normalised(copy["prompt"])), 4
    )


@pytest.mark.parametrize("near", [False, True])
def test_an_injected_leak_between_folds_is_found(near: bool) -> None:
    rows = clean()
    fold = {
        row["id"]: row["fold"] for row in folds_of(rows).to_pylist() if row["source"] == "train"
    }
    train = [row for row in rows if row["source"] == "train"]
    victim = train[0]
    copy = next(row for row in train if fold[row["id"]] != fold[victim["id"]])
    twin = next(row for row in train[1:] if fold[row["id"]] == fold[victim["id"]])
    copy["prompt"] = twin["prompt"] = victim["prompt"] + "?" * near
    copy["response_a"] = victim["response_a"]
    expected = {
        (f"fold {fold[victim['id']]}", "its training"): (1, 1, 1) if near else (2, 0, 1),
        (f"fold {fold[copy['id']]}", "its training"): (1, 0, 1),
    }
    assert leaks(audited(rows)) == expected


def folds_of(rows: Sequence[dict[str, Any]]) -> pa.Table:
    return assign_folds(battles_table(rows), method="kfold", n=3, seed=0)


def test_leaks_within_a_side_are_none() -> None:
    rows = clean()
    for source in ("test", "extra", "ut"):
        mine = [row for row in rows if row["source"] == source]
        mine[0]["prompt"] = mine[1]["prompt"]
        mine[2]["prompt"] = mine[1]["prompt"] + "?"
    assert leaks(audited(rows)) == {}


POEM = "请写一首关于春天的诗"
PROMPTS = ["", "hi", "Hi ", LONG, LONG + "?", LONG + "!!", POEM, POEM + "。"]
ROW = st.fixed_dictionaries(
    {
        "source": st.sampled_from(["train", "extra", "ut", "test"]),
        "prompt": st.sampled_from(PROMPTS),
        "response_a": st.sampled_from(["", "yes", " YES", "no"]),
        "response_b": st.sampled_from(["maybe", "no"]),
    }
)


@settings(max_examples=60)
@given(st.lists(ROW, max_size=14), st.randoms(use_true_random=False))
def test_counts_are_those_of_looking_at_every_two_battles(
    drawn: list[dict[str, Any]], chance: Any
) -> None:
    start = [{"source": "train", "prompt": LONG}, {"source": "train", "prompt": "hi"}]
    rows = [{"id": f"{i}", "label": 0, **row} for i, row in enumerate([*start, *drawn])]
    battles = battles_table(rows)
    folds = assign_folds(battles, method="kfold", n=2, seed=0)
    figures = audit(battles, folds, **HOW)
    keys = [(row["source"], row["id"]) for row in folds.select(["source", "id"]).to_pylist()]
    sides = {source: [r for r in rows if r["source"] == source] for source in SOURCES}
    for fold in (0, 1):
        for name, chosen in (("fold", validation_rows), ("training", training_rows)):
            mine = {keys[position] for position in chosen(folds, fold)}
            sides[f"{name} {fold}"] = [r for r in rows if (r["source"], r["id"]) in mine]
    for relation in figures["relations"]:
        fold = relation["of"][-1]
        among = f"training {fold}" if relation["among"] == "its training" else relation["among"]
        assert relation == counted(relation["of"], relation["among"], sides, among)
    order = list(range(len(rows)))
    chance.shuffle(order)
    assert audit(battles.take(order), folds.take(list(range(len(folds)))[::-1]), **HOW) == figures


def counted(of: str, name: str, sides: dict[str, list[dict[str, Any]]], among: str) -> Any:
    """The figures of a relation, battle by battle."""

    def answers(row: dict[str, Any]) -> set[str]:
        return {normalised(row.get(f"response_{x}", y)) for x, y in (("a", "x"), ("b", "y"))}

    same = near = shared = 0
    for row in sides[of]:
        prompt = normalised(row["prompt"])
        alike = [
            (other, normalised(other["prompt"]) == prompt)
            for other in sides[among]
            if normalised(other["prompt"]) == prompt
            or similarity(normalised(other["prompt"]), prompt) >= HOW["threshold"]
        ]
        is_same = any(equal for _, equal in alike)
        same += is_same
        near += bool(alike) and not is_same
        shared += any(answers(row) & answers(other) for other, _ in alike)
    counts = {"battles": len(sides[of]), "same": same, "near": near, "answers": shared}
    return {"of": of, "among": name, **counts}


def test_a_prompt_of_thousands_of_battles_is_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def counted(texts: pa.StringArray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        compared.append(len(first))
        return jaccard(texts, first, second)

    monkeypatch.setattr("arena_distill.battles.similarity.jaccard", counted)
    hot = [
        {
            "id": f"hot {i}",
            "source": ("train", "test")[i % 2],
            "prompt": (LONG, LONG + "?")[i % 3 == 0],
            "response_a": f"answer {i}",
            "response_b": f"answer {i // 2}",
        }
        for i in range(6000)
    ]
    figures = audited([*clean(), *hot])
    assert sum(compared) < 1000, "every two of them would be 9 million"
    counts = next(r for r in figures["relations"] if r["of"] == "test" and r["among"] == "train")
    assert counts["same"] == 3000
    assert counts["near"] == 0
    assert counts["answers"] == 3000
    assert len(figures["examples"]) <= 2 * EXAMPLES * len(figures["relations"])


def test_same_prompts_across_folds_are_what_the_folds_count() -> None:
    battles = made_up_battles(train=60, extra=20)
    folds = assign_folds(battles, method="stratified", n=3, seed=1)
    counts = audit(battles, folds, **HOW)["relations"][:3]
    assert [c["same"] for c in counts] == [shared_prompts(folds, fold) for fold in range(3)]


def test_examples_are_the_worst_and_show_where_prompts_differ() -> None:
    rows = clean(8)
    test, train = ([r for r in rows if r["source"] == s] for s in ("test", "train"))
    for i, (one, other) in enumerate(zip(test, train, strict=True)):
        one["prompt"] = f"{i}{i}{i} {LONG * (i + 1)}"
        other["prompt"] = f"{one['prompt']} {i} \u202e\x07"
    test[0]["response_a"] = train[0]["response_b"]
    figures = audited(rows)
    shown = [e for e in figures["examples"] if e["of"] == "test"]
    assert len(shown) == EXAMPLES
    assert [e["answer"] for e in shown] == [True] + [False] * (EXAMPLES - 1)
    assert shown[0]["id"] == test[0]["id"]
    rest = [e["similarity"] for e in shown[1:]]
    assert rest == sorted(rest, reverse=True)
    for example in shown:
        assert example["prompt"] != example["other_prompt"]
        for name in ("prompt", "other_prompt"):
            assert example[name].strip("…").isprintable()
            assert len(example[name]) <= EXCERPT + 2


# --- folds that keep near-duplicates together -------------------------------------------------------


def near_battles(seed: int) -> pa.Table:
    texts = prompts(seed, 12)
    rng = np.random.default_rng(seed)
    return battles_table(
        [
            {"source": ("train", "extra")[i % 5 == 0], "prompt": text, "label": int(label)}
            for i, (text, label) in enumerate(
                zip(texts, rng.integers(0, 3, len(texts)), strict=True)
            )
        ]
    )


@pytest.mark.parametrize("seed", range(3))
def test_near_duplicates_stay_in_one_fold(seed: int) -> None:
    battles = near_battles(seed)
    by_prompt = assign_folds(battles, method="stratified_group", n=3, seed=0)
    by_near = assign_folds(battles, method="stratified_group", n=3, seed=0, near=HOW)
    assert any(r["near"] for r in audit(battles, by_prompt, **HOW)["relations"])
    assert not {of for of, _ in leaks(audit(battles, by_near, **HOW))} - {"train"}
    texts = [normalised(prompt[0]) for prompt in battles["prompt"].to_pylist()]
    for fold in range(3):
        trained = [texts[i] for i in training_rows(by_near, fold)]
        for i in validation_rows(by_near, fold):
            assert all(similarity(texts[i], other) < 0.8 for other in trained)
    assert sum(dropped_extra(by_near, fold) for fold in range(3)) > 0
    assert fold_settings(by_near)["near_duplicates"] == HOW


def test_folds_know_near_duplicates_by_the_number_of_the_first() -> None:
    rows = [{"prompt": p, "label": i % 3} for i, p in enumerate([*"abcdef", LONG, "g", LONG + "?"])]
    battles = battles_table([{"source": "ut", "prompt": "before"}, *rows])
    folds = assign_folds(battles, method="stratified_group", n=2, seed=0, near=HOW)
    assert folds["group"].to_pylist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert undivided_groups(folds).tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 7]
    assert distinct_prompts(battles)[1][7].as_py() == LONG.casefold()


def test_what_is_held_out_for_choices_is_audited_as_well() -> None:
    battles = near_battles(1)
    how: dict[str, Any] = {"method": "stratified_group", "n": 3, "seed": 0, "holdout": 0.2}
    names = ("held out", "any training")
    assert leaks(audit(battles, assign_folds(battles, **how), **HOW))[names][1] > 0
    figures = audit(battles, assign_folds(battles, **how, near=HOW), **HOW)
    assert names not in leaks(figures)
    assert sum((r["of"], r["among"]) == names for r in figures["relations"]) == 1


def test_what_links_prompts_of_other_sources_is_no_leak() -> None:
    chain = [LONG + "?" * n for n in range(40)]
    rows = [{"source": "test", "prompt": text} for text in chain[1:-1]]
    rows += [
        {"prompt": text, "label": i % 3} for i, text in enumerate([chain[0], chain[-1], *"abc"])
    ]
    assert similarity(chain[0], chain[-1]) < 0.95
    how = HOW | {"threshold": 0.95}
    folds = assign_folds(battles_table(rows), method="kfold", n=2, seed=0, near=how)
    assert len(set(undivided_groups(folds))) == 5


# --- files and settings -----------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    battles = made_up_battles(train=60, extra=20, test=9)
    write_parquet(battles, tmp_path / "battles.parquet", {})
    chosen = FoldsSettings(version=1, n=3, seed=0)
    write_folds(tmp_path / "battles.parquet", tmp_path / "folds.parquet", settings=chosen)
    return tmp_path / "battles.parquet", tmp_path / "folds.parquet"


def test_files_hold_figures_and_examples(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = AuditSettings(version=1)
    for name in ("a", "b"):
        write_audit(*files, tmp_path / f"{name}.json", tmp_path / f"{name}.csv", settings=chosen)
    for kind in ("json", "csv"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()
    figures = json.loads((tmp_path / "a.json").read_text())
    assert figures["provenance"]["settings"] == chosen.model_dump()
    assert "rensa" in figures["provenance"]["versions"]
    assert leaks(figures)["train", "extra"][0] == 15  # the turns of the others differ
    rows = list(csv.DictReader(io.StringIO((tmp_path / "a.csv").read_text())))
    assert list(rows[0]) == list(COLUMNS)
    assert [row["id"] for row in rows] == [example["id"] for example in figures["examples"]]
    assert "train among extra: of 60 battles, 15 have the same prompt" in capsys.readouterr().out


def test_folds_of_other_battles_are_an_input_error(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    write_parquet(made_up_battles(train=6), tmp_path / "battles.parquet", {})
    with pytest.raises(InputError, match="rows are missing"):
        write_audit(
            *files, tmp_path / "a.json", tmp_path / "a.csv", settings=AuditSettings(version=1)
        )


def test_the_command_line_audits(files: tuple[Path, Path], tmp_path: Path) -> None:
    battles, folds = map(str, files)
    command = [sys.executable, "-m", "arena_distill", "phase", "audit-leaks", "--battles", battles]
    command += ["--folds", folds, "--output", str(tmp_path / "audit.json")]
    command += ["--table", str(tmp_path / "leaks.csv"), "--settings", '{"version": 1}']
    subprocess.run(command, check=True, env={"PYTHONPATH": str(ROOT / "workflow")})
    assert (tmp_path / "audit.json").is_file()
    assert (tmp_path / "leaks.csv").is_file()


def test_only_the_job_imports_the_library() -> None:
    modules = ("battles.audit", "battles.folds", "evaluation.report")
    program = f"import sys, {', '.join(f'arena_distill.{name}' for name in modules)}\n"
    program += "assert not {'rensa', 'scipy', 'pandas'} & set(sys.modules)"
    environment = {"PYTHONPATH": str(ROOT / "workflow")}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def config(**changes: Any) -> Config:
    judges = {"l": {"backbone": {"tiny": "llama"}}}
    files = {"train": "train.csv", "test": "test.csv"}
    return load({"data": files, "judges": judges, "final": "l", **changes})


def test_near_duplicates_need_folds_by_prompt() -> None:
    with pytest.raises(
        InputError, match="folds: near_duplicates .* set `method: stratified_group`"
    ):
        config(folds={"near_duplicates": True})
    with pytest.raises(InputError, match="audit.threshold"):
        config(audit={"threshold": 0.2})


def test_the_audit_reaches_the_folds_only_where_they_use_it() -> None:
    def folds(**audit: Any) -> str:
        chosen = {"method": "stratified_group", "near_duplicates": used}
        return FoldsSettings.of(config(folds=chosen, audit=audit)).as_params()

    used = False
    assert folds() == folds(threshold=0.9)
    assert json.loads(folds()) == {"version": VERSIONS["folds"], "method": "stratified_group"}
    used = True
    assert folds() != folds(threshold=0.9)
    assert parse(FoldsSettings, folds()).audit == Audit()


def test_folds_are_assigned_by_the_settings(tmp_path: Path) -> None:
    battles = near_battles(0)
    write_parquet(battles, tmp_path / "battles.parquet", {})
    chosen = config(folds={"method": "stratified_group", "n": 3, "near_duplicates": True})
    chosen_folds = FoldsSettings.of(chosen)
    write_folds(tmp_path / "battles.parquet", tmp_path / "folds.parquet", settings=chosen_folds)
    expected = assign_folds(battles, method="stratified_group", n=3, seed=42, near=HOW)
    written = pa.parquet.read_table(tmp_path / "folds.parquet")
    assert written.to_pylist() == expected.to_pylist()


# --- real battles -----------------------------------------------------------------------------------


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real battles in {DATA}")
def test_real_battles() -> None:
    sources = ("train", "extra", "ut", "test")
    battles, _ = raw.read_battles({s: [DATA / f"{s}.csv"] for s in sources})
    folds = assign_folds(battles, method="stratified_group", n=5, seed=42)
    figures = audit(battles, folds, **HOW)
    assert leaks(figures)["test", "train"] == (1, 5, 0)
    folded = [r for r in figures["relations"] if r["among"] == "its training"]
    assert sum(r["same"] for r in folded) == 0
    assert sum(r["near"] for r in folded) > 0
    kept = assign_folds(battles, method="stratified_group", n=5, seed=42, near=HOW)
    assert not any(of.startswith("fold") for of, _ in leaks(audit(battles, kept, **HOW)))
