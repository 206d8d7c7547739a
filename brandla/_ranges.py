"""Named ranges: a profiler shows a call of a public function as ``brandla::eigh_update n=4096 r=128 k=64``.

With no profiler on, two flags are read; under torch.compile there is nothing. What is called so also computes as
outside ``torch.autocast``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import profiler

from brandla_kernels import without_autocast

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def ranged(*sizes: str) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Make the calls of the decorated function named ranges.

    ``sizes`` are, for each of the first arguments, the letters of its shape, such as ``"n,r"``: the shape of a tensor,
    of the basis of a symmetric factor, (m, r, n) of an SVD, or one letter for a number. Dimensions before them are
    those of a batch. Of a list of arguments, the largest sizes are shown.
    """
    letters = [each.split(",") for each in sizes]

    def decorate(public: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        function = without_autocast(public)
        module = function.__module__.rpartition(".")[2]
        name = f"brandla::{'grouped.' if module == 'grouped' else ''}{function.__qualname__}"
        names = list(inspect.signature(public).parameters)

        @wraps(function)
        def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            # The compiler must not come to depend on whether a profiler is on.
            if torch.compiler.is_dynamo_compiling() or not profiler._is_profiler_enabled:
                return function(*args, **kwargs)
            # A call that does not fit the signature is left to the function.
            found = sizes_of(letters, [*args, *(kwargs.get(each) for each in names[len(args) :])])
            shown = (f"{letter}={size}" for letter, size in found.items())
            with profiler.record_function(" ".join([name, *shown])):
                return function(*args, **kwargs)

        return call

    return decorate


def sizes_of(letters: Sequence[Sequence[str]], values: Sequence[Any]) -> dict[str, int]:
    """Return the size that each letter stands for in the shapes; the number of problems, or of a batch, first."""
    leading: dict[str, int] = {}
    found: dict[str, int] = {}
    for own, value in zip(letters, values, strict=False):
        # A factor is a tuple as well, and so is the pair (P, Q) of a matrix P Qᵀ.
        if isinstance(value, list):
            leading["problems"] = len(value)
        for shape in map(_shape, value if isinstance(value, list) else [value]):
            batch = shape[: -len(own)]
            if batch:
                leading["batch"] = math.prod(batch)
            for letter, size in zip(own, shape[-len(own) :], strict=False):
                found[letter] = max(found.get(letter, 0), size)
    return leading | found


def _shape(value: Any) -> tuple[int, ...]:
    """Return the shape of an argument as the letters name it; () of what has none, which the function may refuse."""
    if isinstance(value, int):
        return (value,)
    if not isinstance(value, Tensor):
        value = getattr(value, "lowrank", getattr(value, "svd", value))
        if hasattr(value, "Vh"):
            return (*value.U.shape, value.Vh.shape[-1])
        value = getattr(value, "eigenvectors", getattr(value, "root", value))
    return tuple(getattr(value, "shape", ()))
