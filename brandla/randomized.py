"""Randomized decompositions from matrix products: Nyström for positive semi-definite matrices, and the SVD."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Generator, Tensor

from brandla import _check
from brandla._ranges import ranged
from brandla._sharded import is_dtensor
from brandla._small import leading_eigh, safe_eigh, safe_svd
from brandla.lowrank import LowRankEigh, LowRankSVD
from brandla.orthonormal import factorize, orthonormalize, spanning
from brandla_kernels import signs, sketch
from brandla_kernels.gram import inner_product

# Among at most _SMALL rows of random signs, _SMALL_WIDTH columns are dependent with a probability below 10⁻⁶.
_SMALL = 128
_SMALL_WIDTH = 32


class LinearOperator(Protocol):
    """Any object with ``shape``, ``dtype``, ``device``, and ``@`` with a tensor on the right.

    `randomized_svd` and `eigh_refresh` also need the transposed product: an attribute ``mT`` that multiplies, or
    ``tensor @ operator``. Sparse tensors (m, n) of torch are linear operators as they are.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """(m, n)."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the products."""

    @property
    def device(self) -> torch.device:
        """Device of the products."""

    def __matmul__(self, other: Tensor, /) -> Tensor:
        """Product with a block of vectors (n, p)."""


Matrix = Tensor | LinearOperator


@ranged("n,n", "r")
def randomized_eigh(
    matrix: Matrix,
    rank: int,
    *,
    oversample: int = 10,
    power_iterations: int = 2,
    generator: Generator | None = None,
    start: Tensor | None = None,
) -> LowRankEigh:
    """Leading ``rank`` eigenpairs of a symmetric positive semi-definite matrix by randomized Nyström approximation.

    Equivalent to the leading eigenpairs of ``torch.linalg.eigh(matrix)`` up to the error below, with
    ``power_iterations + 1`` products of M with n × (rank + oversample) blocks in place of O(n³) operations.

    Parameters
    ----------
    matrix
        M, a tensor (..., n, n), a sparse tensor (n, n) or a linear operator (n, n). Symmetric positive semi-definite,
        which `brandla.checked` verifies as far as the result shows it. Half precision gives a result in float32.
    rank
        Number of eigenpairs, at most n.
    oversample, power_iterations
        Extra columns of the random start, which are dropped at the end; and products with M before the product that
        Nyström uses, each followed by orthonormalisation.
    generator
        Draws the seed of the random signs. By default, the generator of the device does.
    start
        A basis (..., n, s) that replaces the first s ≤ rank + oversample columns of random signs: typically the
        eigenvectors of the last result, if the matrix has moved little. ``power_iterations`` of 0 or 1 is then enough.
        Random signs replace a zero column.

    Notes
    -----
    0 ⪯ M̂ ⪯ M to rounding; eigenvalues below about √n·ε·‖M‖_F are not resolved. Entries of M may be as large as
    max/(2n) and its norm as small as tiny/ε of the dtype. The derivative may be NaN if the rank of M is below rank +
    oversample, the number of columns of the start. It is not defined if the rank of M is below ``rank``. Source: J.
    Tropp, A. Yurtsever, M. Udell, V. Cevher, "Fixed-rank approximation of a positive-semidefinite matrix from streaming
    data", NeurIPS 2017, algorithm 3. Derivation: ``docs/randomized.md``.

    Examples
    --------
    >>> import torch, brandla
    >>> eigh = brandla.randomized_eigh(torch.diag(1 / torch.arange(1.0, 101)), rank=3)
    >>> eigh.eigenvalues.round(decimals=3)
    tensor([1.0000, 0.5000, 0.3330])
    """
    function = "randomized_eigh"
    rows, n = check_matrix(function, matrix)
    if rows != n:
        _check.fail_value(function, f"matrix must be square; got {tuple(matrix.shape)}; see randomized_svd")
    width = _sketch_width(function, rank, oversample, power_iterations, n, f"the order n = {n}")
    if start is not None:
        _check_start(function, matrix, start, width)
    if width == n:
        # A sketch as large as the matrix would save nothing.
        dense = product(function, matrix, _identity(matrix, n))
        _check.semidefinite(function, "matrix", dense, matrix.dtype)
        values, vectors = leading_eigh((dense + dense.mT) / 2, rank, dense.dtype)
        return LowRankEigh(values, vectors)
    if start is None and power_iterations:
        image = _sketch(function, matrix, width, generator)
    else:
        test = _signs(matrix, width, generator)
        if start is not None:
            filled = torch.where((start == 0).all(-2, keepdim=True), test[..., : start.shape[-1]], start)
            test = torch.cat([filled.to(test.dtype), test[..., start.shape[-1] :]], -1)
        if power_iterations == 0:
            test, _ = orthonormalize(test)
        image = product(function, matrix, test)
    scale = scale_of(image)
    for _ in range(power_iterations):
        test = spanning(image / scale)
        image = product(function, matrix, test)
    values, vectors = _nystrom(test, image / scale, rank, matrix.dtype)
    return LowRankEigh(values * scale[..., 0], vectors)


@ranged("m,n", "r")
def randomized_svd(
    matrix: Matrix, rank: int, *, oversample: int = 10, power_iterations: int = 2, generator: Generator | None = None
) -> LowRankSVD:
    """Leading ``rank`` singular triplets of a matrix by a randomized range finder.

    Equivalent to the leading triplets of ``torch.linalg.svd(matrix)`` up to the error below, with
    ``2 * power_iterations + 2`` products of X or Xᵀ with blocks of rank + oversample columns.

    Parameters
    ----------
    matrix
        X, a tensor (..., m, n), a sparse tensor (m, n) or a linear operator (m, n); its dtype as in `randomized_eigh`.
    rank
        Number of triplets, at most min(m, n).
    power_iterations
        Products with X Xᵀ after the first product. Each half is followed by orthonormalisation.
    oversample, generator
        As in `randomized_eigh`.

    Notes
    -----
    Without power iterations and for a Gaussian test matrix, E‖X − QQᵀX‖_F² ≤ (1 + r/(p − 1)) Σ_{j>r} σ_j² with p =
    ``oversample`` ≥ 2. The test matrix here has random signs. Entries of X may be as large as max/(m + n) of the dtype,
    and its norm as small as tiny/ε. Source: N. Halko, P.-G. Martinsson, J. Tropp, SIAM Review 53 (2011), algorithms 4.4
    and 5.1, theorem 10.5. Derivation: ``docs/randomized.md``.

    Examples
    --------
    >>> import torch, brandla
    >>> svd = brandla.randomized_svd(torch.diag(1 / torch.arange(1.0, 101)), rank=3)
    >>> svd.S.round(decimals=3)
    tensor([1.0000, 0.5000, 0.3330])
    """
    function = "randomized_svd"
    m, n = check_matrix(function, matrix)
    because = f"min(m, n) with m = {m}, n = {n}"
    width = _sketch_width(function, rank, oversample, power_iterations, min(m, n), because)
    if width == m:
        basis = _identity(matrix, m)
    else:
        image = _sketch(function, matrix, width, generator)
        scale = scale_of(image)
        for _ in range(power_iterations):
            rows = spanning(product(function, matrix, spanning(image / scale), adjoint=True) / scale)
            image = product(function, matrix, rows)
        basis, _ = orthonormalize(image / scale)
    image = product(function, matrix, basis, adjoint=True)
    scale = scale_of(image)
    rows, triangle = orthonormalize(image / scale)
    left, values, right = safe_svd(triangle.mT, triangle.dtype)
    dtype = basis.dtype
    return LowRankSVD(
        basis @ left[..., :rank].to(dtype),
        values[..., :rank].to(dtype) * scale[..., 0],
        (rows @ right[..., :rank].to(dtype)).mT,
    )


def _nystrom(test: Tensor, image: Tensor, rank: int, dtype: torch.dtype) -> LowRankEigh:
    """Leading eigenpairs of Y (XᵀY)⁺ Yᵀ for Y = M X: the Nyström approximation of M from the range of X."""
    n = test.shape[-2]
    norm = torch.linalg.vector_norm(image, dim=(-2, -1), keepdim=True)
    shift = n**0.5 * torch.finfo(image.dtype).eps * norm
    image = image + shift * test
    inner = (test.mT @ image).double()
    _check.semidefinite("randomized_eigh", "matrix", inner, dtype)
    inner_values, inner_vectors = safe_eigh((inner + inner.mT) / 2)
    resolved = inner_values > inner.shape[-1] * torch.finfo(inner.dtype).eps * inner_values[..., :1]
    root = inner_vectors * torch.where(resolved, inner_values, 1).rsqrt()[..., None, :] * resolved[..., None, :]
    panel, transform, triangle = factorize(image)
    half = triangle.double() @ root
    values, rotation = leading_eigh(half @ half.mT, rank, image.dtype)
    values = (values - shift[..., 0]).clamp_min(0)
    return LowRankEigh(values, panel @ (transform @ rotation))


def scale_of(image: Tensor) -> Tensor:
    """Return a power of two (..., 1, 1). Dividing an image by it is exact, and keeps products of columns in range."""
    if not image.numel():
        return image.new_ones(*image.shape[:-2], 1, 1)
    largest = image.detach().abs().amax((-2, -1), keepdim=True)
    largest = torch.where(largest > 0, largest, 1)
    return largest / torch.frexp(largest).mantissa


def _sketch(function: str, matrix: Matrix, width: int, generator: Generator | None) -> Tensor:
    """Return X Ω for a test matrix Ω of random signs. The op for a dense X draws Ω as it multiplies."""
    if width == matrix.shape[-1]:
        return product(function, matrix, _identity(matrix, width))
    if is_dense(matrix):
        seed = torch.randint(2**63 - 1, (), device=matrix.device, generator=generator)
        return sketch(cast(Tensor, matrix), seed, width)
    return product(function, matrix, _signs(matrix, width, generator))


def _identity(matrix: Matrix, order: int) -> Tensor:
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    return torch.eye(order, dtype=dtype, device=matrix.device).expand(*matrix.shape[:-2], order, order)


def _signs(matrix: Matrix, width: int, generator: Generator | None) -> Tensor:
    dtype, (*batch, _, n) = torch.promote_types(matrix.dtype, torch.float32), matrix.shape
    # The seed is drawn on the device, so that the host does not wait.
    seed = torch.randint(2**63 - 1, (), device=matrix.device, generator=generator)
    return signs(seed, n, width, batch_shape=tuple(batch), dtype=dtype)


def check_matrix(function: str, matrix: Matrix) -> tuple[int, int]:
    """Check a tensor or a linear operator, and return its numbers of rows and columns."""
    if isinstance(matrix, Tensor):
        _check.data(function, "matrix", matrix)
        if matrix.ndim < 2:
            _check.fail_value(function, f"matrix must have shape (..., m, n); got {tuple(matrix.shape)}")
        if matrix.ndim > 2 and not is_dense(matrix):
            _check.fail_value(function, f"a sparse matrix must have shape (m, n); got {tuple(matrix.shape)}")
        if is_dtensor(matrix):
            rule = "matrix must be a plain tensor or a linear operator"
            _check.fail_type(function, f"{rule}; got a DTensor; take its .full_tensor(), or an operator that holds it")
    else:
        missing = [name for name in ("shape", "dtype", "device", "__matmul__") if not hasattr(matrix, name)]
        if missing:
            rule = "matrix must be a tensor or a linear operator with shape, dtype, device and @"
            _check.fail_type(function, f"{rule}; {type(matrix).__name__} has no {', '.join(missing)}")
        if len(matrix.shape) != 2:
            _check.fail_value(function, f"a linear operator must have shape (m, n); got {tuple(matrix.shape)}")
        dtype: object = matrix.dtype
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            _check.fail_type(function, f"matrix.dtype must be a real floating-point torch.dtype; got {dtype!r}")
    return int(matrix.shape[-2]), int(matrix.shape[-1])


def _sketch_width(function: str, rank: int, oversample: int, power_iterations: int, most: int, because: str) -> int:
    _check.count(function, "rank", rank, 1)
    _check.count(function, "oversample", oversample, 0)
    _check.count(function, "power_iterations", power_iterations, 0)
    if rank > most:
        _check.fail_value(function, f"rank must be at most {most}, {because}; got {rank}")
    # Short columns of random signs may be dependent. With _SMALL_WIDTH of them, or all, the span is large enough.
    least = _SMALL_WIDTH if most <= _SMALL else 0
    return min(max(rank + oversample, least), most)


def _check_start(function: str, matrix: Matrix, start: Tensor, width: int) -> None:
    _check.basis(function, "start", start)
    _check.same_device(function, "start", start, "matrix", cast(Tensor, matrix))
    lead, s = tuple(matrix.shape[:-1]), start.shape[-1]
    if tuple(start.shape[:-1]) != lead or s > width:
        rule = f"start must have shape ({', '.join(map(str, lead))}, s) with s ≤ rank + oversample, here {width}"
        _check.fail_value(function, f"{rule}; got {tuple(start.shape)}")


def product(function: str, matrix: Matrix, block: Tensor, *, adjoint: bool = False) -> Tensor:
    """Return X V, or XᵀV if ``adjoint``. The product with a dense tensor takes long sums in slabs."""
    if is_dense(matrix):
        dense = cast(Tensor, matrix)
        return inner_product((dense if adjoint else dense.mT).to(block.dtype), block)
    result: object
    if not adjoint:
        result = matrix @ block.to(matrix.dtype)
    elif hasattr(matrix, "mT"):
        result = matrix.mT @ block.to(matrix.dtype)
    elif hasattr(matrix, "__rmatmul__"):
        result = (block.to(matrix.dtype).mT @ cast(Any, matrix)).mT
    else:
        rule = "the operator must have a transposed product, by attribute mT or by tensor @ operator"
        _check.fail_type(function, f"{rule}; {type(matrix).__name__} has neither")
    expected = (matrix.shape[1 if adjoint else 0], block.shape[1])
    if not isinstance(result, Tensor) or tuple(result.shape) != expected:
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        _check.fail_value(function, f"the operator's product must be a tensor of shape {expected}; got {got}")
    return result.to(block.dtype)


def is_dense(matrix: Matrix) -> bool:
    """Return whether the matrix is a tensor that is not sparse."""
    return isinstance(matrix, Tensor) and matrix.layout == torch.strided
