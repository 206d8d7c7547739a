"""Settings of the benchmarks, the figures they collect, the table at the end and the result file."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from bench import results, roofline
from bench.cpu import device_of
from bench.facts import facts, in_words
from bench.figures import Figure, Study, spelled
from bench.gpu.cases import TOY
from bench.gpu.device import Ceilings, Device, measure
from bench.study import INTERRUPTED, THREADS, machine_of
from bench.tasks import OURS
from bench.timed_case import Case, Run, reference_on

WIDTH = 130

studies = pytest.StashKey[dict[str, Study]]()
started = pytest.StashKey[float]()
deselected = pytest.StashKey[int]()
# Cases of each file that have not ended, and whether Ctrl-C was pressed.
left = pytest.StashKey[Counter[str]]()
interrupted = pytest.StashKey[bool]()
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
    config.stash[left] = Counter()
    config.stash[interrupted] = False
    # What is refused before it is timed is told by its own words; figures of whole runs time no call.
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used at all")


def pytest_deselected(items: list[pytest.Item]) -> None:
    if items:
        items[0].config.stash[deselected] += len(items)


def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.stash[left].update(name_of(item) for item in session.items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    done = yield
    item.config.stash[left][name_of(item)] -= 1
    return done


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Iterator[None]:
    try:
        return (yield)
    except KeyboardInterrupt:
        session.config.stash[interrupted] = True
        raise


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.stash[interrupted]:
        session.exitstatus = INTERRUPTED


def name_of(node: Any) -> str:
    """Return the name of the study that a case belongs to, which is that of its file."""
    return node.module.__name__.rpartition("bench_")[2]


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


@pytest.fixture(autouse=True)
def _same_draws_for_each() -> None:
    # Some peers draw from these; a case is then the same whatever ran before it.
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (the one that fbpca draws from)


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
    study = request.config.stash[studies].setdefault(name_of(request), Study())

    def keep(case: str, value: Any, *, group: str | None = None, **about: Any) -> None:
        figure = Figure.of(group or benchmark.group or "", case, value, **about)
        study.figures.append(figure)
        benchmark.extra_info[case if group is None else f"{group}: {case}"] = figure.record()

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
def run(device: Device, ceilings: Ceilings, place: tuple[dict[str, Any], Path]) -> Run:
    """Return what all cases have in common."""
    return Run(device.dry, place[0], ceilings, reference_on(device))


@pytest.fixture
def case(
    request: pytest.FixtureRequest, benchmark: Any, run: Run
) -> Callable[..., AbstractContextManager[Callable[..., None]]]:
    """Return a function that opens a case: there a result is checked, and timed by the function that the case gives.

    Whatever goes wrong with a peer there is kept, with its reason, and the run goes on; what is ours fails.
    """
    study = request.config.stash[studies].setdefault(name_of(request), Study())

    @contextmanager
    def opened(group: str, by: str, **about: Any) -> Iterator[Callable[..., None]]:
        benchmark.group = group
        one = Case(run, study, {"group": group, "by": by, **about}, benchmark)
        try:
            yield one.time
        except Exception as error:
            if by in OURS:
                raise
            pytest.skip(f"not timed: {one.refuse(error)}")

    return opened


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    machine = facts(config.getoption("quick"))
    console = Console(width=WIDTH, highlight=False)
    for name, study in config.stash[studies].items():
        console.print(_table(name, study.figures) if study.figures else _table_of_cases(name, study.cases))
        console.print(in_words(machine))
    terminalreporter.write_line(_kept(terminalreporter, config, machine))


def _kept(reporter: pytest.TerminalReporter, config: pytest.Config, machine: dict[str, Any]) -> str:
    """Write the result files of a run that was right, and say what was done.

    Of what Ctrl-C stopped, rows are kept, and the file says that some are missing. Figures are looked up by their
    names: a part of them makes no file.
    """
    found, count = config.stash[studies], {name: len(those) for name, those in reporter.stats.items()}
    skipped = count.get("skipped", 0) - sum(len(study.refused) for study in found.values())
    if skipped + sum(count.get(outcome, 0) for outcome in ("failed", "error", "xfailed")):
        return "no result file: the run was not right"
    if config.stash[deselected] or config.getoption("benchmark_disable"):
        return "no result file: the run was not whole"
    lines = []
    for name, study in found.items():
        missing = config.stash[left][name]
        if missing and not study.cases:
            lines.append(f"not written: {name} was interrupted")
            continue
        about = {"seconds": time.monotonic() - config.stash[started], "full": config.getoption("full")}
        measured, folder = config.stash[machine_facts] if study.cases else (machine, None)
        about["interrupted"] = missing > 0
        path = results.write(name, measured | about, study.record(), folder).relative_to(results.ROOT)
        lines.append(f"written: {path}" + (f", interrupted: {missing} cases are missing" if missing else ""))
    return "\n".join(lines)


def _table(name: str, figures: list[Figure]) -> Table:
    table = Table("case", "measured", "to reach", "met", title=f"bench_{name}", title_justify="left")
    for group in dict.fromkeys(figure.group for figure in figures):
        table.add_section()
        table.add_row(f"[bold]{group}[/bold]")
        for figure in (figure for figure in figures if figure.group == group):
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
