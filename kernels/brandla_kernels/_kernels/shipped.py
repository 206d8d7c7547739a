"""Every specialisation of every kernel that the ops start: what has to compile well before it ships.

Calls of each op are recorded, not run, over its dtypes, over widths that reach each bucket of `configs`, and over ways
for the matrices to lie in memory. Those other than the first are taken at fewer widths: the narrowest tiles, and the
widest, with the Gram matrix and without. What differs in nothing that Triton specialises on is listed once, and so is
what differs in the number of stretches alone where it is more than one: kernels count them, and unroll nothing by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch

from brandla_kernels._kernels.ahead import specialization, target_named
from brandla_kernels._kernels.launch import Launch, recording
from brandla_kernels._op import OPS, AnyOp

WIDTHS = (16, 32, 64, 128)
# Of the factor, and of the data beside it.
DTYPES = (
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
)
_ROWS = 4096
_LONG_SUM = 1024
# What is added to the sizes of a ragged matrix: no pointer but the first is then aligned.
_RAGGED = 3


@dataclass(frozen=True)
class Layout:
    """How the matrices of a call lie in memory."""

    name: str
    listed: bool = False
    transposed: bool = False
    ragged: bool = False
    widths: tuple[int, ...] = (16, 128)


LAYOUTS = (
    Layout("rows", widths=WIDTHS),
    Layout("columns", transposed=True),
    Layout("ragged", ragged=True),
    Layout("list", listed=True),
    Layout("list of columns", listed=True, transposed=True),
    Layout("ragged list", listed=True, ragged=True),
)


@dataclass
class Specialization:
    """One kernel to compile, and the calls that start it."""

    launch: Launch
    dtype: torch.dtype  # of the data
    layout: Layout
    ops: list[str] = field(default_factory=list)


def specializations(
    target: str,
    *,
    ops: Iterable[str] | None = None,
    layouts: Iterable[Layout] = LAYOUTS,
    dtypes: Iterable[tuple[torch.dtype, torch.dtype]] = DTYPES,
) -> list[Specialization]:
    """List what the ops start on ``target``, a key of `brandla_kernels._kernels.ahead.TARGETS`."""
    found: dict[str, Specialization] = {}
    for name, layout, (dtype, data) in product(ops or OPS, list(layouts), list(dtypes)):
        op = OPS[name]
        takes_data = any(operand.kind == "Data" for operand in op.signature.operands)
        if op.launch is None or (data != dtype and not takes_data) or (layout.listed and not op.signature.lists):
            continue
        if data == torch.float16 and layout.name != LAYOUTS[0].name:
            continue
        with recording(target_named(target)) as launches:
            for width in layout.widths:
                for sizes, alternative in product(_sizes(op, width, layout), range(2)):
                    op.launch(*_arguments(op, sizes, layout, alternative, dtype, data))
        for launch in launches:
            key = repr((launch.name, launch.config, specialization(target, _in_two_stretches(launch))))
            entry = found.setdefault(key, Specialization(launch, data, layout))
            if name not in entry.ops:
                entry.ops.append(name)
    return list(found.values())


def _in_two_stretches(launch: Launch) -> Launch:
    stretches = {name: min(value, 2) for name, value in launch.arguments.items() if name.startswith("SPLITS")}
    return replace(launch, arguments=dict(launch.arguments) | stretches)


def _sizes(op: AnyOp, width: int, layout: Layout) -> Iterator[dict[str, int]]:
    """Sizes by letter: what counts rows of a tall matrix is long, and one of the others has the width.

    The others have each width in turn, up to it.
    """
    extra = _RAGGED if layout.ragged else 0
    operands = op.signature.operands
    long = {operand.shapes[0][0] for operand in operands if operand.listed and len(operand.shapes[0]) == 2}
    narrow = sorted({letter for operand in operands for letter in operand.shapes[-1]} - long)
    rows = dict.fromkeys(long, _ROWS + extra)
    for others in WIDTHS[: WIDTHS.index(width) + 1] if layout == LAYOUTS[0] else (width,):
        for widest in narrow[: 1 if others == width else None]:
            yield rows | dict.fromkeys(narrow, others + extra) | {widest: width + extra}
    if not narrow:
        yield rows
    if all(each.listed for each in (*operands, *op.signature.results)) and width == WIDTHS[-1]:
        # The sum is not over what is long: few tiles and a long sum, which is then split.
        yield dict.fromkeys(long, width + extra) | dict.fromkeys(narrow, _LONG_SUM + extra)


def _arguments(
    op: AnyOp, sizes: Mapping[str, int], layout: Layout, alternative: int, dtype: torch.dtype, data: torch.dtype
) -> list[Any]:
    operands = {operand.position: operand for operand in op.signature.operands}
    others = {"Tensor": torch.zeros((), dtype=torch.int64), "float": 0.5}
    arguments: list[Any] = []
    for position, argument in enumerate(op.registered._schema.arguments):
        operand = operands.get(position)
        if operand is None:
            arguments.append(others.get(str(argument.type), max(min(sizes.values()), 1)))
            continue
        shape = [sizes[letter] for letter in operand.shapes[min(alternative, len(operand.shapes) - 1)]]
        kind = data if operand.kind == "Data" else dtype
        if op.name == "cholesky_inverse_core" or operand.kind == "Sum":
            kind = torch.float64
        if layout.listed and not operand.listed:
            shape = [2, *shape]
        # Unwritten matrices: pages that nothing touches take no memory.
        transposed = layout.transposed and operand.listed and len(shape) == 2
        two = [torch.empty(shape[::-1] if transposed else shape, dtype=kind) for _ in range(2)]
        two = [one.mT if transposed else one for one in two]
        arguments.append(two if layout.listed and operand.listed else two[0])
    return arguments
