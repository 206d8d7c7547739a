"""A grouped op in torch, problem by problem, and its gradient. Small results are stacked and padded with zeros."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from brandla_kernels._signature import Operand, Signature


def looped(signature: Signature, torch_form: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``torch_form`` over lists of problems."""

    def call(*arguments: Any) -> Any:
        problems = signature.grouped_sizes(arguments)
        unbound = list(arguments)
        for operand in signature.operands:
            if not operand.listed:
                # One call of torch for all entries of a stack.
                unbound[operand.position] = arguments[operand.position].unbind()
        results = [torch_form(*_arguments_of(signature, unbound, *each)) for each in enumerate(problems)]
        if not signature.results:
            return None
        by_result = zip(*(each if isinstance(each, tuple) else (each,) for each in results), strict=True)
        pairs = zip(signature.results, by_result, strict=True)
        gathered = [list(parts) if result.listed else _padded(parts) for result, parts in pairs]
        return tuple(gathered) if len(gathered) > 1 else gathered[0]

    return call


def looped_gradient(signature: Signature, backward: Callable[..., Sequence[Any]]) -> Callable[..., Sequence[Any]]:
    """Return ``backward``, (inputs, gradients of the results) -> gradients of the inputs, over lists of problems."""

    def call(inputs: Sequence[Any], gradients: Sequence[Any]) -> Sequence[Any]:
        by_problem = []
        for problem, sizes in enumerate(signature.grouped_sizes(inputs)):
            pairs = zip(gradients, signature.results, strict=True)
            parts = tuple(_part_of(gradient[problem], result, sizes) for gradient, result in pairs)
            by_problem.append(backward(tuple(_arguments_of(signature, inputs, problem, sizes)), parts))
        by_input = zip(*by_problem, strict=True)
        return [_gathered_like(value, parts) for value, parts in zip(inputs, by_input, strict=True)]

    return call


def _arguments_of(signature: Signature, arguments: Sequence[Any], problem: int, sizes: dict[str, int]) -> list[Any]:
    chosen, index = list(arguments), signature.index_position
    for operand in signature.operands:
        chosen[operand.position] = _part_of(arguments[operand.position][problem], operand, sizes)
    if index is not None:
        # The dispatcher leaves out an index at its default, 0.
        chosen[index:] = [sum(chosen[index:]) + problem]
    return chosen


def _part_of(matrix: Tensor, operand: Operand, sizes: dict[str, int]) -> Tensor:
    """Return a stack's entry without its padding, or a list's entry as it is."""
    if operand.listed:
        return matrix
    letters = operand.shapes[0]
    if len(letters) != matrix.ndim:
        letters = next(letters for letters in operand.shapes if len(letters) == matrix.ndim)
    shape = tuple(map(sizes.__getitem__, letters))
    return matrix if matrix.shape == shape else matrix[tuple(map(slice, shape))]


def _gathered_like(value: Any, parts: Sequence[Any]) -> Any:
    """Arrange the gradients of the problems as their argument is: a list, or a stack."""
    if isinstance(value, list):
        return list(parts)
    return None if parts[0] is None else _fill_corners(torch.zeros_like(value), parts)


def _padded(parts: Sequence[Tensor]) -> Tensor:
    """Stack small results, and pad them with zeros to the largest."""
    if all(part.shape == parts[0].shape for part in parts):
        return torch.stack(tuple(parts))
    largest = map(max, zip(*(part.shape for part in parts), strict=True))
    return _fill_corners(parts[0].new_zeros(len(parts), *largest), parts)


def _fill_corners(stack: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Write each part into the leading corner of its entry, and return the stack."""
    for problem, part in enumerate(parts):
        stack[problem][tuple(slice(size) for size in part.shape)] = part
    return stack
