"""``sketch``: Y = X Ω with a test matrix Ω of independent random signs, and ``signs``, which returns Ω itself.

X is (..., m, n), Ω is (..., n, width), Y is (..., m, width). The entries of Ω are ±1 with equal probability, a function
of the seed and their place alone: Ω is the same on every device and in every precision, to the bit. The kernel draws it
where it is needed; it is never stored.

Philox 4×32-10 with the seed as its key turns the counter (quad, block, problem, STREAM) into four words of 32 bits: the
entry in row 32·block + bit and column 4·quad + word is −1 where that bit of that word is 1. ``problem`` counts the
problems of a batch or a list, whose Ω are independent.

References
----------
J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from brandla_kernels._op import Cost, op, reads_are_free

# Up to this many calls of Philox, Python's integers take less time than the hundred operations of torch.
_FEW = 1024
# The block of Ω that one call of Philox draws: the bits of four words.
ROWS_PER_CALL = 32
COLUMNS_PER_CALL = 4
# Torch's own Philox streams leave this word of the counter at 0: torch's draws from this seed share no bits with Ω.
STREAM = 0x736B6574

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
# Bits of the float32 numbers −0 and 1.
_SIGN = -(2**31)
_ONE = 0x3F800000


def signs(
    seed: Tensor,
    rows: int,
    width: int,
    *,
    batch_shape: Sequence[int] = (),
    problem: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw the test matrix Ω of `sketch`: independent random signs.

    Equivalent to ``torch.randint(0, 2, (*batch_shape, rows, width)) * 2 - 1`` from a counter-based generator, in a few
    integer operations on 1/32 of the entries: several times faster than ``torch.randn`` on a CPU, and with
    no wait for a device.

    Parameters
    ----------
    seed
        One number in int64, on the device of Ω.
    rows, width
        Size of Ω. A smaller Ω is the leading part of a larger one.
    batch_shape
        Leading dimensions: one Ω for each problem of a batch.
    problem
        Index of the problem, or of the first of a batch.
    dtype
        Floating-point dtype of Ω. The signs are the same in every dtype.

    Returns
    -------
    Tensor
        Ω (*batch_shape, rows, width).

    Raises
    ------
    ValueError, TypeError
        If ``seed`` is not one int64 number, or a size is negative.
    """
    _check("signs", seed, rows=rows, width=width, problem=problem)
    blocks, quads = -(-rows // ROWS_PER_CALL), -(-width // COLUMNS_PER_CALL)
    few = math.prod(batch_shape) * blocks * quads <= _FEW
    draw = _draw_words_on_host if few and reads_are_free(seed) else _draw_words
    words = draw(seed, tuple(batch_shape), problem, blocks, quads)
    words = words if words.shape[-1] == width else words[..., :width]
    # Bit b of a word becomes the sign of the float32 number 1 at row b: [..., blocks, 32, width].
    shift = torch.arange(31, -1, -1, dtype=torch.int32, device=seed.device).unsqueeze(-1)
    numbers = (words << shift).bitwise_and_(_SIGN).bitwise_or_(_ONE).view(torch.float32)
    numbers = numbers.flatten(-3, -2)
    return (numbers if numbers.shape[-2] == rows else numbers[..., :rows, :]).to(dtype)


def _draw_words(seed: Tensor, batch: tuple[int, ...], problem: int, blocks: int, quads: int) -> Tensor:
    """Return the words of all counters, (*batch, blocks, 1, 4 quads) in int32."""

    def count(*shape: int) -> Tensor:
        return torch.arange(math.prod(shape), device=seed.device).view(shape)

    key = seed.reshape(())
    counter = (count(quads), count(blocks, 1, 1), count(*batch, 1, 1, 1) + problem, torch.full_like(key, STREAM))
    return torch.stack(philox(counter, (key, key >> 32)), -1).to(torch.int32).flatten(-2)


def _draw_words_on_host(seed: Tensor, batch: tuple[int, ...], problem: int, blocks: int, quads: int) -> Tensor:
    """Return the same as `_draw_words`. A Python integer holds a word of every counter, 64 bits apart: products fit."""
    problems, key = math.prod(batch), int(seed.item())
    total = problems * blocks * quads
    if not total:
        return seed.new_empty((*batch, blocks, 1, 4 * quads), dtype=torch.int32)
    ones, mask = _packed([1] * total), _packed([_MASK] * total)
    first = _packed(range(quads), blocks * problems)
    second = _packed(sorted([*range(blocks)] * quads), problems)
    third = _packed(sorted([*range(problem, problem + problems)] * (blocks * quads)))
    fourth = STREAM * ones
    for step in range(_ROUNDS):
        keys = [(word + step * gap & _MASK) * ones for word, gap in zip((key, key >> 32), _KEY_STEPS, strict=True)]
        lower, upper = first * _MULTIPLIERS[0], third * _MULTIPLIERS[1]
        first, second = (upper >> 32 & mask) ^ second ^ keys[0], upper & mask
        third, fourth = (lower >> 32 & mask) ^ fourth ^ keys[1], lower & mask
    pairs = (first | second << 32, third | fourth << 32)
    halves = [torch.frombuffer(bytearray(pair.to_bytes(8 * total, "little")), dtype=torch.int32) for pair in pairs]
    return torch.stack([half.view(-1, 2) for half in halves], 1).view(*batch, blocks, 1, 4 * quads)


def _packed(words: Iterable[int], times: int = 1) -> int:
    """Return one integer with the words in 64 bits each, the sequence repeated ``times`` times."""
    return int.from_bytes(array("Q", words).tobytes() * times, "little")


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4×32-10: four random words for four counter words and two key words.

    Words are int64 tensors, which are broadcast. The upper half of a given word does not matter; a returned word is in
    [0, 2³²).
    """
    words = torch.broadcast_tensors(*counter)
    # Words 0 and 2, which are multiplied, and words 1 and 3, each pair as one tensor: half as many operations.
    multiplied, others = torch.stack(words[::2]) & _MASK, torch.stack(words[1::2])
    pair = torch.arange(2, device=words[0].device).view(2, *(1,) * words[0].ndim)
    multipliers = _MULTIPLIERS[0] + pair * (_MULTIPLIERS[1] - _MULTIPLIERS[0])
    steps = torch.arange(_ROUNDS, device=words[0].device)
    keys = torch.stack([word + steps * step for word, step in zip(key, _KEY_STEPS, strict=True)], -1)
    for key_of_round in keys.view(_ROUNDS, *pair.shape).unbind():
        # The product of two words wraps around in int64, and has the right 64 bits.
        products = (multiplied * multipliers).flip(0)
        multiplied = (products >> 32).bitwise_xor_(others).bitwise_xor_(key_of_round).bitwise_and_(_MASK)
        others = products
    others = others & _MASK
    return multiplied[0], others[0], multiplied[1], others[1]


def cost(m: int, n: int, width: int, itemsize: int = 4) -> Cost:
    """Work of one call: Ω is neither read nor written."""
    return Cost(flops=2 * m * n * width, bytes=itemsize * (m * n + m * width))


@op("sketch(Data[m,n] matrix, Tensor seed, SymInt width, SymInt problem=0) -> Tall[m,width]", cost, "sketch.sketch")
def sketch(matrix: Tensor, seed: Tensor, width: int, problem: int = 0) -> Tensor:
    """Return ``matrix @ signs(seed, n, width)``, in float32 for half-precision data.

    ``seed`` is one int64 number on the device of ``matrix``. It is read there, so that a CUDA graph draws again when it
    is changed. ``problem`` is the index of the problem, or of the first of a batch or list.
    """
    check_call(matrix, seed, width, problem)
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    return matrix.to(dtype) @ _signs_of(matrix, seed, width, problem, dtype)


@sketch.gradient
def _gradient(inputs: tuple[Tensor, Tensor, int, int], gradients: tuple[Tensor]) -> tuple[Tensor | None, ...]:
    matrix, seed, width, problem = inputs
    (gradient,) = gradients
    return gradient @ _signs_of(matrix, seed, width, problem, gradient.dtype).mT, None, None, None


def _signs_of(matrix: Tensor, seed: Tensor, width: int, problem: int, dtype: torch.dtype) -> Tensor:
    """Return Ω for X, a matrix or a batch."""
    return signs(seed, matrix.shape[-1], width, batch_shape=matrix.shape[:-2], problem=problem, dtype=dtype)


def check_call(matrix: Tensor, seed: Tensor, width: int, problem: int) -> None:
    """Check the rules that the signature does not express."""
    _check("brandla::sketch", seed, width=width, problem=problem)
    if seed.device != matrix.device:
        message = f"brandla::sketch: seed must be on the device of matrix, {matrix.device}; got {seed.device}"
        raise ValueError(message)


def _check(function: str, seed: Any, **sizes: int) -> None:
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        got = seed.dtype if isinstance(seed, Tensor) else type(seed).__name__
        message = f"{function}: seed must be a tensor of dtype torch.int64; got {got}"
        raise TypeError(message)
    wrong = [f"{name} must be at least 0; got {size}" for name, size in sizes.items() if size < 0]
    if seed.numel() != 1:
        wrong = [f"seed must have one element; got shape {tuple(seed.shape)}"]
    if wrong:
        message = f"{function}: {wrong[0]}"
        raise ValueError(message)
