"""Times of calls on inputs that are no longer in the cache when their turn comes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench.benches import timing
from bench.gpu.device import Device


class Times(NamedTuple):
    """Seconds of each call, and how they were taken."""

    samples: dict[str, list[float]]
    how: str

    def median(self, name: str) -> timing.Interval:
        """Return the median with its interval."""
        return timing.of_median(self.samples[name])

    def ratio(self, numerator: str, denominator: str) -> timing.Interval:
        """Return the median ratio of times taken in the same turn."""
        return timing.ratio(self.samples[numerator], self.samples[denominator])


def replayed(
    device: Device, calls: Mapping[str, Callable[..., Any]], inputs: Sequence[Sequence[Any]], limit: float
) -> Times:
    """Time calls without the host: as graphs of one call for each set of inputs, divided by their number.

    What cannot be captured is called from the host, and that is said.
    """
    functions, how = {}, {}
    for name, call in calls.items():

        def all_sets(call: Callable[..., Any] = call) -> list[Any]:
            return [call(*one) for one in inputs]

        try:
            functions[name], how[name] = device.capture(all_sets).replay, "graph replay"
        except RuntimeError as error:
            device.synchronize()
            functions[name], how[name] = all_sets, f"events, as {type(error).__name__} stopped the capture"
    samples = device.alternating(functions, limit)
    divided = {name: [second / len(inputs) for second in samples[name]] for name in functions}
    if len(set(how.values())) == 1:
        return Times(divided, next(iter(how.values())))
    return Times(divided, "; ".join(f"{name}: {method}" for name, method in how.items()))


def called(device: Device, calls: Mapping[str, Callable[[], Any]], limit: float) -> Times:
    """Time calls from the host, the cache written over before each."""
    return Times(device.alternating(calls, limit), device.timer)


def size_of(arguments: Any) -> int:
    """Return the bytes of the tensors among nested arguments."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor))


def microseconds(interval: timing.Interval) -> timing.Interval:
    """Return seconds as microseconds."""
    return timing.Interval(*(1e6 * value for value in interval))


def same_bits(one: Any, other: Any) -> bool:
    """Say whether nested results are equal to the bit."""
    return all(torch.equal(a, b) for a, b in zip(tensors_in(one), tensors_in(other), strict=True))


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors of nested values."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
