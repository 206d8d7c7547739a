"""`merge`: two streams of centred columns as one, such as those of two machines."""

from __future__ import annotations

import torch

from brandla import _check
from brandla._ranges import ranged
from brandla.centred import Centred
from brandla.lowrank import LowRankSVD, Rank
from brandla.svd import svd_append


@ranged("m,r,n", "m,r,n")
def merge(first: Centred, second: Centred, *, rank: int | Rank | None = None) -> Centred:
    """Join two centred streams: the decomposition of the columns of both about their common mean.

    If nothing was truncated, equivalent to one stream of the columns of ``first`` and then of ``second``, in O(m (r₁ +
    r₂)²) operations. Raises as `svd_append` does.

    Parameters
    ----------
    first, second
        `Centred` values of the same m, batch shape and dtype.
    rank
        Rank of the result, a number or a `brandla.Rank` rule: at most min(m, r₁ + r₂ + 1), by default r₁.

    Returns
    -------
    Centred
        New tensors: nothing is modified or shared.

    Notes
    -----
    Σ (x − μ)(x − μ)ᵀ over both is the sum of both about their own means and s sᵀ with
    s = √(N₁N₂/(N₁ + N₂)) (μ₂ − μ₁): the columns U₂ diag(S₂) and s are appended to the first.

    References
    ----------
    D. Ross, J. Lim, R.-S. Lin, M.-H. Yang, "Incremental learning for robust visual tracking", Int. J. Comput. Vis. 77
    (2008), for the shift of the mean.

    Examples
    --------
    >>> import torch, brandla
    >>> start = brandla.centre(brandla.LowRankSVD.zeros(64, 0, rank=8))
    >>> first, second = (brandla.svd_append(start, torch.randn(64, 32)) for _ in range(2))
    >>> brandla.merge(first, second).weight
    tensor(64., dtype=torch.float64)
    """
    for name, state in (("first", first), ("second", second)):
        _check.centred("merge", name, state)
    (svd, mean, weight, scatter), (other, other_mean, other_weight, other_scatter) = first, second
    _check.columns("merge", "second.svd.U", other.U, "first.svd.U", svd.U)
    total = weight + other_weight
    share = torch.where(total > 0, other_weight / total, 0)
    shift = (other_mean - mean) * (weight * share).sqrt()[..., None]
    columns = torch.cat([other.U * other.S[..., None, :], shift.to(svd.dtype)[..., None]], dim=-1)
    joined = svd_append(svd, columns, rank=rank)
    return Centred(
        LowRankSVD(joined.U, joined.S, joined.Vh[..., :0]),
        mean + (other_mean - mean) * share[..., None],
        total,
        scatter + other_scatter + shift.square().sum(-1),
    )
