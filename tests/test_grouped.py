"""brandla.grouped: the public functions over lists of factors of different sizes."""

import pytest
import torch

import brandla
import oracles
from brandla import LowRankEigh, LowRankRoot, Rank, grouped
from builders import assert_agree, assert_same, defect, make_columns, unchanged
from calls import LIST_SIZES, list_calls
from oracles import generator, power_law, psd_matrix

EIGHS, COLUMNS = list_calls("different")["eigh_update"][0]
ROOTS = list_calls("different")["root_update"][0][0]
RHS = list_calls("different")["damped_solve"][0][1]
MATRICES = [psd_matrix(power_law(1.0)(n), seed=n) for n, *_ in LIST_SIZES["different"]]


def entry_of(values, index):
    """Return the entry of one factor, or the one value of all factors."""
    return values[index] if isinstance(values, (list, tuple)) else values


def grouped_and_single(name, lists, options):
    """Return the results of a grouped call, and the results of single calls."""
    function = name.partition(",")[0]
    singles = [
        getattr(brandla, function)(
            *(entry_of(values, index) for values in lists),
            **{key: entry_of(value, index) for key, value in options.items()},
        )
        for index in range(len(lists[0]))
    ]
    return getattr(grouped, function)(*lists, **options), singles


def factor_of(result):
    """Return the factor in a result, or None if the result holds no factor."""
    parts = (result, *result) if isinstance(result, tuple) else ()
    return next((part for part in parts if isinstance(part, (LowRankEigh, LowRankRoot))), None)


def assert_equal(results, expected, dtype):
    """Check that results stand for the same matrices, up to the rounding of two backward stable computations."""
    for result, wanted in zip(results, expected, strict=True):
        assert_agree(result, wanted, oracles.tolerance(90, dtype))
        factor, wanted_factor = factor_of(result), factor_of(wanted)
        if factor is not None:
            assert [part.shape for part in factor] == [part.shape for part in wanted_factor]
            assert defect(factor) <= oracles.ORTHONORMAL * oracles.epsilon(dtype)


@pytest.mark.parametrize("name", list_calls("different"))
@pytest.mark.parametrize("sizes", LIST_SIZES)
def test_grouped_call_equals_a_loop(sizes, name, dtype):
    lists, options = list_calls(sizes, dtype)[name]
    with unchanged(lists, options):
        results, expected = grouped_and_single(name, lists, options)
    if sizes == "different":
        assert_same(results, expected)
    else:
        assert_equal(results, expected, dtype)


@pytest.mark.parametrize("name", ["eigh_update", "root_update", "root_update, tracked", "eigh_refresh"])
def test_a_non_finite_factor_spoils_no_other_factor(name):
    (factors, matrices), options = list_calls("one rank")[name]
    matrices = [matrix.clone() for matrix in matrices]
    matrices[1][3, 2] = float("nan")
    results, singles = grouped_and_single(name, [factors, matrices], options)
    assert [bool(factor_of(result).is_finite()) for result in results] == [True, False, True, True]
    assert_equal(results[::2], singles[::2], torch.float64)


@pytest.mark.parametrize("function", ["randomized_eigh", "randomized_svd"])
@pytest.mark.parametrize("rank", [4, [4, 8, 2, 1]], ids=str)
def test_grouped_randomized_call_equals_a_loop_from_one_generator(function, rank):
    results = getattr(grouped, function)(MATRICES, rank, power_iterations=1, generator=generator(3))
    options = {"power_iterations": 1, "generator": generator(3)}
    calls = ((matrix, entry_of(rank, index)) for index, matrix in enumerate(MATRICES))
    assert_same(results, [getattr(brandla, function)(*call, **options) for call in calls])


@pytest.mark.parametrize("tracked", [False, True], ids=["plain", "tracked"])
@pytest.mark.parametrize("inside", [(), (1,), (0, 1, 2)], ids=["none", "one", "all"])
def test_columns_inside_the_span_of_some_factors(update, inside, tracked, dtype):
    factors, columns = (
        [make(n, k, seed=n, dtype=dtype) for n in (40, 64, 90)] for make, k in ((update.make, 8), (make_columns, 5))
    )
    for index in inside:
        columns[index] = factors[index].dense() @ columns[index] / factors[index].n ** 0.5
    factors = [brandla.track(factor) for factor in factors] if tracked else factors
    for options in ({"rank": Rank(13, tol=1e-2)}, {"rank": 3}):
        all_options = update.options | options | {"decay": 0.9, "weight": [0.5, 1.0, 2.0]}
        assert_equal(*grouped_and_single(update.name, [factors, columns], all_options), dtype)


def test_grouped_powers_have_the_gradient_of_single_powers():
    (lefts, rights, matrices, *numbers), _ = list_calls("one rank")["kron_damped_power"]
    leaves = [part.clone().requires_grad_() for part in (*matrices, *(left.eigenvalues for left in lefts))]
    factors = [left._replace(eigenvalues=values) for left, values in zip(lefts, leaves[4:], strict=True)]
    of_grouped, of_single = (
        torch.autograd.grad(sum(x.square().sum() for x in results), leaves)
        for results in grouped_and_single("kron_damped_power", [factors, rights, leaves[:4], *numbers], {})
    )
    torch.testing.assert_close(of_grouped, of_single)


def test_an_empty_group_gives_an_empty_list():
    assert grouped.eigh_update([], []) == []
    assert grouped.damped_solve([], [], 0.1) == []


@pytest.mark.parametrize(
    ("function", "lists", "options", "words"),
    [
        ("eigh_update", (EIGHS, COLUMNS[:3]), {}, "4 … 3"),
        ("eigh_update", (EIGHS, COLUMNS), {"decay": [0.9, 0.5]}, "decay … 4 … 2"),
        ("root_update", (ROOTS, COLUMNS), {"compress": ["eigh"] * 3}, "compress … 4 … 3"),
        ("damped_solve", (EIGHS, RHS, [0.1]), {}, "damping … 4 … 1"),
        ("randomized_eigh", (MATRICES, [1, 2]), {}, "rank … 4 … 2"),
        ("eigh_update", (EIGHS, [*COLUMNS[:3], COLUMNS[2]]), {}, "eigh_update: columns must have n = 12 rows"),
    ],
    ids=["lists", "option", "compress", "damping", "rank", "rows"],
)
def test_bad_lists_are_refused(function, lists, options, words):
    with pytest.raises(ValueError, match=function) as caught:
        getattr(grouped, function)(*lists, **options)
    assert all(word in str(caught.value) for word in words.split(" … "))


def test_lists_of_a_checked_layout_are_computed_from_their_own_tensors_and_numbers():
    """A check of one list is reused for another list only if everything that it reads is the same."""
    half, quarter = torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.25, dtype=torch.float64)
    doubled = [2 * part for part in COLUMNS]
    lists = [(COLUMNS, half, half), (doubled, half, half), (COLUMNS, half, quarter), (doubled, quarter, half)]
    for columns, decay, weight in 2 * [*lists, (doubled, 0.5, 1.0)]:
        for rank in ([5, 8, 1, 12], [4, 8, 1, 12]):
            options = {"decay": decay, "weight": weight, "rank": rank}
            assert_same(*grouped_and_single("root_update", [ROOTS, columns], options))
    with pytest.raises(TypeError, match="weight must be a number"):
        grouped.root_update(ROOTS, doubled, decay=0.5, weight=True)
    with brandla.checked(), pytest.raises(ValueError, match="columns must be finite"):
        grouped.root_update(ROOTS, [part * torch.nan for part in doubled], decay=0.5, weight=1.0)


@pytest.mark.parametrize("function", ["eigh_update", "root_update"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_lists_of_half_precision_columns_equal_their_float32_values(function, half):
    (factors, columns), options = list_calls("some of one rank", torch.float32)[function]
    columns = [block.to(half) for block in columns]
    expected = getattr(grouped, function)(factors, [block.float() for block in columns], **options)
    for blocks in (columns, [columns[0], columns[1].float(), *columns[2:]]):
        assert_same(getattr(grouped, function)(factors, blocks, **options), expected)


def test_every_public_function_has_a_grouped_form():
    """In-place functions have none: bad input in one factor could no longer leave the others unchanged."""
    functions = {name for name in brandla.__all__ if "_" in name and not name.endswith("_")} - {"keep_dtype"}
    assert functions == set(grouped.__all__)
