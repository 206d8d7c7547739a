"""K-BFGS against its definition with dense matrices in float64; rounding, and non-finite batches."""

import pytest
import torch
from torch import nn

from brandla.kfac import KBFGS, KFAC, Exact
from brandla.kfac.values import Damping, Now, Rows, Shape
from kfac.networks import assert_near, batch, gradients, layer_gradient, loss_of, mlp, stepped, with_one

DAMPING = 0.3
OPTIONS = {"damping": DAMPING, "damping_scale": "absolute", "clip": None}
DOUBLE = torch.float64


def bfgs(H, s, y):
    """Return (I − ρ s yᵀ) H (I − ρ y sᵀ) + ρ s sᵀ."""
    rho = 1 / (s @ y)
    left = torch.eye(len(H), dtype=H.dtype) - rho * torch.outer(s, y)
    return left @ H @ left.T + rho * torch.outer(s, s)


def powell(H, s, y):
    if s @ y < 0.2 * (y @ H @ y):
        theta = 0.8 * (y @ H @ y) / (y @ H @ y - s @ y)
        s = theta * s + (1 - theta) * H @ y
    if s @ y < DAMPING * (s @ s):
        theta = (1 - DAMPING) * (s @ s) / (s @ s - s @ y)
        y = theta * y + (1 - theta) * s
    return s, y


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize(("sharing", "gives_terms"), [("expand", False), ("expand", True), ("reduce", False)])
def test_steps_are_those_of_the_definition(kind, sharing, gives_terms):
    """The reference takes mean outputs and their gradient by a common shift. The number of terms has no effect."""
    torch.manual_seed(0)
    first = nn.Linear(6, 4) if kind == "linear" else nn.Conv1d(2, 4, 3)
    model = nn.Sequential(first, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).double()
    inputs = torch.randn(*((9, 6) if kind == "linear" else (9, 2, 6)), dtype=DOUBLE)
    labels = torch.randint(3, (9,))
    model(inputs)
    preconditioner = KFAC(model, {"": None, "0": KBFGS()}, sharing=sharing, decay=0.9, **OPTIONS)

    windows = inputs if kind == "linear" else inputs.unfold(2, 3, 1).movedim(2, 1).flatten(2)
    rows = with_one(windows.reshape(-1, windows.shape[-1]))
    averaged = rows if sharing == "expand" or kind == "linear" else rows.reshape(9, 4, -1).mean(1)
    mean = averaged.mean(0)
    A = averaged.T @ averaged / len(averaged) + DAMPING * torch.eye(7, dtype=DOUBLE)
    H_A, H_G = torch.linalg.inv(A), torch.eye(4, dtype=DOUBLE)
    s, y = torch.zeros(2, 4, dtype=DOUBLE)

    def means():
        output = first(inputs).detach()
        shift = torch.zeros(4, dtype=DOUBLE, requires_grad=True)
        moved = output + (shift if kind == "linear" else shift[:, None])
        (slope,) = torch.autograd.grad(nn.functional.cross_entropy(model[1:](moved), labels), shift)
        return output.movedim(1, -1).reshape(-1, 4).mean(0), slope

    def run_passes():
        model.zero_grad()
        loss_of(model, (inputs, labels), preconditioner if gives_terms else None).backward()

    for _ in range(4):
        run_passes()
        gradient, before = layer_gradient(first), means()
        preconditioner.step()
        H_A = bfgs(H_A, H_A @ mean, A @ (H_A @ mean))
        assert_near(layer_gradient(first), H_G @ gradient @ H_A, 1e-10)
        torch.optim.SGD(model.parameters(), 0.3).step()
        run_passes()
        unchanged, after = gradients(model), means()
        preconditioner.second_pass()
        assert all(map(torch.equal, unchanged, gradients(model)))
        changes = (new - old for new, old in zip(after, before, strict=True))
        s, y = (0.9 * mean + 0.1 * change for mean, change in zip((s, y), changes, strict=True))
        H_G = bfgs(H_G, *powell(H_G, s, y))
        assert_near(preconditioner._layers[0].curvature.state["output"], H_G, 1e-9)


@pytest.mark.filterwarnings("ignore:KFAC. a batch was skipped")
def test_a_non_finite_batch_changes_nothing_in_either_pass():
    model = mlp(6, 8, 4)
    preconditioner, (inputs, labels) = KFAC(model, KBFGS(), **OPTIONS), batch(9, 6, 4)

    def state_after(factor, call):
        model.zero_grad()
        loss_of(model, (factor * inputs, labels)).backward()
        call()
        states = [layer.curvature.state for layer in preconditioner._layers]
        return [state[name].clone() for state in states for name in ("input", "output", "s", "y")]

    state_after(1.0, preconditioner.step)
    before = state_after(1.1, preconditioner.second_pass)
    state_after(float("nan"), preconditioner.step)
    assert all(map(torch.equal, state_after(1.2, preconditioner.second_pass), before))
    state_after(1.0, preconditioner.step)
    assert all(part.isfinite().all() for part in state_after(float("nan"), preconditioner.second_pass))


def test_rounding_of_a_gradient_that_is_zero_is_no_curvature():
    """A common shift of all keys does not change the loss."""
    torch.manual_seed(0)
    attention, inputs, targets = nn.MultiheadAttention(8, 2), torch.randn(5, 4, 8), torch.randn(5, 4, 8)
    preconditioner = KFAC(attention, KBFGS())

    def loss():
        return (attention(inputs, inputs, inputs)[0] - targets).square().mean()

    for _ in range(15):
        stepped(attention, preconditioner, loss())
        torch.optim.SGD(attention.parameters(), 0.1).step()
        attention.zero_grad()
        loss().backward()
        preconditioner.second_pass()
    of_queries, of_keys, of_values = preconditioner._layers[0].curvature.state["output"]
    assert torch.equal(of_keys, torch.eye(8).double())
    assert not torch.equal(of_queries, of_keys)
    assert not torch.equal(of_values, of_keys)


def test_flat_directions_beside_steep_ones_leave_the_inverse_positive_definite():
    """Each step moves one output direction. In float32 the steep ones would be less than the rounding of flat ones."""
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    directions, steepness = torch.kron(signs, signs) / 2, torch.logspace(-5, 3, 4)
    curvature = KBFGS(average=0.0).curvature(Shape((), 4, 1, torch.float32, torch.device("cpu")))
    now = Now(0, 0, 0.95, Damping(0.03, "relative"), torch.tensor(True))
    for step in range(80):
        moved = directions[:, step % 4, None]
        before, after = (Rows(torch.ones(1, 1), size * steepness[step % 4] * moved.T, 1) for size in (0, 1))
        curvature.absorb(before, now)
        curvature.note(before, lambda: torch.zeros(4, 1), now)
        curvature.absorb_change(after, lambda moved=moved: moved, now)
    found = torch.linalg.eigvalsh(curvature.state["output"].double())
    torch.testing.assert_close(found, (1 / steepness.double()).sort().values, rtol=1e-6, atol=0)
    resumed = curvature.loaded(curvature.state_dict(), "layer")
    assert torch.equal(resumed.state["output"], curvature.state["output"])


@pytest.mark.parametrize("options", [{"inverse": Exact()}, {"inverse": KBFGS(), "curvature": "type-2"}], ids=str)
def test_second_pass_is_refused_if_no_strategy_takes_it(options):
    with pytest.raises(RuntimeError, match=r"KFAC.second_pass: needs a strategy such as KBFGS\(\), curvature="):
        KFAC(mlp(6, 8, 4), **options).second_pass()
