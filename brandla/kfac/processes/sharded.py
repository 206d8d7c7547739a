"""Gradients of parameters that are sharded over processes, whole for as long as they are worked on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from brandla._sharded import gathered, is_dtensor


@contextmanager
def whole_gradients(parameters: Iterable[nn.Parameter | None]) -> Iterator[None]:
    """Have plain tensors as the gradients of parameters, and write them back to the shards.

    Every process gathers all of each such gradient. Those that are plain already stay what they are.
    """
    # Tensors hash by a function of Python's.
    known = {id(parameter): parameter for parameter in parameters if parameter is not None}
    sharded: list[tuple[Any, Any]] = [
        (parameter, parameter.grad)
        for parameter in known.values()
        if type(parameter.grad) is not Tensor and parameter.grad is not None and is_dtensor(parameter.grad)
    ]
    for parameter, gradient in sharded:
        parameter.grad = gathered(gradient)
    try:
        yield
        for parameter, gradient in sharded:
            from torch.distributed.tensor import DTensor, Replicate

            # This process's part of a tensor that is the same in all: nothing is sent.
            mesh = gradient.device_mesh
            alike = DTensor.from_local(parameter.grad, mesh, [Replicate()] * mesh.ndim, run_check=False)
            gradient.to_local().copy_(alike.redistribute(placements=gradient.placements).to_local())
    finally:
        for parameter, gradient in sharded:
            parameter.grad = gradient
