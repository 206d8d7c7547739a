"""OUT = β (A + Σᵢ Xᵢ Yᵢ) for tall Xᵢ and small Yᵢ.

OUT and A are (n, s), Xᵢ is (n, rᵢ), Yᵢ is (rᵢ, s), with one or two terms. `rotate` (U W₁ + P W₂), `damped_apply`
(β (V + U C)) and `kron_damped_apply` call this kernel. A program computes a tile of BLOCK_N rows and BLOCK_S columns of
OUT. If a tile is as wide as OUT, OUT may overwrite X₁: no other program reads the same rows of X₁, and a program stores
its tile after all its loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from brandla_kernels._kernels import configs
from brandla_kernels._kernels.launch import Launch, counted, products_in, start, target_of
from brandla_kernels._kernels.matrices import add_product, arrange, load_tile, matrix_of, store_tile
from brandla_kernels._signature import Matrices
from brandla_kernels.rotate import ROWS_AT_A_TIME, cost
from brandla_kernels.tall import Tall, columns, dtype_of, rows

# The most slabs that `rotate_` divides a matrix into: more would take more launches, fewer a larger temporary.
_SLABS = 4

# The factors of X Y, a tall matrix and a small one.
Term: TypeAlias = tuple[Matrices, Matrices]


def _flops(given: Mapping[str, Any], *matrices: tuple[int, int]) -> int:
    (n, s), _, (_, r1), _, (_, r2), _ = matrices
    return cost(n, r1, r2, s).flops + (0 if given["scale_ptr"] is None else 2 * n * s)


def _times(given: Mapping[str, Any]) -> dict[str, int]:
    """Return how often X₁ is moved: twice if OUT overwrites it."""
    return {"x1_ptr": 2 if given["x1_ptr"].data_ptr() == given["out_ptr"].data_ptr() else 1}


@counted("n s r1 r2", _flops, _times)
@triton.jit
def tall_product_kernel(
    out_ptr, add_ptr, x1_ptr, y1_ptr, x2_ptr, y2_ptr, scale_ptr, other_scale_ptr, table_ptr,
    n, s, r1, r2,
    out_strides, add_strides, x1_strides, y1_strides, x2_strides, y2_strides,
    OUT_LAYOUT: tl.constexpr, ADD_LAYOUT: tl.constexpr, X1_LAYOUT: tl.constexpr,
    Y1_LAYOUT: tl.constexpr, X2_LAYOUT: tl.constexpr, Y2_LAYOUT: tl.constexpr,
    TERMS: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Grid: problems × tiles of rows × tiles of columns."""
    programs = tl.cdiv(n, BLOCK_N) * tl.cdiv(s, BLOCK_S)
    problem = (tl.program_id(0) // programs).to(tl.int64)
    out = matrix_of(table_ptr, problem, out_ptr, out_strides, n, s, OUT_LAYOUT, 0, 6)
    x1 = matrix_of(table_ptr, problem, x1_ptr, x1_strides, n, r1, X1_LAYOUT, 2, 6)
    y1 = matrix_of(table_ptr, problem, y1_ptr, y1_strides, r1, s, Y1_LAYOUT, 3, 6)
    tiles_s = tl.cdiv(out[4], BLOCK_S)
    # One tile, or none: a smaller problem of a list has fewer tiles than programs.
    for tile in range(tl.program_id(0) % programs, tl.cdiv(out[3], BLOCK_N) * tiles_s, programs):
        row = (tile // tiles_s) * BLOCK_N + tl.arange(0, BLOCK_N)
        column = (tile % tiles_s) * BLOCK_S + tl.arange(0, BLOCK_S)
        total = tl.zeros((BLOCK_N, BLOCK_S), tl.float64 if COMPUTE == tl.float64 else tl.float32)
        # A matrix of a list may be smaller than its padded partner in a stack.
        total = add_product(total, x1, row, y1, column, tl.minimum(x1[4], y1[3]), PRECISION, BLOCK_R)
        if TERMS == 2:
            x2 = matrix_of(table_ptr, problem, x2_ptr, x2_strides, n, r2, X2_LAYOUT, 4, 6)
            y2 = matrix_of(table_ptr, problem, y2_ptr, y2_strides, r2, s, Y2_LAYOUT, 5, 6)
            total = add_product(total, x2, row, y2, column, tl.minimum(x2[4], y2[3]), PRECISION, BLOCK_R)
        if add_ptr is not None:
            add = matrix_of(table_ptr, problem, add_ptr, add_strides, n, s, ADD_LAYOUT, 1, 6)
            total += load_tile(add, row, column, total.dtype)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + problem)
            if other_scale_ptr is not None:
                scale *= tl.load(other_scale_ptr + problem)
            total *= scale.to(total.dtype)
        # OUT may be X₁: all threads must have loaded their part of it before any thread stores.
        tl.debug_barrier()
        store_tile(out, row, column, total)


def tall_product(terms: list[Term], *, add: Matrices | None = None, scales: tuple[Tensor, ...] = ()) -> Matrices:
    """Return β (A + Σ X Y), in the dtype of the first X.

    β is the product of ``scales``, at most two, each with one number per problem. For lists, each OUT has as many
    columns as its A or, without it, the stack of Y.
    """
    out = _new_out(terms, add)
    start(*_launch(terms, out, add, scales))
    return out


def _launch(terms: list[Term], out: Matrices, add: Matrices | None = None, scales: tuple[Tensor, ...] = ()) -> Launch:
    """Return the launch that writes the product to OUT."""
    (x1, y1), (x2, y2) = terms[0], terms[1] if len(terms) == 2 else (None, None)
    operands = arrange({"out": out, "add": add, "x1": x1, "y1": y1, "x2": x2, "y2": y2})
    n, s, dtype, target = rows(out), columns(out), dtype_of(out), target_of(out)
    config = configs.tall_product(target, dtype, s, operands.aligned, len(scales))
    tiles = configs.tiles(n, config.blocks["BLOCK_N"]) * configs.tiles(s, config.blocks["BLOCK_S"])
    arguments = operands.arguments | products_in(target, dtype) | {
        # Each is contiguous, with one number per problem.
        "scale_ptr": scales[0] if scales else None, "other_scale_ptr": scales[1] if len(scales) == 2 else None,
        "n": n, "s": s, "r1": columns(x1), "r2": 0 if x2 is None else columns(x2), "TERMS": len(terms),
    }  # fmt: skip
    return Launch(tall_product_kernel, (operands.problems * tiles,), arguments, config)


def _new_out(terms: list[Term], like: Matrices | None) -> Matrices:
    """Return an uninitialised OUT with the rows and the dtype of X, and the columns of ``like``, or else of Y."""
    tall, small = terms[0]
    if isinstance(tall, list):
        like = like if isinstance(like, list) else small
        widths = [matrix.shape[-1] for matrix in like] if isinstance(like, list) else [columns(small)] * len(tall)
        return [matrix.new_empty(matrix.shape[0], width) for matrix, width in zip(tall, widths, strict=True)]
    batch = max([part.shape[:-2] for part in chain((like,), *terms) if isinstance(part, Tensor)], key=len)
    return tall.new_empty(*batch, tall.shape[-2], columns(small))


def rotate(basis: Tall, panel: Tall, basis_rotation: Tensor, panel_rotation: Tensor) -> Tall:
    """Return U W₁ + P W₂."""
    return tall_product([(basis, basis_rotation), (panel, panel_rotation)])


def rotate_(basis: Matrices, panel: Matrices, basis_rotation: Tensor, panel_rotation: Tensor) -> None:
    """Overwrite U with U W₁ + P W₂: in place if a tile is as wide as U, else a list at once and a matrix in slabs."""
    terms: list[Term] = [(basis, basis_rotation), (panel, panel_rotation)]
    in_place = _launch(terms, basis)
    if in_place.config.blocks["BLOCK_S"] >= columns(basis):
        start(*in_place)
    elif isinstance(basis, list):
        rotated = _new_out(terms, basis)
        start(*_launch(terms, rotated))
        torch._foreach_copy_(basis, list(rotated))
    else:
        assert isinstance(panel, Tensor)
        slab = max(ROWS_AT_A_TIME, configs.tiles(basis.shape[-2], _SLABS))
        for old, new in zip(basis.split(slab, dim=-2), panel.split(slab, dim=-2), strict=True):
            old.copy_(rotate(old, new, basis_rotation, panel_rotation))
