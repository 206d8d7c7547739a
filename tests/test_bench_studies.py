"""The studies: a short run leaves file, tables, picture and page; Ctrl-C keeps what is done; the worse is noticed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from bench import compare, report, timing
from bench.cpu import Cpu
from bench.frame import pictures, results
from bench.frame.study import INTERRUPTED, command
from bench.gpu.ceilings import Ceilings, Work
from bench.studies import accuracy, forms, kfac_images, roofline, scaling, streams
from bench.timed_case import row_of
from brandla_kernels import OPS

ROOT = Path(__file__).parents[1]
STUDIES_THAT_DRAW = (scaling, roofline, accuracy, kfac_images)
FACTS = {
    "cpu": "toy",
    "cores": 2,
    "threads": 2,
    "blas": "mkl",
    "versions": {"torch": "2"},
    "commit": "0" * 40,
    "modified": False,
    "date": "2026-01-01 00:00 UTC",
    "quick": False,
}


def run(module: Any, *options: str) -> Result:
    """Run a study's command at toy sizes."""
    app = module.app if hasattr(module, "app") else command(module.STUDY, module.__doc__)
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["--quick", *options])


@pytest.fixture(scope="module")
def short_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the studies that draw at toy sizes, and return the folder of their files."""
    folder = tmp_path_factory.mktemp("results")
    for module in STUDIES_THAT_DRAW:
        options = ["--only", "digits"] if module is kfac_images else []
        answer = run(module, "--out", str(folder / "toy"), *options)
        assert answer.exit_code == 0, answer.output
        assert "Written:" in answer.output
    return folder


def test_a_short_run_measures_everything_and_draws_it(short_runs: Path) -> None:
    found = results.read(short_runs / "toy")
    assert set(found) == {"scaling", "roofline", "accuracy", "kfac-study"}
    for name, each in found.items():
        assert each["facts"]["quick"]
        assert each["facts"]["interrupted"] is False
        assert {f"{name}-{theme.name}.png" for theme in pictures.THEMES} <= set(os.listdir(short_runs / "toy"))
    assert {row["method"] for row in found["scaling"]["rows"] if row["axis"] == "n"} == set(scaling.METHODS)
    assert {row["op"] for row in found["roofline"]["rows"]} == set(OPS)
    assert all(row["of_ceiling"][0] > 0 for row in found["roofline"]["rows"])
    assert {row["when"] for row in found["roofline"]["ceilings"]} == {"before", "after"}
    runs, settings = found["kfac-study"]["runs"], kfac_images.QUICK
    assert len(runs) == len(kfac_images.METHODS) * len(settings.seeds)
    assert all(row["finished"] for row in (*runs, *found["kfac-study"]["trials"]))


def test_no_tracker_is_better_than_the_best_of_its_rank(short_runs: Path) -> None:
    """In the norms that Eckart and Young are about."""
    rows = accuracy.settled(results.read(short_runs / "toy")["accuracy"])
    measures = [name for name in accuracy.MEASURES if name.endswith(("spectral", "trace"))]
    best = rows[rows["tracker"] == accuracy.BEST].set_index(["width", "seed", "step"])[measures]
    for tracker, own in rows.groupby("tracker"):
        assert (own.set_index(["width", "seed", "step"])[measures] >= best * (1 - 1e-4)).all(axis=None), tracker


def test_pages_and_pictures_are_made_of_the_files_and_checked(short_runs: Path, tmp_path: Path) -> None:
    page, invoke = tmp_path / "measurements.md", CliRunner().invoke
    options = ["--results", str(short_runs), "--output", str(page)]
    assert invoke(report.app, options).exit_code == 0
    texts = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.md")}
    assert set(texts) == {"measurements.md", "accuracy.md", "kfac-study.md"}
    for module, text in zip(STUDIES_THAT_DRAW, ("measurements", "measurements", "accuracy", "kfac-study"), strict=True):
        for theme in pictures.THEMES:
            shown = f"measured/toy/{module.STUDY.name}-{theme.name}.png"
            assert (tmp_path / shown).exists()
            assert shown in texts[f"{text}.md"]
    for text in texts.values():
        assert "its figures mean nothing" in text
        assert ".json`" in text
    assert all(f"### Width {width}" in texts["accuracy.md"] for width in accuracy.QUICK.widths)
    assert all(f"| {method.name} |" in texts["kfac-study.md"] for method in kfac_images.METHODS)
    assert invoke(report.app, [*options, "--check"]).exit_code == 0
    # A picture of other figures does not pass, nor does a page that was edited.
    other = results.read(short_runs / "toy")["scaling"]
    other["rows"][0]["seconds"][0] *= 2
    pictures.write("scaling", other, tmp_path / "measured" / "toy", scaling.draw)
    answer = invoke(report.app, [*options, "--check"])
    assert (answer.exit_code, "scaling-light.png is not what" in answer.stderr) == (1, True)
    (tmp_path / "accuracy.md").write_text("0.3", encoding="utf-8")
    answer = invoke(report.app, [*options, "--check"])
    assert (answer.exit_code, "accuracy.md is not what" in answer.stderr) == (1, True)


def test_without_a_result_the_pages_say_so(tmp_path: Path) -> None:
    for text in (report.page(tmp_path), accuracy.page({}), kfac_images.page({})):
        assert "Nothing has been measured yet." in text


def test_an_interrupted_file_is_marked_and_taken_up_again(short_runs: Path, tmp_path: Path) -> None:
    path = tmp_path / "accuracy.json"
    content = results.read(short_runs / "toy")["accuracy"]
    whole = [row for row in content["runs"] if row["width"] == accuracy.QUICK.widths[0]]
    started = [row for row in content["runs"] if row["width"] == accuracy.QUICK.widths[1] and row["step"] == 3]
    content["runs"] = [*whole, *started]
    content["facts"]["interrupted"] = f"runs: width {accuracy.QUICK.widths[1]}, seed 0"
    path.write_text(json.dumps(content), encoding="utf-8")
    assert "**Interrupted**" in accuracy.page({"toy": content})
    answer = run(accuracy, "--resume", "--out", str(tmp_path))
    assert answer.exit_code == 0, answer.output
    taken_up = results.read(tmp_path)["accuracy"]
    assert taken_up["facts"]["interrupted"] is False
    assert taken_up["runs"][: len(whole)] == whole
    assert [row["step"] for row in taken_up["runs"] if row["tracker"] == "B"] == 2 * accuracy.QUICK.measured
    assert taken_up["trackers"] == content["trackers"]


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [("settings", {"rank": 7}, "other settings"), ("facts", {"commit": "another"}, "other versions")],
)
def test_a_file_of_something_else_is_not_taken_up(
    part: str, change: dict[str, Any], words: str, short_runs: Path, tmp_path: Path
) -> None:
    content = results.read(short_runs / "toy")["accuracy"]
    content[part] |= change
    (tmp_path / "accuracy.json").write_text(json.dumps(content), encoding="utf-8")
    answer = run(accuracy, "--resume", "--out", str(tmp_path))
    assert answer.exit_code == 2
    assert words in answer.output


def test_a_run_is_short_or_long(tmp_path: Path) -> None:
    assert run(scaling, "--full", "--out", str(tmp_path)).exit_code == 2
    assert run(kfac_images, "--only", "cats", "--out", str(tmp_path)).exit_code == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_ctrl_c_ends_with_a_file_that_says_so(tmp_path: Path) -> None:
    source = (
        "from dataclasses import replace; from bench.frame.study import command; import bench.studies.accuracy as m;"
        " many = replace(m.QUICK, steps=100000, measure_every=5);"
        f" command(replace(m.STUDY, sizes={{'quick': many}}), '')(['--quick', '--out', {str(tmp_path)!r}])"
    )
    with subprocess.Popen(
        [sys.executable, "-u", "-c", source], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        while "seed 0" not in process.stdout.readline():
            assert process.poll() is None
        os.kill(process.pid, signal.SIGINT)
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED
    assert "--resume goes on" in printed
    assert results.read(tmp_path)["accuracy"]["facts"]["interrupted"] == "runs: width 192, seed 0"


@pytest.mark.parametrize(("module", "tables"), [(streams, ("right_vectors", "solves")), (forms, ("bases", "carried"))])
def test_studies_of_figures_alone_are_tabulated(module: Any, tables: tuple[str, ...]) -> None:
    pieces = module.pieces(True, None)
    chosen = [next(piece for piece in pieces if piece.table == table) for table in tables]
    rows = {piece.table: [{**piece.key, **row} for row in piece.measure({}, lambda share: None)] for piece in chosen}
    text = "\n".join(module.section({"facts": FACTS, **rows}, "toy"))
    assert text.count("####") == len(tables)
    assert all(str(value) in text for piece in chosen for value in piece.key.values() if module is forms)


@pytest.mark.parametrize("exponent", [1.0, 2.0, 3.0])
def test_the_fit_recovers_a_known_exponent_within_its_interval(exponent: float) -> None:
    sizes = [2**power for power in range(9, 16)]
    source, held = np.random.default_rng(0), 0
    for _ in range(200):
        noise = np.exp(0.03 * source.standard_normal(len(sizes)))
        fit = timing.slope(sizes, [size**exponent * factor for size, factor in zip(sizes, noise, strict=True)])
        # The deviation of the slope is 0.03 over the spread of log n: 0.0082. Six of them.
        assert abs(fit.value - exponent) < 0.05
        held += fit.low <= exponent <= fit.high
    # 95 % of 200, less four deviations of a binomial.
    assert held >= 190 - 4 * (200 * 0.95 * 0.05) ** 0.5


def test_exponents_are_fitted_to_the_rows_of_a_method() -> None:
    shared = {"axis": "n", "method": "torch.linalg.eigh", "r": 1, "k": 1}
    rows = [
        {**shared, "n": n, "seconds": [1e-9 * n**3] * 3, "held_bytes": n**2, "peak_bytes": 3 * n**2}
        for n in (512, 1024, 2048, 4096, 8192, 16384)
    ]
    fits = scaling.exponents({"rows": rows})["exponents"]
    assert [(fit["quantity"], fit["window"], fit["sizes"][0]) for fit in fits] == [
        ("time", "all", 512),
        ("memory", "all", 512),
        ("time", "larger half", 4096),
        ("memory", "larger half", 4096),
    ]
    assert [fit["exponent"].value for fit in fits] == pytest.approx([3, 2, 3, 2])


def test_the_cpu_is_measured_and_its_inputs_outlast_its_cache() -> None:
    device = Cpu()
    assert device.sets(1) > 1
    assert device.sets(4 * device.cache_bytes) == 1
    times = device.alternating({"one": lambda: sum(range(100)), "other": lambda: sum(range(1000))}, 0.02)
    assert len(times["one"]) == len(times["other"]) >= 5
    assert timing.of_median(times["one"]).value < timing.of_median(times["other"]).value


def test_balance_is_one_where_products_and_bytes_bind_alike() -> None:
    ceilings = Ceilings(copy=1e10, float32=1e11, tf32=1e11, bf16=1e11, float64=5e10, samples={})
    assert roofline.balance(Work(float32=10**9, bytes=10**8), ceilings) == pytest.approx(1)
    assert roofline.balance(Work(float64=10**9, bytes=10**8), ceilings) == pytest.approx(2)


# ---------------------------------------------------------------------------------------------------------------------
# Comparison with the committed results
# ---------------------------------------------------------------------------------------------------------------------

STUDIES: dict[str, dict[str, Any]] = {
    "updates": {
        "figures": [
            {"group": "update / its GEMMs", "case": "a", "value": 2.0, "low": 1.99, "high": 2.01, "unit": "×"},
            {"group": "speed", "case": "b", "value": 40.0, "low": 39.8, "high": 40.2, "unit": "×", "at_least": 30},
        ]
    },
    "scaling": {
        "rows": [
            {
                "axis": "n",
                "method": "eigh_update",
                **{"n": 1024, "r": 8, "k": 4},
                "over_reference": [2.0, 1.95, 2.05],
                "rounds": 12,
                **{"held_bytes": 100, "peak_bytes": 100},
            }
        ],
        "exponents": [],
    },
    "roofline": {
        "rows": [{"op": "project", "case": "n 1", "of_ceiling": [0.5, 0.49, 0.51], "rounds": 9, "bound_by": "copy"}],
        "ceilings": [{"ceiling": "copy", "per_second": [100.0, 99.0, 101.0]}],
    },
    "functions": {
        "rows": [
            {
                **{"group": "eigh_update n=1", "by": "brandla"},
                **{"over_reference": [0.5, 0.49, 0.51], "rounds": 9},
                **{"reference": [1.0, 0.99, 1.01], "reference_rounds": 8},
            }
        ]
    },
}
# Where each study keeps a figure, and the factor that makes it half as good.
FIGURES = {
    "updates": ("figures", 0, ("value", "low", "high"), 2.0),
    "updates, more is better": ("figures", 1, ("value", "low", "high"), 0.5),
    "scaling": ("rows", 0, "over_reference", 2.0),
    "roofline": ("rows", 0, "of_ceiling", 0.5),
    "functions": ("rows", 0, "over_reference", 2.0),
}


def changed(case: str, factor: float) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return the name of a study, and it before and after one of its figures got worse by a factor."""
    name = case.partition(",")[0]
    old = {"facts": FACTS, **STUDIES[name]}
    new = deepcopy(old) | {"facts": FACTS | {"commit": "1" * 40}}
    rows, index, keys, worse = FIGURES[case]
    times = worse ** np.log2(factor)
    row = new[rows][index]
    if isinstance(keys, tuple):
        row.update({key: times * row[key] for key in keys})
    else:
        row[keys] = [times * value for value in row[keys]]
    return name, old, new


def run_compare(folder: Path, name: str, old: dict[str, Any], new: dict[str, Any]) -> int:
    for place, content in (("old", old), ("new", new)):
        target = folder / place / "toy"
        target.mkdir(parents=True, exist_ok=True)
        (target / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return compare.main(["--old", str(folder / "old"), "--new", str(folder / "new")])


@pytest.mark.parametrize("case", FIGURES)
def test_a_figure_that_got_worse_is_a_regression(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_compare(tmp_path, *changed(case, 1.4)) == 1
    assert "1 of" in (said := capsys.readouterr().out)
    assert "regression" in said


@pytest.mark.parametrize("factor", [1.05, 1 / 1.4], ids=["noise", "better"])
@pytest.mark.parametrize("case", FIGURES)
def test_noise_and_what_got_better_are_none(
    case: str, factor: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_compare(tmp_path, *changed(case, factor)) == 0
    assert "0 of" in capsys.readouterr().out


def test_a_change_within_the_intervals_is_none(tmp_path: Path) -> None:
    name, old, new = changed("scaling", 1.4)
    new["rows"][0]["over_reference"][1] = 2.0
    assert run_compare(tmp_path, name, old, new) == 0


@pytest.mark.parametrize("run", [0, 1], ids=["old", "new"])
def test_a_change_is_none_where_the_reference_scattered_in_either_run(run: int, tmp_path: Path) -> None:
    name, *runs = deepcopy(changed("functions", 1.4))
    assert run_compare(tmp_path, name, *runs) == 1
    runs[run]["rows"][0]["reference"] = [1.0, 0.9, 1.1]
    assert run_compare(tmp_path, name, *runs) == 0


def test_ceilings_that_differ_before_and_after_widen_the_noise(tmp_path: Path) -> None:
    name, old, new = changed("roofline", 1.4)
    new["ceilings"].append({"ceiling": "copy", "per_second": [80.0, 79.0, 81.0]})
    assert run_compare(tmp_path, name, old, new) == 0


@pytest.mark.parametrize("scatter", [0.01, 0.2])
def test_two_runs_of_the_same_are_not_told_apart_and_twice_the_noise_is(scatter: float) -> None:
    source = np.random.default_rng(0)

    def measured(count: int, seconds: float) -> list[float]:
        # All calls of a run are off together by as much as single ones are: more than rounds alone can tell.
        together, each = source.standard_normal(), source.standard_normal(count)
        return list(seconds * np.exp(scatter * (together + each)))

    def run(factor: float) -> dict[str, Any]:
        counts = [8 * (case % 12 + 1) for case in range(500)]
        rows = [row_of(measured(count, factor), measured(8, 1.0), 1.0) for count in counts]
        return {"rows": [{"group": str(case), "by": "brandla", **row} for case, row in enumerate(rows)]}

    first = run(1.0)
    again = list(compare.changes("functions", first, run(1.0), 0.0))
    # Four deviations leave 3e-5 on one side: of 500, one with 2 %, two with 0.01 %.
    assert sum(one.regression for one in again) <= 1
    noise = max(one.noise for one in again)
    slower = compare.changes("functions", first, run((1 + noise) ** 2), 0.0)
    assert all(one.regression for one in slower)


def test_more_memory_is_a_regression(tmp_path: Path) -> None:
    name, old, new = changed("scaling", 1.0)
    new["rows"][0]["peak_bytes"] = 200
    assert run_compare(tmp_path, name, old, new) == 1


def test_short_runs_and_files_that_are_the_same_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, old, new = changed("roofline", 2.0)
    assert run_compare(tmp_path, name, old, old) == 0
    assert "not measured anew" in capsys.readouterr().out
    new["facts"] = new["facts"] | {"quick": True}
    assert run_compare(tmp_path, name, old, new) == 0
    assert "short one" in capsys.readouterr().out
