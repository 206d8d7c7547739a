"""The tiles that each GPU architecture takes, and the torch forms of those without kernels."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import brandla
from brandla.demo import info
from brandla_kernels import OPS, _op, _targets
from brandla_kernels._targets import AMD, NVIDIA, nearest

# Tiles, or None for torch forms, and the architectures that take them.
TILES = {
    **{arch: [arch] for arch in NVIDIA + AMD},
    **{"sm_86": ["sm_86", "sm_87", "sm_88"], "sm_100": ["sm_100", "sm_103", "sm_110"], "sm_120": ["sm_120", "sm_121"]},
    **{"gfx942": ["gfx942", "gfx940", "gfx941"], None: ["sm_75", "gfx908", "gfx1100", "gfx1201"]},
}


@pytest.fixture
def use_arch(monkeypatch):
    """Return a function that makes every GPU of this process one of an architecture."""

    def use(arch):
        for module in (_op, info):
            monkeypatch.setattr(module, "architecture", lambda index: arch)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
        monkeypatch.setattr(_op, "_HAS_TRITON", True)
        for name, value in {"is_available": True, "device_count": 1, "current_device": 0}.items():
            monkeypatch.setattr(torch.cuda, name, lambda value=value: value)

    return use


@pytest.mark.parametrize(("arch", "kernels"), [("sm_103", 1), ("gfx90a", 1), ("gfx1100", 0), ("gfx1201", 0)])
def test_tensors_of_a_gpu_without_kernels_take_the_torch_form(use_arch, monkeypatch, arch, kernels):
    pytest.importorskip("triton")
    use_arch(arch)
    project, launched = OPS["project"], []
    basis, columns = torch.randn(9, 3), torch.randn(9, 2)
    expected = project.torch_form(basis, columns)
    monkeypatch.setattr(project, "launch", lambda *args: launched.append(args) or expected.clone())
    # The implementation that the dispatcher calls for tensors of a GPU.
    gpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    assert torch.equal(project.registered.redispatch(gpu, basis, columns), expected)
    assert bool(launched) == bool(kernels)


def test_kernels_cannot_be_forced_where_there_are_none(use_arch):
    for device in ("mps", "xpu"):
        assert OPS["project"].implementation(device) == ("torch", "the Triton kernels are for CUDA and ROCm")
    use_arch("gfx942")
    assert OPS["project"].implementation("cuda") == ("triton", "GPU tensors run on the Triton kernels")
    use_arch("gfx1201")
    assert OPS["project"].implementation("cuda") == ("torch", "there are no kernels for gfx1201")
    with pytest.raises(RuntimeError, match="'triton' cannot run: there are no kernels for gfx1201"):
        brandla.backend("triton").__enter__()


@pytest.mark.parametrize(("arch", "tiles"), [(arch, tiles) for tiles, archs in TILES.items() for arch in archs])
def test_an_architecture_takes_the_nearest_tiles_and_info_says_whose(use_arch, arch, tiles):
    use_arch(arch)
    own = {None: "no kernels, torch forms", arch: "compiled for it"}
    words = f"{arch}: {own.get(tiles, f'tiles of {tiles}, the nearest compiled for')}"
    assert nearest(arch) == tiles
    assert info.facts()["kernels"] == [words]
    assert f"kernels {words}" in info.as_text()


def test_info_names_what_the_kernels_are_for_without_a_gpu():
    if not torch.cuda.device_count():
        assert info.facts()["kernels"] == "for " + ", ".join(NVIDIA + AMD)


def test_an_architecture_is_named_as_its_makers_do(monkeypatch):
    properties = SimpleNamespace(major=10, minor=3, gcnArchName="gfx90a:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    architecture = _targets.architecture.__wrapped__
    monkeypatch.setattr(torch.version, "hip", None)
    assert architecture(0) == "sm_103"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert architecture(0) == "gfx90a"


WITHOUT_FLOAT64 = (
    *("damped_solve, root", "damped_solve, eigh", "damped_solve, root, diagonal", "damped_logdet, root"),
    *("damped_logdet, eigh", "damped_power, eigh", "kron_damped_solve, W", "kron_damped_solve, pair"),
    *("kron_damped_solve, W, eigh", "kron_damped_solve, pair, eigh", "kron_damped_power, eigh"),
    "kron_damped_logdet, eigh",
)


@pytest.mark.parametrize("name", WITHOUT_FLOAT64)
def test_functions_that_an_apple_gpu_can_run_make_no_tensor_of_float64(name):
    pytest.importorskip("triton")
    from bench.launches import Counter, call_of
    from brandla_kernels._kernels.ahead import target_named
    from brandla_kernels._kernels.launch import recording

    class Watcher(Counter):
        """Takes the way of a GPU, as its base class does, but with torch forms in place of kernels."""

        def _op(self, func, args):
            with self:
                return OPS[func.__name__.partition(".")[0]].torch_form(*args)

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = super().__torch_dispatch__(func, types, args, kwargs)
            for part in tree_leaves(result):
                assert not isinstance(part, Tensor) or part.dtype != torch.float64, func
            return result

    call = call_of(name, "single")
    with recording(target_named("sm_90")), brandla.backend("triton"), torch.no_grad(), Watcher("sm_90"):
        call()
