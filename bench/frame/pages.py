"""What is shown of result files: tables in Markdown and on a terminal, and pages with pictures for light and dark."""

import re
from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.frame import facts
from bench.frame.figures import spelled

# Folder of the pictures, beside the pages.
PICTURES = "measured"
EXPONENT = re.compile(r"(?<=\d)e-(?=\d)")
# Columns of a terminal table, so that nothing is cut on a narrow one.
WIDTH = 150


def markdown(cells: pd.DataFrame) -> str:
    """Return a table in Markdown, without its index; no line breaks within the exponent of a number."""
    lines = [list(cells), ["---"] * len(cells.columns), *cells.to_numpy().tolist()]
    return EXPONENT.sub("e−", "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines))


def on_terminal(cells: pd.DataFrame, title: str | None = None, red: Sequence[bool] = ()) -> Table:
    """Return a table of a terminal: numbers to the right, and some rows in red."""
    shown = Table(title=title, title_justify="left")
    for name, column in cells.items():
        justify = "right" if pd.api.types.is_numeric_dtype(column) else "left"
        shown.add_column(str(name), justify=justify, overflow="fold")
    for row, wrong in zip(cells.itertuples(index=False), red or [False] * len(cells), strict=True):
        shown.add_row(*(Text(in_words(value)) for value in row), style="red" if wrong else None)
    return shown


def in_words(value: Any) -> str:
    """Return an entry of a table in words."""
    if value is None or value != value:
        return "–"
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() else spelled(value)
    return str(value)


def listed(words: Sequence[str]) -> str:
    """Return "a, b and c"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def show(shown: Table, console: Console) -> None:
    Console(file=console.file, highlight=False, width=max(console.width, WIDTH)).print(shown)


def picture(name: str, machine: str, words: str) -> str:
    """Return a picture in the variant that suits the reader's page."""
    lines = [f"![{words}]({PICTURES}/{machine}/{name}-{theme}.png#only-{theme})" for theme in ("light", "dark")]
    return "\n".join(lines) + "\n"


def provenance(found: dict[str, Any], file: str) -> str:
    """Say from which file figures come, and on what they were measured."""
    seconds = f"; {found['seconds']:.0f} s in all" if "seconds" in found else ""
    return f"`{file}`: {facts.in_words(found)}{seconds}.{caveats(found)}"


def caveats(found: dict[str, Any]) -> str:
    """Say so where a run was short or stopped."""
    short = " A short run: its figures mean nothing." if found["quick"] else ""
    return short + (" **Interrupted**: runs are missing." if found.get("interrupted") else "")
