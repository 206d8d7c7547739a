"""OUT = β (A + Σᵢ Xᵢ Yᵢ) for tall Xᵢ and small Yᵢ.

OUT and A are (n, s), Xᵢ is (n, rᵢ), Yᵢ is (rᵢ, s), with one or two terms. `rotate` (U W₁ + P W₂), `damped_apply`
(β (V + U C)) and `kron_damped_apply` are calls of this kernel. A program computes a tile of BLOCK_N rows and BLOCK_S
columns of OUT.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from brandla_kernels._kernels import configs
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
    new_like,
    rows_of,
    shapes,
    store_tile,
)
from brandla_kernels._signature import Matrices
from brandla_kernels.rotate import cost
from brandla_kernels.tall import columns, dtype_of, rows


class Term(NamedTuple):
    """X Y: a tall matrix times a small one."""

    tall: Matrices
    small: Matrices


@triton.jit
def _add_product(
    total, x_ptr, x_row, x_column, y_ptr, y_row, y_column, row, column, n, r, s,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Add a tile of X Y to ``total``."""
    for start_r in range(0, r, BLOCK_R):
        inner = start_r + tl.arange(0, BLOCK_R)
        x = load_tile(x_ptr, x_row, x_column, row, inner, n, r, COMPUTE)  # [BLOCK_N, BLOCK_R]
        y = load_tile(y_ptr, y_row, y_column, inner, column, r, s, COMPUTE)  # [BLOCK_R, BLOCK_S]
        total = tl.dot(x, y, total, input_precision=PRECISION, out_dtype=total.dtype)
    return total


def _work(arguments: Mapping[str, Any]) -> Work:
    flops: Counter[int] = Counter()
    compute = bits_of(arguments["COMPUTE"])
    for (n, s), _, (_, r1), _, (_, r2), _ in shapes(arguments, "out", "add", "x1", "y1", "x2", "y2"):
        flops[compute] += cost(n, r1, r2, s).flops + (2 * n * s if arguments["SCALED"] else 0)
    moved = bytes_of(arguments, "out", "add", "x1", "y1", "x2", "y2", "scale")
    return Work(+flops, moved, {letter: arguments[letter] for letter in ("n", "s", "r1", "r2")})


@counted(_work)
@triton.jit
def tall_product_kernel(
    out_ptr, add_ptr, x1_ptr, y1_ptr, x2_ptr, y2_ptr, scale_ptr, table_ptr,
    n, s, r1, r2,
    out_strides, add_strides, x1_strides, y1_strides, x2_strides, y2_strides,
    OUT_LAYOUT: tl.constexpr, ADD_LAYOUT: tl.constexpr, X1_LAYOUT: tl.constexpr,
    Y1_LAYOUT: tl.constexpr, X2_LAYOUT: tl.constexpr, Y2_LAYOUT: tl.constexpr,
    TERMS: tl.constexpr, ADD: tl.constexpr, SCALED: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Grid: problems × tiles of rows × tiles of columns."""
    programs = tl.cdiv(n, BLOCK_N) * tl.cdiv(s, BLOCK_S)
    problem = (tl.program_id(0) // programs).to(tl.int64)
    first_tile = tl.program_id(0) % programs
    out_entry = entry_of(table_ptr, problem, 0, 6)
    add_entry = entry_of(table_ptr, problem, 1, 6)
    x1_entry = entry_of(table_ptr, problem, 2, 6)
    y1_entry = entry_of(table_ptr, problem, 3, 6)
    x2_entry = entry_of(table_ptr, problem, 4, 6)
    y2_entry = entry_of(table_ptr, problem, 5, 6)
    n = rows_of(out_entry, n, OUT_LAYOUT)
    s = columns_of(out_entry, s, OUT_LAYOUT)
    # A problem of a list may be smaller than the stack beside it.
    r1 = tl.minimum(columns_of(x1_entry, r1, X1_LAYOUT), rows_of(y1_entry, r1, Y1_LAYOUT))
    s1 = tl.minimum(s, columns_of(y1_entry, s, Y1_LAYOUT))
    out, out_row, out_column = locate(out_entry, out_ptr, out_strides, problem, OUT_LAYOUT)
    x1, x1_row, x1_column = locate(x1_entry, x1_ptr, x1_strides, problem, X1_LAYOUT)
    y1, y1_row, y1_column = locate(y1_entry, y1_ptr, y1_strides, problem, Y1_LAYOUT)

    tiles_s = tl.cdiv(s, BLOCK_S)
    tiles = tl.cdiv(n, BLOCK_N) * tiles_s
    for tile in range(first_tile, tiles, programs):
        row = (tile // tiles_s) * BLOCK_N + tl.arange(0, BLOCK_N)
        column = (tile % tiles_s) * BLOCK_S + tl.arange(0, BLOCK_S)
        total = tl.zeros((BLOCK_N, BLOCK_S), tl.float64 if COMPUTE == tl.float64 else tl.float32)
        total = _add_product(
            total, x1, x1_row, x1_column, y1, y1_row, y1_column, row, column, n, r1, s1, COMPUTE, PRECISION, BLOCK_R
        )
        if TERMS == 2:
            r2_own = tl.minimum(columns_of(x2_entry, r2, X2_LAYOUT), rows_of(y2_entry, r2, Y2_LAYOUT))
            s2 = tl.minimum(s, columns_of(y2_entry, s, Y2_LAYOUT))
            x2, x2_row, x2_column = locate(x2_entry, x2_ptr, x2_strides, problem, X2_LAYOUT)
            y2, y2_row, y2_column = locate(y2_entry, y2_ptr, y2_strides, problem, Y2_LAYOUT)
            total = _add_product(
                total, x2, x2_row, x2_column, y2, y2_row, y2_column, row, column, n, r2_own, s2, COMPUTE,
                PRECISION, BLOCK_R,
            )  # fmt: skip
        if ADD:
            add, add_row, add_column = locate(add_entry, add_ptr, add_strides, problem, ADD_LAYOUT)
            total += load_tile(add, add_row, add_column, row, column, n, s, total.dtype)
        if SCALED:
            total *= tl.load(scale_ptr + problem).to(total.dtype)
        store_tile(out, out_row, out_column, row, column, n, s, total)


def tall_product(
    terms: list[Term],
    *,
    add: Matrices | None = None,
    scale: Tensor | None = None,
    as_wide_as: Matrices | None = None,
) -> Matrices:
    """Return β (A + Σ X Y), in the dtype of the first X; β is 1 or ``scale``, one number a problem.

    For lists, each OUT has as many columns as its A, or its matrix of ``as_wide_as``, or the stack of Y.
    """
    out = _new_out(terms, add if as_wide_as is None else as_wide_as)
    _launch(out, terms, add, scale)
    return out


def _new_out(terms: list[Term], like: Matrices | None) -> Matrices:
    """OUT has the rows and the dtype of X, and the columns of ``like`` or, without it, of Y."""
    tall, small = terms[0]
    if isinstance(tall, list):
        like = like if isinstance(like, list) else small
        widths = [matrix.shape[-1] for matrix in like] if isinstance(like, list) else [columns(small)] * len(tall)
        return new_like(tall, widths)
    others = [like, *(term.small for term in terms), *(term.tall for term in terms)]
    batch = max((tuple(other.shape[:-2]) for other in others if isinstance(other, Tensor)), key=len)
    return tall.new_empty(*batch, tall.shape[-2], columns(small))


def _launch(out: Matrices, terms: list[Term], add: Matrices | None, scale: Tensor | None) -> None:
    (x1, y1), (x2, y2) = terms[0], terms[1] if len(terms) == 2 else (None, None)
    operands = arrange({"out": out, "add": add, "x1": x1, "y1": y1, "x2": x2, "y2": y2})
    n, s, target = rows(out), columns(out), target_of(out[0] if isinstance(out, list) else out)
    config = configs.tall_product(target, dtype_of(out), s, operands.aligned)
    tiles = triton.cdiv(n, config.blocks["BLOCK_N"]) * triton.cdiv(s, config.blocks["BLOCK_S"])
    arguments = operands.arguments() | {
        # One number a problem, next to each other.
        "scale_ptr": None if scale is None else scale.contiguous(),
        "n": n, "s": s, "r1": columns(x1), "r2": columns(x2) if x2 is not None else 0,
        "TERMS": len(terms), "ADD": add is not None, "SCALED": scale is not None,
        "COMPUTE": triton_dtype(dtype_of(out)), "PRECISION": product_precision(target, dtype_of(out)),
    }  # fmt: skip
    start(tall_product_kernel, (operands.problems * tiles,), arguments, config)
