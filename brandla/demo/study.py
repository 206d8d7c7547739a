"""The whole demo: both studies in order, stopped cleanly by Ctrl-C, and what is left behind."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from time import perf_counter

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from brandla.demo import data, machine, summary, tracking, training
from brandla.demo.figures import draw
from brandla.demo.frame import Row, Tables, plain, run, write
from brandla.demo.settings import Settings

SCHEMA = 2


def measure(settings: Settings, console: Console) -> Row:
    """Run both studies; an interrupted run returns what was measured until then."""
    facts = machine.facts()
    load, cores = facts["load"], facts["cores"]
    if load and cores and load > cores / 2:
        # Threads that wait for each other then wait for other programs as well.
        console.print(
            f"The machine is busy (load {load:.1f} on {cores} cores): times will be too long.", highlight=False
        )
    digits, start = data.load(settings.device), perf_counter()
    tables: Tables = {}
    stopped = run([tracking.piece(settings, digits), *training.pieces(settings, digits)], tables, console)
    about = {"seconds": perf_counter() - start, "quick": settings.quick, "interrupted": stopped or False}
    content: Row = plain({"schema": SCHEMA, "facts": facts | about, "settings": asdict(settings), **tables})
    return content


def leave(content: Row, output: Path, console: Console) -> None:
    """Write the JSON and the picture to ``output``, and print the tables."""
    write(content, output / "demo.json")
    for title, cells, note in summary.tables(content):
        first, *others = cells.columns
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        table.add_column(first, no_wrap=True)
        for name in others:
            table.add_column(name, justify="right")
        for row in cells.to_numpy().tolist():
            table.add_row(*row)
        console.print(f"[bold]{title}[/bold]", table, f"[dim]{note}[/dim]\n", sep="\n", highlight=False)
    if content["facts"]["interrupted"]:
        console.print("Interrupted: the figures are of the parts that were finished.")
    written = [output / "demo.json"]
    if draw(content, output / "demo.png"):
        written.append(output / "demo.png")
    names = " and ".join(str(path) for path in written)
    console.print(f"{content['facts']['seconds']:.0f} s. Figures in {names}", soft_wrap=True, highlight=False)
