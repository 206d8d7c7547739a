"""Every wrong input is refused before anything is computed, with the function, the rule, the values and the remedy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import brandla
from builders import make_columns, make_eigh, make_root, make_svd

Error = type[Exception]
Case = Any

N, R, K = 12, 4, 3
EIGH, ROOT, SVD = make_eigh(N, R), make_root(N, R), make_svd(N, 9, R)
EIGH32 = make_eigh(N, R, dtype=torch.float32)
BATCH = make_eigh(N, R, batch_shape=(3,))
COLUMNS, RIGHT, RHS = make_columns(N, K), make_columns(9, K), make_columns(N, 2)
TWO_BATCHES, THREE_NUMBERS = make_columns(N, K, batch_shape=(2,)), torch.ones(3, dtype=torch.float64)
MATRIX = EIGH.dense()
KRON = (EIGH, make_eigh(9, R), make_columns(N, 9))
INTEGERS = torch.ones(N, K, dtype=torch.int64)
COMPLEX = torch.ones(N, K, dtype=torch.complex64)
EXPANDED = brandla.LowRankRoot(COLUMNS[:, :1].expand(N, R), ROOT.gram)
ELSEWHERE = torch.ones(N, K, dtype=torch.float64, device="meta")
HALF_EIGH = brandla.LowRankEigh(*(part.bfloat16() for part in EIGH))


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


def case(name: str, function: str, error: Error, fragments: list[str], *arguments: Any, **options: Any) -> Case:
    """Return a call and the words its message must hold, the values seen among them."""
    return pytest.param(function, arguments, options, error, fragments, id=f"{function}: {name}")


def update_cases(function: str, factor: Any, kind: str) -> list[Case]:
    """Return what both symmetric updates refuse."""

    def refuse(name: str, error: Error, fragments: list[str], *arguments: Any, **options: Any) -> Case:
        return case(name, function, error, fragments, *(arguments or (factor, COLUMNS)), **options)

    same, small = type(factor), "gram" if isinstance(factor, brandla.LowRankRoot) else "eigenvalues"
    part = getattr(factor, small)
    half = same(*(each.bfloat16() for each in factor))
    bound, trace = brandla.track(factor)[1:]
    return [
        refuse("rows", ValueError, ["columns", "n = 12", "(5, 3)"], factor, make_columns(5, K)),
        refuse("a vector", ValueError, ["columns", "(12,)"], factor, torch.ones(N, dtype=torch.float64)),
        refuse(
            "batch shape",
            ValueError,
            ["columns", "batch", "(2,)", "expand"],
            factor,
            TWO_BATCHES,
        ),
        refuse("rank above r + k", ValueError, ["rank", "7", "n = 12, r = 4, k = 3", "got 8"], rank=8),
        refuse("rank below 0", ValueError, ["rank", "got -1"], rank=-1),
        refuse("rank as float", TypeError, ["rank", "int", "float"], rank=2.0),
        refuse("rank as bool", TypeError, ["rank", "bool"], rank=True),
        refuse("negative decay", ValueError, ["decay", ">= 0", "-0.1"], decay=-0.1),
        refuse("NaN decay", ValueError, ["decay", "nan"], decay=math.nan),
        refuse("infinite weight", ValueError, ["weight", "inf"], weight=math.inf),
        refuse("decay as text", TypeError, ["decay", "str"], decay="0.9"),
        refuse("decay of a wrong shape", ValueError, ["decay", "batch shape ()", "(3,)"], decay=THREE_NUMBERS),
        refuse("integer decay tensor", TypeError, ["decay", "int64"], decay=torch.tensor(1)),
        refuse("integer columns", TypeError, ["columns", "int64", "float"], factor, INTEGERS),
        refuse("complex columns", TypeError, ["columns", "complex64"], factor, COMPLEX),
        refuse("boolean columns", TypeError, ["columns", "bool"], factor, INTEGERS.bool()),
        refuse(
            "float32 columns, float64 factor", TypeError, ["columns", "float64", "float32"], factor, COLUMNS.float()
        ),
        refuse(
            "half columns, float64 factor", TypeError, ["columns", "float64", "bfloat16"], factor, COLUMNS.bfloat16()
        ),
        refuse("columns elsewhere", ValueError, ["columns", "device", "cpu", "meta"], factor, ELSEWHERE),
        refuse("columns as a list", TypeError, ["columns", "Tensor", "list"], factor, [[1.0]]),
        refuse("a dense matrix", TypeError, [kind, "Tensor", "zeros"], MATRIX, COLUMNS),
        refuse("nothing", TypeError, [kind, "NoneType"], None, COLUMNS),
        refuse(
            "half factor",
            TypeError,
            ["float32 or float64", "bfloat16"],
            half,
            COLUMNS,
        ),
        refuse(
            "factor of two dtypes",
            TypeError,
            [small, "float64", "float32"],
            factor._replace(**{small: part.float()}),
            COLUMNS,
        ),
        refuse(
            "factor on two devices",
            ValueError,
            [small, "device", "meta"],
            factor._replace(**{small: part.to("meta")}),
            COLUMNS,
        ),
        refuse(
            "factor of two ranks", ValueError, [small, "4", "3"], factor._replace(**{small: part[..., :3]}), COLUMNS
        ),
        refuse(
            "bound of a wrong shape",
            ValueError,
            ["error_bound", "shape ()", "batch shape", "(3,)"],
            brandla.Tracked(factor, THREE_NUMBERS, trace),
            COLUMNS,
        ),
        refuse(
            "bound of another dtype",
            TypeError,
            ["error_bound", "float64", "float32"],
            brandla.Tracked(factor, bound.float(), trace),
            COLUMNS,
        ),
        refuse(
            "trace of a wrong shape",
            ValueError,
            ["trace", "shape ()", "batch shape", "(3,)"],
            brandla.Tracked(factor, bound, THREE_NUMBERS),
            COLUMNS,
        ),
        refuse(
            "trace elsewhere",
            ValueError,
            ["trace", "device", "meta"],
            brandla.Tracked(factor, bound, trace.to("meta")),
            COLUMNS,
        ),
        refuse("bound as a number", TypeError, ["error_bound", "float"], brandla.Tracked(factor, 0.0, trace), COLUMNS),
        refuse("trace as a number", TypeError, ["trace", "float"], brandla.Tracked(factor, bound, 0.0), COLUMNS),
        refuse("an SVD", TypeError, [kind, "LowRankSVD"], SVD, COLUMNS),
    ]


def solve_cases(function: str, *more: Any) -> list[Case]:
    """Return what damped_solve and damped_power refuse."""

    def refuse(
        name: str, error: Error, fragments: list[str], lowrank: Any, rhs: Any, damping: Any, **options: Any
    ) -> Case:
        return case(name, function, error, fragments, lowrank, rhs, damping, *more, **options)

    return [
        refuse("zero damping", ValueError, ["damping", "> 0", "got 0"], EIGH, RHS, 0),
        refuse("negative damping", ValueError, ["damping", "> 0", "-0.5"], ROOT, RHS, -0.5),
        refuse("NaN damping", ValueError, ["damping", "nan"], EIGH, RHS, math.nan),
        refuse("infinite damping", ValueError, ["damping", "inf"], EIGH, RHS, math.inf),
        refuse("damping as text", TypeError, ["damping", "str"], EIGH, RHS, "0.1"),
        refuse("no damping", TypeError, ["damping", "NoneType"], EIGH, RHS, None),
        refuse(
            "damping of a wrong shape",
            ValueError,
            ["damping", "batch shape (3,)", "(2,)"],
            BATCH,
            RHS,
            torch.ones(2).double(),
        ),
        refuse("damping elsewhere", ValueError, ["damping", "meta"], EIGH, RHS, torch.ones((), device="meta")),
        refuse("negative tail", ValueError, ["tail", ">= 0", "-1"], EIGH, RHS, 0.1, tail=-1),
        refuse(
            "unknown tail", ValueError, ["tail", "'smallest'", "'mean'", "'largest'"], EIGH, RHS, 0.1, tail="largest"
        ),
        refuse("a mean of nothing tracked", ValueError, ["tail", "'mean'", "Tracked"], EIGH, RHS, 0.1, tail="mean"),
        refuse("tail as None", TypeError, ["tail", "NoneType"], EIGH, RHS, 0.1, tail=None),
        refuse("rows", ValueError, ["rhs", "n = 12", "(5, 2)"], EIGH, make_columns(5, 2), 0.1),
        refuse("a scalar", ValueError, ["rhs", "n = 12"], EIGH, torch.tensor(1.0).double(), 0.1),
        refuse("batch shape", ValueError, ["rhs", "(3,)", "(2,)"], BATCH, TWO_BATCHES, 0.1),
        refuse("integer rhs", TypeError, ["rhs", "int64"], EIGH, INTEGERS, 0.1),
        refuse("complex rhs", TypeError, ["rhs", "complex64"], EIGH, COMPLEX, 0.1),
        refuse("float32 rhs", TypeError, ["rhs", "float64", "float32"], EIGH, RHS.float(), 0.1),
        refuse("rhs elsewhere", ValueError, ["rhs", "meta"], EIGH, ELSEWHERE, 0.1),
        refuse("an SVD", TypeError, ["LowRankEigh or a LowRankRoot", "LowRankSVD"], SVD, RHS, 0.1),
        refuse("a dense matrix", TypeError, ["LowRankEigh or a LowRankRoot", "Tensor"], MATRIX, RHS, 0.1),
        refuse("half factor", TypeError, ["float32 or float64", "bfloat16"], HALF_EIGH, RHS, 0.1),
    ]


def randomized_cases(function: str) -> list[Case]:
    """Return what both randomized decompositions refuse."""

    def refuse(name: str, error: Error, fragments: list[str], *arguments: Any, **options: Any) -> Case:
        return case(name, function, error, fragments, *arguments, **options)

    return [
        refuse("rank above n", ValueError, ["rank", "at most 12", "got 13"], MATRIX, 13),
        refuse("rank 0", ValueError, ["rank", "got 0"], MATRIX, 0),
        refuse("rank as float", TypeError, ["rank", "int", "float"], MATRIX, 2.0),
        refuse("negative oversample", ValueError, ["oversample", "got -1"], MATRIX, 2, oversample=-1),
        refuse("oversample as float", TypeError, ["oversample", "float"], MATRIX, 2, oversample=1.5),
        refuse("negative powers", ValueError, ["power_iterations", "got -1"], MATRIX, 2, power_iterations=-1),
        refuse("a vector", ValueError, ["matrix", "(12,)"], MATRIX[0], 2),
        refuse("integers", TypeError, ["matrix", "int64", "float"], INTEGERS[:3], 2),
        refuse("complex numbers", TypeError, ["matrix", "complex64"], COMPLEX[:3], 2),
        refuse("a list", TypeError, ["matrix", "list", "shape, dtype, device"], [[1.0]], 1),
        refuse("an operator of wrong products", ValueError, ["(12, 12)", "(13, 12)"], OperatorOfWrongShape(), 2),
    ]


def kron_cases() -> list[Case]:
    """Return what kron_damped_solve refuses."""
    left, right, matrix = KRON
    p, q = COLUMNS, RIGHT

    def refuse(name: str, error: Error, fragments: list[str], *arguments: Any, **options: Any) -> Case:
        return case(name, "kron_damped_solve", error, fragments, *arguments, **options)

    return [
        refuse("shape", ValueError, ["matrix", "12, 9", "(9, 12)"], left, right, matrix.mT, 0.1, 0.1),
        refuse("a vector", ValueError, ["matrix", "(12,)"], left, right, matrix[:, 0], 0.1, 0.1),
        refuse("zero left damping", ValueError, ["left_damping", "> 0"], left, right, matrix, 0.0, 0.1),
        refuse("negative right damping", ValueError, ["right_damping", "-1"], left, right, matrix, 0.1, -1),
        refuse("negative left tail", ValueError, ["left_tail", "-1"], left, right, matrix, 0.1, 0.1, left_tail=-1),
        refuse("unknown right tail", ValueError, ["right_tail", "'x'"], left, right, matrix, 0.1, 0.1, right_tail="x"),
        refuse("rows of P", ValueError, ["(P, Q)", "12", "(5, 3)"], left, right, (make_columns(5, K), q), 0.1, 0.1),
        refuse("rows of Q", ValueError, ["(P, Q)", "9", "(5, 3)"], left, right, (p, make_columns(5, K)), 0.1, 0.1),
        refuse("widths of P and Q", ValueError, ["columns", "3 and 2"], left, right, (p, q[:, :2]), 0.1, 0.1),
        refuse("three tensors", TypeError, ["pair", "tuple"], left, right, (p, q, q), 0.1, 0.1),
        refuse("a number", TypeError, ["pair", "float"], left, right, 1.0, 0.1, 0.1),
        refuse("integers", TypeError, ["matrix", "int64"], left, right, torch.ones(N, 9, dtype=torch.int64), 0.1, 0.1),
        refuse("factors of two dtypes", TypeError, ["float64", "float32"], EIGH32, right, matrix, 0.1, 0.1),
        refuse("an SVD", TypeError, ["right", "LowRankSVD"], left, SVD, matrix, 0.1, 0.1),
    ]


CASES = [
    *update_cases("eigh_update", EIGH, "LowRankEigh"),
    *update_cases("root_update", ROOT, "LowRankRoot"),
    case(
        "a basis wider than tall",
        "eigh_update",
        ValueError,
        ["eigenvectors", "r = 12 > n = 4"],
        brandla.LowRankEigh(torch.ones(N, dtype=torch.float64), EIGH.eigenvectors.mT),
        EIGH.eigenvectors.mT,
    ),
    case("a vector for F", "root_update", ValueError, ["root.root", "(12,)"], (COLUMNS[:, 0], ROOT.gram), COLUMNS),
    case("unknown compression", "root_update", ValueError, ["compress", "'qr'"], ROOT, COLUMNS, compress="qr"),
    case("no compression", "root_update", ValueError, ["compress", "'eigh'", "None"], ROOT, COLUMNS, compress=None),
    case("unknown compression", "root_update_", ValueError, ["compress", "'qr'"], ROOT, COLUMNS, compress="qr"),
    case("tolerance 1", "root_update_", ValueError, ["tol", "[0, 1)", "1.0"], ROOT, COLUMNS, tol=1.0),
    case("rows", "root_update_", ValueError, ["columns", "n = 12", "(9, 3)"], ROOT, RIGHT),
    case("expanded", "root_update_", ValueError, ["root.root", "share memory"], EXPANDED, COLUMNS),
    case("a gradient", "root_update_", RuntimeError, ["columns", "no_grad"], ROOT, COLUMNS.clone().requires_grad_()),
    case("a vector", "orthonormalize", ValueError, ["panel", "(..., n, k)", "(12,)"], COLUMNS[:, 0]),
    case("integers", "orthonormalize", TypeError, ["panel", "int64", ".float()"], INTEGERS),
    case("complex numbers", "orthonormalize", TypeError, ["panel", "complex64"], COMPLEX),
    case("a list", "orthonormalize", TypeError, ["panel", "Tensor", "list"], [[1.0]]),
    case("an eigh", "orthonormalize", TypeError, ["panel", "Tensor", "LowRankEigh"], EIGH),
    case("rows of left", "svd_update", ValueError, ["left", "n = 12", "(9, 3)"], SVD, RIGHT, RIGHT),
    case("rows of right", "svd_update", ValueError, ["right", "n = 9", "(12, 3)"], SVD, COLUMNS, COLUMNS),
    case("widths", "svd_update", ValueError, ["left and right", "3 and 2"], SVD, COLUMNS, RIGHT[:, :2]),
    case("rank", "svd_update", ValueError, ["rank", "m = 12, n = 9, r = 4, k = 3", "8"], SVD, COLUMNS, RIGHT, rank=8),
    case("decay", "svd_update", ValueError, ["decay", "-1"], SVD, COLUMNS, RIGHT, decay=-1),
    case("integers", "svd_update", TypeError, ["left", "int64"], SVD, INTEGERS, RIGHT),
    case("dtypes", "svd_update", TypeError, ["right", "float64", "float32"], SVD, COLUMNS, RIGHT.float()),
    case("an eigh", "svd_update", TypeError, ["LowRankSVD", "LowRankEigh"], EIGH, COLUMNS, RIGHT),
    case("rows", "svd_append", ValueError, ["columns", "n = 12", "(9, 3)"], SVD, RIGHT),
    case("rank", "svd_append", ValueError, ["rank", "m = 12, r = 4, k = 3", "8"], SVD, COLUMNS, rank=8),
    case("complex numbers", "svd_append", TypeError, ["columns", "complex64"], SVD, COMPLEX),
    case("a dense matrix", "svd_append", TypeError, ["LowRankSVD", "Tensor"], MATRIX, COLUMNS),
    *randomized_cases("randomized_eigh"),
    *randomized_cases("randomized_svd"),
    case("a rectangle", "randomized_eigh", ValueError, ["square", "(12, 3)", "randomized_svd"], COLUMNS, 2),
    case(
        "no transpose", "randomized_svd", TypeError, ["mT", "OperatorWithoutTranspose"], OperatorWithoutTranspose(), 2
    ),
    *solve_cases("damped_solve"),
    *solve_cases("damped_power", -0.5),
    case("exponent as text", "damped_power", TypeError, ["exponent", "str"], EIGH, RHS, 0.1, "-1/2"),
    case("infinite exponent", "damped_power", ValueError, ["exponent", "inf"], EIGH, RHS, 0.1, math.inf),
    *kron_cases(),
]


@pytest.mark.parametrize(("function", "arguments", "options", "error", "fragments"), CASES)
def test_wrong_input_is_refused_in_words(
    function: str,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    error: Error,
    fragments: list[str],
    unchanged: Callable[..., Any],
) -> None:
    on_cpu = [part for part in (arguments, options) if "meta" not in str(part)]
    with unchanged(on_cpu), pytest.raises(error) as caught:
        getattr(brandla, function)(*arguments, **options)
    message = str(caught.value)
    assert type(caught.value) is error
    assert message.startswith(f"{function}: ")
    assert [fragment for fragment in fragments if fragment not in message] == []


@pytest.mark.parametrize("kind", [brandla.LowRankEigh, brandla.LowRankRoot])
def test_zeros_refuses_a_rank_above_n(kind: Any) -> None:
    with pytest.raises(ValueError, match=rf"{kind.__name__}.zeros: .*5.*got 6"):
        kind.zeros(5, 6)
    with pytest.raises(ValueError, match="got -1"):
        kind.zeros(5, -1)
    with pytest.raises(TypeError, match="float"):
        kind.zeros(5, 2.0)


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


ZERO = torch.tensor(0.0, dtype=torch.float64)
VALUE_CASES = [
    case("columns", "eigh_update", ValueError, ["columns", "finite", "1", "(12, 3)"], EIGH, spoiled(COLUMNS)),
    case("factor", "eigh_update", ValueError, ["eigenvectors", "finite"], spoiled(EIGH, math.inf), COLUMNS),
    case("decay", "eigh_update", ValueError, ["decay", ">= 0", "-1"], EIGH, COLUMNS, decay=ZERO - 1),
    case(
        "bound",
        "eigh_update",
        ValueError,
        ["error_bound", "finite"],
        brandla.Tracked(EIGH, ZERO * math.nan, ZERO),
        COLUMNS,
    ),
    case("columns", "root_update", ValueError, ["columns", "finite"], ROOT, spoiled(COLUMNS, -math.inf)),
    case("S", "root_update", ValueError, ["root.gram", "finite"], spoiled(ROOT), COLUMNS),
    case("F", "root_update", ValueError, ["root.root", "finite"], ROOT._replace(root=spoiled(ROOT.root)), COLUMNS),
    case("weight", "root_update", ValueError, ["weight", ">= 0", "-1"], ROOT, COLUMNS, weight=ZERO - 1),
    case(
        "trace",
        "root_update",
        ValueError,
        ["trace", "finite"],
        brandla.Tracked(ROOT, ZERO, ZERO * math.nan),
        COLUMNS,
        compress="cholesky",
    ),
    case("panel", "orthonormalize", ValueError, ["panel", "finite", "1", "(12, 3)"], spoiled(COLUMNS)),
    case("S", "damped_solve", ValueError, ["gram", "finite"], spoiled(ROOT), RHS, 0.1),
    case("right", "svd_update", ValueError, ["right", "finite"], SVD, COLUMNS, spoiled(RIGHT)),
    case("factor", "svd_update", ValueError, ["Vh", "finite"], spoiled(SVD), COLUMNS, RIGHT),
    case("columns", "svd_append", ValueError, ["columns", "finite"], SVD, spoiled(COLUMNS)),
    case("matrix", "randomized_eigh", ValueError, ["matrix", "finite"], spoiled(MATRIX), 2),
    case("matrix", "randomized_svd", ValueError, ["matrix", "finite"], spoiled(MATRIX), 2),
    case("rhs", "damped_solve", ValueError, ["rhs", "finite"], EIGH, spoiled(RHS), 0.1),
    case("factor", "damped_solve", ValueError, ["finite"], spoiled(EIGH), RHS, 0.1),
    case("damping", "damped_solve", ValueError, ["damping", "> 0", "0"], EIGH, RHS, ZERO),
    case("tail", "damped_solve", ValueError, ["tail", ">= 0", "-1"], EIGH, RHS, 0.1, tail=ZERO - 1),
    case("NaN damping", "damped_power", ValueError, ["damping", "finite"], EIGH, RHS, ZERO * math.nan, -0.5),
    case("matrix", "kron_damped_solve", ValueError, ["matrix", "finite"], *KRON[:2], spoiled(KRON[2]), 0.1, 0.1),
    case("Q", "kron_damped_solve", ValueError, ["Q", "finite"], *KRON[:2], (COLUMNS, spoiled(RIGHT)), 0.1, 0.1),
    case("damping", "kron_damped_solve", ValueError, ["right_damping", "> 0"], *KRON, 0.1, ZERO),
]


@pytest.mark.parametrize(("function", "arguments", "options", "error", "fragments"), VALUE_CASES)
def test_checked_mode_refuses_bad_values_and_the_default_lets_them_pass(
    function: str,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    error: Error,
    fragments: list[str],
    unchanged: Callable[..., Any],
) -> None:
    call = getattr(brandla, function)
    with unchanged(arguments, options), brandla.checked(), pytest.raises(error) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert message.startswith(f"{function}: ")
    assert [fragment for fragment in fragments if fragment not in message] == []
    call(*arguments, **options)


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
