"""Damped application: (M̂ + τ(I − P) + λI) to any power, times a block of vectors, in O(n r) a vector.

M̂ is U diag(d) Uᵀ or F Fᵀ, and P the projector on its range.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from brandla import _check
from brandla._ranges import ranged
from brandla._sharded import WHOLE, Rows, rows_of
from brandla._small import safe_eigh
from brandla.lowrank import NAMES, LowRankEigh, LowRankRoot, Tracked, of_parts, parts_of, stack_numbers
from brandla_kernels import Tall, damped_apply, kron_damped_apply, project, reads_are_free

Factor = LowRankEigh | LowRankRoot
LowRank = Factor | Tracked[LowRankEigh] | Tracked[LowRankRoot]
Number = float | Tensor
Tail = Number | Literal["mean", "smallest"]
Data = TypeVar("Data", Tensor, tuple[Tensor, Tensor])


@ranged("n,r", "n,m")
def damped_solve(lowrank: LowRank, rhs: Tensor, damping: float | Tensor, *, tail: Tail = 0.0) -> Tensor:
    """(M̂ + τ(I − P) + λI)⁻¹ V: the damped inverse of a low-rank matrix M̂ with range P, applied.

    Equivalent to ``torch.linalg.solve(lowrank.dense() + damping * I, rhs)`` (for τ = 0), in 4nrm operations for m
    right-hand sides in place of O(n³ + n²m), and with no n × n matrix. Differentiable in every tensor argument.

    Parameters
    ----------
    lowrank
        LowRankEigh, LowRankRoot (then a Cholesky factorisation of S + λI of order r is added), or a Tracked one.
    rhs
        V, shape (..., n, m), or a vector: (n,), or exactly the batch shape of the factor and n, as in
        ``torch.linalg.solve``.
    damping
        λ > 0: a number, or a tensor of batch shape, which stays on its device.
    tail
        τ >= 0: the value taken for the eigenvalues that the factor does not hold: a number, a tensor of batch shape,
        ``"mean"``, their mean, from the trace that a Tracked factor carries, or ``"smallest"``, the smallest eigenvalue
        it holds (spectrum continuation).

    Returns
    -------
    Tensor
        Of the shape of ``rhs``, in the dtype of the factor.

    Raises
    ------
    ValueError, TypeError
        For shapes, values, dtypes and devices that do not fit, before anything is computed.

    Notes
    -----
    The part of V inside the range is divided by d + λ after a subtraction, so the relative error there is about
    ε (d + λ)/(τ + λ), and an error ‖UᵀU − I‖ of a basis enters multiplied in the same way. A LowRankRoot has no
    direction of a value 0: in it, every value under τ counts as τ. A τ other than 0 then needs the eigenvalues of S and
    waits for a GPU, unless S is diagonal as `root_update` leaves it. U and V may be DTensors sharded on their rows:
    ``docs/sharded.md``.

    References
    ----------
    Woodbury's identity, in the eigenbasis; derivation: ``docs/damped.md``.

    Examples
    --------
    >>> import torch, brandla
    >>> factor = brandla.LowRankEigh(torch.tensor([3.0]), torch.eye(4, 1))
    >>> brandla.damped_solve(factor, torch.ones(4), damping=1.0)
    tensor([0.2500, 1.0000, 1.0000, 1.0000])
    """
    return check_solve("damped_solve", lowrank, rhs, damping, tail=tail).solution()


@ranged("n,r", "n,m")
def damped_power(
    lowrank: LowRank, rhs: Tensor, damping: float | Tensor, exponent: float, *, tail: Tail = 0.0
) -> Tensor:
    """(M̂ + τ(I − P) + λI)^p V for any real p: −1/2 for whitening, −1/4 for Shampoo.

    Equivalent to the matrix power by a dense ``eigh``, in 4nrm operations. Differentiable in every tensor argument
    for a LowRankEigh; of a LowRankRoot S is first diagonalised (order r), which waits for the device.

    Parameters
    ----------
    lowrank, rhs, damping, tail
        As in `damped_solve`.
    exponent
        p, any real number; −1 is `damped_solve`.

    Returns
    -------
    Tensor
        Of the shape of ``rhs``, in the dtype of the factor.

    Raises
    ------
    ValueError, TypeError
        For shapes, values, dtypes and devices that do not fit, before anything is computed.
    """
    return check_solve("damped_power", lowrank, rhs, damping, exponent, tail=tail).solution()


@ranged("p,a", "q,b", "p,q")
def kron_damped_solve(
    left: LowRank,
    right: LowRank,
    matrix: Data,
    left_damping: float | Tensor,
    right_damping: float | Tensor,
    *,
    left_tail: Tail = 0.0,
    right_tail: Tail = 0.0,
) -> Data:
    """(G + λ_G I)⁻¹ W (A + λ_A I)⁻¹ for low-rank G and A: the Kronecker-factored step.

    Equivalent to two dense solves of orders p and q, in 4pq(r_G + r_A) operations for W (p, q). For a pair (P, Q) that
    stands for W = P Qᵀ the result is a pair too, and the work 4k(p r_G + q r_A): linear in the size of the layer.
    Differentiable in every tensor argument.

    Parameters
    ----------
    left, right
        G of order p and A of order q: LowRankEigh, LowRankRoot or Tracked, in any combination.
    matrix
        W, shape (..., p, q), or a pair P (..., p, k), Q (..., q, k).
    left_damping, right_damping
        λ_G, λ_A > 0: numbers, or tensors of batch shape.
    left_tail, right_tail
        τ of each factor, as in `damped_solve`.

    Returns
    -------
    Tensor or tuple of Tensor
        Of the shape of ``matrix``; a pair for a pair.

    Raises
    ------
    ValueError, TypeError
        For shapes, values, dtypes and devices that do not fit, before anything is computed.

    Notes
    -----
    For W, (τ_G + λ_G)(τ_A + λ_A) and its inverse must be in the range of the dtype; a pair has no such limit.
    The basis and the data of either side of a pair, or the left basis and W, may be DTensors sharded on their rows:
    ``docs/sharded.md``.

    References
    ----------
    J. Martens, R. Grosse, ICML 2015, for the two-sided form; the pair form: ``docs/damped.md``.
    """
    solution: Data = check_kron(
        left, right, matrix, left_damping, right_damping, left_tail=left_tail, right_tail=right_tail
    ).solution()
    return solution


class Shifted(NamedTuple):
    """β (I + U Z Uᵀ) for the tall matrix U of one factor, of a batch, or of a list of factors with Z and β stacked."""

    basis: Tall
    middle: Tensor  # Z: [..., r] where diagonal, else [..., r, r]
    scale: Tensor  # β: batch shape

    def __matmul__(self, rhs: Tall) -> Tall:
        batch = _batch_of(self, rhs)
        return damped_apply(*self.expand(batch), _expand(rhs, batch))

    def on(self, rhs: Tall, rows: Rows) -> Any:
        """Return the product with a right-hand side of which these rows are here."""
        if rows is WHOLE:
            return self @ rhs
        batch = _batch_of(self, rhs)
        basis, middle, scale = self.expand(batch)
        rhs, middle, scale = _expand(rhs, batch), rows.shared(middle), rows.shared(scale)
        coefficients = rows.total(project(basis, rhs))
        inner = middle[..., None] * coefficients if middle.ndim < basis.ndim else middle @ coefficients
        return scale[..., None, None] * (rhs + basis @ inner)

    def expand(self, batch: tuple[int, ...] | None) -> Shifted:
        """Repeat the operator over a batch shape, as a view."""
        if batch is None:
            return self
        middle = self.middle.expand(*batch, *self.middle.shape[self.basis.ndim - 2 :])
        return Shifted(_expand(self.basis, batch), middle, self.scale.expand(batch))


def _batch_of(*parts: Shifted | Tall) -> tuple[int, ...] | None:
    """Return the batch shape to repeat the parts over, or None where all have it already."""
    matrices = [part.basis if isinstance(part, Shifted) else part for part in parts]
    if isinstance(matrices[0], list) or len({matrix.shape[:-2] for matrix in matrices}) == 1:
        return None
    return tuple(torch.broadcast_shapes(*(matrix.shape[:-2] for matrix in matrices)))


def _expand(matrix: Tall, batch: tuple[int, ...] | None) -> Tall:
    return matrix if batch is None else matrix.expand(*batch, *matrix.shape[-2:])


class Side(NamedTuple):
    """A factor and its shift: of one factor, of a batch, or of a list with all but its tall matrices stacked."""

    factor: Factor
    damping: Number
    tail: Number | None  # None stands for "smallest"

    def operator(self, exponent: float = -1.0) -> Shifted:
        """(M̂ + τ(I − P) + λI)^p = β (I + U Z Uᵀ) with β = (τ + λ)^p and Z = ((d + λ)/(τ + λ))^p − 1.

        No difference of two powers is formed. Of a root, whose columns along eigenvectors of S are √d times unit ones,
        Z is divided by d, and 0 for every d up to τ; for p = −1 and τ = 0 that is −(S + λI)⁻¹.
        """
        small, basis = parts_of(self.factor)
        damping, tail, is_root = self.damping, self.tail, isinstance(self.factor, LowRankRoot)
        values, vectors = small, None
        if is_root and _is_diagonal(small):
            values = small.diagonal(dim1=-2, dim2=-1)
        elif is_root and exponent == -1 and isinstance(tail, float) and tail == 0:
            return Shifted(basis, -_inverse_of(small, damping), self._filled(1 / damping))
        elif is_root:
            values, vectors = safe_eigh((small + small.mT) / 2)
        if tail is None:
            tail = values.amin(-1) if values.shape[-1] else values.new_zeros(values.shape[:-1])
        shift, missing = tail + damping, _over(tail) - values
        if exponent == -1:
            middle = (missing.clamp_max(0) if is_root else missing) / (values + _over(damping))
        else:
            # At d = τ clamp_max passes the derivative on and relu does not: the difference has it once.
            grown = torch.log1p(-missing.clamp_max(0) / _over(shift))
            shrunk = 0.0 if is_root else torch.log1p(missing.relu() / (values + _over(damping)))
            middle = torch.expm1(exponent * (grown - shrunk))
        if is_root:
            middle = middle / torch.where(values > 0, values, 1)
        if vectors is not None:
            middle = (vectors * middle[..., None, :]) @ vectors.mT
        return Shifted(basis, middle, self._filled(1 / shift) if exponent == -1 else self._filled(shift) ** exponent)

    def _filled(self, value: Number) -> Tensor:
        """Return a number as a tensor of the factor's batch shape."""
        small = parts_of(self.factor)[0]
        batch = small.shape[:-2] if isinstance(self.factor, LowRankRoot) else small.shape[:-1]
        if isinstance(value, Tensor):
            return value if value.shape == batch else value.expand(batch)
        return torch.full(batch, value, dtype=small.dtype, device=small.device)


def stack(sides: Sequence[Side]) -> Side:
    """Join sides whose factors are of one kind and rank."""
    factors, dampings, tails = zip(*sides, strict=True)
    smalls, bases = zip(*map(parts_of, factors), strict=True)
    small = torch.stack(smalls)
    tail = None if tails[0] is None else stack_numbers(tails, small)
    return Side(of_parts(type(factors[0]), small, list(bases)), stack_numbers(dampings, small), tail)


def _is_diagonal(gram: Tensor) -> bool:
    """Say whether S is diagonal, as `root_update` leaves it; not where looking at it would wait for a device."""
    if not reads_are_free(gram) or gram.requires_grad:
        return False
    return torch.equal(gram, torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1)))


def _inverse_of(gram: Tensor, damping: Number) -> Tensor:
    """(S + λI)⁻¹; where rounding left S + λI not positive definite, NaN and never a wrong number."""
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    lower, info = torch.linalg.cholesky_ex((gram + gram.mT) / 2 + _over(damping, 2) * identity)
    return torch.cholesky_inverse(torch.where((info == 0)[..., None, None], lower, float("nan")))


def _over(value: Number, dims: int = 1) -> Number:
    """Give a tensor of batch shape trailing dimensions to broadcast over; a number needs none."""
    return value[(..., *[None] * dims)] if isinstance(value, Tensor) else value


class Solve(NamedTuple):
    """Arguments of a damped application that fit together."""

    side: Side
    block: Tensor
    vector: bool
    exponent: float
    rows: Rows  # which rows of the tall matrices are here

    def solution(self) -> Tensor:
        """Apply the operator."""
        return self.shaped(self.side.operator(self.exponent).on(self.block, self.rows))

    def shaped(self, block: Tensor) -> Tensor:
        """Return the result in the shape and of the kind of the right-hand side."""
        return self.rows.tall_result(block[..., 0], -1) if self.vector else self.rows.tall_result(block)


def solve_together(problems: Sequence[Solve]) -> list[Tensor]:
    """Apply operators of one kind, rank and exponent, each to its block."""
    operator = stack([problem.side for problem in problems]).operator(problems[0].exponent)
    blocks = operator @ [problem.block for problem in problems]
    return [problem.shaped(block) for problem, block in zip(problems, blocks, strict=True)]


class Kron(NamedTuple):
    """Arguments of a two-sided damped application that fit together."""

    left: Side
    right: Side
    data: Tensor | tuple[Tensor, Tensor]
    rows: tuple[Rows, Rows]  # which rows of the tall matrices of each side are here

    def solution(self) -> Any:
        """Apply both operators to W, or each to its side of a pair."""
        (left_rows, right_rows), left, right = self.rows, self.left.operator(), self.right.operator()
        if isinstance(self.data, tuple):
            first, second = left.on(self.data[0], left_rows), right.on(self.data[1], right_rows)
            return left_rows.tall_result(first), right_rows.tall_result(second)
        if left_rows is WHOLE:
            batch = _batch_of(left, right, self.data)
            return kron_damped_apply(*left.expand(batch), *right.expand(batch), _expand(self.data, batch))
        right = Shifted(*map(left_rows.shared, right))
        return left_rows.tall_result(left.on((right @ self.data.mT).mT, left_rows))


def kron_together(problems: Sequence[Kron]) -> list[Any]:
    """Apply pairs of operators of one kind and rank, each to its W or to its pair."""
    left = stack([problem.left for problem in problems]).operator()
    right = stack([problem.right for problem in problems]).operator()
    data: Any = [problem.data for problem in problems]
    if isinstance(data[0], Tensor):
        return list(kron_damped_apply(*left, *right, data))
    first, second = zip(*data, strict=True)
    return list(zip(left @ list(first), right @ list(second), strict=True))


def check_solve(
    function: str, lowrank: LowRank, rhs: Tensor, damping: Number, exponent: float = -1.0, *, tail: Tail = 0.0
) -> Solve:
    """Check what every damped application takes."""
    factor, rows = _check_factor(function, "lowrank", lowrank)
    rows.admit(function, "rhs", rhs)
    basis = parts_of(factor)[1]
    block = _check.matching_data(function, "rhs", rhs, "lowrank", basis)
    vector = rhs.ndim == 1 or (rhs.ndim == basis.ndim - 1 and rhs.shape == basis.shape[:-1])
    block = block[..., None] if vector else block
    if rhs.ndim == 0 or block.shape[-2] != factor.n:
        rule = f"rhs must have n = {factor.n} rows, as lowrank does"
        _check.fail_value(function, f"{rule}; got shape {tuple(rhs.shape)}")
    _check_batch(function, "rhs", block, basis)
    side = _check_side(function, ("lowrank", "damping", "tail"), lowrank, damping, tail, rows)
    if isinstance(exponent, bool) or not isinstance(exponent, (int, float)):
        _check.fail_type(function, f"exponent must be a number; got {type(exponent).__name__}")
    if not abs(exponent) < float("inf"):
        _check.fail_value(function, f"exponent must be finite; got {exponent}")
    return Solve(side, rows.local(function, "rhs", block), vector, float(exponent), rows)


def check_kron(
    left: LowRank,
    right: LowRank,
    matrix: Tensor | tuple[Tensor, Tensor],
    left_damping: Number,
    right_damping: Number,
    *,
    left_tail: Tail,
    right_tail: Tail,
) -> Kron:
    """Check the arguments of `kron_damped_solve`."""
    function = "kron_damped_solve"
    left_factor, left_rows = _check_factor(function, "left", left)
    right_factor, right_rows = _check_factor(function, "right", right)
    bases, rows = (parts_of(left_factor)[1], parts_of(right_factor)[1]), (left_rows, right_rows)
    _check.together(function, "right", bases[1], "left", bases[0])
    check_data = _check_matrix if isinstance(matrix, Tensor) else _check_pair
    data = check_data(function, matrix, bases, rows)
    return Kron(
        _check_side(function, ("left", "left_damping", "left_tail"), left, left_damping, left_tail, left_rows),
        _check_side(function, ("right", "right_damping", "right_tail"), right, right_damping, right_tail, right_rows),
        data,
        rows,
    )


def _check_factor(function: str, name: str, lowrank: LowRank) -> tuple[Factor, Rows]:
    factor = lowrank.lowrank if isinstance(lowrank, Tracked) else lowrank
    if isinstance(factor, LowRankEigh):
        _check.eigh(function, name, factor)
    elif isinstance(factor, LowRankRoot):
        _check.root(function, name, factor)
    else:
        _check.fail_type(function, f"{name} must be a LowRankEigh or a LowRankRoot; got {type(lowrank).__name__}")
    small, basis = parts_of(factor)
    return factor, rows_of(function, f"{name}.{NAMES[type(factor)][1]}", basis, small)


def _check_side(
    function: str, names: tuple[str, str, str], lowrank: LowRank, damping: Number, tail: Tail, rows: Rows
) -> Side:
    """Check λ and τ, and return them beside what is here of a factor that has been checked."""
    factor: Factor = lowrank.lowrank if isinstance(lowrank, Tracked) else lowrank
    name, damping_name, tail_name = names
    small_name, basis_name = NAMES[type(factor)]
    small, basis = parts_of(factor)
    damping = rows.small(function, damping_name, damping)
    damping = _check.scalar(function, damping_name, damping, "the factor", basis, positive=True)
    given: Number | None
    if not isinstance(tail, str):
        given = _check.scalar(function, tail_name, rows.small(function, tail_name, tail), "the factor", basis)
    elif tail == "smallest":
        given = None
    elif tail != "mean":
        rule = f"{tail_name} must be a number, a tensor, 'mean' or 'smallest'"
        _check.fail_value(function, f"{rule}; got {tail!r}")
    elif not isinstance(lowrank, Tracked):
        rule = f"{tail_name}='mean' needs a Tracked factor, which carries the trace"
        _check.fail_value(function, f"{rule}; got a {type(lowrank).__name__}; start the stream with brandla.track")
    else:
        _check.tracked(function, "trace", lowrank.trace, "the factor", basis)
        given = _mean_left_out(factor, rows.small(function, "trace", lowrank.trace), rows)
    small = rows.small(function, f"{name}.{small_name}", small)
    basis = rows.local(function, f"{name}.{basis_name}", basis)
    return Side(factor if rows is WHOLE else of_parts(type(factor), small, basis), damping, given)


def _mean_left_out(factor: Factor, trace: Tensor, rows: Rows) -> Tensor:
    """(tr M − tr M̂)/(n − r): the mean of the eigenvalues that the factor does not hold; 0 where it holds all."""
    small = rows.small("tail", "the factor", parts_of(factor)[0])
    held = small.sum(-1) if isinstance(factor, LowRankEigh) else small.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (trace - held).clamp_min(0) / max(factor.n - factor.rank, 1) * (factor.n > factor.rank)


def _check_batch(function: str, name: str, block: Tensor, basis: Tensor, whose: str = "the factor's") -> None:
    if block.shape[:-2] == basis.shape[:-2]:
        return
    try:
        torch.broadcast_shapes(block.shape[:-2], basis.shape[:-2])
    except RuntimeError:
        rule = f"batch shape of {name} must broadcast with {whose}, {tuple(basis.shape[:-2])}"
        _check.fail_value(function, f"{rule}; got {tuple(block.shape[:-2])}")


def _check_matrix(function: str, matrix: Any, bases: tuple[Tensor, Tensor], rows: tuple[Rows, Rows]) -> Tensor:
    """Check W beside the bases of both sides, and return what is here of it."""
    left, right = bases
    p, q = left.shape[-2], right.shape[-2]
    if rows[1] is not WHOLE:
        rule = "right must hold plain tensors where matrix is one W, which is sharded on its rows alone"
        _check.fail_value(function, f"{rule}; got a DTensor basis; take its .full_tensor(), or pass a pair (P, Q)")
    rows[0].admit(function, "matrix", matrix)
    data = _check.matching_data(function, "matrix", matrix, "left", left)
    if matrix.ndim < 2 or tuple(matrix.shape[-2:]) != (p, q):
        rule = f"matrix must have shape (..., {p}, {q}), the orders of left and right"
        _check.fail_value(function, f"{rule}; got {tuple(matrix.shape)}")
    _check_batch(function, "matrix", data, left)
    _check_batch(function, "matrix", data, right)
    _check_batch(function, "right", right, left, "left's")
    return rows[0].local(function, "matrix", data)


def _check_pair(
    function: str, pair: Any, bases: tuple[Tensor, Tensor], rows: tuple[Rows, Rows]
) -> tuple[Tensor, Tensor]:
    """Check P and Q, each beside the basis of its side, and return what is here of them."""
    if not isinstance(pair, tuple) or len(pair) != 2:
        _check.fail_type(function, f"matrix must be a tensor or a pair (P, Q); got {type(pair).__name__}")
    for name, given, own in zip(("P", "Q"), pair, rows, strict=True):
        own.admit(function, name, given)
    first = _check.matching_data(function, "P", pair[0], "left", bases[0])
    second = _check.matching_data(function, "Q", pair[1], "right", bases[1])
    (p, q), seen = (basis.shape[-2] for basis in bases), f"{tuple(first.shape)} and {tuple(second.shape)}"
    if first.ndim < 2 or second.ndim < 2 or first.shape[-2] != p or second.shape[-2] != q:
        _check.fail_value(function, f"the pair (P, Q) must have shapes (..., {p}, k) and (..., {q}, k); got {seen}")
    if first.shape[-1] != second.shape[-1]:
        rule = "P and Q must have the same number k of columns"
        _check.fail_value(function, f"{rule}; got {first.shape[-1]} and {second.shape[-1]}")
    _check_batch(function, "P", first, bases[0])
    _check_batch(function, "Q", second, bases[1])
    return rows[0].local(function, "P", first), rows[1].local(function, "Q", second)
