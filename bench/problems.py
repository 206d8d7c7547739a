"""What is timed: factors in the steady state of a stream and matrices of known spectrum; the float64 checks of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import scipy.fft
import torch
from torch import Tensor

import brandla

Symmetric = brandla.LowRankEigh | brandla.LowRankSym
Update = Callable[..., Symmetric]

DECAY, WEIGHT = 0.95, 0.05
UPDATES: dict[str, tuple[Update, type[Symmetric]]] = {
    "eigh_update": (brandla.eigh_update, brandla.LowRankEigh),
    "subspace_update": (brandla.subspace_update, brandla.LowRankSym),
}
# What an update may lose against the best truncation of its own target: nothing, or what the stream tests allow.
LOSS_ALLOWED = {"eigh_update": 1.001, "subspace_update": 1.1}
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
def steady(name: str, n: int, r: int, k: int, exponent: float = 0.5) -> Case:
    """Return the factor that a stream of deviations i^−exponent settles to, and the columns that come next."""
    update, kind = UPDATES[name]
    stream = columns_of(n, k, exponent, seed=n + r + k)
    factor = kind.zeros(n, r)
    for _ in range(STEPS_TO_STEADY_STATE):
        factor = update(factor, next(stream), decay=DECAY, weight=WEIGHT)
    return Case(factor, next(stream))


def check_update(name: str, case: Case, updated: Symmetric) -> None:
    """Check an update against float64: orthonormal vectors, and no more lost than the best truncation loses."""
    target = [(_half(case.factor) * DECAY**0.5, 1.0), (case.columns.double() * WEIGHT**0.5, 1.0)]
    rank = updated.rank
    spectrum = torch.linalg.eigvalsh(in_small(target)).flip(-1).clamp_min(0)
    best = float(torch.linalg.vector_norm(spectrum[rank:]))
    lost = float(torch.linalg.vector_norm(torch.linalg.eigvalsh(in_small([*target, (_half(updated), -1.0)]))))
    eps = torch.finfo(updated[1].dtype).eps
    # Each of the r + k directions may be off by a few ε‖M‖.
    allowed = LOSS_ALLOWED[name] * best + 8 * len(spectrum) ** 0.5 * eps * float(spectrum[0])
    require(lost <= allowed, f"{name}: ‖M − M̂‖_F = {lost:.3e}, allowed {allowed:.3e}")
    defect = orthonormality(updated[1]) / eps
    require(defect <= 200, f"{name}: ‖UᵀU − I‖₂ = {defect:.0f} ε, allowed 200 ε")


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


def _half(factor: Symmetric) -> Tensor:
    """F with F Fᵀ = M̂, in float64 from the factor's own rounded parts."""
    if isinstance(factor, brandla.LowRankEigh):
        return factor.eigenvectors.double() * factor.eigenvalues.double().sqrt()
    values, vectors = torch.linalg.eigh(factor.core.double())
    return factor.basis.double() @ (vectors * values.clamp_min(0).sqrt())


def check_solve(factor: Symmetric, rhs: Tensor, damping: float, solution: Tensor) -> None:
    """Check a damped solve by its residual in float64, divided by what rounding explains."""
    half, solved = _half(factor), solution.double()
    residual = half @ (half.mT @ solved) + damping * solved - rhs.double()
    norm = float(torch.linalg.matrix_norm(half, 2)) ** 2 + damping
    eps = torch.finfo(solution.dtype).eps
    error = float(torch.linalg.matrix_norm(residual)) / (norm * float(torch.linalg.matrix_norm(solved)) * eps)
    require(error <= 200, f"damped_solve: residual of {error:.0f} ε‖M‖‖X‖, allowed 200")


def matrix_of_spectrum(eigenvalues: np.ndarray, seed: int) -> Tensor:
    """Return a dense float64 matrix with these eigenvalues."""
    n = len(eigenvalues)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(n, 1))
    basis = torch.from_numpy(signs * scipy.fft.dct(np.eye(n), axis=0, norm="ortho"))
    return (basis * torch.from_numpy(eigenvalues)) @ basis.mT
