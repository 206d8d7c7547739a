"""What part of the machine's measured ceilings each op reaches: large copies and products, in the same run.

Run by ``make study-roofline``. Every op is checked against float64 before it is timed. On a GPU it runs as a graph, and
everywhere on inputs that are no longer in the cache when their turn comes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import study
from bench.cpu import device_of
from bench.gpu import cases
from bench.gpu.cases import FULL, TOY, Case, Sizes
from bench.gpu.device import Ceilings, Device, Work, measure, replayed, size_of
from bench.study import Piece, Row
from bench.timing import Interval, of_median
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


def pieces(sizes: Sizes, device: Device, ceilings: Ceilings) -> list[Piece]:
    """Return the study in pieces, one for each op at a size."""

    def piece(case: Case) -> Piece:
        return Piece(f"{case.op}, {case.name}", 1.0, lambda: [measured(case, sizes, device, ceilings)])

    return [piece(case) for case in cases.cases(sizes)]


def measured(case: Case, sizes: Sizes, device: Device, ceilings: Ceilings) -> Row:
    """Return the time of an op, the least time that its work takes at the ceilings, and their ratio."""
    error, _ = cases.check(case, device)
    first = cases.operands(case, device)
    inputs = [first, *(cases.operands(case, device) for _ in range(device.sets(size_of(first)) - 1))]
    samples = replayed(device, {"op": OPS[case.op]}, inputs, sizes.seconds).samples["op"]
    work, time = cases.work(case), of_median(samples)
    floor, cost = ceilings.floor(work), cases.cost(case)
    return {
        "op": case.op,
        "case": case.name,
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


def in_rows(ceilings: Ceilings, sizes: Sizes, when: str) -> Iterator[Row]:
    """Yield the ceilings, in bytes or flops per second."""
    for name, samples in ceilings.samples.items():
        rate, middle = getattr(ceilings, name), of_median(samples)
        interval = Interval(*(rate * middle.value / seconds for seconds in (middle.value, middle.high, middle.low)))
        size = sizes.copy if name == "copy" else sizes.product
        yield {"ceiling": name, "when": when, "per_second": interval, "size": size}


def table(rows: Sequence[Row]) -> Table:
    """Return the fractions as a table."""
    shown = Table("op", "case", "by", "µs", "GFLOP/s", "GB/s", "of ceiling", "bound by", title="Part of the ceilings")
    for row in rows:
        time: Any = row["seconds"].value
        rates = (f"{row[amount] / time / 1e9:.3g}" for amount in ("flops", "bytes"))
        part = f"{row['of_ceiling'].value:.2f}"
        shown.add_row(row["op"], row["case"], row["by"], f"{1e6 * time:.4g}", *rates, part, row["bound_by"])
    return shown


def main() -> int:
    """Measure the ceilings and the ops, print the table and write the result file."""
    chosen = study.options("roofline", __doc__)
    device, console = device_of(chosen.quick), Console()
    start = study.prepare(chosen.quick)
    sizes = TOY if chosen.quick else FULL if chosen.full else USUAL
    ceilings = measure(device, sizes)
    rows, interrupted = study.run(pieces(sizes, device, ceilings), console)
    console.print(table(rows))
    levels = [*in_rows(ceilings, sizes, "before")]
    if not interrupted:
        levels.extend(in_rows(measure(device, sizes), sizes, "after"))
    content = {"ceilings": levels, "rows": rows, "interrupted": interrupted}
    study.keep("roofline", content, device, chosen, start, console)
    return study.INTERRUPTED if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
