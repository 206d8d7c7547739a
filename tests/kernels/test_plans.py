"""Plans: the second call of a layout starts what the launcher itself would start, on the tensors of that call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

triton = pytest.importorskip("triton")

import brandla  # noqa: E402
from bench.gpu import cases, smoke  # noqa: E402
from bench.gpu.cases import Case, Size  # noqa: E402
from bench.gpu.device import Stub  # noqa: E402
from brandla_kernels import OPS  # noqa: E402
from brandla_kernels._kernels import inner_product, launch  # noqa: E402
from brandla_kernels._kernels.ahead import target_named  # noqa: E402
from brandla_kernels._kernels.launch import Launch, recording  # noqa: E402

pytestmark = pytest.mark.skipif(bool(triton.knobs.runtime.interpret), reason="the interpreter has tests of its own")

SIZE = Size(n=1200, r=40, k=24, width=72, cores=3)
OTHER = SIZE._replace(n=500)
PLANNED = [name for name, op in OPS.items() if not op.signature.writes]


def started(call: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[list[Launch], Any]:
    with recording(target_named("sm_90")) as launches, brandla.backend("triton"):
        results = call(*arguments)
    return launches, results


def described(launches: list[Launch], arguments: tuple[Any, ...], results: Any) -> list[Any]:
    """All that launches are given, tensors as places: of an argument, or in the order of what is allocated."""
    places: dict[int, int] = {}

    def place(address: int) -> int:
        return places.setdefault(address, len(places))

    def of_value(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.dtype != torch.int64 or value.ndim != 3:
            return place(value.data_ptr()), value.dtype
        return [
            place(number) if index % 5 == 0 and number else number
            for index, number in enumerate(value.flatten().tolist())
        ]

    for tensor in tree_leaves((arguments, results)):
        if isinstance(tensor, Tensor):
            place(tensor.data_ptr())
    return [
        (
            one.name,
            one.grid,
            one.config,
            list(map(of_value, one.given.values())),
        )
        for one in launches
    ]


@pytest.mark.parametrize("listed", [False, True], ids=["single", "grouped"])
@pytest.mark.parametrize("name", PLANNED)
def test_a_plan_starts_what_the_launcher_would(name: str, listed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS[name]
    if listed and not op.signature.lists:
        pytest.skip("takes no lists")

    def new() -> tuple[Any, ...]:
        problems = [cases.operands(Case(name, size, torch.float32, torch.float32), Stub()) for size in (SIZE, OTHER)]
        return smoke.grouped(name, problems) if listed else problems[0]

    arguments, kept = new(), new()
    started(op, kept)
    expected, own = started(op.launch, arguments)
    # From now on there is none to ask.
    monkeypatch.setattr(op, "launch", lambda *_: pytest.fail("there is no plan"))
    launches, results = started(op, arguments)
    assert launches
    assert described(launches, arguments, results) == described(expected, arguments, own)
    assert [one.shape for one in tree_leaves(results)] == [one.shape for one in tree_leaves(own)]


def test_one_tensor_given_twice_is_no_pattern_for_two() -> None:
    one, other = torch.empty(500, 16), torch.empty(500, 16)
    for pair in ((one, one), (one, other), (other, other), (other, one)):
        (first, _), _ = started(OPS["project"], pair)
        assert [first.arguments[name].data_ptr() for name in ("x_ptr", "y_ptr")] == [one.data_ptr() for one in pair]


def test_what_torch_copies_is_copied_at_each_call() -> None:
    """A Z that is not contiguous: its copy is no memory that a kernel writes."""
    basis, rhs, scale = torch.empty(500, 16), torch.empty(500, 8), torch.empty(())
    for _ in range(2):
        middle = torch.randn(16, 16)
        launches, _ = started(OPS["damped_apply"], (basis, middle.mT, scale, rhs))
        assert torch.equal(launches[1].arguments["middle1_ptr"], middle.mT)


class Compiled(triton.compiler.CompiledKernel):  # type: ignore[misc]
    """Stands in for what Triton compiles."""

    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.log.append((grid, arguments))


def test_what_triton_compiled_is_started_again_without_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: list[Any] = []
    again: list[Any] = []

    class Kernel:
        fn = inner_product.sum_parts_kernel.fn
        count = staticmethod(inner_product.sum_parts_kernel.count)

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **options: looked_up.append((grid, arguments)) or Compiled(again)

    monkeypatch.setattr(inner_product, "sum_parts_kernel", Kernel())
    monkeypatch.setattr(inner_product, "inner_product_kernel", Kernel())
    monkeypatch.setattr(launch, "interpreted", lambda: True)
    with brandla.backend("triton"):
        results = [OPS["gram"](torch.empty(700, 24)) for _ in range(2)]
        assert len(looked_up) == len(again) == 2
        assert [len(arguments) for _, arguments in looked_up] == [len(arguments) for _, arguments in again]
        assert [arguments[1] for _, arguments in (looked_up[1], again[1])] == results
        # A profiler is told at each launch, as Triton does it.
        monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [print])
        OPS["gram"](torch.empty(700, 24))
    assert (len(looked_up), len(again)) == (4, 2)
