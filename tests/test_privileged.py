"""A teacher may read the models' names: where they stand, who may not read them, what depends on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SPECIAL_TOKENS, battles_table
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_run import made_up_run
from test_encoding import SMALLEST, Turns, rows_of_turns, sequences, tokens_of

from arena_distill.config.encoding import Encoding
from arena_distill.config.head import Head
from arena_distill.config.phases.encoding import TokensSettings
from arena_distill.config.phases.settings import VERSIONS
from arena_distill.config.run import load
from arena_distill.encoding.sequences import FIELDS, Tokens, read_tokens
from arena_distill.encoding.templates import LONGEST_NAME, NAME, SHOWN, UNKNOWN_MODEL, View
from arena_distill.encoding.tokenization import (
    load_tokenizer,
    tokenize,
    tokenize_battles,
    vocabulary_of,
)
from arena_distill.encoding.truncation import length_budget
from arena_distill.encoding.views import encode, encode_views
from arena_distill.errors import InputError
from arena_distill.evaluation.report import render_report
from arena_distill.files.artifacts import write_parquet
from arena_distill.planning.workload import _measured_sequence

BOTH = ("model_a", "model_b")
MARK = 300  # no other made-up token is as great


def named(rows: list[list[Turns]], names: list[tuple[list[int], list[int]]]) -> Tokens:
    """Made-up tokens, and the names of both models: row by row, tokens from 301 on."""
    tokens = tokens_of(rows)
    fields = dict(tokens.fields)
    for side in (1, 2):
        name = sequences([[MARK, *pair[side - 1]] for pair in names])
        fields[FIELDS[side]] = type(fields["prompt"])(
            *(getattr(fields[FIELDS[side]], part) for part in ("tokens", "turns", "cap", "size")),
            name=name,
        )
    parts = (tokens.ids, tokens.sources, tokens.votes, fields, tokens.vocabulary)
    rows_of_all = np.arange(len(rows))
    return Tokens(*parts, {name: field.extent(rows_of_all) for name, field in fields.items()})


name_ids = st.lists(st.integers(301, 320), max_size=3)


@settings(max_examples=60)
@given(
    rows_of_turns,
    st.data(),
    st.sampled_from(["winners", "rounds", "middle"]),
    st.sampled_from(["AB", "BA", "A", "B"]),
)
def test_each_answer_is_preceded_by_its_own_models_name(
    rows: list[list[Turns]], data: st.DataObject, truncation: Any, view: View
) -> None:
    """And the battle's budget includes the names; without them, the sequence is an ordinary one."""
    names = [(data.draw(name_ids), data.draw(name_ids)) for _ in rows]
    tokens, length = named(rows, names), SMALLEST + 8
    plain = Encoding(truncation=truncation)
    told = Encoding(truncation=truncation, privileged=BOTH)
    bare = encode(tokens_of(rows), plain, view, length)
    for row, kept in enumerate(encode(tokens, plain, view, length)):
        assert kept.tolist() == bare[row].tolist(), "who may not read names does not see them"
    for row in range(len(rows)):
        alone = tokens.take(np.array([row]))
        shown = [[MARK, *names[row][FIELDS.index(name) - 1]] for name in SHOWN[view][1:]]
        made = encode(alone, told, view, length)[0].tolist()
        assert len(made) <= length
        assert [i for i in made if i >= MARK] == sum(shown, [])
        left = [i for i in made if i < MARK]
        room = length - sum(map(len, shown))
        assert left == encode(alone, plain, view, room)[0].tolist()
        before = {"AB": (102, 103), "BA": (102, 103)}.get(view, (102,))
        places = [at for at, i in enumerate(made) if i == MARK]
        assert [made[at - 1] for at in places] == list(before), "right behind the answer's literal"


@settings(max_examples=40)
@given(rows_of_turns, st.data())
def test_the_exchange_of_sides_exchanges_the_names(
    rows: list[list[Turns]], data: st.DataObject
) -> None:
    names = [(data.draw(name_ids), data.draw(name_ids)) for _ in rows]
    swapped = [[row[0], row[2], row[1]] for row in rows]
    told = Encoding(privileged=BOTH, sizes=True)
    one = encode(named(rows, names), told, "BA", 120)
    other = encode(named(swapped, [(b, a) for a, b in names]), told, "AB", 120)
    assert [ids.tolist() for ids in one] == [ids.tolist() for ids in other]


def test_the_budget_of_all_battles_counts_the_names() -> None:
    rows = [[[[20] * 30], [[30] * 60], [[40] * 60]]] * 4
    tokens = named(rows, [([301], [302] * 3)] * 4)
    told = Encoding(privileged=BOTH, tokens_per_battle=100)
    assert length_budget(tokens, told, "AB", 500) == 100
    for made in encode_views(tokens, told, Head(kind="joint")):
        assert 99 <= made.lengths.mean() <= 100, "an odd token is dropped"


def test_tokens_without_names_are_refused() -> None:
    with pytest.raises(InputError, match=r"encoding\.privileged: the tokens have no names"):
        encode(tokens_of([[[[20]], [[30]], [[40]]]]), Encoding(privileged=BOTH), "AB", 64)


def test_a_plan_takes_tokens_of_a_run_before_the_key_was_set() -> None:
    tokens, head = tokens_of([[[[20] * 9], [[30] * 5], [[40] * 7]]]), Head(kind="joint")
    told, plain = (
        _measured_sequence(tokens, "train", encoding, head, 120)
        for encoding in (Encoding(privileged=BOTH), Encoding())
    )
    assert told == plain


# --- text -----------------------------------------------------------------------------------------


def test_names_are_text_and_a_missing_one_is_unknown(
    backbones: Callable[[str], Path], tmp_path: Path
) -> None:
    special = SPECIAL_TOKENS["llama"]["eos_token"]
    pairs = [("gpt-4", None), (None, "gpt-4"), (special, "x" * 999)]
    table = battles_table([dict(zip(BOTH, pair, strict=True)) for pair in pairs])
    write_parquet(table, tmp_path / "battles.parquet", {})
    folder = backbones("llama")
    tokenize_battles(
        tmp_path / "battles.parquet",
        folder,
        tmp_path / "tokens.parquet",
        settings=TokensSettings(version=1, names=True),
    )
    tokens, tokenizer = read_tokens(tmp_path / "tokens.parquet"), load_tokenizer(folder)
    for side in (0, 1):
        found = tokens.fields[FIELDS[side + 1]].name
        assert found is not None and tokens.fields["prompt"].name is None
        for pair, ids in zip(pairs, found, strict=True):
            expected = NAME.format((pair[side] or UNKNOWN_MODEL)[:LONGEST_NAME])
            assert tokenizer.decode(ids) == expected
            assert not set(ids.tolist()) & set(tokenizer.all_special_ids)
    order = encode(tokens, Encoding(privileged=BOTH, max_length=256), "BA")
    assert tokenizer.decode(order[0]).index(UNKNOWN_MODEL) < tokenizer.decode(order[0]).index("gpt")


def test_without_names_the_file_is_as_before(backbones: Callable[[str], Path]) -> None:
    tokenizer, table = load_tokenizer(backbones("llama")), battles_table([{}, {"model_a": None}])
    plain, told = (tokenize(table, tokenizer, names=names) for names in (False, True))
    assert set(told.column_names) - set(plain.column_names) == {
        "response_a_name",
        "response_b_name",
    }
    assert told.select(plain.column_names).equals(plain)


def test_no_battles_have_no_names(backbones: Callable[[str], Path], tmp_path: Path) -> None:
    empty = battles_table([{}]).slice(0, 0)
    tokenizer = load_tokenizer(backbones("llama"))
    about = {"vocabulary": vocabulary_of(tokenizer)}
    write_parquet(tokenize(empty, tokenizer, names=True), tmp_path / "t.parquet", about)
    assert len(encode(read_tokens(tmp_path / "t.parquet"), Encoding(privileged=BOTH), "AB")) == 0


# --- the configuration ----------------------------------------------------------------------------


def raw(**privileged: Any) -> dict[str, Any]:
    """Two teachers and a student on two tokenizers; by judge, its `encoding.privileged`."""
    backbones = {"t": "llama", "u": "qwen2", "s": "llama"}
    judges: dict[str, Any] = {name: {"backbone": {"tiny": of}} for name, of in backbones.items()}
    judges["s"]["teachers"] = ["t", "u"]
    for name, value in privileged.items():
        judges[name]["encoding"] = {"privileged": value}
    return {
        "data": {"arena": {}},
        "judges": judges,
        "final": "s",
        "defaults": {"quantization": None},
        "prediction": {"model": "merged"},
    }


def test_only_tokens_that_a_judge_reads_names_of_have_names() -> None:
    plain, told = load(raw()), load(raw(t=["model_b", "model_a"]))
    assert told.judges["t"].encoding.privileged == BOTH
    version = {"version": VERSIONS["tokens"]}
    for config, judge, names in (
        (plain, "t", {}),
        (told, "t", {"names": True}),
        (told, "s", {"names": True}),  # of the same tokenizer
        (told, "u", {}),
    ):
        assert json.loads(TokensSettings.of(config, judge).as_params()) == version | names


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"s": [*BOTH]}, r"judges\.s\.encoding\.privileged: a student must judge without"),
        ({"t": ["model_a"]}, r"judges\.t\.encoding\.privileged: give \[model_a, model_b\] or"),
        ({"t": ["id"]}, r"judges\.t\.encoding\.privileged"),
        ({"t": ["model_a"] * 2}, r"judges\.t\.encoding\.privileged: .*named twice"),
    ],
)
def test_who_may_not_read_names_is_told_in_one_line(changed: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        load(raw(**changed))
    assert len(str(error.value).splitlines()) == 1


def test_the_final_judge_may_not_read_names_even_if_it_learns_votes() -> None:
    alone = raw(s=[*BOTH])
    del alone["judges"]["s"]["teachers"]
    with pytest.raises(InputError, match=r"judges\.s\.encoding\.privileged: the final judge must"):
        load(alone)


def test_a_default_for_all_judges_reaches_the_student_unless_it_says_otherwise() -> None:
    everyone = raw()
    everyone["defaults"]["encoding"] = {"privileged": [*BOTH]}
    with pytest.raises(InputError, match=r"judges\.s\.encoding\.privileged: a student"):
        load(everyone)
    everyone["judges"]["s"]["encoding"] = {"privileged": []}
    assert load(everyone).judges["u"].encoding.privileged == BOTH


def test_the_report_says_who_read_names(tmp_path: Path) -> None:
    run = made_up_run(tmp_path)
    settings = run.settings.model_copy(update={"privileged": ("big",)})
    render_report(run.evaluate(settings=settings), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "big also reads the" in " ".join(page.split())
    render_report(run.evaluate(), tmp_path / "report.html")
    assert "encoding.privileged" not in (tmp_path / "report.html").read_text()
