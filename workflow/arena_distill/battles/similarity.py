"""Find near-duplicate texts: MinHash proposes pairs, and their exact similarity decides.

The similarity of two texts is Jaccard's index |A ∩ B| / |A ∪ B| of their sets of shingles (Broder 1997, On
the resemblance and containment of documents). A shingle is a run of five characters, including spaces
and punctuation. Words do not work: Chinese, Japanese and Thai do not separate them, and in a short prompt
one changed word changes every run of three. Bytes do not work either: five of them are less than two
letters of Hindi, so all Hindi texts look alike. A text of fewer than five characters is one shingle.

Comparing all pairs would take quadratic time. MinHash signatures agree in each position with a
probability equal to the texts' similarity s. They are cut into `bands` of `rows` positions, and texts that
agree in a whole band are candidates, with a probability of 1 - (1 - s^rows)^bands (Indyk and Motwani 1998,
Approximate nearest neighbors). Candidates are then compared exactly: there are no false pairs, and at
the threshold at most a share of 1 - `RECALL` is missed. Whether a pair is found depends only on its two
texts and the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

SHINGLE = 5
"""Characters per shingle."""

RECALL = 0.999
"""Share of the pairs at the threshold that become candidates; of the more similar ones it is larger."""

PAIRS, SHINGLES = 1 << 18, 1 << 22
"""The most items in memory: candidates, and shingles to sign or compare."""

Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Positions of the first and of the second texts, int64, and their similarities, float64."""

Wanted = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(first, second) → bool: which candidates are worth comparing."""

_COLUMNS = (
    1 << 62
)  # 62 bits: among ten million shingles, the probability of any collision is 1 in 90,000


def near_pairs(
    texts: pa.LargeStringArray,
    *,
    threshold: float,
    permutations: int,
    seed: int,
    wanted: Wanted | None = None,
) -> Iterator[Pairs]:
    """Find the pairs of texts whose similarity is `threshold` or more, in parts.

    Memory depends on the texts, not on the pairs; m similar texts have m² / 2 pairs, and take that much
    time unless `wanted` excludes them.

    Args:
        texts: distinct texts, normalised by the caller; an empty one is similar to none.
        threshold: in (0, 1].
        permutations: length of the MinHash signature; more give fewer false candidates.
        seed: of the signatures.
        wanted: called for candidates before they are compared.

    Yields:
        Pairs with the first position below the second; no pair comes twice.
    """
    bands, rows = banding(threshold, permutations)
    keys, sizes = _sign(texts, permutations, seed, bands, rows)
    for first, second in _candidates(keys):
        # No intersection is larger than the smaller set, no union smaller than the larger one.
        small, large = np.sort((sizes[first], sizes[second]), axis=0)
        keep = small / np.maximum(large, 1) >= threshold
        first, second = first[keep], second[keep]
        if wanted is not None:
            keep = wanted(first, second)
            first, second = first[keep], second[keep]
        ends = np.cumsum(sizes[first] + sizes[second])
        for part in slices(ends, SHINGLES):
            similarity = jaccard(texts, first[part], second[part])
            near = similarity >= threshold
            yield first[part][near], second[part][near], similarity[near]


def near_groups(
    texts: pa.LargeStringArray, *, threshold: float, permutations: int, seed: int
) -> np.ndarray:
    """Number the groups of texts that chains of :func:`near_pairs` connect: int64 (texts,), from 0.

    Texts that are already connected are not compared, so many similar texts take little time.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    group = np.arange(len(texts))
    pairs = near_pairs(
        texts,
        threshold=threshold,
        permutations=permutations,
        seed=seed,
        wanted=lambda first, second: group[first] != group[second],
    )
    for first, second, similarity in pairs:
        edges = coo_array((similarity, (group[first], group[second])), (len(texts),) * 2)
        group = connected_components(edges, directed=False)[1][group]
    return np.unique(group, return_inverse=True)[1].astype(np.int64)


def jaccard(texts: pa.LargeStringArray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Compute the similarity of the pairs of texts at the given positions: float64 (pairs,)."""
    involved, position = np.unique((first, second), return_inverse=True)
    sets = _sets(texts.take(pa.array(involved)))
    a, b = sets[position[0]], sets[position[1]]
    shared = np.diff(a.multiply(b).indptr)
    union = np.diff(a.indptr) + np.diff(b.indptr) - shared
    return shared / np.maximum(union, 1)


def banding(threshold: float, permutations: int) -> tuple[int, int]:
    """Choose bands and rows of a signature: the most rows with `RECALL` at the threshold.

    More rows give fewer false candidates. With too few permutations for `RECALL`, bands have one row.
    """
    rows = np.arange(1, permutations + 1)
    enough = recall(threshold, permutations // rows, rows) >= RECALL
    chosen = int(rows[enough].max(initial=1))
    return permutations // chosen, chosen


def recall(similarity: float, bands: Any, rows: Any) -> Any:
    """Probability that two texts of the given similarity become candidates."""
    return 1 - (1 - similarity**rows) ** bands


# --- candidates -----------------------------------------------------------------------------------


def _sign(
    texts: pa.LargeStringArray, permutations: int, seed: int, bands: int, rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """A key per band of each text's signature, uint64 (bands, texts), and its shingles: int64 (texts,)."""
    from rensa import RMinHash

    keys = np.empty((bands, len(texts)), np.uint64)
    sizes = np.empty(len(texts), np.int64)
    lengths = pc.utf8_length(texts).to_numpy(zero_copy_only=False).astype(np.int64)
    for part in slices(np.cumsum(lengths + permutations), SHINGLES):
        sets = _sets(texts[part.start : part.stop])
        sizes[part] = np.diff(sets.indptr)
        shingles, offsets = sets.indices.view(np.uint64), sets.indptr.astype(np.uint64)
        signed = RMinHash.digest_matrix_from_flat_token_hashes(
            shingles, offsets, permutations, seed
        )
        signatures = np.array(signed.to_rows(), np.uint64)[:, : bands * rows]
        places = signatures.reshape(-1, bands, rows)
        keys[:, part] = _hash([places[..., row] for row in range(rows)]).T
    return keys, sizes


def _candidates(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of texts that share a band's key, each once and the lower position first."""
    for band, key in enumerate(keys):
        order = np.argsort(key, kind="stable")
        ordered = key[order]
        # Each text meets those after it in its run of equal keys.
        ends = np.searchsorted(ordered, ordered, side="right")
        others = ends - np.arange(1, len(order) + 1)
        for part in slices(np.cumsum(others), PAIRS):
            place = np.repeat(np.arange(part.start, part.stop), others[part])
            first, second = order[place], order[place + 1 + within(others[part])]
            # An earlier band may have found the pair already.
            new = ~(keys[:band, first] == keys[:band, second]).any(axis=0)
            yield first[new], second[new]


def slices(ends: np.ndarray, most: int) -> Iterator[slice]:
    """Cut items into runs of no more than `most`, or of one item; `ends` is their running total."""
    start, done = 0, 0
    while start < len(ends) and done < ends[-1]:
        stop = max(int(np.searchsorted(ends, done + most, side="right")), start + 1)
        yield slice(start, stop)
        start, done = stop, int(ends[stop - 1])


def within(counts: np.ndarray) -> np.ndarray:
    """Return 0 to count - 1 for each count: int64 (sum of counts,)."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


# --- shingles -------------------------------------------------------------------------------------


def _sets(texts: pa.LargeStringArray) -> Any:
    """The texts' sets of shingles, as a sparse matrix: bool (texts, `_COLUMNS`), its indices the hashes."""
    from scipy.sparse import csr_array

    lengths = pc.utf8_length(texts).to_numpy(zero_copy_only=False).astype(np.int64)
    # Characters count from 1; zeros pad texts that are too short for a shingle.
    places = np.where(lengths > 0, np.maximum(lengths, SHINGLE), 0)
    characters = np.zeros(places.sum(), np.uint64)
    ends = np.cumsum(places)
    where = np.repeat(ends - places, lengths) + within(lengths)
    whole = "".join(texts.to_pylist()).encode("utf-32-le")
    characters[where] = np.frombuffer(whole, np.uint32).astype(np.uint64) + np.uint64(1)
    counts = np.maximum(places - SHINGLE + 1, 0)
    starts = np.repeat(ends - places, counts) + within(counts)
    windows = len(characters) - SHINGLE + 1
    hashes = _hash([characters[i : i + windows] for i in range(SHINGLE)])[starts]
    indices = (hashes >> np.uint64(2)).astype(np.int64)
    indptr = np.concatenate([[0], np.cumsum(counts)])
    present = np.ones(len(indices), np.bool_)
    sets = csr_array((present, indices, indptr), (len(texts), _COLUMNS))
    sets.sum_duplicates()
    return sets


def _hash(parts: list[np.ndarray]) -> np.ndarray:
    """Hash several uint64 arrays into one, element by element (with the finaliser of SplitMix64)."""
    hashed = np.zeros(parts[0].shape, np.uint64)
    for part in parts:
        hashed = (hashed ^ part) * np.uint64(0x9E3779B97F4A7C15)
        hashed ^= hashed >> np.uint64(29)
    hashed = (hashed ^ (hashed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashed = (hashed ^ (hashed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashed ^ (hashed >> np.uint64(31))
