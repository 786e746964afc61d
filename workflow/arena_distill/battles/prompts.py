"""Define, for all sources, when two battles have the same prompt."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from hashlib import blake2b
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_DIGEST = pa.binary(16)


def prompt_groups(prompts: pa.ChunkedArray) -> np.ndarray:
    """Number the prompts (list<string>): those that are the same share a number.

    Prompts are the same if they are so in Unicode's NFKC form, case folded, with each run of white
    space (ends of turns included) taken for one space.

    Returns:
        int64 (rows,), in the order of first appearance.
    """
    return number_digests([prompt_digests(prompts)])


def prompt_digests(prompts: pa.ChunkedArray) -> pa.ChunkedArray:
    """What stands for prompts (list<string>) where they are compared: 16 bytes (rows,).

    The same prompts have the same bytes. That any two of a billion others have is as likely as 1 in 10²⁰.
    """

    def digest(text: str) -> bytes:
        return blake2b(normalised(text).encode(), digest_size=_DIGEST.byte_width).digest()

    texts = (pc.binary_join(chunk, " ").to_pylist() for chunk in prompts.chunks)
    return pa.chunked_array([pa.array(map(digest, some), _DIGEST) for some in texts], _DIGEST)


def number_digests(digests: Iterable[pa.ChunkedArray]) -> np.ndarray:
    """The groups of prompts by their digests, as of :func:`prompt_groups`: int64 (rows,)."""
    whole = pa.chunked_array([chunk for part in digests for chunk in part.chunks], _DIGEST)
    numbers: np.ndarray = whole.combine_chunks().dictionary_encode().indices.to_numpy()
    return numbers.astype(np.int64)


def distinct_prompts(battles: pa.Table) -> tuple[np.ndarray, pa.LargeStringArray]:
    """The prompts of some battles, each once, as they are compared.

    Args:
        battles: columns `prompt` and `group`.

    Returns:
        numbers: int64 (rows,), the position of each row's prompt in `prompts`.
        prompts: their texts, :func:`normalised`, in the order of their groups.
    """
    groups = battles["group"].to_numpy()
    _, first, numbers = np.unique(groups, return_index=True, return_inverse=True)
    once = np.zeros(len(groups), np.bool_)
    once[first] = True
    # Filtered chunk by chunk: all texts may be too long for one Arrow array of strings.
    chunks = battles["prompt"].filter(pa.array(once)).chunks
    texts = chain.from_iterable(pc.binary_join(chunk, " ").to_pylist() for chunk in chunks)
    prompts = pa.array(map(normalised, texts), pa.large_string())
    return numbers, prompts.take(pa.array(first.argsort().argsort()))


def normalised(text: str) -> str:
    """The form in which texts are the same: NFKC, case folded, each run of white space one space."""
    if text.isascii():
        return " ".join(text.lower().split())
    # Folding case can undo the normal form, so it is restored.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())
