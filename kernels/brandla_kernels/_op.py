"""One definition of what an op is: a signature, a torch form, a Triton launch, a gradient, a cost.

Each op is registered as ``torch.ops.brandla.<name>``, and as ``<name>_grouped`` over lists of problems of different
sizes. PyTorch's dispatcher chooses: the Triton kernels on CUDA and ROCm if the op has any there, else the torch form.
On fake tensors, the torch form tells a tracer the shapes of the results.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, lru_cache, partial, wraps
from itertools import count
from typing import Any, Generic, Literal, NamedTuple, ParamSpec, TypeAlias, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from brandla_kernels import _grouped
from brandla_kernels._signature import Signature, parse
from brandla_kernels._targets import architecture, nearest
from brandla_kernels.tall import device_of

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Backend = Literal["torch", "triton"]
AnyOp: TypeAlias = "Op[..., Any]"

OPS: dict[str, AnyOp] = {}

_HAS_TRITON = importlib.util.find_spec("triton") is not None

# The most layouts of calls that an op remembers as checked.
_MOST_LAYOUTS = 1024

_numbers = count()

_library = torch.library.Library("brandla", "DEF")
_imported = cache(importlib.import_module)
_forced: ContextVar[Backend | None] = ContextVar("brandla_backend", default=None)


class Cost(NamedTuple):
    """Work of one call: each tall matrix is counted once.

    Parameters
    ----------
    flops
        Floating-point operations.
    bytes
        Bytes moved to and from memory.
    """

    flops: int
    bytes: int


class Op(Generic[Parameters, Result]):
    """A registered op. A call with lists of tall matrices is a call of the grouped op."""

    def __init__(
        self, signature: Signature, torch_form: Callable[Parameters, Result], cost: Callable[..., Cost], launch: str
    ) -> None:
        self.name = signature.name
        self.signature = signature
        self.torch_form = torch_form = without_autocast(torch_form)
        self.cost = cost
        self.launch: Callable[..., Any] | None = partial(_launch, *launch.split(".")) if launch else None
        self.registered = self._register(signature.schema, torch_form, signature.sizes)
        if not signature.writes:
            torch.library.register_vmap(f"brandla::{self.name}", self._vmap_rule, lib=_library)
        self.grouped_form = _grouped.looped(signature, torch_form)
        if signature.lists:
            grouped = (signature.grouped_schema, self.grouped_form, signature.grouped_sizes)
            self.registered_grouped = self._register(*grouped)
        OPS[self.name] = cast(AnyOp, self)

    def __call__(self, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        first: Any = args[0] if args else next(iter(kwargs.values()))
        listed = isinstance(first, (list, tuple))
        leader = first[0] if listed and first else first
        traced = torch.compiler.is_compiling()
        forced = None if traced else _forced.get()
        is_free = forced is None and reads_are_free(leader)
        direct = forced == "torch" or is_free or (listed and len(first) > 0 and is_mapped(leader))
        if direct and not self.signature.writes:
            # The dispatcher would give the same results, some microseconds later. It also checks the call; here
            # torch's own errors are enough, since nothing is overwritten.
            form: Callable[..., Result] = self.grouped_form if listed else self.torch_form
            return form(*args, **kwargs)
        registered: Callable[..., Result] = self.registered_grouped if listed else self.registered
        if traced or self.signature.writes or _is_differentiated((*args, *kwargs.values())):
            return registered(*args, **kwargs)
        # Torch's layer for gradients is written in Python. It would find no gradient, many microseconds later.
        with torch._C._AutoDispatchBelowAutograd():
            return registered(*args, **kwargs)

    def gradient(self, backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
        """Register the decorated gradient: (inputs, gradients of the results) -> gradients of the inputs."""
        _register_gradient(self.name, backward)
        if self.signature.lists:
            _register_gradient(self.signature.grouped_name, _grouped.looped_gradient(self.signature, backward))
        return backward

    def listed(self, form: Callable[..., Any]) -> Callable[..., Any]:
        """Make the decorated function the torch form for lists on a CPU, to save calls of torch.

        Its first argument is the `grouped_form` that it replaces. The arguments of the grouped op follow.
        """
        self.grouped_form = without_autocast(partial(form, self.grouped_form))
        return form

    def implementation(self, device_type: str) -> tuple[Backend, str]:
        """Name the backend that serves this op on ``device_type`` ("cpu", "cuda") and the reason in words."""
        forced = _forced.get()
        if forced is not None and (forced == "torch" or self.launch is not None):
            return forced, f"forced by brandla.backend('{forced}')"
        if device_type == "cpu":
            return "torch", "CPU tensors run on torch's own BLAS and LAPACK"
        if self.launch is None:
            return "torch", "no Triton kernel is registered for this op"
        if (reason := _why_no_kernels(device_type)) is not None:
            return "torch", reason
        return "triton", "GPU tensors run on the Triton kernels"

    def _vmap_rule(self, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        """Compute a call under torch.func.vmap: the mapped dimension is one more leading dimension."""
        arguments = list(args)
        for operand in self.signature.operands:
            tensor, dim = args[operand.position], in_dims[operand.position]
            whole = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            arguments[operand.position] = whole
        for position, (value, dim) in enumerate(zip(arguments, in_dims, strict=True)):
            if dim is not None and value is args[position]:
                # The first of mapped seeds is enough: one seed makes the problems of a batch independent.
                arguments[position] = value.select(dim, 0)
        result = self.registered(*arguments)
        return result, tuple(0 for _ in result) if isinstance(result, tuple) else 0

    def _register(self, schema: str, torch_form: Callable[..., Any], check: Callable[[Sequence[Any]], Any]) -> Any:
        name = schema.partition("(")[0]
        # The plans of launches, by each layout that passed the check.
        plans_of: dict[Any, dict[Any, Any]] = {}

        def run_on_gpu(*args: Any) -> Any:
            return run("torch" if nearest(architecture(device_of(args[0]).index)) is None else "triton", *args)

        def run(default: Backend | None, *args: Any) -> Any:
            # Fake tensors have no default, and no backend can be forced on them.
            chosen = default and (_forced.get() or default)
            launch = self.launch if chosen == "triton" else None
            if chosen is None or self.signature.writes:
                check(args)
                return (launch or torch_form)(*args)
            tensors, addresses, layout = _tensors_and_layout(args)
            plans = plans_of.get(layout)
            if plans is None:
                check(args)
                if len(plans_of) == _MOST_LAYOUTS:
                    plans_of.clear()
                plans = plans_of[layout] = {}
            if launch is None:
                return torch_form(*args)
            return _imported("brandla_kernels._kernels.plan").call(plans, launch, args, tensors, addresses)

        _library.define(schema)
        _library.impl(name, partial(run, "torch"), "CompositeExplicitAutograd")
        if self.launch is not None and _HAS_TRITON:
            _library.impl(name, run_on_gpu, "CUDA")
        # Only the torch form can tell the shapes of results on fake tensors.
        torch.library.register_fake(f"brandla::{name}", partial(run, None), lib=_library)
        return getattr(torch.ops.brandla, name).default


def op(
    line: str, cost: Callable[..., Cost], launch: str = ""
) -> Callable[[Callable[Parameters, Result]], Op[Parameters, Result]]:
    """Register the decorated torch form under the signature ``line`` and return its op.

    ``launch`` names the "module.function" of `_kernels` that computes the op on CUDA and ROCm, for one problem, a batch
    or a list. The first call imports it, so no import of this package needs Triton.
    """
    return lambda torch_form: Op(parse(line), torch_form, cost, launch)


def recomputed_gradient(small_op: AnyOp, tensors: int) -> Callable[..., tuple[Tensor | None, ...]]:
    """Return the gradient of an op on small matrices. It runs the torch form again, which costs little.

    The first ``tensors`` arguments are differentiable.
    """

    def backward(inputs: Any, gradients: Any) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            leaves = [part.detach().requires_grad_() for part in inputs[:tensors]]
            results = small_op.torch_form(*leaves, *inputs[tensors:])
            # A result that is not measured, or counts as a constant, has no gradient.
            pairs = [pair for pair in zip(results, gradients, strict=True) if pair[0].requires_grad]
            results, gradients = zip(*pairs, strict=True)
            of_leaves = torch.autograd.grad(results, leaves, gradients, materialize_grads=True)
        return (*of_leaves, *[None] * (len(inputs) - tensors))

    return backward


@lru_cache(4096)
def number_of(look: Hashable) -> int:
    """Return a number for the look of a tensor (its shape, strides, dtype, ...). No other look has this number.

    With tuples instead, the garbage collector would go through thousands of them at every call with a long list.
    """
    return next(_numbers)


def _launch(module: str, function: str, *args: Any) -> Any:
    return getattr(_imported(f"brandla_kernels._kernels.{module}"), function)(*args)


def _tensors_and_layout(arguments: Sequence[Any]) -> tuple[list[Tensor], list[int], tuple[Any, ...]]:
    """Return the tensors of a call, their addresses, and the layout: all else that a launch depends on."""
    tensors: list[Tensor] = []
    layout: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            tensors.append(argument)
        elif isinstance(argument, list):
            layout.append(len(argument))
            tensors += argument
        else:
            layout.append(argument)
    addresses = list(map(Tensor.data_ptr, tensors))
    for tensor, address in zip(tensors, addresses, strict=True):
        layout.append(number_of((tensor.shape, tensor.stride(), tensor.dtype, tensor.device, address % 16)))
    return tensors, addresses, (*layout, len(set(addresses)))


def _is_differentiated(arguments: Sequence[Any]) -> bool:
    """Say whether a call has to go through autograd or torch.func."""
    # torch.func has no public function for this.
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return torch.is_grad_enabled() and any(
        isinstance(part, Tensor) and part.requires_grad
        for argument in arguments
        for part in (argument if isinstance(argument, (list, tuple)) else (argument,))
    )


def _register_gradient(name: str, backward: Callable[..., Sequence[Any]]) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        leaves, ctx.structure = tree_flatten(inputs)
        ctx.save_for_backward(*(leaf if isinstance(leaf, Tensor) else None for leaf in leaves))
        ctx.rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def run(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        leaves = [rest if saved is None else saved for saved, rest in zip(ctx.saved_tensors, ctx.rest, strict=True)]
        inputs = tree_unflatten(leaves, ctx.structure)
        parts = backward(inputs, gradients)
        # The dispatcher leaves out arguments at their default.
        given = len(ctx.needs_input_grad)
        return tuple(_in_dtype_of(value, part) for value, part in zip(inputs[:given], parts, strict=False))

    torch.library.register_autograd(f"brandla::{name}", run, setup_context=setup_context, lib=_library)


def _in_dtype_of(value: Any, part: Any) -> Any:
    if isinstance(value, list):
        return [_in_dtype_of(*pair) for pair in zip(value, part, strict=True)]
    return None if part is None else part.to(value.dtype)


def reads_are_free(tensor: Any) -> bool:
    """Say whether a branch may read values: on a CPU, where no read waits, and not of a traced tensor, which has none.

    If the Triton backend is forced, no branch reads values, so the same code runs as on a GPU.
    """
    if type(tensor) is not Tensor or tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return _forced.get() != "triton" and not is_mapped(tensor)


def has_values(tensor: Tensor) -> bool:
    """Say whether a tensor has numbers to read. Meta tensors, fake ones and those under torch.func.vmap have none."""
    return not (tensor.is_meta or hasattr(tensor, "fake_mode") or is_mapped(tensor))


def is_mapped(tensor: Tensor) -> bool:
    """Say whether torch.func.vmap maps over a tensor."""
    # torch.func has no public function for this.
    return torch._C._functorch.is_batchedtensor(tensor)


def without_autocast(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Run the decorated function without torch.autocast: no factorisation survives its bfloat16 products."""

    @wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return call(*args, **kwargs)
        return function(*args, **kwargs)

    return call


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Force one implementation of every op inside the ``with`` block: for tests, benches and debugging.

    Parameters
    ----------
    name
        ``"torch"``: the torch forms, called without the dispatcher. ``"triton"``: the Triton kernels, on GPU tensors,
        or on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1 in the environment) or while launches are
        recorded.

    Raises
    ------
    ValueError
        If ``name`` is neither.
    RuntimeError
        If the backend cannot run here. Nothing falls back silently.

    Examples
    --------
    >>> import torch, brandla
    >>> with brandla.backend("torch"):
    ...     root = brandla.root_update(brandla.LowRankRoot.zeros(8, rank=2), torch.eye(8, 2))
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
    if (reason := _why_no_kernels("cuda")) is not None:
        return reason
    if torch.cuda.is_available():
        return None
    from brandla_kernels._kernels.launch import active_record, interpreted

    if interpreted() or active_record():
        return None
    return "torch sees no GPU, and TRITON_INTERPRET=1 was not set before Triton was imported"


def _why_no_kernels(device_type: str) -> str | None:
    if device_type != "cuda":
        return "the Triton kernels are for CUDA and ROCm"
    if not _HAS_TRITON:
        return "Triton is not installed"
    if torch.cuda.is_available() and nearest(arch := architecture(torch.cuda.current_device())) is None:
        return f"there are no kernels for {arch}"
    return None
