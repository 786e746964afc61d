"""Combine the final predictions of a stack's members: every length and order of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from arena_distill.config.phases.prediction import StackedViewsSettings
from arena_distill.files.artifacts import provenance
from arena_distill.files.keys import key, locate
from arena_distill.files.logits import write_logits
from arena_distill.files.probabilities import read_probabilities
from arena_distill.prediction.averages import read_views
from arena_distill.scoring.stacks import combine, names_of, read_stack, surface_logits


def combine_views(
    logits: Sequence[Path],
    stack: Path,
    output: Path,
    *,
    settings: StackedViewsSettings,
    surface: Path | None = None,
) -> None:
    """Combine what the members' deployed models say → logits and ids as of ``test_time.score_test``.

    The weights are those of all battles out of fold. Trees say the same at every length, in every order.

    Args:
        logits: the members' files of test or of held-out battles, in the order of `settings`.
        stack: the file of ``scoring.stacks.fit_stack``.
        surface: `surface.parquet`, where trees are a member.

    Raises:
        InputError: a file is damaged, lacks a row, or was made with other lengths, orders or another
            cascade.
    """
    _, rows = read_views(logits[0], settings)
    rows = rows.select(["id", "source"])
    found = []
    for path in logits:
        views, ids = read_views(path, settings)
        found.append(views[locate(key(rows), key(ids), str(path))])
    if surface is not None:
        trees = surface_logits(read_probabilities(surface, key(rows)))
        found.append(np.broadcast_to(trees[:, None, None], found[0].shape))
    combined = combine(found, *read_stack(stack, names_of(settings))).astype(np.float32)
    write_logits(
        output, combined, rows, provenance("stacked_views", settings.model_dump(mode="json"))
    )
    print(f"{output}: {len(rows):,} battles, {len(found)} members")
