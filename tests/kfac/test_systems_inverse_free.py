"""IKFAC and SINGD against their dense formulas in float64, with structures defined entry by entry."""

import pytest
import torch

from brandla.kfac import InverseFree
from brandla.kfac.systems.structures import (
    STRUCTURES,
    BlockDiagonal,
    Dense,
    Diagonal,
    Hierarchical,
    Toeplitz,
    Triangular,
)
from brandla.kfac.values import Damping, Now, Rows, Shape
from kfac.networks import one_hot
from oracles import gaussian, tolerance

DOUBLE, CPU = torch.float64, torch.device("cpu")


def close(actual, expected, updates=1):
    """Compare up to the rounding of some updates whose entries are sums of n products, in any order of summation."""
    bound = updates * tolerance(max(expected.shape), actual.dtype, expected.norm())
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=bound)


# --- Structures: their definition, and their costs


def pattern(structure, n):
    """Return for each entry of an n × n matrix the number of its parameter, or −1 if it is zero."""
    i, j = torch.arange(n)[:, None].expand(n, n), torch.arange(n).expand(n, n)
    number = i * n + j
    match structure:
        case Triangular():
            inside = i >= j
        case Dense():
            inside = torch.ones(n, n, dtype=torch.bool)
        case Diagonal():
            inside = i == j
        case BlockDiagonal(block=b):
            inside = i // b == j // b
        case Hierarchical(first=first, last=last):
            head, tail = i < first, (i >= max(first, n - last))
            inside = head | (tail & (j >= first)) | (i == j)
        case Toeplitz():
            inside, number = j >= i, j - i
    return torch.where(inside, number, -1)


def projected(structure, matrix):
    """Return the smallest of the members m for which (m + mᵀ)/2 is nearest to a symmetric matrix."""
    numbers = pattern(structure, len(matrix))
    members = torch.stack([(numbers == number).double() for number in numbers.unique() if number >= 0])
    # In a basis of unit length, the least coefficients give the smallest matrix.
    members = members / members.flatten(1).norm(dim=1)[:, None, None]
    symmetric = ((members + members.mT) / 2).flatten(1).T
    coefficients = torch.linalg.lstsq(symmetric, matrix.reshape(-1, 1), driver="gelsd").solution[:, 0]
    return torch.einsum("c,cij->ij", coefficients, members)


NUMBERS = {
    Dense(): 1000**2,
    Triangular(): 1000**2,
    Diagonal(): 1000,
    BlockDiagonal(32): 32 * 1024,
    Hierarchical(16, 16): 16 * 1000 + 968 + 16 * 984,
    Toeplitz(): 1000,
}


@pytest.mark.parametrize(("structure", "numbers"), NUMBERS.items(), ids=map(repr, NUMBERS))
def test_storage_is_as_documented_and_flops_of_small_structures_grow_slower_than_dense(structure, numbers):
    assert sum(part.numel() for part in structure.identity(1000, (), torch.float32, CPU)) == numbers
    growth = structure.flops(8192) / structure.flops(1024)
    # n² grows by 64, and n log n by 8 · 13/10 or a little more, with the length of the transform.
    assert growth == 64 if isinstance(structure, Dense) else growth < 11


# --- The systems

D_IN, D_OUT = 13, 7
DAMPING = 0.1
SHAPE = Shape((), D_OUT, D_IN, DOUBLE, CPU)
# Some blocks and strips are empty, or larger than a side.
SMALL = [
    *(Dense(), Diagonal(), Triangular(), Toeplitz()),
    *(BlockDiagonal(block) for block in (1, 5, 20)),
    *(Hierarchical(*parts) for parts in ((3, 2), (0, 4), (4, 0), (9, 9))),
]
NAMED = pytest.mark.parametrize("structure", STRUCTURES)
VARIANT = pytest.mark.parametrize("variant", ["singd", "ikfac"])


def fresh(variant, structure="dense", shape=SHAPE, **options):
    return InverseFree(structure, variant=variant, preconditioner_every=1, **options).curvature(shape)


def now(step=0, *, scale="absolute"):
    return Now(step, step, 0.95, Damping(DAMPING, scale), torch.tensor(True))


def rows(seed=0, groups=(), count=20, dtype=DOUBLE, sizes=(D_IN, D_OUT)):
    inputs, gradients = (gaussian(*groups, count, n, seed=100 * seed + n).to(dtype) for n in sizes)
    return Rows(inputs, gradients / count, count)


def absorbed(curvature, data, scale="absolute"):
    for step, of_step in enumerate(data):
        curvature.absorb(of_step, now(step, scale=scale))
    return curvature


def factors(data):
    """Return A, and G for a mean loss."""
    a, g = data.inputs, data.gradients
    return a.mT @ a / data.uses, data.uses * g.mT @ g


def roots(curvature):
    """Return K and C as dense matrices."""
    return [side.structure.dense(side.root, side.n) for side in (curvature.input, curvature.output)]


def mean(M):
    return M.trace() / len(M)


class DenseReference:
    """The formulas with dense matrices: only m is projected to the structure."""

    def __init__(self, structure, variant, rate, alpha):
        self.structure, self.is_singd, self.rate = structure, variant == "singd", rate
        self.alpha = alpha if self.is_singd else 0.0
        self.momenta, self.roots = [0.0, 0.0], []

    def step(self, *factors):
        """Update K and C with A and G of a batch."""
        eyes = [torch.eye(len(M), dtype=DOUBLE) for M in factors]
        if not self.roots:
            scales = [(mean(M) + DAMPING) ** -0.5 for M in factors]
            if self.is_singd:
                scales = [(mean(factors[0]) * mean(factors[1]) + DAMPING**2) ** -0.25] * 2
            self.roots = [scale * eye for scale, eye in zip(scales, eyes, strict=True)]
        H = [K.T @ M @ K for K, M in zip(self.roots, factors, strict=True)]
        grams = [K.T @ K for K in self.roots]
        for side, other in ((0, 1), (1, 0)):
            weight, damping = (mean(H[other]), DAMPING**2 * mean(grams[other])) if self.is_singd else (1, DAMPING)
            m = projected(self.structure, 0.5 * (weight * H[side] + damping * grams[side] - eyes[side]))
            self.momenta[side] = self.alpha * self.momenta[side] + m
            beta = self.rate / max(1, self.rate * self.momenta[side].norm())
            self.roots[side] = self.roots[side] - beta * self.roots[side] @ self.momenta[side]


@pytest.mark.parametrize("structure", SMALL, ids=repr)
@pytest.mark.parametrize("sizes", [(D_IN, D_OUT), (1, 4)], ids=str)
@VARIANT
def test_updates_are_the_projected_dense_formula_and_steps_its_products(structure, variant, sizes):
    """A step is C Cᵀ ∂W K Kᵀ, for a matrix and for a pair. The rate is reduced in some updates."""
    d_in, d_out = sizes
    data, reference = [rows(step, sizes=sizes) for step in range(8)], DenseReference(structure, variant, 1.0, 0.4)
    shape = SHAPE._replace(d_in=d_in, d_out=d_out)
    curvature = absorbed(fresh(variant, structure, shape, rate=1.0, momentum=0.4), data)
    for of_step in data:
        reference.step(*factors(of_step))
    K, C = reference.roots
    for root, expected in zip(roots(curvature), reference.roots, strict=True):
        close(root, expected, 8)
    pair = gaussian(d_out, 4, seed=1), gaussian(d_in, 4, seed=2)
    gradient = pair[0] @ pair[1].T
    P, Q = curvature.solve(pair, now())
    for step in (curvature.solve(gradient, now()), P @ Q.T):
        close(step, C @ C.T @ gradient @ K @ K.T, 8)


@NAMED
@VARIANT
def test_groups_are_layers_of_their_own(structure, variant):
    data = [rows(seed, (2, 3)) for seed in range(3)]
    gradient = gaussian(2, 3, D_OUT, D_IN, seed=5)
    together = absorbed(fresh(variant, structure, SHAPE._replace(groups=(2, 3))), data, "relative")
    found = together.solve(gradient, now())
    for group in ((0, 0), (0, 2), (1, 1)):
        of_group = (part._replace(inputs=part.inputs[group], gradients=part.gradients[group]) for part in data)
        alone = absorbed(fresh(variant, structure), of_group, "relative")
        close(found[group], alone.solve(gradient[group], now()), 3)


@VARIANT
def test_a_layer_without_gradients_yet_starts_with_the_first_gradients(variant):
    """A last layer that starts at zero sends no gradients back: C cannot start, nor can K in SINGD."""
    data = rows()
    silent = data._replace(gradients=torch.zeros_like(data.gradients))
    waiting = absorbed(fresh(variant), [silent] * 2, "relative")
    assert waiting.solve(torch.zeros(D_OUT, D_IN, dtype=DOUBLE), now()).count_nonzero() == 0
    waiting.absorb(data, now(2, scale="relative"))
    scale = roots(waiting)[1][0, 0].abs() / roots(absorbed(fresh(variant), [data], "relative"))[1][0, 0].abs()
    # The average of one batch and two zeros is a third of the batch, and so is the estimate of d₁ for the damping.
    assert 1 <= scale < 3


def test_largest_eigenvalue_is_approached_from_below():
    """Also if the first row of a batch is zero."""
    curvature, data = fresh("singd"), rows(count=40)
    data.inputs[0] = 0
    largest = torch.linalg.eigvalsh(factors(data)[0])[-1]
    estimates = []
    for step in range(200):
        curvature.absorb(data, now(step))
        estimates.append(curvature.input.largest() / largest)
    assert estimates[0] > 1 / D_IN
    assert all(estimate <= 1 + 1e-12 for estimate in estimates)
    # With decay ρ a second eigenvalue d₂ fades by ρ + (1 − ρ) d₂/d₁ an update.
    assert estimates[-1] > 0.9


@VARIANT
def test_one_hot_inputs_are_a_diagonal_factor(variant):
    """Indices have the same effect as one-hot rows with the diagonal structure; −1 is a row of zeros."""
    indices = [torch.randint(-1, D_IN, (20,), generator=torch.Generator().manual_seed(step)) for step in range(5)]
    of_indices = [rows(step)._replace(inputs=inputs) for step, inputs in enumerate(indices)]
    of_rows = [data._replace(inputs=one_hot(data.inputs, D_IN)) for data in of_indices]
    by_index = absorbed(fresh(variant, Diagonal(), SHAPE._replace(one_hot=True)), of_indices)
    by_row = absorbed(fresh(variant, Diagonal()), of_rows)
    for one, other in zip(roots(by_index), roots(by_row), strict=True):
        close(one, other, 5)


@VARIANT
def test_a_single_layer_has_one_side(variant):
    """Its rows are whole gradients. SINGD is IKFAC with momentum then, because the other factor is 1."""
    data = rows(groups=(3,))
    shape = SHAPE._replace(groups=(3,), single=True, d_out=1)
    curvature = fresh(variant, "dense", shape, rate=0.2, momentum=0.0)
    absorbed(curvature, [data._replace(inputs=data.inputs / 20)] * 150)
    gradient = gaussian(3, 1, D_IN, seed=1)
    damped = data.inputs.mT @ data.inputs / 20 + DAMPING * torch.eye(D_IN, dtype=DOUBLE)
    expected = torch.linalg.solve(damped, gradient, left=False)
    close(curvature.solve(gradient, now()).flatten(0, 1), expected.flatten(0, 1), 10)
    assert curvature.widest_pair(D_IN) is None


@NAMED
def test_pairs_are_used_if_they_are_cheaper(structure):
    """A pair of k columns costs 2k (c_in + c_out + d_in d_out); the matrix costs 2 (d_out c_in + d_in c_out)."""
    curvature = fresh("singd", structure, Shape((), 600, 500, torch.float32, torch.device("cpu")))
    flops = STRUCTURES[structure].flops
    k = curvature.widest_pair(500 * 600)
    pair = 2 * (flops(500) + flops(600) + 500 * 600)
    matrix = 2 * (600 * flops(500) + 500 * flops(600))
    assert k * pair <= matrix < (k + 1) * pair
    assert (k <= 1) == (structure == "diagonal")
