"""A network's worth of factors in one grouped call, against a loop over them; and the launches both take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import brandla
from bench.benches.problems import DECAY, WEIGHT, require
from bench.benches.written_out import brand_update
from bench.gpu import factors
from bench.gpu.device import started
from bench.gpu.findings import Bench, Deadline, Findings
from bench.gpu.timed import called, microseconds, tensors_in

DAMPING = 0.1
UPDATE, SOLVE = "grouped.root_update, cholesky", "grouped.damped_solve"
CHOLESKY: dict[str, Any] = {"decay": DECAY, "weight": WEIGHT, "compress": "cholesky"}


def run(bench: Bench, found: Findings, time: Deadline) -> None:
    """Compare both functions with their loops."""
    device, sizes = bench.device, bench.sizes
    rank, count = sizes.group_rank, sizes.group_columns
    eighs = [factors.eigh(device, n, rank) for n in sizes.group]
    roots = [brandla.LowRankRoot.from_eigh(eigh) for eigh in eighs]
    columns = [device.normal(n, count) for n in sizes.group]
    loops = {
        UPDATE: {
            "grouped": lambda: brandla.grouped.root_update(roots, columns, **CHOLESKY),
            "loop": lambda: [
                brandla.root_update(root, block, **CHOLESKY) for root, block in zip(roots, columns, strict=True)
            ],
            "loop of eager torch Brand updates": lambda: [
                brand_update(*eigh, block, DECAY, WEIGHT) for eigh, block in zip(eighs, columns, strict=True)
            ],
        },
        SOLVE: {
            "grouped": lambda: brandla.grouped.damped_solve(roots, columns, DAMPING),
            "loop": lambda: [
                brandla.damped_solve(root, block, DAMPING) for root, block in zip(roots, columns, strict=True)
            ],
        },
    }
    for name, calls in loops.items():
        if found.in_time(name, time, 0 if device.dry else 10.0):
            with found.case(name, device):
                _compare(bench, found, name, calls)


def _compare(bench: Bench, found: Findings, name: str, calls: dict[str, Callable[[], Any]]) -> None:
    device, sizes = bench.device, bench.sizes
    # Sums of n terms, in another order perhaps; the update takes a dozen such steps, each well conditioned.
    limit = 64 * max(sizes.group) ** 0.5 * torch.finfo(torch.float32).eps
    apart = _apart(_dense_parts(calls["grouped"]()), _dense_parts(calls["loop"]()))
    require(apart <= limit, f"{name} and the loop differ by {apart:.1e}, allowed {limit:.1e}")
    times = called(device, calls, 4 * sizes.seconds)
    words = f"{len(sizes.group)} factors, n {min(sizes.group)} … {max(sizes.group)}, r {sizes.group_rank}"
    at_least = 8.0 if name == UPDATE else None
    note = f"{sizes.group_columns} columns each"
    found.figure(name, f"{words}: loop / it", times.ratio("loop", "grouped"), at_least=at_least, note=note)
    for other in list(calls)[2:]:
        found.figure(name, f"{words}: {other} / it", times.ratio(other, "grouped"))
    for way, call in calls.items():
        kernels = device.kernels(call)
        found.row(
            "launches",
            **{"call": name, "way": way, "µs": microseconds(times.median(way)).value, "launches": started(kernels)},
            **{"µs in kernels": sum(kernel["µs"] for kernel in kernels)},
        )


def _dense_parts(results: list[Any]) -> list[torch.Tensor]:
    """Return what is determined: a solution, or F Fᵀ times a fixed block, since F alone is not."""
    return [_image(result.root) if isinstance(result, brandla.LowRankRoot) else result for result in results]


def _image(root: torch.Tensor) -> torch.Tensor:
    probe = torch.cos(torch.arange(len(root), device=root.device, dtype=root.dtype))[:, None]
    return root @ (root.mT @ probe)


def _apart(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    pairs = zip(tensors_in(one), tensors_in(other), strict=True)
    return max(float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)) for a, b in pairs)
