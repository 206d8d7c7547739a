"""Every wrong input raises, before anything is computed, an error with the function, rule, values and remedy."""

import math
from fnmatch import fnmatchcase
from functools import partial
from inspect import signature
from operator import attrgetter

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

import brandla
from builders import Operator, assert_same, make_columns, make_eigh, make_root, make_svd, unchanged

N, R, K = 12, 4, 3
EIGH, ROOT, SVD = make_eigh(N, R), make_root(N, R), make_svd(N, 9, R)
EIGH32 = make_eigh(N, R, dtype=torch.float32)
BATCH = make_eigh(N, R, batch_shape=(3,))
COLUMNS, RIGHT, RHS, SHORT = make_columns(N, K), make_columns(9, K), make_columns(N, 2), make_columns(5, K)
TWO_BATCHES = make_columns(N, K, batch_shape=(2,))
ZERO, TWO, THREE = torch.tensor(0.0).double(), torch.ones(2).double(), torch.ones(3).double()
MATRIX = EIGH.dense()
SMALL, TWO_SMALL, BLOCK = make_eigh(9, R), make_eigh(9, R, batch_shape=(2,)), make_columns(N, 9)
INTEGERS = torch.ones(N, K, dtype=torch.int64)
COMPLEX = torch.ones(N, K, dtype=torch.complex64)
ELSEWHERE = torch.ones(N, K, dtype=torch.float64, device="meta")
RANDOMIZED = torch.svd_lowrank(make_columns(N, 9), 4)
WIDE = make_columns(N, N + 2)
WIDE_ROOT = brandla.LowRankRoot(WIDE, WIDE.mT @ WIDE)
INTERLEAVED = ROOT._replace(root=COLUMNS.new_zeros(40).as_strided((N, R), (2, 2)))
HALF_EIGH = brandla.LowRankEigh(*(part.bfloat16() for part in EIGH))
STREAM, SHORTER = (brandla.centre(brandla.LowRankSVD.zeros(n, 0, 2)) for n in (N, 10))
FLOAT_MEANS = [STREAM._replace(mean=STREAM.mean.float())] * 2
UPRIGHT, NARROW = brandla.LowRankEigh(COLUMNS.new_ones(N), EIGH.eigenvectors.mT), RIGHT[:, :2]


class OperatorOfWrongShape(Operator):
    """A linear operator whose products, as the products of its transpose, have a row too many."""

    mT = property(lambda self: self)  # noqa: N815

    def __matmul__(self, block):
        """Return a product."""
        return torch.ones(N + 1, block.shape[1], dtype=torch.float64)


WRONG_PRODUCTS, NO_TRANSPOSE = OperatorOfWrongShape(MATRIX), Operator(BLOCK)


def case(function, name, error, words, *arguments, **options):
    """Return a call, its error, and the words and values that the message must hold, separated by ` … `."""
    return pytest.param(function, arguments, options, error, words, id=f"{function}: {name}")


# A good call of each function. The factors of KRON have orders 12 and 9.
KRON = {"left": EIGH, "right": SMALL, "matrix": BLOCK}
GOOD = {
    **{f"eigh_{name}": {"eigh": EIGH, "columns": COLUMNS} for name in ("update", "update_", "downdate")},
    **{f"root_{name}": {"root": ROOT, "columns": COLUMNS} for name in ("update", "update_")},
    "eigh_refresh": {"eigh": EIGH, "matrix": COLUMNS},
    "svd_update": {"svd": SVD, "left": COLUMNS, "right": RIGHT},
    "svd_append": {"svd": SVD, "columns": COLUMNS},
    "damped_solve": {"lowrank": EIGH, "rhs": COLUMNS, "damping": 0.1},
    "damped_power": {"lowrank": ROOT, "rhs": COLUMNS, "damping": 0.1, "exponent": -0.5},
    "damped_logdet": {"lowrank": EIGH, "damping": 0.1},
    "kron_damped_solve": KRON | {"left_damping": 0.1, "right_damping": 0.1},
    "kron_damped_power": KRON | {"damping": 0.1, "exponent": -0.5},
    "kron_damped_logdet": {"left": EIGH, "right": SMALL, "damping": 0.1},
    "randomized_eigh": {"matrix": MATRIX, "rank": 2},
    "randomized_svd": {"matrix": MATRIX, "rank": 2},
    "orthonormalize": {"panel": COLUMNS},
}
# Every "function.argument".
PLACES = [
    f"{function}.{argument}" for function in GOOD for argument in signature(getattr(brandla, function)).parameters
]

# The fault, the error, the words of the message, and the bad argument.
BAD_DTYPES = [
    ("integers", TypeError, "int64 … .float()", INTEGERS),
    ("complex", TypeError, "complex64; take its .real and .imag", COMPLEX),
    ("booleans", TypeError, "bool", INTEGERS.bool()),
]
MISMATCHES = [
    ("float32", TypeError, "float64 … float32", COLUMNS.float()),
    ("half", TypeError, "float64 … bfloat16", COLUMNS.bfloat16()),
    ("elsewhere", ValueError, "device … cpu … meta", ELSEWHERE),
    ("rows", ValueError, "12 … (5, 3)", SHORT),
]
NOT_TENSORS = [
    ("a list", TypeError, "Tensor … list", [[1.0]]),
    ("of numpy", TypeError, "Tensor … ndarray … torch.from_numpy", COLUMNS.numpy()),
]
BAD_SHAPES = [
    ("samples as rows", ValueError, "n = 12 … (3, 12) … pass columns.mT if samples are rows", COLUMNS.mT),
    ("a vector", ValueError, "(12,) … pass columns[:, None] for one column", COLUMNS[:, 0]),
    ("batch shape", ValueError, "batch … (2,) … expand", TWO_BATCHES),
]
SPARSE_BATCH = ("a batch", ValueError, "sparse … (n, k); got (2, 12, 3); pass a list", TWO_BATCHES.to_sparse())
NOT_INTS = [("float", TypeError, "int … float", 1.5), ("bool", TypeError, "int … bool", True)]
NEGATIVE = ("negative", ValueError, "got -1", -1)
BAD_NUMBERS = [
    ("negative", ValueError, "0 … -0.5", -0.5),
    ("NaN", ValueError, "nan", math.nan),
    ("infinite", ValueError, "inf", math.inf),
    ("nothing", TypeError, "NoneType", None),
    ("integers", TypeError, "int64", torch.tensor(1)),
    ("of a wrong shape", ValueError, "batch shape () … (3,)", THREE),
    ("elsewhere", ValueError, "meta", torch.ones((), device="meta")),
]
TEXT = ("text", TypeError, "str", "0.1")
BAD_TAILS = [
    ("unknown", ValueError, "'smallest' … 'mean' … 'largest'", "largest"),
    ("untracked", ValueError, "'mean' … Tracked … brandla.track", "mean"),
]
NOT_FACTORS = [
    ("a dense matrix", TypeError, "Tensor", MATRIX),
    ("a plain tuple", TypeError, "tuple", tuple(EIGH)),
    ("nothing", TypeError, "NoneType", None),
]
BAD_DIAGONALS = [
    ("length", ValueError, "(12,) … (3,)", THREE),
    ("a matrix", ValueError, "(12,) … (12, 12)", MATRIX),
    ("a number", TypeError, "Tensor … float", 0.1),
    ("float32", TypeError, "float64 … float32", MATRIX[0].float()),
    ("elsewhere", ValueError, "meta", ELSEWHERE[:, 0]),
]


def broken(factor):
    """Return factors with one bad part, and tracked factors with one bad number."""
    name, tracked = "gram" if isinstance(factor, brandla.LowRankRoot) else "eigenvalues", brandla.track(factor)
    part = getattr(factor, name)
    return [
        ("half", TypeError, "float32 or float64 … bfloat16", type(factor)(*(entry.bfloat16() for entry in factor))),
        ("two dtypes", TypeError, f"{name} … float64 … float32", factor._replace(**{name: part.float()})),
        ("two devices", ValueError, f"{name} … device … meta", factor._replace(**{name: part.to("meta")})),
        ("two ranks", ValueError, f"{name} … 4 … 3", factor._replace(**{name: part[..., :3]})),
        *(
            (f"{field}, {wrong}", error, f"{field} … {words}", tracked._replace(**{field: value}))
            for field in ("error_bound", "trace")
            for wrong, error, words, value in (
                ("shape", ValueError, "shape () … batch … (3,)", THREE),
                ("dtype", TypeError, "float64 … float32", ZERO.float()),
                ("elsewhere", ValueError, "device … meta", ZERO.to("meta")),
                ("a number", TypeError, "float", 0.0),
            )
        ),
    ]


# Patterns of places, and the bad arguments there. Each message names the argument.
REFUSED = [
    ("*.columns *.rhs svd_update.left", [*BAD_DTYPES, *MISMATCHES, *NOT_TENSORS]),
    ("*.columns", BAD_SHAPES),
    ("eigh_update.columns root_update.columns", [SPARSE_BATCH]),
    ("orthonormalize.panel", [*BAD_DTYPES, *NOT_TENSORS, ("an eigh", TypeError, "Tensor … LowRankEigh", EIGH)]),
    ("orthonormalize.panel", [("a vector", ValueError, "(..., n, k) … (12,)", COLUMNS[:, 0])]),
    ("eigh_refresh.matrix", [*BAD_DTYPES, *MISMATCHES, ("a vector", ValueError, "(12,)", COLUMNS[:, 0])]),
    ("eigh_refresh.iterations", [*NOT_INTS, ("none", ValueError, "at least 1 … 0", 0)]),
    ("*.eigh *.root *.lowrank kron*.left kron*.right *.svd", NOT_FACTORS),
    ("*.eigh *.root *.lowrank kron*.left kron*.right", [("an SVD", TypeError, "LowRankSVD", SVD)]),
    ("eigh_update.eigh", [*broken(EIGH), ("a root", TypeError, "LowRankRoot … convert", ROOT)]),
    ("eigh_update.eigh", [("a wide basis", ValueError, "eigenvectors … r = 12 > n = 4", UPRIGHT)]),
    ("root_update.root", [*broken(ROOT), ("an eigh", TypeError, "LowRankEigh … convert", EIGH)]),
    ("root_update.root", [("a vector", ValueError, "root.root … (12,)", ROOT._replace(root=COLUMNS[:, 0]))]),
    ("root_update_.root", [("wide", ValueError, "root.root … columns than rows … 14 columns and 12 rows", WIDE_ROOT)]),
    ("root_update_.root", [("interleaved", ValueError, "root.root … share memory", INTERLEAVED)]),
    ("root_update*.compress", [(str(no), ValueError, f"'eigh' … {no!r}", no) for no in ("qr", None)]),
    ("*.tol", [(str(tol), ValueError, f"[0, 1) … {tol}", tol) for tol in (1.0, -0.1, math.nan)]),
    ("eigh_downdate.eigh", [("tracked", TypeError, "LowRankEigh … Tracked", brandla.track(EIGH))]),
    ("*_update.rank svd_append.rank", [*NOT_INTS, NEGATIVE, ("much", ValueError, "r = 4, k = 3 … got 8", 8)]),
    ("eigh_update.rank", [("a rule", ValueError, "7 … got 8", brandla.Rank(max=8, tol=0.1))]),
    ("*.decay *.weight", [*BAD_NUMBERS, TEXT]),
    ("*damping", [*BAD_NUMBERS, TEXT, ("zero", ValueError, "> 0 … got 0", 0)]),
    ("*tail", [*BAD_NUMBERS, *BAD_TAILS]),
    ("damped_power.exponent kron_damped_power.exponent", [TEXT, ("infinite", ValueError, "inf", math.inf)]),
    ("damped_solve.diagonal damped_logdet.diagonal", BAD_DIAGONALS),
    ("damped_power.diagonal", [("any", ValueError, "None … damped_solve", MATRIX[0])]),
    ("damped_solve.rhs", [("a scalar", ValueError, "n = 12", ZERO)]),
    ("damped_solve.lowrank", [("half", TypeError, "float32 or float64 … bfloat16", HALF_EIGH)]),
    ("svd_update.right", [("rows", ValueError, "n = 9 … (12, 3)", COLUMNS), ("width", ValueError, "3 and 2", NARROW)]),
    ("svd_update.right", [("float32", TypeError, "float64 … float32", RIGHT.float())]),
    ("*.svd", [("an eigh", TypeError, "LowRankEigh; convert it with LowRankSVD(U, d, U.mT)", EIGH)]),
    ("*.svd", [("a tuple", TypeError, "LowRankSVD(U, S, Vh); torch.svd_lowrank … V", RANDOMIZED)]),
    ("*.svd", [("V for Vh", ValueError, "Vh … (4, 4) … V … .mT … (9, 4)", brandla.LowRankSVD(*RANDOMIZED))]),
    ("randomized*.matrix", [*BAD_DTYPES, ("a list", TypeError, "list … shape, dtype, device", [[1.0]])]),
    ("randomized*.matrix", [("a vector", ValueError, "(12,)", MATRIX[0])]),
    ("randomized*.rank", [*NOT_INTS, ("0", ValueError, "got 0", 0), ("much", ValueError, "at most 12 … got 13", 13)]),
    ("*.oversample *.power_iterations", [*NOT_INTS, NEGATIVE]),
    ("*.start", [("a list", TypeError, "Tensor … list", [1.0]), ("rows", ValueError, "(12, s) … (9, 3)", RIGHT)]),
    ("*.start", [("wide", ValueError, "r = 13 > n = 12", make_columns(N, N + 1))]),
    ("randomized_eigh.matrix", [("a rectangle", ValueError, "square … (12, 3) … randomized_svd", COLUMNS)]),
    ("kron*.matrix", [("shape", ValueError, "12, 9 … (9, 12)", BLOCK.mT)]),
    ("kron*.matrix", [("a vector", ValueError, "(12,)", MATRIX[0]), ("integers", TypeError, "int64", BLOCK.long())]),
    ("kron_damped_solve.matrix", [("three", TypeError, "pair … tuple", (COLUMNS, RIGHT, RIGHT))]),
    ("kron_damped_solve.matrix", [("a number", TypeError, "pair … float", 1.0)]),
    ("kron_damped_solve.left", [("float32", TypeError, "float64 … float32", EIGH32)]),
    ("kron_damped_power.matrix", [("a pair", TypeError, "(P, Q) … P @ Q.mT", (COLUMNS, RIGHT))]),
    ("*.values", [("shape", ValueError, "(4, 4) … (4, 3)", COLUMNS[:4])]),
    ("*.values", [("in float32", TypeError, "float64 … float32", MATRIX[:4, :4].float())]),
]


def places(patterns):
    """Return the pairs of function and argument that match any of these patterns."""
    fitting = [place for place in PLACES if any(fnmatchcase(place, pattern) for pattern in patterns.split())]
    assert fitting, patterns
    return [tuple(place.split(".")) for place in fitting]


CASES = [
    *(
        case(function, f"{argument}, {name}", error, f"{argument} … {words}", **GOOD[function] | {argument: value})
        for patterns, bad in REFUSED
        for function, argument in places(patterns)
        for name, error, words, value in bad
    ),
    *(
        case(f"{kind}.zeros", name, error, words, *sizes, rank, dtype=dtype)
        for kind, sizes in (("LowRankEigh", [5]), ("LowRankRoot", [5]), ("LowRankSVD", [5, 8]))
        for name, error, words, rank, dtype in (
            ("rank above n", ValueError, "5 … got 6", 6, None),
            ("rank below 0", ValueError, "got -1", -1, None),
            ("rank as float", TypeError, "float", 2.0, None),
            ("half", TypeError, "dtype … float32 or float64 … got bfloat16; ", 2, torch.bfloat16),
            ("integers", TypeError, "dtype … float32 or float64 … got int64; ", 2, torch.int64),
        )
    ),
    case("Rank", "max 0", ValueError, "max … got 0", 0, 0.1),
    case("Rank", "max as float", TypeError, "max … float", 2.5, 0.1),
    case("Rank", "tolerance 1", ValueError, "tol … got 1.0", 4, 1.0),
    case("Rank", "tolerance below 0", ValueError, "tol … got -0.1", 4, -0.1),
    case("root_update", "shrink", ValueError, "shrink … 'cholesky'", ROOT, COLUMNS, compress="cholesky", shrink=True),
    case("eigh_refresh", "batch shape", ValueError, "matrix … (3,) … (2,)", BATCH, TWO_BATCHES),
    case("eigh_refresh", "operator of a batch", ValueError, "12 rows … (3, 12, 4)", BATCH, NO_TRANSPOSE),
    case("kron_damped_solve", "P", ValueError, "(P, Q) … 12 … (5, 3)", EIGH, SMALL, (SHORT, RIGHT), 0.1, 0.1),
    case("kron_damped_solve", "Q", ValueError, "(P, Q) … 9 … (5, 3)", EIGH, SMALL, (COLUMNS, SHORT), 0.1, 0.1),
    case("kron_damped_solve", "widths", ValueError, "columns … 3 and 2", EIGH, SMALL, (COLUMNS, NARROW), 0.1, 0.1),
    case("randomized_eigh", "wrong products", ValueError, "(12, 12) … (13, 12)", WRONG_PRODUCTS, 2),
    case("randomized_svd", "wrong products", ValueError, "(12, 12) … (13, 12)", WRONG_PRODUCTS, 2),
    case("randomized_svd", "no mT", TypeError, "mT … Operator", NO_TRANSPOSE, 2),
    case("eigh_refresh", "no mT", TypeError, "mT … Operator", EIGH, NO_TRANSPOSE),
    case("kron_damped_logdet", "batches", ValueError, "right … left's, (3,); got (2,)", BATCH, TWO_SMALL, 0.1),
    case("damped_solve", "batch shape", ValueError, "rhs … (3,) … (2,)", BATCH, TWO_BATCHES, 0.1),
    case("damped_solve", "batch of damping", ValueError, "damping … batch shape (3,) … (2,)", BATCH, RHS, TWO),
    case("merge", "an SVD", TypeError, "second must be a Centred; got LowRankSVD … brandla.centre", STREAM, STREAM.svd),
    case("merge", "rows", ValueError, "second.svd.U must have n = 12 rows", STREAM, SHORTER),
    case("merge", "a mean in float32", TypeError, "first.mean must be float64, whatever … got float32", *FLOAT_MEANS),
    case("centre", "columns seen", ValueError, "4 … LowRankSVD.zeros(m, 0, rank)", brandla.LowRankSVD.zeros(10, 4, 3)),
    case("centre", "an eigh", TypeError, "svd must be a LowRankSVD; got LowRankEigh", EIGH),
    case("track", "an SVD", TypeError, "lowrank must be a LowRankEigh or a LowRankRoot; got LowRankSVD", SVD),
    case("track", "a tensor", TypeError, "lowrank must be a LowRankEigh or a LowRankRoot; got Tensor", MATRIX),
    case("track", "half", TypeError, "lowrank.eigenvectors … bfloat16", HALF_EIGH),
]
WITH_CASES = ("function", "arguments", "options", "error", "words")


def assert_refused(function, arguments, options, error, words):
    """Check that a call raises exactly this error, with these words in the message."""
    with pytest.raises(error) as caught:
        attrgetter(function)(brandla)(*arguments, **options)
    message = str(caught.value)
    assert type(caught.value) is error
    assert message.startswith(f"{function}: ")
    assert [word for word in words.split(" … ") if word not in message] == []


@pytest.mark.parametrize(WITH_CASES, CASES)
def test_wrong_input_raises_an_error_that_explains_it(function, arguments, options, error, words):
    parts = (part for part in tree_leaves((arguments, options)) if isinstance(part, torch.Tensor))
    with unchanged([part for part in parts if not (part.is_meta or part.is_sparse)]):
        assert_refused(function, arguments, options, error, words)


def test_numpy_integers_and_exponents_are_numbers():
    assert_same(brandla.eigh_update(EIGH, COLUMNS, rank=np.int64(3)), brandla.eigh_update(EIGH, COLUMNS, rank=3))
    assert brandla.LowRankRoot.zeros(5, np.int64(2)).rank == brandla.randomized_svd(MATRIX, np.int64(2)).rank == 2
    assert brandla.Rank(np.int32(3), np.float32(0.5)).max == 3
    power = brandla.damped_power(EIGH, RHS, 0.5, np.float32(-0.5))
    assert torch.equal(power, brandla.damped_power(EIGH, RHS, 0.5, -0.5))


# --- Values, which only checked mode reads


def spoiled(value, bad=math.nan):
    """Return a copy with one bad entry in the last tensor."""
    if isinstance(value, torch.Tensor):
        copy = value.clone()
        copy.view(-1)[-1] = bad
        return copy
    *rest, last = value
    return type(value)(*rest, spoiled(last.contiguous(), bad))


def value_case(function, name, words, *arguments, **options):
    return case(function, name, ValueError, words, *arguments, **options)


WITHOUT_IN_PLACE = [function for function in GOOD if not function.endswith("_")]
LONG_EIGH, RISING = EIGH._replace(eigenvectors=2 * EIGH.eigenvectors), EIGH.eigenvalues.flip(-1)
NEGATIVE_EIGH, SECOND_GRAM = EIGH._replace(eigenvalues=-RISING), ROOT._replace(gram=2 * ROOT.gram)
BAD_BOUND, BAD_TRACE = brandla.Tracked(EIGH, ZERO * math.nan, ZERO), brandla.Tracked(ROOT, ZERO, ZERO * math.nan)
INDEFINITE, LARGE_INDEFINITE = (torch.diag(torch.linspace(-1, 1, n).double()) for n in (N, 200))
VALUE_CASES = [
    *(
        value_case(
            function, f"{argument} of {bad}", f"{argument} … finite … 1", **good | {argument: spoiled(value, bad)}
        )
        for function, good in GOOD.items()
        for argument, value in good.items()
        for bad in (math.nan, -math.inf)
        if function in WITHOUT_IN_PLACE and not isinstance(value, (int, float))
    ),
    *(
        value_case(function, f"{argument} {bad}", f"{argument} … {words}", **GOOD[function] | {argument: ZERO + bad})
        for patterns, bad, words in (
            ("*.decay *.weight *tail", -1, ">= 0 … -1"),
            ("*damping", 0, "> 0 … 0"),
            ("*.decay *.weight *tail *damping", math.nan, "finite"),
        )
        for function, argument in places(patterns)
        if function in WITHOUT_IN_PLACE
    ),
    value_case("eigh_update", "bound", "error_bound … finite", BAD_BOUND, COLUMNS),
    value_case("root_update", "trace", "trace … finite", BAD_TRACE, COLUMNS, compress="cholesky"),
    value_case("root_update", "F", "root.root … finite", ROOT._replace(root=spoiled(ROOT.root)), COLUMNS),
    value_case("kron_damped_solve", "Q", "Q … finite", EIGH, SMALL, (COLUMNS, spoiled(RIGHT)), 0.1, 0.1),
    value_case("kron_damped_logdet", "values", "values … finite", EIGH, SMALL, 0.1, values=spoiled(MATRIX[:4, :4])),
    value_case("damped_logdet", "diagonal", "diagonal … >= 0 … -", EIGH, 10.0, diagonal=-MATRIX.diagonal().abs()),
    value_case("eigh_update", "a long basis", "eigenvectors … orthonormal … orthonormalize", LONG_EIGH, COLUMNS),
    value_case("eigh_update", "ascending", "eigenvalues … descending", EIGH._replace(eigenvalues=RISING), COLUMNS),
    value_case("damped_solve", "negative values", "eigenvalues … >= 0", NEGATIVE_EIGH, RHS, 0.1),
    value_case("damped_solve", "another S", "gram … FᵀF … root.mT @ root", SECOND_GRAM, RHS, 0.1),
    value_case("svd_append", "a long basis", "svd.U … orthonormal", SVD._replace(U=2 * SVD.U), COLUMNS),
    value_case("randomized_eigh", "indefinite", "matrix … semi-definite … randomized_svd", INDEFINITE, 2),
    value_case("randomized_eigh", "indefinite, sketched", "semi-definite", LARGE_INDEFINITE, 2),
    value_case("randomized_eigh", "indefinite, no power", "semi-definite", LARGE_INDEFINITE, 2, power_iterations=0),
    value_case("randomized_eigh", "not symmetric", "matrix … symmetric … randomized_svd", MATRIX + MATRIX.triu(), 2),
]


@pytest.mark.parametrize(WITH_CASES, VALUE_CASES)
def test_checked_mode_refuses_bad_values_and_the_default_does_not(function, arguments, options, error, words):
    with unchanged(arguments, options), brandla.checked():
        assert_refused(function, arguments, options, error, words)
    getattr(brandla, function)(*arguments, **options)


@pytest.mark.parametrize("function", WITHOUT_IN_PLACE)
def test_checked_mode_changes_no_result_of_good_values(function):
    call = partial(getattr(brandla, function), **GOOD[function])
    numbers = {name: ZERO + 0.9 for name in signature(call).parameters if name in ("decay", "weight", "damping")}
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with brandla.checked(enabled=enabled):
            results.append(call(**numbers))
    assert_same(*results)


def test_checked_mode_nests_and_ends_with_its_block():
    bad = spoiled(COLUMNS)
    with brandla.checked():
        with brandla.checked(enabled=False):
            brandla.eigh_update(EIGH, bad)
        with pytest.raises(ValueError, match="finite"):
            brandla.eigh_update(EIGH, bad)
    with pytest.raises(KeyError, match="inside"), brandla.checked():
        raise KeyError("inside")
    brandla.eigh_update(EIGH, bad)


# --- Backends


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"backend: .*'torch' or 'triton'.*'cuda'"), brandla.backend("cuda"):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_triton_backend_that_cannot_run_explains_why():
    with pytest.raises(RuntimeError, match=r"backend: 'triton' cannot run: .*use 'torch'"), brandla.backend("triton"):
        pass
