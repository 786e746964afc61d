"""Write `submission.csv` in the form of the competitions: LMSYS with ties, WSDM without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arena_distill.battles.votes import classes_of
from arena_distill.errors import InputError
from arena_distill.files.artifacts import read_parquet, write_text
from arena_distill.files.keys import locate
from arena_distill.verdicts import CLASSES, WINNERS

SUM_TOLERANCE = 1e-6


def write_submission(predictions: Path, battles: Path, output: Path) -> None:
    """Write the submitted variant in Kaggle's format → `submission.csv`.

    One row per test battle, in the order of `battles`. With ties `id`, `winner_model_a`, `winner_model_b`,
    `winner_tie`; numbers are written in full precision, as they were checked. Of two classes `id` and
    `winner`: model_a or model_b, the more probable one (model_a where they are equal).

    Raises:
        InputError: a test battle has no prediction or several, a prediction belongs to no test
            battle, or its numbers are not probabilities.
    """
    import pandas as pd

    test = read_parquet(battles, ["id", "source", "vote"])
    winners = WINNERS[: classes_of(test)]
    table = read_parquet(predictions, ["id", *winners, "submitted"])
    table = table.filter(table["submitted"])
    ids = test.filter(pc.equal(test["source"].cast(pa.string()), "test"))["id"].combine_chunks()
    probabilities = np.column_stack([table[name].to_numpy() for name in winners]).astype(np.float64)
    predicted = table["id"].combine_chunks()
    _check_submission(ids, predicted, probabilities, predictions)
    probabilities = probabilities[locate(ids, predicted, str(predictions))]
    frame = pd.DataFrame(probabilities, columns=list(winners))
    if len(winners) == 2:
        frame = pd.DataFrame({"winner": np.array(CLASSES)[probabilities.argmax(axis=1)]})
    frame.insert(0, "id", ids.to_pylist())
    write_text(frame.to_csv(index=False, lineterminator="\n"), output)
    print(f"{output}: {len(frame):,} battles")


def _check_submission(
    ids: pa.Array, predicted: pa.Array, probabilities: np.ndarray, file: Path
) -> None:
    """Raise InputError for errors that `locate` does not find: foreign ids and invalid numbers."""
    foreign = predicted.filter(pc.invert(pc.is_in(predicted, ids)))
    if len(foreign):
        raise InputError(
            f"{file}: {len(foreign)} predictions belong to no test battle, "
            f"for example that of {foreign[0]}"
        )
    faults = {
        "are not finite": ~np.isfinite(probabilities).all(axis=1),
        "are negative": (probabilities < 0).any(axis=1),
        "do not sum to 1": abs(probabilities.sum(axis=1) - 1) > SUM_TOLERANCE,
    }
    for fault, mask in faults.items():
        if mask.any():
            first = int(mask.argmax())
            raise InputError(
                f"{file}: the probabilities of {int(mask.sum())} test battles {fault}; id "
                f"{predicted[first]}: {', '.join(map(str, probabilities[first]))}"
            )
