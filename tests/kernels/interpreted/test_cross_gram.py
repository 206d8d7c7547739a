"""What is special to the kernel of `cross_gram`: its range, its stretches, and that it is two launches."""

from __future__ import annotations

import math

import pytest
import torch

from brandla_kernels import OPS
from brandla_kernels._kernels import configs
from brandla_kernels._kernels.ahead import target_named
from brandla_kernels._kernels.launch import recording
from op_cases import assert_computes, exact, grouped, operands

pytestmark = pytest.mark.usefixtures("_overflow_is_meant")

# Powers of ten of the root and of the columns: squares of float32 numbers of 10²⁵ and 10⁻²⁵ are no float32 numbers.
RANGES = [(0, -25), (0, 25), (25, 0), (25, 25), (-25, -10), (-30, 10), (-36, 36)]


@pytest.mark.parametrize("powers", RANGES, ids=str)
def test_columns_may_have_any_length(powers: tuple[int, int], device: torch.device) -> None:
    problems = [operands("cross_gram", 40, *size, "plain", torch.float64, device) for size in ((5, 3), (17, 33))]
    lengths = [10.0**power for power in powers]
    # Beside a problem in range.
    problems[1:] = [
        tuple(part * length for part, length in zip(problem, lengths, strict=True)) for problem in problems[1:]
    ]
    problems = [tuple(part.float() for part in problem) for problem in problems]
    results = OPS["cross_gram"](*grouped("cross_gram", problems))
    for index, problem in enumerate(problems):
        for stack, wanted in zip(results, exact("cross_gram", problem), strict=True):
            got = stack[index][tuple(map(slice, wanted.shape))]
            assert ((got - wanted).abs() <= 40 * torch.finfo(torch.float32).eps * wanted.abs().max()).all()


@pytest.mark.parametrize("scale", [1.0, 1e25])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("spoilt", [0, 1], ids=["root", "columns"])
def test_what_is_not_finite_shows(spoilt: int, value: float, scale: float, device: torch.device) -> None:
    arguments = tuple(scale * part for part in operands("cross_gram", 40, 5, 3, "plain", torch.float32, device))
    arguments[spoilt][33, 1] = value
    cross, gram = OPS["cross_gram"](*arguments)
    assert not torch.isfinite(gram if spoilt else cross).all()
    assert cross.isnan().any() if math.isnan(value) else True


def test_gram_matrix_is_symmetric_to_the_bit(device: torch.device) -> None:
    gram = OPS["cross_gram"](*operands("cross_gram", 60, 3, 130, "plain", torch.float32, device))[1]
    assert torch.equal(gram, gram.mT)


def test_a_long_sum_is_taken_in_stretches(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "STRETCH", 64)
    arguments = operands("cross_gram", 4 * 64 + 5, 3, 2, "plain", torch.float32, device)
    assert_computes("cross_gram", OPS["cross_gram"](*arguments), arguments)


@pytest.mark.parametrize("rows", [100, 10**6])
@pytest.mark.parametrize("listed", [False, True], ids=["single", "grouped"])
def test_a_call_is_two_launches_of_stretches_short_enough(rows: int, listed: bool) -> None:
    problem = torch.empty(rows, 64), torch.empty(rows, 32)
    arguments = grouped("cross_gram", [problem] * 9) if listed else problem
    launch = OPS["cross_gram"].launch
    assert launch is not None
    with recording(target_named("sm_90")) as launches:
        launch(*arguments)
    assert [one.name for one in launches] == ["cross_gram_kernel", "sum_parts_kernel"]
    assert rows / launches[0].arguments["SPLITS"] <= configs.STRETCH


def test_rounded_gram_adds_up_short_stretches_in_float64() -> None:
    launch = OPS["rounded_gram"].launch
    assert launch is not None
    with recording(target_named("sm_90")) as launches:
        launch(torch.empty(10**6, 64))
    product, addition = launches
    assert 10**6 / product.arguments["SPLITS"] <= configs.STRETCH
    assert addition.arguments["below_ptr"].dtype == torch.float64
