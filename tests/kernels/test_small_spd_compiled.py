"""What the small-SPD kernel compiles to, without a GPU."""

from __future__ import annotations

import pytest
import torch

from brandla_kernels import OPS

ahead = pytest.importorskip("brandla_kernels._kernels.ahead")
launch = pytest.importorskip("brandla_kernels._kernels.launch")

pytestmark = pytest.mark.skipif(launch.interpreted(), reason="what is interpreted is not compiled")


@pytest.mark.parametrize("k", [31, 256])
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_products_are_on_matrix_units_and_registers_suffice(target: str, k: int) -> None:
    gram, scale = torch.empty(2, k, k, dtype=torch.float64), torch.empty(2, k, dtype=torch.float64)
    with launch.recording(ahead.target_named(target)) as launches:
        OPS["cholesky_inverse_core"].launch(gram, scale, 1e-12)
    assert [one.name for one in launches] == ["small_spd_kernel"]
    compiled = ahead.compile_for(target, launches[0])
    assert compiled.spills == 0
    assert compiled.matrix_instructions
    assert all("f64" in name for name in compiled.matrix_instructions)
