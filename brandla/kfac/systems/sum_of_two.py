"""The sum of two Kronecker products, and its exact inverse by a simultaneous diagonalisation of each side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from brandla import _check
from brandla.kfac.systems.strategy import Curvature
from brandla.kfac.values import Gradient, Now, Rows, Shape, dense
from brandla_kernels import gram_ema_


@dataclass
class SumOfTwo(Curvature):
    """A_Ω ⊗ B_Ω + A_∂ ⊗ B_∂ of one layer, each an exponential average, in float64."""

    shape: Shape
    total: Tensor | None = None
    sums: dict[str, Tensor] = field(default_factory=dict)

    @property
    def started(self) -> bool:
        """Whether data came in."""
        return bool(self.sums)

    def absorb(self, rows: Rows, now: Now) -> None:
        """Take in the rows inside."""
        total = torch.zeros((), dtype=torch.float64, device=self.shape.device) if self.total is None else self.total
        self.total = now.decay * total + (1 - now.decay) * now.finite.to(torch.float64)
        self._add("interior", rows, now)

    def absorb_boundary(self, rows: Rows, now: Now) -> None:
        """Take in the rows at the boundary."""
        self._add("boundary", rows, now)

    def solve(self, gradient: Gradient, now: Now) -> Gradient:
        """Return K₂ [(K₂ᵀ ∂W K₁) / (1 + s₂ s₁ᵀ)] K₁ᵀ, with KᵀM_ΩK = I and KᵀM_∂K = diag(s) on each side."""
        (right, s_in), (left, s_out) = (self._pencil(side, now.damping.value) for side in ("input", "output"))
        rotated = left.mT @ dense(gradient).to(torch.float64) @ right
        return left @ (rotated / (1 + s_out[:, None] * s_in)) @ right.mT

    def state_dict(self) -> dict[str, Any]:
        """Return what a bit-equal continuation needs."""
        return {"total": self.total, **{name: part.clone() for name, part in self.sums.items()}}

    def loaded(self, state: dict[str, Any], where: str) -> SumOfTwo:
        """Return a new curvature that continues from ``state``, or raise ValueError."""
        sums = {name: part for name, part in state.items() if name != "total"}
        for name, part in sums.items():
            n = self.shape.d_in if name.endswith("input") else self.shape.d_out
            if part.shape != (n, n):
                rule = f"{where}: {name} must have shape {(n, n)}; got {tuple(part.shape)}"
                _check.fail_value("PINN.load_state_dict", rule)
        own = {name: part.to(self.shape.device, copy=True) for name, part in sums.items()}
        return replace(self, total=state["total"].to(self.shape.device, copy=True), sums=own)

    def tensors(self) -> Iterator[Tensor]:
        """Go through all that is kept."""
        yield from self.sums.values()

    def _add(self, term: str, rows: Rows, now: Now) -> None:
        scale = {"input": 1 / rows.uses, "output": rows.uses}
        for side, own in (("input", rows.inputs), ("output", rows.gradients)):
            n = own.shape[-1]
            name, start = f"{term} {side}", torch.zeros(n, n, dtype=torch.float64, device=own.device)
            known = self.sums.setdefault(name, start)
            gram_ema_(known, own.mT.to(torch.float64), now.decay, (1 - now.decay) * scale[side])

    def _pencil(self, side: str, damping: float) -> tuple[Tensor, Tensor]:
        """Return K and s of the two factors of a side, each plus λI."""
        assert self.total is not None
        total = self.total.clamp_min(torch.finfo(torch.float64).tiny)
        inside, outside = (self.sums[f"{term} {side}"] / total for term in ("interior", "boundary"))
        for part in (inside, outside):
            part.diagonal().add_(damping)
        factor = torch.linalg.cholesky_ex(inside).L
        half = torch.linalg.solve_triangular(factor, outside, upper=False)
        values, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(factor, half.mT, upper=False))
        return torch.linalg.solve_triangular(factor.mT, vectors, upper=True), values.clamp_min(0)
