"""Probabilities of battles in parquet files, `truth.parquet` and `surface.parquet`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from arena_distill.files.artifacts import read_parquet
from arena_distill.files.keys import key, locate
from arena_distill.verdicts import CLASSES

PROBABILITIES = tuple(f"p_{name}" for name in CLASSES)
"""The columns of the classes."""


def read_probabilities(path: Path, keys: pa.Array) -> np.ndarray:
    """Probabilities of the rows with these keys: float64 (rows, classes).

    Raises:
        InputError: the file is missing or damaged, or lacks a row.
    """
    table = read_parquet(path)
    names = [name for name in PROBABILITIES if name in table.column_names]
    probabilities = np.column_stack([table[name].to_numpy() for name in names]).astype(np.float64)
    return probabilities[locate(keys, key(table), str(path))]
