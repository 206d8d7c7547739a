"""Named ranges: a profiler shows a call of a public function as ``brandla::eigh_update n=4096 r=128 k=64``.

Without a profiler a call only reads two flags, and torch.compile leaves the range out. The decorated functions also
compute outside ``torch.autocast``.
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
    """Make every call of the decorated function a named range.

    ``sizes`` holds the letters for the shape of each leading argument, such as ``"n,r"``: the shape of a tensor or of
    the basis of a symmetric factor, (m, r, n) of an SVD, or one letter for a number. Dimensions before these are batch
    dimensions. For a list of arguments, the range shows the largest sizes.
    """
    letters = [group.split(",") for group in sizes]

    def decorate(public: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        function = without_autocast(public)
        module = function.__module__.rpartition(".")[2]
        name = f"brandla::{'grouped.' if module == 'grouped' else ''}{function.__qualname__}"
        names = list(inspect.signature(public).parameters)

        @wraps(function)
        def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            # A compiled graph must not depend on whether a profiler is on.
            if torch.compiler.is_dynamo_compiling() or not profiler._is_profiler_enabled:
                return function(*args, **kwargs)
            # If the arguments do not fit the signature, the function raises the error.
            values = [*args, *(kwargs.get(parameter) for parameter in names[len(args) :])]
            labels = (f"{letter}={size}" for letter, size in sizes_of(letters, values).items())
            with profiler.record_function(" ".join([name, *labels])):
                return function(*args, **kwargs)

        return call

    return decorate


def sizes_of(letters: Sequence[Sequence[str]], values: Sequence[Any]) -> dict[str, int]:
    """Return the number of problems and the batch size, if any, and then the size that each letter stands for."""
    leading: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for group, value in zip(letters, values, strict=False):
        # Only a list holds several problems: a factor is a tuple, and so is the pair (P, Q) of a matrix P Qᵀ.
        if isinstance(value, list):
            leading["problems"] = len(value)
        for shape in map(_shape, value if isinstance(value, list) else [value]):
            batch = shape[: -len(group)]
            if batch:
                leading["batch"] = math.prod(batch)
            for letter, size in zip(group, shape[-len(group) :], strict=False):
                sizes[letter] = max(sizes.get(letter, 0), size)
    return leading | sizes


def _shape(value: Any) -> tuple[int, ...]:
    """Return the shape of an argument in the order of its letters, or () for a value without a shape."""
    if isinstance(value, int):
        return (value,)
    if not isinstance(value, Tensor):
        value = getattr(value, "lowrank", getattr(value, "svd", value))
        if hasattr(value, "Vh"):
            return (*value.U.shape, value.Vh.shape[-1])
        value = getattr(value, "eigenvectors", getattr(value, "root", value))
    return tuple(getattr(value, "shape", ()))
