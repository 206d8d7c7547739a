"""The pictures, light and dark: accuracy against steps and against seconds, and the seconds to the target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from bench import pictures
from bench.facts import commit_of
from bench.figures import spelled
from bench.kfac_study import summary
from bench.kfac_study.record import STUDY, Record, of_content
from bench.kfac_study.settings import Task
from bench.kfac_study.tables import percent
from bench.pictures import THEMES, Theme

# Okabe and Ito's palette, which colour-blind readers tell apart, with lighter ones for dark pages; greys for the
# methods that are no K-FAC.
COLOURS = {
    "SGD": ("#a0a0a0", "#7d828c"),
    "AdamW": ("#5c5c5c", "#b4b8c2"),
    "K-FAC": ("#000000", "#ffffff"),
    "RS-KFAC": ("#e69f00", "#f0b840"),
    "SRE-KFAC": ("#56b4e9", "#8accf2"),
    "B-KFAC": ("#0072b2", "#3d9be0"),
    "B-KFAC, sketched": ("#4a3fb5", "#a79bff"),
    "B-R-KFAC": ("#009e73", "#2fd3a5"),
    "B-KFAC-C": ("#cc79a7", "#e49cc8"),
    "SINGD": ("#d55e00", "#ff8f40"),
}
DASHED = ("SGD", "AdamW")
ACCURACIES = (0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995)


def write(study: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the content of a result file, once for each theme, and return the paths; none where nothing was measured."""
    if not _tasks(of_content(study)):
        return []
    pictures.write(STUDY, study, folder, draw)
    return [pictures.path(STUDY, theme, folder) for theme in THEMES]


def stale(study: dict[str, Any], folder: Path) -> list[Path]:
    """Return the pictures that are missing or show other figures."""
    return pictures.stale(STUDY, study, folder) if _tasks(of_content(study)) else []


def draw(study: dict[str, Any], theme: Theme) -> Figure:
    """Draw a row a task."""
    record = of_content(study)
    tasks = _tasks(record)
    layout = ConstrainedLayoutEngine(hspace=0.08, wspace=0.04, rect=(0, 0.03, 1, 0.96))
    figure = Figure(figsize=(15, 0.6 + 4.9 * len(tasks)), layout=layout)
    axes = figure.subplots(len(tasks), 3, squeeze=False, width_ratios=(1, 1, 0.85))
    for task, (by_step, by_second, to_target) in zip(tasks, axes, strict=True):
        runs = min(one.runs for one in summary.summaries(record, task.name))
        words = f"{task.network}, batches of {task.batch}; mean and range of {runs} seed{'s' if runs > 1 else ''}"
        _titled(by_step, f"{task.name}: test accuracy", words, theme)
        _titled(by_second, "… against time", "seconds of the steps alone, mean of the seeds", theme)
        _titled(to_target, f"Seconds to {percent(task.target)}", "line: mean; dots: seeds; steps in brackets", theme)
        for axis, against in ((by_step, 0), (by_second, 1)):
            _draw_course(axis, record, task, against, theme)
        by_step.set_xlabel("training step")
        by_second.set_xlabel("seconds")
        _draw_target(to_target, record, task, theme)
    figure.text(0.995, 0.006, _provenance(record, study["facts"]), fontsize=9, color=theme.faint, ha="right")
    return figure


def _tasks(record: Record) -> list[Task]:
    """Return the tasks with a run that has been judged."""
    return [
        task
        for task in record.settings.tasks
        if any(summary.course(record, task.name, name) for name in summary.methods(record, task.name))
    ]


def _titled(axis: Axes, title: str, below: str, theme: Theme) -> None:
    axis.set_title(title, loc="left", fontsize=13.5, fontweight="bold", pad=24)
    axis.text(0, 1.02, below, transform=axis.transAxes, fontsize=10, color=theme.faint, va="bottom")


def _draw_course(axis: Axes, record: Record, task: Task, against: int, theme: Theme) -> None:
    lows, highs = [], []
    for name in summary.methods(record, task.name):
        looks = summary.course(record, task.name, name)
        if not looks:
            continue
        places, colour = [look[against] for look in looks], theme.colour(*COLOURS[name])
        mean, low, high = (_height([getattr(look[2], part) for look in looks]) for part in ("mean", "low", "high"))
        style = {"linestyle": (0, (4, 1.5))} if name in DASHED else {}
        axis.plot(places, mean, color=colour, linewidth=1.8, zorder=3, **style)
        axis.fill_between(places, low, high, color=colour, alpha=0.13, linewidth=0)
        lows.append(float(np.quantile(low, 0.05)))
        highs.append(float(high.max()))
    axis.axhline(_height([task.target])[0], color=theme.text, linewidth=1, linestyle=":")
    axis.set_xscale("log")
    first, last = axis.get_xlim()
    axis.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if last < 200 * first else (1, 3)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    bottom, top = min(lows), max(*highs, _height([task.target])[0])
    axis.set_ylim(bottom - 0.03 * (top - bottom), top + 0.06 * (top - bottom))
    axis.yaxis.set_major_locator(FixedLocator(_height(list(ACCURACIES))))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(round(1 - 10**-value, 4))))
    axis.grid(visible=True, color=theme.faint, alpha=0.25, linewidth=0.7)


def _height(accuracies: list[float]) -> np.ndarray:
    """Return −log₁₀ of the error, which spreads what is nearly right; 0.05 % stands for none."""
    return -np.log10(np.maximum(1 - np.asarray(accuracies), 5e-4))


def _draw_target(axis: Axes, record: Record, task: Task, theme: Theme) -> None:
    found = summary.summaries(record, task.name)
    most = max((one.seconds.mean for one in found if one.seconds), default=1)
    # Those that did not always arrive come last: their means are over their better runs alone.
    found.sort(key=lambda one: (one.reached < one.runs, -one.reached, one.seconds.mean if one.seconds else 0))
    for place, one in enumerate(found):
        colour = theme.colour(*COLOURS[one.method])
        runs = summary.whole(record.of(task.name, one.method))
        reached = [at.seconds for run in runs if (at := run.reached(task.target))]
        end = one.seconds.mean if one.seconds else 0
        axis.plot([0, end], [place, place], color=colour, linewidth=5, alpha=0.45, solid_capstyle="butt")
        axis.plot(reached, [place] * len(reached), "o", color=colour, markersize=7, markeredgecolor=theme.background)
        words = "not reached"
        if one.steps and one.seconds:
            missed = f", {one.reached} of {one.runs} runs" if one.reached < one.runs else ""
            words = f"{spelled(one.seconds.mean)} s ({one.steps.mean:.0f}){missed}"
        axis.text(max([*reached, end]) + 0.03 * most, place, words, va="center", fontsize=10.5, color=theme.text)
    axis.set_yticks(range(len(found)), [one.method for one in found])
    for label in axis.get_yticklabels():
        label.set(color=theme.colour(*COLOURS[label.get_text()]), fontweight="bold", fontsize=11.5)
    axis.set_ylim(len(found) - 0.5, -0.5)
    axis.set_xlim(0, 1.75 * max(most, *(one.seconds.high for one in found if one.seconds), 0))
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.set_xlabel("seconds")


def _provenance(record: Record, machine: dict[str, Any]) -> str:
    place = machine["gpu"]["name"] if machine.get("gpu") else f"{machine['cpu']}, threads: {machine['threads']}"
    words = [
        f"{record.settings.trials} trials of each method beforehand",
        place,
        f"torch {machine['versions']['torch']}",
        commit_of(machine),
    ]
    short = "; short run: means nothing" if machine["quick"] else ""
    return ", ".join(words) + short + ("; interrupted" if record.interrupted else "")
