"""The end of a symmetric update: its new values as a new factor, or written over the old one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic

from torch import Tensor

from brandla._expansion import Expansion
from brandla.lowrank import Factor, Tracked


@dataclass(frozen=True)
class Step(Generic[Factor]):
    """New values (d or S), and what gives the new U: a rotation of an expansion, or the old U as it is."""

    kind: type[Factor]
    values: Tensor
    basis: Tensor
    expansion: Expansion | None
    rotation: Tensor
    bound: Tensor | None

    def as_new(self) -> Factor | Tracked[Factor]:
        """Return the updated factor, tracked if the old one was."""
        basis = self.basis.clone() if self.expansion is None else self.expansion.rotate(self.rotation)
        updated = self.kind(self.values, basis)
        return updated if self.bound is None else Tracked(updated, self.bound)

    def in_place(self, target: Factor | Tracked[Factor]) -> Factor | Tracked[Factor]:
        """Write the updated factor over the tensors of the old one, and return that."""
        old_values, _ = target.lowrank if isinstance(target, Tracked) else target
        if self.expansion is not None:
            self.expansion.rotate_(self.rotation)
        old_values.copy_(self.values)
        if isinstance(target, Tracked) and self.bound is not None:
            target.error_bound.copy_(self.bound)
        return target
