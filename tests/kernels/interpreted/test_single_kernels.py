"""Properties of single kernels, beyond the formulas of their ops."""

import pytest
import torch

import oracles
from brandla_kernels import OPS, signs, sketch
from brandla_kernels._kernels import configs
from brandla_kernels._kernels.ahead import target_named
from brandla_kernels._kernels.launch import recording
from op_cases import assert_computes, grouped, operands, run

# --- cross_gram: stretches of rows, and two launches


def test_a_long_sum_is_taken_in_stretches_and_the_gram_matrix_is_symmetric_to_the_bit(device, monkeypatch):
    monkeypatch.setattr(configs, "STRETCH", 32)
    arguments = operands("cross_gram", 2 * 32 + 5, 3, 66, "plain", torch.float32, device)
    cross, gram = OPS["cross_gram"](*arguments)
    assert_computes("cross_gram", (cross, gram), arguments)
    assert torch.equal(gram, gram.mT)


@pytest.mark.parametrize("rows", [100, 10**6])
@pytest.mark.parametrize("form", ["single", "grouped", "rounded"])
def test_a_call_is_two_launches_with_short_enough_stretches(rows, form):
    """The second launch adds in float64, for rounded products too."""
    op, problem = "rounded_gram" if form == "rounded" else "cross_gram", (torch.zeros(rows, 64), torch.zeros(rows, 32))
    arguments = grouped(op, [problem] * 9) if form == "grouped" else problem[: 1 + (form == "single")]
    with recording(target_named("sm_90")) as launches:
        OPS[op].launch(*arguments)
    product, addition = launches
    assert addition.name == "sum_parts_kernel"
    assert rows / product.arguments["SPLITS"] <= configs.STRETCH
    assert addition.arguments["below_ptr"].dtype == torch.float64


# --- damped_inverse: the inverse computed beside the projection, and NaN that must not spread


# Around the blocks of 16 columns, and the tiles of 64 rows.
@pytest.mark.parametrize(
    ("order", "damping", "dtype"),
    [(order, 1e-7, torch.float64) for order in (1, 15, 17, 65)] + [(40, damp, torch.float32) for damp in (3e-2, 1e-4)],
)
@pytest.mark.usefixtures("_weak_float64")
def test_sweeps_invert_as_well_as_a_factorisation(order, damping, dtype, device):
    """The eigenvalues go from 1 to 10⁻⁹, plus the damping. The error of an inverse is κ ε, relative to its size."""
    eps, generator = torch.finfo(dtype).eps, torch.Generator().manual_seed(order)
    turn = torch.linalg.qr(torch.randn(order, order, generator=generator, dtype=torch.float64)).Q
    gram = oracles.symmetrised((turn * torch.logspace(0, -9, order, dtype=torch.float64)) @ turn.mT).to(dtype)
    damped = gram + damping * torch.eye(order, dtype=torch.float64)
    expected = -torch.cholesky_inverse(torch.linalg.cholesky(damped))
    # With U = V = I and β = 1, Z is Y − V.
    identity = torch.eye(order, dtype=dtype, device=device)
    shift = identity.new_tensor([damping, 1 - damping])
    found = (OPS["damped_inverse"](identity, gram.to(device), *shift, identity) - identity).cpu().double()
    allowed = 8 * order**0.5 * eps * float(torch.linalg.cond(damped)) * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=allowed)
    # The residual is that of a backward stable method, without the factor κ.
    residual = torch.linalg.matrix_norm(damped @ found + torch.eye(order, dtype=torch.float64), 2)
    sizes = torch.linalg.matrix_norm(damped, 2) * torch.linalg.matrix_norm(found, 2)
    assert residual <= 8 * order**0.5 * eps * sizes


def test_an_indefinite_problem_is_nan_and_no_other_is(device):
    basis, rhs = (torch.ones(5, 20, k, dtype=torch.float64, device=device) for k in (17, 2))
    gram, shift = torch.eye(17).to(basis).repeat(5, 1, 1), (basis.new_full((5,), 0.5), basis.new_zeros(5))
    gram[1:4, 16, 16] = torch.tensor([-0.5, -3.0, torch.nan]).to(basis)
    found = OPS["damped_inverse"](basis, gram, *shift, rhs)
    assert found.isnan().flatten(1).all(1).tolist() == [False, True, True, True, False]
    assert torch.equal(found[0], found[4])


# --- sketch: its Ω equals that of signs to the bit, and its products lose no bit of float32 data


@pytest.fixture
def seed(device):
    return torch.tensor([-6148914691236517206], device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
# Blocks have 32 rows and 16 to 128 columns, a call of Philox draws 32 rows of 4 columns.
@pytest.mark.parametrize(("n", "width"), [(1, 1), (31, 4), (33, 17), (65, 131)], ids=str)
def test_sketch_of_the_identity_is_omega_of_the_problem_and_the_current_seed(n, width, dtype, seed, device):
    for number, problem in ((int(seed), 0), (2, 5)):
        seed.fill_(number)
        result = sketch(torch.eye(n, dtype=dtype, device=device), seed, width, problem)
        expected = signs(seed, n, width, problem=problem, dtype=torch.promote_types(dtype, torch.float32))
        assert torch.equal(result, expected)


def test_no_bit_of_float32_data_is_lost(seed, device):
    """Data are integers of 20 bits times a power of two: sums of 16 terms need 24 bits, so partial sums are exact."""
    generator = torch.Generator().manual_seed(3)
    whole = torch.randint(-(2**20), 2**20, (70, 16), generator=generator).to(device, torch.float32)
    for scale in (1.0, 2.0**-80, 2.0**90):
        matrix = whole * scale
        exact = matrix.double() @ signs(seed, 16, 8, dtype=torch.float64)
        assert torch.equal(sketch(matrix, seed, 8).double(), exact)


# --- Offsets into a matrix have 64 bits: its elements may lie further apart than 2³¹

ROWS, RANK, COLUMNS = 5, 3, 2
# The last row starts at 2³¹ elements, or the last column does.
STRIDE = 2**29


@pytest.mark.parametrize(
    ("case", "dim", "listed"),
    [(case, 0, listed) for case in ("project", "cross_gram", "rotate", "rotate_", "damped_apply") for listed in (0, 1)]
    + [("project", 1, 0)],
)
def test_rows_or_columns_may_lie_further_apart_than_32_bits_reach(case, dim, listed, tmp_path, device):
    """On a CPU the memory is a file with holes, so only pages that hold an element take space.

    The file begins 2³¹ elements before the matrix, where a 32-bit offset that wraps around would read zeros.
    """
    sizes = (RANK, ROWS, COLUMNS) if dim else (ROWS, RANK, COLUMNS)
    basis, *others = operands(case, *sizes, "plain", torch.float32, device)
    size, before = (ROWS - 1) * STRIDE + basis.numel(), 2**31 if device.type == "cpu" else 0
    if before:
        memory = torch.from_file(str(tmp_path / "memory"), shared=True, size=before + size)
    else:
        memory = basis.new_zeros(size)
    far_apart = memory.as_strided(basis.shape, [1, STRIDE] if dim else [STRIDE, 1], before)
    far_apart.copy_(basis)
    expected = run(OPS[case].torch_form, (basis.clone(), *others))
    arguments = (far_apart, *others)
    result = run(OPS[case], grouped(case, [arguments]) if listed else arguments)[0]
    assert_computes(case, (result[0] if listed else result, *expected[1:]), (basis, *others))


@pytest.mark.parametrize("rank", [128, 129], ids=["as wide as a tile", "wider"])
def test_a_list_is_overwritten_whatever_its_width(rank, device):
    problems = [operands("rotate_", n, rank, COLUMNS, "plain", torch.float32, device) for n in (130, 3)]
    expected = [run(OPS["rotate_"].torch_form, (basis.clone(), *others))[0] for basis, *others in problems]
    for result, wanted in zip(run(OPS["rotate_"], grouped("rotate_", problems))[0], expected, strict=True):
        torch.testing.assert_close(result.cpu(), wanted.cpu(), rtol=1e-4, atol=1e-4)
