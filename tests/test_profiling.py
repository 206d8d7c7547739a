"""``make profile`` on a CPU, and its table of a GPU's kernels."""

import shlex
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from typer.testing import CliRunner

from bench import profiling
from bench.benches.timing import Interval
from bench.gpu.cases import Case
from bench.gpu.device import Ceilings, Stub
from bench.profiling import NAMES, app, calls_of, nsight_commands, profiled_times, table_of

SIZES = (96, 8, 8, 24, 2)
SMALL = [
    part for name, size in zip(("n", "r", "k", "m", "cores"), SIZES, strict=True) for part in (f"--{name}", str(size))
]
CEILINGS = Ceilings(*(Interval(rate, rate, rate) for rate in (1e12, 5e13, 3e14, 8e14, 6e13)))


@pytest.fixture(autouse=True)
def _known_ceilings_and_few_calls(monkeypatch):
    monkeypatch.setattr(profiling, "measure_ceilings", lambda device, sizes: CEILINGS)
    monkeypatch.setattr(profiling, "FEWEST", 2)


@pytest.mark.parametrize("op", NAMES)
def test_every_op_and_function_is_profiled_on_a_cpu(op):
    every, *kernels = table_of(Case(op, *SIZES), Stub(), CEILINGS)
    assert every["µs"] == pytest.approx(sum(row["µs"] for row in kernels))
    assert kernels == sorted(kernels, key=lambda row: -row["µs"])
    without = ("cholesky_inverse_core", "eigh_core", "gram_ema_", "rotate_")
    assert any(row["TFLOP/s"] for row in kernels) or op in without
    if op == "project":
        # The row of all kernels has the cost of the op.
        assert every["TFLOP/s"] * every["µs"] * 1e6 == pytest.approx(2 * 96 * 8 * 8)
        assert every["GB/s"] * every["µs"] * 1e3 == pytest.approx(4 * (2 * 96 * 8 + 8 * 8))


def test_the_output_names_sizes_times_and_the_commands_of_other_profilers():
    printed = CliRunner().invoke(app, ["--op", "cross_gram", *SMALL]).stdout
    assert "cross_gram: n 96, r 8, k 8" in printed
    assert "torch form on a CPU" in printed
    assert "ncu --clock-control none" in printed
    assert "nsys profile" in printed


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["--op", "residuum"], "'--op'"),
        (["--op", "cross_gram", "--n", "0"], "'--n'"),
        (["--op", "cross_gram", "--n", "8", "--r", "9"], "R must be at most N = 8"),
        (["--op", "eigh_update", "--n", "16", "--r", "8", "--k", "9"], "R + K must be at most N = 16"),
        (["--op", "cross_gram", "--dtype", "int8"], "'--dtype'"),
        (["--op", "rotate", "--dtype", "bfloat16"], "rotate takes none"),
        (["--op", "eigh_update", "--dtype", "float64"], "use float32"),
    ],
)
def test_cases_that_cannot_be_profiled_are_refused(arguments, rule):
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2
    assert rule in refused.stderr


@pytest.mark.parametrize("op", ["cross_gram", "root_update, cholesky"])
def test_the_lines_of_other_profilers_run_the_same_calls_bare(op):
    pytest.importorskip("triton")
    ncu, nsys = nsight_commands(Case(op, *SIZES), Stub())
    assert ("regex:cross_gram_kernel|sum_parts_kernel" in ncu) == (op == "cross_gram")
    for line in (ncu, nsys):
        words = shlex.split(line)
        own = words[words.index("bench.profiling") + 1 :]
        assert own == ["--bare", "--op", op, *SMALL[:-2], "--dtype", "float32", *SMALL[-2:]]
        assert CliRunner().invoke(app, own).exit_code == 0


def test_float64_products_are_told_apart():
    double = Case("project", *SIZES, torch.float64, torch.float64)
    assert any(row["float64"] for row in profiled_times(calls_of(double, Stub()), Stub(), 64))


def test_half_precision_is_that_of_the_data(monkeypatch):
    asked = []
    monkeypatch.setattr(profiling, "calls_of", lambda case, device: asked.append(case) or [])
    for dtype in ("bfloat16", "float64"):
        CliRunner().invoke(app, ["--op", "project", *SMALL, "--dtype", dtype, "--bare"])
    assert [(case.dtype, case.data) for case in asked] == [(torch.float32, torch.bfloat16), 2 * (torch.float64,)]


def test_kernels_of_a_gpu_have_its_time_and_the_work_that_launches_tell(monkeypatch):
    """Only kernels count, not the calls and the named ranges around them, and work is summed by kernel."""
    hook = pytest.importorskip("triton").knobs.runtime.launch_enter_hook
    told = [{"name": f"tall_product_kernel [n={n}]", "flops32": 5e7, "flops64": 6e7, "bytes": 1e6} for n in (8, 9)]
    kernel = {"device_type": DeviceType.CUDA, "is_user_annotation": False, "flops": 0}
    events = [
        SimpleNamespace(key="tall_product_kernel", count=2, self_device_time_total=20, **kernel),
        SimpleNamespace(key="elementwise", count=4, self_device_time_total=2, **kernel),
        SimpleNamespace(key="aten::mul", count=4, self_device_time_total=2, **kernel | {"device_type": DeviceType.CPU}),
        SimpleNamespace(key="root_update", count=1, self_device_time_total=22, **kernel | {"is_user_annotation": True}),
    ]
    profiler = nullcontext(SimpleNamespace(key_averages=lambda: events))
    monkeypatch.setattr(torch.profiler, "profile", lambda **options: profiler)
    monkeypatch.setattr(Stub, "dry", False)
    launch = [partial(hook, SimpleNamespace(get=lambda each=each: each)) for each in told]
    monkeypatch.setattr(profiling, "calls_of", lambda case, device: [lambda: [start() for start in launch]])
    every, *kernels = table_of(Case("root_update", *SIZES), Stub(), CEILINGS)
    assert (every["launches"], every["µs"]) == (6, pytest.approx(22))
    assert [(row["kernel"], row["launches"], row["µs"]) for row in kernels] == [
        ("tall_product_kernel", 2, pytest.approx(20)),
        ("elementwise", 4, pytest.approx(2)),
    ]
    assert kernels[0]["TFLOP/s"] == pytest.approx(2.2e8 / 20e-6 / 1e12)
    assert kernels[0]["GB/s"] == pytest.approx(2e6 / 20e-6 / 1e9)
    # 10⁸ flops take 1 µs at 10¹⁴ flop/s, and 1.2 · 10⁸ in float64 2 µs at 6 · 10¹³.
    assert kernels[0]["of ceiling"] == pytest.approx(3 / 20)
    assert kernels[1]["of ceiling"] is None
