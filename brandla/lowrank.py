"""The values of the library: low-rank factorisations as NamedTuples, and the rule for their rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from brandla import _check
from brandla._sharded import gathered, is_dtensor, sharding_of, zero_rows
from brandla._small import leading_eigh, noise_level
from brandla._value import Value, formatted
from brandla.orthonormal import polish
from brandla_kernels import project, rounded_gram, without_autocast

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class _Matrix(Value):
    """The base class of all matrices, as products L diag(v) Rᵀ."""

    __slots__ = ()
    _size_names: ClassVar[str] = "n"
    _values_name: ClassVar[str]  # the name of the values in a repr

    @property
    def rank(self: Any) -> int:
        """Number of eigenpairs, columns or singular triplets kept."""
        # The last dimension of U, of S = FᵀF or of the singular values.
        rank: int = self[1].shape[-1]
        return rank

    @property
    def shape(self) -> torch.Size:
        """Shape of the matrix: (..., n, n), or (..., m, n) for a LowRankSVD."""
        left, _, right = _factors_of(self)
        return torch.Size((*left.shape[:-1], right.shape[-2]))

    @without_autocast
    def __matmul__(self, block: Tensor) -> Tensor:
        """Return the product with X (n,) or (..., n, m), from products with the parts."""
        left, values, right = _factors_of(self)
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
        """Return the matrix as one tensor, for tests and small cases."""
        left, values, right = _factors_of(self)
        scaled = gathered(left) if values is None else gathered(left) * gathered(values)[..., None, :]
        return scaled @ gathered(right).mT

    def is_finite(self: Any) -> Tensor:
        """Return a bool tensor of batch shape, without a device sync: False if non-finite data came in."""
        _, values, _ = _factors_of(self)
        return torch.isfinite(self.gram).all(-1).all(-1) if values is None else torch.isfinite(values).all(-1)

    def _summary(self: Any) -> list[str]:
        _, values, _ = _factors_of(self)
        batch = [f"batch {tuple(self.shape[:-2])}"] if len(self.shape) > 2 else []
        sizes = [f"{name}={size}" for name, size in zip(self._size_names, self.shape[-2:], strict=False)]
        parts = [f"rank={self.rank}", _check.spelled(self.dtype), str(self.device)]
        values = self.gram.diagonal(dim1=-2, dim2=-1) if values is None else values
        return [*batch, *sizes, *parts, *formatted(self._values_name, values, 1)]


class _Symmetric(_Matrix):
    """The base class of the symmetric matrices of order n."""

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

        With a 1-D ``mesh``, U or F is a DTensor sharded on its rows, on the device of each process.
        """
        tall = zero_rows(f"{cls.__name__}.zeros", mesh, (*batch_shape, n, rank), dtype, device)
        sizes = (rank, rank) if cls is LowRankRoot else (rank,)
        zero: Self = from_parts(cls, torch.zeros(*batch_shape, *sizes, dtype=dtype, device=tall.device), tall)
        return zero

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

    ``eigenvalues`` are d, shape (..., r), descending and >= 0. ``eigenvectors`` are the orthonormal columns of U, shape
    (..., n, r). If the data has a lower rank, a column whose value is 0 may be a zero column, so shapes never depend on
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
    _values_name = "eigenvalues"
    _remedy = "brandla.eigh_update adds columns (F, for a matrix F Fᵀ); its decay= and weight= scale both terms"

    def largest_eigenvalue(self) -> Tensor:
        """Return d₁, of batch shape; 0 at rank 0."""
        values = self.eigenvalues
        return values[..., 0] if values.shape[-1] else values.sum(-1)


class _RootParts(NamedTuple):
    root: Tensor
    gram: Tensor


class LowRankRoot(_Symmetric, _RootParts):
    """M ≈ F Fᵀ, with its Gram matrix S = FᵀF: the form that is cheapest to update.

    Nothing in it is orthonormal, so nothing can lose orthogonality. It holds M to about ε·d₁ (d₁ is the largest
    eigenvalue of M): take this form if damping is at least 10⁻⁴ d₁ in float32. `to_eigh` gives eigenvectors.

    ``root`` is F, shape (..., n, r), with any columns. ``gram`` is S = FᵀF, shape (..., r, r), up to rounding: the
    updates carry S along and do not compute it again from F.

    Examples
    --------
    >>> import torch, brandla
    >>> start = brandla.LowRankRoot.zeros(512, rank=8)
    >>> tracked = brandla.root_update(start, torch.randn(512, 32), decay=0.95, weight=0.05)
    >>> tracked.to_eigh().eigenvectors.shape
    torch.Size([512, 8])
    """

    __slots__ = ()
    _values_name = "diagonal of gram"
    _remedy = "brandla.root_update adds columns (F, for a matrix F Fᵀ); its decay= and weight= scale both terms"

    @classmethod
    @without_autocast
    def from_eigh(cls, eigh: LowRankEigh) -> LowRankRoot:
        """Convert a LowRankEigh: F = U √d."""
        function = "LowRankRoot.from_eigh"
        sharding = sharding_of(function, "eigh.eigenvectors", eigh.eigenvectors, eigh.eigenvalues)
        values = sharding.local_small(function, "eigh.eigenvalues", eigh.eigenvalues)
        vectors = sharding.local(function, "eigh.eigenvectors", eigh.eigenvectors)
        root = vectors * sharding.summing_gradients(values.sqrt())[..., None, :]
        return cls(sharding.tall_result(root), sharding.small_result(torch.diag_embed(values)))

    @without_autocast
    def to_eigh(self) -> LowRankEigh:
        """Return the LowRankEigh of the same matrix and rank, from a new Gram matrix of F.

        It costs 6nr² flops and an eigendecomposition of order r, which waits for the device. Eigenvalues up to 8 ε·d₁
        (√r ε·d₁ above rank 64) are rounding: they become 0, with zero vectors.
        """
        function = "LowRankRoot.to_eigh"
        sharding = sharding_of(function, "root", self.root, self.gram)
        root = sharding.local(function, "root", self.root)
        gram, n, r = sharding.total(rounded_gram(root)), self.n, root.shape[-1]
        values, rotation = leading_eigh(gram, min(r, n), root.dtype, noise_level(root.dtype, r), unit=True, n=n)
        vectors, values = polish(root @ rotation, values, sharding)
        return LowRankEigh(sharding.small_result(values), sharding.tall_result(vectors))

    @without_autocast
    def largest_eigenvalue(self) -> Tensor:
        """Return a lower bound near d₁, of batch shape, from two power iterations on S, without a sync."""
        function = "LowRankRoot.largest_eigenvalue"
        sharding = sharding_of(function, "root", self.root, self.gram)
        gram = sharding.local_small(function, "gram", self.gram)
        if gram.shape[-1] == 0:
            return sharding.small_result(gram.sum((-2, -1)))
        tiny = torch.finfo(gram.dtype).tiny
        # Starts from all unit vectors, which is exact for a diagonal matrix.
        scale = gram.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(tiny)
        relative = gram / scale[..., None, None]
        lengths = torch.linalg.vector_norm(relative, dim=-2, keepdim=True).clamp_min(tiny)
        largest: Tensor = torch.linalg.vector_norm(relative @ (relative / lengths), dim=-2).amax(-1)
        return sharding.small_result(largest * scale)


class _SVDParts(NamedTuple):
    U: Tensor
    S: Tensor
    Vh: Tensor


class LowRankSVD(_Matrix, _SVDParts):
    """X ≈ U diag(S) Vh, with fields as in ``torch.linalg.svd``.

    ``U`` holds left singular vectors as orthonormal columns, shape (..., m, r). ``S`` holds singular values, shape
    (..., r), descending and >= 0. ``Vh`` holds right singular vectors as rows, shape (..., r, n). If a value is 0, its
    column of U and its row of Vh may be zero.

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
    _size_names = "mn"
    _values_name = "values"
    _remedy = "brandla.svd_update adds L Rᵀ (for an SVD L = U * S[..., None, :] and R = Vh.mT); decay= scales it"

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

        ``n = 0`` starts a stream of appended columns; ``rank`` may then exceed ``n``. With a 1-D ``mesh``, U is a
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


def _factors_of(value: Any) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the factors L, v and R of a matrix L diag(v) Rᵀ; v is None for a root."""
    if isinstance(value, LowRankSVD):
        return value.U, value.S, value.Vh.mT
    small, tall = parts_of(value)
    return tall, None if isinstance(value, LowRankRoot) else small, tall


def parts_of(factor: Any) -> tuple[Tensor, Tensor]:
    """Return the small part and the tall part of a symmetric factor, tracked or not."""
    lowrank = factor.lowrank if isinstance(factor, Tracked) else factor
    return (lowrank.gram, lowrank.root) if isinstance(lowrank, LowRankRoot) else tuple(lowrank)


def from_parts(kind: type[Any], small: Tensor, tall: Any) -> Any:
    """Return a symmetric factor of this kind from its small and its tall part."""
    return LowRankRoot(tall, small) if kind is LowRankRoot else LowRankEigh(small, tall)


def add_dims(value: Number, dims: int = 1) -> Number:
    """Return a tensor of batch shape with trailing dimensions of size 1, so that it broadcasts; a number as it is."""
    return value[(..., *[None] * dims)] if isinstance(value, Tensor) else value


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Stack tensors of one layout, without a copy if they are, in order, all parts of one unbound tensor."""
    first = parts[0]
    if len(parts) == 1:
        return first[None]
    base, size = None if torch.compiler.is_compiling() else first._base, first.numel()
    whole = base is not None and base.numel() == len(parts) * size > 0 and base.is_contiguous()
    if base is None or base.requires_grad or not whole:
        return torch.stack(list(parts))
    views = [part for part in parts if part._base is base and part.is_contiguous() and not part.requires_grad]
    start = base.storage_offset()
    if [part.storage_offset() for part in views] != [*range(start, start + base.numel(), size)]:
        return torch.stack(list(parts))
    return base.view(len(parts), *first.shape)


def stack_numbers(numbers: Sequence[Number], like: Tensor) -> Number:
    """Return one number if all are equal numbers, or else a tensor of them."""
    first = numbers[0]
    if not [number for number in numbers if isinstance(number, Tensor)]:
        are_equal = min(numbers) == max(numbers)
        return first if are_equal else torch.tensor(numbers, dtype=like.dtype, device=like.device)
    if isinstance(first, Tensor) and not [number for number in numbers if number is not first]:
        return torch.as_tensor(first, dtype=like.dtype, device=like.device).expand(len(numbers), *first.shape)
    return stacked([number.to(like) if isinstance(number, Tensor) else like.new_tensor(number) for number in numbers])


def as_tensors(
    first: Number, second: Number, dtype: torch.dtype, device: torch.device, batch: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return two numbers as tensors of batch shape: one kernel if both are numbers, or tensors of one shape."""
    if isinstance(first, Tensor) and isinstance(second, Tensor) and first.shape == second.shape:
        first, second = stacked([first, second]).to(dtype).unbind()
    elif isinstance(first, Tensor) or isinstance(second, Tensor):
        first, second = [
            number.to(dtype) if isinstance(number, Tensor) else torch.full((), number, dtype=dtype, device=device)
            for number in (first, second)
        ]
    else:
        # linspace makes both in one kernel, and its end points are exact.
        first, second = torch.linspace(first, second, 2, dtype=dtype, device=device).unbind()
    return (first.expand(batch), second.expand(batch)) if batch else (first, second)


class _TrackedParts(NamedTuple, Generic[Factor]):
    lowrank: Factor
    error_bound: Tensor
    trace: Tensor


class Tracked(Value, _TrackedParts[Factor]):
    """A factor M̂ with the trace of the matrix M that it approximates, and a running bound on its distance from M.

    Start one with `track`. The update functions take it in place of the factor and return the next one. Both numbers
    stay on the device, and cost no pass over tall matrices and no sync.

    ``lowrank`` is the LowRankEigh or LowRankRoot. ``error_bound``, of batch shape, is an upper bound of ‖M − M̂‖₂, up to
    rounding of a few ε·‖M‖ per update. ``trace``, of batch shape, is tr M of the whole stream, including what
    truncation left out. The damped functions derive ``tail="mean"`` from it.

    Examples
    --------
    >>> import torch, brandla
    >>> tracked = brandla.track(brandla.LowRankRoot.zeros(3, rank=1))
    >>> tracked = brandla.root_update(tracked, torch.diag(torch.tensor([3.0, 2.0, 1.0])))
    >>> tracked.error_bound, tracked.trace
    (tensor(4.), tensor(14.))
    """

    __slots__ = ()
    _remedy = "the update functions add columns; their decay= and weight= scale both terms"

    @property
    def shape(self) -> torch.Size:
        """Shape (..., n, n) of the matrix."""
        return self.lowrank.shape

    def _summary(self: Any) -> list[str]:
        return [repr(self.lowrank), *formatted("error bound", self.error_bound), *formatted("trace", self.trace)]


class _CentredParts(NamedTuple):
    svd: LowRankSVD
    mean: Tensor
    weight: Tensor
    scatter: Tensor


class Centred(Value, _CentredParts):
    """U and S of the columns of a stream minus their mean, with the mean: streaming principal component analysis.

    Start one with `centre`, feed it to `brandla.svd_append`, and join two with `brandla.merge`. The columns of
    ``svd.U`` are the principal axes. Right vectors are not kept, since a new mean changes every old column.

    ``svd`` is a LowRankSVD with an empty Vh (..., r, 0). The other parts are float64 and describe all columns so far,
    weighted by the decay: ``mean`` (..., m), ``weight``, the number of columns N, and ``scatter``, Σ‖x − mean‖²
    including what truncation left out. The last two have batch shape.

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
    _remedy = "brandla.merge joins two streams; decay= of brandla.svd_append scales the old columns"

    def to(self, *args: Any, **kwargs: Any) -> Centred:
        """Return the value on another device, or with ``svd`` in another dtype: arguments as in `Tensor.to`."""
        svd = self.svd.to(*args, **kwargs)
        return Centred(svd, *(part.to(svd.device) for part in self[1:]))

    def explained_variance(self, correction: float = 1) -> Tensor:
        """Return the variances S²/(N − correction) along the axes, shape (..., r), descending.

        The default divides by N − 1, as ``torch.var`` and scikit-learn do: the unbiased estimate of a sample.
        ``correction=0`` divides by N. With a decay below 1, N is the sum of the weights, and the estimate is biased.
        """
        return (self.svd.S.double().square() / (self.weight - correction)[..., None]).to(self.dtype)

    def explained_variance_ratio(self) -> Tensor:
        """Return the share of each axis in the total variance, shape (..., r): the same for N and for N − 1."""
        return (self.svd.S.double().square() / self.scatter[..., None]).to(self.dtype)

    @without_autocast
    def transform(self, columns: Tensor) -> Tensor:
        """Return the coordinates Uᵀ(X − mean) of columns X (..., m, k) along the axes, shape (..., r, k)."""
        columns = _check.columns("Centred.transform", "columns", columns, "svd.U", self.svd.U)
        return project(self.svd.U, subtract_mean(columns, self.mean))

    @without_autocast
    def inverse_transform(self, coordinates: Tensor) -> Tensor:
        """Return U Z + mean for coordinates Z (..., r, k), shape (..., m, k)."""
        coordinates = _check.columns("Centred.inverse_transform", "coordinates", coordinates, "svd.U.mT", self.svd.U.mT)
        return ((self.svd.U @ coordinates).double() + self.mean[..., None]).to(self.dtype)

    def is_finite(self) -> Tensor:
        """Return a bool tensor of batch shape, without a device sync: False if non-finite data came in."""
        return torch.isfinite(self.scatter)

    def _summary(self) -> list[str]:
        return [repr(self.svd), *formatted("weight", self.weight)]


def check_factor(function: str, name: str, factor: object) -> tuple[Tensor, Tensor]:
    """Check a LowRankEigh or a LowRankRoot, and return its small and its tall part."""
    if isinstance(factor, LowRankEigh):
        return _check.eigh(function, name, factor)
    if isinstance(factor, LowRankRoot):
        return _check.root(function, name, factor)
    _check.fail_type(function, f"{name} must be a LowRankEigh or a LowRankRoot; got {type(factor).__name__}")


def track(lowrank: Factor) -> Tracked[Factor]:
    """Attach an error bound of 0 and its own trace to a factor that equals the matrix it stands for.

    Raises a TypeError for anything but a LowRankEigh or a LowRankRoot, and a ValueError or a TypeError if its parts do
    not fit together.

    Examples
    --------
    >>> import torch, brandla
    >>> tracked = brandla.track(brandla.LowRankEigh(torch.tensor([2.0]), torch.eye(3, 1)))
    >>> tracked.error_bound, tracked.trace
    (tensor(0.), tensor(2.))
    """
    check_factor("track", "lowrank", lowrank)
    trace = lowrank.trace()
    return Tracked(lowrank, torch.zeros_like(trace), trace)


def centre(svd: LowRankSVD) -> Centred:
    """Start a centred stream from an SVD of no columns, such as ``LowRankSVD.zeros(m, 0, rank)``.

    Raises a ValueError if ``svd`` holds columns, since their mean is not known.

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
        rule = "svd must hold no columns, since their mean is not known"
        _check.fail_value("centre", f"{rule}; its Vh has {svd.Vh.shape[-1]}; start from LowRankSVD.zeros(m, 0, rank)")
    sharding = sharding_of("centre", "svd.U", svd.U, svd.S)
    left = sharding.local("centre", "svd.U", svd.U)
    mean = sharding.tall_result(left.new_zeros(left.shape[:-1], dtype=torch.float64), -1)
    zero = left.new_zeros(left.shape[:-2], dtype=torch.float64)
    return Centred(svd, mean, sharding.small_result(zero), sharding.small_result(zero.clone()))


def subtract_mean(columns: Tensor, mean: Tensor) -> Tensor:
    """Return X − mean for X (..., m, k) and a float64 mean (..., m), in the dtype of X, with all digits of the mean."""
    high = mean.to(columns.dtype)
    return columns - high[..., None] - (mean - high).to(columns.dtype)[..., None]


@dataclass(frozen=True)
class Rank:
    """Keep at most ``max`` values, and only values above ``tol`` times the largest.

    The result has the shapes of rank ``max``. A value under the tolerance becomes 0 with a zero vector, on the device
    and without a sync, and enters the error bound of a tracked factor. Later data fills zero columns again.
    ``(values > 0).sum(-1)`` is the number of values kept. ``max`` is at least 1. ``tol``, in [0, 1), applies to
    eigenvalues in the symmetric updates and to singular values in the SVD.

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


def max_and_tol(rank: int | Rank | None) -> tuple[int | None, float]:
    """Return the largest rank that a number or a rule allows, and its tolerance, 0 for a number."""
    return (rank.max, rank.tol) if isinstance(rank, Rank) else (rank, 0.0)
