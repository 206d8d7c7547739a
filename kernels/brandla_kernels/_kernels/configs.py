"""Tile sizes, warps and stages by target, dtype and size bucket: the tuned defaults that ship with the library.

Nothing is tuned while a program runs: a timing would decide which roundings it gets, and a network would stall on its
first step. Sizes enter through buckets, so that a kernel is compiled for few of them.
"""

from __future__ import annotations

import torch
import triton

from brandla_kernels._kernels.launch import Config, Target

# Programs that keep a large GPU busy: two for each of the 132 multiprocessors of an H100 or H200.
_PROGRAMS = 264


def bucket(size: int, smallest: int, largest: int) -> int:
    """Round ``size`` up to a power of two between the two limits: a tile dimension."""
    return int(min(max(triton.next_power_of_2(max(size, 1)), smallest), largest))


def splits(target: Target, steps: int, programs: int) -> int:
    """Into how many stretches to split ``steps`` blocks of rows beside ``programs`` programs, a power of two."""
    if target.backend == "interpreter":
        return max(1, min(3, steps))
    wanted = max(1, _PROGRAMS // max(programs, 1))
    return int(min(triton.next_power_of_2(wanted), triton.next_power_of_2(max(steps // 4, 1)), 64))


def gram_splits(target: Target, tiles: int, problems: int) -> int:
    """How many programs share the rows of one problem where each keeps a Gram matrix."""
    return splits(target, 4 * tiles, problems)


def tall_product(target: Target, dtype: torch.dtype, columns: int, fused: bool) -> Config:
    """Tiles of `tall_product_kernel`; with the Gram matrix (``fused``) one tile spans all columns."""
    wide = dtype == torch.float64
    if fused:
        block_s = bucket(columns, 16, 128)
        return Config({"BLOCK_N": 32 if wide else 64, "BLOCK_S": block_s, "BLOCK_R": 16 if wide else 32}, 8, 2)
    block_s = bucket(columns, 16, 64 if wide else 128)
    return Config(
        {"BLOCK_N": 64 if wide else 128, "BLOCK_S": block_s, "BLOCK_R": 16 if wide else 32}, 8 if block_s > 64 else 4, 3
    )


def inner_product(target: Target, dtype: torch.dtype, r: int, k: int) -> Config:
    """Tiles of `inner_product_kernel`; ``dtype`` is that of the sum."""
    wide = dtype == torch.float64
    most = 64 if wide else 128
    blocks = {"BLOCK_R": bucket(r, 16, most), "BLOCK_K": bucket(k, 16, most), "BLOCK_N": 16 if wide else 32}
    return Config(blocks, 8 if blocks["BLOCK_R"] * blocks["BLOCK_K"] > 4096 else 4, 3)


def sum_parts() -> Config:
    """Tiles of `sum_parts_kernel`."""
    return Config({"BLOCK_R": 16, "BLOCK_K": 64}, 4, 1)
