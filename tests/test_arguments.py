"""The promises of every public function about its arguments, and about the state of torch around a call.

Arguments: batches, layouts in memory, half precision, numbers and NaN. State: autocast, another default device, tensors
without data. Each call of calls.py is compared with itself; the other test files check the results. Functions that
promise never to wait for the device run on meta tensors, which have no values to read.
"""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

import brandla
from brandla.kfac import KFAC, Brand
from builders import as_matrices, assert_agree, assert_differentiable, assert_same, tensors_in, unchanged
from calls import ALL, NOT_COMPARABLE, OUT_OF_PLACE, WAITING, WITHOUT_WAITING, Arguments, N, doubled, new_arguments
from oracles import tolerance


def rounding(name, dtype=torch.float64):
    """Return the difference that rounding may make in the results of a call; a damped solve divides by 0.1."""
    return tolerance(N, torch.float32 if "half" in name else dtype, 10)


DATA = ("columns", "small_columns", "block", "square")


def used_by(name):
    """Return the fields of `Arguments` that a call uses."""
    code = ALL[name].__code__
    nested = [constant for constant in code.co_consts if hasattr(constant, "co_names")]
    return {name for block in (code, *nested) for name in block.co_names if name in Arguments._fields}


def with_data(x, change):
    """Return the arguments with changed data: new columns and matrices."""
    return x._replace(**{field: change(getattr(x, field)) for field in DATA})


@pytest.mark.parametrize("name", OUT_OF_PLACE)
def test_a_batch_and_vmap_equal_single_calls(name):
    x, call = new_arguments(torch.float64, (4,)), ALL[name]
    mapped = x._replace(one_eigh=tree_map(lambda part: part.expand(4, *part.shape), x.one_eigh))
    expected = [as_matrices(call(tree_map(lambda part, index=index: part[index], mapped))) for index in range(4)]
    results = [as_matrices(torch.vmap(call, (tree_map(lambda part: 0, mapped),), randomness="different")(mapped))]
    if not name.startswith(("grouped", "zeros", "randomized_svd, of a value")):
        batch = tree_map(lambda part: part.unflatten(0, (2, 2)), x._replace(one_eigh=x.number))
        results.append([part.flatten(0, 1) for part in as_matrices(call(batch._replace(one_eigh=x.one_eigh)))])
        for part in as_matrices(call(tree_map(lambda part: part[:0], x)._replace(one_eigh=x.one_eigh))):
            assert part.shape[0] == 0
    for result in results:
        assert_agree(result, [torch.stack(parts) for parts in zip(*expected, strict=True)], rounding(name))


def test_functions_that_overwrite_suggest_batch_dimensions_under_vmap():
    x = new_arguments(batch_shape=(3,))
    with pytest.raises(TypeError, match=r"^root_update_: root.root .*vmap .*: leading dimensions are batch"):
        torch.vmap(brandla.root_update_)(x.root, x.columns)


LAYOUTS = {
    "every other": lambda part: part.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)[..., ::2, ::2],
    "transposed": lambda part: part.mT.contiguous().mT,
    "inside a larger one": lambda part: torch.nn.functional.pad(part, (3, 2, 1, 4), value=math.nan)[..., 1:-4, 3:-2],
}


@pytest.mark.parametrize("name", [name for name in ALL if name != NOT_COMPARABLE])
def test_layout_of_the_arguments_does_not_matter(name):
    """Matrices take every layout, vectors are every other entry of a larger one, and columns repeat one column."""
    x = new_arguments(torch.float64)
    views = [
        tree_map(lambda part, lay=lay: lay(part) if part.ndim > 1 else torch.stack([part, part], -1)[..., 0], x)
        for lay in LAYOUTS.values()
    ]
    for view in (*views, with_data(x, lambda part: part[:, :1].expand(part.shape))._replace(square=x.square)):
        plain = tree_map(lambda part: part.clone(memory_format=torch.contiguous_format), view)
        with unchanged(view) if name in OUT_OF_PLACE else nullcontext():
            result = ALL[name](view)
        assert_agree(result, ALL[name](plain), rounding(name))


# The largest eigenvalue of a LowRankEigh is a view of its eigenvalues.
@pytest.mark.parametrize("name", [name for name in OUT_OF_PLACE if name != "traces"])
def test_inputs_are_neither_changed_nor_shared(name):
    x = new_arguments(torch.float64)
    with unchanged(x):
        result = ALL[name](x)
    inputs, outputs = (
        {part.untyped_storage().data_ptr() for part in tensors_in(tree) if part.numel()} for tree in (x, result)
    )
    assert inputs.isdisjoint(outputs)


# Calls that give new columns only to arguments that take half precision.
HALF = [name for name in OUT_OF_PLACE if not {"diagonal", "products", "gram", "kernels", "merge"} & {*name.split(", ")}]


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", [name for name in HALF if used_by(name) & {*DATA}])
def test_half_precision_data_count_as_their_float32_values(name, half):
    x = with_data(new_arguments(), lambda part: part.to(half))
    assert_agree(ALL[name](x), ALL[name](with_data(x, Tensor.float)), rounding(name, torch.float32))


@pytest.mark.parametrize("name", [name for name in ALL if "number" in used_by(name)])
def test_numbers_and_tensors_mean_the_same(name, dtype):
    expected = ALL[name](new_arguments(dtype)._replace(number=0.125))
    tensors = (torch.tensor(0.125, dtype=of_scalar) for of_scalar in (torch.float32, torch.float64))
    for number in (*tensors, np.float32(0.125), np.float64(0.125)):
        assert_agree(ALL[name](new_arguments(dtype)._replace(number=number)), expected, rounding(name, dtype))


# A cut between equal values has no derivative, nor has rounding, and is_finite returns no numbers.
NOT_SMOOTH = {"root_update, k above n - r", "root_update, half", "is_finite"}
SMOOTH = [name for name in (*WITHOUT_WAITING, *WAITING, "kron_damped_power, tails") if name in OUT_OF_PLACE]


@pytest.mark.parametrize("name", [name for name in SMOOTH if name not in NOT_SMOOTH])
def test_every_function_is_differentiable_in_every_tensor(name):
    assert_differentiable(ALL[name], new_arguments(torch.float64, (2,), 12))


# The parts of factors that calls do not read.
UNSEEN = {
    *(("svd_append", "svd", 2), ("to_eigh", "root", 1), ("damped_logdet", "root", 0), ("damped_logdet", "eigh", 1)),
    *(("kron_damped_logdet", "eigh", 1), ("kron_damped_logdet", "small", 1), ("damped_solve, diagonal", "root", 1)),
}
FACTORS_AND_DATA = ("eigh_", "root_", "svd_", "orthonormalize", "randomized_", "damped_", "kron_", "centred", "to_eigh")
# Calls with several results, or that use little of their arguments.
LEFT_OUT = ("one for all", "one diagonal", "held", "exponents", "pair", "right", "half", "begun", "tails", "of a value")
SPOILT = [name for name in ALL if name.startswith(FACTORS_AND_DATA) and not any(words in name for words in LEFT_OUT)]


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("name", SPOILT)
def test_non_finite_data_spoils_its_whole_problem_and_no_other(name, bad):
    clean, fields = as_matrices(ALL[name](new_arguments(torch.float64, (3,)))), used_by(name)
    if name.startswith(("damped", "kron")):
        # A non-finite column of the right side spoils only its own solution, and division by infinity gives 0.
        fields, bad = fields - {*DATA, "number"}, math.nan
    if "no columns" in name:
        fields -= {*DATA}
    for field in fields:
        for place, _ in enumerate(tree_leaves(getattr(new_arguments(), field))):
            if any(name.startswith(call) and [field, place] == seen for call, *seen in UNSEEN):
                continue
            x = new_arguments(torch.float64, (3,))
            tree_leaves(getattr(x, field))[place][1].view(-1)[-1] = bad
            result = as_matrices(ALL[name](x))
            assert not any(part[1].isfinite().any() for part in result if part.is_floating_point())
            assert_agree([part[::2] for part in result], [part[::2] for part in clean], rounding(name))


# --- The state of torch around a call

# orthonormalize ends with a product by `@`, which autocast would round.
CALLS = ALL | {"orthonormalize, dependent": lambda x: brandla.orthonormalize(doubled(x.columns))}
AROUND = {"autocast": lambda: torch.autocast("cpu", torch.bfloat16), "on meta": lambda: torch.device("meta")}


@pytest.mark.parametrize("name", CALLS)
def test_autocast_and_another_default_device_change_no_bit(name):
    expected = CALLS[name](new_arguments())
    for around in AROUND.values():
        x = new_arguments()
        with around():
            result = CALLS[name](x)
        assert_same(result, expected)


@pytest.mark.parametrize("around", AROUND)
def test_a_step_of_kfac_is_the_same_around(around):
    gradients = []
    for context in (nullcontext, AROUND[around]):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.Tanh(), torch.nn.Linear(20, 18))
        preconditioner = KFAC(model, inverse=Brand(rank=4))
        for _ in range(2):
            model(torch.randn(6, 12)).square().sum().backward()
            with context():
                preconditioner.step()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert_same(*gradients)


@pytest.mark.parametrize("name", CALLS)
def test_tensors_without_data_give_results_of_the_same_shapes(name):
    results = [CALLS[name](new_arguments()), CALLS[name](new_arguments().moved("meta"))]
    if name in ("root_update, eigh", "svd_append", "damped_solve, root, tail", "to_eigh"):
        with FakeTensorMode():
            results.append(CALLS[name](new_arguments()))
    expected, *others = (tree_map(lambda part: (part.shape, part.dtype), result) for result in results)
    assert all(shapes == expected for shapes in others)
