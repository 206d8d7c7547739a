"""The picture: both studies, two panels each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from brandla.demo import summary
from brandla.demo.frame import Row

# Okabe and Ito's palette, which colour-blind readers tell apart; greys for the methods that are no K-FAC.
COLORS = {
    "SGD, momentum": "#9a9a9a",
    "AdamW": "#5a5a5a",
    "K-FAC": "#000000",
    "RS-KFAC": "#e69f00",
    "SRE-KFAC": "#56b4e9",
    "B-KFAC": "#0072b2",
    "B-KFAC, sketched": "#d55e00",
    "B-R-KFAC": "#009e73",
    "B-KFAC-C": "#cc79a7",
    "root_update": "#0072b2",
    "eigh_update": "#cc79a7",
}
_STYLES: dict[str, Any] = {"trace": "-", "frobenius": "--", "spectral": ":"}
_GREY = "#555555"
_TICKS = [factor * power for power in (0.01, 0.1, 1, 10, 100, 1000) for factor in (1, 2, 5)]


def draw(content: Row, path: Path) -> bool:
    """Draw what has been measured to ``path``; return False, and draw nothing, where that is nothing."""
    rows = summary.tracked(content)
    if rows.empty:
        return False
    figure = Figure(figsize=(12, 9), dpi=110, layout=ConstrainedLayoutEngine(hspace=0.09, rect=(0, 0.03, 1, 0.97)))
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    settings = content["settings"]
    _draw_errors(axes[0, 0], rows[rows["rank"] == settings["headline_rank"]], settings)
    _draw_times(axes[0, 1], content)
    _draw_training(axes[1], content)
    facts = content["facts"]
    place = facts["gpus"][0] if settings["device"] != "cpu" and facts["gpus"] else facts["cpu"]
    words = f"{place}, threads: {facts['threads']}, torch {facts['versions']['torch']}"
    words += f", brandla {facts['versions']['brandla']}" + ("; interrupted" if facts["interrupted"] else "")
    figure.text(0.995, 0.008, words, fontsize=8.5, color=_GREY, ha="right")
    figure.savefig(path)
    return True


def _title(axis: Axes, text: str, below: str) -> None:
    axis.set_title(text, loc="left", fontsize=13, fontweight="bold", pad=24)
    axis.text(0, 1.02, below, transform=axis.transAxes, fontsize=10, color=_GREY, va="bottom")


def _draw_errors(axis: Axes, rows: pd.DataFrame, settings: Row) -> None:
    n, k, rank = settings["width"] + 1, settings["batch"], settings["headline_rank"]
    below = f"Error / best possible rank-{rank} error; n = {n}, {k} new columns a step"
    _title(axis, "A layer's input factor, tracked while it learns", below)
    for update, own in rows.groupby("method", sort=False):
        for norm in summary.NORMS:
            label = f"{update}, {norm.replace('f', 'F')}"
            axis.plot(own["step"], own[f"{norm} ratio"], _STYLES[norm], color=COLORS[str(update)], label=label)
    axis.axhspan(1, 1.1, color="#0072b2", alpha=0.1, linewidth=0, label="within 10 % of the best")
    # Room for the legend above the lines.
    top = np.nanmax([1.1, *(rows[f"{norm} ratio"].max() for norm in summary.NORMS)])
    axis.set_ylim(1, 1 + 1.4 * (top - 1))
    axis.set_xlabel("training step")
    axis.legend(frameon=False, ncols=2, loc="upper right", fontsize=9)


def _draw_times(axis: Axes, content: Row) -> None:
    """Draw median times at the headline rank; a decomposition includes the update of the dense average it needs."""
    settings = content["settings"]
    rank = settings["headline_rank"]
    below = f"Median, ms; n = {settings['width'] + 1}, rank {rank}, {settings['batch']} new columns"
    _title(axis, "Time per update", below)
    found = summary.times(content)["median"].dropna()
    found = found[[at in (rank, 0) for at in found.index.get_level_values("rank")]].droplevel("rank")
    average = found.pop("dense average") if "dense average" in found else 0.0
    named = {
        name if name in COLORS else f"dense average +\n{name}": value + (0.0 if name in COLORS else average)
        for name, value in found.items()
    }
    ordered = pd.Series(named).sort_values()
    bars = axis.barh(ordered.index, ordered.to_numpy(), color=[COLORS.get(name, "#9a9a9a") for name in ordered.index])
    axis.bar_label(bars, fmt="%.1f", padding=3)
    axis.invert_yaxis()


def _draw_training(axes: np.ndarray, content: Row) -> None:
    """Draw test error over seconds, as the mean over seeds, and the time of every step."""
    by_time, by_step = axes
    target = content["settings"]["target"]
    _title(by_time, "Training on digits: error over time", f"Test error, %; dashed: {100 * target:g} % accuracy")
    _title(by_step, "Training on digits: time per step", "ms, a dot each step;  ❙ median,  ◆ 99th percentile")
    runs = pd.DataFrame([run for run in content.get("runs", []) if run["evaluations"]])
    if runs.empty:
        for axis in axes:
            axis.set_axis_off()
            axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, color=_GREY, ha="center")
        return
    reached = summary.training(content).set_index("method")
    labels = []
    for place, (name, own) in enumerate(runs.groupby("method", sort=False)):
        color = COLORS[str(name)]
        looks = pd.DataFrame(own["evaluations"].explode().tolist()).groupby("step").mean()
        # A logarithmic axis has no place for 0.
        by_time.plot(looks["seconds"], (100 - 100 * looks["accuracy"]).clip(lower=0.1), color=color, label=name)
        times = np.concatenate([run[content["settings"]["warmup"] :] or run for run in own["milliseconds"]])
        jitter = np.random.default_rng(0).uniform(-0.25, 0.25, len(times))
        late = float(np.percentile(times, 99))
        # A step that the system held up would squeeze all others together.
        by_step.scatter(np.minimum(times, 1.6 * late), place + jitter, s=8, color=color, alpha=0.3, linewidths=0)
        by_step.plot([np.median(times)] * 2, [place - 0.36, place + 0.36], color=color, linewidth=2.6)
        by_step.scatter(late, place, s=60, marker="D", color=color, edgecolors="white", zorder=3)
        steps, seconds = reached.loc[name, ["steps", "seconds"]]
        when = "never" if steps == "never" else f"{steps} steps, {seconds} s"
        labels.append(f"{name}\n{100 * target:g} %: {when}")
    by_time.axhline(100 * (1 - target), color=_GREY, linewidth=1, linestyle="--")
    by_time.set_xlabel("seconds of training, mean over seeds")
    by_time.legend(frameon=False, loc="upper right", fontsize=9, labelspacing=0.22)
    by_time.set_xscale("log")
    by_time.set_yscale("log")
    by_time.set_ylim(top=120)
    by_step.set_xscale("log")
    by_step.invert_yaxis()
    by_step.set_yticks(range(len(labels)), labels, fontsize=9)
    for label, name in zip(by_step.get_yticklabels(), reached.index, strict=False):
        label.set_color(COLORS[name])
    for axis in (by_time.xaxis, by_time.yaxis, by_step.xaxis):
        axis.set_major_locator(FixedLocator(_TICKS))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
