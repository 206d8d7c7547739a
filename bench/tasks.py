"""A task for each public function: its arguments, the peers that do the same, and the float64 check of a result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from sklearn.decomposition import IncrementalPCA
from torch import Tensor

import brandla
from bench import peers
from bench.gpu import cases
from bench.gpu.device import Device, Work
from bench.peers import EXACT, OVERSAMPLE, POWERS, SKETCHED, Peer
from bench.problems import (
    DECAY,
    LOSS_ALLOWED,
    UPDATES,
    WEIGHT,
    columns_of,
    defect,
    matrix_of_spectrum,
    orthonormality,
    require,
    steady,
)
from brandla import LowRankEigh, LowRankRoot, LowRankSVD

DAMPING, EXPONENT = 0.1, -0.5
# Of the unit of rounding: what orthonormal columns, and the residual of a solve, may be off. Peers decompose a dense
# matrix in whatever way they like; theirs are only to be a decomposition.
ROUNDING, PEER_ROUNDING = 200, 20_000


class Shape(NamedTuple):
    """n rows, rank r, k new columns or right-hand sides, the dtype of the factor and that of the data."""

    n: int
    r: int
    k: int
    dtype: torch.dtype = torch.float32
    data: torch.dtype | None = None

    def __str__(self) -> str:
        words = f"n={self.n} r={self.r} k={self.k} {SHORT[self.dtype]}"
        return words if self.data is None else f"{words} {SHORT[self.data]} data"

    @property
    def eps(self) -> float:
        """The unit of rounding of the factor."""
        return torch.finfo(self.dtype).eps


SHORT = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16"}


class Judgement(NamedTuple):
    """How far a result is from the float64 one, how far from its form in units of ε, and what is allowed.

    The form is orthonormal columns, or for a root that S is FᵀF.
    """

    error: float
    allowed: float
    orthogonality: float | None = None
    orthogonality_allowed: float = ROUNDING

    @property
    def used(self) -> float:
        """The part that is used of what is allowed; above 1 for a wrong result."""
        return max(self.error / self.allowed, (self.orthogonality or 0.0) / self.orthogonality_allowed)


class Call(NamedTuple):
    """A function, its arguments, the check of what it returns, and whether NumPy computes it."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    judge: Callable[[Any], Judgement]
    on_numpy: bool = False


class Task(NamedTuple):
    """What a public function is asked, the same asked of others, and the least work that the function's method has."""

    own: Call
    options: dict[str, Any]
    others: dict[str, Call]
    work: Work

    def call(self, implementation: str) -> Call:
        """Return the call of an implementation: of the library by the backend that serves it, or of a peer."""
        if implementation not in OWN:
            return self.others[implementation]
        function = partial(self.own.function, **self.options)
        return self.own._replace(function=forced(function) if implementation == TORCH_FORM else function)


BRANDLA, TORCH_FORM, ONE_BY_ONE = "brandla", "brandla, torch form", "one call each"
OWN = (BRANDLA, TORCH_FORM)
# Where these fail the run fails; where others do, that is a finding.
OURS = (*OWN, ONE_BY_ONE)


def forced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that runs the torch forms of all ops."""

    def call(*arguments: Any) -> Any:
        with brandla.backend("torch"):
            return function(*arguments)

    return call


def check(name: str, call: Call) -> Judgement:
    """Call once, and refuse a wrong result."""
    judged = call.judge(cases.on_cpu(call.function(*call.arguments)))
    # A NaN is no small error.
    require(judged.error <= judged.allowed, f"{name}: error {judged.error:.1e}, allowed {judged.allowed:.1e}")
    if judged.orthogonality is not None:
        most = judged.orthogonality_allowed
        require(judged.orthogonality <= most, f"{name}: {judged.orthogonality:.0f} ε off its form, allowed {most:g}")
    return judged


# ---------------------------------------------------------------------------------------------------------------------
# Low-rank approximations
# ---------------------------------------------------------------------------------------------------------------------


class Product(NamedTuple):
    """X = F Gᵀ in float64, of which a result is to be the best part of a rank."""

    left: Tensor
    right: Tensor

    def spectrum(self) -> Tensor:
        """Return the singular values."""
        return torch.linalg.svdvals(in_small([(self.left, self.right)]))

    def distance(self, left: Tensor, right: Tensor) -> float:
        """Return ‖X − F̂ Ĝᵀ‖_F."""
        return float(torch.linalg.matrix_norm(in_small([(self.left, self.right), (left, -right)])))


class Dense(NamedTuple):
    """A dense float64 matrix with singular values 1/i."""

    matrix: Tensor

    def spectrum(self) -> Tensor:
        """Return the singular values."""
        return 1 / torch.arange(1, min(self.matrix.shape) + 1, dtype=torch.float64)

    def distance(self, left: Tensor, right: Tensor) -> float:
        """Return ‖X − F̂ Ĝᵀ‖_F."""
        return float(torch.linalg.matrix_norm(self.matrix - left @ right.mT))


def in_small(terms: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return Σ F Gᵀ in orthonormal bases of all F and of all G."""
    left, right = (torch.linalg.qr(torch.cat(parts, dim=1), mode="r").R for parts in zip(*terms, strict=True))
    return left @ right.mT


def halves(result: LowRankEigh | LowRankRoot | LowRankSVD) -> tuple[Tensor, Tensor]:
    """Return F, G with F Gᵀ the result, in float64."""
    first, second, *rest = (part.double() for part in result)
    if isinstance(result, LowRankSVD):
        return first * second, rest[0].mT
    return (second * first, second) if isinstance(result, LowRankEigh) else (first, first)


def approximation(
    target: Product | Dense, rank: int, eps: float, slack: float, most: float
) -> Callable[[Any], Judgement]:
    """Return the check that a result is the best approximation of a rank, but for ``slack`` and rounding."""
    spectrum = target.spectrum()
    norm, best = (float(torch.linalg.vector_norm(spectrum[start:])) for start in (0, rank))
    # Each of the directions that matter may be off by a few ε‖X‖.
    rounding = 8 * len(spectrum) ** 0.5 * eps * float(spectrum[0])

    def judge(result: Any) -> Judgement:
        lost = target.distance(*halves(result))
        off = orthonormality(result.U) if isinstance(result, LowRankSVD) else defect(result)
        return Judgement(lost / norm, (slack * best + rounding) / norm, off / eps, most)

    return judge


def against(
    kinds: Mapping[str, Peer], matrix: Tensor, target: Product | Dense, shape: Shape, device: Device
) -> dict[str, Call]:
    """Return the calls of the peers that decompose a dense matrix."""
    return {
        name: Call(
            peer.call,
            (peer.takes(matrix), shape.r),
            approximation(target, shape.r, shape.eps, peer.slack, PEER_ROUNDING),
            peer.on_numpy,
        )
        for name, peer in kinds.items()
        if peer.runs_on(device.tensors.type)
    }


def basis(device: Device, n: int, r: int, dtype: torch.dtype) -> Tensor:
    """Return random orthonormal columns."""
    return torch.linalg.qr(device.normal(n, r, dtype=torch.float64)).Q.to(dtype)


def values(device: Device, r: int, dtype: torch.dtype) -> Tensor:
    """Return 1/i."""
    return 1 / torch.arange(1, r + 1, dtype=dtype, device=device.tensors)


def stream(shape: Shape, device: Device) -> Tensor:
    """Return columns of deviations i^−½, in the dtype of the data."""
    return next(columns_of(shape.n, shape.k, 0.5, 0, torch.float64)).to(device.tensors, shape.data or shape.dtype)


def a_row(r: int, k: int) -> int:
    """Return the flops of an update for each row: a pass for the core, of AᵀA one triangle, and a rotation."""
    return 2 * r * k + k**2 + 2 * (r + k) * r


def symmetric_factor(shape: Shape, device: Device) -> LowRankEigh:
    """Return a factor with eigenvalues 1/i."""
    return LowRankEigh(values(device, shape.r, shape.dtype), basis(device, shape.n, shape.r, shape.dtype))


def symmetric_update(name: str, shape: Shape, device: Device) -> Task:
    """Return an update of the factor that a stream settles to, for which `LOSS_ALLOWED` is.

    Peers decompose the dense target, handed to them for nothing.
    """
    n, r, k = shape[:3]
    settled = steady(name, n, r, k, dtype=shape.dtype)
    factor = type(settled.factor)(*(part.to(device.tensors) for part in settled.factor))
    columns = settled.columns.to(device.tensors, shape.data or shape.dtype)
    left, right = halves(cases.on_cpu(factor))
    added = columns.double().cpu()
    target = Product(
        torch.cat([DECAY * left, WEIGHT * added], dim=1),
        torch.cat([right, added], dim=1),
    )
    judge = approximation(target, r, shape.eps, LOSS_ALLOWED[name], ROUNDING)
    dense = (target.left @ target.right.mT).to(device.tensors, shape.dtype)
    moved = shape.dtype.itemsize * 2 * n * r + columns.element_size() * n * k
    function = UPDATES[name][0]
    options = function.keywords if isinstance(function, partial) else {}
    return Task(
        Call(getattr(brandla, name.partition(",")[0]), (factor, columns), judge),
        {"decay": DECAY, "weight": WEIGHT, **options},
        {} if shape.data else against(peers.SYMMETRIC, dense, target, shape, device),
        _work(shape, n * a_row(r, k), moved),
    )


def svd_factor(shape: Shape, device: Device, columns: int) -> LowRankSVD:
    """Return U diag(1/i) Vh of n rows."""
    n, r, dtype = shape.n, shape.r, shape.dtype
    right = basis(device, columns, r, dtype).mT.contiguous()
    return LowRankSVD(basis(device, n, r, dtype), values(device, r, dtype), right)


def svd_update(shape: Shape, device: Device) -> Task:
    """Return an update of a singular value decomposition of n rows and n / 2 columns."""
    n, r, k = shape[:3]
    m = n // 2
    svd = svd_factor(shape, device, m)
    sides = [device.normal(rows, k, dtype=shape.dtype) / (rows * k) ** 0.5 for rows in (n, m)]
    left, right = halves(cases.on_cpu(svd))
    added = [side.double().cpu() for side in sides]
    target = Product(torch.cat([DECAY * left, added[0]], dim=1), torch.cat([right, added[1]], dim=1))
    dense = (target.left @ target.right.mT).to(device.tensors, shape.dtype)
    return Task(
        Call(brandla.svd_update, (svd, *sides), approximation(target, r, shape.eps, EXACT, ROUNDING)),
        {"decay": DECAY},
        against(peers.GENERAL, dense, target, shape, device),
        _work(shape, (n + m) * a_row(r, k), shape.dtype.itemsize * (n + m) * (2 * r + k)),
    )


def svd_append(shape: Shape, device: Device) -> Task:
    """Return k columns appended to a decomposition of max(2 r, 4 k) columns."""
    n, r, k = shape[:3]
    m = max(2 * r, 4 * k)
    svd, columns = svd_factor(shape, device, m), stream(shape, device)
    left, right = halves(cases.on_cpu(svd))
    added = columns.double().cpu()
    target = Product(
        torch.cat([DECAY * left, added], dim=1), torch.block_diag(right, torch.eye(k, dtype=torch.float64))
    )
    dense = (target.left @ target.right.mT).to(device.tensors, shape.dtype)
    flops = n * a_row(r, k) + 2 * m * r**2
    moved = shape.dtype.itemsize * (n + m) * 2 * r + columns.element_size() * n * k
    return Task(
        Call(brandla.svd_append, (svd, columns), approximation(target, r, shape.eps, EXACT, ROUNDING)),
        {"decay": DECAY},
        {} if shape.data else against(peers.GENERAL, dense, target, shape, device),
        _work(shape, flops, moved),
    )


BATCHES = 5


def centred_append(shape: Shape, device: Device) -> Task:
    """Return k columns appended to a centred decomposition; scikit-learn's IncrementalPCA keeps the same."""
    n, r, k = shape[:3]
    source = columns_of(n, max(r, k), 0.5, 0, torch.float64)
    *before, last = ((next(source) + 0.1)[:, : max(r, k)] for _ in range(BATCHES + 1))
    last = last[:, :k]
    state = brandla.centre(LowRankSVD.zeros(n, 0, r, dtype=shape.dtype, device=device.tensors))
    exact, peer = IncrementalPCA(r), IncrementalPCA(r)
    for columns in before:
        state = brandla.svd_append(state, columns.to(device.tensors, shape.dtype))
        exact.partial_fit(columns.mT.numpy())
        peer.partial_fit(columns.mT.to(shape.dtype).numpy())
    rows = last.mT.to(shape.dtype).contiguous().numpy()
    exact.partial_fit(last.mT.numpy())
    truth = torch.from_numpy(exact.singular_values_)
    # Rounding of every batch adds up; a truncation differs by the order in which it is taken.
    allowed = 8 * (BATCHES + 1) * (r + k) ** 0.5 * shape.eps * float(truth[0] / truth[-1])

    def judge(found: Tensor) -> Judgement:
        return Judgement(float(((found.double() - truth).abs() / truth).max()), allowed)

    own = Call(brandla.svd_append, (state, last.to(device.tensors, shape.dtype)), lambda it: judge(it.svd.S))
    fitted = Call(peer.partial_fit, (rows,), lambda it: judge(torch.from_numpy(it.singular_values_)), True)
    flops = n * a_row(r, k)
    others = {INCREMENTAL: fitted} if device.tensors.type == "cpu" else {}
    return Task(own, {}, others, _work(shape, flops, shape.dtype.itemsize * n * (2 * r + k)))


def randomized(name: str, shape: Shape, device: Device) -> Task:
    """Return a randomized decomposition of a dense matrix with singular values 1/i."""
    n, r, _ = shape[:3]
    truth = _spectral(n, name == "randomized_svd")
    target, matrix = Dense(truth), truth.to(device.tensors, shape.dtype)
    width = min(r + OVERSAMPLE, *truth.shape)
    products = POWERS + 1 if name == "randomized_eigh" else 2 * POWERS + 2
    kinds = peers.SYMMETRIC if name == "randomized_eigh" else peers.GENERAL
    return Task(
        Call(getattr(brandla, name), (matrix, r), approximation(target, r, shape.eps, SKETCHED, ROUNDING)),
        {"oversample": OVERSAMPLE, "power_iterations": POWERS},
        against(kinds, matrix, target, shape, device),
        _work(shape, products * 2 * truth.numel() * width, shape.dtype.itemsize * products * truth.numel()),
    )


def _spectral(n: int, rectangular: bool) -> Tensor:
    """Return a matrix with singular values 1/i: symmetric n × n, or n × n/2."""
    m = n // 2 if rectangular else n
    matrix = matrix_of_spectrum((1 / torch.arange(1, m + 1, dtype=torch.float64)).numpy(), seed=0)
    if not rectangular:
        return matrix
    # A reflection I − 2vvᵀ, cut to m columns, has orthonormal columns.
    normal = torch.nn.functional.normalize(torch.cos(torch.arange(n, dtype=torch.float64)), dim=0)
    return torch.cat([matrix, matrix.new_zeros(n - m, m)]) - 2 * torch.outer(normal, normal[:m] @ matrix)


def _work(shape: Shape, flops: int, moved: int) -> Work:
    """Return the work of the tall products, in the dtype of the factor."""
    if shape.dtype == torch.float64:
        return Work(float64=flops, bytes=moved)
    return Work(float32=flops, bytes=moved)


# ---------------------------------------------------------------------------------------------------------------------
# Damped applications
# ---------------------------------------------------------------------------------------------------------------------


def powered(factor: LowRankEigh, vectors: Tensor, exponent: float) -> Tensor:
    """Return (U diag(d) Uᵀ + λI)^p V in float64."""
    levels, directions = (part.double() for part in factor)
    outside = DAMPING**exponent
    inside = ((levels + DAMPING) ** exponent - outside)[:, None] * (directions.mT @ vectors)
    return outside * vectors + directions @ inside


def undone(rhs: Tensor, sides: Sequence[LowRankEigh], exponent: float, eps: float) -> Callable[[Tensor], Judgement]:
    """Return the check that applying the inverse operators to a result gives ``rhs`` back."""
    scale = (1 + DAMPING) ** (-exponent * len(sides))

    def judge(solution: Tensor) -> Judgement:
        solved = solution.double()
        back = powered(sides[0], solved, -exponent)
        if len(sides) == 2:
            back = powered(sides[1], back.mT, -exponent).mT
        error = torch.linalg.matrix_norm(back - rhs.double()) / torch.linalg.matrix_norm(solved)
        return Judgement(float(error) / scale, ROUNDING * eps)

    return judge


def dense_of(factor: LowRankEigh) -> Tensor:
    """Return U diag(d) Uᵀ + λI."""
    shift = DAMPING * torch.eye(factor.n, dtype=factor.eigenvalues.dtype, device=factor.eigenvalues.device)
    return factor.dense() + shift


def _dense_power(matrix: Tensor, rhs: Tensor) -> Tensor:
    levels, directions = torch.linalg.eigh(matrix)
    return directions @ (levels[:, None] ** EXPONENT * (directions.mT @ rhs))


def _both_sides(left: Tensor, right: Tensor, matrix: Tensor) -> Tensor:
    return torch.linalg.solve(right, torch.linalg.solve(left, matrix).mT).mT


def damped(name: str, shape: Shape, device: Device) -> Task:
    """Return a damped solve or power with k right-hand sides."""
    n, r, k = shape[:3]
    factor = symmetric_factor(shape, device)
    rhs = device.normal(n, k, dtype=shape.dtype)
    power = name == "damped_power"
    judge = undone(rhs.cpu(), [cases.on_cpu(factor)], EXPONENT if power else -1.0, shape.eps)
    call = _dense_power if power else torch.linalg.solve
    others = {DENSE[name]: Call(call, (dense_of(factor), rhs), judge)}
    arguments = (factor, rhs, DAMPING, *((EXPONENT,) if power else ()))
    moved = shape.dtype.itemsize * n * (r + 2 * k)
    return Task(Call(getattr(brandla, name), arguments, judge), {}, others, _work(shape, 4 * n * r * k, moved))


def kron(shape: Shape, device: Device, *, pair: bool) -> Task:
    """Return a two-sided solve of an n × n / 2 matrix, or of a pair of k columns."""
    n, r, k = shape[:3]
    m = n // 2
    sides = [symmetric_factor(shape._replace(n=rows), device) for rows in (n, m)]
    exact = [cases.on_cpu(side) for side in sides]
    dampings = (DAMPING, DAMPING)
    if pair:
        columns = tuple(device.normal(rows, k, dtype=shape.dtype) for rows in (n, m))
        judges = [undone(one.cpu(), [side], -1.0, shape.eps) for one, side in zip(columns, exact, strict=True)]
        judge = lambda both: max(one(part) for one, part in zip(judges, both, strict=True))
        others = {DENSE["kron_damped_solve"]: Call(_solve_both, (*map(dense_of, sides), *columns), judge)}
        flops, moved = 4 * (n + m) * r * k, (n + m) * (r + 2 * k)
        return Task(
            Call(brandla.kron_damped_solve, (*sides, columns, *dampings), judge),
            {},
            others,
            _work(shape, flops, shape.dtype.itemsize * moved),
        )
    matrix = device.normal(n, m, dtype=shape.dtype)
    judge = undone(matrix.cpu(), exact, -1.0, shape.eps)
    others = {DENSE["kron_damped_solve"]: Call(_both_sides, (*map(dense_of, sides), matrix), judge)}
    return Task(
        Call(brandla.kron_damped_solve, (*sides, matrix, *dampings), judge),
        {},
        others,
        _work(shape, 8 * n * m * r, shape.dtype.itemsize * 3 * n * m),
    )


def _solve_both(left: Tensor, right: Tensor, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    return torch.linalg.solve(left, one), torch.linalg.solve(right, other)


# ---------------------------------------------------------------------------------------------------------------------
# All of them
# ---------------------------------------------------------------------------------------------------------------------

Maker = Callable[[Shape, Device], Task]
TASKS: dict[str, Maker] = {
    **{name: partial(symmetric_update, name) for name in UPDATES},
    "svd_update": svd_update,
    "svd_append": svd_append,
    "svd_append, centred": centred_append,
    "randomized_eigh": partial(randomized, "randomized_eigh"),
    "randomized_svd": partial(randomized, "randomized_svd"),
    "damped_solve": partial(damped, "damped_solve"),
    "damped_power": partial(damped, "damped_power"),
    "kron_damped_solve": partial(kron, pair=False),
    "kron_damped_solve, pair": partial(kron, pair=True),
}
# What takes data in half precision beside a float32 factor.
TAKES_HALF = (*UPDATES, "svd_append")
DENSE = {"damped_power": "torch.linalg.eigh, dense"} | dict.fromkeys(
    ("damped_solve", "kron_damped_solve", "kron_damped_solve, pair"), "torch.linalg.solve, dense"
)
INCREMENTAL = "scikit-learn IncrementalPCA"
# What computes in float64 whatever it is given: fbpca draws, and scikit-learn's PCA keeps its mean, in it.
IN_FLOAT64 = (*(name for name, peer in peers.SYMMETRIC.items() if peer.float64), INCREMENTAL)


def implementations(name: str, shape: Shape, device_type: str, most: int) -> list[str]:
    """Return who is timed at a task; what is slow, up to n = ``most`` only."""
    own = list(OWN) if device_type == "cuda" else [BRANDLA]
    if shape.data is not None:
        return own
    if name in DENSE:
        return own + [DENSE[name]] * (shape.n <= most)
    if name == "svd_append, centred":
        return own + [INCREMENTAL] * (device_type == "cpu")
    kinds = peers.GENERAL if name.startswith(("svd", "randomized_svd")) else peers.SYMMETRIC
    fits = (peer.runs_on(device_type) and (shape.n <= most or not peer.slow) for peer in kinds.values())
    return own + [peer for peer, fit in zip(kinds, fits, strict=True) if fit]


def together(name: str, shapes: Sequence[Shape], device: Device) -> Task:
    """Return the grouped function over factors of several shapes, beside one call for each."""
    tasks = [TASKS[name](shape, device) for shape in shapes]
    plain = name.partition(",")[0]
    lists = tuple(map(list, zip(*(task.own.arguments for task in tasks), strict=True)))
    judged = lambda results: [task.own.judge(one) for task, one in zip(tasks, results, strict=True)]
    judge = lambda results: max(judged(results), key=lambda one: one.used)
    single = partial(tasks[0].own.function, **tasks[0].options)
    each = Call(lambda *parts: [single(*own) for own in zip(*parts, strict=True)], lists, judge)
    work = Work(*(sum(amounts) for amounts in zip(*(task.work for task in tasks), strict=True)))
    return Task(Call(getattr(brandla.grouped, plain), lists, judge), tasks[0].options, {ONE_BY_ONE: each}, work)
