"""Every input check. A message names the function, the rule, the values seen and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Integral, Real
from typing import Any, NoReturn

import torch
from torch import Tensor

from brandla_kernels import has_values, is_mapped, overlaps_itself

_HALF = (torch.bfloat16, torch.float16)
_FULL = (torch.float32, torch.float64)
# The float64 parts of a centred stream, whatever the dtype of its decomposition.
SUMS = ("mean", "weight", "scatter")
_FIELDS = {
    "LowRankEigh": ("eigenvalues", "eigenvectors"),
    "LowRankRoot": ("root", "gram"),
    "LowRankSVD": ("U", "S", "Vh"),
    "Centred": ("svd", *SUMS),
}
# How to make a value of the first kind from a value of the second.
_CONVERSIONS = {
    ("LowRankEigh", "LowRankRoot"): "convert it with .to_eigh()",
    ("LowRankEigh", "Tracked"): "convert its .lowrank with .to_eigh(), and brandla.track that",
    ("LowRankRoot", "LowRankEigh"): "convert it with LowRankRoot.from_eigh(...)",
    ("LowRankRoot", "Tracked"): "convert its .lowrank with LowRankRoot.from_eigh(...), and brandla.track that",
    ("LowRankSVD", "LowRankEigh"): "convert it with LowRankSVD(U, d, U.mT)",
    ("LowRankSVD", "tuple"): "convert it with LowRankSVD(U, S, Vh); torch.svd_lowrank returns V, whose .mT is Vh",
}

_checked: ContextVar[bool] = ContextVar("brandla_checked", default=False)
# The open blocks of checked mode in all threads. If there are none, checks read no tensor's values.
_open_blocks: list[bool] = []


@contextmanager
def checked(enabled: bool = True) -> Iterator[None]:
    """Check the values of all inputs inside the ``with`` block, at the cost of a device sync per call.

    Every public function then raises ``ValueError`` if a tensor holds NaN or infinity, or if a damping given as a
    tensor is not positive, before anything is computed. Outside the block no values are read: non-finite data makes
    every value of the result NaN, and its ``is_finite()`` shows this without a sync.

    Examples
    --------
    >>> import torch, brandla
    >>> try:
    ...     with brandla.checked():
    ...         brandla.root_update(brandla.LowRankRoot.zeros(2, rank=1), torch.tensor([[1.0], [torch.nan]]))
    ... except ValueError as error:
    ...     print(str(error).partition(";")[0])
    root_update: columns must be finite
    """
    token = _checked.set(enabled)
    _open_blocks.append(enabled)
    try:
        yield
    finally:
        _open_blocks.pop()
        _checked.reset(token)


def reads_values() -> bool:
    """Return whether a block of checked mode is open in any thread."""
    return bool(_open_blocks)


def _is_checked(tensor: Tensor) -> bool:
    # A compiled graph cannot raise on values.
    return bool(_open_blocks) and not torch.compiler.is_compiling() and _checked.get() and has_values(tensor)


def _plain_match(first: Any, second: Any) -> bool:
    """Return whether plain tensors share a device and a full dtype: the fast path of checks while no block is open."""
    if _open_blocks or not (type(first) is type(second) is Tensor):
        return False
    return first.dtype == second.dtype and first.dtype in _FULL and first.device == second.device


def fail_value(function: str, rule: str) -> NoReturn:
    message = f"{function}: {rule}"
    raise ValueError(message)


def fail_type(function: str, rule: str) -> NoReturn:
    message = f"{function}: {rule}"
    raise TypeError(message)


def spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def data(function: str, name: str, tensor: Tensor) -> None:
    """Check that ``tensor`` is a real floating-point tensor, and finite in checked mode."""
    if not isinstance(tensor, Tensor):
        remedy = "; convert it with torch.from_numpy" if hasattr(tensor, "__array_interface__") else ""
        fail_type(function, f"{name} must be a torch.Tensor; got {type(tensor).__name__}{remedy}")
    if tensor.dtype not in _HALF + _FULL:
        rule = f"{name} must be real floating point (float64, float32, bfloat16, float16)"
        remedy = "take its .real and .imag" if tensor.is_complex() else "convert it with .float() or .double()"
        fail_type(function, f"{rule}; got {spelled(tensor.dtype)}; {remedy}")
    if _is_checked(tensor):
        entries = tensor if tensor.layout == torch.strided else tensor.to_sparse_coo().coalesce().values()
        # The processes of a DTensor count together, so that all of them raise.
        if bad := _full_double((~torch.isfinite(entries)).sum()).item():
            rule = f"{name} must be finite; got {int(bad)} NaN or infinite entries in shape {tuple(tensor.shape)}"
            fail_value(function, f"{rule}; skip this batch or replace them")


def part(function: str, name: str, tensor: Tensor) -> None:
    """Check one tensor of a factor: factors are kept in float32 or float64."""
    data(function, name, tensor)
    part_dtype(function, name, tensor.dtype)


def part_dtype(function: str, name: str, dtype: torch.dtype | None) -> None:
    if dtype not in (None, *_FULL):
        half = ", since half precision cannot hold an orthonormal basis" if dtype in _HALF else ""
        remedy = "keep it in float32, and pass half-precision data beside it" if half else "take one of them"
        fail_type(function, f"{name} must be float32 or float64{half}; got {spelled(dtype)}; {remedy}")


def shape(function: str, name: str, tensor: Tensor, expected: tuple[int, ...], because: str) -> None:
    """Check that ``tensor`` has the shape ``expected``. ``because`` says in the message where that shape comes from."""
    if tuple(tensor.shape) != expected:
        fail_value(function, f"{name} must have shape {expected}, {because}; got {tuple(tensor.shape)}")


def basis(function: str, name: str, tensor: Tensor, *, wide: bool = False) -> None:
    """Check that a matrix has at least two dimensions and, unless ``wide``, no more columns than rows."""
    part(function, name, tensor)
    if tensor.ndim < 2:
        fail_value(function, f"{name} must have shape (..., n, r); got {tuple(tensor.shape)}")
    n, r = tensor.shape[-2:]
    if r > n and not wide:
        fail_value(function, f"{name} must have no more columns than rows; got r = {r} > n = {n}")


def same_dtype_and_device(function: str, name: str, tensor: Tensor, of_name: str, of: Tensor, note: str = "") -> None:
    if tensor.dtype != of.dtype:
        rule = f"{name} must have the dtype of {of_name}, {spelled(of.dtype)}{note}"
        fail_type(function, f"{rule}; got {spelled(tensor.dtype)}; convert one with .to()")
    same_device(function, name, tensor, of_name, of)


def same_device(function: str, name: str, tensor: Tensor, of_name: str, of: Tensor) -> None:
    if tensor.device != of.device:
        rule = f"{name} must be on the device of {of_name}, {of.device}"
        fail_value(function, f"{rule}; got {tensor.device}; move it with .to({str(of.device)!r})")


def matching_data(function: str, name: str, tensor: Tensor, of_name: str, of: Tensor) -> Tensor:
    """Check data that is multiplied with a factor, and return it in the factor's dtype. Only half precision is cast."""
    if _plain_match(tensor, of):
        return tensor
    data(function, name, tensor)
    if tensor.dtype in _HALF and of.dtype == torch.float32:
        tensor = tensor.float()
    same_dtype_and_device(function, name, tensor, of_name, of, " (half-precision data may meet a float32 factor)")
    return tensor


def columns(function: str, name: str, tensor: Tensor, of_name: str, of: Tensor) -> Tensor:
    """Check new columns (..., n, k) against a basis (..., n, r) and return them in its dtype."""
    converted = matching_data(function, name, tensor, of_name, of)
    (*batch, n, _), got = of.shape, tuple(tensor.shape)
    if got[-2:-1] != (n,):
        remedy = ""
        if n in got[-1:]:
            alternative = "[:, None] for one column" if tensor.ndim == 1 else ".mT if samples are rows"
            remedy = f"; pass {name}{alternative}"
        rule = f"{name} must have n = {n} rows, as {of_name} does"
        fail_value(function, f"{rule}; got shape {got}{remedy}")
    if got[:-2] != tuple(batch):
        rule = f"{name} must have the batch shape of {of_name}, {tuple(batch)}"
        fail_value(function, f"{rule}; got {got[:-2]}; expand() it first")
    return converted


def batches(function: str, name: str, block: Tensor, basis: Tensor, whose: str = "the factor's") -> None:
    """Check that the batch shapes of two tall matrices broadcast."""
    if block.shape[:-2] == basis.shape[:-2]:
        return
    try:
        torch.broadcast_shapes(block.shape[:-2], basis.shape[:-2])
    except RuntimeError:
        rule = f"batch shape of {name} must broadcast with {whose}, {tuple(basis.shape[:-2])}"
        fail_value(function, f"{rule}; got {tuple(block.shape[:-2])}")


def rank(function: str, value: int | None, default: int, most: int, because: str) -> int:
    """Check a requested rank and return it, or the default."""
    if value is None:
        return min(default, most)
    _int(function, "rank", value, "an int or None")
    if not 0 <= value <= most:
        fail_value(function, f"rank must be between 0 and {most} = {because}; got {value}")
    return int(value)


def tolerance(function: str, value: float) -> None:
    if not 0 <= value < 1:
        fail_value(function, f"tol must be in [0, 1); got {value}")


def count(function: str, name: str, value: int, least: int) -> int:
    _int(function, name, value)
    if value < least:
        fail_value(function, f"{name} must be at least {least}; got {value}")
    return int(value)


def _int(function: str, name: str, value: object, kind: str = "an int") -> None:
    if isinstance(value, bool) or not isinstance(value, (int, Integral)):
        fail_type(function, f"{name} must be {kind}; got {type(value).__name__} {value!r}")


def exponent(function: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (float, Real)):
        fail_type(function, f"exponent must be a number; got {type(value).__name__}")
    if not abs(value) < float("inf"):
        fail_value(function, f"exponent must be finite; got {value}")
    return float(value)


def choice(function: str, name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Check that an option is one of the ``allowed`` words."""
    if value not in allowed:
        fail_value(function, f"{name} must be {' or '.join(map(repr, allowed))}; got {value!r}")


def scalar(
    function: str, name: str, value: float | Tensor, of_name: str, of: Tensor, *, positive: bool = False
) -> float | Tensor:
    """Check a number, or a tensor that broadcasts to the factor's batch shape: >= 0, or > 0 if ``positive``."""
    if isinstance(value, Tensor):
        if value.ndim == 0 and _plain_match(value, of):
            return value
        data(function, name, value)
        same_device(function, name, value, of_name, of)
        batch, got = tuple(of.shape[:-2]), tuple(value.shape)
        sizes = zip(got[::-1], batch[::-1], strict=False)
        if len(got) > len(batch) or any(size not in (1, most) for size, most in sizes):
            fail_value(function, f"{name} must be a number or have the batch shape {batch} of {of_name}; got {got}")
        if _is_checked(value) and not bool((value > 0).all() if positive else (value >= 0).all()):
            rule = f"{name} must be {'> 0' if positive else '>= 0'} everywhere"
            fail_value(function, f"{rule}; its smallest entry is {float(value.min()):g}")
        return value.to(of.dtype)
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        fail_type(function, f"{name} must be a number or a tensor; got {type(value).__name__}")
    # The negated comparison also catches NaN.
    if not (value > 0 if positive else value >= 0) or value == float("inf"):
        fail_value(function, f"{name} must be finite and {'> 0' if positive else '>= 0'}; got {value}")
    return float(value)


def eigh(function: str, name: str, factor: object) -> tuple[Tensor, Tensor]:
    """Check a LowRankEigh, and return its eigenvalues and eigenvectors."""
    values, vectors = _parts_of(function, name, factor, "LowRankEigh")
    if _plain_match(values, vectors) and vectors.ndim > 1:
        *batch, n, r = vectors.shape
        if r <= n and values.shape == (*batch, r):
            return values, vectors
    basis(function, f"{name}.eigenvectors", vectors)
    because = "one value for each column of eigenvectors"
    _other_part(function, f"{name}.eigenvalues", values, f"{name}.eigenvectors", vectors, vectors.shape[-1:], because)
    _spectrum(function, f"{name}.eigenvectors", vectors, f"{name}.eigenvalues", values)
    return values, vectors


def root(function: str, name: str, factor: object) -> tuple[Tensor, Tensor]:
    """Check a LowRankRoot, and return its gram and root: the small part first."""
    tall, gram = _parts_of(function, name, factor, "LowRankRoot")
    if _plain_match(tall, gram) and tall.ndim > 1:
        *batch, _, r = tall.shape
        if gram.shape == (*batch, r, r):
            return gram, tall
    basis(function, f"{name}.root", tall, wide=True)
    because = "one row and column for each column of root"
    _other_part(function, f"{name}.gram", gram, f"{name}.root", tall, 2 * tall.shape[-1:], because)
    if _is_checked(tall):
        given = _full_double(gram)
        error = (_gram(tall) - given).abs().amax((-2, -1)) / given.diagonal(dim1=-2, dim2=-1).amax(-1)
        rule = f"{name}.gram must be the Gram matrix FᵀF of {name}.root"
        _near_zero(function, rule, error, tall.dtype, "recompute it as root.mT @ root")
    return gram, tall


def svd(function: str, name: str, factor: object) -> None:
    left, values, right = _parts_of(function, name, factor, "LowRankSVD")
    of_name, r = f"{name}.U", left.shape[-1:]
    basis(function, of_name, left)
    _other_part(function, f"{name}.S", values, of_name, left, r, "one value for each column of U")
    remedy = "; if it is V, as torch.svd_lowrank returns, pass its .mT" if right.shape[-1:] == r else ""
    sizes, because = (*r, *right.shape[-1:]), f"one row for each column of U{remedy}"
    _other_part(function, f"{name}.Vh", right, of_name, left, sizes, because)
    _spectrum(function, of_name, left, f"{name}.S", values)


def _other_part(
    function: str, name: str, tensor: Tensor, of_name: str, of: Tensor, sizes: tuple[int, ...], because: str
) -> None:
    """Check another part of a factor against its tall matrix ``of``: shape (batch, *sizes), dtype and device."""
    part(function, name, tensor)
    shape(function, name, tensor, (*of.shape[:-2], *sizes), because)
    same_dtype_and_device(function, name, tensor, of_name, of)


def _parts_of(function: str, name: str, factor: object, kind: str) -> list[Any]:
    parts: list[Any] = []
    for field in _FIELDS[kind]:
        parts.append(getattr(factor, field, None))
        if parts[-1] is None:
            got = type(factor).__name__
            start = "brandla.centre" if kind == "Centred" else f"{kind}.zeros(...)"
            remedy = _CONVERSIONS.get((kind, got), f"start one with {start}")
            fail_type(function, f"{name} must be a {kind}; got {got}; {remedy}")
    return parts


def _near_zero(function: str, rule: str, error: Tensor, dtype: torch.dtype, remedy: str) -> None:
    """Check that errors are at most √ε, which is far above rounding and far below what would spoil a result."""
    worst = float(error.max()) if error.numel() else 0.0
    if worst > torch.finfo(dtype).eps ** 0.5:
        fail_value(function, f"{rule}; got a relative error of {worst:.1g}; {remedy}")


def _full_double(tensor: Any) -> Tensor:
    """Return a tensor in float64; a DTensor is gathered."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.double()


def _gram(tall: Tensor) -> Tensor:
    """Return TᵀT in float64."""
    wide = tall.double()
    return _full_double(wide.mT @ wide)


def _spectrum(function: str, name: str, vectors: Tensor, values_name: str, values: Tensor) -> None:
    """In checked mode, check that vectors are orthonormal or zero, and that values are descending and >= 0."""
    if _is_checked(vectors):
        inner = _gram(vectors)
        error = (inner - torch.diag_embed((inner.diagonal(dim1=-2, dim2=-1) > 0.5).double())).abs()
        rule = f"{name} must have orthonormal columns, or zero ones"
        _near_zero(function, rule, error, vectors.dtype, "call brandla.orthonormalize on it")
    if _is_checked(values) and bool((values < 0).any() | (values[..., 1:] > values[..., :-1]).any()):
        rule = f"{values_name} must be descending and >= 0"
        first = _full_double(values).flatten()[:3].tolist()
        fail_value(function, f"{rule}; got {first} …; sort them, with their vectors")


def semidefinite(function: str, name: str, inner: Tensor, dtype: torch.dtype) -> None:
    """In checked mode, check that a small matrix XᵀMX is symmetric and semi-definite. M has this dtype."""
    if not _is_checked(inner) or not inner.numel():
        return
    largest = torch.linalg.vector_norm(inner, dim=(-2, -1)).clamp_min(torch.finfo(inner.dtype).tiny)
    asymmetry = (inner - inner.mT).abs().amax((-2, -1)) / largest
    _near_zero(function, f"{name} must be symmetric", asymmetry, dtype, "see randomized_svd")
    negative = -torch.linalg.eigvalsh((inner + inner.mT) / 2)[..., 0] / largest
    _near_zero(function, f"{name} must be positive semi-definite", negative, dtype, "see randomized_svd")


def tracked(function: str, name: str, tensor: Tensor, of_name: str, of: Tensor) -> None:
    if _plain_match(tensor, of) and tensor.shape == of.shape[:-2]:
        return
    _other_part(function, name, tensor, of_name, of, (), f"the batch shape of {of_name}")


def without_gradient(function: str, name: str, tensor: Tensor) -> None:
    """Check that an argument of a function that overwrites does not require grad."""
    if tensor.requires_grad and torch.is_grad_enabled():
        rule = f"{name} must not require grad, since a function that overwrites has no gradient"
        message = f"{function}: {rule}; call it under torch.no_grad()"
        raise RuntimeError(message)


def overwritable(function: str, name: str, tensor: Tensor) -> None:
    """Check that a tensor can be overwritten: it is not expanded, and torch.func.vmap does not map over it."""
    if is_mapped(tensor):
        rule = f"{name} is overwritten, and torch.func.vmap cannot map over an overwritten tensor"
        fail_type(function, f"{rule}; pass the whole batch: leading dimensions are batch dimensions")
    if overlaps_itself(tensor):
        rule = f"{name} is overwritten, so no two of its entries may share memory"
        got = f"shape {tuple(tensor.shape)}, strides {tensor.stride()}"
        fail_value(function, f"{rule}; got {got}; take its .contiguous()")


def centred(function: str, name: str, state: object) -> None:
    factor, *sums = _parts_of(function, name, state, "Centred")
    svd(function, f"{name}.svd", factor)
    batch, m = tuple(factor.U.shape[:-2]), factor.U.shape[-2]
    for field, value, expected in zip(SUMS, sums, ((*batch, m), batch, batch), strict=True):
        part(function, f"{name}.{field}", value)
        if value.dtype != torch.float64:
            rule = f"{name}.{field} must be float64, whatever the dtype of the decomposition"
            fail_type(function, f"{rule}; got {spelled(value.dtype)}; convert it with .double()")
        shape(function, f"{name}.{field}", value, expected, f"to match {name}.svd.U")
        same_device(function, f"{name}.{field}", value, f"{name}.svd.U", factor.U)


def fail_kind(function: str, name: str, tensor: Tensor, *, as_dtensor: bool = False) -> NoReturn:
    """Raise the TypeError for a DTensor beside plain tensors or, with ``as_dtensor``, the reverse."""
    if as_dtensor:
        rule = f"{name} must be a DTensor sharded on its rows, as the factor is"
        remedy = "distribute it with torch.distributed.tensor.distribute_tensor"
    else:
        rule = f"{name} must be a plain tensor, as the tall matrices beside it are"
        remedy = "take its .full_tensor(), or shard the tall matrices on their rows as well"
    fail_type(function, f"{rule}; got a {type(tensor).__name__}; {remedy}")


def placements(function: str, name: str, tensor: Any, dim: int | None, mesh: Any = None) -> None:
    """Check that a DTensor lies on a 1-D mesh (``mesh`` if given), sharded on ``dim``, or replicated if it is None."""
    mesh_1d(function, name, tensor.device_mesh)
    if mesh is not None and tensor.device_mesh != mesh:
        rule = f"{name} must lie on the device mesh of the factor, of ranks {mesh.mesh.tolist()}"
        fail_value(function, f"{rule}; got {tensor.device_mesh.mesh.tolist()}; distribute it over that mesh")
    (placement,) = tensor.placements
    if dim is None:
        fits, wanted = placement.is_replicate(), "Replicate()"
        rule = f"{name} must be a plain tensor or [Replicate()], the same in every process"
    else:
        at = tensor.ndim + dim
        fits, wanted = placement.is_shard(at), f"Shard({at})"
        rule = f"{name} must be sharded on its rows, [{wanted}]"
    if not fits:
        remedy = f"redistribute it with .redistribute(placements=[{wanted}])"
        fail_value(function, f"{rule}; got {list(tensor.placements)}; {remedy}")


def mesh_1d(function: str, name: str, mesh: Any) -> None:
    if mesh.ndim != 1:
        fail_value(function, f"{name} must lie on a device mesh of one dimension; got {mesh}; take one with mesh[name]")
