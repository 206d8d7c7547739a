"""The part of the machine's ceilings that each op reaches. Ceilings are large copies and products in the same run.

Run by ``make study-roofline``. Every op is checked against float64 before it is timed. On a GPU it runs as a graph.
Inputs take turns, so that they are no longer in the cache.
"""

from collections.abc import Iterator
from functools import cache

import pandas as pd

from bench.benches import timing
from bench.frame import pictures
from bench.frame.figures import formatted
from bench.frame.study import Piece, Row, Study, Tables, command
from bench.gpu import cases
from bench.gpu.cases import FULL, TOY, Case, Sizes
from bench.gpu.device import MOST_SETS, Ceilings, Device, graph_times, measure_ceilings
from brandla_kernels import OPS

USUAL = Sizes(2**28, 2048, (16384, 4096), (256, 64, 8), FULL.uneven, (4096, 64), 4096, width=1024, cores=8, seconds=0.3)


def pieces(sizes: Sizes, device: Device, _: Tables) -> Iterator[Piece]:
    """Yield the ceilings, every op at every size, and the ceilings once more."""
    ceilings = cache(lambda: measure_ceilings(device, sizes))
    yield Piece("ceilings", {"when": "before"}, lambda: ceiling_rows(ceilings(), sizes), 2.0)
    for case in cases.cases(sizes):
        call = lambda case=case: [measure_op(case, sizes, device, ceilings())]
        yield Piece("rows", {"op": case.op, "case": case.name}, call)
    yield Piece("ceilings", {"when": "after"}, lambda: ceiling_rows(measure_ceilings(device, sizes), sizes), 2.0)


def ceiling_rows(ceilings: Ceilings, sizes: Sizes) -> Iterator[Row]:
    """Yield the ceilings, in bytes or flops per second."""
    for name, rate in ceilings._asdict().items():
        yield {"ceiling": name, "per_second": rate, "size": sizes.copy if name == "copy" else sizes.product}


def measure_op(
    case: Case, sizes: Sizes, device: Device, ceilings: Ceilings, *, beside_torch: bool = False, most: int = MOST_SETS
) -> Row:
    """Return the time of an op, and the part of it that its least work takes at the ceilings.

    The inputs are at most ``most`` sets. With ``beside_torch`` the op takes turns with its torch form.
    """
    op, (error, torch_error), sets = OPS[case.op], cases.check(case, device), cases.inputs(case, device, most)
    calls = {"op": op} | ({"torch": cases.torch_form_of(op)} if beside_torch else {})
    times, how = graph_times(device, calls, sets, sizes.seconds)
    floor, cost, seconds = ceilings.floor(cases.work(case)), cases.cost(case), timing.median_interval(times["op"])
    row = {
        "n": case.n,
        "r": case.r,
        "dtype": str(case.dtype).removeprefix("torch."),
        "data": str(case.data).removeprefix("torch."),
        "by": op.implementation(device.tensors.type)[0],
        "seconds": seconds,
        "flops": cost.flops,
        "bytes": cost.bytes,
        "of_ceiling": floor.part_of(seconds),
        "bound_by": floor.bound_by,
        "error": error,
        "sets": len(sets),
        "rounds": len(times["op"]),
    }
    if not beside_torch:
        return row
    ratio = timing.ratio(times["torch"], times["op"]).value
    return row | {"× torch": ratio, "torch_error": torch_error, "timed_by": how}


def shown(content: Row) -> Iterator[tuple[str, pd.DataFrame]]:
    if len(levels := pd.DataFrame(content.get("ceilings", []))):
        in_words = lambda rates: "{} ({} to {})".format(*(formatted(rate / 1e9) for rate in rates))
        cells = levels.assign(**{"10⁹ a second": levels["per_second"].map(in_words)}).drop(columns="per_second")
        yield "Ceilings: bytes of a copy, read and written, and flops of products; sizes in bytes, and orders", cells
    if content.get("rows"):
        yield "Part of the ceilings", parts(content)


def parts(content: Row) -> pd.DataFrame:
    rows = pd.DataFrame(content["rows"])
    seconds = rows["seconds"].str[0]
    columns = {
        "op": "`" + rows["op"] + "`",
        "of the ceiling": rows["of_ceiling"].map(lambda part: "{:.2f} ({:.2f} to {:.2f})".format(*part)),
        "bound by": rows["bound_by"],
        "µs": (1e6 * seconds).map(formatted),
        "GFLOP/s": (rows["flops"] / seconds / 1e9).map(formatted),
        "GB/s": (rows["bytes"] / seconds / 1e9).map(formatted),
        "by": rows["by"],
        "case": rows["case"],
        "error": rows["error"].map(lambda error: f"{error:.0e}" if error else "0"),
    }
    if "× torch" in rows:
        columns["× torch"] = rows["× torch"].map(formatted)
    return pd.DataFrame(columns)


# --- The page


def longest(content: Row) -> pd.DataFrame:
    """Return the longest float32 case of each op, with the part of its ceiling that it reached."""
    rows = pd.DataFrame(content.get("rows", []))
    if rows.empty:
        return rows
    rows = rows[~rows["case"].str.contains("float64|float16", regex=True)]
    rows = rows.loc[rows["seconds"].str[0].groupby(rows["op"]).idxmax()]
    return rows.assign(part=rows["of_ceiling"].str[0]).sort_values("part", kind="stable")


def answer(content: Row) -> str:
    rows = longest(content)
    if rows.empty:
        return ""
    worst, best, half = rows.iloc[0], rows.iloc[-1], (rows["part"] >= 0.5).sum()
    return (
        f"In float32, {half} of {len(rows)} ops reach at least half of the ceiling that binds them. The parts go from"
        f" {worst['part']:.2f} (`{worst['op']}`) to {best['part']:.2f} (`{best['op']}`)."
    )


def table(content: Row) -> pd.DataFrame:
    return parts(content).loc[longest(content).index] if content.get("rows") else pd.DataFrame()


def chart(content: Row) -> pictures.Bars:
    """Return the part of its ceiling that each op reaches."""
    values = longest(content).set_index("op")["part"]
    return pictures.Bars("Part of the ceiling that binds", "float32; least time at the ceilings / time", values)


STUDY = Study("roofline", {"quick": TOY, "usual": USUAL, "full": FULL}, pieces, shown)

if __name__ == "__main__":
    command(STUDY, __doc__)()
