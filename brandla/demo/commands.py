"""``brandla demo``: its options, both studies in their order, and the files and tables that it produces."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Annotated

import torch
import typer
from rich.console import Console

from brandla.demo import data, machine, summary
from brandla.demo.frame import INTERRUPTED, Row, Tables, jsonable, run, write
from brandla.demo.studies import QUICK, Settings, pieces

SCHEMA = 2

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Less of everything, in under half a minute.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for demo.json and demo.png.", file_okay=False)] = Path(
        "brandla-demo"
    ),
    seeds: Annotated[int | None, typer.Option(min=1, help="Runs of each training method: 3, or 1 if quick.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to run: cpu, cuda, cuda:1; a GPU if there is one.")] = None,
) -> None:
    """Track a real layer's input factor, then train with SGD, AdamW and every K-FAC strategy.

    Ctrl-C stops it and keeps what was measured.
    """
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, dtype=torch.float64, device=place)
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"the folder {output} cannot be made: {error.strerror}"
        raise typer.BadParameter(message, param_hint="--output") from error
    except (RuntimeError, AssertionError, TypeError) as error:
        message = f"torch cannot use {place!r} here: {str(error).splitlines()[0]}"
        raise typer.BadParameter(message, param_hint="--device") from error
    settings, console = replace(QUICK if quick else Settings(), device=place), Console(highlight=False)
    content = measure(replace(settings, seeds=tuple(range(seeds))) if seeds else settings, console)
    report(content, output, console)
    if content["facts"]["interrupted"]:
        raise typer.Exit(INTERRUPTED)


def measure(settings: Settings, console: Console) -> Row:
    """Run both studies; an interrupted run returns what was measured until then."""
    facts, digits, start = machine.facts(), data.load(settings.device), perf_counter()
    if facts["load"] and facts["cores"] and facts["load"] > facts["cores"] / 2:
        # Threads wait for each other, and on a busy machine also for other programs.
        console.print(f"The machine is busy (load {facts['load']:.1f}): times will be too long.")
    tables: Tables = {}
    stopped = run(pieces(settings, digits, tables), tables, console)
    about = {"seconds": perf_counter() - start, "quick": settings.quick, "interrupted": stopped or False}
    content: Row = jsonable({"schema": SCHEMA, "facts": facts | about, "settings": asdict(settings), **tables})
    return content


def report(content: Row, output: Path, console: Console) -> None:
    """Write the JSON and the picture to ``output``, and print the tables."""
    write(content, output / "demo.json")
    for title, cells, note in summary.tables(content):
        console.print(f"[bold]{title}[/bold]", cells.to_string(index=False), f"[dim]{note}[/dim]\n", sep="\n")
    if content["facts"]["interrupted"]:
        console.print("Interrupted: the figures cover the parts that were finished.")
    names = "demo.json and demo.png" if summary.draw(content, output / "demo.png") else "demo.json"
    console.print(f"{content['facts']['seconds']:.0f} s. Figures in {output}: {names}", soft_wrap=True)
