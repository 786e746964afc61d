"""Text to token ids: every field of every battle, once per tokenizer.

The output also holds the ids that the templates need (literals, begin and end of sequence, padding),
so no later job loads a tokenizer. Token ids are never decoded and encoded again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arena_distill.battles.style_features import WORD
from arena_distill.battles.votes import VOTE_FIELDS
from arena_distill.config.phases.encoding import TokensSettings
from arena_distill.encoding.sequences import FIELDS, Sequences, gather, list_array, offsets_of
from arena_distill.encoding.templates import (
    LONGEST_NAME,
    NAME,
    ONE_ANSWER,
    SIZE,
    TEMPLATES,
    UNKNOWN_MODEL,
)
from arena_distill.encoding.text_encoder import encode_texts
from arena_distill.errors import InputError, refusing
from arena_distill.files.artifacts import provenance, read_parquet_parts, write_parquet_parts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a local folder.

    Raises:
        InputError: the folder has no tokenizer.
    """
    from transformers import AutoTokenizer

    with refusing(f"{folder}: cannot load a tokenizer from this folder"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


WORD_CAPS = {"prompt": 256, "response_a": 700, "response_b": 700}
"""The number of words to which the winners cut each field before tokenisation."""

ROWS = 2_048
"""The most battles that are tokenised together."""

_VOTE = tuple(field.name for field in VOTE_FIELDS)


def tokenize_battles(
    battles: Path, tokenizer: Path, output: Path, *, settings: TokensSettings
) -> None:
    """Tokenise every field of `battles.parquet` with the tokenizer in a folder → `tokens.parquet`."""
    loaded = load_tokenizer(tokenizer)
    models = ["model_a", "model_b"] if settings.names else []
    rows = prompts = 0

    def parts() -> Iterator[pa.Table]:
        nonlocal rows, prompts
        for group in read_parquet_parts(battles, ["id", "source", *_VOTE, *FIELDS, *models]):
            for start in range(0, max(len(group), 1), ROWS):
                with refusing(f"{tokenizer}: its tokenizer fails"):
                    tokens = tokenize(group.slice(start, ROWS), loaded, names=settings.names)
                rows += len(tokens)
                prompts += pc.sum(pc.list_value_length(tokens["prompt"])).as_py() or 0
                yield tokens

    with refusing(f"{tokenizer}: its tokenizer fails"):
        vocabulary = vocabulary_of(loaded)
    about = provenance("tokens", settings.model_dump() | {"tokenizer": tokenizer.name})
    write_parquet_parts(parts(), output, about | {"vocabulary": vocabulary})
    print(f"{rows:,} battles tokenised by {tokenizer.name}; prompts: {prompts:,} tokens")


def tokenize(
    battles: pa.Table, tokenizer: PreTrainedTokenizerBase, *, names: bool = False
) -> pa.Table:
    """Compute token ids of every field of every battle.

    Text is data: a special token written in it is encoded as ordinary text.

    Args:
        names: also the models' names, `model_a` and `model_b`.

    Returns:
        A table with `id`, `source`, the vote, and per field `f` (list<int32>: turns joined by a newline),
        `f_turns` (list<int32>: where each turn starts), `f_cap` (int32: tokens within the word cap) and,
        for answers, `f_size` and with `names` `f_name` (list<int32>: its :data:`SIZE` and :data:`NAME`).

    Raises:
        InputError: the tokenizer has no token that is safe for padding, or encodes text as a special one.
    """
    vocabulary = vocabulary_of(tokenizer)
    newline = np.array(vocabulary["newline"], np.int32)
    columns: dict[str, Any] = {name: battles[name] for name in ("id", "source", *_VOTE)}
    for name in FIELDS:
        column = battles[name].combine_chunks()
        texts, rows = column.flatten(), offsets_of(pc.list_value_length(column).to_numpy())
        turns = encode_texts(tokenizer, texts.to_pylist())
        tokens, starts = _join_turns(turns, rows, newline)
        columns[name] = list_array(tokens)
        columns[f"{name}_turns"] = list_array(starts)
        cap = _word_cap(tokenizer, texts, rows, starts, WORD_CAPS[name])
        columns[f"{name}_cap"] = pa.array(np.minimum(cap, tokens.lengths).astype(np.int32))
        if name != "prompt":
            counts, which = np.unique(tokens.lengths, return_inverse=True)
            sizes = encode_texts(tokenizer, [SIZE.format(n) for n in counts.tolist()])
            columns[f"{name}_size"] = list_array(sizes.take(which))
            if names:
                model = battles[name.replace("response", "model")].combine_chunks()
                columns[f"{name}_name"] = list_array(_tokenize_names(tokenizer, model))
    _forbid_special(columns, vocabulary, tokenizer)
    return pa.table(columns)


def safe_pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a token id for padding that never occurs in a sequence.

    Hugging Face classifiers read the hidden state of the last token that is not padding. If the pad
    token is also the end of sequence (or is missing), they read the wrong one. So use the tokenizer's
    own pad token if it has no second role, else an unused special token.

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
            f"{tokenizer.name_or_path}: no token for padding: the pad token is missing or has a second "
            "role, and there is no unused special token; add a pad token to the tokenizer and model"
        )
    telling = [
        i for i, text in spare.items() if re.search("pad|reserved|unused|extra", text.lower())
    ]
    return min(telling or spare)


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The token ids that the templates need, as JSON values.

    Raises:
        InputError: the tokenizer has no token that is safe for padding.
    """
    begin = _first(tokenizer.bos_token_id, tokenizer.cls_token_id)
    end = _first(tokenizer.eos_token_id, tokenizer.sep_token_id)

    def framed(literals: tuple[str, ...]) -> list[list[int]]:
        frame = [ids.tolist() for ids in encode_texts(tokenizer, list(literals))]
        return [begin + frame[0], *frame[1:-1], frame[-1] + end]

    newline = encode_texts(tokenizer, ["\n"])[0].tolist()
    return {
        "pad": safe_pad_id(tokenizer),
        "special": sorted({*begin, *end, safe_pad_id(tokenizer)}),
        "newline": newline,
        "frames": {name: framed(literals) for name, literals in TEMPLATES.items()},
        "one_answer": {name: framed(literals) for name, literals in ONE_ANSWER.items()},
    }


def _first(*ids: int | None) -> list[int]:
    return next(([i] for i in ids if i is not None), [])


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
    ids = gather(pool, starts, lengths).ids
    ends = offsets_of(turns.lengths + separator)
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
    """Count the tokens of the first `cap` words of each row's joined turns: int64 (rows,).

    Rows within the cap get a bound that no row reaches. For the others, only the turn that crosses
    the cap is tokenised again, up to the cap.
    """
    # A word and the space after it are two bytes at the least: short rows need no counting.
    most = offsets_of((pc.binary_length(texts).to_numpy(zero_copy_only=False) + 1) // 2)[rows]
    long = np.repeat(np.diff(most) > cap, np.diff(rows))
    words = np.zeros(len(texts), np.int64)
    words[long] = pc.count_substring_regex(texts.filter(pa.array(long)), WORD)
    before = offsets_of(words)
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
        kept[over] = starts.ids[turn] + encode_texts(tokenizer, heads).lengths
    return kept


def _first_words(text: str, count: int) -> str:
    words = re.finditer(r"\S+", text)
    end = [match.end() for match, _ in zip(words, range(count), strict=False)]
    return text[: end[-1]] if end else ""


def _tokenize_names(tokenizer: PreTrainedTokenizerBase, models: pa.Array) -> Sequences:
    """The :data:`NAME` of each row's model."""
    named = pc.fill_null(models, UNKNOWN_MODEL).dictionary_encode()
    texts = [NAME.format(name[:LONGEST_NAME]) for name in named.dictionary.to_pylist()]
    return encode_texts(tokenizer, texts).take(named.indices.to_numpy())


def _forbid_special(
    columns: Mapping[str, Any], vocabulary: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Check that no token of the template's frame occurs in the text."""
    names = (name for name in columns if name.endswith("_name"))
    for name in (*FIELDS, *names):
        found = np.isin(np.asarray(columns[name].flatten()), vocabulary["special"])
        if found.any():
            raise InputError(
                f"{tokenizer.name_or_path}: the text of {name} encodes to a special token "
                f"({int(found.sum())} times); this tokenizer cannot encode special tokens as text"
            )
