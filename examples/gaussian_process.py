"""Gaussian-process regression with inducing points on the diabetes data: ``python -m examples.gaussian_process``.

The covariance of the targets is F Fᵀ + diag(δ) + σ²I. F Fᵀ = K_nm K_mm⁻¹ K_mn has the rank m of the inducing points.
δ is the part of the kernel's diagonal that F Fᵀ lacks (FITC: E. Snelson, Z. Ghahramani, NIPS 2005). The likelihood and
its gradient by the lengths, the signal and the noise cost O(n m²), with no n × n matrix.
"""

from __future__ import annotations

import math

import torch
from rich.console import Console
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

import brandla


class Process(nn.Module):
    """A squared-exponential kernel with a length for each feature, on m of the inputs as inducing points."""

    def __init__(self, inputs: Tensor, m: int) -> None:
        super().__init__()
        self.points = inputs[:m]
        self.log_lengths = nn.Parameter(inputs.new_full(inputs.shape[1:], math.log(3)))
        self.log_signal, self.log_noise = (nn.Parameter(inputs.new_tensor(value)) for value in (0.0, -1.0))

    def kernel(self, left: Tensor, right: Tensor) -> Tensor:
        """Return signal · exp(−½ |x − y|²) of the scaled inputs."""
        left, right = (inputs / self.log_lengths.exp() for inputs in (left, right))
        squared = left.square().sum(1)[:, None] + right.square().sum(1) - 2 * left @ right.mT
        return torch.exp(self.log_signal - squared / 2)

    def root(self, inputs: Tensor) -> Tensor:
        """Return F = K_nm L⁻ᵀ with K_mm = L Lᵀ."""
        jitter = 1e-8 * torch.eye(len(self.points), dtype=inputs.dtype)
        lower = torch.linalg.cholesky(self.kernel(self.points, self.points) + jitter)
        return torch.linalg.solve_triangular(lower, self.kernel(self.points, inputs), upper=False).mT

    def covariance(self, inputs: Tensor) -> tuple[brandla.LowRankRoot, Tensor, Tensor]:
        """Return F with its Gram matrix, σ² and δ."""
        root = self.root(inputs)
        lacking = self.log_signal.exp() - root.square().sum(1)
        return brandla.LowRankRoot(root, root.mT @ root), self.log_noise.exp(), lacking

    def log_likelihood(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return log N(targets; 0, covariance)."""
        factor, noise, lacking = self.covariance(inputs)
        distance = targets @ brandla.damped_solve(factor, targets, noise, diagonal=lacking)
        logdet = brandla.damped_logdet(factor, noise, diagonal=lacking)
        return -(distance + logdet + len(targets) * math.log(2 * math.pi)) / 2

    def predict(self, inputs: Tensor, targets: Tensor, new: Tensor) -> Tensor:
        """Return the means of new targets."""
        factor, noise, lacking = self.covariance(inputs)
        return self.root(new) @ (factor.root.mT @ brandla.damped_solve(factor, targets, noise, diagonal=lacking))


def main(steps: int = 100) -> None:
    """Fit the kernel to 342 patients by the likelihood, and predict the other 100."""
    inputs, targets = (torch.from_numpy(part) for part in load_diabetes(return_X_y=True))
    inputs, targets = ((part - part.mean(0)) / part.std(0) for part in (inputs, targets))
    training, new = (inputs[:342], targets[:342]), (inputs[342:], targets[342:])
    process = Process(inputs, 40)
    optimizer = torch.optim.Adam(process.parameters(), 0.05)
    for step in range(steps + 1):
        likelihood = process.log_likelihood(*training)
        if step % 25 == 0:
            error = (process.predict(*training, new[0]) - new[1]).square().mean().sqrt()
            Console().print(f"step {step}: log-likelihood {likelihood:.1f}, error on new patients {error:.3f}")
        optimizer.zero_grad()
        (-likelihood).backward()
        optimizer.step()


if __name__ == "__main__":
    main()
