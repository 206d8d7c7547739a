"""C = FᵀA and G = AᵀA in one launch over F and A, and a second one that adds up the parts.

F is (n, r), A is (n, k). A program owns a tile of C, or a tile of G on or above the diagonal, and one stretch of rows.
It writes its part to a workspace in float64, and the second kernel adds the parts in their order: no atomic addition
takes part, so two runs are equal to the bit. Programs of one stretch are neighbours in the grid, so that they share its
rows in the cache.

Of float32 data a stretch has at most `configs.STRETCH` rows, whose products are summed in float32. The parts take
8k(r + k) bytes a stretch, written and read: beside the data of whole stretches, k/1024 of its bytes.

**Range.** A float32 product may overflow, or vanish, where its factors do not. A program looks at the largest entry of
its finished tile: if it is not finite, or so small that products may have lost digits, the program takes its stretch
again, of columns divided by powers of two near their largest entries, and multiplies these back in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from brandla_kernels._kernels import configs
from brandla_kernels._kernels.inner_product import wider
from brandla_kernels._kernels.launch import (
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
from brandla_kernels.cross_gram import cost
from brandla_kernels.tall import columns, device_of, dtype_of, rows

# A tile whose largest entry is below this is taken again: a stretch of products, each wrong by the smallest normal
# number, might be wrong by more than ε.
_LEAST = tl.constexpr(2.0**-90)
# Powers of two that columns are divided by: their own reciprocals are normal numbers.
_MOST_SCALE = tl.constexpr(2.0**100)
_LEAST_SCALE = tl.constexpr(2.0**-100)
_EXPONENT = tl.constexpr(0x7F800000)


@triton.jit
def _dot_over_rows(
    left, left_row, left_column, right, right_row, right_column, index_l, index_r, first, last, n, columns_l, columns_r,
    scale_l, scale_r,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sum products over rows ``first`` to ``last``, of columns times a scale unless it is None."""
    total = tl.zeros((index_l.shape[0], index_r.shape[0]), tl.float64 if COMPUTE == tl.float64 else tl.float32)
    for start_n in range(first, last, BLOCK_N):
        row = start_n + tl.arange(0, BLOCK_N)
        x = load_tile(left, left_row, left_column, row, index_l, n, columns_l, COMPUTE)  # [BLOCK_N, BLOCK_L]
        y = load_tile(right, right_row, right_column, row, index_r, n, columns_r, COMPUTE)  # [BLOCK_N, BLOCK_K]
        if scale_l is not None:
            x = x * scale_l
            y = y * scale_r
        total = tl.dot(tl.trans(x), y, total, input_precision=PRECISION, out_dtype=total.dtype)
    return total


@triton.jit
def _power_of_two(
    matrix, row_stride, column_stride, index, first, last, n, columns, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return a power of two near the largest finite |entry| in rows ``first`` to ``last``."""
    largest = tl.zeros((BLOCK_N, index.shape[0]), tl.float32)
    for start_n in range(first, last, BLOCK_N):
        row = start_n + tl.arange(0, BLOCK_N)
        entries = tl.abs(load_tile(matrix, row_stride, column_stride, row, index, n, columns, tl.float32))
        largest = tl.where((entries < float("inf")) & (entries > largest), entries, largest)
    exponent = tl.max(tl.max(largest, 1), 0).to(tl.int32, bitcast=True) & _EXPONENT
    return tl.minimum(tl.maximum(exponent.to(tl.float32, bitcast=True), _LEAST_SCALE), _MOST_SCALE)


@triton.jit
def _write_part(
    part, row, is_row, columns,
    left, left_row, left_column, right, right_row, right_column, index_l, index_r, first, last, n, columns_l, columns_r,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sum products over rows ``first`` to ``last``, and write them in float64 to the rows ``row`` of the part."""
    total = _dot_over_rows(
        left, left_row, left_column, right, right_row, right_column, index_l, index_r, first, last, n, columns_l,
        columns_r, None, None, COMPUTE, PRECISION, BLOCK_N,
    )  # fmt: skip
    factor = tl.full((), 1.0, tl.float64)
    if COMPUTE == tl.float32:
        size = tl.abs(total)
        # No comparison with NaN holds.
        largest = tl.max(tl.max(tl.where(size < float("inf"), size, float("inf")), 1), 0)
        if (largest < _LEAST) | (largest == float("inf")):
            power_l = _power_of_two(left, left_row, left_column, index_l, first, last, n, columns_l, BLOCK_N)
            power_r = _power_of_two(right, right_row, right_column, index_r, first, last, n, columns_r, BLOCK_N)
            total = _dot_over_rows(
                left, left_row, left_column, right, right_row, right_column, index_l, index_r, first, last, n,
                columns_l, columns_r, 1.0 / power_l, 1.0 / power_r, COMPUTE, PRECISION, BLOCK_N,
            )  # fmt: skip
            factor = power_l.to(tl.float64) * power_r.to(tl.float64)
    places = part + row.to(tl.int64)[:, None] * columns + index_r[None, :]
    tl.store(places, total.to(tl.float64) * factor, mask=is_row[:, None] & (index_r < columns)[None, :])


def _product_work(arguments: Mapping[str, Any]) -> Work:
    flops = sum(cost(n, r, k).flops for (n, r), (_, k) in shapes(arguments, "root", "data"))
    sizes = {letter: arguments[letter] for letter in ("n", "r", "k")}
    return Work({bits_of(arguments["COMPUTE"]): flops}, bytes_of(arguments, "root", "data", "parts"), sizes)


@counted(_product_work)
@triton.jit
def cross_gram_kernel(
    root_ptr, data_ptr, parts_ptr, table_ptr,
    n, r, k, r_most, k_most,
    root_strides, data_strides,
    ROOT_LAYOUT: tl.constexpr, DATA_LAYOUT: tl.constexpr, SPLITS: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid: problems × SPLITS × tiles of C, then of G. Parts: (problems, SPLITS, r_most + k_most, k_most)."""
    tiles_r = tl.cdiv(r_most, BLOCK_R)
    tiles_k = tl.cdiv(k_most, BLOCK_K)
    tiles = (tiles_r + tiles_k) * tiles_k
    tile_row = (tl.program_id(0) % tiles) // tiles_k
    tile_k = tl.program_id(0) % tiles_k
    split = (tl.program_id(0) // tiles) % SPLITS
    problem = (tl.program_id(0) // (tiles * SPLITS)).to(tl.int64)
    if tile_k < tile_row - tiles_r:
        # Below the diagonal of G.
        return
    root_entry = entry_of(table_ptr, problem, 0, 2)
    data_entry = entry_of(table_ptr, problem, 1, 2)
    n = rows_of(root_entry, n, ROOT_LAYOUT)
    k = columns_of(data_entry, k, DATA_LAYOUT)
    data, data_row, data_column = locate(data_entry, data_ptr, data_strides, problem, DATA_LAYOUT)

    index_k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    stretch = tl.cdiv(tl.cdiv(n, BLOCK_N), SPLITS) * BLOCK_N
    first = split * stretch
    # Not past the end of the stretch: the next program takes it up there.
    last = tl.minimum(first + stretch, n)
    part = parts_ptr + (problem * SPLITS + split) * (r_most + k_most) * k_most
    if tile_row < tiles_r:
        r = columns_of(root_entry, r, ROOT_LAYOUT)
        root, root_row, root_column = locate(root_entry, root_ptr, root_strides, problem, ROOT_LAYOUT)
        index_r = tile_row * BLOCK_R + tl.arange(0, BLOCK_R)
        _write_part(
            part, index_r, index_r < r_most, k_most,
            root, root_row, root_column, data, data_row, data_column, index_r, index_k, first, last, n, r, k,
            COMPUTE, PRECISION, BLOCK_N,
        )  # fmt: skip
    else:
        index_l = (tile_row - tiles_r) * BLOCK_K + tl.arange(0, BLOCK_K)
        _write_part(
            part, r_most + index_l, index_l < k_most, k_most,
            data, data_row, data_column, data, data_row, data_column, index_l, index_k, first, last, n, k, k,
            COMPUTE, PRECISION, BLOCK_N,
        )  # fmt: skip


def _sum_work(arguments: Mapping[str, Any]) -> Work:
    sizes = {"r": arguments["r"], "k": arguments["k"], "splits": arguments["SPLITS"]}
    return Work({}, bytes_of(arguments, "parts", "cross", "gram"), sizes)


@counted(_sum_work)
@triton.jit
def sum_cross_gram_kernel(
    parts_ptr, cross_ptr, gram_ptr, r, k, parts_size,
    SPLITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: problems × tiles of C on top of G. What lies below the diagonal of G is taken from its mirror image."""
    tiles_k = tl.cdiv(k, BLOCK_K)
    tiles = tl.cdiv(r + k, BLOCK_R) * tiles_k
    problem = (tl.program_id(0) // tiles).to(tl.int64)
    row = ((tl.program_id(0) % tiles) // tiles_k) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    column = (tl.program_id(0) % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    inside = (row < r + k) & (column < k)
    below = row - r > column
    from_row = tl.where(below, column + r, row)
    from_column = tl.where(below, row - r, column)
    source = parts_ptr + problem * SPLITS * parts_size + from_row.to(tl.int64) * k + from_column
    total = tl.zeros((BLOCK_R, BLOCK_K), tl.float64)
    for _ in range(SPLITS):
        total += tl.load(source, mask=inside, other=0.0)
        source += parts_size
    place = row.to(tl.int64) * k + column
    tl.store(cross_ptr + problem * r * k + place, total, mask=inside & (row < r))
    tl.store(gram_ptr + (problem * k - r) * k + place, total, mask=inside & (row >= r))


def cross_gram(root: Matrices, data: Matrices) -> tuple[Tensor, Tensor]:
    """Return FᵀA and AᵀA in float64, stacked, with zeros where a problem of a list is smaller."""
    r, k, n, dtype = columns(root), columns(data), rows(root), dtype_of(root)
    operands = arrange({"root": root, "data": data})
    target = target_of(root[0] if isinstance(root, list) else root)
    config = configs.cross_gram(target, dtype, r, k, operands.aligned)
    tiles_r, tiles_k = triton.cdiv(r, config.blocks["BLOCK_R"]), triton.cdiv(k, config.blocks["BLOCK_K"])
    busy = (tiles_r * tiles_k + tiles_k * (tiles_k + 1) // 2) * operands.problems
    splits = configs.long_splits(target, n, config.blocks["BLOCK_N"], busy, dtype)
    parts = torch.empty(operands.problems, splits, r + k, k, dtype=torch.float64, device=device_of(root))
    arguments = operands.arguments() | {
        "parts_ptr": parts, "n": n, "r": r, "k": k, "r_most": r, "k_most": k, "SPLITS": splits,
        "COMPUTE": triton_dtype(dtype), "PRECISION": product_precision(target, dtype),
    }  # fmt: skip
    start(cross_gram_kernel, (operands.problems * splits * (tiles_r + tiles_k) * tiles_k,), arguments, config)
    like = wider(root, data)
    cross, gram = (new_small(like, shape, torch.float64) for shape in ((r, k), (k, k)))
    adding = configs.sum_parts()
    blocks = adding.blocks
    tiles = triton.cdiv(r + k, blocks["BLOCK_R"]) * triton.cdiv(k, blocks["BLOCK_K"])
    summed = {
        "parts_ptr": parts, "cross_ptr": cross, "gram_ptr": gram, "r": r, "k": k, "parts_size": (r + k) * k,
        "SPLITS": splits,
    }  # fmt: skip
    start(sum_cross_gram_kernel, (operands.problems * tiles,), summed, adding)
    return cross, gram
