"""Random signs: the generator against its published vectors, each entry of Ω against its bit; sketch on a CPU."""

import pytest
import torch

from brandla_kernels import signs
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
# A call of Philox draws 32 rows of 4 columns. The last size takes more calls than Python's integers are taken for.
SIZES = [(0, 3), (3, 0), (1, 1), (31, 3), (32, 4), (33, 5), (97, 13), (4160, 33)]
SEED = torch.tensor(20240229)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_its_known_answers(counter, key, words):
    assert tuple(int(word) for word in philox([*map(torch.tensor, counter)], [*map(torch.tensor, key)])) == words


@pytest.mark.parametrize("number", [20240229, 12345 - 2**62], ids=["a seed of 32 bits", "a seed of 64"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_entry_is_the_bit_that_the_map_names(size, number):
    """Row 32·block + bit, column 4·quad + word, of a problem by itself, with both halves of the seed in the key."""
    seed, (rows, width), problem = torch.tensor(number), size, 3
    row, column = torch.arange(rows)[:, None], torch.arange(width)
    counter = [column // 4, row // 32, *map(torch.tensor, (problem, 0x736B6574))]
    words = torch.stack(philox(counter, [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]))
    own = words.take_along_dim((column % 4).expand(1, rows, width), 0)[0]
    drawn = signs(seed, rows, width, problem=problem)
    assert drawn.is_contiguous()
    assert torch.equal(drawn, 1 - 2 * (own >> row % 32 & 1).float())
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        again = signs(seed.view(1), rows, width, problem=problem, dtype=dtype)
        assert again.dtype == dtype
        assert torch.equal(again.float(), drawn)


def test_problems_of_a_batch_are_those_drawn_one_by_one():
    batch = signs(SEED, 40, 6, batch_shape=(2, 3), problem=5)
    for problem, entry in enumerate(batch.flatten(0, 1)):
        assert torch.equal(entry, signs(SEED, 40, 6, problem=5 + problem))
    assert signs(SEED, 40, 6, batch_shape=(0, 3)).shape == (0, 3, 40, 6)


def test_signs_on_meta_and_in_a_trace():
    assert signs(SEED.to("meta"), 33, 5, batch_shape=(2,)).shape == (2, 33, 5)
    traced = torch.compile(lambda seed: signs(seed, 33, 5), fullgraph=True, backend="eager")
    assert torch.equal(traced(SEED), signs(SEED, 33, 5))


def test_bad_seed_of_signs_is_named():
    with pytest.raises(TypeError, match=r"^signs: seed must be a tensor of dtype torch.int64; got int$"):
        signs(5, 3, 2)
    with pytest.raises(ValueError, match=r"^signs: rows must be at least 0; got -3$"):
        signs(SEED, -3, 2)
