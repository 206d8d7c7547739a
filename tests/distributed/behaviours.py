"""What ranks do in the tests of `processes`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch
from torch import Tensor, distributed


def refusal(call: Callable[[], object]) -> str:
    """What a call is told; nothing if it goes through."""
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def reduce() -> None:
    distributed.all_reduce(torch.ones(1))


def total(number: float) -> tuple[Tensor, int]:
    tensor = torch.tensor(number)
    distributed.all_reduce(tensor)
    return tensor, distributed.get_rank()


def is_last() -> bool:
    return distributed.get_rank() == distributed.get_world_size() - 1


def first_rank_dies() -> str:
    if distributed.get_rank() == 0:
        os._exit(3)
    return refusal(reduce)


def last_rank_raises() -> str:
    if is_last():
        message = "not today"
        raise ValueError(message)
    return refusal(reduce)


def last_rank_sleeps() -> None:
    if is_last():
        time.sleep(600)
    distributed.barrier()
