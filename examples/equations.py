"""Two equations on the unit square whose solutions are known: Poisson's equation, and the heat equation of a rod."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from brandla.kfac import Columns

INSIDE, BOUNDARY = 400, 100


@dataclass(frozen=True)
class Problem:
    """An equation on the unit square, with its solution, whose values are given on some sides."""

    residual: Callable[[Columns, Tensor], Tensor]
    solution: Callable[[Tensor], Tensor]
    sides: tuple[tuple[int, float], ...]  # a coordinate, and its value there, 0 or 1
    weights: Tensor | None = None  # of the second derivatives in the Laplacian

    def points(self) -> tuple[Tensor, Tensor]:
        """Draw points inside and on the sides, the same for all methods."""
        points = torch.rand(INSIDE + BOUNDARY, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        inside, boundary = points.split((INSIDE, BOUNDARY))
        for index, (coordinate, value) in enumerate(self.sides):
            boundary[index :: len(self.sides), coordinate] = value
        return inside, boundary

    def at_boundary(self, u: Tensor, x: Tensor) -> Tensor:
        """Return the errors of the values at the boundary."""
        return u[:, 0] - self.solution(x)

    @torch.no_grad()
    def error(self, model: nn.Sequential) -> float:
        """Return the norm of the error on a grid, relative to the norm of the solution."""
        grid = torch.cartesian_prod(*[torch.linspace(0, 1, 50, dtype=torch.float64)] * 2)
        exact = self.solution(grid)
        return float((model(grid)[:, 0] - exact).norm() / exact.norm())


def waves(x: Tensor) -> Tensor:
    """Return sin πx sin πy."""
    return (math.pi * x).sin().prod(1)


def decaying(x: Tensor) -> Tensor:
    """Return e^(−π²t/4) sin πx, where the first coordinate is t."""
    return (-(math.pi**2) / 4 * x[:, 0]).exp() * (math.pi * x[:, 1]).sin()


SIDES = ((1, 0.0), (1, 1.0), (0, 0.0), (0, 1.0))
SPACE = torch.tensor([0.0, 1.0], dtype=torch.float64)
PROBLEMS = {
    # Δu = −2π² u is divided by 2π², so that it is as large as the boundary values, and far above λ.
    "Poisson": Problem(lambda u, x: u.laplacian[:, 0] / (2 * math.pi**2) + waves(x), waves, SIDES),
    "heat": Problem(lambda u, _: u.gradient[:, 0, 0] - u.laplacian[:, 0] / 4, decaying, SIDES[:3], SPACE),
}
