"""The launcher of the distributed tests: what a rank raises, and where it hangs, comes back."""

from __future__ import annotations

import multiprocessing
import time

import pytest

from distributed import behaviours
from distributed.processes import RanksFailedError, launch, run


def test_what_a_rank_raises_or_waits_for_is_reported_and_the_others_answer() -> None:
    with pytest.raises(RanksFailedError, match=r"1 of 2 ranks failed\nrank 1: Traceback(.|\n)*ValueError: not today"):
        run(behaviours.last_rank_raises, 2)
    first, last = launch(behaviours.last_rank_raises, 2)
    assert first.result
    assert last.failure
    # The server that forks is up by now, so that the time is that of the ranks.
    start = time.monotonic()
    with pytest.raises(RanksFailedError, match=r"rank 1: still running at the time limit\n(.|\n)*in last_rank_sleeps"):
        run(behaviours.last_rank_sleeps, 2, timeout=3)
    # The limit, and a few seconds in which a busy machine kills two processes.
    assert time.monotonic() - start < 13
    assert not multiprocessing.active_children()
