"""``make gpu`` on a machine without a GPU: every section takes its path at toy sizes, and says what it left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bench.gpu.findings import Bench, Deadline, Findings

from bench import report
from bench.gpu import cases, tune
from bench.gpu.__main__ import SECTIONS, main
from bench.gpu.cases import FULL, TOY
from bench.gpu.device import Ceilings, Stub, Work
from brandla_kernels import OPS

# Each starts a Python of its own.
IN_PROCESSES = ("tests", "sanitizer")


def test_every_section_runs_dry_and_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("triton")
    names = [name for name in SECTIONS if name not in IN_PROCESSES]
    assert main(["--dry-run", "--only", ",".join(names), "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert written["facts"]["quick"] is True
    assert {name: section["status"] for name, section in written["sections"].items()} == dict.fromkeys(names, "done")
    assert "no figure here is a gpu figure" in capsys.readouterr().out.lower()
    assert "no figure here is a gpu figure" in (tmp_path / "gpu.txt").read_text(encoding="utf-8").lower()


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_PROCESSES)
def test_sections_in_processes_run_dry(name: str, tmp_path: Path):
    assert main(["--dry-run", "--only", name, "--out", str(tmp_path)]) == 0
    section = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["sections"][name]
    assert section["failures"] == []
    assert section["tables"] != {}


def test_a_dry_run_writes_nothing_unless_told_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    assert main(["--dry-run", "--only", "ceilings"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_without_time_sections_are_skipped_and_named(tmp_path: Path):
    assert main(["--dry-run", "--only", "ceilings,graph", "--minutes", "0.1", "--out", str(tmp_path)]) == 0
    sections = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["sections"]
    assert [section["status"] for section in sections.values()] == ["skipped", "skipped"]
    assert all("wanted" in section["skipped"][0] for section in sections.values())


def test_a_section_that_fails_is_recorded_and_the_rest_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(bench: Bench, found: Findings, time: Deadline) -> None:
        raise ValueError("broken")

    monkeypatch.setitem(SECTIONS, "graph", SECTIONS["graph"]._replace(run=fail))
    assert main(["--dry-run", "--only", "graph,ceilings", "--out", str(tmp_path)]) == 1
    sections = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["sections"]
    assert sections["ceilings"]["status"] == "done"
    assert "ValueError: broken" in sections["graph"]["failures"][0]["traceback"]


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    assert "--dry-run" in capsys.readouterr().err


def test_an_unknown_section_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["--only", "ops,speed"])
    assert "speed" in capsys.readouterr().err


def test_every_op_has_a_case_and_a_cost():
    assert cases.unknown() == []
    for sizes in (FULL, TOY):
        assert {case.op for case in cases.cases(sizes)} == set(OPS)
        for case in cases.cases(sizes):
            assert min(cases.cost(case)) > 0
            assert sum(cases.work(case)[:3]) <= cases.cost(case).flops


@pytest.mark.parametrize("name", OPS)
def test_a_wrong_result_is_not_timed(name: str, monkeypatch: pytest.MonkeyPatch):
    case, results = next(case for case in cases.cases(TOY) if case.op == name), cases.results
    cases.check(case, Stub())

    def slightly_off(case, call, arguments):
        found = results(case, call, arguments)
        return (
            tuple(part * 1.001 if part.is_floating_point() else part for part in found) if call is OPS[name] else found
        )

    monkeypatch.setattr(cases, "results", slightly_off)
    with pytest.raises(AssertionError, match="relative error"):
        cases.check(case, Stub())


def test_the_floor_is_set_by_the_slower_of_products_and_copy():
    ceilings = Ceilings(copy=1e12, float32=5e13, tf32=3e14, bf16=8e14, float64=6e13, samples={})
    assert ceilings.accurate == 1e14
    assert ceilings.floor(Work(float32=10**14, bytes=10**11)) == (1.0, "float32 products")
    assert ceilings.floor(Work(float64=6 * 10**13, float32=10**13, bytes=10**11)) == (1.1, "float64 products")
    assert ceilings.floor(Work(float32=10**13, bytes=10**12)) == (1.0, "copy")


def test_a_choice_of_tiles_is_seen_and_replaced():
    pytest.importorskip("triton")
    device, case = Stub(), next(case for case in cases.cases(TOY) if case.op == "project")
    arguments, launch = cases.operands(case, device), OPS["project"].launch
    with tune.choosing({}) as made:
        shipped = device.recorded(launch, *arguments)
    choice = next(choice for choice in made if choice.function == "inner_product")
    other = made[choice]._replace(num_warps=8)
    assert other in tune.neighbours(choice, made[choice])
    with tune.choosing({choice: other}):
        replaced = device.recorded(launch, *arguments)
    assert [one.config.num_warps for one in shipped[:1] + replaced[:1]] == [made[choice].num_warps, 8]
    assert device.recorded(launch, *arguments)[0].config == shipped[0].config


def test_a_result_file_becomes_a_section_of_the_measurements(tmp_path: Path):
    folder = tmp_path / "some-gpu"
    assert main(["--dry-run", "--only", "ceilings,ops", "--out", str(folder)]) == 0
    study = json.loads((folder / "gpu.json").read_text(encoding="utf-8"))
    name = {"name": "Some GPU", "architecture": "sm_90", "driver_version": "1", "cuda": "13.0", "hip": None}
    study["facts"]["gpu"] = name
    (folder / "gpu.json").write_text(json.dumps(study), encoding="utf-8")
    page = report.page(tmp_path)
    assert "## Some GPU" in page
    assert "part of the ceiling that binds" in page
    assert "| project |" in page
