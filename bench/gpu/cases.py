"""Calls of ops and updates at a size: operands, cost, and the check against float64 that comes before any timing."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import brandla
from bench.benches.problems import DECAY, WEIGHT, require
from bench.gpu.device import MOST_SETS, Device, Work, size_of, tensors_in
from brandla_kernels import OPS, Cost
from brandla_kernels._grouped import _padded

# The largest error of an op in units of √L ε, for sums of up to L terms. One TF32 product, at 3e-4, exceeds it up to
# L = 4·10⁵.
ROUNDINGS = 4
THRESHOLD = 1e-10
# Ops on small matrices only, which come in batches of ``cores``.
SMALL = ("cholesky_inverse_core", "root_core", "eigh_core", "eigh_rotation")


@dataclass(frozen=True)
class Sizes:
    """The sizes of the ops in a run, the most important first: the last ones are left out when time runs out."""

    copy: int = 2**31  # bytes of the ceiling of copies
    product: int = 8192  # order of the square products that give the other ceilings
    rows: tuple[int, ...] = (16384, 65536, 4096)  # n
    ranks: tuple[int, ...] = (256, 128, 64)  # r = k
    uneven: tuple[tuple[int, int, int], ...] = ((16384, 256, 64), (4096, 128, 64), (16384, 64, 256))  # n, r, k
    other_dtypes: tuple[int, int] = (16384, 256)  # n and r = k in other dtypes
    most_square: int = 16384  # n above which an n × n matrix is left out
    width: int = 4096  # most columns of a wide matrix, such as W of kron_damped_apply
    cores: int = 32  # matrices in a batch of small ones
    seconds: float = 0.15  # spent on one timing


FULL = Sizes()
TOY = Sizes(2**16, 32, (48,), (8,), ((48, 8, 5),), (48, 8), most_square=48, width=16, cores=3, seconds=0.0)


class Case(NamedTuple):
    """An op at a size: n rows, rank r, k columns, in a dtype; its data columns may have another.

    A matrix that is neither tall nor small has at most ``width`` columns. Small matrices come in batches of ``cores``.
    """

    op: str
    n: int = 16384
    r: int = 256
    k: int = 256
    width: int = 4096
    cores: int = 32
    dtype: torch.dtype = torch.float32
    data: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        if self.op in SMALL:
            order = self.k + (0 if self.op == "cholesky_inverse_core" else self.r)
            return f"{self.cores} cores of order {order}" + ("" if self.r == self.k else f", r {self.r}")
        dtype, data = (str(kind).removeprefix("torch.") for kind in (self.dtype, self.data))
        kinds = dtype if dtype == data else f"{dtype}, {data} columns"
        ranks = f"r = k {self.r}" if self.r == self.k else f"r {self.r}, k {self.k}"
        return f"n {self.n}, {ranks}, {kinds}"

    @property
    def wide(self) -> int:
        """The columns of a matrix that is neither tall nor small."""
        return min(self.n, self.width)


def cases(sizes: Sizes) -> list[Case]:
    """Return all cases, those with r ≠ k and in other dtypes last."""
    size = {"width": sizes.width, "cores": sizes.cores}
    listed = [
        Case(name, n, r, k, **size)
        for n, r, k in (*((n, r, r) for r in sizes.ranks for n in sizes.rows), *sizes.uneven)
        for name in OPS
        # The order of a small matrix does not depend on n.
        if (n == sizes.rows[0] if name in SMALL else name != "gram_ema_" or n <= sizes.most_square)
    ]
    n, r = sizes.other_dtypes
    other, float64 = partial(Case, n=n, r=r, k=r, **size), torch.float64
    halves = [other(name, data=torch.bfloat16) for name in ("project", "cross_gram", "gram_ema_")]
    doubles = ("project", "cross_gram", "rotate", "damped_apply", "gram")
    return listed + halves + [other(name, dtype=float64, data=float64) for name in doubles]


# --- Operands. In-place ops run many times on the same tensors, so their rotations and decays keep values of order 1


def operands(case: Case, device: Device) -> tuple[Any, ...]:
    """Return new arguments of the op."""
    (_, n, r, k, _, cores, *_), wide = case, case.wide
    normal = lambda *shape: device.normal(*shape, dtype=case.dtype)
    data = lambda *shape: device.normal(*shape).to(case.data)
    # Columns of length about 1.
    basis = lambda rows, columns: normal(rows, columns) / rows**0.5
    # U, Z and β: U Z Uᵀ of a random vector is about as long as the vector.
    operator = lambda rows: (basis(rows, r), normal(r) * (rows / r) ** 0.5, normal(1)[0])
    # U, d, λ and τ: M̂ is about as large as λ.
    shift = lambda number: (number.square() + 0.5, number.square())
    inverse = lambda rows: (basis(rows, r), normal(r).square_(), *shift(normal(1)[0]))
    rotation = lambda: (basis(n, r), basis(n, k), *(normal(rows, r) / (r + k) ** 0.5 for rows in (r, k)))

    def core(*order: int) -> tuple[Any, ...]:
        """Return FᵀF, FᵀA and AᵀA in the given order, then ρ and w."""
        root, columns = normal(cores, 4 * r, r).double(), normal(cores, 4 * r, k).double()
        grams = ((root.mT @ root).to(case.dtype), root.mT @ columns, columns.mT @ columns)
        numbers = (torch.full((cores,), number, device=root.device).double() for number in (DECAY, WEIGHT))
        return *(grams[place] for place in order), *numbers

    def eigh_rotation() -> tuple[Any, ...]:
        """Return ascending levels and random vectors: an eigendecomposition would take longer than the op."""
        rows, scale, vectors = normal(cores, r + k), normal(cores), normal(cores, r + k, r + k)
        levels = (1 + rows.square()).sort(-1).values
        return levels, vectors, rows.double(), scale.double().abs(), r, 0.0, True

    table: dict[str, Callable[[], tuple[Any, ...]]] = {
        "project": lambda: (basis(n, r), data(n, k)),
        "gram": lambda: (normal(n, k),),
        "rounded_gram": lambda: (basis(n, k),),
        "cross_gram": lambda: (basis(n, r), data(n, k)),
        "rotate": rotation,
        "rotate_": rotation,
        "gram_ema_": lambda: ((square := normal(n, n)) + square.mT, data(n, k), DECAY, WEIGHT),
        "damped_apply": lambda: (*operator(n), normal(n, k)),
        "kron_damped_apply": lambda: (*operator(n), *operator(wide), normal(n, wide)),
        "damped_inverse": lambda: (*inverse(n), normal(n, k)),
        "pair_damped_inverse": lambda: (*inverse(n), *inverse(wide), normal(n, k), normal(wide, k)),
        "kron_damped_inverse": lambda: (*inverse(n), *inverse(wide), normal(n, wide)),
        "cholesky_inverse_core": lambda: (
            *((panel := normal(cores, 4 * k, k).double()).mT @ panel, panel.square().sum(-2).sqrt(), THRESHOLD),
        ),
        "root_core": lambda: (*core(0, 1, 2), r, 0.0, True),
        "eigh_core": lambda: core(1, 2, 0),
        "eigh_rotation": eigh_rotation,
        "sketch": lambda: (data(n, wide), normal(1).mul_(2**20).long(), k),
    }
    return table[case.op]()


def grouped(op: str, problems: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Return the arguments of the grouped op: lists, or small matrices stacked and padded with zeros."""
    arguments = list(problems[0])
    for operand in OPS[op].signature.operands:
        parts = [problem[operand.position] for problem in problems]
        arguments[operand.position] = parts if operand.listed else _padded(parts)
    return tuple(arguments)


def inputs(case: Case, device: Device, most: int = MOST_SETS) -> list[tuple[Any, ...]]:
    """Return enough sets of arguments to outlast the cache in turn, but at most ``most``."""
    first = operands(case, device)
    return [first, *(operands(case, device) for _ in range(min(most, device.sets(size_of(first))) - 1))]


def launches(case: Case, device: Device) -> list[Any]:
    """Return the launches that the op would start on the device; none if it has no kernel."""
    launch = OPS[case.op].launch
    return [] if launch is None else device.recorded(launch, *operands(case, device))


# --- Cost


def cost(case: Case) -> Cost:
    function, (_, n, r, k, _, cores, *_), wide = OPS[case.op].cost, case, case.wide
    sizes = {"n": n, "r": r, "k": k, "m": k, "s": r, "width": k, "p": n, "q": wide, "left_rank": r, "right_rank": r}
    sizes |= {"itemsize": case.dtype.itemsize}
    sizes |= {"eigh_rotation": {"m": r + k}, "sketch": {"m": n, "n": wide}}.get(case.op, {})
    total = function(**{name: sizes[name] for name in inspect.signature(function).parameters})
    if case.op in SMALL:
        return Cost(cores * total.flops, cores * total.bytes)
    return Cost(total.flops, total.bytes - (case.dtype.itemsize - case.data.itemsize) * n * k)


def work(case: Case) -> Work:
    """Return the least work of a call, which is compared with the ceilings."""
    (flops, moved), (_, n, r, k, *_) = cost(case), case
    # The least flops for float32 data, in float32 and in float64. A symmetric result needs one triangle only.
    least = {
        "gram": (0, n * k**2),
        "rounded_gram": (n * k**2, 0),
        "cross_gram": (n * k * (2 * r + k), 0),
        "gram_ema_": (n**2 * k, 0),
        "cholesky_inverse_core": (0, flops),
        "root_core": (0, flops),
    }
    single, double = least.get(case.op, (flops, 0))
    if case.dtype == torch.float64:
        return Work(float64=single + double, bytes=moved)
    if case.op == "gram_ema_" and case.data == torch.bfloat16:
        # Products of two half-precision numbers are exact in float32.
        return Work(bf16=single, bytes=moved)
    return Work(float32=single, float64=double, bytes=moved)


# --- Check


def results_of(call: Callable[..., Any], arguments: Sequence[Any]) -> list[Tensor]:
    """Make a call, and return the tensors that it returned or overwrote."""
    result = call(*arguments)
    return tensors_in(arguments[0] if result is None else result)


def cloned(arguments: Sequence[Any], dtype: torch.dtype | None = None) -> tuple[Any, ...]:
    """Return the arguments with their tensors copied; floating-point ones to ``dtype`` if it is given."""
    copy = lambda part: part.to(dtype if part.is_floating_point() else None, copy=True)
    return tuple(tree_map_only(Tensor, copy, list(arguments)))


def check(case: Case, device: Device, call: Callable[..., Any] | None = None) -> tuple[float, float]:
    """Return the relative errors of the op (or of a call in its place) and of its torch form; refuse a wrong result.

    The reference is the torch form on float64 copies, which the tests hold to the formulas. `root_core` gets the
    arguments themselves: its shift depends on their dtype, and it computes in float64 anyway.
    """
    op, arguments = OPS[case.op], operands(case, device)
    exact = results_of(op.torch_form, cloned(arguments, None if case.op == "root_core" else torch.float64))

    def error(call: Callable[..., Any]) -> float:
        # The second result reuses the memory of the first. It is filled with NaN, so that unwritten entries show.
        for part in results_of(call, cloned(arguments)):
            part.fill_(float("nan") if part.is_floating_point() else 0)
        del part
        return relative_error(results_of(call, cloned(arguments)), exact)

    found, of_torch, limit = error(call or op), error(op.torch_form), error_allowed(case)
    require(found <= limit, f"{case.op}, {case.name}: relative error {found:.1e}, allowed {limit:.1e}")
    return found, of_torch


def relative_error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the largest relative error over the results; infinity for NaN, and for integers that differ."""
    worst = 0.0
    for part, expected in zip(got, exact, strict=True):
        if expected.is_floating_point():
            size = torch.linalg.vector_norm(expected).clamp_min(torch.finfo(torch.float64).tiny)
            error = float(torch.linalg.vector_norm(part.double() - expected) / size)
        else:
            error = 0.0 if torch.equal(part, expected) else float("inf")
        worst = max(worst, error if error == error else float("inf"))
    return worst


def error_allowed(case: Case) -> float:
    """Return the largest error that rounding can explain."""
    in_float64 = case.dtype == torch.float64 or case.op in ("gram", "cholesky_inverse_core")
    eps = torch.finfo(torch.float64 if in_float64 else torch.float32).eps
    if case.op == "root_core":
        # Its shift is 32 ε ‖K‖, with the ε of the dtype.
        return 8 * 32 * eps
    return ROUNDINGS * (case.n + case.r + case.k) ** 0.5 * eps


# --- Torch forms, and tensors


def torch_form_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return an op or a public function that uses the torch forms of all ops."""
    return brandla.backend("torch")(function)


def eigh(device: Device, n: int, r: int, dtype: torch.dtype = torch.float32) -> brandla.LowRankEigh:
    """Return a factor with a random orthonormal basis and the spectrum 1/i."""
    values = 1 / torch.arange(1, r + 1, dtype=dtype, device=device.tensors)
    return brandla.LowRankEigh(values, torch.linalg.qr(device.normal(n, r, dtype=torch.float64)).Q.to(dtype))


def on_cpu(tree: Any) -> Any:
    """Return nested tensors on the CPU, where float64 checks run."""
    return tree_map_only(Tensor, Tensor.cpu, tree)
