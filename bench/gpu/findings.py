"""What a section found, failed at or left out, and how long it may take."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from bench.frame.figures import Figure
from bench.gpu.ceilings import Ceilings, measure
from bench.gpu.device import Device
from bench.gpu.sizes import Sizes


@dataclass(frozen=True)
class Bench:
    """What every section works with."""

    device: Device
    sizes: Sizes

    # A dataclass that is frozen still has a dict of its own, where the property keeps what it measured.
    @cached_property
    def ceilings(self) -> Ceilings:
        """The ceilings of this device, measured once."""
        return measure(self.device, self.sizes)


class Deadline:
    """A moment that a section looks at before it starts something new."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    def left(self) -> float:
        """Return the seconds left, 0 at least."""
        return max(0.0, self._end - self._clock())

    def within(self, seconds: float) -> Deadline:
        """Return a deadline this far ahead, and not after this one."""
        return Deadline(min(seconds, self.left()), self._clock)


@dataclass
class Findings:
    """The record of one section. It is whole after every case, so that an end in between loses one case only."""

    figures: list[Figure] = field(default_factory=list)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def status(self) -> str:
        """Say how the section ended: "failed", "skipped" (nothing ran), "partial" or "done"."""
        if self.failures:
            return "failed"
        if self.skipped:
            return "partial" if self.figures or self.tables else "skipped"
        return "done"

    def row(self, table: str, **columns: Any) -> None:
        """Add a row to a table."""
        self.tables.setdefault(table, []).append(columns)

    def figure(self, group: str, case: str, value: Any, **about: Any) -> None:
        """Add a figure, with the target it is held to."""
        self.figures.append(Figure.of(group, case, value, **about))

    def fail(self, case: str, why: str) -> None:
        """Record a failure that raised nothing."""
        self.failures.append({"case": case, "error": why, "traceback": ""})

    @contextmanager
    def case(self, name: str, device: Device) -> Iterator[None]:
        """Record what fails in the ``with`` block and go on, as long as the device still answers."""
        try:
            yield
        except Exception as error:
            self.failures.append({"case": name, "error": _in_words(error), "traceback": traceback.format_exc()})
            device.synchronize()

    def in_time(self, name: str, time: Deadline, seconds: float) -> bool:
        """Say whether this many seconds are left; record the case as skipped if not."""
        if time.left() >= seconds:
            return True
        self.skipped.append(f"{name}: {time.left():.0f} s left, {seconds:.0f} s wanted")
        return False

    def record(self) -> dict[str, Any]:
        """Return what the result file keeps."""
        return {
            "status": self.status,
            "seconds": self.seconds,
            "figures": [figure.record() for figure in self.figures],
            "tables": self.tables,
            "notes": self.notes,
            "skipped": self.skipped,
            "failures": self.failures,
        }


def _in_words(error: BaseException) -> str:
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}"
