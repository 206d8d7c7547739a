"""The section of ``docs/measurements.md`` about a GPU, from its result file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.frame import figures
from bench.frame.figures import spelled
from bench.frame.pages import table
from bench.gpu.facts import in_words

Row = dict[str, Any]

INTRODUCTION = """`make gpu`. Every op was checked against float64 before it was timed: by events around replays of a
CUDA graph, on inputs that outlast the cache. Ceilings are of the same run. Products at float32 accuracy are held to the
larger of torch's own float32 product and a third of its TF32 product, and a symmetric result to one triangle.
"""
COLUMNS = ("op", "case", "by", "µs", "of ceiling", "bound by", "× torch", "error", "torch's error")


def section(study: Row) -> Iterator[str]:
    """Yield the section of one run."""
    machine, sections = study["facts"], study["sections"]
    yield f"## {machine['gpu']['name']}\n"
    yield f"{INTRODUCTION}\n{in_words(machine)}\n"
    yield table(["section", "ended", "left out"], ([name, *_ended(record)] for name, record in sections.items()))
    rows = [figures.read(record) for found in sections.values() for record in found["figures"]]
    yield table(["what", "case", "measured", "to reach", "met"], (_judged(row) for row in rows))
    ops = sections.get("ops", {}).get("tables", {}).get("ops", [])
    if ops:
        yield table(list(COLUMNS), ([_spelled(row[name]) for name in COLUMNS] for row in ops))


def _ended(record: Row) -> list[str]:
    failed = f" ({len(record['failures'])} failures)" if record["failures"] else ""
    return [record["status"] + failed, str(len(record["skipped"]))]


def _judged(row: figures.Figure) -> list[str]:
    return [row.group, row.case, row.measured(), row.target(), {True: "yes", False: "**no**", None: ""}[row.met]]


def _spelled(value: Any) -> str:
    if value is None:
        return "–"
    return spelled(value) if isinstance(value, float) else str(value)
