"""How a study runs: its command, its pieces under a progress bar, its file, and its tables at the end."""

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
SAME = ("commit", "modified", "cpu", "threads", "versions")

Quick = Annotated[bool, typer.Option("--quick", help="Toy sizes: shows that the study runs, measures nothing.")]
Full = Annotated[bool, typer.Option("--full", help="Sizes for a GPU, or long ones, where the study has them.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what an interrupted result file lacks.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the file, in place of the machine's own.")]


def tabulated(content: Row) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the name and the rows of each table, numbers with four digits."""
    for table, rows in content.items():
        if isinstance(rows, list) and rows:
            yield table, pd.json_normalize(rows).map(lambda cell: f"{cell:.4g}" if isinstance(cell, float) else cell)


@dataclass(frozen=True)
class Study:
    """What a study varies, measures and draws."""

    name: str  # of the result file
    sizes: Mapping[str, Any]  # settings by "quick", "usual" and, where there is one, "full"
    # What is measured with these settings on a device; the tables hold the rows so far.
    pieces: Callable[[Any, Device, Tables], Iterable[Piece]]
    # Titles and tables of the file's content, for the terminal.
    shown: Callable[[Row], Iterable[tuple[str, pd.DataFrame]]] = tabulated
    derived: Callable[[Tables], Tables] = lambda tables: {}  # tables that follow from the measured ones
    threads: int = THREADS  # of torch and of NumPy's BLAS; one in a short run


def each(
    table: str, names: tuple[str, ...], values: Iterable[Any], measure: Callable[..., Iterable[Row]], *about: Any,
    cost: Callable[..., float] | float = 1.0,
) -> Iterator[Piece]:  # fmt: skip
    """Yield a piece for each set of values of the names, measured with what it is about; some values have names."""
    for value in values:
        key = {name: getattr(one, "name", one) for name, one in zip(names, value, strict=True)}
        yield Piece(table, key, partial(measure, *value, *about), cost(*value) if callable(cost) else cost)


def command(study: Study, about: str | None) -> typer.Typer:
    """Return the command line of a study that has the usual options alone."""
    app = application(about)

    @app.command(help=about)
    def main(quick: Quick = False, full: Full = False, resume: Resume = False, out: Out = None) -> None:
        conduct(study, quick, full, resume, out)

    return app


def application(about: str | None) -> typer.Typer:
    """Return a command line without commands."""
    return typer.Typer(help=about, add_completion=False, pretty_exceptions_enable=False)


def conduct(study: Study, quick: bool, full: bool, resume: bool, out: Path | None) -> None:
    """Measure what is missing of the settings, write the file, and print the tables."""
    if quick and full:
        message = "a run is short or long: leave out --quick or --full"
        raise typer.BadParameter(message)
    settings = study.sizes["quick" if quick else "full" if full and "full" in study.sizes else "usual"]
    console, start = Console(highlight=False), time.monotonic()
    # A short run leaves room for what else the machine does.
    torch.set_num_threads(1 if quick else study.threads)
    torch.manual_seed(0)
    device = device_of(quick)
    machine = machine_of(device)
    path = (out or results.folder_of(machine)) / f"{study.name}.json"
    kept, tables, seconds = jsonable(asdict(settings)) if is_dataclass(settings) else {}, {}, 0.0
    pieces = list(study.pieces(settings, device, tables))
    if resume and path.exists():
        seconds = _take_up(tables, pieces, kept, machine, path)
    with threadpool_limits(torch.get_num_threads()):
        stopped = run(pieces, tables, console)
    about = {"seconds": seconds + time.monotonic() - start, "full": full, "interrupted": stopped or False}
    content = {"settings": kept, **tables, **study.derived(tables)}
    results.write(study.name, machine | about, content, path.parent)
    content = results.read(path.parent)[study.name]
    for title, cells in study.shown(content):
        pages.show(pages.on_terminal(cells, title), console)
    console.print(f"{about['seconds']:.0f} s. Written: {path}", soft_wrap=True)
    if stopped:
        console.print("Interrupted: the file holds what was measured, and says so; --resume goes on.")
        raise typer.Exit(INTERRUPTED)


def machine_of(device: Device) -> Row:
    """Return the facts of the device that is measured."""
    return facts(device.dry, gpu=device.tensors.type == "cuda")


def _take_up(tables: Tables, pieces: Sequence[Piece], settings: Row, machine: Row, path: Path) -> float:
    """Add the rows of a file of this study, without those of the piece that was interrupted; return its seconds."""
    begun = results.read(path.parent)[path.stem]
    before = begun["facts"]
    wrong = "has other settings" if begun["settings"] != settings else ""
    if any(before[name] != machine[name] for name in SAME):
        wrong = f"is of {commit_of(before)}, another machine or other versions"
    if wrong:
        message = f"{path.name} {wrong}; move it away"
        raise typer.BadParameter(message, param_hint="--resume")
    for piece in pieces:
        if piece.label != before["interrupted"]:
            tables.setdefault(piece.table, []).extend(filter(piece.owns, begun.get(piece.table, [])))
    return before["seconds"]
