"""SOAP on low-rank bases, refreshed at every step: ``python -m examples.soap``.

SOAP runs Adam in the eigenbases of the averages of G Gᵀ and Gᵀ G. Here each basis has `rank` vectors, and
`brandla.eigh_refresh` turns it at every step by products alone. All that lies outside shares one second moment.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import typer
from torch import Tensor, nn

import brandla
from examples.digits import compare


class LowRankSOAP(torch.optim.Optimizer):
    """Adam on the (rank, rank) coordinates of each matrix, and on the entries of everything else."""

    def __init__(self, weights: Iterable[nn.Parameter], lr: float = 0.01, rank: int = 32) -> None:
        super().__init__(weights, {"lr": lr, "rank": rank, "betas": (0.9, 0.95)})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Take one step with the gradients that the weights hold."""
        for group in self.param_groups:
            rank, (beta, forget), eps = group["rank"], group["betas"], 1e-8
            for weight in group["params"]:
                state, gradient = self.state[weight], weight.grad
                if not state:
                    _begin(state, weight, rank)
                state["step"] += 1
                state["mean"].lerp_(gradient, 1 - beta)
                mean = state["mean"] / (1 - beta ** state["step"])
                unbiased = 1 - forget ** state["step"]
                if "left" not in state:
                    state["square"].lerp_(gradient.square(), 1 - forget)
                    weight.sub_(group["lr"] * mean / ((state["square"] / unbiased).sqrt() + eps))
                    continue
                for side, matrix, axis in (("left", gradient, 0), ("right", gradient.mT, 1)):
                    state[side], order = brandla.eigh_refresh(state[side], matrix, decay=forget, weight=1 - forget)
                    # The second moments follow the vectors that they belong to.
                    state["square"] = state["square"].index_select(axis, order)
                left, right = state["left"].eigenvectors, state["right"].eigenvectors
                inside = left.mT @ gradient @ right
                state["square"].lerp_(inside.square(), 1 - forget)
                outside = (gradient.square().sum() - inside.square().sum()).clamp_min(0)
                state["rest"].lerp_(outside / (gradient.numel() - inside.numel()), 1 - forget)
                rest = (state["rest"] / unbiased).sqrt() + eps
                coordinates = left.mT @ mean @ right
                change = coordinates / ((state["square"] / unbiased).sqrt() + eps) - coordinates / rest
                weight.sub_(group["lr"] * (mean / rest + left @ change @ right.mT))


def _begin(state: dict[str, object], weight: Tensor, rank: int) -> None:
    state["step"], state["mean"] = 0, torch.zeros_like(weight)
    if weight.ndim != 2 or min(weight.shape) <= rank:
        state["square"] = torch.zeros_like(weight)
        return
    m, n = weight.shape
    state["left"] = brandla.LowRankEigh.zeros(m, rank, device=weight.device, dtype=weight.dtype)
    state["right"] = brandla.LowRankEigh.zeros(n, rank, device=weight.device, dtype=weight.dtype)
    state["square"], state["rest"] = weight.new_zeros(rank, rank), weight.new_zeros(())


def main(steps: int = 60) -> None:
    """Train on digits, beside AdamW."""
    compare({"AdamW": lambda weights: torch.optim.AdamW(weights, 0.01), "low-rank SOAP": LowRankSOAP}, steps)


if __name__ == "__main__":
    typer.run(main)
