"""The tests of the kernels on the device: those that the interpreter runs elsewhere, and those marked ``gpu``."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from bench.frame.facts import ROOT
from bench.gpu import processes
from bench.gpu.findings import Bench, Deadline, Findings

FOLDER = "tests/kernels/interpreted"
WORKERS = 8
# Of pytest: nothing was selected.
EMPTY = 5
COUNTS = ("tests", "failures", "errors", "skipped")

RUNS: dict[str, list[str]] = {
    "tests of the kernels": [FOLDER],
    "tests marked gpu": ["tests", "-m", "gpu", "--ignore", FOLDER],
}


def run(bench: Bench, found: Findings, time: Deadline) -> None:
    """Run both sets in processes of their own; a dry run collects the first and runs none."""
    if bench.device.dry:
        _collect(found, time)
        return
    for name, arguments in RUNS.items():
        if not (ROOT / arguments[0]).exists():
            found.skipped.append(f"{name}: {arguments[0]} is not there")
        elif found.in_time(name, time, 10.0):
            _run(found, name, arguments, time)


def _run(found: Findings, name: str, arguments: list[str], time: Deadline) -> None:
    workers = ["-n", str(WORKERS)] if importlib.util.find_spec("xdist") else []
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        finished = processes.run([*_pytest(), *arguments, *workers, f"--junitxml={report}"], time.left())
        found.row(name, **_counts(report), status=_ended(finished))
    if finished.status == EMPTY:
        found.notes.append(f"{name}: there are none")
    elif finished.status != 0:
        found.failures.append({"case": name, "error": _ended(finished), "traceback": finished.tail})


def _collect(found: Findings, time: Deadline) -> None:
    if not (ROOT / FOLDER).exists():
        found.skipped.append(f"tests of the kernels: {FOLDER} is not there")
        return
    finished = processes.run([*_pytest(), "--collect-only", FOLDER], time.left(), {"TRITON_INTERPRET": "1"})
    found.row("tests that a GPU would run", folder=FOLDER, collected=finished.output.count("::"))
    if finished.status == EMPTY:
        found.skipped.append(f"tests of the kernels: there are none in {FOLDER}")
    elif finished.status != 0:
        found.failures.append({"case": "collection", "error": _ended(finished), "traceback": finished.tail})


def _pytest() -> list[str]:
    return [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=short",
        "--continue-on-collection-errors",
        "-p",
        "no:cacheprovider",
    ]


def _counts(report: Path) -> dict[str, int]:
    """Return the counts of a junit report; none was written where the run was stopped."""
    if not report.exists():
        return {}
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    totals = [{name: int(suite.get(name, 0)) for name in COUNTS} for suite in suites]
    return {name: sum(total[name] for total in totals) for name in COUNTS}


def _ended(finished: processes.Finished) -> str:
    return "stopped at its time limit" if finished.status is None else f"exit status {finished.status}"
