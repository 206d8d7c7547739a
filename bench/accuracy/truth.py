"""The exact factor in float64, and how far a low-rank one is from it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

import brandla
from bench.accuracy.settings import Settings
from bench.accuracy.trackers import Factor

# ‖M − M̂‖₂ comes from Lanczos' iteration, whose eigenvalue is right to the square of this.
LANCZOS = 1e-3


class Errors(NamedTuple):
    """Relative errors of one factor."""

    inverse: float  # ‖(M̂ + λI)⁻¹ − (M + λI)⁻¹‖_F / ‖(M + λI)⁻¹‖_F
    spectral: float  # ‖M̂ − M‖₂ / ‖M‖₂
    trace: float  # tr((I − UUᵀ) M) / tr M: what the basis does not hold


class Truth:
    """M in float64 with its eigenpairs, from the columns of every step."""

    def __init__(self, n: int) -> None:
        self.matrix = torch.zeros(n, n, dtype=torch.float64)

    def absorb(self, columns: Tensor, decay: float) -> None:
        """Take in the columns of a step."""
        wide = columns.double()
        self.matrix = torch.addmm(self.matrix, wide, wide.mT, beta=decay, alpha=1 - decay)

    def decompose(self, settings: Settings) -> Decomposed:
        """Return the eigenpairs."""
        values, vectors = torch.linalg.eigh(self.matrix)
        return Decomposed(self.matrix, values.flip(0).clamp_min(0), vectors.flip(1), settings)


class Decomposed:
    """M with its eigenpairs, and its damped inverse; λ is relative to its largest eigenvalue, whatever the tracker."""

    def __init__(self, matrix: Tensor, values: Tensor, vectors: Tensor, settings: Settings) -> None:
        self.matrix, self.values, self.vectors = matrix, values, vectors
        self.damping = settings.damping * float(values[0])
        self.inverse = (vectors / (values + self.damping)) @ vectors.mT

    def best(self, rank: int) -> brandla.LowRankEigh:
        """Return the best approximation of this rank, in float64."""
        return brandla.LowRankEigh(self.values[:rank], self.vectors[:, :rank])

    def errors(self, factor: Factor) -> Errors:
        """Measure a tracker's factor."""
        values, vectors = eigenpairs(factor)
        # M̂ + λI inverted by its eigenvalues, and U taken as orthonormal, as brandla.damped_solve does.
        inverse = (vectors * (1 / (values + self.damping) - 1 / self.damping)) @ vectors.mT
        inverse.diagonal().add_(1 / self.damping)
        outside = self.values.sum() - (vectors * (self.matrix @ vectors)).sum()
        return Errors(
            float(torch.linalg.matrix_norm(inverse - self.inverse) / torch.linalg.matrix_norm(self.inverse)),
            self._distance(values, vectors) / float(self.values[0]),
            float(outside / self.values.sum()),
        )

    def _distance(self, values: Tensor, vectors: Tensor) -> float:
        """Return ‖M̂ − M‖₂."""
        difference = (vectors * values) @ vectors.mT - self.matrix
        operator = LinearOperator(
            difference.shape, matvec=lambda x: (difference @ torch.from_numpy(x).view(-1)).numpy(), dtype="float64"
        )
        start = torch.randn(len(difference), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        (largest,) = eigsh(operator, k=1, which="LM", tol=LANCZOS, v0=start.numpy(), return_eigenvectors=False)
        return abs(float(largest))


def eigenpairs(factor: Factor) -> tuple[Tensor, Tensor]:
    """Return d and U in float64."""
    if isinstance(factor, brandla.LowRankEigh):
        return factor.eigenvalues.double(), factor.eigenvectors.double()
    eigh = brandla.LowRankRoot(*(part.double() for part in factor)).to_eigh()
    return eigh.eigenvalues, eigh.eigenvectors


def step_errors(gradient: Tensor, exact: tuple[Decomposed, Decomposed], factors: tuple[Factor, Factor]) -> Step:
    """Compare (Γ̂ + λI)⁻¹ ∂W (Â + λI)⁻¹ with the step of the true factors; both in float64."""
    of_gradients, of_inputs = exact
    wide = gradient.double()
    right = of_gradients.inverse @ wide @ of_inputs.inverse
    left, other = (brandla.LowRankEigh(*eigenpairs(factor)) for factor in factors)
    taken = brandla.kron_damped_solve(left, other, wide, of_gradients.damping, of_inputs.damping)
    size, own = torch.linalg.matrix_norm(right), torch.linalg.matrix_norm(taken)
    cosine = float((right * taken).sum() / (size * own))
    return Step(
        float(torch.linalg.matrix_norm(taken - right) / size),
        float(torch.rad2deg(torch.acos(torch.tensor(min(max(cosine, -1.0), 1.0), dtype=torch.float64)))),
    )


class Step(NamedTuple):
    """How far a step is from that of the true factors."""

    error: float  # Frobenius, relative
    angle: float  # degrees
