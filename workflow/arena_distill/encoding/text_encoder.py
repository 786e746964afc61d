"""Texts to token ids, by the fastest library that gives exactly the ids of the tokenizer itself."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import fastokens
import numpy as np

from arena_distill.battles.similarity import slices
from arena_distill.encoding.sequences import Sequences, offsets_of
from arena_distill.errors import brief

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHARACTERS = 1 << 21
"""The most characters (or one text) that are encoded together."""

FAST_FROM = 1 << 22
"""The characters after which fastokens takes over: to load it takes as long as these took without it."""

PROBES = (
    *("", " ", "\n", "\x00", "\ufffd", "\u2028", "\u00a0", " \t\r\n \r\n\n  x  \n"),
    *(
        " " * 999,
        "\n" * 99,
        "x" * 999,
        "1234567890" * 9,
        "don't I'LL 'ſ",
        "e\u0301\u0323 é ﬁ Å İ ſ",
    ),
    *("שלום عربي \u202eabc", "👩‍👩‍👧 🏳️‍🌈 👍🏽", "漢字 ไทย हिन्दी 한글", "▁a ▁▁b", "Ġa Ċ <0x0A>"),
)
"""What libraries disagree about."""

TOKENS = 4_096
"""Of the vocabulary, so many are written out and compared too, at regular distances."""

_logger = logging.getLogger(__name__)
_encoders: WeakKeyDictionary[PreTrainedTokenizerBase, TextEncoder] = WeakKeyDictionary()


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Sequences:
    """The ids of each text: special tokens written in it are encoded as text, and none is added."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        encode: Callable[[list[str]], Sequences] = partial(_by_python, tokenizer)
    else:
        encode = _encoders.setdefault(tokenizer, TextEncoder(tokenizer))
    sizes = np.fromiter(map(len, texts), np.int64) + 1
    batches = slices(np.cumsum(sizes), CHARACTERS)
    return Sequences.concatenate([_flat([]), *(encode(texts[batch]) for batch in batches)])


def character_offsets(
    tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> list[np.ndarray] | None:
    """Where the tokens of each text begin and end in it, in characters: int64 (tokens, 2) each.

    The tokens are those of :func:`encode_texts`. None, if the tokenizer has no fast backend, which knows.
    """
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        return None
    backend.encode_special_tokens = True
    backend.no_truncation()
    found = backend.encode_batch(texts, add_special_tokens=False)
    return [np.array(text.offsets, np.int64).reshape(-1, 2) for text in found]


class TextEncoder:
    """Encodes texts by Hugging Face's `tokenizers`, and many texts by fastokens.

    fastokens is ten times as fast and more, but is slow to load and does not know every kind of tokenizer.
    It takes over once it has given the same ids for :data:`PROBES`, tokens written out and these texts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._name = tokenizer.name_or_path
        self._backend = tokenizer.backend_tokenizer
        self._left = FAST_FROM
        self._fast: fastokens.Tokenizer | None = None

    def __call__(self, texts: list[str]) -> Sequences:
        """The ids of each text, as :func:`encode_texts` gives them."""
        if self._fast is not None:
            try:
                return _by_fastokens(self._fast, texts)
            except Exception as error:  # of the regular expressions' limits
                self._stay(brief(error))
        ids = self._plain(texts)
        before, self._left = self._left, self._left - sum(map(len, texts))
        if before > 0 >= self._left:
            self._take_over(texts, ids)
        return ids

    def _plain(self, texts: list[str]) -> Sequences:
        backend = self._backend  # which others use and set, too
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        # Without offsets into the text: the same ids, two to three times as fast.
        return _flat([r.ids for r in backend.encode_batch_fast(texts, add_special_tokens=False)])

    def _take_over(self, texts: list[str], ids: Sequences) -> None:
        added = [token.content for token in self._backend.get_added_tokens_decoder().values()]
        vocabulary = sorted(self._backend.get_vocab())
        some = vocabulary[:: len(vocabulary) // TOKENS + 1]
        probes = [*PROBES, *some, *added, "".join(added), " ".join(added)]
        expected = Sequences.concatenate([self._plain(probes), ids])
        try:
            fast = fastokens.Tokenizer.from_json_str(self._backend.to_str())
            given = _by_fastokens(fast, [*probes, *texts])
        except Exception as error:
            return self._stay(brief(error))
        if not all(
            map(np.array_equal, (given.ids, given.offsets), (expected.ids, expected.offsets))
        ):
            return self._stay("its ids differ")
        self._fast = fast

    def _stay(self, why: str) -> None:
        self._fast = None
        _logger.info(
            "%s: fastokens cannot encode for it (%s); tokenizers does, more slowly", self._name, why
        )


def _by_fastokens(fast: fastokens.Tokenizer, texts: list[str]) -> Sequences:
    ids, offsets = fast.encode_batch_flat(
        texts, add_special_tokens=False, split_special_tokens=True
    )
    return Sequences(np.frombuffer(ids, np.int32), np.frombuffer(offsets, np.int64))


def _by_python(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Sequences:
    """The ids of a tokenizer that no library of Rust knows."""
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return _flat(encoded["input_ids"])


def _flat(rows: list[list[int]]) -> Sequences:
    ids = np.fromiter(chain.from_iterable(rows), np.int32)
    return Sequences(ids, offsets_of(np.fromiter(map(len, rows), np.int64)))
