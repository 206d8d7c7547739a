"""The studies: exponents are recovered, short runs take the whole path, Ctrl-C keeps what is done, worse is noticed."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench import pictures, report, results, roofline, scaling, study
from bench.frame.study import Piece
from bench.gpu.ceilings import Ceilings, Work
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


def test_balance_is_one_where_products_and_bytes_bind_alike() -> None:
    ceilings = Ceilings(copy=1e10, float32=1e11, tf32=1e11, bf16=1e11, float64=5e10, samples={})
    assert roofline.balance(Work(float32=10**9, bytes=10**8), ceilings) == pytest.approx(1)
    assert roofline.balance(Work(float64=10**9, bytes=10**8), ceilings) == pytest.approx(2)
