"""Values of the library with a known spectrum, the dense matrices they stand for, and checks of results."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

import brandla
import oracles
from brandla._sharded import is_dtensor

Symmetric = brandla.LowRankEigh | brandla.LowRankRoot
Size = tuple[int, ...]
FLOAT64 = torch.float64


def make_eigh(n: int, r: int, spectrum: str = "medium", *, seed: int = 1, **options: Any) -> brandla.LowRankEigh:
    """Return a LowRankEigh with the first r values of a spectrum and random eigenvectors."""
    batch_shape = options.get("batch_shape", ())
    values = oracles.SPECTRA[spectrum](r).repeat(*batch_shape, 1)
    return brandla.LowRankEigh(values, oracles.orthonormal(n, r, seed, batch_shape)).to(options.get("dtype", FLOAT64))


def make_root(
    n: int, r: int, spectrum: str = "medium", *, seed: int = 1, diagonal: bool = False, **options: Any
) -> brandla.LowRankRoot:
    """Return a LowRankRoot of the matrix of `make_eigh`, with a dense S, or with S diagonal and descending."""
    batch_shape = options.get("batch_shape", ())
    turn = torch.eye(r, dtype=FLOAT64) if diagonal else oracles.orthonormal(r, r, seed + 7, batch_shape)
    right = oracles.SPECTRA[spectrum](r).sqrt()[:, None] * turn.expand(*batch_shape, r, r)
    root = oracles.orthonormal(n, r, seed, batch_shape) @ right
    return brandla.LowRankRoot(root, oracles.symmetrised(right.mT @ right)).to(options.get("dtype", FLOAT64))


def make_svd(m: int, n: int, r: int, spectrum: str = "medium", *, seed: int = 1, **options: Any) -> brandla.LowRankSVD:
    """Return a LowRankSVD with the first r values of a spectrum and random singular vectors."""
    batch_shape = options.get("batch_shape", ())
    u, v = (oracles.orthonormal(size, r, seed + side, batch_shape) for side, size in enumerate((m, n)))
    values = oracles.SPECTRA[spectrum](r).repeat(*batch_shape, 1)
    return brandla.LowRankSVD(u, values, v.mT.contiguous()).to(options.get("dtype", FLOAT64))


def make_columns(
    n: int, k: int, *, dtype: torch.dtype = torch.float64, batch_shape: Size = (), seed: int = 50, scale: float = 1.0
) -> Tensor:
    """Return normal columns of norm about `scale`·√n / √k."""
    return (oracles.gaussian(*batch_shape, n, k, seed=seed) * scale / max(k, 1) ** 0.5).to(dtype)


def dense(value: Symmetric | brandla.LowRankSVD) -> Tensor:
    """Return the matrix a value stands for, computed in float64 from the value's rounded parts."""
    return type(value)(*(part.double() for part in value)).dense()


def dense_operator(lowrank: Symmetric | brandla.Tracked, damping: float, tail: float | Tensor | str = 0.0) -> Tensor:
    """Return M̂ + τ(I − P) + λI in float64; eigenvalues of a root below τ count as τ."""
    factor = lowrank.lowrank if isinstance(lowrank, brandla.Tracked) else lowrank
    n, r = factor.n, factor.rank
    if tail == "smallest":
        values = values_of(factor) if isinstance(factor, brandla.LowRankEigh) else oracles.eigh(factor.gram).eigenvalues
        tail = float(values[-1]) if r else 0.0
    elif tail == "mean":
        tail = float(lowrank.trace.double() - values_of(factor).double().sum()) / max(n - r, 1) if n > r else 0.0
    matrix, identity = dense(factor), torch.eye(n, dtype=torch.float64)
    if isinstance(factor, brandla.LowRankEigh):
        basis = factor.eigenvectors.double()
        matrix = matrix + float(tail) * (identity - basis @ basis.mT)
    elif float(tail):
        values, vectors = oracles.eigh(matrix)
        matrix = (vectors * values.clamp_min(float(tail))) @ vectors.mT
    return matrix + damping * identity


def tracked(factor: Symmetric, more: float) -> brandla.Tracked:
    """Return a tracked factor of a matrix whose trace exceeds the factor's own by ``more``."""
    start = brandla.track(factor)
    return start._replace(trace=start.trace + more)


def padded(factor: Symmetric, count: int) -> Symmetric:
    """Return a factor with ``count`` more zero columns: d gets zeros, S zero rows and columns; −count drops columns."""
    square = (factor.rank, factor.rank)
    pads = ((0, count, 0, count) if part.shape[-2:] == square else (0, count) for part in factor)
    parts = [(part, torch.nn.functional.pad(part, pad)) for part, pad in zip(factor, pads, strict=True)]
    # torch 2.11 replicates what it pads.
    return type(factor)(
        *(new.redistribute(placements=old.placements) if is_dtensor(old) else new for old, new in parts)
    )


def values_of(value: Symmetric | brandla.LowRankSVD) -> Tensor:
    """Return the eigenvalue, the singular value, or the squared length of each column."""
    if isinstance(value, brandla.LowRankSVD):
        return value.S
    return value.eigenvalues if isinstance(value, brandla.LowRankEigh) else value.gram.diagonal(dim1=-2, dim2=-1)


def sides_of(value: Symmetric | brandla.LowRankSVD) -> list[Tensor]:
    """Return U or F, and V if there is one."""
    if isinstance(value, brandla.LowRankSVD):
        return [value.U, value.Vh.mT]
    return [value.eigenvectors if isinstance(value, brandla.LowRankEigh) else value.root]


def tall_of(value: Symmetric | brandla.LowRankSVD) -> Tensor:
    """Return U or F."""
    return sides_of(value)[0]


def defect(value: Symmetric | brandla.LowRankSVD) -> float:
    """Return ‖UᵀU − I‖₂, or of a root ‖FᵀF − S‖₂/‖S‖₂; the largest of two sides or of a batch."""
    if tall_of(value).ndim > 2:
        return max(map(defect, members(value)), default=0.0)
    if isinstance(value, brandla.LowRankRoot):
        root, gram = (part.double() for part in value)
        return oracles.quotient(oracles.spectral_norm(root.mT @ root - gram), oracles.spectral_norm(gram))
    return max(oracles.orthonormality_defect(side, values_of(value)) for side in sides_of(value))


def assert_factor(value: Symmetric | brandla.LowRankSVD, n: int, rank: int) -> None:
    """Check the shapes, U and V or S, and that values are descending and non-negative, except those of a root."""
    values, tall = values_of(value), tall_of(value)
    assert values.shape[-1] == rank
    assert tall.shape[-2:] == (n, rank)
    assert defect(value) <= oracles.ORTHONORMAL * oracles.epsilon(tall.dtype)
    if isinstance(value, brandla.LowRankRoot):
        assert torch.equal(value.gram, value.gram.mT)
    else:
        assert (values >= 0).all()
        assert (values.diff(dim=-1) <= 0).all()


def assert_equals(value: Symmetric | brandla.LowRankSVD, matrix: Tensor, scale: float | None = None) -> None:
    """Check the factor, and that it equals a matrix to rounding, at the matrix's own scale unless one is given."""
    assert_factor(value, len(matrix), values_of(value).shape[-1])
    approximation = dense(value)
    assert approximation.shape == matrix.shape
    assert oracles.difference_ratio(approximation, matrix, tall_of(value).dtype, scale) <= oracles.THRESHOLD


def assert_underestimates(value: Symmetric, matrix: Tensor, largest: float | None = None, decay: float = 0.0) -> None:
    """Check 0 ⪯ M̂ ⪯ M, up to the rounding of a stream of updates."""
    largest = oracles.spectral_norm(matrix) if largest is None else largest
    slack = oracles.rounding(matrix.shape[-1], tall_of(value).dtype, largest, decay)
    approximation = dense(value)
    assert oracles.eigh(approximation).eigenvalues.amin() >= -slack
    assert oracles.eigh(matrix - approximation).eigenvalues.amin() >= -slack


def members(value: Any) -> list[Any]:
    """Return the members of a batch along its first dimension."""
    leaves, tree = tree_flatten(value)
    return [tree_unflatten(list(parts), tree) for parts in zip(*leaves, strict=True)]


def assert_same(result: Any, expected: Any) -> None:
    """Check that two trees of values have the same structure, and equal tensors to the bit."""
    (parts, structure), (expected_parts, expected_structure) = tree_flatten(result), tree_flatten(expected)
    assert structure == expected_structure
    for part, other in zip(parts, expected_parts, strict=True):
        assert (part.dtype, part.device) == (other.dtype, other.device)
        assert torch.equal(part, other)


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors of nested arguments."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextmanager
def unchanged(*arguments: Any) -> Iterator[None]:
    """Check that no tensor among the arguments is written to."""
    tensors = tensors_in(arguments)
    before = [(tensor.clone(), tensor._version, tensor.stride()) for tensor in tensors]
    yield
    for tensor, (values, version, stride) in zip(tensors, before, strict=True):
        assert tensor._version == version
        assert tensor.stride() == stride
        assert torch.equal(tensor.nan_to_num(), values.nan_to_num())
        assert torch.equal(tensor.isnan(), values.isnan())


def as_matrices(result: Any) -> list[Tensor]:
    """Return the matrices that a result stands for: eigenvectors of close eigenvalues are not comparable themselves."""
    if isinstance(result, Tensor):
        return [result]
    return [dense(result)] if hasattr(result, "dense") else [part for each in result for part in as_matrices(each)]


def assert_agree(result: Any, expected: Any, relative: float) -> None:
    """Check that two results stand for the same matrices and numbers, relative to the largest entry of all."""
    assert [part.dtype for part in tree_leaves(result)] == [part.dtype for part in tree_leaves(expected)]
    wanted = as_matrices(expected)
    largest = max((float(part.double().abs().max()) for part in wanted if part.numel()), default=0.0)
    for actual, other in zip(as_matrices(result), wanted, strict=True):
        torch.testing.assert_close(actual.double(), other.double(), rtol=0, atol=relative * largest)


def assert_differentiable(function: Callable[..., Any], *arguments: Any) -> None:
    """Check the derivatives of a function's results with respect to every tensor among its arguments."""
    leaves, tree = tree_flatten(arguments)

    def symmetric(part: Any) -> Any:
        # A perturbed S must stay symmetric.
        return part._replace(gram=oracles.symmetrised(part.gram)) if isinstance(part, brandla.LowRankRoot) else part

    def call(*parts: Tensor) -> tuple[Tensor, ...]:
        changed = tree_map(symmetric, tree_unflatten(parts, tree), is_leaf=lambda part: isinstance(part, Symmetric))
        return tuple(as_matrices(function(*changed)))

    assert gradcheck(call, [leaf.detach().clone().requires_grad_() for leaf in leaves], fast_mode=True)


class Operator:
    """A matrix that offers nothing but products, and counts them."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.products = matrix, 0
        self.shape, self.dtype, self.device = tuple(matrix.shape), matrix.dtype, matrix.device

    def __matmul__(self, block: Tensor) -> Tensor:
        assert block.dtype == self.dtype
        self.products += 1
        return self.matrix @ block


class OperatorWithTranspose(Operator):
    """An operator that knows its transpose."""

    mT = property(lambda self: Operator(self.matrix.mT))  # noqa: N815


class Update(NamedTuple):
    """An update of a low-rank matrix: the public function, the value it updates, and its options."""

    name: str
    factor: type[Symmetric | brandla.LowRankSVD]
    make: Callable[..., Any]
    options: dict[str, Any]
    is_exact: bool = True  # the best truncation to rounding, with a diagonal S; otherwise only to some per cent

    def __str__(self) -> str:
        return "-".join([self.name, *map(str, self.options.values())])

    def __call__(self, value: Any, *data: Any, **options: Any) -> Any:
        """Return the updated value; an update that is not symmetric applies the weight to its left columns."""
        if not self.is_symmetric:
            data = (options.pop("weight", 1.0) * data[0], *data[1:])[: 1 if self.appends else 2]
        return getattr(brandla, self.name)(value, *data, **self.options, **options)

    def in_place(self, *arguments: Any, **options: Any) -> Any:
        """Call the in-place function."""
        return getattr(brandla, f"{self.name}_")(*arguments, **self.options, **options)

    def grouped(self, *arguments: Any, **options: Any) -> Any:
        """Call the grouped function."""
        return getattr(brandla.grouped, self.name)(*arguments, **self.options, **options)

    def arguments(
        self, m: int, n: int, r: int, k: int, spectrum: str = "medium", scale: float = 1.0, **options: Any
    ) -> Any:
        """Return a value of m rows and new columns for it; n is the size of the right side of an SVD."""
        sizes = (m,) if self.is_symmetric else (m, n)
        columns = [make_columns(size, k, seed=50 - i, scale=scale, **options) for i, size in enumerate(sizes)]
        return self.make(*sizes, r, spectrum, **options), *columns

    def zeros(self, m: int, n: int, r: int, **options: Any) -> Any:
        """Return a value of zeros with these sizes."""
        sizes = (m,) if self.is_symmetric else (m, 0 if self.appends else n)
        return self.factor.zeros(*sizes, r, **options)

    def untruncated(self, value: Any, *data: Tensor, decay: float = 1.0, weight: float = 1.0) -> Tensor:
        """Return, in float64, the matrix that the update of a value or a matrix truncates."""
        old, new = decay * (value if isinstance(value, Tensor) else dense(value)), weight * data[0].double()
        return torch.cat([old, new], -1) if self.appends else old + new @ data[-1].double().mT

    @property
    def is_symmetric(self) -> bool:
        """Whether one side stands for both."""
        return self.factor is not brandla.LowRankSVD

    @property
    def appends(self) -> bool:
        """Whether it ignores the right columns."""
        return self.name == "svd_append"


EIGH_UPDATE = Update("eigh_update", brandla.LowRankEigh, make_eigh, {})
ROOT_UPDATE = Update("root_update", brandla.LowRankRoot, make_root, {"compress": "eigh"})
CHOLESKY_UPDATE = ROOT_UPDATE._replace(options={"compress": "cholesky"}, is_exact=False)
# Frequent directions.
SHRINKING = ROOT_UPDATE._replace(options={"compress": "eigh", "shrink": True}, is_exact=False)
SVD_UPDATE, SVD_APPEND = (Update(name, brandla.LowRankSVD, make_svd, {}) for name in ("svd_update", "svd_append"))
SYMMETRIC_UPDATES = (EIGH_UPDATE, ROOT_UPDATE, CHOLESKY_UPDATE)
UPDATES = (*SYMMETRIC_UPDATES, SVD_UPDATE, SVD_APPEND)
