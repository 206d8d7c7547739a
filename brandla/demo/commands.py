"""``brandla demo``: its options, and where it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

INTERRUPTED = 130

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Less of everything, in under half a minute.")] = False,
    output: Annotated[
        Path, typer.Option("--output", help="Folder for demo.json and demo.png.", file_okay=False)
    ] = Path("brandla-demo"),
    seeds: Annotated[
        int | None,
        typer.Option("--seeds", min=1, help="Runs of each training method: 3, or 1 if quick.", show_default=False),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", help="Where to run: cpu, cuda, cuda:1; a GPU if there is one.", show_default=False),
    ] = None,
) -> None:
    """Track a real layer's input factor, then train with SGD, AdamW and every K-FAC strategy.

    Ctrl-C stops it and keeps what was measured.
    """
    place = _device(device)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"the folder {output} cannot be made: {error.strerror}"
        raise typer.BadParameter(message, param_hint="--output") from error
    try:
        finished = _run_demo(place, output, quick=quick, seeds=seeds)
    except KeyboardInterrupt:
        typer.echo("Interrupted.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if not finished:
        raise typer.Exit(INTERRUPTED)


def _run_demo(device: str, output: Path, *, quick: bool, seeds: int | None) -> bool:
    from brandla.demo.settings import make_settings
    from brandla.demo.study import leave, measure

    console = Console()
    content = measure(make_settings(device, quick=quick, seeds=seeds), console)
    leave(content, output, console)
    return not content["facts"]["interrupted"]


def _device(name: str | None) -> str:
    """Return the device asked for, or the first GPU, or the CPU; refuse one that torch cannot use."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, dtype=torch.float64, device=name)
    except (RuntimeError, AssertionError, TypeError) as error:
        message = f"torch cannot use {name!r} here: {str(error).splitlines()[0]}"
        raise typer.BadParameter(message, param_hint="--device") from error
    return name
