"""The damped applications: projections C = UᵀV with their coefficients Z and β, products Z C, and the final sum.

The projections of one side or of two take two launches, and each side takes one `tall_product`. In the first launch
programs sum tiles of C over stretches of rows, as in `inner_product`. If Z and β are not given, its first programs
compute them meanwhile (`damped_core`), one per factor. The second launch adds up the stretches in their order, and
multiplies by Z. There are no atomic additions, so two runs are equal to the bit.

Two sides are either independent, (U_L, P) and (U_R, Q), or they share one W, (U_L, W) and (U_R, Wᵀ). For one W, with
T = Z_R U_Rᵀ, X = W U_R and Y = Z_L U_LᵀW,

    OUT = β_L β_R (W + U_L (Y + (Z_L U_LᵀX) T) + X T),

the two launches compute Y, X, Z_L U_LᵀX and T: the program that sums a tile of X multiplies it by U_Lᵀ while it holds
the tile. A third launch makes the sum in the inner brackets, and a fourth the outer sum. W is read three times: for
U_LᵀW, for W U_R, and for the outer sum. One pass for both projections would have to write a part of U_LᵀW for every
block of BLOCK_N rows of W and read it again, 2·r_L/BLOCK_N times the size of W. From r_L = BLOCK_N/2 on this is more
than the pass it saves, and at the ranks in use the products take longer than either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from brandla_kernels._kernels import configs
from brandla_kernels._kernels.damped_core import store_coefficients, workspace
from brandla_kernels._kernels.inner_product import sum_over_rows
from brandla_kernels._kernels.launch import core_dtype, counted, product_precision, products_in, start, target_of
from brandla_kernels._kernels.matrices import aligned, arrange, load_tile, matrix_of, place_of, store_tile, stretch_of
from brandla_kernels._kernels.root_core import transposed
from brandla_kernels._kernels.tall_product import tall_product
from brandla_kernels._signature import Matrices
from brandla_kernels.tall import columns, device_of, dtype_of, each, rows

# The form of Z that the second launch multiplies a sum by.
_NOTHING = tl.constexpr(0)
_DIAGONAL = tl.constexpr(1)
_MATRIX = tl.constexpr(2)
# Rows of U_LᵀX that a program computes at a time.
_BLOCK_L = tl.constexpr(32)


class Side(NamedTuple):
    """β (I + U Z Uᵀ), and V: ``small`` is Z if ``numbers`` is (β,), and eigenvalues or S if ``numbers`` is (λ, τ)."""

    basis: Matrices
    rhs: Matrices
    small: Matrices
    numbers: tuple[Tensor, ...]

    @property
    def batch(self) -> tuple[int, ...]:
        return (len(self.basis),) if isinstance(self.basis, list) else tuple(self.basis.shape[:-2])

    @property
    def is_diagonal(self) -> bool:
        """Whether Z has one number per column of U."""
        if isinstance(self.small, list):
            return self.small[0].ndim == 1
        return self.small.ndim == len(self.batch) + 1

    @property
    def to_invert(self) -> Matrices | None:
        """Eigenvalues, as matrices of one column, or S; None if Z is given."""
        if len(self.numbers) == 1:
            return None
        return each(lambda values: values[..., None], self.small) if self.is_diagonal else self.small

    def coefficients(self, number: int, like: Tensor, core: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Return Z and β, contiguous, and the kernel arguments for computing them; an S is inverted in ``core``."""
        if len(self.numbers) == 1:
            assert isinstance(self.small, Tensor)
            return self.small.contiguous(), self.numbers[0].contiguous(), {}
        problems, r = like.shape[0], columns(self.basis)
        middle = like.new_empty(problems, *([r] if self.is_diagonal else [r, r]))
        work = None if self.is_diagonal else like.new_empty(problems, workspace(r), dtype=core)
        # Views, unless a batch of numbers has irregular strides.
        damping, tail = (values.reshape(-1) for values in self.numbers)
        scale = like.new_empty(problems)
        return middle, scale, {
            f"damping{number}_ptr": damping, f"damping{number}_stride": damping.stride(0),
            f"tail{number}_ptr": tail, f"tail{number}_stride": tail.stride(0),
            f"middle{number}_ptr": middle, f"scale{number}_ptr": scale, f"work{number}_ptr": work,
        }  # fmt: skip


@triton.jit
def _store_projection(
    parts_ptr, problem, split, tile_r, tile_k, x, y, r, k, SPLITS: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store a tile of XᵀY, summed over one stretch of rows; return its row and column indices, and the tile."""
    index_r = tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
    index_k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    first, last = stretch_of(x[3], split, SPLITS, BLOCK_N)
    total = sum_over_rows(x, index_r, y, index_k, first, last, None, None, COMPUTE, PRECISION, BLOCK_N)
    store_tile((parts_ptr + (problem * SPLITS + split) * r * k, k, 1, r, k), index_r, index_k, total)
    return index_r, index_k, total


@triton.jit
def _store_both(both_ptr, x, index_k, index_r, total, r1, r2, COMPUTE: tl.constexpr, PRECISION: tl.constexpr):
    """Store the part that ``total``, a tile of Xᵀ, adds to U_LᵀX; ``x`` is U_L."""
    right = tl.trans(total.to(COMPUTE))
    for start_l in range(0, r1, _BLOCK_L):
        index_l = start_l + tl.arange(0, _BLOCK_L)
        left = load_tile(x, index_k, index_l, COMPUTE)
        part = tl.dot(tl.trans(left), right, input_precision=PRECISION, out_dtype=total.dtype)
        store_tile((both_ptr, r2, 1, r1, r2), index_l, index_r, part)


@triton.jit
def _address(is_second, second, first):
    """Return one of two pointers. A choice between pointers fails in Triton 3.6's AMD compiler (triton pull 10701)."""
    return tl.where(is_second, second.to(tl.int64), first.to(tl.int64)).to(first.dtype)


@triton.jit
def _store_either(problem, is_second, side, other, PRECISION: tl.constexpr):
    """Store Z and β of one of two sides. Sides of one kind, d or S, share the code, whose compilation takes seconds."""
    if (side[6] is None) == (other[6] is None):
        small = (
            _address(is_second, other[0][0], side[0][0]), tl.where(is_second, other[0][1], side[0][1]),
            tl.where(is_second, other[0][2], side[0][2]), tl.where(is_second, other[0][3], side[0][3]),
            tl.where(is_second, other[0][4], side[0][4]),
        )  # fmt: skip
        store_coefficients(problem, (
            small, tl.where(is_second, other[1], side[1]),
            _address(is_second, other[2], side[2]), _address(is_second, other[3], side[3]),
            _address(is_second, other[4], side[4]), _address(is_second, other[5], side[5]),
            None if side[6] is None else _address(is_second, other[6], side[6]),
        ), PRECISION)  # fmt: skip
    elif is_second:
        store_coefficients(problem, other, PRECISION)
    else:
        store_coefficients(problem, side, PRECISION)


def _flops(given: Mapping[str, Any], *matrices: tuple[int, int]) -> int:
    (n1, r1), (_, k1), (n2, r2), (_, k2), *_ = matrices
    both = 0 if given["both_ptr"] is None else 2 * n1 * r1 * r2
    return 2 * n1 * r1 * k1 + 2 * n2 * r2 * k2 + both


@counted("n1 r1 k1 n2 r2 k2", _flops)
@triton.jit
def damped_project_kernel(
    x1_ptr, y1_ptr, x2_ptr, y2_ptr, small1_ptr, small2_ptr, table_ptr, parts1_ptr,
    problems, n1, r1, k1, n2, r2, k2,
    x1_strides, y1_strides, x2_strides, y2_strides, small1_strides, small2_strides,
    X1_LAYOUT: tl.constexpr, Y1_LAYOUT: tl.constexpr, X2_LAYOUT: tl.constexpr, Y2_LAYOUT: tl.constexpr,
    SMALL1_LAYOUT: tl.constexpr, SMALL2_LAYOUT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS1: tl.constexpr,
    damping1_ptr=None, tail1_ptr=None, middle1_ptr=None, scale1_ptr=None, work1_ptr=None,
    damping1_stride=0, tail1_stride=0,
    damping2_ptr=None, tail2_ptr=None, middle2_ptr=None, scale2_ptr=None, work2_ptr=None,
    damping2_stride=0, tail2_stride=0,
    parts2_ptr=None, both_ptr=None, SPLITS2: tl.constexpr = 1,
):  # fmt: skip
    """Grid: the problems of each side whose Z is to be computed, then problems × SPLITS × tiles of C of each side.

    Parts of C are (problems, SPLITS, r, k), and those of U_LᵀX (problems, SPLITS2 × tiles of columns of Xᵀ, r1, r2).
    """
    program = tl.program_id(0)
    first = 0  # the first program of the projections
    if damping1_ptr is not None:
        first = problems if damping2_ptr is None else 2 * problems
        if program < first:
            problem = (program % problems).to(tl.int64)
            small = matrix_of(table_ptr, problem, small1_ptr, small1_strides, r1, r1, SMALL1_LAYOUT, 4, 6)
            damping, tail = damping1_ptr + problem * damping1_stride, tail1_ptr + problem * tail1_stride
            side = (small, r1, damping, tail, middle1_ptr, scale1_ptr, work1_ptr)
            if damping2_ptr is None:
                store_coefficients(problem, side, PRECISION)
            else:
                small = matrix_of(table_ptr, problem, small2_ptr, small2_strides, r2, r2, SMALL2_LAYOUT, 5, 6)
                damping, tail = damping2_ptr + problem * damping2_stride, tail2_ptr + problem * tail2_stride
                other = (small, r2, damping, tail, middle2_ptr, scale2_ptr, work2_ptr)
                _store_either(problem, program >= problems, side, other, PRECISION)

    tiles_r, tiles_k = tl.cdiv(r1, BLOCK_R), tl.cdiv(k1, BLOCK_K)
    second = first + problems * SPLITS1 * tiles_r * tiles_k  # the first program of the second side's projection
    if (program >= first) & (program < second):
        problem, split, tile_r, tile_k = place_of(tiles_r, tiles_k, SPLITS1, first)
        x = matrix_of(table_ptr, problem, x1_ptr, x1_strides, n1, r1, X1_LAYOUT, 0, 6)
        y = matrix_of(table_ptr, problem, y1_ptr, y1_strides, n1, k1, Y1_LAYOUT, 1, 6)
        _store_projection(
            parts1_ptr, problem, split, tile_r, tile_k, x, y, r1, k1, SPLITS1,
            COMPUTE, PRECISION, BLOCK_R, BLOCK_K, BLOCK_N,
        )  # fmt: skip
    if x2_ptr is not None:
        if program >= second:
            down, across = tl.cdiv(r2, BLOCK_R), tl.cdiv(k2, BLOCK_K)
            problem, split, tile_r, tile_k = place_of(down, across, SPLITS2, second)
            x = matrix_of(table_ptr, problem, x2_ptr, x2_strides, n2, r2, X2_LAYOUT, 2, 6)
            y = matrix_of(table_ptr, problem, y2_ptr, y2_strides, n2, k2, Y2_LAYOUT, 3, 6)
            index_r, index_k, total = _store_projection(
                parts2_ptr, problem, split, tile_r, tile_k, x, y, r2, k2, SPLITS2,
                COMPUTE, PRECISION, BLOCK_R, BLOCK_K, BLOCK_N,
            )  # fmt: skip
            if both_ptr is not None:
                left = matrix_of(table_ptr, problem, x1_ptr, x1_strides, n1, r1, X1_LAYOUT, 0, 6)
                both = both_ptr + ((problem * SPLITS2 + split) * across + tile_k) * r1 * r2
                _store_both(both, left, index_k, index_r, total, r1, r2, COMPUTE, PRECISION)


@triton.jit
def _sum(source, row, column, parts, part_size):
    """Add up a tile of the parts in order, in their dtype."""
    total = tl.zeros((row.shape[0], column.shape[0]), source[0].dtype.element_ty)
    place = source[0]
    for _ in range(parts):
        total += load_tile((place, source[1], source[2], source[3], source[4]), row, column, total.dtype)
        place += part_size
    return total


@triton.jit
def _store_middle(
    problem, tile, out, source, parts, middle_ptr, KIND: tl.constexpr, PRECISION: tl.constexpr, blocks: tl.constexpr
):
    """Store tile ``tile`` of Z Σ parts if this product has it, and return its number among the next product's tiles.

    A negative number belongs to an earlier product. Z and the parts are contiguous.
    """
    r, part_size, across = out[3], out[3] * out[4], tl.cdiv(out[4], blocks[1])
    tiles = tl.cdiv(r, blocks[0]) * across
    if (tile >= 0) & (tile < tiles):
        row = (tile // across) * blocks[0] + tl.arange(0, blocks[0])
        column = (tile % across) * blocks[1] + tl.arange(0, blocks[1])
        if KIND == _MATRIX:
            middle = (middle_ptr + problem * r * r, r, 1, r, r)
            total = tl.zeros((blocks[0], blocks[1]), source[0].dtype.element_ty)
            for start in range(0, r, blocks[2]):
                inner = start + tl.arange(0, blocks[2])
                left = load_tile(middle, row, inner, total.dtype)
                right = _sum(source, inner, column, parts, part_size)
                total = tl.dot(left, right, total, input_precision=PRECISION, out_dtype=total.dtype)
        else:
            total = _sum(source, row, column, parts, part_size)
            if KIND == _DIAGONAL:
                total *= tl.load(middle_ptr + problem * r + row, mask=row < r, other=0.0)[:, None]
        store_tile(out, row, column, total)
    return tile - tiles


@counted("r1 k1 r2 k2")
# Triton would compile further kernels for values that are 1 or multiples of 16, none of them faster.
@triton.jit(do_not_specialize=["tiles", "splits1", "splits2", "splits_both"])
def damped_middle_kernel(
    parts1_ptr, middle1_ptr, out1_ptr, tiles, r1, k1, splits1, r2, k2,
    KIND1: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
    parts2_ptr=None, middle2_ptr=None, out2_ptr=None, splits2=1, KIND2: tl.constexpr = 0,
    both_ptr=None, out_both_ptr=None, splits_both=1, turned_ptr=None, n2=0,
    basis_ptr=None, table_ptr=None, basis_strides=(0, 0, 0), BASIS_LAYOUT: tl.constexpr = 0,
):  # fmt: skip
    """Grid: problems × tiles of Z₁C₁, then of Z₂C₂; or, for one W, then of C₂ᵀ, Z₁ (U_LᵀW U_R) and Z₂ U_Rᵀ."""
    blocks: tl.constexpr = (BLOCK_R, BLOCK_K, BLOCK_P)
    problem, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    out = (out1_ptr + problem * r1 * k1, k1, 1, r1, k1)
    parts = (parts1_ptr + problem * splits1 * r1 * k1, k1, 1, r1, k1)
    tile = _store_middle(problem, tile, out, parts, splits1, middle1_ptr, KIND1, PRECISION, blocks)
    if parts2_ptr is not None:
        place = out2_ptr + problem * r2 * k2
        parts = (parts2_ptr + problem * splits2 * r2 * k2, k2, 1, r2, k2)
        if both_ptr is None:
            out = (place, k2, 1, r2, k2)
            _store_middle(problem, tile, out, parts, splits2, middle2_ptr, KIND2, PRECISION, blocks)
        else:
            out = (place, 1, r2, r2, k2)
            tile = _store_middle(problem, tile, out, parts, splits2, middle2_ptr, _NOTHING, PRECISION, blocks)
            out = (out_both_ptr + problem * r1 * r2, r2, 1, r1, r2)
            parts = (both_ptr + problem * splits_both * r1 * r2, r2, 1, r1, r2)
            tile = _store_middle(problem, tile, out, parts, splits_both, middle1_ptr, KIND1, PRECISION, blocks)
            basis = transposed(matrix_of(table_ptr, problem, basis_ptr, basis_strides, n2, r2, BASIS_LAYOUT, 0, 1))
            out = (turned_ptr + problem * r2 * n2, n2, 1, r2, n2)
            _store_middle(problem, tile, out, basis, 1, middle2_ptr, KIND2, PRECISION, blocks)


class _Projection(NamedTuple):
    """A side after the first launch: the parts of C = UᵀV, Z and β."""

    side: Side
    parts: Tensor  # (problems, splits, r, k)
    middle: Tensor
    scale: Tensor


def damped(*given: Any) -> Matrices:
    """Return β (V + U Z UᵀV) from U, Z, β and V, or as a damped inverse from U, d or S, λ, τ and V."""
    *operator, rhs = given
    return _apply(_side(operator, rhs))[0]


def pair_damped(*given: Any) -> tuple[Matrices, Matrices]:
    """Return `damped` of two sides, from the arguments of the left side, those of the right side, and the two V."""
    *operators, left_rhs, right_rhs = given
    half = len(operators) // 2
    first, second = _apply(_side(operators[:half], left_rhs), _side(operators[half:], right_rhs))
    return first, second


def kron_damped(*given: Any) -> Matrices:
    """Return the left operator times W times the right operator."""
    *operators, matrix = given
    half = len(operators) // 2
    left, right = _side(operators[:half], matrix), _side(operators[half:], each(lambda part: part.mT, matrix))
    (on_left, on_right), both = _project((left, right), share_matrix=True)
    r1, q, r2, p = *on_left.parts.shape[-2:], *on_right.parts.shape[-2:]
    shapes = ((r1, q), (p, r2), (r1, r2), (r2, q))  # of Y, X, Z_L U_LᵀX and T
    y, x, inner, t = (on_left.parts.new_empty(*left.batch, *shape) for shape in shapes)
    _multiply((on_left, on_right), (y, x), (both, inner, t))
    scales = on_left.scale, on_right.scale
    return tall_product([(left.basis, tall_product([(inner, t)], add=y)), (x, t)], add=matrix, scales=scales)


def _side(operator: Sequence[Any], rhs: Matrices) -> Side:
    basis, small, *numbers = operator
    return Side(basis, rhs, small, tuple(numbers))


def _apply(*sides: Side) -> list[Matrices]:
    """Return the operator of one side applied to its V, or those of two independent sides."""
    projections, _ = _project(sides, share_matrix=False)
    inner = [own.parts.new_empty(*own.side.batch, *own.parts.shape[-2:]) for own in projections]
    _multiply(projections, inner)
    return [
        tall_product([(own.side.basis, small)], add=own.side.rhs, scales=(own.scale,))
        for own, small in zip(projections, inner, strict=True)
    ]


def _project(sides: Sequence[Side], *, share_matrix: bool) -> tuple[list[_Projection], Tensor | None]:
    """Start the first launch; return the projections, and the parts of U_LᵀX if two sides share one W."""
    given: dict[str, Matrices | None] = dict.fromkeys(("x1", "y1", "x2", "y2", "small1", "small2"))
    for number, side in enumerate(sides, 1):
        given |= {f"x{number}": side.basis, f"y{number}": side.rhs, f"small{number}": side.to_invert}
    operands, basis = arrange(given), sides[0].basis
    problems, dtype, target, device = operands.problems, dtype_of(basis), target_of(basis), device_of(basis)
    all_aligned = all(aligned(matrix) for side in sides for matrix in (side.basis, side.rhs))
    shapes = [(columns(side.basis), columns(side.rhs)) for side in sides]
    most_r, most_k = map(max, zip(*shapes, strict=True))
    config = configs.damped_project(target, dtype, most_r, most_k, all_aligned, share_matrix)
    block_r, block_k, block_n = (config.blocks[name] for name in ("BLOCK_R", "BLOCK_K", "BLOCK_N"))
    tiles = [problems * configs.tiles(r, block_r) * configs.tiles(k, block_k) for r, k in shapes]
    arguments: dict[str, Any] = operands.arguments | products_in(target, dtype)
    arguments |= {"problems": problems, "n2": 0, "r2": 0, "k2": 0}
    projections, programs, core = [], 0, core_dtype(target, dtype)
    for number, (side, (r, k), side_tiles) in enumerate(zip(sides, shapes, tiles, strict=True), 1):
        n = rows(side.basis)
        splits = configs.splits(target, configs.tiles(n, block_n), sum(tiles))
        parts = torch.empty(problems, splits, r, k, dtype=dtype, device=device)
        middle, scale, to_compute = side.coefficients(number, parts, core)
        sizes = {f"n{number}": n, f"r{number}": r, f"k{number}": k, f"SPLITS{number}": splits}
        arguments |= sizes | {f"parts{number}_ptr": parts} | to_compute
        projections.append(_Projection(side, parts, middle, scale))
        programs += splits * side_tiles + (problems if to_compute else 0)
    both = None
    if share_matrix:
        (_, splits, r2, k2), r1 = projections[1].parts.shape, shapes[0][0]
        both = torch.empty(problems, splits * configs.tiles(k2, block_k), r1, r2, dtype=dtype, device=device)
    start(damped_project_kernel, (programs,), arguments | {"both_ptr": both}, config)
    return projections, both


def _multiply(
    projections: Sequence[_Projection], outs: Sequence[Tensor], kron: tuple[Tensor | None, Tensor, Tensor] | None = None
) -> None:
    """Start the second launch: Z C to ``outs``, or for one W, Y and X; ``kron`` is U_LᵀX in parts, Z_L U_LᵀX and T."""
    dtype, target = outs[0].dtype, target_of(outs[0])
    arguments: dict[str, Any] = {"PRECISION": product_precision(target, dtype), "r2": 0, "k2": 0}
    for number, (own, out) in enumerate(zip(projections, outs, strict=True), 1):
        problems, splits, r, k = own.parts.shape
        kind = _DIAGONAL if own.side.is_diagonal else _MATRIX
        arguments |= {
            f"parts{number}_ptr": own.parts, f"middle{number}_ptr": own.middle, f"out{number}_ptr": out,
            f"splits{number}": splits, f"r{number}": r, f"k{number}": k, f"KIND{number}": kind.value,
        }  # fmt: skip
    shapes = [own.parts.shape[-2:] for own in projections]
    config = configs.damped_middle(target, *map(max, zip(*shapes, strict=True)))
    if kron is not None:
        both, inner, t = kron
        assert both is not None
        arguments |= arrange({"basis": projections[1].side.basis}).arguments | {
            "both_ptr": both, "out_both_ptr": inner, "turned_ptr": t, "splits_both": both.shape[1], "n2": t.shape[-1],
        }  # fmt: skip
        shapes += [inner.shape[-2:], t.shape[-2:]]
    block_r, block_k = config.blocks["BLOCK_R"], config.blocks["BLOCK_K"]
    tiles = sum(configs.tiles(r, block_r) * configs.tiles(k, block_k) for r, k in shapes)
    start(damped_middle_kernel, (problems * tiles,), arguments | {"tiles": tiles}, config)
