"""Public functions, of one factor and of a network's worth: as CUDA graphs beside torch's ways, and kernel by kernel.

A replay equals the call to the bit, and nothing waits for the device. Each is checked against float64 first.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from statistics import median
from timeit import timeit
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import brandla
from bench.benches import written_out
from bench.benches.problems import DECAY, UPDATES, WEIGHT, Judgement, WrongResultError
from bench.benches.tasks import BRANDLA, DAMPING, ONE_BY_ONE, TASKS, TORCH_FORM, Shape, Task, check, kron, together
from bench.benches.timing import of_median, ratio
from bench.gpu import cases
from bench.gpu.cases import Case, forced, fresh
from bench.gpu.device import Device, tensors_in
from bench.gpu.frame import Findings
from bench.profiling import table_of
from brandla import LowRankEigh, LowRankRoot
from brandla_kernels import gram_ema_

CHOLESKY = "root_update, cholesky"
CASE = 8.0
# Rows of kernels, and calls that the host is timed with.
KERNELS, CALLS = 15, 100
# Of one factor n, r, k; of a list r, k, the number, and n in turn; of a dense moment n, k.
FULL = (Shape(4096, 256, 256), (128, 64), 64, (512, 1024, 2048, 4096, 8191), (8192, 8192))
TOY = (Shape(64, 8, 8), (6, 4), 4, (24, 48), (48, 16))


class Call(NamedTuple):
    """A task, others' ways to the same, and targets: microseconds of a replay, and how often it fits into others' time.

    These are the best of the other ways, or one call each where there is a list.
    """

    task: Callable[[], Task]
    others: Mapping[str, Callable[..., Any]] = {}
    at_least: float | None = None
    at_most: float | None = None
    has_ceiling: bool = False


def graphs(found: Findings) -> None:
    for name, call in calls(found.device).items():
        found.attempt(name, CASE, _captured, found, name, call)


def calls(device: Device) -> dict[str, Call]:
    """Return the calls that promise to be capturable, with numbers and with tensors on the device as options."""
    one, (rank, columns), count, several, (side, wide) = TOY if device.dry else FULL
    # Every third is one larger, as a layer with a bias has it.
    rows = [size + (place % 3 == 0) for place, size in enumerate(islice(cycle(several), count))]
    moment = Case("gram_ema_", side, 1, wide, data=torch.bfloat16)
    single = lambda name: TASKS[name].make(one, device)
    grouped = lambda name: together(name, [Shape(n, rank, columns) for n in rows], device)

    def with_option(task: Task, option: str, value: float | Tensor) -> Task:
        """Return a task that is given a number, or a tensor that may be another one at each replay."""
        call = lambda factor, data, value: task.function(factor, data, **{option: value})
        return replace(task, function=call, arguments=(*task.arguments[:2], value))

    def average() -> Task:
        judge = lambda _: Judgement(cases.check(moment, device)[0], cases.allowed(moment))
        return Task(_gram_ema, cases.operands(moment, device), judge, cases.work(moment))

    tensor = partial(torch.tensor, device=device.tensors)
    # The update of an orthonormal basis in eager torch; a basis of this size takes the same time.
    brand = lambda root, columns: written_out.brand_update(root.gram.diagonal(), root.root, columns, DECAY, WEIGHT)
    loop = lambda *lists: [brand(*parts) for parts in zip(*lists, strict=True)]
    ways = {TORCH_FORM: forced(brandla.kron_damped_solve), "one side, then the other": _one_by_one}
    two_sided = partial(kron, one, device, pair=False, square=True)
    return {
        CHOLESKY: Call(lambda: single(CHOLESKY), {"torch Brand update": brand}, at_least=10, at_most=300),
        f"grouped.{CHOLESKY}": Call(lambda: grouped(CHOLESKY), {"loop of torch Brand updates": loop}, at_least=8),
        "kron_damped_solve": Call(two_sided, ways, at_least=2, has_ceiling=True),
        "damped_solve": Call(lambda: single("damped_solve"), {TORCH_FORM: forced(brandla.damped_solve)}),
        "grouped.damped_solve": Call(lambda: with_option(grouped("damped_solve"), "damping", DAMPING)),
        "gram_ema_": Call(average, {"torch.addmm": _addmm}, at_least=1.5),
        f"{CHOLESKY}, decay as a tensor": Call(lambda: with_option(single(CHOLESKY), "decay", tensor(DECAY))),
        "damped_solve, damping as a tensor": Call(
            lambda: with_option(single("damped_solve"), "damping", tensor(DAMPING))
        ),
    }


def _captured(found: Findings, name: str, call: Call) -> None:
    """Hold a call to float64, its replay to the call, and its time to others'; then call it without a wait."""
    device, task = found.device, call.task()
    check(name, task.call(BRANDLA))
    static = fresh(task.arguments)
    later = tree_map_only(Tensor, lambda part: part / 2, static)
    results = [[part.clone() for part in tensors_in(task.function(*given))] for given in (static, later, static)]
    _same(f"{name}: two calls", results[2], results[0])
    captured, replay = device.capture(lambda: task.function(*static))
    for what, given, expected in (("", static, results[0]), (" with new data", later, results[1])):
        for old, new in zip(tensors_in(static), tensors_in(given), strict=True):
            old.copy_(new)
        replay()
        device.synchronize()
        _same(f"{name}: replay{what} and call", captured, expected)
    others = {way: partial(other, *static) for way, other in call.others.items()}
    others |= {way: task.call(way).again for way in task.others}
    ways = {"replay": replay, "eager": partial(task.function, *static)} | others
    times = device.alternating(ways, 2 * found.sizes.seconds)
    taken = {way: median(samples) for way, samples in times.items()}
    for way, seconds in taken.items():
        found.row("graphs", call=name, way=way, **{"µs": 1e6 * seconds})
    microseconds = of_median([1e6 * seconds for seconds in times["replay"]])
    found.figure(name, "in a graph", microseconds, unit="µs", at_most=call.at_most)
    if others:
        best = ONE_BY_ONE if ONE_BY_ONE in others else min(others, key=taken.__getitem__)
        found.figure(name, f"in a graph: {best} / it", ratio(times[best], times["replay"]), at_least=call.at_least)
    if call.has_ceiling:
        floor = found.ceilings.floor(task.work)
        part, note = floor.seconds / taken["replay"], f"bound by {floor.bound_by}"
        found.figure(name, "in a graph: part of its ceiling", part, at_least=0.5, unit="", note=note)
    with device.never_waiting():
        task.function(*static)
    found.row("captured", call=name, **{"equal to the bit": "yes", "waits for the device": "no"})


def _same(what: str, one: Any, other: Any) -> None:
    said = lambda differences: f"{what} differ: {differences}"
    torch.testing.assert_close(tensors_in(one), tensors_in(other), rtol=0, atol=0, msg=said)


# --- Updates, kernel by kernel


def profile(found: Findings) -> None:
    for name in UPDATES:
        found.attempt(name, 25, _profile, found, name)


def _profile(found: Findings, name: str) -> None:
    device, shape = found.device, (TOY if found.device.dry else FULL)[0]
    call = TASKS[name].make(shape, device).call(BRANDLA)
    check(name, call)
    factor, columns = call.arguments
    eigh = factor.to_eigh() if isinstance(factor, LowRankRoot) else factor
    brand = lambda: written_out.brand_update(*eigh, columns, DECAY, WEIGHT)
    times = device.alternating({"eager": call.again, "torch": brand}, 3 * found.sizes.seconds)
    words, calls = "n {}, r {}, k {}".format(*shape), 3 if device.dry else CALLS
    # How long the host takes for a call, with the device left to catch up.
    device.synchronize()
    host = 1e6 * timeit(call.again, number=calls) / calls
    device.synchronize()
    found.row("updates", update=name, **{f"{way} µs": 1e6 * median(times[way]) for way in times}, host=host)
    found.figure(name, f"{words}: eager torch Brand update / it", ratio(times["torch"], times["eager"]))
    try:
        call.judge(LowRankEigh(*cases.on_cpu(brand()))).accept("eager torch")
    except WrongResultError as error:
        found.add("notes", f"the eager torch update would not pass the same check: {error}")
    for row in table_of(Case(name, *shape[:3]), device, found.ceilings)[: KERNELS + 1]:
        found.row(f"kernels of {name}, {words}", **row)


# --- Others' ways


def _one_by_one(left: LowRankEigh, right: LowRankEigh, matrix: Tensor, *dampings: float) -> Tensor:
    """Return the two-sided solve as two one-sided ones, each of two products."""
    for (values, vectors), damping in zip((left, right), dampings, strict=True):
        inner = (-values / (values + damping) / damping)[:, None] * (vectors.mT @ matrix)
        matrix = torch.addmm(matrix, vectors, inner, beta=1 / damping).mT
    return matrix


def _gram_ema(matrix: Tensor, columns: Tensor, decay: float, weight: float) -> Tensor:
    """Update a copy, for a graph's inputs must stay: the copy counts as the op's."""
    updated = matrix.clone()
    gram_ema_(updated, columns, decay, weight)
    return updated


def _addmm(matrix: Tensor, columns: Tensor, decay: float, weight: float) -> Tensor:
    """Return torch's fastest addmm that keeps the moment in float32: from half data where torch has that."""
    try:
        return torch.addmm(matrix, columns, columns.mT, torch.float32, beta=decay, alpha=weight)
    except RuntimeError:
        data = columns.float()
        return torch.addmm(matrix, data, data.mT, beta=decay, alpha=weight)
