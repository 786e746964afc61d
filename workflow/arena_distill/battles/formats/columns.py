"""A raw table under our names of columns, handed out a few thousand rows at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arena_distill.battles.formats.texts import Messages, TextKind, read_messages
from arena_distill.config.source import Reading
from arena_distill.errors import InputError, shown
from arena_distill.files.raw_tables import KEPT_AS_RAW_TEXT, ROWS_AT_ONCE, RawTable, as_texts

# Columns that belong together have to be found together: `response_1` is B beside `response_0` and A
# beside `response_2`. The first names that a file has are taken; upper and lower case are the same.
SYNONYMS: dict[tuple[str, ...], str] = {
    ("id",): "id | question_id | pair_id | conversation_pair_id | prompt_id | uid",
    ("prompt",): "prompt | question | instruction | input | context",
    ("system",): "system | system_prompt",
    ("response_a", "response_b"): "response_a response_b | response_1 response_2 |"
    " response1 response2 | response_0 response_1 | output_1 output_2 | answer_a answer_b",
    ("conversation_a", "conversation_b"): "conversation_a conversation_b | messages_a messages_b",
    ("chosen", "rejected"): "chosen rejected",
    ("completions",): "completions",
    ("answers",): "answers",
    ("winner",): "winner | label | better_response_id | chosen_model_name",
    ("winner_model_a", "winner_model_b", "winner_tie"): "winner_model_a winner_model_b winner_tie",
    ("both_equal",): "both_equal",
    ("grade",): "overall_preference | preference_strength",
    ("grades",): "individual_preference",
    ("margin",): "margin",
    (
        "score_chosen",
        "score_rejected",
    ): "score_chosen score_rejected | chosen_score rejected_score |"
    " chosen-rating rejected-rating | chosen_rating rejected_rating",
    ("weight",): "weight",
    ("model_a", "model_b"): "model_a model_b | model_a_name model_b_name",
    ("model_chosen", "model_rejected"): "chosen_model rejected_model | chosen-model rejected-model",
    ("language",): "language",
    ("category",): "category | category_tag | subset | domain | source",
    ("turn",): "turn",
    ("judge",): "judge | annotator",
}
"""Our names → what files call them, in the order of preference."""

_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"


def resolve(raw: RawTable, mapped: dict[str, str | None]) -> dict[str, str]:
    """Our name of a column → its name in the file, for the columns that are there.

    Args:
        mapped: as `columns` of the configuration; what it names goes before the synonyms.

    Raises:
        InputError: a column of `mapped` is not in the file.
    """
    if absent := [name for name in mapped.values() if name and name not in raw.columns]:
        raise InputError(
            f"{raw.path}: no column {', '.join(absent)}, which `columns` names; {columns_found(raw)}"
        )
    by_case = {name.lower(): name for name in reversed(list(raw.columns))}
    names: dict[str, str] = {}
    for ours, choices in SYNONYMS.items():
        for choice in choices.split("|"):
            theirs = [by_case.get(name) for name in choice.split()]
            if None not in theirs and not set(theirs) & set(mapped.values()):
                names |= zip(ours, theirs, strict=True)  # type: ignore[arg-type]
                break
        for one in ours:  # a model may be known on one side only
            if one in by_case and by_case[one] not in mapped.values():
                names.setdefault(one, by_case[one])
    names |= {ours: name for ours, name in mapped.items() if name}
    return {ours: name for ours, name in names.items() if mapped.get(ours, name)}


def columns_found(raw: RawTable) -> str:
    names = list(raw.columns)
    return f"columns found: {', '.join(map(shown, names[:20]))}" + (
        ", …" if len(names) > 20 else ""
    )


@dataclass(frozen=True)
class Table:
    """A raw table, the file's names of its columns, and how it is to be understood."""

    raw: RawTable
    names: dict[str, str]  # ours → the file's
    kinds: dict[str, TextKind]  # of the columns with texts, by our names
    reading: Reading
    votes: bool  # whether votes are read
    keep_unreadable: bool  # keep the raw text of a cell that cannot be read

    def pieces(self) -> Iterator[Rows]:
        count = len(self.raw.numbers)
        for start in range(0, max(count, 1), ROWS_AT_ONCE):
            yield Rows(self, start, min(ROWS_AT_ONCE, count - start))
            self.raw.store.release()


@dataclass(frozen=True)
class Rows:
    """Some rows of a table: `count` of them, from `start` on."""

    table: Table
    start: int
    count: int

    def __contains__(self, name: str) -> bool:
        return name in self.table.names

    @property
    def reading(self) -> Reading:
        return self.table.reading

    def cells(self, name: str) -> pa.Array | list[Any]:
        """The cells of a column, as they are in the file."""
        column = self.table.raw.columns[self.table.names[name]]
        if isinstance(column, list):
            return column[self.start : self.start + self.count]
        return column.slice(self.start, self.count).combine_chunks()

    def objects(self, name: str) -> list[Any]:
        """The cells of a column as Python values."""
        cells = self.cells(name)
        return cells if isinstance(cells, list) else cells.to_pylist()

    def texts(self, name: str) -> pa.Array:
        """A column as texts (string); null where a cell is missing or empty, or there is no column."""
        if name not in self:
            return pa.nulls(self.count, pa.string())
        texts = as_texts(self.cells(name), self.where(name))
        return pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)

    def numbers(self, name: str, expected: str = "a number") -> np.ndarray:
        """A column as numbers: float64, NaN where a cell is missing; what is no number is refused.

        true counts as 1, false as 0.
        """
        texts = pc.utf8_lower(pc.utf8_trim_whitespace(self.texts(name)))
        texts = pc.replace_substring_regex(texts, "^true$", "1")
        texts = pc.replace_substring_regex(texts, "^false$", "0")
        good = pc.match_substring_regex(texts, _NUMBER)
        bad = pc.fill_null(pc.invert(good), False).to_numpy(zero_copy_only=False)
        self.refuse_each(bad, name, texts, f"{expected} expected")
        texts = pc.if_else(good, texts, pa.scalar(None, pa.string()))
        numbers: np.ndarray = texts.cast(pa.float64()).to_numpy(zero_copy_only=False)
        return numbers

    def messages(self, name: str, role: int) -> Messages:
        """A column of texts, turns or messages; what has no role of its own gets `role`."""

        def report(position: int, error: ValueError) -> bool:
            return self._unreadable(position, name, str(error))

        kind = self.table.kinds.get(name, "plain")
        return read_messages(self.cells(name), role, kind, report, self.where(name))

    def refuse_missing(self, name: str, needed: np.ndarray | None = None) -> None:
        """Refuse the rows whose cell of a column of texts is missing, all or those `needed` (bool)."""
        cells = self.cells(name)
        if isinstance(cells, list):
            missing = np.array([cell is None for cell in cells], bool)
        else:
            missing = cells.is_null(nan_is_null=True).to_numpy(zero_copy_only=False)
        for position in np.flatnonzero(missing if needed is None else missing & needed):
            self._unreadable(int(position), name, 'missing; an empty text is written as ""')

    def _unreadable(self, position: int, name: str, reason: str) -> bool:
        """Refuse a row, or say that its raw text is kept: whether it is."""
        keep = self.table.keep_unreadable
        self._add(position, name, (KEPT_AS_RAW_TEXT if keep else "") + reason)
        return keep

    def refuse(self, bad: np.ndarray, name: str, reason: str) -> None:
        """Refuse the rows where `bad` (bool)."""
        for position in np.flatnonzero(bad):
            self._add(int(position), name, reason)

    def refuse_each(self, bad: np.ndarray, name: str, texts: pa.Array, expected: str) -> None:
        """Refuse the rows where `bad` (bool), each with its own text as the reason."""
        for position in np.flatnonzero(bad):
            text = texts[position].as_py()
            what = f"unexpected: {text[:60]!r}" if text else "empty"
            self._add(int(position), name, f"{what}, {expected}")

    def _add(self, position: int, name: str, reason: str) -> None:
        column = self.table.names.get(name, name)
        self.table.raw.faults.add(self.start + position, column, reason)

    def where(self, name: str) -> str:
        return f"{self.table.raw.path}, column {self.table.names[name]}"


def finite(value: Any) -> float | None:
    """A value of a list or an object as a number, if it is one."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) else None


def numbering(names: Iterable[str]) -> int | None:
    """The number by which a file calls its first answer, such as 1 in `output_1`, `output_2`."""
    first, second = (re.search(r"(\d)$", name) for name in names)
    if first and second and int(second[1]) == int(first[1]) + 1:
        return int(first[1])
    return None
