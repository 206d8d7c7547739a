"""Kernel tests that run on a GPU or, with TRITON_INTERPRET=1 in the environment, in Triton's interpreter on a CPU.

The tests of `test_ops_on_kernels.py` hold for torch forms too, and elsewhere run on torch forms.
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
    """The device that the kernels, or the torch forms, run on."""
    return torch.device("cuda" if ON_KERNELS and not INTERPRETED else "cpu")


@pytest.fixture(autouse=True, scope="session")
def _faster_interpreter():
    """Save more than a third of the interpreter's time.

    The interpreter patches the modules of Triton's language at each launch and again, to no effect, at each call of a
    function within a kernel. For each look-up of a dtype it builds a table of all dtypes. Here it does both once.
    """
    if not INTERPRETED:
        yield
        return
    import triton.language
    from triton.runtime import interpreter

    modules = {"tl": triton.language, "core": triton.language.core}
    interpreter._patch_lang(SimpleNamespace(__globals__=modules))
    look_up, cache = interpreter._get_np_dtype, {}

    def cached(dtype):
        if dtype.name not in cache:
            cache[dtype.name] = look_up(dtype)
        return cache[dtype.name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", lambda function: SimpleNamespace(restore=lambda: None))
        patch.setattr(interpreter, "_get_np_dtype", cached)
        yield


@pytest.fixture(autouse=True)
def on_kernels(monkeypatch):
    """Run every op on its kernel if it has one, and compute small cores in float64 on every GPU, as torch forms do."""
    if not ON_KERNELS:
        yield
        return
    monkeypatch.setattr("brandla_kernels._kernels.launch.WEAK_FLOAT64", ())
    with brandla.backend("triton"):
        yield


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fill memory for results with NaN, which shows every element that no program writes."""

    def filled(allocate):
        def call(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            # Hide this from dispatch modes: a launcher that fills its memory would get no plan.
            with torch._C._DisableTorchDispatch():
                return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return call

    monkeypatch.setattr(torch, "empty", filled(torch.empty))
    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", filled(Tensor.new_empty))


@pytest.fixture
def _weak_float64(device, monkeypatch):
    """Treat the device as one with slow float64, which computes small cores of float32 factors in float32."""
    from brandla_kernels._kernels import launch

    monkeypatch.setattr(launch, "WEAK_FLOAT64", (launch.target_of(torch.empty(0, device=device)).arch,))


@pytest.fixture
def _overflow_is_meant():
    """The interpreter computes with NumPy, which warns of values that the kernel then looks for."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        yield
