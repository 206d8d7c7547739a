"""`make kernels`: the table of what kernels compile to, and its exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from typer.testing import CliRunner

from bench import kernels_table
from brandla_kernels._kernels import configs, shipped
from brandla_kernels._kernels.launch import Config


class InThisProcess:
    """A pool that runs what it is given at once."""

    def __init__(self, processes: int, **options: Any) -> None:
        self.processes = processes

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, function: Any, *arguments: Any) -> Any:
        found = function(*arguments)

        class Done:
            def result(self) -> Any:
                return found

        return Done()


@pytest.fixture
def facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs the command on `gram` at one width and returns status, JSON and output."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(kernels_table, "ProcessPoolExecutor", InThisProcess)
    layout = shipped.Layout("rows", widths=(32,))
    monkeypatch.setattr(
        kernels_table,
        "specializations",
        lambda target: shipped.specializations(target, ops=["gram"], layouts=[layout], dtypes=shipped.DTYPES[:1]),
    )

    def run(*arguments: str) -> tuple[int, list[dict[str, Any]], str]:
        path = tmp_path / "facts.json"
        done = CliRunner().invoke(kernels_table.app, ["--processes", "1", "--json", str(path), *arguments])
        return done.exit_code, json.loads(path.read_text()), done.stdout

    return run


def test_table_lists_every_kernel_of_every_target(facts: Any) -> None:
    status, found, printed = facts("--targets", "sm_100", "gfx942")
    assert status == 0
    assert {(entry["target"], entry["kernel"]) for entry in found} == {
        (target, kernel) for target in ("sm_100", "gfx942") for kernel in ("inner_product_kernel", "sum_parts_kernel")
    }
    # Float64 products of sm_100 have no matrix instruction, which is said and is no fault.
    assert "fused multiply-add" in printed
    assert "v_mfma_f64_16x16x4_f64" in printed
    assert "4 specialisations compiled, 0 with a fault" in printed


def test_a_spill_or_a_failure_to_compile_fails_the_command(facts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = Config({"BLOCK_R": 128, "BLOCK_K": 128, "BLOCK_N": 16}, 2, 1)
    with monkeypatch.context() as patch:
        patch.setattr(configs, "inner_product", lambda *arguments: wide)
        status, found, _ = facts("--targets", "sm_90")
    assert status == 1
    assert any("spilled" in fault for entry in found for fault in entry["faults"])

    def fail(target: str, launch: Any) -> Any:
        message = "PassManager::run failed"
        raise RuntimeError(message)

    monkeypatch.setattr(kernels_table, "compile_for", fail)
    status, found, _ = facts("--targets", "sm_90")
    assert status == 1
    assert all(entry["faults"] == ["does not compile: PassManager::run failed"] for entry in found)
