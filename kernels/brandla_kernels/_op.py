"""One definition of what an op is: a schema, a torch form, a cost, and the call that PyTorch's dispatcher routes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, ParamSpec, TypeAlias, TypeVar, cast

import torch

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Backend = Literal["torch", "triton"]

AnyOp: TypeAlias = "Op[..., Any]"

OPS: dict[str, AnyOp] = {}

_library = torch.library.Library("brandla", "DEF")
_forced: ContextVar[Backend | None] = ContextVar("brandla_backend", default=None)


class Cost(NamedTuple):
    """Work of one call: floating-point operations and bytes moved to and from memory, each tall matrix counted once."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Op(Generic[Parameters, Result]):
    """A registered op: calling it goes through ``torch.ops.brandla.<name>``.

    The torch form is registered for every device and is differentiable by composition. A device-specific kernel
    registered later takes precedence on its device; no caller chooses.
    """

    name: str
    torch_form: Callable[Parameters, Result]
    cost: Callable[..., Cost]
    registered: Callable[Parameters, Result]

    def __call__(self, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        # Dynamo traces no context variables; a compiled graph keeps the dispatcher's choice.
        if not torch.compiler.is_compiling() and _forced.get() == "torch":
            return self.torch_form(*args, **kwargs)
        return self.registered(*args, **kwargs)

    def implementation(self, device_type: str) -> tuple[Backend, str]:
        """Name the backend that serves this op on ``device_type`` ("cpu", "cuda") and the reason in words."""
        if _forced.get() == "torch":
            return "torch", "forced by brandla.backend('torch')"
        if device_type == "cpu":
            return "torch", "CPU tensors run on torch's own BLAS and LAPACK"
        return "torch", "no Triton kernel is registered for this op"


def op(schema: str, cost: Callable[..., Cost]) -> Callable[[Callable[Parameters, Result]], Op[Parameters, Result]]:
    """Register the decorated torch form under ``schema`` and return the op that stands for it."""

    def register(torch_form: Callable[Parameters, Result]) -> Op[Parameters, Result]:
        name = schema.partition("(")[0]
        _library.define(schema)
        _library.impl(name, torch_form, "CompositeImplicitAutograd")
        registered = getattr(torch.ops.brandla, name).default
        definition = Op(name, torch_form, cost, registered)
        OPS[name] = cast(AnyOp, definition)
        return definition

    return register


def reads_are_free(tensor: torch.Tensor) -> bool:
    """Say whether a branch may look at values: on a CPU nothing has to be waited for; a traced tensor has none yet."""
    return type(tensor) is torch.Tensor and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Force one implementation of every op inside the ``with`` block: for tests, benches and debugging.

    Parameters
    ----------
    name
        ``"torch"``: the torch forms, called without the dispatcher. ``"triton"``: the Triton kernels.

    Raises
    ------
    ValueError
        If ``name`` is neither.
    RuntimeError
        If the backend cannot run here. Nothing falls back silently.
    """
    if name not in ("torch", "triton"):
        message = f"brandla.backend: name must be 'torch' or 'triton'; got {name!r}"
        raise ValueError(message)
    if name == "triton":
        message = (
            "brandla.backend: 'triton' cannot run: no op of this version has a Triton kernel"
            f" ({_gpu_in_words()}); use 'torch', or leave the choice to the dispatcher"
        )
        raise RuntimeError(message)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def _gpu_in_words() -> str:
    if torch.cuda.is_available():
        return f"the GPU {torch.cuda.get_device_name()} is visible"
    return "and torch sees no GPU"
