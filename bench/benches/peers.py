"""What other libraries offer for the same result, and the threads that suit the BLAS they bring."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module, util
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse.linalg
import torch
from sklearn.utils.extmath import randomized_svd
from threadpoolctl import threadpool_limits
from torch import Tensor

from brandla import LowRankEigh, LowRankSVD

OVERSAMPLE, POWERS = 10, 2
# What an exact decomposition, and one from a random sketch, may lose beside the best of the same rank.
EXACT, SKETCHED = 1.001, 2.0
# Packages that compute with a BLAS of their own, on the CPU.
ON_NUMPY = ("scipy", "sklearn", "fbpca")


class Peer(NamedTuple):
    """A function of a library, and for a decomposition of a dense matrix to a rank how exact it is."""

    call: Callable[..., Any]
    slack: float = EXACT
    slow: bool = False  # decomposes the whole matrix, or iterates to full precision
    package: str = "torch"
    float64: bool = False  # computes in it whatever it is given

    @property
    def on_numpy(self) -> bool:
        """Whether a BLAS other than torch's computes, on the CPU."""
        return self.package in ON_NUMPY

    def runs_on(self, device_type: str) -> bool:
        """Say whether the package is installed and works where the matrix is."""
        only = "cuda" if self.package == "cupy" else "cpu" if self.on_numpy else device_type
        return util.find_spec(self.package) is not None and device_type == only

    def takes(self, matrix: Tensor) -> Any:
        """Return the matrix as the library takes it."""
        if self.package == "cupy":
            return import_module("cupy").from_dlpack(matrix)
        return matrix.numpy() if self.on_numpy else matrix


# In float32 residuals come to rest within some 15 iterations, from some starts just above lobpcg's own limit of √ε. It
# then goes on to 1,000 iterations and loses the orthogonality of its vectors. In float64 it converges.
LOBPCG_ITERATIONS = {torch.float32: 20}


def svd_lowrank(matrix: Tensor, rank: int) -> LowRankSVD:
    """Return ``torch.svd_lowrank`` from a sketch of the same width as `brandla.randomized_svd`, cut to the rank."""
    left, values, right = torch.svd_lowrank(matrix, q=min(rank + OVERSAMPLE, *matrix.shape), niter=POWERS)
    return _cut(left, values, right.mT, rank)


def _cut(left: Any, values: Any, right: Any, rank: int) -> LowRankSVD:
    return LowRankSVD(*(torch.as_tensor(part) for part in (left[:, :rank], values[:rank], right[:rank])))


def _ascending(values: Any, vectors: Any, rank: int) -> LowRankEigh:
    return LowRankEigh(torch.as_tensor(values)[-rank:].flip(0), torch.as_tensor(vectors)[:, -rank:].flip(1))


def _lobpcg(matrix: Tensor, rank: int) -> LowRankEigh:
    return LowRankEigh(*torch.lobpcg(matrix, k=rank, largest=True, niter=LOBPCG_ITERATIONS.get(matrix.dtype)))


def _fbpca_eigens(matrix: np.ndarray, rank: int) -> LowRankEigh:
    return LowRankEigh(*map(torch.as_tensor, import_module("fbpca").eigens(matrix, rank, n_iter=POWERS)))


def _fbpca_svd(matrix: np.ndarray, rank: int) -> LowRankSVD:
    found = import_module("fbpca").pca(matrix, rank, raw=True, n_iter=POWERS, l=rank + OVERSAMPLE)
    return _cut(*found, rank)


def _sklearn_svd(matrix: np.ndarray, rank: int) -> LowRankSVD:
    # Its own default of iterations: up to two are not orthonormalised, and lose half the digits of float32.
    return _cut(*randomized_svd(matrix, rank, n_oversamples=OVERSAMPLE, random_state=0), rank)


def _scipy_eigsh(matrix: np.ndarray, rank: int) -> LowRankEigh:
    return _ascending(*scipy.sparse.linalg.eigsh(matrix, k=rank, which="LA"), rank)


def _svd(package: str) -> Callable[[Any, int], LowRankSVD]:
    """Return the full decomposition of torch or cupy, cut to the rank."""
    return lambda matrix, rank: _cut(*import_module(package).linalg.svd(matrix, full_matrices=False), rank)


def _eigh(package: str) -> Callable[[Any, int], LowRankEigh]:
    return lambda matrix, rank: _ascending(*import_module(package).linalg.eigh(matrix), rank)


GENERAL = {
    "torch.svd_lowrank": Peer(svd_lowrank, SKETCHED),
    "torch.linalg.svd": Peer(_svd("torch"), slow=True),
    "scikit-learn randomized_svd": Peer(_sklearn_svd, SKETCHED, package="sklearn"),
    "fbpca.pca": Peer(_fbpca_svd, SKETCHED, package="fbpca", float64=True),
    "cupy.linalg.svd": Peer(_svd("cupy"), slow=True, package="cupy"),
}
SYMMETRIC = GENERAL | {
    "torch.lobpcg": Peer(_lobpcg, slow=True),
    "torch.linalg.eigh": Peer(_eigh("torch"), slow=True),
    "scipy eigsh": Peer(_scipy_eigsh, slow=True, package="scipy"),
    "fbpca.eigens": Peer(_fbpca_eigens, SKETCHED, package="fbpca", float64=True),
    "cupy.linalg.eigh": Peer(_eigh("cupy"), slow=True, package="cupy"),
}
INCREMENTAL = "scikit-learn IncrementalPCA"
# What computes in float64 whatever it is given: fbpca draws, and scikit-learn's PCA keeps its mean, in it.
IN_FLOAT64 = (*(name for name, peer in SYMMETRIC.items() if peer.float64), INCREMENTAL)


# Calls that decide at most, and seconds after which no more are made.
MOST, SECONDS = 7, 0.25
# Seconds after a call in which the threads of a BLAS stop to spin.
REST = 0.1


@contextmanager
def at_best(call: Callable[[], Any]) -> Iterator[int]:
    """Give NumPy and SciPy one thread or as many as torch has, whichever is quicker, and say which that is.

    Each brings a BLAS whose threads wait for work by spinning. A call that uses both then has more threads running than
    there are cores, and may take many times as long as on one thread. torch's own BLAS is part of torch, and keeps its
    threads. The call was made before, and so is warm. Only the number is chosen here: pytest-benchmark times the call.
    """
    typical: dict[int, float] = {}
    # One thread first: it leaves none behind that spin.
    for threads in sorted({1, torch.get_num_threads()}):
        seconds: list[float] = []
        with threadpool_limits(threads, "blas"):
            while len(seconds) < MOST and sum(seconds) < SECONDS:
                start = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - start)
        typical[threads] = median(seconds)
    best = min(typical, key=lambda threads: typical[threads])
    if best < max(typical):
        time.sleep(REST)
    with threadpool_limits(best, "blas"):
        yield best


def in_threads(count: int) -> str:
    """Return a number of threads in words."""
    return f"{count} BLAS thread{'s' if count > 1 else ''}"
