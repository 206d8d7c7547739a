"""The table of ``docs/switch-on.md``: a step of each system by width and batch, from a committed run of bench-kfac."""

from __future__ import annotations

from typing import Any

from bench.frame.figures import read, spelled

BEGIN = "<!-- figures: kfac.json -->"
END = "<!-- end of figures -->"
# How the group of these figures begins in the result file.
BY_SIZE = "a step by width"


def filled(guide: str, study: dict[str, Any]) -> str:
    """Return the guide with the lines between its two markers made anew."""
    before, _, rest = guide.partition(BEGIN)
    _, _, after = rest.partition(END)
    facts = study["facts"]
    told = f"{facts['cpu']}, {facts['threads']} threads, commit {facts['commit'][:7]}"
    return "\n".join([f"{before}{BEGIN}", "", *_table(study), "", f"`make bench-kfac`, {told}.", "", f"{END}{after}"])


def _table(study: dict[str, Any]) -> list[str]:
    """One row a width and batch, one column a system, the quickest in bold."""
    rows: dict[str, dict[str, float]] = {}
    for figure in map(read, study["figures"]):
        if figure.group.startswith(BY_SIZE):
            size, _, system = figure.case.partition(": ")
            rows.setdefault(size, {})[system] = figure.value
    systems = list(next(iter(rows.values()), {}))
    lines = [["layers", *systems], ["---"] * (len(systems) + 1)]
    for size, values in rows.items():
        least = min(values.values())
        cells = (spelled(values[system]) for system in systems)
        bold = (f"**{cell}**" if values[system] == least else cell for cell, system in zip(cells, systems, strict=True))
        lines.append([size, *bold])
    return ["| " + " | ".join(line) + " |" for line in lines]
