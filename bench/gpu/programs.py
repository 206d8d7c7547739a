"""Stages that start programs: the tests of the kernels on the device, and the small calls under compute-sanitizer.

The tests are those that elsewhere run in Triton's interpreter; each file is a shard with a process of its own. This
module is also a pytest plugin: it ends a worker whose device no longer answers, so one bad kernel fails no other test.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib import util
from pathlib import Path
from typing import NamedTuple

import torch

from bench.frame.facts import ROOT
from bench.gpu.frame import LONGEST, Findings


class Finished(NamedTuple):
    status: int | None
    output: str

    @property
    def words(self) -> str:
        return "stopped at its time limit" if self.status is None else f"exit status {self.status}"

    def judge(self, findings: Findings, case: str, so_far: str = "", error: str = "") -> None:
        """Record a program that was stopped, as skipped, or that failed."""
        if self.status is None:
            findings.add("skipped", f"{case}: {self.words}{so_far}")
        elif self.status != 0 or error:
            findings.add("failures", {"case": case, "error": error + self.words, "traceback": self.output[-LONGEST:]})


def command(words: list[str], seconds: float, **variables: str) -> Finished:
    """Run a command from the checkout for at most so many seconds, with both packages on the path."""
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | variables
    # The output goes to a file: a grandchild that outlives its parent would keep a pipe open.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=output, stderr=output, start_new_session=True)
        status: int | None = None
        try:
            with suppress(subprocess.TimeoutExpired):
                status = process.wait(timeout=max(seconds, 1.0))
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return Finished(status, output.read())


# --- The tests of the kernels

FOLDER = "tests/kernels/interpreted"
# Workers of a shard, the most seconds for a shard, and the fewest that must be left to begin one.
WORKERS, MOST, LEAST = 3, 120.0, 15.0
OUTCOMES = ("passed", "failed", "error", "skipped")
# Versions other than those of `constraints.txt` may warn, which is no failure of a kernel.
OPTIONS = ["-v", "--tb=short", "-W", "default", "-p", "no:cacheprovider"]


def cases(dry: bool) -> list[str]:
    """Return the files, the largest first; for a dry run, which only collects the tests, the folder."""
    files = sorted((ROOT / FOLDER).glob("test_*.py"), key=lambda file: -file.stat().st_size)
    return [FOLDER] if dry or not files else [f"{FOLDER}/{file.name}" for file in files]


def tests(findings: Findings) -> None:
    for name in cases(findings.device.dry):
        findings.attempt(name, LEAST, _shard, findings, name)


def _shard(findings: Findings, name: str) -> None:
    pytest = [sys.executable, "-m", "pytest"]
    if findings.device.dry:
        finished = command([*pytest, "-q", "--collect-only", name], MOST, TRITON_INTERPRET="1")
        number = {"collected": finished.output.count("::")}
    else:
        workers = ["-n", str(WORKERS), "-p", "bench.gpu.programs"] if util.find_spec("xdist") else []
        finished = command([*pytest, *OPTIONS, *workers, name], min(findings.seconds_left(), MOST), OMP_NUM_THREADS="1")
        number = count_outcomes(finished.output)
    findings.row("tests", file=name, **number, status=finished.words)
    finished.judge(findings, name)


def count_outcomes(output: str) -> dict[str, int]:
    """Count the outcomes in pytest's output so far: there is no summary if it was stopped."""
    outcomes = re.findall(r"(?:\] |::\S+ )(PASSED|FAILED|ERROR|SKIPPED)\b", output.partition("short test summary")[0])
    return {outcome: outcomes.count(outcome.upper()) for outcome in OUTCOMES}


def pytest_runtest_logfinish() -> None:
    """End a worker whose device fails after an illegal access; xdist starts another worker."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


# --- compute-sanitizer: no access out of bounds, no race in shared memory

NAME = "compute-sanitizer"
CALLS = [sys.executable, "-m", "bench.gpu.ops"]
# Messages of the tool where it cannot work, which say nothing about the kernels.
REFUSALS = ("Device not supported", "Target application terminated before first instrumented", "not supported on")


def sanitize(findings: Findings) -> None:
    """Make the small calls without a tool, then under each check of the tool."""
    dry = findings.device.dry
    findings.attempt("as they are", 15, _run_under, findings, [], CALLS + ["--quick"] * dry)
    if dry:
        return
    # The tool comes with the CUDA toolkit or with NVIDIA's Python packages.
    roots = filter(None, [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"])
    packaged = Path(torch.__file__).parents[1].glob(f"nvidia*/**/{NAME}")
    folders = [f"{root}/{part}" for root in roots for part in ("bin", NAME)] + [str(file.parent) for file in packaged]
    tool = shutil.which(NAME) or shutil.which(NAME, path=os.pathsep.join(folders))
    if tool is None:
        findings.add("skipped", f"{NAME}: not found")
        return
    for check, words in (("memcheck", CALLS), ("racecheck", [*CALLS, "--quick"])):
        under = [tool, "--tool", check, "--error-exitcode", "9", "--print-limit", "20"]
        findings.attempt(check, 15, _run_under, findings, under, words)


def _run_under(findings: Findings, tool: list[str], words: list[str]) -> None:
    # Without torch's caching allocator, each tensor is an allocation of its own, and an access past its end is seen.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool else {}
    finished = command([*tool, *words], 60 if findings.device.dry else findings.seconds_left(), **alone)
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", finished.output)
    errors, check = int(summary[1]) if summary else None, tool[2] if tool else "none"
    made = len(re.findall(r"^called ", finished.output, re.MULTILINE))
    findings.row("small calls", tool=check, calls=made, errors=errors, status=finished.words)
    if any(refusal in finished.output for refusal in REFUSALS):
        findings.add("skipped", f"{check}: the tool cannot work on this machine: {finished.output[-300:]}")
    else:
        wrong = finished.status != 0 or (tool and errors != 0)
        finished.judge(findings, check, f" after {made} calls", f"{errors} errors, " if wrong else "")
