"""Steps inside a CUDA graph: which systems can be captured, and states that keep their memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from brandla.kfac.systems.strategy import Curvature

_RULE = (
    "KFAC.step: a CUDA graph repeats one step, so it can capture only systems that do the same at every step and never"
    " wait for the device: Brand(rank, compress='cholesky') with a rank that is no schedule and tail 0, or"
    " Exact(method='cholesky', inverse_every=1)"
)


def is_captured() -> bool:
    """Say whether a CUDA graph is being captured."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def check_capture(curvatures: Mapping[str, Curvature]) -> None:
    """Check that what a captured step does with these layers' curvatures is what every step does."""
    for name, curvature in curvatures.items():
        factors = list(curvature.factors())
        others = [str(factor.strategy) for _, factor in factors if not factor.strategy.is_capturable]
        if not curvature.started:
            message = f"{_RULE}; the factors of {name} have no data yet: take a few steps before the capture"
            raise RuntimeError(message)
        if others or not factors:
            got = others[0] if others else type(curvature).__name__
            message = f"{_RULE}; got {got} for {name}"
            raise RuntimeError(message)


@contextmanager
def in_place(curvatures: Sequence[Curvature]) -> Iterator[None]:
    """Write what the block computes anew over the tensors that it stands for, which a replay of a graph reads again."""
    before = [(state, dict(state)) for curvature in curvatures for state in _states(curvature.parts())]
    yield
    moved: dict[int, tuple[Tensor, Tensor]] = {}
    for state, old in before:
        for name, part in old.items():
            if isinstance(part, Tensor) and state[name] is not part:
                moved[id(part)] = part, state[name]
                state[name] = part
    if moved:
        kept, new = zip(*moved.values(), strict=True)
        torch._foreach_copy_(kept, new)


def _states(parts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the states of factors among the nested parts of a curvature."""
    for own in parts.values():
        if isinstance(own, dict):
            yield own
            yield from _states(own)
