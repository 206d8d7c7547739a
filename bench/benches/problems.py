"""What is timed: factors in the steady state of a stream and matrices of known spectrum; the float64 checks of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import scipy.fft
import torch
from torch import Tensor

import brandla

Symmetric = brandla.LowRankEigh | brandla.LowRankRoot
Update = Callable[..., Symmetric]

DECAY, WEIGHT = 0.95, 0.05
UPDATES: dict[str, tuple[Update, type[Symmetric]]] = {
    "root_update": (brandla.root_update, brandla.LowRankRoot),
    "root_update, cholesky": (partial(brandla.root_update, compress="cholesky"), brandla.LowRankRoot),
    "eigh_update": (brandla.eigh_update, brandla.LowRankEigh),
}
# What an update may lose against the best truncation of its own target: nothing. Without an eigendecomposition, one
# step of slow streams lost at most 1.05 times as much trace (flat, k = r/4), and 1.00 from k = r on.
LOSS_ALLOWED = {"root_update": 1.001, "root_update, cholesky": 1.1, "eigh_update": 1.001}
# Of ε: what orthonormal columns, or S beside FᵀF, may be off.
DEFECT_ALLOWED = 200
# Half as much again as the time constant of the decay, 1/(1 − 0.95) steps.
STEPS_TO_STEADY_STATE = 30


class WrongResultError(AssertionError):
    """A result is not what float64 says: it is not timed."""


def require(holds: bool, what: str) -> None:
    """Refuse to go on with a wrong result."""
    if not holds:
        raise WrongResultError(what)


class Case(NamedTuple):
    """A factor, the columns that come next, and what an update of the factor with them must give."""

    factor: Symmetric
    columns: Tensor


def columns_of(n: int, k: int, exponent: float, seed: int, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    """Yield n × k normal columns with deviations i^−exponent in an orthonormal basis that is dense, scaled by 1/√k.

    The basis is a cosine transform with random signs, so that it takes no n × n matrix.
    """
    source = np.random.default_rng(seed)
    deviations = np.arange(1, n + 1) ** -exponent
    signs = source.choice([-1.0, 1.0], size=(n, 1))
    while True:
        columns = deviations[:, None] * source.standard_normal((n, k)) / np.sqrt(k)
        yield torch.from_numpy(signs * scipy.fft.dct(columns, axis=0, norm="ortho")).to(dtype)


@cache
def steady(name: str, n: int, r: int, k: int, exponent: float = 0.5, dtype: torch.dtype = torch.float32) -> Case:
    """Return the factor that a stream of deviations i^−exponent settles to, and the columns that come next."""
    update, kind = UPDATES[name]
    stream = columns_of(n, k, exponent, n + r + k, dtype)
    factor = kind.zeros(n, r, dtype=dtype)
    for _ in range(STEPS_TO_STEADY_STATE):
        factor = update(factor, next(stream), decay=DECAY, weight=WEIGHT)
    return Case(factor, next(stream))


def check_update(name: str, case: Case, updated: Symmetric) -> None:
    """Check an update against float64: the form that it promises, and no more lost than the best truncation loses."""
    target = [(half_of(case.factor) * DECAY**0.5, 1.0), (case.columns.double() * WEIGHT**0.5, 1.0)]
    rank = updated.rank
    spectrum = torch.linalg.eigvalsh(in_small(target)).flip(-1).clamp_min(0)
    best = float(torch.linalg.vector_norm(spectrum[rank:]))
    lost = float(torch.linalg.vector_norm(torch.linalg.eigvalsh(in_small([*target, (half_of(updated), -1.0)]))))
    eps = torch.finfo(tall_of(updated).dtype).eps
    # Each of the r + k directions may be off by a few ε‖M‖.
    allowed = LOSS_ALLOWED[name] * best + 8 * len(spectrum) ** 0.5 * eps * float(spectrum[0])
    require(lost <= allowed, f"{name}: ‖M − M̂‖_F = {lost:.3e}, allowed {allowed:.3e}")
    off = defect(updated) / eps
    require(off <= DEFECT_ALLOWED, f"{name}: off its form by {off:.0f} ε, allowed {DEFECT_ALLOWED} ε")


def in_small(terms: list[tuple[Tensor, float]]) -> Tensor:
    """Return Σ sign·F Fᵀ in an orthonormal basis of all tall F: a small matrix of the same nonzero spectrum."""
    triangle = torch.linalg.qr(torch.cat([half for half, _ in terms], dim=-1), mode="r").R
    signs = torch.cat([torch.full((half.shape[-1],), sign, dtype=half.dtype) for half, sign in terms])
    return (triangle * signs) @ triangle.mT


def orthonormality(vectors: Tensor) -> float:
    """Return ‖UᵀU − I‖₂ over the columns that are not zero."""
    gram = vectors.double().mT @ vectors.double()
    live = (gram.diagonal() > 0.25).double()
    deviation = gram - torch.diag(live)
    return float(torch.linalg.eigvalsh(deviation).abs().max()) if deviation.isfinite().all() else float("inf")


def defect(factor: Symmetric) -> float:
    """Return how far a factor is from its form: ‖UᵀU − I‖₂, or ‖S − FᵀF‖₂ over ‖FᵀF‖₂."""
    if isinstance(factor, brandla.LowRankEigh):
        return orthonormality(factor.eigenvectors)
    root = factor.root.double()
    gram = root.mT @ root
    deviation = factor.gram.double() - gram
    if not deviation.isfinite().all():
        return float("inf")
    norms = [float(torch.linalg.eigvalsh(part).abs().max()) for part in (deviation, gram)]
    return norms[0] / norms[1] if norms[0] else 0.0


def tall_of(factor: Symmetric) -> Tensor:
    """Return U or F."""
    return factor.root if isinstance(factor, brandla.LowRankRoot) else factor.eigenvectors


def half_of(factor: Symmetric) -> Tensor:
    """F with F Fᵀ = M̂, in float64 from the factor's own rounded parts."""
    tall = tall_of(factor).double()
    return tall * factor.eigenvalues.double().sqrt() if isinstance(factor, brandla.LowRankEigh) else tall


def check_solve(factor: Symmetric, rhs: Tensor, damping: float, solution: Tensor) -> None:
    """Check a damped solve by its residual in float64, divided by what rounding explains."""
    half, solved = half_of(factor), solution.double()
    residual = half @ (half.mT @ solved) + damping * solved - rhs.double()
    norm = float(torch.linalg.matrix_norm(half, 2)) ** 2 + damping
    eps = torch.finfo(solution.dtype).eps
    error = float(torch.linalg.matrix_norm(residual)) / (norm * float(torch.linalg.matrix_norm(solved)) * eps)
    require(error <= 200, f"damped_solve: residual of {error:.0f} ε‖M‖‖X‖, allowed 200")


def check_decomposition(name: str, truth: Tensor, values: Tensor, vectors: Tensor, rank: int, slack: float) -> None:
    """Check U diag(d) Uᵀ of a rank against a dense float64 matrix: at most ``slack`` times the best error is left."""
    basis = vectors.double()
    error = float(torch.linalg.matrix_norm(truth - (basis * values.double()) @ basis.mT))
    best = best_error(truth, rank)
    require(error <= slack * best, f"{name}: {error / best:.4f} times the best error, allowed {slack}")


def best_error(truth: Tensor, rank: int) -> float:
    """Return ‖M − M_r‖_F for the matrix of eigenvalues 1/i."""
    return float(torch.linalg.vector_norm(1 / torch.arange(rank + 1, len(truth) + 1, dtype=torch.float64)))


def check_moment(before: Tensor, columns: Tensor, after: Tensor) -> None:
    """Check ρM + w·A Aᵀ, entry by entry, against float64."""
    exact = DECAY * before.double() + WEIGHT * columns.double() @ columns.double().mT
    # A sum of k products of normal numbers is within k·ε/2 of the exact one, relative to its positive terms.
    terms = DECAY * before.double().abs() + WEIGHT * columns.double().abs() @ columns.double().abs().mT
    excess = float(((after.double() - exact).abs() / terms).max()) / torch.finfo(after.dtype).eps
    require(excess <= columns.shape[-1] + 4, f"gram_ema_: {excess:.0f} ε off, allowed {columns.shape[-1] + 4}")


def residual_is_rounding(name: str, matrix: Tensor, damping: float, rhs: Tensor, solution: Tensor) -> None:
    """Check (M + λI) X = V in float64 by its residual, for a dense M of norm 1."""
    solved = solution.double()
    residual = matrix @ solved + damping * solved - rhs.double()
    scale = (1 + damping) * float(torch.linalg.matrix_norm(solved)) * torch.finfo(solution.dtype).eps
    error = float(torch.linalg.matrix_norm(residual)) / scale
    require(error <= 200, f"{name}: residual of {error:.0f} ε‖M‖‖X‖, allowed 200")


def matrix_of_spectrum(eigenvalues: np.ndarray, seed: int) -> Tensor:
    """Return a dense float64 matrix with these eigenvalues: two cosine transforms of their diagonal, random signs."""
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(len(eigenvalues), 1))
    half = scipy.fft.dct(np.diag(eigenvalues), axis=0, norm="ortho")
    return torch.from_numpy(signs * scipy.fft.dct(half, axis=1, norm="ortho") * signs.T)
