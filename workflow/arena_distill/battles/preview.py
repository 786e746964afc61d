"""What a file of battles is taken for, on a terminal."""

from __future__ import annotations

from itertools import islice
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from arena_distill.battles.parts import read_parts
from arena_distill.battles.row_counts import VOTE_KINDS, count_rows, print_counts
from arena_distill.config.source import Source

SHOWN = 3
_CUT = 300


def print_preview(source: Source, *, votes: bool) -> None:
    """Print a file's format, what its columns are, the counts and reasons, and some battles as understood.

    Args:
        votes: whether votes are read; without, the file may lack them.
    """
    name = "extra" if votes else "unlabelled"
    parts = read_parts({name: [source]})
    print_counts(source.path, count_rows(parts))
    names = parts[0].names.items()
    columns = (ours if ours == theirs else f"{ours} ← {theirs}" for ours, theirs in names)
    print(f"columns: {', '.join(columns)}")
    tables = (table.slice(0, SHOWN) for part in parts for table in part.kept("class"))
    battles = list(islice((battle for table in tables for battle in table.to_pylist()), SHOWN))
    table = Table(show_lines=True)
    for title in ("", *(battle["id"] for battle in battles)):
        table.add_column(Text(title), overflow="fold")
    for field in [*battles[0]][2:] if battles else ():
        cells = [_shown(battle[field]) for battle in battles]
        if any(cells):
            table.add_row(field, *map(Text, cells))
    Console().print(table)


def _shown(value: Any) -> str:
    """A value of a battle: of turns each in a line of its own, of a vote the winner or the shares."""
    if not isinstance(value, list):
        return "" if value is None else _cut(str(value))
    if all(isinstance(turn, str) for turn in value):
        return "\n".join(f"{number}. {_cut(turn)}" for number, turn in enumerate(value, 1))
    shares = [(kind, share) for kind, share in zip(VOTE_KINDS, value, strict=False) if share]
    return (
        shares[0][0] if len(shares) == 1 else ", ".join(f"{k} {share:.2f}" for k, share in shares)
    )


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _CUT else text[: _CUT - 1] + "…"
