"""The updates and the solves against what torch offers, and the targets set for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

import brandla
from bench.benches.problems import DECAY, UPDATES, WEIGHT, Case, WrongResultError, check_solve, check_update, require
from bench.benches.written_out import brand_update
from bench.gpu import factors
from bench.gpu.cases import ROUNDINGS
from bench.gpu.ceilings import Work
from bench.gpu.findings import Bench, Deadline, Findings
from bench.gpu.timed import Times, called, microseconds, replayed
from brandla_kernels import OPS

DAMPING = 0.1
POWERS, OVERSAMPLE = 2, 10
TIMES = "median times"
CHOLESKY = "root_update, cholesky"


def run(bench: Bench, found: Findings, time: Deadline) -> None:
    """Measure each; the ones with targets first."""
    for name, measure, seconds in (
        (CHOLESKY, _root_update, 12.0),
        ("kron_damped_solve", _kron_damped_solve, 8.0),
        ("gram_ema_", _gram_ema, 8.0),
        ("randomized_eigh", _randomized_eigh, 15.0),
        ("damped_solve", _damped_solve, 5.0),
        ("eigh_update", partial(_with_eigh, "eigh_update"), 8.0),
        ("root_update", partial(_with_eigh, "root_update"), 8.0),
    ):
        if found.in_time(name, time, 0 if bench.device.dry else seconds):
            with found.case(name, bench.device):
                measure(bench, found)


def _keep(found: Findings, times: Times, **calls: str) -> None:
    """Add the plain times of calls, by their names in words."""
    for name, words in calls.items():
        interval = microseconds(times.median(name))
        found.row(TIMES, **{"call": words, "µs": interval.value, "low µs": interval.low, "high µs": interval.high})


# ---------------------------------------------------------------------------------------------------------------------
# Updates
# ---------------------------------------------------------------------------------------------------------------------


def _brand_of_torch(case: Case) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return the eager torch update of the same factor, orthonormalised."""
    factor = case.factor.to_eigh() if isinstance(case.factor, brandla.LowRankRoot) else case.factor
    return lambda: brand_update(*factor, case.columns, DECAY, WEIGHT)


def _checked_update(bench: Bench, name: str) -> tuple[Case, Callable[[], Any]]:
    """Return a case and a call of an update, whose result float64 agrees with."""
    case = factors.steady(name, *bench.sizes.update, bench.sizes.steps, bench.device.tensors)
    function = UPDATES[name][0]
    update = lambda: function(case.factor, case.columns, decay=DECAY, weight=WEIGHT)
    check_update(name, factors.on_cpu(case), factors.on_cpu(update()))
    return case, update


def _judge_baseline(found: Findings, case: Case, baseline: Callable[[], tuple[Tensor, Tensor]]) -> None:
    """Note where the torch update is less accurate than what it is compared with: it projects once."""
    try:
        check_update("eigh_update", factors.on_cpu(case), brandla.LowRankEigh(*factors.on_cpu(baseline())))
    except WrongResultError as error:
        found.notes.append(f"the eager torch update would not pass the check of eigh_update: {error}")


def _root_update(bench: Bench, found: Findings) -> None:
    device = bench.device
    case, update = _checked_update(bench, CHOLESKY)
    captured = device.capture(update)
    captured.replay()
    check_update(CHOLESKY, factors.on_cpu(case), factors.on_cpu(captured.result))
    baseline = _brand_of_torch(case)
    _judge_baseline(found, case, baseline)
    calls = {"graph": captured.replay, "eager": update, "torch": baseline}
    times = called(device, calls, 4 * bench.sizes.seconds)
    n, r, k = bench.sizes.update
    words = f"n {n}, r {r}, k {k}"
    found.figure(CHOLESKY, f"{words}, in a graph", microseconds(times.median("graph")), unit="µs", at_most=300)
    faster = times.ratio("torch", "graph")
    found.figure(CHOLESKY, f"{words}, in a graph: eager torch Brand update / it", faster, at_least=10)
    found.figure(CHOLESKY, f"{words}, eager: eager torch Brand update / it", times.ratio("torch", "eager"))
    _keep(found, times, graph=f"{CHOLESKY}, graph", eager=f"{CHOLESKY}, eager", torch="torch Brand update")


def _with_eigh(name: str, bench: Bench, found: Findings) -> None:
    case, update = _checked_update(bench, name)
    times = called(bench.device, {"eager": update, "torch": _brand_of_torch(case)}, 2 * bench.sizes.seconds)
    n, r, k = bench.sizes.update
    faster = times.ratio("torch", "eager")
    found.figure(name, f"n {n}, r {r}, k {k}: eager torch Brand update / it", faster)
    _keep(found, times, eager=f"{name}, eager")


# ---------------------------------------------------------------------------------------------------------------------
# Damped solves
# ---------------------------------------------------------------------------------------------------------------------


def _damped_solve(bench: Bench, found: Findings) -> None:
    n, r, m = bench.sizes.solve
    factor, rhs = factors.eigh(bench.device, n, r), bench.device.normal(n, m)
    solve = lambda: brandla.damped_solve(factor, rhs, DAMPING)
    check_solve(*factors.on_cpu((factor, rhs, DAMPING, solve())))
    times = replayed(bench.device, {"op": solve, "torch": _by_torch(solve)}, [()], 2 * bench.sizes.seconds)
    floor = bench.ceilings.floor(Work(float32=4 * n * r * m, bytes=4 * (n * r + 2 * n * m)))
    words = f"n {n}, r {r}, {m} right-hand sides, in a graph"
    found.figure("damped_solve", f"{words}: torch form / it", times.ratio("torch", "op"), note=f"timed by {times.how}")
    part = floor.seconds / times.median("op").value
    found.figure("damped_solve", f"{words}: part of its ceiling", part, unit="", note=f"bound by {floor.bound_by}")
    _keep(found, times, op="damped_solve, graph", torch="damped_solve, torch form, graph")


def _kron_damped_solve(bench: Bench, found: Findings) -> None:
    device, (n, r) = bench.device, bench.sizes.kron
    left, right, matrix = factors.eigh(device, n, r), factors.eigh(device, n, r), device.normal(n, n)
    solve = lambda: brandla.kron_damped_solve(left, right, matrix, DAMPING, DAMPING)
    peers = {"torch form": _by_torch(solve), "one side, then the other": lambda: _one_by_one(left, right, matrix)}
    reference = _one_by_one(*(type(part)(*(x.double() for x in part)) for part in (left, right)), matrix.double())
    # Most of W lies outside both spans, so nothing cancels in the norm: rounding alone, as for a product.
    limit = ROUNDINGS * (2 * n + 2 * r) ** 0.5 * torch.finfo(torch.float32).eps
    for name, call in {"kron_damped_solve": solve, **peers}.items():
        error = float(torch.linalg.matrix_norm(call() - reference) / torch.linalg.matrix_norm(reference))
        require(error <= limit, f"{name}: relative error {error:.1e}, allowed {limit:.1e}")
    times = replayed(device, {"op": solve, **peers}, [()], 4 * bench.sizes.seconds)
    best = min(peers, key=lambda name: times.median(name).value)
    words = f"W {n} × {n}, r {r}, in a graph"
    faster = times.ratio(best, "op")
    found.figure("kron_damped_solve", f"{words}: best torch composition / it", faster, at_least=2, note=f"best: {best}")
    floor = bench.ceilings.floor(Work(float32=OPS["kron_damped_apply"].cost(n, n, r, r).flops, bytes=4 * 3 * n * n))
    part = floor.seconds / times.median("op").value
    note = f"bound by {floor.bound_by}"
    found.figure("kron_damped_solve", f"{words}: part of its ceiling", part, at_least=0.5, unit="", note=note)
    _keep(found, times, op="kron_damped_solve, graph", **{name: f"its {name}, graph" for name in peers})


def _one_by_one(left: brandla.LowRankEigh, right: brandla.LowRankEigh, matrix: Tensor) -> Tensor:
    """Return the two-sided solve as two one-sided ones, each of two products."""
    solved = _solve(left, matrix)
    return _solve(right, solved.mT).mT


def _solve(factor: brandla.LowRankEigh, rhs: Tensor) -> Tensor:
    values, vectors = factor
    inner = (-values / (values + DAMPING) / DAMPING)[:, None] * (vectors.mT @ rhs)
    return torch.addmm(rhs, vectors, inner, beta=1 / DAMPING)


def _by_torch(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def forced() -> Tensor:
        with brandla.backend("torch"):
            return call()

    return forced


# ---------------------------------------------------------------------------------------------------------------------
# Dense second moment
# ---------------------------------------------------------------------------------------------------------------------


def _gram_ema(bench: Bench, found: Findings) -> None:
    device, (n, k) = bench.device, bench.sizes.gram
    columns = (device.normal(n, k) / k**0.5).bfloat16()
    matrix = torch.eye(n, device=device.tensors)
    call = OPS["gram_ema_"]
    updated = matrix.clone()
    call(updated, columns, DECAY, WEIGHT)
    exact = DECAY * matrix.double() + WEIGHT * columns.double() @ columns.double().mT
    error = float(torch.linalg.matrix_norm(updated - exact) / torch.linalg.matrix_norm(exact))
    limit = ROUNDINGS * k**0.5 * torch.finfo(torch.float32).eps
    require(error <= limit, f"gram_ema_: relative error {error:.1e}, allowed {limit:.1e}")
    half = matrix.bfloat16()
    calls = {
        "op": lambda: call(updated, columns, DECAY, WEIGHT),
        "float32 M": _working_addmm(matrix, columns),
        "bfloat16 M": lambda: torch.addmm(half, columns, columns.mT, beta=DECAY, alpha=WEIGHT),
    }
    times = called(device, calls, 4 * bench.sizes.seconds)
    words = f"n {n}, k {k}, bfloat16 columns"
    faster = times.ratio("float32 M", "op")
    found.figure("gram_ema_", f"{words}: torch.addmm to float32 / it", faster, at_least=1.5)
    note = "keeps 8 bits of the moment"
    found.figure("gram_ema_", f"{words}: torch.addmm on a bfloat16 M / it", times.ratio("bfloat16 M", "op"), note=note)
    _keep(found, times, op="gram_ema_", **{name: f"torch.addmm, {name}" for name in list(calls)[1:]})


def _working_addmm(matrix: Tensor, columns: Tensor) -> Callable[[], Tensor]:
    """Return torch's fastest addmm that keeps the moment in float32: from half data where torch has that."""
    mixed = lambda: torch.addmm(matrix, columns, columns.mT, torch.float32, beta=DECAY, alpha=WEIGHT)
    try:
        mixed()
    except RuntimeError:
        data = columns.float()
        return lambda: torch.addmm(matrix, data, data.mT, beta=DECAY, alpha=WEIGHT)
    return mixed


# ---------------------------------------------------------------------------------------------------------------------
# Randomized eigendecomposition
# ---------------------------------------------------------------------------------------------------------------------


def _randomized_eigh(bench: Bench, found: Findings) -> None:
    n, r = bench.sizes.randomized
    for exponent in (0.5, 1.0):
        spectrum = torch.arange(1, n + 1, dtype=torch.float64, device=bench.device.tensors) ** -exponent
        truth = _matrix_of(spectrum)
        matrix, best = truth.float(), float(torch.linalg.vector_norm(spectrum[r:]))
        ours = lambda matrix=matrix: brandla.randomized_eigh(matrix, r, power_iterations=POWERS)
        theirs = lambda matrix=matrix: torch.svd_lowrank(matrix, q=r + OVERSAMPLE, niter=POWERS)
        own = _error(truth, lambda ours=ours: _eigh_of(*ours())) / best
        peer = _error(truth, lambda theirs=theirs: _svd_of(*theirs(), r)) / best
        require(own < 2, f"randomized_eigh: {own:.2f} times the best error")
        times = called(bench.device, {"ours": ours, "theirs": theirs}, 4 * bench.sizes.seconds)
        words = f"n {n}, rank {r}, i^−{exponent:g}, {POWERS} iterations both"
        faster = times.ratio("theirs", "ours")
        found.figure("randomized_eigh", f"{words}: torch.svd_lowrank / it", faster, at_least=3)
        note = f"Frobenius error over the best of its rank: {own:.5f}; svd_lowrank {peer:.5f}"
        found.figure("randomized_eigh", f"{words}: its error / svd_lowrank's", own / peer, at_most=1, note=note)
        _keep(found, times, ours=f"randomized_eigh, i^−{exponent:g}", theirs=f"torch.svd_lowrank, i^−{exponent:g}")


def _matrix_of(spectrum: Tensor) -> Tensor:
    """Return a dense matrix with these eigenvalues, whose eigenvectors are cosines with random signs."""
    n = len(spectrum)
    index = torch.arange(n, dtype=torch.float64, device=spectrum.device)
    basis = torch.cos(math.pi / n * (index[:, None] + 0.5) * index) * (2 / n) ** 0.5
    basis[:, 0] /= 2**0.5
    basis *= torch.sign(torch.sin(1e3 * index + 1))[:, None]
    return (basis * spectrum) @ basis.mT


def _error(truth: Tensor, approximate: Callable[[], Tensor]) -> float:
    """Return the median Frobenius norm of the error over three draws."""
    norms = []
    for seed in range(3):
        torch.manual_seed(seed)
        norms.append(float(torch.linalg.matrix_norm(truth - approximate())))
    return median(norms)


def _eigh_of(values: Tensor, vectors: Tensor) -> Tensor:
    return (vectors.double() * values.double()) @ vectors.double().mT


def _svd_of(left: Tensor, values: Tensor, right: Tensor, r: int) -> Tensor:
    return (left.double()[:, :r] * values.double()[:r]) @ right.double()[:, :r].mT
