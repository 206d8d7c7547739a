"""Tall matrices sharded on their rows: every function equals itself on the whole matrices, and no tall one travels."""

import pytest
import torch

from distributed import sharded
from distributed.processes import run

CHECKS = [
    *((sharded.update_streams, name) for name in sharded.UPDATES),
    *((check,) for check in (sharded.every_call, sharded.lists, sharded.svd_streams, sharded.nearly_dependent_columns)),
    (sharded.two_sides,),
]
# The number of processes, what each of them checks, and with what. Precision decides which passes an update takes, and
# the number of processes how the rows are laid out: nothing depends on the two together.
RUNS = [
    *((2, *check, torch.float32) for check in CHECKS),
    *((4, *check, torch.float64) for check in CHECKS),
    *((world_size, sharded.gradients) for world_size in (2, 4)),
    *((2, sharded.messages, dtype) for dtype in (torch.float32, torch.float64)),
    (2, sharded.refusals),
]


@pytest.mark.parametrize("called", RUNS, ids=lambda called: "-".join(getattr(x, "__name__", str(x)) for x in called))
def test_every_rank_finds_what_it_should_and_small_parts_of_the_same_bits(called):
    """The small parts decide branches."""
    world_size, *check = called
    first, *others = run(sharded.small_parts, world_size, *check)
    for other in others:
        for one, same in zip(first, other, strict=True):
            assert torch.equal(one, same)
