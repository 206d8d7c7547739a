"""The launcher of the distributed tests: results, failures and hangs all come back."""

from __future__ import annotations

import multiprocessing
import time

import pytest
import torch

from distributed import behaviours
from distributed.processes import RanksFailedError, launch, run


def test_every_rank_answers_in_order() -> None:
    assert run(behaviours.total, 4, 2.5) == [(torch.tensor(10.0), rank) for rank in range(4)]


def test_traceback_of_a_rank_is_reported_and_the_others_answer() -> None:
    with pytest.raises(RanksFailedError, match=r"1 of 2 ranks failed\nrank 1: Traceback(.|\n)*ValueError: not today"):
        run(behaviours.last_rank_raises, 2)
    first, last = launch(behaviours.last_rank_raises, 2)
    assert first.result
    assert last.failure


def test_death_of_a_rank_reaches_the_others() -> None:
    first, second = launch(behaviours.first_rank_dies, 2)
    assert first.failure == "died with exit code 3"
    assert second.failure is None
    assert second.result


def test_hang_ends_at_the_time_limit_with_the_stack() -> None:
    start = time.monotonic()
    with pytest.raises(RanksFailedError, match=r"rank 1: still running at the time limit\n(.|\n)*in last_rank_sleeps"):
        run(behaviours.last_rank_sleeps, 2, timeout=5)
    # The limit, and a few seconds in which a busy machine kills two processes.
    assert time.monotonic() - start < 15
    assert not multiprocessing.active_children()
