"""Texts, turns and messages of a column → flat messages, and these → lists of turns."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arena_distill.errors import InputError
from arena_distill.files.json_files import JSON_TEXTS
from arena_distill.files.raw_tables import Column, as_texts, is_list, plain_text, strings

TextKind = Literal["plain", "turns", "transcript"]
"""What cells of text are: a text, a JSON list of turns, or "\\n\\nHuman: …\\n\\nAssistant: …"."""

USER, ASSISTANT, SYSTEM = range(3)
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), USER),
    **dict.fromkeys(("assistant", "gpt", "model", "bot"), ASSISTANT),
    **dict.fromkeys(("system", "developer"), SYSTEM),
}
_ROLE_KEYS = ("role", "from")
_CONTENT_KEYS = ("content", "value", "text")

NEARLY = 0.1
"""A column is of turns if at most this share of its cells are not, and plain if at most this share are."""
_SAMPLE = 2_000

_TRANSCRIPT = re.compile(r"\n\n(Human|Assistant): ?")

Report = Callable[[int, ValueError], bool]
"""Is told of a cell that cannot be read, and says whether its raw text is kept."""


@dataclass(frozen=True)
class Messages:
    """The messages of some rows, those of a row together and in their order.

    Args:
        rows: how many rows.
        row: int64 (messages,), ascending.
        role: int8 (messages,): USER, ASSISTANT or SYSTEM.
        text: string (messages,), no nulls.
    """

    rows: int
    row: np.ndarray
    role: np.ndarray
    text: pa.Array

    def count(self) -> np.ndarray:
        """How many messages each row has: int64 (rows,)."""
        return np.bincount(self.row, minlength=self.rows)

    def where(self, keep: np.ndarray) -> Messages:
        """Those messages of which `keep` (bool, messages) is true."""
        if keep.all():
            return self
        text = self.text.filter(pa.array(keep))
        return Messages(self.rows, self.row[keep], self.role[keep], text)

    def of(self, *roles: int) -> Messages:
        return self.where(np.isin(self.role, roles))

    def last_role(self) -> np.ndarray:
        """The role of each row's last message: int8 (rows,), -1 where it has none."""
        last = np.full(self.rows, -1, np.int8)
        last[self.row] = self.role  # of repeated positions the last one stays
        return last

    def turns(self) -> pa.ListArray:
        """The texts of each row: list<string> (rows,)."""
        offsets = np.concatenate([[0], np.cumsum(self.count())]).astype(np.int32)
        return pa.ListArray.from_arrays(offsets, self.text)


def joined(rows: int, parts: Iterable[Messages]) -> Messages:
    """All messages of several columns: in each row those of the first part come first."""
    parts = [part for part in parts if len(part.row)]
    if len(parts) == 1:
        return parts[0]
    row = np.concatenate([np.zeros(0, np.int64), *(part.row for part in parts)])
    role = np.concatenate([np.zeros(0, np.int8), *(part.role for part in parts)])
    text = pa.concat_arrays([pa.array([], pa.string()), *(part.text for part in parts)])
    order = np.argsort(row, kind="stable")
    return Messages(rows, row[order], role[order], text.take(pa.array(order)))


def text_kind(
    column: Column, setting: str, where: str, release: Callable[[], None] = lambda: None
) -> TextKind:
    """Decide what the cells of a column are, the column as a whole.

    Args:
        setting: `auto`, `plain` or `turns`.
        where: the file and column, for the message.
        release: is called after each chunk of an Arrow column.

    Raises:
        InputError: with `auto`, a part of the cells are JSON lists of turns, a part are not.
    """
    if setting == "turns":
        return "turns"
    if setting == "plain":
        return "plain"
    if isinstance(column, pa.ChunkedArray):
        if not pa.types.is_string(column.type):
            return "plain"
        step = max(1, len(column) // _SAMPLE)
        some = []
        for chunk in column.chunks:
            some += chunk[::step].to_pylist()
            release()
    else:
        if any(isinstance(cell, list | dict) for cell in column):
            return "plain"  # JSON has said already which cells are lists.
        some = [cell for cell in column if isinstance(cell, str)]
        some = some[:: max(1, len(some) // _SAMPLE)]
    some = [cell for cell in some if cell and not cell.isspace()]
    if not some:
        return "plain"
    if sum(map(_is_transcript, some)) >= (1 - NEARLY) * len(some):
        return "transcript"
    lists = sum(map(_is_turns, some))
    if lists >= (1 - NEARLY) * len(some):
        return "turns"
    if lists <= NEARLY * len(some):
        return "plain"
    raise InputError(
        f"{where}: {lists:,} of {len(some):,} cells are JSON lists of turns, the others are not; "
        "set `text: turns` or `text: plain`"
    )


def _is_transcript(cell: str) -> bool:
    return cell.startswith(("\n\nHuman:", "\n\nAssistant:"))


def _is_turns(cell: str) -> bool:
    """Whether a cell is a JSON list of texts or messages."""
    if not cell.lstrip().startswith("["):
        return False
    try:
        values = JSON_TEXTS.decode(cell)
    except (ValueError, RecursionError):
        return False
    return all(
        value is None
        or isinstance(value, str)
        or (isinstance(value, dict) and _key(value, _ROLE_KEYS))
        for value in values
    ) and not _NUMBERS.fullmatch(cell)


# Numbers are decoded as the texts they are written as.
_NUMBERS = re.compile(r'[^"{}]*[0-9][^"{}]*')


def read_messages(
    cells: pa.Array | Sequence[Any], role: int, kind: TextKind, report: Report, where: str
) -> Messages:
    """Read the cells of a column.

    A missing cell is the empty text. A list is of texts, numbers, nulls (the empty text) or messages:
    objects with `role` and `content` (or `from` and `value`), where the content is a text or a list of
    parts, joined by line breaks. In a column of turns a text that does not start with ``[`` is one turn.

    Args:
        role: of what is no message.

    Raises:
        InputError: the column holds dates, maps or other things that are no text.
    """
    count = len(cells)
    if isinstance(cells, pa.Array):
        if is_list(cells.type):
            flat = _of_lists(cells, role, where)
            if flat is not None:
                return flat
        elif kind == "plain" or not pa.types.is_string(cells.type):
            text = pc.fill_null(as_texts(cells, where), "")
            return Messages(count, np.arange(count), np.full(count, role, np.int8), text)
        cells = cells.to_pylist()
    # Flat values, not lists of lists: three times faster, as thousands of live lists keep the garbage
    # collector busy.
    texts: list[str] = []
    roles: list[int] = []
    ends = np.zeros(count, np.int64)
    for position, cell in enumerate(cells):
        before = len(texts)
        try:
            _read_cell(cell, role, kind, texts, roles)
        except ValueError as error:
            del texts[before:], roles[before:]
            if report(position, error):
                texts.append(plain_text(cell))
                roles.append(role)
        ends[position] = len(texts)
    row = np.repeat(np.arange(count), np.diff(ends, prepend=0))
    return Messages(count, row, np.array(roles, np.int8), strings(texts))


def _of_lists(cells: pa.Array, role: int, where: str) -> Messages | None:
    """Read Arrow lists of texts or of messages; None where a message has more than a role and a text."""
    kind = cells.type.value_type
    lengths = pc.list_value_length(cells)
    counts = pc.fill_null(lengths, 0).to_numpy(zero_copy_only=False)
    values = cells.flatten()
    roles = np.full(len(values), role, np.int8)
    if pa.types.is_struct(kind):
        names = {field.name: field.type for field in kind}
        of_role, of_content = _key(names, _ROLE_KEYS), _key(names, _CONTENT_KEYS)
        if not of_role or not of_content or not pa.types.is_string(names[of_content]):
            return None
        if values.null_count:
            return None
        words = pc.utf8_lower(pc.struct_field(values, of_role))
        index = pc.fill_null(pc.index_in(words, pa.array(list(ROLES))), -1).to_numpy()
        if (index < 0).any():
            return None  # the reader of cells says which row
        roles = np.array(list(ROLES.values()), np.int8)[index]
        values = pc.struct_field(values, of_content)
    elif pa.types.is_nested(kind):
        raise InputError(f"{where}: holds {cells.type}; a text, texts or messages expected")
    texts = pc.fill_null(as_texts(values, where), "")
    row = np.repeat(np.arange(len(cells)), counts)
    if not cells.null_count or pa.types.is_struct(kind):
        return Messages(len(cells), row, roles, texts)
    missing = np.flatnonzero(cells.is_null().to_numpy(zero_copy_only=False))
    empty = Messages(len(cells), missing, np.full(len(missing), role, np.int8),
                     pa.repeat("", len(missing)))  # fmt: skip
    return joined(len(cells), [Messages(len(cells), row, roles, texts), empty])


def _read_cell(cell: Any, role: int, kind: TextKind, texts: list[str], roles: list[int]) -> None:
    """Add the messages of one cell; ValueError says why it has none."""
    if isinstance(cell, str):
        if kind == "transcript":
            _read_transcript(cell, texts, roles)
            return
        if kind == "turns" and cell.lstrip().startswith("["):
            try:
                cell = JSON_TEXTS.decode(cell)
            except RecursionError:
                raise ValueError("not a JSON list: too deep") from None
            except ValueError as error:
                raise ValueError(
                    f"not a JSON list: {error}; if it is a text, set `text: plain`"
                ) from None
    for value in cell if isinstance(cell, list) else [cell]:
        if type(value) is str:  # nearly always, so looked for first
            texts.append(value)
            roles.append(role)
        elif isinstance(value, dict):
            message_role, text = _read_message(value)
            texts.append(text)
            roles.append(message_role)
        elif isinstance(value, list):
            raise ValueError("a turn is a JSON list: a text or a message expected")
        else:
            texts.append(plain_text(value))
            roles.append(role)


def _read_message(message: dict[str, Any]) -> tuple[int, str]:
    of_role, of_content = _key(message, _ROLE_KEYS), _key(message, _CONTENT_KEYS)
    if not of_role or not of_content:
        raise ValueError(
            "a turn is a JSON object: a text, or a message with role and content expected"
        )
    role = ROLES.get(str(message[of_role]).lower())
    if role is None:
        raise ValueError(f"unknown role: {str(message[of_role])[:60]!r}; known: {', '.join(ROLES)}")
    content = message[of_content]
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        return role, plain_text(content)
    parts = []
    for part in content:
        if isinstance(part, dict):
            if part.get("type", "text") != "text" or part.get("image") or part.get("image_url"):
                kind = part.get("type", "image")
                raise ValueError(
                    f"no text: a message holds a part of type {kind!r}, and only texts are judged"
                )
            part = part.get("text")
        parts.append(plain_text(part))
    return role, "\n".join(parts)


def _read_transcript(cell: str, texts: list[str], roles: list[int]) -> None:
    before, *pieces = _TRANSCRIPT.split(cell)
    if before or not pieces:
        raise ValueError(
            'no transcript: it starts with neither "\\n\\nHuman:" nor "\\n\\nAssistant:"'
        )
    texts += pieces[1::2]
    roles += [USER if name == "Human" else ASSISTANT for name in pieces[::2]]


def _key(of: Any, keys: Sequence[str]) -> str | None:
    for key in keys:
        if key in of:
            return key
    return None
