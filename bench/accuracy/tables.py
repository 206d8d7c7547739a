"""The tables of the terminal, and the answer in words."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from bench.accuracy import summary
from bench.accuracy.record import Record
from bench.accuracy.trackers import BEST

# Errors of B-R over those of RS: what the study is to answer.
QUESTION = ("B-R", "RS")


def of(study: Record) -> Iterator[Table]:
    """Yield a table a width."""
    for width in summary.widths(study):
        table = Table(title=f"width {width}, rank {study.settings.rank}", title_justify="left")
        table.add_column("tracker")
        for heading in headings():
            table.add_column(heading, justify="right")
        for row in rows(study, width):
            table.add_row(*row)
        yield table


def headings() -> list[str]:
    """Return the columns after the tracker's name."""
    return ["renewed every", "ms a step", *summary.MEASURES.values()]


def rows(study: Record, width: int) -> Iterator[list[str]]:
    """Yield a row a tracker."""
    yield [BEST, "", "", *cells(study, width, BEST)]
    for one in study.trackers[width]:
        period = str(one.period) if one.renewal else "never"
        yield [one.name, period, f"{one.cost(study.costs[width]):.3g}", *cells(study, width, one.name)]


def cells(study: Record, width: int, tracker: str) -> Iterator[str]:
    """Yield the errors of one tracker."""
    for of_, measure in summary.MEASURES:
        value = summary.spread(study, width, tracker, of_, measure).mean
        yield f"{value:.2g}°" if measure == "angle" else f"{100 * value:.2g} %"


def verdict(study: Record) -> Iterator[str]:
    """Yield the answer, width by width: error of B-R over that of RS at equal cost."""
    own, other = QUESTION
    for width in summary.widths(study):
        said = (
            f"{words} {summary.over(study, width, own, *key, base=other).in_words()},"
            f" below in {100 * summary.share_below(study, width, own, *key, base=other):.0f} % of the steps"
            for key, words in list(summary.MEASURES.items())[:4]
        )
        yield f"width {width}: error of {own} over that of {other} at equal cost: {'; '.join(said)}."
