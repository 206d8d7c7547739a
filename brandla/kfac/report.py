"""What each factor of a preconditioner got, what it costs, and how far it may be off."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
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
        header = ("layer", "side", "n", "strategy", "rank", "error bound / d₁", "memory", "dense", "note")
        rows = [header, *(_cells(factor) for factor in self.factors)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
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
    active = [layer for layer in layers if layer.name not in refused]
    parts = [(layer.name, str(layer.strategy), layer.shape, layer.curvature) for layer in active]
    rows = [row for own in parts for row in rows_of(*own)]
    orders = {layer.name: layer.order for layer in layers if layer.order}
    return Report(rows, unsupported | refused, skipped, captured_bytes, orders)


def rows_of(layer: str, strategy: str, shape: Shape, curvature: Curvature) -> Iterator[FactorReport]:
    """Describe the factors of a layer, and what its curvature keeps beside them."""
    started = "" if curvature.started else "no data yet"
    rows: list[FactorReport] = []
    for side, factor in curvature.factors():
        bounds: tuple[float | None, float | None] = (None, None)
        if factor.started:
            absolute = factor.strategy.error_bound(factor.state)
            relative = torch.where(absolute == 0, 0, absolute / factor.largest())
            bounds = float(absolute.max()), float(relative.max())
        note = factor.reason if factor.started else "no data yet"
        memory = _bytes(factor.tensors()), math.prod(shape.groups) * factor.n**2 * shape.dtype.itemsize
        rows.append(FactorReport(layer, side, factor.n, str(factor.strategy), note, factor.rank, *bounds, *memory))
    for side, remark, tensors in curvature.kept():
        n = shape.d_in if side == "input" else shape.d_out
        dense = math.prod(shape.groups) * n**2 * shape.dtype.itemsize
        own = side, n, strategy, started or remark, None, None, None, _bytes(tensors), dense
        rows.append(FactorReport(layer, *own))
    yield from rows
    beside = _bytes(curvature.tensors()) - sum(row.bytes for row in rows)
    if beside > 0 or not rows:
        n = math.prod(shape.groups) * shape.d_out * shape.d_in
        yield FactorReport(layer, "beside", n, strategy, started, None, None, None, beside, 0)


def _cells(factor: FactorReport) -> tuple[str, ...]:
    return (
        factor.layer,
        factor.side,
        str(factor.n),
        factor.strategy.partition("(")[0],
        "-" if factor.rank is None else str(factor.rank),
        "-" if factor.relative_error_bound is None else f"{factor.relative_error_bound:.2e}",
        _size(factor.bytes),
        _size(factor.dense_bytes),
        factor.reason,
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(part.numel() * part.element_size() for part in tensors)


def _size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
