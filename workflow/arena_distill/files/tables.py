"""Tables for people, as CSV: no cell is a formula for the program that opens it."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

FORMULA = tuple("=+-@＝＋－＠\t\r\n")
"""What a spreadsheet takes for the beginning of a formula, or drops before one."""


def table_csv(records: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Write records as CSV with a header; None, NaN and a missing key are empty cells.

    Args:
        columns: by default all keys, in the order in which they appear.
    """
    names = list(columns or dict.fromkeys(name for record in records for name in record))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(guarded, names))
    writer.writerows([_cell(record.get(name)) for name in names] for record in records)
    return text.getvalue()


def guarded(text: str) -> str:
    """The text, after an apostrophe if a spreadsheet would compute it; numbers are no formulas."""
    if not text.lstrip(" ").startswith(FORMULA) or _is_number(text):
        return text
    return f"'{text}"


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        return guarded(value.replace("\r\n", "\n").replace("\r", "\n"))  # csv quotes only \n
    return None if value is None or value != value else value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
