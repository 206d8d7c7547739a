"""Settings of the benchmarks, the figures they collect, the table at the end and the result file."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from bench import results, roofline
from bench.cpu import device_of
from bench.facts import facts, in_words
from bench.figures import Figure, Study, spelled
from bench.gpu.ceilings import Ceilings, Work, measure
from bench.gpu.device import Device
from bench.gpu.sizes import TOY
from bench.study import THREADS, machine_of
from bench.timing import Interval, of_median

WIDTH = 130
# Seconds that a case is timed for, and how often it is called at least and at most.
SECONDS, FEWEST, MOST = 0.25, 3, 100
# Order of the product that is timed before and after each case, and the seconds it may take: what two runs have in
# common. Before it there is a rest, as threads of one BLAS library spin for a while after a call.
REFERENCE, REFERENCE_SECONDS, REST = 512, 0.01, 0.1

studies = pytest.StashKey[dict[str, Study]]()
started = pytest.StashKey[float]()
deselected = pytest.StashKey[int]()
machine_facts = pytest.StashKey[tuple[dict[str, Any], Path]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", help="few repeats: shows that the benchmarks run, measures nothing"
    )
    parser.addoption("--full", action="store_true", help="functions and ops at sizes that take a GPU, or long")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(_threads(config))
    torch.manual_seed(0)
    config.stash[studies] = {}
    config.stash[started] = time.monotonic()
    config.stash[deselected] = 0


def pytest_deselected(items: list[pytest.Item]) -> None:
    if items:
        items[0].config.stash[deselected] += len(items)


def pytest_report_header(config: pytest.Config) -> str:
    return f"bench: {in_words(facts(config.getoption('quick')))}"


def _threads(config: pytest.Config) -> int:
    # A short run leaves room for what else the machine does.
    return 1 if config.getoption("quick") else THREADS


@pytest.fixture(autouse=True, scope="session")
def _same_threads_for_all(request: pytest.FixtureRequest) -> Iterator[None]:
    # NumPy's BLAS, under scikit-learn, has a thread pool of its own.
    with threadpool_limits(_threads(request.config)):
        yield


@pytest.fixture
def repeats(request: pytest.FixtureRequest) -> Callable[[int], int]:
    """Return how often to repeat: as often as asked for, or a few times in a short run."""
    return (lambda count: min(count, 3)) if request.config.getoption("quick") else (lambda count: count)


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether this is a short run."""
    return bool(request.config.getoption("quick"))


@pytest.fixture
def figures(request: pytest.FixtureRequest, benchmark: Any) -> Iterator[Callable[..., None]]:
    """Return a function that keeps a figure: in the study of this file, and in pytest-benchmark's own record."""
    study = request.config.stash[studies].setdefault(request.module.__name__.rpartition("bench_")[2], Study())

    def keep(case: str, value: Any, **about: Any) -> None:
        figure = Figure.of(benchmark.group or "", case, value, **about)
        study.figures.append(figure)
        benchmark.extra_info[case] = figure.record()

    yield keep
    if benchmark.stats:
        study.add_timing(benchmark.group or "", request.node.name, benchmark.stats.stats)


# ---------------------------------------------------------------------------------------------------------------------
# Functions and ops over sizes, dtypes and implementations
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> Device:
    """Return what is measured: the GPU if there is one."""
    return device_of(request.config.getoption("quick"))


@pytest.fixture(scope="session")
def ceilings(request: pytest.FixtureRequest, device: Device) -> Ceilings:
    """Return the ceilings of this run, which every time is also given as a part of."""
    sizes = TOY if device.dry else roofline.FULL if device.tensors.type == "cuda" else roofline.USUAL
    return measure(device, sizes)


@pytest.fixture(scope="session")
def place(request: pytest.FixtureRequest, device: Device) -> tuple[dict[str, Any], Path]:
    """Return the facts of the device, and the folder of its results."""
    found = machine_of(device, request.config.getoption("quick"))
    request.config.stash[machine_facts] = found
    return found


@pytest.fixture(scope="session")
def reference(device: Device) -> Callable[[], list[float]]:
    """Return a function that times a square product, after a rest."""
    left, right = (device.normal(REFERENCE, REFERENCE) for _ in range(2))

    def times() -> list[float]:
        time.sleep(0.0 if device.dry else REST)
        return device.alternating({"it": lambda: left @ right}, REFERENCE_SECONDS)["it"]

    return times


@pytest.fixture
def timed(
    request: pytest.FixtureRequest, benchmark: Any, ceilings: Ceilings, place: Any, reference: Callable[[], list[float]]
) -> Callable[..., None]:
    """Return a function that times a checked case: calls on copies of its inputs in turn, so that no cache holds them.

    With more than one copy a round is a call on each, queued one after the other, between two looks at the timer.
    """
    study = request.config.stash[studies].setdefault(request.module.__name__.rpartition("bench_")[2], Study())

    def time_and_keep(copies: list[Callable[[], Any]], work: Work, **about: Any) -> None:
        start = time.perf_counter()
        copies[0]()
        rounds = int(min(max(SECONDS / len(copies) / (time.perf_counter() - start), FEWEST), MOST))
        in_turn = itertools.cycle(copies)
        call = lambda: next(in_turn)()  # noqa: PLW0108 (the call that comes next is what is timed)
        quick = request.config.getoption("quick")
        around = reference()
        benchmark.pedantic(call, rounds=2 if quick else rounds, iterations=len(copies), warmup_rounds=1)
        around = of_median([*around, *reference()])
        floor = ceilings.floor(work)
        about |= {"flops": work.float32 + work.float64 + work.bf16, "bytes": work.bytes, "bound_by": floor.bound_by}
        machine, _ = place
        versions = {key: machine[key] for key in ("cpu", "cores", "threads", "versions", "commit", "modified", "date")}
        benchmark.extra_info.update(results.plain(about | versions | {"gpu": machine.get("gpu")}))
        if benchmark.stats:
            seconds = of_median(benchmark.stats.stats.data)
            part = Interval(*(floor.seconds / each for each in (seconds.value, seconds.high, seconds.low)))
            benchmark.extra_info["of_ceiling"] = part.value
            over = Interval(*(each / around.value for each in seconds))
            row = {"seconds": seconds, "of_ceiling": part, "over_reference": over}
            row["rounds"] = benchmark.stats.stats.rounds
            study.cases.append(about | row)

    return time_and_keep


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    machine = facts(config.getoption("quick"))
    console = Console(width=WIDTH, highlight=False)
    for name, study in config.stash[studies].items():
        console.print(_table(name, study.figures) if study.figures else _table_of_cases(name, study.cases))
        console.print(in_words(machine))
    terminalreporter.write_line(_kept(terminalreporter, config, machine))


def _kept(reporter: pytest.TerminalReporter, config: pytest.Config, machine: dict[str, Any]) -> str:
    """Write the result files of a run that was whole and right, and say what was done."""
    troubled = sum(len(reporter.stats.get(outcome, ())) for outcome in ("failed", "error", "skipped", "xfailed"))
    if troubled or config.stash[deselected] or config.getoption("benchmark_disable"):
        return "no result file: the run was not whole"
    about = {"seconds": time.monotonic() - config.stash[started], "full": config.getoption("full")}
    paths = []
    for name, study in config.stash[studies].items():
        measured, folder = config.stash[machine_facts] if study.cases else (machine, None)
        paths.append(results.write(name, measured | about, study.record(), folder))
    return "\n".join(f"written: {path.relative_to(results.ROOT)}" for path in paths)


def _table(name: str, figures: list[Figure]) -> Table:
    table = Table("case", "measured", "to reach", "met", title=f"bench_{name}", title_justify="left")
    group = None
    for figure in figures:
        if figure.group != group:
            group = figure.group
            table.add_section()
            table.add_row(f"[bold]{group}[/bold]")
        table.add_row(figure.case, figure.measured(), figure.target(), _coloured(figure.met))
    return table


def _table_of_cases(name: str, rows: list[dict[str, Any]]) -> Table:
    """Return the cases, grouped as they are compared, the quickest first."""
    table = Table("by", "median, ms", "of the floor", "error", title=f"bench_{name}", title_justify="left")
    for group in dict.fromkeys(row["group"] for row in rows):
        table.add_section()
        table.add_row(f"[bold]{group}[/bold]")
        for row in sorted((row for row in rows if row["group"] == group), key=lambda row: row["seconds"].value):
            figures_ = (1e3 * row["seconds"].value, row["of_ceiling"].value, row["error"])
            table.add_row(row["by"], *map(spelled, figures_))
    return table


def _coloured(met: bool | None) -> str:
    return {True: "[green]yes[/green]", False: "[red]no[/red]", None: ""}[met]
