"""The whole demo: both studies in order, stopped cleanly by Ctrl-C, and what is left behind."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter

from rich.console import Console

from brandla.demo import data, machine, record, tracking, training
from brandla.demo.figures import draw
from brandla.demo.meter import Meter
from brandla.demo.results import Results, Tracking
from brandla.demo.settings import Settings
from brandla.demo.tables import tables


def run(settings: Settings, console: Console) -> Results:
    """Run both studies; an interrupted run returns what was measured until then."""
    results = Results(machine.facts(), settings)
    _warn_of_load(results, console)
    start = perf_counter()
    total = tracking.STEP_COST * settings.tracking.steps + training.total_cost(settings)
    with Meter(console, total) as meter:
        try:
            _measure(results, meter)
        except KeyboardInterrupt:
            results.interrupted = True
    results.seconds = perf_counter() - start
    return results


def leave(results: Results, output: Path, console: Console) -> None:
    """Write the JSON and the picture to ``output``, and print the tables."""
    record.write(results, output / "demo.json")
    for table in tables(results):
        console.print(table)
        console.print()
    if results.interrupted:
        console.print("Interrupted: the figures are of the parts that were finished.")
    written = [output / "demo.json"]
    if draw(results, output / "demo.png"):
        written.append(output / "demo.png")
    names = " and ".join(str(path) for path in written)
    console.print(f"{results.seconds:.0f} s. Figures in {names}", soft_wrap=True, highlight=False)


def _warn_of_load(results: Results, console: Console) -> None:
    """Say so where other programs may spoil the times: threads that wait for each other then wait for those as well."""
    load, cores = results.machine["load"], results.machine["cores"]
    if load and cores and load > cores / 2:
        console.print(
            f"The machine is busy (load {load:.1f} on {cores} cores): times will be too long.", highlight=False
        )


def _measure(results: Results, meter: Meter) -> None:
    settings = results.settings
    digits = data.load(settings.device)
    meter.stage("tracking a layer's input factor")
    results.tracking = Tracking(tracking.order(settings), settings.batch)
    tracking.track(settings, digits, results.tracking, meter)
    training.search(settings, digits, results.training, meter)
    training.train(settings, digits, results.training, meter)
