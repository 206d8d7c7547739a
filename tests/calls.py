"""Calls of the public functions, with arguments of any dtype, batch and device: what several test files go through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import brandla
from brandla_kernels import gram_ema_
from builders import CHOLESKY_UPDATE, dense, make_columns, make_eigh, make_root, make_svd
from oracles import symmetrised

N, R, K = 40, 6, 4


class Given(NamedTuple):
    """Arguments: factors of order N, of order 9, new columns, and a positive number."""

    eigh: brandla.LowRankEigh
    root: brandla.LowRankRoot
    svd: brandla.LowRankSVD
    one_eigh: brandla.LowRankEigh  # not a batch
    small: brandla.LowRankEigh
    columns: Tensor  # N × K
    small_columns: Tensor  # 9 × K
    block: Tensor  # N × 9
    square: Tensor  # N × N, semi-definite
    number: Tensor

    def moved(self, to: torch.device | str) -> Given:
        """Return copies on a device."""
        return tree_map(lambda part: part.to(to, copy=True), self)


def given(dtype: torch.dtype = torch.float32, batch_shape: tuple[int, ...] = ()) -> Given:
    """Return new arguments."""
    options: dict[str, Any] = {"dtype": dtype, "batch_shape": batch_shape}
    return Given(
        *(make_eigh(N, R, **options), make_root(N, R, **options), make_svd(N, 9, R, **options)),
        *(make_eigh(N, R, dtype=dtype), make_eigh(9, 3, **options)),
        *(make_columns(n, k, **options) for n, k in ((N, K), (9, K), (N, 9))),
        *(symmetrised(make_root(N, R, **options).dense()), torch.tensor(0.1, dtype=dtype)),
    )


def doubled(columns: Tensor) -> Tensor:
    """Return each column twice."""
    return torch.cat([columns, columns], -1)


update = CHOLESKY_UPDATE
Call = Callable[[Given], Any]

# What promises never to wait for the device.
WITHOUT_WAITING: dict[str, Call] = {
    "root_update": lambda x: update(x.root, x.columns),
    "root_update, tracked": lambda x: update(brandla.track(x.root), x.columns),
    "root_update, k above n - r": lambda x: update(x.root, x.square),
    "root_update, tensor decay": lambda x: update(x.root, x.columns, decay=x.number),
    "root_update, rule": lambda x: update(x.root, x.columns, rank=brandla.Rank(max=5, tol=0.1)),
    "root_update, no columns": lambda x: update(brandla.track(x.root), x.columns[..., :0]),
    "root_update, half": lambda x: update(tree_map(Tensor.float, x.root), x.columns.bfloat16()),
    "root_update_": lambda x: update.in_place(x.root, x.columns, decay=0.5),
    "root_update_, tracked": lambda x: update.in_place(brandla.track(x.root), x.columns),
    "orthonormalize": lambda x: brandla.orthonormalize(x.columns),
    "eigh_refresh": lambda x: brandla.eigh_refresh(x.eigh, x.square, decay=x.number, weight=0.5),
    "eigh_refresh, begun": lambda x: brandla.eigh_refresh(tree_map(torch.zeros_like, x.eigh), x.square, iterations=2),
    "damped_solve, eigh": lambda x: brandla.damped_solve(x.eigh, x.columns, x.number),
    "damped_solve, smallest": lambda x: brandla.damped_solve(x.eigh, x.columns, x.number, tail="smallest"),
    "damped_solve, mean": lambda x: brandla.damped_solve(brandla.track(x.eigh), x.columns, x.number, tail="mean"),
    "damped_solve, root": lambda x: brandla.damped_solve(x.root, x.columns, x.number),
    "damped_solve, one for all": lambda x: brandla.damped_solve(x.one_eigh, x.columns, 0.1),
    "damped_power": lambda x: brandla.damped_power(x.eigh, x.columns, x.number, -0.25),
    "damped_solve, diagonal": lambda x: brandla.damped_solve(
        x.root, x.columns, x.number, diagonal=x.columns[..., 0] ** 2
    ),
    "damped_logdet": lambda x: brandla.damped_logdet(x.eigh, x.number, tail="smallest"),
    "damped_logdet, root": lambda x: brandla.damped_logdet(x.root, x.number),
    "damped_logdet, diagonal": lambda x: brandla.damped_logdet(x.eigh, 0.1, tail=0.2, diagonal=x.columns[..., 0] ** 2),
    "kron_damped_power": lambda x: brandla.kron_damped_power(x.eigh, x.small, x.block, 0.1, -0.5, left_tail="smallest"),
    "kron_damped_logdet": lambda x: brandla.kron_damped_logdet(x.eigh, x.small, 0.1, right_tail=0.2),
    "kron_damped_solve": lambda x: brandla.kron_damped_solve(x.root, x.small, x.block, 0.1, x.number),
    "kron_damped_solve, one for all": lambda x: brandla.kron_damped_solve(x.one_eigh, x.small, x.block, 0.1, 0.2),
    "kron_damped_solve, pair": lambda x: brandla.kron_damped_solve(
        x.root, x.small, (x.columns, x.small_columns), 0.1, x.number
    ),
    "is_finite": lambda x: [value.is_finite() for value in (x.eigh, x.root, x.svd)],
    "largest_eigenvalue": lambda x: x.root.largest_eigenvalue(),
    "gram_ema_": lambda x: (gram_ema_(x.square, x.columns, 0.9, 0.1), x.square)[1],
    "grouped.root_update": lambda x: update.grouped([x.root] * 2, [x.columns] * 2),
}
# What may call an eigendecomposition, which waits.
WAITING: dict[str, Call] = {
    "root_update, eigh": lambda x: brandla.root_update(x.root, x.columns, decay=0.9, weight=0.5),
    "root_update_, eigh": lambda x: brandla.root_update_(x.root, x.columns, decay=0.5),
    "damped_solve, root, tail": lambda x: brandla.damped_solve(x.root, x.columns, 0.1, tail=0.5),
    "kron_damped_power, root": lambda x: brandla.kron_damped_power(x.root, x.small, x.block, 0.1, -0.5),
    "to_eigh": lambda x: x.root.to_eigh(),
    "orthonormalize, dependent": lambda x: torch.matmul(*brandla.orthonormalize(doubled(x.columns))),
    "eigh_update": lambda x: brandla.eigh_update(x.eigh, x.columns, decay=0.9, weight=0.5),
    "eigh_update, dependent": lambda x: brandla.eigh_update(x.eigh, doubled(x.columns)),
    "eigh_downdate": lambda x: brandla.eigh_downdate(x.eigh, x.columns, weight=x.number),
    "root_update, shrink": lambda x: brandla.root_update(x.root, x.columns, shrink=True),
    "eigh_update_": lambda x: brandla.eigh_update_(x.eigh, x.columns, decay=0.5),
    "svd_append": lambda x: brandla.svd_append(x.svd, x.columns, decay=0.9),
    "svd_update": lambda x: brandla.svd_update(x.svd, x.columns, x.small_columns),
}


def in_full(result: Any) -> list[Tensor]:
    """Return what a result stands for, as matrices: eigenvectors of close eigenvalues are not comparable themselves."""
    if isinstance(result, brandla.Tracked):
        return in_full(result.lowrank)
    if isinstance(result, Tensor):
        return [result]
    return [dense(result)] if hasattr(result, "dense") else [part for each in result for part in in_full(each)]
