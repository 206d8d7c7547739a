"""Coefficients of a damped inverse, with one program per factor: β = 1/(τ + λ), and Z from eigenvalues or from S.

For eigenvalues d, Z is (τ − d)/(d + λ), entry by entry. For S, Z is −(S + λI)⁻¹, by block sweeps in the dtype of the
workspace. With P the pivot block of the columns k, and P⁻¹ = W Wᵀ, a sweep takes A to

    A₀ − H Hᵀ,    H = A[:, k] W with −W in the rows k,

where A₀ is A with rows and columns k set to 0. The blocks not yet swept then hold what a Cholesky factorisation would
leave of them, and after all sweeps A is −(S + λI)⁻¹. A stays symmetric, and H takes one step of refinement, as in
`small_spd`. If a pivot is not positive, S + λI is not positive definite, and all of Z becomes NaN.

The program keeps its matrix in the second-level cache. The projections of the same launch run at the same time: neither
needs results of the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from brandla_kernels._kernels.matrices import load_tile, store_tile
from brandla_kernels._kernels.root_core import transposed
from brandla_kernels._kernels.small_spd import factor_block, solved_by, symmetric

# Columns of a sweep, and rows and columns of the tiles that it updates.
BLOCK = tl.constexpr(16)
_ROWS = tl.constexpr(64)
_COLUMNS = tl.constexpr(32)


def workspace(r: int) -> int:
    """Return how many numbers a program's workspace holds for Z of order r: A, H and a block."""
    block = int(BLOCK.value)
    return r * r + (r + block) * block


@triton.jit
def store_coefficients(problem, side, PRECISION: tl.constexpr):
    """Store β and Z (r, r), or without a workspace Z (r), contiguous; a smaller d or S of a list is padded with zeros.

    A side is d or S, r, pointers to this problem's λ and τ, and pointers to Z, β and workspaces of all problems.
    """
    small, r, damping_ptr, tail_ptr, middle_ptr, scale_ptr, work_ptr = side
    damping, tail = tl.load(damping_ptr).to(tl.float64), tl.load(tail_ptr).to(tl.float64)
    tl.store(scale_ptr + problem, 1.0 / (tail + damping))
    if work_ptr is None:
        for start in range(0, r, _ROWS):
            index = start + tl.arange(0, _ROWS)
            values = tl.load(small[0] + index * small[1], mask=index < small[3], other=0.0).to(tl.float64)
            tl.store(middle_ptr + problem * r + index, (tail - values) / (values + damping), mask=index < r)
    else:
        work = work_ptr + problem * (r * r + (r + BLOCK) * BLOCK)
        result = (middle_ptr + problem * r * r, r, 1, r, r)
        precision: tl.constexpr = "ieee" if work.dtype.element_ty == tl.float64 else PRECISION
        _store_negative_inverse(small, r, damping.to(work.dtype.element_ty), result, work, precision)


@triton.jit
def _store_negative_inverse(small, r, damping, result, work_ptr, PRECISION: tl.constexpr):
    matrix = (work_ptr, r, 1, r, r)
    swept = (work_ptr + r * r, BLOCK, 1, r, BLOCK)
    scratch = (swept[0] + r * BLOCK, BLOCK, 1, BLOCK, BLOCK)
    mirrored = transposed(small)
    for start_row in range(0, r, _ROWS):
        row = start_row + tl.arange(0, _ROWS)
        for start_column in range(0, r, _COLUMNS):
            column = start_column + tl.arange(0, _COLUMNS)
            tile = load_tile(small, row, column, damping.dtype) + load_tile(mirrored, row, column, damping.dtype)
            store_tile(matrix, row, column, tile * 0.5 + tl.where(row[:, None] == column[None, :], damping, 0.0))
    tl.debug_barrier()
    index = tl.arange(0, BLOCK)
    sound = True
    for first in range(0, r, BLOCK):
        inner = first + index
        block = symmetric(scratch, index, load_tile(matrix, inner, inner))
        # The last block is continued by the identity.
        block += tl.where((index[:, None] == index[None, :]) & (inner >= r)[None, :], 1.0, 0.0)
        factor, inverse, pivots = factor_block(block, 0.0, BLOCK)
        # A comparison with NaN is false, so a NaN pivot is not sound either.
        sound = sound & (tl.min((pivots > 0).to(tl.int32)) == 1)
        for start_row in range(0, r, _ROWS):
            row = start_row + tl.arange(0, _ROWS)
            unit = tl.where(row[:, None] == inner[None, :], -1.0, 0.0).to(damping.dtype)
            tile = tl.where(_among(row, first)[:, None], unit, load_tile(matrix, row, inner))
            store_tile(swept, row, index, solved_by(inverse, factor, tile, PRECISION))
        tl.debug_barrier()
        for start_row in range(0, r, _ROWS):
            row = start_row + tl.arange(0, _ROWS)
            left = load_tile(swept, row, index)
            for start_column in range(0, r, _COLUMNS):
                column = start_column + tl.arange(0, _COLUMNS)
                right = load_tile(swept, column, index)
                tile = load_tile(matrix, row, column)
                tile = tl.where(_among(row, first)[:, None] | _among(column, first)[None, :], 0.0, tile)
                tile -= tl.dot(left, tl.trans(right), input_precision=PRECISION, out_dtype=tile.dtype)
                store_tile(matrix, row, column, tile)
        tl.debug_barrier()
    for start_row in range(0, r, _ROWS):
        row = start_row + tl.arange(0, _ROWS)
        for start_column in range(0, r, _COLUMNS):
            column = start_column + tl.arange(0, _COLUMNS)
            store_tile(result, row, column, tl.where(sound, load_tile(matrix, row, column), float("nan")))


@triton.jit
def _among(index, first):
    """Return which indices belong to the block of columns that begins at ``first``."""
    return (index >= first) & (index < first + BLOCK)
