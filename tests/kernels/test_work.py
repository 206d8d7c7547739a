"""What a launch does beside running its kernel: it goes to the device of its tensors, and tells flops and bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

import brandla_kernels  # noqa: E402
from bench.gpu import cases, smoke  # noqa: E402
from bench.gpu.cases import Case, Size  # noqa: E402
from bench.gpu.device import Stub  # noqa: E402
from brandla_kernels import OPS  # noqa: E402
from brandla_kernels._kernels import launch as launching  # noqa: E402
from brandla_kernels._kernels.ahead import target_named  # noqa: E402
from brandla_kernels._kernels.inner_product import sum_parts_kernel  # noqa: E402
from brandla_kernels._kernels.launch import Config, Launch, metadata, recording  # noqa: E402

pytestmark = pytest.mark.skipif(bool(triton.knobs.runtime.interpret), reason="the interpreter has no launch hooks")

# Narrow enough for Gram matrices in the registers of a program, and too wide for that.
NARROW, WIDE = Size(n=1200, r=40, k=24, width=72, cores=3), Size(n=1200, r=136, k=100, width=136, cores=3)
of_every_size = pytest.mark.parametrize("size", [NARROW, WIDE], ids=["narrow", "wide"])
FLOAT32, FLOAT64, BF16 = torch.float32, torch.float64, torch.bfloat16


def case_of(op: str, size: Size = NARROW, dtype: torch.dtype = FLOAT32, data: torch.dtype | None = None) -> Case:
    return Case(op, size, dtype, data or dtype)


def recorded(case: Case, arguments: tuple[Any, ...] | None = None) -> list[Launch]:
    with recording(target_named("sm_90")) as launches:
        OPS[case.op].launch(*(arguments or cases.operands(case, Stub())))
    return launches


def flops_of(launches: list[Launch]) -> int:
    return sum(sum(launch.work.flops.values()) for launch in launches)


def sizes_in_bytes(launch: Launch) -> dict[int, int]:
    """Bytes of each distinct tensor that a launch reads or writes, by address; twice those that it overwrites."""
    given = {name: one for name, one in launch.arguments.items() if isinstance(one, Tensor)}
    if launch.name == "symmetric_product_kernel" and launch.arguments["SPLITS"] > 1:
        del given["m_ptr"]
    times = {name: 1 + (launch.name.startswith("symmetric") and name == "m_ptr") for name in given}
    return {one.data_ptr(): times[name] * one.numel() * one.itemsize for name, one in given.items()}


def matrices_in_bytes(launches: list[Launch]) -> int:
    """Bytes of what launches read and write, less workspaces, the sums over them, and a seed."""
    own = [launch for launch in launches if launch.name != "sum_parts_kernel"]
    names = ("parts_ptr", "parts1_ptr", "parts2_ptr", "seed_ptr")
    parts = (launch.arguments.get(name) for launch in own for name in names)
    return sum(launch.work.bytes for launch in own) - sum(one.nbytes for one in parts if one is not None)


@of_every_size
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64])
@pytest.mark.parametrize("op", OPS)
def test_flops_of_the_launches_are_those_of_the_cost(op: str, dtype: torch.dtype, size: Size):
    case, left_out = case_of(op, size, dtype), 0
    if op.startswith("kron_"):
        # The cost leaves out terms without the factor p q: U_Lᵀ(W U_R), (U_LᵀW U_R) U_Rᵀ, and β_L β_R W.
        left_out = 2 * (size.n + size.wide) * size.r**2 + 2 * size.n * size.wide
    assert flops_of(recorded(case)) == cases.cost(case).flops + left_out


@of_every_size
@pytest.mark.parametrize("op", OPS)
def test_bytes_of_a_launch_are_those_of_its_tensors(op: str, size: Size):
    for launch in recorded(case_of(op, size)):
        assert launch.work.bytes == sum(sizes_in_bytes(launch).values()) > 0
        assert all(launch.work.sizes.values()) or launch.work.sizes.get("r2") == 0


@of_every_size
@pytest.mark.parametrize("op", ["project", "cross_gram", "gram", "gram_ema_", "rotate"])
def test_bytes_beyond_the_cost_are_what_one_launch_leaves_to_the_next(op: str, size: Size):
    launches = recorded(case_of(op, size))
    parts = (launch.arguments.get("parts_ptr") for launch in launches)
    again, seen = 0, {part.data_ptr() for part in parts if part is not None}
    for launch in launches:
        for address, size_in_bytes in sizes_in_bytes(launch).items():
            again += size_in_bytes if address in seen else 0
            seen.add(address)
    assert sum(launch.work.bytes for launch in launches) - again == cases.cost(case_of(op, size)).bytes


def test_a_long_sum_is_split_and_its_parts_are_counted():
    (first, second) = recorded(case_of("gram_ema_", Size(n=96, r=8, k=4096, width=96, cores=1)))
    parts = first.arguments["parts_ptr"]
    assert first.work.bytes == 4 * (96 * 4096 + parts.numel())
    splits = first.arguments["SPLITS"]
    assert second.work == ({}, 4 * (2 * 96 * 96 + parts.numel()), {"n": 96, "splits": splits})
    seed = torch.zeros((), dtype=torch.int64)
    (first, second) = recorded(case_of("sketch"), (torch.zeros(96, 8192), seed, 16))
    parts = second.arguments["parts_ptr"]
    assert first.work.flops == {32: 2 * 96 * 8192 * 16}
    assert first.work.bytes == 4 * (96 * 8192 + parts.numel()) + 8


@pytest.mark.parametrize("op", [name for name, op in OPS.items() if op.signature.lists])
def test_a_list_is_counted_problem_by_problem(op: str):
    """One rank and width, as stacks are padded to the largest; n as different as it gets."""
    chosen = [case_of(op, Size(n=n, r=24, k=16, width=40, cores=1)) for n in (64, 1000, 250)]
    problems = [cases.operands(case, Stub()) for case in chosen]
    launches = recorded(chosen[0], smoke.grouped(op, problems))
    alone = [recorded(chosen[0], arguments) for arguments in problems]
    assert flops_of(launches) == sum(map(flops_of, alone))
    if op not in ("rotate_", "kron_damped_apply", "kron_damped_inverse"):
        # All but the workspaces, whose number depends on the number of problems, and the seed, which is one for all.
        assert matrices_in_bytes(launches) == sum(map(matrices_in_bytes, alone))


@pytest.mark.parametrize("op", OPS)
def test_a_call_by_plan_tells_the_same_work(op: str):
    """The first call of a layout makes the plan, which the second one goes by; vectors are matrices to a kernel."""
    arguments = cases.operands(case_of(op), Stub())
    with recording(target_named("sm_90")) as launches, brandla_kernels.backend("triton"), torch.no_grad():
        OPS[op](*arguments)
        first = len(launches)
        OPS[op](*arguments)
    works = [launch.work for launch in launches]
    assert works[:first] == works[first:] == [launch.work for launch in recorded(case_of(op), arguments)]


def test_half_precision_products_are_told_apart():
    case = case_of("gram_ema_", data=BF16)
    (launch,) = recorded(case)
    assert launch.work.flops == {16: cases.cost(case).flops}
    assert launch.work.bytes == cases.cost(case).bytes


def test_proton_is_told_name_flops_and_bytes():
    launch = recorded(case_of("cross_gram"))[0]
    told = metadata(launch.kernel.count, launch.grid, SimpleNamespace(name=launch.name), launch.arguments)
    assert told == {
        "name": "cross_gram_kernel [n=1200, r=40, k=24]",
        "flops32": 2 * 1200 * (40 + 24) * 24,
        "bytes": launch.work.bytes,
    }


class Kernel:
    """Stands in for a compiled kernel, and notes when it is launched."""

    launch_metadata = None
    count = staticmethod(sum_parts_kernel.count)

    def __init__(self, fn: Any) -> None:
        self.fn = fn
        self.log: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **options: self.log.append(("launch", grid))


def test_a_launch_runs_under_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch):
    """Triton takes the current device."""
    kernel = Kernel(lambda absent_ptr, panel_ptr, n: None)

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        kernel.log.append(("enter", tensor.device))
        yield
        kernel.log.append(("exit", tensor.device))

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    panel = torch.empty(3, device="meta")
    launching.start(kernel, (2,), {"absent_ptr": None, "panel_ptr": panel, "n": 3}, Config({}, 4, 1))
    assert kernel.log == [("enter", panel.device), ("launch", (2,)), ("exit", panel.device)]


def test_nothing_is_counted_unless_a_profiler_listens(monkeypatch: pytest.MonkeyPatch):
    """A kernel with launch_metadata has its arguments gathered at every launch, profiler or not."""
    (_, launch) = recorded(case_of("project"))
    kernel = Kernel(launch.kernel.fn)
    launching.start(kernel, launch.grid, launch.arguments, launch.config)
    assert kernel.launch_metadata is None
    monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [print])
    launching.start(kernel, launch.grid, launch.arguments, launch.config)
    told = kernel.launch_metadata(launch.grid, SimpleNamespace(name="sum_parts_kernel"), launch.arguments)
    assert told["bytes"] == launch.work.bytes
