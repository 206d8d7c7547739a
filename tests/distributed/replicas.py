"""Replicas of a network train under K-FAC, each on its share of the batches; one process trains on all batches."""

import os
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from brandla.kfac import KFAC, Brand, Exact, Strategy
from builders import tensors_in
from distributed.processes import refusal, whole
from kfac.networks import Words, batch, mlp
from kfac.networks import train as train_on

STEPS = 3
RATE = 0.3
WIDTHS = (10, 30, 24, 4)
# Times a scale of 2³⁰ this is more than the largest float64, 2¹⁰²⁴.
HUGE = 2.0**1000

network = partial(mlp, *WIDTHS)


def falling(step):
    """Damping that falls with the steps."""
    return 0.2 / (1 + step)


class Case(NamedTuple):
    """A way to train."""

    strategy: Strategy
    mode: str = "gather"
    # Samples of each rank in a step.
    sizes: tuple[int, ...] = (6, 6)
    # Backward passes before a step, all but the last without synchronisation.
    accumulate: int = 1
    options: dict[str, Any] | None = None
    model: Callable[[], nn.Module] = network
    # "ddp", "static" or "fsdp"; "plain" and "fsdp later" give K-FAC the model before it is wrapped.
    wrap: str = "ddp"
    # The rank and the step of a batch with a NaN in it.
    broken: tuple[int, int] | None = None
    # The first scale of the loss, and the ranks and steps at which the scaled loss is infinite.
    scale: float | None = None
    overflows: tuple[tuple[int, int], ...] = ()
    # Whether `curvature` is called although G is made of the loss's gradients: it gives the number of terms.
    counted: bool = False


class Mixed(Words):
    """Every kind of layer, on inputs that are read as words."""

    def __init__(self):
        super().__init__(12, 8, WIDTHS[-1])

    def forward(self, inputs):
        return super().forward((3 * inputs.abs()).long().clamp(max=11))


class Branches(nn.Module):
    """Two networks. A batch goes through the first if its first number is positive, and else through the second."""

    def __init__(self):
        super().__init__()
        self.first, self.second = mlp(10, 30, 4, seed=1), mlp(10, 24, 4, seed=2)
        self.shared = mlp(4, 8, 4, seed=3)

    def forward(self, inputs):
        branch = self.first if bool(inputs[0, 0] > 0) else self.second
        return self.shared(branch(inputs))


def share(case, rank, step, part):
    """Return the inputs and labels of a rank's backward pass."""
    inputs, labels = batch(case.sizes[rank], WIDTHS[0], WIDTHS[-1], seed=1000 * step + 10 * part + rank)
    inputs[0, 0] = 1.0 if rank % 2 else -1.0
    if case.broken == (rank, step):
        inputs[0, 1] = float("nan")
    return inputs, labels


class Training:
    """One process's network and its training objects; batches go through ``wrapped``.

    A process that trains alone takes the batches of all ranks, with the mean of their losses.
    """

    def __init__(self, case, model, wrapped=None, group=None):
        self.case, self.group, self.model = case, group, model
        self.wrapped = model if wrapped is None else wrapped
        self.scaler = torch.amp.GradScaler("cpu", case.scale or 1.0, enabled=case.scale is not None)
        self.preconditioner = self._preconditioner()

    def backward(self, rank, step, part, ranks=1):
        """Send back the mean over a rank's samples, divided for accumulation and by the number of ranks."""
        case = self.case
        inputs, labels = share(case, rank, step, part)
        outputs = self.wrapped(inputs)
        # In one process, the terms of several ranks have the weights that the mean of the ranks' means gives them.
        weights = None if ranks == 1 else outputs.new_full((len(inputs),), 1 / len(inputs))
        if case.counted or "curvature" in (case.options or {}):
            self.preconditioner.curvature(outputs, weights=weights)
        loss = nn.functional.cross_entropy(outputs, labels) / (case.accumulate * ranks)
        self.scaler.scale(loss * (HUGE if (rank, step) in case.overflows else 1)).backward()

    def step(self, step, *, alone=False):
        self._passes(step, alone)
        # Without momentum, a new optimizer at each step is the same as the last.
        optimizer = torch.optim.SGD(self.model.parameters(), lr=RATE)
        self.scaler.unscale_(optimizer)
        self.preconditioner.step()
        self.scaler.step(optimizer)
        self.scaler.update()
        if self.case.strategy.takes_second_pass:
            self._passes(step, alone)
            self.preconditioner.second_pass()

    def _passes(self, step, alone):
        self.model.zero_grad()
        parts = range(self.case.accumulate)
        if alone:
            ranks = len(self.case.sizes)
            for part in parts:
                for rank in range(ranks):
                    self.backward(rank, step, part, ranks)
            return
        rank = distributed.get_rank(self.group)
        with unsynchronised(self.wrapped):
            for part in parts[:-1]:
                self.backward(rank, step, part)
        self.backward(rank, step, parts[-1])

    def run(self, first=0, *, alone=False):
        """Take steps; return the weights."""
        for step in range(first, first + STEPS):
            self.step(step, alone=alone)
        return self.parameters()

    def state(self):
        """Return the state from which training can continue."""
        weights = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        return {"model": weights, "kfac": self.preconditioner.state_dict(), "scaler": self.scaler.state_dict()}

    def resume(self, state):
        """Continue from a state, with a new preconditioner."""
        self.preconditioner.remove()
        self.model.load_state_dict(state["model"])
        self.scaler.load_state_dict(state["scaler"])
        self.preconditioner = self._preconditioner()
        self.preconditioner.load_state_dict(state["kfac"])

    def parameters(self):
        return [whole(parameter.detach()).clone() for parameter in self.model.parameters()]

    def _preconditioner(self):
        options = {"damping": 0.1, "clip": 0.1, "process_group": self.group, **(self.case.options or {})}
        model = self.model if self.case.wrap == "plain" else self.wrapped
        return KFAC(model, self.case.strategy, distributed=self.case.mode, scaler=self.scaler, **options)


@contextmanager
def unsynchronised(model):
    """Keep backward passes from reducing gradients over the processes."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
        return
    model.set_requires_gradient_sync(requires_gradient_sync=False)
    yield
    model.set_requires_gradient_sync(requires_gradient_sync=True)


def replica(case, group=None):
    """Return one process's part of the training of a case."""
    model = case.model()
    if case.wrap.startswith("fsdp"):
        training = Training(case, model) if "later" in case.wrap else None
        for module in (*(layer for layer in model if isinstance(layer, nn.Linear)), model):
            fully_shard(module)
        return training or Training(case, model)
    unused = case.model is Branches
    wrapped = DistributedDataParallel(
        model, process_group=group, find_unused_parameters=unused, static_graph=case.wrap == "static"
    )
    return Training(case, model, wrapped, group)


def alone(case, first=0):
    """Train in one process on the batches of all ranks."""
    return Training(case, case.model()).run(first, alone=True)


def error_of(parameters, reference):
    """Return the largest relative error."""
    return max(float((own - right).norm() / right.norm()) for own, right in zip(parameters, reference, strict=True))


def is_last():
    return distributed.get_rank() == distributed.get_world_size() - 1


def train(cases):
    """Train each of the named cases in this group; return parameters, and the states before the last step.

    Check that parameters and states equal those of the other ranks bit by bit, and that a checkpoint continues them.
    """
    torch.set_grad_enabled(True)
    warnings.simplefilter("ignore")
    trained = []
    for name, case in cases.items():
        training = replica(case)
        for step in range(STEPS):
            if step == STEPS - 1:
                state = training.state()
            training.step(step)
            assert _is_same(training.parameters()), name
        parameters = training.parameters()
        assert _is_same(tensors_in(training.preconditioner.state_dict())), f"{name}: states"
        assert training.preconditioner.report().skipped == len(case.overflows) + (case.broken is not None), name
        assert training.scaler.get_scale() == (case.scale or 1.0) / 2 ** len(case.overflows), name
        training.resume(state)
        training.step(STEPS - 1)
        assert all(map(torch.equal, parameters, training.parameters())), f"{name}: continued from a checkpoint"
        trained.append((parameters, whole(state)))
    return trained


def _is_same(tensors):
    """Compare tensors with those of all other ranks, bit by bit."""
    own = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
    everyone = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(everyone, own)
    return all(torch.equal(own.view(torch.int64), other.view(torch.int64)) for other in everyone)


def in_turn(calls):
    """Return the results of several functions, called in turn in one launch."""
    return [function(*arguments) for function, arguments in calls]


def train_in_pairs(cases, firsts):
    """Train in two independent groups of two, each on the batches from its own first step on."""
    groups = [distributed.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    own = distributed.get_rank() // 2
    return [replica(case, groups[own]).run(firsts[own]) for case in cases]


def draws(calls, steps):
    """Return the noise that this rank sends back in each call of `KFAC.curvature`, (steps · calls, numbers)."""
    model = nn.Linear(10, 10)
    preconditioner = KFAC(DistributedDataParallel(model), Exact(), curvature="monte-carlo")
    inputs, _ = batch(100, 10, 10, dtype=torch.float32)
    drawn = []
    for _ in range(steps):
        model.zero_grad()
        for _ in range(calls):
            outputs = model(inputs)
            handle = outputs.register_hook(drawn.append)
            preconditioner.curvature(outputs, loss="mse")
            handle.remove()
            outputs.square().mean().backward()
        preconditioner.step()
    return torch.stack(drawn).flatten(1)


def first_rank_brings_all(mode):
    """Step before any backward pass, then with gradients in the first rank alone; all ranks get the same states."""
    warnings.simplefilter("ignore")
    training = Training(Case(Brand(6), mode), network())
    training.preconditioner.step()
    is_first = distributed.get_rank() == 0
    if is_first:
        training.backward(0, 1, 0)
    training.preconditioner.step()
    assert all((parameter.grad is not None) == is_first for parameter in training.model.parameters())
    states = tensors_in(training.preconditioner.state_dict())
    assert states
    assert _is_same(states)


def train_alike(mode, options):
    """Train on the same batches on every rank, or in one process; return the factors' strategies and the parameters."""
    model = mlp(40, 44)
    wrapped = DistributedDataParallel(model) if mode else model
    preconditioner = KFAC(wrapped, Brand(12), distributed=mode or "gather", damping=0.1, **options)
    train_on(wrapped, preconditioner, (batch(8, 40, 44, seed=step) for step in range(STEPS)), RATE)
    strategies = [row.strategy.partition("(")[0] for row in preconditioner.report().factors]
    return strategies, [parameter.detach() for parameter in model.parameters()]


def last_rank_refuses(mode):
    """Make the last rank leave a layer to the optimizer: then all ranks leave it, and have the same gradients."""
    warnings.simplefilter("ignore")
    training = replica(Case(Exact(), mode))
    model, preconditioner = training.model, training.preconditioner
    training.backward(distributed.get_rank(), 0, 0)
    if is_last():
        preconditioner._layers[1].capture.refusal = "its output is a secret"
    before = model[2].weight.grad.clone()
    preconditioner.step()
    assert [bool(layer.capture.refusal) for layer in preconditioner._layers] == [False, True, False]
    assert torch.equal(before, model[2].weight.grad)
    assert _is_same([parameter.grad for parameter in model.parameters()])


def leaves_gradients_out():
    """Ask autograd to leave gradients out; return the errors for a model in DistributedDataParallel and a plain one."""
    wrapped = (wrap(nn.Linear(20, 10)) for wrap in (DistributedDataParallel, nn.Sequential))
    errors = (refusal(lambda model=model: KFAC(model, Exact(), gradient="pair")) for model in wrapped)
    return list(filter(None, errors))


def last_rank_is_missing(mode, seconds):
    """Step in all ranks but the last, which sleeps ``seconds`` or, for None, exits; return the errors of the others."""
    training = Training(Case(Brand(4), mode, (6,) * distributed.get_world_size()), network())
    training.backward(distributed.get_rank(), 0, 0)
    if not is_last():
        return refusal(training.preconditioner.step)
    if seconds is None:
        os._exit(0)
    return time.sleep(seconds)
