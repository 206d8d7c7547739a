"""``make gpu`` without a GPU: the stages at toy sizes, and faults that must not hide other results."""

import ctypes
import faulthandler
import json
import multiprocessing
import os
import re
import time

import pytest
import torch
from typer.testing import CliRunner

from bench import report
from bench.benches.timing import Interval
from bench.gpu import __main__ as command
from bench.gpu import cases, frame, functions, programs, tune
from bench.gpu.__main__ import STAGES, Stage, app
from bench.gpu.cases import FULL, TOY
from bench.gpu.device import Ceilings, Stub, Work
from bench.gpu.frame import Findings
from brandla_kernels import OPS

pytest.importorskip("triton")
# A process of pytest has threads, but none of them holds a lock during a fork.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def _forked(monkeypatch):
    """Fork this process, so that processes start at once and have the stages that a test has replaced."""
    # A forked process would wait for the thread of pytest's watchdog.
    faulthandler.cancel_dump_traceback_later()
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(context, "set_forkserver_preload", lambda names: None, raising=False)
    monkeypatch.setattr(command, "CONTEXT", context)


def dry(folder, only, *options):
    """Run stages, and return the exit status and the sections of the result file."""
    done = CliRunner().invoke(app, ["--dry-run", "--only", only, "--out", str(folder), *options])
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done.exit_code, json.loads((folder / "gpu.json").read_text(encoding="utf-8"))["sections"]


# --- Stages


def test_every_stage_runs_dry_and_is_written_and_answers_on_the_page_of_a_gpu(tmp_path):
    folder = tmp_path / "some-gpu"
    status, sections = dry(folder, "smoke,ceilings,core,ops")
    assert status == 0
    assert {name: section["status"] for name, section in sections.items()} == dict.fromkeys(sections, "done")
    assert {row["op"] for row in sections["smoke"]["tables"]["smoke"]} == set(OPS)
    assert {row["op"] for row in sections["core"]["tables"]["rows"]} == set(cases.SMALL)
    assert "no figure here is a gpu figure" in (folder / "gpu.txt").read_text(encoding="utf-8").lower()
    study = json.loads((folder / "gpu.json").read_text(encoding="utf-8"))
    name = {"name": "Some GPU", "architecture": "sm_90", "driver_version": "1", "cuda": "13.0", "hip": None}
    study["facts"]["gpu"] = name
    (folder / "gpu.json").write_text(json.dumps(study), encoding="utf-8")
    page = "\n".join(report.page_parts("gpu", report.machines_of(tmp_path)))
    assert "ops reach at least half of the ceiling that binds them" in page
    assert "`gpu.json`: Some GPU" in page
    assert re.search(r"\| `\w+` \| .*, float32 \|", page)


@pytest.mark.parametrize(
    ("name", "stage", "case", "table"),
    [
        ("profile", functions.profile, "root_update", "updates"),
        ("graph", functions.graphs, None, "captured"),
        ("tune", tune.run, None, "tiles"),
    ],
)
def test_a_stage_finds_something_and_leaves_nothing_out(name, stage, case, table, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "NAMES", ["rotate"])
    stage(Findings(tmp_path / "gpu.jsonl", name, Stub(), 600, case))
    section = frame.sections(tmp_path / "gpu.jsonl")[name]
    assert section["failures"] == section["skipped"] == []
    assert table in section["tables"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tests", "sanitizer"])
def test_stages_that_start_programs_run_dry(name, tmp_path):
    _, sections = dry(tmp_path, name)
    assert sections[name]["failures"] == []
    assert sections[name]["tables"] != {}


def test_outcomes_of_tests_are_counted_as_far_as_they_came():
    output = "[gw1] [ 10%] PASSED tests/a.py::one[x] \n[gw0] [ 20%] FAILED tests/a.py::two \ntests/a.py::three "
    assert programs.count_outcomes(output) == {"passed": 1, "failed": 1, "error": 0, "skipped": 0}
    assert programs.count_outcomes("tests/a.py::one PASSED  [50%]\n")["passed"] == 1


# --- Faults


class Faulty(Stub):
    """A device that an illegal access poisons for good, like a GPU for its process."""

    poisoned = False

    def synchronize(self):
        if self.poisoned:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


FAULTS = {
    "good": lambda found: found.row("table", case="good"),
    "raises": lambda found: 1 / 0,
    "poisons": lambda found: setattr(found.device, "poisoned", True),
    "crashes": lambda found: ctypes.string_at(0),
    "hangs": lambda found: time.sleep(60),
    "after": lambda found: found.row("table", case="after"),
}


def faults(found):
    for name, fault in FAULTS.items():
        found.attempt(name, 0, fault, found)


@pytest.mark.parametrize("apart", [False, True])
def test_no_fault_hides_another_case(apart, tmp_path, monkeypatch):
    """Faults are an exception, a poisoned device, a crash and a hang, in one process after another or in one each."""
    monkeypatch.setattr(frame, "Stub", Faulty)
    monkeypatch.setattr(frame, "HANG", 1.0)
    stage = Stage(faults, 60, (lambda dry: [*FAULTS]) if apart else None, together=2)
    monkeypatch.setitem(STAGES, "ops", stage)
    monkeypatch.setitem(STAGES, "core", Stage(lambda found: found.row("table", case="another stage"), 60))
    status, sections = dry(tmp_path, "ops,core")
    failed = {failure["case"]: failure for failure in sections["ops"]["failures"]}
    assert status == 1
    assert set(failed) == {"raises", "poisons", "crashes", "hangs"}
    assert "ZeroDivisionError" in failed["raises"]["error"]
    assert "illegal memory access" in failed["poisons"]["error"]
    assert "faults" in failed["crashes"]["traceback"]
    assert "Timeout" in failed["hangs"]["traceback"]
    assert {row["case"] for row in sections["ops"]["tables"]["table"]} == {"good", "after"}
    assert sections["core"]["status"] == "done"


def test_a_run_that_is_cut_off_leaves_a_report(tmp_path, monkeypatch):
    """A run that is killed has written every finding, and its report names the stages that it did not reach."""
    monkeypatch.setitem(STAGES, "ops", Stage(faults, 60))
    context = multiprocessing.get_context("fork")
    run = context.Process(target=dry, args=(tmp_path, "ceilings,ops,tune"))
    run.start()
    end, report_file = time.monotonic() + 60, tmp_path / "gpu.txt"
    while time.monotonic() < end and not (report_file.exists() and "ZeroDivision" in report_file.read_text("utf-8")):
        time.sleep(0.05)
    run.kill()
    run.join()
    text = report_file.read_text(encoding="utf-8")
    assert "Ceilings: bytes of a copy" in text
    assert "FAILED raises: ZeroDivisionError" in text
    assert "cut off: ops, tune" in text
    assert json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["sections"]["tune"]["status"] == "cut off"


def test_an_unfinished_line_is_left_out_and_a_case_without_time_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Stub, "dry", False)
    found = Findings(tmp_path / "gpu.jsonl", "ops", Stub(), 1)
    found.row("table", case="whole")
    found.attempt("long", 5, os.abort)
    with found.path.open("a", encoding="utf-8") as file:
        file.write('{"stage": "ops", "kind": "no')
    section = frame.sections(found.path)["ops"]
    assert section["tables"] == {"table": [{"case": "whole"}]}
    assert section["skipped"] == ["long: 1 s left, 5 s wanted"]


def test_without_time_stages_are_skipped_and_named(tmp_path):
    status, sections = dry(tmp_path, "ceilings,graph", "--minutes", "0.1")
    assert status == 0
    assert [section["status"] for section in sections.values()] == ["skipped", "skipped"]
    assert all("wanted" in section["skipped"][0] for section in sections.values())


# --- The command and the checks


def test_impossible_runs_are_refused_and_a_dry_run_writes_nothing_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("OUT", str(tmp_path))
    for options, code, words in (
        ([], 2, "--dry-run"),
        (["--only", "ops,speed"], 2, "speed"),
        (["--dry-run", "--only", "ceilings"], 0, ""),
    ):
        done = CliRunner().invoke(app, options)
        assert (done.exit_code, words in done.stderr) == (code, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_a_cost_and_a_wrong_result_is_not_timed(name):
    for sizes in (FULL, TOY):
        case = next(case for case in cases.cases(sizes) if case.op == name)
        assert min(cases.cost(case)) > 0
        assert sum(cases.work(case)[:3]) <= cases.cost(case).flops
    cases.check(case, Stub())

    def slightly_off(*arguments):
        found = cases.results_of(OPS[name], arguments)
        for part in found:
            part.copy_(part * 1.001 if part.is_floating_point() else part)
        return found

    with pytest.raises(AssertionError, match="relative error"):
        cases.check(case, Stub(), slightly_off)


def test_the_floor_is_set_by_the_slower_of_products_and_copy():
    ceilings = Ceilings(*(Interval(rate, rate, rate) for rate in (1e12, 5e13, 3e14, 8e14, 6e13)))
    assert ceilings.accurate == 1e14
    assert ceilings.floor(Work(float32=10**14, bytes=10**11)) == (1.0, "float32 products")
    assert ceilings.floor(Work(float64=6 * 10**13, float32=10**13, bytes=10**11)) == (1.1, "float64 products")
    assert ceilings.floor(Work(float32=10**13, bytes=10**12)) == (1.0, "copy")


def test_a_choice_of_tiles_is_seen_and_replaced_within_its_registers():
    device, case = Stub(), next(case for case in cases.cases(TOY) if case.op == "project")
    arguments, launch = cases.operands(case, device), OPS["project"].launch
    with tune.choosing({}) as made:
        shipped = device.recorded(launch, *arguments)
    choice = next(choice for choice in made if choice.startswith("inner_product("))
    limited = made[choice]._replace(registers=200)
    assert all(config.options["maxnreg"] == 200 for config in tune.neighbours(choice, limited))
    other = made[choice]._replace(num_warps=8)
    assert other in tune.neighbours(choice, made[choice])
    with tune.choosing({choice: other}):
        replaced = device.recorded(launch, *arguments)
    assert [one.config.num_warps for one in shipped[:1] + replaced[:1]] == [made[choice].num_warps, 8]
    assert device.recorded(launch, *arguments)[0].config == shipped[0].config
