"""The frame of a study: its pieces run in order, Ctrl-C keeps what is done, and one JSON file holds the rows."""

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

# A list or an object that holds no object: one line each. A string has no line feeds.
_FLAT = re.compile(r"\[[^][{}]*\]|\{[^{}]*\}")


class Piece(NamedTuple):
    """A part of a study, whose rows are in one of its tables; Ctrl-C may come anywhere in what measures them."""

    table: str
    key: Row  # what tells it from the others of its table; every row begins with it
    measure: Callable[[], Iterable[Row]]
    cost: float = 1.0  # beside the costs of the others, for the progress bar
    rows: int = 1  # that come of it, roughly

    @property
    def words(self) -> str:
        """The table and the key in words."""
        return f"{self.table}: " + ", ".join(f"{name} {value}" for name, value in self.key.items())

    def owns(self, row: Row) -> bool:
        """Say whether a row is of this piece."""
        return all(row.get(name) == value for name, value in self.key.items())


def run(pieces: Iterable[Piece], tables: Tables, console: Console) -> str | None:
    """Add the rows of every piece that has none yet; return the words of the piece in which Ctrl-C came, or None."""
    left = [piece for piece in pieces if not any(map(piece.owns, tables.get(piece.table, [])))]
    columns, words, done = (*Progress.get_default_columns(), TimeElapsedColumn()), "the start", 0.0
    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("", total=sum(piece.cost for piece in left))
            for piece in left:
                words = piece.words
                progress.update(task, description=words)
                if not console.is_terminal:
                    console.print(words, highlight=False)
                for row in piece.measure():
                    tables.setdefault(piece.table, []).append({**piece.key, **row})
                    progress.advance(task, piece.cost / piece.rows)
                done += piece.cost
                progress.update(task, completed=done)
    except KeyboardInterrupt:
        return words
    return None


def write(content: Row, path: Path) -> None:
    """Write JSON to ``path``, whole or not at all: numbers of six digits, null for what is not a number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain(content), indent=1, allow_nan=False, ensure_ascii=False)
    text = _FLAT.sub(lambda found: re.sub(r"\n *", " ", found.group()), text)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def plain(value: Any) -> Any:
    """Return what JSON takes."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
