"""Where the matrices of a launch lie: a batch at equal strides, or a list of matrices of different sizes.

Every kernel takes a group of problems; the index of a program tells its problem. In a *batch*, all problems have one
size, and one stride leads from each to the next: pointers, sizes and strides are launch arguments. For a *list*, they
come from a table on the device, int64 of shape (problems, matrices, 5): pointer, row stride, column stride, rows,
columns. Small matrices beside a list stay launch arguments: they are stacked in one tensor, padded with zeros to the
largest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from brandla_kernels._signature import Matrices

# How a kernel finds a matrix. The last two promise that a thread can load 16 bytes at once: pointer and outer stride
# are aligned, the inner stride is 1, and no such load crosses the inner size. Layouts are words, not global constants:
# at every launch, Triton compares each global constant that a kernel reads, for a microsecond.
Layout: TypeAlias = Literal["batch", "list", "list_rows", "list_columns"]
_ALIGNED = 16

# Host copies of tables that captured graphs read again at every replay.
_captured: list[Tensor] = []


class Operands(NamedTuple):
    """The matrices of a launch."""

    problems: int
    # NAME_ptr, NAME_strides and NAME_LAYOUT of each, and table_ptr. The pointer of a list is that of its first matrix.
    arguments: dict[str, Any]
    # Whether all lie in aligned rows, so that a tile of them takes few registers for addresses.
    aligned: bool


def arrange(matrices: Mapping[str, Matrices | None]) -> Operands:
    """Arrange the matrices of a launch, in the order of the kernel's table: lists, stacked tensors, or None for absent.

    Without a list the tensors (..., a, b) have one batch shape; a matrix shared by all problems may have no batch
    dimensions. A batch with irregular strides is addressed as a list: nothing is copied.
    """
    given = {name: matrix for name, matrix in matrices.items() if matrix is not None}
    strides = {name: _strides(matrix) for name, matrix in given.items() if isinstance(matrix, Tensor)}
    listed = len(strides) < len(given)
    if not listed and None in strides.values():
        return arrange(_as_lists(matrices))
    counts = {name: len(m) if isinstance(m, list) else math.prod(m.shape[:-2]) for name, m in given.items()}
    count = max(counts.values(), default=1)
    entries = {name: _entries(matrix) for name, matrix in given.items()}
    layouts = {name: _layout(own) for name, own in entries.items()}
    table: Tensor | None = None
    if listed:
        # A matrix that is no list has a blank entry.
        blank = [(0,) * 5] * count
        places = [entries[name] if isinstance(matrix, list) else blank for name, matrix in matrices.items()]
        table = torch.tensor(list(zip(*places, strict=True)), dtype=torch.int64, device="cpu")
    arguments: dict[str, Any] = {"table_ptr": table}
    for name, matrix in matrices.items():
        apart, *inner = strides.get(name) or (0, 0, 0)
        arguments |= {
            f"{name}_ptr": matrix[0] if isinstance(matrix, list) else matrix,
            f"{name}_strides": (apart if counts.get(name) == count else 0, *inner),
            f"{name.upper()}_LAYOUT": layouts[name] if isinstance(matrix, list) else "batch",
        }
    return Operands(count, arguments, all(layout == "list_rows" for layout in layouts.values()))


def shapes(arguments: Mapping[str, Any]) -> list[tuple[tuple[int, int], ...]]:
    """Return rows and columns of the matrices of each problem, from a kernel's arguments; (0, 0) for an absent one.

    The sizes of a list are read from its table.
    """
    matrices = [arguments[name] for name in _pointer_names(arguments)]
    whole = tuple((0, 0) if matrix is None else (matrix.shape[-2], matrix.shape[-1]) for matrix in matrices)
    if arguments["table_ptr"] is None:
        return [whole] * max((math.prod(matrix.shape[:-2]) for matrix in matrices if matrix is not None), default=1)
    # A matrix that is no list has a blank entry: it is stacked, and as large for all problems.
    return [
        tuple((entry[3], entry[4]) if any(entry) else own for entry, own in zip(problem, whole, strict=False))
        for problem in arguments["table_ptr"].tolist()
    ]


def bytes_of(arguments: Mapping[str, Any], problems: Sequence[Any], times: Mapping[str, int]) -> int:
    """Return the bytes that a launch moves: each tensor once, or as often as ``times`` says."""
    sizes = dict(zip(_pointer_names(arguments), zip(*problems, strict=True), strict=True)) if problems else {}
    moved: dict[int, int] = {}
    for name, tensor in arguments.items():
        if name.endswith("_ptr") and name != "table_ptr" and tensor is not None:
            if arguments.get(f"{name.removesuffix('_ptr').upper()}_LAYOUT", "batch") == "batch":
                # An expanded dimension is in memory once.
                strided = zip(tensor.shape, tensor.stride(), strict=True)
                count = math.prod(size for size, stride in strided if stride)
            else:
                count = sum(rows * columns for rows, columns in sizes[name])
            moved[tensor.data_ptr()] = count * tensor.itemsize * times.get(name, 1)
    return sum(moved.values())


def _pointer_names(arguments: Mapping[str, Any]) -> list[str]:
    """Return the names of the matrices in the order of the table."""
    return [f"{name.removesuffix('_LAYOUT').lower()}_ptr" for name in arguments if name.endswith("_LAYOUT")]


def aligned(matrices: Matrices) -> bool:
    """Whether all the matrices lie in aligned rows, or all in aligned columns: a thread can load 16 bytes at once."""
    apart = () if isinstance(matrices, list) else matrices.stride()[:-2]
    return math.gcd(_ALIGNED, *apart) == _ALIGNED and _layout(_entries(matrices)) != "list"


def _strides(tensor: Tensor) -> tuple[int, ...] | None:
    """Return the strides of (..., a, b) seen as (B, a, b), or None if that would need a copy."""
    if tensor.ndim == 2:
        row, column = tensor.stride()
        return tensor.shape[0] * row, row, column
    try:
        return tensor.stride() if tensor.ndim == 3 else tensor.view(-1, *tensor.shape[-2:]).stride()
    except RuntimeError:
        return None


def _as_lists(matrices: Mapping[str, Matrices | None]) -> dict[str, Matrices | None]:
    """Split batches into lists of matrices; repeat a matrix shared by all problems."""
    lists = {
        name: [batch[index] for index in product(*map(range, batch.shape[:-2]))]
        for name, batch in matrices.items()
        if isinstance(batch, Tensor)
    }
    count = max(map(len, lists.values()))
    return {name: lists[name] * (count // len(lists[name])) if name in lists else None for name in matrices}


def _entries(matrices: Matrices) -> list[tuple[int, ...]]:
    """Return pointer, row stride, column stride, rows and columns of the matrices of a list, or of a whole batch."""
    members = [matrices] if isinstance(matrices, Tensor) else matrices
    return [(member.data_ptr(), *member.stride()[-2:], *member.shape[-2:]) for member in members]


def uploaded(table: Tensor, device: torch.device) -> Tensor:
    """Return a table on ``device``, as a copy unless that is the CPU."""
    if device.type == "cpu":
        return table
    pinned = table.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _captured.append(pinned)
    return pinned.to(device, non_blocking=True)


def _layout(entries: list[tuple[int, ...]]) -> Layout:
    """Return how matrices of a list lie: all in aligned rows, all in aligned columns, or neither."""
    in_rows = in_columns = True
    for pointer, row_stride, column_stride, rows, columns in entries:
        in_rows = in_rows and column_stride == 1 and not (pointer | row_stride | columns) % _ALIGNED
        in_columns = in_columns and row_stride == 1 and not (pointer | column_stride | rows) % _ALIGNED
    return "list_rows" if in_rows else "list_columns" if in_columns else "list"


# A matrix of a problem is, in a kernel, the tuple (pointer, row stride, column stride, rows, columns).


@triton.jit
def matrix_of(
    table_ptr, problem, ptr, strides, rows, columns,
    LAYOUT: tl.constexpr, PLACE: tl.constexpr, MATRICES: tl.constexpr,
):  # fmt: skip
    """Return a matrix of this problem. PLACE is that of a list in the table; rows and columns are those of a batch."""
    if LAYOUT == "batch":
        return ptr + problem * strides[0], strides[1], strides[2], rows, columns
    else:
        entry = table_ptr + (problem * MATRICES + PLACE) * 5
        address = tl.load(entry).to(ptr.dtype)
        own_row, own_column = tl.load(entry + 1), tl.load(entry + 2)
        own_rows, own_columns = tl.load(entry + 3).to(tl.int32), tl.load(entry + 4).to(tl.int32)
        if LAYOUT == "list_rows":
            whole = tl.multiple_of(own_columns, 16)
            return tl.multiple_of(address, 16), tl.multiple_of(own_row, 16), 1, own_rows, whole
        elif LAYOUT == "list_columns":
            whole = tl.multiple_of(own_rows, 16)
            return tl.multiple_of(address, 16), 1, tl.multiple_of(own_column, 16), whole, own_columns
        else:
            return address, own_row, own_column, own_rows, own_columns


@triton.jit
def load_tile(matrix, row, column, DTYPE: tl.constexpr = None):
    """Load a tile [rows of ``row``, columns of ``column``], in DTYPE if one is named, with 0 outside the matrix."""
    # int64 before the product: n · r may exceed 2³¹.
    offsets = row.to(tl.int64)[:, None] * matrix[1] + column.to(tl.int64)[None, :] * matrix[2]
    inside = (row < matrix[3])[:, None] & (column < matrix[4])[None, :]
    tile = tl.load(matrix[0] + offsets, mask=inside, other=0.0)
    return tile if DTYPE is None else tile.to(DTYPE)


@triton.jit
def store_tile(matrix, row, column, tile):
    """Store a tile, in the dtype of the matrix, where it lies inside."""
    offsets = row.to(tl.int64)[:, None] * matrix[1] + column.to(tl.int64)[None, :] * matrix[2]
    inside = (row < matrix[3])[:, None] & (column < matrix[4])[None, :]
    tl.store(matrix[0] + offsets, tile.to(matrix[0].dtype.element_ty), mask=inside)


@triton.jit
def add_product(total, x, row, y, column, last, PRECISION: tl.constexpr, BLOCK: tl.constexpr, order=None):
    """Add Σ_p X[row, p] Y[p, column] over p < ``last`` to a tile, in its dtype; with an order, of X[row, order[p]]."""
    x = (x[0], x[1], x[2], x[3], last)
    y = (y[0], y[1], y[2], last, y[4])
    for start in range(0, last, BLOCK):
        inner = start + tl.arange(0, BLOCK)
        place = inner
        if order is not None:
            place = tl.load(order + inner, mask=inner < last, other=last)
        left = load_tile(x, row, place, total.dtype)
        right = load_tile(y, inner, column, total.dtype)
        total = tl.dot(left, right, total, input_precision=PRECISION, out_dtype=total.dtype)
    return total


@triton.jit
def place_of(tiles_down, tiles_across, SPLITS: tl.constexpr, first=0):
    """Return the problem and the stretch of the sum of this program, and the row and column of its tile.

    Programs of one stretch are neighbours in the grid, from program ``first`` on.
    """
    program, tiles = tl.program_id(0) - first, tiles_down * tiles_across
    problem = (program // (tiles * SPLITS)).to(tl.int64)
    return problem, (program // tiles) % SPLITS, (program % tiles) // tiles_across, program % tiles_across


@triton.jit
def stretch_of(length, split, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Return where a stretch of a sum begins and ends. The next program goes on from the end."""
    stretch = tl.cdiv(tl.cdiv(length, BLOCK), SPLITS) * BLOCK
    return split * stretch, tl.minimum((split + 1) * stretch, length)
