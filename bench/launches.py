"""Kernels of every public function and of a K-FAC step, beside their budgets: ``python -m bench.launches``.

The kernels are counted on a CPU. A launch takes some microseconds of the host, and its kernel as much of the device
however small it is, so for small matrices the count is the time. Every op of the library records the launches that it
would start on a target, and takes its values from its torch form. No branch looks at a value unless a GPU's branch
would too. A dispatch mode counts the calls of torch. Views, allocations and results without entries are free. One
function of ``torch.linalg``, or one ``torch._foreach_`` over a list, counts as one kernel; cuSOLVER, or a long list,
takes several.

For some calls and for a step of K-FAC, the host's own time is shown, with launches recorded and one thread. On a GPU,
Triton's own part of a launch is added. The time depends on the machine's other work; the number of Python calls does
not.
"""

import cProfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice, product
from time import perf_counter
from timeit import repeat, timeit
from typing import Annotated, Any, NamedTuple
from unittest import mock

import pandas as pd
import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import brandla
import brandla_kernels
from bench.frame import results
from bench.frame.facts import facts
from bench.frame.pages import show
from bench.gpu.device import tensors_in
from brandla import LowRankEigh, LowRankRoot, LowRankSVD, Tracked, grouped
from brandla.demo import data
from brandla.kfac import (
    EKFAC,
    KBFGS,
    KFAC,
    Brand,
    BrandCorrected,
    BrandRandomized,
    ConjugateGradient,
    Exact,
    Foof,
    InverseFree,
    Randomized,
    TwoLevel,
    Woodbury,
)
from brandla_kernels import OPS
from brandla_kernels._kernels import plan
from brandla_kernels._kernels.ahead import target_named
from brandla_kernels._kernels.launch import Launch, recording

TARGET = "sm_90"
aten = torch.ops.aten
ALLOCATIONS = {
    *(aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.resize_),
    *(aten.detach, aten.detach_, aten._unsafe_view, aten.set_),
}
READS_ALONE = {aten._local_scalar_dense, aten.is_nonzero, aten._linalg_check_errors}
FREE = ALLOCATIONS | READS_ALONE | {aten.promote_types}
# Calls that make the host wait for the device, for a result that it reads or whose size it needs.
WAITS = READS_ALONE | {
    *(aten.equal, aten.nonzero, aten._linalg_eigh, aten._linalg_svd, aten.linalg_qr),
    *(aten.geqrf, aten.linalg_eig),
}


class Counts(NamedTuple):
    triton: int = 0  # launches of this library's kernels
    torch: int = 0  # other kernels
    uploads: int = 0  # tensors written on the host: numbers, and the tables of lists
    waits: int = 0  # times that the host waits for the device

    @property
    def kernels(self) -> int:
        return self.triton + self.torch


class Counter(TorchDispatchMode):
    """Counts the kernels that are asked for inside the ``with`` block."""

    def __init__(self, target: str = TARGET) -> None:
        super().__init__()
        self.target = target_named(target)
        self.counts = Counts()
        self.ops: list[tuple[Any, tuple[Any, ...]]] = []  # each with its arguments

    def _add(self, **numbers: int) -> None:
        self.counts = Counts(*map(sum, zip(self.counts, Counts(**numbers), strict=True)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "brandla":
            return self._op(func, args)
        packet = func.overloadpacket
        result = func(*args, **(kwargs or {}))
        upload = packet is aten.lift_fresh
        free = upload or func.is_view or packet in FREE or _is_empty(func, args, result)
        self._add(waits=int(packet in WAITS), uploads=int(upload), torch=int(not free))
        return result

    def _op(self, func: Any, args: tuple[Any, ...]) -> Any:
        name = func.__name__.partition(".")[0]
        op = OPS[name.replace("_grouped", "")]
        form = op.torch_form if name in OPS else op.grouped_form
        if op.launch is None:
            with self:
                return form(*args)
        self.ops.append((op, args))
        # A recorded launch leaves its results unwritten. They must not reach the tensors that the op overwrites.
        copies = tree_map_only(Tensor, Tensor.clone, args)
        with self, recording(self.target) as launches:
            op.launch(*(copies if op.signature.writes else args))
        self._add(triton=len(launches))
        with brandla.backend("torch"):
            return form(*args)


def _is_empty(func: Any, args: Any, result: Any) -> bool:
    """Return whether a call writes nothing, as its results have no entries."""
    written = tensors_in(result) or (tensors_in(args[0]) if func._schema.is_mutable else [])
    return bool(written) and all(part.numel() == 0 for part in written)


@contextmanager
def on_gpu() -> Iterator[list[Launch]]:
    """Let functions take the path of a GPU, and yield the record of their launches."""
    with recording(target_named(TARGET)) as launches, brandla.backend("triton"), torch.no_grad():
        yield launches


def counted(call: Callable[[], Any]) -> Counter:
    with on_gpu(), Counter() as counter:
        call()
    return counter


def counts_of(call: Callable[[], Any]) -> Counts:
    return counted(call).counts


# --- The host

# The most microseconds of the host for a call with one factor, and for a step of K-FAC, on one core.
HOST_BUDGETS = {
    ("project", "single"): 40,
    ("damped_solve, root", "single"): 120,
    ("damped_solve, eigh", "single"): 120,
    ("root_update, cholesky", "single"): 250,
    ("KFAC.step, Brand", "MLP, 48 layers"): 15_000,
}
HOST_PARTS = ["host µs", "checks", "dispatch", "tables", "launching", "Python calls"]


def host_times(call: Callable[[], Any]) -> dict[str, float]:
    """Return the microseconds of a call with recorded launches, in all and by part, and its number of Python calls.

    The parts are the function's own code before and between its ops, mostly checks; the dispatcher and the checks of
    the ops; the tables of lists; and the rest of the launches.
    """
    calls_of_ops = counted(call).ops
    with on_gpu() as launches:
        whole = _microseconds(call, launches)
        ops = sum(_microseconds(partial(op, *args), launches) for op, args in calls_of_ops)
        launching, tables = (_microseconds_in(function, call, launches) for function in ("call", "filled_table"))
    parts = (whole, whole - ops, ops - launching, tables, launching - tables, python_calls(call))
    return {name: round(part, 1) for name, part in zip(HOST_PARTS, parts, strict=True)}


def python_calls(call: Callable[[], Any]) -> int:
    """Count the calls of Python functions in a second call with recorded launches."""
    with on_gpu():
        call()
        return _python_calls(call)


def _python_calls(call: Callable[[], Any]) -> int:
    profile = cProfile.Profile(builtins=False)
    profile.runcall(call)
    return sum(function.callcount for function in profile.getstats())


def _microseconds(call: Callable[[], Any], launches: list[Launch]) -> float:
    """Return the time of a call in the best of some rounds."""

    def once() -> None:
        call()
        # Kept launches would hold the memory of each call: new pages for the next call double its time.
        launches.clear()

    return 1e6 * min(repeat(once, number=20, repeat=100)) / 20


def _microseconds_in(function: str, call: Callable[[], Any], launches: list[Launch]) -> float:
    """Return the mean time that a call spends in a function of `plan`."""
    original, spent = getattr(plan, function), []

    def timed(*arguments: Any) -> Any:
        start = perf_counter()
        result = original(*arguments)
        spent.append(perf_counter() - start)
        return result

    with mock.patch.object(plan, function, timed):
        for _ in range(20):
            call()
            launches.clear()
    return 1e6 * sum(spent) / 20


# --- Public functions

N, R, K = 1000, 32, 16
BATCH, LISTED = 4, 8
FORMS = ("single", "batched", "grouped")
# An argument is a number, or a function of n and a batch shape that makes it.
Argument = Callable[[int, tuple[int, ...]], Any] | float
columns = lambda n, batch, k=K: torch.randn(*batch, n, k)
orthonormal = lambda n, batch: torch.linalg.qr(columns(n, batch, R)).Q
values = lambda batch: (1 / torch.arange(1, R + 1)).expand(*batch, R).contiguous()
eigh = lambda n, batch: LowRankEigh(values(batch), orthonormal(n, batch))
tracked = lambda n, batch: Tracked(root(n, batch), torch.zeros(batch), torch.ones(batch))
# Of an n × n/2 matrix: an argument of the other side, a decomposition, the matrix itself, and P and Q of P Qᵀ.
half = lambda make: lambda n, batch: make(n // 2, batch)
svd = lambda n, batch: LowRankSVD(orthonormal(n, batch), values(batch), orthonormal(n // 2, batch).mT)
wide = lambda n, batch: columns(n, batch, n // 2)
pair = lambda n, batch: (columns(n, batch), columns(n // 2, batch))


def root(n: int, batch: tuple[int, ...]) -> LowRankRoot:
    """Return a factor in the square-root form, whose S is not diagonal."""
    matrix = columns(n, batch, R)
    return LowRankRoot(matrix, matrix.mT @ matrix)


AVERAGE = {"decay": 0.95, "weight": 0.05}
NO_EIGH = AVERAGE | {"compress": "cholesky"}
# Arguments and options by the words for the call, which begin with the function's name.
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
    "damped_solve, root, diagonal": ((root, columns, 0.1), {"diagonal": lambda n, batch: torch.ones(*batch, n)}),
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
    """Return a call of a function in one of the `FORMS`; None if it has no such form."""
    arguments, options = FUNCTIONS[name]
    function = name.partition(",")[0]
    if form == "grouped":
        owner, sizes = grouped, [N + 100 * index for index in range(LISTED)]
        make = lambda maker: [maker(n, ()) for n in sizes]
    else:
        owner = brandla_kernels if function in OPS else brandla
        make = lambda maker: maker(N, (BATCH,) if form == "batched" else ())
    if not hasattr(owner, function):
        return None
    value_of = lambda argument: make(argument) if callable(argument) else argument
    options = {option: value_of(argument) for option, argument in options.items()}
    return partial(getattr(owner, function), *map(value_of, arguments), **options)


# --- A step of K-FAC


class Block(nn.Module):
    """A transformer's block: attention with one head, then two layers."""

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
    """Return an MLP of so many linear layers of different widths."""
    return data.mlp(48, *(64 + 8 * (index % 3) for index in range(layers - 1)), 40)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MLP, 1 layer": lambda: mlp(1),
    "MLP, 3 layers": lambda: mlp(3),
    "MLP, 12 layers": lambda: mlp(12),
    "transformer": lambda: nn.Sequential(nn.Linear(48, 64), Block(64), Block(64), nn.Linear(64, 40)),
    "MLP, 48 layers": lambda: mlp(48),
}
# With these periods, all strategies renew at the step that is counted.
STRATEGIES = {
    "Brand": Brand(8),
    "Brand, by eigh": Brand(8, compress="eigh"),
    "Brand, orthonormal": Brand(8, form="eigh"),
    "BrandRandomized": BrandRandomized(8, overwrite_every=1),
    "BrandCorrected": BrandCorrected(8, correct_every=1),
    "Exact": Exact(inverse_every=1),
    "EKFAC": EKFAC(inverse_every=1),
    "Randomized": Randomized(8, inverse_every=1),
    "InverseFree": InverseFree(),
    "Foof": Foof(Brand(8)),
    "ConjugateGradient": ConjugateGradient(),
    "TwoLevel": TwoLevel(Brand(8)),
    "Woodbury": Woodbury(),
    "KBFGS": KBFGS(),
}


def steps(network: nn.Module, strategy: Any) -> Iterator[Callable[[], None]]:
    """Yield the step function of a training run after each backward pass, for the caller to call."""
    preconditioner = KFAC(network, inverse=strategy)
    inputs = torch.randn(16, 5, 48) if any(isinstance(part, Block) for part in network) else torch.randn(16, 48)
    while True:
        network.zero_grad()
        network(inputs).square().mean().backward()
        yield preconditioner.step


def step_counts(network: nn.Module, strategy: Any) -> Counts:
    """Count the third step of a training run, without its backward pass."""
    run = steps(network, strategy)
    for step in islice(run, 2):
        step()
    return counts_of(next(run))


def step_times(network: nn.Module, strategy: Any, *, rounds: int = 200) -> dict[str, float]:
    """Return the microseconds of the fastest step with recorded launches, and its number of Python calls."""
    run, times = steps(network, strategy), []
    with recording(target_named(TARGET)) as launches, brandla.backend("triton"):
        for step in islice(run, 3):
            step()
        for step in islice(run, rounds):
            launches.clear()
            times.append(timeit(step, number=1))
        return {"host µs": round(1e6 * min(times, default=0.0), 1), "Python calls": _python_calls(next(run))}


# --- The table

# The most launches of this library's kernels and of others, whether for one factor, a batch or a list.
BUDGETS: dict[str, tuple[int, int]] = {
    "root_update, cholesky": (4, 2),
    "root_update_, cholesky": (4, 2),
    "root_update, cholesky, tracked": (4, 2),
    # One of torch's kernels is the eigendecomposition.
    "eigh_update": (8, 7),
    "damped_solve, root": (3, 1),
    "damped_solve, eigh": (3, 1),
    **dict.fromkeys((name for name in FUNCTIONS if name.startswith("kron_damped_solve")), (4, 2)),
}


def rows(*, quick: bool) -> Iterator[dict[str, Any]]:
    """Count every public function in every form, and a step of each system on each network."""
    for name, form in product(FUNCTIONS, FORMS):
        if (call := call_of(name, form)) is not None:
            counts, limit = counts_of(call), BUDGETS.get(name)
            within = limit is None or (counts.triton <= limit[0] and counts.torch <= limit[1])
            row = {"call": name, "form": form, **counts._asdict(), "within": within}
            row |= {"budget": "" if limit is None else "{} + {}".format(*limit)}
            yield row | (host_times(call) if (name, "single") in HOST_BUDGETS else {})
    for (strategy_name, strategy), (form, make) in product({} if quick else STRATEGIES.items(), NETWORKS.items()):
        name, network = f"KFAC.step, {strategy_name}", make()
        layers, counts = sum(isinstance(part, nn.Linear) for part in network.modules()), step_counts(network, strategy)
        # Only a step of `Brand` has a budget, for kernels of all kinds.
        most = 30 + 8 * layers if strategy_name == "Brand" else None
        row = {"call": name, "form": form, "layers": layers, **counts._asdict()}
        row |= {"within": most is None or counts.kernels <= most, "budget": "" if most is None else f"{most} in all"}
        yield row | (step_times(network, strategy) if (name, form) in HOST_BUDGETS else {})


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    quick: Annotated[bool, typer.Option("--quick", help="leaves K-FAC out, and the result out of git")] = False,
) -> None:
    """Count, print the table beside the budgets, and write the result file."""
    torch.manual_seed(0)
    found = list(rows(quick=quick))
    every, console = pd.DataFrame(found), Console(highlight=False)
    cells = every.rename(columns={"triton": "Triton"})
    cells = cells[["call", "form", "Triton", "torch", "budget", "uploads", "waits"]]
    show(console, cells, f"Kernels of a call on {TARGET}", list(~every["within"]))
    timed = every[every["host µs"].notna()]
    limits = [HOST_BUDGETS.get(case) for case in zip(timed["call"], timed["form"], strict=True)]
    over = [most is not None and time > most for time, most in zip(timed["host µs"], limits, strict=True)]
    budgets = ["" if most is None else f"{most} µs" for most in limits]
    hosts = timed[["call", "form", *HOST_PARTS]].assign(budget=budgets)
    show(console, hosts, "Time of the host, launches recorded", over)
    measured = [{key: row[key] for key in row if key != "within"} for row in found]
    path = results.write("launches", facts(quick), {"target": TARGET, "rows": measured})
    console.print(f"Written: {path}", soft_wrap=True)


if __name__ == "__main__":
    app()
