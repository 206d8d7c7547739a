"""The damped applications: projections C = UᵀV with their coefficients Z and β, products Z C, and the last sum.

Two launches for the projections of one side or of two, and one `tall_product` a side. In the first, programs sum tiles
of C over stretches of rows, as in `inner_product`; where Z and β are not given, its first programs compute them
meanwhile (`damped_core`), one a factor. The second adds up the stretches in their order, and multiplies by Z. No atomic
addition takes part, so two runs are equal to the bit.

Two sides are either independent, (U_L, P) and (U_R, Q), or those of one W, (U_L, W) and (U_R, Wᵀ). Of one W, with
T = Z_R U_Rᵀ, X = W U_R and Y = Z_L U_LᵀW,

    OUT = β_L β_R (W + U_L (Y + (Z_L U_LᵀX) T) + X T),

the two launches compute Y, X, Z_L U_LᵀX and T: the program that has a tile of X multiplies it by U_Lᵀ before it lets go
of it. One more makes the sum in the inner brackets, and one the outer. W is read three times: for U_LᵀW, for W U_R, and
for the sum. One pass for both projections would have to write a part of U_LᵀW for every block of BLOCK_N rows of W and
read it again, 2·r_L/BLOCK_N times the size of W: more than the pass it saves from r_L = BLOCK_N/2 on, and at the ranks
this is for the products take longer than either.
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

# What the second launch multiplies a sum by.
_NOTHING = tl.constexpr(0)
_DIAGONAL = tl.constexpr(1)
_MATRIX = tl.constexpr(2)
# Rows of U_LᵀX at a time.
_BLOCK_L = tl.constexpr(32)


class Half(NamedTuple):
    """β (I + U Z Uᵀ) and V: ``small`` is Z for ``numbers`` (β,), and eigenvalues or S for (λ, τ)."""

    basis: Matrices
    rhs: Matrices
    small: Matrices
    numbers: tuple[Tensor, ...]

    @property
    def batch(self) -> tuple[int, ...]:
        return (len(self.basis),) if isinstance(self.basis, list) else tuple(self.basis.shape[:-2])

    @property
    def is_diagonal(self) -> bool:
        """Whether Z is one number a column of U."""
        if isinstance(self.small, list):
            return self.small[0].ndim == 1
        return self.small.ndim == len(self.batch) + 1

    @property
    def unknown(self) -> Matrices | None:
        """Eigenvalues, as matrices of one column, or S; None where Z is given."""
        if len(self.numbers) == 1:
            return None
        return each(lambda values: values[..., None], self.small) if self.is_diagonal else self.small

    def coefficients(self, side: int, like: Tensor, core: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Return Z and β, contiguous, and what the first launch takes to compute them, Z of an S in ``core``."""
        if len(self.numbers) == 1:
            assert isinstance(self.small, Tensor)
            return self.small.contiguous(), self.numbers[0].contiguous(), {}
        problems, r = like.shape[0], columns(self.basis)
        middle = like.new_empty(problems, *([r] if self.is_diagonal else [r, r]))
        work = None if self.is_diagonal else like.new_empty(problems, workspace(r), dtype=core)
        # Views, unless a batch of numbers has irregular strides.
        damping, tail = (number.reshape(-1) for number in self.numbers)
        scale = like.new_empty(problems)
        return middle, scale, {
            f"damping{side}_ptr": damping, f"damping{side}_stride": damping.stride(0),
            f"tail{side}_ptr": tail, f"tail{side}_stride": tail.stride(0),
            f"middle{side}_ptr": middle, f"scale{side}_ptr": scale, f"work{side}_ptr": work,
        }  # fmt: skip


@triton.jit
def _store_projection(
    parts_ptr, problem, split, tile_r, tile_k, x, y, r, k, SPLITS: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store a tile of XᵀY, summed over a stretch; return its rows and columns, and the tile."""
    index_r = tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
    index_k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    first, last = stretch_of(x[3], split, SPLITS, BLOCK_N)
    total = sum_over_rows(x, index_r, y, index_k, first, last, None, None, COMPUTE, PRECISION, BLOCK_N)
    store_tile((parts_ptr + (problem * SPLITS + split) * r * k, k, 1, r, k), index_r, index_k, total)
    return index_r, index_k, total


@triton.jit
def _store_both(both_ptr, x, index_k, index_r, total, r1, r2, COMPUTE: tl.constexpr, PRECISION: tl.constexpr):
    """Store the part of U_LᵀX of a tile of Xᵀ."""
    right = tl.trans(total.to(COMPUTE))
    for start_l in range(0, r1, _BLOCK_L):
        index_l = start_l + tl.arange(0, _BLOCK_L)
        left = load_tile(x, index_k, index_l, COMPUTE)
        part = tl.dot(tl.trans(left), right, input_precision=PRECISION, out_dtype=total.dtype)
        store_tile((both_ptr, r2, 1, r1, r2), index_l, index_r, part)


@triton.jit
def _address(is_second, second, first):
    """Return one of two pointers. Their choice as pointers stops Triton 3.6's compiler for AMD (triton pull 10701)."""
    return tl.where(is_second, second.to(tl.int64), first.to(tl.int64)).to(first.dtype)


@triton.jit
def _store_either(problem, is_second, side, other, PRECISION: tl.constexpr):
    """Store Z and β of one of two sides: those of one kind share the code, whose compilation takes seconds."""
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
    """Grid: problems of each side whose Z is to be computed; problems × SPLITS × tiles of C of each side.

    Parts are (problems, SPLITS, r, k), and of both (problems, SPLITS2 × tiles of columns of Xᵀ, r1, r2).
    """
    program = tl.program_id(0)
    first = 0
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
    second = first + problems * SPLITS1 * tiles_r * tiles_k
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
    """Store a tile of Z Σ parts, if the product has so many, and return its number among those of the next product.

    Z and the parts are contiguous.
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
# For what divides these no kernel is better.
@triton.jit(do_not_specialize=["tiles", "splits1", "splits2", "splits_both"])
def damped_middle_kernel(
    parts1_ptr, middle1_ptr, out1_ptr, tiles, r1, k1, splits1, r2, k2,
    KIND1: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
    parts2_ptr=None, middle2_ptr=None, out2_ptr=None, splits2=1, KIND2: tl.constexpr = 0,
    both_ptr=None, out_both_ptr=None, splits_both=1, turned_ptr=None, n2=0,
    basis_ptr=None, table_ptr=None, basis_strides=(0, 0, 0), BASIS_LAYOUT: tl.constexpr = 0,
):  # fmt: skip
    """Grid: problems × tiles of Z₁C₁, of Z₂C₂ or C₂ᵀ, and of one W also of Z₁ (U_LᵀW U_R) and of Z₂ U_Rᵀ."""
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


class _Sums(NamedTuple):
    """What the first launch leaves of a side."""

    half: Half
    parts: Tensor  # (problems, splits, r, k)
    middle: Tensor
    scale: Tensor


def damped(*given: Any) -> Matrices:
    """Return β (V + U Z UᵀV) of U, Z, β and V; of U, d or S, λ, τ and V with the Z and β of an inverse."""
    *side, rhs = given
    return _applied(_half(side, rhs))[0]


def pair_damped(*given: Any) -> tuple[Matrices, Matrices]:
    """Return two of them: of what belongs to the left side, to the right side, and the two V."""
    *sides, left_rhs, right_rhs = given
    left, right = sides[: len(sides) // 2], sides[len(sides) // 2 :]
    first, second = _applied(_half(left, left_rhs), _half(right, right_rhs))
    return first, second


def kron_damped(*given: Any) -> Matrices:
    """Return the left operator times W times the right operator."""
    *sides, matrix = given
    transposed = each(lambda one: one.mT, matrix)
    left, right = _half(sides[: len(sides) // 2], matrix), _half(sides[len(sides) // 2 :], transposed)
    (of_left, of_right), both = _project((left, right), of_one=True)
    r1, k1, r2, k2, q = *of_left.parts.shape[-2:], *of_right.parts.shape[-2:], rows(right.basis)
    shapes = ((r1, k1), (k2, r2), (r1, r2), (r2, q))
    on_left, on_right, inner, turned = (of_left.parts.new_empty(*left.batch, *shape) for shape in shapes)
    _multiply((of_left, of_right), (on_left, on_right), (both, inner, turned))
    summed = tall_product([(inner, turned)], add=on_left)
    scales = of_left.scale, of_right.scale
    return tall_product([(left.basis, summed), (on_right, turned)], add=matrix, scales=scales)


def _half(side: Sequence[Any], rhs: Matrices) -> Half:
    basis, small, *numbers = side
    return Half(basis, rhs, small, tuple(numbers))


def _applied(*halves: Half) -> list[Matrices]:
    """Return one application, or two independent ones."""
    sums, _ = _project(halves, of_one=False)
    inner = [own.parts.new_empty(*own.half.batch, *own.parts.shape[-2:]) for own in sums]
    _multiply(sums, inner)
    return [
        tall_product([(own.half.basis, small)], add=own.half.rhs, scales=(own.scale,))
        for own, small in zip(sums, inner, strict=True)
    ]


def _project(halves: Sequence[Half], *, of_one: bool) -> tuple[list[_Sums], Tensor | None]:
    """Start the first launch."""
    given: dict[str, Matrices | None] = dict.fromkeys(("x1", "y1", "x2", "y2", "small1", "small2"))
    for side, half in enumerate(halves, 1):
        given |= {f"x{side}": half.basis, f"y{side}": half.rhs, f"small{side}": half.unknown}
    operands, basis = arrange(given), halves[0].basis
    problems, dtype, target, device = operands.problems, dtype_of(basis), target_of(basis), device_of(basis)
    in_lines = all(aligned(matrix) for half in halves for matrix in (half.basis, half.rhs))
    shapes = [(columns(half.basis), columns(half.rhs)) for half in halves]
    most_r, most_k = map(max, zip(*shapes, strict=True))
    config = configs.damped_project(target, dtype, most_r, most_k, in_lines, of_one)
    block_r, block_k, block_n = (config.blocks[name] for name in ("BLOCK_R", "BLOCK_K", "BLOCK_N"))
    tiles = [problems * configs.tiles(r, block_r) * configs.tiles(k, block_k) for r, k in shapes]
    arguments: dict[str, Any] = operands.arguments | products_in(target, dtype)
    arguments |= {"problems": problems, "n2": 0, "r2": 0, "k2": 0}
    sums, programs, core = [], 0, core_dtype(target, dtype)
    for side, (half, (r, k), own_tiles) in enumerate(zip(halves, shapes, tiles, strict=True), 1):
        n = rows(half.basis)
        splits = configs.splits(target, configs.tiles(n, block_n), sum(tiles))
        parts = torch.empty(problems, splits, r, k, dtype=dtype, device=device)
        middle, scale, own = half.coefficients(side, parts, core)
        arguments |= {f"n{side}": n, f"r{side}": r, f"k{side}": k, f"SPLITS{side}": splits, f"parts{side}_ptr": parts}
        arguments |= own
        sums.append(_Sums(half, parts, middle, scale))
        programs += splits * own_tiles + (problems if own else 0)
    both = None
    if of_one:
        (_, splits, r2, k2), r1 = sums[1].parts.shape, shapes[0][0]
        both = torch.empty(problems, splits * configs.tiles(k2, block_k), r1, r2, dtype=dtype, device=device)
    start(damped_project_kernel, (programs,), arguments | {"both_ptr": both}, config)
    return sums, both


def _multiply(
    sums: Sequence[_Sums], inner: Sequence[Tensor], of_one: tuple[Tensor | None, Tensor, Tensor] | None = None
) -> None:
    """Start the second launch."""
    dtype, target = inner[0].dtype, target_of(inner[0])
    arguments: dict[str, Any] = {"PRECISION": product_precision(target, dtype), "r2": 0, "k2": 0}
    for side, (own, out) in enumerate(zip(sums, inner, strict=True), 1):
        problems, splits, r, k = own.parts.shape
        kind = _DIAGONAL if own.half.is_diagonal else _MATRIX
        arguments |= {
            f"parts{side}_ptr": own.parts, f"middle{side}_ptr": own.middle, f"out{side}_ptr": out,
            f"splits{side}": splits, f"r{side}": r, f"k{side}": k, f"KIND{side}": kind.value,
        }  # fmt: skip
    shapes = [own.parts.shape[-2:] for own in sums]
    config = configs.damped_middle(target, *map(max, zip(*shapes, strict=True)))
    if of_one is not None:
        both, of_both, turned = of_one
        assert both is not None
        arguments |= arrange({"basis": sums[1].half.basis}).arguments | {
            "both_ptr": both, "out_both_ptr": of_both, "turned_ptr": turned,
            "splits_both": both.shape[1], "n2": turned.shape[-1],
        }  # fmt: skip
        shapes += [of_both.shape[-2:], turned.shape[-2:]]
    block_r, block_k = config.blocks["BLOCK_R"], config.blocks["BLOCK_K"]
    tiles = sum(configs.tiles(r, block_r) * configs.tiles(k, block_k) for r, k in shapes)
    start(damped_middle_kernel, (problems * tiles,), arguments | {"tiles": tiles}, config)
