"""How a study runs: piece by piece under a progress bar, stopped cleanly by Ctrl-C, with its facts, to one file."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from threadpoolctl import threadpool_limits

from bench import results
from bench.facts import facts, slug
from bench.gpu import frame
from bench.gpu.device import Device
from brandla.demo.meter import Meter

THREADS = 2
# The exit code after Ctrl-C.
INTERRUPTED = 130
Row = dict[str, Any]


class Piece(NamedTuple):
    """A part of a study that is measured whole or not at all, and what it costs beside the others."""

    words: str
    cost: float
    measure: Callable[[], Iterable[Row]]


class Options(NamedTuple):
    """What a study is asked for: a short run, the sizes of a GPU, another folder for the result."""

    quick: bool
    full: bool
    out: Path | None


def options(name: str, description: str | None) -> Options:
    """Read the options that all studies have from the command line."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=description)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="toy sizes: shows that the study runs, measures nothing")
    length.add_argument("--full", action="store_true", help="sizes that only a GPU finishes in minutes")
    parser.add_argument("--out", type=Path, help="folder of the result file, in place of the machine's own")
    found = parser.parse_args()
    return Options(found.quick, found.full, found.out)


def run(pieces: Sequence[Piece], console: Console) -> tuple[list[Row], bool]:
    """Return the rows of all pieces; after Ctrl-C those of the pieces that were finished, and True."""
    rows: list[Row] = []
    with Meter(console, sum(piece.cost for piece in pieces)) as meter, threadpool_limits(torch.get_num_threads()):
        try:
            for piece in pieces:
                meter.stage(piece.words)
                rows.extend(piece.measure())
                meter.advance(piece.cost)
        except KeyboardInterrupt:
            return rows, True
    return rows, False


def prepare(quick: bool) -> float:
    """Set threads and seed, and return the time at which the study starts."""
    # A short run leaves room for what else the machine does.
    torch.set_num_threads(1 if quick else THREADS)
    torch.manual_seed(0)
    return time.monotonic()


def keep(name: str, content: Row, device: Device, chosen: Options, start: float, console: Console) -> Path:
    """Write the result file, and say where."""
    about = {"seconds": time.monotonic() - start, "full": chosen.full, "interrupted": content.pop("interrupted")}
    machine, folder = machine_of(device, chosen.quick)
    path = results.write(name, machine | about, content, chosen.out or folder)
    if about["interrupted"]:
        console.print("Interrupted: the file holds the pieces that were finished, and says so.")
    console.print(f"{about['seconds']:.0f} s. Written: {path}", soft_wrap=True, highlight=False)
    return path


def machine_of(device: Device, quick: bool) -> tuple[Row, Path]:
    """Return the facts of the device that was measured, and the folder of its results."""
    if device.tensors.type == "cuda":
        machine = facts(quick) | {"gpu": device.facts()}
        return machine, frame.folder_of(machine)
    machine = facts(quick)
    return machine, results.folder_of(slug(machine), quick)
