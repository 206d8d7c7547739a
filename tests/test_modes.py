"""What torch does around a call changes no result: autocast, another default device, tensors without data.

Functions that promise never to wait for the device run on meta tensors, which have no values to read.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

import brandla
from brandla.kfac import KFAC, Brand
from builders import CHOLESKY_UPDATE, assert_same, make_columns, make_root
from calls import ALL, doubled, given

# Multiplies the result of a call itself.
CALLS = ALL | {"orthonormalize, dependent": lambda x: brandla.orthonormalize(doubled(x.columns))}


@pytest.mark.parametrize("name", CALLS)
def test_autocast_and_another_default_device_change_no_bit(name: str) -> None:
    expected = CALLS[name](given())
    for around in (torch.autocast("cpu", torch.bfloat16), torch.device("meta")):
        x = given()
        with around:
            result = CALLS[name](x)
        assert_same(result, expected)


def shapes(result: Any) -> Any:
    return tree_map(lambda part: (part.shape, part.dtype), result)


@pytest.mark.parametrize("name", CALLS)
def test_meta_tensors_give_the_shapes_of_the_result(name: str) -> None:
    assert shapes(CALLS[name](given().moved("meta"))) == shapes(CALLS[name](given()))


def test_a_read_back_would_be_seen() -> None:
    with pytest.raises(RuntimeError, match="meta"):
        bool(given().moved("meta").number > 0)


@pytest.mark.parametrize("k", [8, 60], ids=["usual", "k above n - r"])
def test_the_update_by_cholesky_calls_no_decomposition_that_waits(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    def forbidden(*_: Any, **__: Any) -> Any:
        message = "a decomposition that waits for the device"
        raise AssertionError(message)

    root, columns = make_root(64, 12, dtype=torch.float32), make_columns(64, k, dtype=torch.float32)
    for name in ["eigh", "eigvalsh", "eig", "svd", "svdvals", "qr", "pinv", "matrix_rank", "lstsq"]:
        monkeypatch.setattr(torch.linalg, name, forbidden)
    assert CHOLESKY_UPDATE(brandla.track(root), columns, decay=0.9).lowrank.is_finite()


@pytest.mark.parametrize("name", ["root_update, eigh", "svd_append", "damped_solve, root, tail", "to_eigh"])
def test_fake_tensors_give_the_shapes_of_the_result(name: str) -> None:
    with FakeTensorMode() as mode:
        fake = CALLS[name](tree_map(mode.from_tensor, given()))
    assert shapes(fake) == shapes(CALLS[name](given()))


def test_what_overwrites_names_batch_dimensions_under_vmap() -> None:
    x = given(batch_shape=(3,))
    with pytest.raises(TypeError, match=r"^root_update_: root.root .*vmap .*: leading dimensions are batch"):
        torch.vmap(brandla.root_update_)(x.root, x.columns)


@pytest.mark.parametrize(
    "around", [torch.autocast("cpu", torch.bfloat16), torch.device("meta")], ids=["autocast", "on"]
)
def test_a_step_of_kfac_is_the_same_inside(around: Any) -> None:
    gradients = []
    for context in (nullcontext(), around):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.Tanh(), torch.nn.Linear(20, 18))
        preconditioner = KFAC(model, inverse=Brand(rank=4))
        for _ in range(2):
            model(torch.randn(6, 12)).square().sum().backward()
            with context:
                preconditioner.step()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert_same(*gradients)
