"""What is to be profiled, and the calls of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

import brandla
from bench.benches.problems import DECAY, STEPS_TO_STEADY_STATE, UPDATES, WEIGHT
from bench.gpu import cases, factors
from bench.gpu.cases import SMALL
from bench.gpu.ceilings import Work
from bench.gpu.device import Device
from bench.gpu.timed import size_of
from brandla_kernels import OPS, Cost

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
FUNCTIONS = (*UPDATES, "damped_solve", "randomized_eigh")
NAMES = (*sorted(OPS), *FUNCTIONS)
DAMPING = 0.03
HALF = ("bfloat16", "float16")
# Calls of a measurement at least, so that their mean says something.
FEWEST = 10


@dataclass(frozen=True)
class Request:
    """An op of `brandla_kernels` or a public function, and its sizes.

    n rows, rank r, k columns, m columns of what is neither tall nor small (W, the matrix of a sketch), and the number
    of ``cores`` of cholesky_inverse_core or root_core. A half-precision ``dtype`` is that of the data columns beside
    float32.
    """

    op: str
    n: int = 16384
    r: int = 256
    k: int = 256
    m: int = 4096
    dtype: str = "float32"
    cores: int = 32

    def check(self) -> None:
        """Refuse what cannot be profiled."""
        if self.op not in NAMES:
            _refuse(f"OP must be one of {', '.join(NAMES)}; got {self.op!r}")
        if self.dtype not in DTYPES:
            _refuse(f"DTYPE must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        for name in ("n", "r", "k", "m", "cores"):
            if getattr(self, name) < 1:
                _refuse(f"{name.upper()} must be at least 1; got {getattr(self, name)}")
        if self.r > self.n:
            _refuse(f"R must be at most N = {self.n}, as a basis has orthonormal columns; got {self.r}")
        if self.op in FUNCTIONS and self.r + self.k > self.n:
            _refuse(f"R + K must be at most N = {self.n} for {self.op}; got {self.r + self.k}")
        if self.op in FUNCTIONS and (self.dtype == "float64" or (self.dtype in HALF and self.op not in UPDATES)):
            _refuse(f"DTYPE {self.dtype} is not set up for {self.op}; use float32")
        if self.op in OPS and self.dtype in HALF and not _takes_data(self.op):
            _refuse(f"DTYPE {self.dtype} is that of data columns, and {self.op} takes none; use float32 or float64")

    @property
    def case(self) -> cases.Case:
        """The op as `make gpu` has it."""
        data = DTYPES[self.dtype]
        own = torch.float32 if self.dtype in HALF else data
        return cases.Case(self.op, cases.Size(self.n, self.r, self.k, self.m, self.cores), own, data)

    @property
    def words(self) -> str:
        """The request in words."""
        if self.op in SMALL:
            return f"{self.op}: {self.cores} cores, r {self.r}, k {self.k}, {self.dtype}"
        return f"{self.op}: n {self.n}, r {self.r}, k {self.k}, m {min(self.n, self.m)}, {self.dtype}"

    @property
    def arguments(self) -> list[str]:
        """The command line that asks for the same."""
        names = ("op", "n", "r", "k", "m", "dtype", "cores")
        return [part for name in names for part in (f"--{name}", str(getattr(self, name)))]


class Profiled(NamedTuple):
    """Calls on different tensors, so that none finds its own in the cache; the op's own work, if it is an op."""

    calls: list[Callable[[], Any]]
    bits: int  # of the numbers that are multiplied
    cost: Cost | None = None
    work: Work | None = None


def prepare(request: Request, device: Device) -> Profiled:
    """Return the calls of a request."""
    if request.op in FUNCTIONS:
        call = _function(request, device)
        return Profiled([call] * FEWEST, 32)
    case = request.case
    first = cases.operands(case, device)
    sets = device.sets(size_of(first))
    inputs = [first, *(cases.operands(case, device) for _ in range(sets - 1))]
    op = OPS[request.op]
    rounds = -(-FEWEST // len(inputs))
    calls = [lambda arguments=arguments: op(*arguments) for arguments in inputs] * rounds
    return Profiled(calls, 8 * case.dtype.itemsize, cases.cost(case), cases.work(case))


def kernels_of(request: Request, device: Device) -> list[str]:
    """Return the names of the kernels that a call of an op starts, in their order; none of a function."""
    if request.op in FUNCTIONS or OPS[request.op].launch is None:
        return []
    launches = device.recorded(OPS[request.op].launch, *cases.operands(request.case, device))
    return list(dict.fromkeys(launch.name for launch in launches))


def _function(request: Request, device: Device) -> Callable[[], Any]:
    n, r, k = request.n, request.r, request.k
    if request.op in UPDATES:
        update = UPDATES[request.op][0]
        factor, columns = factors.steady(request.op, n, r, k, STEPS_TO_STEADY_STATE, device.tensors)
        data = columns.to(DTYPES[request.dtype])
        return lambda: update(factor, data, decay=DECAY, weight=WEIGHT)
    if request.op == "damped_solve":
        eigh, rhs = factors.eigh(device, n, r), device.normal(n, k)
        return lambda: brandla.damped_solve(eigh, rhs, DAMPING)
    half = device.normal(n, r + k)
    matrix = half @ half.mT
    return lambda: brandla.randomized_eigh(matrix, r)


def _takes_data(op: str) -> bool:
    return any(operand.kind == "Data" for operand in OPS[op].signature.operands)


def _refuse(rule: str) -> None:
    raise ValueError(rule)
