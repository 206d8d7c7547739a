"""The basis of every stage: findings, each a line of the record as soon as it is known, and the report made of them."""

import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from bench.benches.timing import Interval
from bench.frame import figures, pages
from bench.frame.facts import facts_text
from bench.frame.figures import Figure
from bench.gpu.cases import FULL, TOY, Sizes
from bench.gpu.device import Ceilings, Device, Gpu, Stub, measure_ceilings
from bench.studies import roofline as study
from brandla.demo.frame import Row, jsonable

# Seconds past its time after which a hanging case ends its process; and the characters that are kept of an output.
HANG, LONGEST = 60.0, 4000
WIDTH = 165
DRY = "DRY RUN on the CPU, at toy sizes and by the wall clock. No figure here is a GPU figure, and no target is judged."


class Findings:
    """The findings of one process of a stage: each is a line of the record as soon as it is known.

    A case that the record says has begun is not begun again, so a process goes on where another one died.
    """

    def __init__(self, path: Path, stage: str, device: Device, seconds: float, case: str | None = None) -> None:
        self.path, self.stage, self.device, self.case = path, stage, device, case
        self.sizes: Sizes = TOY if device.dry else FULL
        self._end = time.monotonic() + seconds
        self._begun = {value for *mark, value in records(path) if mark == [stage, "begin"]}

    def seconds_left(self) -> float:
        return max(0.0, self._end - time.monotonic())

    def row(self, table: str, **columns: Any) -> None:
        self.add(table, columns)

    def add(self, kind: str, value: Any) -> None:
        """Add a finding to a table, or to one of `LISTS`."""
        write(self.path, self.stage, kind, value)

    def figure(self, group: str, case: str, value: Any, **about: Any) -> None:
        self.add("figures", Figure.of(group, case, value, **about).record())

    def attempt(self, case: str, seconds: float, function: Callable[..., Any], *arguments: Any) -> None:
        """Call the function, if the case belongs to this process and there is time; record a failure and go on.

        If the device no longer answers, the process ends here. If the call hangs, it ends after `HANG` more seconds.
        """
        if case in self._begun or self.case not in (None, case):
            return
        if not self.device.dry and self.seconds_left() < seconds:
            self.add("skipped", f"{case}: {self.seconds_left():.0f} s left, {seconds:.0f} s wanted")
            return
        self.add("begin", case)
        faulthandler.dump_traceback_later(seconds + HANG, exit=True, file=2)
        try:
            function(*arguments)
            self.device.synchronize()
        except Exception as error:
            first_line = str(error).partition("\n")[0]
            words = f"{type(error).__name__}: {first_line}"
            self.add("failures", {"case": case, "error": words, "traceback": traceback.format_exc()})
            self.device.synchronize()
        finally:
            faulthandler.cancel_dump_traceback_later()
        self.add("end", case)

    @cached_property
    def ceilings(self) -> Ceilings:
        """The ceilings of the record if all are there; else they are measured now."""
        rows = [row for _, kind, row in records(self.path) if kind == "ceilings"]
        rates = {row["ceiling"]: Interval(*row["per_second"]) for row in rows}
        return Ceilings(**rates) if set(rates) == set(Ceilings._fields) else measure_ceilings(self.device, self.sizes)


def run_stage(run, dry: bool, threads: int, logs: Path, path: Path, stage: str, seconds: float, case: str | None):
    """Run a stage, or one case of it, in this process. Its output, and the traceback of a crash, go to a log."""
    log = os.open(logs / str(os.getpid()), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable(2)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    torch.set_num_threads(threads)
    run(Findings(path, stage, Stub() if dry else Gpu(), seconds, case))


# --- The record: rows of tables and entries of lists for each stage, and marks of how far the stage came

LISTS = ("figures", "notes", "skipped", "failures")
MARKS = ("asked", "begin", "end", "seconds")
STATUSES = ("done", "partial", "skipped", "failed", "cut off")


def write(path: Path, stage: str, kind: str, value: Any = None) -> None:
    """Add a line, by a single write: so lines of several processes do not mix."""
    line = json.dumps(jsonable({"stage": stage, "kind": kind, "value": value}), ensure_ascii=False)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def records(path: Path) -> Iterator[tuple[str, str, Any]]:
    """Yield stage, kind and value of each line, without a last line that was cut short."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with suppress(ValueError):
            yield tuple(json.loads(line).values())


def sections(path: Path) -> dict[str, Row]:
    """Return the findings of each stage as the result file keeps them; a stage without an end was cut off."""
    found: dict[str, Row] = {}
    for stage, kind, value in records(path):
        empty = {"status": "", **{name: [] for name in LISTS}, "tables": {}, "seconds": None}
        section = found.setdefault(stage, empty)
        if kind == "seconds":
            section["seconds"] = value
        elif kind in LISTS:
            section[kind].append(value)
        elif kind not in MARKS:
            section["tables"].setdefault(kind, []).append(value)
    for section in found.values():
        ends = {
            "cut off": section["seconds"] is None,
            "failed": section["failures"],
            "done": not section["skipped"],
            "partial": section["figures"] or section["tables"],
            "skipped": True,
        }
        section["status"] = next(status for status, holds in ends.items() if holds)
    return found


# --- The report


def heading(machine: Row) -> RenderableType:
    return Group(*[Text(DRY, "bold red")] * machine["quick"], Text(facts_text(machine)))


def section(name: str, record: Row, dry: bool) -> RenderableType:
    took = "" if record["seconds"] is None else f", {record['seconds']:.1f} s"
    parts: list[RenderableType] = [Text(f"\n{name}: {record['status']}{took}", "bold")]
    if record["figures"]:
        rows = [figures.figure_of(each) for each in record["figures"]]
        cells = figures.figure_table(rows).assign(note=[row.note for row in rows])
        parts.append(pages.on_terminal(cells, red=[row.met is False and not dry for row in rows]))
    for title, rows in record["tables"].items():
        # The roofline study formats ceilings and ops. All times of the tuned tiles are too wide for a table.
        cells = pd.DataFrame(rows).drop(columns="configs", errors="ignore")
        tables = dict(study.shown({title: rows})) or {title: cells}
        parts += [pages.on_terminal(cells, words) for words, cells in tables.items()]
    parts += [Text(f"  note: {note}") for note in record["notes"]]
    parts += [Text(f"  skipped: {case}", "yellow") for case in record["skipped"]]
    for failure in record["failures"]:
        parts.append(Text(f"  FAILED {failure['case']}: {failure['error']}", "bold red"))
        parts.append(Padding(Text(failure["traceback"]), (0, 0, 0, 4)))
    return Group(*parts)


def verdict(machine: Row, found: Mapping[str, Row]) -> RenderableType:
    """Return which targets were met and missed, and how the stages ended."""
    rows = [figures.figure_of(each) for record in found.values() for each in record["figures"]]
    met = [row.met for row in rows if row.met is not None]
    parts = [Text("\nsummary", "bold")]
    if machine["quick"]:
        parts.append(Text(DRY, "bold red"))
    elif met:
        parts.append(Text(f"{sum(met)} of {len(met)} targets reached"))
        missed = [row for row in rows if row.met is False]
        parts += [Text(f"  missed: {r.group}, {r.case}: {r.measured()}, to reach {r.target()}") for r in missed]
    for status in STATUSES:
        names = [name for name, record in found.items() if record["status"] == status]
        parts += [Text(f"{status}: {', '.join(names)}")] if names else []
    return Group(*parts)
