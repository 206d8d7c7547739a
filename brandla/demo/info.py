"""``brandla info``: versions, devices, and which backend serves which op."""

from __future__ import annotations

import os
import platform

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

import brandla
from brandla.demo import machine
from brandla_kernels import OPS


def show(console: Console) -> None:
    """Print everything."""
    console.print(_facts())
    console.print()
    console.print(_backends())


def _facts() -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    blas, lapack = machine.linear_algebra()
    packages = machine.versions()
    table.add_row("brandla", brandla.__version__)
    table.add_row("Python", platform.python_version())
    table.add_row("torch", f"{torch.__version__}, BLAS {blas}, LAPACK {lapack}, threads: {torch.get_num_threads()}")
    table.add_row("triton", packages["triton"] or "not installed")
    table.add_row("CPU", f"{machine.cpu_name()}, {os.cpu_count()} cores")
    table.add_row("GPU", ", ".join(machine.gpu_names()) or "none that torch sees")
    return table


def _backends() -> Group:
    """One line an op and one column a device; the reasons, which many ops share, are numbered below."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    table = Table("op", *devices, box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    reasons: dict[str, int] = {}
    for name, op in sorted(OPS.items()):
        cells = []
        for device in devices:
            backend, reason = op.implementation(device)
            number = reasons.setdefault(reason, len(reasons) + 1)
            cells.append(f"{backend} ({number})")
        table.add_row(name, *cells)
    notes = [Text(f"({number}) {reason}") for reason, number in reasons.items()]
    return Group(Text("Backend of each op", style="bold"), table, *notes)
