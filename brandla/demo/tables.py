"""The tables at the end, at most 80 columns wide."""

from __future__ import annotations

from collections.abc import Iterator
from math import floor

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from brandla.demo.results import Reference, Results, Tracking
from brandla.demo.settings import Settings
from brandla.demo.summary import (
    NORMS,
    MemorySummary,
    MethodSummary,
    TrackerSummary,
    summarize_memory,
    summarize_tracking,
    summarize_training,
    timing,
)

_NOTHING = "–"


def tables(results: Results) -> Iterator[RenderableType]:
    """Yield the tables of the parts that have been measured, each with its note."""
    study, settings = results.tracking, results.settings
    if study is not None and study.steps:
        yield _errors(study, summarize_tracking(study, settings))
        yield _times(study, settings.tracking.warmup)
    if methods := summarize_training(results.training, settings):
        yield _methods(methods, settings)
    if memory := summarize_memory(results.training):
        yield _memory(memory)


def _table(*columns: str) -> Table:
    first, *others = columns
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column(first, no_wrap=True)
    for column in others:
        table.add_column(column, justify="right")
    return table


def _with_words(title: str, table: Table, note: str) -> Group:
    return Group(Text(title, style="bold"), table, Text(note, style="dim"))


def _errors(study: Tracking, summaries: list[TrackerSummary]) -> Group:
    table = _table("update", "rank", "trace", "Frobenius", "spectral", "≤ 1.1", "bound")
    for one in summaries:
        ratios = [one.ratios.get(norm) for norm in NORMS]
        cells = [f"{ratio.median:.2f} ({ratio.worst:.2f})" if ratio else _NOTHING for ratio in ratios]
        # Rounded down: 100 % means every step.
        within = f"{floor(100 * ratios[0].within)} %" if ratios[0] else _NOTHING
        over = _NOTHING if one.bound_over_error is None else f"{one.bound_over_error:.1f} ×"
        table.add_row(one.update, str(one.rank), *cells, within, over if one.bound_held else f"{over} broken")
    orthogonality = max(one.orthogonality for one in summaries)
    return _with_words(
        f"Tracked error / best rank-r error, {len(study.steps)} steps, n = {study.n}, {study.columns} columns a step",
        table,
        "In each norm: median over the steps (worst). ≤ 1.1: share of the steps within 10 % of the best in the trace "
        f"norm. bound: running bound / spectral error, median. Largest ‖UᵀU − I‖₂ of any step: {orthogonality:.1e}.",
    )


def _times(study: Tracking, warmup: int) -> Group:
    ranks = list(study.best)
    table = _table("ms, median", *(f"rank {rank}" for rank in ranks))
    updates = {(one.update, one.rank): one.milliseconds for one in study.trackers if one.milliseconds}
    for name in ("root_update", "eigh_update"):
        times = [updates.get((name, rank)) for rank in ranks]
        table.add_row(name, *(_milliseconds(timing(one, warmup) if one else None) for one in times))
    table.add_section()
    references = {(one.name, one.rank): one for one in study.references}
    for name in ("randomized_eigh", "torch.svd_lowrank", "torch.linalg.eigh", "dense average"):
        _add_reference(table, name, [references.get((name, rank), references.get((name, None))) for rank in ranks])
    return _with_words(
        f"Time per update, n = {study.n}, {study.columns} columns",
        table,
        "The decompositions are of the dense average, whose own update (the last line) comes on top.",
    )


def _add_reference(table: Table, name: str, found: list[Reference | None]) -> None:
    failures = max((one.failures for one in found if one), default=0)
    medians = [timing(one.milliseconds, 1) if one and one.milliseconds else None for one in found]
    table.add_row(f"{name}, failed {failures} times" if failures else name, *map(_milliseconds, medians))


def _methods(summaries: list[MethodSummary], settings: Settings) -> Group:
    options = settings.training
    target = f"{100 * options.target:g} %"
    table = _table("method", "rate", "accuracy, %", "steps", "seconds", "median", "p99", "ratio")
    for one in summaries:
        table.add_row(
            one.method,
            f"{one.rate:.2g}",
            _accuracy(one),
            _reached(one.steps_to_target, ".0f", one),
            _reached(one.seconds_to_target, ".2f", one),
            _milliseconds(one.median_milliseconds),
            _milliseconds(one.p99_milliseconds),
            f"{one.p99_milliseconds / one.median_milliseconds:.1f}",
        )
    missed = any(0 < one.reached < one.runs for one in summaries)
    return _with_words(
        f"Training, {options.steps} steps, rank {options.rank}, {len(options.seeds)} seed(s)",
        table,
        f"accuracy: test, at the end, mean (lowest–highest). steps, seconds: until {target}, mean. median, p99: ms of "
        f"a step, without the first {options.warmup} of a run; ratio: p99 / median."
        + (" *: mean of the runs that got there; not all did." if missed else ""),
    )


def _memory(summaries: list[MemorySummary]) -> Group:
    n = summaries[0].n
    table = _table("KiB", f"one factor, n = {n}", "of dense", "all factors", "of dense")
    for one in summaries:
        table.add_row(
            one.method,
            f"{one.largest / 1024:.0f}",
            f"{one.largest / one.largest_dense:.0%}",
            f"{one.total / 1024:.0f}",
            f"{one.total / one.total_dense:.0%}",
        )
    return _with_words(
        "Memory of the factors", table, "of dense: share of what the dense n × n matrices alone would take."
    )


def _milliseconds(value: float | None) -> str:
    if value is None:
        return _NOTHING
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _accuracy(one: MethodSummary) -> str:
    if one.accuracy is None or one.lowest is None or one.highest is None:
        return _NOTHING
    return f"{100 * one.accuracy:.1f} ({100 * one.lowest:.1f}–{100 * one.highest:.1f})"


def _reached(value: float | None, form: str, one: MethodSummary) -> str:
    if value is None:
        return "never"
    return f"{value:{form}}{'' if one.reached == one.runs else '*'}"
