"""Read the verdicts of an external judge from a file: logits, probabilities, or log-odds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arena_distill.battles.formats.columns import columns_found
from arena_distill.battles.surface_features import read_surface
from arena_distill.battles.votes import classes_of, votes_of
from arena_distill.config.phases.scoring import ExternalSettings
from arena_distill.errors import InputError
from arena_distill.files.artifacts import provenance, read_parquet, write_json
from arena_distill.files.keys import key, locate
from arena_distill.files.logits import write_logits
from arena_distill.files.raw_tables import column_texts
from arena_distill.files.readers import read_table
from arena_distill.scoring.log_odds import (
    FEWEST,
    Scale,
    fit_by_surface,
    fit_to_ties,
    fit_to_votes,
    log_softmax,
)
from arena_distill.verdicts import ORDERS, logits_among

COLUMNS: Mapping[str, tuple[str, ...]] = {
    # The forms of a file, and their columns of A, B and tie.
    "logits": ("logit_model_a", "logit_model_b", "logit_tie"),
    "probabilities": ("p_model_a", "p_model_b", "p_tie"),
    "predictions": ("winner_model_a", "winner_model_b", "winner_tie"),  # as in a submission
    "log-odds": ("log_odds",),  # that A is better
}

LEAST = 1e-6
"""The smallest probability: smaller ones in a file, or 0, count as this, so that the logarithm is finite.
So does the rest that a list of the most probable tokens leaves, if it is a rounding error."""

_NUMBER = r"^-?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"


def read_external_logits(
    file: Path, battles: Path, output: Path, *, settings: ExternalSettings
) -> None:
    """Read a judge's logits or probabilities from a parquet, CSV or JSONL file → `logits.npy` and its ids.

    The file has a row per battle, or per battle and order, with the columns `id`, `source` (train, extra
    or unlabelled; default: train, or unlabelled where it has these alone), `order` (AB or BA: which answer
    the judge saw first; default: AB) and one of the sets of columns in `COLUMNS`; where the run has two
    classes, a triple may lack its last. These refer to the battle's own model_a and model_b in both orders.
    A missing order is copied from the other one; rows of other battles are ignored; battles without votes
    may be missing. The output is float32 (rows, orders, classes), natural logarithms of probabilities.
    `file.json` beside it says what was read, and of log-odds how they were mapped onto votes (see
    ``scoring.log_odds``).

    Raises:
        InputError: the file is unusable, a value is invalid, or a battle is missing or duplicated.
    """
    rows, classes = judged_battles(battles, unlabelled=True)
    default = "unlabelled" if settings.battles == "unlabelled" else "train"
    form, keys, order, scores = _judged(file, classes, default)
    wanted = key(rows)
    logits = np.full((len(rows), len(ORDERS), scores.shape[1]), np.nan)
    for number in range(len(ORDERS)):
        mine = np.flatnonzero(order == number)
        position = _positions(wanted, keys.take(pa.array(mine)), f"{file}, order {ORDERS[number]}")
        logits[position >= 0, number] = scores[mine[position[position >= 0]]]
    lacks = np.isnan(logits[..., 0])
    absent = lacks.all(axis=1)
    labelled = pc.not_equal(rows["source"], "unlabelled").to_numpy()
    if settings.battles == "unlabelled":
        absent |= labelled
    elif (missing := absent & labelled).any():
        example = wanted[int(missing.argmax())]
        raise InputError(
            f"{file}: {missing.sum():,} of {labelled.sum():,} labelled battles are missing, for example "
            f"{example}; the file needs all battles of sources train and extra, unless the judge has "
            "`battles: unlabelled`"
        )
    if absent.all():
        raise InputError(f"{file}: none of its battles is of the run: check `id` and `source`")
    others = len(keys) - int(np.count_nonzero(~lacks[~absent]))
    both = int((~lacks[~absent]).all(axis=1).sum())
    logits = np.where(lacks[..., None], logits[:, ::-1], logits)
    mapped = None
    if form == "log-odds":
        mapped = _fit_scale(battles, wanted, logits[..., 0].mean(axis=1), settings.scale)
        logits = mapped.logits(logits[..., 0])
    logits = log_softmax(logits[~absent])
    about = provenance("external_logits", settings.model_dump() | {"file": file.name})
    write_logits(output, logits.astype(np.float32), rows.filter(pa.array(~absent)), about)
    figures = {
        "file": file.name,
        "form": form,
        "battles": len(logits),
        "both_orders": both,
        "ignored": others,
        "map": mapped and mapped.model_dump(),
    }
    write_json(figures | {"provenance": about}, output.with_name(READ))
    print(
        f"{output}: {len(logits):,} battles, {both:,} of them judged in both orders"
        + (f"; {others:,} rows of other battles ignored" if others else "")
        + (f"; {mapped}" if mapped else "")
    )


READ = "file.json"
"""What was read, beside the logits."""


def _fit_scale(battles: Path, keys: pa.Array, log_odds: np.ndarray, scale: float | None) -> Scale:
    """Map a judge's log-odds onto the run's votes.

    Args:
        keys: of battles with and without votes.
        log_odds: float64 (rows,), of them; NaN where the judge has none.
        scale: given, or None.
    """
    table = read_parquet(battles, ["id", "source", "vote", "weight"])
    votes = votes_of(table)[locate(keys, key(table), str(battles))]
    judged = ~np.isnan(log_odds)
    both = judged & votes.known
    if scale is None and both.sum() >= FEWEST:
        return fit_to_votes(log_odds[both], votes[both])
    if not votes.known.any() or not judged.any():
        raise InputError(f"{battles}: log-odds are mapped onto votes, and there are none")
    if scale is not None:
        return fit_to_ties(log_odds[judged], scale, votes[votes.known])
    found, (_, a, b) = read_surface(battles)
    rows = locate(keys, found, str(battles))
    surface = (np.log1p(a) - np.log1p(b))[rows]
    return fit_by_surface(
        log_odds[judged], surface[judged], surface[votes.known], votes[votes.known]
    )


def _judged(file: Path, classes: int, source: str) -> tuple[str, pa.Array, np.ndarray, np.ndarray]:
    """The form of a file; keys, orders (int: position in `ORDERS`) and scores (rows, classes) of its rows.

    The scores are logarithms of probabilities, or log-odds (rows, 1).
    """
    raw = read_table(file)
    given = [kind for kind, names in COLUMNS.items() if set(names[:classes]) <= set(raw.columns)]
    if "id" not in raw.columns or len(given) != 1:
        triples = "; ".join(", ".join(names) for names in COLUMNS.values() if len(names) == 3)
        raise InputError(
            f"{file}: `id` and exactly one of these triples of columns, or log_odds, expected: {triples}"
            f"{' (two of them where there are no ties)' if classes == 2 else ''}; "
            f"{columns_found(raw)}"
        )
    if raw.faults.lost:
        number, reason = raw.faults.lost[0]
        raise InputError(f"{file}, row {number}: {reason}")
    rows = len(raw.numbers)
    default = {"source": source, "order": "AB"}
    filled = {
        name: pc.fill_null(column_texts(raw, name), text)
        if name in raw.columns
        else pa.chunked_array([pa.repeat(text, rows)])
        for name, text in default.items()
    }
    orders = pa.array(ORDERS)
    order = pc.index_in(pc.utf8_upper(filled["order"]), orders).to_numpy().astype(np.float64)
    _refuse(file, raw.numbers, "order", np.isnan(order), "AB or BA expected")
    names = [name for name in COLUMNS[given[0]] if name in raw.columns]
    values = np.stack([_numbers(file, raw.numbers, n, column_texts(raw, n)) for n in names], 1)
    if given[0] not in ("logits", "log-odds"):
        off = (values < 0).any(axis=1) | (np.abs(values.sum(axis=1) - 1) > 0.01)
        _refuse(file, raw.numbers, ", ".join(names), off, "probabilities that sum to 1 expected")
        values = np.log(values.clip(min=LEAST))
    _refuse(file, raw.numbers, ", ".join(names), (np.abs(values) > 1e6).any(1), "logits expected")
    keys = key(pa.table({"id": column_texts(raw, "id"), "source": filled["source"]}))
    scores = values if given[0] == "log-odds" else log_softmax(logits_among(values, classes))
    return given[0], keys, order.astype(np.int64), scores


def _numbers(file: Path, numbers: np.ndarray, name: str, column: pa.ChunkedArray) -> np.ndarray:
    """Parse a text column as numbers: float64 (rows,)."""
    column = pc.utf8_trim_whitespace(pc.fill_null(column, ""))
    good = pc.match_substring_regex(column, _NUMBER).to_numpy()
    _refuse(file, numbers, name, ~good, "a number expected")
    values: np.ndarray = column.cast(pa.float64()).to_numpy()
    return values


def _refuse(file: Path, numbers: np.ndarray, column: str, bad: np.ndarray, why: str) -> None:
    if bad.any():
        others = f" ({bad.sum():,} such rows)" if bad.sum() > 1 else ""
        raise InputError(f"{file}, row {numbers[bad.argmax()]}, column {column}: {why}{others}")


def _positions(wanted: pa.Array, available: pa.Array, where: str) -> np.ndarray:
    """Positions of the wanted keys among the available ones: int64 (wanted,), -1 if missing."""
    counts = pc.value_counts(available.filter(pc.is_in(available, wanted)))
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        raise InputError(f"{where}: {twice.field('values')[0]} is there more than once")
    positions: np.ndarray = pc.fill_null(pc.index_in(wanted, available), -1).to_numpy()
    return positions.astype(np.int64)


def judged_battles(
    battles: Path, columns: Iterable[str] = (), *, unlabelled: bool
) -> tuple[pa.Table, int]:
    """The labelled battles, and if `unlabelled` those without votes: `id`, `source` and `columns`.

    And the number of classes of the run.
    """
    table = read_parquet(battles, ["id", "source", "vote", *columns])
    classes = classes_of(table)
    table = table.drop_columns("vote")
    sources = ["train", "extra", *(["unlabelled"] if unlabelled else [])]
    judged = pc.is_in(table["source"].cast(pa.string()), pa.array(sources))
    return table.filter(judged).combine_chunks(), classes
