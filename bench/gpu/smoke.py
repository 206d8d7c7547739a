"""The first look: each op's kernels on small problems, in a process of its own; and the same under compute-sanitizer.

Single, batched and grouped calls, at sizes that fill no tile, held to the torch form. ``python -m bench.gpu.smoke``
makes the calls without a record, for compute-sanitizer; ``--quick`` makes fewer.
"""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from itertools import product
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from bench.benches.problems import require
from bench.gpu.cases import Case, Size, allowed, error_of, fresh, operands, results
from bench.gpu.device import Device, Gpu, Stub, tensors_in
from bench.gpu.frame import Findings, command
from brandla_kernels import OPS

# The second is wider than the kernels that keep a Gram matrix in registers allow.
SIZES = (Size(37, 5, 3, 41, 2), Size(150, 70, 67, 41, 2))
DTYPES = (torch.float32, torch.float64)
COMPILATION = 30.0
NAME = "compute-sanitizer"
CALLS = [sys.executable, "-m", "bench.gpu.smoke"]
# Each tensor in an allocation of its own: in a block of torch's allocator an access past its end meets another tensor.
ALONE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
# Where the tool itself cannot work, which says nothing of the kernels.
REFUSALS = ("Device not supported", "Target application terminated before first instrumented", "not supported on")


def run(found: Findings) -> None:
    for name in OPS:
        found.attempt(name, COMPILATION, _try, found, name)


def _try(found: Findings, name: str) -> None:
    start, most, count, op = monotonic(), 0.0, 0, OPS[name]
    for words, case, arguments in calls(name, found.device, quick=found.device.dry):
        form = op.grouped_form if isinstance(arguments[0], list) else op.torch_form
        own, torchs = (tensors_in(results(case, call, fresh(arguments))) for call in (op, form))
        used = error_of(own, torchs) / allowed(case)
        found.device.synchronize()
        # The limit is that of float64, from which the torch form may be as far.
        require(used <= 2, f"{words}: {used:.2g} times the error allowed")
        most, count = max(most, used), count + 1
    found.row("smoke", op=name, calls=count, **{"of the error allowed": most / 2, "s": monotonic() - start})


def calls(name: str, device: Device, *, quick: bool) -> Iterator[tuple[str, Case, tuple[Any, ...]]]:
    """Yield calls of an op: their words, the case, and arguments for one problem, a batch and a list."""
    signature = OPS[name].signature
    positions = {operand.position for operand in signature.operands}
    for size, dtype in product(SIZES, DTYPES) if not quick else [(SIZES[0], DTYPES[0])]:
        case = Case(name, size, dtype, dtype)
        single, words = operands(case, device), f"{name}, n {size.n}, r {size.r}, k {size.k}, {dtype}"
        yield words, case, single
        if signature.lists:
            twice = (torch.stack([part, part]) if place in positions else part for place, part in enumerate(single))
            yield f"{words}, batched", case, tuple(twice)
            smaller = size._replace(n=size.n - 7, r=max(size.r - 2, 1), k=max(size.k - 1, 1), width=size.width - 8)
            other = operands(case._replace(size=smaller), device)
            yield f"{words}, grouped", case, grouped(name, [single, other])


def grouped(name: str, problems: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Return the arguments of the grouped op: lists, and small matrices stacked and padded with zeros."""
    arguments = list(problems[0])
    for operand in OPS[name].signature.operands:
        own = [problem[operand.position] for problem in problems]
        most = [max(sizes) for sizes in zip(*(part.shape for part in own), strict=True)]
        stack = own[0].new_zeros(len(own), *most)
        for index, part in enumerate(own):
            stack[index][tuple(map(slice, part.shape))] = part
        arguments[operand.position] = own if operand.listed else stack
    return tuple(arguments)


# --- compute-sanitizer: no access out of bounds, no race in shared memory


def sanitize(found: Findings) -> None:
    """Make the calls as they are, then under each tool."""
    if found.device.dry:
        return found.attempt("as they are", 0, _under, found, [], [*CALLS, "--quick"])
    found.attempt("as they are", 15, _under, found, [], CALLS)
    # The CUDA toolkit has it, or NVIDIA's Python packages.
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [Path(root, part, NAME) for root in roots if root for part in ("bin", "compute-sanitizer")]
    packages = [package for package in metadata.distributions() if (package.name or "").startswith("nvidia-")]
    places += [Path(str(file.locate())) for one in packages for file in one.files or () if file.name == NAME]
    tool = shutil.which(NAME) or next((str(path) for path in places if path.is_file()), None)
    if tool is None:
        return found.add("skipped", f"{NAME}: not found")
    for check, words in (("memcheck", CALLS), ("racecheck", [*CALLS, "--quick"])):
        under = [tool, "--tool", check, "--error-exitcode", "9", "--print-limit", "20"]
        found.attempt(check, 15, _under, found, under, words)
    return None


def _under(found: Findings, tool: list[str], words: list[str]) -> None:
    finished = command([*tool, *words], found.left() if not found.device.dry else 60, ALONE if tool else None)
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", finished.output)
    errors = int(summary[1]) if summary else None
    made = len(re.findall(r"^called ", finished.output, re.MULTILINE))
    check = tool[2] if tool else "none"
    found.row("small calls", tool=check, calls=made, errors=errors, status=finished.words)
    if any(refusal in finished.output for refusal in REFUSALS):
        found.add("skipped", f"{check}: the tool cannot work on this machine: {finished.output[-300:]}")
    elif finished.status is None:
        found.add("skipped", f"{check}: stopped at its time limit after {made} calls")
    elif finished.status != 0 or (tool and errors != 0):
        found.fail(check, f"{errors} errors, {finished.words}", finished.output[-4000:])


if __name__ == "__main__":
    _device, _quick = Gpu() if torch.cuda.is_available() else Stub(), "--quick" in sys.argv
    _all = [(words, OPS[one], arguments) for one in OPS for words, _, arguments in calls(one, _device, quick=_quick)]
    # All kernels together, so that the calls find them.
    _device.precompile([made for _, op, given in _all if op.launch for made in _device.recorded(op.launch, *given)])
    for words, op, given in _all:
        op(*given)
        _device.synchronize()
        print(f"called {words}", flush=True)
