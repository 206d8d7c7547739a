"""The frame of a study: its pieces run in order, Ctrl-C keeps the finished rows, and one JSON file holds them."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

INTERRUPTED = 130  # the exit code after Ctrl-C

Row = dict[str, Any]
Tables = dict[str, list[Row]]

# A list with no list or object inside, or an object with no object inside: one line each. No string has line feeds.
_FLAT = re.compile(r"\[[^][{}]*\]|\{[^{}]*\}")


class Piece(NamedTuple):
    """A part of a study, whose rows go to one table. Ctrl-C may come at any time while it is measured."""

    table: str
    key: Row  # distinguishes the piece from others of its table; every row begins with the key
    measure: Callable[[], Iterable[Row]]
    cost: float = 1.0  # relative to other pieces, for the progress bar
    rows: int = 1  # expected number of rows, for the progress bar

    @property
    def label(self) -> str:
        """The table and the key in words."""
        return f"{self.table}: " + ", ".join(f"{name} {value}" for name, value in self.key.items())

    def owns(self, row: Row) -> bool:
        """Return whether a row belongs to this piece."""
        return all(row.get(name) == value for name, value in self.key.items())


def run(pieces: Iterable[Piece], tables: Tables, console: Console) -> str | None:
    """Add the rows of every piece that has none yet. Return the label of the piece that Ctrl-C stopped, or None."""
    pending = [piece for piece in pieces if not any(map(piece.owns, tables.get(piece.table, [])))]
    columns, label, done = (*Progress.get_default_columns(), TimeElapsedColumn()), "the start", 0.0
    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("", total=sum(piece.cost for piece in pending))
            for piece in pending:
                label = piece.label
                progress.update(task, description=label)
                if not console.is_terminal:
                    console.print(label, highlight=False)
                for row in piece.measure():
                    tables.setdefault(piece.table, []).append({**piece.key, **row})
                    progress.advance(task, piece.cost / piece.rows)
                done += piece.cost
                progress.update(task, completed=done)
    except KeyboardInterrupt:
        return label
    return None


def write(content: Row, path: Path) -> None:
    """Write JSON to ``path``, whole or not at all. Numbers have six digits; NaN and infinity become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(jsonable(content), indent=1, allow_nan=False, ensure_ascii=False)
    text = _FLAT.sub(lambda match: re.sub(r"\n *", " ", match.group()), text)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def jsonable(value: Any) -> Any:
    """Return the value in types that JSON has, with numbers of six digits."""
    if isinstance(value, dict):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
