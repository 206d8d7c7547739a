"""How right the updates stay: what they lose, how orthonormal they stay and what the error bound says, on every stream.

Run by ``make study-streams``. Nothing here is timed but the stream that dies out, whose late steps are compared with
its early ones.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from statistics import median
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.linalg import LinAlgError

import brandla
import oracles
from bench import plain, results
from bench.facts import facts
from bench.families import DECAY, FAMILIES, WEIGHT, Family, Truth, best_discarded, reference
from bench.problems import UPDATES, orthonormality

DTYPES = {"float32": torch.float32, "float64": torch.float64}
Row = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# Losses, orthogonality and the error bound
# ---------------------------------------------------------------------------------------------------------------------


def losses(quick: bool) -> Iterator[Row]:
    """Yield a row for each family, dtype and update."""
    for name, family in FAMILIES.items():
        sized = shortened(family, 30) if quick else family
        for spelled, dtype in DTYPES.items():
            batches = sized.batches(dtype)
            truth = reference(sized, batches)
            about = {"family": name, "words": family.words, "sizes": family.sizes, "steps": sized.steps}
            for update, options in variants(dtype):
                run = followed(update, sized, batches, truth, **options)
                yield {**about, "dtype": spelled, "update": update, **options, **run}
            if sized.steps <= 100:
                yield {**about, "dtype": spelled, "update": "svd_append", **appended(sized, batches, truth)}


def variants(dtype: torch.dtype) -> list[tuple[str, dict[str, int]]]:
    """Return the updates, and in float32 also other numbers of subspace iterations."""
    both = [("eigh_update", {}), ("subspace_update", {})]
    others = [("subspace_update", {"iterations": 1}), ("subspace_update", {"iterations": 4})]
    return both + (others if dtype == torch.float32 else [])


def followed(update: str, family: Family, batches: list[Tensor], truth: Truth, **options: int) -> Row:
    """Run an update over a stream with its error bound; the errors are looked at ten times on the way."""
    function, kind = UPDATES[update]
    dtype = batches[0].dtype
    eps = torch.finfo(dtype).eps
    value = brandla.track(kind.zeros(family.n, family.r, dtype=dtype))
    defect, seen = 0.0, []
    every = max(len(batches) // 10, 1)
    for step, columns in enumerate(batches, 1):
        value = function(value, columns, decay=DECAY, weight=WEIGHT, **options)
        defect = max(defect, orthonormality(value.lowrank[1]) / eps)
        if step % every == 0 or step == len(batches):
            seen.append(bound_seen(truth.matrices[step - 1], value, eps * truth.roundings[step - 1]))
    return {
        **lost(truth.matrices[-1], dense(value.lowrank), truth.discarded[-1], family.r, eps),
        "orthonormality_over_eps": defect,
        "error": seen[-1]["error"],
        "bound": seen[-1]["bound"],
        "bound_over_error": seen[-1]["bound"] / max(seen[-1]["error"], 1e-300),
        "rounding": seen[-1]["rounding"],
        "bound_holds": all(one["error"] <= one["bound"] + one["rounding"] for one in seen),
        "above_bound_over_eps": max((one["error"] - one["bound"]) / (eps * one["norm"]) for one in seen),
    }


def bound_seen(matrix: Tensor, value: brandla.Tracked, rounding: float) -> dict[str, float]:
    """Return the true error, the bound, the rounding that the bound need not cover, and ‖M‖₂."""
    error = oracles.spectral_norm(matrix - dense(value.lowrank))
    norm = oracles.spectral_norm(matrix)
    return {"error": error, "bound": float(value.error_bound), "rounding": rounding, "norm": norm}


def lost(matrix: Tensor, approximation: Tensor, exact: float, rank: int, eps: float) -> Row:
    """Return the part of the trace that was lost beside the best of this rank and the exact truncated update."""
    trace = float(matrix.trace())
    best = best_discarded(matrix, rank)
    own = float((matrix - approximation).trace())
    rounding = 20 * eps * trace
    return {
        "best_over_trace": best / trace,
        "lost_over_trace": own / trace,
        "exact_over_trace": exact / trace,
        "rounding_over_trace": rounding / trace,
        "lost_over_best": own / max(best, 1e-300),
        "lost_over_exact": own / max(exact, 1e-300),
        "resolved": best > rounding,
        "within": own <= 1.05 * exact + rounding,
    }


def appended(family: Family, batches: list[Tensor], truth: Truth) -> Row:
    """Run svd_append, whose U diag(S²) Uᵀ is the same matrix."""
    dtype = batches[0].dtype
    eps = torch.finfo(dtype).eps
    svd = brandla.LowRankSVD.zeros(family.n, 0, family.r, dtype=dtype)
    defect = 0.0
    for columns in batches:
        svd = brandla.svd_append(svd, columns * WEIGHT**0.5, decay=DECAY**0.5)
        defect = max(defect, orthonormality(svd.U) / eps)
    left, values = svd.U.double(), svd.S.double()
    approximation = (left * values.square()) @ left.mT
    figures = lost(truth.matrices[-1], approximation, truth.discarded[-1], family.r, eps)
    return {**figures, "orthonormality_over_eps": defect}


def dense(factor: Any) -> Tensor:
    """Return the matrix of a factor in float64, from its own rounded parts."""
    return type(factor)(*(part.double() for part in factor)).dense()


def shortened(family: Family, steps: int) -> Family:
    """Return a family with fewer steps, for a short run."""
    return replace(family, steps=min(family.steps, steps))


# ---------------------------------------------------------------------------------------------------------------------
# Drift over many updates
# ---------------------------------------------------------------------------------------------------------------------

# update, family, (n, r, k), dtype, number of updates, whether drift is corrected
DRIFTS = [
    *itertools.product(
        UPDATES,
        ["slow", "medium", "fast", "flat", "clustered", "graded", "rank-16", "repeated"],
        [(96, 16, 8)],
        ["float32"],
        [10_000],
        [True],
    ),
    *itertools.product(UPDATES, ["slow", "fast"], [(96, 16, 8)], ["float64"], [10_000], [True]),
    *itertools.product(["eigh_update"], ["slow", "fast"], [(384, 64, 32)], ["float32"], [1000], [True, False]),
    *itertools.product(["eigh_update"], ["slow", "fast"], [(96, 16, 8)], ["float32"], [3000], [False]),
]
MARKS = (100, 1000, 3000, 10_000)
EVERY = 20
POOL = 300


def drifts(quick: bool) -> Iterator[Row]:
    """Yield ‖UᵀU − I‖₂/ε over many updates, with the correction of drift and without."""
    for update, name, sizes, spelled, updates, corrected in DRIFTS:
        count = updates // 40 if quick else updates
        with nullcontext() if corrected else uncorrected():
            seen = drift_of(update, name, sizes, DTYPES[spelled], count)
        known = {step: value for step, value in seen if value is not None}
        yield {
            "update": update,
            "family": name,
            "words": FAMILIES[name].words,
            "sizes": "{}, {}, {}".format(*sizes),
            "dtype": spelled,
            "updates": count,
            "corrected": corrected,
            "largest": max(known.values(), default=None),
            "at": {mark: known.get(mark) for mark in MARKS if mark <= count},
            "broke_down_after": next((step for step, value in seen if value is None), None),
        }


def drift_of(
    update: str, name: str, sizes: tuple[int, int, int], dtype: torch.dtype, count: int
) -> list[tuple[int, float | None]]:
    """Return ‖UᵀU − I‖₂/ε every few updates; None, and the end, where it is above 1 or not a number."""
    n, r, k = sizes
    function, kind = UPDATES[update]
    stream = FAMILIES[name].stream(n, k, 0)
    pool = [columns.to(dtype) for columns in itertools.islice(stream, min(count, POOL))]
    value = kind.zeros(n, r, dtype=dtype)
    seen: list[tuple[int, float | None]] = []
    for step in range(1, count + 1):
        value = function(value, pool[step % len(pool)], decay=DECAY, weight=WEIGHT)
        if step % EVERY == 0:
            defect = orthonormality(value[1])
            if not defect < 1:
                return [*seen, (step, None)]
            seen.append((step, defect / torch.finfo(dtype).eps))
    return seen


@contextmanager
def uncorrected() -> Iterator[None]:
    """Switch the correction of drift off."""
    none = lambda basis, rows: basis.new_zeros(basis.shape[-1], basis.shape[-1], dtype=torch.float64)
    with mock.patch("brandla._split.measure_drift", none):
        yield


def right_vectors(quick: bool) -> Iterator[Row]:
    """Yield ‖Vh Vhᵀ − I‖₂/ε of svd_append, whose right vectors are not corrected."""
    n, r, k, calls = 96, 16, 8, 50 if quick else 1000
    for name, decay in itertools.product(["slow", "medium", "flat"], [1.0, DECAY]):
        svd = brandla.LowRankSVD.zeros(n, 0, r)
        for columns in itertools.islice(FAMILIES[name].stream(n, k, 0), calls):
            svd = brandla.svd_append(svd, columns.float(), decay=decay)
        defect = orthonormality(svd.Vh.mT) / torch.finfo(torch.float32).eps
        yield {
            "family": name,
            "words": FAMILIES[name].words,
            "sizes": f"{n}, {r}, {k}",
            "calls": calls,
            "decay": decay,
            "orthonormality_over_eps": defect,
        }


# ---------------------------------------------------------------------------------------------------------------------
# The choices: two passes, and where subspace iteration starts
# ---------------------------------------------------------------------------------------------------------------------


def passes(quick: bool) -> Iterator[Row]:
    """Yield what a plain float32 update keeps of orthogonality with one projection and with two, beside the library."""
    n, r, k, steps = 384, 64, 32, 20 if quick else 200
    for name in ("slow", "medium", "fast", "rank-16"):
        family = replace(FAMILIES[name], n=n, r=r, k=k, steps=steps)
        batches = family.batches(torch.float32)
        own, first = worst_of(library_steps(family, batches))
        yield {
            "words": family.words,
            "sizes": family.sizes,
            "steps": steps,
            "one": worst_of(plain_steps(family, batches, 1)),
            "two": worst_of(plain_steps(family, batches, 2)),
            "library": (own, first),
        }


def plain_steps(family: Family, batches: list[Tensor], count: int) -> Iterator[float]:
    """Yield the defect after each plain update, and nothing more once LAPACK fails."""
    values = torch.zeros(family.r, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(family.n, family.r, generator=torch.Generator().manual_seed(1))).Q
    for columns in batches:
        try:
            values, basis = plain.update(values, basis, columns, DECAY, WEIGHT, count)
        except LinAlgError:
            return
        yield deviation(basis)


def library_steps(family: Family, batches: list[Tensor]) -> Iterator[float]:
    """Yield the defect after each update of the library."""
    value = brandla.LowRankEigh.zeros(family.n, family.r)
    for columns in batches:
        value = brandla.eigh_update(value, columns, decay=DECAY, weight=WEIGHT)
        yield orthonormality(value.eigenvectors)


def deviation(basis: Tensor) -> float:
    """Return ‖UᵀU − I‖₂, no column excused."""
    return oracles.spectral_norm(basis.double().mT @ basis.double() - torch.eye(basis.shape[1], dtype=torch.float64))


def worst_of(defects: Iterator[float]) -> tuple[float, float]:
    """Return the largest defect and the one after the first update."""
    every = list(defects)
    return max(every), every[0]


def starts(quick: bool) -> Iterator[Row]:
    """Yield what subspace iteration loses, in float64 with LAPACK's QR, by where it starts."""
    larger = replace(FAMILIES["switch"], n=512, r=96, k=64)
    for chosen in (FAMILIES["slow"], FAMILIES["switch"], larger, FAMILIES["switch-20"]):
        family = shortened(chosen, 25) if quick else chosen
        batches = family.batches(torch.float64)
        truth = reference(family, batches)
        best = best_discarded(truth.matrices[-1], family.r)
        for start, iterations in itertools.product(["old basis", "largest diagonals"], [1, 2]):
            core = torch.zeros(family.r, family.r, dtype=torch.float64)
            basis = torch.eye(family.n, family.r, dtype=torch.float64)
            for columns in batches:
                core, basis = plain.subspace_update(core, basis, columns, DECAY, WEIGHT, start, iterations)
            own = float((truth.matrices[-1] - basis @ core @ basis.mT).trace())
            yield {
                "words": family.words,
                "sizes": family.sizes,
                "steps": family.steps,
                "start": start,
                "iterations": iterations,
                "lost_over_best": own / best,
                "exact_over_best": truth.discarded[-1] / best,
            }


# ---------------------------------------------------------------------------------------------------------------------
# A stream that dies out
# ---------------------------------------------------------------------------------------------------------------------


def dying_out(quick: bool) -> Iterator[Row]:
    """Yield the end of a factor that decays for long, and how long a late step takes beside an early one."""
    n, r, k = 128, 24, 16
    for (update, (function, kind)), (spelled, dtype) in itertools.product(UPDATES.items(), DTYPES.items()):
        for width, steps, decay in ((0, 100_000, 0.95), (k, 3000, 0.5)):
            count = steps // 100 if quick else steps
            value = kind.zeros(n, r, dtype=dtype)
            for columns in itertools.islice(FAMILIES["slow"].stream(n, k, 0), 20):
                value = function(value, columns.to(dtype), decay=DECAY, weight=WEIGHT)
            nothing = torch.zeros(n, width, dtype=dtype)
            value, seconds = decayed(function, value, nothing, decay, count)
            tenth = max(count // 100, 1)
            yield {
                "update": update,
                "dtype": spelled,
                "batches": f"{width} columns" if width == 0 else f"{width} zero columns",
                "decay": decay,
                "steps": count,
                "finite": all(bool(part.isfinite().all()) for part in value),
                "largest_value": float(value[0].abs().max()),
                "late_over_early": median(seconds[-tenth:]) / median(seconds[:tenth]),
            }


def decayed(
    function: Callable[..., Any], value: Any, nothing: Tensor, decay: float, count: int
) -> tuple[Any, list[float]]:
    """Return a factor after many updates with no data, and the seconds of each."""
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        value = function(value, nothing, decay=decay, weight=WEIGHT)
        seconds.append(time.perf_counter() - start)
    return value, seconds


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "losses": losses,
    "drifts": drifts,
    "right_vectors": right_vectors,
    "passes": passes,
    "starts": starts,
    "dying_out": dying_out,
}


def main() -> None:
    """Run all parts and write the result file."""
    parser = argparse.ArgumentParser(prog="python -m bench.streams", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few steps: shows that the study runs, measures nothing")
    quick = parser.parse_args().quick
    # The matrices are small: threads would only wait for each other.
    torch.set_num_threads(1)
    console, begin = Console(highlight=False), time.monotonic()
    content: dict[str, Any] = {}
    for name, part in PARTS.items():
        start = time.monotonic()
        with threadpool_limits(1):
            content[name] = list(part(quick))
        console.print(f"{name}: {len(content[name])} rows, {time.monotonic() - start:.0f} s")
    machine = facts(quick) | {"seconds": time.monotonic() - begin}
    path = results.write("streams", machine, content)
    console.print(f"written: {path.relative_to(results.ROOT)}")


if __name__ == "__main__":
    main()
