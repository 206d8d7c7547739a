"""Shampoo with low-rank factors that are updated at every step: ``python -m examples.shampoo``.

Shampoo (arXiv 1802.09568) takes the step L^(−1/4) G R^(−1/4) with L = Σ G Gᵀ and R = Σ Gᵀ G, and computes the roots of
both from time to time. Here both are tracked at a rank by `brandla.eigh_update`, from a sketch of G, and
`brandla.damped_power` applies any power of them: linear memory and time in each side, and nothing is ever stale.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import typer
from torch import Tensor, nn

from brandla import LowRankEigh, damped_power, eigh_update
from examples.digits import compare


class Shampoo(torch.optim.Optimizer):
    """Low-rank Shampoo with the length of SGD's step for matrices; SGD for everything else."""

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
        """Return L^(−1/4) G R^(−1/4), as long as G is."""
        step = gradient = weight.grad
        state = self.state[weight]
        for side in ("left", "right"):
            n, m = step.shape
            rank = min(group["rank"], n)
            known = state.get(side, LowRankEigh.zeros(n, rank, dtype=step.dtype, device=step.device))
            # G Ω/√s with random signs Ω has the right G Gᵀ on average, in s columns.
            signs = torch.randint(0, 2, (m, rank), device=step.device).to(step.dtype) * 2 - 1
            columns = (gradient if side == "left" else gradient.mT) @ signs / rank**0.5
            state[side] = eigh_update(known, columns, decay=group["decay"], weight=1 - group["decay"])
            damping = group["damping"] * state[side].eigenvalues[0] + 1e-12
            # The other side comes next, from the transpose.
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
