"""What torch does around a call changes no result: autocast, another default device, vmap, tensors without data.

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
import brandla_kernels
from brandla.kfac import KFAC, Brand
from brandla.orthonormal import _signs
from builders import CHOLESKY_UPDATE, make_columns, make_root
from calls import WAITING, WITHOUT_WAITING, Call, Given, doubled, given, in_full
from test_values import assert_same


def seeded(x: Given) -> torch.Generator | None:
    return None if x.columns.is_meta else torch.Generator("cpu").manual_seed(0)


def stream(x: Given) -> brandla.Centred:
    start = brandla.centre(x.svd._replace(U=0 * x.svd.U, S=0 * x.svd.S, Vh=x.svd.Vh[..., :0]))
    return brandla.svd_append(brandla.svd_append(start, x.columns), x.block, decay=0.9)


OTHERS: dict[str, Call] = {
    "randomized_eigh": lambda x: brandla.randomized_eigh(x.square, 3, oversample=4, generator=seeded(x)),
    "randomized_svd": lambda x: brandla.randomized_svd(x.block, 3, oversample=1, generator=seeded(x)),
    "randomized_svd, of a value": lambda x: brandla.randomized_svd(x.svd, 3, oversample=1, generator=seeded(x)),
    "svd_append, again": lambda x: brandla.svd_append(brandla.svd_append(x.svd, x.columns), x.columns),
    "eigh_update, again": lambda x: brandla.eigh_update(brandla.eigh_update(x.eigh, x.columns), x.columns),
    "centred": lambda x: (c := stream(x), c.transform(x.columns), c.explained_variance(), c.explained_variance_ratio()),
    "inverse_transform": lambda x: stream(x).inverse_transform(stream(x).transform(x.columns)),
    "merge": lambda x: brandla.merge(stream(x), stream(x), rank=5),
    "damped_power, root": lambda x: brandla.damped_power(x.root, x.columns, 0.1, -0.5, tail=0.2),
    "dense": lambda x: [value.dense() for value in (x.eigh, x.root, x.svd)],
    "products": lambda x: [x.eigh @ x.columns, x.root @ x.columns, x.svd.mT @ x.columns],
    "traces": lambda x: [x.eigh.trace(), x.root.trace(), x.eigh.largest_eigenvalue()],
    "from_eigh": lambda x: brandla.LowRankRoot.from_eigh(x.eigh),
    "zeros": lambda x: brandla.LowRankEigh.zeros(3, 2, device=x.columns.device),
    "gram": lambda x: [brandla_kernels.gram(x.columns), brandla_kernels.project(x.block, x.columns)],
    "kernels": lambda x: [torch.ops.brandla.gram(x.columns), torch.ops.brandla.project(x.block, x.columns)],
}
ALL = WITHOUT_WAITING | WAITING | OTHERS
# Multiplies the result of a call itself.
ALL["orthonormalize, dependent"] = lambda x: brandla.orthonormalize(doubled(x.columns))


@pytest.mark.parametrize("name", ALL)
def test_autocast_and_another_default_device_change_no_bit(name: str) -> None:
    expected = ALL[name](given())
    for around in (torch.autocast("cpu", torch.bfloat16), torch.device("meta")):
        x = given()
        _signs.cache_clear()
        with around:
            result = ALL[name](x)
        assert_same(result, expected)


def shapes(result: Any) -> Any:
    return tree_map(lambda part: (part.shape, part.dtype), result)


@pytest.mark.parametrize("name", ALL)
def test_meta_tensors_give_the_shapes_of_the_result(name: str) -> None:
    assert shapes(ALL[name](given().moved("meta"))) == shapes(ALL[name](given()))


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
        fake = ALL[name](tree_map(mode.from_tensor, given()))
    assert shapes(fake) == shapes(ALL[name](given()))


def one_of(value: Any, index: int) -> Any:
    return tree_map(lambda part: part[index] if part.ndim else part, value)


# Where a look is free it decides which of nearly dependent columns come first, so that only their span is comparable.
NOT_COMPARABLE = "eigh_refresh, begun"
NEW = [name for name in ALL if "_," not in name and not name.endswith("_") and name != NOT_COMPARABLE]


@pytest.mark.parametrize("name", NEW)
def test_vmap_is_the_calls_one_by_one(name: str) -> None:
    x = given(torch.float64, (3,))
    x = x._replace(one_eigh=x.eigh)
    call = (WITHOUT_WAITING | WAITING | OTHERS)[name]
    expected = [in_full(call(one_of(x, index))) for index in range(3)]
    dims = tree_map(lambda part: 0 if part.ndim else None, x)
    result = torch.vmap(call, (dims,), randomness="different")(x)
    for part, *others in zip(in_full(result), *expected, strict=True):
        torch.testing.assert_close(part, torch.stack(others), rtol=1e-5, atol=1e-5)


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
