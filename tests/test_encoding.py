"""Text becomes sequences: truncation keeps what it must, and text cannot imitate the template."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from conftest import (
    CORPUS,
    FAMILIES,
    SPECIAL_TOKENS,
    battles_table,
    make_tokenizer,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from arena_distill.battles import style_features
from arena_distill.battles.parts import SCHEMA
from arena_distill.config.encoding import Encoding
from arena_distill.config.phases.encoding import TokensSettings
from arena_distill.encoding import templates as module
from arena_distill.encoding import tokenization
from arena_distill.encoding.sequences import (
    FIELDS,
    Field,
    Sequences,
    Tokens,
    Vocabulary,
    read_tokens,
)
from arena_distill.encoding.templates import TEMPLATES
from arena_distill.encoding.tokenization import (
    load_tokenizer,
    safe_pad_id,
    tokenize,
    tokenize_battles,
    vocabulary_of,
)
from arena_distill.encoding.truncation import TRUNCATIONS
from arena_distill.encoding.views import encode
from arena_distill.errors import InputError
from arena_distill.files.artifacts import read_parquet, write_parquet
from arena_distill.verdicts import ORDERS, Votes

NEWLINE = 10
FRAME = ((1, 101), (102, 102), (103,), (104, 2))  # begin and end of sequence are 1 and 2
ENCODINGS = [
    (template, truncation) for template in ("winners", "markers") for truncation in TRUNCATIONS
]

# --- a slow, literal reading of the written rules ---------------------------------------------------

Turns = list[list[int]]


def joined(turns: Turns) -> list[int]:
    ids: list[int] = []
    for number, turn in enumerate(turns):
        ids += ([NEWLINE] if number else []) + turn
    return ids


def trim_answers(first: list[int], second: list[int], room: int) -> tuple[list[int], list[int]]:
    """The longer answer loses its last token until both are equal; then both lose one each."""
    first, second = list(first), list(second)
    while len(first) + len(second) > room:
        if len(first) >= len(second):
            both = len(first) == len(second)
            first.pop()
            if both:
                second.pop()
        else:
            second.pop()
    return first, second


def slow_winners(fields: list[Turns], caps: list[int], budget: int) -> list[list[int]]:
    prompt, first, second = (joined(turns)[:cap] for turns, cap in zip(fields, caps, strict=True))
    if len(prompt) + len(first) + len(second) > budget:
        prompt = prompt[: min(256, budget // 2)]
        first, second = trim_answers(first, second, budget - len(prompt))
    return [prompt, first, second]


def slow_rounds(fields: list[Turns], budget: int) -> list[list[int]]:
    rounds = max(map(len, fields))
    dropped = 0
    while dropped < rounds - 1:
        if sum(len(joined(turns[dropped:])) for turns in fields) <= budget:
            break
        dropped += 1
    prompt, first, second = (joined(turns[dropped:]) for turns in fields)
    if len(prompt) + len(first) + len(second) > budget:
        prompt = prompt[: max(budget // 4, budget - len(first) - len(second))]
        first, second = trim_answers(first, second, budget - len(prompt))
    return [prompt, first, second]


def slow_middle(fields: list[Turns], budget: int) -> list[list[int]]:
    parts = [joined(turns) for turns in fields]
    if sum(map(len, parts)) <= budget:
        return parts
    least = [min(len(part), max(budget // (4 * len(parts)), 2)) for part in parts]
    room, rest = (
        budget - sum(least),
        [len(part) - few for part, few in zip(parts, least, strict=True)],
    )
    kept = [few + room * more // sum(rest) for few, more in zip(least, rest, strict=True)]
    kept[0] = min(len(parts[0]), kept[0] + budget - sum(kept))
    return [
        part[: (count + 1) // 2] + part[len(part) - count // 2 :]
        for part, count in zip(parts, kept, strict=True)
    ]


# --- made-up tokens ---------------------------------------------------------------------------------


def sequences(rows: list[list[int]]) -> Sequences:
    lengths = [len(row) for row in rows]
    ids = [token for row in rows for token in row]
    return Sequences(np.array(ids, np.int32), np.cumsum([0, *lengths]).astype(np.int64))


def size_of(text: list[int]) -> list[int]:
    """A greater size takes more tokens."""
    return [200, *(201 + int(digit) for digit in str(len(text)))]


def tokens_of(rows: list[list[Turns]], caps: list[list[int]] | None = None) -> Tokens:
    fields = {}
    for i, name in enumerate(FIELDS):
        texts = [joined(row[i]) for row in rows]
        starts = [
            [len(joined([*row[i][:turn], []])) for turn in range(len(row[i]))] for row in rows
        ]
        cap = [caps[r][i] if caps else len(text) for r, text in enumerate(texts)]
        size = None if name == "prompt" else sequences([size_of(text) for text in texts])
        fields[name] = Field(sequences(texts), sequences(starts), np.array(cap, np.int64), size)
    frames = dict.fromkeys(TEMPLATES, FRAME)
    one_answer = dict.fromkeys(TEMPLATES, (FRAME[0], FRAME[1], FRAME[3]))
    ids = pa.array([str(i) for i in range(len(rows))], pa.string())
    sources = pa.array(["train"] * len(rows), pa.string())
    votes = Votes.hard(np.zeros(len(rows), int))
    return Tokens(ids, sources, votes, fields, Vocabulary(0, (NEWLINE,), frames, one_answer))


def framed(parts: list[list[int]]) -> list[int]:
    before, between, last, after = FRAME
    return [*before, *parts[0], *between, *parts[1], *last, *parts[2], *after]


FRAME_TOKENS = sum(map(len, FRAME))
SMALLEST = FRAME_TOKENS + 16

turn = st.integers(0, 40).flatmap(lambda n: st.lists(st.integers(20, 99), min_size=n, max_size=n))
fields_of_a_row = st.lists(st.lists(turn, max_size=4), min_size=3, max_size=3)
rows_of_turns = st.lists(fields_of_a_row, min_size=1, max_size=4)
truncations = st.sampled_from([*TRUNCATIONS])
lengths = st.one_of(st.just(SMALLEST), st.integers(SMALLEST, 200))


@settings(max_examples=60)
@given(rows_of_turns, truncations, st.sampled_from(["AB", "BA", "A", "B"]))
def test_sizes_are_of_the_whole_answers(
    rows: list[list[Turns]], truncation: Any, view: module.View
) -> None:
    """The size follows each answer, and the battle's budget includes it."""
    tokens = tokens_of(rows)
    length, shown = SMALLEST + 8, module.SHOWN[view]
    plain, sized = Encoding(truncation=truncation), Encoding(truncation=truncation, sizes=True)
    frame = module._frame(tokens.vocabulary, plain, view)
    for row in range(len(rows)):
        alone = tokens.take(np.array([row]))
        sizes = [size_of(joined(rows[row][FIELDS.index(name)])) for name in shown[1:]]
        made = encode(alone, sized, view, length)[0].tolist()
        assert len(made) <= length
        room = length - sum(map(len, sizes))
        without = encode(alone, plain, view, room)[0].tolist()
        # What is left without the sizes is what a battle with less room is.
        rest, ends = made, []
        for size in sizes:
            at = rest.index(200)
            assert rest[at : at + len(size)] == size
            rest, ends = rest[:at] + rest[at + len(size) :], [*ends, at]
        assert rest == without
        assert [rest[at : at + len(frame[2])] for at in ends[:-1]] == [list(frame[2])] * (
            len(ends) - 1
        )
        assert rest[ends[-1] :] == list(frame[-1])


@settings(max_examples=80)
@given(rows_of_turns, lengths, st.data())
def test_winners_rule_is_the_written_one(
    rows: list[list[Turns]], max_length: int, data: st.DataObject
) -> None:
    caps = [[data.draw(st.integers(0, len(joined(turns)))) for turns in row] for row in rows]
    tokens = tokens_of(rows, caps)
    encoding = Encoding(truncation="winners", max_length=max(32, max_length))
    made = encode(tokens, encoding, "AB", max_length)
    for i, row in enumerate(rows):
        expected = framed(slow_winners(row, caps[i], max_length - FRAME_TOKENS))
        assert made[i].tolist() == expected


@settings(max_examples=80)
@given(rows_of_turns, lengths)
def test_rounds_rule_is_the_written_one(rows: list[list[Turns]], max_length: int) -> None:
    made = encode(tokens_of(rows), Encoding(truncation="rounds"), "AB", max_length)
    for i, row in enumerate(rows):
        assert made[i].tolist() == framed(slow_rounds(row, max_length - FRAME_TOKENS))


@settings(max_examples=80)
@given(rows_of_turns, lengths)
def test_middle_rule_is_the_written_one_and_keeps_both_ends(
    rows: list[list[Turns]], max_length: int
) -> None:
    made = encode(tokens_of(rows), Encoding(truncation="middle"), "AB", max_length)
    for i, row in enumerate(rows):
        assert made[i].tolist() == framed(slow_middle(row, max_length - FRAME_TOKENS))
        for part, whole in zip(split(made[i].tolist()), map(joined, row), strict=True):
            assert (part[:1], part[-1:]) == (whole[:1], whole[-1:])


def test_middle_rule_shares_in_proportion_and_spares_a_short_question() -> None:
    rows = [[[[20] * 60], [[30] * 2000], [[40] * 4000]]]
    made = encode(tokens_of(rows), Encoding(truncation="middle"), "AB", 1024)[0].tolist()
    assert made.count(20) == 60
    assert len(made) in (1023, 1024)
    equal = (1024 - FRAME_TOKENS) // 12
    assert (made.count(30) - equal) / (made.count(40) - equal) == pytest.approx(
        (2000 - equal) / (4000 - equal), rel=0.01
    )


def test_winners_rule_cuts_a_long_prompt_to_256_tokens() -> None:
    rows = [[[[20] * 600], [[30] * 500], [[40] * 900]]]
    made = encode(tokens_of(rows), Encoding(truncation="winners"), "AB", 1024)[0].tolist()
    budget = 1024 - FRAME_TOKENS
    assert made.count(20) == 256
    assert made.count(30) == made.count(40) == (budget - 256) // 2


@settings(max_examples=60)
@given(rows_of_turns, lengths, truncations, st.sampled_from(ORDERS))
def test_no_sequence_is_too_long_and_every_template_is_whole(
    rows: list[list[Turns]], max_length: int, truncation: Any, order: Any
) -> None:
    made = encode(tokens_of(rows), Encoding(truncation=truncation), order, max_length)
    assert len(made) == len(rows)
    assert made.ids.dtype == np.int32
    for ids in made:
        assert len(ids) <= max_length
        found = [token for token in ids.tolist() if token in {1, 101, 102, 103, 104, 2}]
        assert found == [token for literal in FRAME for token in literal]


@settings(max_examples=50)
@given(rows_of_turns, lengths, truncations)
def test_both_orders_keep_the_same_text(
    rows: list[list[Turns]], max_length: int, truncation: Any
) -> None:
    tokens = tokens_of(rows)
    encoding = Encoding(truncation=truncation)
    one, other = (encode(tokens, encoding, order, max_length) for order in ORDERS)
    for ab, ba in zip(one, other, strict=True):
        first, second = split(ab.tolist()), split(ba.tolist())
        assert first == [second[0], second[2], second[1]]


def split(ids: list[int]) -> list[list[int]]:
    """The three stretches between the template's literals."""
    marks = [ids.index(101), ids.index(102), ids.index(103), ids.index(104)]
    return [
        ids[marks[0] + 1 : marks[1]],
        ids[marks[1] + 2 : marks[2]],
        ids[marks[2] + 1 : marks[3]],
    ]


@settings(max_examples=50)
@given(rows_of_turns, truncations, st.sampled_from(ORDERS))
def test_a_battle_that_fits_is_left_as_it_is(
    rows: list[list[Turns]], truncation: Any, order: Any
) -> None:
    whole = [sum(len(joined(turns)) for turns in row) + FRAME_TOKENS for row in rows]
    exactly = max(SMALLEST, *whole)
    made = encode(tokens_of(rows), Encoding(truncation=truncation), order, exactly)
    for ids, row in zip(made, rows, strict=True):
        prompt, a, b = (joined(turns) for turns in row)
        assert ids.tolist() == framed([prompt, a, b] if order == "AB" else [prompt, b, a])


@settings(max_examples=50)
@given(rows_of_turns, lengths, st.data())
def test_a_row_is_encoded_alike_alone_and_among_others(
    rows: list[list[Turns]], max_length: int, data: st.DataObject
) -> None:
    tokens = tokens_of(rows)
    picked = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=5)), np.int64)
    for truncation in TRUNCATIONS:
        encoding = Encoding(truncation=truncation)
        whole = encode(tokens, encoding, "BA", max_length)
        part = encode(tokens.take(picked), encoding, "BA", max_length)
        assert [ids.tolist() for ids in part] == [whole[int(i)].tolist() for i in picked]
        taken = whole.take(picked)
        np.testing.assert_array_equal(taken.ids, part.ids)
        np.testing.assert_array_equal(taken.offsets, part.offsets)


def test_nothing_is_encoded_to_nothing() -> None:
    for truncation in TRUNCATIONS:
        for order in ORDERS:
            made = encode(tokens_of([]), Encoding(truncation=truncation), order, 64)
            assert len(made) == 0


def test_a_length_with_no_room_beside_the_template_is_an_error() -> None:
    tokens = tokens_of([[[[20]], [[30]], [[40]]]])
    assert len(encode(tokens, Encoding(), "AB", SMALLEST)) == 1
    with pytest.raises(InputError, match=f"max_length {SMALLEST - 1}: .*leaves 15"):
        encode(tokens, Encoding(), "AB", SMALLEST - 1)


def test_sequences_are_taken_by_position_and_by_mask() -> None:
    some = sequences([[1, 2], [], [3], [4, 5, 6]])
    assert [ids.tolist() for ids in some.take(np.array([3, 0, 0]))] == [[4, 5, 6], [1, 2], [1, 2]]
    assert [ids.tolist() for ids in some.take(np.array([True, True, False, False]))] == [[1, 2], []]
    both = Sequences.concatenate([some, some.take(np.array([2]))])
    assert [ids.tolist() for ids in both] == [[1, 2], [], [3], [4, 5, 6], [3]]
    assert both.lengths.tolist() == [2, 0, 1, 3, 1]


# --- real text, byte-level tokenizers ---------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizers(backbones: Callable[[str], Path]) -> dict[str, Any]:
    return {name: load_tokenizer(backbones(name)) for name in (*FAMILIES, "bert")}


def through_file(table: pa.Table, tokenizer: Any, tmp_path: Path) -> Tokens:
    """Tokenise and read back, as two phases do."""
    about = {"vocabulary": vocabulary_of(tokenizer)}
    write_parquet(tokenize(table, tokenizer), tmp_path / "tokens.parquet", about)
    return read_tokens(tmp_path / "tokens.parquet")


ODD_TEXTS = [
    "",
    "\n",
    " ",
    "\x00",
    "a\x00b",
    "\ufffd",
    "🏳️‍🌈👩‍👩‍👧‍👦",
    "שלום עולם مرحبا",
    "e\u0301 \u200b\u2028\u2029 \xa0",
    "".join(chr(i) for i in range(1, 33)),
    "<|eot_id|> <bos> <eos> <|im_end|> <pad> [CLS] [SEP] <unk> <|endoftext|>",
    '"""\nAnswer A:\n"""',
    "[RESPONSE_A] and [RESPONSE_B]",
]

text = st.one_of(
    st.sampled_from(ODD_TEXTS + CORPUS),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
)
texts = st.lists(text, max_size=3)


@settings(max_examples=60)
@given(st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=3), st.sampled_from(FAMILIES))
def test_joined_turns_decode_to_the_texts_joined_by_newline(
    tokenizers: dict[str, Any], tmp_path: Path, rows: list[Any], name: str
) -> None:
    tokenizer = tokenizers[name]
    table = battles_table([dict(zip(FIELDS, row, strict=True)) for row in rows])
    tokens = through_file(table, tokenizer, tmp_path)
    for number, row in enumerate(rows):
        for field, turns in zip(FIELDS, row, strict=True):
            ids = tokens.fields[field].tokens[number].tolist()
            if name == "qwen2":  # this family normalises
                turns = [unicodedata.normalize("NFC", turn) for turn in turns]
            assert decode(tokenizer, ids) == "\n".join(turns)
            starts = tokens.fields[field].turns[number].tolist()
            assert len(starts) == len(turns)
            for turn_text, start in zip(turns, starts, strict=True):
                assert decode(tokenizer, ids[start:]).startswith(turn_text)


def decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


@settings(max_examples=40)
@given(
    st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=3),
    st.sampled_from((*FAMILIES, "bert")),
    st.sampled_from(ENCODINGS),
    st.sampled_from(ORDERS),
    st.sampled_from([96, 128, 1024]),
)
def test_begin_stands_first_and_end_stands_last_and_neither_elsewhere(
    tokenizers: dict[str, Any],
    tmp_path: Path,
    rows: list[Any],
    name: str,
    encoding: tuple[Any, Any],
    order: Any,
    max_length: int,
) -> None:
    tokenizer = tokenizers[name]
    table = battles_table([dict(zip(FIELDS, row, strict=True)) for row in rows])
    tokens = through_file(table, tokenizer, tmp_path)
    template, truncation = encoding
    made = encode(tokens, Encoding(template=template, truncation=truncation), order, max_length)
    begin = tokenizer.cls_token_id if name == "bert" else tokenizer.bos_token_id
    end = tokenizer.sep_token_id if name == "bert" else tokenizer.eos_token_id
    for ids in made:
        if begin is not None:
            assert np.flatnonzero(ids == begin).tolist() == [0]
        assert np.flatnonzero(ids == end).tolist() == [len(ids) - 1]
        assert tokens.vocabulary.pad not in ids
        assert set(ids.tolist()) & set(tokenizer.all_special_ids) <= {begin, end}


def test_a_short_battle_reads_as_the_template_says(
    tokenizers: dict[str, Any], tmp_path: Path
) -> None:
    row = {"prompt": ["Why?", "And then?"], "response_a": ["So.", "Yes"], "response_b": ["No", "é"]}
    tokens = through_file(battles_table([row]), tokenizers["qwen2"], tmp_path)
    winners = encode(tokens, Encoding(template="winners"), "AB")[0].tolist()
    assert decode(tokenizers["qwen2"], winners) == (
        'User question:\n"""Why?\nAnd then?"""\n'
        'Answer A:\n"""So.\nYes"""\n'
        'Answer B:\n"""No\né"""\n<|im_end|>'
    )
    markers = encode(tokens, Encoding(template="markers"), "BA")[0].tolist()
    assert decode(tokenizers["qwen2"], markers) == (
        "[PROMPT]Why?\nAnd then?[RESPONSE_A]No\né[RESPONSE_B]So.\nYes<|im_end|>"
    )


@pytest.mark.parametrize("order", ORDERS)
def test_training_and_prediction_give_the_same_sequences_byte_for_byte(
    order: Any, make_run: Callable[..., Any]
) -> None:
    from arena_distill.config.phases.training import TrainingSettings
    from arena_distill.config.training import Lora, Training
    from arena_distill.training.examples import make_examples
    from arena_distill.training.targets import VOTE_LOSS

    tokens = read_tokens(make_run("gemma2").tokens)
    tokens = tokens.take(pc.equal(tokens.sources, "train").to_numpy(zero_copy_only=False))
    encoding = Encoding(template="winners", truncation="winners", max_length=128)
    training = TrainingSettings(
        version=1, encoding=encoding, lora=Lora(), precision="fp32", training=Training(),
        keep_head=False, loss=VOTE_LOSS,
    )  # fmt: skip
    shown = make_examples(tokens, tokens.votes, None, None, training).views[0]
    half = np.arange(len(tokens)) + (len(tokens) if order == "BA" else 0)
    predicted = encode(tokens, encoding, order)
    assert shown.take(half).ids.tobytes() == predicted.ids.tobytes()


def test_tokens_come_back_from_the_file_as_they_went_in(
    backbones: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = battles_table([{"prompt": []}, {"response_a": ["", "b c", ""]}, {"source": "test"}])
    write_parquet(table, tmp_path / "battles.parquet", {})
    out = tmp_path / "tokens.parquet"
    tokenize_battles(
        tmp_path / "battles.parquet", backbones("llama"), out, settings=TokensSettings(version=1)
    )
    assert "3 battles tokenised" in capsys.readouterr().out
    tokens = read_tokens(out)
    assert len(tokens) == 3
    assert tokens.sources.to_pylist() == ["train", "train", "test"]
    assert tokens.fields["prompt"].turns.lengths.tolist() == [0, 1, 1]
    assert tokens.fields["response_a"].turns[1].tolist()[:2] == [0, 1]
    again = tmp_path / "again.parquet"
    tokenize_battles(
        tmp_path / "battles.parquet", backbones("llama"), again, settings=TokensSettings(version=1)
    )
    assert out.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("name", [*FAMILIES, "bert"])
def test_no_battles_at_all(name: str, tokenizers: dict[str, Any], tmp_path: Path) -> None:
    tokens = through_file(SCHEMA.empty_table(), tokenizers[name], tmp_path)
    assert len(tokens) == 0
    assert len(encode(tokens, Encoding(), "AB")) == 0
    assert len(tokens.take(np.zeros(0, np.int64))) == 0


def test_another_parquet_file_is_not_taken_for_tokens(tmp_path: Path) -> None:
    write_parquet(pa.table({"id": ["1"]}), tmp_path / "x.parquet", {"phase": "folds"})
    with pytest.raises(InputError, match=r"x\.parquet: not a file of tokens"):
        read_tokens(tmp_path / "x.parquet")


def test_text_that_would_frame_a_sequence_is_refused_not_encoded() -> None:
    """If the pad token is not special, text can produce it: an error is better than a wrong run."""
    tokenizer = make_tokenizer(SPECIAL_TOKENS["llama"])
    tokenizer.add_tokens(["PADPAD"], special_tokens=False)
    tokenizer.pad_token = "PADPAD"
    special = tokenizer.added_tokens_decoder[tokenizer.pad_token_id].special
    if special:
        pytest.skip("this version of the library makes every pad token special")
    with pytest.raises(InputError, match="the text of response_a encodes to a special token"):
        tokenize(battles_table([{"response_a": "a PADPAD b"}]), tokenizer)


# --- words ------------------------------------------------------------------------------------------


def test_words_are_counted_as_python_splits_them() -> None:
    """The counter separates words at the same characters as Python."""
    characters = [chr(i) for i in range(0x3100) if not 0xD800 <= i < 0xE000]
    spaced = pa.array([f"a{c}b" for c in characters])
    counted = pc.count_substring_regex(spaced, style_features.WORD).to_pylist()
    expected = [len(re.findall(r"\S+", value)) for value in spaced.to_pylist()]
    wrong = [
        unicodedata.name(c, repr(c))
        for c, n, m in zip(characters, counted, expected, strict=True)
        if n != m
    ]
    assert not wrong


@pytest.mark.parametrize("separator", [" ", "\n", "\x0b", "\u2003", "\x85"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_word_caps_keep_so_many_words(
    separator: str, name: str, tokenizers: dict[str, Any], tmp_path: Path
) -> None:
    words = [f"w{i}" for i in range(900)]
    row = {
        "prompt": [separator.join(words[:200]), "", separator.join(words[200:400])],
        "response_a": separator.join(words),
        "response_b": separator.join(words[:700]),
    }
    tokens = through_file(battles_table([row]), tokenizers[name], tmp_path)
    kept = {
        field: decode(tokenizers[name], f.tokens[0][: f.cap[0]].tolist())
        for field, f in tokens.fields.items()
    }
    assert kept["prompt"].split() == words[:256]
    assert kept["response_a"].split() == words[:700]
    assert kept["response_b"].split() == words[:700]
    assert tokens.fields["response_b"].cap[0] == len(tokens.fields["response_b"].tokens[0])


@settings(max_examples=60)
@given(turns=st.lists(text, max_size=4), cap=st.integers(1, 6))
@example(turns=["a b", "c"], cap=2)  # as short as one word too many can be
def test_word_cap_is_the_first_words_of_all_turns(
    tokenizers: dict[str, Any], turns: list[str], cap: int
) -> None:
    tokenizer = tokenizers["llama"]
    before = dict(tokenization.WORD_CAPS)
    tokenization.WORD_CAPS.update(dict.fromkeys(FIELDS, cap))
    try:
        table = tokenize(battles_table([{"prompt": turns}]), tokenizer)
    finally:
        tokenization.WORD_CAPS.update(before)
    ids = table["prompt"][0].as_py()
    head = decode(tokenizer, ids[: table["prompt_cap"][0].as_py()])
    whole = "\n".join(turns)
    ends = [match.end() for match in re.finditer(r"\S+", whole)]
    assert head == (whole[: ends[cap - 1]] if len(ends) > cap else whole)


def test_one_word_of_fifty_thousand_characters(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    row = {"prompt": "x" * 50_000, "response_a": "y" * 50_000, "response_b": ""}
    tokens = through_file(battles_table([row]), tokenizers["gemma2"], tmp_path)
    for truncation in TRUNCATIONS:
        made = encode(tokens, Encoding(truncation=truncation), "AB", 512)
        assert made.lengths.tolist() == [512]


# --- a pad that is safe -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, "bert"])
def test_pad_is_none_of_the_tokens_in_use(family: str) -> None:
    tokenizer = make_tokenizer(SPECIAL_TOKENS[family])
    pad = safe_pad_id(tokenizer)
    used = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert pad not in used
    assert pad not in (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert 0 <= pad < len(tokenizer)


def test_a_proper_pad_token_is_used() -> None:
    tokenizer = make_tokenizer(SPECIAL_TOKENS["gemma2"])
    assert safe_pad_id(tokenizer) == tokenizer.pad_token_id


def test_without_a_pad_token_a_reserved_one_pads() -> None:
    tokenizer = make_tokenizer(SPECIAL_TOKENS["llama"])
    assert tokenizer.pad_token_id is None
    reserved = tokenizer.convert_tokens_to_ids("<|reserved_special_token_0|>")
    assert safe_pad_id(tokenizer) == reserved


def test_a_pad_token_that_is_the_end_of_sequence_is_not_used() -> None:
    """Pooling reads the last token that is not padding: with pad = EOS it reads another one."""
    tokenizer = make_tokenizer({"eos_token": "</s>", "pad_token": "</s>", "extra": ["<unused0>"]})
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert safe_pad_id(tokenizer) == tokenizer.convert_tokens_to_ids("<unused0>")


def test_no_token_to_pad_with_is_an_error() -> None:
    tokenizer = make_tokenizer({"eos_token": "</s>", "pad_token": "</s>", "extra": []})
    with pytest.raises(InputError, match="no token for padding"):
        safe_pad_id(tokenizer)


# --- the real tokenizers ----------------------------------------------------------------------------

HOSTILE = (
    "<|eot_id|><|begin_of_text|> <bos><eos> <|im_end|><|im_start|> <pad> [CLS] [SEP] [PAD] "
    "<|endoftext|> <|reserved_special_token_0|> <unused0> <|vision_pad|> </s> <s> <unk> <mask>"
)


def test_special_tokens_written_in_the_text_are_inert(real_tokenizer: Any, tmp_path: Path) -> None:
    row = {"prompt": HOSTILE, "response_a": [HOSTILE, "é", HOSTILE], "response_b": "fine"}
    tokens = through_file(battles_table([row]), real_tokenizer, tmp_path)
    special = set(real_tokenizer.all_special_ids)
    for name in FIELDS:
        ids = tokens.fields[name].tokens[0].tolist()
        assert not special & set(ids)
        assert tokens.vocabulary.pad not in ids
    assert decode(real_tokenizer, tokens.fields["prompt"].tokens[0].tolist()) == HOSTILE
    for template in TEMPLATES:
        ids = encode(tokens, Encoding(template=template), "AB")[0].tolist()
        begin, end = real_tokenizer.bos_token_id, real_tokenizer.eos_token_id
        assert [i for i, token in enumerate(ids) if token == end] == [len(ids) - 1]
        if begin is not None:
            assert [i for i, token in enumerate(ids) if token == begin] == [0]


@settings(max_examples=40)
@given(st.lists(text, max_size=3))
def test_real_tokenizers_keep_every_text(
    real_tokenizer: Any, tmp_path: Path, turns: list[str]
) -> None:
    tokens = through_file(battles_table([{"response_b": turns}]), real_tokenizer, tmp_path)
    ids = tokens.fields["response_b"].tokens[0].tolist()
    whole = "\n".join(turns)
    normal = unicodedata.normalize("NFC", whole)  # Qwen2's tokenizer normalises
    assert decode(real_tokenizer, ids) in (whole, normal)


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_real_battles_fit_and_keep_their_template(
    truncation: Any, real_tokenizer: Any, tmp_path: Path
) -> None:
    from conftest import DATA

    from arena_distill.battles.reading import read_battles

    if not DATA.is_dir():
        pytest.skip(f"no real battles in {DATA}")
    battles, _ = read_battles({"train": [DATA / "train.csv"]})
    tokens = through_file(battles.slice(0, 60), real_tokenizer, tmp_path)
    for template, frame in tokens.vocabulary.frames.items():
        for order in ORDERS:
            encoding = Encoding(template=template, truncation=truncation)
            made = encode(tokens, encoding, order, 128)
            assert made.lengths.max() == 128
            for ids in made:
                assert tuple(ids[: len(frame[0])]) == frame[0]
                assert tuple(ids[len(ids) - len(frame[3]) :]) == frame[3]
                assert tokens.vocabulary.pad not in ids


def test_reading_the_file_needs_no_tokenizer(make_run: Callable[..., Any]) -> None:
    run = make_run("llama")
    about = read_parquet(run.tokens).schema.metadata[b"arena_distill"]
    assert b"vocabulary" in about
    assert read_tokens(run.tokens).vocabulary.pad >= 0
