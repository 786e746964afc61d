"""Battles → token ids, once per tokenizer; token ids → sequences, for any length and order.

``tokenize`` turns every field of every battle into ids and stores them with what the templates need
(their own ids, begin and end of sequence, a safe pad), so that no later job loads a tokenizer.
``encode`` assembles sequences out of that file: truncation decides which stretch of each field is kept,
a template sets the stretches between its literals, and both work on ids. Nothing is ever decoded and
encoded again, and all of it is array arithmetic over all rows at once.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arena_distill.artifacts import provenance, read_parquet, write_parquet
from arena_distill.errors import InputError
from arena_distill.judge import Encoding
from arena_distill.keys import key
from arena_distill.orders import Order

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELDS = ("prompt", "response_a", "response_b")

View = Order | Literal["A", "B"]
"""What a sequence shows of a battle: both answers in an order, or one answer alone."""

SHOWN: Mapping[View, tuple[str, ...]] = {
    "AB": FIELDS,
    "BA": ("prompt", "response_b", "response_a"),
    "A": ("prompt", "response_a"),
    "B": ("prompt", "response_b"),
}
"""The fields of a view, in the order they are shown."""

# What stands before the prompt, before each answer, and after the last. The same at training and
# prediction: there is no second copy. Begin and end of sequence are added by `tokenize`.
TEMPLATES: Mapping[str, tuple[str, str, str, str]] = {
    "winners": ('User question:\n"""', '"""\nAnswer A:\n"""', '"""\nAnswer B:\n"""', '"""\n'),
    "markers": ("[PROMPT]", "[RESPONSE_A]", "[RESPONSE_B]", ""),
}
ONE_ANSWER: Mapping[str, tuple[str, str, str]] = {
    "winners": ('User question:\n"""', '"""\nAnswer:\n"""', '"""\n'),
    "markers": ("[PROMPT]", "[RESPONSE]", ""),
}
"""The templates of sequences that show one answer."""

SIZE = "[TOKENS] {}"
"""What stands behind an answer where its size is stated: how many tokens it has in full."""

WORD_CAPS = {"prompt": 256, "response_a": 700, "response_b": 700}
"""The winners cut fields to so many words before they tokenise."""

WORD = r"[^\s\x0b\x1c-\x1f\x85\p{Z}]+"
"""A word for Arrow's regular expressions: what Python's ``\\S+`` matches (whose white space is wider)."""

PROMPT_TOKENS = 256
"""The winners cut the prompt to so many tokens where a battle is too long."""

ROOM = 16
"""A sequence has room for at least so many tokens of its battle."""


@dataclass(frozen=True)
class Sequences:
    """Ragged token sequences: `ids` int32 (tokens,), `offsets` int64 (rows + 1,)."""

    ids: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.ids[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[row] for row in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per row: int64 (rows,)."""
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> Sequences:
        """The given rows (int positions, or a bool mask), in that order."""
        rows = np.arange(len(self))[rows]
        return _gather(self.ids, self.offsets[rows], self.lengths[rows])

    @staticmethod
    def concatenate(parts: list[Sequences]) -> Sequences:
        lengths = np.concatenate([part.lengths for part in parts])
        return Sequences(np.concatenate([part.ids for part in parts]), _offsets(lengths))


@dataclass(frozen=True)
class Field:
    """One field of every battle.

    tokens: all turns of a row joined by a newline.
    turns: where each turn starts within its row.
    cap: int64 (rows,), how many tokens the winners' word cap leaves.
    size: of an answer, its :data:`SIZE`.
    """

    tokens: Sequences
    turns: Sequences
    cap: np.ndarray
    size: Sequences | None = None

    def take(self, rows: np.ndarray) -> Field:
        """The given rows, in that order."""
        size = self.size.take(rows) if self.size is not None else None
        return Field(self.tokens.take(rows), self.turns.take(rows), self.cap[rows], size)


@dataclass(frozen=True)
class Vocabulary:
    """What the templates need of a tokenizer: ids only."""

    pad: int
    newline: tuple[int, ...]
    frames: Mapping[str, tuple[tuple[int, ...], ...]]
    """Per template its four literals, with begin and end of sequence where the tokenizer has them."""
    one_answer: Mapping[str, tuple[tuple[int, ...], ...]]
    """As `frames`, the three literals of sequences that show one answer."""


@dataclass(frozen=True)
class Tokens:
    """A tokenised set of battles: ids and sources (rows,), three fields, and the vocabulary.

    training: the fields of the file's training battles, without their ids: whichever rows are taken,
        they say how long battles are (see :func:`waterline`).
    """

    ids: pa.Array
    sources: pa.Array
    fields: Mapping[str, Field]
    vocabulary: Vocabulary
    training: Mapping[str, Field] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def keys(self) -> pa.Array:
        """Every row's name, to join other files by (see ``keys``)."""
        return key(pa.table({"id": self.ids, "source": self.sources}))

    def take(self, rows: np.ndarray) -> Tokens:
        """The given rows (int positions, or a bool mask), in that order."""
        rows = np.arange(len(self))[rows]
        fields = {name: field.take(rows) for name, field in self.fields.items()}
        ids, sources = self.ids.take(rows), self.sources.take(rows)
        return Tokens(ids, sources, fields, self.vocabulary, self.training)


# --- text → ids -------------------------------------------------------------------------------------


def tokenize_battles(battles: Path, tokenizer: Path, output: Path, *, version: int) -> None:
    """Tokenise every field of `battles.parquet` with the tokenizer in a folder → `tokens.parquet`."""
    from arena_distill.backbones import load_tokenizer

    table = read_parquet(battles, columns=["id", "source", *FIELDS])
    tokens, vocabulary = tokenize(table, load_tokenizer(tokenizer))
    about = provenance("tokens", {"version": version, "tokenizer": tokenizer.name})
    write_parquet(tokens, output, about | {"vocabulary": vocabulary})
    counts = pc.sum(pc.list_value_length(tokens["prompt"])).as_py() or 0
    print(f"{len(tokens):,} battles tokenised by {tokenizer.name}; prompts: {counts:,} tokens")


def tokenize(
    battles: pa.Table, tokenizer: PreTrainedTokenizerBase
) -> tuple[pa.Table, dict[str, Any]]:
    """Token ids of every field of every battle.

    Text is data: a special token written out in it is spelled in ordinary tokens and means nothing.

    Returns:
        A table with `id`, `source` and per field `f` (list<int32>: turns joined by a newline),
        `f_turns` (list<int32>: where each turn starts), `f_cap` (int32: tokens within the word cap) and,
        of an answer, `f_size` (list<int32>: its :data:`SIZE`); and the vocabulary of the templates as
        plain JSON.

    Raises:
        InputError: the tokenizer has no token that is safe to pad with.
    """
    vocabulary = _vocabulary(tokenizer)
    newline = np.array(vocabulary["newline"], np.int32)
    columns: dict[str, Any] = {"id": battles["id"], "source": battles["source"]}
    for name in FIELDS:
        column = battles[name].combine_chunks()
        texts, rows = column.flatten(), _offsets(pc.list_value_length(column).to_numpy())
        turns = _tokenize_texts(tokenizer, texts.to_pylist())
        tokens, starts = _join_turns(turns, rows, newline)
        columns[name] = _list_array(tokens)
        columns[f"{name}_turns"] = _list_array(starts)
        cap = _word_cap(tokenizer, texts, rows, starts, WORD_CAPS[name])
        columns[f"{name}_cap"] = pa.array(np.minimum(cap, tokens.lengths).astype(np.int32))
        if name != "prompt":
            counts, which = np.unique(tokens.lengths, return_inverse=True)
            sizes = _tokenize_texts(tokenizer, [SIZE.format(n) for n in counts.tolist()])
            columns[f"{name}_size"] = _list_array(sizes.take(which))
    _forbid_special(columns, vocabulary, tokenizer)
    return pa.table(columns), vocabulary


def read_tokens(path: Path) -> Tokens:
    """Read `tokens.parquet`.

    Raises:
        InputError: the file is missing, damaged or not written by :func:`tokenize_battles`.
    """
    table = read_parquet(path).combine_chunks()
    about = json.loads((table.schema.metadata or {}).get(b"arena_distill", b"{}"))
    if "vocabulary" not in about:
        raise InputError(f"{path}: not a file of tokens; delete it and the workflow rebuilds it")
    stored = about["vocabulary"]
    frames, one_answer = (
        {t: tuple(tuple(ids) for ids in frame) for t, frame in stored[name].items()}
        for name in ("frames", "one_answer")
    )
    fields = {
        name: Field(
            _sequences(table[name]),
            _sequences(table[f"{name}_turns"]),
            table[f"{name}_cap"].to_numpy().astype(np.int64),
            None if name == "prompt" else _sequences(table[f"{name}_size"]),
        )
        for name in FIELDS
    }
    sources = table["source"].combine_chunks().cast(pa.string())
    rows = np.flatnonzero(pc.equal(sources, "train").to_numpy(zero_copy_only=False))
    return Tokens(
        table["id"].combine_chunks(),
        sources,
        fields,
        Vocabulary(stored["pad"], tuple(stored["newline"]), frames, one_answer),
        {name: _extent(field, rows) for name, field in fields.items()},
    )


def _extent(field: Field, rows: np.ndarray) -> Field:
    """What truncation asks of a field: how long it is, where its turns start; but not its ids."""
    empty = Sequences(np.zeros(0, np.int32), _offsets(field.tokens.lengths[rows]))
    size = field.size.take(rows) if field.size is not None else None
    return Field(empty, field.turns.take(rows), field.cap[rows], size)


def safe_pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token id that pads and never stands in a sequence.

    Classifiers of the Hugging Face kind read the hidden state of the last token that is not padding.
    Where padding is also the end of sequence (or there is none), they read the wrong one. So: the
    tokenizer's own pad token unless it doubles as another, else a special token nobody uses.

    Raises:
        InputError: there is no such token.
    """
    used = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    used |= {tokenizer.cls_token_id, tokenizer.sep_token_id}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in used:
        return int(tokenizer.pad_token_id)
    added = {i: str(t) for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    spare = {i: text for i, text in added.items() if i not in used}
    if not spare:
        raise InputError(
            f"{tokenizer.name_or_path}: no token to pad with: the pad token is missing or doubles as "
            "another, and there is no unused special token; add a pad token to the tokenizer and model"
        )
    telling = [
        i for i, text in spare.items() if re.search("pad|reserved|unused|extra", text.lower())
    ]
    return min(telling or spare)


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    begin = _first(tokenizer.bos_token_id, tokenizer.cls_token_id)
    end = _first(tokenizer.eos_token_id, tokenizer.sep_token_id)

    def framed(literals: tuple[str, ...]) -> list[list[int]]:
        frame = [ids.tolist() for ids in _tokenize_texts(tokenizer, list(literals))]
        return [begin + frame[0], *frame[1:-1], frame[-1] + end]

    newline = _tokenize_texts(tokenizer, ["\n"])[0].tolist()
    return {
        "pad": safe_pad_id(tokenizer),
        "special": sorted({*begin, *end, safe_pad_id(tokenizer)}),
        "newline": newline,
        "frames": {name: framed(literals) for name, literals in TEMPLATES.items()},
        "one_answer": {name: framed(literals) for name, literals in ONE_ANSWER.items()},
    }


def _first(*ids: int | None) -> list[int]:
    return next(([i] for i in ids if i is not None), [])


def _tokenize_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Sequences:
    """Ids of each text, in batches that bound the memory of the tokenizer's own objects."""
    parts: list[np.ndarray] = []
    lengths: list[int] = []
    for start in range(0, len(texts), 8192):
        rows = _ids(tokenizer, texts[start : start + 8192])
        lengths += map(len, rows)
        parts.append(np.fromiter(chain.from_iterable(rows), np.int32))
    return Sequences(np.concatenate([np.zeros(0, np.int32), *parts]), _offsets(np.array(lengths)))


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of each text, special tokens in it spelled out and none added."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        # The same ids two to three times as fast: offsets into the text are left out.
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        return [row.ids for row in backend.encode_batch_fast(texts, add_special_tokens=False)]
    return tokenizer(  # a tokenizer without a fast backend
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]


def _join_turns(
    turns: Sequences, rows: np.ndarray, newline: np.ndarray
) -> tuple[Sequences, Sequences]:
    """Join the turns of each row by a newline; also where each turn starts within its row."""
    pool = np.concatenate([newline, turns.ids])
    count = len(turns)
    separator = np.full(count, len(newline))
    last = rows[1:][np.diff(rows) > 0] - 1
    separator[last] = 0
    starts = np.stack(
        [turns.offsets[:-1] + len(newline), np.zeros(count, np.int64)], axis=1
    ).ravel()
    lengths = np.stack([turns.lengths, separator], axis=1).ravel()
    ids = _gather(pool, starts, lengths).ids
    ends = _offsets(turns.lengths + separator)
    joined = Sequences(ids, ends[rows])
    within = ends[:-1] - np.repeat(joined.offsets[:-1], np.diff(rows))
    return joined, Sequences(within.astype(np.int32), rows)


def _word_cap(
    tokenizer: PreTrainedTokenizerBase,
    texts: pa.Array,
    rows: np.ndarray,
    starts: Sequences,
    cap: int,
) -> np.ndarray:
    """How many tokens of each row's joined turns its first `cap` words make: int64 (rows,).

    Rows within the cap get a bound no row reaches. Of the others only the turn in which the cap falls
    is tokenised again, up to it.
    """
    words = pc.count_substring_regex(texts, WORD).to_numpy(zero_copy_only=False)
    before = _offsets(words)
    total = before[rows[1:]] - before[rows[:-1]]
    kept = np.full(len(rows) - 1, np.iinfo(np.int64).max)
    over = np.flatnonzero(total > cap)
    if len(over):
        target = before[rows[over]] + cap
        turn = np.searchsorted(before, target, side="left") - 1
        heads = [
            _first_words(text, int(n))
            for text, n in zip(texts.take(turn).to_pylist(), target - before[turn], strict=True)
        ]
        kept[over] = starts.ids[turn] + _tokenize_texts(tokenizer, heads).lengths
    return kept


def _first_words(text: str, count: int) -> str:
    words = re.finditer(r"\S+", text)
    end = [match.end() for match, _ in zip(words, range(count), strict=False)]
    return text[: end[-1]] if end else ""


def _forbid_special(
    columns: Mapping[str, Any], vocabulary: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Assert what everything later relies on: the text holds none of the tokens that frame it."""
    for name in FIELDS:
        found = np.isin(np.asarray(columns[name].flatten()), vocabulary["special"])
        if found.any():
            raise InputError(
                f"{tokenizer.name_or_path}: the text of {name} encodes to a special token "
                f"({int(found.sum())} times); this tokenizer cannot keep special tokens inert"
            )


# --- ids → sequences --------------------------------------------------------------------------------


def encode(
    tokens: Tokens,
    encoding: Encoding,
    view: View,
    max_length: int | np.ndarray | None = None,
) -> Sequences:
    """Assemble every battle's sequence.

    Args:
        encoding: template, truncation, the most tokens a sequence may have, template included
            (unless `max_length` says otherwise), and how many it may have on average.
        view: `BA` shows answer B in the place of answer A; `A` and `B` show one answer alone.
        max_length: the same for all rows, or int (rows,).

    Returns:
        Sequences of at most `max_length` tokens, rows as in `tokens`, the template always whole; with
        `encoding.tokens_per_battle`, none is longer than the :func:`waterline`.

    Raises:
        InputError: `max_length` leaves no room beside the template, or as for :func:`waterline`.
    """
    lengths = np.asarray(encoding.max_length if max_length is None else max_length, np.int64)
    frame = _frame(tokens.vocabulary, encoding, view)
    fields = _shown(tokens.fields, encoding, view)
    framing = _framing(frame, fields)
    shortest, most = lengths.min(initial=np.iinfo(np.int64).max), framing.max(initial=0)
    if shortest < most + ROOM:
        raise InputError(
            f"max_length {shortest}: template {encoding.template!r} takes {most} tokens, "
            f"which leaves {shortest - most} for the battle; at least {ROOM} needed"
        )
    if encoding.tokens_per_battle is not None:
        longest = int(lengths.max(initial=shortest))
        lengths = np.minimum(lengths, waterline(tokens, encoding, view, longest))
    budget = np.broadcast_to(lengths, len(tokens)) - framing
    return _fill(frame, fields, *TRUNCATIONS[encoding.truncation](fields, budget))


def waterline(tokens: Tokens, encoding: Encoding, view: View, max_length: int) -> int:
    """The length all sequences are cut at, so that they have `tokens_per_battle` tokens on average.

    It is the greatest one, up to `max_length`, at which the training battles (source `train`) of the
    whole file have no more than that in the mean, template included. So short battles stay whole and
    the longest give first, as the two answers do within a battle; and what is kept of a battle does
    not depend on the rows that a fold, a shard or a test happens to hold. The length is the same for
    both orders, and for both answers shown alone.

    Of all ways to spend a budget, this one has the shortest longest sequence and the least sum of any
    convex cost, such as attention's squares; and the greatest sum of any use that grows ever more
    slowly with the tokens kept of a battle, whatever its size (A. W. Marshall, I. Olkin and
    B. C. Arnold 2011, Inequalities: Theory of Majorization and Its Applications).

    Raises:
        InputError: the file holds no training battle, or the template alone takes too much.
    """
    training, budget = tokens.training or {}, encoding.tokens_per_battle
    if budget is None:
        return max_length
    if not training or not len(training["prompt"].cap):
        raise InputError(
            "encoding.tokens_per_battle: the tokens hold no training battle to find a length by"
        )
    frame = _frame(tokens.vocabulary, encoding, view)
    truncate = TRUNCATIONS[encoding.truncation]
    # Both orders are equally long: one will do. Answers shown alone are not: their mean.
    views: tuple[View, ...] = ("AB",) if len(SHOWN[view]) > 2 else ("A", "B")
    shown = [_shown(training, encoding, v) for v in views]
    framings = [_framing(frame, fields) for fields in shown]
    most = max(int(framing.max()) for framing in framings)
    rows = len(training["prompt"].cap)

    def total(length: int) -> int:
        """Tokens of all training battles, cut at a length."""
        return sum(
            int(truncate(fields, length - framing)[1].sum() + framing.sum())
            for fields, framing in zip(shown, framings, strict=True)
        )

    lengths = range(most + ROOM, max_length + 1)
    found = bisect_right(lengths, budget * rows * len(shown), key=total)
    if not found:
        least = total(most + ROOM) / (rows * len(shown))
        raise InputError(
            f"encoding.tokens_per_battle {budget}: cut to {most + ROOM} tokens each, of which the "
            f"template takes {most}, training battles still have {least:.1f} on average; raise it"
        )
    return lengths[found - 1]


def _shown(fields: Mapping[str, Field], encoding: Encoding, view: View) -> list[Field]:
    """The fields of a view, without their sizes where these are not stated."""
    shown = [fields[name] for name in SHOWN[view]]
    return shown if encoding.sizes else [replace(field, size=None) for field in shown]


def _framing(frame: tuple[tuple[int, ...], ...], fields: list[Field]) -> np.ndarray:
    """Tokens of each row's sequence that are not of the battle: int64 (rows,)."""
    sizes = [field.size.lengths for field in fields if field.size is not None]
    return np.full(len(fields[0].cap), sum(map(len, frame))) + sum(sizes)


def _frame(vocabulary: Vocabulary, encoding: Encoding, view: View) -> tuple[tuple[int, ...], ...]:
    """The literals that a view's fields are set between."""
    literals = vocabulary.frames if len(SHOWN[view]) > 2 else vocabulary.one_answer
    return literals[encoding.template]


def truncate_winners(fields: list[Field], budget: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The winners' rule: what to keep of the prompt and of one or two answers.

    Fields are cut to their word caps. A battle still longer than the budget has its prompt cut to 256
    tokens (half the budget, where that is less), then the longer answer's tail trimmed until both are
    equal, then both alike. An odd token that is left goes to neither, so both orders keep the same text.

    Args:
        budget: int64 (rows,), tokens to keep at most.

    Returns:
        starts and lengths, int64 (rows, fields), within each field's row.
    """
    prompt, *answers = (np.minimum(f.tokens.lengths, f.cap) for f in fields)
    over = prompt + sum(answers) > budget
    cut = np.minimum(prompt, np.minimum(PROMPT_TOKENS, budget // 2))
    prompt = np.where(over, cut, prompt)
    lengths = np.stack([prompt, *_share(answers, budget - prompt)], axis=1)
    return np.zeros_like(lengths), lengths


def truncate_rounds(fields: list[Field], budget: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The round-aware rule: what to keep of the prompt and of one or two answers.

    Whole rounds (a prompt's turn with its answers) are dropped from the front until the rest fits.
    The last round always stays; where it alone is too long, its prompt keeps a quarter of the budget
    (more, if the answers leave it) and the answers share what is left, the longer giving first.

    Args:
        budget: int64 (rows,), tokens to keep at most.

    Returns:
        starts and lengths, int64 (rows, fields), within each field's row.
    """
    totals = np.stack([f.tokens.lengths for f in fields], axis=1)
    turns = np.stack([f.turns.lengths for f in fields], axis=1)
    rounds = np.maximum(turns.max(axis=1), 1)
    offsets = _offsets(rounds)
    row = np.repeat(np.arange(len(rounds)), rounds)
    number = np.arange(len(row)) - offsets[row]
    starts = np.stack([_turn_start(f, row, number) for f in fields], axis=1)
    fits = ((totals[row] - starts).sum(axis=1) <= budget[row]) | (number == rounds[row] - 1)
    if not len(row):
        return totals, totals
    kept = np.minimum.reduceat(np.where(fits, number, np.iinfo(np.int64).max), offsets[:-1])
    starts = starts[offsets[:-1] + kept]
    prompt, *answers = (totals - starts).T
    prompt = np.minimum(prompt, np.maximum(budget // 4, budget - sum(answers)))
    return starts, np.stack([prompt, *_share(answers, budget - prompt)], axis=1)


TRUNCATIONS = {"winners": truncate_winners, "rounds": truncate_rounds}
"""What to keep of the fields of battles that are too long."""


def _turn_start(field: Field, row: np.ndarray, number: np.ndarray) -> np.ndarray:
    """Where a round starts in a field; at the field's end, for one that has fewer turns."""
    exists = number < field.turns.lengths[row]
    position = np.where(exists, field.turns.offsets[row] + number, 0)
    start = field.turns.ids[position] if len(field.turns.ids) else np.zeros(len(row), np.int64)
    return np.where(exists, start, field.tokens.lengths[row]).astype(np.int64)


def _share(answers: Sequence[np.ndarray], room: np.ndarray) -> list[np.ndarray]:
    """Trim the answers' lengths to a common room: the longer gives first, then both alike."""
    if len(answers) == 1:
        return [np.minimum(answers[0], room)]
    first, second = answers
    half = room // 2
    short = np.minimum(np.minimum(first, second), half)
    fits = first + second <= room
    trimmed = [
        np.where(length <= half, length, np.where(other <= half, room - short, half))
        for length, other in ((first, second), (second, first))
    ]
    return [np.where(fits, first, trimmed[0]), np.where(fits, second, trimmed[1])]


def _fill(
    frame: tuple[tuple[int, ...], ...],
    fields: list[Field],
    starts: np.ndarray,
    lengths: np.ndarray,
) -> Sequences:
    """Set the kept stretches between the template's literals, for all rows in one gather."""
    rows = len(starts)
    # In the order of the sequence: a pool of ids, and where each row's stretch of it starts and ends.
    pools: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def literal(ids: tuple[int, ...]) -> None:
        pools.append((np.array(ids, np.int32), np.zeros(rows, np.int64), np.full(rows, len(ids))))

    for i, field in enumerate(fields):
        literal(frame[i])
        pools.append((field.tokens.ids, field.tokens.offsets[:-1] + starts[:, i], lengths[:, i]))
        if field.size is not None:
            pools.append((field.size.ids, field.size.offsets[:-1], field.size.lengths))
    literal(frame[-1])
    base = _offsets(np.array([len(ids) for ids, _, _ in pools]))
    begins = [start + at for (_, start, _), at in zip(pools, base, strict=False)]
    flat = _gather(
        np.concatenate([ids for ids, _, _ in pools]),
        np.stack(begins, axis=1).ravel(),
        np.stack([length for _, _, length in pools], axis=1).ravel(),
    )
    return Sequences(flat.ids, flat.offsets[:: len(pools)])


def _gather(pool: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Sequences:
    """Concatenate stretches of a pool."""
    offsets = _offsets(lengths)
    index = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
    return Sequences(pool[index], offsets)


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def _list_array(sequences: Sequences) -> pa.LargeListArray:
    return pa.LargeListArray.from_arrays(sequences.offsets, pa.array(sequences.ids, pa.int32()))


def _sequences(column: pa.ChunkedArray) -> Sequences:
    lists = column.combine_chunks()
    if isinstance(lists, pa.ChunkedArray):  # an empty table has no chunk to combine into
        lists = pa.concat_arrays(lists.chunks) if lists.num_chunks else pa.array([], lists.type)
    lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
    return Sequences(lists.flatten().to_numpy(), _offsets(lengths))
