"""The small steps around an update's eigendecomposition: the core before it, values and rotation after it.

``eigh_core`` and ``eigh_rotation`` have the mathematics. A core takes one program, which goes over the tiles twice:
first for the diagonal and whether the core is finite, then to store it. Each tile of a rotation takes its own program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from brandla_kernels._kernels import configs, launch
from brandla_kernels._kernels.matrices import arrange, load_tile, matrix_of, place_of, store_tile
from brandla_kernels._kernels.root_core import core_tile, tile_at, tiles_of, total_of
from brandla_kernels.eigh_core import EMPTY, TINY
from brandla_kernels.eigh_core import cost as core_cost
from brandla_kernels.eigh_rotation import cost as rotation_cost

_EMPTY, _TINY = tl.constexpr(EMPTY), tl.constexpr(TINY)


@triton.jit
def _power_of_two(number):
    """Return the least power of two above a float64."""
    return 2 * (number.to(tl.int64, bitcast=True) & 0x7FF0000000000000).to(tl.float64, bitcast=True)


@launch.counted("r k", lambda _, gram, cross, *others: core_cost(*cross).flops)
@triton.jit
def eigh_core_kernel(
    gram_ptr, cross_ptr, own_ptr, decay_ptr, weight_ptr, table_ptr,
    core_ptr, rows_ptr, scale_ptr,
    r, k, most: tl.float64,
    gram_strides, cross_strides, own_strides, decay_strides, weight_strides,
    GRAM_LAYOUT: tl.constexpr, CROSS_LAYOUT: tl.constexpr, OWN_LAYOUT: tl.constexpr, DECAY_LAYOUT: tl.constexpr,
    WEIGHT_LAYOUT: tl.constexpr, DIAGONAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (problems,). Results are contiguous."""
    blocks: tl.constexpr = (BLOCK, BLOCK, BLOCK)
    problem, m = tl.program_id(0).to(tl.int64), r + k
    gram = matrix_of(table_ptr, problem, gram_ptr, gram_strides, r, 1 if DIAGONAL else r, GRAM_LAYOUT, 0, 5)
    cross = matrix_of(table_ptr, problem, cross_ptr, cross_strides, r, k, CROSS_LAYOUT, 1, 5)
    own = matrix_of(table_ptr, problem, own_ptr, own_strides, k, k, OWN_LAYOUT, 2, 5)
    decay = tl.load(matrix_of(table_ptr, problem, decay_ptr, decay_strides, 1, 1, DECAY_LAYOUT, 3, 5)[0])
    weight = tl.load(matrix_of(table_ptr, problem, weight_ptr, weight_strides, 1, 1, WEIGHT_LAYOUT, 4, 5)[0])
    core = (core_ptr + problem * m * m, m, 1, m, m)

    nothing = tl.zeros((BLOCK, BLOCK), tl.float64)
    diagonal, entries = nothing, nothing
    for step in range(tiles_of(core, blocks)):
        row, column = tile_at(step, core, blocks)
        tile = core_tile(gram, cross, own, decay, weight, row, column, DIAGONAL)
        nothing += 0 * tile  # NaN if an entry is not finite
        on_diagonal = tl.where(row[:, None] == column[None, :], tile, 0.0)
        diagonal += on_diagonal
        entries = tl.maximum(entries, on_diagonal)
    largest = tl.max(tl.max(entries, 1), 0)
    # A comparison with NaN is false, so NaN makes ``finite`` false.
    finite = (total_of(nothing) == 0) & (total_of(diagonal) <= most)
    holds = finite & (largest >= _TINY)
    scale = tl.where(holds, _power_of_two(largest), 1.0)
    for step in range(tiles_of(core, blocks)):
        row, column = tile_at(step, core, blocks)
        tile = core_tile(gram, cross, own, decay, weight, row, column, DIAGONAL)
        tile = tl.where(holds, tile / scale, 0.0)
        empty = (row[:, None] == column[None, :]) & (tile <= 0)
        store_tile(core, row, column, tl.where(empty, _EMPTY, tile))

    scale = tl.where(finite, scale, float("nan"))
    tl.store(scale_ptr + problem, scale)
    for start in range(0, m, BLOCK):
        row = start + tl.arange(0, BLOCK)
        factor = tl.where(row < r, decay, weight)
        if DIAGONAL:
            old = tl.load(gram[0] + row.to(tl.int64) * gram[1], mask=row < r, other=1.0)
            factor = factor * old.to(tl.float64)
        tl.store(rows_ptr + problem * m + row, tl.sqrt(factor) + 0 * scale, mask=row < m)


@launch.counted("m s", lambda given, *_: rotation_cost(given["m"], given["s"]).flops)
@triton.jit
def eigh_rotation_kernel(
    levels_ptr, vectors_ptr, rows_ptr, scale_ptr, table_ptr,
    values_ptr, rotation_ptr, left_out_ptr,
    m, s, tol: tl.float64,
    levels_strides, vectors_strides, rows_strides, scale_strides,
    LEVELS_LAYOUT: tl.constexpr, VECTORS_LAYOUT: tl.constexpr, ROWS_LAYOUT: tl.constexpr, SCALE_LAYOUT: tl.constexpr,
    UNIT: tl.constexpr, TOLERANCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: problems × tiles of the rotation, at least one. Results are contiguous."""
    down, across = tl.maximum(tl.cdiv(m, BLOCK), 1), tl.maximum(tl.cdiv(s, BLOCK), 1)
    problem, _, tile_row, tile_column = place_of(down, across, 1)
    levels = matrix_of(table_ptr, problem, levels_ptr, levels_strides, m, 1, LEVELS_LAYOUT, 0, 4)
    vectors = matrix_of(table_ptr, problem, vectors_ptr, vectors_strides, m, m, VECTORS_LAYOUT, 1, 4)
    rows = matrix_of(table_ptr, problem, rows_ptr, rows_strides, m, 1, ROWS_LAYOUT, 2, 4)
    scale = tl.load(matrix_of(table_ptr, problem, scale_ptr, scale_strides, 1, 1, SCALE_LAYOUT, 3, 4)[0])
    row, column = tile_row * BLOCK + tl.arange(0, BLOCK), tile_column * BLOCK + tl.arange(0, BLOCK)
    inside = column < s
    # Eigenvalues come in ascending order, and values go out in descending order.
    place = tl.where(inside, m - 1 - column, m)
    if UNIT or TOLERANCE:
        least = tol * tl.load(levels[0] + (m - 1) * levels[1], mask=m > 0, other=0.0).to(tl.float64)
    else:
        least = tl.full((), _EMPTY / 2, tl.float64)  # leaves out empty coordinates only
    level = tl.load(levels[0] + place.to(tl.int64) * levels[1], mask=inside, other=_EMPTY).to(tl.float64)
    alive = level > least
    value = tl.where(alive & (level > 0), level, 0.0)
    if UNIT:
        own = tl.load(vectors[0] + column.to(tl.int64) * vectors[1] + place.to(tl.int64) * vectors[2], mask=inside)
        factor = tl.where(value > 0, 1 / tl.sqrt(tl.where(value > 0, value * scale, 1.0)), 0.0)
        # Tests the sign bit, as `copysign` does: −0 counts as negative.
        factor = tl.where(own.to(tl.float64).to(tl.int64, bitcast=True) < 0, -factor, factor)
    else:
        factor = tl.where(alive, 1.0, 0.0)
    of_row = tl.load(rows[0] + row.to(tl.int64) * rows[1], mask=row < m, other=0.0)
    tile = load_tile(vectors, row, place, tl.float64) * factor[None, :] * of_row[:, None]
    store_tile((rotation_ptr + problem * m * s, s, 1, m, s), row, column, tile)
    if tile_row == 0:
        tl.store(values_ptr + problem * s + column, value * scale, mask=inside)
        if tile_column == 0:
            most = tl.zeros((BLOCK,), tl.float64)
            for start in range(0, m, BLOCK):
                index = start + tl.arange(0, BLOCK)
                level = tl.load(levels[0] + index.to(tl.int64) * levels[1], mask=index < m, other=0.0).to(tl.float64)
                most = tl.maximum(most, tl.where((index < m - s) | (level <= least), level, 0.0))
            tl.store(left_out_ptr + problem, tl.max(most, 0) * scale)


def eigh_core(
    cross: Tensor, own: Tensor, gram: Tensor, decay: Tensor, weight: Tensor, rounded: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return K/σ, the factors of its rows, and σ."""
    batch, (r, k), limits = own.shape[:-2], cross.shape[-2:], torch.finfo(gram.dtype)
    core = (gram if rounded else own).new_empty(*batch, r + k, r + k)
    rows, scale = own.new_empty(*batch, r + k), own.new_empty(batch)
    diagonal = gram.ndim < own.ndim
    numbers = {"decay": decay[..., None, None], "weight": weight[..., None, None]}
    operands = arrange({"gram": gram[..., None] if diagonal else gram, "cross": cross, "own": own, **numbers})
    arguments = operands.arguments | {
        "core_ptr": core, "rows_ptr": rows, "scale_ptr": scale, "r": r, "k": k,
        "most": limits.max, "DIAGONAL": diagonal,
    }  # fmt: skip
    launch.start(eigh_core_kernel, (scale.numel(),), arguments, configs.eigh_core())
    return core, rows, scale


def eigh_rotation(
    levels: Tensor, vectors: Tensor, rows: Tensor, scale: Tensor, rank: int, tol: float, unit: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the values, the rotation, and the largest value left out."""
    batch, m = levels.shape[:-1], levels.shape[-1]
    values, rotation = levels.new_empty(*batch, rank), levels.new_empty(*batch, m, rank)
    left_out = levels.new_empty(batch)
    given = {"levels": levels[..., None], "vectors": vectors, "rows": rows[..., None], "scale": scale[..., None, None]}
    config = configs.eigh_core()
    arguments = arrange(given).arguments | {
        "values_ptr": values, "rotation_ptr": rotation, "left_out_ptr": left_out, "m": m, "s": rank,
        "tol": float(tol), "UNIT": bool(unit), "TOLERANCE": tol > 0,
    }  # fmt: skip
    down, across = (max(configs.tiles(size, config.blocks["BLOCK"]), 1) for size in (m, rank))
    launch.start(eigh_rotation_kernel, (left_out.numel() * down * across,), arguments, config)
    return values, rotation, left_out
