"""What an op takes and returns, in one line: kinds and shapes of its operands, from which schemas and checks follow.

``residual(Tall[n,r] basis, Data[n,k] columns, Small[r,k] coefficients) -> (Tall[n,k], Small[k,k])`` reads: ``basis`` is
a matrix (..., n, r) or, for the grouped op, a list of matrices of different sizes; ``columns`` likewise, and may be in
half precision; ``coefficients`` is small: for the grouped op a stack, padded with zeros to the largest problem. ``!``
marks what is overwritten, ``|`` separates alternative shapes, and ``Small[]`` is one number a problem. Other arguments
are written as in a torch schema.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, TypeAlias

import torch
from torch import Tensor

Matrices: TypeAlias = Tensor | list[Tensor]
Shape: TypeAlias = tuple[str, ...]

_FULL = (torch.float32, torch.float64)
_HALF = (torch.bfloat16, torch.float16)
_OPERAND = re.compile(r"(Tall|Data|Small)\[([\w,|]*)\](!?)")


class Operand(NamedTuple):
    """One matrix that an op takes or returns."""

    name: str
    position: int
    kind: str
    shapes: tuple[Shape, ...]

    @property
    def listed(self) -> bool:
        """Whether the grouped op takes or returns a list."""
        return self.kind != "Small"


@dataclass(frozen=True)
class Signature:
    """The line, parsed."""

    name: str
    schema: str
    grouped_schema: str
    operands: tuple[Operand, ...]
    results: tuple[Operand, ...]

    @property
    def lists(self) -> bool:
        """Whether there is a grouped op."""
        return any(operand.listed for operand in self.operands)

    @property
    def grouped_name(self) -> str:
        """Name of the grouped op; what overwrites keeps its final underscore."""
        return self.grouped_schema.partition("(")[0]

    def sizes(self, arguments: Sequence[Any]) -> dict[str, int]:
        """Check the tensors of a call and return the size that each name stands for.

        Raises
        ------
        ValueError, TypeError
            Naming the op, the rule and what was seen, if the tensors do not fit together.
        """
        tall = [arguments[operand.position] for operand in self.operands if operand.listed] or [arguments[0]]
        self._check_kinds(arguments)
        batch = max((tuple(tensor.shape[:-2]) for tensor in tall), key=len)
        sizes: dict[str, int] = {}
        for operand in self.operands:
            self._match(operand, operand.name, arguments[operand.position], batch, sizes)
        return sizes

    def grouped_sizes(self, arguments: Sequence[Any]) -> list[dict[str, int]]:
        """Do the same for a call of the grouped op, for each problem."""
        lists = {operand.name: arguments[operand.position] for operand in self.operands if operand.listed}
        counts = {name: len(matrices) for name, matrices in lists.items()}
        count = next(iter(counts.values()))
        if count == 0 or any(other != count for other in counts.values()):
            self._fail(ValueError, f"the lists must be of one length, at least 1; got {counts}")
        sizes = [self._problem_sizes(arguments, problem) for problem in range(count)]
        first = next(iter(lists.values()))[0]
        for operand in self.operands:
            if not operand.listed:
                stack = arguments[operand.position]
                self._check_kind(operand, operand.name, stack, first)
                shape = self._check_stack(operand, stack, sizes)
                # A size that no list shows, such as that of the result, is the stack's for all.
                sizes = [dict(zip(shape, stack.shape[1:], strict=True)) | own for own in sizes]
        return sizes

    def _problem_sizes(self, arguments: Sequence[Any], problem: int) -> dict[str, int]:
        listed = [operand for operand in self.operands if operand.listed]
        first = arguments[listed[0].position][0]
        sizes: dict[str, int] = {}
        for operand in listed:
            matrix = arguments[operand.position][problem]
            self._check_kind(operand, f"{operand.name}[{problem}]", matrix, first)
            self._match(operand, f"{operand.name}[{problem}]", matrix, (), sizes)
        return sizes

    def _check_kinds(self, arguments: Sequence[Any]) -> None:
        first = arguments[self.operands[0].position]
        for operand in self.operands:
            self._check_kind(operand, operand.name, arguments[operand.position], first)

    def _check_kind(self, operand: Operand, name: str, tensor: Tensor, first: Tensor) -> None:
        allowed = _FULL + _HALF if operand.kind == "Data" else _FULL
        if tensor.dtype not in allowed:
            self._fail(TypeError, f"{name} must have dtype {' or '.join(map(str, allowed))}; got {tensor.dtype}")
        reference = self.operands[0].name
        if operand.kind == "Tall" and first.dtype in _FULL and tensor.dtype != first.dtype:
            self._fail(TypeError, f"{name} must have the dtype of {reference}, {first.dtype}; got {tensor.dtype}")
        if tensor.device != first.device:
            self._fail(ValueError, f"{name} must be on the device of {reference}, {first.device}; got {tensor.device}")

    def _match(
        self, operand: Operand, name: str, tensor: Tensor, batch: tuple[int, ...], sizes: dict[str, int]
    ) -> None:
        """Take up the sizes of a tensor, or fail if they contradict those of the tensors before it."""
        for shape in operand.shapes:
            lead = tensor.ndim - len(shape)
            if lead in (len(batch), 0) and tuple(tensor.shape[:lead]) in (batch, ()):
                found = dict(sizes)
                if all(
                    found.setdefault(letter, size) == size
                    for letter, size in zip(shape, tensor.shape[lead:], strict=True)
                ):
                    sizes.update(found)
                    return
        wanted = " or ".join(_in_words(tuple(map(str, batch)) + shape) for shape in operand.shapes)
        letters = {letter for shape in operand.shapes for letter in shape}
        known = ", ".join(f"{letter} = {size}" for letter, size in sizes.items() if letter in letters)
        where = f" with {known}" if known else ""
        self._fail(ValueError, f"{name} must have shape {wanted}{where}; got {tuple(tensor.shape)}")

    def _check_stack(self, operand: Operand, tensor: Tensor, sizes: list[dict[str, int]]) -> Shape:
        most = {letter: max(own[letter] for own in sizes) for letter in sizes[0]}
        for shape in operand.shapes:
            fits = tensor.ndim == len(shape) + 1 and tensor.shape[0] == len(sizes)
            if fits and all(size >= most.get(letter, 0) for letter, size in zip(shape, tensor.shape[1:], strict=True)):
                return shape
        wanted = " or ".join(_in_words((str(len(sizes)), *shape)) for shape in operand.shapes)
        letters = {letter for shape in operand.shapes for letter in shape}
        known = ", ".join(f"{letter} >= {size}" for letter, size in most.items() if letter in letters)
        self._fail(ValueError, f"{operand.name} must have shape {wanted} with {known}; got {tuple(tensor.shape)}")

    def _fail(self, kind: type[Exception], message: str) -> NoReturn:
        text = f"brandla::{self.name}: {message}"
        raise kind(text)


def parse(line: str) -> Signature:
    """Parse an op's line."""
    name, _, rest = line.partition("(")
    taken, _, returned = rest.partition(") -> ")
    declared = [part.strip() for part in re.split(r",\s+", taken)]
    operands = tuple(
        _operand(found, part.split()[-1], position)
        for position, part in enumerate(declared)
        if (found := _OPERAND.match(part))
    )
    results = tuple(_operand(found, "", position) for position, found in enumerate(_OPERAND.finditer(returned)))
    grouped_name = f"{name.rstrip('_')}_grouped{'_' if name.endswith('_') else ''}"
    grouped = _schema(line, "[]").replace(name, grouped_name, 1)
    return Signature(name, _schema(line, ""), grouped, operands, results)


def _operand(found: re.Match[str], name: str, position: int) -> Operand:
    shapes = tuple(tuple(filter(None, shape.split(","))) for shape in found[2].split("|"))
    return Operand(name, position, found[1], shapes)


def _schema(line: str, brackets: str) -> str:
    def spell(found: re.Match[str]) -> str:
        alias = "(a!)" if found[3] else ""
        return f"Tensor{alias}{brackets if found[1] != 'Small' else ''}"

    return _OPERAND.sub(spell, line)


def _in_words(shape: tuple[str, ...]) -> str:
    return f"({', '.join(shape)}{',' if len(shape) == 1 else ''})"
