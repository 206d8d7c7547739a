"""C = Xᵀ Y for tall X and Y: a sum over n, split over programs and added up in a fixed order.

X is (n, r), Y is (n, k), C is (r, k). `project`, the Gram matrices and the first half of `damped_apply` and
`kron_damped_apply` are calls of this kernel. C has few tiles and n is long, so the rows are split: a program sums
one tile of C over one stretch of rows into a workspace, and a second kernel adds the stretches in their order. No
atomic addition takes part, so two runs are equal to the bit.

A Gram matrix is symmetric: only tiles on and above the diagonal are summed, and both triangles are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from brandla_kernels._kernels import configs
from brandla_kernels._kernels.launch import (
    Config,
    Work,
    bits_of,
    counted,
    product_precision,
    start,
    target_of,
    triton_dtype,
)
from brandla_kernels._kernels.matrices import (
    arrange,
    bytes_of,
    columns_of,
    entry_of,
    load_tile,
    locate,
    new_small,
    rows_of,
    shapes,
)
from brandla_kernels._signature import Matrices
from brandla_kernels.project import cost
from brandla_kernels.tall import columns, device_of, dtype_of, rows


def _product_work(arguments: Mapping[str, Any]) -> Work:
    flops = sum(cost(n, r, k).flops for (n, r), (_, k) in shapes(arguments, "x", "y"))
    sizes = {letter: arguments[letter] for letter in ("n", "r", "k")}
    return Work({bits_of(arguments["COMPUTE"]): flops}, bytes_of(arguments, "x", "y", "parts"), sizes)


@counted(_product_work)
@triton.jit
def inner_product_kernel(
    x_ptr, y_ptr, parts_ptr, table_ptr,
    n, r, k, r_most, k_most,
    x_strides, y_strides,
    X_LAYOUT: tl.constexpr, Y_LAYOUT: tl.constexpr, SYMMETRIC: tl.constexpr, SPLITS: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid: problems × SPLITS × tiles of C. Parts: (problems, SPLITS, r_most, k_most)."""
    tiles_k = tl.cdiv(k_most, BLOCK_K)
    tiles = tl.cdiv(r_most, BLOCK_R) * tiles_k
    tile_r = (tl.program_id(0) % tiles) // tiles_k
    tile_k = tl.program_id(0) % tiles_k
    split = (tl.program_id(0) // tiles) % SPLITS
    problem = (tl.program_id(0) // (tiles * SPLITS)).to(tl.int64)
    if SYMMETRIC:
        if tile_k < tile_r:
            return
    x_entry = entry_of(table_ptr, problem, 0, 2)
    y_entry = entry_of(table_ptr, problem, 1, 2)
    n = rows_of(x_entry, n, X_LAYOUT)
    r = columns_of(x_entry, r, X_LAYOUT)
    k = columns_of(y_entry, k, Y_LAYOUT)
    x, x_row, x_column = locate(x_entry, x_ptr, x_strides, problem, X_LAYOUT)
    y, y_row, y_column = locate(y_entry, y_ptr, y_strides, problem, Y_LAYOUT)

    index_r = tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
    index_k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    stretch = tl.cdiv(tl.cdiv(n, BLOCK_N), SPLITS) * BLOCK_N
    first = split * stretch
    # Not past the end of the stretch: the next program takes it up there.
    last = tl.minimum(first + stretch, n)
    total = tl.zeros((BLOCK_R, BLOCK_K), tl.float64 if COMPUTE == tl.float64 else tl.float32)
    for start_n in range(first, last, BLOCK_N):
        row = start_n + tl.arange(0, BLOCK_N)
        left = load_tile(x, x_row, x_column, row, index_r, n, r, COMPUTE)  # [BLOCK_N, BLOCK_R]
        right = load_tile(y, y_row, y_column, row, index_k, n, k, COMPUTE)  # [BLOCK_N, BLOCK_K]
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION, out_dtype=total.dtype)
    part = parts_ptr + (problem * SPLITS + split) * r_most * k_most
    inside = (index_r < r_most)[:, None] & (index_k < k_most)[None, :]
    tl.store(part + index_r.to(tl.int64)[:, None] * k_most + index_k[None, :], total, mask=inside)


def _sum_work(arguments: Mapping[str, Any]) -> Work:
    sizes = {"rows": arguments["rows"], "columns": arguments["columns"], "splits": arguments["SPLITS"]}
    return Work({}, bytes_of(arguments, "parts", "out", "row_scale"), sizes)


@counted(_sum_work)
@triton.jit
def sum_parts_kernel(
    parts_ptr, out_ptr, row_scale_ptr,
    rows, columns, parts_columns, parts_size, out_strides, row_scale_stride,
    SYMMETRIC: tl.constexpr, SCALED: tl.constexpr, SPLITS: tl.constexpr, TILE_R: tl.constexpr, TILE_K: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: problems × tiles of C. C = Σ parts, each row times its scale; a C in float64 is summed in it."""
    tiles_k = tl.cdiv(columns, BLOCK_K)
    tiles = tl.cdiv(rows, BLOCK_R) * tiles_k
    problem = (tl.program_id(0) // tiles).to(tl.int64)
    row = ((tl.program_id(0) % tiles) // tiles_k) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = (tl.program_id(0) % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    # What lies in a tile below the diagonal was not summed: its mirror image was.
    below = (row // TILE_R)[:, None] > (column // TILE_K)[None, :]
    from_row = tl.where(below & SYMMETRIC, column[None, :], row[:, None])
    from_column = tl.where(below & SYMMETRIC, row[:, None], column[None, :])
    source = parts_ptr + problem * SPLITS * parts_size + from_row * parts_columns + from_column
    total_dtype = tl.float64 if out_ptr.dtype.element_ty == tl.float64 else parts_ptr.dtype.element_ty
    total = tl.zeros((BLOCK_R, BLOCK_K), total_dtype)
    for split in range(SPLITS):
        total += tl.load(source + split * parts_size, mask=inside, other=0.0).to(total.dtype)
    if SCALED:
        scale = tl.load(row_scale_ptr + problem * row_scale_stride + row, mask=row < rows, other=0.0)
        total = total * scale.to(total.dtype)[:, None]
    out = out_ptr + problem * out_strides[0] + row[:, None] * out_strides[1] + column[None, :] * out_strides[2]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside)


def inner_product(x: Matrices, y: Matrices, *, row_scale: Tensor | None = None) -> Tensor:
    """Return diag(``row_scale``) XᵀY in the dtype of X, stacked, with zeros where a problem of a list is smaller."""
    return _inner_product(x, y, dtype_of(x), dtype_of(x), row_scale, symmetric=False)


def gram(panel: Matrices, *, exact: bool = True) -> Tensor:
    """Return PᵀP in float64, stacked, of exact products or of products rounded to the panel's dtype."""
    dtype = torch.float64 if exact else dtype_of(panel)
    return _inner_product(panel, panel, dtype, torch.float64, None, symmetric=True)


def sum_parts(parts: Tensor, out: Tensor) -> None:
    """Add up parts (problems, splits, a, b) of C in order, and write the leading rows and columns that ``out`` has."""
    _sum_parts(parts, out, None, None)


def _inner_product(
    x: Matrices, y: Matrices, dtype: torch.dtype, out_dtype: torch.dtype, row_scale: Tensor | None, symmetric: bool
) -> Tensor:
    r, k, n = columns(x), columns(y), rows(x)
    operands = arrange({"x": x, "y": y})
    target = target_of(x[0] if isinstance(x, list) else x)
    config = configs.inner_product(target, dtype, r, k, operands.aligned)
    blocks = config.blocks
    tiles = triton.cdiv(r, blocks["BLOCK_R"]) * triton.cdiv(k, blocks["BLOCK_K"])
    if out_dtype == torch.float64:
        splits = configs.long_splits(target, n, blocks["BLOCK_N"], tiles * operands.problems, dtype)
    else:
        splits = configs.splits(target, triton.cdiv(n, blocks["BLOCK_N"]), tiles * operands.problems)
    parts = torch.empty(operands.problems, splits, r, k, dtype=dtype, device=device_of(x))
    arguments = operands.arguments() | {
        "parts_ptr": parts, "n": n, "r": r, "k": k, "r_most": r, "k_most": k,
        "SYMMETRIC": symmetric, "SPLITS": splits, "COMPUTE": triton_dtype(dtype),
        "PRECISION": product_precision(target, dtype),
    }  # fmt: skip
    start(inner_product_kernel, (operands.problems * splits * tiles,), arguments, config)
    out = new_small(wider(x, y), (r, k), out_dtype)
    _sum_parts(parts, out, row_scale, config if symmetric else None)
    return out


def wider(x: Matrices, y: Matrices) -> Matrices:
    """Whichever of the two has the batch dimensions, if one is the same for all problems."""
    return y if isinstance(x, Tensor) and isinstance(y, Tensor) and y.ndim > x.ndim else x


def _sum_parts(parts: Tensor, out: Tensor, row_scale: Tensor | None, triangle: Config | None) -> None:
    count, splits, parts_rows, parts_columns = parts.shape
    r, k = out.shape[-2:]
    config = configs.sum_parts()
    tiles = triton.cdiv(r, config.blocks["BLOCK_R"]) * triton.cdiv(k, config.blocks["BLOCK_K"])
    flat = out.view(count, r, k)
    if row_scale is not None:
        # r numbers a problem, next to each other.
        row_scale = row_scale.contiguous()
    arguments = {
        "parts_ptr": parts, "out_ptr": out, "row_scale_ptr": row_scale,
        "rows": r, "columns": k, "parts_columns": parts_columns, "parts_size": parts_rows * parts_columns,
        "out_strides": flat.stride(), "row_scale_stride": r if row_scale is not None else 0,
        "SYMMETRIC": triangle is not None, "SCALED": row_scale is not None, "SPLITS": splits,
        "TILE_R": triangle.blocks["BLOCK_R"] if triangle else 1,
        "TILE_K": triangle.blocks["BLOCK_K"] if triangle else 1,
    }  # fmt: skip
    start(sum_parts_kernel, (count * tiles,), arguments, config)
