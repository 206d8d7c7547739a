"""Functions that promise never to wait for the device run on meta tensors, which have no values to read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import brandla
from builders import CHOLESKY_UPDATE, make_columns, make_root
from calls import WITHOUT_WAITING, given


@pytest.mark.parametrize("name", WITHOUT_WAITING)
def test_function_reads_nothing_back_from_the_device(name: str) -> None:
    expected, result = (WITHOUT_WAITING[name](arguments) for arguments in (given(), given().moved("meta")))
    shapes = [(part.shape, part.dtype) for part in tree_leaves(result)]
    assert shapes == [(part.shape, part.dtype) for part in tree_leaves(expected)]


def test_a_read_back_would_be_seen() -> None:
    with pytest.raises(RuntimeError, match="meta"):
        bool(given().moved("meta").number > 0)


@pytest.mark.parametrize("k", [8, 60], ids=["usual", "k above n - r"])
def test_the_update_by_cholesky_calls_no_decomposition_that_waits(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    def forbidden(*_: Any, **__: Any) -> Any:
        message = "a decomposition that waits for the device"
        raise AssertionError(message)

    root, columns = make_root(64, 12, dtype=torch.float32), make_columns(64, k, dtype=torch.float32)
    for name in ["eigh", "eigvalsh", "eig", "svd", "svdvals", "qr", "pinv", "matrix_rank", "lstsq"]:
        monkeypatch.setattr(torch.linalg, name, forbidden)
    assert CHOLESKY_UPDATE(brandla.track(root), columns, decay=0.9).lowrank.is_finite()
