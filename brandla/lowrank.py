"""The values that flow through everything: low-rank factorisations as NamedTuples, and the rank they are kept at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from brandla import _check
from brandla._sharded import everywhere, is_dtensor, rows_of, zero_rows
from brandla._small import leading, unresolved
from brandla._value import Value, shown
from brandla.orthonormal import polish
from brandla_kernels import project, rounded_gram, without_autocast

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class _Matrix(Value):
    """What all matrices share, as products L diag(v) Rᵀ."""

    __slots__ = ()
    _sizes: ClassVar[str] = "n"
    _shown: ClassVar[str]  # what the values are called in one line

    @property
    def rank(self: Any) -> int:
        """Number of eigenpairs, of columns or of singular triplets kept."""
        # The last dimension of U, of S = FᵀF or of the singular values.
        kept: int = self[1].shape[-1]
        return kept

    @property
    def shape(self) -> torch.Size:
        """Shape of the matrix: (..., n, n), or (..., m, n) of a LowRankSVD."""
        left, _, right = _product(self)
        return torch.Size((*left.shape[:-1], right.shape[-2]))

    @without_autocast
    def __matmul__(self, block: Tensor) -> Tensor:
        """Return the product with X (n,) or (..., n, m), by products with the parts alone."""
        left, values, right = _product(self)
        converted = _check.matching_data(f"{type(self).__name__} @", "the tensor", block, "the value", right)
        columns = converted[..., None] if block.ndim == 1 else converted
        if block.ndim == 0 or columns.shape[-2] != right.shape[-2]:
            rule = f"the tensor must have {right.shape[-2]} rows"
            _check.fail_value(f"{type(self).__name__} @", f"{rule}; got shape {tuple(block.shape)}")
        if is_dtensor(right):
            inner = right.mT @ columns
        else:
            batch = torch.broadcast_shapes(columns.shape[:-2], right.shape[:-2])
            inner = project(*(part.expand(*batch, *part.shape[-2:]) for part in (right, columns)))
        product = left @ (inner if values is None else values[..., None] * inner)
        return product[..., 0] if block.ndim == 1 else product

    @without_autocast
    def dense(self) -> Tensor:
        """Return the whole matrix, a tensor of its shape: for tests and small cases."""
        left, values, right = _product(self)
        scaled = everywhere(left) if values is None else everywhere(left) * everywhere(values)[..., None, :]
        return scaled @ everywhere(right).mT

    def is_finite(self: Any) -> Tensor:
        """Return, with no device sync, a bool tensor of batch shape: False where non-finite data came in."""
        _, values, _ = _product(self)
        return torch.isfinite(self.gram).all(-1).all(-1) if values is None else torch.isfinite(values).all(-1)

    def _facts(self: Any) -> list[str]:
        _, values, _ = _product(self)
        batch = [f"batch {tuple(self.shape[:-2])}"] if len(self.shape) > 2 else []
        sizes = [f"{name}={size}" for name, size in zip(self._sizes, self.shape[-2:], strict=False)]
        parts = [f"rank={self.rank}", _check.spelled(self.dtype), str(self.device)]
        values = self.gram.diagonal(dim1=-2, dim2=-1) if values is None else values
        return [*batch, *sizes, *parts, *shown(self._shown, values, 1)]


class _Symmetric(_Matrix):
    """What the two kinds of symmetric matrices of order n share."""

    __slots__ = ()

    @classmethod
    def zeros(
        cls,
        n: int,
        rank: int,
        *,
        batch_shape: tuple[int, ...] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        mesh: DeviceMesh | None = None,
    ) -> Self:
        """Start a stream from the zero matrix of order ``n``, with room for ``rank`` eigenpairs or columns.

        Over a 1-D ``mesh`` U or F is a DTensor sharded on its rows, on the device of each process.
        """
        tall = zero_rows(f"{cls.__name__}.zeros", mesh, (*batch_shape, n, rank), dtype, device)
        sizes = (rank, rank) if cls is LowRankRoot else (rank,)
        made: Self = of_parts(cls, torch.zeros(*batch_shape, *sizes, dtype=dtype, device=tall.device), tall)
        return made

    @property
    def n(self) -> int:
        """Order of the matrix."""
        return parts_of(self)[1].shape[-2]

    def trace(self: Any) -> Tensor:
        """Return the trace of the matrix, of batch shape: the sum of the eigenvalues, or the trace of S."""
        terms: Tensor = self.gram.diagonal(dim1=-2, dim2=-1) if isinstance(self, LowRankRoot) else self.eigenvalues
        return terms.sum(-1)


class _EighParts(NamedTuple):
    eigenvalues: Tensor
    eigenvectors: Tensor


class LowRankEigh(_Symmetric, _EighParts):
    """M ≈ U diag(d) Uᵀ for a symmetric positive semi-definite M of order n.

    ``eigenvalues`` are d, shape (..., r), descending and >= 0, and ``eigenvectors`` U, shape (..., n, r), orthonormal
    columns. If the rank of the data runs out, a column whose value is 0 may be a zero column, so shapes never depend on
    the data.

    Examples
    --------
    >>> import torch, brandla
    >>> start = brandla.LowRankEigh.zeros(512, rank=8)
    >>> tracked = brandla.eigh_update(start, torch.randn(512, 32), decay=0.95, weight=0.05)
    >>> tracked.eigenvectors.shape
    torch.Size([512, 8])
    """

    __slots__ = ()
    _shown = "eigenvalues"
    _remedy = "brandla.eigh_update adds columns, of a matrix F Fᵀ those of F; its decay= and weight= scale"

    def largest_eigenvalue(self) -> Tensor:
        """Return d₁, of batch shape; 0 at rank 0."""
        values = self.eigenvalues
        return values[..., 0] if values.shape[-1] else values.sum(-1)


class _RootParts(NamedTuple):
    root: Tensor
    gram: Tensor


class LowRankRoot(_Symmetric, _RootParts):
    """M ≈ F Fᵀ, with S = FᵀF beside it: the form that is cheapest to update.

    Nothing in it is orthonormal, so nothing can lose orthogonality. M is held to about ε·d₁ (d₁ its largest
    eigenvalue): take it if damping is at least 10⁻⁴ d₁ in float32. `to_eigh` gives eigenvectors.

    ``root`` is F, shape (..., n, r), any columns, and ``gram`` S = FᵀF, shape (..., r, r), to rounding: the updates
    carry it along and do not measure it again.

    Examples
    --------
    >>> import torch, brandla
    >>> start = brandla.LowRankRoot.zeros(512, rank=8)
    >>> tracked = brandla.root_update(start, torch.randn(512, 32), decay=0.95, weight=0.05)
    >>> tracked.to_eigh().eigenvectors.shape
    torch.Size([512, 8])
    """

    __slots__ = ()
    _shown = "diagonal of gram"
    _remedy = "brandla.root_update adds columns, of a matrix F Fᵀ those of F; its decay= and weight= scale"

    @classmethod
    @without_autocast
    def from_eigh(cls, eigh: LowRankEigh) -> LowRankRoot:
        """Take over a LowRankEigh: F = U √d."""
        function = "LowRankRoot.from_eigh"
        rows = rows_of(function, "eigh.eigenvectors", eigh.eigenvectors, eigh.eigenvalues)
        values = rows.small(function, "eigh.eigenvalues", eigh.eigenvalues)
        vectors = rows.local(function, "eigh.eigenvectors", eigh.eigenvectors)
        root = vectors * rows.shared(values.sqrt())[..., None, :]
        return cls(rows.tall_result(root), rows.small_result(torch.diag_embed(values)))

    @without_autocast
    def to_eigh(self) -> LowRankEigh:
        """Return the LowRankEigh of the same matrix and rank, from a new Gram matrix of F.

        Costs 6nr² flops and an eigendecomposition of order r, which waits for the device. Eigenvalues up to 8 ε·d₁
        (√r ε·d₁ above rank 64) are not resolved: they become 0, with zero vectors.
        """
        function = "LowRankRoot.to_eigh"
        rows = rows_of(function, "root", self.root, self.gram)
        root = rows.local(function, "root", self.root)
        inner = rows.total(rounded_gram(root))
        r = root.shape[-1]
        values, rotation = leading(inner, min(r, self.n), root.dtype, unresolved(root.dtype, r), unit=True, n=self.n)
        vectors, values = polish(root @ rotation, values, rows)
        return LowRankEigh(rows.small_result(values), rows.tall_result(vectors))

    @without_autocast
    def largest_eigenvalue(self) -> Tensor:
        """Estimate d₁ from below by two power iterations on S, of batch shape, with no sync."""
        function = "LowRankRoot.largest_eigenvalue"
        rows = rows_of(function, "root", self.root, self.gram)
        gram = rows.small(function, "gram", self.gram)
        if gram.shape[-1] == 0:
            return rows.small_result(gram.sum((-2, -1)))
        tiny = torch.finfo(gram.dtype).tiny
        # From all unit vectors: exact for a diagonal.
        scale = gram.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(tiny)
        relative = gram / scale[..., None, None]
        lengths = torch.linalg.vector_norm(relative, dim=-2, keepdim=True).clamp_min(tiny)
        largest: Tensor = torch.linalg.vector_norm(relative @ (relative / lengths), dim=-2).amax(-1)
        return rows.small_result(largest * scale)


class _SVDParts(NamedTuple):
    U: Tensor
    S: Tensor
    Vh: Tensor


class LowRankSVD(_Matrix, _SVDParts):
    """X ≈ U diag(S) Vh, fields as in ``torch.linalg.svd``.

    ``U`` are left singular vectors, shape (..., m, r), orthonormal columns, ``S`` singular values, shape (..., r),
    descending and >= 0, and ``Vh`` right singular vectors as rows, shape (..., r, n). Where a value is 0, its column of
    U and its row of Vh may be zero.

    Examples
    --------
    >>> import torch, brandla
    >>> svd = brandla.randomized_svd(torch.diag(torch.tensor([3.0, 2.0, 1.0])), rank=2)
    >>> svd.S
    tensor([3., 2.])
    >>> svd.mT.shape
    torch.Size([3, 3])
    """

    __slots__ = ()
    _sizes = "mn"
    _shown = "values"
    _remedy = (
        "brandla.svd_update adds L Rᵀ, of another such value L = U * S[..., None, :] and R = Vh.mT; its decay= scales"
    )

    @classmethod
    def zeros(
        cls,
        m: int,
        n: int,
        rank: int,
        *,
        batch_shape: tuple[int, ...] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        mesh: DeviceMesh | None = None,
    ) -> LowRankSVD:
        """Start a stream from the zero matrix of shape (m, n), with room for ``rank`` singular triplets.

        ``n = 0`` starts a stream of appended columns; ``rank`` may then exceed ``n``. Over a 1-D ``mesh`` U is a
        DTensor sharded on its rows, on the device of each process.
        """
        left = zero_rows("LowRankSVD.zeros", mesh, (*batch_shape, m, rank), dtype, device)
        values = torch.zeros(*batch_shape, rank, dtype=dtype, device=left.device)
        return cls(left, values, torch.zeros(*batch_shape, rank, n, dtype=dtype, device=left.device))

    @property
    def mT(self) -> LowRankSVD:  # noqa: N802
        """The decomposition of Xᵀ. `brandla.svd_append` on it appends rows to X."""
        return LowRankSVD(self.Vh.mT, self.S, self.U.mT)


Factor = TypeVar("Factor", LowRankEigh, LowRankRoot)
Number = float | Tensor


def _product(value: Any) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return L, v and R of a matrix L diag(v) Rᵀ; a root has no v."""
    if isinstance(value, LowRankSVD):
        return value.U, value.S, value.Vh.mT
    small, tall = parts_of(value)
    return tall, None if isinstance(value, LowRankRoot) else small, tall


def parts_of(factor: Any) -> tuple[Tensor, Tensor]:
    """Return the small part and the tall one of a symmetric factor, tracked or not."""
    lowrank = factor.lowrank if isinstance(factor, Tracked) else factor
    return (lowrank.gram, lowrank.root) if isinstance(lowrank, LowRankRoot) else tuple(lowrank)


def of_parts(kind: type[Any], small: Tensor, tall: Any) -> Any:
    """Return a symmetric factor of this kind."""
    return LowRankRoot(tall, small) if kind is LowRankRoot else LowRankEigh(small, tall)


def over(value: Number, dims: int = 1) -> Number:
    """Give a tensor of batch shape trailing dimensions to broadcast over; a number needs none."""
    return value[(..., *[None] * dims)] if isinstance(value, Tensor) else value


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Stack tensors of one layout; without a copy if they are, in order, all parts of one that was unbound."""
    first = parts[0]
    if len(parts) == 1:
        return first[None]
    base, size = None if torch.compiler.is_compiling() else first._base, first.numel()
    whole = base is not None and base.numel() == len(parts) * size > 0 and base.is_contiguous()
    if base is None or base.requires_grad or not whole:
        return torch.stack(list(parts))
    own = [part for part in parts if part._base is base and part.is_contiguous() and not part.requires_grad]
    start = base.storage_offset()
    if [part.storage_offset() for part in own] != [*range(start, start + base.numel(), size)]:
        return torch.stack(list(parts))
    return base.view(len(parts), *first.shape)


def stack_numbers(numbers: Sequence[Number], like: Tensor) -> Number:
    """Return the one number that all are, or a tensor of them."""
    first = numbers[0]
    if not [number for number in numbers if isinstance(number, Tensor)]:
        one = min(numbers) == max(numbers)
        return first if one else torch.tensor(numbers, dtype=like.dtype, device=like.device)
    if isinstance(first, Tensor) and not [number for number in numbers if number is not first]:
        return torch.as_tensor(first, dtype=like.dtype, device=like.device).expand(len(numbers), *first.shape)
    return stacked([number.to(like) if isinstance(number, Tensor) else like.new_tensor(number) for number in numbers])


def two_numbers(
    first: Number, second: Number, dtype: torch.dtype, device: torch.device, batch: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return two numbers as tensors of batch shape, by one kernel where neither is a tensor yet, or both are one."""
    if isinstance(first, Tensor) and isinstance(second, Tensor) and first.shape == second.shape:
        first, second = stacked([first, second]).to(dtype).unbind()
    elif isinstance(first, Tensor) or isinstance(second, Tensor):
        first, second = [
            number.to(dtype) if isinstance(number, Tensor) else torch.full((), number, dtype=dtype, device=device)
            for number in (first, second)
        ]
    else:
        # A line of two points is exact at its ends.
        first, second = torch.linspace(first, second, 2, dtype=dtype, device=device).unbind()
    return (first.expand(batch), second.expand(batch)) if batch else (first, second)


class _TrackedParts(NamedTuple, Generic[Factor]):
    lowrank: Factor
    error_bound: Tensor
    trace: Tensor


class Tracked(Value, _TrackedParts[Factor]):
    """A factor together with a running bound on its distance from the matrix it stands for, and that matrix's trace.

    Start one with `track`; the update functions take it in place of the factor and return the next one. Both numbers
    are carried along on the device: they cost no pass over tall matrices and no sync.

    ``lowrank`` is the LowRankEigh or LowRankRoot. Of batch shape, ``error_bound`` is an upper bound of ‖M − M̂‖₂, up to
    rounding, a few ε·‖M‖ an update, and ``trace`` is tr M of the whole stream, what truncation left out included:
    ``tail="mean"`` of the damped functions comes from it.

    Examples
    --------
    >>> import torch, brandla
    >>> tracked = brandla.track(brandla.LowRankRoot.zeros(3, rank=1))
    >>> tracked = brandla.root_update(tracked, torch.diag(torch.tensor([3.0, 2.0, 1.0])))
    >>> tracked.error_bound, tracked.trace
    (tensor(4.), tensor(14.))
    """

    __slots__ = ()
    _remedy = "the update functions add columns; their decay= and weight= scale"

    @property
    def shape(self) -> torch.Size:
        """Shape (..., n, n) of the matrix."""
        return self.lowrank.shape

    def _facts(self: Any) -> list[str]:
        return [repr(self.lowrank), *shown("error bound", self.error_bound), *shown("trace", self.trace)]


class _CentredParts(NamedTuple):
    svd: LowRankSVD
    mean: Tensor
    weight: Tensor
    scatter: Tensor


class Centred(Value, _CentredParts):
    """The left half of an SVD of columns less their mean, with the mean: a streaming principal component analysis.

    Start one with `centre`, feed it to `brandla.svd_append`, and join two with `brandla.merge`. The columns of
    ``svd.U`` are the principal axes. Right vectors are not kept: a moving mean moves every column seen.

    ``svd`` is a LowRankSVD with an empty Vh (..., r, 0). Of the columns so far, in float64 and weighted as decay
    weights them, ``mean`` (..., m) is the mean, ``weight``, of batch shape, their number N, and ``scatter``, of batch
    shape, Σ‖x − mean‖², what truncation left out included.

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
        return [repr(self.svd), *shown("weight", self.weight)]


def check_symmetric(function: str, name: str, factor: object) -> tuple[Tensor, Tensor]:
    """Check a LowRankEigh or a LowRankRoot, and return its small part and the tall one."""
    if isinstance(factor, LowRankEigh):
        return _check.eigh(function, name, factor)
    if isinstance(factor, LowRankRoot):
        return _check.root(function, name, factor)
    _check.fail_type(function, f"{name} must be a LowRankEigh or a LowRankRoot; got {type(factor).__name__}")


def track(lowrank: Factor) -> Tracked[Factor]:
    """Attach an error bound of 0 and its own trace to a factor that stands for its matrix exactly.

    Raises a ValueError or a TypeError for what is no LowRankEigh or LowRankRoot, or has parts that do not fit together.

    Examples
    --------
    >>> import torch, brandla
    >>> tracked = brandla.track(brandla.LowRankEigh(torch.tensor([2.0]), torch.eye(3, 1)))
    >>> tracked.error_bound, tracked.trace
    (tensor(0.), tensor(2.))
    """
    check_symmetric("track", "lowrank", lowrank)
    trace = lowrank.trace()
    return Tracked(lowrank, torch.zeros_like(trace), trace)


def centre(svd: LowRankSVD) -> Centred:
    """Start a centred stream from an SVD that has seen no columns, such as ``LowRankSVD.zeros(m, 0, rank)``.

    Raises a ValueError if ``svd`` holds columns: their mean is not known.

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


def less(columns: Tensor, mean: Tensor) -> Tensor:
    """Return columns X (..., m, k) less a float64 mean (..., m), in the dtype of X: what is near it loses no digit."""
    high = mean.to(columns.dtype)
    return columns - high[..., None] - (mean - high).to(columns.dtype)[..., None]


@dataclass(frozen=True)
class Rank:
    """Keep at most ``max`` values, and of those only the ones above ``tol`` times the largest.

    The result has the shapes of rank ``max``. A value under the tolerance becomes 0 with a zero vector, on the device
    and with no sync, and enters the error bound of a tracked factor. Later data fills zero columns again.
    ``(values > 0).sum(-1)`` is the number of values kept. ``max`` is at least 1, and ``tol`` in [0, 1): of eigenvalues
    for the symmetric updates, of singular values for the SVD.

    Examples
    --------
    >>> import torch, brandla
    >>> columns = torch.diag(torch.tensor([1.0, 0.5, 0.01]))
    >>> eigh = brandla.eigh_update(brandla.LowRankEigh.zeros(3, rank=3), columns, rank=brandla.Rank(max=3, tol=0.1))
    >>> eigh.eigenvalues
    tensor([1.0000, 0.2500, 0.0000])
    """

    max: int
    tol: float

    def __post_init__(self) -> None:
        _check.count("Rank", "max", self.max, 1)
        _check.tolerance("Rank", self.tol)


def most_of(rank: int | Rank | None) -> int | None:
    """Return the number behind a rule."""
    return rank.max if isinstance(rank, Rank) else rank


def tolerance_of(rank: int | Rank | None) -> float:
    """Return the tolerance of a rule; a number has none."""
    return rank.tol if isinstance(rank, Rank) else 0.0
