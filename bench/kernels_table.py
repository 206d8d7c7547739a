"""What every kernel compiles to on every target, as a table: ``python -m bench.kernels_table``. No GPU is needed.

Registers, spills and shared memory are those of the worst of the layouts that a row stands for; occupancy is the share
of warps that are resident where nothing but these three limits it. Exits with 1 if any specialisation has a fault.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from brandla_kernels._kernels.ahead import TARGETS, compile_for, faults
from brandla_kernels._kernels.shipped import Specialization, specializations

Facts = dict[str, Any]

NOT_COMPILED: Facts = {
    "registers": 0,
    "spills": 0,
    "shared_bytes": 0,
    "tensor_memory": 0,
    "products": [],
    "matrix_instructions": [],
    "occupancy": 0.0,
}


def compiled_facts(target: str, part: int, parts: int) -> list[Facts]:
    """Compile every ``parts``-th specialisation for a target and say what came out."""
    torch.set_num_threads(1)
    return [_names(target, case) | _facts(target, case) for case in specializations(target)[part::parts]]


def _names(target: str, case: Specialization) -> Facts:
    return {
        "target": target,
        "kernel": case.launch.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "tile": dict(case.launch.config.blocks),
        "warps": case.launch.config.num_warps,
        "stages": case.launch.config.num_stages,
        "layout": case.layout.name,
        "ops": sorted(case.ops),
    }


def _facts(target: str, case: Specialization) -> Facts:
    try:
        compiled = compile_for(target, case.launch)
    except RuntimeError as error:
        return NOT_COMPILED | {"faults": [f"does not compile: {error}"]}
    return {
        "registers": compiled.registers,
        "spills": compiled.spills,
        "shared_bytes": compiled.shared_bytes,
        "tensor_memory": compiled.tensor_memory,
        "products": sorted({f"{dtype} {precision}" for dtype, precision in compiled.products}),
        "matrix_instructions": list(compiled.matrix_instructions),
        "occupancy": compiled.occupancy,
        "faults": faults(compiled),
    }


def _row(facts: Facts) -> tuple[Any, ...]:
    return (facts["kernel"], facts["dtype"], "×".join(map(str, facts["tile"].values())), facts["warps"])


def _summaries(found: list[Facts]) -> Iterator[tuple[str, ...]]:
    """One line for what differs only in ops and layouts."""
    for row, group in groupby(sorted(found, key=_row), key=_row):
        entries = list(group)
        products = sorted({product for entry in entries for product in entry["products"]})
        instructions = sorted({_shortened(name) for entry in entries for name in entry["matrix_instructions"]})
        yield (
            ", ".join(sorted({op for entry in entries for op in entry["ops"]})),
            *map(str, row),
            str(max(entry["registers"] for entry in entries)),
            str(max(entry["spills"] for entry in entries)),
            f"{max(entry['shared_bytes'] for entry in entries) / 1024:.0f} KB",
            ", ".join(products) or "none",
            ", ".join(instructions) or ("fused multiply-add" if products else "none"),
            f"{min(entry['occupancy'] for entry in entries):.0%}",
            "; ".join(sorted({fault for entry in entries for fault in entry["faults"]})),
        )


def _shortened(instruction: str) -> str:
    """Leave out of an instruction's name what it shares with all others."""
    drop = {"sync", "aligned", "row", "col", "cta_group::1", "mma_async"}
    return ".".join(part for part in instruction.split(".") if part not in drop)


def tables(found: list[Facts]) -> Iterator[Table]:
    """One table a target."""
    for target in TARGETS:
        own = [facts for facts in found if facts["target"] == target]
        if own:
            table = Table(title=f"{target}: {len(own)} specialisations")
            headings = ("ops", "kernel", "dtype", "tile", "warps", "registers", "spills", "shared")
            for heading in (*headings, "products", "matrix instructions", "occupancy", "faults"):
                table.add_column(heading, overflow="fold")
            for line in _summaries(own):
                table.add_row(*line, style="red" if line[-1] else None)
            yield table


def main() -> int:
    """Compile, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--json", type=Path, help="write every specialisation to this file")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    with ProcessPoolExecutor(options.processes) as pool:
        parts = [
            pool.submit(compiled_facts, target, part, options.processes)
            for target in options.targets
            for part in range(options.processes)
        ]
        found = [facts for part in parts for facts in part.result()]
    console = Console(width=None if sys.stdout.isatty() else 200)
    for table in tables(found):
        console.print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    faulty = sum(bool(facts["faults"]) for facts in found)
    console.print(f"{len(found)} specialisations compiled, {faulty} with a fault")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
