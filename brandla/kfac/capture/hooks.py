"""The hooks of one weight: they collect its calls between two steps."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from brandla._sharded import is_dtensor
from brandla.kfac.capture.calls import Call, Pass, Recorder, Terms
from brandla.kfac.capture.kinds.kind import BoundHook, Kind
from brandla.kfac.capture.tap import LEAF, Keep, Tap, Ticket
from brandla.kfac.values import Version


class Capture:
    """Collects the calls of one weight between two steps.

    Hooks sit on the output tensor of each call, not on the module. So they see the gradient of the value that the layer
    returned, also when an activation overwrites this value in place. A forward pass under ``torch.no_grad`` leaves no
    trace, and a call whose output gets no gradient contributes nothing. After a call that cannot be made into rows, the
    capture collects nothing any more: ``refusal`` says why, and the weight is left to the optimizer.

    If a gradient was set to None without a step, its calls are forgotten at the next use or backward pass, unless the
    weight is sharded. Backward passes that did not add to the weight's gradient are forgotten at the step.
    """

    def __init__(self, kind: Kind, recorder: Recorder) -> None:
        self.enabled = True
        self.passes: frozenset[Pass] = frozenset(("loss", "curvature"))
        self.calls: list[Call] = []
        self.refusal = ""
        self._kind = kind
        self._recorder = recorder
        # The weight between steps. Sharding may replace and free it later.
        self._weight_ref = ref(kind.weight)
        self._handles: list[Any] = []
        # A weight, and the hook that notes its gradient.
        self._gradient_hook: tuple[Tensor, Any] | None = None
        # Whether autograd leaves the weight's gradient out of the call that is running.
        self._leaves_out = False
        self.clear()
        self.attach(kind)

    def attach(self, kind: Kind) -> None:
        """Watch a module that uses the weight."""
        record = partial(self.record, Ticket(kind, self.collect_compiled))
        self._handles += kind.attach(record, lambda: self.enabled and torch.is_grad_enabled())

    def leave_out_weight_gradient(self) -> None:
        """Keep autograd from forming the weight's gradient if one module has the weight and the calls bring all of it.

        ``requires_grad`` of the weight is off while the module's forward pass runs. The bias is trained and gets its
        gradient from autograd. So there is always a graph, and the bias's gradient shows that a backward pass has come.
        """
        if len(self._handles) == 1 and self._kind.can_leave_out:
            module = self._kind.module
            off, on = BoundHook(module, self._switch_off), BoundHook(module, self._switch_on)
            # Registers the old hook again after the new ones: the compiler of torch 2.11 mixes up reordered hooks.
            self._handles.pop().remove()
            self._handles.append(module.register_forward_pre_hook(off))
            # Runs before all hooks that look at the output.
            self._handles.append(module.register_forward_hook(on, prepend=True, always_call=True))
            self.attach(self._kind)

    def detach(self) -> None:
        """Remove every hook. Graphs that are still alive have no effect from then on."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._gradient_hook is not None:
            self._gradient_hook[1].remove()
            self._gradient_hook = None
        self.passes = frozenset()
        self.clear()

    def set_passes(self, passes: Iterable[Pass]) -> None:
        """Choose the passes whose gradients are collected from now on."""
        self._weight_ref = ref(self._kind.weight)
        if self._handles:
            self.passes = frozenset(passes)
            self.enabled = bool(self.passes) and not self.refusal

    def gradient_is_captured(self) -> bool:
        """Say, with no read-back, whether the gradient can only come from the captured calls.

        It was None before the first call, and nobody but autograd has written to it since. GradScaler.unscale_ does
        not count as writing.
        """
        noted = self._autograd_gradient
        return self._was_none and noted is not None and noted.matches(self._watched.grad)

    def is_weight_changed(self) -> bool:
        """Say whether somebody has written to the weight since the last backward pass."""
        if self._weight_version is None:
            return False
        weight, version = self._weight_version
        return weight._version != version and weight is self._kind.weight and not is_dtensor(weight)

    def clear(self) -> int:
        """Forget all calls, and return the bytes that they held."""
        held = sum(map(Call.release, self.calls))
        self.calls = []
        self.edges: list[Any] = []
        # Whether autograd has left the weight's gradient out of a backward pass since the last step.
        self.left_out = False
        # Whether the gradient was None before the first call, and autograd alone has written to it since.
        self._was_none = False
        # The gradient as autograd has left it.
        self._autograd_gradient: Version | None = None
        # The weight at the last backward pass, and its version then.
        self._weight_version: tuple[Tensor, int] | None = None
        # Autograd's numbers of the backward passes that have added to the weight's gradient.
        self._accumulated_by: set[int] = set()
        return held

    def forget_unaccumulated(self) -> None:
        """Forget the loss's gradients from backward passes that have not added to the weight's gradient.

        If no pass is known to have added to it, as with gradients that were set by hand, all are kept.
        """
        for call in self.calls:
            if self._accumulated_by and not self._accumulated_by.issuperset(call.tasks):
                call.keep(self._accumulated_by)
                self.calls = [kept for kept in self.calls if any(kept.gradients.values())]

    def forget_discarded(self, pass_name: Pass) -> None:
        """Forget the calls if the weight's gradient is None again: the loop has given up their step."""
        if self._gradient_is_gone() and any(call.gradients[pass_name] for call in self.calls):
            self._forget_passes()
            self.edges = []

    def record(self, ticket: Ticket, kind: Kind, inputs: Any, output: Any) -> Any:
        """Watch the output of a call, and return the output to continue with."""
        weight = kind.weight
        if not (self.enabled and weight.requires_grad and torch.is_grad_enabled()) or _in_functorch():
            return output
        # Inside a functional call, another tensor takes the parameter's place.
        if not isinstance(weight, nn.Parameter) and any(weight is own for own in kind.module._parameters.values()):
            return output
        refusal, compiles = kind.refusal(inputs, output), torch.compiler.is_compiling()
        if compiles and not refusal and kind is not ticket.kind and type(kind).of_call is Kind.of_call:
            refusal = "torch.compile: its inputs are not one tensor"
        if refusal:
            if self._leaves_out:
                message = f"KFAC: gradient must be 'autograd' for this {type(kind.module).__name__}: {refusal}"
                raise RuntimeError(message)
            self.refusal = refusal
        elif output.requires_grad and compiles:
            # torch leaves Function.apply without annotations.
            return Tap.apply(output, inputs.detach(), ticket.number)  # type: ignore[no-untyped-call]
        elif output.requires_grad:
            self._watch(kind, inputs, output)
        return output

    def collect(self, call: Call, gradient: Tensor) -> None:
        """Store the gradient of a call's output."""
        # If autograd has left the weight's gradient out, the step needs this one, even if the pass is not collected.
        is_needed = call.left_out and self._recorder.running == "loss" and bool(self._handles)
        # A graph that is still alive also holds calls that were forgotten, without their data.
        forgotten = call.fetch is None and call.inputs is None
        if self.refusal or forgotten or not (is_needed or self._recorder.running in self.passes):
            return
        self.left_out |= call.left_out
        if self._recorder.running == "loss":
            self._weight_version = self._kind.weight, self._kind.weight._version
            if self._accumulated_by and self._gradient_is_gone():
                self._forget_passes(keep=self._recorder.terms["curvature"])
            self._was_none = self.gradient_is_captured() if self._accumulated_by else self._watched.grad is None
            self._watch_gradient(self._watched)
        if call not in self.calls:
            self.calls.append(call)
        call.add(gradient.detach(), self._recorder)

    def collect_compiled(self, kind: Kind, inputs: Tensor, gradient: Tensor) -> None:
        """Store copies of the input and output gradient of a call in a compiled graph, which may reuse their memory."""
        recorder = self._recorder
        if self.refusal or recorder.running not in self.passes:
            return
        if recorder.draw:
            # Gradients come in the same order in each pass through a graph. So this one belongs to the first call that
            # has no gradient of this draw yet.
            terms = recorder.terms["curvature"]
            run = [call for call in self.calls if call.compiled and call.terms["curvature"] is terms]
            call = next(call for call in run if len(call.gradients["curvature"]) == recorder.draw)
        else:
            copy = inputs.clone()
            call = Call(kind.of_call(), lambda: copy, compiled=True, valid=recorder.valid)
        self.collect(call, gradient.clone())

    def _watch(self, kind: Kind, inputs: Tensor, output: Tensor) -> None:
        """Collect the gradient of a call's output, also if an activation overwrites the output."""
        groups, valid = self._recorder.groups, self._recorder.valid if kind.valid is None else kind.valid
        groups = groups if groups is not None and groups.index.shape == inputs.shape[:1] else None
        # Up to torch 2.12, a node made in Python dies with its result. So the closure holds the result, not the node.
        saved: Any = Keep.apply(LEAF, inputs.detach())  # type: ignore[no-untyped-call]
        call = Call(kind, lambda: saved.grad_fn.saved_tensors[0], left_out=self._leaves_out, groups=groups, valid=valid)
        value, base, shape = output, output._base, output.shape
        # A Linear returns three dimensions as a view of two. If an activation overwrites the view, autograd gives the
        # view a new history without the hook. A hook on the base stays with the old values.
        if base is not None and base.requires_grad and base.numel() == output.numel():
            value = base if base.is_contiguous() and output.is_contiguous() else output
        # Inside a backward pass, an activation checkpoint repeats calls that have been watched already.
        if torch._C._current_graph_task_id() == -1:
            self.forget_discarded("loss")
            # The output gradients of all time steps arrive only after the weight's own gradient.
            if call.kind.positions_first:
                self._watch_gradient(call.kind.weight)
            if self._recorder.edges:
                self.edges.append(torch.autograd.graph.get_gradient_edge(value))
        value.register_hook(lambda gradient: self.collect(call, gradient.reshape(shape)))

    def _switch_off(self, *_: Any) -> None:
        """Leave the weight's gradient out of the next call, if the call is captured and no other hook reads it."""
        self._leaves_out = False
        if torch.compiler.is_compiling() or _in_functorch() or not torch.is_grad_enabled():
            return
        weight, bias = self._kind.weight, self._kind.bias
        parts_are_plain = all(isinstance(part, nn.Parameter) and not is_dtensor(part) for part in (weight, bias))
        if weight.requires_grad and parts_are_plain and self.enabled and "loss" in self.passes:
            # 0 or 1: another hook would read the gradient.
            own_hook_count = int(self._gradient_hook is not None and self._gradient_hook[0] is weight)
            hooks = (*(weight._backward_hooks or ()), *(weight._post_accumulate_grad_hooks or ()))
            self._leaves_out = len(hooks) == own_hook_count
            weight.requires_grad_(not self._leaves_out)

    def _switch_on(self, *_: Any) -> None:
        if self._leaves_out:
            self._kind.weight.requires_grad_(True)

    @property
    def _watched(self) -> Any:
        """The parameter whose gradient is watched: the bias if the weight gets no gradient."""
        return self._kind.bias if self.left_out else self._kind.weight

    def _gradient_is_gone(self) -> bool:
        """Say whether the weight has no gradient, or is a new tensor of another shape.

        For a sharded weight this is unknown. During a pass another tensor takes the weight's place. This tensor loses
        its gradient at the reduction, and the weight has none before.
        """
        if self.left_out:
            return self._watched.grad is None
        weight: Tensor = self._kind.weight
        if self._gradient_hook is not None and self._gradient_hook[0].shape != weight.shape:
            return True
        return weight is self._weight_ref() and not is_dtensor(weight) and weight.grad is None

    def _forget_passes(self, keep: Terms | None = None) -> None:
        """Forget all backward passes so far, except those for the curvature of the terms ``keep``."""
        for call in self.calls:
            call.keep(())
            # Another backward pass may run through the same graph.
            if keep is None or call.terms["curvature"] is not keep:
                call.gradients["curvature"] = []
        self.calls = [call for call in self.calls if any(call.gradients.values())]
        self._accumulated_by = set()

    def _watch_gradient(self, weight: Tensor) -> None:
        """Note each new gradient of a weight, if it is trainable: a frozen tensor takes no such hook."""
        if weight.requires_grad and (self._gradient_hook is None or self._gradient_hook[0] is not weight):
            if self._gradient_hook is not None:
                self._gradient_hook[1].remove()
            # The garbage collector does not see references in a tensor's hooks: a strong one to self would be a leak.
            self_ref = ref(self)

            def note(tensor: Tensor) -> None:
                capture = self_ref()
                if capture is not None:
                    capture._accumulated_by.add(torch._C._current_graph_task_id())
                    if tensor.grad is not None:
                        capture._autograd_gradient = Version(tensor.grad)

            self._gradient_hook = weight, weight.register_post_accumulate_grad_hook(note)


def _in_functorch() -> bool:
    """Say whether torch.func is differentiating: then no gradient reaches a weight."""
    # The compiler takes None for an object here, but not for an instance of this type.
    return isinstance(torch._C._functorch.peek_interpreter_stack(), torch._C._functorch.CInterpreter)
