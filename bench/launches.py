"""Kernel launches of every public function and of a K-FAC step, beside their budgets: ``python -m bench.launches``.

Counted on a CPU, as `bench.counting` says; no GPU is needed. A launch takes some microseconds of the host, and its
kernel as much of the device however small it is, so for small matrices the count is the time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import brandla
from bench.counting import Counts, counting, counts_of
from bench.frame import results
from bench.frame.facts import facts
from brandla import LowRankEigh, LowRankRoot, LowRankSVD, Tracked, grouped
from brandla_kernels._kernels.ahead import TARGETS

Call = Callable[[], Any]

N, R, K = 1000, 32, 16
BATCH, LISTED = 4, 8
FORMS = ("single", "batched", "grouped")


class Limit(NamedTuple):
    """The budget of a call, of Triton's kernels and of torch's, and what it takes at present where that is more.

    Both hold for one factor, for a batch and for a list.
    """

    budget: tuple[int, int]
    present: tuple[int, int] | None = None

    @property
    def triton(self) -> int:
        """Most launches of this library's kernels."""
        return max(self.budget[0], (self.present or self.budget)[0])

    @property
    def torch(self) -> int:
        """Most other kernels."""
        return max(self.budget[1], (self.present or self.budget)[1])


# Whoever brings a count down lowers the second pair, down to none where the budget is met.
LIMITS: dict[str, Limit] = {
    "root_update, cholesky": Limit((4, 2)),
    "root_update_, cholesky": Limit((4, 2), present=(4, 3)),
    "root_update, cholesky, tracked": Limit((4, 2), present=(4, 6)),
    # One of torch's is the eigendecomposition.
    "eigh_update": Limit((8, 7), present=(7, 77)),
    # Of a list of roots F is scaled one by one, by a kernel each.
    "damped_solve, root": Limit((3, 1), present=(3, 35)),
    "damped_solve, eigh": Limit((3, 1), present=(3, 6)),
    "kron_damped_solve, W": Limit((4, 2), present=(8, 74)),
    "kron_damped_solve, W, eigh": Limit((4, 2), present=(8, 20)),
    "kron_damped_solve, pair": Limit((4, 2), present=(6, 70)),
    "kron_damped_solve, pair, eigh": Limit((4, 2), present=(6, 12)),
}


def kfac_budget(layers: int) -> int:
    """Return the most kernels of all kinds that a step of `Brand` may take on so many linear layers."""
    return 30 + 8 * layers


# The same for a step of K-FAC: the sum of both kinds at present, by system and network.
STEPS_AT_PRESENT: dict[str, dict[str, int]] = {
    "Brand": {"MLP, 1 layer": 146, "MLP, 3 layers": 176, "MLP, 12 layers": 311, "transformer": 691},
    # Of these some 15 a factor are the power iterations for its largest eigenvalue, of one factor after the other.
    "Brand, cholesky": {"MLP, 1 layer": 142, "MLP, 3 layers": 280, "MLP, 12 layers": 901, "transformer": 1389},
    "Brand, eigh": {"MLP, 1 layer": 152, "MLP, 3 layers": 178, "MLP, 12 layers": 295, "transformer": 656},
}


# ---------------------------------------------------------------------------------------------------------------------
# Public functions
# ---------------------------------------------------------------------------------------------------------------------


def basis(n: int, r: int, batch: tuple[int, ...]) -> Tensor:
    """Return orthonormal columns."""
    return torch.linalg.qr(torch.randn(*batch, n, r)).Q


def values(r: int, batch: tuple[int, ...]) -> Tensor:
    """Return descending values."""
    return (1 / torch.arange(1, r + 1)).expand(*batch, r).contiguous()


def eigh(n: int, batch: tuple[int, ...]) -> LowRankEigh:
    """Return a factor in the orthonormal form."""
    return LowRankEigh(values(R, batch), basis(n, R, batch))


def root(n: int, batch: tuple[int, ...]) -> LowRankRoot:
    """Return a factor in the square-root form, whose S is not diagonal."""
    matrix = torch.randn(*batch, n, R)
    return LowRankRoot(matrix, matrix.mT @ matrix)


def svd(n: int, batch: tuple[int, ...]) -> LowRankSVD:
    """Return a decomposition of an n × n/2 matrix."""
    return LowRankSVD(basis(n, R, batch), values(R, batch), basis(n // 2, R, batch).mT)


def columns(n: int, batch: tuple[int, ...], k: int = K) -> Tensor:
    """Return new columns."""
    return torch.randn(*batch, n, k)


class Case(NamedTuple):
    """A public function, its options, and its arguments for n and a batch shape."""

    function: str
    arguments: Callable[[int, tuple[int, ...]], tuple[Any, ...]]
    options: Mapping[str, Any] = MappingProxyType({})

    def call(self, form: str) -> Call | None:
        """Return the call in a form, if there is one."""
        if form != "grouped":
            arguments = self.arguments(N, (BATCH,) if form == "batched" else ())
            return partial(getattr(brandla, self.function), *arguments, **self.options)
        if not hasattr(grouped, self.function):
            return None
        several = [self.arguments(N + 100 * index, ()) for index in range(LISTED)]
        # Numbers are one for all.
        lists = [list(part) if isinstance(part[0], (Tensor, tuple)) else part[0] for part in zip(*several, strict=True)]
        return partial(getattr(grouped, self.function), *lists, **self.options)


def tracked(factor: LowRankRoot) -> Tracked[LowRankRoot]:
    """Return a factor with its error bound and trace."""
    zero = factor.gram.new_zeros(factor.gram.shape[:-2])
    return Tracked(factor, zero, zero + 1)


AVERAGE = {"decay": 0.95, "weight": 0.05}
NO_EIGH = AVERAGE | {"compress": "cholesky"}
FUNCTIONS: dict[str, Case] = {
    "root_update, cholesky": Case("root_update", lambda n, b: (root(n, b), columns(n, b)), NO_EIGH),
    "root_update, cholesky, tracked": Case("root_update", lambda n, b: (tracked(root(n, b)), columns(n, b)), NO_EIGH),
    "root_update_, cholesky": Case("root_update_", lambda n, b: (root(n, b), columns(n, b)), NO_EIGH),
    "root_update": Case("root_update", lambda n, b: (root(n, b), columns(n, b)), AVERAGE),
    "eigh_update": Case("eigh_update", lambda n, b: (eigh(n, b), columns(n, b)), AVERAGE),
    "eigh_update_": Case("eigh_update_", lambda n, b: (eigh(n, b), columns(n, b)), AVERAGE),
    "damped_solve, root": Case("damped_solve", lambda n, b: (root(n, b), columns(n, b), 0.1)),
    "damped_solve, eigh": Case("damped_solve", lambda n, b: (eigh(n, b), columns(n, b), 0.1)),
    "damped_power, root": Case("damped_power", lambda n, b: (root(n, b), columns(n, b), 0.1, -0.5)),
    "damped_power, eigh": Case("damped_power", lambda n, b: (eigh(n, b), columns(n, b), 0.1, -0.5)),
    "kron_damped_solve, W": Case(
        "kron_damped_solve", lambda n, b: (root(n, b), root(n // 2, b), columns(n, b, n // 2), 0.1, 0.2)
    ),
    "kron_damped_solve, pair": Case(
        "kron_damped_solve", lambda n, b: (root(n, b), root(n // 2, b), (columns(n, b), columns(n // 2, b)), 0.1, 0.2)
    ),
    "kron_damped_solve, W, eigh": Case(
        "kron_damped_solve", lambda n, b: (eigh(n, b), eigh(n // 2, b), columns(n, b, n // 2), 0.1, 0.2)
    ),
    "kron_damped_solve, pair, eigh": Case(
        "kron_damped_solve", lambda n, b: (eigh(n, b), eigh(n // 2, b), (columns(n, b), columns(n // 2, b)), 0.1, 0.2)
    ),
    "orthonormalize": Case("orthonormalize", lambda n, b: (columns(n, b),)),
    "svd_update": Case("svd_update", lambda n, b: (svd(n, b), columns(n, b), columns(n // 2, b))),
    "svd_append": Case("svd_append", lambda n, b: (svd(n, b), columns(n, b))),
    "randomized_eigh": Case("randomized_eigh", lambda n, b: (root(n, b).dense(), R)),
    "randomized_svd": Case("randomized_svd", lambda n, b: (columns(n, b, n // 2), R)),
}


def function_rows(target: str) -> Iterator[dict[str, Any]]:
    """Count every public function in every form."""
    for name, case in FUNCTIONS.items():
        for form in FORMS:
            call = case.call(form)
            if call is not None:
                yield {"call": name, "form": form, **asdict(counts_of(call, target))}


# ---------------------------------------------------------------------------------------------------------------------
# A step of K-FAC
# ---------------------------------------------------------------------------------------------------------------------


def mlp(layers: int) -> nn.Module:
    """Return so many linear layers of different widths."""
    widths = [48, *(64 + 8 * (index % 3) for index in range(layers - 1)), 40]
    return nn.Sequential(*(part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.Tanh())))


class Block(nn.Module):
    """A transformer's block: one head, and two layers after it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.after = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return x and what both parts add to it."""
        y = self.first(x)
        attention = (self.query(y) @ self.key(y).mT / y.shape[-1] ** 0.5).softmax(-1)
        x = x + self.out(attention @ self.value(y))
        return x + self.after(self.second(x))


def transformer() -> nn.Module:
    """Return two blocks between two linear layers: 14 of these in all."""
    return nn.Sequential(nn.Linear(48, 64), Block(64), Block(64), nn.Linear(64, 40))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MLP, 1 layer": lambda: mlp(1),
    "MLP, 3 layers": lambda: mlp(3),
    "MLP, 12 layers": lambda: mlp(12),
    "transformer": transformer,
}


def strategies() -> dict[str, Any]:
    """Return some systems of the K-FAC family, with periods such that all of them renew at the step that is counted."""
    from brandla.kfac import Brand, Exact, InverseFree, Randomized

    return {
        "Brand": Brand(8),
        "Brand, cholesky": Brand(8, compress="cholesky"),
        "Brand, eigh": Brand(8, form="eigh"),
        "Exact": Exact(inverse_every=1),
        "Randomized": Randomized(8, inverse_every=1),
        "InverseFree": InverseFree(),
    }


def step_counts(network: nn.Module, strategy: Any, target: str) -> Counts:
    """Count the third step of a training run, without its backward pass."""
    from brandla.kfac import KFAC

    preconditioner = KFAC(network, inverse=strategy)
    data = torch.randn(16, 5, 48) if any(isinstance(part, Block) for part in network) else torch.randn(16, 48)

    def backward() -> None:
        network.zero_grad()
        network(data).square().mean().backward()

    for _ in range(2):
        backward()
        preconditioner.step()
    backward()
    with counting(target) as counter:
        preconditioner.step()
    return counter.counts


def linear_layers(network: nn.Module) -> int:
    """Return the number of linear layers."""
    return sum(isinstance(part, nn.Linear) for part in network.modules())


def kfac_rows(target: str) -> Iterator[dict[str, Any]]:
    """Count a step of each system on each network."""
    for strategy_name, strategy in strategies().items():
        for name, make in NETWORKS.items():
            network = make()
            counts = step_counts(network, strategy, target)
            own = {"call": f"KFAC.step, {strategy_name}", "form": name, "layers": linear_layers(network)}
            yield own | asdict(counts)


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


def budget_of(row: dict[str, Any]) -> str:
    """Return the budget in words."""
    if row["call"].startswith("KFAC.step, Brand"):
        return f"{kfac_budget(row['layers'])} in all"
    limit = LIMITS.get(row["call"])
    return "" if limit is None else "{} + {}".format(*limit.budget)


def within(row: dict[str, Any]) -> bool:
    """Say whether a call with a budget meets it."""
    if row["call"].startswith("KFAC.step, Brand"):
        return bool(row["triton"] + row["torch"] <= kfac_budget(row["layers"]))
    limit = LIMITS.get(row["call"])
    return limit is None or (row["triton"] <= limit.budget[0] and row["torch"] <= limit.budget[1])


def table(rows: list[dict[str, Any]], target: str) -> Table:
    """Return the counts beside the budgets."""
    shown = Table(title=f"Kernels of a call on {target}")
    for heading in ("call", "form", "Triton", "torch", "budget", "uploads", "waits"):
        shown.add_column(heading, justify="left" if heading in ("call", "form") else "right")
    for row in rows:
        cells = (row["call"], row["form"], row["triton"], row["torch"], budget_of(row), row["uploads"], row["waits"])
        shown.add_row(*map(str, cells), style=None if within(row) else "red")
    return shown


def main() -> int:
    """Count, print the table and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=list(TARGETS), default="sm_90")
    parser.add_argument("--quick", action="store_true", help="leaves K-FAC out, and the result out of version control")
    parser.add_argument("--out", type=Path, help="folder of the result file, in place of the machine's own")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = list(function_rows(options.target))
    if not options.quick:
        rows.extend(kfac_rows(options.target))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table(rows, options.target))
    content = {"target": options.target, "rows": [row | {"budget": budget_of(row)} for row in rows]}
    path = results.write("launches", facts(options.quick), content, options.out)
    console.print(f"Written: {path}", soft_wrap=True, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
