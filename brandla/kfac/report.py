"""What each factor of a preconditioner got, what it costs, and how far it may be off."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from brandla.kfac.factor import Factor
from brandla.kfac.layer import Layer


@dataclass(frozen=True)
class FactorReport:
    """One factor: ``error_bound`` bounds ‖M − M̂‖₂; ``dense_bytes`` is what the n × n matrix alone would take."""

    layer: str
    side: Literal["input", "output"]
    n: int
    strategy: str
    reason: str
    rank: int | None
    error_bound: float | None
    bytes: int
    dense_bytes: int


@dataclass(frozen=True)
class Report:
    """All factors of a preconditioner, the modules left to the optimizer, and the number of batches skipped."""

    factors: list[FactorReport]
    unsupported: list[str]
    skipped: int = 0

    def __str__(self) -> str:
        header = ("layer", "side", "n", "strategy", "rank", "error bound", "memory", "dense", "note")
        rows = [header, *(_cells(factor) for factor in self.factors)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        if self.unsupported:
            lines.append("left to the optimizer: " + ", ".join(self.unsupported))
        if self.skipped:
            lines.append(f"batches skipped for values that are not finite: {self.skipped}")
        return "\n".join(lines)


def describe(layers: list[Layer], unsupported: list[str], skipped: int) -> Report:
    """Read every factor; waits for the device."""
    rows = [_describe(layer.name, side, factor) for layer in layers for side, factor in layer.curvature.factors()]
    return Report(rows, unsupported, skipped)


def _describe(layer: str, side: Literal["input", "output"], factor: Factor) -> FactorReport:
    tensors = [part for part in factor.state.values() if isinstance(part, Tensor)]
    groups = math.prod(factor.groups)
    lowrank = factor.lowrank() if factor.started else None
    return FactorReport(
        layer=layer,
        side=side,
        n=factor.n,
        strategy=repr(factor.strategy),
        reason=factor.reason if factor.started else "no data yet",
        rank=None if lowrank is None else lowrank.rank,
        error_bound=float(factor.strategy.error_bound(factor.state).max()) if factor.started else None,
        bytes=sum(part.numel() * part.element_size() for part in tensors),
        dense_bytes=groups * factor.n**2 * factor.dtype.itemsize,
    )


def _cells(factor: FactorReport) -> tuple[str, ...]:
    return (
        factor.layer,
        factor.side,
        str(factor.n),
        factor.strategy.partition("(")[0],
        "-" if factor.rank is None else str(factor.rank),
        "-" if factor.error_bound is None else f"{factor.error_bound:.2e}",
        _size(factor.bytes),
        _size(factor.dense_bytes),
        factor.reason,
    )


def _size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
