"""Launches beside their kernels: the flops and bytes that they report, their device, and their plans."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

triton = pytest.importorskip("triton")

import brandla_kernels  # noqa: E402
from bench.gpu import cases  # noqa: E402
from bench.gpu.cases import Case  # noqa: E402
from bench.gpu.device import Stub  # noqa: E402
from brandla_kernels import OPS  # noqa: E402
from brandla_kernels._kernels import inner_product  # noqa: E402
from brandla_kernels._kernels import launch as launching  # noqa: E402
from brandla_kernels._kernels.ahead import target_named  # noqa: E402
from brandla_kernels._kernels.launch import Config, metadata, recording  # noqa: E402

pytestmark = pytest.mark.skipif(bool(triton.knobs.runtime.interpret), reason="the interpreter has no launch hooks")

# Narrow enough for Gram matrices in the registers of a program, and too wide for that.
NARROW, WIDE = Case("", n=1200, r=40, k=24, width=72, cores=3), Case("", n=1200, r=136, k=100, width=136, cores=3)
of_every_size = pytest.mark.parametrize("size", [NARROW, WIDE], ids=["narrow", "wide"])
FLOAT32, FLOAT64, BF16 = torch.float32, torch.float64, torch.bfloat16


def case_of(op, size=NARROW, dtype=FLOAT32, data=None):
    return size._replace(op=op, dtype=dtype, data=data or dtype)


def recorded(case, arguments=None):
    with recording(target_named("sm_90")) as launches:
        OPS[case.op].launch(*(arguments or cases.operands(case, Stub())))
    return launches


def flops_of(launches):
    return sum(sum(launch.work.flops.values()) for launch in launches)


def sizes_in_bytes(launch):
    """Bytes of each distinct tensor that a launch reads or writes, by address; twice those that it overwrites."""
    tensors = {name: value for name, value in launch.arguments.items() if isinstance(value, Tensor)}
    if launch.name == "symmetric_product_kernel" and launch.arguments["SPLITS"] > 1:
        del tensors["m_ptr"]
    overwritten = {"m_ptr"}
    if launch.name == "tall_product_kernel" and tensors["x1_ptr"].data_ptr() == tensors["out_ptr"].data_ptr():
        overwritten = {"x1_ptr"}
    return {tensor.data_ptr(): (1 + (name in overwritten)) * tensor.nbytes for name, tensor in tensors.items()}


def matrices_in_bytes(launches):
    """Bytes that launches read and write, without workspaces, the sums over them, and a seed."""
    counted = [launch for launch in launches if launch.name != "sum_parts_kernel"]
    names = ("parts_ptr", "parts1_ptr", "parts2_ptr", "seed_ptr")
    parts = (launch.arguments.get(name) for launch in counted for name in names)
    return sum(launch.work.bytes for launch in counted) - sum(part.nbytes for part in parts if part is not None)


@of_every_size
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64])
@pytest.mark.parametrize("op", OPS)
def test_flops_of_the_launches_are_those_of_the_cost_and_bytes_those_of_their_tensors(op, dtype, size):
    case, left_out = case_of(op, size, dtype), 0
    launches = recorded(case)
    if op.startswith("kron_"):
        # The cost leaves out terms without the factor p q: U_Lᵀ(W U_R), (U_LᵀW U_R) U_Rᵀ, and β_L β_R W.
        left_out = 2 * (size.n + size.wide) * size.r**2 + 2 * size.n * size.wide
    assert flops_of(launches) == cases.cost(case).flops + left_out
    for launch in launches:
        assert launch.work.bytes == sum(sizes_in_bytes(launch).values()) > 0
        assert all(launch.work.sizes.values()) or launch.work.sizes.get("r2") == 0


@of_every_size
@pytest.mark.parametrize("op", ["project", "cross_gram", "gram", "gram_ema_", "rotate"])
def test_bytes_beyond_the_cost_are_what_one_launch_leaves_to_the_next(op, size):
    launches = recorded(case_of(op, size))
    parts = (launch.arguments.get("parts_ptr") for launch in launches)
    again, seen = 0, {part.data_ptr() for part in parts if part is not None}
    for launch in launches:
        for address, size_in_bytes in sizes_in_bytes(launch).items():
            again += size_in_bytes if address in seen else 0
            seen.add(address)
    assert sum(launch.work.bytes for launch in launches) - again == cases.cost(case_of(op, size)).bytes


def test_a_long_sum_is_split_and_its_parts_are_counted():
    (first, second) = recorded(Case("gram_ema_", n=96, r=8, k=4096, width=96, cores=1))
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
def test_a_list_is_counted_problem_by_problem(op):
    """The problems have one rank and width, since stacks are padded to the largest, and very different n."""
    chosen = [Case(op, n=n, r=24, k=16, width=40, cores=1) for n in (64, 1000, 250)]
    problems = [cases.operands(case, Stub()) for case in chosen]
    launches = recorded(chosen[0], cases.grouped(op, problems))
    alone = [recorded(chosen[0], arguments) for arguments in problems]
    assert flops_of(launches) == sum(map(flops_of, alone))
    if op not in ("rotate_", "kron_damped_apply", "kron_damped_inverse"):
        # All but the workspaces, whose number depends on the number of problems, and the seed, which is one for all.
        assert matrices_in_bytes(launches) == sum(map(matrices_in_bytes, alone))


def test_half_precision_products_are_told_apart():
    case = case_of("gram_ema_", data=BF16)
    (launch,) = recorded(case)
    assert launch.work.flops == {16: cases.cost(case).flops}
    assert launch.work.bytes == cases.cost(case).bytes


def test_proton_is_told_name_flops_and_bytes():
    launch = recorded(case_of("cross_gram"))[0]
    reported = metadata(launch.kernel.count, launch.grid, SimpleNamespace(name=launch.name), launch.arguments)
    assert reported == {
        "name": "cross_gram_kernel [n=1200, r=40, k=24]",
        "flops32": 2 * 1200 * (40 + 24) * 24,
        "bytes": launch.work.bytes,
    }


class Kernel:
    """Stands in for a kernel, and notes each launch, which returns ``compiled``."""

    launch_metadata = None
    count = staticmethod(inner_product.sum_parts_kernel.count)

    def __init__(self, fn, compiled=None):
        self.fn, self.compiled, self.log = fn, compiled, []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.log.append((grid, arguments)) or self.compiled


def test_a_launch_runs_under_the_device_of_its_tensors(monkeypatch):
    """Triton launches on the current device."""
    kernel = Kernel(lambda absent_ptr, panel_ptr, n: None)

    @contextmanager
    def device_of(tensor):
        kernel.log.append(("enter", tensor.device))
        yield
        kernel.log.append(("exit", tensor.device))

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    panel = torch.empty(3, device="meta")
    launching.start(kernel, (2,), {"absent_ptr": None, "panel_ptr": panel, "n": 3}, Config({}, 4, 1))
    assert kernel.log == [("enter", panel.device), ((2,), (None, panel, 3)), ("exit", panel.device)]


def test_nothing_is_counted_unless_a_profiler_listens(monkeypatch):
    """A kernel with launch_metadata has its arguments gathered at every launch, profiler or not."""
    (_, launch) = recorded(case_of("project"))
    kernel = Kernel(launch.kernel.fn)
    launching.start(kernel, launch.grid, launch.arguments, launch.config)
    assert kernel.launch_metadata is None
    monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [print])
    launching.start(kernel, launch.grid, launch.arguments, launch.config)
    reported = kernel.launch_metadata(launch.grid, SimpleNamespace(name="sum_parts_kernel"), launch.arguments)
    assert reported["bytes"] == launch.work.bytes


# --- Plans: the second call of a layout starts the launches of the launcher itself, on the tensors of that call


def started(call, arguments):
    with recording(target_named("sm_90")) as launches, brandla_kernels.backend("triton"):
        results = call(*arguments)
    return launches, results


def described(launches, arguments, results):
    """Describe launches with tensors as places: first arguments and results, then memory in its order."""
    places = {}

    def place(address):
        return places.setdefault(address, len(places))

    def of_value(value):
        if not isinstance(value, Tensor):
            return value
        if value.dtype != torch.int64 or value.ndim != 3:
            return place(value.data_ptr()), value.dtype
        # The table of a list: each row begins with an address.
        return [(place(row[0]) if row[0] else 0, *row[1:]) for row in value.flatten(0, 1).tolist()]

    for tensor in tree_leaves((arguments, results)):
        if isinstance(tensor, Tensor):
            place(tensor.data_ptr())
    values = [list(map(of_value, launch.all_arguments.values())) for launch in launches]
    facts = [(launch.name, launch.grid, launch.config, launch.work) for launch in launches]
    return facts, values


PLANNED = [name for name, op in OPS.items() if not op.signature.writes]


@pytest.mark.parametrize(
    ("name", "listed"),
    [(name, False) for name in PLANNED] + [(name, True) for name in PLANNED if OPS[name].signature.lists],
)
def test_a_plan_starts_what_the_launcher_would_and_tells_the_same_work(name, listed, monkeypatch):
    op = OPS[name]

    def new():
        problems = [cases.operands(case_of(name, size), Stub()) for size in (NARROW, NARROW._replace(n=500))]
        return cases.grouped(name, problems) if listed else problems[0]

    arguments, earlier = new(), new()
    started(op, earlier)
    expected, outputs = started(op.launch, arguments)
    # From here on, the launcher must not be asked.
    monkeypatch.setattr(op, "launch", lambda *_: pytest.fail("there is no plan"))
    launches, results = started(op, arguments)
    assert launches
    assert described(launches, arguments, results) == described(expected, arguments, outputs)
    assert [part.shape for part in tree_leaves(results)] == [part.shape for part in tree_leaves(outputs)]


def test_one_tensor_given_twice_is_no_pattern_for_two():
    one, other = torch.empty(500, 16), torch.empty(500, 16)
    for pair in ((one, one), (one, other), (other, other), (other, one)):
        (first, _), _ = started(OPS["project"], pair)
        assert [first.arguments[name].data_ptr() for name in ("x_ptr", "y_ptr")] == [one.data_ptr() for one in pair]


def test_what_torch_copies_is_copied_at_each_call():
    """A Z that is not contiguous: its copy is no memory that a kernel writes."""
    basis, rhs, scale = torch.empty(500, 16), torch.empty(500, 8), torch.empty(())
    for _ in range(2):
        middle = torch.randn(16, 16)
        launches, _ = started(OPS["damped_apply"], (basis, middle.mT, scale, rhs))
        assert torch.equal(launches[1].arguments["middle1_ptr"], middle.mT)


class Compiled(Kernel, triton.compiler.CompiledKernel):
    """Stands in for what Triton compiles."""


def test_what_triton_compiled_is_started_again_without_a_look(monkeypatch):
    kernel = Kernel(inner_product.sum_parts_kernel.fn, Compiled(None))
    looked_up, again = kernel.log, kernel.compiled.log
    monkeypatch.setattr(inner_product, "sum_parts_kernel", kernel)
    monkeypatch.setattr(inner_product, "inner_product_kernel", kernel)
    monkeypatch.setattr(launching, "interpreted", lambda: True)
    with brandla_kernels.backend("triton"):
        results = [OPS["gram"](torch.empty(700, 24)) for _ in range(2)]
        assert len(looked_up) == len(again) == 2
        assert [len(arguments) for _, arguments in looked_up] == [len(arguments) for _, arguments in again]
        assert [arguments[2] for _, arguments in (looked_up[1], again[1])] == results
        # A profiler listens: Triton itself starts each launch and reports it.
        monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [print])
        OPS["gram"](torch.empty(700, 24))
    assert (len(looked_up), len(again)) == (4, 2)
