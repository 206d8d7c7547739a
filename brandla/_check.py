"""Every input check, and its message: the function, the rule, the values seen, the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)
_FULL = (torch.float32, torch.float64)
ONE_DIMENSION = "must lie on a device mesh of one dimension"

_checked: ContextVar[bool] = ContextVar("brandla_checked", default=False)


@contextmanager
def checked(enabled: bool = True) -> Iterator[None]:
    """Verify inside the ``with`` block that the values of all inputs are usable, at the cost of a device sync a call.

    Every public function then raises ``ValueError`` if a tensor holds NaN or infinity, or if a damping given as a
    tensor is not positive, before anything is computed. Outside, such values are not looked at: non-finite data makes
    every value of the result NaN, and ``is_finite()`` of the result says so without a sync.
    """
    token = _checked.set(enabled)
    try:
        yield
    finally:
        _checked.reset(token)


def _is_checked() -> bool:
    # A compiled graph cannot raise on values.
    return not torch.compiler.is_compiling() and _checked.get()


def fail_value(function: str, rule: str) -> NoReturn:
    """Raise the ValueError of ``function``."""
    message = f"{function}: {rule}"
    raise ValueError(message)


def fail_type(function: str, rule: str) -> NoReturn:
    """Raise the TypeError of ``function``."""
    message = f"{function}: {rule}"
    raise TypeError(message)


def _spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def data(function: str, name: str, tensor: Tensor) -> None:
    """Check that ``tensor`` is a real floating-point tensor, and finite in checked mode."""
    if not isinstance(tensor, Tensor):
        fail_type(function, f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
    if tensor.dtype not in _HALF + _FULL:
        rule = f"{name} must be real floating point (float64, float32, bfloat16, float16)"
        fail_type(function, f"{rule}; got {_spelled(tensor.dtype)}; convert it with .float() or .double()")
    finite(function, name, tensor)


def finite(function: str, name: str, tensor: Tensor) -> None:
    """In checked mode, check that every entry of ``tensor`` is finite."""
    if not _is_checked():
        return
    entries = tensor if tensor.layout == torch.strided else tensor.to_sparse_coo().coalesce().values()
    # Of a DTensor the processes count together, so that all of them raise.
    if bad := _read((~torch.isfinite(entries)).sum()):
        rule = f"{name} must be finite; got {int(bad)} NaN or infinite entries in shape {tuple(tensor.shape)}"
        fail_value(function, f"{rule}; skip this batch or replace them")


def _read(number: Tensor) -> float:
    """Return a number on the host, of a DTensor too."""
    return (number.full_tensor() if hasattr(number, "full_tensor") else number).item()


def part(function: str, name: str, tensor: Tensor) -> None:
    """Check one tensor of a factor: factors are kept in float32 or float64."""
    data(function, name, tensor)
    if tensor.dtype not in _FULL:
        rule = f"{name} must be float32 or float64, since half precision cannot hold an orthonormal basis"
        fail_type(function, f"{rule}; got {_spelled(tensor.dtype)}; convert the factor with .float()")


def shape(function: str, name: str, tensor: Tensor, expected: tuple[int, ...], because: str) -> None:
    """Check that ``tensor`` has exactly the shape ``expected``, and say where that shape comes from."""
    if tuple(tensor.shape) != expected:
        fail_value(function, f"{name} must have shape {expected}, {because}; got {tuple(tensor.shape)}")


def basis(function: str, name: str, tensor: Tensor) -> None:
    """Check a tall basis: at least two dimensions, no more columns than rows."""
    part(function, name, tensor)
    if tensor.ndim < 2:
        fail_value(function, f"{name} must have shape (..., n, r); got {tuple(tensor.shape)}")
    n, r = tensor.shape[-2:]
    if r > n:
        fail_value(function, f"{name} must have no more columns than rows; got r = {r} > n = {n}")


def together(function: str, name: str, tensor: Tensor, of_name: str, of: Tensor) -> None:
    """Check that two tensors of one factor share dtype and device."""
    if tensor.dtype != of.dtype:
        rule = f"{name} must have the dtype of {of_name}, {_spelled(of.dtype)}"
        fail_type(function, f"{rule}; got {_spelled(tensor.dtype)}; convert one with .to()")
    same_device(function, name, tensor, of_name, of)


def same_device(function: str, name: str, tensor: Tensor, of_name: str, of: Tensor) -> None:
    """Check that two tensors live on one device."""
    if tensor.device != of.device:
        rule = f"{name} must be on the device of {of_name}, {of.device}"
        fail_value(function, f"{rule}; got {tensor.device}; move it with .to({str(of.device)!r})")


def matching_data(function: str, name: str, tensor: Tensor, of_name: str, of: Tensor) -> Tensor:
    """Check data that meets a factor, and return it in the factor's dtype (only half-precision data is converted)."""
    data(function, name, tensor)
    same_device(function, name, tensor, of_name, of)
    if tensor.dtype == of.dtype:
        return tensor
    if tensor.dtype in _HALF and of.dtype == torch.float32:
        return tensor.float()
    rule = (
        f"{name} must have the dtype of {of_name}, {_spelled(of.dtype)} (half-precision data may meet a float32 factor)"
    )
    fail_type(function, f"{rule}; got {_spelled(tensor.dtype)}; convert one with .to()")


def columns(function: str, name: str, tensor: Tensor, of_name: str, of: Tensor) -> Tensor:
    """Check new columns (..., n, k) against a basis (..., n, r) and return them in its dtype."""
    converted = matching_data(function, name, tensor, of_name, of)
    n = of.shape[-2]
    if tensor.ndim < 2 or tensor.shape[-2] != n:
        fail_value(function, f"{name} must have n = {n} rows, as {of_name} does; got shape {tuple(tensor.shape)}")
    if tensor.shape[:-2] != of.shape[:-2]:
        rule = f"{name} must have the batch shape of {of_name}, {tuple(of.shape[:-2])}"
        fail_value(function, f"{rule}; got {tuple(tensor.shape[:-2])}; expand() it first")
    return converted


def rank(function: str, value: int | None, default: int, most: int, because: str) -> int:
    """Check a requested rank and return it, or the default."""
    if value is None:
        return min(default, most)
    if isinstance(value, bool) or not isinstance(value, int):
        fail_type(function, f"rank must be an int or None; got {type(value).__name__} {value!r}")
    if not 0 <= value <= most:
        fail_value(function, f"rank must be between 0 and {most} = {because}; got {value}")
    return value


def tolerance(function: str, value: float) -> None:
    """Check a relative tolerance."""
    if not 0 <= value < 1:
        fail_value(function, f"tol must be in [0, 1); got {value}")


def count(function: str, name: str, value: int, least: int) -> int:
    """Check an integer option."""
    if isinstance(value, bool) or not isinstance(value, int):
        fail_type(function, f"{name} must be an int; got {type(value).__name__} {value!r}")
    if value < least:
        fail_value(function, f"{name} must be at least {least}; got {value}")
    return value


def choice(function: str, name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Check an option that is one of a few words."""
    if value not in allowed:
        fail_value(function, f"{name} must be {' or '.join(map(repr, allowed))}; got {value!r}")


def scalar(
    function: str, name: str, value: float | Tensor, of_name: str, of: Tensor, *, positive: bool = False
) -> float | Tensor:
    """Check a number, or a tensor that broadcasts to the factor's batch shape; >= 0, or > 0 where ``positive``."""
    if isinstance(value, Tensor):
        return _tensor_scalar(function, name, value, of_name, of, positive=positive)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail_type(function, f"{name} must be a number or a tensor; got {type(value).__name__}")
    bound = "> 0" if positive else ">= 0"
    # Written so that NaN fails too.
    if not (value > 0 if positive else value >= 0) or value == float("inf"):
        fail_value(function, f"{name} must be finite and {bound}; got {value}")
    return float(value)


def _tensor_scalar(function: str, name: str, value: Tensor, of_name: str, of: Tensor, *, positive: bool) -> Tensor:
    data(function, name, value)
    same_device(function, name, value, of_name, of)
    batch = tuple(of.shape[:-2])
    if value.ndim > len(batch) or any(
        size not in (1, batch_size) for size, batch_size in zip(reversed(value.shape), reversed(batch), strict=False)
    ):
        fail_value(
            function, f"{name} must be a number or have the batch shape {batch} of {of_name}; got {tuple(value.shape)}"
        )
    if _is_checked() and not bool((value > 0).all() if positive else (value >= 0).all()):
        bound = "> 0" if positive else ">= 0"
        fail_value(function, f"{name} must be {bound} everywhere; its smallest entry is {float(value.min()):g}")
    return value.to(of.dtype)


def eigh(function: str, name: str, factor: object) -> None:
    """Check a LowRankEigh-shaped pair (eigenvalues, eigenvectors)."""
    values, vectors = _fields(function, name, factor, 2, "LowRankEigh")
    basis(function, f"{name}.eigenvectors", vectors)
    part(function, f"{name}.eigenvalues", values)
    expected = (*vectors.shape[:-2], vectors.shape[-1])
    shape(function, f"{name}.eigenvalues", values, expected, "one value for each column of eigenvectors")
    together(function, f"{name}.eigenvalues", values, f"{name}.eigenvectors", vectors)


def root(function: str, name: str, factor: object) -> None:
    """Check a LowRankRoot-shaped pair (root, gram)."""
    tall, gram = _fields(function, name, factor, 2, "LowRankRoot")
    part(function, f"{name}.root", tall)
    if tall.ndim < 2:
        fail_value(function, f"{name}.root must have shape (..., n, r); got {tuple(tall.shape)}")
    part(function, f"{name}.gram", gram)
    expected = (*tall.shape[:-2], tall.shape[-1], tall.shape[-1])
    shape(function, f"{name}.gram", gram, expected, "one row and column for each column of root")
    together(function, f"{name}.gram", gram, f"{name}.root", tall)


def svd(function: str, name: str, factor: object) -> None:
    """Check a LowRankSVD-shaped triple (U, S, Vh)."""
    left, values, right = _fields(function, name, factor, 3, "LowRankSVD")
    basis(function, f"{name}.U", left)
    part(function, f"{name}.S", values)
    part(function, f"{name}.Vh", right)
    r = left.shape[-1]
    shape(function, f"{name}.S", values, (*left.shape[:-2], r), "one value for each column of U")
    shape(function, f"{name}.Vh", right, (*left.shape[:-2], r, right.shape[-1]), "one row for each column of U")
    together(function, f"{name}.S", values, f"{name}.U", left)
    together(function, f"{name}.Vh", right, f"{name}.U", left)


def _fields(function: str, name: str, factor: object, expected: int, kind: str) -> tuple[Tensor, ...]:
    if not isinstance(factor, tuple) or len(factor) != expected or not all(isinstance(f, Tensor) for f in factor):
        fail_type(function, f"{name} must be a {kind}; got {type(factor).__name__}; start one with {kind}.zeros(...)")
    return factor


def tracked(function: str, name: str, tensor: Tensor, of_name: str, of: Tensor) -> None:
    """Check the error bound or the trace of a tracked factor."""
    part(function, name, tensor)
    shape(function, name, tensor, tuple(of.shape[:-2]), f"the batch shape of {of_name}")
    together(function, name, tensor, of_name, of)


def without_gradient(function: str, name: str, tensor: Tensor) -> None:
    """Check an argument of a function that overwrites."""
    if tensor.requires_grad and torch.is_grad_enabled():
        rule = f"{name} must not require grad, since what overwrites has no gradient"
        message = f"{function}: {rule}; call it under torch.no_grad()"
        raise RuntimeError(message)


def written(function: str, name: str, tensor: Tensor) -> None:
    """Check that a tensor can be overwritten: an expanded one cannot."""
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        rule = f"{name} is overwritten, so no two of its entries may share memory"
        seen = f"shape {tuple(tensor.shape)}, strides {tensor.stride()}"
        fail_value(function, f"{rule}; got {seen}; take its .contiguous()")


def centre(function: str, basis_tensor: Tensor, mean: Tensor, weight: Tensor) -> None:
    """Check the mean and the weight of a centred stream."""
    batch, m = tuple(basis_tensor.shape[:-2]), basis_tensor.shape[-2]
    for name, value, expected in (("svd.mean", mean, (*batch, m)), ("svd.weight", weight, batch)):
        part(function, name, value)
        shape(function, name, value, expected, "as its basis needs")
        together(function, name, value, "svd.svd.U", basis_tensor)


def mixture(function: str, name: str, tensor: Tensor, *, as_dtensor: bool = False) -> NoReturn:
    """Raise the TypeError for a tall matrix, or a small one, that is not of the kind of the factor's."""
    if as_dtensor:
        rule = f"{name} must be a DTensor sharded on its rows, as the factor is"
        remedy = "make it one with torch.distributed.tensor.distribute_tensor"
    else:
        rule = f"{name} must be a plain tensor, as the tall matrices beside it are"
        remedy = "take its .full_tensor(), or shard those on their rows as well"
    fail_type(function, f"{rule}; got a {type(tensor).__name__}; {remedy}")


def sharded(function: str, name: str, tensor: Any, dim: int, mesh: Any = None) -> None:
    """Check that the rows of a DTensor, its dimension ``dim``, are sharded over a 1-D mesh: over ``mesh`` if given."""
    _same_mesh(function, name, tensor, mesh)
    at = tensor.ndim + dim
    if not tensor.placements[0].is_shard(at):
        rule = f"{name} must be sharded on its rows, [Shard({at})]"
        remedy = f"redistribute it with .redistribute(placements=[Shard({at})])"
        fail_value(function, f"{rule}; got {list(tensor.placements)}; {remedy}")


def replicated(function: str, name: str, tensor: Any, mesh: Any) -> None:
    """Check that a small DTensor is whole on every process of the mesh of the factor."""
    _same_mesh(function, name, tensor, mesh)
    if not tensor.placements[0].is_replicate():
        rule = f"{name} must be a plain tensor or [Replicate()], the same in every process"
        remedy = "redistribute it with .redistribute(placements=[Replicate()])"
        fail_value(function, f"{rule}; got {list(tensor.placements)}; {remedy}")


def _same_mesh(function: str, name: str, tensor: Any, mesh: Any) -> None:
    if tensor.device_mesh.ndim != 1:
        fail_value(function, f"{name} {ONE_DIMENSION}; got {tensor.device_mesh}; take one with mesh[name]")
    if mesh is not None and tensor.device_mesh != mesh:
        rule = f"{name} must lie on the device mesh of the factor, of ranks {mesh.mesh.tolist()}"
        fail_value(function, f"{rule}; got {tensor.device_mesh.mesh.tolist()}; distribute it over that one")
