"""Pages made of result files: tables in Markdown, pictures for light and dark, and the lines between two marks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from bench.frame.facts import commit_of

# Folder of the pictures, beside the pages.
PICTURES = "measured"
END = "<!-- end of figures -->"


def markdown(cells: pd.DataFrame) -> str:
    """Return a table in Markdown, without its index."""
    return table(list(cells.columns), cells.to_numpy().tolist())


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def picture(name: str, machine: str, words: str) -> str:
    """Return a picture in the variant that suits the reader's page."""
    lines = [f"![{words}]({PICTURES}/{machine}/{name}-{theme}.png#only-{theme})" for theme in ("light", "dark")]
    return "\n".join(lines) + "\n"


def marked(page: str, about: str, text: str) -> str:
    """Return a page with the lines between ``<!-- figures: about -->`` and the next end of figures made anew."""
    begin = f"<!-- figures: {about} -->"
    before, found, rest = page.partition(begin)
    if not found:
        message = f"the page has no line {begin}"
        raise ValueError(message)
    return f"{before}{begin}\n\n{text.strip()}\n\n{END}{rest.partition(END)[2]}"


def provenance(found: dict[str, Any], file: str) -> str:
    """Say from which file figures come, and on what they were measured."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    seconds = f"; {found['seconds']:.0f} s in all" if "seconds" in found else ""
    words = f"`{file}`: {found['threads']} threads; {versions}; {commit_of(found)}; {found['date']}{seconds}."
    return words + caveats(found)


def caveats(found: dict[str, Any]) -> str:
    """Say so where a run was short or stopped."""
    short = " A short run: its figures mean nothing." if found["quick"] else ""
    return short + (" **Interrupted**: runs are missing." if found.get("interrupted") else "")
