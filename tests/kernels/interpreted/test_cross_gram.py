"""What is special to the kernel of `cross_gram`: its range, its stretches, and that it is two launches."""

import pytest
import torch

from brandla_kernels import OPS
from brandla_kernels._kernels import configs
from brandla_kernels._kernels.ahead import target_named
from brandla_kernels._kernels.launch import recording
from op_cases import assert_computes, exact, grouped, of_problem, operands

pytestmark = pytest.mark.usefixtures("_overflow_is_meant")

# Powers of ten of the root and of the columns: squares of float32 numbers of 10²⁵ and 10⁻²⁵ are no float32 numbers.
RANGES = [(0, -25), (0, 25), (25, 0), (25, 25), (-25, -10), (-30, 10), (-36, 36)]


@pytest.mark.parametrize("powers", RANGES, ids=str)
def test_columns_may_have_any_length(powers, device):
    """Beside a problem in range."""
    problems = [
        tuple(
            (part * 10.0**power).float()
            for part, power in zip(operands("cross_gram", 40, *size, "plain", torch.float64, device), own, strict=True)
        )
        for size, own in (((5, 3), (0, 0)), ((17, 33), powers))
    ]
    results = OPS["cross_gram"](*grouped("cross_gram", problems))
    for index, problem in enumerate(problems):
        expected = exact("cross_gram", problem)
        for got, wanted in zip(of_problem(results, index, expected), expected, strict=True):
            assert ((got - wanted).abs() <= 40 * torch.finfo(torch.float32).eps * wanted.abs().max()).all()


def test_a_long_sum_is_taken_in_stretches_and_the_gram_matrix_is_symmetric_to_the_bit(device, monkeypatch):
    monkeypatch.setattr(configs, "STRETCH", 32)
    arguments = operands("cross_gram", 2 * 32 + 5, 3, 66, "plain", torch.float32, device)
    cross, gram = OPS["cross_gram"](*arguments)
    assert_computes("cross_gram", (cross, gram), arguments)
    assert torch.equal(gram, gram.mT)


@pytest.mark.parametrize("rows", [100, 10**6])
@pytest.mark.parametrize("form", ["single", "grouped", "rounded"])
def test_a_call_is_two_launches_of_stretches_short_enough(rows, form):
    """And those of a rounded sum are added up in float64."""
    op, problem = "rounded_gram" if form == "rounded" else "cross_gram", (torch.zeros(rows, 64), torch.zeros(rows, 32))
    arguments = grouped(op, [problem] * 9) if form == "grouped" else problem[: 1 + (form == "single")]
    launch = OPS[op].launch
    assert launch is not None
    with recording(target_named("sm_90")) as launches:
        launch(*arguments)
    product, addition = launches
    assert addition.name == "sum_parts_kernel"
    assert rows / product.arguments["SPLITS"] <= configs.STRETCH
    assert addition.arguments["below_ptr"].dtype == torch.float64
