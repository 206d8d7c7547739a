"""The sum of two Kronecker products, and its exact inverse by a simultaneous diagonalisation of each side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from brandla.kfac.systems.strategy import StateCurvature
from brandla.kfac.values import Gradient, Now, Rows, Side, dense
from brandla_kernels import gram_ema_


@dataclass
class SumOfTwo(StateCurvature):
    """A_Ω ⊗ B_Ω + A_∂ ⊗ B_∂ of one layer, each an exponential average, in the dtype of its shape: float64."""

    loader: ClassVar[str] = "PINN.load_state_dict"
    remark: ClassVar[str] = "inside and at the boundary"
    of_sides: ClassVar[Mapping[Side, Sequence[str]]] = {
        "input": ("interior input", "boundary input", "total"),
        "output": ("interior output", "boundary output"),
    }

    def absorb(self, rows: Rows, now: Now) -> None:
        total = self.state.get("total", torch.zeros((), dtype=self.shape.dtype, device=self.shape.device))
        self.state["total"] = now.decay * total + (1 - now.decay) * now.finite.to(self.shape.dtype)
        self._add("interior", rows, now)

    def absorb_boundary(self, rows: Rows, now: Now) -> None:
        """Take in the rows at the boundary."""
        self._add("boundary", rows, now)

    def solve(self, gradient: Gradient, now: Now) -> Gradient:
        """Return K₂ [(K₂ᵀ ∂W K₁) / (1 + s₂ s₁ᵀ)] K₁ᵀ, with KᵀM_ΩK = I and KᵀM_∂K = diag(s) on each side."""
        (right, s_in), (left, s_out) = (self._pencil(side, now.damping.value) for side in self.of_sides)
        rotated = left.mT @ dense(gradient).to(right.dtype) @ right
        return left @ (rotated / (1 + s_out[:, None] * s_in)) @ right.mT

    def sizes(self, state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        sides = {name: self.shape.d_in if name.endswith("input") else self.shape.d_out for name in state}
        return {name: (n, n) for name, n in sides.items() if name != "total"}

    def _add(self, term: str, rows: Rows, now: Now) -> None:
        for side, own, scale in (("input", rows.inputs, 1 / rows.uses), ("output", rows.gradients, rows.uses)):
            start = torch.zeros(own.shape[-1], own.shape[-1], dtype=self.shape.dtype, device=own.device)
            known = self.state.setdefault(f"{term} {side}", start)
            gram_ema_(known, own.mT.to(known.dtype), now.decay, (1 - now.decay) * scale)

    def _pencil(self, side: Side, damping: float) -> tuple[Tensor, Tensor]:
        """Return K and s of the two factors of a side, each plus λI."""
        total = self.state["total"].clamp_min(torch.finfo(self.shape.dtype).tiny)
        inside, outside = (self.state[f"{term} {side}"] / total for term in ("interior", "boundary"))
        for part in (inside, outside):
            part.diagonal().add_(damping)
        factor = torch.linalg.cholesky_ex(inside).L
        half = torch.linalg.solve_triangular(factor, outside, upper=False)
        values, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(factor, half.mT, upper=False))
        return torch.linalg.solve_triangular(factor.mT, vectors, upper=True), values.clamp_min(0)
