"""Adam in a subspace that follows the gradients, as in GaLore: ``python -m examples.projection``.

GaLore (arXiv 2403.03507) projects the gradient of each matrix to its r leading singular directions, and keeps Adam's
moments there. It takes a new SVD every few hundred steps. Dion (arXiv 2504.05295) amortises the SVD. Here,
`brandla.eigh_update` tracks the basis at every step from a sketch of the gradient, and the moments turn with the basis.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import typer
from torch import Tensor, nn

from brandla import LowRankEigh, eigh_update
from examples.digits import compare


class ProjectedAdam(torch.optim.Optimizer):
    """Adam on Uᵀ G (r, m) for matrices G (n, m), U the leading eigenvectors of the average G Gᵀ; Adam on the rest."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, rank: int = 16, decay: float = 0.9, beta: float = 0.9
    ) -> None:
        super().__init__(parameters, {"lr": lr, "rank": rank, "decay": decay, "betas": (beta, 0.99)})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take a step."""
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if weight.ndim != 2:
                    weight.sub_(adam(state, weight.grad, group["betas"]), alpha=group["lr"])
                    continue
                turn = update_basis(state, weight.grad, group["rank"], group["decay"])
                basis = state["basis"].eigenvectors
                if "mean" in state:
                    state["mean"] = turn @ state["mean"]
                    # The turn maps second moments as it maps the diagonal of a covariance: by its squares.
                    state["square"] = turn.square() @ state["square"]
                weight.sub_(basis @ adam(state, basis.mT @ weight.grad, group["betas"]), alpha=group["lr"])


def update_basis(state: dict, gradient: Tensor, rank: int, decay: float) -> Tensor:
    """Update the basis from a sketch of the gradient, and return the turn from the old basis to the new one."""
    n, m = gradient.shape
    rank = min(rank, n)
    old = state.get("basis", LowRankEigh.zeros(n, rank, dtype=gradient.dtype, device=gradient.device))
    signs = torch.randint(0, 2, (m, rank), device=gradient.device).to(gradient.dtype) * 2 - 1
    state["basis"] = eigh_update(old, gradient @ signs / rank**0.5, decay=decay, weight=1 - decay)
    return state["basis"].eigenvectors.mT @ old.eigenvectors


def adam(state: dict, gradient: Tensor, betas: tuple[float, float]) -> Tensor:
    """Return Adam's step at learning rate 1."""
    count = state["count"] = state.get("count", 0) + 1
    mean, square = state.get("mean", torch.zeros_like(gradient)), state.get("square", torch.zeros_like(gradient))
    state["mean"] = mean = mean.lerp(gradient, 1 - betas[0])
    state["square"] = square = square.lerp(gradient.square(), 1 - betas[1])
    return mean / (1 - betas[0] ** count) / ((square / (1 - betas[1] ** count)).sqrt() + 1e-8)


def main(steps: int = 60) -> None:
    """Train on digits, beside Adam."""
    compare(
        {
            "Adam": lambda weights: torch.optim.Adam(weights, 0.01),
            "Adam in a tracked subspace": lambda weights: ProjectedAdam(weights, 0.01),
        },
        steps,
    )


if __name__ == "__main__":
    typer.run(main)
