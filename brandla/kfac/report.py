"""The report of a preconditioner: the strategy, the memory and the error bound of each factor."""

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
    """One factor. ``error_bound`` bounds ‖M − M̂‖₂; ``dense_bytes`` is the memory of the n × n matrix alone.

    ``relative_error_bound`` is ``error_bound`` divided by d₁, the largest eigenvalue of M̂. It is 0 if the bound is 0,
    and otherwise infinite if d₁ is 0. For a batch of matrices, both bounds are the largest in the batch.

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

    ``unsupported`` holds the reason why each of its modules or parameters is left to the optimizer. ``captured_bytes``
    is the memory that inputs and output gradients took until the last step freed them. For each layer that takes
    samples and positions, ``layouts`` says which of the two come first, and why.

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
        """The memory that dense matrices would take in place of the factors."""
        return sum(factor.dense_bytes for factor in self.factors)

    def __str__(self) -> str:
        rows = [("layer", "side", "n", "strategy", "rank", "error bound / d₁", "memory", "dense", "note")]
        for factor in self.factors:
            rank = "-" if factor.rank is None else str(factor.rank)
            bound = "-" if factor.relative_error_bound is None else f"{factor.relative_error_bound:.2e}"
            name = factor.layer, factor.side, str(factor.n), factor.strategy.partition("(")[0]
            rows.append((*name, rank, bound, _size(factor.bytes), _size(factor.dense_bytes), factor.reason))
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
    """Return the report of all factors. It reads them, so it waits for the device."""
    refused = {layer.name: "frozen" for layer in layers if layer.is_frozen and not layer.curvature.started}
    refused |= {layer.name: layer.capture.refusal for layer in layers if layer.capture.refusal}
    rows: list[FactorReport] = []
    for layer in layers:
        if layer.name not in refused:
            rows += rows_of(layer.name, str(layer.strategy), layer.shape, layer.curvature)
    orders = {layer.name: layer.order for layer in layers if layer.order}
    return Report(rows, unsupported | refused, skipped, captured_bytes, orders)


def rows_of(layer: str, strategy: str, shape: Shape, curvature: Curvature) -> list[FactorReport]:
    """Describe the factors of a layer, and the rest of its curvature."""
    without_data = "" if curvature.started else "no data yet"
    entry_bytes = math.prod(shape.groups) * shape.dtype.itemsize
    rows: list[FactorReport] = []
    for side, factor in curvature.factors():
        bounds: tuple[float | None, float | None] = (None, None)
        if factor.started:
            absolute = factor.form.error_bound(factor.state)
            relative = torch.where(absolute == 0, 0, absolute / factor.largest())
            bounds = float(absolute.max()), float(relative.max())
        note = factor.reason if factor.started else "no data yet"
        memory = _bytes(factor.tensors()), entry_bytes * factor.n**2
        rows.append(FactorReport(layer, side, factor.n, str(factor.form), note, factor.rank, *bounds, *memory))
    for side, remark, tensors in curvature.kept():
        n = shape.d_in if side == "input" else shape.d_out
        memory = _bytes(tensors), entry_bytes * n**2
        rows.append(FactorReport(layer, side, n, strategy, without_data or remark, None, None, None, *memory))
    beside = _bytes(curvature.tensors()) - sum(row.bytes for row in rows)
    if beside > 0 or not rows:
        n = math.prod(shape.groups) * shape.d_out * shape.d_in
        rows.append(FactorReport(layer, "beside", n, strategy, without_data, None, None, None, beside, 0))
    return rows


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(part.nbytes for part in tensors)


def _size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
