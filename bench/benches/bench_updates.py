"""Speed and memory of the updates and of the damped application, as ratios within one run, in float32 on two threads.

Each case first checks its result against float64, and does not time a wrong one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import svds
from torch import Tensor

import brandla
from bench.benches import problems, written_out
from bench.benches.peers import INCREMENTAL, POWERS, REST, best_threads, svd_lowrank
from bench.benches.problems import DECAY, UPDATES, WEIGHT, require
from bench.benches.tasks import BRANDLA, ONE_BY_ONE, TASKS, Call, Shape, Task, check, group_of, symmetric_update
from bench.benches.timing import Interval, peak_extra_bytes, ratio, torch_calls
from bench.benches.written_out import update_floor
from bench.gpu.cases import cloned
from bench.gpu.device import Stub
from brandla.orthonormal import polish
from brandla.root import Update, check_update
from brandla_kernels import cross_gram

AVERAGE = {"decay": DECAY, "weight": WEIGHT}
SHAPES = [(4096, 128, 64), (4096, 256, 256)]
# The most that root_update may take over the GEMMs of Brand's form, and what eigh_update took at commit 061dd6e, before
# it used the square-root form: on the machine and the tasks of the committed results.
LIMITS = {
    (4096, 128, 64): (1.2, 2.02),
    (4096, 256, 256): (1.3, 1.74),
    (16384, 128, 64): (0.85, 1.18),
    (512, 32, 32): (5.0, 9.75),
    (1024, 128, 32): (2.8, 5.70),
    (256, 16, 8): (None, 15.9),
}
SMALL = [(256, 16, 8), (512, 16, 16), (512, 32, 32)]
FACTORS = 8
ROOT, CHOLESKY, EIGH = UPDATES
OVER_GEMMS = "update / the GEMMs of Brand's form"
OVER_BEFORE = "update / eigh_update before the square-root form, each over the GEMMs of its own run"

every_update = pytest.mark.parametrize("name", UPDATES)


def in_words(n: int, r: int, k: int) -> str:
    return f"n {n}, r {r}, k {k}"


def checked(task: Task, by: str = BRANDLA) -> Call:
    """Return a call after a check of its result."""
    call = task.call(by)
    check(by, call)
    return call


def task_of(name: str, n: int, r: int, k: int, exponent: float = 0.5) -> Task:
    """Return an update in the steady state of a stream, or a damped solve."""
    shape, device = Shape(n, r, k), Stub()
    return symmetric_update(name, shape, device, exponent) if name in UPDATES else TASKS[name].task(shape, device)


# --- Beside the products that an update needs


@pytest.mark.benchmark(group=OVER_GEMMS)
@pytest.mark.parametrize("size", LIMITS, ids=str)
@every_update
def test_update_over_its_gemms(name, size, over, figures) -> None:
    update, words = checked(task_of(name, *size)), f"{name}, {in_words(*size)}"
    count = 1500 if size[0] <= 1024 else 100 if size[2] > 64 else 250
    limit, before = LIMITS[size]
    quotient = over(words, update.again, update_floor(update.arguments), count, at_most=limit if name == ROOT else None)
    limit = {EIGH: 0.6 if size[0] <= 1024 else 1.0, ROOT: 0.35 if size == (256, 16, 8) else None}.get(name)
    figures(words, Interval(*(value / before for value in quotient)), group=OVER_BEFORE, at_most=limit)


@pytest.mark.benchmark(group="where the time of an update goes, stage / the GEMMs of Brand's form")
@pytest.mark.parametrize(("n", "r", "k"), SHAPES, ids=str)
@every_update
def test_profile_of_an_update(name, n, r, k, in_turn, figures) -> None:
    case = problems.steady_state(name, n, r, k)
    stages = stages_of(name, case)
    seconds = in_turn(stages | {"gemms": update_floor(case)}, 60)
    for stage in stages:
        figures(f"{name}, {in_words(n, r, k)}: {stage}", ratio(seconds[stage], seconds["gemms"]))


def stages_of(name: str, case: tuple[Any, Tensor]) -> dict[str, Callable[[], object]]:
    """Return the stages of an update, each on the results of the stages before it."""
    compress = "cholesky" if name == CHOLESKY else "eigh"
    update = check_update(name, *case, DECAY, WEIGHT, None, compress, kind=UPDATES[name][1])
    products = cross_gram(update.tall, update.columns)

    class Summed(Update):
        _inner_products = lambda self: products

    truncate = lambda: Summed(*update).truncated(unit=name == EIGH)
    _, of_old, of_columns, *_ = truncate()
    rotate = lambda: update.rotated(of_old, of_columns)
    stages = {"one pass for the core": lambda: cross_gram(update.tall, update.columns)}
    stages |= {"truncation of the core": truncate, "rotation": rotate}
    if name == EIGH:
        vectors = rotate()
        stages["polish, or the look that spares it"] = lambda: polish(vectors, update.small)
    return stages


@pytest.mark.benchmark(group=OVER_GEMMS)
@every_update
def test_update_of_a_steep_stream(name, over) -> None:
    # There rounding leaves the vectors of small values far from orthonormal, and eigh_update polishes them.
    update = checked(task_of(name, *SHAPES[0], exponent=1.5))
    over(f"{name}, {in_words(*SHAPES[0])}, i^−1.5 stream", update.again, update_floor(update.arguments), 150)


@pytest.mark.benchmark(group=f"one call each of {FACTORS} factors / one call of the list")
@pytest.mark.parametrize("name", [ROOT, EIGH])
def test_list_over_one_call_each(name, in_turn, figures) -> None:
    shape = Shape(1024, 64, 32)
    task = group_of(name, [shape] * FACTORS, Stub())
    seconds = in_turn({by: checked(task, by).again for by in (BRANDLA, ONE_BY_ONE)}, 150)
    figures(f"{name}, {in_words(*shape[:3])}", ratio(seconds[ONE_BY_ONE], seconds[BRANDLA]), at_least=1.25)


@pytest.mark.benchmark(group="‖UᵀU − I‖₂ of tall factors, float32")
@pytest.mark.parametrize("name", [EIGH, ROOT])
@pytest.mark.parametrize("n", [2**18, 10**6])
def test_orthogonality_of_a_tall_factor(n, name, benchmark, figures, quick) -> None:
    n = n // 64 if quick else n
    r = k = 16
    source = torch.Generator().manual_seed(0)
    lead = torch.randn(n, r, generator=source)
    update, kind = UPDATES[name]
    factor = kind.zeros(n, r)
    for _ in range(5):
        columns = lead @ torch.randn(r, k, generator=source) + 0.05 * torch.randn(n, k, generator=source)
        factor = update(factor, columns, **AVERAGE)
    eigh = factor if name == EIGH else factor.to_eigh()
    defect = problems.orthonormality(eigh.eigenvectors) / torch.finfo(torch.float32).eps
    words = name if name == EIGH else f"{name}, then to_eigh"
    figures(f"{words}, {in_words(n, r, k)}", defect, at_most=20, unit="ε")
    benchmark.pedantic(update, (factor, columns), AVERAGE, rounds=3)


# --- Beside other decompositions


@pytest.mark.benchmark(group="a decomposition of the dense factor / eigh_update")
def test_svd_lowrank_over_update(over) -> None:
    # The peer gets the dense matrix ρ M̂ + w A Aᵀ for nothing.
    update, r = checked(task_of(EIGH, *SHAPES[0])), SHAPES[0][1]
    factor, columns = update.arguments
    matrix = DECAY * factor.dense() + WEIGHT * columns @ columns.mT
    peer = lambda: torch.svd_lowrank(matrix, q=r, niter=2)
    over(f"torch.svd_lowrank (q {r}, niter 2), {in_words(*SHAPES[0])}", peer, update.again, 25, at_least=50)


@pytest.mark.benchmark(group="randomized_eigh and torch.svd_lowrank, the same rank and sketch")
@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5])
def test_randomized_eigh(exponent, in_turn, figures, quick) -> None:
    n, r = (1024, 64) if quick else (4096, 128)
    spectrum = np.arange(1, n + 1) ** -exponent
    truth = problems.matrix_of_spectrum(n, spectrum)
    matrix = truth.float()
    # An iteration of svd_lowrank multiplies by M twice, so equal counts are not equal powers of M: three are shown.
    ours = lambda powers: partial(brandla.randomized_eigh, matrix, r, power_iterations=powers)
    calls = {f"power_iterations {powers}": ours(powers) for powers in (POWERS, POWERS + 1, 2 * POWERS)}
    same, theirs = next(iter(calls)), "svd_lowrank"
    calls[theirs] = partial(svd_lowrank, matrix, r)
    errors = {words: relative_errors(call, truth, spectrum, r) for words, call in calls.items()}
    texts = {words: "{:.3f} and {:.3f}".format(*pair) for words, pair in errors.items()}
    for words, pair in errors.items():
        require(words == theirs or max(pair) < 2, f"randomized_eigh, {words}: {max(pair):.2f} times the best error")
    seconds = in_turn(calls, 15)
    for words in (words for words in calls if words != theirs):
        case = f"i^−{exponent:g}, n {n}, r {r}: {words} against niter {POWERS}"
        speedup, worse = ratio(seconds[theirs], seconds[words]), max(errors[words] / errors[theirs])
        figures(f"{case}, times faster", speedup, at_least=2.0 if words == same else None)
        note = f"error over the best, Frobenius and spectral: {texts[words]}; {theirs} {texts[theirs]}"
        figures(f"{case}, error over its error", worse, at_most=1.0 if words == same else None, note=note)


def relative_errors(call: Callable[[], Any], truth: Tensor, spectrum: np.ndarray, r: int) -> np.ndarray:
    """Return the median errors of three draws over the best of this rank, in the Frobenius and spectral norms."""
    draws = []
    for seed in range(3):
        torch.manual_seed(seed)
        left, right = problems.two_factors(call())
        error = (truth - left @ right.mT).numpy()
        # Lanczos' iteration, to a thousandth.
        (largest,) = svds(error, k=1, tol=1e-3, return_singular_vectors=False, v0=np.ones(len(error)))
        draws.append((np.linalg.norm(error) / np.linalg.norm(spectrum[r:]), largest / spectrum[r]))
    return np.median(draws, axis=0)


@pytest.mark.benchmark(group="scikit-learn IncrementalPCA / svd_append")
def test_incremental_pca_over_append(in_turn, figures) -> None:
    shape = Shape(4096, 64, 64)
    task = TASKS["svd_append, centred"].task(shape, Stub())
    calls = {by: checked(task, by).again for by in (BRANDLA, INCREMENTAL)}
    with best_threads(calls[INCREMENTAL]) as threads:
        seconds = in_turn(calls, 50, rest=REST)
    words = f"{shape.n} features, rank {shape.r}, batches of {shape.k}, centred"
    note = "1 BLAS thread" if threads == 1 else f"{threads} BLAS threads"
    figures(words, ratio(seconds[INCREMENTAL], seconds[BRANDLA]), at_least=5, note=note)


# --- Damped application, small factors


@pytest.mark.benchmark(group="damped_solve / its GEMMs")
def test_solve_over_its_gemms(over) -> None:
    solve = checked(task_of("damped_solve", *SHAPES[0]))
    factor, rhs, _ = solve.arguments
    basis = factor.eigenvectors
    words = f"n {factor.n}, r {factor.rank}, {rhs.shape[1]} right-hand sides"
    over(words, solve.again, lambda: basis @ (basis.mT @ rhs), 500, at_most=1.05)


@pytest.mark.benchmark(group="small factors: a call / its torch primitives written out")
@pytest.mark.parametrize(("n", "r", "k"), SMALL, ids=str)
@pytest.mark.parametrize("name", [ROOT, EIGH, "damped_solve"])
def test_overhead_of_a_small_call(name, n, r, k, over) -> None:
    update = checked(task_of(name, n, r, k))
    numbers = AVERAGE if name in UPDATES else {}
    call, hand = update.again, partial(getattr(written_out, name), *update.arguments, **numbers)
    found, by_hand = (result if isinstance(result, Tensor) else result.dense() for result in (call(), hand()))
    error = float(torch.linalg.matrix_norm(found - by_hand) / torch.linalg.matrix_norm(by_hand))
    require(error < 1e-5, f"the results by hand and by the library differ by {error:.1e}")
    note = f"{torch_calls(call)} and {torch_calls(hand)} torch calls"
    over(f"{name}, {in_words(n, r, k)}", call, hand, 1500, at_most=1.25, note=note)


@pytest.mark.benchmark(group="peak extra memory / size of [U, A]")
@pytest.mark.parametrize(("r", "k"), [(128, 64), (256, 256)], ids=str)
@every_update
def test_peak_memory(name, r, k, in_turn, figures) -> None:
    n = 16384
    update = checked(task_of(name, n, r, k))
    factor, columns = cloned(update.arguments)
    options = AVERAGE | getattr(UPDATES[name][0], "keywords", {})
    in_place = partial(getattr(brandla, name.partition(",")[0] + "_"), factor, columns, **options)
    in_place()
    update.judge(factor).accept(name)
    size = 4 * n * (r + k)
    figures(f"{name}, {in_words(n, r, k)}", peak_extra_bytes(update.again) / size, at_most=2.0)
    figures(f"{name}_, {in_words(n, r, k)}", peak_extra_bytes(in_place) / size, at_most=1.0)
    in_turn({"in place": in_place}, 10)
