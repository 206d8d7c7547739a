"""Public functions of one factor and of a network's factors: as CUDA graphs beside torch, and kernel by kernel.

Each call is checked against float64 first. A replay must equal it to the bit, and nothing may wait for the device.
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
from bench.benches import tasks, written_out
from bench.benches.problems import DECAY, UPDATES, WEIGHT, WrongResultError
from bench.benches.tasks import BRANDLA, DAMPING, ONE_BY_ONE, TASKS, TORCH_FORM, Shape, Task, check, group_of, kron
from bench.benches.timing import median_interval, ratio
from bench.gpu import cases
from bench.gpu.cases import Case, cloned, torch_form_of
from bench.gpu.device import Device, tensors_in
from bench.gpu.frame import Findings
from bench.profiling import table_of
from brandla import LowRankEigh, LowRankRoot
from brandla_kernels import gram_ema_

CHOLESKY = "root_update, cholesky"
CASE = 8.0
KERNELS, CALLS = 15, 100  # rows of kernels that are kept, and calls that time the host
# Sizes: n, r, k of one factor; r and k, the number and the n in turn of a list; n, k of a dense moment.
FULL = (Shape(4096, 256, 256), (128, 64), 64, (512, 1024, 2048, 4096, 8191), (8192, 8192))
TOY = (Shape(64, 8, 8), (6, 4), 4, (24, 48), (48, 16))


class Call(NamedTuple):
    """A task, other ways to the same result, and targets for its replay.

    ``at_most`` is in microseconds. ``at_least`` is for the time of the best other way, or of one call for each factor
    of a list, over that of the replay.
    """

    task: Callable[[], Task]
    others: Mapping[str, Callable[..., Any]] = {}
    at_least: float | None = None
    at_most: float | None = None
    has_ceiling: bool = False


def graphs(findings: Findings) -> None:
    for name, call in calls(findings.device).items():
        findings.attempt(name, CASE, _captured, findings, name, call)


def calls(device: Device) -> dict[str, Call]:
    """Return the calls that promise to be capturable, with numbers or tensors on the device as options."""
    shape, (rank, columns), count, several, (side, wide) = TOY if device.dry else FULL
    # Every third factor has one more row, like that of a layer with a bias.
    rows = [size + (index % 3 == 0) for index, size in enumerate(islice(cycle(several), count))]
    moment = Case("gram_ema_", side, 1, wide, data=torch.bfloat16)
    single = lambda name: TASKS[name].make(shape, device)
    grouped = lambda name: group_of(name, [Shape(n, rank, columns) for n in rows], device)

    def with_option(task: Task, option: str, value: float | Tensor) -> Task:
        """Return a task with an option as an argument: a number, or a tensor that may change between replays."""
        call = lambda factor, data, value: task.function(factor, data, **{option: value})
        return replace(task, function=call, arguments=(*task.arguments[:2], value))

    tensor = partial(torch.tensor, device=device.tensors)
    # Brand's update in eager torch. Its time depends on the sizes alone, so the root may stand for a basis.
    brand = lambda root, columns: written_out.brand_update(root.gram.diagonal(), root.root, columns, DECAY, WEIGHT)
    loop = lambda *lists: [brand(*parts) for parts in zip(*lists, strict=True)]
    ways = {TORCH_FORM: torch_form_of(brandla.kron_damped_solve), "one side, then the other": _one_sided_solves}
    two_sided = partial(kron, shape, device, pair=False, square=True)
    return {
        CHOLESKY: Call(lambda: single(CHOLESKY), {"torch Brand update": brand}, at_least=10, at_most=300),
        f"grouped.{CHOLESKY}": Call(lambda: grouped(CHOLESKY), {"loop of torch Brand updates": loop}, at_least=8),
        "kron_damped_solve": Call(two_sided, ways, at_least=2, has_ceiling=True),
        "damped_solve": Call(lambda: single("damped_solve"), {TORCH_FORM: torch_form_of(brandla.damped_solve)}),
        "grouped.damped_solve": Call(lambda: with_option(grouped("damped_solve"), "damping", DAMPING)),
        "gram_ema_": Call(lambda: tasks.op_task(moment, device, _gram_ema), {"torch.addmm": _addmm}, at_least=1.5),
        f"{CHOLESKY}, decay as a tensor": Call(lambda: with_option(single(CHOLESKY), "decay", tensor(DECAY))),
        "damped_solve, damping as a tensor": Call(
            lambda: with_option(single("damped_solve"), "damping", tensor(DAMPING))
        ),
    }


def _captured(findings: Findings, name: str, call: Call) -> None:
    """Check a call against float64, its replay against the call, and that nothing waits; time both beside others."""
    device, task = findings.device, call.task()
    check(name, task.call(BRANDLA))
    static = cloned(task.arguments)
    later = tree_map_only(Tensor, lambda part: part / 2, static)
    results = [[part.clone() for part in tensors_in(task.function(*given))] for given in (static, later, static)]
    _assert_equal(f"{name}: two calls", results[2], results[0])
    captured, replay = device.capture(lambda: task.function(*static))
    for what, given, expected in (("", static, results[0]), (" with new data", later, results[1])):
        for old, new in zip(tensors_in(static), tensors_in(given), strict=True):
            old.copy_(new)
        replay()
        device.synchronize()
        _assert_equal(f"{name}: replay{what} and call", captured, expected)
    others = {way: partial(other, *static) for way, other in call.others.items()}
    others |= {way: task.call(way).again for way in task.others}
    ways = {"replay": replay, "eager": partial(task.function, *static)} | others
    times = device.alternating(ways, 2 * findings.sizes.seconds)
    taken = {way: median(samples) for way, samples in times.items()}
    for way, seconds in taken.items():
        findings.row("graphs", call=name, way=way, **{"µs": 1e6 * seconds})
    microseconds = median_interval([1e6 * seconds for seconds in times["replay"]])
    findings.figure(name, "in a graph", microseconds, unit="µs", at_most=call.at_most)
    if others:
        best = ONE_BY_ONE if ONE_BY_ONE in others else min(others, key=taken.__getitem__)
        findings.figure(name, f"in a graph: {best} / it", ratio(times[best], times["replay"]), at_least=call.at_least)
    if call.has_ceiling:
        floor = findings.ceilings.floor(task.work)
        part, note = floor.seconds / taken["replay"], f"bound by {floor.bound_by}"
        findings.figure(name, "in a graph: part of its ceiling", part, at_least=0.5, unit="", note=note)
    with device.never_waiting():
        task.function(*static)
    findings.row("captured", call=name, **{"equal to the bit": "yes", "waits for the device": "no"})


def _assert_equal(what: str, result: Any, expected: Any) -> None:
    message = lambda differences: f"{what} differ: {differences}"
    torch.testing.assert_close(tensors_in(result), tensors_in(expected), rtol=0, atol=0, msg=message)


# --- Updates, kernel by kernel


def profile(findings: Findings) -> None:
    for name in UPDATES:
        findings.attempt(name, 25, _profile, findings, name)


def _profile(findings: Findings, name: str) -> None:
    device, shape = findings.device, (TOY if findings.device.dry else FULL)[0]
    call = TASKS[name].make(shape, device).call(BRANDLA)
    check(name, call)
    factor, columns = call.arguments
    eigh = factor.to_eigh() if isinstance(factor, LowRankRoot) else factor
    brand = lambda: written_out.brand_update(*eigh, columns, DECAY, WEIGHT)
    times = device.alternating({"eager": call.again, "torch": brand}, 3 * findings.sizes.seconds)
    words, calls = "n {}, r {}, k {}".format(*shape), 3 if device.dry else CALLS
    # The time of the host alone: the device catches up afterwards.
    device.synchronize()
    host = 1e6 * timeit(call.again, number=calls) / calls
    device.synchronize()
    findings.row("updates", update=name, **{f"{way} µs": 1e6 * median(times[way]) for way in times}, host=host)
    findings.figure(name, f"{words}: eager torch Brand update / it", ratio(times["torch"], times["eager"]))
    try:
        call.judge(LowRankEigh(*cases.on_cpu(brand()))).accept("eager torch")
    except WrongResultError as error:
        findings.add("notes", f"the eager torch update would not pass the same check: {error}")
    for row in table_of(Case(name, *shape[:3]), device, findings.ceilings)[: KERNELS + 1]:
        findings.row(f"kernels of {name}, {words}", **row)


# --- Other ways in torch


def _one_sided_solves(left: LowRankEigh, right: LowRankEigh, matrix: Tensor, *dampings: float) -> Tensor:
    """Return the two-sided solve by two one-sided ones of two products each."""
    for (values, vectors), damping in zip((left, right), dampings, strict=True):
        inner = (-values / (values + damping) / damping)[:, None] * (vectors.mT @ matrix)
        matrix = torch.addmm(matrix, vectors, inner, beta=1 / damping).mT
    return matrix


def _gram_ema(matrix: Tensor, columns: Tensor, decay: float, weight: float) -> Tensor:
    """Update a copy, as the inputs of a graph must not change. The time includes the copy."""
    updated = matrix.clone()
    gram_ema_(updated, columns, decay, weight)
    return updated


def _addmm(matrix: Tensor, columns: Tensor, decay: float, weight: float) -> Tensor:
    """Return torch's fastest addmm that keeps the moment in float32: on half-precision data if torch can."""
    try:
        return torch.addmm(matrix, columns, columns.mT, torch.float32, beta=decay, alpha=weight)
    except RuntimeError:
        data = columns.float()
        return torch.addmm(matrix, data, data.mT, beta=decay, alpha=weight)
