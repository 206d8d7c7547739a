"""One definition of what an op is: a signature, a torch form, a Triton launch, a gradient, a cost.

Each op is registered as ``torch.ops.brandla.<name>``, and as ``<name>_grouped`` over lists of problems of different
sizes. PyTorch's dispatcher chooses: the torch form on every device, the Triton kernels on CUDA and ROCm; the torch form
on fake tensors tells a tracer the shapes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, Literal, NamedTuple, ParamSpec, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from brandla_kernels import _grouped
from brandla_kernels._signature import Signature, parse

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Backend = Literal["torch", "triton"]
AnyOp: TypeAlias = "Op[..., Any]"

OPS: dict[str, AnyOp] = {}

_HAS_TRITON = importlib.util.find_spec("triton") is not None

_library = torch.library.Library("brandla", "DEF")
_forced: ContextVar[Backend | None] = ContextVar("brandla_backend", default=None)


class Cost(NamedTuple):
    """Work of one call: floating-point operations and bytes moved to and from memory, each tall matrix counted once."""

    flops: int
    bytes: int


class Op(Generic[Parameters, Result]):
    """A registered op. Called with lists where it takes tall matrices, it is the grouped op."""

    def __init__(
        self, signature: Signature, torch_form: Callable[Parameters, Result], cost: Callable[..., Cost]
    ) -> None:
        self.name = signature.name
        self.signature = signature
        self.torch_form = torch_form
        self.cost = cost
        self.launch: Callable[..., Any] | None = None
        self.registered = self._register(signature.schema, torch_form, signature.sizes)
        self.grouped_form = _grouped.looped(signature, torch_form)
        if signature.lists:
            self.registered_grouped = self._register(
                signature.grouped_schema, self.grouped_form, signature.grouped_sizes
            )
        OPS[self.name] = cast(AnyOp, self)

    def __call__(self, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        first: Any = args[0]
        listed = isinstance(first, (list, tuple))
        backend = None if torch.compiler.is_compiling() else _forced.get()
        if backend == "triton" and self.launch is not None:
            (self.signature.grouped_sizes if listed else self.signature.sizes)(args)
            return cast(Result, self.launch(*args, **kwargs))
        if backend == "torch" or reads_are_free(first[0] if listed else first):
            # The dispatcher would come to the same, some microseconds later.
            return cast(Result, (self.grouped_form if listed else self.torch_form)(*args, **kwargs))
        return cast(Result, (self.registered_grouped if listed else self.registered)(*args, **kwargs))

    def triton(self, launch: Callable[..., Any]) -> Callable[..., Any]:
        """Register the decorated function as the op on CUDA and ROCm, for one problem, a batch and a list."""
        self.launch = launch
        if _HAS_TRITON:
            _library.impl(self.name, _checked(launch, self.signature.sizes), "CUDA")
            if self.signature.lists:
                _library.impl(self.signature.grouped_name, _checked(launch, self.signature.grouped_sizes), "CUDA")
        return launch

    def gradient(self, backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
        """Register the decorated function (inputs, gradients of the results) -> gradients of the inputs."""

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
            ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
            ctx.tensors = [isinstance(value, Tensor) for value in inputs]

        def run(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
            saved = iter(ctx.saved_tensors)
            inputs = tuple(next(saved) if one else other for one, other in zip(ctx.tensors, ctx.others, strict=True))
            found = backward(inputs, gradients)
            return tuple(
                None if part is None else part.sum_to_size(value.shape).to(value.dtype)
                for part, value in zip(found, inputs, strict=True)
            )

        torch.library.register_autograd(f"brandla::{self.name}", run, setup_context=setup_context, lib=_library)
        return backward

    def implementation(self, device_type: str) -> tuple[Backend, str]:
        """Name the backend that serves this op on ``device_type`` ("cpu", "cuda") and the reason in words."""
        forced = _forced.get()
        if forced is not None and (forced == "torch" or self.launch is not None):
            return forced, f"forced by brandla.backend('{forced}')"
        if device_type == "cpu":
            return "torch", "CPU tensors run on torch's own BLAS and LAPACK"
        if self.launch is None:
            return "torch", "no Triton kernel is registered for this op"
        if not _HAS_TRITON:
            return "torch", "Triton is not installed"
        return "triton", "GPU tensors run on the Triton kernels"

    def _register(self, schema: str, torch_form: Callable[..., Any], check: Callable[[Sequence[Any]], Any]) -> Any:
        name = schema.partition("(")[0]
        _library.define(schema)
        _library.impl(name, _checked(torch_form, check), "CompositeExplicitAutograd")
        torch.library.register_fake(f"brandla::{name}", torch_form, lib=_library)
        return getattr(torch.ops.brandla, name).default


def op(line: str, cost: Callable[..., Cost]) -> Callable[[Callable[Parameters, Result]], Op[Parameters, Result]]:
    """Register the decorated torch form under the signature ``line`` and return the op that stands for it."""

    def register(torch_form: Callable[Parameters, Result]) -> Op[Parameters, Result]:
        return Op(parse(line), torch_form, cost)

    return register


def reads_are_free(tensor: Any) -> bool:
    """Say whether a branch may look at values: on a CPU nothing has to be waited for; a traced tensor has none yet."""
    return type(tensor) is Tensor and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Force one implementation of every op inside the ``with`` block: for tests, benches and debugging.

    Parameters
    ----------
    name
        ``"torch"``: the torch forms, called without the dispatcher. ``"triton"``: the Triton kernels, on GPU tensors,
        or on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1 in the environment).

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
    if name == "triton" and (reason := _why_no_triton()) is not None:
        message = f"brandla.backend: 'triton' cannot run: {reason}; use 'torch', or leave the choice to the dispatcher"
        raise RuntimeError(message)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def _why_no_triton() -> str | None:
    if not _HAS_TRITON:
        return "Triton is not installed"
    if torch.cuda.is_available():
        return None
    from brandla_kernels._kernels.launch import interpreted

    return None if interpreted() else "torch sees no GPU, and TRITON_INTERPRET=1 was not set before Triton was imported"


def _checked(implementation: Callable[..., Any], check: Callable[[Sequence[Any]], Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        check(args)
        return implementation(*args)

    return call
