"""The specialisations of every kernel that the ops start. All of them have to compile well before a release.

Calls of each op are recorded, not run, over its dtypes, over widths that reach each bucket of `configs`, and over the
layouts of matrices in memory. Variants that cost registers are listed in full, the others once:

- at full width, in rows: all that Triton tells apart, but one number of stretches stands for all above one;
- at full width, in other layouts: each tile and each path through a kernel, with the most operands that any op gives
  it; float16, which takes the registers of bfloat16, in rows only;
- at other widths: each tile that is not listed yet, for each type of products.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Any

import torch

from brandla_kernels._kernels.ahead import specialization, target_named
from brandla_kernels._kernels.launch import Launch, recording
from brandla_kernels._op import OPS, AnyOp

WIDTHS = (16, 32, 64, 128)
# Dtypes of the factor and of the data beside it.
DTYPES = (
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
)
_ROWS = 4096
_LONG_SUM = 1024
# Added to the sizes of a ragged matrix, so that no pointer but the first is aligned.
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
    """List the specialisations that the ops start on ``target``, a key of `brandla_kernels._kernels.ahead.TARGETS`."""
    entries: dict[str, Specialization] = {}
    tiles: set[str] = set()
    for full, name, layout, (dtype, data) in product((True, False), ops or OPS, list(layouts), list(dtypes)):
        op, in_rows = OPS[name], layout.name == LAYOUTS[0].name
        takes_data = any(operand.kind == "Data" for operand in op.signature.operands)
        if op.launch is None or (data != dtype and not takes_data) or (layout.listed and not op.signature.lists):
            continue
        if data == torch.float16 and not in_rows:
            continue
        with recording(target_named(target)) as launches:
            for sizes, alternative in product(_sizes(op, layout, full=full), range(2 if full else 1)):
                op.launch(*_arguments(op, sizes, layout, alternative, dtype, data))
        for launch in launches:
            tile = repr((launch.name, launch.config, launch.arguments.get("COMPUTE", data)))
            if tile in tiles and not full:
                continue
            tiles.add(tile)
            path = _path_constants(launch)
            same_path = launch._replace(arguments=dict(launch.arguments) | path)
            key = repr((launch.name, launch.config, specialization(target, same_path)))
            if not in_rows and key not in entries:
                key = repr((tile, layout.name, data, path))
            entry = entries.setdefault(key, Specialization(launch, data, layout))
            if _tensor_count(launch) > _tensor_count(entry.launch):
                entry.launch = launch
            if name not in entry.ops:
                entry.ops.append(name)
    return list(entries.values())


def _path_constants(launch: Launch) -> dict[str, Any]:
    """Return the constants that choose a path through the kernel. It unrolls no loop by stretches: 2 stand for more."""
    given = launch.arguments.items()
    constants = {name: value for name, value in given if name.isupper() and not name.endswith("_LAYOUT")}
    return {name: min(value, 2) if name.startswith("SPLITS") else value for name, value in constants.items()}


def _tensor_count(launch: Launch) -> int:
    return sum(isinstance(value, torch.Tensor) for value in launch.arguments.values())


def _sizes(op: AnyOp, layout: Layout, *, full: bool) -> Iterator[dict[str, int]]:
    """Yield sizes by letter: long for the rows of tall matrices, and the largest width of the layout for the others.

    If not ``full``, the others are narrower, and in rows one of them is wider than the rest.
    """
    extra = _RAGGED if layout.ragged else 0
    operands = op.signature.operands
    long = {operand.shapes[0][0] for operand in operands if operand.listed and len(operand.shapes[0]) == 2}
    narrow = sorted({letter for operand in operands for letter in operand.shapes[-1]} - long)
    rows, widest = dict.fromkeys(long, _ROWS + extra), layout.widths[-1] + extra
    if not full:
        for width in layout.widths[:-1]:
            yield rows | dict.fromkeys(narrow, width + extra)
        for (others, width), letter in product(combinations(WIDTHS, 2), narrow if layout == LAYOUTS[0] else ()):
            yield rows | dict.fromkeys(narrow, others) | {letter: width}
        return
    yield rows | dict.fromkeys(narrow, widest)
    if all(operand.listed for operand in (*operands, *op.signature.results)) and layout.widths[-1] == WIDTHS[-1]:
        # Here the sum is over a narrow letter: few tiles and a long sum, which is then split.
        yield dict.fromkeys(long, widest) | dict.fromkeys(narrow, _LONG_SUM + extra)


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
        # Unwritten matrices take no memory, since nothing touches their pages.
        transposed = layout.transposed and operand.listed and len(shape) == 2
        pair = [torch.empty(shape[::-1] if transposed else shape, dtype=kind) for _ in range(2)]
        pair = [matrix.mT if transposed else matrix for matrix in pair]
        arguments.append(pair if layout.listed and operand.listed else pair[0])
    return arguments
