"""The record of a run in words: tables on the terminal, and the same as plain text."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bench.frame import figures
from bench.frame.figures import spelled
from bench.gpu.facts import in_words

WIDTH = 165
# Kept in the result file, too wide for a table.
LEFT_OUT = ("low µs", "high µs", "sets", "timed by", "configs")
DRY = "DRY RUN on the CPU, at toy sizes and by the wall clock. No figure here is a GPU figure, and no target is judged."

Record = Mapping[str, Any]


def console() -> Console:
    """Return a console as wide as the tables."""
    return Console(width=WIDTH, highlight=False, soft_wrap=False)


def text(machine: Record, sections: Mapping[str, Record]) -> str:
    """Return the whole record as plain text."""
    plain = Console(width=WIDTH, file=io.StringIO(), record=True, highlight=False)
    plain.print(whole(machine, sections))
    return plain.export_text()


def whole(machine: Record, sections: Mapping[str, Record]) -> RenderableType:
    """Return the whole record, the verdict last."""
    parts = [heading(machine), *(section(name, record, machine["quick"]) for name, record in sections.items())]
    return Group(*parts, verdict(machine, sections))


def heading(machine: Record) -> RenderableType:
    """Return what the figures were measured on."""
    return Group(*([Text(DRY, "bold red")] if machine["quick"] else []), Text(in_words(dict(machine))))


def section(name: str, record: Record, dry: bool) -> RenderableType:
    """Return what one section found."""
    title = Text(f"\n{name}: {record['status']}, {record['seconds']:.1f} s", "bold")
    parts: list[RenderableType] = [title]
    if record["figures"]:
        parts.append(_figures(record["figures"], dry))
    parts += [_table(heading, rows) for heading, rows in record["tables"].items()]
    parts += [Text(f"  note: {note}") for note in record["notes"]]
    parts += [Text(f"  skipped: {case}", "yellow") for case in record["skipped"]]
    for failure in record["failures"]:
        parts.append(Text(f"  FAILED {failure['case']}: {failure['error']}", "bold red"))
        parts.append(Padding(Text(failure["traceback"]), (0, 0, 0, 4)))
    return Group(*parts)


def verdict(machine: Record, sections: Mapping[str, Record]) -> RenderableType:
    """Return the targets, and how the sections ended."""
    rows = [figures.read(figure) for record in sections.values() for figure in record["figures"]]
    judged = [row for row in rows if row.met is not None]
    lines: list[RenderableType] = [Text("\nsummary", "bold")]
    if machine["quick"]:
        lines.append(Text(DRY, "bold red"))
    elif judged:
        lines.append(Text(f"{sum(row.met is True for row in judged)} of {len(judged)} targets reached"))
        lines += [
            Text(f"  missed: {row.group}, {row.case}: {row.measured()}, to reach {row.target()}")
            for row in judged
            if not row.met
        ]
    for status in ("done", "partial", "skipped", "failed", "started"):
        names = [name for name, record in sections.items() if record["status"] == status]
        if names:
            lines.append(Text(f"{status}: {', '.join(names)}"))
    return Group(*lines)


def _figures(records: Sequence[Record], dry: bool) -> Table:
    table = Table("what", "case", "measured", "to reach", "met", "note")
    for record in records:
        row = figures.read(dict(record))
        met = {True: "[green]yes[/green]", False: "[red]no[/red]", None: ""}[None if dry else row.met]
        table.add_row(row.group, row.case, row.measured(), row.target(), met, row.note)
    return table


def _table(title: str, rows: Sequence[Record]) -> Table:
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in LEFT_OUT]
    table = Table(title=title, title_justify="left")
    for name in names:
        table.add_column(name, justify="left" if any(isinstance(row.get(name), str) for row in rows) else "right")
    for row in rows:
        table.add_row(*(Text(_spelled(row.get(name))) for name in names))
    return table


def _spelled(value: Any) -> str:
    if value is None:
        return "–"
    return spelled(value) if isinstance(value, float) else str(value)
