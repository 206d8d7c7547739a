"""Public functions as CUDA graphs: replay equals call to the bit, nothing waits for the device, and what both take.

One factor, and a network's worth in one call; beside torch's own ways, and against the targets set for them.
"""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import cycle, islice
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import brandla
from bench.benches import written_out
from bench.benches.problems import DECAY, WEIGHT, require
from bench.benches.timing import ratio
from bench.gpu import cases
from bench.gpu.device import Device, Work, tensors_in
from bench.gpu.frame import Findings
from brandla import LowRankEigh, LowRankRoot, grouped
from brandla_kernels import OPS, gram_ema_

DAMPING = 0.1
AVERAGE: dict[str, Any] = {"decay": DECAY, "weight": WEIGHT, "compress": "cholesky"}
CASE = 8.0
# Of one factor n, r, k; of a list r, k, the number, and n in turn; of a dense moment n, k.
FULL = ((4096, 256, 256), (128, 64), 64, (512, 1024, 2048, 4096, 8191), (8192, 8192))
TOY = ((64, 8, 8), (6, 4), 4, (24, 48), (48, 16))


class Call(NamedTuple):
    """A function, a source of its inputs, and others' ways to the same.

    The target is of the ratio of the best of these ways, or of the first that is a loop, to the replay.
    """

    function: Callable[..., Any]
    inputs: Callable[[], tuple[Any, ...]]
    peers: Mapping[str, Callable[..., Any]] = {}
    at_least: float | None = None
    work: Work | None = None


def run(found: Findings) -> None:
    """Capture each call, and call each without a wait."""
    for name, call in calls(found.device).items():
        found.attempt(f"{name}: graph", CASE, _replayed, found, name, call)
        found.attempt(f"{name}: no wait for the device", 2, _never_waiting, found, name, call)


def calls(device: Device) -> dict[str, Call]:
    """Return the calls that promise to be capturable, with numbers and with tensors on the device as options."""
    (n, r, k), (rank, columns), count, several, (side, wide) = TOY if device.dry else FULL
    # Every third is one larger, as a layer with a bias has it.
    listed = [size + (place % 3 == 0) for place, size in enumerate(islice(cycle(several), count))]
    eigh, block = partial(cases.eigh, device, n, r), partial(device.normal, n, k)
    rooted = lambda: (LowRankRoot.from_eigh(eigh()), block())
    number = lambda: device.normal(1)[0].abs() + DAMPING
    many = lambda: (
        [LowRankRoot.from_eigh(cases.eigh(device, one, rank)) for one in listed],
        [device.normal(one, columns) for one in listed],
    )
    moment = lambda: (torch.eye(side, device=device.tensors), (device.normal(side, wide) / side**0.5).bfloat16())
    update, solve = partial(brandla.root_update, **AVERAGE), brandla.damped_solve
    by_tensor = lambda factor, columns, decay: update(factor, columns, decay=decay)
    kron = lambda left, right, matrix: brandla.kron_damped_solve(left, right, matrix, DAMPING, DAMPING)
    two_sided = Work(float32=OPS["kron_damped_apply"].cost(n, n, r, r).flops, bytes=4 * 3 * n * n)
    loop = lambda one: lambda *lists: [one(*parts) for parts in zip(*lists, strict=True)]
    solve_all, solve_one = (partial(function, damping=DAMPING) for function in (grouped.damped_solve, solve))
    loops = {"loop": loop(update), "loop of torch Brand updates": loop(_brand_of_torch)}
    ways = {"torch form": cases.forced(kron), "one side, then the other": _one_by_one}
    return {
        "root_update, cholesky": Call(update, rooted, {"torch Brand update": _brand_of_torch}),
        "grouped.root_update, cholesky": Call(partial(grouped.root_update, **AVERAGE), many, loops, at_least=8),
        "kron_damped_solve": Call(kron, lambda: (eigh(), eigh(), device.normal(n, n)), ways, 2, two_sided),
        "damped_solve": Call(solve, lambda: (eigh(), block(), DAMPING), {"torch form": cases.forced(solve)}),
        "grouped.damped_solve": Call(solve_all, many, {"loop": loop(solve_one)}),
        "gram_ema_": Call(_gram_ema, moment, {"torch.addmm": _addmm}, at_least=1.5),
        "root_update, cholesky, decay as a tensor": Call(by_tensor, lambda: (*rooted(), number())),
        "damped_solve, damping as a tensor": Call(solve, lambda: (eigh(), block(), number())),
    }


def _replayed(found: Findings, name: str, call: Call) -> None:
    device, static, later = found.device, call.inputs(), call.inputs()
    results = [[part.clone() for part in tensors_in(call.function(*inputs))] for inputs in (static, later, static)]
    _is_right(name, call, static)
    _same(f"{name}: two calls", results[2], results[0])
    captured, replay = device.capture(lambda: call.function(*static))
    replay()
    device.synchronize()
    _same(f"{name}: replay and call", captured, results[0])
    for old, new in zip(tensors_in(static), tensors_in(later), strict=True):
        old.copy_(new)
    replay()
    device.synchronize()
    _same(f"{name}: replay with new data and call", captured, results[1])
    peers = {peer: partial(other, *static) for peer, other in call.peers.items()}
    ways = {"replay": replay, "eager": lambda: call.function(*static)} | peers
    times = device.alternating(ways, 2 * found.sizes.seconds)
    taken = {way: 1e6 * median(samples) for way, samples in times.items()}
    own = {f"{way} µs": taken.pop(way) for way in ("replay", "eager")}
    found.row("graphs", call=name, **{"equal to the bit": "yes"}, **own)
    for peer, microseconds in taken.items():
        found.row("others", call=name, way=peer, **{"µs": microseconds})
    if taken:
        best = "loop" if "loop" in taken else min(taken, key=taken.__getitem__)
        found.figure(name, f"in a graph: {best} / it", ratio(times[best], times["replay"]), at_least=call.at_least)
    if call.work is not None:
        floor = found.ceilings.floor(call.work)
        part, note = floor.seconds / median(times["replay"]), f"bound by {floor.bound_by}"
        found.figure(name, "in a graph: part of its ceiling", part, at_least=0.5, unit="", note=note)


def _is_right(name: str, call: Call, inputs: tuple[Any, ...]) -> None:
    """Hold a call to its torch form: a dozen sums of n terms, in other orders, each well conditioned."""
    # Of a root a column of F Fᵀ counts: F alone is not determined.
    image, is_root = lambda root: root.root @ root.root[0], lambda part: isinstance(part, LowRankRoot)
    own, torchs = (
        tensors_in(tree_map_only(LowRankRoot, image, function(*inputs), is_leaf=is_root))
        for function in (call.function, cases.forced(call.function))
    )
    limit = 64 * max(max(part.shape) for part in own) ** 0.5 * torch.finfo(torch.float32).eps
    error = cases.error_of(own, torchs)
    require(error <= limit, f"{name}: relative error {error:.1e} beside the torch form, allowed {limit:.1e}")


def _same(what: str, one: Any, other: Any) -> None:
    said = lambda differences: f"{what} differ: {differences}"
    torch.testing.assert_close(tensors_in(one), tensors_in(other), rtol=0, atol=0, msg=said)


def _never_waiting(found: Findings, name: str, call: Call) -> None:
    inputs = call.inputs()
    call.function(*inputs)
    with found.device.never_waiting():
        call.function(*inputs)
    found.row("no wait for the device", call=name, waits="none")


# --- Others' ways


def _brand_of_torch(root: LowRankRoot, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return the update of an orthonormal basis in eager torch; a basis of this size takes the same time."""
    return written_out.brand_update(root.gram.diagonal(), root.root, columns, DECAY, WEIGHT)


def _one_by_one(left: LowRankEigh, right: LowRankEigh, matrix: Tensor) -> Tensor:
    """Return the two-sided solve as two one-sided ones, each of two products."""
    for values, vectors in (left, right):
        inner = (-values / (values + DAMPING) / DAMPING)[:, None] * (vectors.mT @ matrix)
        matrix = torch.addmm(matrix, vectors, inner, beta=1 / DAMPING).mT
    return matrix


def _gram_ema(matrix: Tensor, columns: Tensor) -> Tensor:
    """Update a copy, for a graph's inputs must stay: the copy counts as the op's."""
    updated = matrix.clone()
    gram_ema_(updated, columns, DECAY, WEIGHT)
    return updated


def _addmm(matrix: Tensor, columns: Tensor) -> Tensor:
    """Return torch's fastest addmm that keeps the moment in float32: from half data where torch has that."""
    try:
        return torch.addmm(matrix, columns, columns.mT, torch.float32, beta=DECAY, alpha=WEIGHT)
    except RuntimeError:
        data = columns.float()
        return torch.addmm(matrix, data, data.mT, beta=DECAY, alpha=WEIGHT)
