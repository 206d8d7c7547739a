"""Which rows of a tall matrix this process holds: all rows, or its shard of a DTensor sharded on its rows.

An inner product of tall matrices is the sum of the products of their shards: one all-reduce of a small matrix. Tall
matrices never travel. ``docs/sharded.md`` lists what does.
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
class Sharding:
    """Which rows of a tall matrix this process holds: all or, with a mesh, a DTensor's shard of them, perhaps none."""

    mesh: DeviceMesh | None = None
    n: int = 0  # rows of all shards, with a mesh
    replicates: bool = False  # Small results are replicated DTensors, not plain tensors.

    def check_kind(self, function: str, name: str, tensor: Tensor) -> None:
        """Check that a tall argument is a DTensor if the factor's tall matrix is one, and only then."""
        if is_dtensor(tensor) is (self.mesh is None):
            _check.fail_kind(function, name, tensor, as_dtensor=self.mesh is not None)

    def local(self, function: str, name: str, tensor: Tensor, dim: int = -2) -> Tensor:
        """Return the local rows, dimension ``dim``, of a tall argument, which must be sharded as the factor is."""
        if self.mesh is None:
            return tensor
        _check.placements(function, name, tensor, dim, self.mesh)
        local: Tensor = local_tensor(tensor)
        start, stop = _span(self.mesh, self.n, self.mesh.get_local_rank())
        if local.shape[dim] != stop - start:
            rule = f"{name} must hold rows {start} to {stop} in this process, as distribute_tensor splits {self.n} rows"
            _check.fail_value(function, f"{rule}; got {local.shape[dim]} rows; distribute it again")
        return local

    def local_small(self, function: str, name: str, value: Small) -> Small:
        """Return a small argument, or the local copy of one that is a replicated DTensor beside a sharded factor."""
        if not (isinstance(value, Tensor) and is_dtensor(value)):
            return value
        self.check_kind(function, name, value)
        _check.placements(function, name, value, None, self.mesh)
        copy: Small = local_tensor(value)
        return copy

    def count(self, local: Tensor) -> int:
        """Return n of the tall matrix whose local rows these are."""
        return local.shape[-2] if self.mesh is None else self.n

    def total(self, part: Tensor) -> Tensor:
        """Return an inner product over all rows, in every process, from the local product, which it may overwrite."""
        if self.mesh is None:
            return part
        if part.requires_grad:
            # The gradient of a sum over the processes is the sum of their gradients.
            part = self.summing_gradients(part).clone(memory_format=torch.contiguous_format)
        with torch.no_grad():
            return self._summed(part)

    def totals(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Return the `total` of each part in one message. All parts have one dtype."""
        joined = self.total(torch.cat([part.flatten() for part in parts]))
        pieces = joined.split([part.numel() for part in parts])
        return tuple(piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True))

    def summing_gradients(self, small: Tensor) -> Tensor:
        """Return a result that every process computed for itself, with a gradient summed over the processes."""
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
        """Return the local rows of Q, and R: from the QR of the R of all processes, stacked."""
        basis, triangle = torch.linalg.qr(panel)
        if self.mesh is None:
            return basis, triangle
        # R of a process has no more rows than its shard: padding would give Q rows that no process holds.
        spans = (_span(self.mesh, self.n, rank) for rank in range(self.mesh.size()))
        heights = [min(stop - start, panel.shape[-1]) for start, stop in spans]
        rank = self.mesh.get_local_rank()
        local = -2, sum(heights[:rank]), heights[rank]
        stacked = triangle.new_zeros(*triangle.shape[:-2], sum(heights), panel.shape[-1])
        stacked.narrow(*local).copy_(triangle)
        inner, triangle = torch.linalg.qr(self.total(stacked))
        return basis @ inner.narrow(*local), triangle

    def tall_result(self, local: Tensor, dim: int = -2) -> Tensor:
        """Return a tall result from its local rows, as a DTensor if the argument was one."""
        if self.mesh is None:
            return local
        from torch.distributed.tensor import DTensor, Shard

        dim %= local.ndim
        shape = torch.Size([self.n if at == dim else size for at, size in enumerate(local.shape)])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, self.mesh, [Shard(dim)], run_check=False, shape=shape, stride=stride)

    def small_result(self, value: Tensor) -> Tensor:
        """Return a small result, as a DTensor if the small parts of the factor were DTensors."""
        if not self.replicates:
            return value
        from torch.distributed.tensor import DTensor, Replicate

        return DTensor.from_local(value, self.mesh, [Replicate()], run_check=False)


UNSHARDED = Sharding()
# Argument types that need no `Rows.check_kind` and no `Rows.local_small`.
PLAIN = frozenset({Tensor, float, int})


def placement_of(sharding: Sharding) -> tuple[DeviceMesh, bool] | None:
    """Return the mesh and the kind of small results: matrices computed together must share both."""
    return None if sharding.mesh is None else (sharding.mesh, sharding.replicates)


def sharding_of(function: str, name: str, tall: Any, small: Tensor) -> Sharding:
    """Return the `Sharding` of a factor's tall matrix. ``small`` shows whether the small parts are DTensors."""
    if type(tall) is Tensor or not is_dtensor(tall):
        return UNSHARDED
    _check.placements(function, name, tall, -2)
    return Sharding(tall.device_mesh, tall.shape[-2], is_dtensor(small))


def zero_rows(
    function: str, mesh: Any, shape: tuple[int, ...], dtype: torch.dtype | None, device: torch.device | str | None
) -> Tensor:
    """Return a tall matrix (..., n, r) of zeros for a new factor, sharded on its rows over a mesh, if given."""
    *_, n, rank = shape
    _check.part_dtype(function, "dtype", torch.get_default_dtype() if dtype is None else dtype)
    _check.count(function, "rank", rank, 0)
    if rank > n:
        _check.fail_value(function, f"rank must not exceed the number of rows, {n}; got {rank}")
    if mesh is None:
        return torch.zeros(*shape, dtype=dtype, device=device)
    if device is not None:
        _check.fail_value(function, f"device must be left out beside a mesh, which has its own; got {device}")
    from torch.distributed.tensor import Shard, zeros

    _check.mesh_1d(function, "mesh", mesh)
    return zeros(*shape, dtype=dtype, device_mesh=mesh, placements=[Shard(len(shape) - 2)])


def is_dtensor(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor. It costs plain tensors one look, and never imports torch.distributed."""
    if type(tensor) is Tensor or torch.compiler.is_compiling():
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_tensor(tensor: Any) -> Any:
    """Return the part of a tensor that this process holds: the tensor itself unless it is a DTensor."""
    if not is_dtensor(tensor):
        return tensor
    local = tensor.to_local()
    # An unfinished redistribution gives an AsyncCollectiveTensor.
    return local.wait() if hasattr(local, "wait") else local


def gathered(tensor: Any) -> Tensor:
    """Return the whole tensor in every process; a DTensor is gathered. For tests and small cases."""
    whole: Tensor = tensor.full_tensor() if is_dtensor(tensor) else tensor
    return whole


def _span(mesh: DeviceMesh, n: int, rank: int) -> tuple[int, int]:
    """Return the first row and one past the last row of a process. Shards have one size until the n rows run out."""
    size = -(-n // mesh.size())
    start = min(rank * size, n)
    return start, min(start + size, n)
