"""The fast library gives the ids of Hugging Face's, or is not used: by hostile texts, at any moment."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FAMILIES, SPECIAL_TOKENS, make_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from arena_distill.config.backbone import TINY
from arena_distill.encoding import text_encoder
from arena_distill.encoding.text_encoder import PROBES, TextEncoder, encode_texts
from arena_distill.encoding.tokenization import load_tokenizer

PIECES = (
    *(
        "<|eot_id|>",
        "<bos>",
        "<eos>",
        "<|im_end|>",
        "<pad>",
        "<|begin_of_text|>",
        "<unused0>",
        "<0x0A>",
    ),
    *(
        "\n",
        "\r\n",
        "\t",
        " ",
        "  ",
        "\xa0",
        "\u3000",
        "\u2028",
        "\x00",
        "\ufffd",
        "\ufeff",
        "▁",
        "Ġ",
    ),
    *(
        "e\u0301",
        "\u0323\u0301",
        "İ",
        "ſ",
        "ﬁ",
        "Å",
        "가",
        "\u1100\u1161",
        "'LL",
        "don't",
        "12345",
        "½",
    ),
    *(
        "👩‍👩‍👧",
        "🏳️‍🌈",
        "👍🏽",
        "\u200d",
        "שלום",
        "\u202e",
        "مرحبا",
        "漢字",
        "ไทย",
        "हिन्दी",
        "The ",
        "def f(x):",
    ),
)
piece = st.sampled_from(PIECES) | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
hostile = st.lists(
    st.tuples(piece, st.sampled_from([1, 1, 1, 2, 3, 17, 400])).map(lambda p: p[0] * p[1]),
    max_size=8,
).map("".join)
batches = st.lists(hostile, max_size=4)
LONG_RUNS = [" " * 20_000 + "x", "\n" * 5_000, "a" * 20_000, "\u0301" * 3_000, " \t\n" * 3_000]


def of_hugging_face(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The plain call, one text at a time."""
    options = {"add_special_tokens": False, "split_special_tokens": True}
    return [tokenizer(text, **options)["input_ids"] for text in texts]


def lists(encoded: Any) -> list[list[int]]:
    assert (encoded.ids.dtype, encoded.offsets.dtype) == (np.int32, np.int64)
    return [ids.tolist() for ids in encoded]


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """fastokens takes over after the first batch."""
    monkeypatch.setattr(text_encoder, "FAST_FROM", 1)


def taken_over(tokenizer: Any) -> TextEncoder:
    """Its encoder, which encodes by fastokens now."""
    encoder = TextEncoder(tokenizer)
    encoder._left = 1
    assert lists(encoder(["first"])) == of_hugging_face(tokenizer, ["first"])
    assert encoder._fast is not None
    return encoder


@pytest.fixture(scope="module", params=[*FAMILIES, "shipped llama", "shipped qwen2"])
def tiny(request: pytest.FixtureRequest) -> tuple[Any, TextEncoder]:
    family = request.param.removeprefix("shipped ")
    made = family == request.param
    tokenizer = make_tokenizer(SPECIAL_TOKENS[family]) if made else load_tokenizer(TINY / family)
    return tokenizer, taken_over(tokenizer)


@pytest.fixture(scope="module")
def real(real_tokenizer: Any) -> tuple[Any, TextEncoder]:
    return real_tokenizer, taken_over(real_tokenizer)


@settings(max_examples=60)
@given(batches)
@example(LONG_RUNS)
def test_ids_of_tiny_tokenizers_are_those_of_hugging_face(tiny: Any, texts: list[str]) -> None:
    tokenizer, encoder = tiny
    assert lists(encoder(texts)) == of_hugging_face(tokenizer, texts)


@settings(max_examples=150)
@given(batches)
@example(LONG_RUNS)
@example(list(PIECES))
def test_ids_of_real_tokenizers_are_those_of_hugging_face(
    real: Any, real_tokenizer: Any, texts: list[str]
) -> None:
    tokenizer, encoder = real
    assert lists(encoder(texts)) == of_hugging_face(tokenizer, texts)


@pytest.mark.slow
def test_ids_of_the_whole_vocabulary_are_those_of_hugging_face(
    real: Any, real_tokenizer: Any
) -> None:
    """Words that no merge reaches, too: each token as it is written in the vocabulary, and as its text."""
    _, encoder = real
    backend = encoder._backend
    words = sorted(backend.get_vocab())
    texts = backend.decode_batch([[token] for token in range(len(words))])
    for batch in (words, texts):
        fast, plain = encoder(batch), encoder._plain(batch)
        np.testing.assert_array_equal(fast.ids, plain.ids)
        np.testing.assert_array_equal(fast.offsets, plain.offsets)


def test_every_special_token_in_a_text_is_ordinary_text(real: Any, real_tokenizer: Any) -> None:
    tokenizer, encoder = real
    special = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
    texts = [*special, "".join(special), " ".join(special)]
    ids = lists(encoder(texts))
    assert ids == of_hugging_face(tokenizer, texts)
    assert not set(tokenizer.all_special_ids) & {token for row in ids for token in row}


def test_few_texts_are_encoded_without_loading_the_fast_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = make_tokenizer(SPECIAL_TOKENS["llama"])
    monkeypatch.setattr(text_encoder, "FAST_FROM", 100)
    monkeypatch.setattr(text_encoder, "CHARACTERS", 30)
    texts = ["The sea is deep. ", "é" * 20, "", "<|eot_id|>" * 2] * 3
    expected = of_hugging_face(tokenizer, texts)
    assert lists(encode_texts(tokenizer, texts[:5])) == expected[:5]
    assert text_encoder._encoders[tokenizer]._fast is None
    assert lists(encode_texts(tokenizer, texts)) == expected  # it takes over in the midst
    assert text_encoder._encoders[tokenizer]._fast is not None
    assert lists(encode_texts(tokenizer, [])) == []


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The lines of the log until then."""
    caplog.set_level(logging.INFO, text_encoder.__name__)
    return lambda: caplog.messages


def word_pieces() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = models.WordPiece({"[UNK]": 0, "the": 1, "sea": 2, "##s": 3}, unk_token="[UNK]")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    ("make", "why"),
    [
        (word_pieces, "unsupported pre-tokenizer type"),
        # It takes `<0x0A>`, written out, for the byte, as that is a word of its own there.
        (lambda: load_tokenizer(TINY / "gemma2"), "its ids differ"),
    ],
    ids=["word pieces", "shipped gemma2"],
)
def test_a_tokenizer_that_it_does_not_know_stays_with_hugging_face(
    make: Callable[[], Any], why: str, told: Callable[[], list[str]]
) -> None:
    tokenizer, texts = make(), ["the seas", *PROBES, "<0x0A>"]
    for _ in range(3):
        assert lists(encode_texts(tokenizer, texts)) == of_hugging_face(tokenizer, texts)
    assert len(told()) == 1 and "\n" not in told()[0]
    assert told()[0].startswith(f"{tokenizer.name_or_path}: fastokens cannot encode for it (")
    assert why in told()[0]


class Differs:
    """A library that is wrong about one text."""

    def __init__(self, fast: Any, wrong: str) -> None:
        self.fast, self.wrong = fast, wrong

    def encode_batch_flat(self, texts: list[str], **options: bool) -> tuple[bytes, bytes]:
        changed = ["?" if text == self.wrong else text for text in texts]
        ids, offsets = self.fast.encode_batch_flat(changed, **options)
        return ids, offsets


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("wrong", ["a text at hand", PROBES[5], "<|eot_id|>"])
def test_a_tokenizer_of_which_one_text_differs_stays_with_hugging_face(
    wrong: str, monkeypatch: pytest.MonkeyPatch, told: Callable[[], list[str]]
) -> None:
    real = text_encoder.fastokens.Tokenizer

    class Library:
        @staticmethod
        def from_json_str(text: str) -> Differs:
            return Differs(real.from_json_str(text), wrong)

    monkeypatch.setattr(text_encoder.fastokens, "Tokenizer", Library)
    tokenizer = make_tokenizer(SPECIAL_TOKENS["llama"])
    texts = ["one", "a text at hand", "<|eot_id|>"]
    for _ in range(2):
        assert lists(encode_texts(tokenizer, texts)) == of_hugging_face(tokenizer, texts)
    assert told() == [
        ": fastokens cannot encode for it (its ids differ); tokenizers does, more slowly"
    ]


def test_a_library_that_fails_in_the_midst_is_given_up(told: Callable[[], list[str]]) -> None:
    tokenizer = make_tokenizer(SPECIAL_TOKENS["qwen2"])
    encoder: Any = taken_over(tokenizer)

    class Fails:
        def encode_batch_flat(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("match limit exceeded")

    encoder._fast = Fails()
    for _ in range(2):
        assert lists(encoder(["The sea", "é"])) == of_hugging_face(tokenizer, ["The sea", "é"])
    assert [line.split("(")[1] for line in told()] == [
        "match limit exceeded); tokenizers does, more slowly"
    ]


def test_an_encoder_lives_no_longer_than_its_tokenizer() -> None:
    tokenizer = make_tokenizer(SPECIAL_TOKENS["gemma2"])
    encode_texts(tokenizer, ["x"])
    encoder = weakref.ref(text_encoder._encoders[tokenizer])
    assert encoder() is not None
    del tokenizer
    gc.collect()
    assert encoder() is None


def test_a_tokenizer_in_python_encodes_for_itself(tmp_path: Path) -> None:
    class InPython:
        def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
            assert options["split_special_tokens"] and not options["add_special_tokens"]
            return {"input_ids": [list(text.encode()) for text in texts]}

    tokenizer: Any = InPython()
    assert lists(encode_texts(tokenizer, ["ab", "", "é"])) == [[97, 98], [], [195, 169]]
    assert lists(encode_texts(tokenizer, [])) == []
