"""Gathers the gradients of sharded parameters for the time of a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from brandla._sharded import gathered, is_dtensor


@contextmanager
def whole_gradients(parameters: Iterable[nn.Parameter | None]) -> Iterator[None]:
    """Replace sharded gradients by plain tensors in the block, and write these back to the shards at its end.

    Every process gathers all of each sharded gradient. Plain gradients stay as they are.
    """
    # By id, since tensors hash by a slow Python function.
    unique = {id(parameter): parameter for parameter in parameters if parameter is not None}
    sharded: list[tuple[Any, Any]] = [
        (parameter, parameter.grad)
        for parameter in unique.values()
        if type(parameter.grad) is not Tensor and parameter.grad is not None and is_dtensor(parameter.grad)
    ]
    for parameter, gradient in sharded:
        parameter.grad = gathered(gradient)
    try:
        yield
        for parameter, gradient in sharded:
            from torch.distributed.tensor import DTensor, Replicate

            # All processes have the same tensor, so each takes its shard and nothing is sent.
            mesh = gradient.device_mesh
            replicated = DTensor.from_local(parameter.grad, mesh, [Replicate()] * mesh.ndim, run_check=False)
            gradient.to_local().copy_(replicated.redistribute(placements=gradient.placements).to_local())
    finally:
        for parameter, gradient in sharded:
            parameter.grad = gradient
