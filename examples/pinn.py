"""Poisson's and the heat equation by K-FAC, Adam and L-BFGS: ``python -m examples.pinn``.

The error is that of the network against the known solution, relative, on a grid that none of them trains on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from brandla.kfac import PINN, Columns, Exact, forward_laplacian

INSIDE, BOUNDARY, WIDTH = 400, 100, 32
# Lengths that the line search tries.
LENGTHS = [0.0, *(2.0**-power for power in range(12))]
METHODS = ("Adam", "L-BFGS", "K-FAC", "K-FAC, averaged")


@dataclass(frozen=True)
class Problem:
    """An equation on the unit square, and its solution, known at some sides: of a coordinate, at 0 or 1."""

    residual: Callable[[Columns, Tensor], Tensor]
    solution: Callable[[Tensor], Tensor]
    sides: tuple[tuple[int, float], ...]
    weights: Tensor | None = None

    def points(self) -> tuple[Tensor, Tensor]:
        """Draw points inside and at the sides, the same for all methods."""
        points = torch.rand(INSIDE + BOUNDARY, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        inside, boundary = points.split((INSIDE, BOUNDARY))
        for index, (coordinate, value) in enumerate(self.sides):
            boundary[index :: len(self.sides), coordinate] = value
        return inside, boundary

    def at_boundary(self, u: Tensor, x: Tensor) -> Tensor:
        """Return how far the values are off."""
        return u[:, 0] - self.solution(x)

    @torch.no_grad()
    def error(self, model: nn.Sequential) -> float:
        """Return the norm of the error on a grid over that of the solution."""
        grid = torch.cartesian_prod(*[torch.linspace(0, 1, 50, dtype=torch.float64)] * 2)
        exact = self.solution(grid)
        return float((model(grid)[:, 0] - exact).norm() / exact.norm())


def waves(x: Tensor) -> Tensor:
    """Return sin πx sin πy."""
    return (math.pi * x).sin().prod(1)


def decaying(x: Tensor) -> Tensor:
    """Return e^(−π²t/4) sin πx, the first coordinate being t."""
    return (-(math.pi**2) / 4 * x[:, 0]).exp() * (math.pi * x[:, 1]).sin()


SIDES = ((1, 0.0), (1, 1.0), (0, 0.0), (0, 1.0))
SPACE = torch.tensor([0.0, 1.0], dtype=torch.float64)
PROBLEMS = {
    # Δu = −2π² u, divided by 2π²: as large as the values at the boundary, and far above λ.
    "Poisson": Problem(lambda u, x: u.laplacian[:, 0] / (2 * math.pi**2) + waves(x), waves, SIDES),
    "heat": Problem(lambda u, _: u.gradient[:, 0, 0] - u.laplacian[:, 0] / 4, decaying, SIDES[:3], SPACE),
}


@torch.no_grad()
def search(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """Move against the gradients by the length that leaves the least loss."""
    before = [parameter.clone() for parameter in model.parameters()]

    def moved(length: float) -> float:
        for parameter, old in zip(model.parameters(), before, strict=True):
            parameter.copy_(old - length * parameter.grad)
        return loss().item()

    moved(min(LENGTHS, key=moved))


def train(problem: Problem, method: str, steps: int) -> tuple[float, float]:
    """Return the error after some steps on all points, and the seconds."""
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
