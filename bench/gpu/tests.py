"""The tests of the kernels on the device, those that the interpreter runs elsewhere: a file, and a process, a shard.

As a plugin of pytest this module ends a worker whose device no longer answers, so that one failing kernel does not
take the other tests with it.
"""

import os
import re
import sys
from importlib import util

import torch

from bench.frame.facts import ROOT
from bench.gpu.frame import KEPT, Findings, command

FOLDER = "tests/kernels/interpreted"
# Workers of a shard; the most seconds that one takes, and those without which it is not begun.
WORKERS, MOST, LEAST = 3, 120.0, 15.0
OUTCOMES = ("passed", "failed", "error", "skipped")
# Warnings of other versions than those of `constraints.txt` are no failures of a kernel.
PYTEST = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-W", "default", "-p", "no:cacheprovider"]


def cases(dry: bool) -> list[str]:
    """Return the files; all in one for a dry run, which collects and runs none."""
    files = sorted((ROOT / FOLDER).glob("test_*.py"), key=lambda file: -file.stat().st_size)
    return [FOLDER] if dry else [file.name for file in files] or [FOLDER]


def run(found: Findings) -> None:
    dry = found.device.dry
    for name in cases(dry):
        found.attempt(name, 0 if dry else LEAST, _collect if dry else _shard, found, name)


def _collect(found: Findings, folder: str) -> None:
    finished = command([*PYTEST[:3], "-q", "--collect-only", folder], 120, {"TRITON_INTERPRET": "1"})
    found.row("tests that a GPU would run", folder=folder, collected=finished.output.count("::"))
    if finished.status != 0:
        found.fail("collection", finished.words, finished.output[-KEPT:])


def _shard(found: Findings, name: str) -> None:
    workers = ["-n", str(WORKERS), "-p", "bench.gpu.tests"] if util.find_spec("xdist") else []
    finished = command([*PYTEST, *workers, f"{FOLDER}/{name}"], min(found.left(), MOST), {"OMP_NUM_THREADS": "1"})
    found.row("tests", file=name, **counts(finished.output), status=finished.words)
    if finished.status is None:
        found.add("skipped", f"{name}: stopped at its time limit")
    elif finished.status != 0:
        found.fail(name, finished.words, finished.output[-KEPT:])


def counts(output: str) -> dict[str, int]:
    """Count the outcomes in what pytest printed so far: there is no summary where it was stopped."""
    found = re.findall(r"(?:\] |::\S+ )(PASSED|FAILED|ERROR|SKIPPED)\b", output.partition("short test summary")[0])
    return {outcome: found.count(outcome.upper()) for outcome in OUTCOMES}


def pytest_runtest_logfinish() -> None:
    """End a worker that an illegal access has poisoned; xdist starts another."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
