"""IKFAC and SINGD against their dense formulas in float64, and inside the loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from brandla.kfac import KFAC
from brandla.kfac.systems.inverse_free import InverseFree, InverseFreeCurvature
from brandla.kfac.systems.inverse_root import RowBatch
from brandla.kfac.systems.structures import (
    STRUCTURES,
    BlockDiagonal,
    Dense,
    Diagonal,
    Hierarchical,
    Structure,
    Triangular,
)
from brandla.kfac.values import Damping, Now, Rows, Scale, Shape
from kfac.networks import batch, gradients, mlp
from kfac.structured import projected
from oracles import tolerance

D_IN, D_OUT = 13, 7
DAMPING = 0.1
DOUBLE = torch.float64
CPU = torch.device("cpu")
SMALL = [*(each for name, each in STRUCTURES.items() if "i" in name and "-" not in name), Dense(), BlockDiagonal(5)]
SMALL = [each for each in SMALL if not isinstance(each, Hierarchical)] + [Hierarchical(3, 2)]
EACH = pytest.mark.parametrize("structure", SMALL, ids=repr)
NAMED = pytest.mark.parametrize("structure", STRUCTURES)
VARIANT = pytest.mark.parametrize("variant", ["singd", "ikfac"])


def shape(groups: tuple[int, ...] = (), *, dtype: torch.dtype = DOUBLE, **kind: bool) -> Shape:
    return Shape(groups, D_OUT, D_IN, dtype, CPU, **kind)


def now(step: int = 0, *, finite: bool = True, scale: Scale = "absolute", damping: float = DAMPING) -> Now:
    return Now(step, step, 0.95, Damping(damping, scale), torch.tensor(finite))


def rows(seed: int = 0, groups: tuple[int, ...] = (), count: int = 20, dtype: torch.dtype = DOUBLE) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(*groups, count, D_IN, generator=generator, dtype=DOUBLE)
    gradients = torch.randn(*groups, count, D_OUT, generator=generator, dtype=DOUBLE) / count
    return Rows(inputs.to(dtype), gradients.to(dtype), count)


def factors(data: Rows) -> tuple[Tensor, Tensor]:
    """A, and G of a loss that is a mean, in float64."""
    a, g = data.inputs.double(), data.gradients.double()
    return a.mT @ a / data.uses, data.uses * g.mT @ g


def roots(curvature: InverseFreeCurvature) -> tuple[Tensor, Tensor]:
    """K and C as dense matrices."""
    assert curvature.output is not None
    sides = curvature.input, curvature.output
    K, C = (side.structure.dense(side.root, side.n) for side in sides)
    return K, C


class DenseReference:
    """The formulas with dense matrices: m is projected, nothing else is structured."""

    def __init__(self, structure: Structure, variant: str, rate: float, alpha: float) -> None:
        self.structure, self.variant, self.rate = structure, variant, rate
        self.alpha = alpha if variant == "singd" else 0.0
        self.momenta = torch.zeros(D_IN, D_IN, dtype=DOUBLE), torch.zeros(D_OUT, D_OUT, dtype=DOUBLE)
        self.roots: tuple[Tensor, Tensor] | None = None

    def step(self, A: Tensor, G: Tensor) -> None:
        eyes = torch.eye(D_IN, dtype=DOUBLE), torch.eye(D_OUT, dtype=DOUBLE)
        means = A.trace() / D_IN, G.trace() / D_OUT
        if self.roots is None and self.variant == "ikfac":
            self.roots = tuple(eye / (mean + DAMPING).sqrt() for eye, mean in zip(eyes, means, strict=True))
        elif self.roots is None:
            self.roots = tuple(eye / (means[0] * means[1] + DAMPING**2) ** 0.25 for eye in eyes)
        (K, C), (eye_in, eye_out) = self.roots, eyes
        H_K, H_C = K.T @ A @ K, C.T @ G @ C
        if self.variant == "ikfac":
            sums = H_K + DAMPING * K.T @ K - eye_in, H_C + DAMPING * C.T @ C - eye_out
        else:
            sums = (
                H_C.trace() / D_OUT * H_K + DAMPING**2 * (C.T @ C).trace() / D_OUT * K.T @ K - eye_in,
                H_K.trace() / D_IN * H_C + DAMPING**2 * (K.T @ K).trace() / D_IN * C.T @ C - eye_out,
            )
        self.momenta = tuple(
            self.alpha * old + projected(self.structure, 0.5 * new) for old, new in zip(self.momenta, sums, strict=True)
        )
        self.roots = tuple(root - self.rate * root @ m for root, m in zip(self.roots, self.momenta, strict=True))


def close(actual: Tensor, expected: Tensor, updates: int = 1) -> None:
    """Compare to rounding of as many updates."""
    bound = updates * tolerance(max(expected.shape), actual.dtype, expected.norm())
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=bound)


@EACH
@VARIANT
def test_updates_are_the_projected_dense_formula(structure: Structure, variant: str):
    strategy = InverseFree(structure, variant=variant, rate=0.02, momentum=0.4, preconditioner_every=1)
    curvature, reference = strategy.curvature(shape()), DenseReference(structure, variant, 0.02, 0.4)
    for step in range(8):
        data = rows(step)
        curvature.absorb(data, now(step))
        reference.step(*factors(data))
    for root, expected in zip(roots(curvature), reference.roots, strict=True):
        close(root, expected, 8)


@EACH
@VARIANT
def test_step_multiplies_by_the_roots_from_both_sides(structure: Structure, variant: str):
    curvature = InverseFree(structure, variant=variant).curvature(shape())
    curvature.absorb(rows(), now())
    (K, C), generator = roots(curvature), torch.Generator().manual_seed(1)
    first = torch.randn(D_OUT, 4, generator=generator, dtype=DOUBLE)
    second = torch.randn(D_IN, 4, generator=generator, dtype=DOUBLE)
    expected = C @ C.T @ first @ second.T @ K @ K.T
    close(curvature.solve(first @ second.T, now()), expected)
    P, Q = curvature.solve((first, second), now())
    close(P @ Q.T, expected)


# With a structure that holds a root of every positive definite matrix, or of the part of it that it keeps.
FIXED_POINTS = {
    Dense(): lambda M: M.inverse(),
    Triangular(): lambda M: M.inverse(),
    Diagonal(): lambda M: (1 / M.diagonal()).diag(),
    BlockDiagonal(5): lambda M: torch.block_diag(*(M[k : k + 5, k : k + 5].inverse() for k in range(0, len(M), 5))),
}


@pytest.mark.parametrize("structure", FIXED_POINTS, ids=repr)
def test_ikfac_converges_to_the_damped_inverse_of_a_fixed_factor(structure: Structure):
    """K ← K (I − β m) stands still only where KᵀAK + λKᵀK = I, seen through the structure; each step shrinks the
    distance by about 1 − β, so that 0.8^150 leaves less than rounding."""
    strategy = InverseFree(structure, variant="ikfac", rate=0.2, preconditioner_every=1)
    curvature, data = strategy.curvature(shape()), rows(count=200)
    for step in range(150):
        curvature.absorb(data, now(step))
    for root, factor in zip(roots(curvature), factors(data), strict=True):
        damped = factor + DAMPING * torch.eye(len(factor), dtype=DOUBLE)
        close(root @ root.T, FIXED_POINTS[structure](damped), 10)


@NAMED
@VARIANT
def test_groups_are_layers_of_their_own(structure: str, variant: str):
    strategy, groups = InverseFree(structure, variant=variant, preconditioner_every=1), (2, 3)
    together = strategy.curvature(shape(groups))
    data = [rows(seed, groups) for seed in range(3)]
    gradient = torch.randn(*groups, D_OUT, D_IN, generator=torch.Generator().manual_seed(5), dtype=DOUBLE)
    for step, own in enumerate(data):
        together.absorb(own, now(step, scale="relative"))
    found = together.solve(gradient, now())
    for group in ((0, 0), (0, 2), (1, 1)):
        alone = strategy.curvature(shape())
        for step, own in enumerate(data):
            alone.absorb(Rows(own.inputs[group], own.gradients[group], own.uses), now(step, scale="relative"))
        close(found[group], alone.solve(gradient[group], now()), 3)


@NAMED
@VARIANT
@pytest.mark.parametrize(("scale", "skipped"), [("relative", 0), ("absolute", 2)], ids=["first", "later"])
def test_a_batch_that_is_not_finite_changes_nothing(structure: str, variant: str, scale: Scale, skipped: int):
    """The loop hands over zeros with ``finite`` False; what follows is as if that batch had never been."""
    strategy = InverseFree(structure, variant=variant, momentum=0.4, preconditioner_every=1)
    skipping, never = strategy.curvature(shape()), strategy.curvature(shape())
    empty = Rows(torch.zeros(20, D_IN, dtype=DOUBLE), torch.zeros(20, D_OUT, dtype=DOUBLE), 20)
    for step in range(4):
        if step == skipped:
            before = [root.clone() for root in roots(skipping)]
            skipping.absorb(empty, now(step, finite=False, scale=scale))
            assert all(torch.equal(*pair) for pair in zip(before, roots(skipping), strict=True))
        else:
            skipping.absorb(rows(step), now(step, scale=scale))
            never.absorb(rows(step), now(step, scale=scale))
    assert all(torch.equal(*pair) for pair in zip(skipping.tensors(), never.tensors(), strict=True))


@VARIANT
def test_a_layer_without_gradients_yet_starts_with_the_first_that_come(variant: str):
    """A last layer that starts at zero sends none back: C has no scale to start at, nor, in SINGD, has K."""
    strategy = InverseFree(variant=variant, preconditioner_every=1)
    waiting, fresh = strategy.curvature(shape()), strategy.curvature(shape())
    data = rows()
    for step in range(2):
        waiting.absorb(data._replace(gradients=torch.zeros_like(data.gradients)), now(step, scale="relative"))
    gradient = torch.ones(D_OUT, D_IN, dtype=DOUBLE)
    assert waiting.solve(0 * gradient, now()).count_nonzero() == 0
    waiting.absorb(data, now(2, scale="relative"))
    fresh.absorb(data, now(2, scale="relative"))
    scale = roots(waiting)[1][0, 0].abs() / roots(fresh)[1][0, 0].abs()
    # The average of one batch and two zeros is a third of it, and with it the estimate that damping is relative to.
    assert 1 <= scale < 3


@VARIANT
def test_relative_damping_leaves_the_scale_of_data_without_effect(variant: str):
    strategy = InverseFree(variant=variant, preconditioner_every=1)
    plain, scaled = strategy.curvature(shape()), strategy.curvature(shape())
    for step in range(4):
        data = rows(step)
        plain.absorb(data, now(step, scale="relative"))
        small = Rows(data.inputs * 2**-20, data.gradients * 2**10, data.uses)
        scaled.absorb(small, now(step, scale="relative"))
    gradient = torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    expected = plain.solve(gradient, now()) * 2.0 ** (40 - 20)
    # Powers of 2: the same digits but for roots, whose exponents may be odd.
    close(scaled.solve(gradient, now()), expected)


def test_largest_eigenvalue_is_approached_from_below():
    curvature = InverseFree(preconditioner_every=1).curvature(shape())
    data = rows(count=40)
    largest = torch.linalg.eigvalsh(factors(data)[0])[-1]
    estimates = []
    for step in range(200):
        curvature.absorb(data, now(step))
        estimates.append(curvature.input.largest() / largest)
    assert estimates[0] > 1 / D_IN
    assert all(estimate <= 1 + 1e-12 for estimate in estimates)
    # With decay ρ a second eigenvalue d₂ fades by ρ + (1 − ρ) d₂/d₁ an update.
    assert estimates[-1] > 0.98


@NAMED
@VARIANT
def test_a_batch_of_another_scale_does_not_blow_up_the_roots(structure: str, variant: str):
    """β is cut to 1/‖m‖: I − βm keeps every direction, and the largest value of K grows by 2 at most."""
    strategy = InverseFree(structure, variant=variant, rate=0.1, preconditioner_every=1)
    curvature = strategy.curvature(shape(dtype=torch.float32))
    curvature.absorb(rows(0, dtype=torch.float32), now(0))
    before = [torch.linalg.matrix_norm(root, 2) for root in roots(curvature)]
    loud = rows(1, dtype=torch.float32)
    curvature.absorb(loud._replace(inputs=1e6 * loud.inputs), now(1))
    for root, norm in zip(roots(curvature), before, strict=True):
        assert root.isfinite().all()
        assert torch.linalg.matrix_norm(root, 2) <= 2 * norm * (1 + tolerance(D_IN, torch.float32))


@VARIANT
def test_one_hot_inputs_are_a_diagonal_factor(variant: str):
    """Indices give what their one-hot rows give to the diagonal structure."""
    strategy = InverseFree(Diagonal(), variant=variant, preconditioner_every=1)
    by_index, by_row = strategy.curvature(shape(one_hot=True)), strategy.curvature(shape())
    for step in range(5):
        data = rows(step)
        # −1 is a row of zeros.
        indices = torch.randint(-1, D_IN, (20,), generator=torch.Generator().manual_seed(step))
        by_index.absorb(data._replace(inputs=indices), now(step))
        one_hot = nn.functional.one_hot(indices + 1, D_IN + 1)[:, 1:].double()
        by_row.absorb(data._replace(inputs=one_hot), now(step))
    for one, other in zip(roots(by_index), roots(by_row), strict=True):
        close(one, other, 5)


@VARIANT
def test_a_single_layer_has_one_side(variant: str):
    """Rows are whole gradients; SINGD with the other factor 1 is IKFAC with momentum."""
    strategy = InverseFree(variant=variant, rate=0.2, momentum=0.0, preconditioner_every=1)
    curvature = strategy.curvature(shape((3,), single=True)._replace(d_out=1))
    data = rows(groups=(3,))
    for step in range(150):
        curvature.absorb(Rows(data.inputs / 20, data.gradients, 20), now(step))
    factor = 20 * data.inputs.mT @ data.inputs / 400
    gradient = torch.randn(3, 1, D_IN, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    expected = torch.linalg.solve(factor + DAMPING * torch.eye(D_IN, dtype=DOUBLE), gradient, left=False)
    close(curvature.solve(gradient, now()).flatten(0, 1), expected.flatten(0, 1), 10)
    assert curvature.widest_pair(D_IN) is None


@pytest.mark.parametrize(
    ("structure", "kind"),
    [*((structure, {}) for structure in STRUCTURES), ("dense", {"one_hot": True}), ("dense", {"single": True})],
    ids=[*STRUCTURES, "one_hot", "single"],
)
@VARIANT
def test_nothing_is_read_back_from_the_device(structure: str, variant: str, kind: dict[str, bool]):
    """Meta tensors have no values to read."""
    meta = torch.device("meta")
    strategy = InverseFree(structure, variant=variant, preconditioner_every=1)
    curvature = strategy.curvature(shape(dtype=torch.float32, **kind)._replace(device=meta))
    data = rows(dtype=torch.float32)
    inputs = torch.zeros(20, dtype=torch.int64, device=meta) if "one_hot" in kind else data.inputs.to(meta)
    for step in range(2):
        moment = now(step, scale="relative")
        curvature.absorb(Rows(inputs, data.gradients.to(meta), 20), moment._replace(finite=moment.finite.to(meta)))
    solved = curvature.solve(torch.zeros(D_OUT, D_IN, device=meta), now())
    assert (solved.shape, solved.device) == ((D_OUT, D_IN), meta)


@NAMED
def test_pairs_are_used_where_they_are_cheaper(structure: str):
    """A pair of k columns costs 2k (c_in + c_out + d_in d_out), the matrix d_out c_in + d_in c_out twice."""
    curvature = InverseFree(structure).curvature(Shape((), 600, 500, torch.float32, CPU))
    own = STRUCTURES[structure]
    k = curvature.widest_pair(500 * 600)
    pair = 2 * (own.flops(500) + own.flops(600) + 500 * 600)
    matrix = 2 * (600 * own.flops(500) + 500 * own.flops(600))
    assert k * pair <= matrix < (k + 1) * pair
    assert (k <= 1) == (structure == "diagonal")


def test_updates_fall_due_by_a_period_or_a_schedule():
    def every(step: int) -> int:
        return 1 if step < 3 else 4

    strategy = InverseFree(preconditioner_every=every)
    curvature, renewed = strategy.curvature(shape()), []
    for step in range(12):
        before = roots(curvature)[0].clone()
        curvature.absorb(rows(step), now(step))
        if not torch.equal(before, roots(curvature)[0]):
            renewed.append(step)
    assert renewed == [0, 1, 2, 6, 10]


def test_gradients_of_zero_stay_zero():
    model = mlp(10, 20, 4, dtype=torch.float32)
    preconditioner = KFAC(model, InverseFree())
    (0 * model(batch(8, 10, 4, dtype=torch.float32)[0]).sum()).backward()
    preconditioner.step()
    assert all(part.count_nonzero() == 0 for part in gradients(model))


def test_start_is_the_longest_row():
    data = torch.tensor([[1.0, 0.0], [0.0, -3.0], [2.0, 0.0]])
    assert RowBatch(data, 1.0).start().tolist() == [0.0, -3.0]
