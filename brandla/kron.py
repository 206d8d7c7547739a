"""Damped application from both sides of a matrix: a Kronecker product with a damping for each factor, or a joint one.

G acts on the rows and A on the columns. Both are low-rank factors with tails, as in `brandla.damped`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import brandla_kernels as ops
from brandla import _check
from brandla._ranges import ranged
from brandla._sharded import UNSHARDED
from brandla._shifted import DampedFactor, LowRank, Shifted, Tail, broadcast_parts, check_damped_factor, join
from brandla.lowrank import Number, add_dims, stack_numbers
from brandla.orthonormal import times
from brandla_kernels import Tall
from brandla_kernels.damped_apply import scaled_sum

Data = TypeVar("Data", Tensor, tuple[Tensor, Tensor])


@ranged("p,a", "q,b", "p,q")
def kron_damped_solve(
    left: LowRank,
    right: LowRank,
    matrix: Data,
    left_damping: Number,
    right_damping: Number,
    *,
    left_tail: Tail = 0.0,
    right_tail: Tail = 0.0,
) -> Data:
    """(G + λ_G I)⁻¹ W (A + λ_A I)⁻¹ for low-rank G and A: the Kronecker-factored step.

    Equivalent to two dense solves of orders p and q, in 4pq(r_G + r_A) operations for W (p, q). A pair (P, Q) stands
    for W = P Qᵀ. Its result is a pair too, and the work is 4k(p r_G + q r_A): linear in the size of the layer.
    Differentiable in every tensor argument. Raises as `damped_solve` does.

    Parameters
    ----------
    left, right, left_tail, right_tail
        G of order p and A of order q, of the same or of different kinds, and τ of each, as in `damped_solve`.
    matrix
        W, shape (..., p, q), or a pair P (..., p, k), Q (..., q, k).
    left_damping, right_damping
        λ_G, λ_A > 0: numbers, or tensors of batch shape.

    Notes
    -----
    For W, (τ_G + λ_G)(τ_A + λ_A) and its inverse must be in the range of the dtype. The left basis and W, or either
    basis and its half of a pair, may be DTensors sharded on their rows: ``docs/sharded.md``. Source: J. Martens,
    R. Grosse, ICML 2015, for the two-sided form; ``docs/damped.md`` for the pair form.

    Examples
    --------
    >>> import torch, brandla
    >>> eigh = brandla.LowRankEigh(torch.tensor([3.0]), torch.eye(2, 1))
    >>> brandla.kron_damped_solve(eigh, eigh, torch.ones(2, 2), left_damping=1.0, right_damping=1.0)
    tensor([[0.0625, 0.2500],
            [0.2500, 1.0000]])
    """
    function, tails = "kron_damped_solve", {"left_tail": left_tail, "right_tail": right_tail}
    solution: Data = check_solve(function, left, right, matrix, left_damping, right_damping, **tails).solution()
    return solution


@ranged("p,a", "q,b", "p,q")
def kron_damped_power(
    left: LowRank,
    right: LowRank,
    matrix: Tensor,
    damping: Number,
    exponent: float,
    *,
    left_tail: Tail = 0.0,
    right_tail: Tail = 0.0,
    values: Tensor | None = None,
) -> Tensor:
    """Power of a damped Kronecker product, applied: (A ⊗ G + δI)^p W. G acts on the rows of W, A on its columns.

    Equivalent to the power of the operator W ↦ G W A + δW by a dense ``eigh`` of order pq, in 4pq(r_G + r_A)
    operations. p = −1 is the exact damped inverse of a Kronecker factor, which `kron_damped_solve` approximates.
    p = −1/2 whitens and p = 1/2 samples. Factors, tails and errors are as in `kron_damped_solve`.

    Parameters
    ----------
    matrix
        W, shape (..., p, q). A pair (P, Q) raises an error, because the result does not keep the pair's rank.
    damping, exponent
        δ > 0, a number or a tensor of batch shape, and any real number.
    values
        Shape (..., r_G, r_A), >= 0. They replace the products of eigenvalues gⱼ aᵢ in both spans, for example by second
        moments measured in that basis (EK-FAC, SOAP). Outside the spans, products and tails stay.

    Notes
    -----
    A LowRankRoot takes an eigendecomposition first, which waits for the device. Every value of a root up to τ, or
    not resolved, counts as τ. The derivative is right where a root's eigenvalues differ or are 0. Source: T. George, C.
    Laurent, X. Bouthillier, N. Ballas, P. Vincent, NeurIPS 2018, for fitted values. Derivation: ``docs/damped.md``.

    Examples
    --------
    >>> import torch, brandla
    >>> left = brandla.LowRankEigh(torch.tensor([3.0]), torch.eye(2, 1))
    >>> brandla.kron_damped_power(left, left, torch.ones(2, 2), damping=1.0, exponent=-1.0)
    tensor([[0.1000, 1.0000],
            [1.0000, 1.0000]])
    """
    tails = {"left_tail": left_tail, "right_tail": right_tail}
    return check_power("kron_damped_power", left, right, matrix, damping, exponent, **tails, values=values).result()


@ranged("p,a", "q,b")
def kron_damped_logdet(
    left: LowRank,
    right: LowRank,
    damping: Number,
    *,
    left_tail: Tail = 0.0,
    right_tail: Tail = 0.0,
    values: Tensor | None = None,
) -> Tensor:
    """Log-determinant of A ⊗ G + δI, of batch shape, for the evidence of a Laplace approximation.

    Equivalent to the sum of logarithms of all pq eigenvalues. Eigenvalues outside the spans are counted, not formed.
    Arguments are as in `kron_damped_power`, errors and derivatives as in `damped_logdet`.

    Examples
    --------
    >>> import torch, brandla
    >>> left = brandla.LowRankEigh(torch.tensor([3.0]), torch.eye(2, 1))
    >>> brandla.kron_damped_logdet(left, left, damping=1.0).exp()
    tensor(10.)
    """
    tails = {"left_tail": left_tail, "right_tail": right_tail}
    return check_joint("kron_damped_logdet", left, right, damping, **tails, values=values).logdet()


class Solve(NamedTuple):
    """Checked arguments of `kron_damped_solve`: one pair of factors, a batch, or a list."""

    left: DampedFactor
    right: DampedFactor
    data: Any  # W, or a pair (P, Q); beside lists of factors, a list of W, or a pair of lists

    def solution(self) -> Any:
        """Apply both operators to W, or each to its half of a pair."""
        data, left_sharding, right_sharding = self.data, self.left.sharding, self.right.sharding
        first, second = self.left.inverse(), self.right.inverse()
        if first is not None and second is not None:
            if not isinstance(data, tuple):
                return ops.kron_damped_inverse(*broadcast_parts(first, second, data))
            *left_parts, p = broadcast_parts(first, data[0])
            *right_parts, q = broadcast_parts(second, data[1])
            if left_parts[2].shape != right_parts[2].shape:  # sides of different batch shapes
                return first @ data[0], second @ data[1]
            operands = [*left_parts, *right_parts, p, q]
            return ops.pair_damped_inverse(*operands)
        left, right = self.left.stacked().operator(), self.right.stacked().operator()
        if isinstance(data, tuple):
            p, q = left.apply(data[0], left_sharding), right.apply(data[1], right_sharding)
            return left_sharding.tall_result(p), right_sharding.tall_result(q)
        if left_sharding is UNSHARDED:
            return ops.kron_damped_apply(*broadcast_parts(left, right, data))
        right = Shifted(*map(left_sharding.summing_gradients, right))
        return left_sharding.tall_result(left.apply((right @ data.mT).mT, left_sharding))


def solve_together(problems: Sequence[Solve]) -> list[Any]:
    """Apply pairs of operators that share kinds and ranks, each to its W or to its pair."""
    lefts, rights, data = zip(*problems, strict=True)
    pairs = isinstance(data[0], tuple)
    listed: Any = tuple(map(list, zip(*data, strict=True))) if pairs else list(data)
    solution = Solve(join(lefts), join(rights), listed).solution()
    return list(zip(*solution, strict=True)) if pairs else list(solution)


class Joint(NamedTuple):
    """Checked arguments of A ⊗ G + δI."""

    left: DampedFactor  # G; the sides' own dampings are not used
    right: DampedFactor  # A
    damping: Number
    fitted: Tensor | None  # replaces the products of eigenvalues in both spans

    def eigenvalues(self, left: Tensor, left_tail: Number, right: Tensor, right_tail: Number) -> tuple[Tensor, ...]:
        """Return eigenvalues of A ⊗ G + δI in both spans (..., s, r), only in the left or right one, and in neither."""
        both = left[..., :, None] * right[..., None, :] if self.fitted is None else self.fitted
        neither = torch.as_tensor(left_tail * right_tail + self.damping, dtype=both.dtype, device=both.device)
        in_left = left * add_dims(right_tail) + add_dims(self.damping)
        in_right = right * add_dims(left_tail) + add_dims(self.damping)
        return both + add_dims(self.damping, 2), in_left, in_right, neither

    def logdet(self) -> Tensor:
        """Return the sum of logarithms of all eigenvalues."""
        eigenvalues = self.eigenvalues(*self.left.eigenvalues(), *self.right.eigenvalues())
        both, in_left, in_right, neither = (values.log() for values in eigenvalues)
        p, q = self.left.tail_count(), self.right.tail_count()
        return both.sum((-2, -1)) + q * in_left.sum(-1) + p * in_right.sum(-1) + p * q * neither


def logdets_together(problems: Sequence[Joint]) -> Sequence[Tensor]:
    """Return the log-determinants of products that share the kinds and ranks of their factors."""
    return _joined(problems).logdet().unbind()


def _joined(problems: Sequence[Joint]) -> Joint:
    lefts, rights, dampings, fitted = zip(*problems, strict=True)
    left, right = join(lefts).stacked(), join(rights).stacked()
    values = None if fitted[0] is None else torch.stack(fitted)
    return Joint(left, right, stack_numbers(dampings, left.small), values)


class Power(NamedTuple):
    """Checked arguments of `kron_damped_power`: one pair of factors, a batch, or a list.

    The power applied to W is β (W + U (z_U ∘ UᵀW) + (W V ∘ z_V) Vᵀ + U (z ∘ UᵀW V) Vᵀ). β is the power of the
    eigenvalue in neither span. The coefficients z, z_U and z_V are relative to β.
    """

    joint: Joint
    matrix: Tall
    exponent: float

    def result(self) -> Tensor:
        """Apply the power."""
        (z, z_left, z_right, scale), left, right = self.coefficients()
        u, v, w = broadcast_parts(left, right, self.matrix)
        projected = u.mT @ w
        rows = z_left[..., :, None] * projected + (z * (projected @ v)) @ v.mT
        columns = (w @ v) * z_right[..., None, :]
        return scaled_sum(scale.expand(w.shape[:-2]), w, torch.cat([u, columns], -1), torch.cat([rows, v.mT], -2))

    def coefficients(self) -> tuple[tuple[Tensor, ...], Tall, Tall]:
        """Return z, z_U, z_V and β, and U and V."""
        (left, left_values), (right, right_values) = self.joint.left.eigenpairs(), self.joint.right.eigenpairs()
        in_both, in_left, in_right, neither = self.joint.eigenvalues(*left_values, *right_values)
        p, neither_column = self.exponent, add_dims(neither)
        z_left, z_right = (in_left / neither_column) ** p - 1, (in_right / neither_column) ** p - 1
        z = (in_both / add_dims(neither, 2)) ** p - 1 - z_left[..., :, None] - z_right[..., None, :]
        return (z, z_left, z_right, neither**p), left, right


def powers_together(problems: Sequence[Power]) -> Sequence[Tensor]:
    """Apply powers that share the exponent and the kinds and ranks of their factors, each to its W.

    Each launch serves all problems: V and the products with V are stacked, with zeros in place of missing rows.
    """
    matrices: Any = [problem.matrix for problem in problems]
    joint = _joined([problem.joint for problem in problems])
    (z, z_left, z_right, scale), left, right = Power(joint, matrices, problems[0].exponent).coefficients()
    scale = scale.expand(len(left))
    same_size = len({len(basis) for basis in right}) == 1
    v = torch.stack(list(right)) if same_size else pad_sequence(list(right), batch_first=True)
    columns = times(matrices, v)
    inner = z * ops.project(left, columns)
    columns = ops.rotate(left, columns, inner, torch.diag_embed(z_right))
    right_terms = times(columns, scale[:, None, None] * v.mT)
    left_terms: Any = ops.damped_apply(left, z_left, scale, matrices)
    unpadded = [block[:, : len(basis)] for block, basis in zip(right_terms, right, strict=True)]
    summed: Sequence[Tensor] = torch._foreach_add(left_terms, unpadded)
    return summed


def check_solve(
    function: str, left: LowRank, right: LowRank, data: Any, left_damping: Number, right_damping: Number, **tails: Tail
) -> Solve:
    """Check the arguments of `kron_damped_solve`."""
    first = check_damped_factor(function, left, left_damping, tails["left_tail"], "left")
    second = check_damped_factor(function, right, right_damping, tails["right_tail"], "right")
    _check.same_dtype_and_device(function, "right", second.basis, "left", first.basis)
    check_data = _check_matrix if isinstance(data, Tensor) else _check_pair
    return Solve(first, second, check_data(function, data, first, second))


def check_joint(
    function: str, left: LowRank, right: LowRank, damping: Number, *, values: Tensor | None, **tails: Tail
) -> Joint:
    """Check the factors of a product with a joint damping."""
    factors = []
    for name, lowrank in (("left", left), ("right", right)):
        factors.append(check_damped_factor(function, lowrank, 1.0, tails[f"{name}_tail"], name))
        if factors[-1].sharding is not UNSHARDED:
            rule = f"{name} must hold plain tensors, since a joint damping needs all rows in one process"
            _check.fail_type(function, f"{rule}; got a DTensor; take its .full_tensor()")
    first, second = (factor.basis for factor in factors)
    _check.same_dtype_and_device(function, "right", second, "left", first)
    _check.batches(function, "right", second, first, "left's")
    larger = first if first.ndim >= second.ndim else second
    damping = _check.scalar(function, "damping", damping, "the factors", larger, positive=True)
    if values is not None:
        values = _check.matching_data(function, "values", values, "left", first)
        batch = torch.broadcast_shapes(first.shape[:-2], second.shape[:-2])
        shape = (*batch, first.shape[-1], second.shape[-1])
        _check.shape(function, "values", values, shape, "one value for each pair of columns of left and right")
    return Joint(factors[0], factors[1], damping, values)


def check_power(
    function: str, left: LowRank, right: LowRank, matrix: Tensor, damping: Number, exponent: float, **options: Any
) -> Power:
    """Check the arguments of `kron_damped_power`. The options are those of `check_joint`."""
    exponent = _check.exponent(function, exponent)
    if isinstance(matrix, tuple):
        rule = "matrix must be a tensor, since the result for a pair (P, Q) does not keep the pair's rank"
        _check.fail_type(function, f"{rule}; got a pair; form P @ Q.mT")
    joint = check_joint(function, left, right, damping, **options)
    return Power(joint, _check_matrix(function, matrix, joint.left, joint.right), exponent)


def _check_matrix(function: str, matrix: Any, left: DampedFactor, right: DampedFactor) -> Tensor:
    """Check W against both sides, and return the rows of it that are held here."""
    if right.sharding is not UNSHARDED:
        rule = "right must hold plain tensors where matrix is one W, which is sharded on its rows alone"
        _check.fail_value(function, f"{rule}; got a DTensor basis; take its .full_tensor(), or pass a pair (P, Q)")
    data = left.matching_data(function, "matrix", matrix, "left")
    shape = left.sharding.count(left.basis), right.basis.shape[-2]
    if tuple(matrix.shape[-2:]) != shape:
        rule = f"matrix must have shape (..., {shape[0]}, {shape[1]}), the orders of left and right"
        _check.fail_value(function, f"{rule}; got {tuple(matrix.shape)}")
    _check.batches(function, "matrix", data, right.basis)
    _check.batches(function, "right", right.basis, left.basis, "left's")
    return left.local_rows(function, "matrix", data)


def _check_pair(function: str, pair: Any, left: DampedFactor, right: DampedFactor) -> tuple[Tensor, Tensor]:
    """Check P and Q, each against its side, and return the rows of them that are held here."""
    if not isinstance(pair, tuple) or len(pair) != 2:
        _check.fail_type(function, f"matrix must be a tensor or a pair (P, Q); got {type(pair).__name__}")
    first = left.matching_data(function, "P", pair[0], "left")
    second = right.matching_data(function, "Q", pair[1], "right")
    p, q = (factor.sharding.count(factor.basis) for factor in (left, right))
    if first.shape[-2:-1] != (p,) or second.shape[-2:-1] != (q,):
        rule = f"the pair (P, Q) must have shapes (..., {p}, k) and (..., {q}, k)"
        _check.fail_value(function, f"{rule}; got {tuple(first.shape)} and {tuple(second.shape)}")
    if first.shape[-1] != second.shape[-1]:
        rule = "P and Q must have the same number k of columns"
        _check.fail_value(function, f"{rule}; got {first.shape[-1]} and {second.shape[-1]}")
    return left.local_rows(function, "P", first), right.local_rows(function, "Q", second)
