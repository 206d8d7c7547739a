"""Random signs: the generator against its published vectors, statistics of Ω, what Ω depends on; sketch on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import oracles
from brandla_kernels import signs, sketch
from brandla_kernels.sketch import philox

# Counter, key and words of Philox 4×32-10 in the known-answer tests of the Random123 library.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
# A call of Philox draws 32 rows of 4 columns.
SIZES = [(0, 3), (3, 0), (1, 1), (31, 3), (32, 4), (33, 5), (97, 13)]


@pytest.fixture
def seed() -> Tensor:
    return torch.tensor(20240229)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_its_known_answers(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]):
    assert tuple(int(word) for word in philox([*map(torch.tensor, counter)], [*map(torch.tensor, key)])) == words


def test_entry_is_the_bit_that_the_map_names():
    """Row 32·block + bit, column 4·quad + word, with both halves of the seed in the key."""
    seed, problem, row, column = torch.tensor(-(2**62) + 12345), 3, 77, 10
    counter = [*map(torch.tensor, (column // 4, row // 32, problem, 0x736B6574))]
    words = philox(counter, [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF])
    bit = int(words[column % 4]) >> row % 32 & 1
    assert signs(seed, 100, 11, problem=problem)[row, column] == 1 - 2 * bit


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_entry_is_a_sign_and_a_smaller_matrix_a_corner_of_a_larger_one(size: tuple[int, int], seed: Tensor):
    drawn, (rows, width) = signs(seed, *size), size
    assert drawn.is_contiguous()
    assert (drawn.abs() == 1).all()
    assert torch.equal(drawn, signs(seed, 130, 21)[:rows, :width])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_signs_do_not_depend_on_the_dtype(dtype: torch.dtype, seed: Tensor):
    drawn = signs(seed, 50, 9, dtype=dtype)
    assert drawn.dtype == dtype
    assert torch.equal(drawn.float(), signs(seed, 50, 9))


def test_one_seed_gives_one_matrix(seed: Tensor):
    first = signs(seed, 64, 16)
    assert torch.equal(first, signs(seed.view(1), 64, 16))
    # A single bit of the seed, in either half, changes half the signs: 512 ± 6·16.
    for bit in (0, 31, 32, 63):
        other = signs(seed ^ (1 << bit if bit < 63 else -(2**63)), 64, 16)
        assert abs(int((other != first).sum()) - 512) < 96


def test_problems_of_a_batch_are_those_drawn_one_by_one(seed: Tensor):
    batch = signs(seed, 40, 6, batch_shape=(2, 3), problem=5)
    for problem, entry in enumerate(batch.flatten(0, 1)):
        assert torch.equal(entry, signs(seed, 40, 6, problem=5 + problem))
    assert signs(seed, 40, 6, batch_shape=(0, 3)).shape == (0, 3, 40, 6)


def test_signs_are_balanced(seed: Tensor):
    """A sum of N signs has standard deviation √N; the bounds are 6 of them for the total, the rows and the columns."""
    drawn = signs(seed, 4096, 512)
    assert drawn.sum().abs() < 6 * drawn.numel() ** 0.5
    assert drawn.sum(0).abs().max() < 6 * 4096**0.5
    assert drawn.sum(1).abs().max() < 6 * 512**0.5


@pytest.mark.parametrize("axis", [0, 1], ids=["columns", "rows"])
def test_rows_and_columns_are_uncorrelated(axis: int, seed: Tensor):
    """Inner products of different columns of length N have standard deviation √N; there are 2¹⁸ of them."""
    drawn = signs(seed, 1024, 1024, dtype=torch.float64)
    drawn = drawn[:, :724] if axis == 0 else drawn[:724].mT
    products = drawn.mT @ drawn
    assert torch.equal(products.diagonal(), torch.full((724,), 1024.0, dtype=torch.float64))
    assert products.fill_diagonal_(0).abs().max() < 7 * 1024**0.5


def test_matrices_of_different_problems_and_seeds_are_uncorrelated(seed: Tensor):
    drawn = torch.cat([signs(seed, 512, 16, batch_shape=(8,)), signs(seed + 1, 512, 16, batch_shape=(8,))]).flatten(1)
    products = drawn @ drawn.mT
    assert products.fill_diagonal_(0).abs().max() < 6 * (512 * 16) ** 0.5


def test_signs_on_meta_and_in_a_trace(seed: Tensor):
    assert signs(seed.to("meta"), 33, 5, batch_shape=(2,)).shape == (2, 33, 5)
    traced = torch.compile(lambda seed: signs(seed, 33, 5), fullgraph=True, backend="eager")
    assert torch.equal(traced(seed), signs(seed, 33, 5))


def test_sketch_of_a_list_counts_the_problems(seed: Tensor):
    matrices = [oracles.gaussian(m, n, seed=m) for m, n in ((5, 40), (3, 2), (0, 7))]
    for problem, (matrix, result) in enumerate(zip(matrices, sketch(matrices, seed, 6), strict=True)):
        assert torch.equal(result, matrix @ signs(seed, matrix.shape[1], 6, problem=problem, dtype=torch.float64))
        assert torch.equal(result, sketch(matrix, seed, 6, problem))


@pytest.mark.parametrize(
    ("wrong", "kind", "rule"),
    [
        ({"seed": torch.tensor(1.0)}, TypeError, r"seed must be a tensor of dtype torch.int64; got torch.float32"),
        ({"seed": torch.tensor([1, 2])}, ValueError, r"seed must have one element; got shape \(2,\)"),
        ({"seed": torch.tensor([], dtype=torch.int64)}, ValueError, r"seed must have one element; got shape \(0,\)"),
        ({"seed": torch.tensor(1, device="meta")}, ValueError, r"seed must be on the device of matrix, cpu; got meta"),
        ({"width": -1}, ValueError, r"width must be at least 0; got -1"),
        ({"problem": -2}, ValueError, r"problem must be at least 0; got -2"),
    ],
    ids=["dtype", "two seeds", "no seed", "device", "width", "problem"],
)
def test_bad_input_is_named(wrong: dict[str, object], kind: type[Exception], rule: str, seed: Tensor):
    arguments = {"seed": seed, "width": 3, "problem": 0} | wrong
    for call in (sketch, torch.ops.brandla.sketch):
        with pytest.raises(kind, match=rf"^brandla::sketch: {rule}$"):
            call(torch.ones(4, 5), **arguments)
    with pytest.raises(kind, match=rf"^brandla::sketch: {rule}$"):
        torch.ops.brandla.sketch_grouped([torch.ones(4, 5)], **arguments)


def test_bad_seed_of_signs_is_named():
    with pytest.raises(TypeError, match=r"^signs: seed must be a tensor of dtype torch.int64; got int$"):
        signs(5, 3, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^signs: rows must be at least 0; got -3$"):
        signs(torch.tensor(5), -3, 2)
