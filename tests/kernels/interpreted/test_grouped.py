"""brandla.grouped on the kernels: one launch for factors of different n, and the results of the torch forms."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

import brandla
from brandla import grouped
from brandla_kernels._kernels.launch import Target, recording
from builders import assert_agree, make_columns, make_eigh, make_root

# Four factors of one class, one of another rank, and one with r + k > n.
SIZES = [(60, 8, 5), (90, 8, 5), (41, 8, 5), (50, 8, 5), (50, 6, 5), (12, 8, 5)]
FLOAT32 = {"dtype": torch.float32}
ROOTS = [make_root(n, r, **FLOAT32) for n, r, _ in SIZES]
EIGHS = [make_eigh(n, r, **FLOAT32) for n, r, _ in SIZES]
COLUMNS = [make_columns(n, k, **FLOAT32) for n, _, k in SIZES]
LISTS = {
    **{"roots": ROOTS, "eighs": EIGHS, "columns": COLUMNS, "vectors": [each[:, 0] for each in COLUMNS]},
    **{"tracked": list(map(brandla.track, ROOTS)), "widths": [each[:, : i + 1] for i, each in enumerate(COLUMNS)]},
    "matrices": [make_columns(p[0], q[0], **FLOAT32) for p, q in zip(SIZES, SIZES[::-1], strict=True)],
    "each": [torch.tensor(number) for number in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)],
    "pairs": list(zip(COLUMNS, COLUMNS[::-1], strict=True)),
}

CALLS: dict[str, Callable[[Any], list[Any]]] = {
    "root_update": lambda x: grouped.root_update(x.roots, x.columns, decay=x.each, weight=0.1),
    "root_update, cholesky": lambda x: grouped.root_update(x.tracked, x.columns, decay=0.9, compress="cholesky"),
    "root_update, both": lambda x: grouped.root_update(x.roots, x.columns, compress=["eigh", "cholesky"] * 3),
    "eigh_update": lambda x: grouped.eigh_update(x.eighs, x.columns, decay=0.9, weight=x.each),
    "damped_solve, eigh": lambda x: grouped.damped_solve(x.eighs, x.columns, x.each, tail="smallest"),
    "damped_solve, root": lambda x: grouped.damped_solve(x.roots, x.widths, 0.1),
    "damped_solve, both": lambda x: grouped.damped_solve([*x.roots[:3], *x.eighs[3:]], x.columns, 0.1),
    "damped_solve, vectors": lambda x: grouped.damped_solve(x.roots, x.vectors, 0.1),
    "damped_power": lambda x: grouped.damped_power(x.roots, x.columns, 0.1, [-1, -1, -0.5, -0.5, 2, 1]),
    "kron_damped_solve": lambda x: grouped.kron_damped_solve(x.eighs, x.roots[::-1], x.matrices, 0.1, x.each),
    "eigh_refresh": lambda x: grouped.eigh_refresh(x.eighs, x.matrices, decay=0.9, weight=x.each),
    "kron_damped_power": lambda x: grouped.kron_damped_power(x.eighs, x.roots[::-1], x.matrices, x.each, -0.5),
    "kron_damped_solve, pairs": lambda x: grouped.kron_damped_solve(x.eighs, x.roots[::-1], x.pairs, 0.1, 0.2),
}


@pytest.mark.parametrize("name", CALLS)
def test_grouped_call_equals_the_torch_backend(name: str, device: torch.device) -> None:
    given = SimpleNamespace(**tree_map(lambda part: part.to(device), LISTS))
    actual = CALLS[name](given)
    with brandla.backend("torch"):
        expected = CALLS[name](given)
    # Sums of length up to n = 90 in float32, in a different order, through three products.
    assert_agree(actual, expected, 3e-5)


@pytest.mark.parametrize("name", ["root_update, cholesky", "eigh_update", "damped_solve, root", "kron_damped_solve"])
def test_launches_do_not_grow_with_the_number_of_factors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing runs: what would be decomposed is whatever the memory held.
    monkeypatch.setattr(torch.linalg, "eigh", lambda core: (core.diagonal(dim1=-2, dim2=-1), core))

    def launches(count: int) -> int:
        several = {key: values[:2] * count for key, values in LISTS.items()}
        # W between the first two of the left factors and the last two of the right ones, which are reversed.
        several["matrices"] = [torch.ones(n, m) for n, m in ((60, 90), (90, 60))] * count
        with recording(Target("cuda", "sm_90")) as started:
            CALLS[name](SimpleNamespace(**several))
        return len(started)

    assert 0 < launches(1) == launches(8) <= 24
