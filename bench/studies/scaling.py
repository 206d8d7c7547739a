"""How time and memory grow with n, r and k: updates and applications of a factor beside what a dense one needs.

Run by ``make study-scaling``. Every result is checked against float64 before it is timed. All calls at a size take
turns with one reference, the GEMMs of an update of that size, so that times can be told apart from the machine's mood.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure as Picture
from torch import Tensor

import brandla
from bench.benches import timing
from bench.benches.problems import (
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
from bench.benches.resources import peak_extra_bytes
from bench.benches.written_out import update_floor
from bench.frame import pages, pictures
from bench.frame.figures import spelled
from bench.frame.pictures import Theme
from bench.frame.study import Piece, Row, Study, Tables, command
from bench.gpu import cases as gpu_cases
from bench.gpu.device import Device, size_of
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
    steady = partial(gpu_cases.steady, n=size.n, r=size.r, k=size.k, steps=STEPS_TO_STEADY_STATE, device=device.tensors)
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
    check = lambda updated: check_update(name, gpu_cases.on_cpu(case), gpu_cases.on_cpu(updated))
    return Call(lambda: update(case.factor, case.columns, decay=DECAY, weight=WEIGHT), check, size_of(tuple(case)))


def solve_call(name: str, factor: Any, sides: Tensor) -> Call:
    """Return a damped solve with k right-hand sides, or with a pair of them."""
    left, right = sides
    judge = lambda rhs, solved: check_solve(*gpu_cases.on_cpu((factor, rhs, DAMPING, solved)))
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
    approximates = lambda slack: lambda found: check_decomposition(name, truth, *gpu_cases.on_cpu(found), r, slack)
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
    check = lambda solved: residual_is_rounding(name, truth, DAMPING, *gpu_cases.on_cpu((columns, solved)))
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

    def piece(axis: str, size: Size, names: Sequence[str]) -> Piece:
        flops = sum(size.n ** METHODS[name].time for name in names if METHODS[name].dense)
        seconds = 6 * flops / 2e10 + 1.5 * sizes.seconds * len(names) + size.n / 2e4
        key = {"axis": axis, **size._asdict()}
        return Piece("rows", key, seconds, lambda *_: measured(size, names, sizes.seconds, device))

    tall = [name for name, method in METHODS.items() if not method.dense]
    found = []
    for n in sorted({n for each in sizes.n.values() for n in each}):
        names = [name for name, method in METHODS.items() if n in sizes.n[method.time]]
        found.append(piece("n", sizes.with_n._replace(n=n), names))
    for r in sizes.r:
        size = sizes.with_r._replace(r=r)
        found += [piece("r", size, tall), piece("r", size._replace(n=sizes.dense), ["randomized_eigh"])]
    return found + [piece("k", sizes.with_k._replace(k=k), tall) for k in sizes.k]


def measured(size: Size, names: Sequence[str], seconds: float, device: Device) -> Iterator[Row]:
    """Yield time and memory of each method at a size: the short calls in turns together, a long one by itself."""
    floor = update_floor(gpu_cases.steady("eigh_update", *size, STEPS_TO_STEADY_STATE, device.tensors))
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
            yield {
                "method": name,
                "seconds": timing.of_median(times[name]),
                "over_reference": timing.ratio(times[name], times[REFERENCE]),
                "held_bytes": made[name].held,
                "peak_bytes": peak_extra_bytes(made[name].function, device.tensors.type, warm_up=False),
                "rounds": len(times[name]),
            }
    spectral_matrix.cache_clear()
    gpu_cases.steady.cache_clear()


# ---------------------------------------------------------------------------------------------------------------------
# Exponents, tables, page and picture
# ---------------------------------------------------------------------------------------------------------------------

FEWEST_SIZES = 3
LARGER = "larger half"
WINDOWS = {"all": "all sizes", LARGER: "the larger half of the sizes"}


def exponents(tables: Tables) -> Tables:
    """Return the fitted exponents of time and memory, over all sizes and over the larger half of them."""
    fits = []
    rows = pd.DataFrame(tables.get("rows", []), columns=["axis", "method", "n", "r", "k", *AMOUNTS])
    rows["time"], rows["memory"] = rows["seconds"].str[0], rows["held_bytes"] + rows["peak_bytes"]
    for (axis, method), own in rows.groupby(["axis", "method"], sort=False):
        for window, part in (("all", own), (LARGER, own[len(own) // 2 :])):
            for quantity in ("time", "memory") if len(part) >= FEWEST_SIZES else ():
                sizes = part[axis].tolist()
                about = {"axis": axis, "method": method, "quantity": quantity, "window": window, "sizes": sizes}
                fits.append(about | {"exponent": timing.slope(sizes, part[quantity].tolist())})
    return {"exponents": fits}


AMOUNTS = ("seconds", "held_bytes", "peak_bytes")


def shown(content: Row) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the exponents."""
    if not content["exponents"]:
        return
    fits = pd.DataFrame(content["exponents"])
    fits["sizes"] = fits["sizes"].map(lambda sizes: f"{sizes[0]} … {sizes[-1]}")
    fits["exponent"] = fits["exponent"].map(in_words)
    by = {"axis": "grows", "method": "method", "quantity": "quantity"}
    wide = fits.pivot_table(["sizes", "exponent"], list(by), "window", aggfunc="first", sort=False, observed=True)
    cells = wide.reset_index(names=list(by.values())).fillna("")
    cells.columns = [" ".join(filter(None, column)) for column in cells.columns]
    order = [f"{part} {window}" for window in ("all", LARGER) for part in ("sizes", "exponent")]
    yield "Exponents", cells.reindex(columns=[*by.values(), *order], fill_value="")


def in_words(interval: Sequence[float | None]) -> str:
    """Return an exponent with its interval, where there is one."""
    value, low, high = interval
    return f"{value:.2f}" if low is None or high is None else f"{value:.2f} ({low:.2f} to {high:.2f})"


ABOUT = """### Growth with n, r and k

`make study-scaling`. float32; updates at the steady state of an i^−½ stream; dense methods on a matrix with eigenvalues
1/i, handed to them for nothing; solves have k right-hand sides. Every result was checked against float64 before it was
timed. Memory is what is held between calls and the peak of a call on top. An exponent is the slope of log time, or
log memory, in log size by least squares, with Student's 95 % interval, misfit included: over all sizes, and over the
larger half of them, where what does not grow (calls, the core of order r + k) weighs less.
"""


def section(content: Row, machine: str) -> Iterator[str]:
    """Yield the section of ``docs/measurements.md``."""
    yield ABOUT + pages.caveats(content["facts"])
    yield pages.picture(STUDY.name, machine, "Time and memory against n, r and k")
    yield from verdict(content["exponents"])
    yield from (pages.markdown(cells) for _, cells in shown(content))
    rows = pd.DataFrame(content["rows"])
    yield "#### Times and memory\n"
    yield pages.markdown(
        pd.DataFrame(
            {
                "n, r, k": rows[["n", "r", "k"]].astype(str).agg(", ".join, axis=1),
                "method": rows["method"],
                "ms": (1e3 * rows["seconds"].str[0]).map(spelled),
                "× the GEMMs of an update": rows["over_reference"].map(
                    lambda ratio: "{} ({} to {})".format(*map(spelled, ratio))
                ),
                "held, MB": (rows["held_bytes"] / 1e6).map(spelled),
                "peak on top, MB": (rows["peak_bytes"] / 1e6).map(spelled),
            }
        )
    )


def verdict(fits: Sequence[Row]) -> Iterator[str]:
    """Yield how the time of each method grew with n, by the power that it is said to grow with."""
    lines = ["Exponents of time in n:\n"]
    for power, window in ((1, "all"), (1, LARGER), (2, LARGER), (3, LARGER)):
        of_time = [fit for fit in fits if (fit["axis"], fit["quantity"], fit["window"]) == ("n", "time", window)]
        own = [fit for fit in of_time if fit["method"] in METHODS and METHODS[fit["method"]].time == power]
        if own:
            found = "; ".join(f"`{fit['method']}` {in_words(fit['exponent'])}" for fit in own)
            lines.append(f"- said to be {power}, over {WINDOWS[window]}: {found}.")
    yield "\n".join([*lines, ""])


# Okabe and Ito's palette, which colour-blind readers tell apart, and lighter ones of the same hue.
COLOURS = {
    "root_update": ("#d55e00", "#ff8f40"),
    "root_update, cholesky": ("#8f6a4a", "#c9a27e"),
    "eigh_update": ("#0072b2", "#4db2ee"),
    "damped_solve": ("#009e73", "#2fd3a5"),
    "kron_damped_solve, pair": ("#3f8f9b", "#7fd0dc"),
    "gram_ema_": ("#9a9a9a", "#8a8f99"),
    "randomized_eigh": ("#b07900", "#f0b840"),
    "torch.svd_lowrank": ("#b05c90", "#e49cc8"),
    "Cholesky solve": ("#6b6b6b", "#b8bcc6"),
    "torch.linalg.eigh": ("#000000", "#ffffff"),
}


def draw(content: Row, theme: Theme, most: int = 4) -> Picture:
    """Draw time and memory against n, and time against r and k; the first ``most`` of these."""
    rows = pd.DataFrame(content["rows"]).query("method in @COLOURS")
    rows = rows.assign(time=rows["seconds"].str[0], memory=rows["held_bytes"] + rows["peak_bytes"])
    found = [
        (axis, quantity, title)
        for axis, quantity, title in (
            ("n", "time", "Time against n"),
            ("n", "memory", "Memory against n"),
            ("r", "time", "Time against the rank"),
            ("k", "time", "Time against the new columns"),
        )
        if axis in set(rows["axis"])
    ][:most]
    words = f"Powers are fitted over {WINDOWS[LARGER]}"
    figure, axes = pictures.panels([4.6 if axis == "n" else 3.9 for axis, *_ in found], content, words, theme)
    powers = {
        (fit["axis"], fit["quantity"], fit["method"]): fit["exponent"][0]
        for fit in content["exponents"]
        if fit["window"] == LARGER
    }
    for panel, (axis, quantity, title) in zip(axes, found, strict=True):
        own = rows[rows["axis"] == axis]
        eigh = own[own["method"] == "eigh_update"]
        fixed = [f"{other} = {eigh[other].iloc[0]}" for other in "nrk" if other != axis and len(eigh)]
        pictures.titled(panel, title, ", ".join(fixed), theme)
        for method, line in own.groupby("method", sort=False):
            power = powers.get((axis, quantity, str(method)))
            others = set() if axis == "n" else set(line["n"]) - set(eigh["n"])
            at = "".join(f", n = {n}" for n in others)
            label = f"{method}{at}" + ("" if power is None else f"  ${axis}^{{{power:.2f}}}$")
            style = {"linewidth": 1.8, "marker": "o", "markersize": 3.5, "label": label}
            panel.plot(line[axis], line[quantity], color=theme.colour(*COLOURS[str(method)]), **style)
        panel.set_xscale("log", base=2)
        sizes = sorted(size for size in own[axis].unique() if size & (size - 1) == 0) or sorted(own[axis].unique())
        ticks = sizes[:: 2 if len(sizes) > 7 else 1]
        panel.set_xticks(ticks, list(map(str, ticks)))
        pictures.logarithmic(panel.yaxis, pictures.with_unit(pictures.TIMES if quantity == "time" else pictures.BYTES))
        panel.set_xlabel(axis)
        pictures.legend(panel, 2)
    return figure


STUDY = Study("scaling", {"quick": TOY, "usual": USUAL, "full": FULL}, pieces, shown, exponents, draw)

if __name__ == "__main__":
    command(STUDY, __doc__)()
