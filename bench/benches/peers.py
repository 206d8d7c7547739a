"""Other libraries' functions for the same results, and the number of threads that suits their BLAS."""

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
# The error that an exact decomposition, and one from a random sketch, may have over the best one of the same rank.
EXACT, SKETCHED = 1.001, 2.0


class Peer(NamedTuple):
    """A library's function. ``slack`` is the error allowed over the best one of the rank, if it decomposes a matrix."""

    call: Callable[..., Any]
    slack: float = EXACT
    slow: bool = False  # decomposes the whole matrix, or iterates to full precision
    package: str = "torch"

    @property
    def on_numpy(self) -> bool:
        """Whether a BLAS other than torch's computes, which runs on the CPU."""
        return self.package != "torch"

    def runs_on(self, device_type: str) -> bool:
        """Return whether the package is installed and works on such a device."""
        return util.find_spec(self.package) is not None and (device_type == "cpu" or not self.on_numpy)


# In float32, residuals stop falling within some 15 iterations, from some starts just above lobpcg's own limit of √ε.
# It then runs for 1,000 iterations and loses the orthogonality of its vectors. In float64 it converges.
LOBPCG_ITERATIONS = {torch.float32: 20}


def svd_lowrank(matrix: Tensor, rank: int) -> LowRankSVD:
    """Return ``torch.svd_lowrank`` from a sketch of the same width as `brandla.randomized_svd`, cut to the rank."""
    left, values, right = torch.svd_lowrank(matrix, q=min(rank + OVERSAMPLE, *matrix.shape), niter=POWERS)
    return _truncated((left, values, right.mT), rank)


def _truncated(parts: Any, rank: int) -> LowRankSVD:
    left, values, right = map(torch.as_tensor, parts)
    return LowRankSVD(left[:, :rank], values[:rank], right[:rank])


def _from_ascending(parts: Any, rank: int) -> LowRankEigh:
    values, vectors = map(torch.as_tensor, parts)
    return LowRankEigh(values[-rank:].flip(0), vectors[:, -rank:].flip(1))


_as_eigh = lambda parts: LowRankEigh(*map(torch.as_tensor, parts))
_lobpcg = lambda m, r: _as_eigh(torch.lobpcg(m, k=r, largest=True, niter=LOBPCG_ITERATIONS.get(m.dtype)))
_eigsh = lambda m, r: _from_ascending(scipy.sparse.linalg.eigsh(m, k=r, which="LA"), r)
# Keeps its own number of iterations. With two or fewer it does not orthonormalise, and loses half of float32's digits.
_sklearn = lambda m, r: _truncated(randomized_svd(m, r, n_oversamples=OVERSAMPLE, random_state=0), r)
_pca = lambda m, r: _truncated(import_module("fbpca").pca(m, r, raw=True, n_iter=POWERS, l=r + OVERSAMPLE), r)
_eigens = lambda m, r: _as_eigh(import_module("fbpca").eigens(m, r, n_iter=POWERS))
GENERAL = {
    "torch.svd_lowrank": Peer(svd_lowrank, SKETCHED),
    "torch.linalg.svd": Peer(lambda m, r: _truncated(torch.linalg.svd(m, full_matrices=False), r), slow=True),
    "scikit-learn randomized_svd": Peer(_sklearn, SKETCHED, package="sklearn"),
    "fbpca.pca": Peer(_pca, SKETCHED, package="fbpca"),
}
SYMMETRIC = GENERAL | {
    "torch.lobpcg": Peer(_lobpcg, slow=True),
    "torch.linalg.eigh": Peer(lambda m, r: _from_ascending(torch.linalg.eigh(m), r), slow=True),
    "scipy eigsh": Peer(_eigsh, slow=True, package="scipy"),
    "fbpca.eigens": Peer(_eigens, SKETCHED, package="fbpca"),
}
INCREMENTAL = "scikit-learn IncrementalPCA"

REST = 0.1  # seconds after a call until the threads of a BLAS stop spinning


@contextmanager
def best_threads(call: Callable[[], Any]) -> Iterator[int]:
    """Give NumPy and SciPy one thread or as many as torch has, whichever is quicker, and yield that number.

    Each brings a BLAS whose threads wait for work by spinning. A call that uses both then runs more threads than there
    are cores, and may take many times as long as with one thread. torch has a BLAS of its own, which keeps its threads.
    The call is warm, as it was made before. Only the number is chosen here: pytest-benchmark times the call.
    """
    typical: dict[int, float] = {}
    # One thread comes first, as it leaves no spinning threads behind.
    for threads in sorted({1, torch.get_num_threads()}):
        with threadpool_limits(threads, "blas"):
            number, seconds = Timer(call, timer=time.perf_counter).autorange()
        typical[threads] = seconds / number
    best = min(typical, key=typical.__getitem__)
    if best < max(typical):
        time.sleep(REST)
    with threadpool_limits(best, "blas"):
        yield best
