"""What steps ask of the device: of factors that began together one sum of weights, and of some systems no wait.

Those run on meta tensors, which have no values to read.
"""

import pytest
import torch

from brandla.kfac import KFAC, Brand, Exact, Foof, InverseFree, TwoLevel, Woodbury
from brandla.kfac.systems.strategy import Problem
from brandla.kfac.systems.structures import STRUCTURES
from brandla.kfac.values import Damping, Now, Rows, Shape
from kfac.networks import mlp
from kfac.systems import SYSTEMS


@pytest.mark.filterwarnings("ignore:KFAC. the model has hooks")
def test_factors_that_began_together_have_one_sum_of_weights():
    """Also after a checkpoint was read."""
    model = mlp(40, 40, 40)
    own = KFAC(model, Brand(4))
    for preconditioner in (own, KFAC(model, Brand(4))):
        if preconditioner is not own:
            preconditioner.load_state_dict(own.state_dict())
        model(torch.randn(6, 40, dtype=torch.float64)).sum().backward()
        preconditioner.step()
        totals = [factor.state["total"] for layer in preconditioner._layers for _, factor in layer.curvature.factors()]
        assert len(totals) == 4
        assert all(total is totals[0] for total in totals)


META = torch.device("meta")
CHOLESKY, ROOT = Exact(inverse_every=1, method="cholesky"), Brand(6, compress="cholesky")
STRATEGIES = {
    "cholesky": CHOLESKY,
    **{f"foof-{name}": Foof(inner) for name, inner in {"brand": ROOT, "cholesky": CHOLESKY}.items()},
    "two-level": TwoLevel(ROOT),
    "fngd": Woodbury(fixed_after=1),
    **{name: SYSTEMS[name] for name in ("conjugate-gradient", "residual", "k-bfgs", "woodbury")},
    **{name: InverseFree(name, preconditioner_every=1) for name in STRUCTURES},
    "ikfac": InverseFree(variant="ikfac", preconditioner_every=1),
}


CASES = [(name, "plain") for name in STRATEGIES]
CASES += [(name, "grouped") for name in STRATEGIES if name not in STRUCTURES]
CASES += [(name, kind) for name in ("dense", "ikfac") for kind in ("one_hot", "single")]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_steps_read_nothing_back_from_the_device(name, kind):
    strategy = STRATEGIES[name]
    groups = {"grouped": (2,), "single": (5,)}.get(kind, ())
    flags = {kind: True} if kind in ("one_hot", "single") else {}
    sizes = [(1, 2)] * 2 if kind == "single" else [(20, 30), (25, 20)]
    curvatures = [strategy.curvature(Shape(groups, *size, torch.float32, META, **flags)) for size in sizes]
    now = Now(0, 0, 0.95, Damping(0.03, "relative"), torch.ones((), dtype=torch.bool, device=META))

    def rows(d_out, d_in):
        inputs, gradients = (torch.empty(*groups, 8, n, device=META) for n in (d_in, d_out))
        if kind == "single":
            return Rows(inputs, inputs, 8, single=True)
        indices = torch.empty(8, dtype=torch.int64, device=META)
        return Rows(indices if kind == "one_hot" else inputs, gradients, 8, 2)

    for step in range(2):
        taken = [rows(*size) for size in sizes]
        strategy.absorb(curvatures, taken, now._replace(step=step))
        gradients = [torch.empty(*groups, *size, device=META) for size in sizes]
        problems = [Problem(*parts) for parts in zip(curvatures, gradients, taken, strict=True)]
        steps = strategy.solve(problems, now._replace(step=step))
        assert [(part.shape, part.device) for part in steps] == [(gradient.shape, META) for gradient in gradients]
