"""Damped application from one side: any power of M̂ + τ(I − P) + λI, times a block of vectors, and the determinant.

M̂ is U diag(d) Uᵀ or F Fᵀ, and P is the projector on its range. The cost is O(n r) a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from brandla import _check
from brandla._ranges import ranged
from brandla._sharded import UNSHARDED
from brandla._shifted import DampedFactor, LowRank, Tail, check_damped_factor, join
from brandla.lowrank import Number
from brandla_kernels import Tall

__all__ = ["LowRank", "Tail", "damped_logdet", "damped_power", "damped_solve"]


@ranged("n,r", "n,m")
def damped_solve(
    lowrank: LowRank, rhs: Tensor, damping: Number, *, tail: Tail = 0.0, diagonal: Tensor | None = None
) -> Tensor:
    """(M̂ + τ(I − P) + λI)⁻¹ V: the damped inverse of a low-rank matrix M̂, applied. P projects on the range of M̂.

    Equivalent to ``torch.linalg.solve(lowrank.dense() + damping * I, rhs)`` (for τ = 0), in 4nrm operations for m
    right-hand sides in place of O(n³ + n²m), and with no n × n matrix. The result has the shape of ``rhs`` and the
    dtype of the factor. It is differentiable in every tensor argument. A wrong shape, value or device raises a
    ValueError, and a wrong dtype or kind a TypeError, before anything is computed.

    Parameters
    ----------
    lowrank
        LowRankEigh, LowRankRoot or Tracked. A root adds a Cholesky factorisation of S + λI of order r.
    rhs
        V, shape (..., n, m), or a vector as in ``torch.linalg.solve``: shape (n,), or exactly the batch shape of the
        factor and n.
    damping
        λ > 0: a number, or a tensor of batch shape, which stays on its device.
    tail
        τ >= 0, the value for the eigenvalues that the factor does not hold: a number, a tensor of batch shape,
        ``"mean"`` for (tr M − tr M̂)/(n − r) from a Tracked factor, or ``"smallest"`` for the smallest one held.
    diagonal
        δ >= 0, shape (n,) or the batch shape of the factor and n. It adds diag(δ) to the operator, and 2nr² + O(r³) to
        the work. Must be None for a sharded factor.

    Notes
    -----
    Inside the range, the relative error is about ε (d + λ)/(τ + λ). An error ‖UᵀU − I‖ of the basis is multiplied in
    the same way. Every value of a root under τ counts as τ. For a root, τ other than 0 needs the eigenvalues of S and
    makes the host wait for a GPU. A CPU reads them from S if it is diagonal, as `root_update` leaves it by default. U
    and V may be DTensors sharded on their rows: ``docs/sharded.md``.

    The derivative treats U, d, F and S as separate variables: compute S = FᵀF from F if F varies. A root with τ > 0
    can be differentiated only once. Source: Woodbury's identity, in the eigenbasis. Derivation, errors and derivatives:
    ``docs/damped.md``.

    Examples
    --------
    >>> import torch, brandla
    >>> factor = brandla.LowRankEigh(torch.tensor([3.0]), torch.eye(4, 1))
    >>> brandla.damped_solve(factor, torch.ones(4), damping=1.0)
    tensor([0.2500, 1.0000, 1.0000, 1.0000])
    """
    return check_solve("damped_solve", lowrank, rhs, damping, tail=tail, diagonal=diagonal).solution()


@ranged("n,r", "n,m")
def damped_power(
    lowrank: LowRank, rhs: Tensor, damping: Number, exponent: float, *, tail: Tail = 0.0, diagonal: None = None
) -> Tensor:
    """(M̂ + τ(I − P) + λI)^p V for any real p: −1/2 for whitening, 1/2 for sampling, −1/4 for Shampoo.

    Equivalent to the matrix power by a dense ``eigh``, in 4nrm operations. ``exponent`` is p. Everything else is as in
    `damped_solve`, errors and derivatives included, except that ``diagonal`` must be None: with a diagonal, only the
    inverse and the determinant have a low-rank form. For a LowRankRoot, S is diagonalised first, which waits for the
    device.

    Examples
    --------
    >>> import torch, brandla
    >>> eigh = brandla.LowRankEigh(torch.tensor([3.0]), torch.eye(2, 1))
    >>> brandla.damped_power(eigh, torch.ones(2), damping=1.0, exponent=-0.5)
    tensor([0.5000, 1.0000])
    """
    if diagonal is not None:
        rule = "diagonal must be None, since with a diagonal only the inverse has a low-rank form"
        _check.fail_value("damped_power", f"{rule}; got a {type(diagonal).__name__}; use damped_solve for exponent -1")
    return check_solve("damped_power", lowrank, rhs, damping, exponent, tail=tail).solution()


@ranged("n,r")
def damped_logdet(lowrank: LowRank, damping: Number, *, tail: Tail = 0.0, diagonal: Tensor | None = None) -> Tensor:
    """Log-determinant of M̂ + τ(I − P) + λI, Σ log(dᵢ + λ) + (n − r) log(τ + λ): half of a Gaussian likelihood.

    Equivalent to ``torch.linalg.slogdet(lowrank.dense() + damping * I).logabsdet`` (for τ = 0), from the r eigenvalues
    or a Cholesky factorisation of S + λI, by the matrix determinant lemma (``docs/damped.md``). The result has the
    batch shape and the dtype of the factor. Arguments, errors and derivatives are as in `damped_solve`. Without a
    diagonal, the determinant does not depend on U or F, and has no derivative by them.

    Examples
    --------
    >>> import torch, brandla
    >>> factor = brandla.LowRankEigh(torch.tensor([3.0]), torch.eye(4, 1))
    >>> brandla.damped_logdet(factor, damping=1.0).exp()
    tensor(4.)
    """
    return check_damped_factor("damped_logdet", lowrank, damping, tail, diagonal=diagonal).logdet()


class Solve(NamedTuple):
    """Checked arguments of a damped application."""

    factor: DampedFactor
    block: Tall  # V with columns (..., n, m), also if it is a vector; a list if the factor is one
    is_vector: bool
    exponent: float

    def solution(self) -> Tensor:
        """Return the operator times the right-hand side."""
        return self.like_rhs(self.product())

    def product(self) -> Tall:
        """Return the operator times the block, or times each block of a list."""
        factor, block = self.factor, self.block
        if factor.diagonal is not None:
            return factor.solve_with_diagonal(factor.diagonal, block)
        inverse = factor.inverse() if self.exponent == -1 else None
        if inverse is not None:
            return inverse @ block
        return factor.stacked().operator(self.exponent).apply(block, factor.sharding)

    def like_rhs(self, block: Tensor) -> Tensor:
        """Return a product as a vector or DTensor if the right-hand side is one."""
        sharding, block = self.factor.sharding, block[..., 0] if self.is_vector else block
        return block if sharding is UNSHARDED else sharding.tall_result(block, -1 if self.is_vector else -2)


def logdets_together(factors: Sequence[DampedFactor]) -> Sequence[Tensor]:
    """Return the log-determinants of operators whose factors share kind and rank."""
    return join(factors).stacked().logdet().unbind()


def solve_together(problems: Sequence[Solve]) -> list[Tensor]:
    """Apply operators that share kind, rank and exponent, each to its block."""
    factor, blocks = join([problem.factor for problem in problems]), [problem.block for problem in problems]
    products = problems[0]._replace(factor=factor, block=blocks).product()
    return [problem.like_rhs(block) for problem, block in zip(problems, products, strict=True)]


def check_solve(
    function: str, lowrank: LowRank, rhs: Tensor, damping: Number, exponent: float = -1.0, **options: Any
) -> Solve:
    """Check the arguments of `damped_solve` and `damped_power`."""
    factor = check_damped_factor(function, lowrank, damping, **options)
    block, basis = factor.matching_data(function, "rhs", rhs, "lowrank"), factor.basis
    n = factor.sharding.count(basis)
    is_vector = rhs.ndim == 1 or (rhs.ndim == basis.ndim - 1 and rhs.shape == (*basis.shape[:-2], n))
    block = block[..., None] if is_vector else block
    if rhs.ndim == 0 or block.shape[-2] != n:
        _check.fail_value(function, f"rhs must have n = {n} rows, as lowrank does; got shape {tuple(rhs.shape)}")
    block = factor.local_rows(function, "rhs", block)
    return Solve(factor, block, is_vector, _check.exponent(function, exponent))
