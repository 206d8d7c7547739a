"""How result files are shown: tables in Markdown and on a terminal, pictures for light and dark pages, provenance."""

import re
from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.frame import facts
from bench.frame.figures import formatted

PICTURES = "measured"  # folder of the pictures, beside the pages
EXPONENT = re.compile(r"(?<=\d)e-(?=\d)")
WIDTH = 150  # columns of a terminal table, so that nothing is cut on a narrow one


def markdown(cells: pd.DataFrame) -> str:
    """Return a table in Markdown, without its index. No line breaks within the exponent of a number."""
    lines = [list(cells), ["---"] * len(cells.columns), *cells.to_numpy().tolist()]
    return EXPONENT.sub("e−", "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines))


def on_terminal(cells: pd.DataFrame, title: str | None = None, red: Sequence[bool] = ()) -> Table:
    """Return a table for a terminal: numbers to the right, and the rows that ``red`` marks in red."""
    table = Table(title=title, title_justify="left")
    for name, column in cells.items():
        justify = "right" if pd.api.types.is_numeric_dtype(column) else "left"
        table.add_column(str(name), justify=justify, overflow="fold")
    for row, wrong in zip(cells.itertuples(index=False), red or [False] * len(cells), strict=True):
        table.add_row(*(Text(cell_text(value)) for value in row), style="red" if wrong else None)
    return table


def cell_text(value: Any) -> str:
    """Return the text of a table's cell; a missing value is a dash."""
    if value is None or value != value:
        return "–"
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() else formatted(value)
    return str(value)


def in_sentence(words: Sequence[str]) -> str:
    """Return "a, b and c"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def show(console: Console, cells: pd.DataFrame, title: str, red: Sequence[bool] = ()) -> None:
    """Print a table at a width at which no cell is cut."""
    wide = Console(file=console.file, highlight=False, width=max(console.width, WIDTH))
    wide.print(on_terminal(cells, title, red))


def picture(name: str, machine: str, words: str) -> str:
    """Return the Markdown of a picture, for light pages and for dark ones."""
    return "".join(f"![{words}]({PICTURES}/{machine}/{name}-{theme}.png#only-{theme})\n" for theme in ("light", "dark"))


def provenance(about: dict[str, Any], file: str) -> str:
    """Return the file that figures come from, and the machine and versions that they were measured with."""
    seconds = f"; {about['seconds']:.0f} s in all" if "seconds" in about else ""
    return f"`{file}`: {facts.facts_text(about)}{seconds}.{caveats(about)}"


def caveats(about: dict[str, Any]) -> str:
    """Return a warning if a run was short or interrupted."""
    short = " A short run: its figures mean nothing." if about["quick"] else ""
    return short + (" **Interrupted**: runs are missing." if about.get("interrupted") else "")
