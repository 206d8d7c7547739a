"""The cost and the needs of importing the library."""

import importlib
import subprocess
import sys

import pytest

HEAVY = (
    *("triton", "numpy", "scipy", "sklearn", "pandas", "matplotlib", "rich", "typer", "torch._inductor"),
    *("torch._dynamo", "torch.distributed.tensor", "brandla.kfac", "brandla.cli"),
)
STATEMENTS = (
    "import brandla_kernels",
    "import brandla",
    "brandla.eigh_update(brandla.LowRankEigh.zeros(9, 2), torch.ones(9, 1))",
)


def test_imports_and_a_call_add_no_heavy_module_to_torch():
    """The kernels stand alone; and plain tensors import no DTensor."""
    look = "print(*(set(sys.modules) - before)); before = set(sys.modules)"
    program = "; ".join(["import sys, torch; before = set(sys.modules)", *(f"{one}; {look}" for one in STATEMENTS)])
    answer = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    kernels, library, call = (set(line.split()) for line in answer.stdout.splitlines())
    assert "brandla_kernels" in kernels
    assert not {name for name in kernels if name.split(".")[0] == "brandla"}
    assert "brandla" in library
    for module in HEAVY:
        assert not {name for name in kernels | library | call if f"{name}.".startswith(f"{module}.")}


@pytest.mark.parametrize("name", ["brandla", "brandla.kfac"])
def test_dir_shows_the_public_names_alone(name):
    module = importlib.import_module(name)
    assert dir(module) == sorted(module.__all__)
