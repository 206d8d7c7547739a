"""The tables of terminal and page, and the answer in words: what won, what lost, and what failed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich.table import Table

from bench.accuracy.summary import Spread
from bench.figures import spelled
from bench.kfac_study import summary
from bench.kfac_study.methods import METHODS
from bench.kfac_study.record import Record, Run
from bench.kfac_study.settings import Task
from bench.kfac_study.summary import Summary

NOTHING = "–"


def of(record: Record) -> Iterator[Table]:
    """Yield a table a task, of what has been measured."""
    for task in record.settings.tasks:
        if found := list(rows(record, task)):
            table = Table(title=f"{task.name}: to {percent(task.target)}", title_justify="left")
            table.add_column("method")
            for heading in headings(task)[1:]:
                table.add_column(heading, justify="right")
            for row in found:
                table.add_row(*row)
            yield table


def headings(task: Task) -> list[str]:
    """Return the columns."""
    target = percent(task.target)
    return [
        "method",
        f"steps to {target}",
        f"× {summary.BASE}",
        f"seconds to {target}",
        f"× {summary.BASE}",
        "reached by",
        "accuracy after all steps",
        "median ms a step",
        "99th percentile",
        "factors, MB",
        "optimizer, MB",
    ]


def rows(record: Record, task: Task) -> Iterator[list[str]]:
    """Yield a row a method."""
    found = summary.summaries(record, task.name)
    for one in found:
        ratios = {part: summary.over_base(found, one.method, part) for part in ("steps", "seconds")}
        sizes = (
            [NOTHING] * 2 if one.memory is None else [megabytes(one.memory.factors), megabytes(one.memory.optimizer)]
        )
        yield [
            one.method,
            ranged(one.steps, "{:.0f}".format),
            ratio(ratios["steps"]),
            ranged(one.seconds, spelled),
            ratio(ratios["seconds"]),
            f"{one.reached} of {one.runs}",
            ranged(one.accuracy, lambda value: f"{100 * value:.1f}", " %"),
            ranged(one.median_milliseconds, spelled),
            ranged(one.p99_milliseconds, spelled),
            *sizes,
        ]


def ranged(value: Spread | None, words: Callable[[float], str], unit: str = "") -> str:
    """Return mean and range."""
    if value is None:
        return NOTHING
    mean, low, high = map(words, value)
    return f"{mean}{unit}" if low == high else f"{mean}{unit} ({low} to {high})"


def ratio(value: float | None) -> str:
    """Return a quotient."""
    return NOTHING if value is None else f"{value:.2f}"


def megabytes(count: int) -> str:
    """Return bytes in MB."""
    return spelled(count / 1e6) if count else "0"


def percent(share: float) -> str:
    """Return a share in per cent."""
    return f"{100 * share:g} %"


def verdict(record: Record, task: Task) -> Iterator[str]:
    """Yield the answers of a task, as sentences."""
    found = summary.summaries(record, task.name)
    for part, unit in (("steps", ""), ("seconds", " s")):
        if ranked := summary.ranking(found, part):
            words = ", ".join(f"{one.method} {spelled(getattr(one, part).mean)}{unit}" for one in ranked)
            yield f"{part.capitalize()} to {percent(task.target)}, the fewest first, where every run arrived: {words}."
    beaten = [one.method for one in found if (summary.over_base(found, one.method, "seconds") or 0) > 1]
    if beaten:
        yield f"Slower than {summary.BASE} in seconds: {', '.join(beaten)}."
    missed = [f"{one.method} ({one.runs - one.reached} of {one.runs})" for one in found if one.reached < one.runs]
    yield f"Runs that did not reach it: {', '.join(missed)}." if missed else "Every run reached it."
    yield from failures(record, task, found)


def failures(record: Record, task: Task, found: list[Summary]) -> Iterator[str]:
    """Yield what failed, in runs and in trials."""
    of_runs = [f"{one.method}, {words}" for one in found for words in one.failures]
    yield f"Runs that failed: {'; '.join(of_runs)}." if of_runs else "No run failed."
    tried = {method.name: record.tried(task.name, method.name) for method in METHODS}
    counts = {name: sum(run.failure is not None for run in trials) for name, trials in tried.items()}
    words = [f"{name} {count} of {len(tried[name])}" for name, count in counts.items() if count]
    yield f"Trials of the search that failed: {', '.join(words)}." if words else "No trial of the search failed."


def search_rows(record: Record, task: Task) -> Iterator[list[str]]:
    """Yield what was chosen for each method, among what."""
    for method in METHODS:
        if tried := record.tried(task.name, method.name):
            chosen = record.chosen(task.name, method.name)
            ranges = "; ".join(f"{name} {low:g} to {high:g}" for name, (low, high) in method.ranges.items())
            numbers = "" if chosen is None else "; ".join(f"{name} {value:g}" for name, value in chosen.numbers.items())
            yield [method.name, ranges, numbers, scores(tried), str(sum(run.failure is not None for run in tried))]


def scores(tried: list[Run]) -> str:
    """Return best, median and worst of the trials."""
    found = [run.score or 0.0 for run in (tried[0], tried[len(tried) // 2], tried[-1])]
    return ", ".join(f"{100 * each:.1f} %" for each in found)
