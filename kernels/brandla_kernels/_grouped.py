"""A grouped op problem by problem, and its gradient: small results are stacked and padded with zeros."""

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
        apart = list(arguments)
        for operand in signature.operands:
            if not operand.listed:
                # One call of torch for all entries of a stack.
                apart[operand.position] = arguments[operand.position].unbind()
        found = [torch_form(*_own_arguments(signature, apart, *each)) for each in enumerate(problems)]
        if not signature.results:
            return None
        columns = list(zip(*(each if isinstance(each, tuple) else (each,) for each in found), strict=True))
        pairs = zip(signature.results, columns, strict=True)
        gathered = [list(parts) if result.listed else _padded(parts) for result, parts in pairs]
        return tuple(gathered) if len(gathered) > 1 else gathered[0]

    return call


def looped_gradient(signature: Signature, backward: Callable[..., Sequence[Any]]) -> Callable[..., Sequence[Any]]:
    """Return ``backward``, (inputs, gradients of the results) -> gradients of the inputs, over lists of problems."""

    def call(inputs: Sequence[Any], gradients: Sequence[Any]) -> Sequence[Any]:
        found = []
        for problem, sizes in enumerate(signature.grouped_sizes(inputs)):
            pairs = zip(gradients, signature.results, strict=True)
            own = tuple(_own(gradient[problem], result, sizes) for gradient, result in pairs)
            found.append(backward(tuple(_own_arguments(signature, inputs, problem, sizes)), own))
        return [_gathered_like(value, parts) for value, parts in zip(inputs, zip(*found, strict=True), strict=True)]

    return call


def _own_arguments(signature: Signature, arguments: Sequence[Any], problem: int, sizes: dict[str, int]) -> list[Any]:
    own = list(arguments)
    for operand in signature.operands:
        own[operand.position] = _own(arguments[operand.position][problem], operand, sizes)
    if signature.counter is not None:
        # The dispatcher leaves out what has its default.
        own[signature.counter :] = [sum(own[signature.counter :]) + problem]
    return own


def _own(matrix: Tensor, operand: Operand, sizes: dict[str, int]) -> Tensor:
    """Return the part of a stack's entry that belongs to the problem, or a list's entry as it is."""
    if operand.listed:
        return matrix
    letters = operand.shapes[0]
    if len(letters) != matrix.ndim:
        letters = next(letters for letters in operand.shapes if len(letters) == matrix.ndim)
    own = tuple(map(sizes.__getitem__, letters))
    return matrix if matrix.shape == own else matrix[tuple(map(slice, own))]


def _gathered_like(value: Any, parts: Sequence[Any]) -> Any:
    """Arrange the gradients of the problems as the argument that they belong to is."""
    if isinstance(value, list):
        return list(parts)
    return None if parts[0] is None else _stacked(torch.zeros_like(value), parts)


def _padded(parts: Sequence[Tensor]) -> Tensor:
    """Stack small results, of different sizes padded with zeros."""
    if all(part.shape == parts[0].shape for part in parts):
        return torch.stack(tuple(parts))
    largest = map(max, zip(*(part.shape for part in parts), strict=True))
    return _stacked(parts[0].new_zeros(len(parts), *largest), parts)


def _stacked(stack: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Write each part into the leading corner of its entry."""
    for problem, part in enumerate(parts):
        stack[problem][tuple(slice(size) for size in part.shape)] = part
    return stack
