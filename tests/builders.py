"""Values of the library with a known spectrum, and the dense matrices they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import brandla
import oracles

Symmetric = brandla.LowRankEigh | brandla.LowRankSym
Size = tuple[int, ...]


def stacked(make: Callable[[int], Any], batch_shape: Size, seed: int) -> Any:
    """Return make(seed), or for a batch shape a stack of such values with different seeds."""
    if not batch_shape:
        return make(seed)
    count = int(torch.Size(batch_shape).numel())
    values = [make(seed + 100 * i) for i in range(count)]
    return type(values[0])(*(torch.stack(parts).unflatten(0, batch_shape) for parts in zip(*values, strict=True)))


def make_eigh(
    n: int,
    r: int,
    spectrum: str = "medium",
    *,
    dtype: torch.dtype = torch.float64,
    batch_shape: Size = (),
    seed: int = 1,
) -> brandla.LowRankEigh:
    """Return a LowRankEigh with the first r values of a spectrum and random eigenvectors."""

    def make(seed: int) -> brandla.LowRankEigh:
        values = oracles.SPECTRA[spectrum](r)
        return brandla.LowRankEigh(values.to(dtype), oracles.orthonormal(n, r, seed).to(dtype))

    return stacked(make, batch_shape, seed)


def make_sym(
    n: int,
    r: int,
    spectrum: str = "medium",
    *,
    dtype: torch.dtype = torch.float64,
    batch_shape: Size = (),
    seed: int = 1,
) -> brandla.LowRankSym:
    """Return a LowRankSym whose dense core has the first r values of a spectrum."""

    def make(seed: int) -> brandla.LowRankSym:
        core = oracles.psd_matrix(oracles.SPECTRA[spectrum](r), seed + 7)
        return brandla.LowRankSym(core.to(dtype), oracles.orthonormal(n, r, seed).to(dtype))

    return stacked(make, batch_shape, seed)


def make_svd(
    m: int,
    n: int,
    r: int,
    spectrum: str = "medium",
    *,
    dtype: torch.dtype = torch.float64,
    batch_shape: Size = (),
    seed: int = 1,
) -> brandla.LowRankSVD:
    """Return a LowRankSVD with the first r values of a spectrum and random singular vectors."""

    def make(seed: int) -> brandla.LowRankSVD:
        u, v = oracles.orthonormal(m, r, seed), oracles.orthonormal(n, r, seed + 1)
        return brandla.LowRankSVD(u.to(dtype), oracles.SPECTRA[spectrum](r).to(dtype), v.mT.to(dtype))

    return stacked(make, batch_shape, seed)


def make_columns(
    n: int, k: int, *, dtype: torch.dtype = torch.float64, batch_shape: Size = (), seed: int = 50, scale: float = 1.0
) -> Tensor:
    """Return normal columns of norm about `scale`·√n / √k."""
    return (oracles.gaussian(*batch_shape, n, k, seed=seed) * scale / max(k, 1) ** 0.5).to(dtype)


def dense(value: Symmetric | brandla.LowRankSVD) -> Tensor:
    """Return the matrix a value stands for, in float64 from its own rounded parts."""
    if isinstance(value, brandla.LowRankSVD):
        u, s, vh = (part.double() for part in value)
        return (u * s.unsqueeze(-2)) @ vh
    values, vectors = (part.double() for part in value)
    core = torch.diag_embed(values) if isinstance(value, brandla.LowRankEigh) else values
    return vectors @ core @ vectors.mT


def dense_operator(lowrank: Symmetric, damping: float, tail: float | str = 0.0) -> Tensor:
    """Return U diag(d) Uᵀ + τ(I − UUᵀ) + λI in float64."""
    basis = lowrank[1].double()
    if tail == "smallest":
        core = torch.diag(lowrank[0].double()) if isinstance(lowrank, brandla.LowRankEigh) else lowrank[0].double()
        tail = float(oracles.eigh(core).eigenvalues[-1]) if basis.shape[-1] else 0.0
    identity = torch.eye(basis.shape[-2], dtype=torch.float64)
    return dense(lowrank) + float(tail) * (identity - basis @ basis.mT) + damping * identity


def values_of(value: Symmetric) -> Tensor:
    """Return what belongs to each column: the eigenvalues, or the row norms of the core."""
    if isinstance(value, brandla.LowRankEigh):
        return value.eigenvalues
    return torch.linalg.vector_norm(value.core, dim=-1)


def basis_of(value: Symmetric) -> Tensor:
    """Return the orthonormal columns."""
    return value[1]


class SymmetricUpdate(NamedTuple):
    """One of the two updates of a symmetric low-rank matrix, with the value it updates."""

    name: str
    factor: type[Symmetric]
    make: Callable[..., Any]

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Call the public function."""
        return getattr(brandla, self.name)(*arguments, **options)

    @property
    def loop(self) -> Callable[..., Any]:
        """The grouped form."""
        return getattr(brandla.grouped, self.name)


SYMMETRIC_UPDATES = (
    SymmetricUpdate("eigh_update", brandla.LowRankEigh, make_eigh),
    SymmetricUpdate("subspace_update", brandla.LowRankSym, make_sym),
)
