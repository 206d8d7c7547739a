"""Settings of the benchmarks, the figures that they collect, the tables at the end and the result files."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from threadpoolctl import threadpool_limits

from bench.benches import timing
from bench.frame import pages, results
from bench.frame.facts import facts, facts_text
from bench.frame.figures import Figure, Study, figure_table
from bench.frame.study import INTERRUPTED, THREADS, machine_of
from bench.gpu.device import device_of

STARTED = time.monotonic()
STUDIES = pytest.StashKey[dict[str, Study]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="few repeats: shows that the benches run, measures nothing")
    parser.addoption("--full", action="store_true", help="functions and ops at sizes that take a GPU, or long")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STUDIES] = {}
    # A short run leaves the other cores to other programs.
    torch.set_num_threads(1 if config.getoption("quick") else THREADS)
    # A garbage collection would make one call of many an outlier.
    config.option.benchmark_disable_gc = True
    # The fixture itself times nothing where calls take turns, a case is refused, or a whole training run is timed.
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used at all")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    # --benchmark-compare reports every difference, so nothing here differs from run to run. Date and commit are there.
    machine = machine_of(device_of(config.getoption("quick")))
    machine_info["measured on"] = {name: machine.get(name) for name in ("cpu", "cores", "threads", "versions", "gpu")}


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    # Without a case yet, the collection has failed.
    if exitstatus == pytest.ExitCode.INTERRUPTED and session.config.stash[STUDIES]:
        session.exitstatus = INTERRUPTED


@pytest.fixture(autouse=True, scope="session")
def _same_threads_for_all() -> Iterator[None]:
    # NumPy's BLAS, which scikit-learn uses, has a thread pool of its own.
    with threadpool_limits(torch.get_num_threads()):
        yield


@pytest.fixture(autouse=True)
def _same_draws_for_each() -> None:
    # Some peers draw from these generators. A case is then the same whatever ran before it.
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (the one that fbpca draws from)


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("quick"))


def name_of(node: Any) -> str:
    """Return the study that a case belongs to: its function may name one, else the file does."""
    return getattr(node.function, "study", node.module.__name__.rpartition("bench_")[2])


@pytest.fixture
def study(request: pytest.FixtureRequest) -> Study:
    return request.config.stash[STUDIES].setdefault(name_of(request.node), Study())


@pytest.fixture
def in_turn(benchmark: Any, quick: bool) -> Callable[..., dict[str, list[float]]]:
    """Return `timing.in_turn` for this case. A short run takes few turns."""
    most = 3 if quick else float("inf")
    return lambda calls, rounds, **options: timing.in_turn(benchmark, calls, min(rounds, most), **options)


@pytest.fixture
def figures(request: pytest.FixtureRequest, benchmark: Any, study: Study) -> Iterator[Callable[..., None]]:
    """Return a function that keeps a figure in the study of this file and in pytest-benchmark's record."""

    def keep(case: str, value: Any, *, group: str | None = None, **about: Any) -> None:
        study.figures.append(Figure.of(group or benchmark.group, case, value, **about))
        benchmark.extra_info[case if group is None else f"{group}: {case}"] = study.figures[-1].record()

    yield keep
    if benchmark.stats:
        stats = benchmark.stats.stats
        milliseconds = {f"{part}_ms": 1e3 * getattr(stats, part) for part in ("median", "q1", "q3")}
        about = {"group": benchmark.group, "name": request.node.name}
        study.timings.append(about | milliseconds | {"rounds": stats.rounds})


@pytest.fixture
def over(in_turn: Any, figures: Any) -> Callable[..., timing.Interval]:
    """Return a function that times two calls in turn, and keeps and returns the ratio."""

    def keep(case, call, other, rounds, *, ratio=timing.ratio, warm_up=timing.WARM_UP, **about):
        quotient = ratio(*in_turn({"call": call, "other": other}, rounds, warm_up=warm_up).values())
        figures(case, quotient, **about)
        return quotient

    return keep


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    # The times of the cases are in pytest-benchmark's own tables.
    console, reporter, studies = Console(highlight=False), terminalreporter, config.stash[STUDIES]
    for name, study in studies.items():
        for group, shown in figure_table(study.figures).groupby("what", sort=False):
            red = list(shown["met"] == "**no**")
            pages.show(console, shown.drop(columns="what"), f"bench_{name}: {group}", red)
    console.print(facts_text(facts(config.getoption("quick"))))
    refused = sum(len(study.refused) for study in studies.values())
    if reporter._session.testsfailed or len(reporter.stats.get("skipped", [])) > refused:
        console.print("no result file: the run was not right")
    elif reporter.stats.get("deselected") or config.getoption("benchmark_disable"):
        console.print("no result file: the run was not whole")
    else:
        ended = {report.nodeid for report in reporter.stats.get("", []) if report.when == "teardown"}
        left = Counter(name_of(item) for item in reporter._session.items if item.nodeid not in ended)
        for name, study in studies.items():
            console.print(_written(name, study, left[name], config), soft_wrap=True)


def _written(name: str, study: Study, missing: int, config: pytest.Config) -> str:
    """Write the result file of a run without failures, and return a line that says so.

    After Ctrl-C, a file of rows keeps those that were measured and says that some are missing. Figures make no file.
    """
    if missing and not study.cases:
        return f"not written: {name} was interrupted"
    quick = config.getoption("quick")
    about = {"seconds": time.monotonic() - STARTED, "full": config.getoption("full"), "interrupted": missing > 0}
    machine = machine_of(device_of(quick)) if study.cases else facts(quick)
    path = results.write(name, machine | about, study.record())
    return f"written: {path.relative_to(results.ROOT)}" + f", interrupted: {missing} cases are missing" * (missing > 0)
