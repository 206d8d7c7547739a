"""Small calls of every kernel under compute-sanitizer: no access out of bounds, no race in shared memory."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch.utils.cpp_extension

from bench.gpu import processes
from bench.gpu.findings import Bench, Deadline, Findings

NAME = "compute-sanitizer"
CASES = [sys.executable, "-m", "bench.gpu.small_cases"]
# Each tensor in an allocation of its own: in a block of torch's allocator an access past its end meets another tensor.
ALONE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
# Where the tool itself cannot work, which says nothing of the kernels.
REFUSALS = ("Device not supported", "Target application terminated before first instrumented", "not supported on")


def run(bench: Bench, found: Findings, time: Deadline) -> None:
    """Run the cases as they are, then under each tool."""
    finished = processes.run([*CASES, "--quick"] if bench.device.dry else CASES, time.left())
    found.row("small cases", tool="none", calls=_calls(finished.output), status=_ended(finished))
    if finished.status is None:
        found.skipped.append(f"small cases: stopped at the time limit after {_calls(finished.output)} calls")
        return
    if finished.status != 0:
        found.failures.append({"case": "small cases", "error": _ended(finished), "traceback": finished.tail})
        return
    tool = None if bench.device.dry else find()
    if tool is None:
        found.skipped.append("compute-sanitizer: " + ("no GPU in a dry run" if bench.device.dry else "not found"))
        return
    for check, seconds, cases in (("memcheck", 15.0, CASES), ("racecheck", 15.0, [*CASES, "--quick"])):
        if found.in_time(check, time, seconds):
            _under(found, tool, check, cases, time)


def find() -> str | None:
    """Return the tool from the path, the CUDA toolkit, or NVIDIA's Python packages."""
    return shutil.which(NAME) or next((str(path) for path in _candidates() if path.is_file()), None)


def _candidates() -> Iterator[Path]:
    for root in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), torch.utils.cpp_extension.CUDA_HOME):
        if root:
            yield Path(root) / "bin" / NAME
            yield Path(root) / "compute-sanitizer" / NAME
    for package in metadata.distributions():
        if (package.name or "").startswith("nvidia-"):
            yield from (Path(str(file.locate())) for file in package.files or () if file.name == NAME)


def _under(found: Findings, tool: str, check: str, cases: list[str], time: Deadline) -> None:
    command = [tool, "--tool", check, "--error-exitcode", "9", "--print-limit", "20", *cases]
    finished = processes.run(command, time.left(), ALONE)
    errors = re.search(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", finished.output)
    count = int(errors[1] or errors[2]) if errors else None
    found.row("small cases", tool=check, calls=_calls(finished.output), errors=count, status=_ended(finished))
    if any(refusal in finished.output for refusal in REFUSALS):
        found.skipped.append(f"{check}: the tool cannot work on this machine: {finished.tail[-300:]}")
    elif finished.status is None:
        found.skipped.append(f"{check}: stopped at its time limit after {_calls(finished.output)} calls")
    elif finished.status != 0 or count != 0:
        found.failures.append({"case": check, "error": f"{count} errors", "traceback": finished.tail})


def _calls(output: str) -> int:
    return len(re.findall(r"^called ", output, re.MULTILINE))


def _ended(finished: processes.Finished) -> str:
    return "stopped at its time limit" if finished.status is None else f"exit status {finished.status}"
