"""A task for each public function: its arguments, the peers that do the same, and the float64 check of a result."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.decomposition import IncrementalPCA
from torch import Tensor
from torch.utils._pytree import tree_map_only

import brandla
from bench.benches import problems
from bench.benches.peers import EXACT, GENERAL, INCREMENTAL, OVERSAMPLE, POWERS, SKETCHED, SYMMETRIC, Peer
from bench.benches.problems import DECAY, DEFECT_ALLOWED, PEER_DEFECT_ALLOWED, UPDATES, WEIGHT, Judgement
from bench.gpu import cases
from bench.gpu.cases import Case, eigh, on_cpu, relative_error, torch_form_of
from bench.gpu.device import Device, Work, tensors_in
from brandla import LowRankEigh, LowRankSVD
from brandla_kernels import OPS

DAMPING, EXPONENT = 0.1, -0.5
BRANDLA, TORCH_FORM, ONE_BY_ONE = "brandla", "brandla, torch form", "one call each"
OWN = (BRANDLA, TORCH_FORM)
# A failure of one of these fails the run. A failure of another is a finding.
OURS = (*OWN, ONE_BY_ONE)
SHORT = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16"}


class Shape(NamedTuple):
    """n rows, rank r, k new columns or right-hand sides, the factor's dtype, and the data's if it differs."""

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
        return torch.finfo(self.dtype).eps

    def work(self, flops: int, entries: int, data: int = 0) -> Work:
        """Return the work of products in the factor's dtype that moves so many entries of it and of the data."""
        moved = entries * self.dtype.itemsize + data * (self.data or self.dtype).itemsize
        return Work(bytes=moved, **{"float64" if self.dtype == torch.float64 else "float32": flops})


Judge = Callable[[Any], Judgement]


class Call(NamedTuple):
    """A function, its arguments, the check of its result, and whether NumPy computes it."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    judge: Judge
    on_numpy: bool = False

    @property
    def again(self) -> Callable[[], Any]:
        """The call, on the same tensors each time."""
        return partial(self.function, *self.arguments)


@dataclass(frozen=True)
class Task:
    """A call of a public function, the same task for others, and the least work of the function's method."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    judge: Judge
    work: Work
    given: Callable[[], tuple[Any, ...]] = tuple  # the arguments of others
    judge_of: Callable[[Peer], Judge] | None = None  # the check of others' results, if it differs
    others: Mapping[str, Peer] = field(default_factory=dict)

    def call(self, implementation: str) -> Call:
        if implementation in OWN:
            function = torch_form_of(self.function) if implementation == TORCH_FORM else self.function
            return Call(function, self.arguments, self.judge)
        peer, given = self.others[implementation], self.given()
        given = tuple(tree_map_only(Tensor, Tensor.numpy, list(given))) if peer.on_numpy else given
        return Call(peer.call, given, self.judge_of(peer) if self.judge_of else self.judge, peer.on_numpy)


def check(name: str, call: Call) -> Judgement:
    return call.judge(on_cpu(call.function(*call.arguments))).accept(name)


def op_task(case: Case, device: Device, function: Callable[..., Any] | None = None) -> Task:
    """Return the task of an op, or of a ``function`` in its place."""
    judge = lambda _: Judgement(cases.check(case, device)[0], cases.error_allowed(case))
    return Task(function or OPS[case.op], cases.operands(case, device), judge, cases.work(case))


def approximating(function, arguments, target, slack, shape, device, work) -> Task:
    """Return a task to find the best approximation of a target; peers get the dense matrix for nothing."""
    allowed = partial(problems.approximation, target, shape.r, shape.eps)

    @cache
    def given() -> tuple[Tensor, int]:
        dense = target if isinstance(target, Tensor) else sum(left @ right.mT for left, right in target)
        return dense.to(device.tensors, shape.dtype), shape.r

    judge_of = lambda peer: allowed(peer.slack, PEER_DEFECT_ALLOWED)
    return Task(function, arguments, allowed(slack), work, given, judge_of)


def svd_factor(shape: Shape, device: Device, columns: int) -> LowRankSVD:
    """Return U diag(1/i) Vh of n rows."""
    (values, left), (_, right) = (eigh(device, rows, shape.r, shape.dtype) for rows in (shape.n, columns))
    return LowRankSVD(left, values, right.mT.contiguous())


def row_flops(r: int, k: int) -> int:
    """Return the flops of an update per row: a pass for the core with one triangle of AᵀA, and a rotation."""
    return 2 * r * k + k**2 + 2 * (r + k) * r


def symmetric_update(name: str, shape: Shape, device: Device, exponent: float = 0.5) -> Task:
    """Return an update of the factor that a stream settles to; `LOSS_ALLOWED` holds for it."""
    n, r, k = shape[:3]
    factor, columns = problems.steady_state(name, n, r, k, exponent, shape.dtype, device=device.tensors)
    columns = columns.to(shape.data or shape.dtype)
    (left, right), added = problems.two_factors(on_cpu(factor)), columns.double().cpu()
    target = [(DECAY * left, right), (WEIGHT * added, added)]
    function = partial(UPDATES[name][0], decay=DECAY, weight=WEIGHT)
    work = shape.work(n * row_flops(r, k), 2 * n * r, n * k)
    return approximating(function, (factor, columns), target, problems.LOSS_ALLOWED[name], shape, device, work)


def svd_update(shape: Shape, device: Device) -> Task:
    """Return an update of a singular value decomposition with n rows and n / 2 columns."""
    n, r, k = shape[:3]
    m = n // 2
    svd = svd_factor(shape, device, m)
    sides = [device.normal(rows, k, dtype=shape.dtype) / (rows * k) ** 0.5 for rows in (n, m)]
    left, right = problems.two_factors(on_cpu(svd))
    target = [(DECAY * left, right), tuple(side.double().cpu() for side in sides)]
    work = shape.work((n + m) * row_flops(r, k), (n + m) * (2 * r + k))
    function = partial(brandla.svd_update, decay=DECAY)
    return approximating(function, (svd, *sides), target, EXACT, shape, device, work)


def svd_append(shape: Shape, device: Device) -> Task:
    """Return the task to append k columns with deviations i^−½ to a decomposition of max(2 r, 4 k) columns."""
    n, r, k = shape[:3]
    m = max(2 * r, 4 * k)
    svd = svd_factor(shape, device, m)
    columns = next(problems.columns_of(n, k, 0.5, 0, torch.float64)).to(shape.data or shape.dtype)
    left, right = problems.two_factors(on_cpu(svd))
    unit = torch.eye(m + k, dtype=torch.float64)
    target = [(DECAY * left, unit[:, :m] @ right), (columns.double(), unit[:, m:])]
    work = shape.work(n * row_flops(r, k) + 2 * m * r**2, (n + m) * 2 * r, n * k)
    function, arguments = partial(brandla.svd_append, decay=DECAY), (svd, columns.to(device.tensors))
    return approximating(function, arguments, target, EXACT, shape, device, work)


def downdate(shape: Shape, device: Device) -> Task:
    """Return the task to take back k columns in the span of the factor, which leaves the vectors as they are."""
    n, r, k = shape[:3]
    factor = eigh(device, n, r, shape.dtype)
    values, vectors = on_cpu(factor)
    # The columns take half of each of the last k values.
    columns = vectors[:, r - k :].double() * (values[r - k :].double() / 2).sqrt()
    target = [problems.two_factors(LowRankEigh(values[: r - k], vectors[:, : r - k])), (columns, columns)]
    arguments = (factor, columns.to(device.tensors, shape.dtype))
    work = shape.work(2 * n * r * k + 2 * n * r**2, 2 * n * r + n * k)
    return approximating(brandla.eigh_downdate, arguments, target, EXACT, shape, device, work)


def refresh(shape: Shape, device: Device) -> Task:
    """Return a refresh by an n × 2n matrix whose leading singular vectors are those of the factor."""
    n, r, _ = shape[:3]
    old, right = (eigh(device, rows, r, shape.dtype) for rows in (n, 2 * n))
    matrix = (old.eigenvectors * old.eigenvalues.sqrt()) @ right.eigenvectors.mT
    # As decay and weight sum to 1, the result is the factor itself.
    judge = problems.approximation([problems.two_factors(on_cpu(old))], r, shape.eps, EXACT)
    function, work = partial(brandla.eigh_refresh, decay=DECAY, weight=WEIGHT), shape.work(12 * n * n * r, 6 * n * n)
    return Task(function, (old, matrix), lambda found: judge(found[0]), work)


def centred_append(shape: Shape, device: Device) -> Task:
    """Return the task to append k columns to a centred decomposition, as scikit-learn's IncrementalPCA does."""
    n, r, k = shape[:3]
    source = problems.columns_of(n, max(r, k), 0.5, 0, torch.float64)
    *before, last = (next(source) + 0.1 for _ in range(6))
    last = last[:, :k]
    state = brandla.centre(LowRankSVD.zeros(n, 0, r, dtype=shape.dtype, device=device.tensors))
    exact, peer = IncrementalPCA(r), IncrementalPCA(r)
    for columns in before:
        state = brandla.svd_append(state, columns.to(device.tensors, shape.dtype))
        exact.partial_fit(columns.mT.numpy())
        peer.partial_fit(columns.mT.to(shape.dtype).numpy())
    exact.partial_fit(last.mT.numpy())
    truth = torch.from_numpy(exact.singular_values_)
    # The rounding of all batches adds up, and truncations depend on their order.
    allowed = 8 * (len(before) + 1) * (r + k) ** 0.5 * shape.eps * float(truth[0] / truth[-1])

    def judge(found: Any) -> Judgement:
        values = found.svd.S if hasattr(found, "svd") else torch.from_numpy(found.singular_values_)
        return Judgement(float(((values.double() - truth).abs() / truth).max()), allowed)

    arguments, work = (state, last.to(device.tensors, shape.dtype)), shape.work(n * row_flops(r, k), n * (2 * r + k))
    given = lambda: (peer, last.mT.to(shape.dtype).contiguous())
    return Task(brandla.svd_append, arguments, judge, work, given=given)


def randomized(name: str, shape: Shape, device: Device) -> Task:
    """Return a randomized decomposition of a dense matrix with singular values 1/i, symmetric or n × n / 2."""
    n, r, _ = shape[:3]
    m, products = (n, POWERS + 1) if name == "randomized_eigh" else (n // 2, 2 * POWERS + 2)
    truth = problems.matrix_of_spectrum(n, 1 / np.arange(1, m + 1))
    arguments = (truth.to(device.tensors, shape.dtype), r)
    function = partial(getattr(brandla, name), oversample=OVERSAMPLE, power_iterations=POWERS)
    work = shape.work(products * 2 * n * m * min(r + OVERSAMPLE, m), products * n * m)
    return approximating(function, arguments, truth, SKETCHED, shape, device, work)


def orthonormal(shape: Shape, device: Device, batch: tuple[int, ...] = ()) -> Task:
    """Return Q and R of an n × r panel, or of a batch, whose columns are far from orthogonal."""
    n, r, _ = shape[:3]
    lengths = 1 / torch.arange(1, r + 1, dtype=shape.dtype, device=device.tensors)
    panel = (device.normal(*batch, n, r, dtype=shape.dtype) + 1) * lengths
    exact = panel.double().cpu()

    def judge(found: Any) -> Judgement:
        q, triangle = (torch.stack(list(part)) if isinstance(part, list) else part for part in found)
        error = torch.linalg.matrix_norm(q.double() @ triangle.double() - exact) / torch.linalg.matrix_norm(exact)
        off = max(map(problems.orthonormality, q.reshape(-1, n, r)))
        return Judgement(float(error.max()), DEFECT_ALLOWED * shape.eps, off / shape.eps)

    work = shape.work(8 * panel.numel() * r, 2 * panel.numel())
    return Task(brandla.orthonormalize, (panel,), judge, work, given=lambda: (panel,))


def close_to(expected: Any, shape: Shape) -> Judge:
    """Return the check of a result against the float64 one."""
    parts = tensors_in(expected)
    return lambda found: Judgement(relative_error(tensors_in(found), parts), DEFECT_ALLOWED * shape.eps)


def damped(name: str, shape: Shape, device: Device) -> Task:
    """Return a solve, a power or a determinant: of a factor with k right-hand sides, or of a Kronecker product.

    The Kronecker product has one damping, and is applied to an n × n / 2 matrix. Others get dense matrices; that of a
    single factor includes λI.
    """
    n, r, k = shape[:3]
    joint, logdet, options = name.startswith("kron"), name.endswith("logdet"), (EXPONENT,) * name.endswith("power")
    m = n // 2 if joint else 1 if logdet else k
    sides = [eigh(device, rows, r, shape.dtype) for rows in ((n, m) if joint else (n,))]
    data = () if logdet else (device.normal(n, m, dtype=shape.dtype),)
    # The other side of a single factor is the identity.
    (d, u), (e, v) = on_cpu([*sides, (torch.ones(m), torch.eye(m))])[:2]
    levels, u, v = _joint_levels(d.double(), e.double()), u.double(), v.double()
    if logdet:
        expected = levels.log().sum() + (n * m - levels.numel()) * math.log(DAMPING)
        work = shape.work(0, r * len(sides))
    else:
        power, right = options[0] if options else -1.0, on_cpu(data[0]).double()
        outside = DAMPING**power
        expected = outside * right + u @ ((levels**power - outside) * (u.mT @ right @ v)) @ v.mT
        work = shape.work(4 * n * m * r * len(sides), 3 * n * m if joint else n * (r + 2 * k))
    given = lambda: (*(_dense(side, 0.0 if joint else DAMPING) for side in sides), *data)
    arguments = (*sides, *data, DAMPING, *options)
    return Task(getattr(brandla, name), arguments, close_to(expected, shape), work, given=given)


def kron(shape: Shape, device: Device, *, pair: bool, square: bool = False) -> Task:
    """Return a two-sided solve of an n × n / 2 or n × n matrix, or of a pair with k columns."""
    n, r, k = shape[:3]
    m = n if square else n // 2
    sides = [eigh(device, rows, r, shape.dtype) for rows in (n, m)]

    def solved(side: LowRankEigh, rhs: Tensor) -> Tensor:
        (levels, directions), rhs = side.to("cpu", torch.float64), rhs.double().cpu()
        inside = (levels / (levels + DAMPING))[:, None] * (directions.mT @ rhs)
        return (rhs - directions @ inside) / DAMPING

    if pair:
        data: Any = tuple(device.normal(rows, k, dtype=shape.dtype) for rows in (n, m))
        expected: Any = list(map(solved, sides, data))
        work = shape.work(4 * (n + m) * r * k, (n + m) * (r + 2 * k))
    else:
        data = device.normal(n, m, dtype=shape.dtype)
        expected, work = solved(sides[1], solved(sides[0], data).mT).mT, shape.work(8 * n * m * r, 3 * n * m)
    given, arguments = lambda: (*(_dense(side, DAMPING) for side in sides), data), (*sides, data, DAMPING, DAMPING)
    return Task(brandla.kron_damped_solve, arguments, close_to(expected, shape), work, given=given)


def _dense(factor: LowRankEigh, shift: float) -> Tensor:
    matrix = factor.dense()
    matrix.diagonal().add_(shift)
    return matrix


# --- Other ways, with dense matrices

_cholesky_solve = lambda matrix, rhs: torch.cholesky_solve(rhs, torch.linalg.cholesky(matrix))
_joint_levels = lambda left, right: left[:, None] * right + DAMPING
_joint_logdet = lambda *sides: _joint_levels(*map(torch.linalg.eigvalsh, sides)).log().sum()
_qr_each = lambda panels: [list(parts) for parts in zip(*map(torch.linalg.qr, panels), strict=True)]
_solve_pair = lambda left, right, data: tuple(map(torch.linalg.solve, (left, right), data))
_solve_both = lambda left, right, data: torch.linalg.solve(right, torch.linalg.solve(left, data).mT).mT


def _power(matrix: Tensor, rhs: Tensor) -> Tensor:
    levels, directions = torch.linalg.eigh(matrix)
    return directions @ (levels[:, None] ** EXPONENT * (directions.mT @ rhs))


def _joint_power(left: Tensor, right: Tensor, matrix: Tensor) -> Tensor:
    (g, u), (a, v) = torch.linalg.eigh(left), torch.linalg.eigh(right)
    return u @ (_joint_levels(g, a) ** EXPONENT * (u.mT @ matrix @ v)) @ v.mT


# --- All functions


class Entry(NamedTuple):
    """A function that makes a task, and its peers."""

    make: Callable[[Shape, Device], Task]
    peers: Mapping[str, Peer]
    takes_half: bool = False  # data in half precision beside a float32 factor

    def task(self, shape: Shape, device: Device) -> Task:
        return replace(self.make(shape, device), others=self.peers)

    def implementations(self, shape: Shape, device_type: str, most: int) -> list[str]:
        """Return the implementations to time: slow peers up to n = ``most``, and none for data in half precision."""
        ours = list(OWN) if device_type == "cuda" else [BRANDLA]
        fits = lambda peer: peer.runs_on(device_type) and (shape.n <= most or not peer.slow)
        return ours + [name for name, peer in self.peers.items() if shape.data is None and fits(peer)]


SOLVE, CHOLESKY, DENSE_EIGH = (f"torch.linalg.{name}, dense" for name in ("solve", "cholesky", "eigh"))
_QR = {"torch.linalg.qr": Peer(torch.linalg.qr)}
_BATCHED_QR = _QR | {"torch.linalg.qr, one call each": Peer(_qr_each)}
# The peers of functions with one damping.
_DAMPED = {
    "damped_solve": {SOLVE: Peer(torch.linalg.solve, slow=True), CHOLESKY: Peer(_cholesky_solve, slow=True)},
    "damped_power": {DENSE_EIGH: Peer(_power, slow=True)},
    "damped_logdet": {"torch.linalg.slogdet, dense": Peer(lambda dense: torch.linalg.slogdet(dense)[1], slow=True)},
    "kron_damped_power": {DENSE_EIGH: Peer(_joint_power, slow=True)},
    "kron_damped_logdet": {DENSE_EIGH: Peer(_joint_logdet, slow=True)},
}
TASKS: dict[str, Entry] = {
    **{name: Entry(partial(symmetric_update, name), SYMMETRIC, takes_half=True) for name in UPDATES},
    "eigh_downdate": Entry(downdate, {}),
    "eigh_refresh": Entry(refresh, {}),
    "svd_update": Entry(svd_update, GENERAL),
    "svd_append": Entry(svd_append, GENERAL, takes_half=True),
    "svd_append, centred": Entry(centred_append, {INCREMENTAL: Peer(IncrementalPCA.partial_fit, package="sklearn")}),
    "randomized_eigh": Entry(partial(randomized, "randomized_eigh"), SYMMETRIC),
    "randomized_svd": Entry(partial(randomized, "randomized_svd"), GENERAL),
    "orthonormalize": Entry(orthonormal, _QR),
    "orthonormalize, batched": Entry(partial(orthonormal, batch=(4,)), _BATCHED_QR),
    **{name: Entry(partial(damped, name), peers) for name, peers in _DAMPED.items()},
    "kron_damped_solve": Entry(partial(kron, pair=False), {SOLVE: Peer(_solve_both, slow=True)}),
    "kron_damped_solve, pair": Entry(partial(kron, pair=True), {SOLVE: Peer(_solve_pair, slow=True)}),
}
# The tasks whose functions `brandla.grouped` has too.
GROUPED = [name for name in TASKS if name.partition(",")[0] in brandla.grouped.__all__ and "centred" not in name]


def group_of(name: str, shapes: Sequence[Shape], device: Device) -> Task:
    """Return the task of the grouped function over factors of several shapes, beside one call for each factor."""
    tasks = [TASKS[name].make(shape, device) for shape in shapes]
    lists = tuple(map(list, zip(*(task.arguments for task in tasks), strict=True)))

    judge_all = lambda results: [task.judge(result) for task, result in zip(tasks, results, strict=True)]
    worst = lambda results: max(judge_all(results), key=lambda judgement: judgement.used)
    single = tasks[0].function
    each = Peer(lambda *parts: [single(*arguments) for arguments in zip(*parts, strict=True)])
    work = Work(*(sum(amounts) for amounts in zip(*(task.work for task in tasks), strict=True)))
    function = partial(getattr(brandla.grouped, name.partition(",")[0]), **getattr(single, "keywords", {}))
    return Task(function, lists, worst, work, lambda: lists, others={ONE_BY_ONE: each})
