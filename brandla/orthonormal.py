"""Orthonormal columns without a host sync: rank-aware Cholesky QR of tall panels, and the polish of an update.

Derivation and error bounds: ``docs/updates.md``.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

# torch.linalg does not list its error in __all__.
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

import brandla_kernels as ops
from brandla import _check
from brandla._ranges import ranged
from brandla._sharded import UNSHARDED, Sharding, is_dtensor
from brandla._small import signs_of
from brandla_kernels import Tall, tall

# Squared length that a unit column must keep through the second pass. A column that loses more was rounding noise
# inside the span of the columns before it ("twice is enough").
_KEPT_BY_SECOND_PASS = 0.25
# A column up to this length counts as zero: float64 may not hold its squared length to full precision.
_SHORTEST = (torch.finfo(torch.float64).tiny / torch.finfo(torch.float64).eps) ** 0.5
# Columns are clean, and need no polish, if the estimate of ‖UᵀU − I‖₂ is at most this multiple of ε.
_CLEAN = 20
# One polish is enough up to this estimate of ‖UᵀU − I‖₂. A polish amplifies rounding by the condition of UᵀU.
_NEAR = 0.5
_PROBES = 4
# Beyond this amplification of rounding by T and R, the columns are taken in another order.
_MAX_AMPLIFICATION = 256


@ranged("n,k")
def orthonormalize(panel: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q and R with P = Q R. Q has orthonormal columns, and zero columns where the rank of P runs out.

    Equivalent to ``torch.linalg.qr`` in exact arithmetic and full rank. It takes only matrix products and Cholesky
    factorisations of order k: 8nk² flops, a batch at once, and no host sync on a GPU.

    Parameters
    ----------
    panel
        P, shape (..., n, k), float32 or float64; bfloat16 and float16 are computed in float32.

    Returns
    -------
    tuple
        Q, shape (..., n, k), and R, shape (..., k, k), in the dtype of P; float32 for half precision. R is square, and
        upper triangular if every column of P stands out clearly from the columns before it: on a GPU, where no values
        are read, by a few hundredths of its length. A panel with a non-finite entry gives NaN throughout. Column j of
        Q comes from column j of P.

    Notes
    -----
    ‖QᵀQ − I‖₂ is a few ε whatever the condition of P, except for zero columns. The backward error ‖P − Q R‖/‖P‖ of each
    column is a few ε too if no direction of P is near its rounding. Such a direction is dropped: at most 8 √k ε of a
    column in float32 and 32 k ε in float64, and some hundred times that on a GPU, which takes no eigenvectors. Columns
    may have lengths from tiny/ε on in float32, and from √(tiny/ε) to √max in float64. Shorter columns count as zero.
    The derivative is right if no column of P depends on the others.

    References
    ----------
    T. Fukaya, R. Kannan, Y. Nakatsukasa, Y. Yamamoto, Y. Yanagisawa, "Shifted Cholesky QR for computing the QR
    factorization of ill-conditioned matrices", SIAM J. Sci. Comput. 42 (2020), for float64.

    Examples
    --------
    >>> import torch, brandla
    >>> q, r = brandla.orthonormalize(torch.tensor([[3.0, 3.0], [4.0, 4.0]]))
    >>> torch.dist(q @ r, torch.tensor([[3.0, 3.0], [4.0, 4.0]])) < 1e-6
    tensor(True)
    """
    _check.data("orthonormalize", "panel", panel)
    if panel.ndim < 2:
        _check.fail_value("orthonormalize", f"panel must have shape (..., n, k); got {tuple(panel.shape)}")
    if is_dtensor(panel):
        _check.fail_type("orthonormalize", "panel must be a plain tensor; got a DTensor; take its .full_tensor()")
    near_basis, transform, triangle = factorize(panel.to(torch.promote_types(panel.dtype, torch.float32)))
    return near_basis @ transform, triangle


def factorize(panel: Tall) -> tuple[Tall, Tensor, Tensor]:
    """Return P′, T and R with Q = P′ T, so that Q W costs no more than P′ (T W). For a list, T and R are stacked."""
    dtype = tall.dtype_of(panel)
    panel, transform, first = _first_pass(panel)
    near_basis = times(panel, transform.to(dtype))
    near_gram = ops.rounded_gram(near_basis)
    second, _ = _second_pass(near_gram)
    triangle = second.mT @ near_gram @ first
    return near_basis, second.to(dtype), triangle.to(dtype)


def times(panel: Tall, small: Tensor) -> Tall:
    """Return P W. For a list of P and a stack of W, this is one launch."""
    if isinstance(panel, Tensor):
        return panel @ small
    no_columns: Any = [matrix[..., :0] for matrix in panel]
    return ops.rotate(panel, no_columns, small, small[..., :0, :])


def spanning(panel: Tensor) -> Tensor:
    """Return columns with the span of P, orthonormal to about √ε or zero: enough between two products."""
    panel, transform, _ = _first_pass(panel)
    spanned: Tensor = panel @ transform.to(panel.dtype)
    return spanned


def polish(
    panel: Tall, values: Tensor, sharding: Sharding = UNSHARDED, *, in_place: bool = False
) -> tuple[Tall, Tensor]:
    """Make nearly orthonormal columns Y orthonormal to a few ε: Y L⁻ᵀ for H = YᵀY = L Lᵀ. Zero columns stay zero.

    A column that was rounding noise inside the span of others becomes zero. Its value and all later values become 0,
    since values descend. A CPU reads H. It returns clean columns as they are, and takes a second pass over columns that
    were far from orthonormal and are not clean after the first.
    """
    first = panel if isinstance(panel, Tensor) else panel[0]
    # H may be read if this is free, if it holds all rows, and if no gradient is taken.
    may_read = sharding is UNSHARDED and ops.reads_are_free(first) and not first.requires_grad and first.numel() > 0
    for _ in range(2):
        inner = sharding.total(ops.rounded_gram(panel))
        error = _deviation(inner) if may_read else 0.0
        if may_read and error <= _CLEAN * torch.finfo(tall.dtype_of(panel)).eps:
            break
        transform, live = _second_pass(inner)
        transform, no_columns = transform.to(tall.dtype_of(panel)), tall.each(lambda matrix: matrix[..., :0], panel)
        rotation = panel, no_columns, transform, transform[..., :0, :]
        if in_place:
            ops.rotate_(*rotation)
        else:
            panel = ops.rotate(*rotation)
        # A product, because NaN must stay NaN.
        values = values * live.cumprod(-1)
        if error <= _NEAR:
            break
    return panel, values


def _second_pass(inner: Tensor) -> tuple[Tensor, Tensor]:
    """Return the transform for a Gram matrix H near I, and which columns live. Columns of Y may be zero."""
    # Squared lengths, near 1 or 0, serve as lengths: the result does not depend on them.
    return ops.cholesky_inverse_core(inner, inner.detach().diagonal(dim1=-2, dim2=-1), _KEPT_BY_SECOND_PASS)


def _deviation(inner: Tensor) -> float:
    """Estimate ‖H − I‖₂ from below, zero columns aside, by a step of power iteration from the longest columns."""
    error = inner - torch.diag_embed((inner.diagonal(dim1=-2, dim2=-1) != 0).to(inner.dtype))
    lengths, longest = torch.linalg.vector_norm(error, dim=-2).topk(min(_PROBES, inner.shape[-1]))
    probes = tall.columns_at(error, longest) / lengths[..., None, :].clamp_min(torch.finfo(inner.dtype).tiny)
    return float(torch.linalg.vector_norm(error @ probes, dim=-2).amax().item())


def _first_pass(panel: Tall) -> tuple[Tall, Tensor, Tensor]:
    """Return P′, T and R with P ≈ (P′ T) R, where the columns of P′ T are nearly orthonormal, or zero.

    A float64 Gram matrix resolves float64 columns only down to √ε of their length. So for float64, a shifted Cholesky
    factor first brings the panel's condition down to 1/√ε (shifted Cholesky QR).
    """
    dtype, k = tall.dtype_of(panel), max(tall.columns(panel), 1)
    eps = torch.finfo(dtype).eps
    panel_gram = ops.gram(panel)
    length = panel_gram.diagonal(dim1=-2, dim2=-1).sqrt()
    # The inverse of a length must be finite. NaN stays NaN, because its comparison is false.
    length = torch.where(length <= max(torch.finfo(dtype).tiny / eps, _SHORTEST), 0, length)
    if dtype != panel_gram.dtype:
        return panel, *_rank_aware(panel_gram, length, 64 * k * eps**2)
    shift, order = 64 * k * eps, None
    may_read = ops.reads_are_free(panel_gram)
    if not may_read or not _all_live(ops.live_columns(panel_gram, length, shift), length).all().item():
        order = _pivot_order(panel_gram, length, shift)
        panel, panel_gram = tall.each(tall.columns_at, panel, order), _permuted(panel_gram, order)
        length = length.gather(-1, order)
    divisor = torch.where(length > 0, length, 1)
    equilibrated = panel_gram / (divisor[..., :, None] * divisor[..., None, :])
    identity = torch.eye(panel_gram.shape[-1], dtype=dtype, device=panel_gram.device)
    to_panel = torch.linalg.cholesky_ex(equilibrated + shift * identity).L.mT * divisor[..., None, :]
    panel = tall.each(
        lambda matrix, upper: torch.linalg.solve_triangular(upper, matrix, upper=True, left=False), panel, to_panel
    )
    panel_gram = ops.gram(panel)
    transform, triangle = _rank_aware(panel_gram, (length > 0).to(dtype), 16 * k * eps)
    triangle = triangle @ to_panel
    if order is not None:
        place = order.argsort(-1)
        transform, triangle = tall.columns_at(transform, place), _permuted(triangle, place)
    return panel, transform, triangle


def _rank_aware(gram: Tensor, scale: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return T and R with P ≈ (P T) R from the Gram matrix G of P, whose columns may depend on one another.

    A column that depends on earlier columns is dropped. Their noise times its coefficients on them goes too, and is
    more than noise if a coefficient on a weak column is large. So `_pivot_order` compares no column with much weaker
    ones. A CPU reads whether any column is dropped. If so, it takes the leading eigenvectors of G instead; if not, the
    columns keep their order, unless elimination in this order amplifies rounding.
    """
    if ops.reads_are_free(gram):
        transform, live = ops.cholesky_inverse_core(gram, scale, threshold)
        triangle = transform.mT @ gram
        all_live = bool(_all_live(live, scale).all())
        if all_live and _amplification(transform, triangle, scale) <= _MAX_AMPLIFICATION:
            return transform, triangle
        if not (all_live or gram.requires_grad):
            with suppress(LinAlgError):
                return _from_eigenvectors(gram, scale, threshold)
    order = _pivot_order(gram, scale, threshold)
    transform, _ = ops.cholesky_inverse_core(_permuted(gram, order), scale.gather(-1, order), threshold)
    transform = _permuted(transform, order.argsort(-1))
    return transform, transform.mT @ gram


def _amplification(transform: Tensor, triangle: Tensor, scale: Tensor) -> float:
    """Bound the factor by which |T| |R| multiplies the rounding of P T, relative to the length of a column."""
    if scale.numel() == 0:
        return 0.0
    divisor = torch.where(scale > 0, scale, 1)
    growth = (divisor[..., None, :] @ (transform.abs() @ triangle.abs())).squeeze(-2) / divisor
    return growth.amax().item()


def _from_eigenvectors(gram: Tensor, scale: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return T and R for the span of the eigenvectors of D G D, D = 1/scale, whose eigenvalues are above the threshold.

    Any rotation of the columns P D V Λ^(−½) has this span, and for equal eigenvalues rounding alone decides which one
    `eigh` finds. The rotation taken gives the columns of Gram–Schmidt on P in `_pivot_order`.
    """
    inverse_scale = torch.where(scale > 0, 1 / scale, 0)
    equilibrated = gram * inverse_scale[..., :, None] * inverse_scale[..., None, :]
    finite = equilibrated.sum((-2, -1)).isfinite()[..., None, None]
    values, vectors = (part.flip(-1) for part in torch.linalg.eigh(torch.where(finite, equilibrated, 0)))
    kept = values > threshold
    roots = torch.where(kept, values, 0).sqrt()
    order = _pivot_order(gram, scale, threshold)
    root = (vectors * roots[..., None, :]).mT
    rotation, upper = torch.linalg.qr(tall.columns_at(root, order))
    # Each column takes the place of the column of P that it came from. As many live as eigenvalues are kept.
    rotation = rotation * (signs_of(upper.diagonal(dim1=-2, dim2=-1)) * kept)[..., None, :]
    rotation = tall.columns_at(rotation, order.argsort(-1))
    scaled = vectors * torch.where(kept, 1 / roots, 0)[..., None, :]
    transform = inverse_scale[..., :, None] * (scaled @ rotation)
    # R is TᵀG in exact arithmetic, but eigenvalues near the threshold would carry much of the rounding of G.
    triangle = rotation.mT @ root * scale[..., None, :]
    return torch.where(finite, transform, float("nan")), torch.where(finite, triangle, float("nan"))


def _permuted(gram: Tensor, order: Tensor) -> Tensor:
    """Return Πᵀ G Π."""
    return tall.columns_at(tall.columns_at(gram, order).mT, order).mT


def _pivot_order(gram: Tensor, scale: Tensor, threshold: float) -> Tensor:
    """Return an order of the columns that compares none with much weaker ones: pivoting, three levels deep.

    First come columns that stand out from longer columns at a coarse threshold, then at a finer one, then the rest. A
    coefficient on an earlier column is at most about θ^(−1/6). Columns that all stand out clearly keep their order.
    """
    levels = (threshold ** (1 / 3), threshold ** (2 / 3))
    clear = _all_live(ops.live_columns(gram, scale, levels[0]), scale)
    natural = torch.arange(scale.shape[-1], device=scale.device)
    order = torch.where(clear, natural, gram.diagonal(dim1=-2, dim2=-1).argsort(-1, descending=True))
    for level in levels:
        live = ops.live_columns(_permuted(gram, order), scale.gather(-1, order), level)
        order = order.gather(-1, torch.argsort((~live).to(torch.uint8), dim=-1, stable=True))
    return order


def _all_live(live: Tensor, scale: Tensor) -> Tensor:
    """Return whether no column is dropped except zero columns: bool (..., 1)."""
    return (live | (scale == 0)).all(-1, keepdim=True)
