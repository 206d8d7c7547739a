"""What every kernel compiles to on every target, as a table: ``python -m bench.kernels_table``. No GPU is needed.

Registers, spills and shared memory are those of the worst of the layouts that a row stands for; occupancy is the share
of warps that are resident where nothing but these three limits it. A second table estimates times at the sizes of the
roofline study. Exits with 1 if any specialisation has a fault.
"""

import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from rich.console import Console
from rich.table import Table

from bench.estimates import CAPTION, estimates
from bench.frame.pages import on_terminal
from bench.studies.roofline import USUAL
from brandla_kernels._kernels.ahead import TARGETS, compile_for, faults
from brandla_kernels._kernels.shipped import specializations

Facts = dict[str, Any]
COUNTED = ("registers", "spills", "shared_bytes", "tensor_memory", "occupancy")
# What differs only in ops and layouts is one row.
ROW = ["kernel", "dtype", "tiles", "warps"]
COLUMNS = ["ops", *ROW, "registers", "spills", "shared", "products", "matrix instructions", "occupancy", "faults"]
# What the names of all matrix instructions share.
SHARED = {"sync", "aligned", "row", "col", "cta_group::1", "mma_async"}


def compiled_facts(target: str, part: int, parts: int) -> list[Facts]:
    """Compile every ``parts``-th specialisation for a target and say what came out."""
    torch.set_num_threads(1)
    found = []
    for case in specializations(target)[part::parts]:
        config, dtype = case.launch.config, str(case.dtype).removeprefix("torch.")
        facts: Facts = {"target": target, "kernel": case.launch.name, "dtype": dtype, "tile": dict(config.blocks)}
        facts |= {"warps": config.num_warps, "stages": config.num_stages, "layout": case.layout.name}
        try:
            compiled = compile_for(target, case.launch)
        except RuntimeError as error:
            nothing: Facts = {"products": [], "matrix_instructions": [], "faults": [f"does not compile: {error}"]}
            facts |= dict.fromkeys(COUNTED, 0) | nothing
        else:
            facts |= {name: getattr(compiled, name) for name in COUNTED} | {"faults": faults(compiled)}
            facts["products"] = sorted({f"{dtype} {precision}" for dtype, precision in compiled.products})
            facts["matrix_instructions"] = list(compiled.matrix_instructions)
        found.append(facts | {"ops": sorted(case.ops)})
    return found


def tables(found: list[Facts]) -> Iterator[Table]:
    short = lambda name: ".".join(part for part in name.split(".") if part not in SHARED)
    joined = lambda names: ", ".join(sorted(set(names.sum())))
    every = pd.DataFrame(found)
    every["tiles"] = ["×".join(map(str, tile.values())) for tile in every["tile"]]
    every["matrix instructions"] = [list(map(short, names)) for names in every["matrix_instructions"]]
    lists = dict.fromkeys(("ops", "products", "matrix instructions", "faults"), joined)
    worst = {"registers": "max", "spills": "max", "shared_bytes": "max", "occupancy": "min"}
    for target, own in every.groupby("target", sort=False):
        cells = own.groupby(ROW).agg(lists | worst).reset_index()
        none = cells["products"].map(lambda products: "fused multiply-add" if products else "none")
        cells["matrix instructions"] = cells["matrix instructions"].mask(cells["matrix instructions"] == "", none)
        cells["products"] = cells["products"].replace("", "none")
        cells["shared"] = (cells["shared_bytes"] / 1024).map("{:.0f} KB".format)
        cells["occupancy"] = cells["occupancy"].map("{:.0%}".format)
        yield on_terminal(cells[COLUMNS], f"{target}: {len(own)} specialisations", list(cells["faults"] != ""))


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Target = StrEnum("Target", {name: name for name in TARGETS})


# Options take one value, so that further targets are arguments: ``--targets sm_90 gfx942``.
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
    if json_file:
        json_file.write_text(json.dumps(found, indent=1) + "\n")
    faulty = sum(bool(facts["faults"]) for facts in found)
    console.print(f"{len(found)} specialisations compiled, {faulty} with a fault")
    raise typer.Exit(int(faulty > 0))


if __name__ == "__main__":
    app()
