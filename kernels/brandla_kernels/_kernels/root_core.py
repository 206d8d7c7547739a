"""The small core of a root's update in one launch, one program a factor; ``root_core`` has the mathematics.

All lies in a workspace of 3m² + 2ms numbers a factor, m = r + k, which the second-level cache holds, and is computed in
float64. One phase follows another, with a barrier between them:

1. K, its largest diagonal entry, whether it is finite, the trace that A adds; then K over that entry, and its norm.
2. K + σI = ΛΛᵀ, Λ = Rᵀ; the squared lengths of the columns of Λ are the diagonal of L = ΛᵀΛ; their descending order.
3. ΠᵀLΠ, its factor Λ₂, and the order of the lengths of the columns of that.
4. Y = RᵀLΠΛ₂Z = (K + σI) (ΛΠ) (Λ₂Z), with unit columns, and W = orth(Y).
5. X = KW and S⁺ = WᵀX; what falls below the tolerance; ‖K − XWᵀ − W(X − WS⁺)ᵀ‖_F; the results.

**Factorisations** take the columns in blocks of BLOCK, as `small_spd` does, with its step of refinement. A pivot that
is not positive drops its column. An order is a count: for each entry, how many are larger, or equal and before it.

**W = orth(Y)** goes over blocks of BLOCK columns, three times over each: less its projection on the columns before it,
and times the inverse Cholesky factor of its Gram matrix. The first time a shift takes the place of weak pivots, the
second time columns with a pivot below rounding become zero, the third time those that lost three quarters of their
squared length, which were rounding noise ("twice is enough").

Programs share nothing, loops and branches depend on values that are the same in all threads, and sums have a fixed
order, so two runs are equal to the bit. Barriers and memory: as in `small_spd`.

**What bounds it**, by count: nothing has been measured on a GPU. 2m + 3s steps of a column loop follow one another,
some 400 cycles each: at r = 128, k = 64, s = 128 that is 768 steps, 180 µs at 1.7 GHz. The flops beside them, 65 Mflop
there, take 130 µs at the 0.5 TFLOP/s in float64 of a multiprocessor of an H100 at best, and grow with m³: 1.8 ms at
m = 512, whether for one factor or for as many as there are multiprocessors. Latencies of loads come on top: twice these
times are to be expected. So up to order 128, and for a network, one launch takes the place of some 85; for one factor
of order 512 torch's factorisations and products, on the whole device, are the quicker way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from brandla_kernels._kernels import configs, launch
from brandla_kernels._kernels.launch import Work
from brandla_kernels._kernels.matrices import arrange, bytes_of, entry_of, load_tile, locate, store_tile
from brandla_kernels.root_core import cost


@triton.jit
def _core_tile(
    gram, gram_row, gram_column, cross, cross_row, cross_column, own, own_row, own_column, decay, weight, row, column,
    r, m,
):  # fmt: skip
    """Load a tile of K in float64, with 0 outside."""
    old_row, old_column = (row < r)[:, None], (column < r)[None, :]
    inside = (row < m)[:, None] & (column < m)[None, :]
    wide_row, wide_column = row.to(tl.int64)[:, None], column.to(tl.int64)[None, :]
    places = gram + wide_row * gram_row + wide_column * gram_column
    total = tl.load(places, mask=inside & old_row & old_column, other=0.0).to(tl.float64) * decay
    places = cross + wide_row * cross_row + (wide_column - r) * cross_column
    part = tl.load(places, mask=inside & old_row & (column >= r)[None, :], other=0.0)
    places = cross + wide_column * cross_row + (wide_row - r) * cross_column
    part += tl.load(places, mask=inside & (row >= r)[:, None] & old_column, other=0.0)
    total += part * tl.sqrt(decay * weight)
    places = own + (wide_row - r) * own_row + (wide_column - r) * own_column
    total += tl.load(places, mask=inside & (row >= r)[:, None] & (column >= r)[None, :], other=0.0) * weight
    return tl.where(inside, total, 0.0)


@triton.jit
def _product(
    left, left_row, left_column, row, right, right_row, right_column, column, inner_map, first, last, rows, columns,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """Return Σ_p X[row, p] Y[p, column] over p from ``first`` to ``last``, of X[row, map[p]] where there is a map."""
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float64)
    for start in range(first, last, BLOCK_INNER):
        inner = start + tl.arange(0, BLOCK_INNER)
        x_inner = inner
        if inner_map is not None:
            x_inner = tl.load(inner_map + inner, mask=inner < last, other=last)
        x = load_tile(left, left_row, left_column, row, x_inner, rows, last, tl.float64)
        y = load_tile(right, right_row, right_column, inner, column, last, columns, tl.float64)
        total = tl.dot(x, y, total, input_precision="ieee", out_dtype=tl.float64)
    return total


@triton.jit
def _symmetric(scratch, block, BLOCK: tl.constexpr):
    """Make a diagonal block symmetric to the bit, by way of memory: its lower triangle is read for both."""
    index = tl.arange(0, BLOCK)
    tl.store(scratch + index[:, None] * BLOCK + index[None, :], block)
    tl.debug_barrier()
    lower, upper = tl.maximum(index[:, None], index[None, :]), tl.minimum(index[:, None], index[None, :])
    block = tl.load(scratch + lower * BLOCK + upper)
    tl.debug_barrier()
    return block


@triton.jit
def _factor_block(block, least, BLOCK: tl.constexpr):
    """Return the Cholesky factor of a symmetric tile and its transposed inverse: 0 where a pivot is at most ``least``.

    As in `small_spd`: the order of the products keeps the tile symmetric to the bit.
    """
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inverse = tl.where(row == column, 1.0, 0.0).to(tl.float64)
    for step in range(BLOCK):
        pivot_row = tl.sum(tl.where(row == step, block, 0.0), 0, keep_dims=True)
        pivot = tl.sum(tl.where(column == step, pivot_row, 0.0), 1, keep_dims=True)
        reciprocal = tl.where(pivot <= least, 0.0, 1 / tl.where(pivot <= least, 1.0, pivot))
        reciprocal = tl.where(column > step, reciprocal, 0.0)
        here = tl.zeros((BLOCK, 1), tl.int32) + step
        block -= tl.gather(block, here, 1) * pivot_row * reciprocal
        inverse -= tl.gather(inverse, here, 1) * pivot_row * reciprocal
    pivots = tl.sum(tl.where(row == column, block, 0.0), 0)[None, :]
    inverse_root = tl.where(pivots <= least, 0.0, 1 / tl.sqrt(tl.where(pivots <= least, 1.0, pivots)))
    return tl.where(row >= column, block * inverse_root, 0.0), inverse * inverse_root


@triton.jit
def _cholesky(
    source, factor, scratch, m, shift,
    BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """Factor a matrix plus ``shift`` on its diagonal, of which the lower triangle is read; it may be overwritten."""
    index = tl.arange(0, BLOCK)
    for start in range(0, m, BLOCK):
        column = start + index
        stop = start + BLOCK
        block = load_tile(source, m, 1, column, column, m, m, tl.float64)
        block -= _product(factor, m, 1, column, factor, 1, m, column, None, 0, start, m, m, BLOCK, BLOCK, BLOCK_INNER)
        block += tl.where(index[:, None] == index[None, :], tl.where(column < m, shift, 1.0)[None, :], 0.0)
        lower, inverse = _factor_block(_symmetric(scratch, block, BLOCK), 0.0, BLOCK)
        store_tile(factor, m, 1, column, column, m, m, lower)
        for start_row in range(stop, m, BLOCK_ROWS):
            row = start_row + tl.arange(0, BLOCK_ROWS)
            tile = load_tile(source, m, 1, row, column, m, m, tl.float64)
            tile -= _product(
                factor, m, 1, row, factor, 1, m, column, None, 0, start, m, m, BLOCK_ROWS, BLOCK, BLOCK_INNER
            )
            solved = tl.dot(tile, inverse, input_precision="ieee", out_dtype=tl.float64)
            rest = tile - tl.dot(solved, tl.trans(lower), input_precision="ieee", out_dtype=tl.float64)
            solved = tl.dot(rest, inverse, solved, input_precision="ieee", out_dtype=tl.float64)
            # Source and factor may be one: all threads have read the tile before any writes it, here and below.
            tl.debug_barrier()
            store_tile(factor, m, 1, row, column, m, m, solved)
        for start_row in range(0, start, BLOCK_ROWS):
            row = start_row + tl.arange(0, BLOCK_ROWS)
            store_tile(factor, m, 1, row, column, start, m, tl.zeros((BLOCK_ROWS, BLOCK), tl.float64))
        # Blocks to come read what other threads have written here.
        tl.debug_barrier()


@triton.jit
def _column_squares(matrix, squares, rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Store the squared lengths of the columns."""
    for start in range(0, columns, BLOCK_COLS):
        column = start + tl.arange(0, BLOCK_COLS)
        total = tl.zeros((BLOCK_COLS,), tl.float64)
        for start_row in range(0, rows, BLOCK_ROWS):
            row = start_row + tl.arange(0, BLOCK_ROWS)
            tile = load_tile(matrix, columns, 1, row, column, rows, columns, tl.float64)
            total += tl.sum(tile * tile, 0)
        tl.store(squares + column, total, mask=column < columns)
    tl.debug_barrier()


@triton.jit
def _descending(squares, order, m, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Store the indices of the squares, the largest first, and the first of equal ones first."""
    for start in range(0, m, BLOCK_COLS):
        index = start + tl.arange(0, BLOCK_COLS)
        own = tl.load(squares + index, mask=index < m, other=0.0)[None, :]
        before = tl.zeros((BLOCK_COLS,), tl.int32)
        for start_other in range(0, m, BLOCK_ROWS):
            other_index = start_other + tl.arange(0, BLOCK_ROWS)
            other = tl.load(squares + other_index, mask=other_index < m, other=-1.0)[:, None]
            first = (other > own) | ((other == own) & (other_index[:, None] < index[None, :]))
            before += tl.sum(first.to(tl.int32), 0)
        tl.store(order + before, index, mask=index < m)
    tl.debug_barrier()


@triton.jit
def _orthonormalize(
    panel, coefficients, scratch, m, s, noise,
    BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """Make the columns of a panel (m, s) of unit, or zero, columns orthonormal or zero, in place."""
    index = tl.arange(0, BLOCK)
    for start in range(0, s, BLOCK):
        column = start + index
        for turn in range(3):
            for start_row in range(0, start, BLOCK_ROWS):
                row = start_row + tl.arange(0, BLOCK_ROWS)
                tile = _product(
                    panel, 1, s, row, panel, s, 1, column, None, 0, m, start, s, BLOCK_ROWS, BLOCK, BLOCK_INNER
                )
                store_tile(coefficients, BLOCK, 1, row, index, start, BLOCK, tile)
            tl.debug_barrier()
            inner = tl.zeros((BLOCK, BLOCK), tl.float64)
            for start_row in range(0, m, BLOCK_ROWS):
                row = start_row + tl.arange(0, BLOCK_ROWS)
                tile = load_tile(panel, s, 1, row, column, m, s, tl.float64)
                tile -= _product(
                    panel, s, 1, row, coefficients, BLOCK, 1, index, None, 0, start, m, BLOCK,
                    BLOCK_ROWS, BLOCK, BLOCK_INNER,
                )  # fmt: skip
                tl.debug_barrier()
                store_tile(panel, s, 1, row, column, m, s, tile)
                inner = tl.dot(tl.trans(tile), tile, inner, input_precision="ieee", out_dtype=tl.float64)
            added = tl.where(turn == 0, noise, 0.0)
            inner += tl.where(index[:, None] == index[None, :], added, 0.0)
            least = tl.where(turn == 0, 0.0, tl.where(turn == 1, noise, 0.25))
            _, inverse = _factor_block(_symmetric(scratch, inner, BLOCK), least, BLOCK)
            for start_row in range(0, m, BLOCK_ROWS):
                row = start_row + tl.arange(0, BLOCK_ROWS)
                tile = load_tile(panel, s, 1, row, column, m, s, tl.float64)
                tile = tl.dot(tile, inverse, input_precision="ieee", out_dtype=tl.float64)
                tl.debug_barrier()
                store_tile(panel, s, 1, row, column, m, s, tile)
            tl.debug_barrier()


@triton.jit
def _look(
    gram, gram_row, gram_column, cross, cross_row, cross_column, own, own_row, own_column, decay, weight, r, m,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Return 0, or NaN where K is not finite, its largest diagonal entry, and the trace of its last rows."""
    nothing = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float64)
    largest_tile = nothing
    trace_tile = nothing
    for start_row in range(0, m, BLOCK_ROWS):
        row = start_row + tl.arange(0, BLOCK_ROWS)
        for start in range(0, m, BLOCK_COLS):
            column = start + tl.arange(0, BLOCK_COLS)
            tile = _core_tile(
                gram, gram_row, gram_column, cross, cross_row, cross_column, own, own_row, own_column, decay, weight,
                row, column, r, m,
            )  # fmt: skip
            nothing += 0 * tile
            diagonal = tl.where(row[:, None] == column[None, :], tile, 0.0)
            largest_tile = tl.maximum(largest_tile, diagonal)
            trace_tile += tl.where((row >= r)[:, None], diagonal, 0.0)
    poison = tl.sum(tl.sum(nothing, 1), 0)
    largest = tl.max(tl.max(largest_tile, 1), 0)
    trace = tl.sum(tl.sum(trace_tile, 1), 0)
    return poison, largest, trace


@triton.jit
def _store_core(
    core, gram, gram_row, gram_column, cross, cross_row, cross_column, own, own_row, own_column, decay, weight,
    r, m, scale, finite,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Store K over its largest diagonal entry, 0 where it is not finite, and return its norm."""
    norm_tile = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float64)
    for start_row in range(0, m, BLOCK_ROWS):
        row = start_row + tl.arange(0, BLOCK_ROWS)
        for start in range(0, m, BLOCK_COLS):
            column = start + tl.arange(0, BLOCK_COLS)
            tile = _core_tile(
                gram, gram_row, gram_column, cross, cross_row, cross_column, own, own_row, own_column, decay, weight,
                row, column, r, m,
            )  # fmt: skip
            tile = tl.where(finite, tile / scale, 0.0)
            norm_tile += tile * tile
            store_tile(core, m, 1, row, column, m, m, tile)
    norm = tl.sqrt(tl.sum(tl.sum(norm_tile, 1), 0))
    tl.debug_barrier()
    return norm


@triton.jit
def _identity(basis, m, s, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Store the first columns of I."""
    for start_row in range(0, m, BLOCK_ROWS):
        row = start_row + tl.arange(0, BLOCK_ROWS)
        for start in range(0, s, BLOCK_COLS):
            column = start + tl.arange(0, BLOCK_COLS)
            tile = tl.where(row[:, None] == column[None, :], 1.0, 0.0)
            store_tile(basis, s, 1, row, column, m, s, tile)
    tl.debug_barrier()


@triton.jit
def _find_basis(
    core, factor, second, image, basis, scratch, coefficients, squares, order, chosen, m, s, shift, noise,
    BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """Store W by two steps of the LR algorithm; phases 2 to 4."""
    _cholesky(core, factor, scratch, m, shift, BLOCK, BLOCK_ROWS, BLOCK_INNER)
    _column_squares(factor, squares, m, m, BLOCK_ROWS, BLOCK_COLS)
    _descending(squares, order, m, BLOCK_ROWS, BLOCK_COLS)
    for start in range(0, m, BLOCK_COLS):
        column = start + tl.arange(0, BLOCK_COLS)
        from_column = tl.load(order + column, mask=column < m, other=m)
        for start_row in range(0, m, BLOCK_ROWS):
            # What lies above the diagonal is not read.
            if start_row + BLOCK_ROWS > start:
                row = start_row + tl.arange(0, BLOCK_ROWS)
                from_row = tl.load(order + row, mask=row < m, other=m)
                tile = _product(
                    factor, 1, m, from_row, factor, m, 1, from_column, None, 0, m, m, m,
                    BLOCK_ROWS, BLOCK_COLS, BLOCK_INNER,
                )  # fmt: skip
                store_tile(second, m, 1, row, column, m, m, tile)
    tl.debug_barrier()
    _cholesky(second, second, scratch, m, 0.0, BLOCK, BLOCK_ROWS, BLOCK_INNER)
    _column_squares(second, squares, m, m, BLOCK_ROWS, BLOCK_COLS)
    _descending(squares, chosen, m, BLOCK_ROWS, BLOCK_COLS)
    for start in range(0, s, BLOCK_COLS):
        column = start + tl.arange(0, BLOCK_COLS)
        from_column = tl.load(chosen + column, mask=column < s, other=m)
        for start_row in range(0, m, BLOCK_ROWS):
            row = start_row + tl.arange(0, BLOCK_ROWS)
            tile = _product(
                factor, m, 1, row, second, m, 1, from_column, order, 0, m, m, m,
                BLOCK_ROWS, BLOCK_COLS, BLOCK_INNER,
            )  # fmt: skip
            store_tile(image, s, 1, row, column, m, s, tile)
    tl.debug_barrier()
    for start in range(0, s, BLOCK_COLS):
        column = start + tl.arange(0, BLOCK_COLS)
        for start_row in range(0, m, BLOCK_ROWS):
            row = start_row + tl.arange(0, BLOCK_ROWS)
            tile = load_tile(image, s, 1, row, column, m, s, tl.float64) * shift
            tile += _product(
                core, m, 1, row, image, s, 1, column, None, 0, m, m, s, BLOCK_ROWS, BLOCK_COLS, BLOCK_INNER
            )
            store_tile(basis, s, 1, row, column, m, s, tile)
    tl.debug_barrier()
    _column_squares(basis, squares, m, s, BLOCK_ROWS, BLOCK_COLS)
    for start in range(0, s, BLOCK_COLS):
        column = start + tl.arange(0, BLOCK_COLS)
        square = tl.load(squares + column, mask=column < s, other=1.0)
        inverse_length = tl.where(square > 0, 1 / tl.sqrt(tl.where(square > 0, square, 1.0)), 0.0)
        for start_row in range(0, m, BLOCK_ROWS):
            row = start_row + tl.arange(0, BLOCK_ROWS)
            tile = load_tile(basis, s, 1, row, column, m, s, tl.float64) * inverse_length[None, :]
            store_tile(basis, s, 1, row, column, m, s, tile)
    tl.debug_barrier()
    _orthonormalize(basis, coefficients, scratch, m, s, noise, BLOCK, BLOCK_ROWS, BLOCK_INNER)


@triton.jit
def _store_compressed(
    core, basis, image, small, m, s,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """Store X = KW and WᵀX, and return the largest entry on the diagonal of that."""
    for start in range(0, s, BLOCK_COLS):
        column = start + tl.arange(0, BLOCK_COLS)
        for start_row in range(0, m, BLOCK_ROWS):
            row = start_row + tl.arange(0, BLOCK_ROWS)
            tile = _product(core, m, 1, row, basis, s, 1, column, None, 0, m, m, s, BLOCK_ROWS, BLOCK_COLS, BLOCK_INNER)
            store_tile(image, s, 1, row, column, m, s, tile)
    tl.debug_barrier()
    largest_tile = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float64)
    for start in range(0, s, BLOCK_COLS):
        column = start + tl.arange(0, BLOCK_COLS)
        for start_row in range(0, s, BLOCK_ROWS):
            row = start_row + tl.arange(0, BLOCK_ROWS)
            tile = _product(
                basis, 1, s, row, image, s, 1, column, None, 0, m, s, s, BLOCK_ROWS, BLOCK_COLS, BLOCK_INNER
            )
            largest_tile = tl.maximum(largest_tile, tl.where(row[:, None] == column[None, :], tile, 0.0))
            store_tile(small, s, 1, row, column, s, s, tile)
    tl.debug_barrier()
    return tl.max(tl.max(largest_tile, 1), 0)


@triton.jit
def _clear_weak(basis, image, small, least, m, s, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Clear the columns of W and X whose entry on the diagonal of S⁺ is at most ``least``."""
    for start in range(0, s, BLOCK_COLS):
        column = start + tl.arange(0, BLOCK_COLS)
        alive = tl.load(small + column * (s + 1), mask=column < s, other=0.0) > least
        for start_row in range(0, m, BLOCK_ROWS):
            row = start_row + tl.arange(0, BLOCK_ROWS)
            tile = load_tile(image, s, 1, row, column, m, s, tl.float64)
            store_tile(image, s, 1, row, column, m, s, tl.where(alive[None, :], tile, 0.0))
            tile = load_tile(basis, s, 1, row, column, m, s, tl.float64)
            store_tile(basis, s, 1, row, column, m, s, tl.where(alive[None, :], tile, 0.0))
    tl.debug_barrier()


@triton.jit
def _norm_left_out(
    core, basis, image, small, rest, m, s,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """Return ‖K − XWᵀ − W(X − WS⁺)ᵀ‖_F."""
    for start in range(0, s, BLOCK_COLS):
        column = start + tl.arange(0, BLOCK_COLS)
        for start_row in range(0, m, BLOCK_ROWS):
            row = start_row + tl.arange(0, BLOCK_ROWS)
            tile = load_tile(image, s, 1, row, column, m, s, tl.float64)
            tile -= _product(
                basis, s, 1, row, small, s, 1, column, None, 0, s, m, s, BLOCK_ROWS, BLOCK_COLS, BLOCK_INNER
            )
            store_tile(rest, s, 1, row, column, m, s, tile)
    tl.debug_barrier()
    norm_tile = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float64)
    for start in range(0, m, BLOCK_COLS):
        column = start + tl.arange(0, BLOCK_COLS)
        for start_row in range(0, m, BLOCK_ROWS):
            row = start_row + tl.arange(0, BLOCK_ROWS)
            tile = load_tile(core, m, 1, row, column, m, m, tl.float64)
            tile -= _product(
                image, s, 1, row, basis, 1, s, column, None, 0, s, m, m, BLOCK_ROWS, BLOCK_COLS, BLOCK_INNER
            )
            tile -= _product(
                basis, s, 1, row, rest, 1, s, column, None, 0, s, m, m, BLOCK_ROWS, BLOCK_COLS, BLOCK_INNER
            )
            norm_tile += tile * tile
    return tl.sqrt(tl.sum(tl.sum(norm_tile, 1), 0))


@triton.jit
def _store_small(
    result, small, s, scale, least, tiny, poison,
    TOLERANCE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Store S⁺ in its dtype, and return the poison of it and of what is beyond that dtype."""
    nothing = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float64)
    largest_tile = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float64)
    for last in range(2):
        # Values of a factor that are all below the normal numbers become 0; values beyond its dtype are not finite.
        beyond = tl.sum(tl.sum(nothing, 1), 0) + poison
        vanished = tl.max(tl.max(largest_tile, 1), 0) < tiny
        for start in range(0, s, BLOCK_COLS):
            column = start + tl.arange(0, BLOCK_COLS)
            lives = tl.load(small + column * (s + 1), mask=column < s, other=0.0) > least
            for start_row in range(0, s, BLOCK_ROWS):
                row = start_row + tl.arange(0, BLOCK_ROWS)
                tile = load_tile(small, s, 1, row, column, s, s, tl.float64)
                tile = (tile + load_tile(small, 1, s, row, column, s, s, tl.float64)) * 0.5 * scale
                if TOLERANCE:
                    row_lives = tl.load(small + row * (s + 1), mask=row < s, other=0.0) > least
                    tile = tl.where(row_lives[:, None] & lives[None, :], tile, 0.0)
                rounded = tile.to(result.dtype.element_ty).to(tl.float64)
                if last == 0:
                    nothing += 0 * rounded
                    largest_tile = tl.maximum(largest_tile, tl.abs(rounded))
                else:
                    tile = tl.where(vanished, 0.0, rounded) + beyond
                    store_tile(result, s, 1, row, column, s, s, tile)
    return tl.sum(tl.sum(nothing, 1), 0) + poison


@triton.jit
def _store_rotation(
    of_root, of_columns, basis, r, m, s, decay, weight, poison,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Store √ρ times the first rows of W, and √w times the others."""
    for start in range(0, s, BLOCK_COLS):
        column = start + tl.arange(0, BLOCK_COLS)
        for start_row in range(0, m, BLOCK_ROWS):
            row = start_row + tl.arange(0, BLOCK_ROWS)
            tile = load_tile(basis, s, 1, row, column, m, s, tl.float64) + poison
            store_tile(of_root, s, 1, row, column, r, s, tile * tl.sqrt(decay))
            tile = tile * tl.sqrt(weight)
            places = of_columns + (row - r).to(tl.int64)[:, None] * s + column[None, :]
            inside = ((row >= r) & (row < m))[:, None] & (column < s)[None, :]
            tl.store(places, tile.to(of_columns.dtype.element_ty), mask=inside)


def _work(arguments: Mapping[str, Any]) -> Work:
    small = arguments["small_ptr"]
    problems = math.prod(small.shape[:-2])
    r, m, s = (arguments[letter] for letter in ("r", "m", "s"))
    names = ("gram", "cross", "own", "decay", "weight", "small", "of_root", "of_columns", "left_out", "added")
    moved = bytes_of(arguments, *names, "squares", "panels", "vectors", "orders")
    return Work({64: problems * cost(r, m - r, s).flops}, moved, {"factors": problems, "m": m, "s": s})


@launch.counted(_work)
@triton.jit
def root_core_kernel(
    gram_ptr, cross_ptr, own_ptr, decay_ptr, weight_ptr, table_ptr,
    small_ptr, of_root_ptr, of_columns_ptr, left_out_ptr, added_ptr,
    squares_ptr, panels_ptr, vectors_ptr, orders_ptr,
    r, m, s, tol: tl.float64, eps: tl.float64, tiny: tl.float64, noise: tl.float64,
    gram_strides, cross_strides, own_strides, decay_strides, weight_strides,
    GRAM_LAYOUT: tl.constexpr, CROSS_LAYOUT: tl.constexpr, OWN_LAYOUT: tl.constexpr, DECAY_LAYOUT: tl.constexpr,
    WEIGHT_LAYOUT: tl.constexpr, WHOLE: tl.constexpr, TOLERANCE: tl.constexpr, MEASURE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """Grid: (problems,). Results and workspaces are contiguous: squares (3, m, m), panels (2, m, s), orders (2, m)."""
    problem = tl.program_id(0).to(tl.int64)
    entry = entry_of(table_ptr, problem, 0, 5)
    gram, gram_row, gram_column = locate(entry, gram_ptr, gram_strides, problem, GRAM_LAYOUT)
    entry = entry_of(table_ptr, problem, 1, 5)
    cross, cross_row, cross_column = locate(entry, cross_ptr, cross_strides, problem, CROSS_LAYOUT)
    entry = entry_of(table_ptr, problem, 2, 5)
    own, own_row, own_column = locate(entry, own_ptr, own_strides, problem, OWN_LAYOUT)
    entry = entry_of(table_ptr, problem, 3, 5)
    place, _, _ = locate(entry, decay_ptr, decay_strides, problem, DECAY_LAYOUT)
    decay = tl.load(place).to(tl.float64)
    entry = entry_of(table_ptr, problem, 4, 5)
    place, _, _ = locate(entry, weight_ptr, weight_strides, problem, WEIGHT_LAYOUT)
    weight = tl.load(place).to(tl.float64)
    core = squares_ptr + problem * 3 * m * m
    factor, second = core + m * m, core + 2 * m * m
    image = panels_ptr + problem * 2 * m * s
    basis = image + m * s
    scratch = vectors_ptr + problem * (BLOCK * BLOCK + BLOCK * s + m)
    coefficients = scratch + BLOCK * BLOCK
    squares = coefficients + BLOCK * s
    order = orders_ptr + problem * 2 * m
    chosen = order + m

    poison, largest, trace = _look(
        gram, gram_row, gram_column, cross, cross_row, cross_column, own, own_row, own_column, decay, weight, r, m,
        BLOCK_ROWS, BLOCK_COLS,
    )  # fmt: skip
    finite = poison == 0
    scale = tl.where(finite & (largest > 0), largest, 1.0)
    norm = _store_core(
        core, gram, gram_row, gram_column, cross, cross_row, cross_column, own, own_row, own_column, decay, weight,
        r, m, scale, finite, BLOCK_ROWS, BLOCK_COLS,
    )  # fmt: skip
    if WHOLE:
        _identity(basis, m, s, BLOCK_ROWS, BLOCK_COLS)
    else:
        shift = tl.maximum(32 * eps * norm, eps)
        _find_basis(
            core, factor, second, image, basis, scratch, coefficients, squares, order, chosen, m, s, shift, noise,
            BLOCK, BLOCK_ROWS, BLOCK_COLS, BLOCK_INNER,
        )  # fmt: skip
    small = factor
    least = tol * _store_compressed(core, basis, image, small, m, s, BLOCK_ROWS, BLOCK_COLS, BLOCK_INNER)
    if TOLERANCE:
        _clear_weak(basis, image, small, least, m, s, BLOCK_ROWS, BLOCK_COLS)
    left_out = poison
    if MEASURE:
        left_out += scale * _norm_left_out(core, basis, image, small, second, m, s, BLOCK_ROWS, BLOCK_COLS, BLOCK_INNER)
    tl.store(left_out_ptr + problem, left_out)
    tl.store(added_ptr + problem, trace + poison)
    poison = _store_small(
        small_ptr + problem * s * s, small, s, scale, least, tiny, poison, TOLERANCE, BLOCK_ROWS, BLOCK_COLS
    )
    _store_rotation(
        of_root_ptr + problem * r * s, of_columns_ptr + problem * (m - r) * s, basis, r, m, s, decay, weight, poison,
        BLOCK_ROWS, BLOCK_COLS,
    )  # fmt: skip


def root_core(
    gram: Tensor, cross: Tensor, own: Tensor, decay: Tensor, weight: Tensor, rank: int, tol: float, measure: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return S⁺, √ρ W₁, √w W₂, the norm of what is left out, and w tr G."""
    batch, r, k, s = gram.shape[:-2], gram.shape[-1], own.shape[-1], rank
    m = r + k
    small, of_root, of_columns = (gram.new_empty(*batch, rows, s) for rows in (s, r, k))
    left_out, added = gram.new_empty(batch), gram.new_empty(batch)
    operands = arrange(
        {
            "gram": gram, "cross": cross, "own": own,
            "decay": decay[..., None, None], "weight": weight[..., None, None],
        }
    )  # fmt: skip
    config = configs.root_core(launch.target_of(gram), m)
    block, problems, info = config.blocks["BLOCK"], math.prod(batch), torch.finfo(gram.dtype)
    workspaces = {
        "squares": own.new_empty(problems, 3, m, m),
        "panels": own.new_empty(problems, 2, m, s),
        "vectors": own.new_empty(problems, block * block + block * s + m),
        "orders": own.new_empty(problems, 2, m, dtype=torch.int32),
    }
    arguments = operands.arguments() | {f"{name}_ptr": workspace for name, workspace in workspaces.items()} | {
        "small_ptr": small, "of_root_ptr": of_root, "of_columns_ptr": of_columns, "left_out_ptr": left_out,
        "added_ptr": added, "r": r, "m": m, "s": s, "tol": float(tol), "eps": info.eps, "tiny": info.tiny,
        # The rounding of inner products in float64, which tells weak columns from dependent ones.
        "noise": 64 * s * torch.finfo(torch.float64).eps,
        "WHOLE": rank == m and not (m and tol), "TOLERANCE": tol > 0, "MEASURE": bool(measure),
    }  # fmt: skip
    launch.start(root_core_kernel, (problems,), arguments, config)
    return small, of_root, of_columns, left_out, added
