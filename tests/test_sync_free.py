"""Functions that promise never to wait for the device run on meta tensors, which have no values to read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import brandla
from builders import make_columns, make_eigh, make_svd, make_sym

N, R, K = 40, 6, 4
COLUMNS = make_columns(N, K, dtype=torch.float32)
SYM = make_sym(N, R, dtype=torch.float32)
EIGH = make_eigh(N, R, dtype=torch.float32)
SMALL = make_eigh(9, 3, dtype=torch.float32)
DAMPING = torch.tensor(0.1)

CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "subspace_update": (brandla.subspace_update, (SYM, COLUMNS)),
    "subspace_update, tracked": (brandla.subspace_update, (brandla.track(SYM), COLUMNS)),
    "subspace_update, k above n - r": (brandla.subspace_update, (SYM, make_columns(N, N, dtype=torch.float32))),
    "subspace_update, tensor decay": (lambda *a: brandla.subspace_update(*a[:2], decay=a[2]), (SYM, COLUMNS, DAMPING)),
    "damped_solve, eigh": (brandla.damped_solve, (EIGH, COLUMNS, DAMPING)),
    "damped_solve, eigh, smallest": (lambda *a: brandla.damped_solve(*a, tail="smallest"), (EIGH, COLUMNS, DAMPING)),
    "damped_solve, sym": (brandla.damped_solve, (SYM, COLUMNS, DAMPING)),
    "damped_power, eigh": (lambda *a: brandla.damped_power(*a, -0.25), (EIGH, COLUMNS, DAMPING)),
    "kron_damped_solve": (brandla.kron_damped_solve, (EIGH, SMALL, torch.ones(N, 9), DAMPING, DAMPING)),
    "kron_damped_solve, pair": (
        brandla.kron_damped_solve,
        (SYM, SMALL, (COLUMNS, torch.ones(9, K)), DAMPING, DAMPING),
    ),
    "is_finite, eigh": (brandla.LowRankEigh.is_finite, (EIGH,)),
    "is_finite, sym": (brandla.LowRankSym.is_finite, (SYM,)),
    "is_finite, svd": (brandla.LowRankSVD.is_finite, (make_svd(N, 9, 3),)),
}


@pytest.mark.parametrize("name", CALLS)
def test_function_reads_nothing_back_from_the_device(name: str) -> None:
    function, arguments = CALLS[name]
    expected = function(*arguments)
    on_meta = tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf, arguments)
    result = function(*on_meta)
    shapes = [(part.shape, part.dtype) for part in tree_leaves(result)]
    assert shapes == [(part.shape, part.dtype) for part in tree_leaves(expected)]


def test_a_read_back_would_be_seen() -> None:
    with pytest.raises(RuntimeError, match="meta"):
        bool(DAMPING.to("meta") > 0)
