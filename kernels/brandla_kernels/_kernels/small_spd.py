"""The rank-aware Cholesky core of a batch of small matrices: one launch, with one program per matrix.

For G (k, k) the kernel writes T and the mask of its live columns; ``cholesky_inverse_core`` has the mathematics. Each
factorisation is of the equilibrated matrix E, with columns taken out or a shift added. It takes the columns in blocks
of BLOCK, as column operations on E with the identity on top,

    [ I ]             [ L⁻ᵀ ]
    [ E ]  ·  L⁻ᵀ  =  [  L  ],

so the inverse needs no second algorithm: at block j, for the rows i of both,

    Yᵢ = Cᵢ − Σ_p Tᵢₚ Lⱼₚᵀ,    Lⱼⱼ Lⱼⱼᵀ = Yⱼ,    Tᵢⱼ = Yᵢ Lⱼⱼ⁻ᵀ,

where C is E below block j and 0 above it. L⁻ᵀ is upper triangular and L is lower triangular, so both fit into the
output T. It holds L⁻ᵀ in the blocks on and above the diagonal, and L below it. At the end zeros overwrite L, and L⁻ᵀ is
scaled. The only other workspace holds one weight per column.

A loop over its columns factors and inverts the diagonal block in registers, with the same operations. Products with the
explicit inverse Lⱼⱼ⁻ᵀ alone would not be backward stable: two nearly equal columns in a block have a pivot of about the
shift δ, and then such products disturb later pivots by ε/√δ, which is far more than δ. One step of iterative
refinement, Y Lⱼⱼ⁻ᵀ + (Y − Y Lⱼⱼ⁻ᵀ Lⱼⱼᵀ) Lⱼⱼ⁻ᵀ, reduces the error to the ε of a substitution.

Different threads of a program write and read T. Only later blocks read the columns of a block, so one barrier after
each block is enough; two more surround the diagonal block's way through memory. (Barriers order a program's shared and
global memory. On gfx942 and gfx950 LLVM adds no wait for stores to them, since a program's waves share one cache.)
Programs share nothing. Loops and branches depend on values that are the same in all threads, and sums have a fixed
order, so two runs are equal to the bit.

``docs/kernels.md`` counts what bounds this kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from brandla_kernels._kernels import configs, launch
from brandla_kernels._kernels.matrices import arrange, load_tile, matrix_of, store_tile
from brandla_kernels.cholesky_inverse_core import cost

# The factorisations, in order. The even ones have no shift, and no other follows if they succeed.
WHOLE = tl.constexpr(0)  # all columns of positive scale: enough if every one of them stands out
SHIFTED = tl.constexpr(1)  # the same plus δ: its inverse tells which columns live
MASKED = tl.constexpr(2)  # the live columns
AGAIN = tl.constexpr(3)  # the shifted one once more, if the live columns broke down
DONE = tl.constexpr(4)


@triton.jit
def factor_block(block, least, BLOCK: tl.constexpr):
    """Return the Cholesky factor of a tile that is symmetric to the bit, its transposed inverse, and the pivots.

    A column whose pivot is at most ``least`` becomes zero in the factor and in the inverse, as if it were absent.
    """
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inverse = tl.where(row == column, 1.0, 0.0).to(block.dtype)
    for step in range(BLOCK):
        pivot_row = tl.sum(tl.where(row == step, block, 0.0), 0, keep_dims=True)
        pivot = tl.sum(tl.where(column == step, pivot_row, 0.0), 1, keep_dims=True)
        reciprocal = tl.where(pivot <= least, 0.0, 1 / tl.where(pivot <= least, 1.0, pivot))
        reciprocal = tl.where(column > step, reciprocal, 0.0)
        here = tl.zeros((BLOCK, 1), tl.int32) + step
        # This order of products keeps the tile symmetric to the bit, so a row can stand for its column.
        block -= tl.gather(block, here, 1) * pivot_row * reciprocal
        inverse -= tl.gather(inverse, here, 1) * pivot_row * reciprocal
    pivots = tl.sum(tl.where(row == column, block, 0.0), 0)[None, :]
    # NaN is not <= least, so it stays NaN.
    inverse_root = tl.where(pivots <= least, 0.0, 1 / tl.sqrt(tl.where(pivots <= least, 1.0, pivots)))
    return tl.where(row >= column, block * inverse_root, 0.0), inverse * inverse_root, pivots


@triton.jit
def symmetric(scratch, index, block):
    """Make a diagonal block symmetric to the bit: store it, and load its lower triangle in place of both triangles.

    The result has the layout of a load. A product's layout, over several warps, would cost the column loop three times
    the barriers.
    """
    store_tile(scratch, index, index, block)
    tl.debug_barrier()
    lower, upper = tl.maximum(index[:, None], index[None, :]), tl.minimum(index[:, None], index[None, :])
    block = tl.load(scratch[0] + lower.to(tl.int64) * scratch[1] + upper, mask=lower < scratch[3], other=0.0)
    tl.debug_barrier()
    return block


@triton.jit
def solved_by(inverse, factor, tile, PRECISION: tl.constexpr):
    """Return the tile times the transposed inverse of a factor, with one step of refinement."""
    solved = tl.dot(tile, inverse, input_precision=PRECISION, out_dtype=tile.dtype)
    rest = tile - tl.dot(solved, tl.trans(factor), input_precision=PRECISION, out_dtype=tile.dtype)
    return tl.dot(rest, inverse, solved, input_precision=PRECISION, out_dtype=tile.dtype)


@triton.jit
def _store_weights(weight, scale, scale_stride, live, marked, k, BLOCK_ROWS: tl.constexpr):
    """Store the weights of rows and columns of G: 1 / scale, or 0 for columns that are taken out.

    Columns of scale 0 are taken out, and so are dead columns among the first ``marked``, which is k or 0.
    """
    for start in range(0, k, BLOCK_ROWS):
        index = start + tl.arange(0, BLOCK_ROWS)
        length = tl.load(scale + index.to(tl.int64) * scale_stride, mask=index < k, other=0.0)
        kept = tl.load(live + index, mask=index < marked, other=True)
        # A comparison with NaN is false.
        inverse = tl.where(length > 0, 1 / tl.where(length > 0, length, 1.0), 0.0)
        tl.store(weight + index, tl.where(kept, inverse, 0.0), mask=index < k)


@triton.jit
def _equilibrated(gram, weight, row, column, inside):
    """Load a tile of E, with 0 where it is not ``inside``; a weight of 0 does not hide NaN."""
    offsets = row.to(tl.int64)[:, None] * gram[1] + column.to(tl.int64)[None, :] * gram[2]
    row_weight = tl.load(weight + row, mask=row < gram[3], other=0.0)
    column_weight = tl.load(weight + column, mask=column < gram[3], other=0.0)
    return tl.load(gram[0] + offsets, mask=inside, other=0.0) * row_weight[:, None] * column_weight[None, :]


@triton.jit
def _earlier(transform, row, column, first, stop, BLOCK: tl.constexpr, BLOCK_INNER: tl.constexpr):
    """Return Σ_p T[row, p] T[column, p]ᵀ over p from ``first`` to ``stop``; L⁻ᵀ is 0 before its diagonal blocks."""
    total = tl.zeros((row.shape[0], BLOCK), tl.float64)
    for start in range(first, stop, BLOCK_INNER):
        inner = start + tl.arange(0, BLOCK_INNER)
        stored = (row >= stop)[:, None] | ((inner // BLOCK)[None, :] >= (row // BLOCK)[:, None])
        inside = (row < transform[3])[:, None] & (inner < stop)[None, :] & stored
        places = transform[0] + row.to(tl.int64)[:, None] * transform[1] + inner[None, :]
        left = tl.load(places, mask=inside, other=0.0)
        earlier = (transform[0], transform[1], 1, transform[3], stop)
        right = load_tile(earlier, column, inner, tl.float64)  # [BLOCK, BLOCK_INNER]
        total = tl.dot(left, tl.trans(right), total, input_precision="ieee", out_dtype=tl.float64)
    return total


@triton.jit
def _finish(transform, live, weight, k, BLOCK_ROWS: tl.constexpr, BLOCK_INNER: tl.constexpr):
    """Scale the rows of L⁻ᵀ; clear the rows and columns that are taken out, and all entries below the diagonal."""
    for start in range(0, k, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        row_lives = tl.load(live + row, mask=row < k, other=False)
        row_weight = tl.load(weight + row, mask=row < k, other=0.0) * row_lives.to(tl.float64)
        for start_column in range(0, k, BLOCK_INNER):
            column = start_column + tl.arange(0, BLOCK_INNER)
            lives = tl.load(live + column, mask=column < k, other=False)
            upper = row[:, None] <= column[None, :]
            inside = (row < k)[:, None] & (column < k)[None, :]
            address = transform[0] + row.to(tl.int64)[:, None] * k + column[None, :]
            tile = tl.load(address, mask=inside & upper, other=0.0)
            tile = tile * row_weight[:, None] * lives.to(tl.float64)[None, :]
            tl.store(address, tl.where(upper, tile, 0.0), mask=inside)


@launch.counted("k", lambda _, gram, scale: cost(gram[0]).flops)
@triton.jit
def small_spd_kernel(
    gram_ptr, scale_ptr, transform_ptr, live_ptr, weight_ptr, table_ptr,
    k, threshold: tl.float64,
    gram_strides, scale_strides,
    GRAM_LAYOUT: tl.constexpr, SCALE_LAYOUT: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """Grid: (problems,). T (k, k), the mask (k) and the weights of rows and columns (k) are contiguous."""
    problem = tl.program_id(0).to(tl.int64)
    gram = matrix_of(table_ptr, problem, gram_ptr, gram_strides, k, k, GRAM_LAYOUT, 0, 2)
    scale = matrix_of(table_ptr, problem, scale_ptr, scale_strides, k, 1, SCALE_LAYOUT, 1, 2)
    transform = (transform_ptr + problem * k * k, k, 1, k, k)
    live = live_ptr + problem * k
    weight = weight_ptr + problem * k

    task = WHOLE
    while task < DONE:
        shift = tl.where(task % 2 == 1, threshold * 0.25, 0.0)
        marked = tl.where(task == MASKED, k, 0)
        _store_weights(weight, scale[0], scale[1], live, marked, k, BLOCK_ROWS)
        tl.debug_barrier()
        sound = True
        start = 0
        while start < k:
            stop = start + BLOCK
            column = start + tl.arange(0, BLOCK)
            kept = tl.load(weight + column, mask=column < k, other=0.0) > 0
            inside = (column < k)[:, None] & (column < k)[None, :]
            block = _equilibrated(gram, weight, column, column, inside)
            block -= _earlier(transform, column, column, 0, start, BLOCK, BLOCK_INNER)
            block = symmetric(transform, column, block)
            added = tl.where(kept, shift, 1 + shift)  # a column that is taken out gets a unit pivot
            block += tl.where(column[:, None] == column[None, :], added[None, :], 0.0)
            factor, inverse, pivots = factor_block(block, 0.0, BLOCK)
            positive = tl.min((pivots > 0).to(tl.int32)) == 1
            store_tile(transform, column, column, inverse)
            growth = tl.sum(inverse * inverse, 0)  # squared lengths of the columns of L⁻ᵀ

            for start_row in range(0, k, BLOCK_ROWS):
                row = start_row + tl.arange(0, BLOCK_ROWS)
                above = (row < start)[:, None]
                below = ((row >= stop) & (row < k))[:, None] & (column < k)[None, :]
                first = tl.where(start_row + BLOCK_ROWS <= start, start_row, 0)  # rows of L⁻ᵀ begin at the diagonal
                tile = _equilibrated(gram, weight, row, column, below)
                tile -= _earlier(transform, row, column, first, start, BLOCK, BLOCK_INNER)
                solved = solved_by(inverse, factor, tile, "ieee")
                outside = (above & (column < k)[None, :]) | below
                tl.store(transform[0] + row.to(tl.int64)[:, None] * k + column[None, :], solved, mask=outside)
                growth += tl.sum(tl.where(above, solved * solved, 0.0), 0)

            if task < MASKED:
                # A growth of 0 comes from a pivot that is not positive.
                stands_out = kept & (growth > 0) & (growth * threshold < 1)
                tl.store(live + column, stands_out, mask=column < k)
                if task == WHOLE:
                    positive = positive & (tl.min((stands_out == kept).to(tl.int32)) == 1)
            sound = sound & positive
            # Later blocks read what other threads have written here.
            tl.debug_barrier()
            start = tl.where(sound | (shift > 0), stop, k)  # without a shift, the first failure ends it
        task = tl.where(sound & (task % 2 == 0), DONE, task + 1)
    _finish(transform, live, weight, k, BLOCK_ROWS, BLOCK_INNER)


def cholesky_inverse_core(gram: Tensor, scale: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return T (..., k, k) and the mask (..., k) of its live columns.

    Like the torch form on a CPU, the kernel factors the whole matrix first: one factorisation is enough if all columns
    of positive scale stand out. If they do not, this order costs up to one factorisation more.
    """
    k = gram.shape[-1]
    transform = gram.new_empty(gram.shape)
    live = gram.new_empty(gram.shape[:-1], dtype=torch.bool)
    if transform.numel() == 0:
        return transform, live
    operands = arrange({"gram": gram, "scale": scale[..., None]})
    arguments = operands.arguments | {
        "transform_ptr": transform, "live_ptr": live, "weight_ptr": gram.new_empty(gram.shape[:-1]),
        "k": k, "threshold": threshold,
    }  # fmt: skip
    config = configs.small_spd(launch.target_of(gram), k)
    launch.start(small_spd_kernel, (operands.problems,), arguments, config)
    return transform, live
