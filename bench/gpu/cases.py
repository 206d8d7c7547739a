"""Calls of ops and updates at a size: operands, cost, and the check against float64 that comes before any timing."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import brandla
from bench.benches.problems import DECAY, WEIGHT, require
from bench.gpu.device import Device, Work, size_of
from brandla_kernels import OPS, Cost

# What an op must not exceed, in units of √L ε for sums of up to L terms. One TF32 product, at 3e-4, is above it up to
# L = 4·10⁵.
ROUNDINGS = 4
THRESHOLD = 1e-10
# Ops on small matrices alone, which are taken in batches of ``cores``.
SMALL = ("cholesky_inverse_core", "root_core", "eigh_core", "eigh_rotation")


@dataclass(frozen=True)
class Sizes:
    """What a run measures of the ops, in order of importance: what comes late is left out when time runs out."""

    copy: int  # bytes of the ceiling of copies
    product: int  # order of the square products that give the other ceilings
    rows: tuple[int, ...]  # n
    ranks: tuple[int, ...]  # r = k
    uneven: tuple[tuple[int, int, int], ...]  # n, r, k
    other_dtypes: tuple[int, int]  # n and r = k in other dtypes
    most_square: int  # n above which an n × n matrix is left out
    width: int  # most columns of the W of kron_damped_apply
    cores: int  # matrices in a batch of an op on small ones
    seconds: float  # time spent on one timing


FULL = Sizes(
    copy=2**31,
    product=8192,
    rows=(16384, 65536, 4096),
    ranks=(256, 128, 64),
    uneven=((16384, 256, 64), (4096, 128, 64), (16384, 64, 256)),
    other_dtypes=(16384, 256),
    most_square=16384,
    width=4096,
    cores=32,
    seconds=0.15,
)
TOY = Sizes(
    copy=2**16,
    product=32,
    rows=(48,),
    ranks=(8,),
    uneven=((48, 8, 5),),
    other_dtypes=(48, 8),
    most_square=48,
    width=16,
    cores=3,
    seconds=0.0,
)


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
    dtype: torch.dtype = torch.float32
    data: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        own, columns = (str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.data))
        kinds = own if own == columns else f"{own}, {columns} columns"
        n, r, k, _, cores = self.size
        if self.op in SMALL:
            return f"{cores} cores of order {order_of(self)}"
        return f"n {n}, " + (f"r = k {r}" if r == k else f"r {r}, k {k}") + f", {kinds}"


def order_of(case: Case) -> int:
    """Return the order of the small matrices of a case."""
    return case.size.k + (0 if case.op == "cholesky_inverse_core" else case.size.r)


def cases(sizes: Sizes) -> list[Case]:
    """Return all cases, those with r ≠ k and in other dtypes last."""
    listed = [
        Case(name, Size(n, r, k, sizes.width, sizes.cores))
        for n, r, k in (*((n, r, r) for r in sizes.ranks for n in sizes.rows), *sizes.uneven)
        for name in OPS
        # The size of a small matrix has no n; a Gram matrix has no r.
        if (n == sizes.rows[0] if name in SMALL else name != "gram_ema_" or n <= sizes.most_square)
    ]
    n, r = sizes.other_dtypes
    other, float64 = Size(n, r, r, sizes.width, sizes.cores), torch.float64
    halves = [Case(name, other, data=torch.bfloat16) for name in ("project", "cross_gram", "gram_ema_")]
    doubles = ("project", "cross_gram", "rotate", "damped_apply", "gram")
    return listed + halves + [Case(name, other, float64, float64) for name in doubles]


# --- Operands. In-place ops are timed many times on the same tensors: their rotations and decays keep values of order 1

Normal = Callable[..., Tensor]


def _core(normal: Normal, data: Normal, size: Size) -> tuple[Any, ...]:
    panel = normal(size.cores, 4 * size.k, size.k).double()
    return panel.mT @ panel, panel.square().sum(-2).sqrt(), THRESHOLD


def _root_core(normal: Normal, data: Normal, size: Size) -> tuple[Any, ...]:
    root, columns = normal(size.cores, 4 * size.r, size.r), normal(size.cores, 4 * size.r, size.k).double()
    wide = root.double()
    decay, weight = (torch.full((size.cores,), number, device=root.device).double() for number in (DECAY, WEIGHT))
    return (wide.mT @ wide).to(root.dtype), wide.mT @ columns, columns.mT @ columns, decay, weight, size.r, 0.0, True


def _eigh_core(normal: Normal, data: Normal, size: Size) -> tuple[Any, ...]:
    gram, cross, own, *numbers = _root_core(normal, data, size)[:5]
    return cross, own, gram, *numbers


def _eigh_rotation(normal: Normal, data: Normal, size: Size) -> tuple[Any, ...]:
    """Return ascending levels and any vectors: an eigendecomposition would take longer than the op."""
    m = size.r + size.k
    rows, scale, vectors = normal(size.cores, m), normal(size.cores), normal(size.cores, m, m)
    levels = (1 + rows.square()).sort(-1).values
    return levels, vectors, rows.double(), scale.double().abs(), size.r, 0.0, True


def _rotate(normal: Normal, data: Normal, size: Size) -> tuple[Any, ...]:
    n, r, k = size.n, size.r, size.k
    return _basis(normal, n, r), _basis(normal, n, k), *(normal(rows, r) / (r + k) ** 0.5 for rows in (r, k))


def _gram_ema(normal: Normal, data: Normal, size: Size) -> tuple[Any, ...]:
    square = normal(size.n, size.n)
    return square + square.mT, data(size.n, size.k), DECAY, WEIGHT


def _operator(normal: Normal, n: int, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, Z and β, where U Z Uᵀ changes a random vector as much as it is long."""
    return _basis(normal, n, r), normal(r) * (n / r) ** 0.5, normal(1)[0]


def _inverse(normal: Normal, n: int, r: int) -> tuple[Tensor, ...]:
    """Return U, d, λ and τ, where M̂ is about as large as λ."""
    basis, _, number = _operator(normal, n, r)
    return basis, normal(r).square_(), number.square() + 0.5, number.square()


def _basis(normal: Normal, n: int, r: int) -> Tensor:
    """Return columns of length about 1."""
    return normal(n, r) / n**0.5


OPERANDS: dict[str, Callable[[Normal, Normal, Size], tuple[Any, ...]]] = {
    "project": lambda normal, data, s: (_basis(normal, s.n, s.r), data(s.n, s.k)),
    "gram": lambda normal, data, s: (normal(s.n, s.k),),
    "rounded_gram": lambda normal, data, s: (_basis(normal, s.n, s.k),),
    "cross_gram": lambda normal, data, s: (_basis(normal, s.n, s.r), data(s.n, s.k)),
    "rotate": _rotate,
    "rotate_": _rotate,
    "gram_ema_": _gram_ema,
    "damped_apply": lambda normal, data, s: (*_operator(normal, s.n, s.r), normal(s.n, s.k)),
    "kron_damped_apply": lambda normal, data, s: (
        *_operator(normal, s.n, s.r), *_operator(normal, s.wide, s.r), normal(s.n, s.wide),
    ),
    "damped_inverse": lambda normal, data, s: (*_inverse(normal, s.n, s.r), normal(s.n, s.k)),
    "pair_damped_inverse": lambda normal, data, s: (
        *_inverse(normal, s.n, s.r), *_inverse(normal, s.wide, s.r), normal(s.n, s.k), normal(s.wide, s.k),
    ),
    "kron_damped_inverse": lambda normal, data, s: (
        *_inverse(normal, s.n, s.r), *_inverse(normal, s.wide, s.r), normal(s.n, s.wide),
    ),
    "cholesky_inverse_core": _core,
    "root_core": _root_core,
    "eigh_core": _eigh_core,
    "eigh_rotation": _eigh_rotation,
    "sketch": lambda normal, data, s: (data(s.n, s.wide), normal(1).mul_(2**20).long(), s.k),
}  # fmt: skip


def operands(case: Case, device: Device) -> tuple[Any, ...]:
    normal = lambda *shape: device.normal(*shape, dtype=case.dtype)
    data = lambda *shape: device.normal(*shape).to(case.data)
    return OPERANDS[case.op](normal, data, case.size)


def inputs(case: Case, device: Device) -> list[tuple[Any, ...]]:
    """Return as many sets of arguments as outlast the cache in turn."""
    first = operands(case, device)
    return [first, *(operands(case, device) for _ in range(device.sets(size_of(first)) - 1))]


def launches(case: Case, device: Device) -> list[Any]:
    """Return what the op would start on the device: nothing where it has no kernel."""
    launch = OPS[case.op].launch
    return [] if launch is None else device.recorded(launch, *operands(case, device))


# --- Cost

# Arguments of an op's ``cost``, where they are not those of the others.
COSTS: dict[str, Callable[[Size], dict[str, int]]] = {
    "eigh_rotation": lambda s: {"m": s.r + s.k},
    "sketch": lambda s: {"m": s.n, "n": s.wide},
}
# Flops that float32 data cannot do without, in float32 and in float64. A symmetric result needs one triangle only.
NEEDED: dict[str, Callable[[Size], tuple[int, int]]] = {
    "gram": lambda s: (0, s.n * s.k**2),
    "rounded_gram": lambda s: (s.n * s.k**2, 0),
    "cross_gram": lambda s: (s.n * s.k * (2 * s.r + s.k), 0),
    "gram_ema_": lambda s: (s.n**2 * s.k, 0),
    "cholesky_inverse_core": lambda s: (0, s.cores * OPS["cholesky_inverse_core"].cost(s.k).flops),
    "root_core": lambda s: (0, s.cores * OPS["root_core"].cost(s.r, s.k, s.r).flops),
}


def cost(case: Case) -> Cost:
    function, size = OPS[case.op].cost, case.size
    known = {"n": size.n, "r": size.r, "k": size.k, "m": size.k, "s": size.r, "width": size.k}
    known |= {"p": size.n, "q": size.wide, "left_rank": size.r, "right_rank": size.r, "itemsize": case.dtype.itemsize}
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


# --- Check


def results(case: Case, call: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Tensor, ...]:
    """Call, and return what was returned or overwritten."""
    result = call(*arguments)
    if result is None:
        return (arguments[0],)
    return result if isinstance(result, tuple) else (result,)


def fresh(arguments: Sequence[Any], dtype: torch.dtype | None = None) -> tuple[Any, ...]:
    """Return copies of the tensors among the arguments, in another dtype if one is named."""
    copied = lambda part: part.to(dtype if part.is_floating_point() else None, copy=True)
    return tuple(tree_map_only(Tensor, copied, list(arguments)))


def check(case: Case, device: Device, call: Callable[..., Any] | None = None) -> tuple[float, float]:
    """Return the relative errors of the op, or another call in its place, and of its torch form; refuse a wrong result.

    The reference is the torch form on float64 copies, which the tests hold to the formulas; of `root_core`, whose
    shift is that of its dtype and which computes in float64 anyway, on the arguments themselves.
    """
    op, arguments = OPS[case.op], operands(case, device)
    exact = results(case, op.torch_form, fresh(arguments, None if case.op == "root_core" else torch.float64))

    def error(call: Callable[..., Any]) -> float:
        # The second result takes the memory of the first, filled with NaN where it was not written.
        for part in results(case, call, fresh(arguments)):
            part.fill_(float("nan") if part.is_floating_point() else 0)
        del part
        return error_of(results(case, call, fresh(arguments)), exact)

    own, peer = error(call or op), error(op.torch_form)
    limit = allowed(case)
    require(own <= limit, f"{case.op}, {case.name}: relative error {own:.1e}, allowed {limit:.1e}")
    return own, peer


def error_of(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the largest relative error over the results; infinity for NaN, and for numbers that are to be equal."""

    def one(part: Tensor, expected: Tensor) -> float:
        if not expected.is_floating_point():
            return 0.0 if torch.equal(part, expected) else float("inf")
        difference = torch.linalg.vector_norm(part.double() - expected)
        error = float(difference / torch.linalg.vector_norm(expected).clamp_min(torch.finfo(torch.float64).tiny))
        return error if error == error else float("inf")

    return max(one(*pair) for pair in zip(got, exact, strict=True))


def allowed(case: Case) -> float:
    """Return the largest error that rounding explains."""
    in_float64 = case.dtype == torch.float64 or case.op in ("gram", "cholesky_inverse_core")
    eps = torch.finfo(torch.float64 if in_float64 else torch.float32).eps
    if case.op == "root_core":
        # Its shift, 32 ε of the dtype times ‖K‖, is another one in float64.
        return 8 * 32 * eps
    return ROUNDINGS * (case.size.n + case.size.r + case.size.k) ** 0.5 * eps


# --- Other ways, and tensors


def forced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return an op or a public function with the torch forms of all ops."""

    def call(*arguments: Any) -> Any:
        with brandla.backend("torch"):
            return function(*arguments)

    return call


def eigh(device: Device, n: int, r: int, dtype: torch.dtype = torch.float32) -> brandla.LowRankEigh:
    """Return a factor with a random orthonormal basis and the spectrum 1/i."""
    values = 1 / torch.arange(1, r + 1, dtype=dtype, device=device.tensors)
    return brandla.LowRankEigh(values, torch.linalg.qr(device.normal(n, r, dtype=torch.float64)).Q.to(dtype))


def on_cpu(tree: Any) -> Any:
    """Return nested tensors on the CPU, where the float64 checks run."""
    return tree_map_only(Tensor, Tensor.cpu, tree)
