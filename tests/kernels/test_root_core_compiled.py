"""What the kernel of `root_core` compiles to, without a GPU."""

from __future__ import annotations

import pytest
import torch

from brandla_kernels import OPS

ahead = pytest.importorskip("brandla_kernels._kernels.ahead")
launch = pytest.importorskip("brandla_kernels._kernels.launch")

pytestmark = pytest.mark.skipif(launch.interpreted(), reason="what is interpreted is not compiled")


@pytest.mark.parametrize(("r", "k", "rank", "tol"), [(1, 1, 1, 0.1), (20, 12, 32, 0.0), (128, 64, 128, 0.1)], ids=str)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_products_are_on_matrix_units_and_registers_suffice(target: str, r: int, k: int, rank: int, tol: float) -> None:
    gram, numbers = torch.empty(2, r, r), torch.empty(2, dtype=torch.float64)
    cross, own = (torch.empty(2, rows, k, dtype=torch.float64) for rows in (r, k))
    with launch.recording(ahead.target_named(target)) as launches:
        OPS["root_core"].launch(gram, cross, own, numbers, numbers, rank, tol, tol == 0)
    assert [one.name for one in launches] == ["root_core_kernel"]
    compiled = ahead.compile_for(target, launches[0])
    assert ahead.faults(compiled) == []
    assert compiled.matrix_instructions
    assert all("f64" in name for name in compiled.matrix_instructions)
