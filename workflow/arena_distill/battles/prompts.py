"""Define, for all sources, when two battles have the same prompt."""

from __future__ import annotations

import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def prompt_groups(prompts: pa.ChunkedArray) -> np.ndarray:
    """Number the prompts (list<string>): those that are the same share a number.

    Prompts are the same if they are so in Unicode's NFKC form, case folded, with each run of white
    space (ends of turns included) taken for one space.

    Returns:
        int64 (rows,), in the order of first appearance.
    """
    texts = pc.binary_join(prompts, " ").combine_chunks().dictionary_encode()
    # Once per distinct text; what differs may still become the same.
    same = pa.array([normalised(text) for text in texts.dictionary.to_pylist()], pa.string())
    numbers = same.dictionary_encode().indices.to_numpy()
    groups: np.ndarray = numbers[texts.indices.to_numpy()].astype(np.int64)
    return groups


def distinct_prompts(battles: pa.Table) -> tuple[np.ndarray, pa.StringArray]:
    """The prompts of some battles, each once, as they are compared.

    Args:
        battles: columns `prompt` and `group`.

    Returns:
        numbers: int64 (rows,), the position of each row's prompt in `prompts`.
        prompts: their texts, :func:`normalised`, in the order of their groups.
    """
    groups = battles["group"].to_numpy()
    _, first, numbers = np.unique(groups, return_index=True, return_inverse=True)
    texts = pc.binary_join(battles["prompt"].take(pa.array(first)), " ").to_pylist()
    return numbers, pa.array([normalised(text) for text in texts], pa.string())


def normalised(text: str) -> str:
    """The form in which texts are the same: NFKC, case folded, each run of white space one space."""
    # Folding case can undo the normal form, so it is restored.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())
