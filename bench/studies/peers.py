"""Optimizers beside K-FAC: Muon, Shampoo and SOAP from their papers, and the K-FAC of the package asdfghjkl.

A weight is a matrix, that of a convolution with its windows as columns. Adam trains vectors.
"""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from brandla.demo.data import Split

EPS = 1e-8
State = dict[str, Any]


class Matrices(torch.optim.Optimizer):
    """Steps of matrices, with decoupled weight decay; ``betas`` are those of the mean gradient and of the factors.

    ``matrix_step`` returns the step of a matrix at rate 1, from its state, its gradient and the options.
    """

    def __init__(self, matrix_step: Callable[[State, Tensor, State], Tensor], weights, rate, betas, decay, every=1):
        super().__init__(weights, {"lr": rate, "betas": betas, "weight_decay": decay, "every": every})
        self.matrix_step = matrix_step

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in (weight for weight in group["params"] if weight.grad is not None):
                state = self.state[weight]
                state["count"] = state.get("count", 0) + 1
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                if weight.ndim < 2:
                    step = adam(state, weight.grad, group["betas"])
                else:
                    step = self.matrix_step(state, weight.grad.flatten(1), group).reshape(weight.shape)
                weight.sub_(step, alpha=group["lr"])


def shampoo(state: State, gradient: Tensor, group: State) -> Tensor:
    """Return L^(−1/4) M R^(−1/4) of averages L and R and the mean gradient M, scaled to the length of Adam's step."""
    of_adam = adam(state, gradient, group["betas"])
    update_averages(state, gradient, group["betas"][1])
    if (state["count"] - 1) % group["every"] == 0:
        state["roots"] = [inverse_fourth_root(state[side]) for side in ("left", "right")]
    left, right = state["roots"]
    step = left @ state["mean"] @ right
    return step * (of_adam.norm() / step.norm().clamp_min(EPS))


def soap(state: State, gradient: Tensor, group: State) -> Tensor:
    """Return Adam's step in the eigenbases of Shampoo's factors, which one product and a QR renew now and then."""
    update_averages(state, gradient, group["betas"][1])
    if "bases" not in state:
        state["bases"] = [torch.linalg.eigh(state[side]).eigenvectors.flip(-1) for side in ("left", "right")]
    elif (state["count"] - 1) % group["every"] == 0:
        old = state["bases"]
        new = [torch.linalg.qr(state[side] @ basis).Q for side, basis in zip(("left", "right"), old, strict=True)]
        # The mean gradient turns with the bases. Second moments stay as they are, as in the paper.
        left, right = (after.mT @ before for after, before in zip(new, old, strict=True))
        state |= {"mean": left @ state["mean"] @ right.mT, "bases": new}
    left, right = state["bases"]
    return left @ adam(state, left.mT @ gradient @ right, group["betas"]) @ right.mT


def muon(state: State, gradient: Tensor, group: State) -> Tensor:
    """Return roughly U Vᵀ of the SVD of Nesterov's mean gradient, by five Newton–Schulz steps.

    Products are in bfloat16 on a GPU, as in torch, and in float32 on a CPU: many CPUs multiply bfloat16 very slowly.
    """
    beta = group["betas"][0]
    state["mean"] = mean = state.get("mean", torch.zeros_like(gradient)).lerp(gradient, 1 - beta)
    tall = gradient.shape[0] > gradient.shape[1]
    step = gradient.lerp(mean, beta)
    step = step.mT if tall else step
    step = (step.bfloat16() if step.is_cuda else step) / step.norm().clamp_min(1e-7)
    for _ in range(5):
        gram = step @ step.mT
        step = torch.addmm(step, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), step, beta=3.4445)
    return 0.2 * max(gradient.shape) ** 0.5 * (step.mT if tall else step)


# By the papers, arXiv 1802.09568 and 2409.11321; and ``torch.optim.Muon``, with steps as long as AdamW's.
Shampoo, SOAP = partial(Matrices, shampoo), partial(Matrices, soap)
Muon = lambda weights, rate, momentum, decay: Matrices(muon, weights, rate, (momentum, 0.999), decay)


class Maker:
    """A trainer with asdfghjkl's K-FAC, which preconditions gradients as it computes them, by the empirical Fisher."""

    preconditioner = None

    def __init__(self, model: nn.Module, rate: float, loss, batch: int, period: int, damping: float, weight: float):
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            import asdl
            from asdl.precondition import natural_gradient

        if not torch.backends.cuda.is_built():
            # The package's named ranges need a CUDA build of torch.
            natural_gradient.nvtx = SimpleNamespace(range=lambda *_: nullcontext())
        every = {"curvature_upd_interval": 1, "preconditioner_upd_interval": period}
        config = asdl.PreconditioningConfig(data_size=batch, damping=damping, ema_decay=weight, **every)
        self.model, self.optimizer, self.loss = model, torch.optim.SGD(model.parameters(), rate), loss
        self.maker = asdl.KfacGradientMaker(model, config, fisher_type="fisher_emp")

    def step(self, batch: Split) -> None:
        self.optimizer.zero_grad()
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            outputs = self.maker.setup_model_call(self.model, batch.images)
            self.maker.setup_loss_call(self.loss, outputs, batch.labels)
            self.maker.forward_and_backward()
        self.optimizer.step()


def adam(state: State, gradient: Tensor, betas: tuple[float, float]) -> Tensor:
    """Return Adam's step at rate 1."""
    mean, square = state.get("mean", torch.zeros_like(gradient)), state.get("square", torch.zeros_like(gradient))
    state["mean"] = mean = mean.lerp(gradient, 1 - betas[0])
    state["square"] = square = square.lerp(gradient.square(), 1 - betas[1])
    count = state["count"]
    return mean / (1 - betas[0] ** count) / ((square / (1 - betas[1] ** count)).sqrt() + EPS)


def update_averages(state: State, gradient: Tensor, decay: float) -> None:
    """Add a gradient to the averages of G Gᵀ and Gᵀ G."""
    for side, gram in (("left", gradient @ gradient.mT), ("right", gradient.mT @ gradient)):
        state[side] = state[side].lerp(gram, 1 - decay) if side in state else (1 - decay) * gram


def inverse_fourth_root(factor: Tensor) -> Tensor:
    """Return M^(−1/4)."""
    values, vectors = torch.linalg.eigh(factor)
    values = values.clamp_min(EPS * values[-1]).clamp_min(torch.finfo(values.dtype).tiny)
    return vectors * values.pow(-0.25) @ vectors.mT
