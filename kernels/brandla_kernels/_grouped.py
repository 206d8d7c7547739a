"""The torch form of a grouped op: the op of each problem in turn, its small results stacked and padded with zeros."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from brandla_kernels._signature import Operand, Signature


def looped(signature: Signature, torch_form: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``torch_form`` over lists of problems."""

    def call(*arguments: Any) -> Any:
        problems = signature.grouped_sizes(arguments)
        results = [
            torch_form(*_own_arguments(signature, arguments, problem, sizes)) for problem, sizes in enumerate(problems)
        ]
        if not signature.results:
            return None
        columns = list(zip(*(each if isinstance(each, tuple) else (each,) for each in results), strict=True))
        largest = {letter: max(sizes[letter] for sizes in problems) for letter in problems[0]}
        gathered = tuple(
            _gather(result, column, largest) for result, column in zip(signature.results, columns, strict=True)
        )
        return gathered if len(gathered) > 1 else gathered[0]

    return call


def _own_arguments(signature: Signature, arguments: Sequence[Any], problem: int, sizes: dict[str, int]) -> list[Any]:
    own = list(arguments)
    for operand in signature.operands:
        value = arguments[operand.position]
        if operand.listed:
            own[operand.position] = value[problem]
        else:
            shape = next(shape for shape in operand.shapes if len(shape) == value.ndim - 1)
            own[operand.position] = value[problem][tuple(slice(sizes.get(letter)) for letter in shape)]
    return own


def _gather(result: Operand, parts: Sequence[Tensor], largest: dict[str, int]) -> list[Tensor] | Tensor:
    if result.listed:
        return list(parts)
    stack = parts[0].new_zeros(len(parts), *(largest[letter] for letter in result.shapes[0]))
    for problem, part in enumerate(parts):
        stack[problem][tuple(slice(size) for size in part.shape)] = part
    return stack
