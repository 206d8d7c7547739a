"""C = FᵀA and G = AᵀA in one launch over F and A, and a second launch that adds up the parts.

F is (n, r), A is (n, k). A program owns a tile of C, or a tile of G on or above the diagonal, and one stretch of rows.
It writes its part to a workspace in float64, and the second kernel adds the parts in their order. There are no atomic
additions, so two runs are equal to the bit. Programs of one stretch are neighbours in the grid, so they share its rows
in the cache.

For float32 data a stretch has at most `configs.STRETCH` rows, and its products are summed in float32. Its part takes
8k(r + k) bytes, written once and read once: together k/1024 of the bytes of a full stretch.

**Range.** A float32 product may overflow or vanish although its factors do not. A program looks at the largest entry of
its finished tile. If this is not finite, or so small that products may have lost digits, the program sums its stretch
again: now it divides each side's columns by a power of two near their largest entry, and multiplies back in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from brandla_kernels._kernels import configs
from brandla_kernels._kernels.inner_product import empty_stack, sum_over_rows, sum_parts
from brandla_kernels._kernels.launch import counted, products_in, start, target_of
from brandla_kernels._kernels.matrices import arrange, load_tile, matrix_of, place_of, store_tile, stretch_of
from brandla_kernels._signature import Matrices
from brandla_kernels.cross_gram import cost
from brandla_kernels.tall import columns, device_of, dtype_of, rows

# A tile whose largest entry is smaller is summed again: if each product of a stretch is wrong by the smallest normal
# number, their sum might be wrong by more than ε.
_LEAST = tl.constexpr(2.0**-90)
# Limits on the powers of two that columns are divided by: within them a reciprocal is a normal number.
_MOST_SCALE = tl.constexpr(2.0**100)
_LEAST_SCALE = tl.constexpr(2.0**-100)
_EXPONENT = tl.constexpr(0x7F800000)


@triton.jit
def _power_of_two(matrix, index, first, last, BLOCK_N: tl.constexpr):
    """Return a power of two near the largest finite |entry| in rows ``first`` to ``last``."""
    largest = tl.zeros((BLOCK_N, index.shape[0]), tl.float32)
    for start_n in range(first, last, BLOCK_N):
        entries = tl.abs(load_tile(matrix, start_n + tl.arange(0, BLOCK_N), index, tl.float32))
        largest = tl.where((entries < float("inf")) & (entries > largest), entries, largest)
    exponent = tl.max(tl.max(largest, 1), 0).to(tl.int32, bitcast=True) & _EXPONENT
    return tl.minimum(tl.maximum(exponent.to(tl.float32, bitcast=True), _LEAST_SCALE), _MOST_SCALE)


@triton.jit
def _write_part(
    part, left, index_l, right, index_r, first, last,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sum products over rows ``first`` to ``last``, and write the sums to a tile of the part in float64."""
    total = sum_over_rows(left, index_l, right, index_r, first, last, None, None, COMPUTE, PRECISION, BLOCK_N)
    factor = tl.full((), 1.0, tl.float64)
    if COMPUTE == tl.float32:
        size = tl.abs(total)
        # A comparison with NaN is false: NaN counts as infinite.
        largest = tl.max(tl.max(tl.where(size < float("inf"), size, float("inf")), 1), 0)
        if (largest < _LEAST) | (largest == float("inf")):
            power_l = _power_of_two(left, index_l, first, last, BLOCK_N)
            power_r = _power_of_two(right, index_r, first, last, BLOCK_N)
            total = sum_over_rows(
                left, index_l, right, index_r, first, last, 1.0 / power_l, 1.0 / power_r, COMPUTE, PRECISION, BLOCK_N
            )
            factor = power_l.to(tl.float64) * power_r.to(tl.float64)
    store_tile(part, index_l, index_r, total.to(tl.float64) * factor)


@counted("n r k", lambda _, root, data: cost(root[0], root[1], data[1]).flops)
@triton.jit
def cross_gram_kernel(
    root_ptr, data_ptr, parts_ptr, table_ptr,
    n, r, k,
    root_strides, data_strides,
    ROOT_LAYOUT: tl.constexpr, DATA_LAYOUT: tl.constexpr, SPLITS: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid: problems × SPLITS × tiles of C, then of G. Parts: (problems, SPLITS, r + k, k), C on top of G."""
    tiles_r, tiles_k = tl.cdiv(r, BLOCK_R), tl.cdiv(k, BLOCK_K)
    problem, split, tile_row, tile_k = place_of(tiles_r + tiles_k, tiles_k, SPLITS)
    if tile_k < tile_row - tiles_r:
        # This tile of G lies below the diagonal.
        return
    root = matrix_of(table_ptr, problem, root_ptr, root_strides, n, r, ROOT_LAYOUT, 0, 2)
    data = matrix_of(table_ptr, problem, data_ptr, data_strides, n, k, DATA_LAYOUT, 1, 2)
    first, last = stretch_of(root[3], split, SPLITS, BLOCK_N)
    part = parts_ptr + (problem * SPLITS + split) * (r + k) * k
    index_k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    if tile_row < tiles_r:
        index_r = tile_row * BLOCK_R + tl.arange(0, BLOCK_R)
        _write_part((part, k, 1, r, k), root, index_r, data, index_k, first, last, COMPUTE, PRECISION, BLOCK_N)
    else:
        index_l = (tile_row - tiles_r) * BLOCK_K + tl.arange(0, BLOCK_K)
        _write_part((part + r * k, k, 1, k, k), data, index_l, data, index_k, first, last, COMPUTE, PRECISION, BLOCK_N)


def cross_gram(root: Matrices, data: Matrices) -> tuple[Tensor, Tensor]:
    """Return FᵀA and AᵀA in float64, stacked, with zeros where a problem of a list is smaller."""
    r, k, n, dtype = columns(root), columns(data), rows(root), dtype_of(root)
    operands, target = arrange({"root": root, "data": data}), target_of(root)
    config = configs.cross_gram(target, dtype, r, k, operands.aligned)
    tiles_r, tiles_k = configs.tiles(r, config.blocks["BLOCK_R"]), configs.tiles(k, config.blocks["BLOCK_K"])
    # Programs below the diagonal of G return at once, and do not count.
    programs = (tiles_r * tiles_k + tiles_k * (tiles_k + 1) // 2) * operands.problems
    splits = configs.long_splits(target, n, config.blocks["BLOCK_N"], programs, dtype)
    parts = torch.empty(operands.problems, splits, r + k, k, dtype=torch.float64, device=device_of(root))
    sizes = {"n": n, "r": r, "k": k, "SPLITS": splits}
    arguments = operands.arguments | {"parts_ptr": parts} | sizes | products_in(target, dtype)
    start(cross_gram_kernel, (operands.problems * splits * (tiles_r + tiles_k) * tiles_k,), arguments, config)
    cross, gram = (empty_stack(root, data, shape, torch.float64) for shape in ((r, k), (k, k)))
    sum_parts(parts, cross, gram)
    return cross, gram
