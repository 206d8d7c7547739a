"""Calls of the public functions, with arguments of any dtype, batch and device, that several test files go through."""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import brandla
import brandla_kernels
from builders import CHOLESKY_UPDATE, make_columns, make_eigh, make_root, make_svd, padded
from oracles import symmetrised

N, R, K = 40, 6, 4


class Arguments(NamedTuple):
    """Factors of order N and of order 9, new columns, and positive numbers."""

    eigh: brandla.LowRankEigh
    root: brandla.LowRankRoot
    svd: brandla.LowRankSVD
    one_eigh: brandla.LowRankEigh  # not a batch
    small: brandla.LowRankEigh
    columns: Tensor  # N × K
    small_columns: Tensor  # 9 × K
    block: Tensor  # N × 9
    square: Tensor  # N × N, semi-definite
    number: Tensor  # 1/8, 2/8, … in a batch

    def moved(self, to: torch.device | str) -> Self:
        """Return copies on a device."""
        return tree_map(lambda part: part.to(to, copy=True), self)


def new_arguments(dtype: torch.dtype = torch.float32, batch_shape: tuple[int, ...] = (), n: int = N) -> Arguments:
    """Return new arguments, of order n in place of N."""
    options: dict[str, Any] = {"dtype": dtype, "batch_shape": batch_shape}
    numbers = torch.arange(1, math.prod(batch_shape) + 1, dtype=dtype) / 8
    return Arguments(
        *(make_eigh(n, R, **options), make_root(n, R, **options), make_svd(n, 9, R, **options)),
        *(make_eigh(n, R, dtype=dtype), make_eigh(9, 3, **options)),
        *(make_columns(rows, k, **options) for rows, k in ((n, K), (9, K), (n, 9))),
        *(symmetrised(make_root(n, R, **options).dense()), numbers.reshape(batch_shape)),
    )


def doubled(columns: Tensor) -> Tensor:
    """Return each column twice."""
    return torch.cat([columns, columns], -1)


def seeded(x: Arguments) -> torch.Generator | None:
    """Return a generator, or None on the meta device, where no numbers are drawn."""
    return None if x.columns.is_meta else torch.Generator("cpu").manual_seed(0)


def stream(x: Arguments) -> brandla.Centred:
    """Return a centred stream after two batches."""
    start = brandla.centre(x.svd._replace(U=0 * x.svd.U, S=0 * x.svd.S, Vh=x.svd.Vh[..., :0]))
    return brandla.svd_append(brandla.svd_append(start, x.columns), x.block, decay=0.9)


update = CHOLESKY_UPDATE
Call = Callable[[Arguments], Any]

# Calls that promise never to wait for the device.
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
    "kron_damped_power": lambda x: brandla.kron_damped_power(
        x.eigh, x.small, x.block, x.number, -0.5, left_tail="smallest"
    ),
    "kron_damped_logdet": lambda x: brandla.kron_damped_logdet(x.eigh, x.small, x.number, right_tail=0.2),
    "kron_damped_solve": lambda x: brandla.kron_damped_solve(x.root, x.small, x.block, 0.1, x.number, right_tail=0.3),
    "kron_damped_solve, one for all": lambda x: brandla.kron_damped_solve(x.one_eigh, x.small, x.block, 0.1, 0.2),
    "kron_damped_solve, pair": lambda x: brandla.kron_damped_solve(
        x.root, x.small, (x.columns, x.small_columns), 0.1, x.number
    ),
    "is_finite": lambda x: [value.is_finite() for value in (x.eigh, x.root, x.svd)],
    "largest_eigenvalue": lambda x: x.root.largest_eigenvalue(),
    "gram_ema_": lambda x: (brandla_kernels.gram_ema_(x.square, x.columns, 0.9, 0.1), x.square)[1],
    "grouped.root_update": lambda x: update.grouped([x.root] * 2, [x.columns] * 2),
}
# Calls that may run an eigendecomposition, which waits for the device.
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
    "svd_update": lambda x: brandla.svd_update(x.svd, x.columns, x.small_columns, decay=x.number),
}
# Calls that tests of torch.compile leave out, and with few exceptions those of kernels.
OTHERS: dict[str, Call] = {
    "randomized_eigh": lambda x: brandla.randomized_eigh(x.square, 3, oversample=4, generator=seeded(x)),
    "randomized_svd": lambda x: brandla.randomized_svd(x.block, 3, oversample=1, generator=seeded(x)),
    "randomized_svd, of a value": lambda x: brandla.randomized_svd(x.svd, 3, oversample=3, generator=seeded(x)),
    "svd_append, again": lambda x: brandla.svd_append(brandla.svd_append(x.svd, x.columns), x.columns),
    "svd_append, no columns": lambda x: brandla.svd_append(x.svd, x.columns[..., :0]),
    "svd_update, wide": lambda x: brandla.svd_update(x.svd, x.square, x.block.mT, decay=x.number, rank=9),
    "eigh_update, again": lambda x: brandla.eigh_update(brandla.eigh_update(x.eigh, x.columns), x.columns),
    "eigh_update, tensors": lambda x: brandla.eigh_update(
        brandla.track(x.eigh), x.columns, decay=x.number, weight=x.number, rank=8
    ),
    "eigh_update, wide": lambda x: brandla.eigh_update(brandla.track(x.eigh), x.square),
    "root_update, tensors": lambda x: brandla.root_update(
        brandla.track(x.root), x.columns, decay=x.number, weight=x.number, rank=8
    ),
    "root_update, no columns, rank 4": lambda x: brandla.root_update(x.root, x.columns[..., :0], rank=4),
    "eigh_update, no columns": lambda x: brandla.eigh_update(brandla.track(x.eigh), x.columns[..., :0], decay=0.5),
    "eigh_downdate, no columns": lambda x: brandla.eigh_downdate(x.eigh, x.columns[..., :0]),
    "centred": lambda x: (c := stream(x), c.transform(x.columns), c.explained_variance(), c.explained_variance_ratio()),
    "inverse_transform": lambda x: stream(x).inverse_transform(stream(x).transform(x.columns)),
    "merge": lambda x: brandla.merge(stream(x), stream(x._replace(columns=2 * x.columns)), rank=5),
    "damped_solve, tensor tail": lambda x: brandla.damped_solve(x.eigh, x.columns, x.number, tail=x.number / 4),
    "damped_solve, vector": lambda x: brandla.damped_solve(x.eigh, x.columns[..., 0], x.number),
    "damped_solve, no columns": lambda x: [
        brandla.damped_solve(factor, x.columns[..., :0], x.number) for factor in (x.eigh, x.root)
    ],
    "damped_solve, one diagonal": lambda x: brandla.damped_solve(
        x.eigh, x.columns, 0.1, tail=0.2, diagonal=x.one_eigh.eigenvectors[..., 0] ** 2
    ),
    "damped_power, root": lambda x: brandla.damped_power(x.root, x.columns, 0.1, -0.5, tail=0.2),
    "damped_power, exponents 0 and 1": lambda x: [
        brandla.damped_power(x.eigh, x.columns, 0.1, power) for power in (0, 1)
    ],
    "damped_power, nothing held": lambda x: [
        brandla.damped_power(padded(x.root, -R), x.columns, 1.0, power) for power in (-1, -0.5, 0, 1)
    ],
    "kron_damped_solve, nothing held": lambda x: [
        brandla.kron_damped_solve(padded(x.eigh, -R), padded(x.small, -3), data, 1.0, 1.0)
        for data in (x.block, (x.columns, x.small_columns))
    ],
    "kron_damped_solve, root right": lambda x: [
        brandla.kron_damped_solve(x.eigh, brandla.LowRankRoot.from_eigh(x.small), data, x.number, 0.2, left_tail=0.1)
        for data in (x.block, (x.columns, x.small_columns))
    ],
    "kron_damped_power, one for all": lambda x: [
        brandla.kron_damped_power(x.one_eigh, x.small, x.block, x.number, -1),
        brandla.kron_damped_logdet(x.one_eigh, x.small, x.number),
    ],
    "kron_damped_power, tails": lambda x: [
        brandla.kron_damped_solve(x.eigh, x.small, x.block, x.number, 0.2, left_tail=x.number / 4, right_tail=x.number),
        brandla.kron_damped_power(x.root, x.small, x.block, x.number, -1, left_tail=x.number / 4, right_tail=x.number),
        brandla.kron_damped_logdet(
            x.eigh, x.small, x.number, values=2 * x.eigh.eigenvalues[..., None] * x.small.eigenvalues[..., None, :]
        ),
    ],
    "dense": lambda x: [value.dense() for value in (x.eigh, x.root, x.svd)],
    "products": lambda x: [x.eigh @ x.columns, x.root @ x.columns, x.svd.mT @ x.columns],
    "traces": lambda x: [x.eigh.trace(), x.root.trace(), x.eigh.largest_eigenvalue()],
    "from_eigh": lambda x: brandla.LowRankRoot.from_eigh(x.eigh),
    "zeros": lambda x: brandla.LowRankEigh.zeros(3, 2, device=x.columns.device),
    "gram": lambda x: [brandla_kernels.gram(x.columns), brandla_kernels.project(x.block, x.columns)],
    "kernels": lambda x: [torch.ops.brandla.gram(x.columns), torch.ops.brandla.project(x.block, x.columns)],
}
ALL = WITHOUT_WAITING | WAITING | OTHERS
# Where reads are free, values decide which of nearly dependent columns come first: only their span is comparable.
NOT_COMPARABLE = "eigh_refresh, begun"
# Calls that overwrite nothing, except the one above.
OUT_OF_PLACE = [name for name in ALL if "_," not in name and not name.endswith("_") and name != NOT_COMPARABLE]

# --- Lists

# n, r, k of each factor of a list. Factors of one rank are computed together, those of one order also in one stack.
LIST_SIZES = {
    "different": [(20, 5, 3), (33, 8, 40), (7, 0, 1), (12, 12, 0)],
    "one rank": [(40, 8, 5), (64, 8, 5), (90, 8, 5), (52, 8, 5)],
    "one order": [(40, 8, 5)] * 4,
    "some of one rank": [(50, 8, 5), (41, 8, 5), (50, 6, 5), (12, 8, 5)],
    "filled whole": [(10, 8, 30), (20, 8, 30), (33, 8, 30), (21, 8, 30)],
}


@cache
def list_calls(sizes: str, dtype: torch.dtype = torch.float64) -> dict[str, tuple[list[Any], dict[str, Any]]]:
    """Return the lists and the options of each call, for factors of these sizes."""
    each = [(*size, {"seed": 50 + index, "dtype": dtype}) for index, size in enumerate(LIST_SIZES[sizes])]
    eighs = [make_eigh(n, r, **options) for n, r, k, options in each]
    roots = [make_root(n, r, **options) for n, r, k, options in each]
    rights = [make_root(n + 2, min(r, 5), **options) for n, r, k, options in each]
    svds = [make_svd(n, n + 2, r, **options) for n, r, k, options in each]
    columns = [make_columns(n, k, **options) for n, r, k, options in each]
    right_columns = [make_columns(n + 2, k, **options) for n, r, k, options in each]
    rhs = [make_columns(n, 2, **options) for n, r, k, options in each]
    widths = [panel[:, : index + 1] for index, panel in enumerate(columns)]
    blocks = [make_columns(n, n + 2, **options) for n, r, k, options in each]
    pairs = list(zip(columns, right_columns, strict=True))
    # The last column becomes zero, if there is one.
    eighs[0] = padded(padded(eighs[0], -1), 1)
    ones, ramp = torch.ones(LIST_SIZES[sizes][0][0]).to(dtype), torch.arange(LIST_SIZES[sizes][3][0]).to(dtype)
    numbers, tracked = [0.1, torch.tensor(0.2), 0.3, 0.4], partial(map, brandla.track)
    decays, tails = [0.9, 0.5, 0.1, 1.0], [0.0, "smallest", 0.5, torch.tensor(0.1)]
    one_each = {"decay": decays, "weight": (0.1, 0.2, 0.3, 0.4), "rank": [8, None, 1, 5]}
    forms = {"rank": [8, brandla.Rank(13, tol=1e-3), 1, 5], "compress": ["eigh", "cholesky", "eigh", "cholesky"]}
    diagonals = {"tail": "smallest", "diagonal": [ones, None, None, ramp]}
    fitted = {"left_tail": 0.2, "values": [None, make_columns(8, 5, dtype=dtype).square(), None, None]}
    both_kinds = [*eighs[:2], *roots[2:]]
    sides = {"left_tail": "smallest", "right_tail": [0.0, 0.1, 0.2, 0.3]}
    # Names begin with the function; calls of one function differ in the words behind it.
    return {
        "eigh_update": ([eighs, columns], {}),
        "eigh_update, one value for all": ([eighs, columns], {"decay": 0.9, "weight": torch.tensor(0.1)}),
        "eigh_update, one value each": ([eighs, columns], one_each),
        "eigh_update, tracked": ([[*tracked(eighs)], columns], {"decay": 0.9}),
        "root_update": ([roots, columns], {"decay": decays}),
        "root_update, one value each": ([roots, columns], forms),
        "root_update, tracked": ([[*tracked(roots)], columns], {"compress": "cholesky"}),
        "root_update, shrink": ([roots, columns], {"shrink": [True, False, True, True], "decay": 0.9}),
        "eigh_downdate": ([eighs, columns], {"weight": [0.1, 0.2, 0.3, 0.4]}),
        "eigh_refresh": ([eighs, blocks], {"decay": [0.5, torch.tensor(0.9), 0.9, 0.9], "weight": 0.1}),
        "eigh_refresh, twice": ([eighs, blocks], {"decay": 0.9, "iterations": [2, 2, 1, 2]}),
        "svd_update": ([svds, columns, right_columns], {"decay": 0.5, "rank": [8, 8, 1, 5]}),
        "svd_append": ([svds, columns], {"decay": decays}),
        "damped_solve": ([eighs, rhs, numbers], {"tail": tails}),
        "damped_solve, both kinds": ([both_kinds, rhs, numbers], {"tail": "smallest"}),
        "damped_solve, one value": ([eighs, rhs, 0.1], {}),
        "damped_solve, roots": ([roots, widths, 0.1], {}),
        "damped_solve, vectors": ([roots, [block[:, 0] for block in rhs], 0.1], {}),
        "damped_solve, diagonal": ([eighs, rhs, numbers], diagonals),
        "damped_power": ([roots, rhs, numbers, [-1, -0.5, -0.25, 2]], {}),
        "damped_power, one value": ([eighs, rhs, 0.1, -0.5], {}),
        "damped_logdet": ([both_kinds, numbers], {"tail": tails}),
        "damped_logdet, one value": ([eighs, 0.1], {"tail": 0.3}),
        "damped_logdet, roots": ([roots, numbers], {"tail": "smallest"}),
        "kron_damped_solve": ([eighs, rights, [*blocks[:2], *pairs[2:]], numbers, numbers], sides),
        "kron_damped_solve, matrices": ([roots, rights, blocks, 0.1, 0.2], {}),
        "kron_damped_solve, pairs": ([eighs, rights, pairs, 0.1, 0.2], {}),
        "kron_damped_power": ([eighs, rights, blocks, 0.1, -0.5], sides),
        "kron_damped_power, one value each": ([roots, rights, blocks, numbers, [-1, -0.5, 0.5, 1]], fitted),
        "kron_damped_logdet": ([eighs, rights, 0.3], sides),
        "kron_damped_logdet, roots": ([roots, rights, numbers], {"left_tail": 0.3, "right_tail": 0.2}),
    }
