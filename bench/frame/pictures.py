"""Pictures for light and for dark pages: one column of panels, which stays legible on a phone.

Each file carries a digest of its figures. So a check can tell without drawing whether a picture is up to date.
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

from bench.frame.facts import short_facts
from bench.frame.figures import Row, formatted

DIGEST = "Source"
WIDTH, DOTS = 6.2, 170
NARROW = 4.2  # inches at which a phone shows the whole picture, with legible letters


class Theme(NamedTuple):
    """Colours of a page: background, text and faint marks. ``dark`` chooses the second, lighter colour of each pair."""

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
# Okabe and Ito's palette, which colour-blind readers can tell apart, then further hues; each is lighter on dark pages.
PALETTE = (
    *(("#0072b2", "#4db2ee"), ("#d55e00", "#ff8f40"), ("#009e73", "#2fd3a5"), ("#cc79a7", "#e49cc8")),
    *(("#e69f00", "#f0b840"), ("#56b4e9", "#8accf2"), ("#000000", "#ffffff"), ("#6b6b6b", "#b8bcc6")),
    *(("#9a9a9a", "#8a8f99"), ("#4a3fb5", "#a79bff"), ("#7f6000", "#ffd966"), ("#274e13", "#b6d7a8")),
    *(("#6aa84f", "#93c47d"), ("#4c1130", "#d5a6bd"), ("#990000", "#e06666")),
)


def write(name: str, study: Row, folder: Path, draw: Draw) -> None:
    """Draw a study once for each theme."""
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
    """Return whether a picture is missing or shows other figures."""
    files, wanted = [path(name, theme, folder) for theme in THEMES], digest(study)
    carried = lambda file: Image.open(BytesIO(file.read_bytes())).info.get(DIGEST)
    return any(not file.exists() or carried(file) != wanted for file in files)


def path(name: str, theme: Theme, folder: Path) -> Path:
    return folder / f"{name}-{theme.name}.png"


def digest(study: Row) -> str:
    """Return a digest of a study's figures and facts."""
    return hashlib.sha256(json.dumps(study, sort_keys=True).encode()).hexdigest()


def panels(
    study: Row, words: str, theme: Theme, *about: tuple[str, str, float], width: float = WIDTH
) -> tuple[Figure, list[Axes]]:
    """Return a column of panels, each by title, line below it and inches, with the words and the facts at the foot."""
    facts, heights = study["facts"], [height for *_, height in about]
    state = "; short run: means nothing" if facts["quick"] else ""
    signed = short_facts(facts) + state + ("; interrupted" if facts.get("interrupted") else "")
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
    handles, _ = axis.get_legend_handles_labels()
    style = {"fontsize": 9, "handlelength": 1.6, "columnspacing": 1.2, "borderaxespad": 0.2}
    axis.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=columns, **style)


def logarithmic(axis: Any, spell: Callable[[float], str] = "{:g}".format, subs: Sequence[float] = (1,)) -> None:
    """Make an ``axis.xaxis`` or ``axis.yaxis`` logarithmic, with few ticks, labelled by ``spell``."""
    axis._set_axes_scale("log")
    axis.set_major_locator(LogLocator(10, subs=subs))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: spell(value)))


def curves(axis: Axes, table: pd.DataFrame, colours: Colours, theme: Theme, solid: Collection[str], **style) -> None:
    """Draw the mean and the range of each column against the first level of the index; dashed unless ``solid``."""
    for name, values in table.items():
        ranges = values.dropna().groupby(level=0).agg(["mean", "min", "max"])
        colour, dashes = colours[name][theme.dark], "-" if name in solid else (0, (4, 1.5))
        axis.plot(ranges.index, ranges["mean"], color=colour, label=name, linestyle=dashes, **style)
        axis.fill_between(ranges.index, ranges["min"], ranges["max"], color=colour, alpha=0.13, linewidth=0)


# --- Bars

OWN, OTHER = PALETTE[0], PALETTE[8]
WIDE = 30  # bars have a logarithmic axis if the largest value is more than this many times the smallest


class Bars(NamedTuple):
    """Values by their labels. The bars of ``others`` are grey: other people's methods."""

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
    # Leaves room for the value at the end of the longest bar.
    first, last = (smallest / 3, largest * (largest / smallest) ** 0.3) if spread else (0.0, 1.25 * max(largest, 1e-9))
    if spread:
        logarithmic(axis.xaxis)
    colours = [(OTHER if label in others else OWN)[theme.dark] for label in values.index]
    rectangles = axis.barh(range(len(values)), values - first, left=first, height=0.3, color=colours)
    axis.bar_label(rectangles, [f"{formatted(value)}{unit}" for value in values], padding=4, fontsize=9)
    for row, label in enumerate(values.index):
        axis.annotate(str(label), (first, row - 0.2), (1, 0), textcoords="offset points", fontsize=9, va="bottom")
    axis.set(xlim=(first, last), ylim=(len(values) - 0.4, -0.75))
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    return figure
