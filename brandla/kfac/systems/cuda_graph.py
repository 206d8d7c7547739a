"""Steps inside a CUDA graph: which systems can be captured, and how states keep their memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from brandla.kfac.systems.strategy import Curvature

_RULE = (
    "KFAC.step: a CUDA graph repeats one step, so it can capture only systems that do the same at every step and never"
    " wait for the device: Brand(rank, compress='cholesky') with a rank that is no schedule and tail 0, or"
    " Exact(method='cholesky', inverse_every=1)"
)


def is_captured() -> bool:
    """Return whether a CUDA graph is being captured."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def check_capture(options: Mapping[str, bool], curvatures: Mapping[str, Curvature]) -> None:
    """Check that a CUDA graph can capture a step with these curvatures. None of the ``options`` may be in use."""
    if given := [name for name, is_given in options.items() if is_given]:
        rule = "a CUDA graph can capture the step of one process, with the defaults of scaler, curvature and clip_by"
        message = f"KFAC.step: {rule}, and a fixed damping; got {given[0]}"
        raise RuntimeError(message)
    for name, curvature in curvatures.items():
        factors = list(curvature.factors())
        others = [str(factor.form) for _, factor in factors if not factor.form.is_capturable]
        got = f"got {others[0] if others else type(curvature).__name__} for {name}"
        if not curvature.started:
            got = f"the factors of {name} have no data yet: take a few steps before the capture"
        if others or not factors or not curvature.started:
            message = f"{_RULE}; {got}"
            raise RuntimeError(message)


@contextmanager
def in_place(curvatures: Sequence[Curvature]) -> Iterator[None]:
    """Copy new parts of states into the old tensors after the block, because a replay of the graph reads those."""
    # Curvatures that can be captured have all of their state in factors.
    states = [factor.state for curvature in curvatures for _, factor in curvature.factors()]
    before = [(state, dict(state)) for state in states]
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
