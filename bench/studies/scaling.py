"""How time and memory grow with n, r and k: updates and applications of a factor beside dense methods.

Run by ``make study-scaling``. Every result is checked against float64 before it is timed. All calls at a size take
turns with a reference, the GEMMs of an update of that size, so the machine's mood does not count.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product

import pandas as pd
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import EngFormatter

from bench.benches import timing
from bench.benches.peers import INCREMENTAL
from bench.benches.problems import UPDATES, steady_state
from bench.benches.tasks import BRANDLA, CHOLESKY, TASKS, Shape, check, kron, op_task
from bench.benches.written_out import update_floor
from bench.frame import pages, pictures
from bench.frame.figures import duration, formatted
from bench.frame.pictures import Theme
from bench.frame.study import Piece, Row, Study, Tables, command
from bench.gpu.cases import Case
from bench.gpu.device import Device, size_of

REFERENCE = "GEMMs of an update"
PCA = "svd_append, centred"


# The update of a dense n × n moment.
gram_ema = lambda shape, device: op_task(Case("gram_ema_", *shape[:3], shape.n, 1), device)
# For each method the power of n that its time grows with, which determines its sizes; its task; its implementation. A
# centred decomposition has the sizes of scikit-learn's. All others with a power of 2 or 3 work on a dense matrix, which
# they get for nothing.
METHODS = {
    **{name: (1, TASKS[name].task, BRANDLA) for name in (*UPDATES, "damped_solve")},
    "kron_damped_solve, pair": (1, partial(kron, pair=True, square=True), BRANDLA),
    "gram_ema_": (2, gram_ema, BRANDLA),
    "randomized_eigh": (2, TASKS["randomized_eigh"].task, BRANDLA),
    "torch.svd_lowrank": (2, TASKS["randomized_eigh"].task, "torch.svd_lowrank"),
    PCA: (2, TASKS[PCA].task, BRANDLA),
    INCREMENTAL: (2, TASKS[PCA].task, INCREMENTAL),
    "Cholesky solve": (3, TASKS["damped_solve"].task, CHOLESKY),
    "torch.linalg.eigh": (3, TASKS["randomized_eigh"].task, "torch.linalg.eigh"),
}
TALL = [name for name, (power, *_) in METHODS.items() if power == 1]
Three = tuple[int, int, int]  # n rows, rank r, k new columns or right-hand sides


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run: each axis n, r and k that grows, and the other two sizes for it (with 0 for the axis)."""

    n: dict[int, tuple[int, ...]]  # by the power of n that the time grows with
    with_n: Three
    r: tuple[int, ...]
    with_r: Three
    k: tuple[int, ...]
    with_k: Three
    dense: int  # n of the dense matrix while r grows
    seconds: float  # time spent on one timing


def _doubling(first: int, last: int, between: bool = False) -> tuple[int, ...]:
    """Return first, 2·first, … last, and if ``between`` also 3/2 of each but the last."""
    sizes = [first * 2**power for power in range((last // first).bit_length())]
    return tuple(sorted(sizes + ([size * 3 // 2 for size in sizes[:-1]] if between else [])))


# An update has at least half as many columns as its rank.
USUAL = Sizes(
    n={1: _doubling(1024, 65536, True), 2: _doubling(1024, 8192, True), 3: _doubling(512, 4096, True)},
    with_n=(0, 128, 64),
    r=_doubling(16, 256),
    with_r=(8192, 0, 128),
    k=_doubling(32, 512),
    with_k=(8192, 64, 0),
    dense=4096,
    seconds=0.8,
)
FULL = Sizes(
    n={1: _doubling(4096, 2**20), 2: _doubling(2048, 16384, True), 3: _doubling(1024, 16384, True)},
    with_n=(0, 256, 256),
    r=_doubling(32, 1024),
    with_r=(65536, 0, 512),
    k=_doubling(128, 2048),
    with_k=(65536, 256, 0),
    dense=16384,
    seconds=0.8,
)
SMALL = dict.fromkeys((1, 2, 3), (48, 64, 96))
TOY = Sizes(SMALL, (0, 8, 8), (4, 8), (96, 0, 8), (4, 8), (96, 8, 0), dense=64, seconds=0.0)


# --- Time and memory at a size


def pieces(sizes: Sizes, device: Device, _: Tables) -> Iterator[Piece]:
    """Yield a piece for each size."""

    def piece(axis: str, value: int, names: Sequence[str], **other: int) -> Piece:
        size = dict(zip("nrk", getattr(sizes, f"with_{axis}"), strict=True)) | {axis: value} | other
        flops = sum(size["n"] ** METHODS[name][0] for name in names if name not in TALL)
        seconds = 6 * flops / 2e10 + 1.5 * sizes.seconds * len(names) + size["n"] / 2e4
        call = partial(measure_size, Shape(**size), names, sizes.seconds, device)
        return Piece("rows", {"axis": axis, **size}, call, seconds, len(names))

    for n in sorted(set().union(*sizes.n.values())):
        yield piece("n", n, [name for name, (power, *_) in METHODS.items() if n in sizes.n[power]])
    for r in sizes.r:
        yield piece("r", r, TALL)
        yield piece("r", r, ["randomized_eigh"], n=sizes.dense)
    for k in sizes.k:
        yield piece("k", k, TALL)


def measure_size(shape: Shape, names: Sequence[str], seconds: float, device: Device) -> Iterator[Row]:
    """Yield time and memory of each method at a size: short calls take turns together, a long one by itself."""
    floor = update_floor(steady_state("eigh_update", *shape[:3], device=device.tensors))
    task_of = cache(lambda make: make(shape, device))
    calls = {name: task_of(make).call(by) for name, (_, make, by) in METHODS.items() if name in names}
    for name, call in calls.items():
        check(name, call)
    tall = [name for name in names if name in TALL]
    for together in filter(None, (tall, *([name] for name in names if name not in TALL))):
        functions = {REFERENCE: floor} | {name: calls[name].again for name in together}
        times = device.alternating(functions, seconds * len(together))
        for name in together:
            yield {
                "method": name,
                "seconds": timing.median_interval(times[name]),
                "over_reference": timing.ratio(times[name], times[REFERENCE]),
                "held_bytes": size_of(calls[name].arguments),
                "peak_bytes": timing.peak_extra_bytes(functions[name], device.tensors.type, warm_up=False),
                "rounds": len(times[name]),
            }
    steady_state.cache_clear()


# --- Exponents and tables

LARGER = "larger half"


def times_and_memory(rows: Sequence[Row]) -> pd.DataFrame:
    """Return the rows with the median time and the whole memory of each."""
    columns = ["axis", "method", "n", "r", "k", "seconds", "held_bytes", "peak_bytes"]
    table = pd.DataFrame(rows, columns=None if rows else columns)
    return table.assign(time=table["seconds"].str[0], memory=table["held_bytes"] + table["peak_bytes"])


def exponents(tables: Tables) -> Tables:
    """Return the fitted exponents of time and memory, over all sizes and over the larger half of them."""
    fits = []
    for (axis, method), rows in times_and_memory(tables.get("rows", [])).groupby(["axis", "method"], sort=False):
        windows = {"all": rows, LARGER: rows[len(rows) // 2 :]}
        for (window, part), quantity in product(windows.items(), ("time", "memory")):
            # NumPy's memory is not measured.
            measured = part[part[quantity] > 0]
            if len(measured) >= 3:
                sizes = measured[axis].tolist()
                about = {"axis": axis, "method": method, "quantity": quantity, "window": window, "sizes": sizes}
                fits.append(about | {"exponent": timing.slope(sizes, measured[quantity].tolist())})
    return {"exponents": fits}


def shown(content: Row) -> Iterator[tuple[str, pd.DataFrame]]:
    if content["exponents"]:
        fits = pd.DataFrame(content["exponents"])
        fits["sizes"] = fits["sizes"].map(lambda sizes: f"{sizes[0]} … {sizes[-1]}")
        # A fit to three sizes has no interval.
        words = lambda fit: f"{fit[0]:.2f}" if None in fit else "{:.2f} ({:.2f} to {:.2f})".format(*fit)
        yield "Exponents", fits.assign(exponent=fits["exponent"].map(words))


# --- The page

DECOMPOSITIONS = ["torch.svd_lowrank", "torch.linalg.eigh"]


def by_n(content: Row, quantity: str = "time") -> pd.DataFrame:
    """Return the seconds, or the bytes, of each method by n."""
    rows = times_and_memory(content.get("rows", []))
    return rows[rows["axis"] == "n"].pivot(index="n", columns="method", values=quantity).astype(float)


def milliseconds(content: Row, methods: list[str]) -> pd.DataFrame:
    """Return the times of some methods as text, a row for each n at which one of them was measured."""
    times = 1e3 * by_n(content).reindex(columns=methods).dropna(how="all")
    return times.map(lambda time: formatted(time) if time > 0 else "–")


def fitted_exponents(content: Row) -> dict[str, float]:
    """Return the fitted exponents of the methods' times in n, over the larger half of the sizes."""
    wanted = {"axis": "n", "quantity": "time", "window": LARGER}
    return {fit["method"]: fit["exponent"][0] for fit in content.get("exponents", []) if fit.items() >= wanted.items()}


def answer(content: Row) -> str:
    times = by_n(content).reindex(columns=[*UPDATES, *DECOMPOSITIONS])
    if times[list(UPDATES)].isna().all(axis=None):
        return ""
    # The largest n at which the most methods were measured.
    at = times.loc[times.notna().sum(axis=1)[::-1].idxmax()].dropna()
    size = next(row for row in content["rows"] if row["axis"] == "n" and row["n"] == at.name)
    taken = pages.in_sentence([f"{duration(time)} for `{method}`" for method, time in at.items()])
    powers = fitted_exponents(content)
    grown = pages.in_sentence([f"n^{powers[method]:.2f} for `{method}`" for method in times if method in powers])
    growth = f"Over the larger half of the sizes, times grow as {grown}." if grown else "How times grow is not fitted."
    return f"At n = {at.name}, r = {size['r']} and k = {size['k']} in float32 the times are {taken}. {growth}"


def table(content: Row) -> pd.DataFrame:
    """Return times and memory by n, at no more than ten sizes."""
    cells = milliseconds(content, list(UPDATES)).join(milliseconds(content, DECOMPOSITIONS)).fillna("–")
    cells = cells.rename(columns="`{}`, ms".format)
    memory = by_n(content, "memory").reindex(index=cells.index) / 1e6
    for method, words in (("root_update", "`root_update`, MB"), ("torch.linalg.eigh", "dense, MB")):
        if method in memory:
            cells[words] = memory[method].map(lambda size: formatted(size) if size > 0 else "–")
    return cells.iloc[:: max(1, -(-len(cells) // 10))].reset_index()


# The methods in the picture; the tables have the rest.
SHOWN = (
    *("root_update", "eigh_update", "damped_solve", PCA, INCREMENTAL),
    *("torch.svd_lowrank", "Cholesky solve", "torch.linalg.eigh"),
)
COLOURS = dict(zip(SHOWN, pictures.PALETTE, strict=False))


def draw(content: Row, theme: Theme) -> Picture:
    """Draw the time of the main methods against n."""
    rows, powers = times_and_memory(content["rows"]), fitted_exponents(content)
    fixed = rows[(rows["axis"] == "n") & rows["method"].isin(UPDATES)].iloc[0]
    about = ("Time against n", f"r = {fixed['r']}, k = {fixed['k']}, float32", 6.6)
    figure, (panel,) = pictures.panels(content, "scaling.json", theme, about, width=pictures.NARROW)
    times = by_n(content)
    times = times[[method for method in SHOWN if method in times]]
    pictures.curves(panel, times, COLOURS, theme, COLOURS, linewidth=1.8, marker="o", markersize=3.5)
    for line in panel.lines:
        if line.get_label() in powers:
            line.set_label(f"{line.get_label()}  $n^{{{powers[line.get_label()]:.2f}}}$")
    panel.set_xscale("log", base=2)
    ticks = ([size for size in times.index if size & (size - 1) == 0] or list(times.index))[::2]
    panel.set_xticks(ticks, list(map(str, ticks)))
    pictures.logarithmic(panel.yaxis, EngFormatter("s"))
    pictures.legend(panel, 1)
    return figure


STUDY = Study("scaling", {"quick": TOY, "usual": USUAL, "full": FULL}, pieces, shown, exponents)

if __name__ == "__main__":
    command(STUDY, __doc__)()
