"""The kernels of gram_ema_: the walk over a triangle of tiles, symmetry to the bit, what is read and what is not."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import oracles
from brandla_kernels import gram_ema_
from brandla_kernels._kernels.symmetric_update import (
    symmetric_product_kernel,
    symmetric_update_kernel,
    tile_in_triangle,
)
from op_cases import assert_computes

DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
]


# n, k: tiles have 16 to 128 rows, sums are taken 16 to 64 terms at a time.
@triton.jit
def walk_kernel(index_ptr, tile_ptr, tiles):
    """Write (i, j) of the tile at the place that ``index_ptr`` holds for each program."""
    program = tl.program_id(0)
    row, column = tile_in_triangle(tl.load(index_ptr + program), tiles)
    tl.store(tile_ptr + 2 * program, row)
    tl.store(tile_ptr + 2 * program + 1, column)


def walk(index: Tensor, tiles: int) -> list[tuple[int, ...]]:
    found = torch.full((len(index), 2), -1, dtype=torch.int64, device=index.device)
    walk_kernel[(len(index),)](index, found, tiles)
    return [tuple(pair) for pair in found.tolist()]


def symmetric(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return oracles.symmetrised(oracles.gaussian(n, n, seed=0)).to(device, dtype)


def data(n: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return oracles.gaussian(n, k, seed=1).to(device, dtype)


def assert_updated(result: Tensor, matrix: Tensor, columns: Tensor, decay: float, weight: float) -> None:
    """Check ρ M + w A Aᵀ entry by entry, and its symmetry."""
    assert_computes("gram_ema_", (result,), (matrix, columns, decay, weight))
    assert torch.equal(result, result.mT)


def assert_updates(matrix: Tensor, columns: Tensor, decay: float = 0.9, weight: float = 0.25) -> None:
    """Check what becomes of a matrix."""
    result = matrix.clone()
    gram_ema_(result, columns, decay, weight)
    assert_updated(result, matrix, columns, decay, weight)


@pytest.mark.parametrize("tiles", [1, 2, 8, 9, 17])
def test_walk_meets_every_tile_of_the_triangle_once(tiles: int, device: torch.device) -> None:
    met = walk(torch.arange(tiles * (tiles + 1) // 2, dtype=torch.int32, device=device), tiles)
    assert sorted(met) == [(row, column) for row in range(tiles) for column in range(row + 1)]


def test_walk_stays_in_a_band_of_eight_rows_until_it_is_done(device: torch.device) -> None:
    bands = [row // 8 for row, _ in walk(torch.arange(17 * 18 // 2, dtype=torch.int32, device=device), 17)]
    assert bands == sorted(bands)


@pytest.mark.parametrize("row", [4095, 5793, 46340, 65527, 65534])
def test_walk_is_exact_where_the_root_in_float32_is_not(row: int, device: torch.device) -> None:
    """At the first and the last places of the bands that begin and end there: 8·index + 1 has up to 34 bits."""
    top = row // 8 * 8
    first, last = top * (top + 1) // 2, (top + 8) * (top + 9) // 2 - 1
    index = torch.tensor([first - 1, first, last, last + 1], dtype=torch.int64, device=device)
    index = index[index < 2**31].to(torch.int32)
    expected = [(top - 1, top - 1), (top, 0), (top + 7, top + 7), (top + 8, 0)]
    assert walk(index, 2**16) == expected[: len(index)]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_result_is_symmetric_to_the_bit(dtypes: tuple[torch.dtype, torch.dtype], device: torch.device) -> None:
    assert_updates(symmetric(129, dtypes[0], device), data(129, 65, dtypes[1], device))


def test_more_tiles_than_a_band(device: torch.device) -> None:
    """1200 rows are ten rows of tiles of 128: a band of eight, and two."""
    assert_updates(symmetric(1200, torch.float32, device), data(1200, 1, torch.float32, device), 0.5, 0.5)


@pytest.mark.parametrize("columns", [3, 400], ids=["one sum", "split sum"])
def test_only_the_lower_triangle_is_read_and_runs_repeat_to_the_bit(columns: int, device: torch.device) -> None:
    matrix, added = symmetric(150, torch.float32, device), data(150, columns, torch.float32, device)
    poisoned = matrix.masked_fill(torch.ones_like(matrix).triu(1).bool(), torch.nan)
    results = [poisoned.clone(), poisoned.clone()]
    for result in results:
        gram_ema_(result, added, 0.9, 0.25)
    assert_updated(results[0], matrix, added, 0.9, 0.25)
    assert torch.equal(*results)


@pytest.mark.parametrize("n", [15, 16, 130])
def test_nothing_around_the_matrix_is_touched(n: int, device: torch.device) -> None:
    around = torch.full((n + 4, n + 7), 5.0, device=device)
    inside = around[2:-2, 3:-4]
    matrix, columns = symmetric(n, torch.float32, device), data(n, 6, torch.float32, device)
    inside.copy_(matrix)
    gram_ema_(inside, columns, 0.9, 0.25)
    assert_updated(inside.clone(), matrix, columns, 0.9, 0.25)
    inside.fill_(5)
    assert (around == 5).all()


@pytest.mark.parametrize("kernel", [symmetric_product_kernel, symmetric_update_kernel])
def test_decay_and_weight_are_passed_in_float64(kernel: object) -> None:
    """Triton passes a float as float32 unless the parameter says otherwise, which its interpreter does not show."""
    annotations = getattr(kernel, "fn", kernel).__annotations__
    assert annotations["decay"] == annotations["weight"] == "tl.float64"
