"""The compiled kernels on every target, as a table: ``python -m bench.kernels_table``. No GPU is needed.

Each row stands for several layouts; its registers, spills and shared memory are those of the worst one. Occupancy is
the share of warps that are resident if only these three limit it. The exit code is 1 if any specialisation has a fault.

A second table estimates times at the sizes of the roofline study, at the published ceilings of GPUs. A launch takes
`LAUNCH`, and in addition the time of its bytes at the memory's bandwidth or of its products at the rate of their type,
whichever is longer. If it has fewer programs than the GPU has multiprocessors, the idle ones add no flops. Serial steps
inside a program, and torch's own products between the kernels, are not counted. A third table compares one update of
the factors of a whole network with the time of its bytes, with and without the serial steps of a core.
"""

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import pandas as pd
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import brandla
from bench.frame.figures import Row, formatted
from bench.frame.pages import on_terminal
from bench.gpu import cases
from bench.gpu.device import Stub
from bench.studies.roofline import USUAL
from brandla import LowRankRoot, grouped
from brandla_kernels._kernels.ahead import TARGETS, compile_for, faults, target_named
from brandla_kernels._kernels.launch import Launch, recording
from brandla_kernels._kernels.shipped import specializations

COUNTED = ("registers", "spills", "shared_bytes", "tensor_memory", "occupancy")
ROW = ["kernel", "dtype", "tiles", "warps"]  # specialisations that differ only in ops and layouts share a row
COLUMNS = ["ops", *ROW, "registers", "spills", "shared", "products", "matrix instructions", "occupancy", "faults"]
# Parts that the names of all matrix instructions share.
SHARED = {"sync", "aligned", "row", "col", "cta_group::1", "mma_async"}


def compiled_facts(target: str, part: int, parts: int) -> list[Row]:
    """Compile every ``parts``-th specialisation for a target, and return the facts of each."""
    torch.set_num_threads(1)
    found = []
    for case in specializations(target)[part::parts]:
        config, dtype = case.launch.config, str(case.dtype).removeprefix("torch.")
        facts: Row = {"target": target, "kernel": case.launch.name, "dtype": dtype, "tile": dict(config.blocks)}
        facts |= {"warps": config.num_warps, "stages": config.num_stages, "layout": case.layout.name}
        facts |= {"ops": sorted(case.ops), "products": [], "matrix_instructions": []}
        try:
            compiled = compile_for(target, case.launch)
        except RuntimeError as error:
            facts |= {"faults": [f"does not compile: {error}"], **dict.fromkeys(COUNTED, 0)}
        else:
            facts |= {"faults": faults(compiled), **{name: getattr(compiled, name) for name in COUNTED}}
            facts["products"] = sorted({f"{dtype} {precision}" for dtype, precision in compiled.products})
            facts["matrix_instructions"] = list(compiled.matrix_instructions)
        found.append(facts)
    return found


def tables(found: list[Row]) -> Iterator[Table]:
    short = lambda name: ".".join(part for part in name.split(".") if part not in SHARED)
    joined = lambda names: ", ".join(sorted(set(names.sum())))
    every = pd.DataFrame(found)
    every["tiles"] = ["×".join(map(str, tile.values())) for tile in every["tile"]]
    every["matrix instructions"] = [list(map(short, names)) for names in every["matrix_instructions"]]
    lists = dict.fromkeys(("ops", "products", "matrix instructions", "faults"), joined)
    worst = {"registers": "max", "spills": "max", "shared_bytes": "max", "occupancy": "min"}
    for target, of_target in every.groupby("target", sort=False):
        cells = of_target.groupby(ROW).agg(lists | worst).reset_index()
        none = cells["products"].map(lambda products: "fused multiply-add" if products else "none")
        cells["matrix instructions"] = cells["matrix instructions"].mask(cells["matrix instructions"] == "", none)
        cells["products"] = cells["products"].replace("", "none")
        cells["shared"] = (cells["shared_bytes"] / 1024).map("{:.0f} KB".format)
        cells["occupancy"] = cells["occupancy"].map("{:.0%}".format)
        yield on_terminal(cells[COLUMNS], f"{target}: {len(of_target)} specialisations", list(cells["faults"] != ""))


# --- Estimates

BITS = (16, 32, 64)
LAUNCH = 4e-6  # seconds between the starts of two kernels, an assumption: 2 in a graph, up to 8 from the host
CAPTION = (
    "Estimated, not measured: µs at the published ceilings (docs/references.md), without sparsity, and"
    f" {LAUNCH * 1e6:.0f} µs a launch, beside what takes longest. Float32 products count as three in TF32 on NVIDIA, as"
    " float32 matrix products on AMD. Bytes and flops are those on the first GPU."
)
# The factors of a network, their rank and their new columns; and the seconds of a serial step of a core, 400 cycles.
NETWORK, RANK, NEW, STEP = [int(n) for n in np.linspace(512, 8192, 64)], 128, 64, 400 / 1.7e9


class Gpu(NamedTuple):
    """The published figures of a GPU, and the target that its kernels are compiled for."""

    target: str
    bytes: float  # a second
    flops: Mapping[int, float]  # a second, of matrix products with the accuracy of numbers of so many bits
    multiprocessors: int


GPUS = {
    "H200": Gpu("sm_90", 4.8e12, {16: 989.4e12, 32: 494.7e12 / 3, 64: 66.9e12}, 132),
    "RTX 4090": Gpu("sm_89", 1.008e12, {16: 165.2e12, 32: 82.6e12 / 3, 64: 1.29e12}, 128),
    "MI300X": Gpu("gfx942", 5.3e12, {16: 1307.4e12, 32: 163.4e12, 64: 163.4e12}, 304),
}


class _Published(Stub):
    """A GPU for which launches are recorded, with uninitialised operands: nothing reads them."""

    def __init__(self, gpu: Gpu) -> None:
        self.target = lambda: target_named(gpu.target)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype)


def seconds(launch: Launch, gpu: Gpu) -> dict[str, float]:
    """Return the parts of the estimate, and the whole time: the launch, and the longer of bytes and flops."""
    busy = min(1.0, math.prod(launch.grid) / gpu.multiprocessors)
    products = sum(flops / gpu.flops[bits] for bits, flops in launch.work.flops.items()) / busy
    moved = launch.work.bytes / gpu.bytes
    return {"launch": LAUNCH, "bytes": moved, "flops": products, "time": LAUNCH + max(moved, products)}


def estimates(sizes: cases.Sizes) -> pd.DataFrame:
    """Return a row for each kernel of an op at a size; repeated launches of a kernel are added up."""
    rows = [
        {"op": case.op, "case": case.name, "kernel": launch.name, "GPU": name, "launches": 1}
        | {"MB": launch.work.bytes / 1e6, **launch.work.flops, **seconds(launch, gpu)}
        for case in cases.cases(sizes)
        for name, gpu in GPUS.items()
        for launch in cases.launches(case, _Published(gpu))
    ]
    summed = pd.DataFrame(rows).groupby(["op", "case", "kernel", "GPU"], sort=False).sum()
    times = (1e6 * summed["time"]).map(formatted) + " " + summed[["launch", "bytes", "flops"]].idxmax(axis=1)
    first = summed.xs(next(iter(GPUS)), level="GPU")
    products = [
        ", ".join(f"{formatted(row[bits] / 1e9)} of {bits} bits" for bits in BITS if row.get(bits))
        for row in first.to_dict("records")
    ]
    cells = first[["launches"]].assign(MB=first["MB"].map(formatted), Gflop=products).replace("", "–")
    return cells.join(times.unstack()[list(GPUS)].add_suffix(", µs")).reset_index()


def updates() -> pd.DataFrame:
    """Return, for each GPU, the time of one update of a network's factors without `eigh`, beside that of its bytes."""
    roots = [LowRankRoot(torch.empty(n, RANK), torch.empty(RANK, RANK)) for n in NETWORK]
    columns = [torch.empty(n, NEW) for n in NETWORK]
    # Roots and columns are read twice, and the new roots are written.
    moved = 4 * sum(NETWORK) * (2 * (RANK + NEW) + RANK)
    # Two factorisations, and three rounds that make columns orthonormal.
    steps = (2 * (RANK + NEW) + 3 * RANK) * STEP
    rows = []
    for name, gpu in GPUS.items():
        with recording(target_named(gpu.target)) as launches, brandla.backend("triton"):
            grouped.root_update(roots, columns, decay=0.95, weight=0.05, compress="cholesky")
        time, least = sum(seconds(launch, gpu)["time"] for launch in launches), moved / gpu.bytes
        row = {"GPU": name, "µs": round(1e6 * time), "of its bytes, µs": round(1e6 * least)}
        rows.append(row | {"ratio": round(time / least, 1), "with serial steps": round((time + steps) / least, 1)})
    return pd.DataFrame(rows)


# --- The command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Target = StrEnum("Target", {name: name for name in TARGETS})


# An option takes one value, so further targets are arguments: ``--targets sm_90 gfx942``.
@app.command()
def main(
    more: Annotated[list[Target] | None, typer.Argument(hidden=True)] = None,
    targets: Annotated[list[Target] | None, typer.Option(help="all without it")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write every specialisation to this file")] = None,
) -> None:
    """Compile every kernel for every target, and print what came out."""
    asked = [target.value for target in [*(targets or []), *(more or [])] or Target]
    processes = os.cpu_count() or 1
    with ProcessPoolExecutor(processes) as pool:
        parts = [pool.submit(compiled_facts, target, part, processes) for target in asked for part in range(processes)]
        found = [facts for part in parts for facts in part.result()]
    console = Console(width=None if sys.stdout.isatty() else 200)
    for table in tables(found):
        console.print(table)
    console.print(on_terminal(estimates(USUAL), CAPTION))
    of = f"r {RANK}, k {NEW}, n {NETWORK[0]} to {NETWORK[-1]}"
    console.print(on_terminal(updates(), f"One update of {len(NETWORK)} factors, {of}: estimated as above"))
    if json_file:
        json_file.write_text(json.dumps(found, indent=1) + "\n")
    faulty = sum(bool(facts["faults"]) for facts in found)
    console.print(f"{len(found)} specialisations compiled, {faulty} with a fault")
    raise typer.Exit(int(faulty > 0))


if __name__ == "__main__":
    app()
