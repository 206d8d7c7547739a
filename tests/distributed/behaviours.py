"""What ranks do in the tests of `processes`."""

from __future__ import annotations

import os
import time

import torch
from torch import Tensor, distributed


def total(number: float) -> tuple[Tensor, int]:
    tensor = torch.tensor(number)
    distributed.all_reduce(tensor)
    return tensor, distributed.get_rank()


def first_rank_dies() -> str:
    if distributed.get_rank() == 0:
        os._exit(3)
    return refusal_of_all_reduce()


def last_rank_raises() -> str:
    if distributed.get_rank() == distributed.get_world_size() - 1:
        message = "not today"
        raise ValueError(message)
    return refusal_of_all_reduce()


def last_rank_sleeps() -> None:
    if distributed.get_rank() == distributed.get_world_size() - 1:
        time.sleep(600)
    distributed.barrier()


def refusal_of_all_reduce() -> str:
    try:
        distributed.all_reduce(torch.ones(1))
    except RuntimeError as error:
        return str(error)
    return ""
