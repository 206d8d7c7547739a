"""The signature of an op in one line, the source of schemas and checks: kinds and shapes of what it takes and returns.

In ``rotate_(Tall[n,r]! basis, Tall[n,k] panel, Small[r,r] basis_rotation, Small[k,r] panel_rotation) -> ()``, a
``Tall`` is a matrix (..., n, r) or, for the grouped op, a list of matrices of different sizes. ``!`` marks the operand
that is overwritten. A ``Small`` is a small matrix or, for the grouped op, a stack, padded with zeros to the largest
problem. ``Data`` is a ``Tall`` that may be in half precision. A ``Sum`` is a ``Small`` in float64, whatever the dtype
of the others. ``|`` separates alternative shapes, and ``Small[]`` is one number per problem. Other arguments are
written as in a torch schema. A last argument ``problem`` is the index of the first problem; a list counts on from it.

All operands have the same batch dimensions: an operand shared by all problems is ``expand``-ed, which copies nothing.
All have one dtype, but ``Data`` in half precision may meet float32. With these two rules, the torch forms and the
kernels cannot read one call in two ways.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple, NoReturn, TypeAlias

import torch
from torch import Tensor

Matrices: TypeAlias = Tensor | list[Tensor]
Shape: TypeAlias = tuple[str, ...]

_FULL = (torch.float32, torch.float64)
_HALF = (torch.bfloat16, torch.float16)
_DATA = (*_FULL, *_HALF)
_LISTED = ("Tall", "Data")
_OPERAND = re.compile(r"(Tall|Data|Small|Sum)\[([\w,|]*)\](!?)")


class Operand(NamedTuple):
    """One matrix that an op takes or returns."""

    name: str
    position: int
    kind: str
    shapes: tuple[Shape, ...]
    written: bool
    listed: bool  # whether the grouped op takes or returns a list


@dataclass(frozen=True)
class Signature:
    """A parsed signature line."""

    name: str
    schema: str
    grouped_schema: str
    operands: tuple[Operand, ...]
    results: tuple[Operand, ...]
    leader: Operand  # whose dtype and device the others have
    index_position: int | None  # of the argument ``problem``
    writes: bool  # whether an operand is overwritten

    @property
    def lists(self) -> bool:
        """Whether there is a grouped op."""
        return any(operand.listed for operand in self.operands)

    @property
    def grouped_name(self) -> str:
        """Name of the grouped op; an op that overwrites keeps its final underscore."""
        return self.grouped_schema.partition("(")[0]

    def sizes(self, arguments: Sequence[Any]) -> dict[str, int]:
        """Check the tensors of a call and return the size that each name stands for.

        Raises
        ------
        ValueError, TypeError
            If the tensors do not fit together. The message names the op, the rule and the values seen.
        """
        leader = arguments[self.leader.position]
        sizes: dict[str, int] = {}
        batch = None
        for operand in self.operands:
            tensor = arguments[operand.position]
            self._check_kind(operand, operand.name, tensor, leader)
            if batch is None:
                batch = tensor.shape[: max(tensor.ndim - len(operand.shapes[0]), 0)]
            sizes = self._merged_sizes(operand, operand.name, tensor, batch, sizes)
        return sizes

    def grouped_sizes(self, arguments: Sequence[Any]) -> list[dict[str, int]]:
        """Check the tensors of a call of the grouped op and return the sizes of each problem."""
        lists = {operand: arguments[operand.position] for operand in self.operands if operand.listed}
        for operand, matrices in lists.items():
            if not isinstance(matrices, (list, tuple)):
                self._fail(TypeError, f"{operand.name} must be a list of tensors; got {type(matrices).__name__}")
        counts = {operand.name: len(matrices) for operand, matrices in lists.items()}
        count = next(iter(counts.values()))
        if count == 0 or any(other != count for other in counts.values()):
            self._fail(ValueError, f"the lists must be of one length, at least 1; got {counts}")
        leader = arguments[self.leader.position]
        leader = leader[0] if self.leader.listed else leader
        sizes: list[dict[str, int]] = [{} for _ in range(count)]
        for problem in range(count):
            for operand, matrices in lists.items():
                matrix, name = matrices[problem], f"{operand.name}[{problem}]"
                self._check_kind(operand, name, matrix, leader)
                if matrix.dtype != matrices[0].dtype:
                    rule = f"{name} must have the dtype of {operand.name}[0], {matrices[0].dtype}"
                    self._fail(TypeError, f"{rule}; got {matrix.dtype}")
                sizes[problem] = self._merged_sizes(operand, name, matrix, (), sizes[problem])
        largest = {letter: max(map(itemgetter(letter), sizes)) for letter in sizes[0]}
        for operand in self.operands:
            if not operand.listed:
                stack = arguments[operand.position]
                self._check_kind(operand, operand.name, stack, leader)
                largest = self._merged_sizes(operand, operand.name, stack, (count,), largest)
        # A size that only stacks have, such as that of the result, is the same for all problems.
        return [largest | own for own in sizes]

    def _check_kind(self, operand: Operand, name: str, tensor: Any, leader: Any) -> None:
        for checked, value in ((name, tensor), (self.leader.name, leader)):
            if not isinstance(value, Tensor):
                self._fail(TypeError, f"{checked} must be a tensor; got {type(value).__name__}")
        dtype, leading = tensor.dtype, leader.dtype
        allowed = {"Sum": (torch.float64,), "Data": _DATA}.get(operand.kind, _FULL)
        if dtype not in allowed:
            self._fail(TypeError, f"{name} must have dtype {' or '.join(map(str, allowed))}; got {dtype}")
        # Half-precision data may meet a float32 factor. Without a factor, data may have any dtype.
        free = operand.kind == "Data" and (self.leader.kind == "Data" or (dtype in _HALF and leading == torch.float32))
        if dtype != leading and not free and operand.kind != "Sum":
            self._fail(TypeError, f"{name} must have the dtype of {self.leader.name}, {leading}; got {dtype}")
        if tensor.device != leader.device:
            rule = f"{name} must be on the device of {self.leader.name}, {leader.device}"
            self._fail(ValueError, f"{rule}; got {tensor.device}")
        if self.writes and tensor.requires_grad and torch.is_grad_enabled():
            rule = f"{name} must not require grad, since an op that overwrites has no gradient"
            self._fail(RuntimeError, f"{rule}; call it under torch.no_grad()")
        if operand.written and overlaps_itself(tensor):
            layout = f"shape {tuple(tensor.shape)}, strides {tensor.stride()}"
            self._fail(ValueError, f"{name} is overwritten, so no two of its entries may share memory; got {layout}")

    def _merged_sizes(
        self, operand: Operand, name: str, tensor: Tensor, batch: tuple[int, ...], sizes: dict[str, int]
    ) -> dict[str, int]:
        """Return ``sizes`` with those of a tensor added, or fail if it contradicts the tensors before it."""
        shape, lead = tensor.shape, len(batch)
        for letters in operand.shapes:
            # The number of dimensions tells the alternatives apart.
            if len(shape) == lead + len(letters) and shape[:lead] == batch:
                merged = dict(sizes)
                for letter, size in zip(letters, shape[lead:], strict=True):
                    if merged.setdefault(letter, size) != size:
                        break
                else:
                    return merged
        allowed = [(*map(str, batch), *letters) for letters in operand.shapes]
        wanted = " or ".join(f"({', '.join(names)}{',' if len(names) == 1 else ''})" for names in allowed)
        own_letters = {letter for letters in operand.shapes for letter in letters}
        known = ", ".join(f"{letter} = {size}" for letter, size in sizes.items() if letter in own_letters)
        with_known = f" with {known}" if known else ""
        self._fail(ValueError, f"{name} must have shape {wanted}{with_known}; got {tuple(tensor.shape)}")

    def _fail(self, kind: type[Exception], message: str) -> NoReturn:
        text = f"brandla::{self.name}: {message}"
        raise kind(text)


def overlaps_itself(tensor: Tensor) -> bool:
    """Say whether entries of a tensor may share memory, by its strides: interleaving rows or columns count too."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return tensor.numel() > 0
            reach += (size - 1) * stride
    return False


def parse(line: str) -> Signature:
    """Parse the signature line of an op."""
    name, _, rest = line.partition("(")
    taken, _, returned = rest.partition(") -> ")
    declared = [part.strip() for part in re.split(r",\s+", taken)]
    operands = tuple(
        _operand(match, part.split()[-1], position)
        for position, part in enumerate(declared)
        if (match := _OPERAND.match(part))
    )
    results = tuple(_operand(match, "", position) for position, match in enumerate(_OPERAND.finditer(returned)))
    grouped_name = f"{name.rstrip('_')}_grouped{'_' if name.endswith('_') else ''}"
    grouped = _schema(line, "[]").replace(name, grouped_name, 1)
    leader = next((operand for operand in operands if operand.kind in ("Tall", "Small")), operands[0])
    index_position = len(declared) - 1 if re.search(r"\bproblem\b", declared[-1]) else None
    writes = any(operand.written for operand in operands)
    return Signature(name, _schema(line, ""), grouped, operands, results, leader, index_position, writes)


def _operand(match: re.Match[str], name: str, position: int) -> Operand:
    kind, alternatives, mark = match.groups()
    shapes = tuple(tuple(filter(None, shape.split(","))) for shape in alternatives.split("|"))
    return Operand(name, position, kind, shapes, written=bool(mark), listed=kind in _LISTED)


def _schema(line: str, brackets: str) -> str:
    def spell(match: re.Match[str]) -> str:
        kind, _, mark = match.groups()
        return f"Tensor{'(a!)' if mark else ''}{brackets if kind in _LISTED else ''}"

    return _OPERAND.sub(spell, line)
