"""Published shapes of preferences → canonical battles: a made-up row or two in the schema of each set."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arena_distill.battles.formats.conversion import FORMATS, Converted, convert
from arena_distill.battles.formats.graded import VOTES
from arena_distill.cli import formats
from arena_distill.config.source import Reading
from arena_distill.errors import InputError
from arena_distill.files.raw_tables import RawTable
from arena_distill.files.readers import read_table

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no files in {DATA}")

Row = dict[str, Any]
A, B, TIE = [1, 0, 0], [0, 1, 0], [0, 0, 1]


def write(path: Path, rows: list[Row]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def understood(
    path: Path, rows: list[Row], *, votes: bool = True, **keys: Any
) -> tuple[Converted, RawTable]:
    raw = read_table(write(path, rows))
    return convert(raw, Reading(**keys), votes=votes), raw


def read(path: Path, rows: list[Row], **keys: Any) -> list[Row]:
    """The battles of rows of which none is refused."""
    found, raw = understood(path, rows, **keys)
    assert not raw.faults.found
    found.battles.validate(full=True)
    battles = found.battles.to_pylist()
    for battle, vote, weight in zip(battles, found.vote, found.weight, strict=True):
        battle |= {"vote": vote.round(4).tolist(), "weight": round(float(weight), 4)}
        for name in ("model_a", "model_b", "language", "category", "id"):
            if battle[name] is None or battle[name].startswith("row"):
                del battle[name]
    return battles


def reasons(path: Path, rows: list[Row], **keys: Any) -> list[tuple[int, str, str]]:
    """Of every refused row: its position, column and reason."""
    _, raw = understood(path, rows, **keys)
    return [(position, *fault) for position, fault in sorted(raw.faults.found.items())]


def user(text: Any) -> Row:
    return {"role": "user", "content": text}


def assistant(text: Any) -> Row:
    return {"role": "assistant", "content": text}


def system(text: Any) -> Row:
    return {"role": "system", "content": text}


def parts(*messages: Row) -> list[Row]:
    """Messages as arena-human-preference-140k has them."""
    empty = {"image": None, "mimeType": None}
    return [m | {"content": [{"type": "text", "text": m["content"], **empty}]} for m in messages]


# --- votes on two answers -------------------------------------------------------------------------

CHAT = {"a": [user("q"), assistant("x")], "b": [user("q"), assistant("y")]}
LONG = [user("q"), assistant("x"), user("r"), assistant("z")]

VOTED: dict[str, tuple[str, Row, Row, list[int]]] = {
    # name → format, a row as published, what it is beside prompt q, answers x and y, its vote
    "kaggle": (
        "battles",
        {"id": 3, "model_a": "m", "model_b": "n", "prompt": '["q"]', "response_a": '["x"]',
         "response_b": '["y"]', "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0},
        {"id": "3", "model_a": "m", "model_b": "n"},
        B,
    ),
    "wsdm": (
        "battles",
        {"id": "f", "prompt": "q", "response_a": "x", "response_b": "y", "winner": "model_b",
         "model_a": "m", "model_b": "n", "language": "English"},
        {"id": "f", "model_a": "m", "model_b": "n", "language": "English"},
        B,
    ),
    "ppe": (
        "battles",
        {"question_id": "f", "prompt": "q", "response_1": "x", "response_2": "y", "winner": "model_a",
         "model_a": "m", "model_b": "n"},
        {"id": "f", "model_a": "m", "model_b": "n"},
        A,
    ),
    "pku-saferlhf": (
        "battles",
        {"prompt": "q", "response_0": "x", "response_1": "y", "better_response_id": 1,
         "safer_response_id": 0},
        {},
        B,
    ),
    "llmbar": ("battles", {"input": "q", "output_1": "x", "output_2": "y", "label": 1}, {}, A),
    "judgebench": (
        "battles",
        {"pair_id": "f", "source": "mmlu", "question": "q", "response_A": "x", "response_B": "y",
         "label": "B>A"},
        {"id": "f", "category": "mmlu"},
        B,
    ),
    "arena-33k": (
        "conversations",
        {"question_id": "f", "model_a": "m", "model_b": "n", "winner": "tie (bothbad)", "judge": "j",
         "conversation_a": CHAT["a"], "conversation_b": CHAT["b"], "turn": 1, "language": "English"},
        {"id": "f", "model_a": "m", "model_b": "n", "language": "English"},
        TIE,
    ),
    "arena-140k": (
        "conversations",
        {"id": "f", "evaluation_session_id": "s", "evaluation_order": 1, "winner": "both_bad",
         "conversation_a": parts(*CHAT["a"]), "conversation_b": parts(*CHAT["b"]),
         "category_tag": {"creative": True}, "language": "en", "is_code": False},
        {"id": "f", "language": "en"},
        TIE,
    ),
    "expert-5k": (
        "conversations",
        {"id": "f", "winner": "model_a", "conversation_a": json.dumps(parts(*CHAT["a"])),
         "conversation_b": json.dumps(parts(*CHAT["b"]))},
        {"id": "f"},
        A,
    ),
    "search-arena": (
        "conversations",
        {"model_a": "m", "model_b": "n", "winner": "model_a", "messages_a": CHAT["a"],
         "messages_b": CHAT["b"], "system_a_metadata": {"web": True}},
        {"model_a": "m", "model_b": "n"},
        A,
    ),
    "compar-ia": (
        "conversations",
        {"conversation_pair_id": "f", "model_a_name": "m", "model_b_name": "n",
         "chosen_model_name": "n", "both_equal": False, "conversation_a": CHAT["a"],
         "conversation_b": CHAT["b"]},
        {"id": "f", "model_a": "m", "model_b": "n"},
        B,
    ),
    "compar-ia-equal": (
        "conversations",
        {"model_a_name": "m", "model_b_name": "n", "chosen_model_name": None, "both_equal": True,
         "conversation_a": CHAT["a"], "conversation_b": CHAT["b"]},
        {"model_a": "m", "model_b": "n"},
        TIE,
    ),
    "mt-bench": (
        "conversations",
        {"question_id": 81, "model_a": "m", "model_b": "n", "winner": "model_a", "judge": "expert_1",
         "conversation_a": LONG, "conversation_b": [*CHAT["b"], *LONG[2:]], "turn": 1},
        {"id": "81", "model_a": "m", "model_b": "n"},
        A,
    ),
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", VOTED)
def test_votes_on_two_answers(tmp_path: Path, name: str, suffix: str) -> None:
    shape, row, rest, vote = VOTED[name]
    path = tmp_path / f"t.{suffix}"
    expected = {
        "prompt": ["q"],
        "response_a": ["x"],
        "response_b": ["y"],
        "vote": vote,
        "weight": 1,
    }
    assert read(path, [row]) == [expected | rest]
    found, _ = understood(path, [row])
    assert found.format == shape
    without, _ = understood(path, [row], votes=False)
    assert without.battles.equals(found.battles) and np.isnan(without.vote).all()


def test_repeated_questions_of_several_judges_are_votes_of_their_own(tmp_path: Path) -> None:
    _, row, _, _ = VOTED["mt-bench"]
    rows = [row, row | {"judge": "expert_2"}, row | {"turn": 2}]
    one, two, later = read(tmp_path / "t.parquet", rows)
    assert [b["id"] for b in (one, two)] == ["81-m-n-1-expert_1", "81-m-n-1-expert_2"]
    assert later["prompt"] == ["q", "r"] and later["response_b"] == ["y", "z"]


@pytest.mark.parametrize("grade", VOTES)
@pytest.mark.parametrize("steer", ["3", "2"])
def test_grades(tmp_path: Path, grade: int, steer: str) -> None:
    context = [user("q"), assistant("p"), user("r")]
    rows = {
        "3": {"domain": "code", "language": "c", "context": context, "response1": "x",
              "response2": "y", "overall_preference": grade},
        "2": {"prompt": "q", "response_1": "x", "response_2": "y", "preference_strength": grade},
    }  # fmt: skip
    (battle,) = read(tmp_path / "t.jsonl", [rows[steer]])
    assert battle["vote"] == pytest.approx(list(VOTES[grade]))
    if steer == "3":
        assert battle["prompt"] == ["q", "r"] and battle["category"] == "code"
        assert (battle["response_a"], battle["response_b"]) == (["p", "x"], ["p", "y"])
    assert np.argmax(VOTES[grade]) == (2 if grade == 0 else int(grade > 0))


def test_grades_are_symmetric_and_others_are_refused(tmp_path: Path) -> None:
    assert all(round(sum(vote), 9) == 1 for vote in VOTES.values())
    assert all(VOTES[-g] == (b, a, tie) for g, (a, b, tie) in VOTES.items())
    row = {"prompt": "q", "response_1": "x", "response_2": "y"}
    rows = [row | {"preference_strength": g} for g in (-100, "much", None, 1.5)]
    assert [reason.split(",")[0] for _, _, reason in reasons(tmp_path / "t.jsonl", rows)] == [
        "unexpected: '-100'", "unexpected: 'much'", "no vote; to keep such rows: `missing_votes: keep`",
        "unexpected: '1.5'",
    ]  # fmt: skip


def of_annotators(*grades: Any, **more: Any) -> Row:
    """A row as HelpSteer3 publishes it."""
    each = [{"score": grade, "reasoning": "r", "feedback1": "f"} for grade in grades]
    row = {
        "domain": "code",
        "language": "c",
        "context": [user("q")],
        "response1": "x",
        "response2": "y",
    }
    return row | {"overall_preference": -1, "individual_preference": each} | more


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_grades_of_several_annotators_are_shares_when_asked(tmp_path: Path, suffix: str) -> None:
    rows = [of_annotators(-2, -1, 1), of_annotators(3), of_annotators()]
    path = tmp_path / f"t.{suffix}"
    merged = read(path, rows, annotators="merge")
    mean = np.mean([VOTES[-2], VOTES[-1], VOTES[1]], axis=0)
    assert [b["vote"] for b in merged] == [mean.round(4).tolist(), list(VOTES[3]), list(VOTES[-1])]
    assert [b["weight"] for b in merged] == [3, 1, 1]
    kept = read(path, rows)
    assert [(b["vote"], b["weight"]) for b in kept] == [(list(VOTES[-1]), 1)] * 3
    named = [{**row, "grades": row.pop("individual_preference")} for row in map(dict, rows)]
    assert read(path, named, annotators="merge") == merged
    _, raw = understood(path, rows, annotators="merge", votes=False)
    assert not raw.faults.found


def test_a_grade_of_an_annotator_that_is_none_is_refused(tmp_path: Path) -> None:
    rows = [
        *(of_annotators(1, grade) for grade in (4, 0.5, "much", None, [1])),
        *(of_annotators(individual_preference=cell) for cell in ("[1]", {"score": 1}, None)),
        of_annotators(1, overall_preference=7),
    ]
    found = reasons(tmp_path / "t.jsonl", rows, annotators="merge")
    assert [(row, column) for row, column, _ in found] == [
        *((row, "individual_preference") for row in range(7)), (8, "overall_preference"),
    ]  # fmt: skip
    assert found[0][2] == "a list with a `score` from -3 to 3 of each annotator expected"


# --- chosen and rejected --------------------------------------------------------------------------

PREFERRED: dict[str, tuple[Row, list[str], list[str], list[str]]] = {
    # name → a row as published, its prompt, chosen and rejected turns
    "trl-explicit-text": ({"prompt": "q", "chosen": "x", "rejected": "y"}, ["q"], ["x"], ["y"]),
    "trl-implicit-text": (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        ["The sky is"], [" blue."], [" green."],
    ),
    "trl-explicit-chat": (
        {"prompt": [user("q")], "chosen": [assistant("x")], "rejected": [assistant("y")]},
        ["q"], ["x"], ["y"],
    ),
    "trl-implicit-chat": ({"chosen": CHAT["a"], "rejected": CHAT["b"]}, ["q"], ["x"], ["y"]),
    "hh-rlhf": (
        {"chosen": "\n\nHuman: q\n\nAssistant: p\n\nHuman: r\n\nAssistant: x",
         "rejected": "\n\nHuman: q\n\nAssistant: p\n\nHuman: r\n\nAssistant: y"},
        ["q", "r"], ["p", "x"], ["p", "y"],
    ),
    "skywork": ({"chosen": CHAT["a"], "rejected": CHAT["b"], "source": "s"}, ["q"], ["x"], ["y"]),
    "ultrafeedback-binarised": (
        {"prompt": "q", "prompt_id": "f", "chosen": CHAT["a"], "rejected": CHAT["b"],
         "messages": CHAT["a"], "score_chosen": 8.5, "score_rejected": 7.0},
        ["q"], ["x"], ["y"],
    ),
    "orpo-dpo-mix": (
        {"source": "s", "prompt": "q", "chosen": [system("s"), *CHAT["a"]],
         "rejected": [system("s"), *CHAT["b"]]},
        ["s", "q"], ["x"], ["y"],
    ),
    "orca-pairs": (
        {"system": "s", "question": "q", "chosen": "x", "rejected": "y"}, ["s", "q"], ["x"], ["y"],
    ),
    "reward-bench": (
        {"prompt": "q", "chosen": "x", "chosen_model": "m", "rejected": "y", "rejected_model": "n",
         "subset": "hep-cpp", "id": 7},
        ["q"], ["x"], ["y"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", PREFERRED)
def test_chosen_and_rejected(tmp_path: Path, name: str, suffix: str) -> None:
    row, prompt, chosen, rejected = PREFERRED[name]
    (battle,) = read(tmp_path / f"t.{suffix}", [row])
    assert battle["prompt"] == prompt and battle["vote"] in (A, B)
    sides = [battle["response_a"], battle["response_b"]]
    assert sides == ([chosen, rejected] if battle["vote"] == A else [rejected, chosen])
    if name == "reward-bench":
        models = [battle["model_a"], battle["model_b"]]
        assert models == (["m", "n"] if battle["vote"] == A else ["n", "m"])
        assert (battle["id"], battle["category"]) == ("7", "hep-cpp")
    found, _ = understood(tmp_path / f"t.{suffix}", [row])
    assert found.format == "chosen_rejected"


def test_sides_are_dealt_by_the_texts_whichever_was_chosen(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(2000)]
    battles = read(tmp_path / "t.jsonl", rows)
    assert 900 < sum(battle["vote"] == A for battle in battles) < 1100
    assert read(tmp_path / "r.jsonl", rows[::-1]) == battles[::-1]
    other = [{"prompt": r["prompt"], "chosen": "no", "rejected": "yes"} for r in rows]
    for one, two in zip(battles, read(tmp_path / "o.jsonl", other), strict=True):
        assert one["response_a"] == two["response_a"] and one["vote"] == two["vote"][1::-1] + [0]
    same = [{"prompt": f"q{i}", "chosen": "x", "rejected": "x"} for i in range(200)]
    assert 50 < sum(b["vote"] == A for b in read(tmp_path / "s.jsonl", same)) < 150


def test_margins_are_rewards_and_equal_scores_are_ties(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": "x", "rejected": "y"}
    margins = [row | {"margin": m} for m in (0, 2.0, None)]
    shares = [max(battle["vote"]) for battle in read(tmp_path / "t.jsonl", margins)]
    assert shares == [0.5, round(1 / (1 + np.exp(-2)), 4), 1]
    scores = [row | {"score_chosen": c, "score_rejected": 5} for c in (5, None)]
    assert read(tmp_path / "t.jsonl", scores)[0]["vote"] == TIE
    assert read(tmp_path / "t.jsonl", scores)[1]["vote"] in (A, B)
    ((_, column, reason),) = reasons(tmp_path / "t.jsonl", [scores[0] | {"score_chosen": 4}])
    assert column == "score_chosen" and reason.startswith("lower than")


# --- several answers ------------------------------------------------------------------------------


def winners(battles: list[Row]) -> list[str]:
    """Of each battle "winner>loser", or "one=other" in alphabetical order."""
    lines = []
    for battle in battles:
        a, b = battle["response_a"][0], battle["response_b"][0]
        sign = {0: (a, ">", b), 1: (b, ">", a), 2: (min(a, b), "=", max(a, b))}
        lines.append("".join(sign[int(np.argmax(battle["vote"]))]))
    return lines


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rated_answers(tmp_path: Path, suffix: str) -> None:
    rated = [("x", 4.5), ("y", 2.0), ("z", 4.5), ("w", None)]
    completions = [
        {"model": f"m-{text}", "response": text, "fine-grained_score": score, "overall_score": 1.0,
         "annotations": {"honesty": {"Rating": "N/A"}}}
        for text, score in rated
    ]  # fmt: skip
    completions[3]["overall_score"] = None
    rows = [
        {"instruction": "p", "completions": completions[:2]},
        {"instruction": "q", "completions": completions},
    ]
    first, *battles = read(tmp_path / f"t.{suffix}", rows)
    assert winners([first]) == ["x>y"] and first["weight"] == 1
    assert winners(battles) == ["x>y", "x=z", "z>y"]
    assert [battle["weight"] for battle in battles] == [round(2 / 3, 4)] * 3
    assert all(battle["model_a"] == f"m-{battle['response_a'][0]}" for battle in battles)
    rows[1]["completions"] = [{"response": "x", "annotations": {"a": {"Rating": r}}} for r in "53"]
    assert winners(read(tmp_path / "t.jsonl", rows[1:])) == ["x>x"]
    ((_, _, reason),) = reasons(
        tmp_path / "t.jsonl", [rows[0], {"instruction": "q", "completions": completions[2:]}]
    )
    assert reason.startswith("fewer than two answers")


def test_one_pair_of_each_row(tmp_path: Path) -> None:
    """The texts choose it, wherever a row stands; each pair as often as any other."""
    rows = [
        {"instruction": f"p{i}", "completions": [
            {"model": str(rating), "response": f"{i} {rating}", "score": rating}
            for rating in (1, 2, 3, 3.5)[: 1 + i % 4]
        ]}
        for i in range(4000)
    ]  # fmt: skip
    rows = [row for row in rows if len(row["completions"]) > 1]
    every = read(tmp_path / "t.jsonl", rows)
    one = read(tmp_path / "t.jsonl", rows, pairs="one")
    assert [battle["prompt"] for battle in one] == [[row["instruction"]] for row in rows]
    assert {battle["weight"] for battle in one} == {1}
    known = {(b["prompt"][0], b["model_a"], b["model_b"]): b["vote"] for b in every}
    drawn = {key: b["vote"] for b in one if (key := (b["prompt"][0], b["model_a"], b["model_b"]))}
    assert drawn.items() <= known.items()
    of_four = [{a, b} for (prompt, a, b) in drawn if int(prompt[1:]) % 4 == 3]
    counts = [of_four.count({x, y}) for x, y in itertools.combinations(("1", "2", "3", "3.5"), 2)]
    assert sum(counts) == 1000 and min(counts) > 120 and max(counts) < 215
    assert read(tmp_path / "t.jsonl", rows[::-1], pairs="one")[::-1] == one


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_ranked_answers(tmp_path: Path, suffix: str) -> None:
    answers = [
        {"answer": t, "model": "m", "rank": r} for t, r in (("x", 2.0), ("y", 1.0), ("z", 2.0))
    ]
    prompt = "\n\nHuman: q\n\nAssistant: "
    battles = read(tmp_path / f"t.{suffix}", [{"prompt": prompt, "answers": answers}])
    assert winners(battles) == ["y>x", "x=z", "y>z"]
    assert {battle["prompt"][0] for battle in battles} == {"q"}
    long = "\n\nHuman: q\n\nAssistant: p\n\nHuman: r\n\nAssistant:"
    battle = read(tmp_path / f"t.{suffix}", [{"prompt": long, "answers": answers}])[0]
    assert battle["prompt"] == ["q", "r"] and battle["response_a"][0] == "p"
    bad = [{"prompt": "q", "answers": a} for a in ([], None, [{"answer": "x"}], answers)]
    assert [position for position, *_ in reasons(tmp_path / "t.jsonl", bad)] == [0, 1, 2]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_lists_of_better_and_worse_answers(tmp_path: Path, suffix: str) -> None:
    rm_bench = {"id": 5, "prompt": "q", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"],
                "subset": "chat"}  # fmt: skip
    battles = read(tmp_path / f"t.{suffix}", [rm_bench])
    assert winners(battles) == [f"{x}>{y}" for x in "abc" for y in "def"]
    assert [b["id"] for b in battles[:4]] == ["5-1-4", "5-1-5", "5-1-6", "5-2-4"]
    assert sum(b["weight"] for b in battles) == pytest.approx(5, abs=1e-3)
    reward_bench_2 = rm_bench | {"chosen": ["a"], "subset": "Ties"}
    battles = read(tmp_path / f"t.{suffix}", [reward_bench_2, rm_bench | {"id": 6}])
    assert len(battles) == 12 and winners(battles)[:3] == ["a>d", "a>e", "a>f"]
    assert [b["weight"] for b in battles[:3]] == [1, 1, 1]


# --- texts ----------------------------------------------------------------------------------------

BATTLE = {"id": "1", "prompt": "q", "response_a": "x", "response_b": "y", "winner": "tie"}


def prompts(path: Path, cells: list[Any], **keys: Any) -> list[list[str]]:
    rows = [BATTLE | {"prompt": cell} for cell in cells]
    return [battle["prompt"] for battle in read(path, rows, **keys)]


def test_a_column_is_turns_or_plain_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    odd = ["[Note] see below", "[1, 2, 3]", '["quoted"', "[x](y)"]
    assert prompts(path, odd) == [[cell] for cell in odd]
    lists = [f'["a{i}", null]' for i in range(9)]
    assert prompts(path, [*lists, "", "plain"]) == [
        *([f"a{i}", ""] for i in range(9)),
        [""],
        ["plain"],
    ]
    with pytest.raises(InputError, match=r"column prompt: 9 of 13 cells .* set `text: turns`"):
        prompts(path, [*lists, *odd])
    assert prompts(path, [*lists, *odd], text="plain") == [[cell] for cell in [*lists, *odd]]
    ((position, column, reason),) = reasons(
        path, [BATTLE | {"prompt": c} for c in [*lists, '["cut']]
    )
    assert (position, column) == (9, "prompt") and reason.startswith("not a JSON list")
    assert prompts(path, ["[1, 2]"], text="turns") == [["1", "2"]]
    assert prompts(path, ['["a"]', ["b", '["c"]']]) == [['["a"]'], ["b", '["c"]']]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_messages_of_every_kind(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t.{suffix}"
    assert prompts(path, [[system("s"), user("q")], [user("r")]]) == [["s", "q"], ["r"]]
    assert prompts(path, [[system("s"), user("q")]], system="drop") == [["q"]]
    assert prompts(path, [[{"from": "human", "value": "q"}]]) == [["q"]]
    cells = [[user([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}])]]
    assert prompts(path, cells) == [["one\ntwo"]]
    rows = [
        BATTLE | {"prompt": [user([{"type": "image", "text": None}])]},
        BATTLE | {"prompt": [user([{"type": "text", "text": "q"}])]},
    ]
    ((position, _, reason),) = reasons(path, rows)
    assert position == 0 and "part of type 'image'" in reason
    ((position, _, reason),) = reasons(
        path, [BATTLE | {"prompt": [{"role": "tool", "content": "q"}]}]
    )
    assert "unknown role: 'tool'" in reason


def test_conversations_must_ask_the_same_and_be_answered(tmp_path: Path) -> None:
    rows = [
        {"winner": "tie", "conversation_a": a, "conversation_b": b}
        for a, b in (
            (CHAT["a"], [user("other"), assistant("y")]),
            (CHAT["a"], [user("q")]),
            ([], []),
            (CHAT["a"], CHAT["b"]),
        )
    ]
    found = reasons(tmp_path / "t.jsonl", rows)
    assert [(position, reason.split(":")[0].split(",")[0]) for position, _, reason in found] == [
        (0, "its user or system turns differ from those of conversation_a"),
        (1, "no answer"),
        (2, "no turn of a user"),
    ]


# --- votes ----------------------------------------------------------------------------------------


def voted(path: Path, words: list[Any], row: Row = BATTLE, **keys: Any) -> list[list[float]]:
    return [battle["vote"] for battle in read(path, [row | {"winner": w} for w in words], **keys)]


def test_words_numbers_and_models_that_won(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    assert voted(path, ["model_a", "A", 0, "0.0", "Response_A", "a>b"]) == [A] * 6
    assert voted(path, ["MODEL_B ", "b", 1, "1.00"]) == [B] * 4
    assert voted(path, ["tie", "Tie (bothbad)", "both_bad", 2, "A=B"]) == [TIE] * 5
    models = BATTLE | {"model_a": "gpt", "model_b": "tie-5"}
    assert voted(path, ["gpt", "tie-5", "tie", "model_a"], models) == [A, B, TIE, A]
    clash = BATTLE | {"model_a": "b", "model_b": "b", "winner": "b"}
    other = BATTLE | {"model_a": "b", "model_b": "a", "winner": "b"}
    assert [reason.split(":")[0] for _, _, reason in reasons(path, [clash, other])] == [
        "two meanings"
    ] * 2


def test_ties_may_be_dropped_or_named(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    rows = [BATTLE | {"winner": word} for word in ("both_bad", "tie", "neither")]
    dropped, neither = reasons(path, rows, ties={"Both_Bad": "drop"})
    assert dropped == (0, "winner", "dropped: as `ties` says")
    assert "unexpected: 'neither'" in neither[2]
    assert voted(path, ["neither"], ties={"neither": "tie"}) == [TIE]


def test_rows_without_a_vote_are_no_ties(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    rows = [BATTLE | {"winner": word} for word in (None, "", "tie")]
    assert [position for position, *_ in reasons(path, rows)] == [0, 1]
    found, raw = understood(path, rows, missing_votes="keep")
    assert np.isnan(found.vote[:, 0]).tolist() == [True, True, False] and not raw.faults.found


def test_shares_of_votes(tmp_path: Path) -> None:
    names = ("winner_model_a", "winner_model_b", "winner_tie")
    row = {k: v for k, v in BATTLE.items() if k != "winner"}
    shares = [(0.5, 0.3, 0.2), (1, 0, 0), ("0", "1.00", "false")]
    rows = [row | dict(zip(names, share, strict=True)) for share in shares]
    assert [b["vote"] for b in read(tmp_path / "t.jsonl", rows)] == [[0.5, 0.3, 0.2], A, B]
    two = [{k: v for k, v in r.items() if k != "winner_tie"} for r in rows[1:]]
    assert [b["vote"] for b in read(tmp_path / "two.jsonl", two)] == [A, B]
    bad = [(0.5, 0.3, 0.3), (1, 1, 0), (-1, 2, 0), (1, None, 0), ("yes", 0, 0), (0, 0, 0)]
    rows = [row | dict(zip(names, share, strict=True)) for share in bad]
    assert [reason.split(",")[0].split(";")[0] for *_, reason in reasons(tmp_path / "t.jsonl", rows)] == [
        "shares that sum to 1 expected", "several winners are set", "shares that sum to 1 expected",
        "empty", "unexpected: 'yes'", "no vote",
    ]  # fmt: skip


def test_weights(tmp_path: Path) -> None:
    rows = [BATTLE | {"weight": weight} for weight in (0.5, 2.5)]
    assert [battle["weight"] for battle in read(tmp_path / "t.jsonl", rows)] == [0.5, 2.5]
    rows = [BATTLE | {"weight": weight} for weight in (0, None, "much")]
    assert len(reasons(tmp_path / "t.jsonl", rows)) == 3


# --- which format ---------------------------------------------------------------------------------


def test_columns_may_be_named(tmp_path: Path) -> None:
    row = {"ask": "q", "one": "x", "output_2": "y", "label": 1, "prompt": "wrong"}
    keys = {"columns": {"prompt": "ask", "response_a": "one", "response_b": "output_2"}}
    (battle,) = read(tmp_path / "t.jsonl", [row], **keys)
    assert (battle["prompt"], battle["response_a"], battle["vote"]) == (["q"], ["x"], B)
    (battle,) = read(tmp_path / "t.jsonl", [BATTLE | {"source": "s"}], columns={"category": None})
    assert "category" not in battle
    with pytest.raises(
        InputError, match="no column gone, which `columns` names; columns found: id"
    ):
        read(tmp_path / "t.jsonl", [BATTLE], columns={"prompt": "gone"})
    with pytest.raises(ValueError, match="unknown column 'promt'; known: id, prompt"):
        Reading(columns={"promt": "x"})


def test_unknown_and_ambiguous_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with pytest.raises(
        InputError, match="of no known format; columns found: a, b; formats: battles"
    ) as e:
        read(path, [{"a": 1, "b": 2}])
    assert all(name in str(e.value) for name in FORMATS)
    both = BATTLE | {"conversation_a": CHAT["a"], "conversation_b": CHAT["b"]}
    with pytest.raises(InputError, match="may be conversations or battles; columns found"):
        read(path, [both])
    assert read(path, [both], format="conversations")[0]["vote"] == TIE
    with pytest.raises(
        InputError, match="no column conversation_a, conversation_b for format conv"
    ):
        read(path, [BATTLE], format="conversations")
    with pytest.raises(
        InputError, match=r"no column of votes \(winner, winner_model_a, both_equal\)"
    ):
        read(path, [{k: v for k, v in BATTLE.items() if k != "winner"}])


# --- real files -----------------------------------------------------------------------------------


PUBLISHED = {
    "llmbar": ("llmbar/*.json", "battles", 419, 419),
    "judgebench": ("judgebench/*.jsonl", "battles", 620, 620),
    "rm-bench": ("rm-bench/*.json", "ranking", 286, 286 * 9),
    "hh-rlhf": ("hh-rlhf/*.gz", "chosen_rejected", 300, 300),
}
"""Files as published: where, their format, rows, and battles of these."""


@needs_data
@pytest.mark.parametrize(("pattern", "shape", "rows", "battles"), PUBLISHED.values())
def test_benchmarks_are_read_whole(pattern: str, shape: str, rows: int, battles: int) -> None:
    read_rows = read_battles = 0
    for file in sorted((DATA / "benchmarks").glob(pattern)):
        raw = read_table(file)
        found = convert(raw, Reading())
        assert found.format == shape and not raw.faults.found and not np.isnan(found.vote).any()
        read_rows += raw.rows
        read_battles += len(found.battles)
    assert (read_rows, read_battles) == (rows, battles)


@needs_data
def test_cases() -> None:
    def case(name: str, **keys: Any) -> tuple[list[Row], np.ndarray, RawTable]:
        raw = read_table(DATA / "cases" / name)
        found = convert(raw, Reading(**keys), votes=name != "t-role.csv")
        return found.battles.to_pylist(), found.vote, raw

    rows, votes, raw = case("winner-names.csv")
    assert votes.tolist() == [A, B, TIE] * 4 and not raw.faults.found
    rows, _, raw = case("brackets.csv")
    texts = raw.columns["response_a"].to_pylist()  # type: ignore[union-attr]
    assert [row["response_a"] for row in rows] == [
        [text] for text in texts
    ] and not raw.faults.found
    for name in ("t-role.csv", "role-content.csv", "role-content.jsonl", "arena-raw.jsonl"):
        rows, _, raw = case(name)
        assert {row["prompt"][0] for row in rows} == {"Hi"} and not raw.faults.found
    rows, _, _ = case("pq-binarytext-ok.parquet")
    assert {row["response_a"][0] for row in rows} == {"hello"}
    with pytest.raises(
        InputError, match=r"column response_a: holds date32\[day\], which is no text"
    ):
        case("pq-date-text.parquet")
    rows, _, raw = case("pq-float-nan-text.parquet")
    assert raw.faults.found[0][0] == "response_a" and rows[1]["response_a"] == ["1"]
    _, _, raw = case("j-nan.jsonl")
    assert raw.faults.found[0] == ("response_b", 'missing; an empty text is written as ""')
    rows, votes, raw = case("wsdm.csv")
    assert votes.tolist() == [A, B] * 6 and not raw.faults.found
    _, votes, raw = case("winner-odd.csv")
    assert (votes[:, 2] == 1).sum() == 2 and len(raw.faults.found) == 10
    assert raw.faults.found[0] == ("winner", raw.faults.found[0][1])
    assert "unexpected: 'left'" in raw.faults.found[0][1]


# --- round trip -----------------------------------------------------------------------------------

text = st.text(st.characters(exclude_categories=("Cs",))) | st.text(
    st.sampled_from('",[]{}\\\n\r a')
)
turns = st.lists(text, min_size=1, max_size=3)
shares = st.sampled_from([A, B, TIE, [0.25, 0.5, 0.25]])


@given(st.lists(st.tuples(turns, turns, turns, shares), min_size=1, max_size=4))
def test_canonical_battles_survive_every_file(
    tmp_path_factory: pytest.TempPathFactory, battles: list[tuple[list[Any], ...]]
) -> None:
    folder = tmp_path_factory.mktemp("round")
    names = ("prompt", "response_a", "response_b")
    votes = ("winner_model_a", "winner_model_b", "winner_tie")
    lists = [
        {"id": str(i), **dict(zip(names, x, strict=False)), **dict(zip(votes, x[3], strict=True))}
        for i, x in enumerate(battles)
    ]
    cells = [row | {name: json.dumps(row[name]) for name in names} for row in lists]
    paths = [write(folder / f"lists.{s}", lists) for s in ("jsonl", "parquet")]
    paths += [write(folder / f"cells.{s}", cells) for s in ("jsonl", "parquet")]
    pa.csv.write_csv(pa.Table.from_pylist(cells), folder / "cells.csv")
    for path in [*paths, folder / "cells.csv"]:
        raw = read_table(path)
        found = convert(raw, Reading())
        assert not raw.faults.found
        read = found.battles.select(["id", *names]).to_pylist()
        assert read == [{k: row[k] for k in ("id", *names)} for row in lists]
        assert found.vote.tolist() == [x[3] for x in battles]


# --- arena-distill formats ------------------------------------------------------------------------


def test_the_command_shows_how_a_file_is_understood(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"ask": f"q{i}", "output_1": "x", "output_2": "y", "label": i} for i in (1, 2, 3, 1)]
    path = write(tmp_path / "t.jsonl", rows)
    formats(str(path), columns=["prompt=ask"], ties=["3=drop"])
    printed = capsys.readouterr().out
    assert "(battles): 4 rows, 1 dropped\n  3 battles by vote: A 2, B 1, tie 0\n" in printed
    assert (
        "columns: response_a ← output_1, response_b ← output_2, winner ← label, prompt ← ask"
        in printed
    )
    for cell in ("row1", "row2", "row4", "1. q2", "1. x", "1. y", " B "):
        assert cell in printed
    with pytest.raises(
        InputError, match="format: Input should be 'auto', or: Input should be 'battles'"
    ):
        formats(str(path), format="nope")


# --- anything at all ------------------------------------------------------------------------------

NAMES = (
    *("id", "prompt", "system", "response_a", "response_b", "conversation_a", "conversation_b"),
    *("chosen", "rejected", "completions", "answers", "winner", "both_equal", "margin", "turn"),
    *("score_chosen", "score_rejected", "overall_preference", "weight", "model_a", "category"),
)
words = st.sampled_from(
    ["a", "[", '["x"]', "tie", "1", "-3", "", "\n\nHuman: q\n\nAssistant: a", "é"]
)
keys = st.sampled_from(["role", "content", "response", "score", "answer", "rank", "model", "from"])
values = st.recursive(
    words | st.none() | st.booleans() | st.integers(-4, 4) | st.floats() | st.just("assistant"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)
needs = st.sampled_from([(name, of) for name, f in FORMATS.items() for of in f.needs])


@given(st.data(), needs, st.sets(st.sampled_from(NAMES)), st.booleans(), st.booleans())
def test_whatever_columns_hold_they_are_read_or_named(
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    needed: tuple[str, tuple[str, ...]],
    more: set[str],
    votes: bool,
    auto: bool,
) -> None:
    shape = "auto" if auto else needed[0]
    row = st.fixed_dictionaries(dict.fromkeys(sorted(more | {*needed[1]}), values))
    rows = data.draw(st.lists(row, min_size=1, max_size=4))
    path = tmp_path_factory.mktemp("any") / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        raw = read_table(path)
        found = convert(raw, Reading(format=shape), votes=votes)  # type: ignore[arg-type]
    except InputError as error:
        assert str(path) in str(error)
        return
    found.battles.validate(full=True)
    good = ~np.isin(found.row, raw.faults.fatal())
    assert len(found.vote) == len(found.weight) == len(found.row) == len(found.battles)
    assert not good.any() or bool(np.isnan(found.vote[good, 0]).any()) is not votes
    assert np.allclose(found.vote[good & ~np.isnan(found.vote[:, 0])].sum(axis=1), 1)
