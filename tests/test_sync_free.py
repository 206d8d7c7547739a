"""Functions that promise never to wait for the device run on meta tensors, which have no values to read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import brandla
from builders import CHOLESKY_UPDATE, make_columns, make_eigh, make_root, make_svd

N, R, K = 40, 6, 4
COLUMNS = make_columns(N, K, dtype=torch.float32)
ROOT = make_root(N, R, dtype=torch.float32)
EIGH = make_eigh(N, R, dtype=torch.float32)
SMALL = make_eigh(9, 3, dtype=torch.float32)
DAMPING = torch.tensor(0.1)

CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "root_update": (CHOLESKY_UPDATE, (ROOT, COLUMNS)),
    "root_update, tracked": (CHOLESKY_UPDATE, (brandla.track(ROOT), COLUMNS)),
    "root_update, k above n - r": (CHOLESKY_UPDATE, (ROOT, make_columns(N, N, dtype=torch.float32))),
    "root_update, tensor decay": (lambda *a: CHOLESKY_UPDATE(*a[:2], decay=a[2]), (ROOT, COLUMNS, DAMPING)),
    "root_update, rule": (lambda *a: CHOLESKY_UPDATE(*a, rank=brandla.Rank(max=5, tol=0.1)), (ROOT, COLUMNS)),
    "root_update, no columns": (CHOLESKY_UPDATE, (brandla.track(ROOT), COLUMNS[:, :0])),
    "root_update_": (CHOLESKY_UPDATE.in_place, (make_root(N, R, dtype=torch.float32), COLUMNS)),
    "root_update, list": (CHOLESKY_UPDATE.grouped, ([ROOT, ROOT], [COLUMNS, COLUMNS])),
    "orthonormalize": (brandla.orthonormalize, (COLUMNS,)),
    "damped_solve, eigh": (brandla.damped_solve, (EIGH, COLUMNS, DAMPING)),
    "damped_solve, eigh, smallest": (lambda *a: brandla.damped_solve(*a, tail="smallest"), (EIGH, COLUMNS, DAMPING)),
    "damped_solve, root": (brandla.damped_solve, (ROOT, COLUMNS, DAMPING)),
    "damped_solve, eigh, mean": (
        lambda *a: brandla.damped_solve(*a, tail="mean"),
        (brandla.track(EIGH), COLUMNS, DAMPING),
    ),
    "damped_power, eigh": (lambda *a: brandla.damped_power(*a, -0.25), (EIGH, COLUMNS, DAMPING)),
    "kron_damped_solve": (brandla.kron_damped_solve, (EIGH, SMALL, torch.ones(N, 9), DAMPING, DAMPING)),
    "kron_damped_solve, pair": (
        brandla.kron_damped_solve,
        (ROOT, SMALL, (COLUMNS, torch.ones(9, K)), DAMPING, DAMPING),
    ),
    "is_finite, eigh": (brandla.LowRankEigh.is_finite, (EIGH,)),
    "is_finite, root": (brandla.LowRankRoot.is_finite, (ROOT,)),
    "largest_eigenvalue, root": (brandla.LowRankRoot.largest_eigenvalue, (ROOT,)),
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


@pytest.mark.parametrize("k", [8, 60], ids=["usual", "k above n - r"])
def test_the_update_by_cholesky_calls_no_decomposition_that_waits(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    def forbidden(*_: Any, **__: Any) -> Any:
        message = "a decomposition that waits for the device"
        raise AssertionError(message)

    root, columns = make_root(64, 12, dtype=torch.float32), make_columns(64, k, dtype=torch.float32)
    for name in ["eigh", "eigvalsh", "eig", "svd", "svdvals", "qr", "pinv", "matrix_rank", "lstsq"]:
        monkeypatch.setattr(torch.linalg, name, forbidden)
    assert CHOLESKY_UPDATE(brandla.track(root), columns, decay=0.9).lowrank.is_finite()
