"""What each factor of a preconditioner got, what it costs, and how far it may be off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from brandla.kfac.layer import Factor, Layer


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
    """All factors of a preconditioner, and the modules whose parameters are left to the optimizer."""

    factors: list[FactorReport]
    unsupported: list[str]

    def __str__(self) -> str:
        header = ("layer", "side", "n", "strategy", "rank", "error bound", "memory", "dense", "note")
        rows = [header, *(_cells(factor) for factor in self.factors)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        if self.unsupported:
            lines.append("left to the optimizer: " + ", ".join(self.unsupported))
        return "\n".join(lines)


def describe(layers: list[Layer], unsupported: list[str]) -> Report:
    """Read every factor; waits for the device."""
    rows = [
        row
        for layer in layers
        for row in (_describe(layer.name, "input", layer.input), _describe(layer.name, "output", layer.output))
    ]
    return Report(rows, unsupported)


def _describe(layer: str, side: Literal["input", "output"], factor: Factor) -> FactorReport:
    tensors = [value for value in factor.state.values() if isinstance(value, Tensor)]
    itemsize = tensors[0].element_size() if tensors else 4
    started = factor.count > 0
    return FactorReport(
        layer=layer,
        side=side,
        n=factor.n,
        strategy=repr(factor.strategy),
        reason=factor.reason if started else "no data yet",
        rank=factor.strategy.lowrank(factor.state).rank if started else None,
        error_bound=float(factor.strategy.error_bound(factor.state)) if started else None,
        bytes=sum(value.numel() * value.element_size() for value in tensors),
        dense_bytes=factor.n**2 * itemsize,
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
