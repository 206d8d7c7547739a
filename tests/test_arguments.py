"""What every public function promises of its arguments: batches, how they lie in memory, half precision, numbers, NaN.

Each call of calls.py is compared with itself. That it is right at all is what the other files are about.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from builders import assert_agree, in_full, shares_memory, unchanged
from calls import ALL, NEW, NOT_COMPARABLE, Given, N, given, one_of
from oracles import tolerance


def rounding(name: str, dtype: torch.dtype = torch.float64) -> float:
    """Return what rounding explains of the results of a call; a damped solve divides by 0.1."""
    return tolerance(N, torch.float32 if "half" in name else dtype, 10)


DATA = ("columns", "small_columns", "block", "square")


def used_by(name: str) -> set[str]:
    """Return the fields of its arguments that a call takes."""
    code = ALL[name].__code__
    inner = [constant for constant in code.co_consts if hasattr(constant, "co_names")]
    return {field for each in (code, *inner) for field in each.co_names if field in Given._fields}


def with_data(x: Given, change: Callable[[Tensor], Tensor]) -> Given:
    """Return the arguments with other new columns and matrices."""
    return x._replace(**{field: change(getattr(x, field)) for field in DATA})


@pytest.mark.parametrize("name", NEW)
def test_a_batch_and_vmap_are_the_calls_one_by_one(name: str) -> None:
    x, call = given(torch.float64, (4,)), ALL[name]
    each = x._replace(one_eigh=tree_map(lambda part: part.expand(4, *part.shape), x.one_eigh))
    expected = [in_full(call(one_of(each, index))) for index in range(4)]
    results = [in_full(torch.vmap(call, (tree_map(lambda part: 0, each),), randomness="different")(each))]
    if not name.startswith(("grouped", "zeros", "randomized_svd, of a value")):
        batch = tree_map(lambda part: part.unflatten(0, (2, 2)), x._replace(one_eigh=x.number))
        results.append([part.flatten(0, 1) for part in in_full(call(batch._replace(one_eigh=x.one_eigh)))])
        for part in in_full(call(tree_map(lambda part: part[:0], x)._replace(one_eigh=x.one_eigh))):
            assert part.shape[0] == 0
    for result in results:
        assert_agree(result, [torch.stack(parts) for parts in zip(*expected, strict=True)], rounding(name))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "every other": lambda part: part.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)[..., ::2, ::2],
    "transposed": lambda part: part.mT.contiguous().mT,
    "inside a larger one": lambda part: torch.nn.functional.pad(part, (3, 2, 1, 4), value=math.nan)[..., 1:-4, 3:-2],
}


def laid_out() -> dict[str, Given]:
    """Return arguments in every layout: those, a vector as every other entry, and columns that are one column."""
    x = given(torch.float64)
    views = {
        name: tree_map(lambda part, lay=lay: lay(part) if part.ndim > 1 else torch.stack([part, part], -1)[..., 0], x)
        for name, lay in LAYOUTS.items()
    }
    return views | {"one column": with_data(x, lambda part: part[:, :1].expand(part.shape))._replace(square=x.square)}


@pytest.mark.parametrize("name", [name for name in ALL if name != NOT_COMPARABLE])
def test_layout_of_the_arguments_does_not_matter(name: str) -> None:
    for view in laid_out().values():
        plain = tree_map(lambda part: part.clone(memory_format=torch.contiguous_format), view)
        with unchanged(view) if name in NEW else nullcontext():
            result = ALL[name](view)
        assert_agree(result, ALL[name](plain), rounding(name))


# The largest eigenvalue of a LowRankEigh is a view of all.
@pytest.mark.parametrize("name", [name for name in NEW if name != "traces"])
def test_inputs_are_neither_changed_nor_shared(name: str) -> None:
    x = given(torch.float64)
    with unchanged(x):
        result = ALL[name](x)
    assert not shares_memory(x, result)


# Where new columns go to alone what takes half precision.
HALF = [name for name in NEW if not {"diagonal", "products", "gram", "kernels", "merge"} & {*name.split(", ")}]


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", [name for name in HALF if used_by(name) & {*DATA}])
def test_half_precision_data_count_as_their_float32_values(name: str, half: torch.dtype) -> None:
    x = with_data(given(), lambda part: part.to(half))
    assert_agree(ALL[name](x), ALL[name](with_data(x, Tensor.float)), rounding(name, torch.float32))


@pytest.mark.parametrize("name", [name for name in ALL if "number" in used_by(name)])
def test_numbers_and_tensors_mean_the_same(name: str, dtype: torch.dtype) -> None:
    expected = ALL[name](given(dtype)._replace(number=0.125))
    for of_scalar in (torch.float32, torch.float64):
        number = torch.tensor(0.125, dtype=of_scalar)
        assert_agree(ALL[name](given(dtype)._replace(number=number)), expected, rounding(name, dtype))


# What calls do not look at: of a factor, a part.
UNSEEN = {
    *(("svd_append", "svd", 2), ("to_eigh", "root", 1), ("damped_logdet", "root", 0), ("damped_logdet", "eigh", 1)),
    *(("kron_damped_logdet", "eigh", 1), ("kron_damped_logdet", "small", 1), ("damped_solve, diagonal", "root", 1)),
}
FACTORS_AND_DATA = ("eigh_", "root_", "svd_", "orthonormalize", "randomized_", "damped_", "kron_", "centred", "to_eigh")
# What has several results, or takes little of its arguments.
LEFT_OUT = ("one for all", "one diagonal", "held", "exponents", "pair", "right", "half", "begun", "of a value")
SPOILT = [name for name in ALL if name.startswith(FACTORS_AND_DATA) and not any(words in name for words in LEFT_OUT)]


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("name", SPOILT)
def test_what_is_not_finite_spoils_all_of_its_own_problem_and_no_other(name: str, bad: float) -> None:
    clean, fields = in_full(ALL[name](given(torch.float64, (3,)))), used_by(name)
    if name.startswith(("damped", "kron")):
        # Solved for a column that is not finite, only that column is not; and what is divided by infinity is 0.
        fields, bad = fields - {*DATA, "number"}, math.nan
    if "no columns" in name:
        fields -= {*DATA}
    for field in fields:
        for place, _ in enumerate(tree_leaves(getattr(given(), field))):
            if any(name.startswith(call) and [field, place] == seen for call, *seen in UNSEEN):
                continue
            x = given(torch.float64, (3,))
            tree_leaves(getattr(x, field))[place][1].view(-1)[-1] = bad
            result = in_full(ALL[name](x))
            assert not any(part[1].isfinite().any() for part in result if part.is_floating_point())
            assert_agree([part[::2] for part in result], [part[::2] for part in clean], rounding(name))
