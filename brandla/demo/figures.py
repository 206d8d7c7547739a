"""The picture: both studies, two panels each."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from brandla.demo.results import Results, Run, Tracking, Training
from brandla.demo.settings import Settings
from brandla.demo.summary import NORMS, MethodSummary, Norm, ratios, step_times, summarize_training, timing

# Okabe and Ito's palette, which colour-blind readers tell apart; greys for the methods that are no K-FAC.
_COLORS = {
    "SGD, momentum": "#9a9a9a",
    "AdamW": "#5a5a5a",
    "K-FAC": "#000000",
    "RS-KFAC": "#e69f00",
    "SRE-KFAC": "#56b4e9",
    "B-KFAC": "#0072b2",
    "B-KFAC, sketched": "#d55e00",
    "B-R-KFAC": "#009e73",
    "B-KFAC-C": "#cc79a7",
}
_UPDATES = {"root_update": "#0072b2", "eigh_update": "#cc79a7"}
_STYLES: dict[Norm, Literal["-", "--", ":"]] = {"trace": "-", "frobenius": "--", "spectral": ":"}
_NAMES = {"trace": "trace norm", "frobenius": "Frobenius norm", "spectral": "spectral norm"}
_GREY = "#555555"
_SMALL: dict[str, Any] = {"fontsize": 9, "color": _GREY}
_TICKS = [factor * power for power in (0.01, 0.1, 1, 10, 100, 1000) for factor in (1, 2, 5)]


def draw(results: Results, path: Path) -> bool:
    """Draw what has been measured to ``path``; return False, and draw nothing, where that is nothing."""
    study, settings = results.tracking, results.settings
    if study is None or not study.steps:
        return False
    layout = ConstrainedLayoutEngine(hspace=0.09, wspace=0.05, rect=(0, 0.03, 1, 0.97))
    figure = Figure(figsize=(12, 9), dpi=110, layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    _draw_errors(axes[0, 0], study, settings)
    _draw_times(axes[0, 1], study, settings)
    _draw_accuracy(axes[1, 0], results.training, settings)
    _draw_steps(axes[1, 1], results.training, settings)
    figure.text(0.995, 0.008, _provenance(results), fontsize=8.5, color=_GREY, ha="right")
    figure.savefig(path)
    return True


def _provenance(results: Results) -> str:
    machine = results.machine
    versions = machine["versions"]
    place = machine["gpus"][0] if results.settings.device != "cpu" and machine["gpus"] else machine["cpu"]
    words = [place, f"threads: {machine['threads']}", f"torch {versions['torch']}", f"brandla {versions['brandla']}"]
    return ", ".join(words) + ("; interrupted" if results.interrupted else "")


def _title(axis: Axes, text: str, below: str) -> None:
    axis.set_title(text, loc="left", fontsize=13, fontweight="bold", pad=24)
    axis.text(0, 1.02, below, transform=axis.transAxes, fontsize=10, color=_GREY, va="bottom")


def _draw_errors(axis: Axes, study: Tracking, settings: Settings) -> None:
    rank = settings.tracking.headline_rank
    _title(
        axis,
        "A layer's input factor, tracked while it learns",
        f"Error / best possible rank-{rank} error; n = {study.n}, {study.columns} new columns a step",
    )
    trackers = [tracker for tracker in study.trackers if tracker.rank == rank]
    top = 1.1
    for tracker in trackers:
        for norm in NORMS:
            steps, values = ratios(study, tracker, norm)
            width = 2.2 if norm == "trace" else 1.4
            axis.plot(steps, values, color=_UPDATES[tracker.update], linestyle=_STYLES[norm], linewidth=width)
            top = max([top, *values])
    band = axis.axhspan(1, 1.1, color="#0072b2", alpha=0.1, linewidth=0, label="within 10 % of the best")
    # Room for the legend above the lines.
    axis.set_ylim(1, 1 + 1.35 * (top - 1))
    axis.set_xlim(0, study.steps[-1])
    axis.set_xlabel("training step")
    updates = [Line2D([], [], color=_UPDATES[one.update], linewidth=2.2, label=one.update) for one in trackers]
    norms = [Line2D([], [], color="black", linestyle=_STYLES[norm], label=_NAMES[norm]) for norm in NORMS]
    axis.legend(handles=[*updates, band, *norms], frameon=False, ncols=2, loc="upper right")


def _draw_times(axis: Axes, study: Tracking, settings: Settings) -> None:
    rank = settings.tracking.headline_rank
    _title(axis, "Time per update", f"Median, ms; n = {study.n}, rank {rank}, {study.columns} new columns")
    rows = sorted(_times(study, settings), key=lambda row: row[1])
    places = range(len(rows))
    axis.barh(places, [value for _, value, _ in rows], color=[color for _, _, color in rows], height=0.62)
    for place, (_, value, _) in zip(places, rows, strict=True):
        axis.text(value, place, f" {value:.1f}", va="center", fontsize=11)
    axis.set_yticks(places, [name for name, _, _ in rows])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.12 * max(value for _, value, _ in rows))


def _times(study: Tracking, settings: Settings) -> list[tuple[str, float, str]]:
    """List label, milliseconds and colour; a decomposition includes the update of the dense average it needs."""
    rank = settings.tracking.headline_rank
    rows = [
        (one.update, timing(one.milliseconds, settings.tracking.warmup), _UPDATES[one.update])
        for one in study.trackers
        if one.rank == rank
    ]
    average = next((one.milliseconds for one in study.references if one.name == "dense average"), [])
    on_top = timing(average, 1) if average else 0.0
    return rows + [
        (f"dense average +\n{one.name}", on_top + timing(one.milliseconds, 1), "#9a9a9a")
        for one in study.references
        if one.rank in (rank, None) and one.name != "dense average" and one.milliseconds
    ]


def _draw_accuracy(axis: Axes, study: Training, settings: Settings) -> None:
    target = settings.training.target
    below = f"Test error, %, mean over seeds; dashed: {100 * target:g} % accuracy"
    _title(axis, "Training on digits: error over time", below)
    grouped = _by_method(study)
    if not grouped:
        return _leave_empty(axis)
    for method, runs in grouped.items():
        finished = [run for run in runs if run.finished] or runs
        looks = list(zip(*(run.evaluations for run in finished), strict=False))
        seconds = [mean(at.seconds for at in look) for look in looks]
        errors = [100 * mean(1 - at.accuracy for at in look) for look in looks]
        # A logarithmic axis has no place for 0.
        axis.plot(seconds, np.maximum(errors, 0.1), color=_COLORS[method], linewidth=1.8, label=method)
    axis.axhline(100 * (1 - target), color=_GREY, linewidth=1, linestyle="--")
    axis.set_xlabel("seconds of training")
    # Learning goes from the upper left to the lower right, so the upper right is free.
    axis.legend(frameon=False, loc="upper right", fontsize=9, labelspacing=0.22, handlelength=1.4, borderaxespad=0)
    axis.set_xscale("log")
    axis.set_yscale("log")
    _plain_ticks(axis.xaxis)
    _plain_ticks(axis.yaxis)
    axis.set_ylim(top=120)


def _draw_steps(axis: Axes, study: Training, settings: Settings) -> None:
    _title(axis, "Training on digits: time per step", "ms, a dot each step;  ❙ median,  ◆ 99th percentile")
    grouped = _by_method(study)
    if not grouped:
        return _leave_empty(axis)
    summaries = summarize_training(study, settings)
    # One step that the system held up would squeeze all others together: it is drawn at the edge.
    edge = 1.6 * max(one.p99_milliseconds for one in summaries)
    for place, (method, runs) in enumerate(grouped.items()):
        times = step_times(runs, settings) or runs[0].milliseconds
        jitter = np.random.default_rng(0).uniform(-0.25, 0.25, len(times))
        color, p99 = _COLORS[method], float(np.percentile(times, 99))
        axis.scatter(np.minimum(times, edge), place + jitter, s=8, color=color, alpha=0.3, linewidths=0)
        axis.plot([np.median(times)] * 2, [place - 0.36, place + 0.36], color=color, linewidth=2.6)
        axis.scatter(p99, place, s=60, marker="D", color=color, edgecolors="white", zorder=3)
    axis.set_xscale("log")
    _plain_ticks(axis.xaxis)
    axis.set_xlim(right=edge)
    axis.invert_yaxis()
    axis.set_yticks(range(len(grouped)), list(grouped))
    for label in axis.get_yticklabels():
        label.set(color=_COLORS[label.get_text()], fontweight="bold", verticalalignment="bottom")
    for place, one in enumerate(summaries):
        words = _reached(one, settings)
        axis.text(-0.022, place + 0.08, words, transform=axis.get_yaxis_transform(), **_SMALL, ha="right", va="top")


def _reached(one: MethodSummary, settings: Settings) -> str:
    """Say when the target was reached."""
    target = f"{100 * settings.training.target:g} %"
    if one.steps_to_target is None or one.seconds_to_target is None:
        return f"{target}: not reached"
    part = "" if one.reached == one.runs else f" ({one.reached}/{one.runs} runs)"
    return f"{target}: {one.steps_to_target:.0f} steps, {one.seconds_to_target:.2f} s{part}"


def _by_method(study: Training) -> dict[str, list[Run]]:
    grouped: dict[str, list[Run]] = {}
    for run in study.runs:
        if run.evaluations:
            grouped.setdefault(run.method, []).append(run)
    return grouped


def _leave_empty(axis: Axes) -> None:
    axis.set_axis_off()
    axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, color=_GREY, ha="center")


def _plain_ticks(axis: Any) -> None:
    axis.set_major_locator(FixedLocator(_TICKS))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
