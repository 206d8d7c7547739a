"""Which rows of a tall matrix this process holds: all of them or, of a DTensor sharded on its rows, some.

An inner product of tall matrices is the sum of those of their parts: one all-reduce of something small. Tall matrices
never travel. ``docs/sharded.md`` lists what does.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from brandla import _check

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Small = TypeVar("Small", bound=float | Tensor | None)


@dataclass(frozen=True)
class Rows:
    """Which rows of a tall matrix are here: all or, with a mesh, those of a DTensor's shard, perhaps none."""

    mesh: DeviceMesh | None = None
    n: int = 0  # rows in all, with a mesh
    replicates: bool = False  # Small results are replicated DTensors, and not plain tensors.

    def admit(self, function: str, name: str, tensor: Tensor) -> None:
        """Check that a tall argument is a DTensor if the factor's tall matrix is one, and only then."""
        if is_dtensor(tensor) is (self.mesh is None):
            _check.mixture(function, name, tensor, as_dtensor=self.mesh is not None)

    def local(self, function: str, name: str, tensor: Tensor, dim: int = -2) -> Tensor:
        """Return what is here of a tall argument, whose rows are dimension ``dim``, sharded as the factor's."""
        if self.mesh is None:
            return tensor
        _check.placed(function, name, tensor, dim, self.mesh)
        local: Tensor = here(tensor)
        start, stop = _span(self.mesh, self.n, self.mesh.get_local_rank())
        if local.shape[dim] != stop - start:
            rule = f"{name} must have its rows {start} to {stop} here, as distribute_tensor lays {self.n} rows out"
            _check.fail_value(function, f"{rule}; got {local.shape[dim]} rows; distribute it again")
        return local

    def small(self, function: str, name: str, value: Small) -> Small:
        """Return a number, a plain tensor, or beside a sharded factor the local copy of a replicated DTensor."""
        if not (isinstance(value, Tensor) and is_dtensor(value)):
            return value
        self.admit(function, name, value)
        _check.placed(function, name, value, None, self.mesh)
        copy: Small = here(value)
        return copy

    def count(self, local: Tensor) -> int:
        """Return n, of a tall matrix of which ``local`` is here."""
        return local.shape[-2] if self.mesh is None else self.n

    def total(self, part: Tensor) -> Tensor:
        """Return an inner product over all rows, the same everywhere, from one over those here, which may be lost."""
        if self.mesh is None:
            return part
        if part.requires_grad:
            # The gradient of a sum over the processes is the sum of theirs.
            part = self.shared(part).clone(memory_format=torch.contiguous_format)
        with torch.no_grad():
            return self._summed(part)

    def totals(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Return `total` of each, of one dtype, in one message."""
        joined = self.total(torch.cat([part.flatten() for part in parts]))
        pieces = joined.split([part.numel() for part in parts])
        return tuple(piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True))

    def shared(self, small: Tensor) -> Tensor:
        """Return what every process computed for itself; its gradient is summed over them."""
        if self.mesh is None or not (small.requires_grad and torch.is_grad_enabled()):
            return small
        view = small.view_as(small)
        view.register_hook(lambda gradient: self._summed(gradient.clone()))
        return view

    def _summed(self, part: Tensor) -> Tensor:
        if part.numel() and self.mesh is not None:
            part = part.contiguous()
            torch.distributed.all_reduce(part, group=self.mesh.get_group())
        return part

    def qr(self, panel: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is here of Q, and R: from the QR of all processes' R, one below the other."""
        basis, triangle = torch.linalg.qr(panel)
        if self.mesh is None:
            return basis, triangle
        # No more rows of a process than it holds, so that Q has no row that is nowhere.
        spans = (_span(self.mesh, self.n, rank) for rank in range(self.mesh.size()))
        heights = [min(stop - start, panel.shape[-1]) for start, stop in spans]
        rank = self.mesh.get_local_rank()
        own = -2, sum(heights[:rank]), heights[rank]
        stacked = triangle.new_zeros(*triangle.shape[:-2], sum(heights), panel.shape[-1])
        stacked.narrow(*own).copy_(triangle)
        inner, triangle = torch.linalg.qr(self.total(stacked))
        return basis @ inner.narrow(*own), triangle

    def tall_result(self, local: Tensor, dim: int = -2) -> Tensor:
        """Return a tall result, of which ``local`` is here, as its argument came in."""
        if self.mesh is None:
            return local
        from torch.distributed.tensor import DTensor, Shard

        dim %= local.ndim
        shape = torch.Size([self.n if at == dim else size for at, size in enumerate(local.shape)])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, self.mesh, [Shard(dim)], run_check=False, shape=shape, stride=stride)

    def small_result(self, value: Tensor) -> Tensor:
        """Return a small result as that of the factor came in."""
        if not self.replicates:
            return value
        from torch.distributed.tensor import DTensor, Replicate

        return DTensor.from_local(value, self.mesh, [Replicate()], run_check=False)


WHOLE = Rows()
# Types of arguments of which `Rows.admit` and `Rows.small` have nothing to say.
PLAIN = frozenset({Tensor, float, int})


def kind_of(rows: Rows) -> tuple[DeviceMesh, bool] | None:
    """Return what the rows of matrices that are computed together have in common."""
    return None if rows.mesh is None else (rows.mesh, rows.replicates)


def rows_of(function: str, name: str, tall: Any, small: Tensor) -> Rows:
    """Return how the rows of a factor's tall matrix are laid out; ``small`` shows what its small parts are."""
    if type(tall) is Tensor or not is_dtensor(tall):
        return WHOLE
    _check.placed(function, name, tall, -2)
    return Rows(tall.device_mesh, tall.shape[-2], is_dtensor(small))


def zero_rows(
    function: str, mesh: Any, shape: tuple[int, ...], dtype: torch.dtype | None, device: torch.device | str | None
) -> Tensor:
    """Return a tall matrix (..., n, r) of zeros for a new factor, sharded on its rows over a mesh if there is one."""
    *_, n, rank = shape
    _check.part_dtype(function, "dtype", torch.get_default_dtype() if dtype is None else dtype)
    _check.count(function, "rank", rank, 0)
    if rank > n:
        _check.fail_value(function, f"rank must not exceed the number of rows, {n}; got {rank}")
    if mesh is None:
        return torch.zeros(*shape, dtype=dtype, device=device)
    if device is not None:
        _check.fail_value(function, f"device must be left out where a mesh is given, which has its own; got {device}")
    from torch.distributed.tensor import Shard, zeros

    _check.one_dimension(function, "mesh", mesh)
    return zeros(*shape, dtype=dtype, device_mesh=mesh, placements=[Shard(len(shape) - 2)])


def is_dtensor(tensor: Tensor) -> bool:
    """Say whether a tensor is a DTensor, at no cost for others and without importing what it takes to make one."""
    if type(tensor) is Tensor or torch.compiler.is_compiling():
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def here(tensor: Any) -> Any:
    """Return the part of a tensor that this process holds: the tensor itself unless it is a DTensor."""
    if not is_dtensor(tensor):
        return tensor
    local = tensor.to_local()
    # What a redistribution is still bringing is a tensor that waits for it.
    return local.wait() if hasattr(local, "wait") else local


def everywhere(tensor: Any) -> Tensor:
    """Return a whole tensor in every process, by gathering a DTensor: for tests and small cases."""
    whole: Tensor = tensor.full_tensor() if is_dtensor(tensor) else tensor
    return whole


def _span(mesh: DeviceMesh, n: int, rank: int) -> tuple[int, int]:
    """Return the first of n rows on a process, and the one after its last: of one size until rows run out."""
    size = -(-n // mesh.size())
    start = min(rank * size, n)
    return start, min(start + size, n)
