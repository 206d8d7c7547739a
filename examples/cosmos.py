"""COSMOS: SOAP in the leading subspace, orthogonal steps outside it: ``python -m examples.cosmos``.

`brandla.eigh_refresh` keeps `rank` leading eigenvectors of the average of Gᵀ G. Adam runs on the coordinates in them.
Newton–Schulz iterations, as in Muon, make the rest of the momentum orthogonal.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import typer
from torch import Tensor, nn

import brandla
from examples.digits import compare


def orthogonal(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Bring all singular values near 1, by matrix products only."""
    matrix = matrix / (torch.linalg.matrix_norm(matrix) + 1e-12)
    for _ in range(iterations):
        gram = matrix @ matrix.mT
        matrix = 3.4445 * matrix + (2.0315 * gram @ gram - 4.775 * gram) @ matrix
    return matrix


class Cosmos(torch.optim.Optimizer):
    """COSMOS for matrices, and Adam for vectors."""

    def __init__(self, weights: Iterable[nn.Parameter], lr: float = 0.01, rank: int = 8, outside: float = 0.5) -> None:
        super().__init__(weights, {"lr": lr, "rank": rank, "outside": outside, "betas": (0.9, 0.95)})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Take one step with the gradients that the weights hold."""
        for group in self.param_groups:
            rank, (beta, forget) = group["rank"], group["betas"]
            for weight in group["params"]:
                state, gradient = self.state[weight], weight.grad
                if not state:
                    state["step"], state["mean"] = 0, torch.zeros_like(weight)
                    state["square"] = torch.zeros_like(weight)
                    if weight.ndim == 2 and min(weight.shape) > rank:
                        n, state["square"] = weight.shape[1], torch.zeros_like(weight[:, :rank])
                        state["eigh"] = brandla.LowRankEigh.zeros(n, rank, device=weight.device, dtype=weight.dtype)
                state["step"] += 1
                momentum = mean = state["mean"].lerp_(gradient, 1 - beta) / (1 - beta ** state["step"])
                share = (1 - forget) / (1 - forget ** state["step"])
                if "eigh" in state:
                    state["eigh"], order = brandla.eigh_refresh(
                        state["eigh"], gradient.mT, decay=1 - share, weight=share
                    )
                    basis = state["eigh"].eigenvectors
                    # The second moments follow the vectors that they belong to.
                    state["square"] = state["square"][:, order]
                    gradient, mean = gradient @ basis, momentum @ basis
                square = state["square"].lerp_(gradient.square(), share)
                step = mean / (square.sqrt() + 1e-8)
                if "eigh" in state:
                    rest = orthogonal(momentum - mean @ basis.mT)
                    step = step @ basis.mT + group["outside"] * len(weight) ** 0.5 * rest
                weight.sub_(group["lr"] * step)


def main(steps: int = 60) -> None:
    """Train on digits, beside AdamW."""
    compare({"AdamW": lambda weights: torch.optim.AdamW(weights, 0.01), "COSMOS": Cosmos}, steps)


if __name__ == "__main__":
    typer.run(main)
