"""Read JSON lines, and JSON lists of objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from arena_distill.errors import InputError
from arena_distill.files.raw_tables import Column, Faults, RawTable

# Numbers stay the text they were written as: "3.10" is not 3.1, and no number is too long. NaN is missing.
JSON_TEXTS = json.JSONDecoder(
    strict=False, parse_float=str, parse_int=str, parse_constant=lambda _: None
)


def read_json_file(path: Path, text: str, kind: str) -> RawTable:
    """Read JSON lines, or one JSON list of objects."""
    text = text.removeprefix("\ufeff")
    if kind == "json" and text.lstrip().startswith("["):
        return _read_json_list(path, text)
    # Not splitlines(): a JSON text may hold U+2028 and its like.
    lines = [line for line in text.split("\n") if line and not line.isspace()]
    records: list[dict[str, Any]] = []
    numbers: list[int] = []
    lost: list[tuple[int, str]] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = JSON_TEXTS.decode(line)
            if not isinstance(record, dict):
                raise ValueError("a JSON object per line expected")
        except (ValueError, RecursionError) as error:
            lost.append((number, f"not a battle: {error}"))
            continue
        records.append(record)
        numbers.append(number)
    if lost and not records:
        raise InputError(f"{path}, row {lost[0][0]}: {lost[0][1]}; is it a JSON-lines file?")
    return _of_records(path, records, numbers, lost)


def _read_json_list(path: Path, text: str) -> RawTable:
    try:
        values = JSON_TEXTS.decode(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON list of objects: {error}") from None
    rows = list(enumerate(values, start=1))
    records = [(number, record) for number, record in rows if isinstance(record, dict)]
    lost = [(n, "not a battle: a JSON object expected") for n, r in rows if not isinstance(r, dict)]
    return _of_records(path, [r for _, r in records], [n for n, _ in records], lost)


def _of_records(
    path: Path, records: list[dict[str, Any]], numbers: list[int], lost: list[tuple[int, str]]
) -> RawTable:
    names = list(dict.fromkeys(name for record in records for name in record))
    columns: dict[str, Column] = {n: [record.get(n) for record in records] for n in names}
    faults = Faults(path, np.array(numbers, np.int64), lost)
    return RawTable(path, columns, len(records) + len(lost), faults)
