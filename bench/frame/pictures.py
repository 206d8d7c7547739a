"""Pictures for light and for dark pages: one column of panels, so that a phone shows them legibly.

Each file carries a digest of what it shows, so that a check can tell a picture of other figures without drawing.
"""

import hashlib
import json
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from PIL import Image

from bench.frame.facts import shortly
from bench.frame.figures import Row, spelled

DIGEST = "Source"
WIDTH, DOTS = 6.2, 170
# Inches of a picture that a phone shows whole, with letters that can be read there.
NARROW = 4.2


class Theme(NamedTuple):
    """Colours of a page: background, text, what recedes, and whether colours have to be lighter: which of a pair."""

    name: str
    background: str
    text: str
    faint: str
    dark: bool


THEMES = (
    Theme("light", "#ffffff", "#1f1f1f", "#6b6b6b", dark=False),
    Theme("dark", "#1e2129", "#ececec", "#a0a4ad", dark=True),
)
Draw = Callable[[Row, Theme], Figure]
Colours = Mapping[str, tuple[str, str]]  # on light pages and on dark ones
# Okabe and Ito's palette, which colour-blind readers tell apart, then further hues; each lighter for dark pages.
PALETTE = (
    *(("#0072b2", "#4db2ee"), ("#d55e00", "#ff8f40"), ("#009e73", "#2fd3a5"), ("#cc79a7", "#e49cc8")),
    *(("#e69f00", "#f0b840"), ("#56b4e9", "#8accf2"), ("#000000", "#ffffff"), ("#6b6b6b", "#b8bcc6")),
    *(("#9a9a9a", "#8a8f99"), ("#4a3fb5", "#a79bff"), ("#7f6000", "#ffd966"), ("#274e13", "#b6d7a8")),
    *(("#6aa84f", "#93c47d"), ("#4c1130", "#d5a6bd"), ("#990000", "#e06666")),
)


def write(name: str, study: Row, folder: Path, draw: Draw) -> None:
    """Draw a study, once for each theme."""
    folder.mkdir(parents=True, exist_ok=True)
    inked = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "legend.labelcolor")
    plain = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "font.size": 10}
    grid = {"axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.25, "grid.linewidth": 0.7}
    metadata = {DIGEST: digest(study), "Software": None}
    for theme in THEMES:
        style = dict.fromkeys(inked, theme.text) | dict.fromkeys(("axes.edgecolor", "grid.color"), theme.faint)
        with rc_context(plain | grid | style | {"axes.facecolor": theme.background}):
            figure = draw(study, theme)
            figure.savefig(path(name, theme, folder), facecolor=theme.background, dpi=DOTS, metadata=metadata)


def stale(name: str, study: Row, folder: Path) -> bool:
    """Say whether a picture is missing or shows other figures."""
    drawn, wanted = [path(name, theme, folder) for theme in THEMES], digest(study)
    carried = lambda picture: Image.open(BytesIO(picture.read_bytes())).info.get(DIGEST)
    return any(not picture.exists() or carried(picture) != wanted for picture in drawn)


def path(name: str, theme: Theme, folder: Path) -> Path:
    return folder / f"{name}-{theme.name}.png"


def digest(study: Row) -> str:
    """Return a digest of the figures of a study and of what they were measured on."""
    return hashlib.sha256(json.dumps(study, sort_keys=True).encode()).hexdigest()


def panels(
    study: Row, words: str, theme: Theme, *about: tuple[str, str, float], width: float = WIDTH
) -> tuple[Figure, list[Axes]]:
    """Return a column of panels, each by its title, a line below that and its inches, signed with what was measured."""
    found, heights = study["facts"], [height for *_, height in about]
    state = "; short run: means nothing" if found["quick"] else ""
    signed = shortly(found) + state + ("; interrupted" if found.get("interrupted") else "")
    lines = [line for text in (words, signed) for line in textwrap.wrap(text, int(15 * width))]
    foot = (0.16 + 0.17 * len(lines)) / sum(heights)
    layout = ConstrainedLayoutEngine(hspace=0.04, rect=(0, foot, 1, 1 - foot))
    figure = Figure(figsize=(width, sum(heights)), layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    figure.text(0.01, 0.05 / sum(heights), "\n".join(lines), fontsize=8, color=theme.faint, va="bottom")
    for axis, (title, below, _) in zip(axes, about, strict=True):
        axis.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=20 if below else 8)
        axis.text(0, 1.02, below, transform=axis.transAxes, fontsize=9, color=theme.faint, va="bottom")
    return figure, list(axes)


def legend(axis: Axes, columns: int) -> None:
    found = axis.get_legend_handles_labels()[0]
    style = {"fontsize": 9, "handlelength": 1.6, "columnspacing": 1.2, "borderaxespad": 0.2}
    axis.legend(handles=found, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=columns, **style)


def logarithmic(axis: Any, spell: Callable[[float], str] = "{:g}".format, subs: Sequence[float] = (1,)) -> None:
    """Let an ``axis.xaxis`` or ``axis.yaxis`` be logarithmic, with few ticks in plain words."""
    axis._set_axes_scale("log")
    axis.set_major_locator(LogLocator(10, subs=subs))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: spell(value)))


def curves(axis: Axes, table: pd.DataFrame, colours: Colours, theme: Theme, solid: Collection[str], **style) -> None:
    """Draw of each column the mean at each place, which the index begins with, and its range; all not solid dashed."""
    for name, values in table.items():
        found = values.dropna().groupby(level=0).agg(["mean", "min", "max"])
        colour, dashes = colours[name][theme.dark], "-" if name in solid else (0, (4, 1.5))
        axis.plot(found.index, found["mean"], color=colour, label=name, linestyle=dashes, **style)
        axis.fill_between(found.index, found["min"], found["max"], color=colour, alpha=0.13, linewidth=0)


# --- Bars

OWN, OTHER = PALETTE[0], PALETTE[8]
# From such a quotient of the largest value over the smallest, bars have a logarithmic axis.
WIDE = 30


class Bars(NamedTuple):
    """Values by their labels; some, which are other people's, are grey."""

    title: str
    below: str
    values: pd.Series
    others: Collection[str] = ()
    unit: str = ""


def bars(chart: Callable[[Row], Bars], file: str, study: Row, theme: Theme) -> Figure:
    """Draw a bar below each label, with its value at its end."""
    title, below, values, others, unit = chart(study)
    values = values.dropna()
    figure, (axis,) = panels(study, file, theme, (title, below, 1.2 + 0.46 * len(values)), width=NARROW)
    largest, smallest = (values.max(), values.min()) if len(values) else (1.0, 0.0)
    spread = smallest > 0 and largest > WIDE * smallest
    # Room for the value at the end of the longest bar.
    first, last = (smallest / 3, largest * (largest / smallest) ** 0.3) if spread else (0.0, 1.25 * max(largest, 1e-9))
    if spread:
        logarithmic(axis.xaxis)
    colours = [(OTHER if label in others else OWN)[theme.dark] for label in values.index]
    drawn = axis.barh(range(len(values)), values - first, left=first, height=0.3, color=colours)
    axis.bar_label(drawn, [f"{spelled(value)}{unit}" for value in values], padding=4, fontsize=9)
    for place, label in enumerate(values.index):
        axis.annotate(str(label), (first, place - 0.2), (1, 0), textcoords="offset points", fontsize=9, va="bottom")
    axis.set(xlim=(first, last), ylim=(len(values) - 0.4, -0.75))
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    return figure
