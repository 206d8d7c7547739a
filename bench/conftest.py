"""Settings of the benchmarks, the figures they collect, the table at the end and the result file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from bench import results
from bench.facts import facts, in_words
from bench.figures import Figure, Study

THREADS = 2
WIDTH = 130

studies = pytest.StashKey[dict[str, Study]]()
started = pytest.StashKey[float]()
deselected = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", help="few repeats: shows that the benchmarks run, measures nothing"
    )


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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    machine = facts(config.getoption("quick"))
    console = Console(width=WIDTH, highlight=False)
    for name, study in config.stash[studies].items():
        console.print(_table(name, study.figures))
        console.print(in_words(machine))
    terminalreporter.write_line(_kept(terminalreporter, config, machine))


def _kept(reporter: pytest.TerminalReporter, config: pytest.Config, machine: dict[str, Any]) -> str:
    """Write the result files of a run that was whole and right, and say what was done."""
    troubled = sum(len(reporter.stats.get(outcome, ())) for outcome in ("failed", "error", "skipped", "xfailed"))
    if troubled or config.stash[deselected] or config.getoption("benchmark_disable"):
        return "no result file: the run was not whole"
    machine["seconds"] = time.monotonic() - config.stash[started]
    paths = [results.write(name, machine, study.record()) for name, study in config.stash[studies].items()]
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


def _coloured(met: bool | None) -> str:
    return {True: "[green]yes[/green]", False: "[red]no[/red]", None: ""}[met]
