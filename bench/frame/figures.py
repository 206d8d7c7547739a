"""A measured figure with the target it is held to, and how both are written."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One row of the table: what was measured, its interval where it has one, and what it was to reach."""

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
    def of(cls, group: str, case: str, value: float | tuple[float, float, float], **about: Any) -> Figure:
        """Take a number, or a number with its interval."""
        if isinstance(value, tuple):
            return cls(group, case, *value, **about)
        return cls(group, case, float(value), **about)

    @property
    def met(self) -> bool | None:
        """Whether the target was reached; None without one."""
        if self.at_most is not None:
            return self.value <= self.at_most
        return None if self.at_least is None else self.value >= self.at_least

    def measured(self) -> str:
        """Return the figure in words."""
        if self.low is None or self.high is None:
            return f"{spelled(self.value)}{self._unit()}"
        return f"{spelled(self.value)}{self._unit()} ({spelled(self.low)} to {spelled(self.high)})"

    def target(self) -> str:
        """Return the target in words."""
        if self.at_most is not None:
            return f"≤ {self.at_most:g}{self._unit()}"
        return "" if self.at_least is None else f"≥ {self.at_least:g}{self._unit()}"

    def record(self) -> dict[str, Any]:
        """Return what the result file keeps."""
        return {name: value for name, value in asdict(self).items() if value is not None} | {"met": self.met}

    def _unit(self) -> str:
        return f" {self.unit}" if self.unit else ""


def read(record: dict[str, Any]) -> Figure:
    """Return a figure from its record."""
    return Figure(**{name: value for name, value in record.items() if name != "met"})


def spelled(value: float) -> str:
    """Return a figure with the digits that tell it from a target near it."""
    size = abs(value)
    if size >= 1000:
        return f"{value:.0f}"
    if size >= 10:
        return f"{value:.3g}"
    if size >= 1:
        return f"{value:.3f}" if size < 2 else f"{value:.2f}"
    return f"{value:.2g}" if size >= 0.01 or size == 0 else f"{value:.1e}"


@dataclass
class Study:
    """What one file of benchmarks found: figures with the plain times of their calls, or the rows of its cases.

    Cases of other libraries that failed are beside the rows, each with its reason.
    """

    figures: list[Figure] = field(default_factory=list)
    timings: list[dict[str, Any]] = field(default_factory=list)
    cases: list[dict[str, Any]] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)

    def add_timing(self, group: str, name: str, stats: Any) -> None:
        """Keep pytest-benchmark's own statistics, in milliseconds."""
        keep = {"median": stats.median, "q1": stats.q1, "q3": stats.q3}
        milliseconds = {f"{part}_ms": 1e3 * seconds for part, seconds in keep.items()}
        self.timings.append({"group": group, "name": name, **milliseconds, "rounds": stats.rounds})

    def record(self) -> dict[str, Any]:
        """Return what the result file keeps."""
        if self.cases:
            return {"rows": self.cases, "refused": self.refused}
        return {"figures": [figure.record() for figure in self.figures], "timings": self.timings}
