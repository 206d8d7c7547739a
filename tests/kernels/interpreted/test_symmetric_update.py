"""The kernels of gram_ema_: the walk over a triangle of tiles, symmetry to the bit, and which entries are read."""

import pytest
import torch
import triton
import triton.language as tl

import oracles
from brandla_kernels import gram_ema_
from brandla_kernels._kernels.symmetric_update import (
    symmetric_product_kernel,
    symmetric_update_kernel,
    tile_in_triangle,
)
from op_cases import assert_computes

FLOAT32 = torch.float32


@triton.jit
def walk_kernel(index_ptr, tile_ptr, tiles):
    """Write (i, j) of one tile per program; ``index_ptr`` holds its place in the walk."""
    program = tl.program_id(0)
    row, column = tile_in_triangle(tl.load(index_ptr + program), tiles)
    tl.store(tile_ptr + 2 * program, row)
    tl.store(tile_ptr + 2 * program + 1, column)


def walk(index, tiles):
    pairs = torch.full((len(index), 2), -1, dtype=torch.int64, device=index.device)
    walk_kernel[(len(index),)](index, pairs, tiles)
    return [tuple(pair) for pair in pairs.tolist()]


@pytest.mark.parametrize("tiles", [1, 2, 8, 9, 17])
def test_walk_meets_every_tile_of_the_triangle_once_one_band_of_eight_rows_after_another(tiles, device):
    met = walk(torch.arange(tiles * (tiles + 1) // 2, dtype=torch.int32, device=device), tiles)
    assert sorted(met) == [(row, column) for row in range(tiles) for column in range(row + 1)]
    bands = [row // 8 for row, _ in met]
    assert bands == sorted(bands)


@pytest.mark.parametrize("row", [4095, 5793, 46340, 65527, 65534])
def test_walk_is_exact_where_the_root_in_float32_is_not(row, device):
    """Tests the first and last places of a band, and its neighbours: 8·index + 1 has up to 34 bits there."""
    top = row // 8 * 8
    first, last = top * (top + 1) // 2, (top + 8) * (top + 9) // 2 - 1
    index = torch.tensor([first - 1, first, last, last + 1], dtype=torch.int64, device=device)
    index = index[index < 2**31].to(torch.int32)
    expected = [(top - 1, top - 1), (top, 0), (top + 7, top + 7), (top + 8, 0)]
    assert walk(index, 2**16) == expected[: len(index)]


# Sizes n and k: tiles have 16 to 128 rows, a step sums 16 to 64 terms, and long sums are split.
@pytest.mark.parametrize(
    ("n", "k", "dtype", "data"),
    [
        *((129, 33, FLOAT32, data) for data in (FLOAT32, torch.bfloat16, torch.float16)),
        *((65, 33, torch.float64, torch.float64), (15, 6, FLOAT32, FLOAT32), (16, 6, FLOAT32, FLOAT32)),
        # Aligned data take tiles of 128 rows, and these two rows of tiles.
        *((132, 4, FLOAT32, FLOAT32), (132, 68, FLOAT32, FLOAT32)),
    ],
    ids=str,
)
def test_only_the_lower_triangle_is_read_and_both_are_written_and_nothing_around_them(n, k, dtype, data, device):
    """The two triangles are equal to the bit."""
    matrix = oracles.symmetrised(oracles.gaussian(n, n, seed=0)).to(device, dtype)
    columns = oracles.gaussian(n, k, seed=1).to(device, data)
    around = torch.full((n + 4, n + 8), 5.0, dtype=dtype, device=device)
    inside = around[2:-2, 4:-4]
    inside.copy_(matrix.masked_fill(torch.ones_like(matrix).triu(1).bool(), torch.nan))
    gram_ema_(inside, columns, 0.9, 0.25)
    assert_computes("gram_ema_", (inside,), (matrix, columns, 0.9, 0.25))
    assert torch.equal(inside, inside.mT)
    inside.fill_(5)
    assert (around == 5).all()


@pytest.mark.parametrize("kernel", [symmetric_product_kernel, symmetric_update_kernel])
def test_decay_and_weight_are_passed_in_float64(kernel):
    """Triton passes a float as float32 unless its parameter is annotated. The interpreter does not show this."""
    annotations = getattr(kernel, "fn", kernel).__annotations__
    assert annotations["decay"] == annotations["weight"] == "tl.float64"
