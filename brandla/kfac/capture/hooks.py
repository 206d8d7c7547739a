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
from brandla.kfac.capture.kinds.kind import Kind, OwnHook
from brandla.kfac.capture.tap import LEAF, Keep, Tap, Ticket
from brandla.kfac.values import Version


class Capture:
    """Collects the calls of one weight between two steps.

    Hooks sit on the output tensor of each call, not on the module: they see the gradient of the value that the layer
    returned, also when an activation overwrites it in place. A forward pass under ``torch.no_grad`` leaves no trace,
    and a call whose output gets no gradient contributes nothing. After a call that cannot be made into rows nothing is
    collected any more: ``refusal`` says why, and the weight is left to the optimizer.

    Calls whose gradient was set to None without a step are forgotten at the next use or backward pass, unless the
    weight is sharded. Backward passes that did not add to the weight's gradient are forgotten at the step.
    """

    def __init__(self, kind: Kind, recorder: Recorder) -> None:
        self.enabled = True
        self.wanted: frozenset[Pass] = frozenset(("loss", "curvature"))
        self.calls: list[Call] = []
        self.refusal = ""
        self._kind = kind
        self._recorder = recorder
        # The weight between steps, which may be sharded later and freed.
        self._lasting = ref(kind.weight)
        self._handles: list[Any] = []
        # The weight whose gradient is noted, and the hook that does it.
        self._noting: tuple[Tensor, Any] | None = None
        # Whether autograd does not form the weight's gradient in the last call.
        self._is_leaving = False
        self.clear()
        self.attach(kind)

    def attach(self, kind: Kind) -> None:
        """Watch a module that uses the weight."""
        record = partial(self.record, Ticket(kind, self.collect_compiled))
        self._handles += kind.attach(record, lambda: self.enabled and torch.is_grad_enabled())

    def leave_out(self) -> None:
        """Have autograd not form the weight's gradient wherever the calls bring all of it, if one module has it.

        ``requires_grad`` of the weight is off while the module's forward pass runs. The bias is trained and gets its
        gradient from autograd: so there is a graph in any case, and the bias's gradient tells when one came.
        """
        if len(self._handles) == 1 and self._kind.leaves_out:
            module = self._kind.module
            off, on = OwnHook(module, self._switch_off), OwnHook(module, self._switch_on)
            # Registered again after them: the compiler of torch 2.11 mixes up hooks that have changed places.
            self._handles.pop().remove()
            self._handles.append(module.register_forward_pre_hook(off))
            # Before all that look at the output.
            self._handles.append(module.register_forward_hook(on, prepend=True, always_call=True))
            self.attach(self._kind)

    def detach(self) -> None:
        """Remove every hook, and ignore graphs that are still alive."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._noting is not None:
            self._noting[1].remove()
            self._noting = None
        self.wanted = frozenset()
        self.clear()

    def want(self, passes: Iterable[Pass]) -> None:
        """Choose the passes whose gradients are collected from now on."""
        self._lasting = ref(self._kind.weight)
        if self._handles:
            self.wanted = frozenset(passes)
            self.enabled = bool(self.wanted) and not self.refusal

    def gradient_is_pairs(self) -> bool:
        """Say whether the gradient can only be that of the captured calls, as far as is known with no read-back.

        It was empty before the first of them, and nobody has written to it since autograd did. GradScaler.unscale_ does
        not count as writing.
        """
        noted = self._accumulated
        return self._fresh and noted is not None and noted.matches(self._witness.grad)

    def is_overtaken(self) -> bool:
        """Say whether somebody has written to the weight since the last backward pass."""
        if self._seen is None:
            return False
        weight, version = self._seen
        return weight._version != version and weight is self._kind.weight and not is_dtensor(weight)

    def clear(self) -> int:
        """Forget all calls, and return how many bytes they have held."""
        held = sum(map(Call.release, self.calls))
        self.calls = []
        self.edges: list[Any] = []
        # Whether autograd has left the weight's gradient out of a backward pass since the last step.
        self.left_out = False
        # Whether the weight had no gradient before the first of the calls, and autograd alone has written to it since.
        self._fresh = False
        # The gradient as autograd has left it.
        self._accumulated: Version | None = None
        # The weight at the last backward pass, and its version then.
        self._seen: tuple[Tensor, int] | None = None
        # The backward passes, by autograd's numbers, that have added to the weight's gradient.
        self._reached: set[int] = set()
        return held

    def keep_reached(self) -> None:
        """Forget the loss's gradients of backward passes that have not added to the weight's.

        Where no pass is known to have done so, as with gradients that were set by hand, all are kept.
        """
        for call in self.calls:
            if self._reached and not self._reached.issuperset(call.tasks):
                call.keep(self._reached)
                self.calls = [own for own in self.calls if any(own.gradients.values())]

    def forget_discarded(self, of: Pass) -> None:
        """Forget the calls if the weight's gradient is None again: the step they were for has been given up."""
        if self._gradient_is_gone() and any(call.gradients[of] for call in self.calls):
            self._forget_passes()
            self.edges = []

    def record(self, ticket: Ticket, kind: Kind, inputs: Any, output: Any) -> Any:
        """Watch the output of a call, and return the output to go on with."""
        weight = kind.weight
        if not (self.enabled and weight.requires_grad and torch.is_grad_enabled()) or _is_functional():
            return output
        # A functional call has put a tensor of its own in the parameter's place.
        if not isinstance(weight, nn.Parameter) and any(weight is own for own in kind.module._parameters.values()):
            return output
        refusal, compiles = kind.refusal(inputs, output), torch.compiler.is_compiling()
        if compiles and not refusal and kind is not ticket.kind and type(kind).of_call is Kind.of_call:
            refusal = "torch.compile: its inputs are not one tensor"
        if refusal:
            if self._is_leaving:
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
        """Take in the gradient of a call's output."""
        # What autograd has left out must be taken in, whatever is wanted by now.
        owed = call.left_out and self._recorder.running == "loss" and bool(self._handles)
        # A graph that is still alive holds a call that has been forgotten, but not its data.
        forgotten = call.fetch is None and call.inputs is None
        if self.refusal or forgotten or not (owed or self._recorder.running in self.wanted):
            return
        self.left_out |= call.left_out
        if self._recorder.running == "loss":
            self._seen = self._kind.weight, self._kind.weight._version
            if self._reached and self._gradient_is_gone():
                self._forget_passes(but=self._recorder.terms["curvature"])
            self._fresh = self.gradient_is_pairs() if self._reached else self._witness.grad is None
            self._note_gradients_of(self._witness)
        if call not in self.calls:
            self.calls.append(call)
        call.add(gradient.detach(), self._recorder)

    def collect_compiled(self, kind: Kind, inputs: Tensor, gradient: Tensor) -> None:
        """Take in input and output gradient of a call inside a compiled graph, whose memory may be used again."""
        recorder = self._recorder
        if self.refusal or recorder.running not in self.wanted:
            return
        if recorder.draw:
            # Gradients come in the same order in each pass through a graph: this one is of the first call without it.
            terms = recorder.terms["curvature"]
            of_run = [call for call in self.calls if call.compiled and call.terms["curvature"] is terms]
            call = next(call for call in of_run if len(call.gradients["curvature"]) == recorder.draw)
        else:
            copy = inputs.clone()
            call = Call(kind.of_call(), lambda: copy, compiled=True, valid=recorder.valid)
        self.collect(call, gradient.clone())

    def _watch(self, kind: Kind, inputs: Tensor, output: Tensor) -> None:
        """Collect the gradient of a call's output, also where that is overwritten."""
        groups, valid = self._recorder.groups, self._recorder.valid if kind.valid is None else kind.valid
        groups = groups if groups is not None and groups.index.shape == inputs.shape[:1] else None
        # A node of Python's lives no longer than the results it made, whoever else holds it (torch up to 2.12).
        keeping: Any = Keep.apply(LEAF, inputs.detach())  # type: ignore[no-untyped-call]
        call = Call(
            kind, lambda: keeping.grad_fn.saved_tensors[0], left_out=self._is_leaving, groups=groups, valid=valid
        )
        value, base, shape = output, output._base, output.shape
        # A Linear gives three dimensions as a view of two. Where an activation overwrites the view, autograd gives that
        # a new history, with no hook in it, and leaves the one of the values behind it.
        if base is not None and base.requires_grad and base.numel() == output.numel():
            value = base if base.is_contiguous() and output.is_contiguous() else output
        # Inside a backward pass an activation checkpoint computes again what has been watched already.
        if torch._C._current_graph_task_id() == -1:
            self.forget_discarded("loss")
            # The gradients of all time steps come when the weight has its own.
            if call.kind.positions_first:
                self._note_gradients_of(call.kind.weight)
            if self._recorder.edges:
                self.edges.append(torch.autograd.graph.get_gradient_edge(value))
        value.register_hook(lambda gradient: self.collect(call, gradient.reshape(shape)))

    def _switch_off(self, *_: Any) -> None:
        """Leave the gradient out of the call that comes, if that is captured and nobody else waits for it."""
        self._is_leaving = False
        if torch.compiler.is_compiling() or _is_functional() or not torch.is_grad_enabled():
            return
        weight, bias = self._kind.weight, self._kind.bias
        parts_are_plain = all(isinstance(part, nn.Parameter) and not is_dtensor(part) for part in (weight, bias))
        if weight.requires_grad and parts_are_plain and self.enabled and "loss" in self.wanted:
            own = self._noting is not None and self._noting[0] is weight
            hooks = (*(weight._backward_hooks or ()), *(weight._post_accumulate_grad_hooks or ()))
            self._is_leaving = len(hooks) == own
            weight.requires_grad_(not self._is_leaving)

    def _switch_on(self, *_: Any) -> None:
        if self._is_leaving:
            self._kind.weight.requires_grad_(True)

    @property
    def _witness(self) -> Any:
        """The parameter whose gradient is watched: the bias, where the weight gets no gradient."""
        return self._kind.bias if self.left_out else self._kind.weight

    def _gradient_is_gone(self) -> bool:
        """Say whether the weight has no gradient, or is no longer the one that had it, since its shape is another.

        For a sharded weight this cannot be known: during a pass another tensor takes its place, which has no gradient
        once that has been reduced, and the weight itself has none until then.
        """
        if self.left_out:
            return self._witness.grad is None
        weight: Tensor = self._kind.weight
        if self._noting is not None and self._noting[0].shape != weight.shape:
            return True
        return weight is self._lasting() and not is_dtensor(weight) and weight.grad is None

    def _forget_passes(self, but: Terms | None = None) -> None:
        """Forget all backward passes so far but those for the curvature of these terms."""
        for call in self.calls:
            call.keep(())
            # The graph may be gone through again.
            if but is None or call.terms["curvature"] is not but:
                call.gradients["curvature"] = []
        self.calls = [call for call in self.calls if any(call.gradients.values())]
        self._reached = set()

    def _note_gradients_of(self, weight: Tensor) -> None:
        """Have the gradient of a weight noted, once it is trainable: a frozen one takes no such hook."""
        if weight.requires_grad and (self._noting is None or self._noting[0] is not weight):
            if self._noting is not None:
                self._noting[1].remove()
            # The garbage collector does not see through hooks of a tensor's: they must not hold what holds the tensor.
            known = ref(self)

            def note(of: Tensor) -> None:
                own = known()
                if own is not None:
                    own._reached.add(torch._C._current_graph_task_id())
                    if of.grad is not None:
                        own._accumulated = Version(of.grad)

            self._noting = weight, weight.register_post_accumulate_grad_hook(note)


def _is_functional() -> bool:
    """Say whether torch.func is differentiating: no gradient gets to a weight then."""
    # The compiler takes None for an object here, but not for one of the type.
    return isinstance(torch._C._functorch.peek_interpreter_stack(), torch._C._functorch.CInterpreter)
