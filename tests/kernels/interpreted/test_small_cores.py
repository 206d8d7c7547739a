"""The kernels of small cores: their promises, and equality with the torch forms where the results are unique."""

import math

import pytest
import torch
from torch import Tensor

import brandla
import oracles
from brandla_kernels import OPS, cross_gram
from brandla_kernels._kernels import eigh_core as eigh_kernels
from brandla_kernels._kernels import root_core as kernel
from brandla_kernels.eigh_core import EMPTY, assembled
from op_cases import eigh_core_operands, root_core_operands

pytestmark = pytest.mark.usefixtures("_overflow_is_meant")

# --- root_core

FLOAT32, FLOAT64 = torch.float32, torch.float64
EPS = torch.finfo(FLOAT64).eps
# r, k and s: orders 0, 1, 2, around the blocks of 16 columns and the tiles of 32, and without truncation.
SIZES = [
    *((0, 0, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1), (3, 2, 0), (5, 4, 9), (10, 5, 8), (10, 6, 10), (9, 8, 9)),
    (20, 13, 17),
]
# An order above 64, which takes tiles of 64 rows.
LARGE = (40, 26, 40)
FAMILIES = (
    *("gaussian", "graded", "half the rank", "zero columns", "every column repeated", "columns in the span", "zero"),
)


def arguments_of(family, r, k, s, tol=0.0, dtype=FLOAT64):
    """Return the op's arguments for F and A of 3 (r + k) + 1 rows."""
    families = oracles.panels(3 * (r + k) + 1, r + k, 0)
    # Graded by columns, so that every column that may be chosen is above rounding.
    families["graded"] = families["gaussian"] * torch.logspace(0, -9, r + k, dtype=FLOAT64)
    spanning = families["gaussian"][:, :r]
    families["columns in the span"] = torch.cat([spanning, spanning @ oracles.gaussian(r, k, seed=1)], dim=1)
    both = families[family].to(dtype)
    return (*root_core_operands(both[:, :r], both[:, r:])[:5], s, tol, True)


def launched(arguments, device):
    moved = (part.to(device) if isinstance(part, Tensor) else part for part in arguments)
    return tuple(part.cpu() for part in kernel.root_core(*moved))


def expected_of(arguments):
    """Return the results of the torch form, which runs no kernel."""
    with brandla.backend("torch"):
        return OPS["root_core"].torch_form(*arguments)


def core_of(arguments):
    gram, cross, own, decay, weight = (part.double() for part in arguments[:5])
    return assembled(gram, cross, own, decay, weight)[0]


def assert_promised(results, arguments):
    """Check W, S⁺, the norm of what is left out, and the added trace, by their definitions."""
    small, of_root, of_columns, left_out, added = (part.double() for part in results)
    decay, weight = (part.double().sqrt() for part in arguments[3:5])
    core, rotation = core_of(arguments), torch.cat([of_root / decay, of_columns / weight])
    m, eps = len(core), torch.finfo(arguments[0].dtype).eps
    norm = float(torch.linalg.matrix_norm(core)) or 1.0
    assert torch.equal(small, small.mT)
    alive = rotation.square().sum(0) > 0.5
    # An entry of this Gram matrix is a sum of m rounded numbers, of unit columns.
    inner = rotation.mT @ rotation - torch.diag_embed(alive.double())
    assert (inner.abs() <= 4 * math.sqrt(m) * eps).all()
    assert (rotation[:, ~alive] == 0).all()
    assert ((small - rotation.mT @ core @ rotation).abs() <= 8 * math.sqrt(m) * eps * norm).all()
    projected = torch.eye(m, dtype=FLOAT64) - rotation @ rotation.mT
    rest = torch.linalg.matrix_norm(projected @ core @ projected)
    assert abs(left_out - rest) <= 8 * m * eps * norm
    r = arguments[0].shape[-1]
    assert abs(added - core.diagonal()[r:].sum()) <= 4 * m * eps * norm


@pytest.mark.parametrize(
    ("size", "dtype"), [(size, dtype) for size in SIZES for dtype in (FLOAT32, FLOAT64)] + [(LARGE, FLOAT32)], ids=str
)
def test_results_equal_those_of_the_torch_form(size, dtype, device):
    """Distinct eigenvalues determine W up to the rounding of K over their gaps, which are above 1e-3 here."""
    arguments = arguments_of("gaussian", *size, dtype=dtype)
    results, expected = launched(arguments, device), expected_of(arguments)
    error = 4 * torch.finfo(dtype).eps + 1e4 * sum(size[:2]) * EPS
    for got, wanted in zip(results, expected, strict=True):
        assert got.shape == wanted.shape
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=0, atol=error * float(wanted.abs().max()) if wanted.numel() else 0)


@pytest.mark.parametrize(
    ("tol", "dtype"), [(0.0, FLOAT64), (0.02, FLOAT32)], ids=["all, float64", "tolerance, float32"]
)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("_weak_float64")
def test_every_family_meets_its_definition_and_keeps_as_much_of_the_trace(family, tol, dtype, device):
    """The device has slow float64, so the core is in the dtype of the factor."""
    arguments = arguments_of(family, 10, 7, 9, tol, dtype)
    results, expected = launched(arguments, device), expected_of(arguments)
    assert_promised(results, arguments)
    kept, wanted = (float(part[0].double().trace()) for part in (results, expected))
    # Kernel and torch form may differ in directions whose eigenvalues are rounding.
    assert abs(kept - wanted) <= 64 * 17 * torch.finfo(dtype).eps * wanted


@pytest.mark.usefixtures("_weak_float64")
def test_a_core_in_float32_leaves_out_no_more_of_a_stream(device):
    """In the 21st update, one of the streams has just moved to a subspace orthogonal to the old one."""
    n, r, k, streams = 60, 18, 6, ("slow", "fast", "rank-16", "repeated-8", "switch")
    batches = zip(*(oracles.batches(name, n, k, 21, dtype=FLOAT32) for name in streams), strict=True)
    *before, columns = map(torch.stack, batches)
    root = brandla.LowRankRoot.zeros(n, r, batch_shape=(len(streams),))
    with brandla.backend("torch"):
        for batch in before:
            root = brandla.root_update(root, batch, decay=0.95, weight=0.05)
        inner = cross_gram(root.root, columns)
    numbers = (torch.full((len(streams),), number, dtype=FLOAT64) for number in (0.95, 0.05))
    arguments = (root.gram, *inner, *numbers, r, 0.0, True)
    results, expected = launched(arguments, device), expected_of(arguments)
    for place, stream in enumerate(streams):
        own = (*(part[place] for part in arguments[:5]), *arguments[5:])
        assert_promised(tuple(part[place] for part in results), own)
        whole = core_of(own).trace()
        lost, least = (whole - parts[0][place].double().trace() for parts in (results, expected))
        assert lost <= 1.01 * least + 8 * torch.finfo(FLOAT32).eps * whole, stream


def test_non_finite_input_makes_its_own_problem_nan_and_no_other(device):
    spoilt = [(place, value) for place in range(5) for value in (math.nan, math.inf)]
    one = arguments_of("gaussian", 6, 4, 6)
    arguments = [torch.stack([part] * (1 + len(spoilt))) for part in one[:5]]
    for problem, (place, value) in enumerate(spoilt, start=1):
        arguments[place][problem].view(-1)[-1] = value
    for part, clean in zip(launched((*arguments, *one[5:]), device), launched(one, device), strict=True):
        assert torch.equal(part[0], clean)
        assert part[1:].isnan().all()


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e25])
def test_any_scale_gives_the_same_rotation(scale, device):
    """The squares of 10²⁵ are beyond float32: all results are NaN. Those of 10⁻²⁵ are below it: S⁺ is 0."""
    plain = arguments_of("gaussian", 6, 4, 6, dtype=FLOAT32)
    # The root is zero, so that no float32 operand leaves its range before the core does.
    scaled = (plain[0] * 0, plain[1] * 0, plain[2] * scale**2, *plain[3:])
    small, _, rotation, *_ = launched(scaled, device)
    if scale > 1:
        assert small.isnan().all()
        assert rotation.isnan().all()
        return
    assert rotation.isfinite().all()
    assert bool(small.any()) == (scale > 1e-20)
    expected = launched((plain[0] * 0, plain[1] * 0, *plain[2:]), device)[2]
    torch.testing.assert_close(rotation, expected)


def test_the_norm_left_out_is_zero_unless_it_is_measured(device):
    arguments = arguments_of("gaussian", 6, 4, 6)
    *results, left_out, _ = launched((*arguments[:-1], False), device)
    assert left_out == 0
    assert all(map(torch.equal, results, launched(arguments, device)))


# --- Around an eigendecomposition: equality with the torch forms, and cores that are empty or not finite

CORE, ROTATION = (OPS[name].torch_form for name in ("eigh_core", "eigh_rotation"))
# r and k: orders 0 and 1, no old or no new columns, and orders around the tiles of 32.
ORDERS = [(0, 0), (1, 0), (0, 1), (1, 1), (5, 0), (0, 3), (20, 11), (20, 13), (40, 26)]


def core_arguments(r, k, dtype, *, diagonal, seed=0):
    """Return the arguments of `eigh_core` for F and A, or with ``diagonal`` for orthonormal U, d and A."""
    both = oracles.gaussian(2 * (r + k) + 1, r + k, seed=seed)
    root = torch.linalg.qr(both[:, :r]).Q if diagonal else both[:, :r]
    cross, own, gram, *numbers = eigh_core_operands(root.to(dtype), both[:, r:].to(dtype))
    return cross, own, torch.linspace(2, 1, r, dtype=dtype) if diagonal else gram, *numbers


def assert_same(results, expected, dtype):
    results, eps = tuple(part.cpu() for part in results), torch.finfo(dtype).eps
    torch.testing.assert_close(results, expected, rtol=8 * eps, atol=1e-14, equal_nan=True)


@pytest.mark.parametrize("diagonal", [False, True], ids=["root", "eigenvalues"])
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("size", ORDERS, ids=str)
def test_core_equals_the_torch_form(size, rounded, diagonal, dtype, device):
    problems = [core_arguments(*size, dtype, diagonal=diagonal, seed=seed) for seed in range(2)]
    for arguments in (problems[0], tuple(map(torch.stack, zip(*problems, strict=True)))):
        results = eigh_kernels.eigh_core(*(part.to(device) for part in arguments), rounded)
        assert_same(results, CORE(*arguments, rounded), dtype if rounded else torch.float64)
        assert results[0].dtype == (dtype if rounded else torch.float64)


@pytest.mark.parametrize("diagonal", [False, True], ids=["root", "eigenvalues"])
def test_a_core_may_be_empty_in_part_or_vanish_or_not_be_finite(diagonal, device):
    arguments = [torch.stack([part] * 7) for part in core_arguments(6, 4, torch.float32, diagonal=diagonal)]
    cross, own, gram, _, weight = arguments
    # Problem 1 has an old and a new column of zeros, 2 vanishes in float64, 3 is beyond float32. Neither 4 nor 5 is
    # finite. All entries of 6 vanish, but their sum does not.
    gram[1, 2], gram[1, ..., 2], cross[1, 2], cross[1, :, 1], own[1, 1], own[1, :, 1] = 0, 0, 0, 0, 0, 0
    for part, factor in ((gram, 0), (cross, 1e-320), (own, 1e-320)):
        part[2] *= factor
    own[3] *= 1e40
    cross[4, 0, 0] = math.nan
    weight[5] = math.inf
    gram[6], cross[6], own[6] = 0, 0, 0.4 * torch.finfo(torch.float64).tiny / weight[6] * torch.eye(4).double()
    results = eigh_kernels.eigh_core(*(part.to(device) for part in arguments))
    assert_same(results, CORE(*arguments), torch.float64)
    core, rows, scale = (part.cpu() for part in results)
    assert (core.diagonal(dim1=-2, dim2=-1) == EMPTY).sum(-1).tolist() == [0, 2, 10, 10, 10, 10, 10]
    assert scale.isnan().tolist() == rows.isnan().all(-1).tolist() == [False] * 3 + [True] * 3 + [False]


@pytest.mark.parametrize("unit", [False, True], ids=["root", "unit"])
@pytest.mark.parametrize("tol", [0.0, 0.2])
@pytest.mark.parametrize(("m", "rank"), [(0, 0), (1, 1), (5, 0), (9, 9), (33, 20), (65, 40)])
def test_rotation_equals_the_torch_form(m, rank, tol, unit, dtype, device):
    problems = []
    for seed in range(3):
        panel = oracles.gaussian(m + 3, m, seed=seed)
        core = panel.mT @ panel / max(m, 1)
        # The second problem has empty coordinates, the third is not finite.
        if seed == 1:
            core[: m // 2], core[:, : m // 2] = 0, 0
            core.diagonal()[: m // 2] = EMPTY
        levels, vectors = torch.linalg.eigh(core.to(dtype))
        rows, scale = panel[0].abs(), torch.tensor(math.nan if seed == 2 else 3.0, dtype=torch.float64)
        problems.append((levels, vectors, rows * (scale / scale), scale))
    for arguments in (problems[0], tuple(map(torch.stack, zip(*problems, strict=True)))):
        results = eigh_kernels.eigh_rotation(*(part.to(device) for part in arguments), rank, tol, unit)
        assert_same(results, ROTATION(*arguments, rank, tol, unit), dtype)
    values, rotation, left_out = (part.cpu() for part in results)
    assert all(part[2].isnan().all() for part in (values, rotation, left_out))
    assert torch.equal(values[1] > 0, (rotation[1] != 0).any(-2))
