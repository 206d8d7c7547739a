"""KL-Shampoo on tracked bases with a flat tail: ``python -m examples.kl_shampoo``.

Each factor averages gradients that the other factor has whitened, so that the Kronecker product of both is the best fit
of the gradients' covariance. A factor has `rank` eigenpairs, and one value for all others: their mean, by the
remaining trace. The step is (A ⊗ L + δI)^−½ of the momentum, by `brandla.kron_damped_power`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import typer
from torch import Tensor, nn

import brandla
from examples.digits import compare

Factor = brandla.Tracked[brandla.LowRankEigh]


def identity(n: int, rank: int, like: Tensor) -> Factor:
    """Return the factor I: it has no eigenpairs, and the trace n is left for the tail."""
    tracked = brandla.track(brandla.LowRankEigh.zeros(n, rank, device=like.device, dtype=like.dtype))
    return tracked._replace(trace=tracked.trace + n)


def whitened(factor: Factor, matrix: Tensor) -> Tensor:
    """Return L^−½ X."""
    return brandla.damped_power(factor, matrix, 1e-3 * factor.trace / factor.lowrank.n, -0.5, tail="mean")


def averaged(factor: Factor, matrix: Tensor, share: float) -> Factor:
    """Return the factor with the mean of x xᵀ over the columns x of X averaged in, at weight ``share``."""
    weight = share / matrix.shape[-1]
    eigh, _ = brandla.eigh_refresh(factor.lowrank, matrix, decay=1 - share, weight=weight)
    return factor._replace(lowrank=eigh, trace=(1 - share) * factor.trace + weight * matrix.square().sum())


class KLShampoo(torch.optim.Optimizer):
    """Whitens the momentum of matrices from both sides, and takes Adam's step for vectors."""

    def __init__(self, weights: Iterable[nn.Parameter], lr: float = 0.01, rank: int = 8) -> None:
        super().__init__(weights, {"lr": lr, "rank": rank, "betas": (0.9, 0.95)})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Take one step with the gradients that the weights hold."""
        for group in self.param_groups:
            rank, (beta, forget) = group["rank"], group["betas"]
            for weight in group["params"]:
                state, gradient = self.state[weight], weight.grad
                if not state:
                    state["step"], state["mean"] = 0, torch.zeros_like(weight)
                    if weight.ndim == 2 and min(weight.shape) > rank:
                        state["left"], state["right"] = (identity(n, rank, weight) for n in weight.shape)
                    else:
                        state["square"] = torch.zeros_like(weight)
                state["step"] += 1
                mean = state["mean"].lerp_(gradient, 1 - beta) / (1 - beta ** state["step"])
                # The weight of this gradient in the bias-corrected moving average.
                share = (1 - forget) / (1 - forget ** state["step"])
                if "square" in state:
                    square = state["square"].lerp_(gradient.square(), share)
                    weight.sub_(group["lr"] * mean / (square.sqrt() + 1e-8))
                    continue
                left = state["left"] = averaged(state["left"], whitened(state["right"], gradient.mT).mT, share)
                right = state["right"] = averaged(state["right"], whitened(left, gradient).mT, share)
                damping = 1e-4 * left.trace * right.trace / gradient.numel()
                step = brandla.kron_damped_power(left, right, mean, damping, -0.5, left_tail="mean", right_tail="mean")
                weight.sub_(group["lr"] * step)


def main(steps: int = 60) -> None:
    """Train on digits, beside AdamW."""
    compare({"AdamW": lambda weights: torch.optim.AdamW(weights, 0.01), "KL-Shampoo": KLShampoo}, steps)


if __name__ == "__main__":
    typer.run(main)
