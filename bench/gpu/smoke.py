"""The first look: each op's kernels on small problems, in a process of its own.

Single, batched and grouped calls, at sizes that fill no tile, held to the torch form. ``python -m bench.gpu.smoke``
makes the calls without a record, for compute-sanitizer; ``--quick`` makes fewer.
"""

import sys
from collections.abc import Iterator
from itertools import product
from time import monotonic
from typing import Any

import torch

from bench.benches.problems import require
from bench.gpu.cases import Case, allowed, error_of, fresh, grouped, operands, results
from bench.gpu.device import Device, Gpu, Stub, tensors_in
from bench.gpu.frame import Findings
from brandla_kernels import OPS

# n, r and k, the width, and a number of small matrices. The second has ranks above those of the kernels that keep a
# Gram matrix in registers.
SIZES = ((37, 5, 3, 41, 2), (150, 70, 67, 41, 2))
COMPILATION = 30.0


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
    for size, dtype in list(product(SIZES, (torch.float32, torch.float64)))[: 1 if quick else None]:
        case = Case(name, *size, dtype, dtype)
        single, words = operands(case, device), f"{name}, n {case.n}, r {case.r}, k {case.k}, {dtype}"
        yield words, case, single
        if signature.lists:
            twice = (torch.stack([part, part]) if place in positions else part for place, part in enumerate(single))
            yield f"{words}, batched", case, tuple(twice)
            smaller = case._replace(n=case.n - 7, r=case.r - 2, k=case.k - 1, width=case.width - 8)
            yield f"{words}, grouped", case, grouped(name, [single, operands(smaller, device)])


if __name__ == "__main__":
    _device, _quick = Gpu() if torch.cuda.is_available() else Stub(), "--quick" in sys.argv
    _all = [(words, OPS[one], arguments) for one in OPS for words, _, arguments in calls(one, _device, quick=_quick)]
    # All kernels together, so that the calls find them.
    _device.precompile([made for _, op, given in _all if op.launch for made in _device.recorded(op.launch, *given)])
    for words, op, given in _all:
        op(*given)
        _device.synchronize()
        print(f"called {words}", flush=True)
