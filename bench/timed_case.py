"""How a case of the functions and ops is timed, and what is kept of it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from bench import results
from bench.figures import Study
from bench.gpu.device import Ceilings, Device, Work
from bench.peer_threads import REST
from bench.timing import Interval, of_median

# Seconds that a case is timed for, and how often it is called at least and at most.
SECONDS, FEWEST, MOST = 0.25, 3, 100
# Order of the product that is timed before and after each case, and the seconds it may take: what two runs have in
# common. Before it there is a rest, as threads of one BLAS library spin for a while after a call.
REFERENCE, REFERENCE_SECONDS = 512, 0.01
# Characters of a reason.
LONGEST = 160
# Facts of the machine that pytest-benchmark's own record of a case has too.
VERSIONS = ("cpu", "cores", "threads", "versions", "commit", "modified", "date")


class Run(NamedTuple):
    """What all cases of a run have in common: the machine, its ceilings, and the times of a product on it now."""

    quick: bool
    machine: dict[str, Any]
    ceilings: Ceilings
    reference: Callable[[], list[float]]


def reference_on(device: Device) -> Callable[[], list[float]]:
    """Return a function that times a square product, after a rest."""
    left, right = (device.normal(REFERENCE, REFERENCE) for _ in range(2))

    def times() -> list[float]:
        time.sleep(0.0 if device.dry else REST)
        return device.alternating({"it": lambda: left @ right}, REFERENCE_SECONDS)["it"]

    return times


@dataclass
class Case:
    """A case of a run: what is known about it, and where it is kept."""

    run: Run
    study: Study
    about: dict[str, Any]
    benchmark: Any

    def time(self, copies: list[Callable[[], Any]], work: Work, **judged: Any) -> None:
        """Time calls on copies of the inputs in turn, so that no cache holds them, and keep the row.

        With more than one copy a round is a call on each, queued one after the other, between two looks at the timer.
        The call was checked before, and so is warm.
        """
        start = time.perf_counter()
        copies[0]()
        wanted = SECONDS / len(copies) / (time.perf_counter() - start)
        rounds = 2 if self.run.quick else int(min(max(wanted, FEWEST), MOST))
        in_turn = itertools.cycle(copies)
        call = lambda: next(in_turn)()  # noqa: PLW0108 (the call that comes next is what is timed)
        around = self.run.reference()
        self.benchmark.pedantic(call, rounds=rounds, iterations=len(copies), warmup_rounds=1 if wanted > FEWEST else 0)
        around += self.run.reference()
        floor = self.run.ceilings.floor(work)
        flops = work.float32 + work.float64 + work.bf16
        self.about |= judged | {"flops": flops, "bytes": work.bytes, "bound_by": floor.bound_by}
        facts = {key: self.run.machine[key] for key in VERSIONS} | {"gpu": self.run.machine.get("gpu")}
        self.benchmark.extra_info.update(results.plain(self.about | facts))
        if self.benchmark.stats:
            row = row_of(self.benchmark.stats.stats.data, around, floor.seconds)
            self.benchmark.extra_info["of_ceiling"] = row["of_ceiling"].value
            self.study.cases.append(self.about | row)

    def refuse(self, error: Exception) -> str:
        """Keep the case as one that was not timed, and return why: the kind of the error and what it says first."""
        said = str(error).strip().partition("\n")[0].replace("|", "/")
        reason = f"{type(error).__name__}: {said}"[:LONGEST]
        self.study.refused.append(self.about | {"reason": reason})
        return reason


def row_of(times: list[float], around: list[float], floor: float) -> dict[str, Any]:
    """Return the median of times in seconds, the part that the floor is of it, and it over the product's median."""
    seconds, reference = of_median(times), of_median(around)
    part = Interval(*(floor / each for each in (seconds.value, seconds.high, seconds.low)))
    over = Interval(*(each / reference.value for each in seconds))
    row = {"seconds": seconds, "of_ceiling": part, "over_reference": over, "rounds": len(times)}
    return row | {"reference": reference, "reference_rounds": len(around)}
