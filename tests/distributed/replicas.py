"""Replicas of a network that train under K-FAC, each on its share of the batches, and one process on all of them."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from brandla.kfac import KFAC, Brand, Exact, Strategy
from kfac.networks import batch, mlp

STEPS = 5
RATE = 0.3
WIDTHS = (10, 30, 24, 4)


def network() -> nn.Module:
    """A network for classification."""
    return mlp(*WIDTHS)


def falling(step: int) -> float:
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
    wrap: str = "ddp"
    # The rank and the step of a batch with a NaN in it.
    broken: tuple[int, int] | None = None


class Mixed(nn.Module):
    """An embedding, a normalisation, a grouped convolution and a projection of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.embedding, self.norm = nn.Embedding(12, 8), nn.LayerNorm(8)
        self.convolution, self.projection = nn.Conv1d(8, 6, 3, groups=2), nn.Linear(6, 4)
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        """Read the inputs as words."""
        words = self.norm(self.embedding((3 * inputs.abs()).long().clamp(max=11)))
        return self.projection(self.convolution(words.mT).tanh().mean(-1))


class Branches(nn.Module):
    """Two networks of which a batch goes through one: the first if its first number is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = mlp(10, 30, 4, seed=1), mlp(10, 24, 4, seed=2)
        self.shared = mlp(4, 8, 4, seed=3)

    def forward(self, inputs: Tensor) -> Tensor:
        """Choose by the data."""
        branch = self.first if bool(inputs[0, 0] > 0) else self.second
        return self.shared(branch(inputs))


def share(case: Case, rank: int, step: int, part: int) -> tuple[Tensor, Tensor]:
    """Return what a rank trains on in one backward pass."""
    inputs, labels = batch(case.sizes[rank], WIDTHS[0], WIDTHS[-1], seed=1000 * step + 10 * part + rank)
    inputs[0, 0] = 1.0 if rank % 2 else -1.0
    if case.broken == (rank, step):
        inputs[0, 1] = float("nan")
    return inputs, labels


def backward(model: nn.Module, case: Case, preconditioner: KFAC, rank: int, step: int, part: int, ranks: int) -> None:
    """Send back the mean over a rank's samples, scaled for accumulation and for the number of ranks."""
    inputs, labels = share(case, rank, step, part)
    outputs = model(inputs)
    preconditioner.curvature(outputs)
    (nn.functional.cross_entropy(outputs, labels) / (case.accumulate * ranks)).backward()


def preconditioner_of(model: nn.Module, case: Case) -> KFAC:
    """Construct with the options of a case."""
    options = {"damping": 0.1, "clip": 0.1, **(case.options or {})}
    return KFAC(model, case.strategy, distributed=case.mode, **options)


def alone(case: Case, steps: int = STEPS) -> list[Tensor]:
    """Train in one process on the batches of all ranks: the loss is the mean of theirs."""
    model = case.model()
    preconditioner = preconditioner_of(model, case._replace(mode="gather"))
    for step in range(steps):
        step_alone(case, model, preconditioner, step)
    return [parameter.detach() for parameter in model.parameters()]


def step_alone(case: Case, model: nn.Module, preconditioner: KFAC, step: int) -> None:
    """Take one step of `alone`."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    optimizer.zero_grad()
    for rank in range(len(case.sizes)):
        for part in range(case.accumulate):
            backward(model, case, preconditioner, rank, step, part, len(case.sizes))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "KFAC")
        preconditioner.step()
    optimizer.step()


class Outcome(NamedTuple):
    """What a rank found: its parameters, and whether they and all states are those of the others, bit by bit."""

    parameters: list[Tensor]
    same: bool
    states_same: bool
    continued_same: bool
    skipped: int


def train(cases: list[Case]) -> list[Outcome]:
    """Train in this group, each case in turn."""
    torch.set_grad_enabled(True)
    warnings.simplefilter("ignore")
    return [_train(case) for case in cases]


def _train(case: Case) -> Outcome:
    model = case.model()
    wrapped = DistributedDataParallel(model, find_unused_parameters=case.model is Branches)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    preconditioner = preconditioner_of(wrapped if case.wrap == "ddp" else model, case)
    same = True
    for step in range(STEPS):
        if step == STEPS - 1:
            saved = preconditioner.state_dict()
            before = [parameter.detach().clone() for parameter in model.parameters()]
        _take_step(case, wrapped, optimizer, preconditioner, step)
        same = same and _is_same(list(model.parameters()))
    parameters = [parameter.detach().clone() for parameter in model.parameters()]
    states_same = _is_same(tensors_of(preconditioner.state_dict()))
    skipped = preconditioner.report().skipped
    preconditioner.remove()
    # Once more from the checkpoint, by a new preconditioner.
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), before, strict=True):
            parameter.copy_(value)
    resumed = preconditioner_of(model, case)
    resumed.load_state_dict(saved)
    _take_step(case, wrapped, optimizer, resumed, STEPS - 1)
    continued = all(map(torch.equal, parameters, model.parameters()))
    return Outcome(parameters, same, states_same, continued, skipped)


def _take_step(case: Case, model: Any, optimizer: torch.optim.Optimizer, preconditioner: KFAC, step: int) -> None:
    rank = distributed.get_rank()
    optimizer.zero_grad()
    with model.no_sync():
        for part in range(case.accumulate - 1):
            backward(model, case, preconditioner, rank, step, part, 1)
    backward(model, case, preconditioner, rank, step, case.accumulate - 1, 1)
    preconditioner.step()
    optimizer.step()


def tensors_of(nested: Any) -> list[Tensor]:
    """Return all tensors of nested dicts, in the order of their keys."""
    if isinstance(nested, Tensor):
        return [nested]
    if isinstance(nested, dict):
        return [tensor for key in sorted(nested) for tensor in tensors_of(nested[key])]
    return []


def _is_same(tensors: list[Tensor]) -> bool:
    """Compare tensors with those of all other ranks, bit by bit."""
    own = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
    everyone = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(everyone, own)
    return all(torch.equal(own.view(torch.int64), other.view(torch.int64)) for other in everyone)


def checkpoint(case: Case) -> tuple[dict[str, Any], list[Tensor]]:
    """Return the state after some steps, and the parameters after one more."""
    warnings.simplefilter("ignore")
    model = case.model()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    preconditioner = preconditioner_of(wrapped, case)
    for step in range(STEPS):
        _take_step(case, wrapped, optimizer, preconditioner, step)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = {"model": weights, "kfac": preconditioner.state_dict()}
    _take_step(case, wrapped, optimizer, preconditioner, STEPS)
    return state, [parameter.detach() for parameter in model.parameters()]


def train_alike(mode: str | None, options: dict[str, int]) -> tuple[list[str], list[Tensor]]:
    """Train on the same batches on every rank, or in one process; return what the factors got, and the parameters."""
    torch.manual_seed(0)
    model = nn.Linear(40, 44, dtype=torch.float64)
    wrapped = DistributedDataParallel(model) if mode else model
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    preconditioner = KFAC(wrapped, Brand(12), distributed=mode or "gather", damping=0.1, **options)
    for step in range(STEPS):
        inputs, labels = batch(8, 40, 44, seed=step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(wrapped(inputs), labels).backward()
        preconditioner.step()
        optimizer.step()
    strategies = [row.strategy.partition("(")[0] for row in preconditioner.report().factors]
    return strategies, [parameter.detach() for parameter in model.parameters()]


def train_sharded(cases: list[Case], *, before: bool) -> list[list[Tensor]]:
    """Train with parameters sharded by FSDP2, the preconditioner constructed before or after they are."""
    from torch.distributed.fsdp import fully_shard

    warnings.simplefilter("ignore")
    results = []
    for case in cases:
        model = case.model()
        preconditioner = preconditioner_of(model, case) if before else None
        for module in model:
            if isinstance(module, nn.Linear):
                fully_shard(module)
        fully_shard(model)
        preconditioner = preconditioner or preconditioner_of(model, case)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        for step in range(STEPS):
            optimizer.zero_grad()
            backward(model, case, preconditioner, distributed.get_rank(), step, 0, 1)
            preconditioner.step()
            optimizer.step()
        results.append([parameter.full_tensor().detach() for parameter in model.parameters()])
    return results


def last_rank_refuses(mode: str) -> tuple[list[bool], bool, bool]:
    """Have the last rank leave a layer to the optimizer; return which layers are left, and what becomes of gradients.

    That of the layer must be as it was, and all gradients the same on all ranks.
    """
    warnings.simplefilter("ignore")
    case = Case(Exact(), mode)
    model = case.model()
    wrapped = DistributedDataParallel(model)
    preconditioner = preconditioner_of(wrapped, case)
    rank = distributed.get_rank()
    backward(wrapped, case, preconditioner, rank, 0, 0, 1)
    if rank == distributed.get_world_size() - 1:
        preconditioner._layers[1].refusal = "its output is a secret"
    before = model[2].weight.grad.clone()
    preconditioner.step()
    gradients = [parameter.grad for parameter in model.parameters()]
    left = [bool(layer.refusal) for layer in preconditioner._layers]
    return left, torch.equal(before, model[2].weight.grad), _is_same(gradients)


def last_rank_leaves(mode: str) -> str:
    """Step in all ranks but the last, which ends before; return what the others are told."""
    case = Case(Brand(4), mode=mode, sizes=(6,) * distributed.get_world_size())
    model = DistributedDataParallel(case.model())
    preconditioner = preconditioner_of(model, case)
    rank = distributed.get_rank()
    backward(model, case, preconditioner, rank, 0, 0, 1)
    if rank == distributed.get_world_size() - 1:
        os._exit(3)
    try:
        preconditioner.step()
    except RuntimeError as error:
        return str(error)
    return ""


def last_rank_is_late(seconds: float) -> str:
    """Step in the first rank alone; return what it is told when the group's timeout is over."""
    case = Case(Brand(4))
    model = case.model()
    preconditioner = preconditioner_of(model, case)
    backward(model, case, preconditioner, 0, 0, 0, 1)
    if distributed.get_rank() == distributed.get_world_size() - 1:
        time.sleep(seconds)
        return ""
    try:
        preconditioner.step()
    except RuntimeError as error:
        return str(error)
    return "no error"
