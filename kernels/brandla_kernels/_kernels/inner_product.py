"""C = Xᵀ Y for tall X and Y: a sum over n, split over programs and added up in a fixed order.

X is (n, r), Y is (n, k), C is (r, k). `project`, `gram` and `rounded_gram` call this kernel. C has few tiles and n is
large, so the rows are split: a program sums one tile of C over one stretch of rows into a workspace. A second kernel
adds the stretches in their order. There are no atomic additions, so two runs are equal to the bit.

A Gram matrix is symmetric: only tiles on and above the diagonal are summed. The second kernel writes both triangles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from brandla_kernels._kernels import configs
from brandla_kernels._kernels.launch import counted, products_in, start, target_of
from brandla_kernels._kernels.matrices import arrange, load_tile, matrix_of, place_of, store_tile, stretch_of
from brandla_kernels._signature import Matrices
from brandla_kernels.project import cost
from brandla_kernels.tall import columns, device_of, dtype_of, rows


@triton.jit
def sum_over_rows(
    x, index_x, y, index_y, first, last, scale_x, scale_y,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return a tile of XᵀY over rows ``first`` to ``last``; the scales multiply X and Y, unless they are None."""
    total = tl.zeros((index_x.shape[0], index_y.shape[0]), tl.float64 if COMPUTE == tl.float64 else tl.float32)
    for start_n in range(first, last, BLOCK_N):
        row = start_n + tl.arange(0, BLOCK_N)
        left = load_tile(x, row, index_x, COMPUTE)  # [BLOCK_N, BLOCK_R]
        right = load_tile(y, row, index_y, COMPUTE)  # [BLOCK_N, BLOCK_K]
        if scale_x is not None:
            left = left * scale_x
            right = right * scale_y
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION, out_dtype=total.dtype)
    return total


@counted("n r k", lambda _, x, y: cost(x[0], x[1], y[1]).flops)
@triton.jit
def inner_product_kernel(
    x_ptr, y_ptr, parts_ptr, table_ptr,
    n, r, k,
    x_strides, y_strides,
    X_LAYOUT: tl.constexpr, Y_LAYOUT: tl.constexpr, SYMMETRIC: tl.constexpr, SPLITS: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid: problems × SPLITS × tiles of C. Parts: (problems, SPLITS, r, k)."""
    problem, split, tile_r, tile_k = place_of(tl.cdiv(r, BLOCK_R), tl.cdiv(k, BLOCK_K), SPLITS)
    if SYMMETRIC:
        if tile_k < tile_r:
            return
    x = matrix_of(table_ptr, problem, x_ptr, x_strides, n, r, X_LAYOUT, 0, 2)
    y = matrix_of(table_ptr, problem, y_ptr, y_strides, n, k, Y_LAYOUT, 1, 2)
    index_r = tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
    index_k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    first, last = stretch_of(x[3], split, SPLITS, BLOCK_N)
    total = sum_over_rows(x, index_r, y, index_k, first, last, None, None, COMPUTE, PRECISION, BLOCK_N)
    store_tile((parts_ptr + (problem * SPLITS + split) * r * k, k, 1, r, k), index_r, index_k, total)


@counted("rows columns SPLITS")
@triton.jit
def sum_parts_kernel(
    parts_ptr, above_ptr, below_ptr, first, rows, columns,
    SPLITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: problems × tiles of a part. All tensors are contiguous, and the sum is in the dtype of the result.

    Rows from ``first`` on are a symmetric matrix, alone or below another matrix. Its entries below the diagonal come
    from their mirror images.
    """
    problem, _, tile_r, tile_k = place_of(tl.cdiv(rows, BLOCK_R), tl.cdiv(columns, BLOCK_K), 1)
    row = tile_r * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    column = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    inside = (row < rows) & (column < columns)
    mirrored = row - first > column
    from_row = tl.where(mirrored, column + first, row)
    from_column = tl.where(mirrored, row - first, column)
    source = parts_ptr + problem * SPLITS * rows * columns + from_row.to(tl.int64) * columns + from_column
    total_dtype = below_ptr.dtype.element_ty if above_ptr is None else above_ptr.dtype.element_ty
    total = tl.zeros((BLOCK_R, BLOCK_K), total_dtype)
    for _ in range(SPLITS):
        total += tl.load(source, mask=inside, other=0.0).to(total_dtype)
        source += rows * columns
    place = row.to(tl.int64) * columns + column
    if above_ptr is not None:
        tl.store(above_ptr + problem * first * columns + place, total, mask=inside & (row < first))
    if below_ptr is not None:
        tl.store(below_ptr + (problem * columns - first) * columns + place, total, mask=inside & (row >= first))


def project(x: Matrices, y: Matrices) -> Tensor:
    """Return XᵀY in the dtype of X, stacked, with zeros where a problem of a list is smaller."""
    return _inner_product(x, y, dtype_of(x), dtype_of(x), symmetric=False)


def gram(panel: Matrices) -> Tensor:
    """Return PᵀP in float64, stacked."""
    return _inner_product(panel, panel, torch.float64, torch.float64, symmetric=True)


def rounded_gram(panel: Matrices) -> Tensor:
    """Return PᵀP in float64, stacked, of products rounded to the panel's dtype."""
    return _inner_product(panel, panel, dtype_of(panel), torch.float64, symmetric=True)


def _inner_product(x: Matrices, y: Matrices, dtype: torch.dtype, out_dtype: torch.dtype, *, symmetric: bool) -> Tensor:
    r, k, n = columns(x), columns(y), rows(x)
    operands = arrange({"x": x, "y": y})
    target = target_of(x)
    config = configs.inner_product(target, dtype, r, k, operands.aligned)
    tiles = configs.tiles(r, config.blocks["BLOCK_R"]) * configs.tiles(k, config.blocks["BLOCK_K"])
    programs, block_n = tiles * operands.problems, config.blocks["BLOCK_N"]
    if out_dtype == torch.float64:
        splits = configs.long_splits(target, n, block_n, programs, dtype)
    else:
        splits = configs.splits(target, configs.tiles(n, block_n), programs)
    parts = torch.empty(operands.problems, splits, r, k, dtype=dtype, device=device_of(x))
    sizes = {"n": n, "r": r, "k": k, "SYMMETRIC": symmetric, "SPLITS": splits}
    arguments = operands.arguments | {"parts_ptr": parts} | sizes | products_in(target, dtype)
    start(inner_product_kernel, (splits * programs,), arguments, config)
    out = empty_stack(x, y, (r, k), out_dtype)
    sum_parts(parts, above=None if symmetric else out, below=out if symmetric else None)
    return out


def empty_stack(x: Matrices, y: Matrices, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised stack of small matrices, one per problem; a batch may share one X or one Y."""
    batch = (len(x),) if isinstance(x, list) else max(x.shape[:-2], y.shape[:-2], key=len)  # type: ignore[union-attr]
    return torch.empty(*batch, *shape, dtype=dtype, device=device_of(x))


def sum_parts(parts: Tensor, above: Tensor | None = None, below: Tensor | None = None) -> None:
    """Add up parts (problems, splits, rows, columns) in order, and write their rows to one or two contiguous matrices.

    The matrix ``below`` is symmetric: only entries of its parts on and above the diagonal are read.
    """
    count, splits, r, k = parts.shape
    config = configs.sum_parts()
    tiles = configs.tiles(r, config.blocks["BLOCK_R"]) * configs.tiles(k, config.blocks["BLOCK_K"])
    arguments = {
        "parts_ptr": parts, "above_ptr": above, "below_ptr": below,
        "first": 0 if above is None else above.shape[-2], "rows": r, "columns": k, "SPLITS": splits,
    }  # fmt: skip
    start(sum_parts_kernel, (count * tiles,), arguments, config)
