"""`make kernels`: the table of what kernels compile to, and its exit status."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from typer.testing import CliRunner

from bench import kernels_table
from bench.gpu.cases import SMALL, TOY
from brandla_kernels import OPS
from brandla_kernels._kernels import shipped
from brandla_kernels._kernels.ahead import compile_for, target_named
from brandla_kernels._kernels.launch import recording


@pytest.fixture
def facts(tmp_path, tmp_path_factory, monkeypatch):
    """Return a function that runs the command on `gram` at one width and returns status, JSON and output."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))
    # A patched function exists in this process only.
    monkeypatch.setattr(kernels_table, "ProcessPoolExecutor", lambda processes: ThreadPoolExecutor(1))
    monkeypatch.setattr(kernels_table, "USUAL", TOY)
    layout = shipped.Layout("rows", widths=(32,))
    monkeypatch.setattr(
        kernels_table,
        "specializations",
        lambda target: shipped.specializations(target, ops=["gram"], layouts=[layout], dtypes=shipped.DTYPES[:1]),
    )

    def run(*arguments):
        path = tmp_path / "facts.json"
        done = CliRunner().invoke(kernels_table.app, ["--json", str(path), *arguments])
        return done.exit_code, json.loads(path.read_text()), done.stdout

    return run


def test_table_lists_every_kernel_of_every_target(facts):
    status, found, printed = facts("--targets", "sm_100", "gfx942")
    assert status == 0
    assert {(entry["target"], entry["kernel"]) for entry in found} == {
        (target, kernel) for target in ("sm_100", "gfx942") for kernel in ("inner_product_kernel", "sum_parts_kernel")
    }
    # Float64 products of sm_100 have no matrix instruction: the table says so, and it is no fault.
    assert "fused multiply-add" in printed
    assert "v_mfma_f64_16x16x4_f64" in printed
    assert "4 specialisations compiled, 0 with a fault" in printed
    assert "Estimated, not measured" in printed
    for words in (*kernels_table.GPUS, "root_core_kernel", "symmetric_product_kernel"):
        assert words in printed


def test_a_fault_or_a_failure_to_compile_fails_the_command(facts, monkeypatch):
    wrong = {
        "8 bytes of registers spilled": lambda target, launch: replace(compile_for(target, launch), spills=8),
        "does not compile: PassManager::run failed": mock.Mock(side_effect=RuntimeError("PassManager::run failed")),
    }
    for fault, compiling in wrong.items():
        monkeypatch.setattr(kernels_table, "compile_for", compiling)
        status, entries, _ = facts("--targets", "gfx942")
        assert status == 1
        assert [entry["faults"] for entry in entries] == 2 * [[fault]]


@pytest.mark.parametrize("name", kernels_table.GPUS)
def test_an_estimate_is_the_cost_of_the_op_at_the_published_ceilings(name):
    gpu, n, r = kernels_table.GPUS[name], 65536, 256
    cost = OPS["rotate"].cost(n, r, r, r)
    with recording(target_named(gpu.target)) as launches:
        OPS["rotate"].launch(torch.empty(n, r), torch.empty(n, r), torch.empty(r, r), torch.empty(r, r))
    (parts,) = (kernels_table.seconds(launch, gpu) for launch in launches)
    assert parts["bytes"] == cost.bytes / gpu.bytes
    assert parts["flops"] == cost.flops / gpu.flops[32]
    assert parts["launch"] == kernels_table.LAUNCH


def test_few_programs_get_only_their_multiprocessors_share_of_the_flops():
    gpu, (r, k) = kernels_table.GPUS["H200"], (32, 16)
    gram, cross, own = (torch.empty(2, *shape, dtype=torch.float64) for shape in ((r, r), (r, k), (k, k)))
    with recording(target_named(gpu.target)) as launches:
        OPS["root_core"].launch(gram.float(), cross, own, gram[:, 0, 0], gram[:, 0, 0], r, 0.0, False)
    flops = 2 * OPS["root_core"].cost(r, k, r).flops
    assert kernels_table.seconds(launches[0], gpu)["flops"] == pytest.approx(flops / (gpu.flops[64] * 2 / 132))


def test_every_row_of_the_estimates_adds_up_the_launches_of_a_kernel():
    # The last two sizes give cores of one order, but each is a case of its own.
    sizes = replace(TOY, uneven=((48, 8, 5), (48, 5, 8)))
    rows = kernels_table.estimates(sizes).set_index(["op", "kernel"])
    assert set(rows.index.get_level_values("op")) == set(OPS)
    for op in SMALL:
        assert rows["launches"][op].tolist() == [1, 1, 1]
    launches = rows["launches"]["kron_damped_apply"][:3]
    assert launches.to_dict() == {"damped_project_kernel": 1, "damped_middle_kernel": 1, "tall_product_kernel": 2}
    assert (rows["H200, µs"].str.split().str[1] == "launch").all()


def test_an_update_of_a_network_is_estimated_at_no_more_than_three_times_its_bytes():
    found = kernels_table.updates().set_index("GPU")
    assert (found["ratio"] <= 3).all()
    assert (found["with serial steps"] > found["ratio"]).all()
