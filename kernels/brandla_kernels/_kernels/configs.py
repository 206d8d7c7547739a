"""Tile sizes, warps and stages by target, dtype and size bucket: the tuned defaults that ship with the library.

Nothing is tuned while a program runs: a timing would decide which roundings it gets, and a network would stall on its
first step. Sizes enter through buckets, so that a kernel is compiled for few of them.
"""

from __future__ import annotations

import torch

from brandla_kernels._kernels.launch import Config, Target
from brandla_kernels._targets import WEAK_FLOAT64

# Programs that keep a large GPU busy: two for each of the 132 multiprocessors of an H100 or H200.
_PROGRAMS = 264
# Targets whose matrix units read operands from registers only: the operands take registers beside the sum.
_REGISTER_OPERANDS = ("sm_80", *WEAK_FLOAT64)
# Targets whose float64 products are fused multiply-adds: they get small tiles of many threads.
_FMA_FLOAT64 = ("sm_100", *WEAK_FLOAT64)
# The most rows whose products are summed in float32, in a sum that goes on in float64.
STRETCH = 4096


def tiles(size: int, block: int) -> int:
    """Return how many blocks cover a size."""
    # triton.cdiv takes some microseconds on the host.
    return -(-size // block)


def _power_of_two(size: int) -> int:
    """Round up to a power of two, at least 1."""
    return 1 << (max(size, 1) - 1).bit_length()


def bucket(size: int, smallest: int, largest: int) -> int:
    """Round ``size`` up to a power of two between the two limits: a tile dimension."""
    return min(max(_power_of_two(size), smallest), largest)


def splits(target: Target, steps: int, programs: int) -> int:
    """Return the number of stretches for ``steps`` blocks, with ``programs`` programs each: on a GPU a power of two."""
    if target.backend == "interpreter":
        return max(1, min(3, steps))
    wanted = max(1, _PROGRAMS // max(programs, 1))
    return min(_power_of_two(wanted), _power_of_two(steps // 4), 64)


def long_splits(target: Target, rows: int, block_n: int, programs: int, dtype: torch.dtype) -> int:
    """Return the number of stretches of a float64 sum, each summed in ``dtype``: at most STRETCH rows in float32."""
    least = tiles(rows, STRETCH) if dtype == torch.float32 else 1
    return max(splits(target, tiles(rows, block_n), programs), _power_of_two(least))


def _register_limit(target: Target, *spilling: str) -> int | None:
    """Return the most registers that a thread can have if the assembler's own limit spills on the target, else None."""
    return 255 if target.arch in (*_FMA_FLOAT64, *spilling) else None


def tall_product(target: Target, dtype: torch.dtype, columns: int, aligned: bool, scales: int) -> Config:
    """Tiles of `tall_product_kernel`."""
    fma = dtype == torch.float64 and target.arch in _FMA_FLOAT64
    if dtype == torch.float64:
        block_n, most, block_r, stages = 32 if fma else 64, 32, 16, 3
    elif not aligned:
        block_n, most, block_r, stages = 64, 64, 16, 2
    elif target.arch in _REGISTER_OPERANDS:
        block_n, most, block_r, stages = 128, 64, 16, 2
    else:
        # A second scale takes the registers of a third stage.
        block_n, most, block_r, stages = 128, 128, 32, 3 if scales < 2 else 2
    block_s = bucket(columns, 16, most)
    warps = 8 if block_s > (16 if fma else 32) else 4
    registers = _register_limit(target, *_REGISTER_OPERANDS, *(["sm_90"] if dtype == torch.float64 else []))
    return Config({"BLOCK_N": block_n, "BLOCK_S": block_s, "BLOCK_R": block_r}, warps, stages, registers)


def inner_product(target: Target, dtype: torch.dtype, r: int, k: int, aligned: bool) -> Config:
    """Tiles of `inner_product_kernel`; ``dtype`` is that of the sum."""
    wide = dtype == torch.float64
    # Without alignment, each element of a tile has an address of its own, in two registers. Beside a larger sum these
    # spill if a thread has no more than 255 registers.
    roomy = aligned or target.backend == "hip"
    most, area_of_four_warps = (128, 4096) if roomy and not wide else (64, 2048)
    block_r, block_k = bucket(r, 16, most), bucket(k, 16, most)
    warps = 8 if block_r * block_k > area_of_four_warps else 4
    long = not wide and (warps == 4 or (aligned and target.arch not in _REGISTER_OPERANDS))
    registers = _register_limit(target) if aligned else _register_limit(target, *_REGISTER_OPERANDS, "sm_90")
    if target.arch == "sm_120" and aligned and not wide:
        # The assembler's own limit, here 138 registers, spills nothing, and 255 does.
        registers = None
    return Config({"BLOCK_R": block_r, "BLOCK_K": block_k, "BLOCK_N": 32 if long else 16}, warps, 3, registers)


def damped_project(target: Target, dtype: torch.dtype, r: int, k: int, aligned: bool, of_one: bool) -> Config:
    """Tiles of `damped_project_kernel`; for both sides of one W, a program multiplies its tile a second time."""
    most = max(r, k)
    if of_one:
        # The tile goes through shared memory, and gfx942 has 64 KiB of it. As multiply-adds, a wider product spills.
        small = target.backend == "hip" or target.arch in _FMA_FLOAT64
        most = 32 if small and dtype == torch.float64 else 64
    if target.arch in _REGISTER_OPERANDS:
        # For matrices in columns, tiles of 128 × 128 spill 8 to 32 bytes.
        k = min(k, 64)
    config = inner_product(target, dtype, min(r, most), min(k, most), aligned)
    # The programs that invert a small matrix take more registers than the assembler's own limit.
    return config._replace(registers=_register_limit(target, "sm_80", "sm_90"))


def damped_middle(target: Target, r: int, k: int) -> Config:
    """Tiles of `damped_middle_kernel`: with four warps, the addresses of ragged matrices spill beside the sums."""
    blocks = {"BLOCK_R": bucket(r, 16, 64), "BLOCK_K": bucket(k, 16, 64), "BLOCK_P": 16}
    return Config(blocks, 8, 1, _register_limit(target, "sm_80", "sm_90"))


def cross_gram(target: Target, dtype: torch.dtype, r: int, k: int, aligned: bool) -> Config:
    """Tiles of `cross_gram_kernel`: BLOCK_R × BLOCK_K of C, BLOCK_K × BLOCK_K of G."""
    # On these targets, summing a stretch again spills beside the widest tiles.
    narrow = target.arch in (*_REGISTER_OPERANDS, "sm_100")
    config = inner_product(target, dtype, max(r, k), k, aligned and not narrow)
    blocks = dict(config.blocks) | {"BLOCK_R": min(config.blocks["BLOCK_R"], bucket(r, 16, 128))}
    if target.arch == "sm_90" and blocks["BLOCK_R"] * blocks["BLOCK_K"] == 128**2:
        # For a list, the assembler's own limit spills 16 bytes.
        config = config._replace(registers=255)
    return config._replace(blocks=blocks)


def sum_parts() -> Config:
    """Tiles of `sum_parts_kernel`."""
    return Config({"BLOCK_R": 16, "BLOCK_K": 64}, 4, 1)


def symmetric_product(target: Target, dtype: torch.dtype, n: int, aligned: bool) -> Config:
    """Tiles of `symmetric_product_kernel`; ``dtype`` is that of the multiplied tiles."""
    # A third stage of a ragged list spills 8 bytes on sm_86.
    stages = 2 if target.backend == "hip" or (target.arch in _REGISTER_OPERANDS and not aligned) else 3
    if dtype == torch.float64 or not aligned:
        # The multiply-adds of float64 on sm_100 spill least within the assembler's own limit.
        own_limit = dtype == torch.float64 and target.arch == "sm_100"
        registers = None if own_limit else _register_limit(target, *_REGISTER_OPERANDS, "sm_90")
        return Config({"BLOCK_N": bucket(n, 16, 64), "BLOCK_K": 16}, 8 if n > 32 else 4, stages, registers)
    # Three TF32 terms take the registers of a larger tile if the matrix units read operands from registers.
    most = 64 if dtype == torch.float32 and target.arch in _REGISTER_OPERANDS else 128
    block_n = bucket(n, 16, most)
    return Config({"BLOCK_N": block_n, "BLOCK_K": 32}, 8 if block_n > 64 else 4, stages)


def symmetric_update(target: Target, block_n: int) -> Config:
    """Tiles of `symmetric_update_kernel`: the tiles in which the product was summed."""
    # On other targets the assembler's own limit spills least.
    registers = 255 if target.arch in WEAK_FLOAT64 else None
    return Config({"BLOCK_N": block_n}, 8 if block_n > 64 else 4, 1, registers)


def sketch(target: Target, dtype: torch.dtype, width: int, aligned: bool) -> Config:
    """Tiles of `sketch_kernel`; ``dtype`` is that of the data."""
    stages = 2 if target.backend == "hip" else 3
    if dtype == torch.float64:
        # Without a limit given here, the assembler stops at 80 or 96 registers, and spills two.
        registers = 255 if target.arch == "sm_90" or (target.arch in _FMA_FLOAT64 and aligned) else None
        return Config({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_W": bucket(width, 16, 64)}, 4, stages, registers)
    if not aligned:
        block_w = bucket(width, 16, 32 if target.arch == "sm_100" else 64)
        return Config({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_W": block_w}, 4, stages)
    block_w = bucket(width, 16, 64 if dtype == torch.float32 and target.arch in _REGISTER_OPERANDS else 128)
    if dtype == torch.float32:
        # Three programs fit on a multiprocessor: one splits its X and draws its Ω while another multiplies.
        return Config({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_W": block_w}, 4, stages)
    # Drawing Ω takes as long as multiplying, so more rows share it.
    return Config({"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_W": block_w}, 8 if block_w > 64 else 4, stages)


def small_spd(target: Target, k: int) -> Config:
    """Tiles of `small_spd_kernel`: as few warps as the products need, since the column loop waits for all of them.

    Larger tiles spill on one target or another, with some of the layouts.
    """
    warps = 2 if k <= 32 else 8
    registers = _register_limit(target, "sm_90") if warps == 2 else None
    return Config({"BLOCK": 16, "BLOCK_ROWS": 16 * warps, "BLOCK_INNER": 16}, warps, 1, registers)


def root_core(target: Target, m: int) -> Config:
    """Tiles of `root_core_kernel`: the column loop waits for all warps, and larger tiles spill on sm_80 or sm_90."""
    warps = 4 if m <= 64 else 8
    registers = _register_limit(target, *_REGISTER_OPERANDS, "sm_90") if warps == 4 else None
    return Config({"BLOCK": 16, "BLOCK_ROWS": 8 * warps, "BLOCK_COLS": 32, "BLOCK_INNER": 16}, warps, 1, registers)


def eigh_core() -> Config:
    """Tiles of `eigh_core_kernel` and `eigh_rotation_kernel`."""
    return Config({"BLOCK": 32}, 4, 1)
