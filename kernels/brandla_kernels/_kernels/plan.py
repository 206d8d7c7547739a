"""A call of an op as a plan: what follows from the layout of its arguments alone is found out once.

The first call of a layout is recorded, not started. What later calls start differs from the record in nothing but the
tensors. So a plan keeps the launches, and which tensors go where: those of the call in their order, and behind them the
memory that the launcher allocated. A call by plan allocates, and starts.

There is no plan where launches may differ in more than that, and each call goes by the launcher: where torch computes
or copies something for them, where arguments begin at one address, and where something is empty.
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from brandla_kernels._kernels.launch import Launch, Target, begin, is_profiled, record_of, recording, target_of

_MEMORY = {torch.ops.aten.empty, torch.ops.aten.new_empty}
# What numbers of the host become a tensor by, as in the table of a list, which a plan writes anew; and a question.
_FREE = {torch.ops.aten.lift_fresh, torch.ops.aten.detach_, torch.ops.aten.promote_types}


def call(
    plans: dict[Target | None, Plan | None],
    launch: Callable[..., Any],
    args: Any,
    given: list[Tensor],
    addresses: list[int],
) -> Any:
    """Call an op by the plan for the target, which is made if there is none yet.

    ``plans`` are those of the layout of the arguments, and ``given`` are the tensors among these in their order, with
    their ``addresses``.
    """
    record = record_of()
    target = record and record[0]
    if target not in plans:
        plans[target] = _planned(launch, args, given)
    plan = plans[target]
    if plan is None:
        return launch(*args)
    memory = list(map(operator.call, plan.memory))
    tensors, addresses = [*given, *memory], [*addresses, *map(Tensor.data_ptr, memory)]
    if record is not None:
        for step in plan.steps:
            own = step.launch
            record[1].append(Launch(own.kernel, own.grid, step.given(tensors, addresses, shaped=True), own.config))
    else:
        shaped = is_profiled()
        with torch.cuda.device_of(given[0]):
            for step in plan.steps:
                step.compiled = begin(step.launch, step.given(tensors, addresses, shaped=shaped), step.compiled)
    return plan.results(tensors)


class _Watch(TorchDispatchMode):
    """Note the memory that a launcher allocates, and whether it asks torch for more than that and views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory: list[Tensor] = []
        self.computes = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in _MEMORY:
            self.memory.append(result)
        elif not func.is_view and func.overloadpacket not in _FREE:
            self.computes = True
        return result


@dataclass
class _Step:
    """A launch without its tensors, and the places of those among all tensors of the call."""

    launch: Launch
    places: dict[str, int]
    views: dict[str, tuple[torch.Size, tuple[int, ...]]]  # shapes and strides of those that the launcher views so
    table: _Table | None  # of lists
    compiled: Any = None  # by Triton

    def given(self, tensors: Sequence[Tensor], addresses: Sequence[int], *, shaped: bool) -> dict[str, Any]:
        """Return all arguments of the kernel, which reads addresses; ``shaped`` for those who count its work."""
        given = dict(self.launch.arguments)
        for name, place in self.places.items():
            given[name] = tensors[place]
        if shaped:
            given |= {name: given[name].as_strided(*view) for name, view in self.views.items()}
        if self.table is not None:
            given["table_ptr"] = written(self.table, addresses)
        return given


class _Table(NamedTuple):
    """A table of lists, with the place of the tensor that each row begins with the address of; −1 for none."""

    numbers: array[int]  # with addresses of an earlier call
    shape: torch.Size
    places: list[int]


def written(table: _Table, addresses: Sequence[int]) -> Tensor:
    """Return a table with these addresses, on the host."""
    numbers, known = array("q", table.numbers), [*addresses, 0]
    numbers[:: table.shape[-1]] = array("q", [known[place] for place in table.places])
    # In place of torch.tensor, which looks at each number.
    return torch.frombuffer(numbers, dtype=torch.int64).view(table.shape)


class Plan(NamedTuple):
    """What calls of one layout start."""

    memory: list[Callable[[], Tensor]]  # each allocates it anew
    steps: list[_Step]
    results: Callable[[list[Tensor]], Any]  # picks them out of the tensors


def _picker(places: Any) -> Callable[[list[Tensor]], Any]:
    """Return what picks results out of the tensors by their places: one, or a tuple or list of them."""
    if isinstance(places, int):
        return itemgetter(places)
    if isinstance(places, tuple) and len(places) > 1 and all(isinstance(place, int) for place in places):
        return itemgetter(*places)
    kind, each = type(places), [_picker(place) for place in places]
    return lambda tensors: kind([pick(tensors) for pick in each])


def _planned(launch: Callable[..., Any], args: Any, given: list[Tensor]) -> Plan | None:
    """Return the plan of calls of this layout, or None."""
    with recording(target_of(given)) as launches, _Watch() as watch:
        results = launch(*args)
    tensors = [*given, *watch.memory]
    places = {one.data_ptr(): place for place, one in enumerate(tensors)}
    if watch.computes or 0 in places or len(places) < len(tensors):
        return None

    def place_of(result: Tensor) -> int:
        place = places[result.data_ptr()]
        if result.shape != tensors[place].shape:
            raise KeyError
        return place

    try:
        steps = [_step(each, places, tensors) for each in launches]
        # Torch reads these arguments in half the time that those of torch.empty take.
        memory: list[Callable[[], Tensor]] = [
            partial(torch.empty_strided, one.shape, one.stride(), dtype=one.dtype, device=one.device)
            for one in watch.memory
        ]
        return Plan(memory, steps, _picker(tree_map(place_of, results)))
    except KeyError:
        # Something begins inside an argument, or is a part of what was allocated.
        return None


def _step(launch: Launch, places: Mapping[int, int], tensors: Sequence[Tensor]) -> _Step:
    given, rewritten = launch.given, None
    if (table := given.get("table_ptr")) is not None:
        numbers, width = array("q", table.flatten().tolist()), table.shape[-1]
        addressed = [places[address] if address else -1 for address in numbers[::width]]
        rewritten = _Table(numbers, table.shape, addressed)
    own = {name: one for name, one in given.items() if isinstance(one, Tensor) and one is not table}
    constants = Launch(launch.kernel, launch.grid, given | dict.fromkeys(own), launch.config)
    own_places = {name: places[one.data_ptr()] for name, one in own.items()}
    views = {
        name: (own[name].shape, own[name].stride())
        for name, place in own_places.items()
        if own[name].shape != tensors[place].shape
    }
    return _Step(constants, own_places, views, rewritten)
