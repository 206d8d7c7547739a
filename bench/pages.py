"""What all generated pages have in common: how they are written, how they are checked, and their tables."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from bench import results

REMEDY = "what the result files say: run make docs-figures"
# Folder of the pictures, beside the page.
PICTURES = "measured"


class Drawn(Protocol):
    """Pictures of the result files."""

    def __call__(self, folder: Path, target: Path, *, check: bool) -> Iterable[Path]:
        """Return those under ``target`` that are stale, drawn anew from ``folder`` unless this is a check."""


def no_pictures(folder: Path, target: Path, *, check: bool) -> Iterator[Path]:
    """Return no pictures: for a page that has none of its own."""
    return iter(())


def main(
    program: str,
    output: Path,
    texts: Callable[[Path, Path], dict[Path, str]],
    drawn: Drawn = no_pictures,
    arguments: Sequence[str] | None = None,
) -> None:
    """Write pages and pictures from the result files, or fail where they are not theirs.

    Parameters
    ----------
    program
        Module that is run.
    output
        The page, unless the command line names another.
    texts
        Takes the folder of the results and the page; returns the files to write, with their contents.
    drawn
        The pictures, which lie beside the page.
    arguments
        In place of those of the command line.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=f"Write {output.name} from result files.")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder with one folder a machine")
    parser.add_argument("--output", type=Path, default=output)
    parser.add_argument("--check", action="store_true", help="fail if page or pictures are not what the files say")
    options = parser.parse_args(arguments)
    for path, text in texts(options.results, options.output).items():
        if not options.check:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path.name} is not {REMEDY}")
    for path in drawn(options.results, options.output.parent / PICTURES, check=options.check):
        if options.check:
            sys.exit(f"{path.name} does not show {REMEDY}")


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
