"""Shampoo with low-rank factors that are updated at every step: ``python -m examples.shampoo``.

Shampoo (arXiv 1802.09568) takes the step L^(−1/4) G R^(−1/4) with L = Σ G Gᵀ and R = Σ Gᵀ G, and computes the roots of
both from time to time. Here `brandla.eigh_update` tracks both at low rank, from a sketch of G, and
`brandla.damped_power` applies their powers. Memory and time are linear in each side, and the roots are never stale.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import typer
from torch import Tensor, nn

from brandla import LowRankEigh, damped_power, eigh_update
from examples.digits import compare


class Shampoo(torch.optim.Optimizer):
    """Low-rank Shampoo for matrices, with the length of SGD's step, and SGD for everything else."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, rank: int = 16, decay: float = 0.95, damping: float = 1e-3
    ) -> None:
        super().__init__(parameters, {"lr": lr, "rank": rank, "decay": decay, "damping": damping})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take a step."""
        for group in self.param_groups:
            for weight in group["params"]:
                step = weight.grad if weight.ndim != 2 else self._preconditioned(weight, group)
                weight.sub_(step, alpha=group["lr"])

    def _preconditioned(self, weight: Tensor, group: dict) -> Tensor:
        """Return L^(−1/4) G R^(−1/4), scaled to the norm of G."""
        step = gradient = weight.grad
        state = self.state[weight]
        for side in ("left", "right"):
            n, m = step.shape
            rank = min(group["rank"], n)
            old = state.get(side, LowRankEigh.zeros(n, rank, dtype=step.dtype, device=step.device))
            # With s columns of random signs Ω, the sketch Y = G Ω/√s has Y Yᵀ = G Gᵀ on average.
            signs = torch.randint(0, 2, (m, rank), device=step.device).to(step.dtype) * 2 - 1
            columns = (gradient if side == "left" else gradient.mT) @ signs / rank**0.5
            state[side] = eigh_update(old, columns, decay=group["decay"], weight=1 - group["decay"])
            damping = group["damping"] * state[side].eigenvalues[0] + 1e-12
            # The next side works on the transpose.
            step = damped_power(state[side], step, damping, -0.25).mT
        return step * gradient.norm() / step.norm().clamp_min(1e-12)


def main(steps: int = 60) -> None:
    """Train on digits, beside SGD."""
    compare(
        {
            "SGD": lambda weights: torch.optim.SGD(weights, 0.3),
            "low-rank Shampoo": lambda weights: Shampoo(weights, 0.3),
        },
        steps,
    )


if __name__ == "__main__":
    typer.run(main)
