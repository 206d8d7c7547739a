"""Tables of a committed run of the demo, for the generated page and for README."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]

BEGIN = "<!-- figures: demo.json -->"
END = "<!-- end of figures -->"


def section(demo: Row) -> Iterator[str]:
    """Yield the section of the generated page."""
    yield "### The demo on digits\n"
    yield f"`make demo`, {_provenance(demo)}.\n"
    yield from tracking(demo)
    yield ""
    yield from training(demo)
    yield ""


def filled(readme: str, demo: Row) -> str:
    """Return README with the lines between its two markers made anew."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    rank = demo["settings"]["tracking"]["headline_rank"]
    lines = [
        f"One run of `make demo` ({_provenance(demo)});",
        "absolute times are this machine's, and [docs/measurements.md](docs/measurements.md) has the rest:",
        "",
        *tracking(demo, rank),
        "",
        *training(demo),
    ]
    return "\n".join([f"{before}{BEGIN}", "", *lines, "", f"{END}{after}"])


def tracking(demo: Row, rank: int | None = None) -> Iterator[str]:
    """Yield the table of the tracking study, of all ranks or of one."""
    yield "| update | rank | error / best rank-r error: trace norm | Frobenius | spectral | ms an update |"
    yield "|---|---|---|---|---|---|"
    for one in demo["tracking"]["summary"]:
        if rank in (None, one["rank"]):
            ratios = (_ratio(one["ratios"][norm]) for norm in ("trace", "frobenius", "spectral"))
            cells = (f"`{one['update']}`", one["rank"], *ratios, f"{one['milliseconds']:.1f}")
            yield f"| {' | '.join(map(str, cells))} |"
    yield ""
    steps = len(demo["tracking"]["steps"])
    n, columns = demo["tracking"]["n"], demo["tracking"]["columns"]
    yield f"Median over {steps} steps, worst in brackets; n = {n}, {columns} new columns a step."


def training(demo: Row) -> Iterator[str]:
    """Yield the table of the training study."""
    memory = {one["method"]: one["total"] / one["total_dense"] for one in demo["training"]["memory_summary"]}
    yield "| method | test accuracy, % | steps to 97 % | seconds | median step, ms | p99 / median | memory / dense |"
    yield "|---|---|---|---|---|---|---|"
    for one in demo["training"]["summary"]:
        median, p99 = one["median_milliseconds"], one["p99_milliseconds"]
        reached = "" if one["reached"] == one["runs"] else f" ({one['reached']} of {one['runs']} runs)"
        cells = (
            one["method"],
            f"{100 * one['accuracy']:.1f}",
            f"{one['steps_to_target']:.0f}{reached}" if one["reached"] else "never",
            f"{one['seconds_to_target']:.2f}" if one["reached"] else "never",
            f"{median:.1f}",
            f"{p99 / median:.1f}",
            f"{memory[one['method']]:.2f}" if one["method"] in memory else "",
        )
        yield f"| {' | '.join(cells)} |"
    options = demo["settings"]["training"]
    yield ""
    yield f"{options['steps']} steps, rank {options['rank']}, mean of {len(options['seeds'])} seeds, rates by search."


def _ratio(entry: Row) -> str:
    return f"{entry['median']:.2f} ({entry['worst']:.2f})"


def _provenance(demo: Row) -> str:
    machine = demo["machine"]
    changed = ", modified" if machine["modified"] else ""
    return (
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['versions']['torch']},"
        f" commit {machine['commit'][:7]}{changed}"
    )
