"""Plans: the host's work that depends only on the layout of a call is done once.

The first call of a layout is recorded, not started. Later calls differ from the record only in their tensors. So a plan
keeps the launches and the place of each tensor in one list: the tensors of the call in their order, then the memory
that the launcher allocated. A planned call allocates this memory and starts the launches.

Launches may differ in more if torch computes or copies something for them, if two arguments begin at one address, or
if something is empty. Such calls have no plan, and go through the launcher each time.
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

from brandla_kernels._kernels.launch import Launch, Target, active_record, is_profiled, recording, run_kernel, target_of

_ALLOCATIONS = {torch.ops.aten.empty, torch.ops.aten.new_empty}
# Calls that turn numbers of the host into a tensor, such as the table of a list, which a plan writes anew; and a query.
_FREE = {torch.ops.aten.lift_fresh, torch.ops.aten.detach_, torch.ops.aten.promote_types}


def call(
    plans: dict[Target | None, Plan | None],
    launch: Callable[..., Any],
    args: Any,
    given: list[Tensor],
    addresses: list[int],
) -> Any:
    """Call an op by its plan for the target, and make the plan if there is none yet.

    ``plans`` belong to the layout of the arguments. ``given`` are the tensors among these in their order, with their
    ``addresses``.
    """
    record = active_record()
    target = record and record[0]
    if target not in plans:
        plans[target] = _make_plan(launch, args, given)
    plan = plans[target]
    if plan is None:
        return launch(*args)
    memory = list(map(operator.call, plan.memory))
    tensors, addresses = [*given, *memory], [*addresses, *map(Tensor.data_ptr, memory)]
    if record is not None:
        for step in plan.steps:
            arguments = step.all_arguments(tensors, addresses, shaped=True)
            record[1].append(Launch(step.launch.kernel, step.launch.grid, arguments, step.launch.config))
    else:
        shaped = is_profiled()
        with torch.cuda.device_of(given[0]):
            for step in plan.steps:
                arguments = step.all_arguments(tensors, addresses, shaped=shaped)
                step.compiled = run_kernel(step.launch, arguments, step.compiled)
    return plan.results(tensors)


class _Watch(TorchDispatchMode):
    """Note the memory that a launcher allocates, and whether it asks torch for more than memory and views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory: list[Tensor] = []
        self.computes = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in _ALLOCATIONS:
            self.memory.append(result)
        elif not func.is_view and func.overloadpacket not in _FREE:
            self.computes = True
        return result


@dataclass
class _Step:
    """A launch without its tensors, and the place of each tensor among all tensors of the call."""

    launch: Launch
    places: dict[str, int]
    views: dict[str, tuple[torch.Size, tuple[int, ...]]]  # shape and strides of each reshaped tensor
    table: _Table | None  # of a list
    compiled: Any = None  # by Triton

    def all_arguments(self, tensors: Sequence[Tensor], addresses: Sequence[int], *, shaped: bool) -> dict[str, Any]:
        """Return all arguments of the kernel. It reads addresses only; a count of its work reads ``shaped`` tensors."""
        arguments = dict(self.launch.arguments)
        for name, place in self.places.items():
            arguments[name] = tensors[place]
        if shaped:
            arguments |= {name: arguments[name].as_strided(*view) for name, view in self.views.items()}
        if self.table is not None:
            arguments["table_ptr"] = filled_table(self.table, addresses)
        return arguments


class _Table(NamedTuple):
    """The table of a list. Each row begins with the address of a tensor, or with 0 for none."""

    numbers: array[int]  # with addresses of an earlier call
    shape: torch.Size
    places: list[int]  # of the tensor of each row; −1 for none


def filled_table(table: _Table, addresses: Sequence[int]) -> Tensor:
    """Return a table with these addresses, on the host."""
    numbers, with_none = array("q", table.numbers), [*addresses, 0]
    numbers[:: table.shape[-1]] = array("q", [with_none[place] for place in table.places])
    # torch.tensor would look at each number.
    return torch.frombuffer(numbers, dtype=torch.int64).view(table.shape)


class Plan(NamedTuple):
    """The memory, launches and results of a call of one layout."""

    memory: list[Callable[[], Tensor]]  # each call allocates a new tensor
    steps: list[_Step]
    results: Callable[[list[Tensor]], Any]  # picks them out of the tensors


def _picker(places: Any) -> Callable[[list[Tensor]], Any]:
    """Return a function that picks the tensors at ``places``: one place, or a tuple or list of places."""
    if isinstance(places, int):
        return itemgetter(places)
    if isinstance(places, tuple) and len(places) > 1 and all(isinstance(place, int) for place in places):
        return itemgetter(*places)
    kind, pickers = type(places), [_picker(place) for place in places]
    return lambda tensors: kind([pick(tensors) for pick in pickers])


def _make_plan(launch: Callable[..., Any], args: Any, given: list[Tensor]) -> Plan | None:
    """Return the plan for calls of this layout, or None."""
    with recording(target_of(given)) as launches, _Watch() as watch:
        results = launch(*args)
    tensors = [*given, *watch.memory]
    places = {tensor.data_ptr(): place for place, tensor in enumerate(tensors)}
    if watch.computes or 0 in places or len(places) < len(tensors):
        return None

    def place_of(result: Tensor) -> int:
        place = places[result.data_ptr()]
        if result.shape != tensors[place].shape:
            raise KeyError
        return place

    try:
        steps = [_make_step(each, places, tensors) for each in launches]
        # Torch reads these arguments in half the time that those of torch.empty take.
        memory: list[Callable[[], Tensor]] = [
            partial(torch.empty_strided, block.shape, block.stride(), dtype=block.dtype, device=block.device)
            for block in watch.memory
        ]
        return Plan(memory, steps, _picker(tree_map(place_of, results)))
    except KeyError:
        # A tensor begins inside an argument, or is a part of the allocated memory.
        return None


def _make_step(launch: Launch, places: Mapping[int, int], tensors: Sequence[Tensor]) -> _Step:
    arguments, table = launch.all_arguments, None
    if (recorded := arguments.get("table_ptr")) is not None:
        numbers, width = array("q", recorded.flatten().tolist()), recorded.shape[-1]
        table = _Table(numbers, recorded.shape, [places[address] if address else -1 for address in numbers[::width]])
    own = {name: value for name, value in arguments.items() if isinstance(value, Tensor) and value is not recorded}
    constants = Launch(launch.kernel, launch.grid, arguments | dict.fromkeys(own), launch.config)
    own_places = {name: places[tensor.data_ptr()] for name, tensor in own.items()}
    views = {
        name: (own[name].shape, own[name].stride())
        for name, place in own_places.items()
        if own[name].shape != tensors[place].shape
    }
    return _Step(constants, own_places, views, table)
