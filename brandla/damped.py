"""Damped application: (M̂ + τ(I − P) + λI) to any power, times a block of vectors, in O(n r) a vector.

M̂ is U diag(d) Uᵀ or F Fᵀ, and P the projector on its range.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from brandla import _check
from brandla._ranges import ranged
from brandla._sharded import WHOLE, Rows, rows_of
from brandla._small import safe_eigh
from brandla.lowrank import LowRankEigh, LowRankRoot, Tracked
from brandla_kernels import Tall, damped_apply, kron_damped_apply, project, reads_are_free

Factor = LowRankEigh | LowRankRoot
LowRank = Factor | Tracked[LowRankEigh] | Tracked[LowRankRoot]
Number = float | Tensor
Tail = Number | Literal["mean", "smallest"]


class Shifted(NamedTuple):
    """β I + U H Uᵀ for U or F, of one factor, of a batch, or of a list of factors with H and β stacked."""

    basis: Tall
    middle: Tensor  # H: [..., r] where diagonal, else [..., r, r]
    complement: Tensor  # β: batch shape

    def __matmul__(self, rhs: Tall) -> Tall:
        batch = _batch_of(self, rhs)
        return damped_apply(*self.expand(batch), _expand(rhs, batch))

    def on(self, rhs: Tall, rows: Rows) -> Tall:
        """Return the product with a right-hand side of which these rows are here."""
        if rows is WHOLE:
            return self @ rhs
        batch = _batch_of(self, rhs)
        basis, middle, complement = self.expand(batch)
        rhs = _expand(rhs, batch)
        middle, complement = rows.shared(middle), rows.shared(complement)
        coefficients = rows.total(project(basis, rhs))
        diagonal = middle.ndim < basis.ndim
        inner = middle[..., None] * coefficients if diagonal else middle @ coefficients
        return complement[..., None, None] * rhs + basis @ inner

    def expand(self, batch: tuple[int, ...] | None) -> Shifted:
        """Repeat the operator over a batch shape, as a view."""
        if batch is None:
            return self
        middle = self.middle.expand(*batch, *self.middle.shape[self.basis.ndim - 2 :])
        return Shifted(_expand(self.basis, batch), middle, self.complement.expand(batch))


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
    problem = check_solve("damped_solve", lowrank, rhs, damping, tail)
    return problem.solution(inverse(problem.factor, *problem.shift))


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
    problem = check_solve("damped_power", lowrank, rhs, damping, tail)
    check_exponent(exponent)
    return problem.solution(power(problem.factor, *problem.shift, float(exponent)))


@overload
def kron_damped_solve(
    left: LowRank,
    right: LowRank,
    matrix: Tensor,
    left_damping: float | Tensor,
    right_damping: float | Tensor,
    *,
    left_tail: Tail = ...,
    right_tail: Tail = ...,
) -> Tensor: ...


@overload
def kron_damped_solve(
    left: LowRank,
    right: LowRank,
    matrix: tuple[Tensor, Tensor],
    left_damping: float | Tensor,
    right_damping: float | Tensor,
    *,
    left_tail: Tail = ...,
    right_tail: Tail = ...,
) -> tuple[Tensor, Tensor]: ...


@ranged("p,a", "q,b", "p,q")
def kron_damped_solve(
    left: LowRank,
    right: LowRank,
    matrix: Tensor | tuple[Tensor, Tensor],
    left_damping: float | Tensor,
    right_damping: float | Tensor,
    *,
    left_tail: Tail = 0.0,
    right_tail: Tail = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
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
    problem = check_kron(left, right, matrix, (left_damping, left_tail), (right_damping, right_tail))
    return problem.solution(inverse(*problem.left), inverse(*problem.right))


class Solve(NamedTuple):
    """Arguments of a damped application that fit together."""

    factor: Factor
    block: Tensor
    vector: bool
    shift: tuple[Number, Number | None]
    rows: Rows  # which rows of the tall matrices are here

    def solution(self, operator: Shifted) -> Tensor:
        """Apply the operator."""
        return self.shaped(operator.on(self.block, self.rows))

    def shaped(self, block: Tensor) -> Tensor:
        """Return the result in the shape and of the kind of the right-hand side."""
        return self.rows.tall_result(block[..., 0], -1) if self.vector else self.rows.tall_result(block)


class Kron(NamedTuple):
    """Arguments of a two-sided damped application that fit together: factor, λ and τ of each side, and the data."""

    left: tuple[Factor, Number, Number | None]
    right: tuple[Factor, Number, Number | None]
    data: Tensor | tuple[Tensor, Tensor]
    rows: tuple[Rows, Rows]  # which rows of the tall matrices of each side are here

    def solution(self, left: Shifted, right: Shifted) -> Tensor | tuple[Tensor, Tensor]:
        """Apply both operators to W, or each to its side of a pair."""
        left_rows, right_rows = self.rows
        if isinstance(self.data, tuple):
            first, second = left.on(self.data[0], left_rows), right.on(self.data[1], right_rows)
            return left_rows.tall_result(first), right_rows.tall_result(second)
        if left_rows is WHOLE:
            applied: Tensor = kron_apply(left, right, self.data)
            return applied
        right = Shifted(*map(left_rows.shared, right))
        return left_rows.tall_result(left.on((right @ self.data.mT).mT, left_rows))


def check_solve(function: str, lowrank: LowRank, rhs: Tensor, damping: float | Tensor, tail: Tail) -> Solve:
    """Check what every damped application takes."""
    factor, rows = _check_factor(function, "lowrank", lowrank)
    rows.admit(function, "rhs", rhs)
    block, vector = _check_rhs(function, "rhs", rhs, factor, rows)
    shift = _check_shift(function, ("damping", "tail"), lowrank, damping, tail, rows)
    return Solve(_local(function, "lowrank", factor, rows), block, vector, shift, rows)


def check_exponent(exponent: float) -> None:
    """Check the exponent of `damped_power`."""
    if isinstance(exponent, bool) or not isinstance(exponent, (int, float)):
        _check.fail_type("damped_power", f"exponent must be a number; got {type(exponent).__name__}")
    if not abs(exponent) < float("inf"):
        _check.fail_value("damped_power", f"exponent must be finite; got {exponent}")


def check_kron(
    left: LowRank,
    right: LowRank,
    matrix: Tensor | tuple[Tensor, Tensor],
    left_shift: tuple[float | Tensor, Tail],
    right_shift: tuple[float | Tensor, Tail],
) -> Kron:
    """Check the arguments of `kron_damped_solve`."""
    function = "kron_damped_solve"
    left_factor, left_rows = _check_factor(function, "left", left)
    right_factor, right_rows = _check_factor(function, "right", right)
    _check.together(function, "right", basis_of(right_factor), "left", basis_of(left_factor))
    data = _check_kron_data(function, matrix, left_factor, right_factor, (left_rows, right_rows))
    left_checked = _check_shift(function, ("left_damping", "left_tail"), left, *left_shift, left_rows)
    right_checked = _check_shift(function, ("right_damping", "right_tail"), right, *right_shift, right_rows)
    return Kron(
        (_local(function, "left", left_factor, left_rows), *left_checked),
        (_local(function, "right", right_factor, right_rows), *right_checked),
        data,
        (left_rows, right_rows),
    )


def kron_apply(left: Shifted, right: Shifted, data: Tall | tuple[Tall, Tall]) -> Any:
    """Apply both operators to W, or each to its side of a pair."""
    if isinstance(data, tuple):
        return left @ data[0], right @ data[1]
    batch = _batch_of(left, right, data)
    return kron_damped_apply(*left.expand(batch), *right.expand(batch), _expand(data, batch))


def _batch_of(*parts: Shifted | Tall) -> tuple[int, ...] | None:
    """Return the batch shape to repeat the parts over, or None where all have it already."""
    matrices = [part.basis if isinstance(part, Shifted) else part for part in parts]
    if isinstance(matrices[0], list) or len({matrix.shape[:-2] for matrix in matrices}) == 1:
        return None
    return tuple(torch.broadcast_shapes(*(matrix.shape[:-2] for matrix in matrices)))


def _expand(matrix: Tall, batch: tuple[int, ...] | None) -> Tall:
    return matrix if batch is None else matrix.expand(*batch, *matrix.shape[-2:])


def inverse(factor: Factor, damping: Number, tail: Number | None) -> Shifted:
    """β = 1/(τ + λ), and H = (d + λ)⁻¹ (τ − d) β, written without the difference of two reciprocals.

    Of a root, whose columns along eigenvectors of S are √d times unit ones, H = −β max(d − τ, 0) / (d (d + λ)), and
    with τ = 0 that is −β (S + λI)⁻¹.
    """
    if isinstance(factor, LowRankRoot) and not _is_of_order_one(factor.gram, damping):
        return _inverse_of_any_size(factor, damping, tail)
    return _inverse(factor, damping, tail)


def _inverse_of_any_size(root: LowRankRoot, damping: Number, tail: Number | None) -> Shifted:
    """`inverse` by way of c² M of order one, c a power of two: the H of M itself, of order 1/d², leaves the range."""
    size = root.gram.detach().diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(damping)
    unit = torch.exp2((torch.log2(size) / -2).round())
    square = unit * unit
    # Of a list of roots F is a list too, and S is stacked.
    basis: Any = root.root
    if isinstance(basis, list):
        basis = [own * each for own, each in zip(basis, unit.unbind(), strict=True)]
    else:
        basis = basis * _over(unit, 2)
    scaled = LowRankRoot(basis, root.gram * _over(square, 2))
    tail = tail * square if tail is not None and _is_given(tail) else tail
    _, middle, complement = _inverse(scaled, damping * square, tail)
    return Shifted(basis, middle * _over(square, middle.ndim - square.ndim), complement * square)


def _is_of_order_one(gram: Tensor, damping: Number) -> bool:
    """Say whether d₁ and λ are so; not where looking at them would wait for a device."""
    if gram.shape[-1] == 0:
        return True
    if not reads_are_free(gram):
        return False
    low, high = gram.detach().diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(damping).aminmax()
    return bool(low > 2**-40) and bool(high < 2**40)


def _inverse(factor: Factor, damping: Number, tail: Number | None) -> Shifted:
    """`inverse` where no square of an eigenvalue is out of range."""
    if isinstance(factor, LowRankRoot) and isinstance(tail, float) and tail == 0 and not _is_diagonal(factor.gram):
        middle = -_inverse_of(factor.gram, damping) / _over(damping, 2)
        return Shifted(factor.root, middle, _filled(1 / damping, factor))
    values, vectors = _pairs(factor)
    tail = _smallest(values) if tail is None else tail
    complement = 1 / (tail + damping)
    if isinstance(factor, LowRankEigh):
        middle = (_over(tail) - values) / (values + _over(damping)) * _over(complement)
    else:
        held = (values - _over(tail)).clamp_min(0) / torch.where(values > 0, values, 1) if _is_given(tail) else 1.0
        middle = -held / (values + _over(damping)) * _over(complement)
    return Shifted(basis_of(factor), _turned(middle, vectors), _filled(complement, factor))


def power(factor: Factor, damping: Number, tail: Number | None, exponent: float) -> Shifted:
    """β = (τ + λ)^p and H = (d + λ)^p − β, as β·expm1(p·log((d + λ)/(τ + λ))), the logarithm from d − τ.

    Of a root H is divided by d, and 0 for every d up to τ.
    """
    values, vectors = _pairs(factor)
    tail = _smallest(values) if tail is None else tail
    complement = _filled(tail + damping, factor) ** exponent
    # At d = τ clamp_min passes the derivative on and relu does not: the difference has it once.
    above = torch.log1p((values - _over(tail)).clamp_min(0) / _over(tail + damping))
    below = torch.log1p((_over(tail) - values).relu() / (values + _over(damping)))
    if isinstance(factor, LowRankEigh):
        middle = torch.expm1(exponent * (above - below))
    else:
        middle = torch.expm1(exponent * above) / torch.where(values > 0, values, 1)
    return Shifted(basis_of(factor), _turned(complement[..., None] * middle, vectors), complement)


def _pairs(factor: Factor) -> tuple[Tensor, Tensor | None]:
    """Return d, and the eigenvectors of S where it is not diagonal."""
    if isinstance(factor, LowRankEigh):
        return factor.eigenvalues, None
    if _is_diagonal(factor.gram):
        return factor.gram.diagonal(dim1=-2, dim2=-1), None
    return safe_eigh((factor.gram + factor.gram.mT) / 2)


def _is_diagonal(gram: Tensor) -> bool:
    """Say whether S is diagonal, as `root_update` leaves it; not where looking at it would wait for a device."""
    if not reads_are_free(gram) or gram.requires_grad:
        return False
    return torch.equal(gram, torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1)))


def _turned(middle: Tensor, vectors: Tensor | None) -> Tensor:
    """Return V diag(H) Vᵀ, or H where V is I."""
    return middle if vectors is None else (vectors * middle[..., None, :]) @ vectors.mT


def _is_given(tail: Number) -> bool:
    return isinstance(tail, Tensor) or tail != 0


def _inverse_of(gram: Tensor, damping: Number) -> Tensor:
    """(S + λI)⁻¹; where rounding left S + λI not positive definite, NaN and never a wrong number."""
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    lower, info = torch.linalg.cholesky_ex((gram + gram.mT) / 2 + _over(damping, 2) * identity)
    return torch.cholesky_inverse(torch.where((info == 0)[..., None, None], lower, float("nan")))


def _smallest(values: Tensor) -> Tensor:
    return values.amin(-1) if values.shape[-1] else values.new_zeros(values.shape[:-1])


def small_of(factor: Factor) -> Tensor:
    """Return d or S."""
    return factor.eigenvalues if isinstance(factor, LowRankEigh) else factor.gram


def basis_of(factor: Factor) -> Tensor:
    """Return U or F."""
    return factor.eigenvectors if isinstance(factor, LowRankEigh) else factor.root


def of_parts(kind: type[Factor], small: Tensor, basis: Tall) -> Factor:
    """Return a factor of this kind."""
    return LowRankEigh(small, basis) if kind is LowRankEigh else LowRankRoot(basis, small)


def _batch_shape(factor: Factor) -> tuple[int, ...]:
    """Batch shape of a factor, from what is stacked for a list."""
    small = small_of(factor)
    return tuple(small.shape[: -1 if isinstance(factor, LowRankEigh) else -2])


def _check_factor(function: str, name: str, lowrank: LowRank) -> tuple[Factor, Rows]:
    factor = lowrank.lowrank if isinstance(lowrank, Tracked) else lowrank
    if isinstance(factor, LowRankEigh):
        _check.eigh(function, name, factor)
    elif isinstance(factor, LowRankRoot):
        _check.root(function, name, factor)
    else:
        _check.fail_type(function, f"{name} must be a LowRankEigh or a LowRankRoot; got {type(lowrank).__name__}")
    return factor, rows_of(function, f"{name}.{_tall_name(factor)}", basis_of(factor), small_of(factor))


def _tall_name(factor: Factor) -> str:
    return "eigenvectors" if isinstance(factor, LowRankEigh) else "root"


def _local(function: str, name: str, factor: Factor, rows: Rows) -> Factor:
    """Return a factor of what this process holds."""
    small_name = "eigenvalues" if isinstance(factor, LowRankEigh) else "gram"
    small = rows.small(function, f"{name}.{small_name}", small_of(factor))
    if rows is WHOLE:
        return factor
    return of_parts(type(factor), small, rows.local(function, f"{name}.{_tall_name(factor)}", basis_of(factor)))


def _check_rhs(function: str, name: str, rhs: Tensor, factor: Factor, rows: Rows) -> tuple[Tensor, bool]:
    """Return the right-hand side as a block (..., n, m), and whether it was a vector."""
    basis = basis_of(factor)
    converted = _check.matching_data(function, name, rhs, "lowrank", basis)
    vector = rhs.ndim == 1 or (rhs.ndim == basis.ndim - 1 and rhs.shape == basis.shape[:-1])
    block = converted[..., None] if vector else converted
    n = basis.shape[-2]
    if rhs.ndim == 0 or block.shape[-2] != n:
        _check.fail_value(function, f"{name} must have n = {n} rows, as lowrank does; got shape {tuple(rhs.shape)}")
    _check_batch(function, name, block, basis)
    return rows.local(function, name, block), vector


def _check_batch(function: str, name: str, block: Tensor, basis: Tensor, whose: str = "the factor's") -> None:
    if block.shape[:-2] == basis.shape[:-2]:
        return
    try:
        torch.broadcast_shapes(block.shape[:-2], basis.shape[:-2])
    except RuntimeError:
        rule = f"batch shape of {name} must broadcast with {whose}, {tuple(basis.shape[:-2])}"
        _check.fail_value(function, f"{rule}; got {tuple(block.shape[:-2])}")


def _check_shift(
    function: str, names: tuple[str, str], lowrank: LowRank, damping: float | Tensor, tail: Tail, rows: Rows
) -> tuple[Number, Number | None]:
    """Return λ and τ, numbers or tensors that broadcast with the batch shape; None stands for "smallest"."""
    factor: Factor = lowrank.lowrank if isinstance(lowrank, Tracked) else lowrank
    basis = basis_of(factor)
    damping = rows.small(function, names[0], damping)
    damping = _check.scalar(function, names[0], damping, "the factor", basis, positive=True)
    if not isinstance(tail, str):
        return damping, _check.scalar(function, names[1], rows.small(function, names[1], tail), "the factor", basis)
    if tail == "smallest":
        return damping, None
    if tail != "mean":
        _check.fail_value(function, f"{names[1]} must be a number, a tensor, 'mean' or 'smallest'; got {tail!r}")
    if not isinstance(lowrank, Tracked):
        rule = f"{names[1]}='mean' needs a Tracked factor, which carries the trace"
        _check.fail_value(function, f"{rule}; got a {type(lowrank).__name__}; start the stream with brandla.track")
    _check.tracked(function, "trace", lowrank.trace, "the factor", basis)
    return damping, _mean_left_out(factor, rows.small(function, "trace", lowrank.trace), rows)


def _mean_left_out(factor: Factor, trace: Tensor, rows: Rows) -> Tensor:
    """(tr M − tr M̂)/(n − r): the mean of the eigenvalues that the factor does not hold; 0 where it holds all."""
    small = rows.small("tail", "the factor", small_of(factor))
    held = small.sum(-1) if isinstance(factor, LowRankEigh) else small.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (trace - held).clamp_min(0) / max(factor.n - factor.rank, 1) * (factor.n > factor.rank)


def _over(value: Number, dims: int = 1) -> Number:
    """Give a tensor of batch shape trailing dimensions to broadcast over; a number needs none."""
    return value[(..., *[None] * dims)] if isinstance(value, Tensor) else value


def _filled(value: Number, factor: Factor) -> Tensor:
    """Return a number as a tensor of the factor's batch shape."""
    batch = _batch_shape(factor)
    if isinstance(value, Tensor):
        return value if value.shape == batch else value.expand(batch)
    small = small_of(factor)
    return torch.full(batch, value, dtype=small.dtype, device=small.device)


def _check_kron_data(
    function: str,
    matrix: Tensor | tuple[Tensor, Tensor],
    left: Factor,
    right: Factor,
    rows: tuple[Rows, Rows],
) -> Tensor | tuple[Tensor, Tensor]:
    p, q = left.n, right.n
    if isinstance(matrix, Tensor):
        if rows[1] is not WHOLE:
            rule = "right must hold plain tensors where matrix is one W, which is sharded on its rows alone"
            _check.fail_value(function, f"{rule}; got a DTensor basis; take its .full_tensor(), or pass a pair (P, Q)")
        rows[0].admit(function, "matrix", matrix)
        data = _check.matching_data(function, "matrix", matrix, "left", basis_of(left))
        if matrix.ndim < 2 or tuple(matrix.shape[-2:]) != (p, q):
            rule = f"matrix must have shape (..., {p}, {q}), the orders of left and right"
            _check.fail_value(function, f"{rule}; got {tuple(matrix.shape)}")
        _check_batch(function, "matrix", data, basis_of(left))
        _check_batch(function, "matrix", data, basis_of(right))
        _check_batch(function, "right", basis_of(right), basis_of(left), "left's")
        return rows[0].local(function, "matrix", data)
    pair: object = matrix
    if not isinstance(pair, tuple) or len(pair) != 2:
        _check.fail_type(function, f"matrix must be a tensor or a pair (P, Q); got {type(matrix).__name__}")
    first, second = matrix
    rows[0].admit(function, "P", first)
    rows[1].admit(function, "Q", second)
    first = _check.matching_data(function, "P", first, "left", basis_of(left))
    second = _check.matching_data(function, "Q", second, "right", basis_of(right))
    if first.ndim < 2 or second.ndim < 2 or first.shape[-2] != p or second.shape[-2] != q:
        rule = f"the pair (P, Q) must have shapes (..., {p}, k) and (..., {q}, k)"
        _check.fail_value(function, f"{rule}; got {tuple(first.shape)} and {tuple(second.shape)}")
    if first.shape[-1] != second.shape[-1]:
        rule = "P and Q must have the same number k of columns"
        _check.fail_value(function, f"{rule}; got {first.shape[-1]} and {second.shape[-1]}")
    _check_batch(function, "P", first, basis_of(left))
    _check_batch(function, "Q", second, basis_of(right))
    return rows[0].local(function, "P", first), rows[1].local(function, "Q", second)
