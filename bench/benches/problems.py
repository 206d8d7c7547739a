"""The problems that are timed, and the float64 check of every kind of result.

Problems are factors in the steady state of a stream, and matrices of known spectrum.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import scipy.fft
import torch
from torch import Tensor

import brandla
from brandla import LowRankEigh, LowRankRoot, LowRankSVD

Symmetric = LowRankEigh | LowRankRoot
Update = Callable[..., Symmetric]

DECAY, WEIGHT = 0.95, 0.05
UPDATES: dict[str, tuple[Update, type[Symmetric]]] = {
    "root_update": (brandla.root_update, LowRankRoot),
    "root_update, cholesky": (partial(brandla.root_update, compress="cholesky"), LowRankRoot),
    "eigh_update": (brandla.eigh_update, LowRankEigh),
}
# The error of an update over that of the best truncation of its target. Only rounding is allowed. Without an
# eigendecomposition, one step of slow streams lost up to 1.05 times the trace (flat, k = r/4), and 1.00 from k = r on.
LOSS_ALLOWED = {"root_update": 1.001, "root_update, cholesky": 1.1, "eigh_update": 1.001}
# The errors allowed, in units of ε: of orthonormal columns, of S beside FᵀF, of a solve. Peers may decompose a dense
# matrix in any way; their columns only have to be orthonormal enough to be a decomposition.
DEFECT_ALLOWED, PEER_DEFECT_ALLOWED = 200, 20_000


def columns_of(n: int, k: int, exponent: float, seed: int, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    """Yield n × k normal columns with deviations i^−exponent in a dense orthonormal basis, scaled by 1/√k."""
    source = np.random.default_rng(seed)
    deviations = np.arange(1, n + 1) ** -exponent
    # The basis is a cosine transform with random signs, which needs no n × n matrix.
    signs = source.choice([-1.0, 1.0], size=(n, 1))
    while True:
        columns = deviations[:, None] * source.standard_normal((n, k)) / np.sqrt(k)
        yield torch.from_numpy(signs * scipy.fft.dct(columns, axis=0, norm="ortho")).to(dtype)


@cache
def steady_state(
    name: str, n: int, r: int, k: int, exponent=0.5, dtype=torch.float32, device="cpu"
) -> tuple[Symmetric, Tensor]:
    """Return the factor that a stream with deviations i^−exponent settles to, by torch forms, and the next columns."""
    update, kind = UPDATES[name]
    stream = (columns.to(device) for columns in columns_of(n, k, exponent, n + r + k, dtype))
    factor = kind.zeros(n, r, dtype=dtype, device=device)
    with brandla.backend("torch"):
        # 1.5 times the time constant of the decay, 1/(1 − 0.95).
        for _ in range(30):
            factor = update(factor, next(stream), decay=DECAY, weight=WEIGHT)
    return factor, next(stream)


def matrix_of_spectrum(n: int, values: np.ndarray) -> Tensor:
    """Return a dense float64 matrix of n rows with these singular values. Of n values, they are its eigenvalues too."""
    m = len(values)
    # Transforms the diagonal matrix of the values by cosines along either side, and gives it random signs.
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=n)
    return torch.from_numpy(signs[:, None] * scipy.fft.dctn(np.eye(n, m) * values, norm="ortho") * signs[:m])


class WrongResultError(AssertionError):
    """A result differs from the float64 reference, so it is not timed."""


def require(holds: bool, what: str) -> None:
    if not holds:
        raise WrongResultError(what)


class Judgement(NamedTuple):
    """The error of a result beside float64, its distance from its form in units of ε, and what is allowed of both."""

    error: float
    allowed: float
    orthogonality: float | None = None  # of columns; for a root the distance of S from FᵀF
    orthogonality_allowed: float = DEFECT_ALLOWED

    @property
    def used(self) -> float:
        """The part of the allowed errors that is used; above 1 for a wrong result."""
        return max(self.error / self.allowed, (self.orthogonality or 0.0) / self.orthogonality_allowed)

    def accept(self, name: str) -> "Judgement":
        # Not by `used`, whose max may drop a NaN.
        require(self.error <= self.allowed, f"{name}: error {self.error:.1e}, allowed {self.allowed:.1e}")
        off, most = self.orthogonality, self.orthogonality_allowed
        require(off is None or off <= most, f"{name}: {off or 0:.0f} ε off its form, allowed {most:g}")
        return self


def small_core(terms: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return Σ F Gᵀ in orthonormal bases of all F and of all G: a small matrix with the same singular values."""
    left, right = (torch.linalg.qr(torch.cat(parts, dim=1), mode="r").R for parts in zip(*terms, strict=True))
    return left @ right.mT


def approximation(
    target: Sequence[tuple[Tensor, Tensor]] | Tensor, rank: int, eps: float, slack: float, most: float = DEFECT_ALLOWED
) -> Callable[[Any], Judgement]:
    """Return the check that a result is the best approximation of X of a rank, up to ``slack`` and rounding.

    The target is pairs F, G with X = Σ F Gᵀ, or X itself in float64, with singular values 1/i.
    """
    if isinstance(target, Tensor):
        spectrum = 1 / torch.arange(1, min(target.shape) + 1, dtype=torch.float64)
        left_out = lambda left, right: target - left @ right.mT
    else:
        spectrum = torch.linalg.svdvals(small_core(target))
        left_out = lambda left, right: small_core([*target, (left, -right)])
    norm, best = (float(spectrum[start:].norm()) for start in (0, rank))
    # Each direction may be off by a few ε‖X‖.
    rounding = 8 * len(spectrum) ** 0.5 * eps * float(spectrum[0])

    def judge(result: Any) -> Judgement:
        lost = float(torch.linalg.matrix_norm(left_out(*two_factors(result))))
        off = orthonormality(result.U) if isinstance(result, LowRankSVD) else defect(result)
        return Judgement(lost / norm, (slack * best + rounding) / norm, off / eps, most)

    return judge


def two_factors(result: Symmetric | LowRankSVD) -> tuple[Tensor, Tensor]:
    """Return F and G in float64, where F Gᵀ is the result."""
    first, second, *rest = (part.double() for part in result)
    if isinstance(result, LowRankSVD):
        return first * second, rest[0].mT
    return (second * first, second) if isinstance(result, LowRankEigh) else (first, first)


def orthonormality(vectors: Tensor) -> float:
    """Return ‖UᵀU − I‖₂ over the columns that are not zero."""
    gram = vectors.double().mT @ vectors.double()
    live = (gram.diagonal() > 0.25).double()
    return spectral_norm(gram - torch.diag(live))


def defect(factor: Symmetric) -> float:
    """Return how far a factor is from its form: ‖UᵀU − I‖₂, or ‖S − FᵀF‖₂ over ‖FᵀF‖₂."""
    if isinstance(factor, LowRankEigh):
        return orthonormality(factor.eigenvectors)
    root = factor.root.double()
    gram = root.mT @ root
    off = spectral_norm(factor.gram.double() - gram)
    return off / spectral_norm(gram) if 0 < off < float("inf") else off


def spectral_norm(symmetric: Tensor) -> float:
    """Return ‖M‖₂; infinity if an entry is not finite."""
    return float(torch.linalg.eigvalsh(symmetric).abs().max()) if symmetric.isfinite().all() else float("inf")
