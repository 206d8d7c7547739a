"""A call of each op: operands of a size, the cost, and the check against float64 that comes before any timing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.benches.problems import DECAY, WEIGHT, require
from bench.gpu.ceilings import Work
from bench.gpu.device import Device
from bench.gpu.sizes import Sizes
from brandla_kernels import OPS, Cost

# What an op must not exceed, in units of √L ε for sums of up to L terms. One TF32 product, at 3e-4, is above it up to
# L = 4·10⁵.
ROUNDINGS = 4
THRESHOLD = 1e-10
# Ops on small matrices alone, which are taken in batches of ``cores``.
SMALL = ("cholesky_inverse_core", "root_core")


class Size(NamedTuple):
    """Sizes of a call: n rows, rank r, k columns, and the widths of what is not tall."""

    n: int
    r: int
    k: int
    width: int
    cores: int

    @property
    def wide(self) -> int:
        """Columns of a matrix that is neither tall nor small."""
        return min(self.n, self.width)


class Case(NamedTuple):
    """An op at a size, in a dtype, with data columns perhaps in another."""

    op: str
    size: Size
    dtype: torch.dtype
    data: torch.dtype

    @property
    def name(self) -> str:
        """The case in words."""
        own = str(self.dtype).removeprefix("torch.")
        columns = str(self.data).removeprefix("torch.")
        kinds = own if own == columns else f"{own}, {columns} columns"
        if self.op in SMALL:
            order = self.size.k + (self.size.r if self.op == "root_core" else 0)
            return f"{self.size.cores} cores of order {order}"
        return f"n {self.size.n}, r = k {self.size.r}, {kinds}"


Normal = Callable[..., Tensor]


def _core_operands(normal: Normal, data: Normal, size: Size) -> tuple[Any, ...]:
    panel = normal(size.cores, 4 * size.k, size.k).double()
    return panel.mT @ panel, panel.square().sum(-2).sqrt(), THRESHOLD


def _root_core_operands(normal: Normal, data: Normal, size: Size) -> tuple[Any, ...]:
    root, columns = normal(size.cores, 4 * size.r, size.r), normal(size.cores, 4 * size.r, size.k).double()
    wide = root.double()
    decay, weight = (torch.full((size.cores,), number, device=root.device).double() for number in (DECAY, WEIGHT))
    return (wide.mT @ wide).to(root.dtype), wide.mT @ columns, columns.mT @ columns, decay, weight, size.r, 0.0, True


def _rotate_operands(normal: Normal, data: Normal, size: Size) -> tuple[Any, ...]:
    n, r, k = size.n, size.r, size.k
    rotations = (normal(rows, r) / (r + k) ** 0.5 for rows in (r, k))
    return _basis(normal, n, r), _basis(normal, n, k), *rotations


def _kron_operands(normal: Normal, data: Normal, size: Size) -> tuple[Any, ...]:
    return *_operator(normal, size.n, size.r), *_operator(normal, size.wide, size.r), normal(size.n, size.wide)


def _operator(normal: Normal, n: int, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, H and β, where U H Uᵀ changes a random vector as much as β does."""
    return _basis(normal, n, r), normal(r) * (n / r) ** 0.5, normal(1)[0]


def _basis(normal: Normal, n: int, r: int) -> Tensor:
    """Return columns of length about 1."""
    return normal(n, r) / n**0.5


def _symmetric(square: Tensor) -> Tensor:
    return square + square.mT


# In-place ops are timed many times on the same tensors: their rotations and decays keep the values of order 1.
OPERANDS: dict[str, Callable[[Normal, Normal, Size], tuple[Any, ...]]] = {
    "project": lambda normal, data, s: (_basis(normal, s.n, s.r), data(s.n, s.k)),
    "gram": lambda normal, data, s: (normal(s.n, s.k),),
    "rounded_gram": lambda normal, data, s: (_basis(normal, s.n, s.k),),
    "cross_gram": lambda normal, data, s: (_basis(normal, s.n, s.r), data(s.n, s.k)),
    "rotate": _rotate_operands,
    "rotate_": _rotate_operands,
    "gram_ema_": lambda normal, data, s: (_symmetric(normal(s.n, s.n)), data(s.n, s.k), DECAY, WEIGHT),
    "damped_apply": lambda normal, data, s: (*_operator(normal, s.n, s.r), normal(s.n, s.k)),
    "kron_damped_apply": _kron_operands,
    "cholesky_inverse_core": _core_operands,
    "root_core": _root_core_operands,
    "sketch": lambda normal, data, s: (data(s.n, s.wide), normal(1).mul_(2**20).long(), s.k),
}
# Arguments of an op's ``cost``, where they are not n, r and k.
COSTS: dict[str, Callable[[Size], dict[str, int]]] = {
    "rotate": lambda s: {"s": s.r},
    "rotate_": lambda s: {"s": s.r},
    "root_core": lambda s: {"s": s.r},
    "damped_apply": lambda s: {"m": s.k},
    "kron_damped_apply": lambda s: {"p": s.n, "q": s.wide, "left_rank": s.r, "right_rank": s.r},
    "sketch": lambda s: {"m": s.n, "n": s.wide, "width": s.k},
}
ALL_FLOAT64 = ("gram", "cholesky_inverse_core")
# Flops that float32 data cannot do without, in float32 and in float64. A symmetric result needs one triangle only.
NEEDED: dict[str, Callable[[Size], tuple[int, int]]] = {
    "gram": lambda s: (0, s.n * s.k**2),
    "rounded_gram": lambda s: (s.n * s.k**2, 0),
    "cross_gram": lambda s: (s.n * s.k * (2 * s.r + s.k), 0),
    "gram_ema_": lambda s: (s.n**2 * s.k, 0),
    "cholesky_inverse_core": lambda s: (0, s.cores * OPS["cholesky_inverse_core"].cost(s.k).flops),
    "root_core": lambda s: (0, s.cores * OPS["root_core"].cost(s.r, s.k, s.r).flops),
}


def cases(sizes: Sizes) -> list[Case]:
    """Return all cases, the ones that targets are set for first; an op that this file does not know has none."""
    known = [name for name in OPS if name in OPERANDS]
    float32, float64, bf16 = torch.float32, torch.float64, torch.bfloat16
    listed = [
        Case(name, _size(sizes, n, r), float32, float32)
        for r in sizes.ranks
        for n in sizes.rows
        for name in known
        if _fits(name, n, sizes)
    ]
    other = _size(sizes, *sizes.other_dtypes)
    halves = [Case(name, other, float32, bf16) for name in ("project", "cross_gram", "gram_ema_") if name in known]
    doubles = [
        Case(name, other, float64, float64) for name in ("project", "cross_gram", "rotate", "damped_apply", "gram")
    ]
    return listed + halves + doubles


def _fits(name: str, n: int, sizes: Sizes) -> bool:
    if name in SMALL:
        # Its size has no n.
        return n == sizes.rows[0]
    return name != "gram_ema_" or n <= sizes.most_square


def _size(sizes: Sizes, n: int, r: int) -> Size:
    return Size(n, r, r, sizes.width, sizes.cores)


def unknown() -> list[str]:
    """Return the ops that have no operands here, so that they are named and not left out silently."""
    return [name for name in OPS if name not in OPERANDS]


def operands(case: Case, device: Device) -> tuple[Any, ...]:
    """Return fresh arguments of the op."""
    return OPERANDS[case.op](
        lambda *shape: device.normal(*shape, dtype=case.dtype),
        lambda *shape: device.normal(*shape).to(case.data),
        case.size,
    )


def cost(case: Case) -> Cost:
    """Return the work of a call, by the op's own count."""
    function, size = OPS[case.op].cost, case.size
    known = {"n": size.n, "r": size.r, "k": size.k, "itemsize": case.dtype.itemsize}
    known |= COSTS.get(case.op, lambda size: {})(size)
    total = function(**{name: known[name] for name in inspect.signature(function).parameters})
    if case.op in SMALL:
        return Cost(size.cores * total.flops, size.cores * total.bytes)
    return Cost(total.flops, total.bytes - (case.dtype.itemsize - case.data.itemsize) * size.n * size.k)


def work(case: Case) -> Work:
    """Return the least work of a call: what the ceilings are compared with."""
    flops, moved = cost(case)
    single, double = NEEDED.get(case.op, lambda size: (flops, 0))(case.size)
    if case.dtype == torch.float64:
        return Work(float64=single + double, bytes=moved)
    if case.op == "gram_ema_" and case.data == torch.bfloat16:
        # Products of two half-precision numbers are exact in float32.
        return Work(bf16=single, bytes=moved)
    return Work(float32=single, float64=double, bytes=moved)


def results(case: Case, call: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Tensor, ...]:
    """Call, and return what was returned or overwritten."""
    result = call(*arguments)
    if result is None:
        return (arguments[0],)
    return result if isinstance(result, tuple) else (result,)


def fresh(arguments: Sequence[Any], dtype: torch.dtype | None = None) -> tuple[Any, ...]:
    """Return copies of the tensors among the arguments, in another dtype if one is named."""
    return tuple(
        part.to(dtype if part.is_floating_point() else None, copy=True) if isinstance(part, Tensor) else part
        for part in arguments
    )


def errors(case: Case, device: Device) -> tuple[float, float]:
    """Return the relative errors of the op and of its torch form, the largest over the results.

    The reference is the torch form on float64 copies, which the tests hold to the formulas; of `root_core`, whose
    shift is that of its dtype and which computes in float64 anyway, on the arguments themselves.
    """
    op = OPS[case.op]
    arguments = operands(case, device)
    exact = results(case, op.torch_form, fresh(arguments, None if case.op == "root_core" else torch.float64))
    own, peer = (_poisoned(case, call, fresh(arguments)) for call in (op, op.torch_form))
    return _error(own, exact), _error(peer, exact)


def _poisoned(case: Case, call: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Call twice: the second result takes the memory of the first, filled with NaN where it was not written."""
    spoiled = fresh(arguments)
    for part in results(case, call, spoiled):
        part.fill_(float("nan") if part.is_floating_point() else 0)
    del spoiled, part
    return results(case, call, arguments)


def _error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    return max(_relative_error(one, other) for one, other in zip(got, exact, strict=True))


def _relative_error(got: Tensor, expected: Tensor) -> float:
    if not expected.is_floating_point():
        return 0.0 if torch.equal(got, expected) else float("inf")
    difference = torch.linalg.vector_norm(got.double() - expected)
    error = float(difference / torch.linalg.vector_norm(expected).clamp_min(torch.finfo(torch.float64).tiny))
    return error if error == error else float("inf")


def allowed(case: Case) -> float:
    """Return the largest error that rounding explains."""
    terms = case.size.n + case.size.r + case.size.k
    wide = case.dtype == torch.float64 or case.op in ALL_FLOAT64
    if case.op == "root_core":
        # Its shift, 32 ε of the dtype times ‖K‖, is another one in float64.
        return 8 * 32 * torch.finfo(torch.float64 if wide else torch.float32).eps
    return ROUNDINGS * terms**0.5 * torch.finfo(torch.float64 if wide else torch.float32).eps


def check(case: Case, device: Device) -> tuple[float, float]:
    """Return both errors; refuse a wrong result."""
    error, peer = errors(case, device)
    limit = allowed(case)
    require(error <= limit, f"{case.op}, {case.name}: relative error {error:.1e}, allowed {limit:.1e}")
    return error, peer


def grouped(op: str, problems: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Return the arguments of the grouped op: lists, and small matrices stacked and padded with zeros."""
    signature = OPS[op].signature
    arguments = list(problems[0])
    for operand in signature.operands:
        own = [problem[operand.position] for problem in problems]
        arguments[operand.position] = own if operand.listed else _stack(own)
    return arguments


def _stack(parts: Sequence[Tensor]) -> Tensor:
    most = [max(part.shape[dim] for part in parts) for dim in range(parts[0].ndim)]
    stack = parts[0].new_zeros(len(parts), *most)
    for index, part in enumerate(parts):
        stack[index][tuple(slice(size) for size in part.shape)] = part
    return stack
