"""A symmetric update from its checked arguments to its result: a new factor, one written over the old, or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple

import torch
from torch import Tensor

from brandla import _check
from brandla._core import without_denormals
from brandla._expansion import Expansion
from brandla._sharded import Rows, here, join, rows_of
from brandla.lowrank import Factor, Tracked
from brandla.rank import Rank, most_of, tolerance_of
from brandla_kernels import Tall, tall


class Update(NamedTuple):
    """Arguments of an update that fit together: of one factor, of a batch, or of a list of factors."""

    values: Tensor  # d or S
    basis: Tall
    columns: Tall
    decay: float | Tensor
    weight: float | Tensor
    rank: int
    tol: float
    bound: Tensor | None  # error bound of a tracked factor
    rows: Rows  # which rows of the tall matrices are here

    @property
    def decayed_bound(self) -> Tensor | None:
        """The bound for what the old factor leaves of the new matrix."""
        return None if self.bound is None else self.decay * self.bound

    @property
    def adds_nothing(self) -> bool:
        """Whether only the decay has to be applied."""
        return tall.columns(self.columns) == 0 and self.rank == tall.columns(self.basis) and self.tol == 0

    @property
    def old_values(self) -> Tensor:
        """The values; NaN where U is not finite, if there are no columns whose products with U would say so."""
        if tall.columns(self.columns):
            return self.values
        flat = self.values.flatten(self.basis.ndim - 2)
        flat = flat + 0 * self.rows.total(self.basis.sum((-2, -1)))[..., None]
        return flat.reshape(self.values.shape)


@dataclass(frozen=True)
class Step(Generic[Factor]):
    """New values (d or S), and what gives the new U.

    That is an expansion B and W with U = B W or, where U stays, what it is added, of batch shape: 0, or NaN where
    something was not finite.
    """

    kind: type[Factor]
    values: Tensor
    basis: Tall
    turn: tuple[Expansion, Tensor] | Tensor
    bound: Tensor | None
    rows: Rows

    def as_new(self) -> Factor | Tracked[Factor]:
        """Return the updated factor, tracked if the old one was."""
        return _given_out(self.kind, self.values, self._new_basis(), self.bound, self.rows)

    def as_list(self) -> list[Factor | Tracked[Factor]]:
        """Return the updated factors of a list."""
        bounds = [None] * len(self.values) if self.bound is None else self.bound
        parts = zip(self.values, self._new_basis(), bounds, strict=True)
        return [_given_out(self.kind, *member, self.rows.of(index)) for index, member in enumerate(parts)]

    def in_place(self, target: Factor | Tracked[Factor]) -> Factor | Tracked[Factor]:
        """Write the updated factor over the tensors of the old one, and return that."""
        old_values, _ = target.lowrank if isinstance(target, Tracked) else target
        if isinstance(self.turn, Tensor):
            self.basis.add_(self.turn[..., None, None])
        else:
            expansion, rotation = self.turn
            expansion.rotate_(rotation)
        here(old_values).copy_(self.values)
        if isinstance(target, Tracked) and self.bound is not None:
            here(target.error_bound).copy_(self.bound)
        return target

    def _new_basis(self) -> Tall:
        if isinstance(self.turn, Tensor):
            return self.basis + self.turn[..., None, None]
        expansion, rotation = self.turn
        return expansion.rotate(rotation)


def decay_step(kind: type[Factor], update: Update) -> Step[Factor]:
    """Apply the decay alone; what is not finite makes all of the factor NaN, as it does in every update."""
    decay = update.decay[..., None] if isinstance(update.decay, Tensor) else update.decay
    flat = decay * update.old_values.flatten(update.basis.ndim - 2)
    nothing = (0 * flat).sum(-1)
    values = without_denormals(flat + nothing[..., None]).reshape(update.values.shape)
    bound = None if update.decayed_bound is None else update.decayed_bound + nothing
    return Step(kind, values, update.basis, nothing, bound, update.rows)


def _given_out(
    kind: type[Factor], values: Tensor, basis: Tensor, bound: Tensor | None, rows: Rows
) -> Factor | Tracked[Factor]:
    updated = kind(rows.small_result(values), rows.tall_result(basis))
    return updated if bound is None else Tracked(updated, rows.small_result(bound))


def check_update(
    function: str,
    name: str,
    small_name: str,
    factor: Factor | Tracked[Factor],
    columns: Tensor,
    decay: float | Tensor,
    weight: float | Tensor,
    rank: int | Rank | None,
) -> Update:
    """Check what every symmetric update takes besides its factor, whose basis is called ``name``, d or S otherwise."""
    (values, basis), bound = (factor.lowrank, factor.error_bound) if isinstance(factor, Tracked) else (factor, None)
    if isinstance(factor, Tracked):
        _check.error_bound(function, factor.error_bound, name, basis)
    rows = rows_of(function, name, basis, values)
    rows.admit(function, "columns", columns)
    columns = _check.columns(function, "columns", columns, name, basis)
    decay = _check.scalar(function, "decay", rows.small(function, "decay", decay), name, basis)
    weight = _check.scalar(function, "weight", rows.small(function, "weight", weight), name, basis)
    n, r = basis.shape[-2:]
    k = columns.shape[-1]
    because = f"min(n, r + k) with n = {n}, r = {r}, k = {k}"
    most = _check.rank(function, most_of(rank), r, min(n, r + k), because)
    return Update(
        rows.small(function, small_name, values),
        rows.local(function, name, basis),
        rows.local(function, "columns", columns),
        decay,
        weight,
        most,
        tolerance_of(rank),
        rows.small(function, "error_bound", bound),
        rows,
    )


def check_in_place(function: str, name: str, small_name: str, update: Update, tol: float) -> Update:
    """Check what overwriting the factor of an update needs besides, and return the update with that tolerance."""
    _check.tolerance(function, tol)
    written = {name: update.basis, small_name: update.values, "error_bound": update.bound}
    read = {"columns": update.columns, "decay": update.decay, "weight": update.weight}
    for each, value in (written | read).items():
        if isinstance(value, Tensor):
            _check.without_gradient(function, each, value)
            if each in written:
                _check.written(function, each, value)
    return update._replace(tol=tol)


def stack(updates: Sequence[Update]) -> Update:
    """Join updates of one r, k, rank and tolerance, of single factors, into that of a list."""
    first = updates[0]
    return Update(
        torch.stack([update.values for update in updates]),
        [update.basis for update in updates],
        [update.columns for update in updates],
        stack_numbers([update.decay for update in updates], first.values),
        stack_numbers([update.weight for update in updates], first.values),
        first.rank,
        first.tol,
        None if first.bound is None else torch.stack([update.bound for update in updates if update.bound is not None]),
        join([update.rows for update in updates]),
    )


def stack_numbers(numbers: Sequence[float | Tensor], like: Tensor) -> float | Tensor:
    """Return the one number that all are, or a tensor of them."""
    if all(not isinstance(number, Tensor) and number == numbers[0] for number in numbers):
        return numbers[0]
    return torch.stack([torch.as_tensor(number, dtype=like.dtype, device=like.device) for number in numbers])
