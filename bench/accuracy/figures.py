"""The pictures, light and dark: errors over the steps, and what an error costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench.accuracy import summary
from bench.accuracy.record import Record
from bench.accuracy.trackers import BEST

# Okabe and Ito's palette, which colour-blind readers tell apart.
COLORS = {
    "B": "#0072b2",
    "B, root": "#56b4e9",
    "B, no eigh": "#8a8a8a",
    "B-R": "#009e73",
    "B-C": "#cc79a7",
    "RS": "#d55e00",
    "SRE": "#e69f00",
}
MARKERS = {"B": "o", "B, root": "<", "B, no eigh": "v", "B-R": "s", "B-C": "D", "RS": "^", "SRE": "P"}
COLUMNS = (("inputs", "inverse"), ("gradients", "inverse"), ("step", "error"), ("step", "angle"))
TITLES = ("Inverse of A", "Inverse of G", "Step", "Angle of the step")


class Theme(NamedTuple):
    """Colours of one picture."""

    name: str
    paper: str
    ink: str
    faint: str


THEMES = (Theme("light", "#ffffff", "#1a1a1a", "#8a8a8a"), Theme("dark", "#1e2129", "#e8e8e8", "#8d93a0"))


def draw(study: Record, machine: dict[str, Any], folder: Path) -> list[Path]:
    """Draw what has been measured, a file a theme, and return their paths; none where that is nothing."""
    widths = summary.widths(study)
    if not widths:
        return []
    paths = []
    for theme in THEMES:
        path = folder / f"accuracy-{theme.name}.png"
        with rc_context(_style(theme)):
            _figure(study, widths, machine, theme).savefig(path, facecolor=theme.paper)
        paths.append(path)
    return paths


def _style(theme: Theme) -> dict[str, Any]:
    inked = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
    return dict.fromkeys(inked, theme.ink) | {"axes.facecolor": theme.paper, "font.size": 10}


def _figure(study: Record, widths: list[int], machine: dict[str, Any], theme: Theme) -> Figure:
    figure = Figure(
        figsize=(13, 2.3 + 2.7 * (len(widths) + 1)), dpi=100, layout=ConstrainedLayoutEngine(rect=(0, 0.022, 1, 0.978))
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(widths) + 1, len(COLUMNS), squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color=theme.faint, alpha=0.25, linewidth=0.6)
    for row, width in zip(axes, widths, strict=False):
        for axis, key in zip(row, COLUMNS, strict=True):
            _draw_course(axis, study, width, key, theme)
        row[0].set_ylabel(f"width {width}", fontweight="bold")
    for axis, key in zip(axes[-1], COLUMNS, strict=True):
        _draw_prices(axis, study, widths[-1], key, theme)
    axes[-1, 0].set_ylabel(f"width {widths[-1]}:\nerror and cost", fontweight="bold")
    for axis, title, (_, measure) in zip(axes[0], TITLES, COLUMNS, strict=True):
        unit = "degrees" if measure == "angle" else "relative error"
        axis.set_title(f"{title}, {unit}", loc="left", fontweight="bold", fontsize=11)
    for axis in axes[-2]:
        axis.set_xlabel("training step")
    for axis in axes[-1]:
        axis.set_xlabel("ms a step and factor")
    _legend(figure, axes[0, 0], study, theme)
    figure.text(0.995, 0.004, _provenance(study, machine), fontsize=8.5, color=theme.faint, ha="right")
    return figure


def _legend(figure: Figure, axis: Axes, study: Record, theme: Theme) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=len(labels), frameon=False, fontsize=10.5)
    settings = study.settings
    words = f"kept at rank {settings.rank} with {settings.batch} new columns a step"
    figure.suptitle(
        f"Factors of an MLP's middle layer on digits, {words}. B-R, B-C, RS and SRE at equal cost",
        x=0.01, ha="left", fontsize=13, fontweight="bold", color=theme.ink,
    )  # fmt: skip


def _draw_course(axis: Axes, study: Record, width: int, key: tuple[str, str], theme: Theme) -> None:
    for name in (BEST, *COLORS):
        steps, values = summary.course(study, width, name, *key)
        color = theme.faint if name == BEST else COLORS[name]
        style = {"linestyle": "--", "linewidth": 2.2, "zorder": 1} if name == BEST else {"linewidth": 1.5}
        if name in ("B", "B, root", "B, no eigh"):
            style |= {"linestyle": (0, (1.2, 1.2)), "linewidth": 1.8, "zorder": 4}
        axis.plot(steps, [value.mean for value in values], color=color, label=name, **style)
        axis.fill_between(
            steps, [v.low for v in values], [v.high for v in values], color=color, alpha=0.12, linewidth=0
        )
    _scale(axis, key)
    axis.set_xlim(0, study.settings.steps)


def _draw_prices(axis: Axes, study: Record, width: int, key: tuple[str, str], theme: Theme) -> None:
    costs = study.costs[width]
    best = summary.spread(study, width, BEST, *key).mean
    axis.axhline(best, color=theme.faint, linestyle="--", linewidth=2.2)
    for one in study.trackers[width]:
        family = next(name for name in (*sorted(COLORS, key=len, reverse=True),) if one.name.startswith(name))
        value = summary.spread(study, width, one.name, *key)
        filled = one.name in COLORS
        axis.errorbar(
            one.cost(costs), value.mean, yerr=[[value.mean - value.low], [value.high - value.mean]],
            color=COLORS[family], marker=MARKERS[family], markersize=8, capsize=2, linestyle="none",
            markerfacecolor=COLORS[family] if filled else "none",
        )  # fmt: skip
        if one.name.startswith("RS every"):
            axis.annotate(
                f"RS and SRE every {one.period}", (one.cost(costs), value.mean), (9, -3), textcoords="offset points",
                fontsize=8.5, color=theme.faint,
            )  # fmt: skip
    _scale(axis, key)
    axis.set_xlim(0, 1.12 * max(one.cost(costs) for one in study.trackers[width]))


def _scale(axis: Axes, key: tuple[str, str]) -> None:
    axis.set_yscale("log")
    sign = "°" if key[1] == "angle" else " %"
    factor = 1 if key[1] == "angle" else 100
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{factor * value:g}{sign}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _provenance(study: Record, machine: dict[str, Any]) -> str:
    count = min(summary.seeds(study, width) for width in summary.widths(study))
    words = [
        f"mean and range over {count} seed{'s' if count > 1 else ''}",
        f"λ = {study.settings.damping:g} of the largest eigenvalue",
        f"{machine['cpu']}, threads: {machine['threads']}",
        f"torch {machine['versions']['torch']}, brandla {machine['versions']['brandla']}",
    ]
    return (
        ", ".join(words)
        + ("; short run: means nothing" if machine["quick"] else "")
        + ("; interrupted" if study.interrupted else "")
    )
