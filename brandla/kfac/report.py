"""What each factor of a preconditioner got, what it costs, and how far it may be off."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from brandla.kfac.capture.layer import Layer
from brandla.kfac.systems.strategy import Curvature
from brandla.kfac.values import Shape

Side = Literal["input", "output", "beside"]


@dataclass(frozen=True)
class FactorReport:
    """One factor: ``error_bound`` bounds ‖M − M̂‖₂; ``dense_bytes`` is what the n × n matrix alone would take.

    ``relative_error_bound`` is that bound divided by d₁, the largest eigenvalue of M̂: 0 if the bound is 0, otherwise
    infinite if d₁ is 0. For a batch of matrices, both are the largest in the batch.

    A curvature that keeps more than its factors has one more row, whose ``side`` is ``"beside"``. There n is the
    layer's number of parameters, and ``dense_bytes`` is 0.

    Examples
    --------
    >>> import torch
    >>> from brandla.kfac import KFAC, Exact
    >>> report = KFAC(torch.nn.Linear(20, 10), Exact()).report()
    >>> [factor.n for factor in report.factors]
    [21, 10]
    """

    layer: str
    side: Side
    n: int
    strategy: str
    reason: str
    rank: int | None
    error_bound: float | None
    relative_error_bound: float | None
    bytes: int
    dense_bytes: int


@dataclass(frozen=True)
class Report:
    """All factors of a preconditioner, and the number of batches skipped.

    ``unsupported`` says why each module or parameter in it is left to the optimizer; ``captured_bytes`` is the memory
    that inputs and output gradients took until the last step was done with them. ``layouts`` says, for each layer that
    takes samples and positions, which of them come first, and why.

    Examples
    --------
    >>> import torch
    >>> from brandla.kfac import KFAC, Exact
    >>> report = KFAC(torch.nn.Linear(20, 10), Exact()).report()
    >>> [factor.n for factor in report.factors]
    [21, 10]
    """

    factors: list[FactorReport]
    unsupported: dict[str, str]
    skipped: int = 0
    captured_bytes: int = 0
    layouts: dict[str, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """The memory of all factors."""
        return sum(factor.bytes for factor in self.factors)

    @property
    def dense_bytes(self) -> int:
        """The memory that dense matrices in their place would take."""
        return sum(factor.dense_bytes for factor in self.factors)

    def __str__(self) -> str:
        rows = [("layer", "side", "n", "strategy", "rank", "error bound / d₁", "memory", "dense", "note")]
        for own in self.factors:
            rank = "-" if own.rank is None else str(own.rank)
            bound = "-" if own.relative_error_bound is None else f"{own.relative_error_bound:.2e}"
            of_factor = own.layer, own.side, str(own.n), own.strategy.partition("(")[0]
            rows.append((*of_factor, rank, bound, _size(own.bytes), _size(own.dense_bytes), own.reason))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.append(
            f"factors: {_size(self.bytes)}, dense: {_size(self.dense_bytes)};"
            f" captured in the last step: {_size(self.captured_bytes)}"
        )
        if self.unsupported:
            lines.append("left to the optimizer:")
            lines += [f"  {name}: {reason}" for name, reason in self.unsupported.items()]
        if any(layout.startswith("positions") for layout in self.layouts.values()):
            lines.append("order of the inputs' dimensions:")
            lines += [f"  {name}: {layout}" for name, layout in self.layouts.items()]
        if self.skipped:
            lines.append(f"batches skipped for values that are not finite: {self.skipped}")
        return "\n".join(lines)


def describe(layers: list[Layer], unsupported: dict[str, str], skipped: int, captured_bytes: int) -> Report:
    """Read every factor; waits for the device."""
    refused = {layer.name: "frozen" for layer in layers if layer.is_frozen and not layer.curvature.started}
    refused |= {layer.name: layer.capture.refusal for layer in layers if layer.capture.refusal}
    rows: list[FactorReport] = []
    for layer in layers:
        if layer.name not in refused:
            rows += rows_of(layer.name, str(layer.strategy), layer.shape, layer.curvature)
    orders = {layer.name: layer.order for layer in layers if layer.order}
    return Report(rows, unsupported | refused, skipped, captured_bytes, orders)


def rows_of(layer: str, strategy: str, shape: Shape, curvature: Curvature) -> list[FactorReport]:
    """Describe the factors of a layer, and what its curvature keeps beside them."""
    started = "" if curvature.started else "no data yet"
    of_one = math.prod(shape.groups) * shape.dtype.itemsize
    rows: list[FactorReport] = []
    for side, factor in curvature.factors():
        bounds: tuple[float | None, float | None] = (None, None)
        if factor.started:
            absolute = factor.strategy.error_bound(factor.state)
            relative = torch.where(absolute == 0, 0, absolute / factor.largest())
            bounds = float(absolute.max()), float(relative.max())
        note = factor.reason if factor.started else "no data yet"
        memory = _bytes(factor.tensors()), of_one * factor.n**2
        rows.append(FactorReport(layer, side, factor.n, str(factor.strategy), note, factor.rank, *bounds, *memory))
    for side, remark, tensors in curvature.kept():
        n = shape.d_in if side == "input" else shape.d_out
        memory = _bytes(tensors), of_one * n**2
        rows.append(FactorReport(layer, side, n, strategy, started or remark, None, None, None, *memory))
    beside = _bytes(curvature.tensors()) - sum(row.bytes for row in rows)
    if beside > 0 or not rows:
        n = math.prod(shape.groups) * shape.d_out * shape.d_in
        rows.append(FactorReport(layer, "beside", n, strategy, started, None, None, None, beside, 0))
    return rows


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(part.nbytes for part in tensors)


def _size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
