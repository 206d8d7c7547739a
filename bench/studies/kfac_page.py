"""What the study of K-FAC shows of its result file: an answer, tables, and pictures."""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from bench.frame import pictures
from bench.frame.figures import spelled
from bench.frame.pictures import Theme
from bench.frame.study import Row
from bench.studies.kfac_methods import METHODS, STRATEGIES, Task

# What the others are compared with.
BASE = "AdamW"
NOTHING = "–"
OWN = list(STRATEGIES)


def tasks_of(content: Row) -> list[Task]:
    return [Task(**row) for row in content["settings"]["tasks"]]


def by_method(runs: pd.DataFrame, parts: Sequence[str]) -> pd.DataFrame:
    """Return a row a method: mean, least and largest of each figure, the runs, and those that reached the target."""
    by = runs.astype(dict.fromkeys(parts, float)).groupby("method", sort=False)
    found = pd.concat([by[part].agg(["mean", "min", "max"]).add_prefix(f"{part} ") for part in parts], axis=1)
    return found.assign(runs=by.size(), reached=by["step"].count())


def summary(content: Row, task: Task) -> pd.DataFrame:
    """Return a row a method, with what it keeps besides weights and gradients."""
    runs = pd.DataFrame([row for row in content.get("runs", []) if row["task"] == task.name])
    if runs.empty:
        return runs
    found = by_method(runs, ("step", "seconds", "milliseconds"))
    found["bytes"] = runs.groupby("method")[["factor_bytes", "optimizer_bytes"]].first().sum(axis=1).astype(float)
    return in_order(found)


def in_order(found: pd.DataFrame) -> pd.DataFrame:
    return found.reindex([method.name for method in METHODS if method.name in found.index])


def whole(found: pd.DataFrame) -> pd.DataFrame:
    """Return the methods all of whose runs reached the target."""
    return found[found["reached"] == found["runs"]] if len(found) else found


def over_base(found: pd.DataFrame, part: str) -> pd.Series:
    """Return means over that of AdamW, where every run of both reached the target."""
    means = whole(found)[f"{part} mean"].reindex(found.index)
    return means / means.get(BASE, math.nan)


def means(content: Row) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return steps and seconds over AdamW's, where every run of both arrived; and their geometric means by method."""
    parts = ("step", "seconds")
    found = [each for each in (summary(content, task) for task in tasks_of(content)) if len(each)]
    over = [pd.DataFrame({part: over_base(each, part) for part in parts}) for each in found]
    each = pd.concat(over).dropna() if over else pd.DataFrame(columns=parts)
    by = each.astype(float).groupby(level=0)
    return each, in_order(np.exp(by.agg(lambda column: np.log(column).mean())).assign(tasks=by.size()))


# --- Tables


def ranged(found: pd.DataFrame, part: str, words: Callable[[float], str]) -> list[str]:
    """Return means with their ranges."""
    cells = []
    for row in found[[f"{part} mean", f"{part} min", f"{part} max"]].to_numpy().tolist():
        mean, low, high = map(words, row) if row[0] == row[0] else [NOTHING] * 3
        cells.append(mean + (f" ({low} to {high})" if low != high else ""))
    return cells


def ratio(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{value:.2f}"


def cells_of(found: pd.DataFrame) -> pd.DataFrame:
    """Return the table of a task: those that always arrived by their seconds, then the others."""
    found = found.assign(missed=found["runs"] - found["reached"]).sort_values(["missed", "seconds mean"], kind="stable")
    columns = {
        "method": found.index,
        "steps": ranged(found, "step", "{:.0f}".format),
        f"steps × {BASE}": over_base(found, "step").map(ratio),
        "seconds": ranged(found, "seconds", spelled),
        f"seconds × {BASE}": over_base(found, "seconds").map(ratio),
        "reached by": found["reached"].astype(str) + " of " + found["runs"].astype(str),
        "ms per step": ranged(found, "milliseconds", spelled),
        "kept, MB": found["bytes"].map(lambda count: spelled(count / 1e6) if count else "0"),
    }
    return pd.DataFrame({name: list(cells) for name, cells in columns.items()})


def winners(content: Row) -> pd.DataFrame:
    """Return for each task who takes the fewest steps and the fewest seconds, of those that always arrive."""
    rows = []
    for task in tasks_of(content):
        if len(found := whole(summary(content, task))):
            names = {part: found[f"{part} mean"].idxmin() for part in ("step", "seconds")}
            about = {"task": f"{task.name}, to {task.goal}", "fewest steps": names["step"]}
            about |= {"steps": taken(found, names["step"]), "fewest seconds": names["seconds"]}
            rows.append(about | {"seconds": taken(found, names["seconds"]), BASE: taken(found, BASE)})
    return pd.DataFrame(rows)


def taken(found: pd.DataFrame, name: str) -> str:
    """Return what a method takes to the target in words, if all its runs arrive."""
    if name not in whole(found).index:
        return NOTHING
    return f"{found.loc[name, 'step mean']:.0f} steps, {spelled(found.loc[name, 'seconds mean'])} s"


def costs(content: Row) -> pd.DataFrame:
    """Return the cost of a step over SGD's: a row a method, a column a width."""
    rows = pd.DataFrame(content.get("costs", []))
    if rows.empty:
        return rows
    found = rows.pivot(index="method", columns="width", values="milliseconds").astype(float)
    return in_order(found / found.loc["SGD"])


def shown(content: Row) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield who wins, a table for each task, what failed, the cost of a step, and what the methods are."""
    if len(found := winners(content)):
        yield "The fewest steps and seconds, of those that always arrive", found
    for task in tasks_of(content):
        if len(found := summary(content, task)):
            yield f"{task.name}, to {task.goal}", cells_of(found)
    if failed := [row for row in content.get("runs", []) if row["failure"]]:
        yield "Runs that failed", pd.DataFrame(failed)[["task", "method", "seed", "failure"]]
    if len(found := costs(content)):
        yield (
            "A step over SGD's, by width",
            found.map(ratio).rename(columns=str).rename_axis(columns=None).reset_index(),
        )
    rows = []
    for method in METHODS:
        ranges = "; ".join(f"{name} {low:g} to {high:g}" for name, (low, high) in method.ranges.items())
        rows.append([method.name, method.words.format(**content["settings"]), ranges])
    yield "The methods", pd.DataFrame(rows, columns=["method", "what it is", "ranges of the search"])


def answer(content: Row) -> str:
    """Return in two sentences who takes the fewest steps and seconds, and what K-FAC gains on AdamW."""
    best = winners(content)
    if best.empty:
        return "No method reached a target in every run."
    counts = [
        f"the {part} are those of " + ", ".join(f"{who} (on {of})" for who, of in best[part].value_counts().items())
        for part in ("fewest steps", "fewest seconds")
    ]
    first = f"On {len(best)} tasks {', and '.join(counts)}."
    ours = means(content)[1]
    ours = ours[ours.index.isin(OWN)].sort_values(["tasks", "seconds"], ascending=[False, True])
    if ours.empty:
        return f"{first} No K-FAC can be compared with {BASE}: they never both arrived."
    row = ours.iloc[0]
    return (
        f"{first} {ours.index[0]}, the fastest K-FAC, takes {row['step']:.2f} times the steps of {BASE} and"
        f" {row['seconds']:.2f} times its seconds: geometric means over the {row['tasks']:.0f} tasks where both arrive."
    )


def by_width(content: Row) -> list[Task]:
    """Return the MLPs, the narrowest first."""
    return sorted((task for task in tasks_of(content) if task.kind == "mlp"), key=lambda task: task.width)


def readme(content: Row) -> pd.DataFrame:
    """Return what some methods take to the target, by the width of an MLP."""
    found = {f"width {task.width}": summary(content, task) for task in by_width(content)}
    cells = {width: [taken(runs, name) for name in IN_README] for width, runs in found.items()}
    return pd.DataFrame({"method": IN_README} | cells)


# --- Pictures

COLOURED = (
    *("B-KFAC", "SINGD", "B-R-KFAC", "B-KFAC-C", "RS-KFAC", "SRE-KFAC", "K-FAC", "AdamW", "SGD", "B-KFAC, sketched"),
    *("Muon", "SOAP", "SOAP, every step", "Shampoo", "asdfghjkl"),
)
COLOURS = dict(zip(COLOURED, pictures.PALETTE, strict=True))
# Those in README.
IN_README = ("SGD", "AdamW", "Muon", "SOAP", "K-FAC", "B-KFAC", "B-KFAC, sketched")


def draw(content: Row, theme: Theme) -> Figure:
    """Draw seconds over steps to the target, as multiples of AdamW's: small dots are tasks, large ones their mean."""
    figure, (axis,) = pictures.panels([6.0], content, "geometric means over the tasks where both always arrive", theme)
    about = "large: mean of the tasks, in brackets how many; small: each task"
    pictures.titled(axis, "To the target, as multiples of AdamW's", about, theme)
    each, middle = means(content)
    for name, row in middle.iterrows():
        colour, own = theme.colour(*COLOURS[str(name)]), each.loc[[name]]
        axis.plot(own["step"], own["seconds"], "o", color=colour, markersize=3.5, alpha=0.45)
        words = f"{name} ({row['tasks']:.0f})"
        axis.plot(row["step"], row["seconds"], "o", color=colour, markersize=10, label=words)
    # They also give the axes a range where nothing arrived.
    axis.axhline(1, color=theme.text, linewidth=1, linestyle=":")
    axis.axvline(1, color=theme.text, linewidth=1, linestyle=":")
    for side, words in ((axis.xaxis, "steps × AdamW"), (axis.yaxis, "seconds × AdamW")):
        pictures.logarithmic(side, subs=(1, 2, 5))
        side.set_label_text(words)
    pictures.legend(axis, 3)
    return figure


def draw_costs(content: Row, theme: Theme) -> Figure:
    """Draw the cost of a step over SGD's against the width of the network, with batches in proportion."""
    figure, (axis,) = pictures.panels([5.0], content, "MLP 784-w-w-10, batches of w / 8; medians of steps", theme)
    _lines(axis, costs(content), "Cost of a step over SGD's", theme)
    axis.set_ylabel("× SGD")
    pictures.legend(axis, 3)
    return figure


def draw_widths(content: Row, theme: Theme) -> Figure:
    """Draw steps and seconds of MLPs to their target against the width, of the methods that always arrive."""
    tasks = by_width(content)
    goal = tasks[0].goal if tasks else ""
    figure, axes = pictures.panels([3.6, 4.2], content, f"MLP on Fashion-MNIST to {goal}; means of the seeds", theme)
    found = {task.width: whole(summary(content, task)) for task in tasks}
    for axis, part, unit in zip(axes, ("step", "seconds"), ("steps", "seconds"), strict=True):
        none = pd.Series(dtype=float)
        table = pd.DataFrame({width: of.get(f"{part} mean", none) for width, of in found.items()})
        _lines(axis, table.reindex(IN_README), f"{unit.capitalize()} to {goal}", theme)
        axis.set_ylabel(unit)
    pictures.legend(axes[-1], 3)
    return figure


def _lines(axis: Axes, table: pd.DataFrame, title: str, theme: Theme) -> None:
    """Draw a line a row against the widths of the columns."""
    pictures.titled(axis, title, "against the width of the hidden layers", theme)
    table = table.astype(float).dropna(how="all")
    if table.empty:
        return
    for name, values in table.iterrows():
        style = "-" if name in OWN else (0, (4, 1.5))
        colour = theme.colour(*COLOURS[str(name)])
        axis.plot(table.columns, values, "o", color=colour, linestyle=style, markersize=4, label=name)
    for side in (axis.xaxis, axis.yaxis):
        pictures.logarithmic(side, subs=(1, 2, 5))
    axis.xaxis.set_major_locator(FixedLocator(list(table.columns)))
    axis.set_xlabel("width")
