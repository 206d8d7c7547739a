"""A measured figure, the target it is held to, and the text of both."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd

Row = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """A row of the table: a measured value, its interval if it has one, and its target."""

    group: str
    case: str
    value: float
    low: float | None = None
    high: float | None = None
    unit: str = "×"
    at_most: float | None = None
    at_least: float | None = None
    note: str = ""

    @classmethod
    def of(cls, group: str, case: str, value: float | tuple[float, float, float], **options: Any) -> "Figure":
        """Return the figure of a number, or of a number with its interval."""
        return cls(group, case, *(value if isinstance(value, tuple) else [float(value)]), **options)

    @property
    def met(self) -> bool | None:
        """Whether the target was reached; None without one."""
        if self.at_most is not None:
            return self.value <= self.at_most
        return None if self.at_least is None else self.value >= self.at_least

    def measured(self) -> str:
        interval = "" if None in (self.low, self.high) else f" ({formatted(self.low)} to {formatted(self.high)})"
        return f"{formatted(self.value)} {self.unit}".rstrip() + interval

    def target(self) -> str:
        sign, limit = ("≤", self.at_most) if self.at_most is not None else ("≥", self.at_least)
        return "" if limit is None else f"{sign} {limit:g} {self.unit}".rstrip()

    def record(self) -> Row:
        return {name: value for name, value in asdict(self).items() if value is not None} | {"met": self.met}


def figure_of(record: Row) -> Figure:
    return Figure(**{name: value for name, value in record.items() if name != "met"})


def figure_table(figures: Iterable[Figure]) -> pd.DataFrame:
    met = {True: "yes", False: "**no**", None: ""}
    rows = [(one.group, one.case, one.measured(), one.target(), met[one.met]) for one in figures]
    return pd.DataFrame(rows, columns=["what", "case", "measured", "to reach", "met"])


def formatted(value: float) -> str:
    """Return a number with enough digits to tell it from a target close to it."""
    size = abs(value)
    if size >= 1000:
        return f"{value:.0f}"
    if size >= 10:
        return f"{value:.3g}"
    if size >= 1:
        return f"{value:.3f}" if size < 2 else f"{value:.2f}"
    return f"{value:.2g}" if size >= 0.01 or size == 0 else f"{value:.1e}"


def duration(seconds: float) -> str:
    return f"{formatted(seconds)} s" if seconds >= 1 else f"{formatted(1e3 * seconds)} ms"


@dataclass
class Study:
    """The findings of one file of benches: figures with the times of their calls, or timed cases and refused ones."""

    figures: list[Figure] = field(default_factory=list)
    timings: list[Row] = field(default_factory=list)
    cases: list[Row] = field(default_factory=list)
    refused: list[Row] = field(default_factory=list)

    def record(self) -> Row:
        if self.cases:
            return {"rows": self.cases, "refused": self.refused}
        return {"figures": [figure.record() for figure in self.figures], "timings": self.timings}
