"""How right the updates stay: what they lose, what keeps of their form and what the error bound says, on every stream.

Run by ``make study-streams``. Nothing here is timed but the stream that dies out, whose late steps are compared with
its early ones.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from rich.console import Console
from threadpoolctl import threadpool_limits
from torch import Tensor

import brandla
import oracles
from bench.benches.problems import UPDATES, defect, orthonormality
from bench.families import DECAY, FAMILIES, WEIGHT, Family, Truth, best_discarded, reference
from bench.frame import results
from bench.frame.facts import facts

DTYPES = {"float32": torch.float32, "float64": torch.float64}
Row = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# Losses, form and the error bound
# ---------------------------------------------------------------------------------------------------------------------


def losses(quick: bool) -> Iterator[Row]:
    """Yield a row for each family, dtype and update."""
    for name, family in FAMILIES.items():
        sized = shortened(family, 30) if quick else family
        for spelled, dtype in DTYPES.items():
            batches = sized.batches(dtype)
            truth = reference(sized, batches)
            about = {"family": name, "words": family.words, "sizes": family.sizes, "steps": sized.steps}
            for update in UPDATES:
                yield {**about, "dtype": spelled, "update": update, **followed(update, sized, batches, truth)}
            if sized.steps <= 100:
                yield {**about, "dtype": spelled, "update": "svd_append", **appended(sized, batches, truth)}


def followed(update: str, family: Family, batches: list[Tensor], truth: Truth) -> Row:
    """Run an update over a stream with its error bound; the errors are looked at ten times on the way."""
    function, kind = UPDATES[update]
    dtype = batches[0].dtype
    eps = torch.finfo(dtype).eps
    value = brandla.track(kind.zeros(family.n, family.r, dtype=dtype))
    worst, seen = 0.0, []
    every = max(len(batches) // 10, 1)
    for step, columns in enumerate(batches, 1):
        value = function(value, columns, decay=DECAY, weight=WEIGHT)
        worst = max(worst, defect(value.lowrank) / eps)
        if step % every == 0 or step == len(batches):
            seen.append(bound_seen(truth.matrices[step - 1], value, eps * truth.roundings[step - 1]))
    return {
        **lost(truth.matrices[-1], dense(value.lowrank), truth.discarded[-1], family.r, eps),
        "defect_over_eps": worst,
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
    worst = 0.0
    for columns in batches:
        svd = brandla.svd_append(svd, columns * WEIGHT**0.5, decay=DECAY**0.5)
        worst = max(worst, orthonormality(svd.U) / eps)
    left, values = svd.U.double(), svd.S.double()
    approximation = (left * values.square()) @ left.mT
    figures = lost(truth.matrices[-1], approximation, truth.discarded[-1], family.r, eps)
    return {**figures, "defect_over_eps": worst}


def dense(factor: Any) -> Tensor:
    """Return the matrix of a factor in float64, from its own rounded parts."""
    return type(factor)(*(part.double() for part in factor)).dense()


def shortened(family: Family, steps: int) -> Family:
    """Return a family with fewer steps, for a short run."""
    return replace(family, steps=min(family.steps, steps))


# ---------------------------------------------------------------------------------------------------------------------
# Drift over many updates
# ---------------------------------------------------------------------------------------------------------------------

# update, family, dtype
DRIFTS = [
    *itertools.product(
        UPDATES, ["slow", "medium", "fast", "flat", "clustered", "graded", "rank-16", "repeated"], ["float32"]
    ),
    *itertools.product(UPDATES, ["slow", "fast"], ["float64"]),
]
MANY, SIZES_OF_MANY = 10_000, (96, 16, 8)
MARKS = (100, 1000, 3000, 10_000)
EVERY = 20
POOL = 300


def drifts(quick: bool) -> Iterator[Row]:
    """Yield how far factors are from their form over many updates, in units of ε."""
    for update, name, spelled in DRIFTS:
        count = MANY // 40 if quick else MANY
        seen = dict(drift_of(update, name, DTYPES[spelled], count))
        yield {
            "update": update,
            "family": name,
            "words": FAMILIES[name].words,
            "sizes": "{}, {}, {}".format(*SIZES_OF_MANY),
            "dtype": spelled,
            "updates": count,
            "largest": max(seen.values()),
            "at": {mark: seen[mark] for mark in MARKS if mark <= count},
        }


def drift_of(update: str, name: str, dtype: torch.dtype, count: int) -> Iterator[tuple[int, float]]:
    """Yield the number of updates and the defect in units of ε, every few updates."""
    n, r, k = SIZES_OF_MANY
    function, kind = UPDATES[update]
    pool = [columns.to(dtype) for columns in itertools.islice(FAMILIES[name].stream(n, k, 0), min(count, POOL))]
    value = kind.zeros(n, r, dtype=dtype)
    for step in range(1, count + 1):
        value = function(value, pool[step % len(pool)], decay=DECAY, weight=WEIGHT)
        if step % EVERY == 0:
            yield step, defect(value) / torch.finfo(dtype).eps


def right_vectors(quick: bool) -> Iterator[Row]:
    """Yield ‖Vh Vhᵀ − I‖₂/ε of svd_append, whose right vectors are not corrected."""
    n, r, k, calls = 96, 16, 8, 50 if quick else 1000
    for name, decay in itertools.product(["slow", "medium", "flat"], [1.0, DECAY]):
        svd = brandla.LowRankSVD.zeros(n, 0, r)
        for columns in itertools.islice(FAMILIES[name].stream(n, k, 0), calls):
            svd = brandla.svd_append(svd, columns.float(), decay=decay)
        off = orthonormality(svd.Vh.mT) / torch.finfo(torch.float32).eps
        yield {
            "family": name,
            "words": FAMILIES[name].words,
            "sizes": f"{n}, {r}, {k}",
            "calls": calls,
            "decay": decay,
            "defect_over_eps": off,
        }


# ---------------------------------------------------------------------------------------------------------------------
# Damped solves, by the damping
# ---------------------------------------------------------------------------------------------------------------------

# Over the largest eigenvalue of M.
DAMPINGS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


def solves(quick: bool) -> Iterator[Row]:
    """Yield errors of damped solves in float32 beside the truncated update in float64, and what truncation costs."""
    n, r, k, steps = 256, 64, 16, 25 if quick else 1000
    rhs = torch.randn(n, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for name in ("slow", "medium", "fast"):
        family = replace(FAMILIES[name], n=n, r=r, k=k, steps=steps)
        batches = family.batches(torch.float32)
        matrix = torch.zeros(n, n, dtype=torch.float64)
        exact = brandla.LowRankEigh.zeros(n, r, dtype=torch.float64)
        values = {update: kind.zeros(n, r) for update, (_, kind) in UPDATES.items()}
        for columns in batches:
            matrix = oracles.updated(matrix, columns, DECAY, WEIGHT)
            exact = brandla.eigh_update(exact, columns.double(), decay=DECAY, weight=WEIGHT)
            for update, (function, _) in UPDATES.items():
                values[update] = function(values[update], columns, decay=DECAY, weight=WEIGHT)
        for damping in DAMPINGS:
            shift = damping * oracles.spectral_norm(matrix)
            wanted = brandla.damped_solve(exact, rhs, shift)
            whole = torch.linalg.solve(matrix + shift * torch.eye(n, dtype=torch.float64), rhs)
            found = {update: brandla.damped_solve(value, rhs.float(), shift) for update, value in values.items()}
            yield {
                "family": name,
                "words": family.words,
                "sizes": family.sizes,
                "steps": steps,
                "damping": damping,
                "truncation": relative(wanted, whole),
                "errors": {update: relative(solved, wanted) for update, solved in found.items()},
            }


def relative(found: Tensor, wanted: Tensor) -> float:
    """Return ‖X̂ − X‖_F / ‖X‖_F."""
    return float(torch.linalg.matrix_norm(found.double() - wanted) / torch.linalg.matrix_norm(wanted))


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
    "solves": solves,
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
