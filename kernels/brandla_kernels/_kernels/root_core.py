"""The small core of a root's update in one launch, with one program per factor; ``root_core`` has the mathematics.

A program works in a workspace of 3m² + 2ms numbers, m = r + k, which the second-level cache holds. It computes in the
dtype of its workspace, but assembles K in float64. Its phases follow one another, with a barrier between them:

1. The largest diagonal entry of K, and the trace that A adds. K over that entry, whether K is finite, and its norm.
2. K + σI = ΛΛᵀ, Λ = Rᵀ. The squared column lengths of Λ are the diagonal of L = ΛᵀΛ; they give its order Π, descending.
3. ΠᵀLΠ, its factor Λ₂, and the order of the column lengths of Λ₂.
4. Y = RᵀLΠΛ₂Z = (K + σI) (ΛΠ) (Λ₂Z), with unit columns, and W = orth(Y).
5. X = KW and S⁺ = WᵀX. Columns below the tolerance become zero. ‖K − XWᵀ − W(X − WS⁺)ᵀ‖_F, and the results.

**Factorisations** take the columns in blocks of BLOCK, with a step of refinement, as in `small_spd`. A pivot that is
not positive drops its column. In an order, an entry's place is the count of those larger, or equal and before it.

**W = orth(Y)** goes over blocks of BLOCK columns, with three passes over each block. A pass subtracts the projection on
the columns before the block, and multiplies by the inverse Cholesky factor of the block's Gram matrix. In the first
pass a shift takes the place of weak pivots. In the second, columns whose pivot is below rounding become zero. In the
third, columns that lost three quarters of their squared length do: they were rounding noise ("twice is enough").

Programs share nothing, loops and branches depend on values that are the same in all threads, and sums have a fixed
order, so two runs are equal to the bit. Barriers and memory are as in `small_spd`.

``docs/kernels.md`` counts what bounds this kernel.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from brandla_kernels._kernels import configs, launch
from brandla_kernels._kernels.matrices import add_product, arrange, load_tile, matrix_of, store_tile
from brandla_kernels._kernels.small_spd import factor_block, solved_by, symmetric
from brandla_kernels.eigh_core import TINY
from brandla_kernels.root_core import cost

_TINY = tl.constexpr(TINY)
# The tuple ``blocks`` holds the columns of a factorisation's block, the rows and columns of a tile, the terms that a
# product takes at a time, and the precision of products.


@triton.jit
def transposed(matrix):
    return matrix[0], matrix[2], matrix[1], matrix[4], matrix[3]


@triton.jit
def tiles_of(matrix, blocks: tl.constexpr):
    """Return how many tiles a matrix has."""
    return tl.cdiv(matrix[3], blocks[1]) * tl.cdiv(matrix[4], blocks[2])


@triton.jit
def tile_at(step, matrix, blocks: tl.constexpr):
    """Return the row and column indices of a tile; steps go down one column of tiles after another."""
    # At least 1: Triton's AMD backend fails to compile a division by a number that is 0 in a loop's first iteration.
    down = tl.maximum(tl.cdiv(matrix[3], blocks[1]), 1)
    return (step % down) * blocks[1] + tl.arange(0, blocks[1]), (step // down) * blocks[2] + tl.arange(0, blocks[2])


@triton.jit
def total_of(tile):
    return tl.sum(tl.sum(tile, 1), 0)


@triton.jit
def _largest(tile):
    return tl.max(tl.max(tile, 1), 0)


@triton.jit
def _product(x, row, y, column, last, blocks: tl.constexpr, order=None):
    """Return Σ_p X[row, p] Y[p, column] over p < ``last``, with X[row, order[p]] if an order is given."""
    total = tl.zeros((row.shape[0], column.shape[0]), x[0].dtype.element_ty)
    return add_product(total, x, row, y, column, last, blocks[4], blocks[3], order)


@triton.jit
def _store_product(
    out, x, y, blocks: tl.constexpr,
    add=None, scale=1.0, sign=1.0, row_order=None, column_order=None, inner_order=None, LOWER: tl.constexpr = False,
):  # fmt: skip
    """Store X Y, or ``scale`` A + ``sign`` X Y; with LOWER only tiles that reach the diagonal or lie below it.

    The orders, where given, permute the rows of X, the columns of Y, and the columns of X that meet the rows of Y.
    """
    down = tl.cdiv(out[3], blocks[1])
    for step in range(tiles_of(out, blocks)):
        needed = True
        if LOWER:
            needed = (step % down + 1) * blocks[1] > (step // down) * blocks[2]
        if needed:
            row, column = tile_at(step, out, blocks)
            from_row, from_column = row, column
            if row_order is not None:
                from_row = tl.load(row_order + row, mask=row < out[3], other=x[3])
            if column_order is not None:
                from_column = tl.load(column_order + column, mask=column < out[4], other=y[4])
            tile = _product(x, from_row, y, from_column, x[4], blocks, inner_order)
            if add is not None:
                tile = load_tile(add, row, column) * scale + tile * sign
                # A may be OUT: all threads must have read the tile before any thread writes it.
                tl.debug_barrier()
            store_tile(out, row, column, tile)
    tl.debug_barrier()


@triton.jit
def core_tile(gram, cross, own, decay, weight, row, column, DIAGONAL: tl.constexpr):
    """Return a tile of K in float64. With DIAGONAL the root is U √d: S is the column d, and C is UᵀA."""
    r, k = cross[3], cross[4]
    # An old row gets the index k, which lies outside the matrices of the new columns: it loads zeros.
    new_row, new_column = tl.where(row < r, k, row - r), tl.where(column < r, k, column - r)
    part = load_tile(cross, row, new_column, tl.float64)
    part += load_tile(transposed(cross), new_row, column, tl.float64)
    if DIAGONAL:
        first = tl.zeros((1,), tl.int32)
        down, across = load_tile(gram, row, first, tl.float64), load_tile(transposed(gram), first, column, tl.float64)
        old = tl.where(row[:, None] == column[None, :], down, 0.0)
        # C lies where one index is old and the other is new. d has no entry for the new one, so the sum is the old d.
        part = part * tl.sqrt(down + across)
    else:
        old = load_tile(gram, row, column, tl.float64)
    tile = old * decay + part * tl.sqrt(decay * weight)
    return tile + load_tile(own, new_row, new_column, tl.float64) * weight


@triton.jit
def _diagonal_of_core(gram, own, decay, weight, blocks: tl.constexpr):
    """Return the largest diagonal entry of K, or 1 if none is positive, and the trace that A adds."""
    largest, trace = tl.zeros((blocks[1],), tl.float64), tl.zeros((blocks[1],), tl.float64)
    for start in range(0, tl.maximum(gram[3], own[3]), blocks[1]):
        index = start + tl.arange(0, blocks[1])
        place = index.to(tl.int64)
        old = tl.load(gram[0] + place * (gram[1] + gram[2]), mask=index < gram[3], other=0.0).to(tl.float64)
        new = tl.load(own[0] + place * (own[1] + own[2]), mask=index < own[3], other=0.0)
        old, new = old * decay, new * weight
        # A comparison with NaN is false, so NaN never becomes the largest.
        largest = tl.where(old > largest, old, largest)
        largest = tl.where(new > largest, new, largest)
        trace += new
    most = tl.max(largest, 0)
    # At least _TINY, a normal number: its inverse is finite.
    return tl.where(most > 0, tl.maximum(most, _TINY), 1.0), tl.sum(trace, 0)


@triton.jit
def _store_core(core, gram, cross, own, decay, weight, scale, blocks: tl.constexpr):
    """Store K over ``scale``, or zeros if K is not finite; return a poison, 0 or in that case NaN, and the norm."""
    norm_tile = tl.zeros((blocks[1], blocks[2]), core[0].dtype.element_ty)
    nothing, inverse = norm_tile, 1 / scale
    for step in range(tiles_of(core, blocks)):
        row, column = tile_at(step, core, blocks)
        tile = (core_tile(gram, cross, own, decay, weight, row, column, False) * inverse).to(norm_tile.dtype)
        store_tile(core, row, column, tile)
        nothing += 0 * tile  # NaN if an entry is not finite
        norm_tile += tile * tile
    poison = total_of(nothing)
    tl.debug_barrier()
    if poison != 0:
        # NaN has no place in an order: places left unwritten, read as indices, would lead out of the workspace.
        for step in range(tiles_of(core, blocks)):
            row, column = tile_at(step, core, blocks)
            store_tile(core, row, column, tl.zeros((blocks[1], blocks[2]), norm_tile.dtype))
        tl.debug_barrier()
    return poison, tl.where(poison == 0, tl.sqrt(total_of(norm_tile)), 0.0)


@triton.jit
def _store_identity(basis, blocks: tl.constexpr):
    for step in range(tiles_of(basis, blocks)):
        row, column = tile_at(step, basis, blocks)
        store_tile(basis, row, column, tl.where(row[:, None] == column[None, :], 1.0, 0.0))
    tl.debug_barrier()


@triton.jit
def _cholesky(source, factor, scratch, shift, blocks: tl.constexpr):
    """Factor a matrix plus ``shift`` on its diagonal. Only its lower triangle is read; the factor may overwrite it."""
    m = source[3]
    index = tl.arange(0, blocks[0])
    for start in range(0, m, blocks[0]):
        column = start + index
        block = load_tile(source, column, column)
        block -= _product(factor, column, transposed(factor), column, start, blocks)
        block += tl.where(index[:, None] == index[None, :], tl.where(column < m, shift, 1.0)[None, :], 0.0)
        lower, inverse, _ = factor_block(symmetric(scratch, index, block), 0.0, blocks[0])
        store_tile(factor, column, column, lower)
        for start_row in range(start + blocks[0], m, blocks[1]):
            row = start_row + tl.arange(0, blocks[1])
            tile = load_tile(source, row, column)
            tile -= _product(factor, row, transposed(factor), column, start, blocks)
            solved = solved_by(inverse, lower, tile, blocks[4])
            # Here, and in each update in place below, all threads must have read the tile before any thread writes it.
            tl.debug_barrier()
            store_tile(factor, row, column, solved)
        above = (factor[0], factor[1], factor[2], start, m)
        for start_row in range(0, start, blocks[1]):
            row = start_row + tl.arange(0, blocks[1])
            store_tile(above, row, column, tl.zeros((blocks[1], blocks[0]), above[0].dtype.element_ty))
        # Later blocks read what other threads have written here.
        tl.debug_barrier()


@triton.jit
def _column_squares(matrix, squares, blocks: tl.constexpr):
    """Store the squared lengths of the columns."""
    for start in range(0, matrix[4], blocks[2]):
        column = start + tl.arange(0, blocks[2])
        total = tl.zeros((blocks[2],), matrix[0].dtype.element_ty)
        for start_row in range(0, matrix[3], blocks[1]):
            tile = load_tile(matrix, start_row + tl.arange(0, blocks[1]), column)
            total += tl.sum(tile * tile, 0)
        tl.store(squares + column, total, mask=column < matrix[4])
    tl.debug_barrier()


@triton.jit
def _longest_first(matrix, squares, order, blocks: tl.constexpr):
    """Store the column indices of a square matrix, longest column first; equally long columns keep their order."""
    _column_squares(matrix, squares, blocks)
    m = matrix[4]
    for start in range(0, m, blocks[2]):
        index = start + tl.arange(0, blocks[2])
        own = tl.load(squares + index, mask=index < m, other=0.0)[None, :]
        before = tl.zeros((blocks[2],), tl.int32)
        for start_other in range(0, m, blocks[1]):
            other_index = start_other + tl.arange(0, blocks[1])
            other = tl.load(squares + other_index, mask=other_index < m, other=-1.0)[:, None]
            first = (other > own) | ((other == own) & (other_index[:, None] < index[None, :]))
            before += tl.sum(first.to(tl.int32), 0)
        tl.store(order + before, index, mask=index < m)
    tl.debug_barrier()


@triton.jit
def _orthonormalize(basis, squares, coefficients, scratch, noise, blocks: tl.constexpr):
    """Make the columns of a matrix (m, s) orthonormal or zero, in place: first of unit length, then block by block."""
    m, s = basis[3], basis[4]
    _column_squares(basis, squares, blocks)
    for step in range(tiles_of(basis, blocks)):
        row, column = tile_at(step, basis, blocks)
        square = tl.load(squares + column, mask=column < s, other=1.0)
        inverse_length = tl.where(square > 0, 1 / tl.sqrt(tl.where(square > 0, square, 1.0)), 0.0)
        tile = load_tile(basis, row, column) * inverse_length[None, :]
        tl.debug_barrier()
        store_tile(basis, row, column, tile)
    tl.debug_barrier()
    narrow: tl.constexpr = (blocks[0], blocks[1], blocks[0], blocks[3], blocks[4])
    index = tl.arange(0, blocks[0])
    for start in range(0, s, blocks[0]):
        before = (basis[0], s, 1, m, start)
        block = (basis[0] + start, s, 1, m, tl.minimum(s - start, blocks[0]))
        projection = (coefficients, blocks[0], 1, start, blocks[0])
        for turn in range(3):
            _store_product(projection, transposed(before), block, narrow)
            _store_product(block, before, projection, narrow, block, 1.0, -1.0)
            inner = tl.zeros((blocks[0], blocks[0]), noise.dtype)
            for start_row in range(0, m, blocks[1]):
                tile = load_tile(block, start_row + tl.arange(0, blocks[1]), index)
                inner = tl.dot(tl.trans(tile), tile, inner, input_precision=blocks[4], out_dtype=noise.dtype)
            added = tl.where(turn == 0, noise, 0.0)
            inner += tl.where(index[:, None] == index[None, :], added, 0.0)
            least = tl.where(turn == 0, 0.0, tl.where(turn == 1, noise, 0.25))
            _, inverse, _ = factor_block(symmetric(scratch, index, inner), least, blocks[0])
            for start_row in range(0, m, blocks[1]):
                row = start_row + tl.arange(0, blocks[1])
                tile = load_tile(block, row, index)
                tile = tl.dot(tile, inverse, input_precision=blocks[4], out_dtype=noise.dtype)
                tl.debug_barrier()
                store_tile(block, row, index, tile)
            tl.debug_barrier()


@triton.jit
def _largest_on_diagonal(small, blocks: tl.constexpr):
    largest = tl.zeros((blocks[2],), small[0].dtype.element_ty)
    for start in range(0, small[3], blocks[2]):
        column = start + tl.arange(0, blocks[2])
        largest = tl.maximum(largest, tl.load(small[0] + column * (small[3] + 1), mask=column < small[3], other=0.0))
    return tl.max(largest, 0)


@triton.jit
def _alive(small, column, least):
    """Return which columns have a diagonal entry of S⁺ above ``least``."""
    return tl.load(small[0] + column * (small[3] + 1), mask=column < small[3], other=0.0) > least


@triton.jit
def _clear_weak(matrix, small, least, blocks: tl.constexpr):
    """Clear the columns of W or X whose diagonal entry of S⁺ is at most ``least``."""
    for step in range(tiles_of(matrix, blocks)):
        row, column = tile_at(step, matrix, blocks)
        tile = tl.where(_alive(small, column, least)[None, :], load_tile(matrix, row, column), 0.0)
        tl.debug_barrier()
        store_tile(matrix, row, column, tile)
    tl.debug_barrier()


@triton.jit
def _norm_left_out(core, basis, image, small, rest, blocks: tl.constexpr):
    """Return ‖K − XWᵀ − W(X − WS⁺)ᵀ‖_F."""
    _store_product(rest, basis, small, blocks, image, 1.0, -1.0)
    norm_tile = tl.zeros((blocks[1], blocks[2]), core[0].dtype.element_ty)
    for step in range(tiles_of(core, blocks)):
        row, column = tile_at(step, core, blocks)
        tile = load_tile(core, row, column)
        tile -= _product(image, row, transposed(basis), column, basis[4], blocks)
        tile -= _product(basis, row, transposed(rest), column, basis[4], blocks)
        norm_tile += tile * tile
    return tl.sqrt(total_of(norm_tile))


@triton.jit
def _store_small(result, small, scale, least, tiny, poison, TOLERANCE: tl.constexpr, blocks: tl.constexpr):
    """Store S⁺ in the dtype of the result; return the poison, which an entry beyond that dtype makes NaN too."""
    nothing = tl.zeros((blocks[1], blocks[2]), small[0].dtype.element_ty)
    largest = nothing
    for last in range(2):
        # The first pass looks for overflow and for the largest entry. The second stores NaN after an overflow, zeros if
        # no entry is a normal number.
        beyond = total_of(nothing) + poison
        vanished = _largest(largest) < tiny
        for step in range(tiles_of(small, blocks)):
            row, column = tile_at(step, small, blocks)
            tile = load_tile(small, row, column) + load_tile(transposed(small), row, column)
            tile = tile * 0.5 * scale
            if TOLERANCE:
                lives = _alive(small, row, least)[:, None] & _alive(small, column, least)[None, :]
                tile = tl.where(lives, tile, 0.0)
            rounded = tile.to(result[0].dtype.element_ty).to(tile.dtype)
            if last == 0:
                nothing += 0 * rounded  # NaN if an entry overflowed
                largest = tl.maximum(largest, tl.abs(rounded))
            else:
                store_tile(result, row, column, tl.where(vanished, 0.0, rounded) + beyond)
    return total_of(nothing) + poison


@triton.jit
def _store_rotation(out, basis, scale, poison, blocks: tl.constexpr):
    """Store rows of W times ``scale``, or NaN if there is poison."""
    for step in range(tiles_of(out, blocks)):
        row, column = tile_at(step, out, blocks)
        store_tile(out, row, column, (load_tile(basis, row, column) + poison) * scale)


@launch.counted("r m s", lambda given, gram, cross, *_: cost(cross[0], cross[1], given["s"]).flops)
@triton.jit
def root_core_kernel(
    gram_ptr, cross_ptr, own_ptr, decay_ptr, weight_ptr, table_ptr,
    small_ptr, of_root_ptr, of_columns_ptr, left_out_ptr, added_ptr,
    squares_ptr, panels_ptr, vectors_ptr, orders_ptr,
    r, m, s, tol: tl.float64, eps: tl.float64, tiny: tl.float64, noise: tl.float64,
    gram_strides, cross_strides, own_strides, decay_strides, weight_strides,
    GRAM_LAYOUT: tl.constexpr, CROSS_LAYOUT: tl.constexpr, OWN_LAYOUT: tl.constexpr, DECAY_LAYOUT: tl.constexpr,
    WEIGHT_LAYOUT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    WHOLE: tl.constexpr, TOLERANCE: tl.constexpr, MEASURE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """Grid: (problems,). Results and workspaces are contiguous: squares (3, m, m), panels (2, m, s), orders (2, m)."""
    blocks: tl.constexpr = (BLOCK, BLOCK_ROWS, BLOCK_COLS, BLOCK_INNER, PRECISION)
    problem = tl.program_id(0).to(tl.int64)
    gram = matrix_of(table_ptr, problem, gram_ptr, gram_strides, r, r, GRAM_LAYOUT, 0, 5)
    cross = matrix_of(table_ptr, problem, cross_ptr, cross_strides, r, m - r, CROSS_LAYOUT, 1, 5)
    own = matrix_of(table_ptr, problem, own_ptr, own_strides, m - r, m - r, OWN_LAYOUT, 2, 5)
    decay = tl.load(matrix_of(table_ptr, problem, decay_ptr, decay_strides, 1, 1, DECAY_LAYOUT, 3, 5)[0])
    weight = tl.load(matrix_of(table_ptr, problem, weight_ptr, weight_strides, 1, 1, WEIGHT_LAYOUT, 4, 5)[0])
    core = (squares_ptr + problem * 3 * m * m, m, 1, m, m)
    factor, second = (core[0] + m * m, m, 1, m, m), (core[0] + 2 * m * m, m, 1, m, m)
    image = (panels_ptr + problem * 2 * m * s, s, 1, m, s)
    basis = (image[0] + m * s, s, 1, m, s)
    vectors = vectors_ptr + problem * (BLOCK * BLOCK + BLOCK * s + m)
    scratch, coefficients = (vectors, BLOCK, 1, BLOCK, BLOCK), vectors + BLOCK * BLOCK
    squares = coefficients + BLOCK * s
    order, chosen = orders_ptr + problem * 2 * m, orders_ptr + (problem * 2 + 1) * m

    # 1: K
    scale, trace = _diagonal_of_core(gram, own, decay, weight, blocks)
    poison, norm = _store_core(core, gram, cross, own, decay, weight, scale, blocks)
    scale = tl.where(poison == 0, scale, 1.0)
    if WHOLE:
        _store_identity(basis, blocks)
    else:
        # 2: the first step of the LR algorithm, 3: the second, 4: W
        shift = tl.maximum(32 * eps * norm, eps).to(COMPUTE)
        _cholesky(core, factor, scratch, shift, blocks)
        _longest_first(factor, squares, order, blocks)
        _store_product(second, transposed(factor), factor, blocks, row_order=order, column_order=order, LOWER=True)
        _cholesky(second, second, scratch, 0.0, blocks)
        _longest_first(second, squares, chosen, blocks)
        _store_product(image, factor, second, blocks, column_order=chosen, inner_order=order)
        _store_product(basis, core, image, blocks, image, shift)
        _orthonormalize(basis, squares, coefficients, scratch, tl.cast(noise, COMPUTE), blocks)
    # 5: S⁺, the norm of the part left out, and the results
    small = (factor[0], s, 1, s, s)
    _store_product(image, core, basis, blocks)
    _store_product(small, transposed(basis), image, blocks)
    least = (tol * _largest_on_diagonal(small, blocks)).to(COMPUTE)
    if TOLERANCE:
        _clear_weak(image, small, least, blocks)
        _clear_weak(basis, small, least, blocks)
    left_out = poison
    if MEASURE:
        left_out += scale * _norm_left_out(core, basis, image, small, (second[0], s, 1, m, s), blocks)
    tl.store(left_out_ptr + problem, left_out)
    tl.store(added_ptr + problem, trace + poison)
    result = (small_ptr + problem * s * s, s, 1, s, s)
    poison = _store_small(result, small, scale.to(COMPUTE), least, tiny, poison, TOLERANCE, blocks)
    of_root = (of_root_ptr + problem * r * s, s, 1, r, s)
    _store_rotation(of_root, basis, tl.sqrt(decay).to(COMPUTE), poison, blocks)
    of_columns = (of_columns_ptr + problem * (m - r) * s, s, 1, m - r, s)
    _store_rotation(of_columns, (basis[0] + r * s, s, 1, m - r, s), tl.sqrt(weight).to(COMPUTE), poison, blocks)


def root_core(
    gram: Tensor, cross: Tensor, own: Tensor, decay: Tensor, weight: Tensor, rank: int, tol: float, measure: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return S⁺, √ρ W₁, √w W₂, the norm of the part left out, and w tr G."""
    batch, r, k, s = gram.shape[:-2], gram.shape[-1], own.shape[-1], rank
    m = r + k
    small, of_root, of_columns = (gram.new_empty(*batch, rows, s) for rows in (s, r, k))
    left_out, added = gram.new_empty(batch), gram.new_empty(batch)
    numbers = {"decay": decay[..., None, None], "weight": weight[..., None, None]}
    operands = arrange({"gram": gram, "cross": cross, "own": own, **numbers})
    target = launch.target_of(gram)
    config, dtype = configs.root_core(target, m), launch.core_dtype(target, gram.dtype)
    block, problems, info = config.blocks["BLOCK"], math.prod(batch), torch.finfo(gram.dtype)
    workspaces = {
        "squares": gram.new_empty(problems, 3, m, m, dtype=dtype),
        "panels": gram.new_empty(problems, 2, m, s, dtype=dtype),
        "vectors": gram.new_empty(problems, block * block + block * s + m, dtype=dtype),
        "orders": gram.new_empty(problems, 2, m, dtype=torch.int32),
    }
    arguments = operands.arguments | {f"{name}_ptr": workspace for name, workspace in workspaces.items()}
    arguments |= launch.products_in(target, dtype) | {
        "small_ptr": small, "of_root_ptr": of_root, "of_columns_ptr": of_columns, "left_out_ptr": left_out,
        "added_ptr": added, "r": r, "m": m, "s": s, "tol": float(tol), "eps": info.eps, "tiny": info.tiny,
        # The rounding of inner products: a column with a smaller pivot counts as dependent.
        "noise": 64 * torch.finfo(dtype).eps,
        "WHOLE": rank == m and not (m and tol), "TOLERANCE": tol > 0, "MEASURE": bool(measure),
    }  # fmt: skip
    launch.start(root_core_kernel, (problems,), arguments, config)
    return small, of_root, of_columns, left_out, added
