"""The accuracy of the updates on every stream: their losses, how well they keep their form, and their error bounds.

Run by ``make study-streams``. Only the stream that dies out is timed: its late steps beside its early ones.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import islice, product
from statistics import median
from typing import Any

import pandas as pd
import torch
from torch import Tensor

import brandla
from bench.benches.problems import DECAY, UPDATES, WEIGHT, defect, orthonormality
from bench.frame import pictures
from bench.frame.study import Piece, Row, Study, Tables, command, sweep, tables_of
from bench.gpu.device import Device
from tests import oracles
from tests.oracles import STREAMS, Stream, power_law, spectral_stream, switching_stream

DTYPES = {"float32": torch.float32, "float64": torch.float64}
GROWTH = 1.02
ROUNDING = 8


@dataclass(frozen=True)
class Family:
    """A stream with its sizes: n rows, rank r, k columns a batch."""

    words: str
    stream: Stream
    n: int = 128
    r: int = 24
    k: int = 16
    steps: int = 60

    def batches(self, dtype: torch.dtype) -> list[Tensor]:
        """Return the batches, rounded to `dtype`."""
        return [columns.to(dtype) for columns in islice(self.stream(self.n, self.k, 0), self.steps)]

    @property
    def about(self) -> Row:
        return {"words": self.words, "sizes": f"{self.n}, {self.r}, {self.k}"}


def scaled(size: Callable[[int], float]) -> Stream:
    """Return batches of i^−½ columns, each times the size at its step."""
    return lambda n, k, seed: (size(step) * columns for step, columns in enumerate(STREAMS["slow"](n, k, seed)))


FAMILIES = {
    "slow": Family("i^−½", STREAMS["slow"]),
    "medium": Family("i^−3/2", STREAMS["medium"]),
    "fast": Family("i^−3", STREAMS["fast"]),
    "flat": Family("flat", STREAMS["flat"]),
    "clustered": Family("four clusters", STREAMS["clustered"]),
    "graded": Family("graded, 1 … 10⁻¹²", STREAMS["graded"]),
    "rank-16": Family("rank 16", STREAMS["rank-16"]),
    "rank-16-wide": Family("rank 16, more columns than that", STREAMS["rank-16"], k=32),
    "repeated": Family("every column eight times", spectral_stream(power_law(0.5), copies=8)),
    "switch": Family("switches to an orthogonal subspace", switching_stream(1.0)),
    "switch-20": Family("switches to a subspace 20 times smaller", switching_stream(1 / 20)),
    "switch-1000": Family("switches to a subspace 1000 times smaller", switching_stream(1 / 1000)),
    "growing": Family("grows by 2 % a step", scaled(lambda step: GROWTH**step), steps=1000),
    "one-column": Family("one column at a time", STREAMS["slow"], k=1, steps=400),
    "many-columns": Family("many more columns than the rank", STREAMS["slow"], r=8, k=96),
    "zeros-between": Family("zero batches between", STREAMS["zeros-between"]),
    "dies-out": Family("zero batches for good", scaled(lambda step: float(step < 60)), steps=100),
}


# --- Losses, form and the error bound


def losses(name: str, dtype: str, quick: bool) -> Iterator[Row]:
    """Yield a row for each update of a family, all beside M in float64, with ten looks at errors and bounds."""
    family = FAMILIES[name]
    family = replace(family, steps=min(family.steps, 30)) if quick else family
    n, r, kind, eps = family.n, family.r, DTYPES[dtype], torch.finfo(DTYPES[dtype]).eps
    tracked = {update: brandla.track(of.zeros(n, r, dtype=kind)) for update, (_, of) in UPDATES.items()}
    factors: dict[str, Any] = dict(tracked)
    # The SVD of a panel P; P Pᵀ is the matrix of the updates.
    svd = brandla.LowRankSVD.zeros(n, 0, r, dtype=kind) if family.steps <= 100 else None
    matrix = truncated = torch.zeros(n, n, dtype=torch.float64)
    rounding, defects, looks = 0.0, {}, {update: [] for update in UPDATES}
    for step, columns in enumerate(family.batches(kind), 1):
        matrix = oracles.updated(matrix, columns, DECAY, WEIGHT)
        truncated = oracles.eigh(oracles.updated(truncated, columns, DECAY, WEIGHT)).truncation(r)
        size = oracles.spectral_norm(matrix)
        # The rounding of each update, in units of ε, decays with the factor.
        rounding = DECAY * rounding + ROUNDING * size
        for update, (function, _) in UPDATES.items():
            tracked[update] = value = function(tracked[update], columns, decay=DECAY, weight=WEIGHT)
            factors[update] = value.lowrank
            if step % max(family.steps // 10, 1) == 0 or step == family.steps:
                dense = value.lowrank.to(torch.float64).dense()
                error, bound = oracles.spectral_norm(matrix - dense), float(value.error_bound)
                # The bound need not cover rounding.
                looks[update].append((error, bound, error <= bound + eps * rounding, (error - bound) / (eps * size)))
        if svd:
            svd = brandla.svd_append(svd, columns * WEIGHT**0.5, decay=DECAY**0.5)
            factors["svd_append"] = brandla.LowRankEigh(svd.S.double().square(), svd.U)
        for update, factor in factors.items():
            defects[update] = max(defects.get(update, 0.0), defect(factor) / eps)
    for update, factor in factors.items():
        row = {"update": update, **family.about, "steps": family.steps}
        row |= trace_lost(matrix, truncated, factor.to(torch.float64).dense(), r, eps)
        row |= {"defect_over_eps": defects[update]}
        if update in looks:
            errors, bounds, holds, above = zip(*looks[update], strict=True)
            row |= {"error": errors[-1], "bound": bounds[-1], "bound_over_error": bounds[-1] / max(errors[-1], 1e-300)}
            row |= {"rounding": eps * rounding, "bound_holds": all(holds), "above_bound_over_eps": max(above)}
        yield row


def trace_lost(matrix: Tensor, truncated: Tensor, approximation: Tensor, rank: int, eps: float) -> Row:
    """Return the lost part of the trace beside that of the best of this rank and of the exact truncated update."""
    trace, lost, exact = (float(part.trace()) for part in (matrix, matrix - approximation, matrix - truncated))
    best = math.fsum(oracles.eigh(matrix).eigenvalues[rank:].clamp(min=0).tolist())
    rounding = 20 * eps * trace
    return {
        "best_over_trace": best / trace,
        "lost_over_trace": lost / trace,
        "exact_over_trace": exact / trace,
        "rounding_over_trace": rounding / trace,
        "lost_over_best": lost / max(best, 1e-300),
        "lost_over_exact": lost / max(exact, 1e-300),
        "resolved": best > rounding,
        "within": lost <= 1.05 * exact + rounding,
    }


DRIFTING = ("slow", "medium", "fast", "flat", "clustered", "graded", "rank-16", "repeated")
MANY, EVERY, POOL = 10_000, 20, 300
MARKS = (100, 1000, 3000, 10_000)


def drift(update: str, name: str, dtype: str, quick: bool) -> Iterator[Row]:
    """Yield the distance of a factor from its form in units of ε: the largest over many updates, and at some marks."""
    family = replace(FAMILIES[name], n=96, r=16, k=8, steps=MANY // 40 if quick else MANY)
    function, kind = UPDATES[update]
    pool = replace(family, steps=min(family.steps, POOL)).batches(DTYPES[dtype])
    value, defects = kind.zeros(family.n, family.r, dtype=DTYPES[dtype]), {}
    for step in range(1, family.steps + 1):
        value = function(value, pool[step % len(pool)], decay=DECAY, weight=WEIGHT)
        if step % EVERY == 0:
            defects[step] = defect(value) / torch.finfo(DTYPES[dtype]).eps
    at = {mark: defects[mark] for mark in MARKS if mark <= family.steps}
    yield {**family.about, "updates": family.steps, "largest": max(defects.values()), "at": at}


def right_vectors(name: str, decay: float, quick: bool) -> Iterator[Row]:
    """Yield ‖Vh Vhᵀ − I‖₂/ε of svd_append, whose right vectors are not corrected."""
    family = replace(FAMILIES[name], n=96, r=16, k=8, steps=50 if quick else 1000)
    append = partial(brandla.svd_append, decay=decay)
    svd = reduce(append, family.batches(torch.float32), brandla.LowRankSVD.zeros(family.n, 0, family.r))
    off = orthonormality(svd.Vh.mT) / torch.finfo(torch.float32).eps
    yield {**family.about, "calls": family.steps, "defect_over_eps": off}


def dying_out(update: str, dtype: str, width: int, quick: bool) -> Iterator[Row]:
    """Yield the end of a factor that decays for long, and the time of its late steps over its early ones."""
    family, (function, kind) = replace(FAMILIES["slow"], steps=20), UPDATES[update]
    steps, decay = (3000, 0.5) if width else (100_000, 0.95)
    steps = steps // 100 if quick else steps
    value = kind.zeros(family.n, family.r, dtype=DTYPES[dtype])
    for columns in family.batches(DTYPES[dtype]):
        value = function(value, columns, decay=DECAY, weight=WEIGHT)
    nothing, seconds = torch.zeros(family.n, width, dtype=DTYPES[dtype]), []
    for _ in range(steps):
        start = time.perf_counter()
        value = function(value, nothing, decay=decay, weight=WEIGHT)
        seconds.append(time.perf_counter() - start)
    tenth = max(steps // 100, 1)
    yield {
        "batches": f"{width} zero columns" if width else "0 columns",
        "decay": decay,
        "steps": steps,
        "finite": all(bool(part.isfinite().all()) for part in value),
        "largest_value": float(value[0].abs().max()),
        "late_over_early": median(seconds[-tenth:]) / median(seconds[:tenth]),
    }


# --- The run and its tables


def pieces(quick: bool, device: Device, tables: Tables) -> Iterator[Piece]:
    """Yield the pieces of all tables."""
    yield from sweep("losses", ("family", "dtype"), product(FAMILIES, DTYPES), losses, quick)
    drifts = [*product(UPDATES, DRIFTING, ["float32"]), *product(UPDATES, ["slow", "fast"], ["float64"])]
    yield from sweep("drifts", ("update", "family", "dtype"), drifts, drift, quick, cost=3.0)
    decays = product(("slow", "medium", "flat"), (1.0, DECAY))
    yield from sweep("right_vectors", ("family", "decay"), decays, right_vectors, quick)
    yield from sweep("dying_out", ("update", "dtype", "columns"), product(UPDATES, DTYPES, (0, 16)), dying_out, quick)


def shown(content: Row) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the losses, forms and bounds of the updates side by side, then the other tables."""
    if content.get("losses"):
        yield "losses", lost_of_trace(content)
        rows = pd.DataFrame(content["losses"]).query("update != 'svd_append'").rename(columns={"words": "stream"})
        yield "form", by_update(rows, ["stream", "dtype"], rows["defect_over_eps"].map("{:.1f}".format))
        bound = rows["bound_over_error"].map("{:.1f}".format).where(rows["error"] > rows["rounding"], "–")
        yield "error bound", by_update(rows, ["stream", "dtype"], bound)
    yield from tables_of(content | {"losses": []})


def lost_of_trace(content: Row) -> pd.DataFrame:
    """Return the trace lost by the updates over the least possible, where that is above rounding."""
    rows = pd.DataFrame(content["losses"]).rename(columns={"words": "stream", "sizes": "n, r, k", "steps": "updates"})
    above = lambda ratio: ratio.map("{:.3f}".format).where(rows["resolved"], "–")
    rows["best / tr M"] = rows["best_over_trace"].map("{:.1e}".format)
    rows["exact"] = above(rows["exact_over_trace"] / rows["best_over_trace"])
    about = ["stream", "n, r, k", "updates", "dtype", "best / tr M", "exact"]
    return by_update(rows, about, above(rows["lost_over_best"]))


def by_update(rows: pd.DataFrame, about: list[str], cells: pd.Series) -> pd.DataFrame:
    """Return cells with a column for each update, and a row for each combination of the columns ``about``."""
    table = rows.assign(cell=cells).groupby([*about, "update"], sort=False)["cell"].first()
    return table.unstack("update").fillna("").reset_index().rename_axis(columns=None)


# --- The page


def answer(content: Row) -> str:
    rows = pd.DataFrame(content.get("losses", []))
    if rows.empty:
        return ""
    bounded = rows.get("bound_holds", pd.Series(dtype=bool)).dropna().astype(bool)
    most = rows["lost_over_exact"].where(rows["resolved"].astype(bool), 0).max()
    return (
        f"In {rows['within'].sum()} of {len(rows)} runs an update loses no more than 1.05 times what the exact"
        f" truncated update does, and {most:.2f} times at most. The running bound holds in {bounded.sum()} of"
        f" {len(bounded)} runs."
    )


def table(content: Row) -> pd.DataFrame:
    """Return the float32 streams by the trace lost over the least possible, the most first."""
    if not content.get("losses"):
        return pd.DataFrame()
    rows = lost_of_trace(content).query("dtype == 'float32'").drop(columns="dtype")
    updates = [update for update in UPDATES if update in rows]
    worst = rows[updates].apply(pd.to_numeric, errors="coerce").max(axis=1)
    rows = rows.loc[worst.sort_values(ascending=False, kind="stable").index]
    ordered = rows[["stream", *updates, *rows.columns.difference(["stream", *updates], sort=False)]]
    return ordered.rename(columns={update: f"`{update}`" for update in (*UPDATES, "svd_append")})


def chart(content: Row) -> pictures.Bars:
    """Return the trace that `root_update` leaves out beyond the least possible, in percent."""
    rows = pd.DataFrame(content["losses"])
    rows = rows[(rows["update"] == "root_update") & (rows["dtype"] == "float32") & rows["resolved"].astype(bool)]
    values = (100 * (rows.set_index("words")["lost_over_best"] - 1)).sort_values(ascending=False).head(10)
    title = "Trace left out beyond the best possible"
    return pictures.Bars(title, "root_update, float32, at the end of a stream", values, unit=" %")


# The matrices are small, and more threads would only wait for each other.
STUDY = Study("streams", {"quick": True, "usual": False}, pieces, shown, threads=1)

if __name__ == "__main__":
    command(STUDY, __doc__)()
