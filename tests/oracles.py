"""Matrices of known spectrum, streams of columns, float64 references and error ratios.

Everything here is dense, in float64 and slow. The tests compare the library with it, so it uses nothing of the library.

Error ratios follow LAPACK's test programs: an error divided by n·ε·‖·‖ in the working precision, which rounding can
explain. A ratio above `THRESHOLD` is a failure, whatever the size, the scale or the dtype. `tolerance` is the same rule
solved for the error, and the only tolerance of the suite.
"""

import math
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import NamedTuple

import scipy.linalg
import torch
from torch import Tensor

THRESHOLD = 30.0
# A bound in units of ε on ‖UᵀU − I‖₂, and on ‖FᵀF − S‖₂/‖S‖₂ of a root, for every n and every number of updates.
ORTHONORMAL = 200

Spectrum = Callable[[int], Tensor]
Stream = Callable[[int, int, int], Iterator[Tensor]]


# --- Spectra and matrices


def power_law(exponent: float) -> Spectrum:
    """Return the spectrum i^−exponent, i = 1 … n."""
    return lambda n: torch.arange(1, n + 1, dtype=torch.float64).pow(-exponent)


def clustered(n: int) -> Tensor:
    """Return four clusters (1, 0.3, 0.1, 0.03) whose members differ by 1e-6."""
    clusters = torch.tensor([1.0, 0.3, 0.1, 0.03], dtype=torch.float64)
    i = torch.arange(n)
    return clusters[(4 * i // max(n, 1)).clamp(max=3)] - 1e-6 * i / max(n, 1)


SPECTRA: dict[str, Spectrum] = {
    "slow": power_law(0.5),
    "medium": power_law(1.5),
    "fast": power_law(3.0),
    "flat": power_law(0.0),
    "clustered": clustered,
    # From 1 to 1e-12, evenly spaced in the exponent.
    "graded": lambda n: torch.logspace(0, -12, n, dtype=torch.float64),
    "rank-16": lambda n: (torch.arange(n) < 16).double(),
    "zero": lambda n: torch.zeros(n, dtype=torch.float64),
}


def generator(seed: int) -> torch.Generator:
    """Return a CPU generator with this seed."""
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int) -> Tensor:
    """Return standard normal entries."""
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def orthonormal(n: int, r: int, seed: int, batch_shape: tuple[int, ...] = ()) -> Tensor:
    """Return n × r random orthonormal columns."""
    return torch.linalg.qr(gaussian(*batch_shape, n, r, seed=seed)).Q.contiguous()


def psd_matrix(spectrum: Tensor, seed: int) -> Tensor:
    """Return a symmetric matrix with these eigenvalues and random eigenvectors."""
    q = orthonormal(spectrum.numel(), spectrum.numel(), seed)
    return symmetrised((q * spectrum) @ q.mT)


def rectangular_matrix(spectrum: Tensor, m: int, n: int, seed: int) -> Tensor:
    """Return an m × n matrix with these min(m, n) singular values and random singular vectors."""
    r = spectrum.numel()
    return (orthonormal(m, r, seed) * spectrum) @ orthonormal(n, r, seed + 1).mT


def panels(n: int, k: int, seed: int = 5) -> dict[str, Tensor]:
    """Return n × k columns of every family that Gram–Schmidt or Cholesky QR has trouble with."""
    z, pair = gaussian(n, k, seed=seed), gaussian(n, 2, seed=seed + 1)
    p, u, ones = pair[:, :1], pair[:, 1:], torch.ones(k, k, dtype=torch.float64)
    in_plane = pair @ gaussian(2, k, seed=seed + 2)
    # The inverse of this triangle has entries up to 2.2^(k − 2).
    growing = orthonormal(n, k, seed) @ (torch.eye(k, dtype=torch.float64) - 1.2 * ones.triu(1))
    cancelling, first_and_last = z.clone(), torch.arange(k) % max(k - 1, 1) == 0
    for j in range(2, k, 3):
        # Every third column is minus the sum of the two before it, plus a small part.
        cancelling[:, j] = 1e-5 * z[:, j] - cancelling[:, j - 1] - cancelling[:, j - 2]
    return {
        "gaussian": z,
        "condition 1e3": rectangular_matrix(torch.logspace(0, -3, k, dtype=torch.float64), n, k, seed),
        "condition 1e6": rectangular_matrix(torch.logspace(0, -6, k, dtype=torch.float64), n, k, seed),
        "graded": rectangular_matrix(SPECTRA["graded"](k), n, k, seed),
        "columns of very different length": z * torch.logspace(-12, 12, k, dtype=torch.float64),
        "half the rank": z[:, : k // 2] @ gaussian(k // 2, k, seed=seed + 2),
        "two directions": in_plane,
        "two directions and noise near rounding": in_plane + 1e-13 * z,
        "p, p + 1e-5 z, 0.9 z": torch.cat([p, p + 1e-5 * z[:, :1], z[:, 2 : k // 2], 0.9 * z[:, : k - k // 2]], dim=1),
        "a weak column first": torch.cat([1e-7 * p, p + z[:, 1:]], dim=1),
        "every column repeated": z.repeat_interleave(2, dim=1)[:, :k],
        "nearly repeated": p + 1e-5 * z,
        "nearly cancelling": cancelling,
        "zero columns": z.masked_fill(first_and_last, 0),
        "every third column zero": z.masked_fill(torch.arange(k) % 3 == 0, 0),
        "zero": 0 * z,
        "tiny": 1e-18 * z,
        "huge": 1e17 * z,
        "growing under elimination": growing,
        "growing under elimination, one repeated": torch.cat([growing[:, 1:-1], p, p], dim=1),
        # x, x + u√δ and u are in one block, where L⁻¹ is of order 1/√δ. All later columns depend on x and u.
        "noise, then its direction": torch.cat([p, p + 3e-7 * u, u, in_plane], dim=1)[:, :k],
    }


PANELS = tuple(panels(4, 4))


def symmetrised(matrix: Tensor) -> Tensor:
    """Return (M + Mᵀ) / 2."""
    return (matrix + matrix.mT) / 2


# --- Streams: endless n × k batches, scaled by 1/√k like those of a curvature factor


def spectral_stream(deviations: Spectrum, copies: int = 1) -> Stream:
    """Return normal columns with these deviations along a random basis, each column repeated `copies` times."""

    def stream(n: int, k: int, seed: int) -> Iterator[Tensor]:
        source = generator(seed)
        mixing = orthonormal(n, n, seed) * deviations(n)
        while True:
            distinct = torch.randn(n, -(-k // copies), dtype=torch.float64, generator=source)
            yield (mixing @ distinct).repeat_interleave(copies, dim=1)[:, :k] / math.sqrt(k)

    return stream


def switching_stream(scale: float, switch_at: int = 20) -> Stream:
    """Return a stream that moves to an orthogonal subspace, `scale` times as large, after `switch_at` batches."""

    def stream(n: int, k: int, seed: int) -> Iterator[Tensor]:
        source, half = generator(seed), n // 2
        q, deviations = orthonormal(n, n, seed), power_law(0.5)(half)
        before, after = q[:, :half] * deviations, scale * q[:, half : 2 * half] * deviations
        for step in count():
            mixing = before if step < switch_at else after
            yield mixing @ torch.randn(half, k, dtype=torch.float64, generator=source) / math.sqrt(k)

    return stream


def interrupted_stream(n: int, k: int, seed: int) -> Iterator[Tensor]:
    """Yield two zero batches and then a batch, again and again."""
    for columns in spectral_stream(power_law(0.5))(n, k, seed):
        yield torch.zeros_like(columns)
        yield torch.zeros_like(columns)
        yield columns


STREAMS: dict[str, Stream] = {
    **{name: spectral_stream(values) for name, values in SPECTRA.items() if name != "zero"},
    "repeated-8": spectral_stream(power_law(0.5), copies=8),
    "switch": switching_stream(1.0),
    "switch-20x-smaller": switching_stream(1 / 20),
    "zeros-between": interrupted_stream,
}


def batches(
    stream: str, n: int, k: int, count: int, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Return the first `count` batches of a stream, rounded to `dtype`."""
    return [columns.to(dtype) for columns in islice(STREAMS[stream](n, k, seed), count)]


# --- Float64 references


class Eigh(NamedTuple):
    """All n eigenvalues, descending, and all eigenvectors of a symmetric matrix."""

    eigenvalues: Tensor
    eigenvectors: Tensor

    def truncation(self, rank: int) -> Tensor:
        """Return the best approximation of rank `rank` as a dense matrix."""
        d, u = self.eigenvalues[:rank].clamp(min=0), self.eigenvectors[:, :rank]
        return (u * d) @ u.mT


def eigh(matrix: Tensor) -> Eigh:
    """Return the eigendecomposition of a symmetric matrix by scipy.linalg.eigh in float64."""
    if matrix.shape[-1] == 0:
        return Eigh(matrix.new_zeros(0), matrix)
    values, vectors = scipy.linalg.eigh(matrix.double().numpy())
    return Eigh(torch.from_numpy(values).flip(0), torch.from_numpy(vectors).flip(1))


def svd_truncation(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best approximation of rank `rank` as a dense matrix, and all singular values, by scipy.linalg.svd."""
    if 0 in matrix.shape:
        return matrix.double(), torch.zeros(0, dtype=torch.float64)
    u, s, vh = (torch.from_numpy(part) for part in scipy.linalg.svd(matrix.double().numpy(), full_matrices=False))
    return (u[:, :rank] * s[:rank]) @ vh[:rank], s


def updated(matrix: Tensor, columns: Tensor, decay: float = 1.0, weight: float = 1.0) -> Tensor:
    """Return decay·M + weight·A Aᵀ in float64."""
    a = columns.double()
    return decay * matrix.double() + weight * (a @ a.mT)


# --- Error ratios


def epsilon(dtype: torch.dtype) -> float:
    """Return ε of the working precision: that of float32 for half data."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def tolerance(n: int, dtype: torch.dtype, scale: float | Tensor = 1.0) -> float:
    """Return THRESHOLD·n·ε·scale: the largest error that rounding explains."""
    return THRESHOLD * max(n, 1) * epsilon(dtype) * float(scale)


def rounding(n: int, dtype: torch.dtype, largest: float | Tensor, decay: float = 0.0) -> float:
    """Return 16 ε·d₁/(1 − ρ), the rounding of a stream's updates, which decays as the stream does, and of the oracle.

    An update rounds four times: the core, its eigenvectors, their scaling and the rotation, each to √m ε·d₁ for a core
    of order m, which is 16 to 40 here. The float64 oracle's own rounding is its `tolerance`.
    """
    return 16 * epsilon(dtype) * float(largest) / (1 - decay) + tolerance(n, torch.float64, largest)


def spectral_norm(matrix: Tensor) -> float:
    """Return the largest singular value, 0 for an empty matrix."""
    return 0.0 if matrix.numel() == 0 else float(torch.linalg.matrix_norm(matrix.double(), 2))


def quotient(error: float, unit: float) -> float:
    """Return error / unit, and 0 if both are 0."""
    return error / unit if unit > 0 else (0.0 if error == 0 else math.inf)


def difference_ratio(actual: Tensor, expected: Tensor, dtype: torch.dtype, scale: float | None = None) -> float:
    """Return ‖X − Y‖₂ / (n·ε·scale), with scale = ‖Y‖₂ unless given."""
    scale = spectral_norm(expected) if scale is None else scale
    error = spectral_norm(actual.double() - expected.double())
    return quotient(error, max(expected.shape) * epsilon(dtype) * scale)


def orthonormality_defect(vectors: Tensor, values: Tensor) -> float:
    """Return ‖UᵀU − I‖₂, where a zero column counts as right if its value is zero.

    `vectors` is (n, r) and `values` (r,).
    """
    u = vectors.double()
    is_missing = (u == 0).all(dim=-2) & (values == 0)
    return spectral_norm(u.mT @ u - torch.diag((~is_missing).double()))


def orthonormality_ratio(vectors: Tensor, values: Tensor) -> float:
    """Return the defect divided by n·ε."""
    return orthonormality_defect(vectors, values) / (max(vectors.shape[-2], 1) * epsilon(vectors.dtype))
