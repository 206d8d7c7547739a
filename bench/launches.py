"""Kernels of every public function and of a K-FAC step, beside their budgets: ``python -m bench.launches``.

Counted on a CPU, with no GPU: a launch takes some microseconds of the host, and its kernel as much of the device
however small it is, so for small matrices the count is the time. Every op of the library records what its Triton
launch would start on a target, and takes its values from its torch form; no branch looks at a value unless a GPU's
would too. A dispatch mode counts what torch is asked for. A view, an allocation, and a result without entries are
free. One function of ``torch.linalg``, and one ``torch._foreach_`` over a list, counts as one kernel; cuSOLVER, or a
long list, takes several.

The host's own time is shown for some calls and for a step of K-FAC: launches replaced by their record, one thread.
Triton's own part of a launch comes on top on a GPU. Times depend on what else the machine does, and the number of
Python's calls does not.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from time import perf_counter
from timeit import repeat, timeit
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import brandla
import brandla_kernels
from bench.frame import results
from bench.frame.facts import facts
from bench.frame.pages import on_terminal
from brandla import LowRankEigh, LowRankRoot, LowRankSVD, Tracked, grouped
from brandla.kfac import KBFGS, KFAC, Brand, Exact, InverseFree, Randomized, Woodbury
from brandla_kernels import OPS
from brandla_kernels._kernels import plan
from brandla_kernels._kernels.ahead import TARGETS, target_named
from brandla_kernels._kernels.launch import Launch, recording

aten = torch.ops.aten
ALLOCATIONS = {
    *(aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.resize_),
    *(aten.detach, aten.detach_, aten._unsafe_view, aten.set_),
}
READS_ALONE = {aten._local_scalar_dense, aten.is_nonzero}
ON_HOST = {aten.promote_types}
# What makes the host wait for the device: results that it reads, or whose sizes it needs.
WAITS = READS_ALONE | {
    *(aten.equal, aten.nonzero, aten._linalg_eigh, aten._linalg_svd, aten.linalg_qr),
    *(aten.geqrf, aten.linalg_eig, aten._linalg_solve_ex),
}


@dataclass(frozen=True)
class Counts:
    triton: int = 0  # launches of this library's kernels
    torch: int = 0  # other kernels
    uploads: int = 0  # tensors written on the host: numbers, and the tables of lists
    waits: int = 0  # times that the host waits for the device

    @property
    def kernels(self) -> int:
        return self.triton + self.torch


class Counter(TorchDispatchMode):
    """Count what is asked for inside the ``with`` block."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = target_named(target)
        self.counts = Counts()
        self.ops: list[tuple[Any, tuple[Any, ...]]] = []  # each with its arguments

    def _add(self, **numbers: int) -> None:
        self.counts = Counts(**{name: count + numbers.get(name, 0) for name, count in asdict(self.counts).items()})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "brandla":
            return self._op(func, args)
        packet = func.overloadpacket
        result = func(*args, **(kwargs or {}))
        upload = packet is aten.lift_fresh
        free = func.is_view or packet in ALLOCATIONS | READS_ALONE | ON_HOST or _is_empty(func, args, result)
        self._add(waits=int(packet in WAITS), uploads=int(upload), torch=int(not upload and not free))
        return result

    def _op(self, func: Any, args: tuple[Any, ...]) -> Any:
        name = func.__name__.partition(".")[0]
        op = OPS[name.replace("_grouped", "")]
        form = op.torch_form if name in OPS else op.grouped_form
        if op.launch is None:
            with self:
                return form(*args)
        self.ops.append((op, args))
        # What a launch leaves unwritten must not reach what the op overwrites.
        spared = tree_map_only(Tensor, Tensor.clone, args)
        with self, recording(self.target) as launches:
            op.launch(*(spared if op.signature.writes else args))
        self._add(triton=len(launches))
        with brandla.backend("torch"):
            return form(*args)


def _is_empty(func: Any, args: Any, result: Any) -> bool:
    """Say whether nothing is written, since all that would be has no entries."""
    written = [part for part in tree_leaves(result) if isinstance(part, Tensor)]
    if not written and func._schema.is_mutable:
        written = [part for part in tree_leaves(args[0]) if isinstance(part, Tensor)]
    return bool(written) and all(part.numel() == 0 for part in written)


@contextmanager
def counting(target: str) -> Iterator[Counter]:
    """Yield a `Counter`, inside which functions take the way of a GPU."""
    with recording(target_named(target)), brandla.backend("triton"), torch.no_grad(), Counter(target) as counter:
        yield counter


def counts_of(call: Callable[[], Any], target: str = "sm_90") -> Counts:
    with counting(target) as counter:
        call()
    return counter.counts


# --- The host

# The most microseconds of the host that a call for one factor may take on one core.
HOST_BUDGETS = {
    "project": 40,
    "damped_solve, root": 120,
    "damped_solve, eigh": 120,
    "root_update, cholesky": 250,
}
# The same of a step of K-FAC: its call, and the network that it is for.
STEP_BUDGETS = {("KFAC.step, Brand, cholesky", "MLP, 48 layers"): 15_000}


def host_times(call: Callable[[], Any], target: str = "sm_90") -> dict[str, float]:
    """Return microseconds of a call whose launches are recorded, in all and of its parts, and Python's calls in it.

    Its parts are what the function does before and between its ops, checks above all; the dispatcher and the checks of
    the ops; the tables of lists; and the rest of the launches.
    """
    with counting(target) as counter:
        call()
    with recording(target_named(target)) as launches, brandla.backend("triton"), torch.no_grad():
        whole = _microseconds(call, launches)
        ops = sum(_microseconds(partial(op, *args), launches) for op, args in counter.ops)
        launching, tables = (_microseconds_in(plan, name, call, launches) for name in ("call", "written"))
    parts = {"checks": whole - ops, "dispatch": ops - launching, "tables": tables, "launching": launching - tables}
    return {"host µs": whole, **parts, "Python calls": python_calls(call, target)}


def python_calls(call: Callable[[], Any], target: str = "sm_90") -> int:
    """Count the calls of Python functions in a call whose launches are recorded, once it has been made before."""
    with recording(target_named(target)), brandla.backend("triton"), torch.no_grad():
        call()
        return _python_calls(call)


def _python_calls(call: Callable[[], Any]) -> int:
    calls, other = 0, sys.getprofile()

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(other)
    return calls


def _microseconds(call: Callable[[], Any], launches: list[Launch]) -> float:
    """Return the time of a call, at the best of some rounds."""

    def once() -> None:
        call()
        # They hold the memory of every call, which then takes new pages of the host: twice the time.
        launches.clear()

    return 1e6 * min(repeat(once, number=20, repeat=10)) / 20


def _microseconds_in(module: Any, function: str, call: Callable[[], Any], launches: list[Launch]) -> float:
    """Return the time that a call spends in a function, in the mean of some."""
    own, spent = getattr(module, function), 0.0

    def timed(*arguments: Any) -> Any:
        nonlocal spent
        began = perf_counter()
        result = own(*arguments)
        spent += perf_counter() - began
        return result

    setattr(module, function, timed)
    try:
        for _ in range(20):
            call()
            launches.clear()
    finally:
        setattr(module, function, own)
    return 1e6 * spent / 20


# --- Public functions

N, R, K = 1000, 32, 16
BATCH, LISTED = 4, 8
FORMS = ("single", "batched", "grouped")
# Arguments for n and a batch shape; numbers are the same for all.
Argument = Callable[[int, tuple[int, ...]], Any] | float


def orthonormal(n: int, batch: tuple[int, ...]) -> Tensor:
    return torch.linalg.qr(torch.randn(*batch, n, R)).Q


def values(batch: tuple[int, ...]) -> Tensor:
    return (1 / torch.arange(1, R + 1)).expand(*batch, R).contiguous()


def eigh(n: int, batch: tuple[int, ...]) -> LowRankEigh:
    return LowRankEigh(values(batch), orthonormal(n, batch))


def root(n: int, batch: tuple[int, ...]) -> LowRankRoot:
    """Return a factor in the square-root form, whose S is not diagonal."""
    matrix = torch.randn(*batch, n, R)
    return LowRankRoot(matrix, matrix.mT @ matrix)


def tracked(n: int, batch: tuple[int, ...]) -> Tracked[LowRankRoot]:
    return Tracked(root(n, batch), torch.zeros(batch), torch.ones(batch))


def svd(n: int, batch: tuple[int, ...]) -> LowRankSVD:
    """Return a decomposition of an n × n/2 matrix."""
    return LowRankSVD(orthonormal(n, batch), values(batch), orthonormal(n // 2, batch).mT)


def columns(n: int, batch: tuple[int, ...], k: int = K) -> Tensor:
    return torch.randn(*batch, n, k)


def half(make: Callable[..., Any]) -> Argument:
    """Return the same for n/2 rows: the other side of an n × n/2 matrix."""
    return lambda n, batch: make(n // 2, batch)


def wide(n: int, batch: tuple[int, ...]) -> Tensor:
    return columns(n, batch, n // 2)


def diagonal(n: int, batch: tuple[int, ...]) -> Tensor:
    return torch.ones(*batch, n)


def pair(n: int, batch: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return P and Q of an n × n/2 matrix P Qᵀ."""
    return columns(n, batch), columns(n // 2, batch)


AVERAGE = {"decay": 0.95, "weight": 0.05}
NO_EIGH = AVERAGE | {"compress": "cholesky"}
# Arguments and options by the call in words, which begin with the function's name.
FUNCTIONS: dict[str, tuple[tuple[Argument, ...], dict[str, Any]]] = {
    "root_update, cholesky": ((root, columns), NO_EIGH),
    "root_update, cholesky, tracked": ((tracked, columns), NO_EIGH),
    "root_update_, cholesky": ((root, columns), NO_EIGH),
    "root_update": ((root, columns), AVERAGE),
    "eigh_update": ((eigh, columns), AVERAGE),
    "eigh_update_": ((eigh, columns), AVERAGE),
    "eigh_downdate": ((eigh, columns), {}),
    "eigh_refresh": ((eigh, wide), AVERAGE),
    "damped_solve, root": ((root, columns, 0.1), {}),
    "damped_solve, eigh": ((eigh, columns, 0.1), {}),
    "damped_power, root": ((root, columns, 0.1, -0.5), {}),
    "damped_power, eigh": ((eigh, columns, 0.1, -0.5), {}),
    "kron_damped_solve, W": ((root, half(root), wide, 0.1, 0.2), {}),
    "kron_damped_solve, pair": ((root, half(root), pair, 0.1, 0.2), {}),
    "kron_damped_solve, W, eigh": ((eigh, half(eigh), wide, 0.1, 0.2), {}),
    "kron_damped_solve, W, root and eigh": ((root, half(eigh), wide, 0.1, 0.2), {}),
    "kron_damped_solve, pair, eigh": ((eigh, half(eigh), pair, 0.1, 0.2), {}),
    "damped_logdet, root": ((root, 0.1), {}),
    "damped_logdet, eigh": ((eigh, 0.1), {}),
    "damped_solve, root, diagonal": ((root, columns, 0.1), {"diagonal": diagonal}),
    "kron_damped_power, root": ((root, half(root), wide, 0.1, -0.5), {}),
    "kron_damped_power, eigh": ((eigh, half(eigh), wide, 0.1, -0.5), {}),
    "kron_damped_logdet, eigh": ((eigh, half(eigh), 0.1), {}),
    "project": ((orthonormal, columns), {}),
    "orthonormalize": ((columns,), {}),
    "svd_update": ((svd, columns, half(columns)), {}),
    "svd_append": ((svd, columns), {}),
    "randomized_eigh": ((lambda n, batch: root(n, batch).dense(), R), {}),
    "randomized_svd": ((wide, R), {}),
}


def call_of(name: str, form: str) -> Callable[[], Any] | None:
    makers, options = FUNCTIONS[name]
    function = name.partition(",")[0]
    made = lambda maker, n, batch: maker(n, batch) if callable(maker) else maker
    if form != "grouped":
        batch = (BATCH,) if form == "batched" else ()
        own = {option: made(maker, N, batch) for option, maker in options.items()}
        owner = brandla_kernels if function in OPS else brandla
        return partial(getattr(owner, function), *(made(maker, N, batch) for maker in makers), **own)
    if not hasattr(grouped, function):
        return None
    sizes = [N + 100 * index for index in range(LISTED)]
    listed = lambda maker: [maker(n, ()) for n in sizes] if callable(maker) else maker
    own = {option: listed(maker) for option, maker in options.items()}
    return partial(getattr(grouped, function), *map(listed, makers), **own)


# --- A step of K-FAC


class Block(nn.Module):
    """A transformer's block: one head, and two layers after it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.after = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        attention = (self.query(y) @ self.key(y).mT / y.shape[-1] ** 0.5).softmax(-1)
        x = x + self.out(attention @ self.value(y))
        return x + self.after(self.second(x))


def mlp(layers: int) -> nn.Module:
    """Return so many linear layers of different widths."""
    widths = [48, *(64 + 8 * (index % 3) for index in range(layers - 1)), 40]
    return nn.Sequential(*(part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.Tanh())))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MLP, 1 layer": lambda: mlp(1),
    "MLP, 3 layers": lambda: mlp(3),
    "MLP, 12 layers": lambda: mlp(12),
    "transformer": lambda: nn.Sequential(nn.Linear(48, 64), Block(64), Block(64), nn.Linear(64, 40)),
    "MLP, 48 layers": lambda: mlp(48),
}
# Periods are such that all of them renew at the step that is counted.
STRATEGIES = {
    "Brand": Brand(8),
    "Brand, cholesky": Brand(8, compress="cholesky"),
    "Brand, eigh": Brand(8, form="eigh"),
    "Exact": Exact(inverse_every=1),
    "Randomized": Randomized(8, inverse_every=1),
    "InverseFree": InverseFree(),
    "Woodbury": Woodbury(),
    "KBFGS": KBFGS(),
}


def steps(network: nn.Module, strategy: Any) -> Iterator[Callable[[], None]]:
    """Yield the steps of a training run, each after its backward pass, for the caller to take."""
    preconditioner = KFAC(network, inverse=strategy)
    data = torch.randn(16, 5, 48) if any(isinstance(part, Block) for part in network) else torch.randn(16, 48)
    while True:
        network.zero_grad()
        network(data).square().mean().backward()
        yield preconditioner.step


def step_counts(network: nn.Module, strategy: Any, target: str = "sm_90") -> Counts:
    """Count the third step of a training run, without its backward pass."""
    run = steps(network, strategy)
    for step in islice(run, 2):
        step()
    return counts_of(next(run), target)


def step_times(network: nn.Module, strategy: Any, target: str = "sm_90", *, rounds: int = 10) -> dict[str, float]:
    """Return microseconds of a step whose launches are recorded, at the best of some, and Python's calls in it."""
    run = steps(network, strategy)
    with recording(target_named(target)) as launches, brandla.backend("triton"):
        for step in islice(run, 3):
            step()
        times = []
        for step in islice(run, rounds):
            launches.clear()
            times.append(timeit(step, number=1))
        best = min(times, default=0.0)
        return {"host µs": 1e6 * best, "Python calls": _python_calls(next(run))}


def linear_layers(network: nn.Module) -> int:
    return sum(isinstance(part, nn.Linear) for part in network.modules())


# --- The table

# The most launches of this library's kernels and of other ones, for one factor, for a batch and for a list.
BUDGETS: dict[str, tuple[int, int]] = {
    "root_update, cholesky": (4, 2),
    "root_update_, cholesky": (4, 2),
    "root_update, cholesky, tracked": (4, 2),
    # One of torch's is the eigendecomposition.
    "eigh_update": (8, 7),
    "damped_solve, root": (3, 1),
    "damped_solve, eigh": (3, 1),
    **dict.fromkeys((name for name in FUNCTIONS if name.startswith("kron_damped_solve")), (4, 2)),
}


def kfac_budget(layers: int) -> int:
    """Return the most kernels of all kinds that a step of `Brand` may take on so many linear layers."""
    return 30 + 8 * layers


def rows(target: str, *, quick: bool) -> Iterator[dict[str, Any]]:
    """Count every public function in every form, and a step of each system on each network."""
    for name in FUNCTIONS:
        limit = BUDGETS.get(name)
        for form in FORMS:
            if (call := call_of(name, form)) is not None:
                counts = counts_of(call, target)
                within = limit is None or (counts.triton <= limit[0] and counts.torch <= limit[1])
                budget = "" if limit is None else "{} + {}".format(*limit)
                host = host_times(call, target) if name in HOST_BUDGETS else {}
                own = {"call": name, "form": form, **asdict(counts), "budget": budget, "within": within}
                yield own | {part: round(time, 1) for part, time in host.items()}
    for strategy_name, strategy in {} if quick else STRATEGIES.items():
        for form, make in NETWORKS.items():
            network = make()
            layers, counts = linear_layers(network), step_counts(network, strategy, target)
            most = kfac_budget(layers) if strategy_name.startswith("Brand") else None
            call = f"KFAC.step, {strategy_name}"
            host = step_times(network, strategy, target) if (call, form) in STEP_BUDGETS else {}
            own = {"call": call, "form": form, "layers": layers, **asdict(counts)}
            budget = "" if most is None else f"{most} in all"
            own |= {"budget": budget, "within": most is None or counts.kernels <= most}
            yield own | {part: round(time, 1) for part, time in host.items()}


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    target: Annotated[str, typer.Option(help=f"one of {', '.join(TARGETS)}")] = "sm_90",
    quick: Annotated[bool, typer.Option("--quick", help="leaves K-FAC out, and the result out of git")] = False,
    out: Annotated[Path | None, typer.Option(help="folder of the result file, in place of the machine's own")] = None,
) -> None:
    """Count, print the table beside the budgets, and write the result file."""
    if target not in TARGETS:
        message = f"unknown target {target}; choose from {', '.join(TARGETS)}"
        raise typer.BadParameter(message)
    torch.manual_seed(0)
    found = list(rows(target, quick=quick))
    cells = pd.DataFrame(found)[["call", "form", "triton", "torch", "budget", "uploads", "waits"]]
    cells, console = cells.rename(columns={"triton": "Triton"}), Console(width=None if sys.stdout.isatty() else 120)
    console.print(on_terminal(cells, f"Kernels of a call on {target}", [not row["within"] for row in found]))
    timed = [row for row in found if "host µs" in row]
    parts = ["call", "form", "host µs", "checks", "dispatch", "tables", "launching", "Python calls"]
    # Of public functions the budget is for one factor.
    limits = {(call, "single"): most for call, most in HOST_BUDGETS.items()} | STEP_BUDGETS
    budgets = [limits.get((row["call"], row["form"])) for row in timed]
    over = [most is not None and row["host µs"] > most for row, most in zip(timed, budgets, strict=True)]
    hosts = pd.DataFrame(timed)[parts].assign(budget=["" if most is None else f"{most} µs" for most in budgets])
    console.print(on_terminal(hosts, "Time of the host, launches recorded", over))
    content = {"target": target, "rows": [{key: row[key] for key in row if key != "within"} for row in found]}
    path = results.write("launches", facts(quick), content, out)
    console.print(f"Written: {path}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    app()
