"""Count the rows of a source: kept, refused, dropped, by vote and by reason."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from arena_distill.battles.parts import Part
from arena_distill.errors import InputError
from arena_distill.files.raw_tables import (
    DROPPED,
    KEPT_AS_RAW_TEXT,
    described,
)
from arena_distill.verdicts import NO_VOTE

VOTE_KINDS = ("A", "B", "tie", "none")
"""Kinds of votes, by the likeliest class."""


def count_rows(parts: Sequence[Part]) -> dict[str, Any]:
    """The counts of one source, as `write_battles` writes them."""
    lines = [line for part in parts for line in part.faults.lines(part.source)]
    dropped = [line for line in lines if line["reason"].startswith(DROPPED)]
    raw_text = [line for line in lines if line["reason"].startswith(KEPT_AS_RAW_TEXT)]
    refused = len(lines) - len(dropped) - len(raw_text)
    kinds = np.concatenate([part.votes.labels for part in parts])
    good = np.concatenate([part.good() for part in parts])
    merged = np.concatenate([part.merged for part in parts])
    reasons: dict[str, dict[str, Any]] = {}
    for line in lines:
        kind = f"{line['column'] or 'row'}: {_kind(line['reason'])}"
        found = reasons.setdefault(kind, {"rows": 0, "first": described(line)})
        found["rows"] += 1
    return {
        "files": [
            {"path": str(part.path), "format": part.format, "rows": part.rows} for part in parts
        ],
        "rows": sum(part.rows for part in parts),
        "refused": refused,
        "dropped": len(dropped),
        "raw_text": len(raw_text),
        "merged": int(merged.sum()),
        "battles": int(good.sum()),
        "votes": {
            kind: {"kept": int((good & mine).sum()), "refused": int((~good & mine).sum())}
            for number, kind in enumerate(VOTE_KINDS)
            if (mine := ~merged & (kinds == (number if kind != "none" else -1))).any()
        },
        "reasons": dict(sorted(reasons.items(), key=lambda item: -item[1]["rows"])),
    }


def _kind(reason: str) -> str:
    """A reason without its example, so that rows may be counted by it."""
    known = next((sign for sign in (KEPT_AS_RAW_TEXT, DROPPED) if reason.startswith(sign)), "")
    return known + re.split(r": |, by row ", reason.removeprefix(known))[0]


def print_counts(source: str, counts: Mapping[str, Any]) -> None:
    """Print what `count_rows` has counted."""
    formats = ", ".join(sorted({file["format"] for file in counts["files"]}))
    left = [f"{counts[name]:,} {text}" for name, text in _LEFT.items() if counts[name]]
    print(f"{source} ({formats}): {counts['rows']:,} rows" + "".join(f", {x}" for x in left))
    votes = [f"{kind} {count['kept']:,}" for kind, count in counts["votes"].items()]
    print(f"  {counts['battles']:,} battles by vote: {', '.join(votes)}")
    for reason, found in counts["reasons"].items():
        print(f"  {found['rows']:,} × {reason}; first: {found['first']}")


_LEFT = {
    "refused": "refused",
    "dropped": "dropped",
    "raw_text": "kept as raw text",
    "merged": "merged with another annotator's",
}


def check_refused(
    source: str, parts: Sequence[Part], counts: Mapping[str, Any], max_refused: float
) -> None:
    """Refuse a source of which too much was refused; what is dropped was not."""
    kept, given = (
        np.concatenate([part.votes.labels[rows] for part, rows in zip(parts, of, strict=True)])
        for of in (
            [part.good() for part in parts],
            [~part.dropped & ~part.merged for part in parts],
        )
    )
    lost = [VOTE_KINDS[kind] for kind in np.setdiff1d(given, [*kept, NO_VOTE])]
    share = counts["refused"] / counts["rows"]
    if share <= max_refused and not lost:
        return
    reason, found = next(iter(counts["reasons"].items()))
    what = (
        f"{counts['refused']:,} of {counts['rows']:,} rows are refused, more than data.max_refused "
        f"({max_refused:g})"
        if share > max_refused
        else f"every vote of kind {lost[0]} is refused"
    )
    raise InputError(
        f"{source}: {what}; most often ({found['rows']:,} rows): {reason}; first: {found['first']}"
    )
