"""What other libraries offer for the same result: the leading part of a dense matrix, by several roads."""

from __future__ import annotations

from collections.abc import Callable
from importlib import util
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor

from brandla import LowRankEigh, LowRankSVD

OVERSAMPLE, POWERS = 10, 2
# What an exact decomposition, and one from a random sketch, may lose beside the best of the same rank.
EXACT, SKETCHED = 1.001, 2.0


class Peer(NamedTuple):
    """A decomposition of a dense matrix to a rank, by a library."""

    call: Callable[[Any, int], LowRankEigh | LowRankSVD]
    slack: float
    slow: bool = False  # decomposes the whole matrix, or iterates to full precision
    package: str = "torch"
    float64: bool = False  # computes in it whatever it is given

    @property
    def on_numpy(self) -> bool:
        """Whether a BLAS other than torch's computes, on the CPU."""
        return self.package not in ("torch", "cupy")

    def runs_on(self, device_type: str) -> bool:
        """Say whether the package is installed and works where the matrix is."""
        return util.find_spec(self.package) is not None and device_type in WHERE[self.package]

    def takes(self, matrix: Tensor) -> Any:
        """Return the matrix as the library takes it."""
        if self.package == "torch":
            return matrix
        return _cupy().from_dlpack(matrix) if self.package == "cupy" else matrix.numpy()


# Packages, and the devices whose matrices they take.
WHERE = {
    "torch": ("cpu", "cuda"),
    "scipy": ("cpu",),
    "sklearn": ("cpu",),
    "fbpca": ("cpu",),
    "cupy": ("cuda",),
}


def _cupy() -> Any:
    import cupy

    return cupy


# ---------------------------------------------------------------------------------------------------------------------
# Symmetric matrices
# ---------------------------------------------------------------------------------------------------------------------


def _ascending(values: Any, vectors: Any, rank: int) -> LowRankEigh:
    return _eigh(values[-rank:][::-1].copy(), vectors[:, -rank:][:, ::-1].copy())


def _eigh(values: Any, vectors: Any) -> LowRankEigh:
    return LowRankEigh(torch.as_tensor(values), torch.as_tensor(vectors))


def _torch_eigh(matrix: Tensor, rank: int) -> LowRankEigh:
    values, vectors = torch.linalg.eigh(matrix)
    return LowRankEigh(values[-rank:].flip(0), vectors[:, -rank:].flip(1))


# In float32 residuals come to rest within some 15 iterations, from some starts just above lobpcg's own limit of √ε. It
# then goes on to 1,000 iterations and loses the orthogonality of its vectors. In float64 it converges.
LOBPCG_ITERATIONS = {torch.float32: 20}


def _lobpcg(matrix: Tensor, rank: int) -> LowRankEigh:
    return LowRankEigh(*torch.lobpcg(matrix, k=rank, largest=True, niter=LOBPCG_ITERATIONS.get(matrix.dtype)))


def _eigsh(matrix: np.ndarray, rank: int) -> LowRankEigh:
    return _ascending(*scipy.sparse.linalg.eigsh(matrix, k=rank, which="LA"), rank)


def _eigens(matrix: np.ndarray, rank: int) -> LowRankEigh:
    import fbpca

    return _eigh(*fbpca.eigens(matrix, rank, n_iter=POWERS))


def _cupy_eigh(matrix: Any, rank: int) -> LowRankEigh:
    return _ascending(*_cupy().linalg.eigh(matrix), rank)


# ---------------------------------------------------------------------------------------------------------------------
# General matrices
# ---------------------------------------------------------------------------------------------------------------------


def _cut(left: Any, values: Any, right: Any, rank: int) -> LowRankSVD:
    return LowRankSVD(*(torch.as_tensor(part) for part in (left[:, :rank], values[:rank], right[:rank])))


def _torch_svd(matrix: Tensor, rank: int) -> LowRankSVD:
    return _cut(*torch.linalg.svd(matrix, full_matrices=False), rank)


def _svd_lowrank(matrix: Tensor, rank: int) -> LowRankSVD:
    left, values, right = torch.svd_lowrank(matrix, q=min(rank + OVERSAMPLE, *matrix.shape), niter=POWERS)
    return _cut(left, values, right.mT, rank)


def _sklearn_svd(matrix: np.ndarray, rank: int) -> LowRankSVD:
    from sklearn.utils.extmath import randomized_svd

    # Its own default of iterations: up to two are not orthonormalised, and lose half the digits of float32.
    return _cut(*randomized_svd(matrix, rank, n_oversamples=OVERSAMPLE, random_state=0), rank)


def _fbpca_svd(matrix: np.ndarray, rank: int) -> LowRankSVD:
    import fbpca

    return _cut(*fbpca.pca(matrix, rank, raw=True, n_iter=POWERS, l=rank + OVERSAMPLE), rank)


def _cupy_svd(matrix: Any, rank: int) -> LowRankSVD:
    return _cut(*_cupy().linalg.svd(matrix, full_matrices=False), rank)


GENERAL = {
    "torch.svd_lowrank": Peer(_svd_lowrank, SKETCHED),
    "torch.linalg.svd": Peer(_torch_svd, EXACT, slow=True),
    "scikit-learn randomized_svd": Peer(_sklearn_svd, SKETCHED, package="sklearn"),
    "fbpca.pca": Peer(_fbpca_svd, SKETCHED, package="fbpca", float64=True),
    "cupy.linalg.svd": Peer(_cupy_svd, EXACT, slow=True, package="cupy"),
}
SYMMETRIC = GENERAL | {
    "torch.lobpcg": Peer(_lobpcg, EXACT, slow=True),
    "torch.linalg.eigh": Peer(_torch_eigh, EXACT, slow=True),
    "scipy eigsh": Peer(_eigsh, EXACT, slow=True, package="scipy"),
    "fbpca.eigens": Peer(_eigens, SKETCHED, package="fbpca", float64=True),
    "cupy.linalg.eigh": Peer(_cupy_eigh, EXACT, slow=True, package="cupy"),
}
