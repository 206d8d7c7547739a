"""How a study runs: its command, its pieces under a progress bar, its file, and its tables at the end."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pandas as pd
import torch
import typer
from rich.console import Console
from threadpoolctl import threadpool_limits

from bench.frame import pages, results
from bench.frame.facts import commit_of, facts
from bench.gpu.device import Device, device_of
from brandla.demo.frame import INTERRUPTED, Piece, Row, Tables, plain, run

THREADS = 2
SAME = ("commit", "modified", "cpu", "threads", "versions")

Quick = Annotated[bool, typer.Option("--quick", help="Toy sizes: shows that the study runs, measures nothing.")]
Full = Annotated[bool, typer.Option("--full", help="Sizes for a GPU, or long ones, where the study has them.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what an interrupted result file lacks.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the file, in place of the machine's own.")]


@dataclass(frozen=True)
class Study:
    """What a study varies, measures and draws."""

    name: str  # of the result file
    sizes: Mapping[str, Any]  # settings by "quick", "usual" and, where there is one, "full"
    # What is measured with these settings on a device; see ``brandla.demo.frame.Piece``.
    pieces: Callable[[Any, Device], Sequence[Piece]]
    # Titles and tables of the file's content, for the terminal.
    shown: Callable[[Row], Iterable[tuple[str, pd.DataFrame]]]
    derived: Callable[[Tables], Tables] = lambda tables: {}  # tables that follow from the measured ones
    threads: int = THREADS  # of torch and of NumPy's BLAS; one in a short run


class Table(NamedTuple):
    """A table whose rows differ in the values of some names, and what measures the rows of given values."""

    title: str
    names: tuple[str, ...]
    values: Iterable[tuple[Any, ...]]
    measure: Callable[..., Iterator[Row]]
    cost: float = 1.0


def pieces_of(tables: Mapping[str, Table], *settings: Any) -> list[Piece]:
    """Return a piece for each set of values, measured with the settings."""
    return [
        Piece(
            table,
            dict(zip(each.names, values, strict=True)),
            each.cost,
            lambda *_, measure=each.measure, values=values: measure(*values, *settings),
        )
        for table, each in tables.items()
        for values in each.values
    ]


def tabulated(tables: Mapping[str, Table], content: Row) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the rows of what has been measured, numbers with four digits."""
    for table, each in tables.items():
        if rows := content.get(table):
            cells = pd.json_normalize(rows)
            yield each.title, cells.map(lambda cell: f"{cell:.4g}" if isinstance(cell, float) else cell)


def command(study: Study, about: str | None) -> typer.Typer:
    """Return the command line of a study that has the usual options alone."""
    app = application(about)

    @app.command(help=about)
    def main(quick: Quick = False, full: Full = False, resume: Resume = False, out: Out = None) -> None:
        conduct(study, settings_of(study, quick=quick, full=full), quick=quick, full=full, resume=resume, out=out)

    return app


def application(about: str | None) -> typer.Typer:
    """Return a command line without commands."""
    return typer.Typer(help=about, add_completion=False, pretty_exceptions_enable=False)


def settings_of(study: Study, *, quick: bool, full: bool) -> Any:
    """Return the settings of a length."""
    if quick and full:
        message = "a run is short or long: leave out --quick or --full"
        raise typer.BadParameter(message)
    return study.sizes["quick" if quick else "full" if full and "full" in study.sizes else "usual"]


def conduct(study: Study, settings: Any, *, quick: bool, full: bool, resume: bool, out: Path | None) -> None:
    """Measure what is missing; write the file, and print the tables."""
    console, start = Console(highlight=False), time.monotonic()
    # A short run leaves room for what else the machine does.
    torch.set_num_threads(1 if quick else study.threads)
    torch.manual_seed(0)
    device = device_of(quick)
    machine = machine_of(device)
    path = (out or results.folder_of(machine)) / f"{study.name}.json"
    pieces, kept = study.pieces(settings, device), plain(asdict(settings)) if is_dataclass(settings) else {}
    tables, seconds = _taken_up(pieces, kept, machine, path) if resume and path.exists() else ({}, 0.0)
    with threadpool_limits(torch.get_num_threads()):
        stopped = run(pieces, tables, console)
    about = {"seconds": seconds + time.monotonic() - start, "full": full, "interrupted": stopped or False}
    content = plain({"settings": kept, **tables, **study.derived(tables)})
    results.write(study.name, plain(machine | about), content, path.parent)
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


def _taken_up(pieces: Sequence[Piece], settings: Row, machine: Row, path: Path) -> tuple[Tables, float]:
    """Return the rows of a file of this study, without those of the piece that was interrupted, and its seconds."""
    begun = results.read(path.parent)[path.stem]
    before = begun["facts"]
    wrong = "has other settings" if begun["settings"] != settings else ""
    if any(before[name] != machine[name] for name in SAME):
        wrong = f"is of {commit_of(before)}, another machine or other versions"
    if wrong:
        message = f"{path.name} {wrong}; move it away"
        raise typer.BadParameter(message, param_hint="--resume")
    tables: Tables = {}
    for piece in pieces:
        if piece.words != before["interrupted"]:
            tables.setdefault(piece.table, []).extend(filter(piece.owns, begun.get(piece.table, [])))
    return tables, before["seconds"]
