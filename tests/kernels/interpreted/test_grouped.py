"""brandla.grouped on the kernels: one launch for factors of different n, and the results of the single functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import brandla
from brandla import grouped
from brandla_kernels._kernels.launch import Target, recording
from builders import make_columns, make_eigh, make_root

# Four factors of one class, one of another rank, and one with r + k > n.
SIZES = [(60, 8, 5), (90, 8, 5), (41, 8, 5), (50, 8, 5), (50, 6, 5), (12, 8, 5)]
ROOTS = [make_root(n, r, dtype=torch.float32) for n, r, _ in SIZES]
EIGHS = [make_eigh(n, r, dtype=torch.float32) for n, r, _ in SIZES]
COLUMNS = [make_columns(n, k, dtype=torch.float32) for n, _, k in SIZES]
WIDTHS = [columns[:, : index + 1] for index, columns in enumerate(COLUMNS)]
MATRICES = [make_columns(p, q, dtype=torch.float32) for (p, *_), (q, *_) in zip(SIZES, SIZES[::-1], strict=True)]
DECAYS = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]

CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "root_update": (lambda *a: grouped.root_update(*a, decay=DECAYS, weight=0.1), (ROOTS, COLUMNS)),
    "root_update, cholesky, tracked": (
        lambda roots, columns: grouped.root_update(
            [brandla.track(root) for root in roots], columns, decay=0.9, compress="cholesky"
        ),
        (ROOTS, COLUMNS),
    ),
    "root_update, some by either way": (
        lambda *a: grouped.root_update(*a, compress=["eigh", "eigh", "cholesky", "cholesky", "eigh", "eigh"]),
        (ROOTS, COLUMNS),
    ),
    "eigh_update": (lambda *a: grouped.eigh_update(*a, decay=0.9, weight=DECAYS), (EIGHS, COLUMNS)),
    "damped_solve, eigh": (lambda *a: grouped.damped_solve(*a, DECAYS, tail="smallest"), (EIGHS, COLUMNS)),
    "damped_solve, root": (lambda *a: grouped.damped_solve(*a, 0.1), (ROOTS, WIDTHS)),
    "damped_solve, both kinds": (lambda *a: grouped.damped_solve(*a, 0.1), ([*ROOTS[:3], *EIGHS[3:]], COLUMNS)),
    "damped_solve, vectors": (
        lambda lowranks, rhs: grouped.damped_solve(lowranks, [block[:, 0] for block in rhs], 0.1),
        (ROOTS, COLUMNS),
    ),
    "damped_power": (lambda *a: grouped.damped_power(*a, 0.1, [-1, -1, -0.5, -0.5, 2, 1]), (ROOTS, COLUMNS)),
    "kron_damped_solve": (lambda *a: grouped.kron_damped_solve(*a, 0.1, DECAYS), (EIGHS, ROOTS[::-1], MATRICES)),
    "kron_damped_solve, pairs": (
        lambda lefts, rights, data: grouped.kron_damped_solve(lefts, rights, [(a, b) for a, b in data], 0.1, 0.2),
        (EIGHS, ROOTS[::-1], list(zip(COLUMNS, COLUMNS[::-1], strict=True))),
    ),
}


def in_full(tree: Any) -> list[torch.Tensor]:
    """Return what factors stand for: their bases are determined only up to signs and rotations."""
    factors = (item.lowrank if isinstance(item, brandla.Tracked) else item for item in tree)
    return tree_leaves([factor.dense() if hasattr(factor, "dense") else factor for factor in factors])


@pytest.mark.parametrize("name", CALLS)
def test_grouped_call_equals_the_torch_backend(name: str, device: str):
    function, arguments = CALLS[name]
    expected = in_full(function(*arguments))
    moved = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, arguments)
    with brandla.backend("triton"):
        actual = in_full(function(*moved))
    for got, wanted in zip(actual, expected, strict=True):
        # Sums of length up to n = 90 in float32, in a different order, through three products.
        torch.testing.assert_close(got.cpu(), wanted, rtol=3e-5, atol=3e-5 * float(wanted.abs().max()))


ALIKE: dict[str, Callable[[int], Any]] = {
    "root_update": lambda count: grouped.root_update(ROOTS[:2] * count, COLUMNS[:2] * count, compress="cholesky"),
    "eigh_update": lambda count: grouped.eigh_update(EIGHS[:2] * count, COLUMNS[:2] * count),
    "damped_solve": lambda count: grouped.damped_solve(EIGHS[:2] * count, COLUMNS[:2] * count, 0.1),
    "kron_damped_solve": lambda count: grouped.kron_damped_solve(
        EIGHS[:2] * count, ROOTS[:2] * count, [torch.ones(n, n) for n, *_ in SIZES[:2]] * count, 0.1, 0.1
    ),
}


@pytest.mark.parametrize("name", ALIKE)
def test_launches_do_not_grow_with_the_number_of_factors(name: str):
    def launches(count: int) -> int:
        with brandla.backend("triton"), recording(Target("cuda", "sm_90")) as started:
            ALIKE[name](count)
        return len(started)

    assert 0 < launches(1) == launches(8) <= 24
