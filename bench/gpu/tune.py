"""A search around the shipped tiles and stretches: for each choice that a call makes, its neighbours, one step away.

Nothing is changed: the best that was seen stands beside the shipped one, for a person to put into ``configs.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench.gpu import cases
from bench.gpu.cases import Case, Size
from bench.gpu.device import Device
from bench.gpu.findings import Bench, Deadline, Findings
from bench.gpu.timed import replayed, size_of
from brandla_kernels import OPS

SMALLEST, LARGEST = 16, 256
MOST_STRETCHES = 128
WARPS, STAGES = (2, 4, 8), (1, 2, 3, 4)
# Blocks that another kernel, or the algorithm, sets.
FIXED = {("symmetric_update", "BLOCK_N"), ("small_spd", "BLOCK")}
# Seconds for the compilation of one choice's candidates, many at a time, and for one candidate's timing.
COMPILATION, TIMING = 12.0, 0.5
# A gain below the spread of timings is none.
GAIN = 1.03


class Choice(NamedTuple):
    """A question that a launcher puts to ``configs``: the function and its arguments."""

    function: str
    arguments: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        """The question in words, with no target: there is one."""
        words = [f"{name} {_spelled(value)}" for name, value in self.arguments if name != "target"]
        return f"{self.function}({', '.join(words)})"


def run(bench: Bench, found: Findings, time: Deadline) -> None:
    """Try the neighbours of every choice made by the ops at a few sizes, each choice once."""
    seen: set[Choice] = set()
    for n, r in bench.sizes.tuned:
        for name, op in OPS.items():
            case = Case(name, Size(n, r, r, bench.sizes.width, bench.sizes.cores), torch.float32, torch.float32)
            if op.launch is None or name not in cases.OPERANDS:
                continue
            if name == "gram_ema_" and n > bench.sizes.most_square:
                continue
            if found.in_time(f"{name}, {case.name}", time, 0 if bench.device.dry else COMPILATION):
                with found.case(f"{name}, {case.name}", bench.device):
                    _tune(bench, found, case, seen, time)


def _tune(bench: Bench, found: Findings, case: Case, seen: set[Choice], time: Deadline) -> None:
    device = bench.device
    first = cases.operands(case, device)
    inputs = [first, *(cases.operands(case, device) for _ in range(device.sets(size_of(first)) - 1))]
    with choosing({}) as made:
        _launched(device, case)(*first)
    for choice, shipped in made.items():
        words = f"{case.op}, {case.name}: {choice.name}"
        if choice in seen or not found.in_time(words, time, 0 if device.dry else COMPILATION):
            continue
        seen.add(choice)
        candidates = [shipped, *neighbours(choice, shipped)]
        problem = device.precompile(
            [one for config in candidates for one in _recorded(device, case, first, choice, config)]
        )
        found.notes += [problem] if problem else []
        timed = []
        for config in candidates:
            if not found.in_time(f"{words}, {spelled(config)}", time, 0 if device.dry else TIMING):
                break
            timed.append((_seconds(bench, found, case, choice, config, inputs), config))
        if timed:
            _report(bench, found, case, choice, timed)


def _report(bench: Bench, found: Findings, case: Case, choice: Choice, timed: list[tuple[float | None, Any]]) -> None:
    """Keep the fastest that is right, beside the shipped one, which comes first."""
    own, shipped = timed[0]
    ranked = sorted(((seconds, index) for index, (seconds, _) in enumerate(timed) if seconds is not None))
    best, config = next(
        ((seconds, timed[index][1]) for seconds, index in ranked if _is_right(bench, case, choice, timed[index][1])),
        (None, None),
    )
    if own is None or best is None:
        found.notes.append(f"{case.op}: no timing of the shipped tiles of {choice.name}")
        return
    found.row(
        "tiles",
        **{"choice": choice.name, "in": f"{case.op}, {case.name}", "shipped": spelled(shipped), "µs": 1e6 * own},
        **{"best": spelled(config) if own / best > GAIN else "as shipped", "best µs": 1e6 * best, "×": own / best},
        **{"tried": len(ranked), "configs": [_plain(one, seconds) for seconds, one in timed]},
    )


def _is_right(bench: Bench, case: Case, choice: Choice, config: Any) -> bool:
    with choosing({choice: config}):
        try:
            cases.check(case, bench.device)
        except AssertionError:
            return False
    return True


def _seconds(
    bench: Bench, found: Findings, case: Case, choice: Choice, config: Any, inputs: list[tuple[Any, ...]]
) -> float | None:
    """Return the median time of a call with these tiles; None, with a note, where they cannot run."""
    call = _launched(bench.device, case)
    with choosing({choice: config}):
        try:
            call(*inputs[0])
            bench.device.synchronize()
            return median(replayed(bench.device, {"it": call}, inputs, bench.sizes.seconds / 3).samples["it"])
        except Exception as error:
            # Shared memory or registers may not suffice. A device that no longer answers ends the section.
            bench.device.synchronize()
            found.notes.append(f"{choice.name}, {spelled(config)}: {type(error).__name__}: {str(error)[:120]}")
            return None


def _launched(device: Device, case: Case) -> Callable[..., Any]:
    return lambda *arguments: device.launch(OPS[case.op].launch, *arguments)


def _recorded(device: Device, case: Case, arguments: tuple[Any, ...], choice: Choice, config: Any) -> list[Any]:
    with choosing({choice: config}):
        return device.recorded(OPS[case.op].launch, *arguments)


def neighbours(choice: Choice, config: Any) -> list[Any]:
    """Return the configs, or the numbers of stretches, that differ in one number by one step."""
    if isinstance(config, int):
        return [count for count in (config // 2, config * 2) if 1 <= count <= MOST_STRETCHES]
    blocks = [
        config._replace(blocks={**config.blocks, name: size})
        for name, block in config.blocks.items()
        for size in (block // 2, block * 2)
        if SMALLEST <= size <= LARGEST and not _fixed(choice, name)
    ]
    warps = [config._replace(num_warps=count) for count in _beside(config.num_warps, WARPS)]
    stages = [config._replace(num_stages=count) for count in _beside(config.num_stages, STAGES)]
    return blocks + warps + stages


def _fixed(choice: Choice, block: str) -> bool:
    """Say whether a block is no choice."""
    return (choice.function, block) in FIXED


def _beside(value: int, allowed: tuple[int, ...]) -> list[int]:
    place = allowed.index(value) if value in allowed else -2
    return [allowed[other] for other in (place - 1, place + 1) if 0 <= other < len(allowed)]


@contextmanager
def choosing(instead: Mapping[Choice, Any]) -> Iterator[dict[Choice, Any]]:
    """Note what every launch of the ``with`` block asks ``configs`` for, and answer some of it with ``instead``."""
    from brandla_kernels._kernels import configs

    made: dict[Choice, Any] = {}

    def noting(name: str, choose: Callable[..., Any]) -> Callable[..., Any]:
        def chosen(*args: Any, **kwargs: Any) -> Any:
            bound = inspect.signature(choose).bind(*args, **kwargs)
            choice = Choice(name, tuple(bound.arguments.items()))
            made[choice] = instead[choice] if choice in instead else choose(*args, **kwargs)
            return made[choice]

        return chosen

    with ExitStack() as stack:
        for name, choose in _choosers(configs).items():
            stack.enter_context(mock.patch.object(configs, name, noting(name, choose)))
        yield made


def _choosers(module: Any) -> dict[str, Callable[..., Any]]:
    """Return the functions that choose tiles."""
    return {
        name: function
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and _chooses(function)
    }


def _chooses(function: Callable[..., Any]) -> bool:
    """Say whether a function answers with tiles or, for a target, with a number of stretches."""
    answer = function.__annotations__.get("return")
    return answer == "Config" or (answer == "int" and "target" in function.__annotations__)


def spelled(config: Any) -> str:
    """Return tiles, warps and stages, or stretches, in words."""
    if isinstance(config, int):
        return f"{config} stretches"
    blocks = " ".join(f"{name.removeprefix('BLOCK_')}{size}" for name, size in config.blocks.items())
    return f"{blocks} w{config.num_warps} s{config.num_stages}"


def _plain(config: Any, seconds: float | None) -> dict[str, Any]:
    time = None if seconds is None else 1e6 * seconds
    if isinstance(config, int):
        return {"stretches": config, "µs": time}
    return {"blocks": dict(config.blocks), "warps": config.num_warps, "stages": config.num_stages, "µs": time}


def _spelled(value: Any) -> str:
    return str(value).removeprefix("torch.")
