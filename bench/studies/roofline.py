"""What part of the machine's measured ceilings each op reaches: large copies and products, in the same run.

Run by ``make study-roofline``. Every op is checked against float64 before it is timed. On a GPU it runs as a graph, and
everywhere on inputs that are no longer in the cache when their turn comes.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Picture

from bench.frame import pages, pictures
from bench.frame.figures import spelled
from bench.frame.pictures import Theme
from bench.frame.study import Piece, Row, Study, command
from bench.gpu import cases
from bench.gpu.cases import FULL, TOY, Case, Sizes
from bench.gpu.device import Ceilings, Device, Work, measure

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

    def levels(ceilings: Ceilings) -> Iterator[Row]:
        """Yield the ceilings, in bytes or flops per second."""
        for name, rate in ceilings.intervals():
            yield {"ceiling": name, "per_second": rate, "size": sizes.copy if name == "copy" else sizes.product}

    return [
        Piece("ceilings", {"when": "before"}, 2.0, lambda *_: levels(ceilings())),
        *map(op, cases.cases(sizes)),
        Piece("ceilings", {"when": "after"}, 2.0, lambda *_: levels(measure(device, sizes))),
    ]


def measured(case: Case, sizes: Sizes, device: Device, ceilings: Ceilings) -> Row:
    """Return the time of an op, the least time that its work takes at the ceilings, and their ratio."""
    timed, cost = cases.timed(case, device, ceilings, sizes.seconds), cases.cost(case)
    return {
        "n": case.size.n,
        "r": case.size.r,
        "dtype": str(case.dtype).removeprefix("torch."),
        "data": str(case.data).removeprefix("torch."),
        "by": timed.by,
        "seconds": timed.seconds,
        "flops": cost.flops,
        "bytes": cost.bytes,
        "of_ceiling": timed.of_ceiling,
        "bound_by": timed.floor.bound_by,
        "balance": balance(cases.work(case), ceilings),
        "error": timed.error,
        "sets": timed.sets,
        "rounds": len(timed.times.samples["op"]),
    }


def balance(work: Work, ceilings: Ceilings) -> float:
    """Return the least time of the products over the least time of the bytes: 1 where both bind alike."""
    return ceilings.floor(work._replace(bytes=0)).seconds / (work.bytes / ceilings.copy)


# --- Tables, page and picture


def shown(content: Row) -> Iterator[tuple[str, pd.DataFrame]]:
    if len(levels := pd.DataFrame(content.get("ceilings", []))):
        copied, in_giga = levels["ceiling"] == "copy", lambda rates: [spelled(rate / 1e9) for rate in rates]
        unit = copied.map({True: "GB/s, read + write", False: "GFLOP/s"})
        rates = pd.DataFrame(levels["per_second"].map(in_giga).tolist(), columns=["middle", "low", "high"])
        measured = rates["middle"] + " " + unit + " (" + rates["low"] + " to " + rates["high"] + ")"
        mebibytes = (levels["size"] / 2**20).map("{:g} MiB".format)
        size = mebibytes.where(copied, levels["size"].map("order {}".format))
        name = levels["ceiling"] + ", " + levels["when"]
        yield "Ceilings", pd.DataFrame({"ceiling": name, "measured": measured, "size": size})
    if len(rows := pd.DataFrame(content.get("rows", []))):
        seconds = rows["seconds"].str[0]
        columns = {
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
        yield "Part of the ceilings", pd.DataFrame(columns)


ABOUT = """### Ops and the machine's ceilings

`make study-roofline`. The least time of an op is that of its bytes at the speed of a large copy, or of its products at
that of a large product, whichever is more; a symmetric result counts one triangle. Both speeds were measured in the
same run. Inputs outlast the cache. Every op was checked before it was timed against its torch form in float64, which
the tests hold to the formula; where that form is what runs, the error is 0.
"""


def section(content: Row, machine: str) -> Iterator[str]:
    yield ABOUT + pages.caveats(content["facts"])
    yield pages.picture(STUDY.name, machine, "Part of the measured ceilings that each op reaches")
    yield from (pages.markdown(cells) for _, cells in shown(content))


BY_COPY, BY_PRODUCTS = ("#0072b2", "#4db2ee"), ("#d55e00", "#ff8f40")


def draw(content: Row, theme: Theme) -> Picture:
    """Draw every op in float32 below the roof, and the part of the ceiling that it reaches."""
    rows = pd.DataFrame(content["rows"]).query("dtype == 'float32' and data == 'float32'")
    rows = rows.assign(part=rows["of_ceiling"].str[0])
    levels = pd.DataFrame(content["ceilings"]).query("when == 'before'").set_index("ceiling")["per_second"].str[0]
    giga = {name: f"{levels[name] / 1e9:.3g}" for name in ("copy", "float32", "float64")}
    words = "Ceilings of the same run: copy {copy} GB/s, float32 {float32} GFLOP/s, float64 {float64} GFLOP/s"
    ops, ranks = list(rows["op"].unique()), sorted(rows["r"].unique())
    heights = (3.8, 0.9 + 0.42 * len(ops))
    figure, (roof, parts) = pictures.panels(heights, content, words.format(**giga), theme)
    pictures.titled(roof, "Ops under the roof", "the larger the dot, the larger the rank", theme)
    reach = np.geomspace(min(0.3, rows["balance"].min()) / 1.5, max(3.0, rows["balance"].max()) * 1.5, 200)
    roof.plot(reach, np.minimum(reach, 1), color=theme.faint, linewidth=2)
    pictures.titled(parts, "Part of the ceiling that binds", "filled: the largest n; bar: 95 % interval", theme)
    for row in rows.to_dict("records"):
        colour = theme.colour(*(BY_COPY if row["bound_by"] == "copy" else BY_PRODUCTS))
        rank, largest = ranks.index(row["r"]), rows.loc[rows["op"] == row["op"], "n"].max()
        place, size = ops.index(row["op"]) + 0.26 * (len(ranks) / 2 - 0.5 - rank), 3 + 1.5 * rank
        roof.plot(row["balance"], row["part"] * min(row["balance"], 1), "o", color=colour, markersize=size)
        parts.plot(row["of_ceiling"][1:], [place] * 2, color=colour, linewidth=1.3)
        face = colour if row["n"] == largest else theme.background
        parts.plot(row["part"], place, "o", color=colour, markerfacecolor=face, markersize=size)
    for colours, label in ((BY_COPY, "bound by the copy"), (BY_PRODUCTS, "bound by products")):
        roof.plot([], [], "o", color=theme.colour(*colours), label=label)
    for axis in (roof.xaxis, roof.yaxis):
        pictures.logarithmic(axis, subs=(1, 3))
    roof.set(xlabel="least time of the products / least time of the bytes", ylabel="part of the products' ceiling")
    roof.legend(loc="lower right", fontsize=9)
    parts.set_yticks(range(len(ops)), ops)
    most = max(1.05, 1.05 * rows["of_ceiling"].str[2].max())
    parts.set(ylim=(len(ops) - 0.5, -0.5), xlim=(0, most), xlabel="least time at the measured ceilings / time")
    parts.axvline(1, color=theme.faint, linewidth=1.4, linestyle="--")
    return figure


STUDY = Study("roofline", {"quick": TOY, "usual": USUAL, "full": FULL}, pieces, shown, draw=draw)

if __name__ == "__main__":
    command(STUDY, __doc__)()
