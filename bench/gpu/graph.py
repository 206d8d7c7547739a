"""CUDA graphs: what is replayed equals what is called, to the bit; and nothing waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import brandla
from bench.benches.problems import DECAY, WEIGHT, require
from bench.gpu import factors
from bench.gpu.device import Device
from bench.gpu.findings import Bench, Deadline, Findings
from bench.gpu.timed import called, microseconds, same_bits, tensors_in
from brandla_kernels import gram_ema_

DAMPING = 0.1


class Call(NamedTuple):
    """A function of tensors, and a source of inputs of one shape."""

    function: Callable[..., Any]
    inputs: Callable[[], tuple[Tensor, ...]]


def run(bench: Bench, found: Findings, time: Deadline) -> None:
    """Check each call as a graph, and without a wait."""
    for name, call in calls(bench.device, *bench.sizes.graph).items():
        if found.in_time(name, time, 0 if bench.device.dry else 4.0):
            with found.case(f"{name}: graph", bench.device):
                _replayed(bench, found, name, call)
            with found.case(f"{name}: no wait for the device", bench.device):
                _never_waiting(bench.device, found, name, call)


def calls(device: Device, n: int, r: int, k: int) -> dict[str, Call]:
    """Return the calls that promise to be capturable, with numbers and with tensors on the device as options."""

    def root() -> tuple[Tensor, ...]:
        return (*factors.root(device, n, r), device.normal(n, k))

    def eigh() -> tuple[Tensor, ...]:
        return (*factors.eigh(device, n, r), device.normal(n, k))

    def pair() -> tuple[Tensor, ...]:
        return (*factors.eigh(device, n, r), *factors.root(device, n, r), device.normal(n, n))

    def damping() -> Tensor:
        return device.normal(1)[0].abs() + DAMPING

    return {
        "root_update, cholesky": Call(_update, root),
        "root_update, cholesky, decay as a tensor": Call(_update, lambda: (*root(), damping())),
        "damped_solve": Call(_solve, eigh),
        "damped_solve, damping as a tensor": Call(_solve, lambda: (*eigh(), damping())),
        "kron_damped_solve": Call(_kron_solve, pair),
        "gram_ema_": Call(_gram_ema, lambda: (torch.eye(n, device=device.tensors), device.normal(n, k))),
    }


def _update(factor: Tensor, gram: Tensor, columns: Tensor, decay: float | Tensor = DECAY) -> Any:
    root = brandla.LowRankRoot(factor, gram)
    return brandla.root_update(root, columns, decay=decay, weight=WEIGHT, compress="cholesky")


def _solve(values: Tensor, vectors: Tensor, rhs: Tensor, damping: float | Tensor = DAMPING) -> Tensor:
    return brandla.damped_solve(brandla.LowRankEigh(values, vectors), rhs, damping)


def _kron_solve(values: Tensor, vectors: Tensor, factor: Tensor, gram: Tensor, matrix: Tensor) -> Any:
    left, right = brandla.LowRankEigh(values, vectors), brandla.LowRankRoot(factor, gram)
    return brandla.kron_damped_solve(left, right, matrix, DAMPING, DAMPING)


def _gram_ema(matrix: Tensor, columns: Tensor) -> Tensor:
    updated = matrix.clone()
    gram_ema_(updated, columns, DECAY, WEIGHT)
    return updated


def _replayed(bench: Bench, found: Findings, name: str, call: Call) -> None:
    device, static, later = bench.device, call.inputs(), call.inputs()
    expected = [_copies(call.function(*inputs)) for inputs in (static, later, static)]
    require(same_bits(expected[0], expected[2]), f"{name}: two calls differ{_by(expected[0], expected[2])}")
    captured = device.capture(lambda: call.function(*static))
    captured.replay()
    device.synchronize()
    differ = f"{name}: replay and call differ{_by(captured.result, expected[0])}"
    require(same_bits(captured.result, expected[0]), differ)
    for old, new in zip(static, later, strict=True):
        old.copy_(new)
    captured.replay()
    device.synchronize()
    differ = f"{name}: replay with new data and call differ{_by(captured.result, expected[1])}"
    require(same_bits(captured.result, expected[1]), differ)
    times = called(device, {"graph": captured.replay, "eager": lambda: call.function(*static)}, bench.sizes.seconds)
    interval = {one: microseconds(times.median(one)).value for one in ("graph", "eager")}
    found.row(
        "graphs",
        **{"call": name, "equal to the bit": "yes", "replay µs": interval["graph"], "eager µs": interval["eager"]},
    )


def _copies(result: Any) -> list[Tensor]:
    return [part.clone() for part in tensors_in(result)]


def _by(one: Any, other: Any) -> str:
    """Say how far two results are apart, relative to the largest entry."""
    pairs = zip(tensors_in(one), tensors_in(other), strict=True)
    return f" by {max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs):.1e} of the largest entry"


def _never_waiting(device: Device, found: Findings, name: str, call: Call) -> None:
    inputs = call.inputs()
    call.function(*inputs)
    with device.never_waiting():
        call.function(*inputs)
    found.row("no wait for the device", call=name, waits="none")
