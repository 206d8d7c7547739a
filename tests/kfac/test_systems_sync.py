"""Systems that promise never to wait for the device run on meta tensors, which have no values to read."""

from __future__ import annotations

import pytest
import torch

from brandla.kfac import KBFGS, Brand, ConjugateGradient, Exact, Foof, Strategy, TwoLevel, Woodbury
from brandla.kfac.systems.strategy import Problem
from brandla.kfac.values import Damping, Now, Rows, Shape

SYSTEMS = {
    "cholesky": Exact(inverse_every=1, method="cholesky"),
    "foof": Foof(Brand(6, compress="cholesky")),
    "foof-cholesky": Foof(Exact(inverse_every=1, method="cholesky")),
    "conjugate-gradient": ConjugateGradient(batches=2, warm_start=True),
    "k-bfgs": KBFGS(),
    "woodbury": Woodbury(),
    "woodbury-fixed": Woodbury(fixed_after=1),
    "two-level": TwoLevel(Brand(6, compress="cholesky")),
    "two-level-residual": TwoLevel(Exact(inverse_every=1, method="cholesky"), "residual"),
}


@pytest.mark.parametrize("groups", [(), (2,)], ids=["single", "grouped"])
@pytest.mark.parametrize("strategy", SYSTEMS.values(), ids=SYSTEMS)
def test_steps_read_nothing_back_from_the_device(strategy: Strategy, groups: tuple[int, ...]):
    meta = torch.device("meta")
    sizes = [(20, 30), (25, 20)]
    curvatures = [strategy.curvature(Shape(groups, *size, torch.float32, meta)) for size in sizes]
    now = Now(0, 0, 0.95, Damping(0.03, "relative"), torch.ones((), dtype=torch.bool, device=meta))
    for step in range(3):
        rows = [
            Rows(torch.empty(*groups, 8, d_in, device=meta), torch.empty(*groups, 8, d_out, device=meta), 8, 2)
            for d_out, d_in in sizes
        ]
        strategy.absorb(curvatures, rows, now._replace(step=step))
        gradients = [torch.empty(*groups, *size, device=meta) for size in sizes]
        problems = [Problem(*parts) for parts in zip(curvatures, gradients, rows, strict=True)]
        steps = strategy.solve(problems, now._replace(step=step))
        assert [part.shape for part in steps] == [gradient.shape for gradient in gradients]
