"""What ranks do in the tests of `processes`."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import distributed


def refusal(call: Callable[[], object]) -> str:
    """What a call is told; nothing if it goes through."""
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def reduce() -> None:
    distributed.all_reduce(torch.ones(1))


def is_last() -> bool:
    return distributed.get_rank() == distributed.get_world_size() - 1


def last_rank_raises() -> str:
    if is_last():
        message = "not today"
        raise ValueError(message)
    return refusal(reduce)


def last_rank_sleeps() -> None:
    if is_last():
        time.sleep(600)
    distributed.barrier()
