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
from brandla._sharded import WHOLE, Rows, is_dtensor
from brandla._small import signs_of
from brandla_kernels import Tall, tall

# Squared length that a unit column must keep through the second pass. One that loses more was rounding noise
# inside the span it was to be orthogonal to ("twice is enough").
_SECOND_PASS = 0.25
# Length up to which the square of a column is no normal number in float64.
_VANISHING = (torch.finfo(torch.float64).tiny / torch.finfo(torch.float64).eps) ** 0.5
# Multiple of ε that an estimate of ‖UᵀU − I‖₂ may reach before a polish.
_CLEAN = 20
# Estimate of ‖UᵀU − I‖₂ up to which one polish is enough: it amplifies rounding by the condition of UᵀU.
_NEAR = 0.5
_PROBES = 4
# Factor by which a product with T and R may multiply rounding before the columns are taken in another order.
_AMPLIFIED = 256


@ranged("n,k")
def orthonormalize(panel: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q and R with P = Q R, where Q has orthonormal columns, or zero ones where the rank of P runs out.

    Equivalent to ``torch.linalg.qr`` in exact arithmetic and full rank, with matrix products and Cholesky
    factorisations of order k only: 8nk² flops, a batch at once, and no host sync on a GPU.

    Parameters
    ----------
    panel
        P, shape (..., n, k), float32 or float64; bfloat16 and float16 are computed in float32.

    Returns
    -------
    tuple
        Q, shape (..., n, k), and R, shape (..., k, k), in the dtype of P; float32 for half precision. R is square, and
        upper triangular if every column of P stands out clearly from the columns before it: on a GPU, where nothing
        is looked at, by a few hundredths of its length. A panel with a non-finite entry gives NaN throughout. Column j
        of Q comes from column j of P.

    Notes
    -----
    ‖QᵀQ − I‖₂ is a few ε whatever the condition of P, except for zero columns. The backward error ‖P − Q R‖/‖P‖ of each
    column is a few ε too if no direction of P is near its rounding. Such a direction is dropped: at most 8 √k ε of a
    column in float32 and 32 k ε in float64, and some hundred times that on a GPU, which takes no eigenvectors. Lengths
    of columns: from tiny/ε on in float32, from √(tiny/ε) to √max in float64; shorter columns count as zero. The
    derivative is right where no column of P depends on the others.

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
    nearly, transform, triangle = factorize(panel.to(torch.promote_types(panel.dtype, torch.float32)))
    return nearly @ transform, triangle


def factorize(panel: Tall) -> tuple[Tall, Tensor, Tensor]:
    """Return P′, T and R with Q = P′ T, so that Q W costs no more than P′ (T W); of a list, T and R are stacked."""
    dtype = tall.dtype_of(panel)
    panel, transform, first = _first_pass(panel)
    nearly = times(panel, transform.to(dtype))
    nearly_gram = ops.rounded_gram(nearly)
    second, _ = _second_pass(nearly_gram)
    triangle = second.mT @ nearly_gram @ first
    return nearly, second.to(dtype), triangle.to(dtype)


def times(panel: Tall, small: Tensor) -> Tall:
    """Return P W; of a list of P and a stack of W in one launch."""
    if isinstance(panel, Tensor):
        return panel @ small
    nothing: Any = [one[..., :0] for one in panel]
    return ops.rotate(panel, nothing, small, small[..., :0, :])


def spanning(panel: Tensor) -> Tensor:
    """Return columns for those of P with their span, orthonormal to about √ε or zero: enough between two products."""
    panel, transform, _ = _first_pass(panel)
    spanned: Tensor = panel @ transform.to(panel.dtype)
    return spanned


def polish(panel: Tall, values: Tensor, rows: Rows = WHOLE, *, in_place: bool = False) -> tuple[Tall, Tensor]:
    """Return Y L⁻ᵀ for H = YᵀY = L Lᵀ: nearly orthonormal columns made orthonormal to a few ε. Zero columns stay zero.

    A column that was rounding noise inside the span of others becomes zero. Its value becomes 0, with those after it,
    since values descend. On a CPU columns that are clean already, as H shows, are returned as they are, and those far
    from orthonormal that are not clean after one pass take another.
    """
    first = panel if isinstance(panel, Tensor) else panel[0]
    # A look at columns is free, and shows all of them.
    may_look = rows is WHOLE and ops.reads_are_free(first) and not first.requires_grad and first.numel() > 0
    for _ in range(2):
        inner = rows.total(ops.rounded_gram(panel))
        error = _deviation(inner) if may_look else 0.0
        if may_look and error <= _CLEAN * torch.finfo(tall.dtype_of(panel)).eps:
            break
        transform, live = _second_pass(inner)
        transform, nothing = transform.to(tall.dtype_of(panel)), tall.each(lambda matrix: matrix[..., :0], panel)
        rotation = panel, nothing, transform, transform[..., :0, :]
        if in_place:
            ops.rotate_(*rotation)
        else:
            panel = ops.rotate(*rotation)
        # NaN stays NaN.
        values = values * live.cumprod(-1)
        if error <= _NEAR:
            break
    return panel, values


def _second_pass(inner: Tensor) -> tuple[Tensor, Tensor]:
    """Return the transform and the live columns of a Gram matrix H near I, but for zero columns."""
    # Squared lengths, near 1 or 0, serve as lengths, on which the result does not depend.
    return ops.cholesky_inverse_core(inner, inner.detach().diagonal(dim1=-2, dim2=-1), _SECOND_PASS)


def _deviation(inner: Tensor) -> float:
    """Estimate ‖H − I‖₂ for H = YᵀY from below, zero columns apart, by a power iteration from its longest columns."""
    error = inner - torch.diag_embed((inner.diagonal(dim1=-2, dim2=-1) != 0).to(inner.dtype))
    lengths, longest = torch.linalg.vector_norm(error, dim=-2).topk(min(_PROBES, inner.shape[-1]))
    probes = tall.columns_at(error, longest) / lengths[..., None, :].clamp_min(torch.finfo(inner.dtype).tiny)
    return float(torch.linalg.vector_norm(error @ probes, dim=-2).amax().item())


def _first_pass(panel: Tall) -> tuple[Tall, Tensor, Tensor]:
    """Return P′, T and R with P ≈ (P′ T) R, where the columns of P′ T are nearly orthonormal, or zero.

    A float64 Gram matrix resolves float64 columns only down to √ε of their length, so there a shifted Cholesky factor
    first brings the panel's condition down to 1/√ε (shifted Cholesky QR).
    """
    dtype, k = tall.dtype_of(panel), max(tall.columns(panel), 1)
    eps = torch.finfo(dtype).eps
    panel_gram = ops.gram(panel)
    length = panel_gram.diagonal(dim1=-2, dim2=-1).sqrt()
    # The inverse of a length must be finite. A comparison with NaN is false.
    length = torch.where(length <= max(torch.finfo(dtype).tiny / eps, _VANISHING), 0, length)
    if dtype != panel_gram.dtype:
        return panel, *_ranked_core(panel_gram, length, 64 * k * eps**2)
    shift, order = 64 * k * eps, None
    free = ops.reads_are_free(panel_gram)
    if not free or not _nothing_goes(ops.live_columns(panel_gram, length, shift), length).all().item():
        # One in which no column is measured against much weaker ones.
        order = _order(panel_gram, length, shift)
        panel, panel_gram = tall.each(tall.columns_at, panel, order), _permuted(panel_gram, order)
        length = length.gather(-1, order)
    unit = torch.where(length > 0, length, 1)
    equilibrated = panel_gram / (unit[..., :, None] * unit[..., None, :])
    identity = torch.eye(panel_gram.shape[-1], dtype=dtype, device=panel_gram.device)
    to_panel = torch.linalg.cholesky_ex(equilibrated + shift * identity).L.mT * unit[..., None, :]
    panel = tall.each(
        lambda own, upper: torch.linalg.solve_triangular(upper, own, upper=True, left=False), panel, to_panel
    )
    panel_gram = ops.gram(panel)
    transform, triangle = _ranked_core(panel_gram, (length > 0).to(dtype), 16 * k * eps)
    triangle = triangle @ to_panel
    if order is not None:
        place = order.argsort(-1)
        transform, triangle = tall.columns_at(transform, place), _permuted(triangle, place)
    return panel, transform, triangle


def _ranked_core(gram: Tensor, scale: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return T and R with P ≈ (P T) R for the P of this Gram matrix, also where its columns depend on one another.

    A column that depends on the ones before it is dropped, and with it the noise of those times its coefficients on
    them: no noise any more where a coefficient on a weak column is large. So the columns are taken in an order in which
    none is measured against much weaker ones. On a CPU, where it is known whether any has to go, the eigenvectors of G
    serve then, of which the least go. Columns none of which has to go can still grow under elimination in their order.
    """
    if ops.reads_are_free(gram):
        transform, live = ops.cholesky_inverse_core(gram, scale, threshold)
        triangle = transform.mT @ gram
        all_live = bool(_nothing_goes(live, scale).all())
        if all_live and _amplification(transform, triangle, scale) <= _AMPLIFIED:
            return transform, triangle
        if not (all_live or gram.requires_grad):
            with suppress(LinAlgError):
                return _principal(gram, scale, threshold)
    order = _order(gram, scale, threshold)
    transform, _ = ops.cholesky_inverse_core(_permuted(gram, order), scale.gather(-1, order), threshold)
    transform = _permuted(transform, order.argsort(-1))
    return transform, transform.mT @ gram


def _amplification(transform: Tensor, triangle: Tensor, scale: Tensor) -> float:
    """Return the factor by which |T| |R| at most multiplies the rounding of P T, relative to the length of a column."""
    if scale.numel() == 0:
        return 0.0
    unit = torch.where(scale > 0, scale, 1)
    growth = (unit[..., None, :] @ (transform.abs() @ triangle.abs())).squeeze(-2) / unit
    return growth.amax().item()


def _principal(gram: Tensor, scale: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return T and R for the span of the eigenvectors of D G D, D = 1/scale, whose eigenvalues are above the threshold.

    The columns of P D V Λ^(−½) may be turned among themselves, by rounding alone where eigenvalues agree. They are
    turned into those of Gram–Schmidt on the columns of P, in an order in which none is measured against weaker ones.
    """
    unit = torch.where(scale > 0, 1 / scale, 0)
    equilibrated = gram * unit[..., :, None] * unit[..., None, :]
    finite = equilibrated.sum((-2, -1)).isfinite()[..., None, None]
    values, vectors = (part.flip(-1) for part in torch.linalg.eigh(torch.where(finite, equilibrated, 0)))
    kept = values > threshold
    roots = torch.where(kept, values, 0).sqrt()
    order = _order(gram, scale, threshold)
    root = (vectors * roots[..., None, :]).mT
    turn, inner = torch.linalg.qr(tall.columns_at(root, order))
    # Each column goes to the place of that of P which it came from; as many live as eigenvalues are kept.
    turn = turn * (signs_of(inner.diagonal(dim1=-2, dim2=-1)) * kept)[..., None, :]
    turn = tall.columns_at(turn, order.argsort(-1))
    scaled = vectors * torch.where(kept, 1 / roots, 0)[..., None, :]
    transform = unit[..., :, None] * (scaled @ turn)
    # TᵀG is the same in exact arithmetic. Eigenvalues near the threshold are rounding of G in good part, but not here.
    triangle = turn.mT @ root * scale[..., None, :]
    return torch.where(finite, transform, float("nan")), torch.where(finite, triangle, float("nan"))


def _permuted(gram: Tensor, order: Tensor) -> Tensor:
    """Return Πᵀ G Π."""
    return tall.columns_at(tall.columns_at(gram, order).mT, order).mT


def _order(gram: Tensor, scale: Tensor, threshold: float) -> Tensor:
    """Take first what stands out of longer columns at a coarse threshold, then at a finer one, then the rest.

    Pivoting, three levels deep: a coefficient on an earlier column is at most about θ^(−1/6). Columns that all stand
    out clearly of the ones before them stay in their order.
    """
    levels = (threshold ** (1 / 3), threshold ** (2 / 3))
    clear = _nothing_goes(ops.live_columns(gram, scale, levels[0]), scale)
    natural = torch.arange(scale.shape[-1], device=scale.device)
    order = torch.where(clear, natural, gram.diagonal(dim1=-2, dim2=-1).argsort(-1, descending=True))
    for level in levels:
        live = ops.live_columns(_permuted(gram, order), scale.gather(-1, order), level)
        order = order.gather(-1, torch.argsort((~live).to(torch.uint8), dim=-1, stable=True))
    return order


def _nothing_goes(live: Tensor, scale: Tensor) -> Tensor:
    """Say whether all columns live that are not zero: bool (..., 1)."""
    return (live | (scale == 0)).all(-1, keepdim=True)
