"""Every op of brandla_kernels over sizes and dtypes: as the dispatcher serves it and, on a GPU, its torch form.

Each case checks its result against float64 first and does not time a wrong one: where that is what ``torch.compile``
made, the run goes on and the result file says so. ``--full`` takes the sizes of a GPU.
"""

from functools import partial

import pytest
import torch

from bench.benches.tasks import BRANDLA, SHORT, TORCH_FORM
from bench.benches.timing import TIMER
from bench.gpu import cases
from bench.gpu.cases import FULL, TOY, Case
from bench.studies import roofline
from brandla_kernels import OPS

pytestmark = pytest.mark.benchmark(timer=TIMER)

COMPILED = "torch.compile of the torch form"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick, full = (metafunc.config.getoption(name) for name in ("quick", "full"))
    sizes = TOY if quick else FULL if full else roofline.USUAL
    by = [BRANDLA, TORCH_FORM, COMPILED] if torch.cuda.is_available() and not quick else [BRANDLA]
    found = [(case, one) for case in cases.cases(sizes) for one in by]
    metafunc.parametrize(("op_case", "by"), found, ids=[f"{case.op}-{one}-{shape(case)}" for case, one in found])


def shape(case: Case) -> str:
    """Return the sizes and dtypes of a case, as the functions have them."""
    size, words = case.size, SHORT[case.dtype]
    data = "" if case.data == case.dtype else f" {SHORT[case.data]} data"
    return f"n={size.n} r={size.r} k={size.k} {words}{data}"


def test_op(op_case, by, device, case) -> None:
    size, op, words = op_case.size, OPS[op_case.op], shape(op_case)
    sizes = {"n": size.n, "r": size.r, "k": size.k, "dtype": str(op_case.dtype).removeprefix("torch.")}
    with case(f"{op_case.op} {words}", by, function=op_case.op, shape=words, **sizes) as timed:
        call = {BRANDLA: op, TORCH_FORM: cases.forced(op)}.get(by) or device.compiled(op.torch_form)
        error, _ = cases.check(op_case, device, call)
        on_gpu = device.tensors.type == "cuda"
        inputs = cases.inputs(op_case, device) if on_gpu else [cases.operands(op_case, device)]
        timed([partial(call, *one) for one in inputs], cases.work(op_case), error=error, orthogonality=None)
