"""Speed and memory of the updates and of the damped application, as ratios within one run.

Each case checks its result against float64 first and does not time a wrong one. float32, two threads.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from sklearn.decomposition import IncrementalPCA
from sklearn.utils.extmath import randomized_svd
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import brandla
from bench import by_hand, timing
from bench.floors import solve_floor, update_floor
from bench.memory import peak_extra_bytes
from bench.peer_threads import REST, at_best, in_threads
from bench.problems import (
    DECAY,
    UPDATES,
    WEIGHT,
    Case,
    Symmetric,
    check_solve,
    check_update,
    columns_of,
    matrix_of_spectrum,
    require,
    steady,
)
from brandla._core import polish, safe_eigh, truncate_by_subspace
from brandla._expansion import expand
from brandla._split import split

SHAPES = [(4096, 128, 64), (4096, 256, 256)]
SIZES = [1024, 2048, 4096, 8192, 16384, 32768]
SMALL = [(256, 16, 8), (512, 16, 16), (512, 32, 32)]
DAMPING = 0.1
EIGH, SUBSPACE = "eigh_update", "subspace_update"

both_updates = pytest.mark.parametrize("name", [SUBSPACE, EIGH])
both_shapes = pytest.mark.parametrize(("n", "r", "k"), SHAPES, ids=str)


def call_of(name: str, case: Case) -> Callable[[], Symmetric]:
    """Return one call of an update."""
    update, _ = UPDATES[name]
    return lambda: update(case.factor, case.columns, decay=DECAY, weight=WEIGHT)


def in_words(n: int, r: int, k: int) -> str:
    return f"n {n}, r {r}, k {k}"


# ---------------------------------------------------------------------------------------------------------------------
# Against the products an update needs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.benchmark(group="update / its GEMMs")
@both_shapes
@both_updates
def test_update_over_its_gemms(name, n, r, k, benchmark, figures, repeats) -> None:
    case = steady(name, n, r, k)
    update = call_of(name, case)
    check_update(name, case, update())
    seconds = timing.alternating({"update": update, "gemms": update_floor(case)}, repeats(100 if k > 64 else 250))
    limit = {SUBSPACE: 1.3, EIGH: 1.6}[name]
    figures(f"{name}, {in_words(n, r, k)}", timing.ratio(seconds["update"], seconds["gemms"]), at_most=limit)
    benchmark.pedantic(update, rounds=repeats(60), warmup_rounds=2)


@pytest.mark.benchmark(group="where the time of an update goes, stage / its GEMMs")
@both_shapes
@both_updates
def test_profile_of_an_update(name, n, r, k, benchmark, figures, repeats) -> None:
    case = steady(name, n, r, k)
    stages = stages_of(name, case)
    seconds = timing.alternating(stages | {"gemms": update_floor(case)}, repeats(60))
    for stage in stages:
        figures(f"{name}, {in_words(n, r, k)}: {stage}", timing.ratio(seconds[stage], seconds["gemms"]))
    benchmark.pedantic(stages["rotation of U"], rounds=repeats(30), warmup_rounds=2)


def stages_of(name: str, case: Case) -> dict[str, Callable[[], object]]:
    """Return an update in the four parts that it is made of, each on the results of the ones before it."""
    values, basis = case.factor
    r, dtype = basis.shape[-1], basis.dtype
    parts = split(basis, case.columns)
    expansion = expand(values, basis, case.columns, DECAY, WEIGHT)
    compress = {
        SUBSPACE: lambda: truncate_by_subspace(expansion.core, r, 2, dtype)[1],
        EIGH: lambda: polish(safe_eigh(expansion.core, dtype, keep=r)[1]),
    }[name]
    rotation = compress()

    def core() -> Tensor:
        stacked = torch.cat([parts.coefficients, parts.triangle], dim=-2)
        return (stacked * WEIGHT) @ stacked.mT

    return {
        "split of the columns": lambda: split(basis, case.columns),
        "the core, float64": core,
        "truncation of the core": compress,
        "rotation of U": lambda: expansion.rotate(rotation),
    }


@pytest.mark.benchmark(group="update / its GEMMs")
@both_updates
def test_update_that_takes_two_passes(name, benchmark, figures, repeats) -> None:
    # A steep spectrum leaves columns almost inside the span of the basis, where one pass is not enough.
    n, r, k = SHAPES[0]
    case = steady(name, n, r, k, exponent=1.5)
    update = call_of(name, case)
    check_update(name, case, update())
    seconds = timing.alternating({"update": update, "gemms": update_floor(case)}, repeats(150))
    figures(f"{name}, {in_words(n, r, k)}, i^−1.5 stream", timing.ratio(seconds["update"], seconds["gemms"]))
    benchmark.pedantic(update, rounds=repeats(60), warmup_rounds=2)


# ---------------------------------------------------------------------------------------------------------------------
# Against decompositions of the dense matrix
# ---------------------------------------------------------------------------------------------------------------------


def dense_target(case: Case) -> Tensor:
    """Return ρ M̂ + w A Aᵀ as a dense float32 matrix: what the baselines decompose, handed to them for nothing."""
    return DECAY * case.factor.dense() + WEIGHT * case.columns @ case.columns.mT


@pytest.mark.benchmark(group="a decomposition of the dense factor / eigh_update")
def test_svd_lowrank_over_update(benchmark, figures, repeats) -> None:
    n, r, k = SHAPES[0]
    case = steady(EIGH, n, r, k)
    update, matrix = call_of(EIGH, case), dense_target(case)
    check_update(EIGH, case, update())
    baseline = lambda: torch.svd_lowrank(matrix, q=r, niter=2)
    seconds = timing.alternating({"update": update, "baseline": baseline}, repeats(25))
    speedup = timing.ratio(seconds["baseline"], seconds["update"])
    figures(f"torch.svd_lowrank (q {r}, niter 2), {in_words(n, r, k)}", speedup, at_least=50)
    benchmark.pedantic(baseline, rounds=repeats(10), warmup_rounds=1)


@pytest.mark.benchmark(group="a decomposition of the dense factor / eigh_update")
def test_scikit_learn_over_update(benchmark, figures, repeats) -> None:
    n, r, k = SHAPES[0]
    case = steady(EIGH, n, r, k)
    update, matrix = call_of(EIGH, case), dense_target(case).numpy()
    check_update(EIGH, case, update())
    baseline = lambda: randomized_svd(matrix, r, random_state=0)
    baseline()
    with at_best(baseline) as threads:
        seconds = timing.alternating({"update": update, "baseline": baseline}, repeats(15), rest=REST)
        benchmark.pedantic(baseline, rounds=repeats(5), warmup_rounds=1)
    speedup = timing.ratio(seconds["baseline"], seconds["update"])
    case = f"scikit-learn randomized_svd (its defaults), {in_words(n, r, k)}"
    figures(case, speedup, at_least=120, note=in_threads(threads))


# ---------------------------------------------------------------------------------------------------------------------
# Randomized eigendecomposition
# ---------------------------------------------------------------------------------------------------------------------

POWERS, OVERSAMPLE = 2, 10


def error_norms(matrix: Tensor, approximation: Tensor) -> tuple[float, float]:
    """Return the Frobenius and the spectral norm of the error; the latter by Lanczos, to a thousandth."""
    error = matrix - approximation
    largest = scipy.sparse.linalg.svds(
        error.numpy(), k=1, tol=1e-3, return_singular_vectors=False, v0=np.ones(len(error))
    )
    return float(torch.linalg.matrix_norm(error)), float(largest[0])


def lowrank_eigh(matrix: Tensor, r: int, powers: int) -> Tensor:
    """Return randomized_eigh's approximation in float64."""
    values, vectors = (part.double() for part in brandla.randomized_eigh(matrix, r, power_iterations=powers))
    return (vectors * values) @ vectors.mT


def lowrank_svd(matrix: Tensor, r: int, powers: int) -> Tensor:
    """Return torch.svd_lowrank's approximation, from a sketch of the same width cut to the same rank, in float64."""
    left, values, right = (part.double() for part in torch.svd_lowrank(matrix, q=r + OVERSAMPLE, niter=powers))
    return (left[:, :r] * values[:r]) @ right[:, :r].mT


def relative_errors(approximate: Callable[[], Tensor], truth: Tensor, best: tuple[float, float]) -> tuple[float, float]:
    """Return the median errors of three draws over the best ones of this rank, in both norms."""
    draws = []
    for seed in range(3):
        torch.manual_seed(seed)
        draws.append(error_norms(truth, approximate()))
    frobenius, spectral = zip(*draws, strict=True)
    return median(frobenius) / best[0], median(spectral) / best[1]


def both_norms(errors: tuple[float, float]) -> str:
    return f"{errors[0]:.3f} and {errors[1]:.3f}"


@pytest.mark.benchmark(group="randomized_eigh and torch.svd_lowrank, the same rank and sketch")
@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5])
def test_randomized_eigh(exponent, benchmark, figures, repeats, quick) -> None:
    n, r = (1024, 64) if quick else (4096, 128)
    spectrum = np.arange(1, n + 1) ** -exponent
    truth = matrix_of_spectrum(spectrum, seed=0)
    matrix = truth.float()
    best = float(np.linalg.norm(spectrum[r:])), float(spectrum[r])
    peer = relative_errors(lambda: lowrank_svd(matrix, r, POWERS), truth, best)
    # svd_lowrank's iteration multiplies by M twice, so equal counts are not equal powers of M: three counts are shown.
    for powers in (POWERS, POWERS + 1, 2 * POWERS):
        own = relative_errors(lambda powers=powers: lowrank_eigh(matrix, r, powers), truth, best)
        require(max(own) < 2, f"randomized_eigh: {max(own):.2f} times the best error")
        ours = lambda powers=powers: brandla.randomized_eigh(matrix, r, power_iterations=powers)
        theirs = lambda: torch.svd_lowrank(matrix, q=r + OVERSAMPLE, niter=POWERS)
        seconds = timing.alternating({"ours": ours, "theirs": theirs}, repeats(15))
        same = powers == POWERS
        case = f"i^−{exponent:g}, n {n}, r {r}: power_iterations {powers} against niter {POWERS}"
        speedup = timing.ratio(seconds["theirs"], seconds["ours"])
        figures(f"{case}, times faster", speedup, at_least=2.0 if same else None)
        worse = max(one / other for one, other in zip(own, peer, strict=True))
        note = f"error over the best, Frobenius and spectral: {both_norms(own)}; svd_lowrank {both_norms(peer)}"
        figures(f"{case}, error over its error", worse, at_most=1.0 if same else None, note=note)
    benchmark.pedantic(brandla.randomized_eigh, (matrix, r), rounds=repeats(10), warmup_rounds=1)


# ---------------------------------------------------------------------------------------------------------------------
# Damped application, growth with n, small factors
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.benchmark(group="damped_solve / its GEMMs")
def test_solve_over_its_gemms(benchmark, figures, repeats) -> None:
    n, r, _ = SHAPES[0]
    factor, rhs = steady(EIGH, *SHAPES[0]).factor, torch.randn(n, 64)
    solve = lambda: brandla.damped_solve(factor, rhs, DAMPING)
    check_solve(factor, rhs, DAMPING, solve())
    seconds = timing.alternating({"solve": solve, "gemms": solve_floor(factor.eigenvectors, rhs)}, repeats(500))
    figures(f"n {n}, r {r}, 64 right-hand sides", timing.ratio(seconds["solve"], seconds["gemms"]), at_most=1.05)
    benchmark.pedantic(solve, rounds=repeats(100), warmup_rounds=5)


def solve_of(n: int, r: int, k: int) -> Callable[[], Tensor]:
    factor, rhs = steady(EIGH, n, r, k).factor, torch.randn(n, 64)
    check_solve(factor, rhs, DAMPING, brandla.damped_solve(factor, rhs, DAMPING))
    return lambda: brandla.damped_solve(factor, rhs, DAMPING)


def pair_of(n: int, r: int, k: int) -> Callable[[], tuple[Tensor, Tensor]]:
    factor, left, right = steady(EIGH, n, r, k).factor, torch.randn(n, 64), torch.randn(n, 64)
    for one, solved in zip(
        (left, right), brandla.kron_damped_solve(factor, factor, (left, right), DAMPING, DAMPING), strict=True
    ):
        check_solve(factor, one, DAMPING, solved)
    return lambda: brandla.kron_damped_solve(factor, factor, (left, right), DAMPING, DAMPING)


def update_of(name: str) -> Callable[[int, int, int], Callable[[], Symmetric]]:
    def make(n: int, r: int, k: int) -> Callable[[], Symmetric]:
        case = steady(name, n, r, k)
        update = call_of(name, case)
        check_update(name, case, update())
        return update

    return make


GROWING = {
    EIGH: update_of(EIGH),
    SUBSPACE: update_of(SUBSPACE),
    "damped_solve": solve_of,
    "kron_damped_solve of a pair": pair_of,
}


@pytest.mark.benchmark(group="slope of log time in log n")
@pytest.mark.parametrize("name", GROWING)
def test_time_grows_linearly(name, benchmark, figures, repeats) -> None:
    _, r, k = SHAPES[0]
    calls = {str(n): GROWING[name](n, r, k) for n in SIZES}
    seconds = timing.alternating(calls, repeats(40))
    medians = [median(seconds[str(n)]) for n in SIZES]
    case = f"{name}, n {SIZES[0]} … {SIZES[-1]}, r {r}, {k} columns"
    figures(case, timing.slope(SIZES, medians), at_most=1.05, unit="")
    benchmark.extra_info["medians_ms"] = [1e3 * time for time in medians]
    benchmark.pedantic(calls[str(SIZES[-1])], rounds=repeats(20), warmup_rounds=1)


class CallCount(TorchDispatchMode):
    """Counts the calls that reach torch's own operators."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def torch_calls(function: Callable[[], object]) -> int:
    with CallCount() as mode:
        function()
    return mode.count


def small_calls(name: str, n: int, r: int, k: int) -> dict[str, Callable[[], Symmetric | Tensor]]:
    """Return a call of the library and the same arithmetic written out."""
    if name == "damped_solve":
        factor, rhs = steady(EIGH, n, r, k).factor, torch.randn(n, k)
        return {
            "call": lambda: brandla.damped_solve(factor, rhs, DAMPING),
            "hand": lambda: by_hand.damped_solve(factor, rhs, DAMPING),
        }
    case = steady(name, n, r, k)
    written_out = getattr(by_hand, name)
    return {"call": call_of(name, case), "hand": lambda: written_out(case.factor, case.columns, DECAY, WEIGHT)}


def check_same(calls: dict[str, Callable[[], Symmetric | Tensor]]) -> None:
    """Check that both forms give the same numbers, to rounding."""
    one, other = (function() for function in calls.values())
    if not isinstance(one, Tensor):
        one, other = one.dense(), other.dense()
    error = float(torch.linalg.matrix_norm(one - other) / torch.linalg.matrix_norm(other))
    require(error < 1e-5, f"by hand and by the library differ by {error:.1e}")


@pytest.mark.benchmark(group="small factors: a call / its torch primitives written out")
@pytest.mark.parametrize(("n", "r", "k"), SMALL, ids=str)
@pytest.mark.parametrize("name", [EIGH, SUBSPACE, "damped_solve"])
def test_overhead_of_a_small_call(name, n, r, k, benchmark, figures, repeats) -> None:
    calls = small_calls(name, n, r, k)
    check_same(calls)
    seconds = timing.alternating(calls, repeats(1500))
    counts = " and ".join(str(torch_calls(function)) for function in calls.values())
    overhead = timing.ratio(seconds["call"], seconds["hand"])
    figures(f"{name}, {in_words(n, r, k)}", overhead, at_most=1.25, note=f"{counts} torch calls")
    benchmark.pedantic(calls["call"], rounds=repeats(200), warmup_rounds=10)


# ---------------------------------------------------------------------------------------------------------------------
# Streaming principal components
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.benchmark(group="scikit-learn IncrementalPCA / svd_append")
def test_incremental_pca_over_append(benchmark, figures, repeats) -> None:
    features, rank, batch = 4096, 64, 64
    stream = columns_of(features, batch, 0.5, seed=3)
    warm = [next(stream) + 0.1 for _ in range(20)]
    peer = IncrementalPCA(rank)
    exact = IncrementalPCA(rank)
    state = brandla.centre(brandla.LowRankSVD.zeros(features, 0, rank))
    for columns in warm:
        state = brandla.svd_append(state, columns)
        peer.partial_fit(columns.mT.numpy())
        exact.partial_fit(columns.mT.double().numpy())
    truth = torch.from_numpy(exact.singular_values_)
    error = float(((state.svd.S.double() - truth).abs() / truth).max())
    require(error < 1e-3, f"svd_append: singular values {error:.1e} off those of IncrementalPCA in float64")
    columns = next(stream) + 0.1
    rows = columns.mT.contiguous().numpy()
    calls = {"append": lambda: brandla.svd_append(state, columns), "peer": lambda: peer.partial_fit(rows)}
    with at_best(calls["peer"]) as threads:
        seconds = timing.alternating(calls, repeats(50), rest=REST)
    case = f"{features} features, rank {rank}, batches of {batch}, centred"
    ratio = timing.ratio(seconds["peer"], seconds["append"])
    figures(case, ratio, at_least=5, note=in_threads(threads))
    benchmark.pedantic(calls["append"], rounds=repeats(50), warmup_rounds=2)


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------

IN_PLACE = {EIGH: brandla.eigh_update_, SUBSPACE: brandla.subspace_update_}


@pytest.mark.benchmark(group="peak extra memory / size of [U, A]")
@pytest.mark.parametrize(("r", "k"), [(128, 64), (256, 256)], ids=str)
@both_updates
def test_peak_memory(name, r, k, benchmark, figures, repeats) -> None:
    n = 16384
    case = steady(name, n, r, k)
    update = call_of(name, case)
    check_update(name, case, update())
    own = type(case.factor)(*(part.clone() for part in case.factor))
    in_place = lambda: IN_PLACE[name](own, case.columns, decay=DECAY, weight=WEIGHT)
    in_place()
    check_update(name, case, own)
    size = 4 * n * (r + k)
    figures(f"{name}, {in_words(n, r, k)}", peak_extra_bytes(update) / size, at_most=2.0)
    figures(f"{name}_, {in_words(n, r, k)}", peak_extra_bytes(in_place) / size, at_most=1.0)
    benchmark.pedantic(in_place, rounds=repeats(10), warmup_rounds=1)
