"""A search around the shipped tiles and stretches: for each choice that a call makes, its neighbours one step away.

Nothing is changed: the best one is shown beside the shipped one, for a person to put into ``configs.py``.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import median
from typing import Any
from unittest import mock

from bench.gpu import cases
from bench.gpu.cases import Case
from bench.gpu.device import graph_times
from bench.gpu.frame import Findings
from brandla_kernels import OPS

NAMES = tuple(OPS)
TUNED, TOY = ((16384, 256), (16384, 64), (4096, 128), (65536, 256)), ((48, 8),)  # n, r = k, in order of importance
SMALLEST, LARGEST, MOST_STRETCHES = 16, 256, 128
WARPS, STAGES = (2, 4, 8), (1, 2, 3, 4)
# Block sizes that another kernel or the algorithm determines.
FIXED = {("symmetric_update", "BLOCK_N"), ("small_spd", "BLOCK")}
# Seconds for one choice, whose candidates are compiled together, and for the timing of one candidate.
CHOICE, TIMING = 12.0, 0.5
GAIN = 1.03  # the least gain, above the scatter of timings


def run(findings: Findings) -> None:
    """Try the neighbours of every choice that the ops make at a few sizes, each choice once."""
    device, sizes = findings.device, findings.sizes
    for n, r in TOY if device.dry else TUNED:
        for name in NAMES:
            if OPS[name].launch is None or (name == "gram_ema_" and n > sizes.most_square):
                continue
            case = Case(name, n, r, r, sizes.width, sizes.cores)
            if device.dry or findings.seconds_left() > CHOICE:
                with choosing({}) as made:
                    cases.launches(case, device)
                for choice, shipped in made.items():
                    findings.attempt(choice, CHOICE, _tune, findings, case, choice, shipped)


def _tune(findings: Findings, case: Case, choice: str, shipped: Any) -> None:
    """Record the fastest candidate with a right result, beside the shipped one."""
    device, candidates = findings.device, [shipped, *neighbours(choice, shipped)]
    inputs, launches = cases.inputs(case, device), []
    for config in candidates:
        with choosing({choice: config}):
            launches += device.recorded(OPS[case.op].launch, *inputs[0])
    if problem := device.precompile(launches):
        findings.add("notes", problem)
    seconds_of = partial(_seconds, findings, case, choice, inputs)
    timed = [(seconds, config) for config in candidates if (seconds := seconds_of(config))]
    if not timed or timed[0][1] is not shipped:
        findings.add("notes", f"{case.op}: no timing of the shipped tiles of {choice}")
        return
    best, config = min(timed, key=lambda candidate: candidate[0])
    gain = timed[0][0] / best
    row = {"choice": choice, "in": f"{case.op}, {case.name}", "shipped": in_words(shipped), "µs": 1e6 * timed[0][0]}
    row |= {"best": in_words(config) if gain > GAIN else "as shipped", "best µs": 1e6 * best, "×": gain}
    configs = {in_words(config): 1e6 * seconds for seconds, config in timed}
    findings.add("tiles", row | {"tried": len(timed), "configs": configs})


def _seconds(findings: Findings, case: Case, choice: str, inputs: list[tuple[Any, ...]], config: Any) -> float | None:
    """Return the median time of a call with these tiles; None, with a note, if they cannot run or are wrong."""
    launch, device = OPS[case.op].launch, findings.device
    call = launch if not device.dry else partial(device.recorded, launch)
    if not device.dry and findings.seconds_left() < TIMING:
        findings.add("skipped", f"{choice}, {in_words(config)}: no time left")
        return None
    with choosing({choice: config}):
        try:
            # Checks the launch and not the op, whose plan keeps the tiles of its first call.
            cases.check(case, device, None if device.dry else call)
            return median(graph_times(device, {"it": call}, inputs, findings.sizes.seconds / 3)[0]["it"])
        except Exception as error:
            # Shared memory or registers may not suffice. If the device no longer answers, this ends the process.
            device.synchronize()
            findings.add("notes", f"{choice}, {in_words(config)}: {type(error).__name__}: {str(error)[:120]}")
            return None


def neighbours(choice: str, config: Any) -> list[Any]:
    """Return the configs that differ in one number by one step; the limit of registers stays."""
    if isinstance(config, int):
        return [count for count in (config // 2, config * 2) if 1 <= count <= MOST_STRETCHES]
    blocks = [
        config._replace(blocks={**config.blocks, name: size})
        for name, block in config.blocks.items()
        for size in (block // 2, block * 2)
        if SMALLEST <= size <= LARGEST and (choice.partition("(")[0], name) not in FIXED
    ]
    warps = [config._replace(num_warps=n) for n in WARPS if n in (config.num_warps // 2, config.num_warps * 2)]
    stages = [config._replace(num_stages=n) for n in STAGES if abs(n - config.num_stages) == 1]
    return blocks + warps + stages


@contextmanager
def choosing(instead: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Record every choice that launches ask of ``configs`` in the ``with`` block; make some of them as ``instead``."""
    from brandla_kernels._kernels import configs

    made: dict[str, Any] = {}

    def chosen(name: str, choose: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # The choice in words; there is one target only.
        given = inspect.signature(choose).bind(*args, **kwargs).arguments.items()
        words = [f"{key} {value}".replace("torch.", "") for key, value in given if key != "target"]
        choice = f"{name}({', '.join(words)})"
        made[choice] = instead[choice] if choice in instead else choose(*args, **kwargs)
        return made[choice]

    with ExitStack() as stack:
        for name, choose in inspect.getmembers(configs, inspect.isfunction):
            if name.endswith("splits") or choose.__annotations__.get("return") == "Config":
                stack.enter_context(mock.patch.object(configs, name, partial(chosen, name, choose)))
        yield made


def in_words(config: Any) -> str:
    """Return the text of tiles, warps and stages, or of stretches."""
    if isinstance(config, int):
        return f"{config} stretches"
    blocks = " ".join(f"{name.removeprefix('BLOCK_')}{size}" for name, size in config.blocks.items())
    return f"{blocks} w{config.num_warps} s{config.num_stages}"
