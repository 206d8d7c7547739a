"""What other libraries offer for the same result, and the threads that suit the BLAS they bring."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module, util
from timeit import Timer
from typing import Any, NamedTuple

import scipy.sparse.linalg
import torch
from sklearn.utils.extmath import randomized_svd
from threadpoolctl import threadpool_limits
from torch import Tensor

from brandla import LowRankEigh, LowRankSVD

OVERSAMPLE, POWERS = 10, 2
# What an exact decomposition, and one from a random sketch, may lose beside the best of the same rank.
EXACT, SKETCHED = 1.001, 2.0


class Peer(NamedTuple):
    """A function of a library, and for a decomposition of a dense matrix to a rank how exact it is."""

    call: Callable[..., Any]
    slack: float = EXACT
    slow: bool = False  # decomposes the whole matrix, or iterates to full precision
    package: str = "torch"

    @property
    def on_numpy(self) -> bool:
        """Whether a BLAS other than torch's computes, on the CPU."""
        return self.package != "torch"

    def runs_on(self, device_type: str) -> bool:
        """Say whether the package is installed and works where the matrix is."""
        return util.find_spec(self.package) is not None and (device_type == "cpu" or not self.on_numpy)


# In float32 residuals come to rest within some 15 iterations, from some starts just above lobpcg's own limit of √ε. It
# then goes on to 1,000 iterations and loses the orthogonality of its vectors. In float64 it converges.
LOBPCG_ITERATIONS = {torch.float32: 20}


def svd_lowrank(matrix: Tensor, rank: int) -> LowRankSVD:
    """Return ``torch.svd_lowrank`` from a sketch of the same width as `brandla.randomized_svd`, cut to the rank."""
    left, values, right = torch.svd_lowrank(matrix, q=min(rank + OVERSAMPLE, *matrix.shape), niter=POWERS)
    return _cut((left, values, right.mT), rank)


def _cut(parts: Any, rank: int) -> LowRankSVD:
    left, values, right = map(torch.as_tensor, parts)
    return LowRankSVD(left[:, :rank], values[:rank], right[:rank])


def _ascending(parts: Any, rank: int) -> LowRankEigh:
    values, vectors = map(torch.as_tensor, parts)
    return LowRankEigh(values[-rank:].flip(0), vectors[:, -rank:].flip(1))


_eigh = lambda parts: LowRankEigh(*map(torch.as_tensor, parts))
_lobpcg = lambda m, r: _eigh(torch.lobpcg(m, k=r, largest=True, niter=LOBPCG_ITERATIONS.get(m.dtype)))
_eigsh = lambda m, r: _ascending(scipy.sparse.linalg.eigsh(m, k=r, which="LA"), r)
# With its own number of iterations: up to two are not orthonormalised, and lose half the digits of float32.
_sklearn = lambda m, r: _cut(randomized_svd(m, r, n_oversamples=OVERSAMPLE, random_state=0), r)
_pca = lambda m, r: _cut(import_module("fbpca").pca(m, r, raw=True, n_iter=POWERS, l=r + OVERSAMPLE), r)
_eigens = lambda m, r: _eigh(import_module("fbpca").eigens(m, r, n_iter=POWERS))
GENERAL = {
    "torch.svd_lowrank": Peer(svd_lowrank, SKETCHED),
    "torch.linalg.svd": Peer(lambda m, r: _cut(torch.linalg.svd(m, full_matrices=False), r), slow=True),
    "scikit-learn randomized_svd": Peer(_sklearn, SKETCHED, package="sklearn"),
    "fbpca.pca": Peer(_pca, SKETCHED, package="fbpca"),
}
SYMMETRIC = GENERAL | {
    "torch.lobpcg": Peer(_lobpcg, slow=True),
    "torch.linalg.eigh": Peer(lambda m, r: _ascending(torch.linalg.eigh(m), r), slow=True),
    "scipy eigsh": Peer(_eigsh, slow=True, package="scipy"),
    "fbpca.eigens": Peer(_eigens, SKETCHED, package="fbpca"),
}
INCREMENTAL = "scikit-learn IncrementalPCA"

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
        with threadpool_limits(threads, "blas"):
            number, seconds = Timer(call, timer=time.perf_counter).autorange()
        typical[threads] = seconds / number
    best = min(typical, key=typical.__getitem__)
    if best < max(typical):
        time.sleep(REST)
    with threadpool_limits(best, "blas"):
        yield best
