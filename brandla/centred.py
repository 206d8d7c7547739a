"""The state of a centred stream: a decomposition of columns less their mean, with the mean."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from brandla import _check
from brandla._sharded import rows_of
from brandla._value import Value, number
from brandla.lowrank import LowRankSVD
from brandla_kernels import project, without_autocast


class _CentredParts(NamedTuple):
    svd: LowRankSVD
    mean: Tensor
    weight: Tensor
    scatter: Tensor


class Centred(Value, _CentredParts):
    """The left half of an SVD of columns less their mean, with the mean: a streaming principal component analysis.

    Start one with `centre`, feed it to `brandla.svd_append`, and join two with `brandla.merge`. The columns of
    ``svd.U`` are the principal axes. Right vectors are not kept: a moving mean moves every column seen.

    Parameters
    ----------
    svd
        LowRankSVD with an empty Vh (..., r, 0).
    mean
        Shape (..., m), float64: the mean of the columns so far, weighted as decay weights them.
    weight
        Tensor of batch shape, float64: the number N of columns so far, weighted in the same way.
    scatter
        Tensor of batch shape, float64: Σ‖x − mean‖² of the columns so far, what truncation left out included.

    Examples
    --------
    >>> import torch, brandla
    >>> stream = brandla.centre(brandla.LowRankSVD.zeros(64, 0, rank=8))
    >>> for batch in torch.randn(4, 64, 32):
    ...     stream = brandla.svd_append(stream, batch)
    >>> stream.transform(torch.randn(64, 5)).shape
    torch.Size([8, 5])
    """

    __slots__ = ()
    _remedy = "brandla.merge joins two streams; decay= of brandla.svd_append scales what was seen"

    def to(self, *args: Any, **kwargs: Any) -> Centred:
        """Return the value on another device, or its decomposition in another dtype: arguments as in `Tensor.to`."""
        svd = self.svd.to(*args, **kwargs)
        return Centred(svd, *(part.to(svd.device) for part in self[1:]))

    def explained_variance(self, correction: float = 1) -> Tensor:
        """Return the variances S²/(N − correction) along the axes, shape (..., r), descending.

        The default divides by N − 1, as ``torch.var`` and scikit-learn do: the unbiased estimate of a sample.
        ``correction=0`` divides by N. With a decay below 1, N is the sum of the weights, and the estimate is biased.
        """
        return (self.svd.S.double().square() / (self.weight - correction)[..., None]).to(self.dtype)

    def explained_variance_ratio(self) -> Tensor:
        """Return the share of each axis in the total variance, shape (..., r): the same with N and with N − 1."""
        return (self.svd.S.double().square() / self.scatter[..., None]).to(self.dtype)

    @without_autocast
    def transform(self, columns: Tensor) -> Tensor:
        """Return the coordinates Uᵀ(X − mean) of columns X (..., m, k) along the axes, shape (..., r, k)."""
        columns = _check.columns("Centred.transform", "columns", columns, "svd.U", self.svd.U)
        return project(self.svd.U, less(columns, self.mean))

    @without_autocast
    def inverse_transform(self, coordinates: Tensor) -> Tensor:
        """Return U Z + mean for coordinates Z (..., r, k), shape (..., m, k)."""
        coordinates = _check.columns("Centred.inverse_transform", "coordinates", coordinates, "svd.U.mT", self.svd.U.mT)
        return ((self.svd.U @ coordinates).double() + self.mean[..., None]).to(self.dtype)

    def is_finite(self) -> Tensor:
        """Return, with no device sync, a bool tensor of batch shape: False where non-finite data came in."""
        return torch.isfinite(self.scatter)

    def _facts(self) -> list[str]:
        return [repr(self.svd), *number("weight", self.weight)]


def less(columns: Tensor, mean: Tensor) -> Tensor:
    """Return columns X (..., m, k) less a float64 mean (..., m), in the dtype of X: what is near it loses no digit."""
    high = mean.to(columns.dtype)
    return columns - high[..., None] - (mean - high).to(columns.dtype)[..., None]


def centre(svd: LowRankSVD) -> Centred:
    """Start a centred stream from an SVD that has seen no columns, such as ``LowRankSVD.zeros(m, 0, rank)``.

    Raises
    ------
    ValueError
        If ``svd`` holds columns: their mean is not known.

    Examples
    --------
    >>> import torch, brandla
    >>> stream = brandla.centre(brandla.LowRankSVD.zeros(5, 0, rank=2))
    >>> stream = brandla.svd_append(stream, torch.randn(5, 100) + 7)
    >>> (stream.mean > 6).all()
    tensor(True)
    """
    _check.svd("centre", "svd", svd)
    if svd.Vh.shape[-1] != 0:
        rule = "svd must have seen no columns, since their mean is not known"
        _check.fail_value("centre", f"{rule}; its Vh has {svd.Vh.shape[-1]}; start from LowRankSVD.zeros(m, 0, rank)")
    rows = rows_of("centre", "svd.U", svd.U, svd.S)
    left = rows.local("centre", "svd.U", svd.U)
    mean = rows.tall_result(left.new_zeros(left.shape[:-1], dtype=torch.float64), -1)
    nothing = left.new_zeros(left.shape[:-2], dtype=torch.float64)
    return Centred(svd, mean, rows.small_result(nothing), rows.small_result(nothing.clone()))
