"""How a study runs: the command, the pieces under a progress bar, the result file, and the tables at the end."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from rich.console import Console
from threadpoolctl import threadpool_limits

from bench.frame import pages, results
from bench.frame.facts import commit_of, facts
from bench.gpu.device import Device, device_of
from brandla.demo.frame import INTERRUPTED, Piece, Row, Tables, jsonable, run

THREADS = 2
# The facts that a result file must share with the machine for --resume.
MUST_MATCH = ("commit", "modified", "cpu", "threads", "versions")

Quick = Annotated[bool, typer.Option("--quick", help="Toy sizes: shows that the study runs, measures nothing.")]
Full = Annotated[bool, typer.Option("--full", help="Sizes for a GPU, or long ones, where the study has them.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what an interrupted result file lacks.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the file, in place of the machine's own.")]


def tables_of(content: Row) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the name and the rows of each table, numbers with four digits."""
    for table, rows in content.items():
        if isinstance(rows, list) and rows:
            yield table, pd.json_normalize(rows).map(lambda cell: f"{cell:.4g}" if isinstance(cell, float) else cell)


@dataclass(frozen=True)
class Study:
    """A study: its settings, its measurements, and the tables that it shows."""

    name: str  # of the result file
    sizes: Mapping[str, Any]  # settings by "quick", "usual" and perhaps "full"
    # From the settings, the device, and the tables with the rows so far.
    pieces: Callable[[Any, Device, Tables], Iterable[Piece]]
    # Titles and tables for the terminal, from the content of the result file.
    shown: Callable[[Row], Iterable[tuple[str, pd.DataFrame]]] = tables_of
    derived: Callable[[Tables], Tables] = lambda tables: {}  # further tables, computed from the measured ones
    threads: int = THREADS  # of torch and of NumPy's BLAS; one in a short run


def sweep(
    table: str, names: tuple[str, ...], values: Iterable[Any], measure: Callable[..., Iterable[Row]], *about: Any,
    cost: Callable[..., float] | float = 1.0,
) -> Iterator[Piece]:  # fmt: skip
    """Yield a piece for each tuple of values. Its key has the values by the names, some by their attribute ``name``."""
    for value in values:
        key = {name: getattr(part, "name", part) for name, part in zip(names, value, strict=True)}
        yield Piece(table, key, partial(measure, *value, *about), cost(*value) if callable(cost) else cost)


def command(study: Study, about: str | None) -> typer.Typer:
    """Return the command line of a study without options of its own."""
    app = new_app(about)

    @app.command(help=about)
    def main(quick: Quick = False, full: Full = False, resume: Resume = False, out: Out = None) -> None:
        run_study(study, quick, full, resume, out)

    return app


def new_app(about: str | None) -> typer.Typer:
    """Return a command line without commands."""
    return typer.Typer(help=about, add_completion=False, pretty_exceptions_enable=False)


def run_study(study: Study, quick: bool, full: bool, resume: bool, out: Path | None) -> None:
    """Measure all missing pieces, write the result file, and print the tables."""
    if quick and full:
        message = "a run is short or long: leave out --quick or --full"
        raise typer.BadParameter(message)
    settings = study.sizes["quick" if quick else "full" if full and "full" in study.sizes else "usual"]
    console, start = Console(highlight=False), time.monotonic()
    # A short run leaves the other cores to other programs.
    torch.set_num_threads(1 if quick else study.threads)
    torch.manual_seed(0)
    device = device_of(quick)
    machine = machine_of(device)
    path = (out or results.folder_of(machine)) / f"{study.name}.json"
    kept, tables, seconds = jsonable(asdict(settings)) if is_dataclass(settings) else {}, {}, 0.0
    pieces = list(study.pieces(settings, device, tables))
    if resume and path.exists():
        seconds = _resume(tables, pieces, kept, machine, path)
    with threadpool_limits(torch.get_num_threads()):
        stopped = run(pieces, tables, console)
    about = {"seconds": seconds + time.monotonic() - start, "full": full, "interrupted": stopped or False}
    content = {"settings": kept, **tables, **study.derived(tables)}
    results.write(study.name, machine | about, content, path.parent)
    content = results.read(path.parent)[study.name]
    for title, cells in study.shown(content):
        pages.show(console, cells, title)
    console.print(f"{about['seconds']:.0f} s. Written: {path}", soft_wrap=True)
    if stopped:
        console.print("Interrupted: the file holds what was measured, and says so; --resume goes on.")
        raise typer.Exit(INTERRUPTED)


def machine_of(device: Device) -> Row:
    """Return the facts of the machine, with those of a GPU if the device is one."""
    return facts(device.dry, gpu=device.tensors.type == "cuda")


def _resume(tables: Tables, pieces: Sequence[Piece], settings: Row, machine: Row, path: Path) -> float:
    """Add the rows of the result file, without those of the piece that was interrupted; return the file's seconds."""
    content = results.read(path.parent)[path.stem]
    before = content["facts"]
    wrong = "has other settings" if content["settings"] != settings else ""
    if any(before[name] != machine[name] for name in MUST_MATCH):
        wrong = f"is of {commit_of(before)}, another machine or other versions"
    if wrong:
        message = f"{path.name} {wrong}; move it away"
        raise typer.BadParameter(message, param_hint="--resume")
    for piece in pieces:
        if piece.label != before["interrupted"]:
            tables.setdefault(piece.table, []).extend(filter(piece.owns, content.get(piece.table, [])))
    return before["seconds"]
