"""``damped_inverse``: Y = (M̂ + τ(I − P) + λI)⁻¹ V. Z and β are computed on the device, beside the projection.

M̂ is U diag(d) Uᵀ, given by d (..., r), or F Fᵀ, given by S = FᵀF (..., r, r), with τ = 0 and F in the place of U. P is
the projector on the range of M̂. U is (..., n, r), V and Y are (..., n, m), λ and τ are one number per batch entry.

    Y = β (V + U Z UᵀV),    β = 1/(τ + λ),    Z = diag((τ − d)/(d + λ)), or −(S + λI)⁻¹

β stays outside, so no square of an eigenvalue is formed. If rounding left S + λI not positive definite, Y is NaN.

``pair_damped_inverse`` applies two damped inverses, each to its own block, with both projections in one launch.
``kron_damped_inverse`` applies one from the left and one from the right of W (..., p, q), as ``kron_damped_apply``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from brandla_kernels._op import Cost, op
from brandla_kernels.damped_apply import cost as apply_cost
from brandla_kernels.damped_apply import damped_apply, damped_apply_gradient
from brandla_kernels.kron_damped_apply import cost as kron_cost
from brandla_kernels.kron_damped_apply import kron_damped_apply, kron_damped_apply_gradient

_LEFT = "Tall[p,a] left_basis, Tall[a|a,a] left_small, Small[] left_damping, Small[] left_tail"
_RIGHT = "Tall[q,b] right_basis, Tall[b|b,b] right_small, Small[] right_damping, Small[] right_tail"


def pair_cost(p: int, q: int, left_rank: int, right_rank: int, k: int, itemsize: int = 4) -> Cost:
    """Work of one call of ``pair_damped_inverse`` with eigenvalues."""
    parts = zip(apply_cost(p, left_rank, k, itemsize), apply_cost(q, right_rank, k, itemsize), strict=True)
    return Cost(*map(sum, parts))


@op(
    "damped_inverse(Tall[n,r] basis, Tall[r|r,r] small, Small[] damping, Small[] tail, Tall[n,m] rhs) -> Tall[n,m]",
    apply_cost,
    "damped.damped",
)
def damped_inverse(basis: Tensor, small: Tensor, damping: Tensor, tail: Tensor, rhs: Tensor) -> Tensor:
    """Return the damped inverse times ``rhs``; ``small`` is d or S."""
    return damped_apply.torch_form(basis, *coefficients(basis, small, damping, tail), rhs)


@op(
    f"pair_damped_inverse({_LEFT}, {_RIGHT}, Tall[p,k] left_rhs, Tall[q,k] right_rhs) -> (Tall[p,k], Tall[q,k])",
    pair_cost,
    "damped.pair_damped",
)
def pair_damped_inverse(
    left_basis: Tensor, left_small: Tensor, left_damping: Tensor, left_tail: Tensor,
    right_basis: Tensor, right_small: Tensor, right_damping: Tensor, right_tail: Tensor,
    left_rhs: Tensor, right_rhs: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return two damped inverses, each applied to its block."""
    first = damped_inverse.torch_form(left_basis, left_small, left_damping, left_tail, left_rhs)
    return first, damped_inverse.torch_form(right_basis, right_small, right_damping, right_tail, right_rhs)


@op(f"kron_damped_inverse({_LEFT}, {_RIGHT}, Tall[p,q] matrix) -> Tall[p,q]", kron_cost, "damped.kron_damped")
def kron_damped_inverse(
    left_basis: Tensor, left_small: Tensor, left_damping: Tensor, left_tail: Tensor,
    right_basis: Tensor, right_small: Tensor, right_damping: Tensor, right_tail: Tensor,
    matrix: Tensor,
) -> Tensor:  # fmt: skip
    """Return the left inverse times ``matrix`` times the right inverse."""
    left = coefficients(left_basis, left_small, left_damping, left_tail)
    right = coefficients(right_basis, right_small, right_damping, right_tail)
    return kron_damped_apply.torch_form(left_basis, *left, right_basis, *right, matrix)


def coefficients(basis: Tensor, small: Tensor, damping: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """Return Z and β."""
    scale = 1 / (tail + damping)
    if small.ndim == basis.ndim:
        return -damped_gram_inverse(small, damping), scale
    return (tail[..., None] - small) / (small + damping[..., None]), scale


def damped_gram_inverse(gram: Tensor, damping: float | Tensor) -> Tensor:
    """Return (S + λI)⁻¹, or NaN, never a wrong number, if rounding left S + λI not positive definite."""
    return torch.cholesky_inverse(damped_cholesky(gram, damping))


def damped_cholesky(gram: Tensor, damping: float | Tensor) -> Tensor:
    """Return the Cholesky factor of S + λI, or NaN if there is none."""
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    damping = damping[..., None, None] if isinstance(damping, Tensor) else damping
    lower, info = torch.linalg.cholesky_ex((gram + gram.mT) / 2 + damping * identity)
    return torch.where((info == 0)[..., None, None], lower, float("nan"))


@damped_inverse.gradient
def _gradient(inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
    *side, rhs = inputs
    operator = coefficients(*side)
    *of_side, of_rhs = damped_apply_gradient(side[0], *operator, rhs, gradients[0])
    return *_gradients_of(side, operator, of_side), of_rhs


@pair_damped_inverse.gradient
def _pair_gradient(inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    *of_left, of_first = _gradient((*inputs[:4], inputs[8]), gradients[:1])
    *of_right, of_second = _gradient((*inputs[4:8], inputs[9]), gradients[1:])
    return *of_left, *of_right, of_first, of_second


@kron_damped_inverse.gradient
def _kron_gradient(inputs: Sequence[Tensor], gradients: tuple[Tensor]) -> tuple[Tensor, ...]:
    left, right, matrix = inputs[:4], inputs[4:8], inputs[8]
    on_left, on_right = coefficients(*left), coefficients(*right)
    found = kron_damped_apply_gradient((left[0], *on_left, right[0], *on_right, matrix), gradients[0])
    return *_gradients_of(left, on_left, found[:3]), *_gradients_of(right, on_right, found[3:6]), found[6]


def _gradients_of(
    side: Sequence[Tensor], operator: Sequence[Tensor], gradients: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Return the gradients with respect to U, d or S, λ and τ, given those with respect to U, Z and β."""
    basis, small, damping, _ = side
    (middle, scale), (of_basis, of_middle, of_scale) = operator, gradients
    of_shift = -(of_scale * scale) * scale
    if small.ndim == basis.ndim:
        # Z = −A⁻¹ for A = S + λI, so dZ = Z dA Z.
        of_gram = middle @ of_middle @ middle
        of_damping = of_shift + of_gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        return of_basis, (of_gram + of_gram.mT) / 2, of_damping, of_shift
    of_gap = of_middle / (small + damping[..., None])
    of_damping = of_shift - (of_gap * middle).sum(-1)
    return of_basis, -of_gap * (1 + middle), of_damping, of_shift + of_gap.sum(-1)
