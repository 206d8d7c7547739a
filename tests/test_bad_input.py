"""Every wrong input is refused before anything is computed, with the function, the rule, the values and the remedy."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

import brandla
from builders import make_columns, make_eigh, make_root, make_svd

Error = type[Exception]
Case = Any

N, R, K = 12, 4, 3
EIGH, ROOT, SVD = make_eigh(N, R), make_root(N, R), make_svd(N, 9, R)
EIGH32 = make_eigh(N, R, dtype=torch.float32)
BATCH = make_eigh(N, R, batch_shape=(3,))
COLUMNS, RIGHT, RHS, SHORT = make_columns(N, K), make_columns(9, K), make_columns(N, 2), make_columns(5, K)
TWO_BATCHES = make_columns(N, K, batch_shape=(2,))
ZERO, TWO, THREE = torch.tensor(0.0).double(), torch.ones(2).double(), torch.ones(3).double()
MATRIX = EIGH.dense()
KRON = (EIGH, make_eigh(9, R), make_columns(N, 9))
INTEGERS = torch.ones(N, K, dtype=torch.int64)
COMPLEX = torch.ones(N, K, dtype=torch.complex64)
ELSEWHERE = torch.ones(N, K, dtype=torch.float64, device="meta")
OTHER_FORM = {"LowRankEigh": ROOT, "LowRankRoot": EIGH}
RANDOMIZED = torch.svd_lowrank(make_columns(N, 9), 4)
WITH_V = brandla.LowRankSVD(*RANDOMIZED)
INTERLEAVED = ROOT._replace(root=COLUMNS.new_zeros(40).as_strided((N, R), (2, 2)))
HALF_EIGH = brandla.LowRankEigh(*(part.bfloat16() for part in EIGH))
STREAM, SHORTER = (brandla.centre(brandla.LowRankSVD.zeros(n, 0, 2)) for n in (N, 10))
FLOAT_MEANS = [STREAM._replace(mean=STREAM.mean.float())] * 2


class OperatorWithoutTranspose:
    """A linear operator that only multiplies from the left."""

    shape, dtype, device = (N, 9), torch.float64, torch.device("cpu")

    def __matmul__(self, block: torch.Tensor) -> torch.Tensor:
        """Return a product of the right shape."""
        return torch.ones(N, block.shape[1], dtype=torch.float64)


class OperatorOfWrongShape(OperatorWithoutTranspose):
    """A linear operator whose products do not have its shape."""

    shape = (N, N)

    @property
    def mT(self) -> OperatorOfWrongShape:  # noqa: N802
        """Return an operator whose products are as wrong."""
        return self

    def __matmul__(self, block: torch.Tensor) -> torch.Tensor:
        """Return a product with a row too many."""
        return torch.ones(N + 1, block.shape[1], dtype=torch.float64)


def case(function: str, name: str, error: Error, words: str, *arguments: Any, **options: Any) -> Case:
    """Return a call, its error, and what the message must hold, the values seen among it, with ` … ` between."""
    return pytest.param(function, arguments, options, error, words, id=f"{function}: {name}")


def update_cases(function: str, factor: Any, kind: str) -> list[Case]:
    """Return what both symmetric updates refuse."""

    def columns(name: str, words: str, error: Error, wrong: Any) -> Case:
        return case(function, name, error, f"columns … {words}", factor, wrong)

    def option(name: str, error: Error, words: str, **options: Any) -> Case:
        return case(function, name, error, words, factor, COLUMNS, **options)

    def old(name: str, error: Error, words: str, wrong: Any) -> Case:
        return case(function, name, error, words, wrong, COLUMNS)

    small = "gram" if isinstance(factor, brandla.LowRankRoot) else "eigenvalues"
    part = getattr(factor, small)
    tracked = brandla.track(factor)
    return [
        *(
            case(f"{function}_", f"tol {tol}", ValueError, "[0, 1)", factor, COLUMNS, tol=tol)
            for tol in (1.0, -0.1, math.nan)
        ),
        case(f"{function}_", "rows", ValueError, "columns … n = 12", factor, SHORT),
        case(f"{function}_", "decay", ValueError, "decay … >= 0", factor, COLUMNS, decay=-1),
        case(f"{function}_", "float32", TypeError, "columns … float64", factor, COLUMNS.float()),
        columns("rows", "n = 12 … (5, 3)", ValueError, SHORT),
        columns("samples as rows", "n = 12 … (3, 12) … pass columns.mT if samples are rows", ValueError, COLUMNS.mT),
        columns("a vector", "(12,) … pass columns[:, None] for one column", ValueError, THREE.new_ones(N)),
        columns("a numpy array", "Tensor … ndarray … torch.from_numpy", TypeError, COLUMNS.numpy()),
        columns("batch shape", "batch … (2,) … expand", ValueError, TWO_BATCHES),
        columns("integers", "int64 … float", TypeError, INTEGERS),
        columns("complex numbers", "complex64; take its .real and .imag", TypeError, COMPLEX),
        columns("booleans", "bool", TypeError, INTEGERS.bool()),
        columns("float32 beside float64", "float64 … float32", TypeError, COLUMNS.float()),
        columns("half beside float64", "float64 … bfloat16", TypeError, COLUMNS.bfloat16()),
        columns("elsewhere", "device … cpu … meta", ValueError, ELSEWHERE),
        columns("a list", "Tensor … list", TypeError, [[1.0]]),
        columns("a sparse batch", "sparse … (n, k); got (2, 12, 3); pass a list", ValueError, TWO_BATCHES.to_sparse()),
        option("rank above r + k", ValueError, "rank … 7 … n = 12, r = 4, k = 3 … got 8", rank=8),
        option("rank below 0", ValueError, "rank … got -1", rank=-1),
        option("rank as float", TypeError, "rank … int … float", rank=2.0),
        option("rank as bool", TypeError, "rank … bool", rank=True),
        option("negative decay", ValueError, "decay … >= 0 … -0.1", decay=-0.1),
        option("NaN decay", ValueError, "decay … nan", decay=math.nan),
        option("infinite weight", ValueError, "weight … inf", weight=math.inf),
        option("decay as text", TypeError, "decay … str", decay="0.9"),
        option("decay of a wrong shape", ValueError, "decay … batch shape () … (3,)", decay=THREE),
        option("integer decay tensor", TypeError, "decay … int64", decay=torch.tensor(1)),
        old("a dense matrix", TypeError, f"{kind} … Tensor … zeros", MATRIX),
        old("another form", TypeError, f"{kind} … {type(OTHER_FORM[kind]).__name__} … convert", OTHER_FORM[kind]),
        old("a plain tuple", TypeError, f"{kind} … tuple", tuple(factor)),
        old("nothing", TypeError, f"{kind} … NoneType", None),
        old("an SVD", TypeError, f"{kind} … LowRankSVD", SVD),
        old("half", TypeError, "float32 or float64 … bfloat16", type(factor)(*(each.bfloat16() for each in factor))),
        old("two dtypes", TypeError, f"{small} … float64 … float32", factor._replace(**{small: part.float()})),
        old("two devices", ValueError, f"{small} … device … meta", factor._replace(**{small: part.to("meta")})),
        old("two ranks", ValueError, f"{small} … 4 … 3", factor._replace(**{small: part[..., :3]})),
        old("bound's shape", ValueError, "error_bound … shape () … batch … (3,)", tracked._replace(error_bound=THREE)),
        old("bound's dtype", TypeError, "error_bound … float64 … float32", tracked._replace(error_bound=ZERO.float())),
        old("bound as a number", TypeError, "error_bound … float", tracked._replace(error_bound=0.0)),
        old("trace's shape", ValueError, "trace … shape () … batch shape … (3,)", tracked._replace(trace=THREE)),
        old("trace elsewhere", ValueError, "trace … device … meta", tracked._replace(trace=ZERO.to("meta"))),
        old("trace as a number", TypeError, "trace … float", tracked._replace(trace=0.0)),
    ]


def solve_cases(function: str, *more: Any) -> list[Case]:
    """Return what damped_solve and damped_power refuse."""

    def refuse(name: str, error: Error, words: str, of: Any, rhs: Any, damping: Any, **options: Any) -> Case:
        return case(function, name, error, words, of, rhs, damping, *more, **options)

    return [
        refuse("zero damping", ValueError, "damping … > 0 … got 0", EIGH, RHS, 0),
        refuse("negative damping", ValueError, "damping … > 0 … -0.5", ROOT, RHS, -0.5),
        refuse("NaN damping", ValueError, "damping … nan", EIGH, RHS, math.nan),
        refuse("infinite damping", ValueError, "damping … inf", EIGH, RHS, math.inf),
        refuse("damping as text", TypeError, "damping … str", EIGH, RHS, "0.1"),
        refuse("no damping", TypeError, "damping … NoneType", EIGH, RHS, None),
        refuse("damping of a wrong shape", ValueError, "damping … batch shape (3,) … (2,)", BATCH, RHS, TWO),
        refuse("damping elsewhere", ValueError, "damping … meta", EIGH, RHS, torch.ones((), device="meta")),
        refuse("negative tail", ValueError, "tail … >= 0 … -1", EIGH, RHS, 0.1, tail=-1),
        refuse("unknown tail", ValueError, "tail … 'smallest' … 'mean' … 'largest'", EIGH, RHS, 0.1, tail="largest"),
        refuse("untracked", ValueError, "tail='mean' … Tracked … brandla.track", ROOT, RHS, 0.1, tail="mean"),
        refuse("tail as None", TypeError, "tail … NoneType", EIGH, RHS, 0.1, tail=None),
        refuse("rows", ValueError, "rhs … n = 12 … (5, 3)", EIGH, SHORT, 0.1),
        refuse("a scalar", ValueError, "rhs … n = 12", EIGH, ZERO, 0.1),
        refuse("batch shape", ValueError, "rhs … (3,) … (2,)", BATCH, TWO_BATCHES, 0.1),
        refuse("integer rhs", TypeError, "rhs … int64", EIGH, INTEGERS, 0.1),
        refuse("complex rhs", TypeError, "rhs … complex64", EIGH, COMPLEX, 0.1),
        refuse("float32 rhs", TypeError, "rhs … float64 … float32", EIGH, RHS.float(), 0.1),
        refuse("rhs elsewhere", ValueError, "rhs … meta", EIGH, ELSEWHERE, 0.1),
        refuse("an SVD", TypeError, "LowRankEigh or a LowRankRoot … LowRankSVD", SVD, RHS, 0.1),
        refuse("a dense matrix", TypeError, "LowRankEigh or a LowRankRoot … Tensor", MATRIX, RHS, 0.1),
        refuse("half factor", TypeError, "float32 or float64 … bfloat16", HALF_EIGH, RHS, 0.1),
    ]


def diagonal_cases(function: str, *more: Any) -> list[Case]:
    """Return what is refused for a diagonal."""

    def refuse(name: str, error: Error, words: str, diagonal: Any) -> Case:
        return case(function, f"diagonal: {name}", error, f"diagonal … {words}", EIGH, *more, 0.1, diagonal=diagonal)

    return [
        refuse("length", ValueError, "(12,) … (3,)", THREE),
        refuse("a matrix", ValueError, "(12,) … (12, 12)", MATRIX),
        refuse("a number", TypeError, "Tensor … float", 0.1),
        refuse("float32", TypeError, "float64 … float32", MATRIX[0].float()),
        refuse("elsewhere", ValueError, "meta", ELSEWHERE[:, 0]),
    ]


def joint_cases(function: str, *more: Any) -> list[Case]:
    """Return what the functions of a product with one damping refuse besides what is not of its factors."""
    left, right, _ = KRON

    def refuse(name: str, error: Error, words: str, damping: Any = 0.1, of: Any = KRON[:2], **options: Any) -> Case:
        exponent = [-1.0] * len(more)
        return case(function, name, error, words, *of, *more, damping, *exponent, **options)

    return [
        refuse("zero damping", ValueError, "damping … > 0 … got 0", 0),
        refuse("damping of a wrong shape", ValueError, "damping … batch shape () … (2,)", TWO),
        refuse("negative tail", ValueError, "left_tail … -1", left_tail=-1),
        refuse("unknown tail", ValueError, "right_tail … 'x'", right_tail="x"),
        refuse("untracked", ValueError, "right_tail='mean' … Tracked", right_tail="mean"),
        refuse("factors of two dtypes", TypeError, "float64 … float32", of=(EIGH32, right)),
        refuse("an SVD", TypeError, "right … LowRankSVD", of=(left, SVD)),
        refuse("values of a wrong shape", ValueError, "values … (4, 4) … (4, 3)", values=COLUMNS[:4]),
        refuse("values in float32", TypeError, "values … float64 … float32", values=MATRIX[:4, :4].float()),
    ]


def randomized_cases(function: str) -> list[Case]:
    """Return what both randomized decompositions refuse."""
    refuse = partial(case, function)
    return [
        refuse("rank above n", ValueError, "rank … at most 12 … got 13", MATRIX, 13),
        refuse("rank 0", ValueError, "rank … got 0", MATRIX, 0),
        refuse("rank as float", TypeError, "rank … int … float", MATRIX, 2.0),
        refuse("negative oversample", ValueError, "oversample … got -1", MATRIX, 2, oversample=-1),
        refuse("oversample as float", TypeError, "oversample … float", MATRIX, 2, oversample=1.5),
        refuse("negative powers", ValueError, "power_iterations … got -1", MATRIX, 2, power_iterations=-1),
        refuse("a vector", ValueError, "matrix … (12,)", MATRIX[0], 2),
        refuse("integers", TypeError, "matrix … int64 … float", INTEGERS[:3], 2),
        refuse("complex numbers", TypeError, "matrix … complex64", COMPLEX[:3], 2),
        refuse("a list", TypeError, "matrix … list … shape, dtype, device", [[1.0]], 1),
        refuse("an operator of wrong products", ValueError, "(12, 12) … (13, 12)", OperatorOfWrongShape(), 2),
    ]


def zeros_cases(kind: str, *sizes: int) -> list[Case]:
    """Return what the constructors of zeros refuse."""
    refuse = partial(case, f"{kind}.zeros")
    bad = {"bfloat16": torch.bfloat16, "float16": torch.float16, "int64": torch.int64, "complex64": torch.complex64}
    dtypes = (
        refuse(name, TypeError, f"dtype … float32 or float64 … got {name}; ", *sizes, 2, dtype=dtype)
        for name, dtype in bad.items()
    )
    return [
        *dtypes,
        refuse("rank above n", ValueError, "5 … got 6", *sizes, 6),
        refuse("rank below 0", ValueError, "got -1", *sizes, -1),
        refuse("rank as float", TypeError, "float", *sizes, 2.0),
    ]


def kron_cases() -> list[Case]:
    """Return what kron_damped_solve refuses."""

    def refuse(name: str, error: Error, words: str, data: Any, *damping: Any, of: Any = KRON[:2], **tails: Any) -> Case:
        return case("kron_damped_solve", name, error, words, *of, data, *(damping or (0.1, 0.1)), **tails)

    left, right, matrix = KRON
    two_batches = make_eigh(9, R, batch_shape=(2,))
    return [
        refuse("shape", ValueError, "matrix … 12, 9 … (9, 12)", matrix.mT),
        refuse("a vector", ValueError, "matrix … (12,)", matrix[:, 0]),
        refuse("zero left damping", ValueError, "left_damping … > 0", matrix, 0.0, 0.1),
        refuse("negative right damping", ValueError, "right_damping … -1", matrix, 0.1, -1),
        refuse("negative left tail", ValueError, "left_tail … -1", matrix, left_tail=-1),
        refuse("unknown right tail", ValueError, "right_tail … 'x'", matrix, right_tail="x"),
        refuse("rows of P", ValueError, "(P, Q) … 12 … (5, 3)", (SHORT, RIGHT)),
        refuse("rows of Q", ValueError, "(P, Q) … 9 … (5, 3)", (COLUMNS, SHORT)),
        refuse("widths of P and Q", ValueError, "columns … 3 and 2", (COLUMNS, RIGHT[:, :2])),
        refuse("three tensors", TypeError, "pair … tuple", (COLUMNS, RIGHT, RIGHT)),
        refuse("a number", TypeError, "pair … float", 1.0),
        refuse("integers", TypeError, "matrix … int64", matrix.long()),
        refuse("factors of two dtypes", TypeError, "float64 … float32", matrix, of=(EIGH32, right)),
        refuse("an SVD", TypeError, "right … LowRankSVD", matrix, of=(left, SVD)),
        refuse("two batches", ValueError, "right … left's, (3,); got (2,)", matrix, of=(BATCH, two_batches)),
    ]


VECTOR_ROOT = brandla.LowRankRoot(COLUMNS[:, 0], ROOT.gram)
WIDE = make_columns(N, N + 1)
wide = brandla.LowRankEigh(THREE.new_ones(N), EIGH.eigenvectors.mT)
CASES = [
    *update_cases("eigh_update", EIGH, "LowRankEigh"),
    *update_cases("root_update", ROOT, "LowRankRoot"),
    case("eigh_update", "a wide basis", ValueError, "eigenvectors … r = 12 > n = 4", wide, EIGH.eigenvectors.mT),
    case("root_update", "a vector for F", ValueError, "root.root … (12,)", VECTOR_ROOT, COLUMNS),
    case("root_update", "unknown compression", ValueError, "compress … 'qr'", ROOT, COLUMNS, compress="qr"),
    case("root_update", "no compression", ValueError, "compress … 'eigh' … None", ROOT, COLUMNS, compress=None),
    case("root_update_", "unknown compression", ValueError, "compress … 'qr'", ROOT, COLUMNS, compress="qr"),
    case("eigh_update", "a rule", ValueError, "rank … 7 … got 8", EIGH, COLUMNS, rank=brandla.Rank(max=8, tol=0.1)),
    case("Rank", "max 0", ValueError, "max … got 0", 0, 0.1),
    case("Rank", "max as float", TypeError, "max … float", 2.5, 0.1),
    case("Rank", "tolerance 1", ValueError, "tol … got 1.0", 4, 1.0),
    case("Rank", "tolerance below 0", ValueError, "tol … got -0.1", 4, -0.1),
    case("root_update_", "interleaved", ValueError, "root.root … share memory", INTERLEAVED, COLUMNS),
    case("root_update_", "a gradient", RuntimeError, "columns … no_grad", ROOT, COLUMNS.clone().requires_grad_()),
    case("root_update", "shrink", ValueError, "shrink … 'cholesky'", ROOT, COLUMNS, compress="cholesky", shrink=True),
    case("eigh_downdate", "rows", ValueError, "columns … n = 12 … (9, 3)", EIGH, RIGHT),
    case("eigh_downdate", "weight", ValueError, "weight … >= 0 … -1", EIGH, COLUMNS, weight=-1),
    case("eigh_downdate", "a tracked factor", TypeError, "LowRankEigh … Tracked", brandla.track(EIGH), COLUMNS),
    case("eigh_refresh", "rows", ValueError, "matrix … n = 12 … (9, 3)", EIGH, RIGHT),
    case("eigh_refresh", "batch shape", ValueError, "matrix … (3,) … (2,)", BATCH, TWO_BATCHES),
    case("eigh_refresh", "float32", TypeError, "matrix … float64 … float32", EIGH, COLUMNS.float()),
    case("eigh_refresh", "no iteration", ValueError, "iterations … at least 1 … 0", EIGH, COLUMNS, iterations=0),
    case("eigh_refresh", "decay", ValueError, "decay … -1", EIGH, COLUMNS, decay=-1),
    case("eigh_refresh", "an SVD", TypeError, "LowRankEigh … LowRankSVD", SVD, COLUMNS),
    case("eigh_refresh", "a vector", ValueError, "matrix … (12,)", EIGH, COLUMNS[:, 0]),
    case("eigh_refresh", "operator of a batch", ValueError, "12 rows … (3, 12, 4)", BATCH, OperatorWithoutTranspose()),
    case("eigh_refresh", "no transpose", TypeError, "mT … OperatorWithoutTranspose", EIGH, OperatorWithoutTranspose()),
    case("randomized_eigh", "a list for a start", TypeError, "start … Tensor … list", MATRIX, 2, start=[1.0]),
    case("randomized_eigh", "start of other rows", ValueError, "start … (12, s) … (9, 3)", MATRIX, 2, start=RIGHT),
    case("randomized_eigh", "a wide start", ValueError, "start … r = 13 > n = 12", MATRIX, 2, start=WIDE),
    case("orthonormalize", "a vector", ValueError, "panel … (..., n, k) … (12,)", COLUMNS[:, 0]),
    case("orthonormalize", "integers", TypeError, "panel … int64 … .float()", INTEGERS),
    case("orthonormalize", "complex numbers", TypeError, "panel … complex64", COMPLEX),
    case("orthonormalize", "a list", TypeError, "panel … Tensor … list", [[1.0]]),
    case("orthonormalize", "an eigh", TypeError, "panel … Tensor … LowRankEigh", EIGH),
    case("svd_update", "rows of left", ValueError, "left … n = 12 … (9, 3)", SVD, RIGHT, RIGHT),
    case("svd_update", "rows of right", ValueError, "right … n = 9 … (12, 3)", SVD, COLUMNS, COLUMNS),
    case("svd_update", "widths", ValueError, "left and right … 3 and 2", SVD, COLUMNS, RIGHT[:, :2]),
    case("svd_update", "rank", ValueError, "rank … m = 12, n = 9, r = 4, k = 3 … 8", SVD, COLUMNS, RIGHT, rank=8),
    case("svd_update", "decay", ValueError, "decay … -1", SVD, COLUMNS, RIGHT, decay=-1),
    case("svd_update", "integers", TypeError, "left … int64", SVD, INTEGERS, RIGHT),
    case("svd_update", "dtypes", TypeError, "right … float64 … float32", SVD, COLUMNS, RIGHT.float()),
    case("svd_update", "an eigh", TypeError, "LowRankSVD … LowRankEigh", EIGH, COLUMNS, RIGHT),
    case("svd_append", "a tuple", TypeError, "LowRankSVD(U, S, Vh); torch.svd_lowrank … V", RANDOMIZED, COLUMNS),
    case("svd_append", "V for Vh", ValueError, "Vh … (4, 4) … V … .mT … (9, 4)", WITH_V, COLUMNS),
    case("svd_append", "an eigh", TypeError, "LowRankEigh; convert it with LowRankSVD(U, d, U.mT)", EIGH, COLUMNS),
    case("svd_append", "samples as rows", ValueError, "pass columns.mT if samples are rows", SVD, COLUMNS.mT),
    case("svd_append", "rows", ValueError, "columns … n = 12 … (9, 3)", SVD, RIGHT),
    case("svd_append", "rank", ValueError, "rank … m = 12, r = 4, k = 3 … 8", SVD, COLUMNS, rank=8),
    case("svd_append", "complex numbers", TypeError, "columns … complex64", SVD, COMPLEX),
    case("svd_append", "a dense matrix", TypeError, "LowRankSVD … Tensor", MATRIX, COLUMNS),
    *randomized_cases("randomized_eigh"),
    *randomized_cases("randomized_svd"),
    case("randomized_eigh", "a rectangle", ValueError, "square … (12, 3) … randomized_svd", COLUMNS, 2),
    case("randomized_svd", "no transpose", TypeError, "mT … OperatorWithoutTranspose", OperatorWithoutTranspose(), 2),
    *solve_cases("damped_solve"),
    *solve_cases("damped_power", -0.5),
    case("damped_power", "exponent as text", TypeError, "exponent … str", EIGH, RHS, 0.1, "-1/2"),
    case("damped_power", "infinite exponent", ValueError, "exponent … inf", EIGH, RHS, 0.1, math.inf),
    *diagonal_cases("damped_solve", RHS),
    *diagonal_cases("damped_logdet"),
    case(
        "damped_power", "diagonal", ValueError, "diagonal … None … damped_solve", EIGH, RHS, 0.1, -1, diagonal=MATRIX[0]
    ),
    case("damped_logdet", "zero damping", ValueError, "damping … > 0 … got 0", EIGH, 0),
    case("damped_logdet", "an SVD", TypeError, "LowRankEigh or a LowRankRoot … LowRankSVD", SVD, 0.1),
    *kron_cases(),
    *joint_cases("kron_damped_power", KRON[2]),
    *joint_cases("kron_damped_logdet"),
    case("kron_damped_power", "shape", ValueError, "matrix … 12, 9 … (9, 12)", *KRON[:2], KRON[2].mT, 0.1, -1),
    case("kron_damped_power", "a pair", TypeError, "(P, Q) … P @ Q.mT", *KRON[:2], (COLUMNS, RIGHT), 0.1, -1),
    case("kron_damped_power", "exponent as text", TypeError, "exponent … str", *KRON, 0.1, "-1/2"),
    *zeros_cases("LowRankEigh", 5),
    *zeros_cases("LowRankRoot", 5),
    *zeros_cases("LowRankSVD", 5, 8),
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


def assert_refused(function: str, arguments: Any, options: dict[str, Any], error: Error, words: str) -> None:
    """Check that a call raises just this error, and what the message says."""
    with pytest.raises(error) as caught:
        attrgetter(function)(brandla)(*arguments, **options)
    message = str(caught.value)
    assert type(caught.value) is error
    assert message.startswith(f"{function}: ")
    assert [word for word in words.split(" … ") if word not in message] == []


@pytest.mark.parametrize(WITH_CASES, CASES)
def test_wrong_input_is_refused_in_words(
    function: str, arguments: Any, options: dict[str, Any], error: Error, words: str, unchanged: Callable[..., Any]
) -> None:
    parts = (part for part in tree_leaves((arguments, options)) if isinstance(part, torch.Tensor))
    with unchanged([part for part in parts if not (part.is_meta or part.is_sparse)]):
        assert_refused(function, arguments, options, error, words)


def test_numpy_numbers_are_numbers() -> None:
    plain = brandla.eigh_update(EIGH, COLUMNS, decay=0.5, weight=2.0, rank=3)
    result = brandla.eigh_update(EIGH, COLUMNS, decay=np.float32(0.5), weight=np.float64(2), rank=np.int64(3))
    assert all(torch.equal(a, b) for a, b in zip(plain, result, strict=True))
    assert brandla.LowRankRoot.zeros(5, np.int64(2)).rank == brandla.randomized_svd(MATRIX, np.int64(2)).rank == 2
    assert brandla.Rank(np.int32(3), np.float32(0.5)).max == 3
    assert torch.equal(brandla.damped_solve(EIGH, RHS, np.float32(0.5)), brandla.damped_solve(EIGH, RHS, 0.5))
    power = brandla.damped_power(EIGH, RHS, 0.5, np.float32(-0.5))
    assert torch.equal(power, brandla.damped_power(EIGH, RHS, 0.5, -0.5))


# ---------------------------------------------------------------------------------------------------------------------
# Values: looked at in checked mode alone
# ---------------------------------------------------------------------------------------------------------------------


def spoiled(value: Any, bad: float = math.nan) -> Any:
    """Return a copy with one bad entry in the last tensor."""
    if isinstance(value, torch.Tensor):
        copy = value.clone()
        copy.view(-1)[-1] = bad
        return copy
    *rest, last = value
    return type(value)(*rest, spoiled(last.contiguous(), bad))


def value_case(function: str, name: str, words: str, *arguments: Any, **options: Any) -> Case:
    return case(function, name, ValueError, words, *arguments, **options)


below = -MATRIX.diagonal().abs()
bad_bound, bad_trace = brandla.Tracked(EIGH, ZERO * math.nan, ZERO), brandla.Tracked(ROOT, ZERO, ZERO * math.nan)
LONG_EIGH = EIGH._replace(eigenvectors=2 * EIGH.eigenvectors)
RISING = EIGH.eigenvalues.flip(-1)
INDEFINITE, LARGE_INDEFINITE = (torch.diag(torch.linspace(-1, 1, n).double()) for n in (N, 200))
VALUE_CASES = [
    value_case("damped_logdet", "diagonal", "diagonal … >= 0 … -", EIGH, 10.0, diagonal=below),
    value_case("kron_damped_logdet", "values", "values … finite", *KRON[:2], 0.1, values=spoiled(MATRIX[:4, :4])),
    value_case("eigh_update", "columns", "columns … finite … 1 … (12, 3)", EIGH, spoiled(COLUMNS)),
    value_case("eigh_update", "factor", "eigenvectors … finite", spoiled(EIGH, math.inf), COLUMNS),
    value_case("eigh_update", "decay", "decay … >= 0 … -1", EIGH, COLUMNS, decay=ZERO - 1),
    value_case("eigh_update", "bound", "error_bound … finite", bad_bound, COLUMNS),
    value_case("root_update", "columns", "columns … finite", ROOT, spoiled(COLUMNS, -math.inf)),
    value_case("root_update", "S", "root.gram … finite", spoiled(ROOT), COLUMNS),
    value_case("root_update", "F", "root.root … finite", ROOT._replace(root=spoiled(ROOT.root)), COLUMNS),
    value_case("root_update", "weight", "weight … >= 0 … -1", ROOT, COLUMNS, weight=ZERO - 1),
    value_case("root_update", "trace", "trace … finite", bad_trace, COLUMNS, compress="cholesky"),
    value_case("eigh_refresh", "matrix", "matrix … finite … 1", EIGH, spoiled(COLUMNS)),
    value_case("eigh_downdate", "columns", "columns … finite … 1", EIGH, spoiled(COLUMNS)),
    value_case("orthonormalize", "panel", "panel … finite … 1 … (12, 3)", spoiled(COLUMNS)),
    value_case("damped_solve", "S", "gram … finite", spoiled(ROOT), RHS, 0.1),
    value_case("svd_update", "right", "right … finite", SVD, COLUMNS, spoiled(RIGHT)),
    value_case("svd_update", "factor", "Vh … finite", spoiled(SVD), COLUMNS, RIGHT),
    value_case("svd_append", "columns", "columns … finite", SVD, spoiled(COLUMNS)),
    value_case("randomized_eigh", "matrix", "matrix … finite", spoiled(MATRIX), 2),
    value_case("randomized_svd", "matrix", "matrix … finite", spoiled(MATRIX), 2),
    value_case("damped_solve", "rhs", "rhs … finite", EIGH, spoiled(RHS), 0.1),
    value_case("damped_solve", "factor", "finite", spoiled(EIGH), RHS, 0.1),
    value_case("damped_solve", "damping", "damping … > 0 … 0", EIGH, RHS, ZERO),
    value_case("damped_solve", "tail", "tail … >= 0 … -1", EIGH, RHS, 0.1, tail=ZERO - 1),
    value_case("damped_power", "NaN damping", "damping … finite", EIGH, RHS, ZERO * math.nan, -0.5),
    value_case("kron_damped_solve", "matrix", "matrix … finite", *KRON[:2], spoiled(KRON[2]), 0.1, 0.1),
    value_case("kron_damped_solve", "Q", "Q … finite", *KRON[:2], (COLUMNS, spoiled(RIGHT)), 0.1, 0.1),
    value_case("eigh_update", "a long basis", "eigenvectors … orthonormal … orthonormalize", LONG_EIGH, COLUMNS),
    value_case("eigh_update", "ascending", "eigenvalues … descending", EIGH._replace(eigenvalues=RISING), COLUMNS),
    value_case("damped_solve", "negative values", "eigenvalues … >= 0", EIGH._replace(eigenvalues=-RISING), RHS, 0.1),
    value_case("damped_solve", "another S", "gram … FᵀF … root.mT @ root", ROOT._replace(gram=2 * ROOT.gram), RHS, 0.1),
    value_case("svd_append", "a long basis", "svd.U … orthonormal", SVD._replace(U=2 * SVD.U), COLUMNS),
    value_case("randomized_eigh", "indefinite", "matrix … semi-definite … randomized_svd", INDEFINITE, 2),
    value_case("randomized_eigh", "indefinite, sketched", "semi-definite", LARGE_INDEFINITE, 2),
    value_case("randomized_eigh", "indefinite, no power", "semi-definite", LARGE_INDEFINITE, 2, power_iterations=0),
    value_case("randomized_eigh", "not symmetric", "matrix … symmetric … randomized_svd", MATRIX + MATRIX.triu(), 2),
    value_case("kron_damped_solve", "damping", "right_damping … > 0", *KRON, 0.1, ZERO),
]


@pytest.mark.parametrize(WITH_CASES, VALUE_CASES)
def test_checked_mode_refuses_bad_values_and_the_default_lets_them_pass(
    function: str, arguments: Any, options: dict[str, Any], error: Error, words: str, unchanged: Callable[..., Any]
) -> None:
    with unchanged(arguments, options), brandla.checked():
        assert_refused(function, arguments, options, error, words)
    getattr(brandla, function)(*arguments, **options)


def test_checked_mode_lets_good_values_pass_and_changes_none() -> None:
    plain = brandla.eigh_update(EIGH, COLUMNS, decay=torch.tensor(0.9).double())
    with brandla.checked():
        checked = brandla.eigh_update(EIGH, COLUMNS, decay=torch.tensor(0.9).double())
        brandla.damped_solve(EIGH, RHS, torch.tensor(0.1).double(), tail="smallest")
        brandla.damped_solve(brandla.track(ROOT), RHS, torch.tensor(0.1).double(), tail="mean")
        brandla.root_update(brandla.track(ROOT), COLUMNS, compress="cholesky")
        brandla.orthonormalize(COLUMNS)
    assert all(torch.equal(a, b) for a, b in zip(plain, checked, strict=True))


def test_checked_mode_nests_and_ends_with_its_block() -> None:
    bad = spoiled(COLUMNS)
    message = "inside"
    with brandla.checked():
        with brandla.checked(enabled=False):
            brandla.eigh_update(EIGH, bad)
        with pytest.raises(ValueError, match="finite"):
            brandla.eigh_update(EIGH, bad)
    with pytest.raises(KeyError, match=message), brandla.checked():
        raise KeyError(message)
    brandla.eigh_update(EIGH, bad)


# ---------------------------------------------------------------------------------------------------------------------
# Backends
# ---------------------------------------------------------------------------------------------------------------------


def test_torch_backend_gives_the_same_and_ends_with_its_block() -> None:
    with brandla.backend("torch"):
        forced = brandla.eigh_update(EIGH, COLUMNS)
    assert all(torch.equal(a, b) for a, b in zip(forced, brandla.eigh_update(EIGH, COLUMNS), strict=True))


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"backend: .*'torch' or 'triton'.*'cuda'"), brandla.backend("cuda"):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens on a machine with no GPU")
def test_triton_backend_that_cannot_run_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"backend: 'triton' cannot run: .*use 'torch'"), brandla.backend("triton"):
        pass
