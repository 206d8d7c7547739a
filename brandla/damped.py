"""Damped application from one side: (M̂ + τ(I − P) + λI) to any power, times a block of vectors, and its determinant.

M̂ is U diag(d) Uᵀ or F Fᵀ, and P the projector on its range. A block costs O(n r) a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from brandla import _check
from brandla._ranges import ranged
from brandla._sharded import WHOLE
from brandla._shifted import LowRank, Side, Tail, check_side, join
from brandla.lowrank import Number
from brandla_kernels import Tall

__all__ = ["LowRank", "Tail", "damped_logdet", "damped_power", "damped_solve"]


@ranged("n,r", "n,m")
def damped_solve(
    lowrank: LowRank, rhs: Tensor, damping: Number, *, tail: Tail = 0.0, diagonal: Tensor | None = None
) -> Tensor:
    """(M̂ + τ(I − P) + λI)⁻¹ V: the damped inverse of a low-rank matrix M̂ with range P, applied.

    Equivalent to ``torch.linalg.solve(lowrank.dense() + damping * I, rhs)`` (for τ = 0), in 4nrm operations for m
    right-hand sides in place of O(n³ + n²m), and with no n × n matrix. The result is of the shape of ``rhs``, in the
    dtype of the factor, and differentiable in every tensor argument. Arguments that do not fit raise a ValueError, for
    shapes, values and devices, or a TypeError, for dtypes and kinds, before anything is computed.

    Parameters
    ----------
    lowrank
        LowRankEigh, LowRankRoot or Tracked. A root adds a Cholesky factorisation of S + λI of order r.
    rhs
        V, shape (..., n, m), or a vector: (n,), or exactly the batch shape of the factor and n, as in
        ``torch.linalg.solve``.
    damping
        λ > 0: a number, or a tensor of batch shape, which stays on its device.
    tail
        τ >= 0, the value for the eigenvalues that the factor does not hold: a number, a tensor of batch shape, their
        ``"mean"``, from the trace of a Tracked factor, or the ``"smallest"`` eigenvalue that the factor holds.
    diagonal
        δ >= 0, shape (n,) or the batch shape of the factor and n: diag(δ) is added to the operator, and 2nr² + O(r³) to
        the work. Not for a sharded factor.

    Notes
    -----
    The relative error of the part inside the range is about ε (d + λ)/(τ + λ), and an error ‖UᵀU − I‖ of a basis is
    multiplied in the same way. Every value of a root under τ counts as τ. For a root, a τ other than 0 needs the
    eigenvalues of S and waits for a GPU, unless S is diagonal as `root_update` leaves it. U and V may be DTensors
    sharded on their rows: ``docs/sharded.md``.

    The derivative treats U, d, F and S as separate variables: compute S = FᵀF from F where F varies. It can be taken
    once for a root with τ > 0. Source: Woodbury's identity, in the eigenbasis; derivation, errors and derivatives:
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

    Equivalent to the matrix power by a dense ``eigh``, in 4nrm operations. ``exponent`` is p; all else, errors and
    derivatives included, is as in `damped_solve`, but that there is no diagonal: beside one only the inverse and the
    determinant have a low-rank form. For a LowRankRoot, S is diagonalised first, which waits for the device.

    Examples
    --------
    >>> import torch, brandla
    >>> eigh = brandla.LowRankEigh(torch.tensor([3.0]), torch.eye(2, 1))
    >>> brandla.damped_power(eigh, torch.ones(2), damping=1.0, exponent=-0.5)
    tensor([0.5000, 1.0000])
    """
    if diagonal is not None:
        rule = "diagonal must be None, since beside a diagonal only the inverse has a low-rank form"
        _check.fail_value("damped_power", f"{rule}; got a {type(diagonal).__name__}; use damped_solve for exponent -1")
    return check_solve("damped_power", lowrank, rhs, damping, exponent, tail=tail).solution()


@ranged("n,r")
def damped_logdet(lowrank: LowRank, damping: Number, *, tail: Tail = 0.0, diagonal: Tensor | None = None) -> Tensor:
    """Log-determinant of M̂ + τ(I − P) + λI, Σ log(dᵢ + λ) + (n − r) log(τ + λ): half of a Gaussian likelihood.

    Equivalent to ``torch.linalg.slogdet(lowrank.dense() + damping * I).logabsdet`` (for τ = 0), from the r eigenvalues
    or a Cholesky factorisation of S + λI, by the matrix determinant lemma (``docs/damped.md``). Of the batch shape of
    the factor, in its dtype. Arguments, errors and derivatives are as in `damped_solve`; without a diagonal there is
    no derivative by U or F, on which the determinant does not depend.

    Examples
    --------
    >>> import torch, brandla
    >>> factor = brandla.LowRankEigh(torch.tensor([3.0]), torch.eye(4, 1))
    >>> brandla.damped_logdet(factor, damping=1.0).exp()
    tensor(4.)
    """
    return check_side("damped_logdet", lowrank, damping, tail, diagonal=diagonal).logdet()


# What `damped_logdet` takes, as `brandla.grouped` checks it.
check_logdet = check_side


class Solve(NamedTuple):
    """Arguments of a damped application that fit together."""

    side: Side
    block: Tall
    vector: bool
    exponent: float

    def solution(self) -> Tensor:
        """Apply the operator."""
        return self.shaped(self.applied())

    def applied(self) -> Tall:
        """Return the product with the block, or with each of a list."""
        side, block = self.side, self.block
        if side.diagonal is not None:
            return side.solve_beside(side.diagonal, block)
        inverse = side.inverse() if self.exponent == -1 else None
        return side.stacked().operator(self.exponent).on(block, side.rows) if inverse is None else inverse @ block

    def shaped(self, block: Tensor) -> Tensor:
        """Return the result in the shape and of the kind of the right-hand side."""
        rows, block = self.side.rows, block[..., 0] if self.vector else block
        return block if rows is WHOLE else rows.tall_result(block, -1 if self.vector else -2)


def logdets_together(sides: Sequence[Side]) -> Sequence[Tensor]:
    """Compute the determinants of operators of one kind and rank."""
    return join(sides).stacked().logdet().unbind()


def solve_together(problems: Sequence[Solve]) -> list[Tensor]:
    """Apply operators of one kind, rank and exponent, each to its block."""
    side, blocks = join([problem.side for problem in problems]), [problem.block for problem in problems]
    solutions = problems[0]._replace(side=side, block=blocks).applied()
    return [problem.shaped(own) for problem, own in zip(problems, solutions, strict=True)]


def check_solve(
    function: str, lowrank: LowRank, rhs: Tensor, damping: Number, exponent: float = -1.0, **options: Any
) -> Solve:
    """Check what every damped application takes."""
    side = check_side(function, lowrank, damping, **options)
    block, basis = side.data(function, "rhs", rhs, "lowrank"), side.basis
    n = side.rows.count(basis)
    vector = rhs.ndim == 1 or (rhs.ndim == basis.ndim - 1 and rhs.shape == (*basis.shape[:-2], n))
    block = block[..., None] if vector else block
    if rhs.ndim == 0 or block.shape[-2] != n:
        _check.fail_value(function, f"rhs must have n = {n} rows, as lowrank does; got shape {tuple(rhs.shape)}")
    block = side.here(function, "rhs", block)
    return Solve(side, block, vector, _check.exponent(function, exponent))
