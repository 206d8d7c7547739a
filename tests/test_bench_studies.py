"""The studies: exponents are recovered, short runs take the whole path, Ctrl-C keeps what is done, worse is noticed."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from bench import compare, pictures, report, results, roofline, scaling, study, timing
from bench.cpu import Cpu
from bench.gpu.device import Ceilings, Work
from bench.study import Piece
from bench.timed_case import row_of
from brandla_kernels import OPS

QUIET = Console(quiet=True)
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


@pytest.fixture(scope="module")
def short_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run both studies at toy sizes, and return the folder of their files."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        for module in (scaling, roofline):
            name = module.__name__.rpartition(".")[2]
            patch.setattr("sys.argv", [name, "--quick", "--out", str(folder / "toy")])
            module.main()
    return folder


def test_a_short_run_measures_every_method_and_op(short_runs: Path) -> None:
    found = results.read(short_runs / "toy")
    growth, roof = found["scaling"], found["roofline"]
    assert {row["method"] for row in growth["rows"] if row["axis"] == "n"} == set(scaling.METHODS)
    assert {row["op"] for row in roof["rows"]} == set(OPS)
    for each in (growth, roof):
        assert each["facts"]["quick"]
        assert not each["facts"]["interrupted"]
    assert all(row["of_ceiling"][0] > 0 for row in roof["rows"])


def test_page_and_pictures_are_made_of_the_files_and_checked(
    short_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "measurements.md"
    command = ["report", "--results", str(short_runs), "--output", str(page)]
    monkeypatch.setattr("sys.argv", command)
    report.main()
    shown = sorted(path.name for path in tmp_path.glob("measured/toy/*.png"))
    assert shown == ["roofline-dark.png", "roofline-light.png", "scaling-dark.png", "scaling-light.png"]
    assert all(f"measured/toy/{name}" in page.read_text(encoding="utf-8") for name in shown)
    monkeypatch.setattr("sys.argv", [*command, "--check"])
    report.main()
    # A picture of other figures does not pass.
    other = json.loads((short_runs / "toy" / "scaling.json").read_text(encoding="utf-8"))
    other["rows"][0]["seconds"][0] *= 2
    pictures.write("scaling", other, tmp_path / "measured" / "toy")
    with pytest.raises(SystemExit, match=r"scaling-light\.png does not show"):
        report.main()


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
    shared = {"axis": "n", "method": "torch.linalg.eigh"}
    fits = list(
        scaling.exponents(
            [
                {**shared, "n": n, "seconds": [1e-9 * n**3] * 3, "held_bytes": n**2, "peak_bytes": 3 * n**2}
                for n in (512, 1024, 2048, 4096, 8192, 16384)
            ]
        )
    )
    assert [(fit["quantity"], fit["window"], fit["sizes"][0]) for fit in fits] == [
        ("time", "all", 512),
        ("memory", "all", 512),
        ("time", "larger half", 4096),
        ("memory", "larger half", 4096),
    ]
    assert [fit["exponent"].value for fit in fits] == pytest.approx([3, 2, 3, 2])


def test_ctrl_c_keeps_what_was_finished_and_says_so() -> None:
    def second() -> Iterator[dict[str, Any]]:
        signal.raise_signal(signal.SIGINT)
        yield {"piece": 2}

    pieces = [
        Piece("first", 1.0, lambda: [{"piece": 1}]),
        Piece("second", 1.0, second),
        Piece("third", 1.0, lambda: [{"piece": 3}]),
    ]
    assert study.run(pieces, QUIET) == ([{"piece": 1}, {"piece": 2}], True)
    assert study.run(pieces[:1], QUIET) == ([{"piece": 1}], False)


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
