"""The small dense problems: eigen- and singular value decompositions that do not fail, and truncation without one."""

from __future__ import annotations

import torch
from torch import Tensor

# torch.linalg does not list its error in __all__.
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from brandla.orthonormal import orthonormalize
from brandla.rank import above
from brandla_kernels import cholesky_inverse_core, gram, tall

# Value given to coordinates that no data occupies, relative to the largest eigenvalue: far from every real one,
# so that no rounding mixes an empty coordinate into an eigenvector.
_EMPTY = -1.0


def safe_eigh(core: Tensor, dtype: torch.dtype | None = None, keep: int | None = None) -> tuple[Tensor, Tensor]:
    """Eigendecomposition of a small symmetric positive semi-definite matrix, descending, that survives hard cores.

    The core is scaled by its largest diagonal entry. A coordinate whose diagonal entry is 0 is empty: it gets a zero
    eigenvector and the value 0, after all others. A core with a non-finite entry gives NaN throughout. Where LAPACK
    fails to converge or returns non-finite values, the decomposition is repeated in float64 (``docs/brand.md``).

    Parameters
    ----------
    core
        (..., m, m).
    dtype
        Precision of the decomposition and of the result; that of ``core`` by default.
    keep
        Number of leading eigenvectors to return; all by default.

    Returns
    -------
    tuple
        Eigenvalues (..., m) and eigenvectors (..., m, keep).

    Raises
    ------
    RuntimeError
        If the decomposition fails in float64 as well.
    """
    dtype = dtype or core.dtype
    diagonal = core.diagonal(dim1=-2, dim2=-1)
    if core.shape[-1] == 0:
        return diagonal.to(dtype), core[..., :keep].to(dtype)
    finite = _is_finite(core)
    largest = diagonal.amax(-1)
    scale = torch.where(finite & (largest > 0), largest, 1)
    normalized = (core / scale[..., None, None]).masked_fill_(~finite[..., None, None], 0).to(dtype)
    normalized.diagonal(dim1=-2, dim2=-1).add_(torch.where(diagonal > 0, 0.0, _EMPTY))
    values, vectors = _eigh_with_retry(normalized)
    values, vectors = values.flip(-1), vectors.flip(-1)[..., :keep]
    vectors = vectors * (values[..., :keep] > _EMPTY / 2)[..., None, :]
    values = values.clamp_min(0) * scale[..., None].to(dtype)
    return _poison(values, finite[..., None]), _poison(vectors, finite[..., None, None])


def safe_svd(core: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition of a small matrix whose empty rows and columns stay empty.

    Always in float64; values below 4·ε of ``dtype`` relative to the largest are rounding noise of the data and become
    0, with zero vectors. A core with a non-finite entry gives NaN throughout. Returns U (..., p, m), S (..., m) and
    V (..., q, m), not transposed.
    """
    core = core.double()
    if core.numel() == 0:
        *batch_shape, p, q = core.shape
        kept = min(p, q)
        return (
            core.new_zeros(*batch_shape, p, kept),
            core.new_zeros(*batch_shape, kept),
            core.new_zeros(*batch_shape, q, kept),
        )
    finite = _is_finite(core)
    clean = torch.where(finite[..., None, None], core, 0)
    scale = clean.abs().amax((-2, -1))
    scale = torch.where(scale > 0, scale, 1)[..., None]
    left, values, right = torch.linalg.svd(clean / scale[..., None], full_matrices=False)
    left = left * (clean.abs().amax(-1) > 0)[..., :, None]
    right = right.mT * (clean.abs().amax(-2) > 0)[..., :, None]
    # A vector of an empty coordinate has no value, even where rounding of the others is above the threshold.
    alive = (values > 4 * torch.finfo(dtype).eps * values[..., :1]) & _has_length(left) & _has_length(right)
    left = _orthonormal_again(left * alive[..., None, :])
    right = _orthonormal_again(right * alive[..., None, :])
    values = values * scale * alive
    return (
        _poison(left, finite[..., None, None]),
        _poison(values, finite[..., None]),
        _poison(right, finite[..., None, None]),
    )


def polish(vectors: Tensor) -> Tensor:
    """One Newton–Schulz step towards the nearest orthonormal columns.

    LAPACK's eigenvectors are orthonormal to some ten ε, which thousands of updates would add up.
    """
    return 1.5 * vectors - vectors @ (vectors.mT @ vectors) / 2


def largest_eigenvalue(core: Tensor) -> Tensor:
    """Estimate the largest eigenvalue of a positive semi-definite core (..., r, r) from below, with no sync.

    Four power iterations from the column of the largest diagonal entry.
    """
    diagonal = core.diagonal(dim1=-2, dim2=-1)
    if core.shape[-1] == 0:
        return diagonal.sum(-1)
    vector = tall.columns_at(core, diagonal.argmax(-1, keepdim=True))
    tiny = torch.finfo(core.dtype).tiny
    for _ in range(4):
        vector = core @ (vector / torch.linalg.vector_norm(vector, dim=-2, keepdim=True).clamp_min(tiny))
    return torch.maximum(torch.linalg.vector_norm(vector, dim=(-2, -1)), diagonal.amax(-1))


def truncate_by_subspace(
    core: Tensor, rank: int, iterations: int, dtype: torch.dtype, tol: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Rank-``rank`` compression of a positive semi-definite core by subspace iteration: no eigendecomposition.

    W starts as the unit vectors of the largest diagonal entries of K, which, unlike the old basis, also see directions
    orthogonal to it. All but the last iteration are W ← orth(K W); the last is the Nyström approximation
    Y (WᵀY)⁻¹ Yᵀ ⪯ K with Y = K W, whose range is that of one more product. Where nothing has to go, W = I.

    Parameters
    ----------
    core
        K (..., m, m), float64.
    rank, iterations
        Order of the result, and products with K, at least 1.
    dtype
        Precision of the factor: eigenvalues below its ε·‖K‖ may be lost.
    tol
        Terms of the approximation up to ``tol`` times the largest are left out.

    Returns
    -------
    tuple
        S (..., rank, rank) and W (..., m, rank), float64, with W S Wᵀ ⪯ K; NaN throughout for a non-finite core.
    """
    diagonal = core.diagonal(dim1=-2, dim2=-1)
    finite = _is_finite(core)[..., None, None]
    if rank == 0:
        return core[..., :0, :0], core[..., :0]
    if rank == core.shape[-1] and tol == 0:
        identity = torch.eye(rank, dtype=core.dtype, device=core.device).expand_as(core).clone()
        return _poison((core + core.mT) / 2, finite), _poison(identity, finite)
    largest = diagonal.amax(-1)[..., None, None]
    scale = torch.where(finite & (largest > 0), largest, 1)
    normalized = (core / scale).masked_fill_(~finite, 0)
    order = torch.where(finite[..., 0], diagonal, 0).topk(rank, dim=-1).indices
    image = tall.columns_at(normalized, order)
    inner = tall.columns_at(image.mT, order)
    size = inner.diagonal(dim1=-2, dim2=-1)
    for _ in range(iterations - 1):
        # Only the span matters here, so columns may come out less than orthonormal, but none that is left may be lost.
        rotation = _orthonormal_basis(image, dtype, _lowest_threshold(rank))
        image = normalized @ rotation
        inner = rotation.mT @ image
        size = (rotation.abs() * (normalized.abs() @ rotation.abs())).sum(-2)
    # K is known to the factor's ε in every entry, and no more semi-definite than that; so wᵀK w to ε |w|ᵀ|K||w|.
    # K̂ = F Fᵀ, a sum of terms: leaving some out keeps K̂ ⪯ K.
    root = image @ _inverse_root(inner, 2 * rank * torch.finfo(dtype).eps * size)
    root = root * above(root.square().sum(-2), tol)[..., None, :]
    # A column that keeps 10⁻⁴ of its length is orthonormal to 10⁻⁷; the rest is 10⁻⁸ of an eigenvalue.
    rotation, triangle = _orthonormal_columns(root, dtype, 1e-8)
    compressed = triangle @ triangle.mT
    # A product with a transpose is symmetric only to rounding.
    compressed = (compressed + compressed.mT) * (scale / 2)
    return _poison(compressed, finite), _poison(rotation, finite)


def _inverse_root(inner: Tensor, rounding: Tensor) -> Tensor:
    """T with T Tᵀ = H⁺ for a positive semi-definite H: columns of a Nyström sketch that add nothing become zero.

    So do those that add no more than ``rounding`` (..., rank), by which the Nyström approximation would divide.
    """
    inner = (inner + inner.mT) / 2
    threshold = _lowest_threshold(inner.shape[-1])
    squares = torch.maximum(inner.diagonal(dim1=-2, dim2=-1).clamp_min(0), rounding / threshold)
    return cholesky_inverse_core(inner, squares.sqrt(), threshold)[0]


def _lowest_threshold(order: int) -> float:
    """Threshold just above the rounding of a float64 Gram matrix of columns of this length."""
    return 64 * order * torch.finfo(torch.float64).eps


def _eigh_with_retry(matrix: Tensor) -> tuple[Tensor, Tensor]:
    try:
        values, vectors = torch.linalg.eigh(matrix)
        # NaN and infinity survive a sum, which is read at a tenth of the cost of every entry's own test.
        if bool(torch.isfinite(values.sum() + vectors.sum())):
            return values, vectors
    except LinAlgError:
        pass
    try:
        values, vectors = torch.linalg.eigh(matrix.double())
    except LinAlgError as error:
        order = matrix.shape[-1]
        message = (
            f"brandla: eigendecomposition of a finite core of order {order} failed in {matrix.dtype} and in float64;"
            " use subspace_update, which needs none"
        )
        raise RuntimeError(message) from error
    return values.to(matrix.dtype), vectors.to(matrix.dtype)


def _orthonormal_columns(matrix: Tensor, dtype: torch.dtype, threshold: float) -> tuple[Tensor, Tensor]:
    """Q and R of a small float64 matrix by Cholesky QR; columns that depend on earlier ones become zero.

    For float32 factors one pass in float64 is enough. Float64 factors take the iterated form, with its own threshold.
    """
    if dtype == matrix.dtype:
        return orthonormalize(matrix)
    transform, inner = _cholesky_transform(matrix, threshold)
    return matrix @ transform, transform.mT @ inner


def _orthonormal_basis(matrix: Tensor, dtype: torch.dtype, threshold: float) -> Tensor:
    """Q of `_orthonormal_columns` alone."""
    if dtype == matrix.dtype:
        return orthonormalize(matrix)[0]
    return matrix @ _cholesky_transform(matrix, threshold)[0]


def _cholesky_transform(matrix: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """T with Q = M T orthonormal but for zero columns, and MᵀM."""
    inner = gram(matrix)
    scale = inner.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    return cholesky_inverse_core(inner, scale, threshold)[0], inner


def _has_length(vectors: Tensor) -> Tensor:
    """Say which columns kept more than half of their squared length."""
    return vectors.square().sum(-2) > 0.5


def _orthonormal_again(vectors: Tensor) -> Tensor:
    """Orthonormalise what clearing the rows of empty coordinates left of unit vectors, or of zero ones."""
    inner = vectors.mT @ vectors
    transform, _ = cholesky_inverse_core(inner, _has_length(vectors).to(inner.dtype), 0.25)
    return vectors @ transform


def without_denormals(values: Tensor, dims: int = 1) -> Tensor:
    """Zero the values of a factor (the last ``dims`` dimensions) once the largest is no normal number any more.

    A stream that dies out would otherwise slow every product down with denormals, for good.
    """
    if values.numel() == 0:
        return values
    largest = values.abs().amax(tuple(range(-dims, 0)), keepdim=True)
    return torch.where(largest < torch.finfo(values.dtype).tiny, 0, values)


def _is_finite(core: Tensor) -> Tensor:
    """Bool tensor of batch shape, by one reduction: NaN and infinity survive a sum in float64."""
    return torch.isfinite(core.double().sum((-2, -1)))


def _poison(tensor: Tensor, finite: Tensor) -> Tensor:
    """Fill a new tensor with NaN, in place, where a core was not finite."""
    return tensor.masked_fill_(~finite, float("nan"))
