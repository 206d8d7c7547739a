"""A kernel is launched while the device of its tensors is the current one: Triton takes the current device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from brandla_kernels._kernels.launch import Config, start


class Kernel:
    """Stands in for a compiled kernel, and notes when it is launched."""

    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda **arguments: self.log.append(("launch", grid))


def test_a_launch_runs_under_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        log.append(("enter", tensor.device))
        yield
        log.append(("exit", tensor.device))

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    panel = torch.empty(3, device="meta")
    start(Kernel(log), (2,), {"absent_ptr": None, "panel_ptr": panel, "n": 3}, Config({}, 4, 1))
    assert log == [("enter", panel.device), ("launch", (2,)), ("exit", panel.device)]
