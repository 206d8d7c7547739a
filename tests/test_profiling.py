"""``make profile`` on a CPU, and what it makes of Proton's output."""

import shlex

import pytest
import torch
from typer.testing import CliRunner

from bench import profiling
from bench.benches.timing import Interval
from bench.gpu.device import Ceilings, Stub
from bench.profiling import NAMES, Request, app, by_torch, deeper, frames, prepare, rows_of, table_of

SIZES = {"n": 96, "r": 8, "k": 8, "m": 24, "cores": 2}
SMALL = [part for name, size in SIZES.items() for part in (f"--{name}", str(size))]
CEILINGS = Ceilings(*(Interval(rate, rate, rate) for rate in (1e12, 5e13, 3e14, 8e14, 6e13)))


@pytest.fixture(autouse=True)
def _known_ceilings_and_few_calls(monkeypatch):
    monkeypatch.setattr(profiling, "measure", lambda device, sizes: CEILINGS)
    monkeypatch.setattr(profiling, "FEWEST", 2)


@pytest.mark.parametrize("op", NAMES)
def test_every_op_and_function_is_profiled_on_a_cpu(op):
    every, *kernels = table_of(Request(op, **SIZES), Stub(), CEILINGS)
    assert every["µs"] == pytest.approx(sum(row["µs"] for row in kernels))
    assert kernels == sorted(kernels, key=lambda row: -row["µs"])
    without = ("cholesky_inverse_core", "eigh_core", "gram_ema_", "rotate_")
    assert any(row["TFLOP/s"] for row in kernels) or op in without
    if op == "project":
        # The row of all kernels has the cost of the op.
        assert every["TFLOP/s"] * every["µs"] * 1e6 == pytest.approx(2 * 96 * 8 * 8)
        assert every["GB/s"] * every["µs"] * 1e3 == pytest.approx(4 * (2 * 96 * 8 + 8 * 8))


def test_what_is_printed_names_size_time_and_the_way_deeper():
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
def test_what_cannot_be_profiled_is_said(arguments, rule):
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2
    assert rule in refused.stderr


@pytest.mark.parametrize("op", ["cross_gram", "root_update, cholesky"])
def test_the_lines_of_other_profilers_run_the_same_calls_bare(op):
    pytest.importorskip("triton")
    ncu, nsys = deeper(Request(op, **SIZES), Stub())
    assert ("regex:cross_gram_kernel|sum_parts_kernel" in ncu) == (op == "cross_gram")
    for line in (ncu, nsys):
        words = shlex.split(line)
        own = words[words.index("bench.profiling") + 1 :]
        assert own == ["--bare", "--op", op, *SMALL[:-2], "--dtype", "float32", *SMALL[-2:]]
        assert CliRunner().invoke(app, own).exit_code == 0


def test_half_precision_is_that_of_the_data():
    case = Request("project", n=96, r=8, k=8, dtype="bfloat16").case
    assert (case.dtype, case.data) == (torch.float32, torch.bfloat16)
    double = Request("project", n=96, r=8, k=8, dtype="float64")
    assert any(row["float64"] for row in by_torch(prepare(double, Stub()), Stub(), 8 * double.case.dtype.itemsize))


def frame(name, metrics, *children):
    return {"frame": {"name": name, "type": "function"}, "metrics": metrics, "children": list(children)}


def test_a_tree_of_proton_is_summed_by_launch():
    """Time is in the launch's own frame, or in one of the compiled kernel below it; both have been so."""
    work = {"flops32": 2e9, "flops64": 1e9, "bytes": 4e6}
    tree = frame(
        "ROOT",
        {"count": 0, "time (ns)": 0},
        frame("tall_product_kernel [n=8]", work | {"count": 2, "time (ns)": 3000}),
        frame("tall_product_kernel [n=9]", work, frame("tall_product_kernel", {"count": 1, "time (ns)": 500})),
        frame("elementwise", {"count": 4, "time (ns)": 100}),
        # 10⁸ flops take 1 µs at 10¹⁴ flop/s, and 10⁶ bytes 1 µs at 10¹² byte/s.
        frame("project", {"count": 1, "time (ns)": 2000, "flops32": 1e8, "bytes": 1e6}),
        frame("__proton_launch_metadata", {}, frame("copy", {"count": 9, "time (ns)": 9})),
    )
    every, *kernels = rows_of(list(frames(tree)), 1, CEILINGS)
    assert (every["launches"], every["µs"]) == (8, pytest.approx(5.6))
    assert [(row["kernel"], row["launches"], row["µs"]) for row in kernels] == [
        ("tall_product_kernel [n=8]", 2, pytest.approx(3.0)),
        ("project", 1, pytest.approx(2.0)),
        ("tall_product_kernel [n=9]", 1, pytest.approx(0.5)),
        ("elementwise", 4, pytest.approx(0.1)),
    ]
    assert kernels[0]["TFLOP/s"] == pytest.approx(1e3)
    assert kernels[-1]["of ceiling"] is None
    # It is held to the ceiling that binds.
    found = [kernels[1][name] for name in ("TFLOP/s", "GB/s", "of ceiling")]
    assert found == pytest.approx([50, 500, 0.5])
