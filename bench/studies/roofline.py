"""What part of the machine's measured ceilings each op reaches: large copies and products, in the same run.

Run by ``make study-roofline``. Every op is checked against float64 before it is timed. On a GPU it runs as a graph, and
everywhere on inputs that are no longer in the cache when their turn comes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Picture

from bench.benches.timing import Interval, of_median
from bench.frame import pages, pictures
from bench.frame.figures import spelled
from bench.frame.pictures import Theme
from bench.frame.study import Piece, Row, Study, command
from bench.gpu import cases
from bench.gpu.cases import FULL, TOY, Case, Sizes
from bench.gpu.device import Ceilings, Device, Work, measure, replayed, size_of
from brandla_kernels import OPS

USUAL = replace(
    FULL,
    copy=2**28,
    product=2048,
    rows=(16384, 4096),
    ranks=(256, 64, 8),
    other_dtypes=(4096, 64),
    most_square=4096,
    width=1024,
    cores=8,
    seconds=0.3,
)


def pieces(sizes: Sizes, device: Device) -> list[Piece]:
    """Return the ceilings, every op at every size, and the ceilings once more."""
    ceilings = cache(lambda: measure(device, sizes))

    def op(case: Case) -> Piece:
        key = {"op": case.op, "case": case.name}
        return Piece("rows", key, 1.0, lambda *_: [measured(case, sizes, device, ceilings())])

    return [
        Piece("ceilings", {"when": "before"}, 2.0, lambda *_: in_rows(ceilings(), sizes)),
        *map(op, cases.cases(sizes)),
        Piece("ceilings", {"when": "after"}, 2.0, lambda *_: in_rows(measure(device, sizes), sizes)),
    ]


def measured(case: Case, sizes: Sizes, device: Device, ceilings: Ceilings) -> Row:
    """Return the time of an op, the least time that its work takes at the ceilings, and their ratio."""
    error, _ = cases.check(case, device)
    first = cases.operands(case, device)
    inputs = [first, *(cases.operands(case, device) for _ in range(device.sets(size_of(first)) - 1))]
    samples = replayed(device, {"op": OPS[case.op]}, inputs, sizes.seconds).samples["op"]
    work, time = cases.work(case), of_median(samples)
    floor, cost = ceilings.floor(work), cases.cost(case)
    return {
        "n": case.size.n,
        "r": case.size.r,
        "dtype": str(case.dtype).removeprefix("torch."),
        "data": str(case.data).removeprefix("torch."),
        "by": OPS[case.op].implementation(device.tensors.type)[0],
        "seconds": time,
        "flops": cost.flops,
        "bytes": cost.bytes,
        "of_ceiling": Interval(*(floor.seconds / seconds for seconds in (time.value, time.high, time.low))),
        "bound_by": floor.bound_by,
        "balance": balance(work, ceilings),
        "error": error,
        "sets": len(inputs),
        "rounds": len(samples),
    }


def balance(work: Work, ceilings: Ceilings) -> float:
    """Return the least time of the products over the least time of the bytes: 1 where both bind alike."""
    return ceilings.floor(work._replace(bytes=0)).seconds / (work.bytes / ceilings.copy)


def in_rows(ceilings: Ceilings, sizes: Sizes) -> Iterator[Row]:
    """Yield the ceilings, in bytes or flops per second."""
    for name, samples in ceilings.samples.items():
        rate, middle = getattr(ceilings, name), of_median(samples)
        interval = Interval(*(rate * middle.value / seconds for seconds in (middle.value, middle.high, middle.low)))
        yield {"ceiling": name, "per_second": interval, "size": sizes.copy if name == "copy" else sizes.product}


# ---------------------------------------------------------------------------------------------------------------------
# Tables, page and picture
# ---------------------------------------------------------------------------------------------------------------------


def shown(content: Row) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the ceilings and the ops."""
    levels, rows = pd.DataFrame(content.get("ceilings", [])), pd.DataFrame(content.get("rows", []))
    if len(levels):
        copied = levels["ceiling"] == "copy"
        rates = [[spelled(each / 1e9) for each in interval] for interval in levels["per_second"]]
        units = copied.map({True: "GB/s, read + write", False: "GFLOP/s"})
        yield (
            "Ceilings",
            pd.DataFrame(
                {
                    "ceiling": levels["ceiling"] + ", " + levels["when"],
                    "measured": [f"{a} {unit} ({b} to {c})" for (a, b, c), unit in zip(rates, units, strict=True)],
                    "size": [
                        f"{size / 2**20:g} MiB" if copy else f"order {size}"
                        for size, copy in zip(levels["size"], copied, strict=True)
                    ],
                }
            ),
        )
    if len(rows):
        seconds = rows["seconds"].str[0]
        yield (
            "Part of the ceilings",
            pd.DataFrame(
                {
                    "op": "`" + rows["op"] + "`",
                    "case": rows["case"],
                    "by": rows["by"],
                    "µs": (1e6 * seconds).map(spelled),
                    "GFLOP/s": (rows["flops"] / seconds / 1e9).map(spelled),
                    "GB/s": (rows["bytes"] / seconds / 1e9).map(spelled),
                    "of the ceiling": rows["of_ceiling"].map(lambda part: "{:.2f} ({:.2f} to {:.2f})".format(*part)),
                    "bound by": rows["bound_by"],
                    "error": rows["error"].map("{:.0e}".format),
                }
            ),
        )


ABOUT = """### Ops and the machine's ceilings

`make study-roofline`. The least time of an op is that of its bytes at the speed of a large copy, or of its products at
that of a large product, whichever is more; a symmetric result counts one triangle. Both speeds were measured in the
same run. Inputs outlast the cache. Every op was checked before it was timed against its torch form in float64, which
the tests hold to the formula; where that form is what runs, the error is 0.
"""


def section(content: Row, machine: str) -> Iterator[str]:
    """Yield the section of ``docs/measurements.md``."""
    yield ABOUT + pages.caveats(content["facts"])
    yield pages.picture(STUDY.name, machine, "Part of the measured ceilings that each op reaches")
    yield from (pages.markdown(cells) for _, cells in shown(content))


def draw(content: Row, theme: Theme) -> Picture:
    """Draw every op in float32 below the roof, and the part of the ceiling that it reaches."""
    rows = pd.DataFrame(content["rows"])
    rows = rows[(rows["dtype"] == "float32") & (rows["data"] == "float32")]
    rows["part"] = rows["of_ceiling"].str[0]
    levels = {row["ceiling"]: row["per_second"][0] for row in content["ceilings"] if row["when"] == "before"}
    words = ", ".join(
        f"{name} {rate / 1e9:.3g} {'GB/s' if name == 'copy' else 'GFLOP/s'}"
        for name, rate in levels.items()
        if name in ("copy", "float32", "float64")
    )
    ops = list(rows["op"].unique())
    heights = (3.8, 0.9 + 0.42 * len(ops))
    figure, (roof, parts) = pictures.panels(heights, content, f"Ceilings of the same run: {words}", theme)
    colours = {
        "copy": (theme.colour("#0072b2", "#4db2ee"), "bound by the copy"),
        "products": (theme.colour("#d55e00", "#ff8f40"), "bound by products"),
    }
    pictures.titled(roof, "Ops under the roof", "the larger the dot, the larger the rank", theme)
    reach = np.geomspace(min(0.3, rows["balance"].min()) / 1.5, max(3.0, rows["balance"].max()) * 1.5, 200)
    roof.plot(reach, np.minimum(reach, 1), color=theme.faint, linewidth=2)
    pictures.titled(parts, "Part of the ceiling that binds", "filled: the largest n; bar: 95 % interval", theme)
    ranks = sorted(rows["r"].unique())
    for row in rows.to_dict("records"):
        colour, _ = colours["copy" if row["bound_by"] == "copy" else "products"]
        place = ops.index(row["op"]) + 0.26 * (len(ranks) / 2 - 0.5 - ranks.index(row["r"]))
        size = 3 + 1.5 * ranks.index(row["r"])
        roof.plot(row["balance"], row["part"] * min(row["balance"], 1), "o", color=colour, markersize=size)
        parts.plot(row["of_ceiling"][1:], [place] * 2, color=colour, linewidth=1.3)
        face = colour if row["n"] == rows.loc[rows["op"] == row["op"], "n"].max() else theme.background
        parts.plot(row["part"], place, "o", color=colour, markerfacecolor=face, markersize=size)
    for colour, label in colours.values():
        roof.plot([], [], "o", color=colour, label=label)
    for axis in (roof.xaxis, roof.yaxis):
        pictures.logarithmic(axis, subs=(1, 3))
    roof.set_xlabel("least time of the products / least time of the bytes")
    roof.set_ylabel("part of the products' ceiling")
    roof.legend(loc="lower right", fontsize=9)
    parts.set_yticks(range(len(ops)), ops)
    parts.set_ylim(len(ops) - 0.5, -0.5)
    parts.set_xlim(0, max(1.05, 1.05 * rows["of_ceiling"].str[2].max()))
    parts.axvline(1, color=theme.faint, linewidth=1.4, linestyle="--")
    parts.set_xlabel("least time at the measured ceilings / time")
    return figure


STUDY = Study("roofline", {"quick": TOY, "usual": USUAL, "full": FULL}, pieces, shown, draw=draw)

if __name__ == "__main__":
    command(STUDY, __doc__)()
