"""M ← ρ M + w A Aᵀ in place: one triangle of tiles is computed, both are written.

M is symmetric (n, n), A is (n, k). A program owns the tile (i, j), i ≥ j, and its mirror image (j, i): it sums A_i A_jᵀ
over k, reads the tile (i, j) of M, and writes the new tile and its transpose. This leaves out half the products of a
general update, and reads half of M. Entries of M above the diagonal are never read, so the result is symmetric to the
bit even if M was symmetric to rounding only. No program reads an entry that another one writes.

If M has few tiles and k is large, the columns are split: a program sums one tile over one stretch of columns into a
workspace, and a second kernel adds the stretches in their order and updates M.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from brandla_kernels._kernels import configs
from brandla_kernels._kernels.launch import counted, products_in, start, target_of, triton_dtype
from brandla_kernels._kernels.matrices import aligned, arrange, load_tile, matrix_of, place_of, store_tile, stretch_of
from brandla_kernels._signature import Matrices
from brandla_kernels.gram_ema import cost
from brandla_kernels.tall import columns, device_of, dtype_of, rows

# Rows of tiles in a band. The grid goes through a band column by column, so that programs which run at the same time
# share their A_i and A_j in the cache.
_BAND = tl.constexpr(8)


@triton.jit
def _row_in_triangle(index):
    """Return the row i of entry ``index`` of a triangle counted by rows: i(i + 1)/2 ≤ index < (i + 1)(i + 2)/2."""
    index = index.to(tl.int64)
    row = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int64)
    # A grid has less than 2³¹ programs, so i < 2¹⁶, and the root in float32 is at most one off.
    row = tl.where((row * (row + 1)) >> 1 > index, row - 1, row)
    return tl.where(((row + 1) * (row + 2)) >> 1 <= index, row + 1, row)


@triton.jit
def tile_in_triangle(index, tiles):
    """Return (i, j), i ≥ j, of the tile at place ``index`` in a triangle of ``tiles`` rows, band by band."""
    top = _row_in_triangle(index) // _BAND * _BAND
    height = tl.minimum(_BAND, tiles - top)
    place = index - ((top * (top + 1)) >> 1)
    if place < top * height:
        row = place % height
        column = place // height
    else:
        place -= top * height
        row = _row_in_triangle(place)
        column = top + place - ((row * (row + 1)) >> 1)
    return top + row, column


@triton.jit
def tiles_of_triangle(across):
    """Return how many tiles lie on and below the diagonal of ``across`` × ``across``."""
    return (across * (across + 1)) // 2


@triton.jit
def _update_entries(m, row, column, total, decay, weight):
    """Write ρ M + w ``total`` to these entries of M on and below the diagonal, and to their mirror images.

    ρ and w are rounded to the precision of the sum: with float64 scalars the tile would take twice the registers.
    """
    decay = tl.full((1, 1), decay, total.dtype)
    weight = tl.full((1, 1), weight, total.dtype)
    row, column = row.to(tl.int64), column.to(tl.int64)
    lower = (row < m[3])[:, None] & (row[:, None] >= column[None, :])
    places = m[0] + row[:, None] * m[1] + column[None, :] * m[2]
    new = tl.load(places, mask=lower, other=0.0).to(total.dtype) * decay + total * weight
    tl.store(places, new, mask=lower)
    upper = (row < m[3])[None, :] & (column[:, None] < row[None, :])
    tl.store(m[0] + column[:, None] * m[1] + row[None, :] * m[2], tl.trans(new), mask=upper)


@counted(
    "n k",
    lambda _, m, a: cost(m[0], a[1]).flops,
    # This kernel reads and writes M, unless the one that adds up the stretches does.
    lambda given: {"m_ptr": 2 if given["SPLITS"] == 1 else 0},
)
@triton.jit
def symmetric_product_kernel(
    m_ptr, a_ptr, parts_ptr, table_ptr,
    n, k, decay: tl.float64, weight: tl.float64,
    m_strides, a_strides,
    M_LAYOUT: tl.constexpr, A_LAYOUT: tl.constexpr,
    SPLITS: tl.constexpr, TOTAL: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: problems × SPLITS × tiles of a triangle. Parts, with SPLITS > 1: (problems, SPLITS, tiles, tile)."""
    problem, split, _, index = place_of(1, tiles_of_triangle(tl.cdiv(n, BLOCK_N)), SPLITS)
    m = matrix_of(table_ptr, problem, m_ptr, m_strides, n, n, M_LAYOUT, 0, 2)
    a = matrix_of(table_ptr, problem, a_ptr, a_strides, n, k, A_LAYOUT, 1, 2)
    tiles = tl.cdiv(m[3], BLOCK_N).to(tl.int64)
    # A problem of a list may be smaller than the largest.
    if index >= tiles_of_triangle(tiles):
        return
    tile_i, tile_j = tile_in_triangle(index, tiles)
    row_i = tile_i * BLOCK_N + tl.arange(0, BLOCK_N)
    row_j = tile_j * BLOCK_N + tl.arange(0, BLOCK_N)
    first, last = stretch_of(a[4], split, SPLITS, BLOCK_K)
    total = tl.zeros((BLOCK_N, BLOCK_N), TOTAL)
    for start_k in range(first, last, BLOCK_K):
        column = start_k + tl.arange(0, BLOCK_K)
        left = load_tile(a, row_i, column, COMPUTE)  # [BLOCK_N, BLOCK_K]
        right = load_tile(a, row_j, column, COMPUTE)  # [BLOCK_N, BLOCK_K]
        total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION, out_dtype=TOTAL)
    if SPLITS == 1:
        # Half the columns at a time, so that entries and addresses of M take fewer registers.
        left, right = total.reshape(BLOCK_N, 2, BLOCK_N // 2).permute(0, 2, 1).split()
        column = tile_j * BLOCK_N + tl.arange(0, BLOCK_N // 2)
        _update_entries(m, row_i, column, left, decay, weight)
        _update_entries(m, row_i, column + BLOCK_N // 2, right, decay, weight)
    else:
        part = (problem * SPLITS + split) * tiles_of_triangle(tl.cdiv(n, BLOCK_N)) + index
        inner = tl.arange(0, BLOCK_N)
        store_tile((parts_ptr + part * BLOCK_N * BLOCK_N, BLOCK_N, 1, BLOCK_N, BLOCK_N), inner, inner, total)


@counted("n SPLITS", times=lambda given: {"m_ptr": 2})
@triton.jit
def symmetric_update_kernel(
    m_ptr, parts_ptr, table_ptr, n, decay: tl.float64, weight: tl.float64, m_strides,
    M_LAYOUT: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid: problems × tiles of a triangle. The second half of a split product: sum of the parts, then the update."""
    programs = tiles_of_triangle(tl.cdiv(n, BLOCK_N))
    problem, _, _, index = place_of(1, programs, 1)
    m = matrix_of(table_ptr, problem, m_ptr, m_strides, n, n, M_LAYOUT, 0, 2)
    tiles = tl.cdiv(m[3], BLOCK_N).to(tl.int64)
    if index >= tiles_of_triangle(tiles):
        return
    tile_i, tile_j = tile_in_triangle(index, tiles)
    inner = tl.arange(0, BLOCK_N)
    # A quarter of the columns at a time: the addresses of both triangles take four registers per entry beside the sum.
    for first in range(0, BLOCK_N, BLOCK_N // 4):
        column = first + tl.arange(0, BLOCK_N // 4)
        total = tl.zeros((BLOCK_N, BLOCK_N // 4), parts_ptr.dtype.element_ty)
        for split in range(SPLITS):
            part = parts_ptr + ((problem * SPLITS + split) * programs + index) * BLOCK_N * BLOCK_N
            total += tl.load(part + inner[:, None] * BLOCK_N + column[None, :])
        _update_entries(m, tile_i * BLOCK_N + inner, tile_j * BLOCK_N + column, total, decay, weight)


def symmetric_update(matrix: Matrices, added: Matrices, decay: float, weight: float) -> None:
    """Overwrite M with ``decay`` M + ``weight`` A Aᵀ, M symmetric, A = ``added``."""
    operands, target = arrange({"m": matrix, "a": added}), target_of(matrix)
    n, k, total = rows(matrix), columns(added), dtype_of(matrix)
    # Half-precision data under a float32 M go to the matrix units as they are: their products are exact in float32.
    # For the interpreter they are converted, since its arithmetic on bfloat16 is wrong.
    native = total == torch.float32 and dtype_of(added).itemsize == 2 and target.backend != "interpreter"
    compute = dtype_of(added) if native else total
    config = configs.symmetric_product(target, compute, n, aligned(matrix) and aligned(added))
    block = config.blocks["BLOCK_N"]
    across = configs.tiles(n, block)
    tiles = across * (across + 1) // 2
    splits = configs.splits(target, configs.tiles(k, config.blocks["BLOCK_K"]), tiles * operands.problems)
    parts: Tensor | None = None
    if splits > 1:
        parts = torch.empty(operands.problems, splits, tiles, block, block, dtype=total, device=device_of(matrix))
    common = operands.arguments | {"parts_ptr": parts, "n": n, "decay": decay, "weight": weight, "SPLITS": splits}
    product = common | {"k": k, "TOTAL": triton_dtype(total)} | products_in(target, compute)
    start(symmetric_product_kernel, (operands.problems * splits * tiles,), product, config)
    if splits > 1:
        update = {name: common[name] for name in symmetric_update_kernel.arg_names if name in common}
        start(symmetric_update_kernel, (operands.problems * tiles,), update, configs.symmetric_update(target, block))
