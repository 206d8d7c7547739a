"""Kernel tests that run on a GPU or, with TRITON_INTERPRET=1 in the environment, in Triton's interpreter on a CPU.

Those of `test_ops_on_kernels.py` hold for torch forms too, and run on these elsewhere.
"""

import importlib.util
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

import brandla

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_KERNELS = importlib.util.find_spec("triton") is not None and (INTERPRETED or torch.cuda.is_available())

if not ON_KERNELS:
    # Triton decides at its import whether it interprets, so these tests need a process of their own: `make interpret`.
    collect_ignore_glob = ["test_[!o]*.py"]


@pytest.fixture
def device():
    """Where the kernels run, or the torch forms."""
    return torch.device("cuda" if ON_KERNELS and not INTERPRETED else "cpu")


@pytest.fixture(autouse=True, scope="session")
def _interpreter_does_once_what_it_repeats():
    """Spare the interpreter more than a third of its time.

    It puts its own functions into the modules of Triton's language for each launch and again, to no effect, at each
    call of a function within the kernel. And it makes a table of all dtypes whenever it looks one up.
    """
    if not INTERPRETED:
        yield
        return
    import triton.language
    from triton.runtime import interpreter

    modules = {"tl": triton.language, "core": triton.language.core}
    interpreter._patch_lang(SimpleNamespace(__globals__=modules))
    look_up, known = interpreter._get_np_dtype, {}

    def looked_up(dtype):
        if dtype.name not in known:
            known[dtype.name] = look_up(dtype)
        return known[dtype.name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", lambda function: SimpleNamespace(restore=lambda: None))
        patch.setattr(interpreter, "_get_np_dtype", looked_up)
        yield


@pytest.fixture(autouse=True)
def on_kernels(monkeypatch):
    """Run every op that has a kernel on it, and small cores in float64 on every GPU, as the torch forms have them."""
    if not ON_KERNELS:
        yield
        return
    monkeypatch.setattr("brandla_kernels._kernels.launch.WEAK_FLOAT64", ())
    with brandla.backend("triton"):
        yield


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fill what is allocated for results with NaN: an element that no program writes shows."""

    def filled(allocate):
        def call(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            # Unseen by dispatch modes: a launcher that fills what it allocates has no plan.
            with torch._C._DisableTorchDispatch():
                return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return call

    monkeypatch.setattr(torch, "empty", filled(torch.empty))
    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", filled(Tensor.new_empty))


@pytest.fixture
def _weak_float64(device, monkeypatch):
    """Take the device for one whose float64 is slow: small cores of float32 factors are in float32 there."""
    from brandla_kernels._kernels import launch

    monkeypatch.setattr(launch, "WEAK_FLOAT64", (launch.target_of(torch.empty(0, device=device)).arch,))


@pytest.fixture
def _overflow_is_meant():
    """The interpreter computes with NumPy, which warns of what a kernel then looks for."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        yield
