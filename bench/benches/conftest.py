"""Settings of the benchmarks, the figures they collect, the tables at the end and the result files."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from threadpoolctl import threadpool_limits

from bench.benches import cases, timing
from bench.benches.cases import Run
from bench.frame import pages, results
from bench.frame.facts import facts, in_words
from bench.frame.figures import Figure, Study, judged
from bench.frame.study import INTERRUPTED, THREADS, machine_of
from bench.gpu.cases import TOY
from bench.gpu.device import Device, device_of, measure
from bench.studies import roofline


@dataclass
class Found:
    started: float = field(default_factory=time.monotonic)
    studies: dict[str, Study] = field(default_factory=dict)
    # Facts of the device, where functions or ops were measured.
    machine: dict[str, Any] | None = None


FOUND = pytest.StashKey[Found]()


def pytest_addoption(parser: pytest.Parser) -> None:
    few = "few repeats: shows that the benchmarks run, measures nothing"
    parser.addoption("--quick", action="store_true", help=few)
    parser.addoption("--full", action="store_true", help="functions and ops at sizes that take a GPU, or long")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(_threads(config))
    config.stash[FOUND] = Found()
    # A collection in one call of many would be its outlier.
    config.option.benchmark_disable_gc = True
    # What is refused before it is timed is told by its own words; figures of whole runs time no call.
    config.addinivalue_line("markers", "study(name): the result file of a case, where it is not that of its file")
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used at all")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    # Before the first case it is a collection that failed.
    if exitstatus == pytest.ExitCode.INTERRUPTED and session.config.stash[FOUND].studies:
        session.exitstatus = INTERRUPTED


def name_of(node: Any) -> str:
    """Return the name of the study that a case belongs to: that of its mark, or of its file."""
    mark = node.get_closest_marker("study")
    return mark.args[0] if mark else node.module.__name__.rpartition("bench_")[2]


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


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("quick"))


@pytest.fixture
def study(request: pytest.FixtureRequest) -> Study:
    return request.config.stash[FOUND].studies.setdefault(name_of(request.node), Study())


@pytest.fixture
def in_turn(benchmark: Any, quick: bool) -> Callable[..., dict[str, list[float]]]:
    """Return `timing.in_turn` of this case; a short run takes few turns."""
    most = 3 if quick else float("inf")
    return lambda calls, rounds, **options: timing.in_turn(benchmark, calls, min(rounds, most), **options)


@pytest.fixture
def figures(request: pytest.FixtureRequest, benchmark: Any, study: Study) -> Iterator[Callable[..., None]]:
    """Return a function that keeps a figure: in the study of this file, and in pytest-benchmark's own record."""

    def keep(case: str, value: Any, *, group: str | None = None, **about: Any) -> None:
        study.figures.append(Figure.of(group or benchmark.group or "", case, value, **about))
        benchmark.extra_info[case if group is None else f"{group}: {case}"] = study.figures[-1].record()

    yield keep
    if benchmark.stats:
        found, parts = benchmark.stats.stats, ("median", "q1", "q3")
        milliseconds = {f"{part}_ms": 1e3 * getattr(found, part) for part in parts}
        about = {"group": benchmark.group or "", "name": request.node.name}
        study.timings.append(about | milliseconds | {"rounds": found.rounds})


@pytest.fixture(scope="session")
def device(quick: bool) -> Device:
    return device_of(quick)


@pytest.fixture(scope="session")
def run(request: pytest.FixtureRequest, device: Device) -> Run:
    """Return what all cases have in common; the ceilings are what every time is also given as a part of."""
    sizes = TOY if device.dry else roofline.FULL if device.tensors.type == "cuda" else roofline.USUAL
    machine = request.config.stash[FOUND].machine = machine_of(device)
    return Run(device.dry, machine, measure(device, sizes), cases.reference_on(device))


@pytest.fixture
def case(benchmark: Any, run: Run, study: Study) -> Callable[..., AbstractContextManager[Callable[..., None]]]:
    return partial(cases.opened, benchmark, run, study)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    # Times of cases are in pytest-benchmark's own tables.
    machine, console = facts(config.getoption("quick")), Console(highlight=False)
    for name, study in config.stash[FOUND].studies.items():
        for group, shown in judged(study.figures).groupby("what", sort=False):
            red = list(shown["met"] == "**no**")
            pages.show(pages.on_terminal(shown.drop(columns="what"), f"bench_{name}: {group}", red), console)
    console.print(in_words(machine))
    terminalreporter.write_line(_kept(terminalreporter, config, machine))


def _kept(reporter: pytest.TerminalReporter, config: pytest.Config, machine: dict[str, Any]) -> str:
    """Write the result files of a run that was right, and say what was done.

    Of what Ctrl-C stopped, rows are kept, and the file says that some are missing. Figures are looked up by their
    names: a part of them makes no file.
    """
    found, count = config.stash[FOUND], {name: len(those) for name, those in reporter.stats.items()}
    ended = {report.nodeid for report in reporter.stats.get("", []) if report.when == "teardown"}
    left = Counter(name_of(item) for item in reporter._session.items if item.nodeid not in ended)
    skipped = count.get("skipped", 0) - sum(len(study.refused) for study in found.studies.values())
    if skipped + sum(count.get(outcome, 0) for outcome in ("failed", "error", "xfailed")):
        return "no result file: the run was not right"
    if count.get("deselected") or config.getoption("benchmark_disable"):
        return "no result file: the run was not whole"
    lines = []
    for name, study in found.studies.items():
        missing = left[name]
        if missing and not study.cases:
            lines.append(f"not written: {name} was interrupted")
            continue
        measured = found.machine if study.cases and found.machine else machine
        about = {"seconds": time.monotonic() - found.started, "full": config.getoption("full")}
        path = results.write(name, measured | about | {"interrupted": missing > 0}, study.record())
        words = f", interrupted: {missing} cases are missing" if missing else ""
        lines.append(f"written: {path.relative_to(results.ROOT)}{words}")
    return "\n".join(lines)
