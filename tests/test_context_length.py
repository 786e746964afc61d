"""The length limit of sequences: one per row, and one from a token budget per battle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import battles_table
from hypothesis import given, settings
from hypothesis import strategies as st
from test_encoding import FRAME, SMALLEST, Turns, lengths, rows_of_turns, split, tokens_of

from arena_distill.config.encoding import Encoding
from arena_distill.config.head import Head
from arena_distill.config.phases.encoding import TokensSettings
from arena_distill.config.phases.prediction import ScoringSettings
from arena_distill.config.phases.training import TrainingSettings
from arena_distill.config.run import load
from arena_distill.encoding.sequences import Sequences, Tokens, read_tokens
from arena_distill.encoding.templates import ROOM, View
from arena_distill.encoding.tokenization import tokenize_battles
from arena_distill.encoding.truncation import length_budget
from arena_distill.encoding.views import encode, encode_views
from arena_distill.errors import InputError
from arena_distill.files.artifacts import write_parquet
from arena_distill.verdicts import ORDERS

TRUNCATIONS = ("rounds", "winners", "middle")
VIEWS: tuple[View, ...] = ("AB", "BA", "A", "B")
truncations = st.sampled_from(TRUNCATIONS)
budgets = st.integers(SMALLEST, 140)
LONGEST = 200


def training(rows: list[list[Turns]]) -> Tokens:
    """Tokens of battles that are all from `train`."""
    tokens = tokens_of(rows)
    return replace(tokens, training=tokens.fields)


def within(budget: int, truncation: Any, max_length: int = LONGEST) -> Encoding:
    """An encoding with a budget as small as the invented battles."""
    wide = Encoding(truncation=truncation, max_length=max_length)
    return wide.model_copy(update={"tokens_per_battle": budget})


def same(one: Sequences, other: Sequences) -> bool:
    return np.array_equal(one.ids, other.ids) and np.array_equal(one.offsets, other.offsets)


# --- a length per row -------------------------------------------------------------------------------


@settings(max_examples=60)
@given(rows_of_turns, truncations, st.sampled_from(VIEWS), st.data())
def test_a_row_is_cut_at_its_own_length_whatever_the_others_are(
    rows: list[list[Turns]], truncation: Any, view: View, data: st.DataObject
) -> None:
    own = np.array([data.draw(lengths) for _ in rows])
    tokens, encoding = tokens_of(rows), Encoding(truncation=truncation)
    made = encode(tokens, encoding, view, own)
    for i, length in enumerate(own.tolist()):
        alone = encode(tokens.take(np.array([i])), encoding, view, length)
        assert made[i].tolist() == alone[0].tolist()
        assert len(made[i]) <= length


def test_one_row_with_no_room_is_an_error() -> None:
    tokens = tokens_of([[[[20]], [[30]], [[40]]]] * 2)
    with pytest.raises(InputError, match=f"max_length {SMALLEST - 1}: .*leaves 15"):
        encode(tokens, Encoding(), "AB", np.array([SMALLEST, SMALLEST - 1]))
    nothing = tokens.take(np.zeros(0, np.int64))
    assert len(encode(nothing, Encoding(), "AB", np.zeros(0, np.int64))) == 0


# --- a budget ---------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(rows_of_turns, truncations, budgets)
def test_training_battles_keep_the_budget_and_no_longer_length_would(
    rows: list[list[Turns]], truncation: Any, budget: int
) -> None:
    tokens, encoding = training(rows), within(budget, truncation)
    line = length_budget(tokens, encoding, "AB", LONGEST)
    made = encode(tokens, encoding, "AB")
    assert made.lengths.mean() <= budget
    assert made.lengths.max() <= line <= LONGEST
    if line < LONGEST:
        longer = encode(tokens, Encoding(truncation=truncation), "AB", line + 1)
        assert longer.lengths.mean() > budget


@settings(max_examples=80)
@given(rows_of_turns, truncations, budgets)
def test_answers_shown_alone_keep_the_budget_together(
    rows: list[list[Turns]], truncation: Any, budget: int
) -> None:
    tokens, encoding = training(rows), within(budget, truncation)
    one, other = encode_views(tokens, encoding, Head(kind="pointwise"))
    assert np.mean([one.lengths, other.lengths]) <= budget


@settings(max_examples=60)
@given(rows_of_turns, rows_of_turns, truncations, budgets, st.sampled_from(VIEWS))
def test_whichever_rows_are_taken_a_row_reads_the_same(
    train: list[list[Turns]], others: list[list[Turns]], truncation: Any, budget: int, view: View
) -> None:
    seen, encoding = training(train), within(budget, truncation)
    line = length_budget(seen, encoding, view, LONGEST)
    # Rows of other sources in the same file: extra, ut, test.
    tokens = replace(tokens_of(train + others), training=seen.training)
    whole = encode(tokens, encoding, view)
    assert same(whole, encode(tokens, Encoding(truncation=truncation), view, line))
    for rows in (np.arange(len(train), len(tokens)), np.array([0]), np.arange(len(tokens))[::-2]):
        assert same(encode(tokens.take(rows), encoding, view), whole.take(rows))


@settings(max_examples=60)
@given(rows_of_turns, truncations, budgets)
def test_exchanging_the_answers_exchanges_what_is_kept(
    rows: list[list[Turns]], truncation: Any, budget: int
) -> None:
    encoding = within(budget, truncation)
    tokens = training(rows)
    exchanged = training([[prompt, b, a] for prompt, a, b in rows])
    for ab, ba in zip(*(encode(tokens, encoding, order) for order in ORDERS), strict=True):
        first, second = split(ab.tolist()), split(ba.tolist())
        assert first == [second[0], second[2], second[1]]
    for view, other in (("AB", "BA"), ("A", "B"), ("B", "A")):
        assert same(encode(tokens, encoding, view), encode(exchanged, encoding, other))


@settings(max_examples=60)
@given(rows_of_turns, truncations, budgets, st.sampled_from(VIEWS))
def test_the_template_is_always_whole(
    rows: list[list[Turns]], truncation: Any, budget: int, view: View
) -> None:
    frame = FRAME if len(view) == 2 else (FRAME[0], FRAME[1], FRAME[3])
    literals = [token for literal in frame for token in literal]
    for ids in encode(training(rows), within(budget, truncation), view):
        assert [token for token in ids.tolist() if token in literals] == literals


@settings(max_examples=40)
@given(rows_of_turns, truncations, lengths, st.sampled_from(VIEWS))
def test_what_the_budget_has_room_for_is_cut_as_without_it(
    rows: list[list[Turns]], truncation: Any, max_length: int, view: View
) -> None:
    tokens = training(rows)
    fixed = encode(tokens, Encoding(truncation=truncation), view, max_length)
    ample = within(max(SMALLEST, max_length), truncation)
    assert same(encode(tokens, ample, view, max_length), fixed)


def test_a_budget_by_hand() -> None:
    """Sizes of 30, 40 and 200 tokens (seven for the template): a budget of 45 leaves 65 for the last."""
    rows = [[[[20] * 5], [[30] * n], [[40] * n]] for n in (9, 14, 94)]
    tokens = training(rows)
    sizes = encode(tokens, Encoding(), "AB").lengths
    framing = sum(map(len, FRAME))
    assert (sizes == framing + np.array([23, 33, 193])).all()
    encoding = within(45, "rounds")
    assert length_budget(tokens, encoding, "AB", 1000) == 45 * 3 - sizes[:2].sum()


def test_a_budget_too_small_for_the_template_is_an_error() -> None:
    tokens = training([[[[20] * 50], [[30] * 50], [[40] * 50]]])
    smallest = sum(map(len, FRAME)) + ROOM
    with pytest.raises(InputError, match=rf"tokens_per_battle {SMALLEST - 1}: cut to {smallest}"):
        encode(tokens, within(SMALLEST - 1, "rounds"), "AB")


def test_without_training_battles_a_budget_is_an_error() -> None:
    tokens = tokens_of([[[[20]], [[30]], [[40]]]])
    encoding = Encoding(tokens_per_battle=64)
    for seen in (tokens, replace(tokens, training=tokens.take(np.zeros(0, np.int64)).fields)):
        with pytest.raises(InputError, match="tokens_per_battle: there is no training"):
            encode(seen, encoding, "AB")
        assert len(encode(seen, Encoding(), "AB")) == 1


def test_only_the_files_training_battles_decide(
    backbones: Callable[[str], Path], tmp_path: Path
) -> None:
    """Through the file, as jobs read it: other sources get the same cut and do not influence it."""
    battles = [{"response_a": "yes " * n, "response_b": "no " * n} for n in (5, 20, 60, 90)]
    others = [{"source": s, "response_a": "so " * 300} for s in ("extra", "ut", "test")]
    lines = []
    for i, rows in enumerate((battles, battles + others)):
        table = battles_table([{"id": str(n), **row} for n, row in enumerate(rows)])
        write_parquet(table, tmp_path / "battles.parquet", {})
        path = tmp_path / f"{i}.parquet"
        tokenize_battles(
            tmp_path / "battles.parquet",
            backbones("llama"),
            path,
            settings=TokensSettings(version=1),
        )
        tokens = read_tokens(path)
        encoding = Encoding(tokens_per_battle=90)
        lines.append([length_budget(tokens, encoding, view, 1000) for view in VIEWS])
        made = encode(tokens, encoding, "AB")
        assert made.lengths[: len(battles)].mean() <= 90
        assert made.lengths[len(battles) :].max(initial=0) in (0, lines[-1][0])
    assert lines[0] == lines[1]
    joint, alone = lines[0][0], lines[0][2]
    assert lines[0] == [joint, joint, alone, alone]
    assert joint < alone


# --- the configuration ------------------------------------------------------------------------------


def config(**encoding: Any) -> Any:
    return load(
        {
            "data": {"train": ["a.csv"], "test": ["b.csv"]},
            "defaults": {"encoding": encoding},
            "judges": {"small": {"backbone": {"tiny": "llama"}, "quantization": None}},
            "final": "small",
            "prediction": {"model": "merged"},
        }
    )


def test_settings_name_a_budget_only_if_there_is_one() -> None:
    """Otherwise the new key would rebuild finished runs."""
    for phase in (ScoringSettings, TrainingSettings):
        off, null, on = (
            phase.of(config(**encoding), "small").as_params()
            for encoding in ({}, {"tokens_per_battle": None}, {"tokens_per_battle": 300})
        )
        assert off == null
        assert "tokens_per_battle" not in off
        assert phase.model_validate_json(on).encoding.tokens_per_battle == 300
