"""Figures of a study: medians over the steps after the warm-up, and their spread over the seeds."""

from __future__ import annotations

from statistics import mean, median
from typing import NamedTuple

from bench.accuracy.record import Record, Run
from bench.accuracy.trackers import BEST, Tracker

# Of a factor and of the step; what each is, in words.
MEASURES = {
    ("inputs", "inverse"): "inverse of A",
    ("gradients", "inverse"): "inverse of G",
    ("step", "error"): "step",
    ("step", "angle"): "angle of the step",
    ("inputs", "spectral"): "‖Â − A‖₂",
    ("gradients", "spectral"): "‖Ĝ − G‖₂",
    ("inputs", "trace"): "trace of A left out",
    ("gradients", "trace"): "trace of G left out",
}


class Spread(NamedTuple):
    """Mean, smallest and largest over the seeds."""

    mean: float
    low: float
    high: float

    def in_words(self) -> str:
        """Return the three."""
        return f"{self.mean:.2f} ({self.low:.2f} to {self.high:.2f})"


def widths(study: Record) -> list[int]:
    """Return the widths of which a run has steps past the warm-up."""
    return [width for width in study.settings.widths if _runs(study, width)]


def seeds(study: Record, width: int) -> int:
    """Return the number of runs that a summary of this width is of."""
    return len(_runs(study, width))


def spread(study: Record, width: int, tracker: str, of: str, measure: str) -> Spread:
    """Return the median over the settled steps, over the seeds."""
    medians = [median(_settled(study, run, tracker, of, measure)) for run in _runs(study, width)]
    return Spread(mean(medians), min(medians), max(medians))


def over(study: Record, width: int, tracker: str, of: str, measure: str, base: str = BEST) -> Spread:
    """Return the median quotient of a tracker's error and another's, step by step, over the seeds."""
    medians = [median(each) for each in _quotients(study, width, tracker, of, measure, base)]
    return Spread(mean(medians), min(medians), max(medians))


def share_below(study: Record, width: int, tracker: str, of: str, measure: str, base: str) -> float:
    """Return the share of the settled steps of all seeds at which a tracker's error is below another's."""
    return mean(one < 1 for each in _quotients(study, width, tracker, of, measure, base) for one in each)


def over_best_at(
    study: Record, width: int, tracker: str, key: tuple[str, str], renewing: Tracker, renewed: bool
) -> float | None:
    """Return the median of an error over the best one, at the settled steps that renew another tracker or do not."""
    found = []
    for run, quotients in zip(_runs(study, width), _quotients(study, width, tracker, *key, BEST), strict=True):
        steps = [step for step in run.steps if step > study.settings.warmup]
        found += [one for step, one in zip(steps, quotients, strict=True) if renewing.due(step) == renewed]
    return median(found) if found else None


def _quotients(study: Record, width: int, tracker: str, of: str, measure: str, base: str) -> list[list[float]]:
    """Return the quotients of two trackers' errors at the settled steps of each run."""
    return [
        [
            own / other
            for own, other in zip(
                _settled(study, run, tracker, of, measure), _settled(study, run, base, of, measure), strict=True
            )
        ]
        for run in _runs(study, width)
    ]


def course(study: Record, width: int, tracker: str, of: str, measure: str) -> tuple[list[int], list[Spread]]:
    """Return the measured steps that all runs have, and the error at each."""
    runs = [run for run in study.runs if run.width == width]
    count = min(len(run.steps) for run in runs)
    columns = zip(*(run.errors[tracker][of][measure][:count] for run in runs), strict=True)
    return runs[0].steps[:count], [Spread(mean(each), min(each), max(each)) for each in columns]


def _runs(study: Record, width: int) -> list[Run]:
    """Whole runs, or in an interrupted study what there is."""
    own = [run for run in study.runs if run.width == width and run.steps and run.steps[-1] > study.settings.warmup]
    return [run for run in own if run.finished] or own


def _settled(study: Record, run: Run, tracker: str, of: str, measure: str) -> list[float]:
    values = run.errors[tracker][of][measure]
    return [value for step, value in zip(run.steps, values, strict=True) if step > study.settings.warmup]
