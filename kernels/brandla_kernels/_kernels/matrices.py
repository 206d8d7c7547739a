"""Where the matrices of a launch lie: a batch at equal strides, or a list of matrices of different sizes.

Every kernel takes a group of problems, one for each index of its last grid axis. In a *batch* all problems have one
size, and one stride leads from each to the next: pointers, sizes and strides are launch arguments. For a *list* they
come from a table on the device, int64 of shape (problems, matrices, 5): pointer, row stride, column stride, rows,
columns. Small matrices beside a list are stacked in one tensor, which is padded with zeros to the largest, and stay
launch arguments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from brandla_kernels._signature import Matrices

Strides: TypeAlias = tuple[int, int, int]

# How a kernel finds a matrix. The last two promise what lets a thread load 16 bytes at once: pointer and outer stride
# aligned, inner stride 1, and an inner size that no such load crosses.
BATCH = tl.constexpr(0)
LISTED = tl.constexpr(1)
LISTED_ROWS = tl.constexpr(2)
LISTED_COLUMNS = tl.constexpr(3)

# Fields of a table entry.
FIELDS = tl.constexpr(5)

_ALIGNED = 16

# Host copies of tables that captured graphs read again at every replay.
_captured: list[Tensor] = []


class Operands(NamedTuple):
    """The matrices of a launch as arguments of the kernel."""

    problems: int
    table: Tensor | None
    layouts: dict[str, int]
    pointers: dict[str, Tensor | None]
    strides: dict[str, Strides]

    @property
    def aligned(self) -> bool:
        """Whether all matrices lie in aligned rows, so that a tile of them takes few registers for addresses."""
        return all(
            layout == LISTED_ROWS.value or (layout == BATCH.value and _in_aligned_rows(matrix))
            for matrix, layout in zip(self.pointers.values(), self.layouts.values(), strict=True)
            if matrix is not None
        )

    def arguments(self) -> dict[str, Any]:
        """Return ``NAME_ptr``, ``NAME_strides`` and ``NAME_LAYOUT`` of each matrix, and ``table_ptr``."""
        named: dict[str, Any] = {f"{name}_ptr": pointer for name, pointer in self.pointers.items()}
        named |= {"table_ptr": self.table}
        named |= {f"{name}_strides": strides for name, strides in self.strides.items()}
        named |= {f"{name.upper()}_LAYOUT": layout for name, layout in self.layouts.items()}
        return named


def arrange(matrices: Mapping[str, Matrices | None]) -> Operands:
    """Arrange the matrices of a launch, in the order of the kernel's table: lists, stacked tensors, or None for absent.

    Without a list the tensors (..., a, b) are problems of one batch shape; one that is the same for all may have no
    batch dimensions. Where the strides of a batch are irregular, it is addressed as a list: nothing is copied.
    """
    if any(isinstance(matrix, list) for matrix in matrices.values()):
        return _listed(matrices)
    batches = {name: _flat(matrix) for name, matrix in matrices.items() if isinstance(matrix, Tensor)}
    if any(flat is None for flat in batches.values()):
        return _listed(_as_lists(matrices))
    count = max((flat.shape[0] for flat in batches.values() if flat is not None), default=1)
    strides = {name: _strides(batches.get(name), count) for name in matrices}
    return Operands(count, None, dict.fromkeys(matrices, BATCH.value), dict(_pointers(matrices)), strides)


def shapes(arguments: Mapping[str, Any], *names: str) -> list[tuple[tuple[int, int], ...]]:
    """Return rows and columns of the named matrices for each problem, from a kernel's arguments; (0, 0) of none.

    ``names`` are all the matrices of the launch, in the order of its table, which is read.
    """
    matrices = [arguments[f"{name}_ptr"] for name in names]
    whole = tuple((0, 0) if matrix is None else (matrix.shape[-2], matrix.shape[-1]) for matrix in matrices)
    if arguments["table_ptr"] is None:
        return [whole] * max(math.prod(matrix.shape[:-2]) for matrix in matrices if matrix is not None)
    # A matrix that is no list has a blank entry: it is stacked, and as large for all problems.
    return [
        tuple((entry[3], entry[4]) if any(entry) else own for entry, own in zip(problem, whole, strict=True))
        for problem in arguments["table_ptr"].tolist()
    ]


def bytes_of(arguments: Mapping[str, Any], *names: str) -> int:
    """Return the bytes of the named arguments, matrices or other tensors, each counted once; 0 of None."""
    listed = {name for name in names if arguments.get(f"{name.upper()}_LAYOUT", BATCH.value) != BATCH.value}
    found: dict[int, int] = {}
    for name in names:
        tensor = arguments[f"{name}_ptr"]
        if tensor is not None:
            found[tensor.data_ptr()] = _bytes_of_list(arguments, name) if name in listed else _bytes_of(tensor)
    return sum(found.values())


def new_like(matrices: list[Tensor], widths: Sequence[int]) -> Matrices:
    """Return unwritten matrices with the rows of ``matrices`` and as many columns as ``widths`` says."""
    return [matrix.new_empty(matrix.shape[0], width) for matrix, width in zip(matrices, widths, strict=True)]


def new_small(matrices: Matrices, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Return an unwritten stack of small matrices, one for each of ``matrices``."""
    if isinstance(matrices, Tensor):
        return matrices.new_empty(*matrices.shape[:-2], *shape, dtype=dtype)
    return matrices[0].new_empty(len(matrices), *shape, dtype=dtype)


def aligned(matrices: Matrices) -> bool:
    """Whether all the matrices lie in aligned rows, or all in aligned columns: a thread can load 16 bytes at once."""
    if isinstance(matrices, list):
        return bool(_layout(matrices) != LISTED.value)
    apart = all(stride % _ALIGNED == 0 for stride in matrices.stride()[:-2])
    return apart and (_in_aligned_rows(matrices) or _in_aligned_rows(matrices.mT))


def _bytes_of(tensor: Tensor) -> int:
    """Return the bytes of a tensor; what is expanded is there once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * int(tensor.itemsize)


def _bytes_of_list(arguments: Mapping[str, Any], name: str) -> int:
    place = [one for one in arguments if one.endswith("_LAYOUT")].index(f"{name.upper()}_LAYOUT")
    entries = (problem[place] for problem in arguments["table_ptr"].tolist())
    return int(arguments[f"{name}_ptr"].itemsize * sum(entry[3] * entry[4] for entry in entries))


def _flat(tensor: Tensor) -> Tensor | None:
    """View (..., a, b) as (B, a, b), or return None where that would need a copy."""
    if tensor.ndim == 2:
        return tensor.unsqueeze(0)
    if tensor.ndim == 3:
        return tensor
    try:
        return tensor.view(-1, *tensor.shape[-2:])
    except RuntimeError:
        return None


def _strides(flat: Tensor | None, count: int) -> Strides:
    if flat is None:
        return (0, 0, 0)
    return (flat.stride(0) if flat.shape[0] == count else 0, flat.stride(1), flat.stride(2))


def _pointers(matrices: Mapping[str, Matrices | None]) -> Mapping[str, Tensor | None]:
    return {name: matrix[0] if isinstance(matrix, list) else matrix for name, matrix in matrices.items()}


def _as_lists(matrices: Mapping[str, Matrices | None]) -> dict[str, Matrices | None]:
    """Take batches apart into lists of matrices; a matrix that is one for all is repeated."""
    lists = {name: _entries(matrix) for name, matrix in matrices.items() if isinstance(matrix, Tensor)}
    count = max(len(entries) for entries in lists.values())
    spread = {name: entries * (count // len(entries)) for name, entries in lists.items()}
    return {name: spread.get(name) for name in matrices}


def _entries(tensor: Tensor) -> list[Tensor]:
    """Return views of the matrices of a batch, in order."""
    if tensor.ndim == 2:
        return [tensor]
    return [entry for part in tensor.unbind(0) for entry in _entries(part)]


def _listed(matrices: Mapping[str, Matrices | None]) -> Operands:
    lists = [matrix for matrix in matrices.values() if isinstance(matrix, list)]
    count = len(lists[0])
    blank = [0] * FIELDS.value
    entries = [
        [_entry(matrix[problem]) if isinstance(matrix, list) else blank for matrix in matrices.values()]
        for problem in range(count)
    ]
    table = _on_device(torch.tensor(entries, dtype=torch.int64), lists[0][0].device)
    layouts = {name: _layout(matrix) if isinstance(matrix, list) else BATCH.value for name, matrix in matrices.items()}
    flat = {name: _flat(matrix) if isinstance(matrix, Tensor) else None for name, matrix in matrices.items()}
    strides = {name: _strides(flat[name], count) for name in matrices}
    return Operands(count, table, layouts, dict(_pointers(matrices)), strides)


def _entry(matrix: Tensor) -> list[int]:
    return [matrix.data_ptr(), *matrix.stride(), *matrix.shape]


def _layout(matrices: list[Tensor]) -> int:
    if all(map(_in_aligned_rows, matrices)):
        return int(LISTED_ROWS.value)
    return int(LISTED_COLUMNS.value if all(_in_aligned_rows(matrix.mT) for matrix in matrices) else LISTED.value)


def _in_aligned_rows(matrix: Tensor) -> bool:
    *_, row_stride, column_stride = matrix.stride()
    return (
        column_stride == 1 and matrix.data_ptr() % _ALIGNED == row_stride % _ALIGNED == matrix.shape[-1] % _ALIGNED == 0
    )


def _on_device(table: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return table
    pinned = table.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _captured.append(pinned)
    return pinned.to(device, non_blocking=True)


@triton.jit
def entry_of(table_ptr, problem, MATRIX: tl.constexpr, MATRICES: tl.constexpr):
    """Address the table entry of a matrix of this problem; there is none, and none is read, for a batch."""
    if table_ptr is None:
        return 0
    else:
        return table_ptr + (problem * MATRICES + MATRIX) * FIELDS


@triton.jit
def locate(entry_ptr, ptr, strides, problem, LAYOUT: tl.constexpr):
    """Return pointer, row stride and column stride of a matrix of this problem."""
    if LAYOUT == BATCH:
        return ptr + problem * strides[0], strides[1], strides[2]
    else:
        address = tl.load(entry_ptr).to(ptr.dtype)
        row_stride = tl.load(entry_ptr + 1)
        column_stride = tl.load(entry_ptr + 2)
        if LAYOUT == LISTED_ROWS:
            return tl.multiple_of(address, 16), tl.multiple_of(row_stride, 16), 1
        elif LAYOUT == LISTED_COLUMNS:
            return tl.multiple_of(address, 16), 1, tl.multiple_of(column_stride, 16)
        else:
            return address, row_stride, column_stride


@triton.jit
def rows_of(entry_ptr, rows, LAYOUT: tl.constexpr):
    """Return the number of rows: the launch argument for a batch, or the problem's own."""
    if LAYOUT == BATCH:
        return rows
    else:
        own = tl.load(entry_ptr + 3).to(tl.int32)
        if LAYOUT == LISTED_COLUMNS:
            return tl.multiple_of(own, 16)
        else:
            return own


@triton.jit
def columns_of(entry_ptr, columns, LAYOUT: tl.constexpr):
    """Return the number of columns: the launch argument for a batch, or the problem's own."""
    if LAYOUT == BATCH:
        return columns
    else:
        own = tl.load(entry_ptr + 4).to(tl.int32)
        if LAYOUT == LISTED_ROWS:
            return tl.multiple_of(own, 16)
        else:
            return own


@triton.jit
def load_tile(ptr, row_stride, column_stride, row, column, rows, columns, DTYPE: tl.constexpr):
    """Load a tile [rows of ``row``, columns of ``column``] in DTYPE, with 0 outside the matrix."""
    # int64 before the product: n · r may exceed 2³¹.
    offsets = row.to(tl.int64)[:, None] * row_stride + column.to(tl.int64)[None, :] * column_stride
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(ptr + offsets, mask=inside, other=0.0).to(DTYPE)


@triton.jit
def store_tile(ptr, row_stride, column_stride, row, column, rows, columns, tile):
    """Store a tile, in the dtype of the matrix, where it lies inside."""
    offsets = row.to(tl.int64)[:, None] * row_stride + column.to(tl.int64)[None, :] * column_stride
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(ptr + offsets, tile.to(ptr.dtype.element_ty), mask=inside)
