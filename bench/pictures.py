"""The pictures of the scaling study and of the roofline study, for light and for dark pages.

Each file carries a digest of what it shows, so that a check can tell a picture of other figures without drawing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from PIL import Image

Row = dict[str, Any]
DIGEST = "Source"


class Theme(NamedTuple):
    """Colours of a page: background, text, what recedes, and whether colours have to be lighter."""

    name: str
    background: str
    text: str
    faint: str
    dark: bool

    def colour(self, light: str, dark: str) -> str:
        """Return the one that stands out from the background."""
        return dark if self.dark else light


THEMES = (
    Theme("light", "#ffffff", "#1f1f1f", "#6b6b6b", dark=False),
    Theme("dark", "#1e2129", "#ececec", "#a0a4ad", dark=True),
)
# Okabe and Ito's palette, which colour-blind readers tell apart, and lighter ones of the same hue.
COLOURS = {
    "root_update": ("#d55e00", "#ff8f40"),
    "root_update, cholesky": ("#8f6a4a", "#c9a27e"),
    "eigh_update": ("#0072b2", "#4db2ee"),
    "damped_solve": ("#009e73", "#2fd3a5"),
    "kron_damped_solve, pair": ("#3f8f9b", "#7fd0dc"),
    "gram_ema_": ("#9a9a9a", "#8a8f99"),
    "randomized_eigh": ("#b07900", "#f0b840"),
    "torch.svd_lowrank": ("#b05c90", "#e49cc8"),
    "Cholesky solve": ("#6b6b6b", "#b8bcc6"),
    "torch.linalg.eigh": ("#000000", "#ffffff"),
}


def write(name: str, study: Row, folder: Path, draw: Callable[[Row, Theme], Figure] | None = None) -> None:
    """Draw a study, once for each theme; by ``draw`` where it is none of those here."""
    folder.mkdir(parents=True, exist_ok=True)
    for theme in THEMES:
        style = {
            "text.color": theme.text,
            "axes.edgecolor": theme.faint,
            "axes.labelcolor": theme.text,
            "axes.facecolor": theme.background,
            "xtick.color": theme.text,
            "ytick.color": theme.text,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "font.size": 11,
        }
        with rc_context(style):
            figure = (draw or DRAWN[name])(study, theme)
            FigureCanvasAgg(figure)
            metadata = {DIGEST: digest(study), "Software": None}
            figure.savefig(path(name, theme, folder), facecolor=theme.background, dpi=110, metadata=metadata)


def stale(name: str, study: Row, folder: Path) -> list[Path]:
    """Return the pictures that are missing or show other figures."""
    wanted = digest(study)
    paths = [path(name, theme, folder) for theme in THEMES]
    return [one for one in paths if not one.exists() or _carried(one) != wanted]


def path(name: str, theme: Theme, folder: Path) -> Path:
    """Return where a picture is."""
    return folder / f"{name}-{theme.name}.png"


def digest(study: Row) -> str:
    """Return a digest of the figures of a study and of what they were measured on."""
    return hashlib.sha256(json.dumps(study, sort_keys=True).encode()).hexdigest()


def _carried(picture: Path) -> str | None:
    with Image.open(picture) as image:
        return image.info.get(DIGEST)


# ---------------------------------------------------------------------------------------------------------------------
# Axes and labels
# ---------------------------------------------------------------------------------------------------------------------


def _titled(axis: Axes, title: str, below: str, theme: Theme) -> None:
    axis.set_title(title, loc="left", fontsize=13.5, fontweight="bold", pad=26)
    axis.text(0, 1.025, below, transform=axis.transAxes, fontsize=10.5, color=theme.faint, va="bottom")


def _logarithmic(axis: Axes, sizes: Sequence[float], spelled: Callable[[float], str], theme: Theme) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_locator(LogLocator(10))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: spelled(value)))
    axis.grid(visible=True, axis="y", color=theme.faint, alpha=0.25, linewidth=0.7)
    axis.tick_params(length=3)


def _with_unit(value: float, units: Sequence[tuple[float, str]]) -> str:
    scale, unit = next((pair for pair in units if value >= 0.999 * pair[0]), units[-1])
    return f"{value / scale:g} {unit}"


def _time(seconds: float) -> str:
    return _with_unit(seconds, [(1, "s"), (1e-3, "ms"), (1e-6, "µs")])


def _bytes(count: float) -> str:
    return _with_unit(count, [(1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")])


def _apart(wanted: Sequence[float], least: float) -> list[float]:
    """Return places in the order of the wanted ones, moved as little as keeps them ``least`` apart."""
    order = np.argsort(wanted)
    # Blocks of labels that touch share their mean: merge the blocks until none overlaps.
    blocks: list[list[float]] = []
    for place in np.asarray(wanted)[order]:
        blocks.append([float(place)])
        while len(blocks) > 1 and _start(blocks[-1], least) < _end(blocks[-2], least) + least:
            last = blocks.pop()
            blocks[-1].extend(last)
    placed = [_start(block, least) + index * least for block in blocks for index in range(len(block))]
    moved = np.empty(len(placed))
    moved[order] = placed
    return list(moved)


def _start(block: Sequence[float], least: float) -> float:
    return float(np.mean(block)) - least * (len(block) - 1) / 2


def _end(block: Sequence[float], least: float) -> float:
    return _start(block, least) + least * (len(block) - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Growth
# ---------------------------------------------------------------------------------------------------------------------


def _scaling(study: Row, theme: Theme) -> Figure:
    layout = ConstrainedLayoutEngine(hspace=0.1, wspace=0.06, rect=(0, 0.03, 1, 0.97))
    figure = Figure(figsize=(13.5, 10.5), layout=layout)
    axes = figure.subplots(2, 2, height_ratios=(1.35, 1))
    seconds = lambda row: row["seconds"][0]
    held = lambda row: row["held_bytes"] + row["peak_bytes"]
    panels = (
        (axes[0, 0], "n", "time", seconds, _time, "Time against n", "one update, application or decomposition"),
        (
            axes[0, 1],
            "n",
            "memory",
            held,
            _bytes,
            "Memory against n",
            "held between calls, and the peak of a call on top",
        ),
        (axes[1, 0], "r", "time", seconds, _time, "Time against the rank", ""),
        (axes[1, 1], "k", "time", seconds, _time, "Time against the new columns", ""),
    )
    for axis, letter, quantity, value, spelled, title, below in panels:
        rows = [row for row in study["rows"] if row["axis"] == letter]
        if not rows:
            axis.set_axis_off()
            continue
        _titled(axis, title, "; ".join(filter(None, (_shared(rows, letter), below))), theme)
        fits = {
            fit["method"]: fit["exponent"]
            for fit in study["exponents"]
            if (fit["axis"], fit["quantity"], fit["window"]) == (letter, quantity, WINDOW)
        }
        _draw_growth(axis, letter, rows, value, fits, theme)
        _logarithmic(axis, _ticks(rows, letter), spelled, theme)
        axis.set_xlabel(letter)
    _sign(figure, study, theme, "Exponents are fitted over the larger half of the sizes")
    return figure


WINDOW = "larger half"


def _shared(rows: Sequence[Row], letter: str) -> str:
    """Say what does not grow."""
    return ", ".join(
        f"{other} = {next(iter(found))}"
        for other in "nrk"
        if other != letter and len(found := {row[other] for row in rows if row["method"] == "eigh_update"}) == 1
    )


def _ticks(rows: Sequence[Row], letter: str) -> list[int]:
    sizes = sorted({row[letter] for row in rows})
    # Every second power of two where there are many sizes; none in between.
    powers = [size for size in sizes if size & (size - 1) == 0] or sizes
    return powers[:: 2 if len(powers) > 7 else 1]


def _draw_growth(
    axis: Axes, letter: str, rows: Sequence[Row], value: Callable[[Row], float], fits: dict[str, Any], theme: Theme
) -> None:
    lines = {name: line for name in COLOURS if (line := [row for row in rows if row["method"] == name])}
    for name, line in lines.items():
        sizes, values = [row[letter] for row in line], [value(row) for row in line]
        axis.plot(sizes, values, color=theme.colour(*COLOURS[name]), linewidth=2, marker="o", markersize=4)
    ends = {name: (line[-1][letter], value(line[-1])) for name, line in lines.items()}
    first, last = (pick(row[letter] for row in rows) for pick in (min, max))
    least, most = (pick(map(value, rows)) for pick in (min, max))
    for name, at in _places(ends, LINE * float(np.log(most / least))).items():
        colour = theme.colour(*COLOURS[name])
        arrow = LEADER | {"color": colour}
        other = {row["n"] for row in lines[name]} - {row["n"] for row in lines["eigh_update"]} if letter != "n" else ()
        words = _label(name + "".join(f", n = {n}" for n in other), letter, fits.get(name))
        where = {"xy": ends[name], "xytext": (at[0] * (last / first) ** GAP, at[1])}
        label = axis.annotate(words, **where, color=colour, fontsize=11, va="center", arrowprops=arrow)
        label.set_in_layout(False)
        most = max(most, at[1])
    axis.set_xlim(first / 1.15, last * (last / first) ** ROOM)
    axis.set_ylim(least / 1.4, most * 1.4)


# Height of a label, its distance from the line, and the room to the right of the lines, as parts of the panel.
LINE, GAP, ROOM = 0.068, 0.05, 0.78
# From the left edge of a label to its point.
LEADER = {
    "arrowstyle": "-",
    "linestyle": ":",
    "linewidth": 1.0,
    "alpha": 0.8,
    "shrinkA": 1,
    "shrinkB": 4,
    "relpos": (0, 0.5),
}


def _places(ends: dict[str, tuple[float, float]], line: float) -> dict[str, tuple[float, float]]:
    """Return where the labels go: beside the ends of the longest lines, and above those for lines that end earlier."""
    last = max(across for across, _ in ends.values())
    longest, early = ([name for name, end in ends.items() if (end[0] == last) == at_end] for at_end in (True, False))
    height_of = lambda name: float(np.log(ends[name][1]))
    heights = dict(zip(longest, _apart([*map(height_of, longest)], line), strict=True))
    if early:
        floor = max(heights.values()) + line
        above = _apart([max(height_of(name), floor) for name in early], line)
        # Labels that crowd at the floor move up as far as their block reaches below it.
        heights |= {name: height + max(0.0, floor - min(above)) for name, height in zip(early, above, strict=True)}
    across = {name: max(ends[one][0] for one in (early if name in early else longest)) for name in heights}
    return {name: (across[name], float(np.exp(height))) for name, height in heights.items()}


def _label(name: str, letter: str, exponent: Any) -> str:
    return name if exponent is None else f"{name}  ${letter}^{{{exponent[0]:.2f}}}$"


def _sign(figure: Figure, study: Row, theme: Theme, words: str) -> None:
    """Say below the panels what was measured and on what."""
    machine = study["facts"]
    gpu = machine.get("gpu")
    place = gpu["name"] if gpu else f"{machine['cpu']}, {machine['threads']} threads"
    state = "; interrupted" if machine.get("interrupted") else ""
    torch = machine["versions"]["torch"]
    text = f"{words}. {place}, torch {torch}, {machine['date'][:10]}{state}"
    figure.text(0.995, 0.006, text, fontsize=10, color=theme.faint, ha="right")


# ---------------------------------------------------------------------------------------------------------------------
# Roofline
# ---------------------------------------------------------------------------------------------------------------------


def _roofline(study: Row, theme: Theme) -> Figure:
    layout = ConstrainedLayoutEngine(wspace=0.05, rect=(0, 0.05, 1, 0.94))
    figure = Figure(figsize=(13.5, 8.2), layout=layout)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    rows = [row for row in study["rows"] if row["dtype"] == row["data"] == "float32"]
    _draw_roof(left, rows, theme)
    _draw_parts(right, rows, theme)
    levels = {row["ceiling"]: row["per_second"][0] for row in study["ceilings"] if row["when"] == "before"}
    measured = ", ".join(
        f"{name} {levels[name] / 1e9:.3g} {'GB/s' if name == 'copy' else 'GFLOP/s'}"
        for name in ("copy", "float32", "float64")
        if name in levels
    )
    _sign(figure, study, theme, f"Ceilings of the same run: {measured}")
    return figure


def _colour_of(row: Row, theme: Theme) -> str:
    return theme.colour(*(("#0072b2", "#4db2ee") if row["bound_by"] == "copy" else ("#d55e00", "#ff8f40")))


def _draw_roof(axis: Axes, rows: Sequence[Row], theme: Theme) -> None:
    n, ranks = max(row["n"] for row in rows), sorted({row["r"] for row in rows})
    words = ", ".join(map(str, ranks))
    _titled(axis, "Ops under the roof", f"n = {n} (gram_ema_: what fits), r = k = {words}: the larger the dot", theme)
    across, up = ([one[part] for one in map(_under_roof, rows)] for part in (0, 1))
    reach = np.geomspace(min(0.3, *across) / 1.5, max(3.0, *across) * 1.5, 200)
    axis.plot(reach, np.minimum(reach, 1), color=theme.faint, linewidth=2)
    lines = {name: _of_largest_n(rows, name) for name in dict.fromkeys(row["op"] for row in rows)}
    low, high = min(up) / 1.4, 1.6
    ends = [float(np.log(_under_roof(line[-1])[1])) for line in lines.values()]
    heights = _apart(ends, 0.055 * float(np.log(high / low)))
    for (name, line), height in zip(lines.items(), heights, strict=True):
        places = list(map(_under_roof, line))
        axis.plot(*zip(*places, strict=True), color=theme.faint, linewidth=0.8, alpha=0.6)
        for row, place in zip(line, places, strict=True):
            axis.plot(*place, marker="o", markersize=4 + 2 * ranks.index(row["r"]), color=_colour_of(row, theme))
        arrow = LEADER | {"color": theme.faint}
        style = {"color": _colour_of(line[-1], theme), "fontsize": 11, "va": "center", "annotation_clip": False}
        axis.annotate(name, xy=places[-1], xytext=(reach[-1] * 1.3, float(np.exp(height))), arrowprops=arrow, **style)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(reach[0], reach[-1] * (reach[-1] / reach[0]) ** 0.55)
    axis.set_ylim(min(low, float(np.exp(min(heights))) / 1.1), max(high, float(np.exp(max(heights))) * 1.1))
    axis.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    for coordinate in (axis.xaxis, axis.yaxis):
        coordinate.set_minor_locator(NullLocator())
        coordinate.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_xlabel("least time of the products / least time of the bytes")
    axis.set_ylabel("part of the products' ceiling")
    axis.grid(visible=True, color=theme.faint, alpha=0.25, linewidth=0.7)


def _under_roof(row: Row) -> tuple[float, float]:
    """Return where an op is under a roof that rises to 1 at 1."""
    return row["balance"], row["of_ceiling"][0] * min(row["balance"], 1)


def _of_largest_n(rows: Sequence[Row], name: str) -> list[Row]:
    """Return the rows of an op at its largest n, by rank."""
    own = [row for row in rows if row["op"] == name]
    largest = max(row["n"] for row in own)
    return sorted((row for row in own if row["n"] == largest), key=lambda row: row["r"])


def _draw_parts(axis: Axes, rows: Sequence[Row], theme: Theme) -> None:
    _titled(axis, "Part of the ceiling that binds", "filled: the larger n; bar: 95 % interval", theme)
    ops = list(dict.fromkeys(row["op"] for row in rows))
    ranks = sorted({row["r"] for row in rows}, reverse=True)
    larger = max(row["n"] for row in rows)
    for place, name in enumerate(ops):
        for row in (row for row in rows if row["op"] == name):
            shift = 0.28 * (ranks.index(row["r"]) - (len(ranks) - 1) / 2)
            value, low, high = row["of_ceiling"]
            colour = _colour_of(row, theme)
            axis.plot([low, high], [place + shift] * 2, color=colour, linewidth=1.6)
            face = colour if row["n"] == larger or name == "cholesky_inverse_core" else theme.background
            axis.plot(value, place + shift, marker="o", markersize=7, color=colour, markerfacecolor=face)
        for rank in ranks:
            shift = 0.28 * (ranks.index(rank) - (len(ranks) - 1) / 2)
            axis.text(1.02, place + shift, f"r = {rank}", transform=axis.get_yaxis_transform(), va="center", fontsize=9)
        axis.axhline(place + 0.5, color=theme.faint, alpha=0.25, linewidth=0.7)
    axis.set_yticks(range(len(ops)), ops)
    axis.set_ylim(len(ops) - 0.5, -0.5)
    axis.set_xlim(0, max(1.05, *(row["of_ceiling"][2] * 1.05 for row in rows)))
    axis.axvline(1, color=theme.faint, linewidth=1.4, linestyle="--")
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel("least time at the measured ceilings / time")
    for words, colour, height in (
        ("bound by the copy", ("#0072b2", "#4db2ee"), 1.062),
        ("bound by products", ("#d55e00", "#ff8f40"), 1.025),
    ):
        style = {"color": theme.colour(*colour), "fontsize": 11, "ha": "right"}
        axis.text(1, height, words, transform=axis.transAxes, **style)


DRAWN: dict[str, Callable[[Row, Theme], Figure]] = {"scaling": _scaling, "roofline": _roofline}


def studies(found: dict[str, Row]) -> Iterator[str]:
    """Yield the studies of a machine that have pictures."""
    yield from (name for name in DRAWN if name in found and found[name]["rows"])
