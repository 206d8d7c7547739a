"""How time and memory grow with n, r and k: updates and applications of a factor beside what a dense one needs.

Run by ``make study-scaling``. Every result is checked against float64 before it is timed. All calls at a size take
turns with one reference, the GEMMs of an update of that size, so that times can be told apart from the machine's mood.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import brandla
from bench import study, timing
from bench.cpu import device_of
from bench.floors import update_floor
from bench.gpu import cases
from bench.gpu.device import Device, size_of
from bench.memory import peak_extra_bytes_on
from bench.problems import (
    DECAY,
    STEPS_TO_STEADY_STATE,
    UPDATES,
    WEIGHT,
    check_decomposition,
    check_moment,
    check_solve,
    check_update,
    matrix_of_spectrum,
    residual_is_rounding,
)
from bench.study import Piece, Row
from bench.timing import Interval
from brandla_kernels import gram_ema_

DAMPING = 0.1
REFERENCE = "GEMMs of an update"


class Size(NamedTuple):
    """n rows, rank r, k new columns or right-hand sides."""

    n: int
    r: int
    k: int


class Method(NamedTuple):
    """Whether a dense matrix is worked on, and the power of n that the time is said to grow with."""

    dense: bool
    time: int


METHODS = {
    **{name: Method(dense=False, time=1) for name in UPDATES},
    "damped_solve": Method(dense=False, time=1),
    "kron_damped_solve, pair": Method(dense=False, time=1),
    "gram_ema_": Method(dense=True, time=2),
    "randomized_eigh": Method(dense=True, time=2),
    "torch.svd_lowrank": Method(dense=True, time=2),
    "Cholesky solve": Method(dense=True, time=3),
    "torch.linalg.eigh": Method(dense=True, time=3),
}


@dataclass(frozen=True)
class Sizes:
    """What a run measures: the n of each kind of method, and for growth with r and with k the sizes they share.

    An update meets at least half as many columns as its rank.
    """

    n: dict[int, tuple[int, ...]]  # by the power of n that the time grows with
    with_n: Size
    r: tuple[int, ...]
    with_r: Size
    k: tuple[int, ...]
    with_k: Size
    dense: int  # n of the dense matrix while r grows
    seconds: float  # time spent on one timing


def _doubling(first: int, last: int, between: bool = False) -> tuple[int, ...]:
    """Return first, 2·first, … last, with 3/2 of each ``between`` if wanted."""
    powers = range((last // first).bit_length())
    sizes = [first * 2**power for power in powers]
    return tuple(sorted(sizes + ([size * 3 // 2 for size in sizes[:-1]] if between else [])))


USUAL = Sizes(
    n={
        1: _doubling(1024, 65536, between=True),
        2: _doubling(1024, 8192, between=True),
        3: _doubling(512, 4096, between=True),
    },
    with_n=Size(0, 128, 64),
    r=_doubling(16, 256),
    with_r=Size(8192, 0, 128),
    k=_doubling(32, 512),
    with_k=Size(8192, 64, 0),
    dense=4096,
    seconds=0.8,
)
FULL = Sizes(
    n={
        1: _doubling(4096, 2**20),
        2: _doubling(2048, 16384, between=True),
        3: _doubling(1024, 16384, between=True),
    },
    with_n=Size(0, 256, 256),
    r=_doubling(32, 1024),
    with_r=Size(65536, 0, 512),
    k=_doubling(128, 2048),
    with_k=Size(65536, 256, 0),
    dense=16384,
    seconds=0.8,
)
TOY = Sizes(
    n=dict.fromkeys((1, 2, 3), (48, 64, 96, 128)),
    with_n=Size(0, 8, 8),
    r=(4, 8, 16),
    with_r=Size(96, 0, 8),
    k=(4, 8, 16),
    with_k=Size(96, 8, 0),
    dense=64,
    seconds=0.0,
)


# ---------------------------------------------------------------------------------------------------------------------
# The calls
# ---------------------------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """A call, the check of its result, and the bytes that it needs held from one call to the next."""

    function: Callable[[], Any]
    check: Callable[[Any], None]
    held: int


@cache
def spectral_matrix(n: int) -> Tensor:
    """Return a dense float64 matrix with the eigenvalues 1/i."""
    return matrix_of_spectrum(1 / np.arange(1, n + 1), seed=0)


def calls(size: Size, device: Device, names: Sequence[str]) -> dict[str, Call]:
    """Return the calls of these methods at a size."""
    steady = partial(cases.steady, n=size.n, r=size.r, k=size.k, steps=STEPS_TO_STEADY_STATE, device=device.tensors)
    made = {}
    for name in names:
        if name in UPDATES:
            made[name] = update_call(name, steady(name))
        elif not METHODS[name].dense:
            made[name] = solve_call(name, steady("eigh_update").factor, device.normal(2, size.n, size.k))
        else:
            made[name] = dense_call(name, size, device)
    return made


def update_call(name: str, case: Any) -> Call:
    """Return an update of a factor in its steady state."""
    update, _ = UPDATES[name]
    check = lambda updated: check_update(name, cases.on_cpu(case), cases.on_cpu(updated))
    return Call(lambda: update(case.factor, case.columns, decay=DECAY, weight=WEIGHT), check, size_of(tuple(case)))


def solve_call(name: str, factor: Any, sides: Tensor) -> Call:
    """Return a damped solve with k right-hand sides, or with a pair of them."""
    left, right = sides
    judge = lambda rhs, solved: check_solve(*cases.on_cpu((factor, rhs, DAMPING, solved)))
    if name == "damped_solve":
        call = lambda: brandla.damped_solve(factor, left, DAMPING)
        return Call(call, partial(judge, left), size_of((factor, left)))
    call = lambda: brandla.kron_damped_solve(factor, factor, (left, right), DAMPING, DAMPING)
    check = lambda solved: [judge(*pair) for pair in zip((left, right), solved, strict=True)]
    # Two factors, as of two sides of a layer; here they are one and the same.
    return Call(call, check, size_of((factor, factor, left, right)))


def dense_call(name: str, size: Size, device: Device) -> Call:
    """Return what works on the dense n × n matrix, which is handed to it for nothing."""
    truth, r = spectral_matrix(size.n), size.r
    matrix = truth.float().to(device.tensors)
    columns = device.normal(size.n, size.k)
    held = size_of(matrix)
    approximates = lambda slack: lambda found: check_decomposition(name, truth, *cases.on_cpu(found), r, slack)
    match name:
        case "gram_ema_":
            moment = matrix.clone()
            check = lambda _: check_moment(matrix, columns, moment)
            return Call(lambda: gram_ema_(moment, columns, DECAY, WEIGHT), check, held + size_of(columns))
        case "randomized_eigh":
            return Call(lambda: brandla.randomized_eigh(matrix, r), approximates(2.0), held)
        case "torch.svd_lowrank":
            decompose = lambda: torch.svd_lowrank(matrix, q=r + 10, niter=2)
            return Call(lambda: _leading(*decompose()[1::-1], r), approximates(2.0), held)
        case "torch.linalg.eigh":
            return Call(lambda: _ascending(*torch.linalg.eigh(matrix), r), approximates(1.001), held)
    shift = DAMPING * torch.eye(size.n, device=device.tensors)
    solve = lambda: torch.cholesky_solve(columns, torch.linalg.cholesky(matrix + shift))
    check = lambda solved: residual_is_rounding(name, truth, DAMPING, *cases.on_cpu((columns, solved)))
    return Call(solve, check, held + size_of(columns))


def _leading(values: Tensor, vectors: Tensor, r: int) -> tuple[Tensor, Tensor]:
    return values[:r], vectors[:, :r]


def _ascending(values: Tensor, vectors: Tensor, r: int) -> tuple[Tensor, Tensor]:
    return values[-r:], vectors[:, -r:]


# ---------------------------------------------------------------------------------------------------------------------
# Time and memory at a size
# ---------------------------------------------------------------------------------------------------------------------


def pieces(sizes: Sizes, device: Device) -> list[Piece]:
    """Return the study in pieces, one for each size."""
    by_n = sorted({n for each in sizes.n.values() for n in each})
    found = [_piece("n", sizes.with_n._replace(n=n), _grown_with_n(sizes, n), sizes, device) for n in by_n]
    tall = [name for name, method in METHODS.items() if not method.dense]
    for r in sizes.r:
        size = sizes.with_r._replace(r=r)
        found.append(_piece("r", size, tall, sizes, device))
        found.append(_piece("r", size._replace(n=sizes.dense), ["randomized_eigh"], sizes, device))
    found.extend(_piece("k", sizes.with_k._replace(k=k), tall, sizes, device) for k in sizes.k)
    return found


def _grown_with_n(sizes: Sizes, n: int) -> list[str]:
    return [name for name, method in METHODS.items() if n in sizes.n[method.time]]


def _piece(axis: str, size: Size, names: Sequence[str], sizes: Sizes, device: Device) -> Piece:
    words = f"growth with {axis}: n {size.n}, r {size.r}, k {size.k}"
    flops = sum(size.n ** METHODS[name].time for name in names if METHODS[name].dense)
    seconds = 6 * flops / 2e10 + 1.5 * sizes.seconds * len(names) + size.n / 2e4
    return Piece(words, seconds, lambda: measured(axis, size, names, sizes.seconds, device))


def measured(axis: str, size: Size, names: Sequence[str], seconds: float, device: Device) -> Iterator[Row]:
    """Yield time and memory of each method at a size: the short calls in turns together, a long one by itself."""
    floor = update_floor(cases.steady("eigh_update", *size, STEPS_TO_STEADY_STATE, device.tensors))
    made = calls(size, device, names)
    for call in made.values():
        call.check(call.function())
    tall = [name for name in names if not METHODS[name].dense]
    for together in (tall, *([name] for name in names if METHODS[name].dense)):
        if not together:
            continue
        functions = {REFERENCE: floor} | {name: made[name].function for name in together}
        times = device.alternating(functions, seconds * len(together))
        for name in together:
            yield _row(axis, size, name, times[name], times[REFERENCE], made[name], device)
    spectral_matrix.cache_clear()
    cases.steady.cache_clear()


def _row(
    axis: str, size: Size, name: str, times: list[float], reference: list[float], call: Call, device: Device
) -> Row:
    return {
        "axis": axis,
        "method": name,
        **size._asdict(),
        "seconds": timing.of_median(times),
        "over_reference": timing.ratio(times, reference),
        "held_bytes": call.held,
        "peak_bytes": peak_extra_bytes_on(device.tensors, call.function, warm_up=False),
        "rounds": len(times),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Exponents
# ---------------------------------------------------------------------------------------------------------------------

FEWEST_SIZES = 3


def exponents(rows: Sequence[Row]) -> Iterator[Row]:
    """Yield the fitted exponents of time and memory, over all sizes and over the larger half of them."""
    for axis in "nrk":
        for name in METHODS:
            own = [row for row in rows if (row["axis"], row["method"]) == (axis, name)]
            for window, part in (("all", own), ("larger half", own[len(own) // 2 :])):
                if len(part) >= FEWEST_SIZES:
                    yield from _fits(axis, name, window, part)


def _fits(axis: str, name: str, window: str, rows: Sequence[Row]) -> Iterator[Row]:
    sizes = [row[axis] for row in rows]
    amounts = {
        "time": [Interval(*row["seconds"]).value for row in rows],
        "memory": [row["held_bytes"] + row["peak_bytes"] for row in rows],
    }
    for quantity, values in amounts.items():
        about = {"axis": axis, "method": name, "quantity": quantity, "window": window, "sizes": sizes}
        yield about | {"exponent": timing.slope(sizes, values)}


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def table(fits: Sequence[Row]) -> Table:
    """Return the exponents as a table."""
    shown = Table("in", "method", "quantity", "sizes", "exponent", "95 % interval", title="Exponents")
    for fit in fits:
        value, low, high = fit["exponent"]
        between = f"{fit['sizes'][0]} … {fit['sizes'][-1]}"
        shown.add_row(fit["axis"], fit["method"], fit["quantity"], between, f"{value:.2f}", f"{low:.2f} to {high:.2f}")
    return shown


def main() -> int:
    """Measure, fit, print the table and write the result file."""
    chosen = study.options("scaling", __doc__)
    device, console = device_of(chosen.quick), Console()
    start = study.prepare(chosen.quick)
    sizes = TOY if chosen.quick else FULL if chosen.full else USUAL
    rows, interrupted = study.run(pieces(sizes, device), console)
    fits = list(exponents(rows))
    console.print(table(fits))
    content = {"rows": rows, "exponents": fits, "interrupted": interrupted}
    study.keep("scaling", content, device, chosen, start, console)
    return study.INTERRUPTED if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
