"""Y = X Ω for a matrix Ω of random signs that is drawn where it is needed and never stored.

X is (m, n), Ω is (n, width), Y is (m, width). A program computes a tile of BLOCK_M rows and BLOCK_W columns of Y. One
call of Philox draws 32 rows of four columns of Ω as the bits of four words. In registers each bit becomes the sign of
a one; `brandla_kernels.sketch` has the map. X is the only matrix that is read.

±1 is exact in every precision. Float32 X is cut into three bfloat16 parts, which hold its 24 bits, 8 in each. Three
products on the bfloat16 units are then exact up to the float32 sum, in half the time of ``tf32x3`` on NVIDIA.

If Y has few tiles and n is large, the rows of Ω are split: a program sums over one stretch of rows into a workspace,
and a second kernel adds the stretches in their order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from brandla_kernels._kernels import configs
from brandla_kernels._kernels.inner_product import sum_parts
from brandla_kernels._kernels.launch import Target, counted, start, target_of, triton_dtype
from brandla_kernels._kernels.matrices import aligned, arrange, load_tile, matrix_of, place_of, store_tile, stretch_of
from brandla_kernels.sketch import COLUMNS_PER_CALL, ROWS_PER_CALL, STREAM, check_call, cost
from brandla_kernels.tall import Tall, columns, dtype_of, each, rows

_ROWS = tl.constexpr(ROWS_PER_CALL)
_COLUMNS = tl.constexpr(COLUMNS_PER_CALL)
_STREAM = tl.constexpr(STREAM)


@triton.jit
def _held(x, UNIT: tl.constexpr):
    """Return float32 ``x`` in UNIT, which can hold it exactly. Bfloat16 is the upper half of float32: no rounding."""
    if UNIT == tl.bfloat16:
        return (x.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(UNIT)


@triton.jit
def _cut(x):
    """Return the leading 8 bits of float32 ``x``, which bfloat16 can hold, and the rest; the rest of ∞ is 0."""
    leading = (x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return leading, tl.where(x == leading, 0.0, x - leading)


@triton.jit
def signs_tile(
    seed, problem, first_row, first_column, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr
):
    """Draw BLOCK_N rows and BLOCK_W columns of Ω in UNIT, starting at a multiple of 32 rows and of 4 columns."""
    block = first_row // _ROWS + tl.arange(0, BLOCK_N // _ROWS)
    quad = first_column // _COLUMNS + tl.arange(0, BLOCK_W // _COLUMNS)
    word0, word1, word2, word3 = tl.philox(seed, quad[None, :], block[:, None], problem, _STREAM)
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3)).reshape(BLOCK_N // _ROWS, 1, BLOCK_W)
    # Bit b of a word becomes the sign of the float32 number 1 at row b.
    shift = 31 - tl.arange(0, _ROWS).to(tl.uint32)[None, :, None]
    numbers = ((words << shift) & 0x80000000) | 0x3F800000
    return _held(numbers.reshape(BLOCK_N, BLOCK_W).to(tl.float32, bitcast=True), UNIT)


@counted(
    "m n width",
    lambda _, out, x: cost(x[0], x[1], out[1]).flops,
    # OUT is one stretch of the sum; the kernel writes them all.
    lambda given: {"out_ptr": given["SPLITS"]},
)
@triton.jit
def sketch_kernel(
    out_ptr, x_ptr, seed_ptr, table_ptr,
    m, n, width, first_problem, split_stride,
    out_strides, x_strides,
    OUT_LAYOUT: tl.constexpr, X_LAYOUT: tl.constexpr,
    SPLITS: tl.constexpr, COMPUTE: tl.constexpr, UNIT: tl.constexpr, CUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Grid: problems × SPLITS × tiles of Y. Each stretch of the sum lies ``split_stride`` behind the one before."""
    problem, split, tile_m, tile_w = place_of(tl.cdiv(m, BLOCK_M), tl.cdiv(width, BLOCK_W), SPLITS)
    first_row, first_column = tile_m * BLOCK_M, tile_w * BLOCK_W
    row, column = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_W)
    out = matrix_of(table_ptr, problem, out_ptr, out_strides, m, width, OUT_LAYOUT, 0, 2)
    x = matrix_of(table_ptr, problem, x_ptr, x_strides, m, n, X_LAYOUT, 1, 2)
    # A problem of a list may be smaller than the largest.
    if first_row >= x[3]:
        return
    seed, index = tl.load(seed_ptr), (problem + first_problem).to(tl.int32)
    first, last = stretch_of(x[4], split, SPLITS, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_W), tl.float64 if COMPUTE == tl.float64 else tl.float32)
    for start_n in range(first, last, BLOCK_N):
        signs = signs_tile(seed, index, start_n, first_column, UNIT, BLOCK_N, BLOCK_W)  # [BLOCK_N, BLOCK_W]
        values = load_tile(x, row, start_n + tl.arange(0, BLOCK_N), COMPUTE)  # [BLOCK_M, BLOCK_N]
        if CUT:
            high, rest = _cut(values)
            middle, low = _cut(rest)
            total = tl.dot(_held(low, UNIT), signs, total, input_precision="ieee", out_dtype=total.dtype)
            total = tl.dot(_held(middle, UNIT), signs, total, input_precision="ieee", out_dtype=total.dtype)
            total = tl.dot(_held(high, UNIT), signs, total, input_precision="ieee", out_dtype=total.dtype)
        else:
            total = tl.dot(values, signs, total, input_precision="ieee", out_dtype=total.dtype)
    # Y was allocated row by row, without gaps.
    store_tile((out[0] + split.to(tl.int64) * split_stride, width, 1, x[3], width), row, column, total)


def sketch(matrix: Tall, seed: Tensor, width: int, problem: int = 0) -> Tall:
    """Return X Ω with the Ω that `brandla_kernels.signs` draws from ``seed``, in float32 for half-precision X.

    ``problem`` is the index of the first problem.
    """
    check_call(matrix if isinstance(matrix, Tensor) else matrix[0], seed, width, problem)
    dtype = torch.promote_types(dtype_of(matrix), torch.float32)
    target = target_of(matrix)
    config = configs.sketch(target, dtype_of(matrix), width, aligned(matrix))
    tiles = configs.tiles(rows(matrix), config.blocks["BLOCK_M"]) * configs.tiles(width, config.blocks["BLOCK_W"])
    out = each(lambda one: one.new_empty(*one.shape[:-1], width, dtype=dtype), matrix)
    splits, first = 1, out
    if isinstance(matrix, Tensor):
        problems, steps = math.prod(matrix.shape[:-2]), configs.tiles(columns(matrix), config.blocks["BLOCK_N"])
        splits = configs.splits(target, steps, tiles * problems)
        if splits > 1:
            # The kernel is given the first stretch of each problem; the others lie behind it.
            parts = out.new_empty(problems, splits, rows(matrix), width)
            first = parts[:, 0]
    operands = arrange({"out": first, "x": matrix})
    compute, unit, cut = _units(target, dtype_of(matrix))
    arguments = operands.arguments | {
        "seed_ptr": seed, "m": rows(matrix), "n": columns(matrix), "width": width, "first_problem": problem,
        "split_stride": rows(matrix) * width, "SPLITS": splits,
        "COMPUTE": triton_dtype(compute), "UNIT": triton_dtype(unit), "CUT": cut,
    }  # fmt: skip
    start(sketch_kernel, (operands.problems * splits * tiles,), arguments, config)
    if splits > 1:
        sum_parts(parts, out)
    return out


def _units(target: Target, data: torch.dtype) -> tuple[torch.dtype, torch.dtype, bool]:
    """Return the dtype X is loaded in, the dtype of its products, and whether it is cut into three parts for these."""
    if data == torch.float64:
        return data, data, False
    if target.backend == "interpreter":
        # The interpreter's arithmetic on bfloat16 is wrong; float32 holds the parts as well.
        return torch.float32, torch.float32, data == torch.float32
    return (torch.float32, torch.bfloat16, True) if data == torch.float32 else (data, data, False)
