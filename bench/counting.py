"""What a call asks of a GPU, counted on a CPU: launches of this library's kernels, and torch's kernels beside them.

Every op of the library records what its Triton launch would start on a target, and takes its values from its torch
form; no branch looks at a value unless a GPU's would too. A dispatch mode counts what torch is asked for. A view, an
allocation, and a result without entries are free. One function of ``torch.linalg``, and one ``torch._foreach_`` over a
list, counts as one kernel; cuSOLVER, or a long list, takes several.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import brandla
from brandla_kernels import OPS
from brandla_kernels._kernels.ahead import target_named
from brandla_kernels._kernels.launch import recording

aten = torch.ops.aten

_ALLOCATIONS = {
    *(aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.resize_),
    *(aten.detach, aten.detach_, aten._unsafe_view, aten.set_),
}
# What makes the host wait for the device: results that it reads, or whose sizes it needs.
_WAITS = {
    *(aten._local_scalar_dense, aten.equal, aten.nonzero, aten._linalg_eigh, aten._linalg_svd, aten.linalg_qr),
    *(aten.geqrf, aten.linalg_eig, aten._linalg_solve_ex, aten.is_nonzero),
}
_READS_ALONE = {aten._local_scalar_dense, aten.is_nonzero}


@dataclass(frozen=True)
class Counts:
    """What a call asks for."""

    triton: int = 0  # launches of this library's kernels
    torch: int = 0  # other kernels
    uploads: int = 0  # tensors written on the host: numbers, and the tables of lists
    waits: int = 0  # times that the host waits for the device

    @property
    def kernels(self) -> int:
        """Launches of all kernels."""
        return self.triton + self.torch


class Counter(TorchDispatchMode):
    """Count what is asked for inside the ``with`` block."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = target_named(target)
        self.triton: list[str] = []
        self.torch: list[str] = []
        self.uploads = 0
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "brandla":
            return self._op(func, args)
        packet = func.overloadpacket
        result = func(*args, **(kwargs or {}))
        self.waits += packet in _WAITS
        if packet is aten.lift_fresh:
            self.uploads += 1
        elif not (func.is_view or packet in _ALLOCATIONS or packet in _READS_ALONE or _is_empty(func, args, result)):
            self.torch.append(packet.__name__)
        return result

    def _op(self, func: Any, args: tuple[Any, ...]) -> Any:
        name = func.__name__.partition(".")[0]
        grouped = name not in OPS
        op = OPS[name.replace("_grouped", "")]
        form = op.grouped_form if grouped else op.torch_form
        if op.launch is None:
            with self:
                return form(*args)
        # What a launch leaves unwritten must not reach what the op overwrites.
        spared = tree_map(lambda part: part.clone() if isinstance(part, Tensor) else part, args)
        with self, recording(self.target) as launches:
            op.launch(*(spared if op.signature.writes else args))
        self.triton.extend(launch.name for launch in launches)
        with brandla.backend("torch"):
            return form(*args)

    @property
    def counts(self) -> Counts:
        """What was counted."""
        return Counts(len(self.triton), len(self.torch), self.uploads, self.waits)


def _is_empty(func: Any, args: Any, result: Any) -> bool:
    """Say whether nothing is written, since all that would be has no entries."""
    written = [part for part in tree_leaves(result) if isinstance(part, Tensor)]
    if not written and func._schema.is_mutable:
        written = [part for part in tree_leaves(args[0]) if isinstance(part, Tensor)]
    return bool(written) and all(part.numel() == 0 for part in written)


@contextmanager
def counting(target: str) -> Any:
    """Yield a `Counter`, inside which functions take the way of a GPU."""
    with recording(target_named(target)), brandla.backend("triton"), torch.no_grad(), Counter(target) as counter:
        yield counter


def counts_of(call: Callable[[], Any], target: str = "sm_90") -> Counts:
    """Count what a call asks for."""
    with counting(target) as counter:
        call()
    return counter.counts
