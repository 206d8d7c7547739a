"""brandla_kernels: each op against its formula in float64, through the dispatcher, and by PyTorch's own check."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import brandla
import brandla_kernels
from brandla_kernels import OPS

SIZES = {
    "usual": (37, 5, 3),
    "empty basis": (11, 0, 4),
    "no columns": (11, 3, 0),
    "one": (1, 1, 1),
    "wide": (5, 4, 150),
}
LAYOUTS = ("plain", "transposed", "strided", "batched")


def matrix(rows: int, columns: int, layout: str, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    if layout == "transposed":
        return normal(columns, rows).mT
    if layout == "strided":
        return normal(2 * rows, 3 * columns)[::2, ::3]
    if layout == "batched":
        return normal(2, 3, rows, columns)
    return normal(rows, columns)


def symmetric(square: Tensor) -> Tensor:
    return square + square.mT


def operands(name: str, n: int, r: int, k: int, layout: str, dtype: torch.dtype) -> tuple[Any, ...]:
    def new(rows: int, columns: int, seed: int) -> Tensor:
        return matrix(rows, columns, layout, dtype, seed)

    basis, columns, small = new(n, r, 0), new(n, k, 1), new(r, k, 2)
    batch = basis.shape[:-2]
    if name == "cholesky_inverse_core":
        panel = columns.double()
        return panel.mT @ panel, panel.square().sum(-2).sqrt(), 1e-10
    table: dict[str, tuple[Any, ...]] = {
        "project": (basis, columns),
        "residual": (basis, columns, small),
        "gram": (columns,),
        "refine": (basis, columns, new(k, k, 3)),
        "rotate": (basis, columns, new(r, r + 1, 3), new(k, r + 1, 4)),
        "rotate_": (basis.clone(), columns, new(r, r, 3), new(k, r, 4)),
        "gram_ema_": (new(n, n, 5).clone(), columns, 0.9, 0.25),
        "damped_apply": (basis, new(r, 1, 6)[..., 0], torch.full(batch, 0.5, dtype=dtype), columns),
        "kron_damped_apply": (
            *(basis, new(r, 1, 6)[..., 0], torch.full(batch, 0.5, dtype=dtype)),
            *(new(k, min(2, k), 7), symmetric(new(min(2, k), min(2, k), 8)), torch.full(batch, 2.0, dtype=dtype)),
            new(n, k, 9),
        ),
    }
    return table[name]


def shifted(basis: Tensor, middle: Tensor, complement: Tensor) -> Tensor:
    """β I + U H Uᵀ, dense."""
    inner = torch.diag_embed(middle) if middle.ndim < basis.ndim else middle
    identity = torch.eye(basis.shape[-2], dtype=basis.dtype)
    return complement[..., None, None] * identity + basis @ inner @ basis.mT


FORMULAS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "project": lambda U, A: (U.mT @ A,),
    "residual": lambda U, A, C: (A - U @ C, (A - U @ C).mT @ (A - U @ C)),
    "gram": lambda P: (P.mT @ P,),
    "refine": lambda U, P, T: (P @ T, U.mT @ P @ T, T.mT @ P.mT @ P @ T),
    "rotate": lambda U, P, V, W: (U @ V + P @ W,),
    "rotate_": lambda U, P, V, W: (U @ V + P @ W,),
    "gram_ema_": lambda M, A, decay, weight: (decay * M + weight * A @ A.mT,),
    "damped_apply": lambda U, H, b, V: (shifted(U, H, b) @ V,),
    "kron_damped_apply": lambda U, H, b, V, K, c, W: (shifted(U, H, b) @ W @ shifted(V, K, c),),
}


def run(name: str, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    result = OPS[name](*arguments)
    if result is None:
        return (arguments[0],)
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", FORMULAS)
def test_op_computes_its_formula(name: str, size: tuple[int, int, int], layout: str, dtype: torch.dtype):
    arguments = operands(name, *size, layout, dtype)
    exact = FORMULAS[name](*(part.double() if isinstance(part, Tensor) else part for part in arguments))
    # Inner products of length n + r + k with entries of order 1, three deep at most.
    tolerance = 30 * sum(size) ** 1.5 * torch.finfo(dtype).eps
    for got, expected in zip(run(name, arguments), exact, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_cholesky_core_orthonormalises_what_stands_out(size: tuple[int, int, int], layout: str):
    gram, scale, threshold = operands("cholesky_inverse_core", *size, layout, torch.float64)
    transform, live = brandla_kernels.cholesky_inverse_core(gram, scale, threshold)
    expected = torch.diag_embed(live.double())
    torch.testing.assert_close(transform.mT @ gram @ transform, expected, rtol=0, atol=1e-5)
    assert (live.sum(-1) == min(size[0], size[2])).all()


@pytest.mark.parametrize("name", OPS)
def test_op_passes_the_check_of_torch(name: str):
    torch.library.opcheck(getattr(torch.ops.brandla, name).default, operands(name, 13, 4, 3, "plain", torch.float64))


@pytest.mark.parametrize("name", OPS)
def test_forced_torch_backend_gives_the_same_bits(name: str):
    first, second = (operands(name, 13, 4, 3, "plain", torch.float64) for _ in range(2))
    dispatched = run(name, first)
    with brandla.backend("torch"):
        forced = run(name, second)
        assert OPS[name].implementation("cpu") == ("torch", "forced by brandla.backend('torch')")
    for one, other in zip(dispatched, forced, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", OPS)
def test_cost_counts_work_and_traffic(name: str):
    sizes = {"n": 64, "r": 8, "k": 4, "s": 8, "m": 4, "p": 64, "q": 32, "left_rank": 8, "right_rank": 8}
    wanted = OPS[name].cost.__code__.co_varnames[: OPS[name].cost.__code__.co_argcount]
    cost = OPS[name].cost(**{key: sizes[key] for key in wanted if key in sizes})
    assert cost.flops > 0
    assert cost.bytes > 0


def test_gram_of_many_slabs_equals_the_gram_of_one():
    panel = matrix(5000, 130, "plain", torch.float32, 0)
    exact = panel.double().mT @ panel.double()
    torch.testing.assert_close(brandla_kernels.gram(panel), exact, rtol=1e-13, atol=1e-11)


def test_an_op_follows_the_dispatcher_on_every_device():
    """On meta tensors, which have no data, shapes and dtypes come out right: what a tracer sees."""
    panel, gram = OPS["residual"](*(torch.empty(*shape, device="meta") for shape in ((9, 2), (9, 3), (2, 3))))
    assert (panel.shape, gram.shape, gram.dtype) == ((9, 3), (3, 3), torch.float64)
    assert OPS["residual"].implementation("cuda") == ("triton", "GPU tensors run on the Triton kernels")
