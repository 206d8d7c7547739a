"""What importing the library costs and needs."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

HEAVY = ["triton", "scipy", "sklearn", "pandas", "matplotlib", "rich", "typer", "torch._inductor", "torch._dynamo"]


def modules_added(statement: str) -> set[str]:
    """Return the modules a statement adds in a fresh interpreter that has imported torch."""
    program = f"import sys, torch; before = set(sys.modules); {statement}; print(*(set(sys.modules) - before))"
    answer = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return set(answer.stdout.split())


@pytest.fixture(scope="module")
def added_by_import() -> set[str]:
    return modules_added("import brandla")


@pytest.mark.parametrize("module", [*HEAVY, "numpy", "brandla.kfac", "brandla.cli"])
def test_import_adds_no_heavy_module_to_torch(added_by_import: set[str], module: str) -> None:
    assert not {name for name in added_by_import if name == module or name.startswith(f"{module}.")}


def test_kernels_import_alone() -> None:
    added = modules_added("import brandla_kernels")
    assert "brandla_kernels" in added
    assert not {name for name in added if name.split(".")[0] == "brandla"}


def test_every_public_name_exists() -> None:
    import brandla

    names = {
        "LowRankEigh LowRankRoot LowRankSVD Rank Tracked track Centred centre merge keep_dtype",
        "root_update root_update_ eigh_update eigh_update_ eigh_downdate eigh_refresh svd_update svd_append",
        "orthonormalize randomized_eigh randomized_svd",
        "damped_solve damped_power kron_damped_solve grouped backend checked",
    }
    public = {name for line in names for name in line.split()}
    assert public <= set(brandla.__all__)
    assert all(hasattr(brandla, name) for name in brandla.__all__)


@pytest.mark.parametrize("name", ["brandla", "brandla.kfac"])
def test_dir_shows_the_public_names_alone(name: str) -> None:
    module = importlib.import_module(name)
    assert dir(module) == sorted(module.__all__)
