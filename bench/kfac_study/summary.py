"""The figures that tables, page and pictures state: means with least and largest over the seeds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean

from bench.accuracy.summary import Spread
from bench.kfac_study.methods import METHODS
from bench.kfac_study.record import Memory, Record, Run

# What the others are compared with.
BASE = "AdamW"


@dataclass(frozen=True)
class Summary:
    """What the study says of one method on one task.

    ``steps`` and ``seconds`` are those to the target, over the ``reached`` runs of ``runs`` that arrived; None where
    none did. ``accuracy`` is that at the end of the runs that were finished.
    """

    method: str
    runs: int
    reached: int
    steps: Spread | None
    seconds: Spread | None
    accuracy: Spread | None
    median_milliseconds: Spread | None
    p99_milliseconds: Spread | None
    memory: Memory | None
    failures: tuple[str, ...]


def methods(record: Record, task: str) -> list[str]:
    """Return the methods that were judged on a task."""
    return [method.name for method in METHODS if record.of(task, method.name)]


def summaries(record: Record, task: str) -> list[Summary]:
    """Summarize all methods of a task."""
    return [summarize(record, task, method) for method in methods(record, task)]


def summarize(record: Record, task: str, method: str) -> Summary:
    """Summarize a method."""
    runs = whole(record.of(task, method))
    arrived = [at for run in runs if (at := run.reached(record.settings.task(task).target)) is not None]
    times = [run.milliseconds for run in runs if run.milliseconds is not None]
    return Summary(
        method,
        len(runs),
        len(arrived),
        spread(at.step for at in arrived),
        spread(at.seconds for at in arrived),
        spread(run.evaluations[-1].accuracy for run in runs if run.finished),
        spread(each for each, _ in times),
        spread(each for _, each in times),
        record.kept(task, method),
        tuple(f"seed {run.seed} {run.failure}" for run in runs if run.failure),
    )


def whole(runs: list[Run]) -> list[Run]:
    """Return the runs that ended by themselves, or where there are none, what an interruption left."""
    return [run for run in runs if run.finished or run.failure] or runs


def spread(values: Iterable[float]) -> Spread | None:
    """Return mean, least and largest; None of nothing."""
    found = list(values)
    return _spread(found) if found else None


def over_base(found: list[Summary], method: str, part: str) -> float | None:
    """Return a mean over that of AdamW, where every run of both reached the target."""
    own, base = (next((one for one in found if one.method == name), None) for name in (method, BASE))
    if own is None or base is None or own.reached < own.runs or base.reached < base.runs or not own.runs:
        return None
    return float(getattr(own, part).mean / getattr(base, part).mean)


def ranking(found: list[Summary], part: str) -> list[Summary]:
    """Return the methods all of whose runs reached the target, the best first."""
    return sorted((one for one in found if 0 < one.runs == one.reached), key=lambda one: getattr(one, part).mean)


def course(record: Record, task: str, method: str) -> list[tuple[int, float, Spread]]:
    """Return step, mean seconds and accuracy at every look that all runs have."""
    runs = [run.evaluations for run in whole(record.of(task, method)) if run.evaluations]
    if not runs:
        return []
    looks = zip(*(run[: min(map(len, runs))] for run in runs), strict=True)
    return [(each[0].step, mean(at.seconds for at in each), _spread([at.accuracy for at in each])) for each in looks]


def _spread(values: list[float]) -> Spread:
    return Spread(mean(values), min(values), max(values))
