"""Poisson's equation and the heat equation by K-FAC, Adam and L-BFGS: ``python -m examples.pinn``.

The error is relative to the known solution, on a grid that no method trains on.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from brandla.kfac import PINN, Exact, forward_laplacian
from examples.equations import PROBLEMS, Problem

WIDTH = 32
# The step lengths that the line search tries.
LENGTHS = [0.0, *(2.0**-power for power in range(12))]
METHODS = ("Adam", "L-BFGS", "K-FAC", "K-FAC, averaged")


@torch.no_grad()
def search(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """Move against the gradients by the length with the least loss."""
    before = [parameter.clone() for parameter in model.parameters()]

    def move(length: float) -> float:
        for parameter, old in zip(model.parameters(), before, strict=True):
            parameter.copy_(old - length * parameter.grad)
        return loss().item()

    move(min(LENGTHS, key=move))


def train(problem: Problem, method: str, steps: int) -> tuple[float, float]:
    """Train on all points in each step, and return the error at the end and the seconds."""
    torch.manual_seed(0)
    hidden = [nn.Linear(2, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh()]
    model = nn.Sequential(*hidden, nn.Linear(WIDTH, 1)).double()
    inside, boundary = problem.points()
    parts = inside, problem.residual, boundary, problem.at_boundary
    preconditioner = PINN(model, None if method == "K-FAC" else Exact(1), weights=problem.weights)
    lbfgs = torch.optim.LBFGS(model.parameters(), max_iter=1, history_size=50, line_search_fn="strong_wolfe")
    optimizer = torch.optim.Adam(model.parameters(), 0.003) if method == "Adam" else lbfgs

    def closure() -> float:
        optimizer.zero_grad()
        columns = forward_laplacian(model, inside, problem.weights)
        residuals = problem.residual(columns, inside), problem.at_boundary(model(boundary), boundary)
        loss = sum(part.square().mean() / 2 for part in residuals)
        loss.backward()
        return loss.item()

    start = perf_counter()
    for _ in range(steps):
        if "K-FAC" in method:
            preconditioner.backward(*parts)
            search(model, lambda: preconditioner.loss(*parts))
        else:
            optimizer.step(closure)
    return problem.error(model), perf_counter() - start


def main(steps: int = 50) -> None:
    """Train by each method on each equation."""
    table = Table("equation", "method", f"error after {steps} steps", "seconds")
    for name, problem in PROBLEMS.items():
        for method in METHODS:
            error, seconds = train(problem, method, steps)
            table.add_row(name, method, f"{error:.1e}", f"{seconds:.1f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
