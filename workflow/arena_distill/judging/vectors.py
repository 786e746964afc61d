"""Make a judge's test vectors, and check a judge against them.

The battles hold what goes wrong when somebody else asks a judge: several turns, text beyond every
length, an empty answer, special tokens and template literals written out as text, other scripts, and
two equal answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from arena_distill.encoding.sequences import FIELDS, Sequences
from arena_distill.errors import InputError
from arena_distill.judging.battles import battles_table
from arena_distill.judging.contract import Contract, Vector, changed_files
from arena_distill.judging.judge import Judge
from arena_distill.judging.verdicts import Verdicts

if TYPE_CHECKING:
    from arena_distill.judging.battles import Battles

TOLERANCE = {"float32": 1e-4}
"""By dtype, how far probabilities may be from the vectors' on another machine or server."""

_SCRIPTS = "Как дела? 東京は日本の首都です。 שלום 😀👩‍👩‍👧 e\u0301"


def battles_of(judge: Judge) -> list[dict[str, str | list[str]]]:
    """The battles of a judge's test vectors; `about` says what each is for."""
    literals = chain(*(model.contract.template.literals for model in judge.models))
    special = " ".join(
        [*dict.fromkeys(literals), "<s> </s> <eos> <bos> <|eot_id|> <|im_end|> [PAD]"]
    )
    counted = " ".join(
        str(n) for n in range(max(judge.contract.lengths))
    )  # at least a token per number
    return [
        {
            "about": "short",
            "prompt": "What is the capital of France?",
            "response_a": "Paris.",
            "response_b": "It is Lyon, I think.\n\n- **Lyon**",
        },
        {
            "about": "several turns",
            "prompt": [
                "Write a haiku about the sea.",
                "Now one about the moon.",
                "Which is better?",
            ],
            "response_a": ["Waves fold into foam", "Pale coin of the night", "The second one."],
            "response_b": ["The sea, so wide.", "", "Both are fine; it depends on you."],
        },
        {
            "about": "beyond every length",
            "prompt": f"Add these numbers: {counted}",
            "response_a": counted,
            "response_b": f"One by one:\n{counted}\nDone.",
        },
        {
            "about": "an empty answer",
            "prompt": "Say nothing.",
            "response_a": "",
            "response_b": "I would rather say something.",
        },
        {
            "about": "special tokens as text",
            "prompt": f"What are these? {special}",
            "response_a": special,
            "response_b": "Special tokens.",
        },
        {
            "about": "other scripts",
            "prompt": _SCRIPTS,
            "response_a": f"{_SCRIPTS}\u200b\ufeff",
            "response_b": "مرحبا",
        },
        {
            "about": "equal answers",
            "prompt": "1 + 1?",
            "response_a": "2",
            "response_b": "2",
        },
    ]


def make_vectors(judge: Judge) -> tuple[Vector, ...]:
    """The test vectors of a judge, computed by itself."""
    battles = battles_of(judge)
    sequences, found = _ask(judge, battles)
    return tuple(
        Vector(
            about=str(battle["about"]),
            **{name: _turns(battle[name]) for name in FIELDS},
            ids={name: tuple(ids[row].tolist()) for name, ids in sequences.items()},
            logits=found.logits[row].tolist(),
            probabilities=tuple(found.probabilities[row].tolist()),
        )
        for row, battle in enumerate(battles)
    )


@dataclass(frozen=True)
class Differences:
    """How far a judge is from its test vectors.

    ids: what differs, as ``<battle>, <length>/<view>``; these are never to differ.
    logits, probabilities: the largest absolute difference.
    """

    ids: list[str]
    logits: float
    probabilities: float

    def within(self, tolerance: float) -> bool:
        """Whether all ids are equal, and no probability differs by more."""
        return not self.ids and self.probabilities <= tolerance


def compare_with_vectors(judge: Judge) -> Differences:
    """Ask a judge its test vectors, with weights here or on a server."""
    contract = judge.contract
    battles = [vector.model_dump(include={*FIELDS}) for vector in contract.vectors]
    sequences, found = _ask(judge, battles)
    different = [
        f"{vector.about}, {name}"
        for name, ids in sequences.items()
        for row, vector in enumerate(contract.vectors)
        if tuple(ids[row].tolist()) != vector.ids.get(name)
    ]
    return Differences(
        different,
        _distance(found.logits, [vector.logits for vector in contract.vectors]),
        _distance(found.probabilities, [vector.probabilities for vector in contract.vectors]),
    )


def allowed_difference(contract: Contract, tolerance: float | None = None) -> float:
    """How far probabilities may be from the vectors': `tolerance`, or that of the dtype of the weights."""
    return TOLERANCE.get(contract.dtype, 3e-2) if tolerance is None else tolerance


def refuse_another_judge(
    judge: Judge, folder: str, server: str, tolerance: float | None = None
) -> None:
    """Ask a server the judge's test vectors, before it is asked anything else.

    Raises:
        InputError: it says something else: another model, another pooling, a softmax, less precision.
    """
    allowed = allowed_difference(judge.contract, tolerance)
    found = compare_with_vectors(judge)
    if not found.within(allowed):
        apart = f"{found.probabilities:.2g} (at most {allowed:g})"
        raise InputError(
            f"{server}: not the same judge: probabilities of its test vectors differ by {apart}, "
            f"{len(found.ids)} have other token ids; run `arena-distill verify {folder} --server {server}` "
            "and see docs/serving.md"
        )


def print_verification(
    judge: Judge, tolerance: float | None = None, folder: Path | None = None
) -> bool:
    """Print how far a judge is from its vectors; whether it is within `tolerance`.

    Args:
        tolerance: of probabilities; by default as :func:`allowed_difference`.
        folder: the judge's, whose files are compared with the fingerprints.
    """
    allowed = allowed_difference(judge.contract, tolerance)
    found = compare_with_vectors(judge)
    changed = changed_files(folder, judge.contract) if folder else []
    passed = found.within(allowed) and not changed
    for name in changed:
        print(f"not the file of its fingerprint: {name}")
    for name in found.ids:
        print(f"other token ids: {name}")
    print(
        f"{judge.contract.judge}: {len(judge.contract.vectors)} test vectors, "
        f"{len(found.ids)} with other token ids; largest difference of logits {found.logits:.2g}, "
        f"of probabilities {found.probabilities:.2g} (at most {allowed:g}): "
        f"{'the same judge' if passed else 'NOT the same judge'}"
    )
    return passed


def _ask(judge: Judge, battles: Battles) -> tuple[dict[str, Sequences], Verdicts]:
    """The sequences by their name in a vector, and the verdicts."""
    table = battles_table(battles)
    return judge.sequences(table), judge.predict(table)


def _turns(text: str | list[str]) -> tuple[str, ...]:
    return (text,) if isinstance(text, str) else tuple(text)


def _distance(found: np.ndarray, stored: Sequence[object]) -> float:
    expected = np.array(stored, np.float64)
    return float(np.abs(found - expected).max(initial=0.0))
