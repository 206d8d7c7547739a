"""The page of the study of K-FAC, from its result file: an answer, tables, and pictures."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from bench.frame import pictures
from bench.frame.figures import formatted
from bench.frame.pictures import Theme
from bench.frame.study import Row
from bench.studies.kfac_methods import METHODS, STRATEGIES, Task

BASE = "AdamW"  # the method that the others are compared with
NOTHING = "–"
OWN = list(STRATEGIES)
# The methods of the table in README.
IN_README = ["SGD", "AdamW", "Muon", "SOAP", "K-FAC", "B-KFAC", "B-KFAC, sketched"]


def by_method(runs: pd.DataFrame, parts: list[str]) -> pd.DataFrame:
    """Return a row for each method: mean, least and largest of each figure, and the runs, and those that arrived.

    If all runs reached the target, the mean is there once more as "whole", and over that of AdamW as "over".
    """
    by = runs.astype(dict.fromkeys(parts, float)).groupby("method", sort=False)
    summary = by[parts].agg(["mean", "min", "max"])
    summary = summary.set_axis(map(" ".join, summary), axis=1).assign(runs=by.size(), reached=by["step"].count())
    for part in parts:
        whole = summary[f"{part} mean"].where(summary["reached"] == summary["runs"])
        summary[f"{part} whole"], summary[f"{part} over"] = whole, whole / whole.get(BASE, math.nan)
    return summary


def summaries(content: Row) -> dict[Task, pd.DataFrame]:
    """Return for each task with runs a row for each method, with its bytes, and its steps and seconds in words."""
    summary = {}
    for task in (Task(**row) for row in content["settings"]["tasks"]):
        runs = pd.DataFrame([row for row in content.get("runs", []) if row["task"] == task.name])
        if len(runs):
            kept = runs.groupby("method")[["factor_bytes", "optimizer_bytes"]].first().sum(axis=1).astype(float)
            # This package does not tell the bytes of its factors.
            kept[kept.index == "asdfghjkl"] = math.nan
            rows = in_order(by_method(runs, ["step", "seconds", "milliseconds"]).assign(bytes=kept))
            taken = rows["step whole"].map("{:.0f} steps, ".format) + rows["seconds whole"].map(formatted) + " s"
            summary[task] = rows.assign(taken=taken.where(rows["step whole"].notna(), NOTHING))
    return summary


def in_order(found: pd.DataFrame) -> pd.DataFrame:
    return found.reindex([method.name for method in METHODS if method.name in found.index])


def over_base(content: Row) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return steps and seconds over AdamW's if all runs of both arrived, and their geometric means by method."""
    parts = {"step over": "step", "seconds over": "seconds"}
    ratios = pd.concat([pd.DataFrame(columns=[*parts], dtype=float), *summaries(content).values()])
    ratios = ratios[[*parts]].rename(columns=parts).dropna()
    by = np.log(ratios).groupby(level=0)
    return ratios, in_order(np.exp(by.mean()).assign(tasks=by.size()))


# --- Tables


def with_range(found: pd.DataFrame, part: str, words: Callable[[float], str]) -> pd.Series:
    """Return means with their ranges."""
    mean, low, high = (found[f"{part} {of}"].astype(object).map(words, "ignore") for of in ("mean", "min", "max"))
    return (mean + (" (" + low + " to " + high + ")").where(low != high, "")).fillna(NOTHING)


def ratio_text(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{value:.2f}"


def task_table(found: pd.DataFrame) -> pd.DataFrame:
    """Return the table of a task: the methods that always arrived by their seconds, then the others."""
    found = found.assign(missed=found["runs"] - found["reached"]).sort_values(["missed", "seconds mean"], kind="stable")
    columns = {
        "method": found.index,
        "steps": with_range(found, "step", "{:.0f}".format),
        f"steps × {BASE}": found["step over"].map(ratio_text),
        "seconds": with_range(found, "seconds", formatted),
        f"seconds × {BASE}": found["seconds over"].map(ratio_text),
        "reached by": found["reached"].astype(str) + " of " + found["runs"].astype(str),
        "ms per step": with_range(found, "milliseconds", formatted),
        "kept, MB": (found["bytes"] / 1e6).astype(object).map(formatted, "ignore").fillna(NOTHING),
    }
    return pd.DataFrame(columns).reset_index(drop=True)


def winners(content: Row) -> pd.DataFrame:
    """Return for each task the methods with the fewest steps and seconds, of those that always arrive."""
    rows = []
    for task, found in summaries(content).items():
        if found["step whole"].notna().any():
            row = {"task": f"{task.name}, to {task.goal}"}
            for words, part in (("steps", "step"), ("seconds", "seconds")):
                best = found[f"{part} whole"].idxmin()
                row |= {f"fewest {words}": best, words: found["taken"][best]}
            rows.append(row | {BASE: found["taken"].get(BASE, NOTHING)})
    return pd.DataFrame(rows)


def costs(content: Row) -> pd.DataFrame:
    """Return the cost of a step over SGD's: a row for each method, a column for each width."""
    rows = pd.DataFrame(content.get("costs", []), columns=["method", "width", "milliseconds"])
    times = rows.pivot(index="method", columns="width", values="milliseconds").astype(float)
    return in_order(times / times.loc["SGD"]) if len(times) else times


def shown(content: Row) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the best methods, a table for each task, the failed runs, the cost of a step, and the list of methods."""
    if len(found := winners(content)):
        yield "The fewest steps and seconds, of those that always arrive", found
    for task, found in summaries(content).items():
        yield f"{task.name}, to {task.goal}", task_table(found)
    if failed := [row for row in content.get("runs", []) if row["failure"]]:
        yield "Runs that failed", pd.DataFrame(failed)[["task", "method", "seed", "failure"]]
    if len(found := costs(content).map(ratio_text)):
        yield "A step over SGD's, by width", found.rename(columns=str).rename_axis(columns=None).reset_index()
    ranges = lambda method: "; ".join(f"{name} {low:g} to {high:g}" for name, (low, high) in method.ranges.items())
    rows = [(method.name, method.words.format(**content["settings"]), ranges(method)) for method in METHODS]
    yield "The methods", pd.DataFrame(rows, columns=["method", "what it is", "ranges of the search"])


def answer(content: Row) -> str:
    """Return in two sentences the methods with the fewest steps and seconds, and K-FAC beside AdamW."""
    best = winners(content)
    if best.empty:
        return "No method reached a target in every run."
    won = lambda part: ", ".join(f"{who} (on {of})" for who, of in best[part].value_counts().items())
    counts = [f"the {part} are those of {won(part)}" for part in ("fewest steps", "fewest seconds")]
    first = f"On {len(best)} tasks {', and '.join(counts)}."
    ours = over_base(content)[1].query("index in @OWN").sort_values(["tasks", "seconds"], ascending=[False, True])
    if ours.empty:
        return f"{first} No K-FAC can be compared with {BASE}: they never both arrived."
    row = ours.iloc[0]
    return (
        f"{first} {ours.index[0]}, the fastest K-FAC, takes {row['step']:.2f} times the steps of {BASE} and"
        f" {row['seconds']:.2f} times its seconds: geometric means over the {row['tasks']:.0f} tasks where both arrive."
    )


def by_width(content: Row) -> dict[Task, pd.DataFrame]:
    """Return the summaries of the MLPs, the narrowest first."""
    found = summaries(content)
    return {task: found[task] for task in sorted(found, key=lambda task: task.width) if task.kind == "mlp"}


def readme(content: Row) -> pd.DataFrame:
    """Return the steps and seconds of some methods to the target, by the width of an MLP."""
    cells = {f"width {task.width}": found["taken"] for task, found in by_width(content).items()}
    return pd.DataFrame(cells, IN_README).fillna(NOTHING).reset_index(names="method")


# --- Pictures

COLOURED = (
    *("B-KFAC", "SINGD", "B-R-KFAC", "B-KFAC-C", "RS-KFAC", "SRE-KFAC", "K-FAC", "AdamW", "SGD", "B-KFAC, sketched"),
    *("Muon", "SOAP", "SOAP, every step", "Shampoo", "asdfghjkl"),
)
COLOURS = dict(zip(COLOURED, pictures.PALETTE, strict=True))


def draw(content: Row, theme: Theme) -> Figure:
    """Draw seconds against steps to the target, as multiples of AdamW's: small dots are tasks, large ones are means."""
    words = "geometric means over the tasks where both always arrive"
    below = "large: mean of the tasks, in brackets how many; small: each task"
    figure, (axis,) = pictures.panels(content, words, theme, ("To the target, as multiples of AdamW's", below, 6.0))
    ratios, means = over_base(content)
    for name, row in means.iterrows():
        colour, tasks = COLOURS[str(name)][theme.dark], ratios.loc[[name]]
        axis.plot(tasks["step"], tasks["seconds"], "o", color=colour, markersize=3.5, alpha=0.45)
        label = f"{name} ({row['tasks']:.0f})"
        axis.plot(row["step"], row["seconds"], "o", color=colour, markersize=10, label=label)
    # These lines also give the axes a range if no run arrived.
    axis.axhline(1, color=theme.text, linewidth=1, linestyle=":")
    axis.axvline(1, color=theme.text, linewidth=1, linestyle=":")
    for side, words in ((axis.xaxis, "steps × AdamW"), (axis.yaxis, "seconds × AdamW")):
        pictures.logarithmic(side, subs=(1, 2, 5))
        side.set_label_text(words)
    pictures.legend(axis, 3)
    return figure


def draw_costs(content: Row, theme: Theme) -> Figure:
    """Draw the cost of a step over SGD's against the width of the network; batches grow with the width."""
    words = "MLP 784-w-w-10, batches of w / 8; medians of steps"
    return _against_width(content, words, theme, ("Cost of a step over SGD's", 5.0, costs(content), "× SGD"))


def draw_widths(content: Row, theme: Theme) -> Figure:
    """Draw steps and seconds of MLPs to their target against the width, for the methods that always arrive."""
    found = by_width(content)
    goal = next(iter(found)).goal if found else ""
    by_task = lambda part: {task.width: rows[f"{part} whole"] for task, rows in found.items()}
    steps, seconds = (pd.DataFrame(by_task(part)).reindex(IN_README) for part in ("step", "seconds"))
    panels = (f"Steps to {goal}", 3.6, steps, "steps"), (f"Seconds to {goal}", 4.2, seconds, "seconds")
    return _against_width(content, f"MLP on Fashion-MNIST to {goal}; means of the seeds", theme, *panels)


def _against_width(content: Row, words: str, theme: Theme, *drawn: tuple[str, float, pd.DataFrame, str]) -> Figure:
    """Draw a panel for each title, height, table and unit: a line for each row against the widths of the columns."""
    about = [(title, "against the width of the hidden layers", inches) for title, inches, _, _ in drawn]
    figure, axes = pictures.panels(content, words, theme, *about)
    for axis, (_, _, table, unit) in zip(axes, drawn, strict=True):
        lines = table.astype(float).dropna(how="all").T
        if lines.size:
            pictures.curves(axis, lines, COLOURS, theme, OWN, marker="o", markersize=4)
            for side in (axis.xaxis, axis.yaxis):
                pictures.logarithmic(side, subs=(1, 2, 5))
            axis.xaxis.set_major_locator(FixedLocator(list(lines.index)))
            axis.set_xlabel("width")
        axis.set_ylabel(unit)
    pictures.legend(axes[-1], 3)
    return figure
