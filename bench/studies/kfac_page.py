"""What the study of K-FAC shows of its result file: tables, the page, and pictures."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from bench.frame import pages, pictures
from bench.frame.facts import place
from bench.frame.figures import spelled
from bench.frame.pictures import Theme
from bench.frame.samples import PACKAGE
from bench.frame.study import Row
from bench.studies.kfac_methods import DECAY, METHODS, STRATEGIES, USUAL, Task

# What the others are compared with.
BASE, SKETCHED = "AdamW", "B-KFAC, sketched"
NOTHING = "–"
OWN = list(STRATEGIES)
MOST_ROWS = 10


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
    """Return the rows in the order of the methods."""
    return found.reindex([method.name for method in METHODS if method.name in found.index])


def whole(found: pd.DataFrame) -> pd.DataFrame:
    """Return the methods all of whose runs reached the target."""
    return found[found["reached"] == found["runs"]] if len(found) else found


def over_base(found: pd.DataFrame, part: str) -> pd.Series:
    """Return means over that of AdamW, where every run of both reached the target."""
    means = found[f"{part} mean"].where(found["reached"] == found["runs"])
    return means / means.get(BASE, math.nan)


def ratios(content: Row) -> pd.DataFrame:
    """Return steps and seconds over AdamW's: a row for each task and method where every run of both arrived."""
    parts = []
    for task in tasks_of(content):
        if len(found := summary(content, task)):
            own = pd.DataFrame({part: over_base(found, part) for part in ("step", "seconds")}).dropna()
            parts.append(own.rename_axis("method").reset_index().assign(task=task.name))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["method", "step", "seconds", "task"])


def means(content: Row) -> pd.DataFrame:
    """Return geometric means of the ratios over the tasks, a row a method, with the number of tasks."""
    by = ratios(content).groupby("method")
    found = np.exp(by[["step", "seconds"]].agg(lambda column: np.log(column.astype(float)).mean()))
    return in_order(found.assign(tasks=by.size()))


# --- Tables


def ranged(found: pd.DataFrame, part: str, words: Callable[[float], str]) -> list[str]:
    """Return means with their ranges."""
    cells = []
    for row in found[[f"{part} mean", f"{part} min", f"{part} max"]].to_numpy().tolist():
        mean, low, high = map(words, row) if row[0] == row[0] else [NOTHING] * 3
        cells.append(mean + (f" ({low} to {high})" if low != high else ""))
    return cells


def cells_of(found: pd.DataFrame) -> pd.DataFrame:
    """Return the table of a task: those that always arrived by their seconds, then the others."""
    found = found.assign(missed=found["runs"] - found["reached"]).sort_values(["missed", "seconds mean"], kind="stable")
    columns = {
        "method": found.index,
        "steps": ranged(found, "step", "{:.0f}".format),
        f"steps × {BASE}": over_base(found, "step").map(_ratio),
        "seconds": ranged(found, "seconds", spelled),
        f"seconds × {BASE}": over_base(found, "seconds").map(_ratio),
        "reached by": found["reached"].astype(str) + " of " + found["runs"].astype(str),
        "ms per step": ranged(found, "milliseconds", spelled),
        "kept, MB": found["bytes"].map(lambda count: spelled(count / 1e6) if count else "0"),
    }
    return pd.DataFrame({name: list(cells) for name, cells in columns.items()})


def _ratio(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{value:.2f}"


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
    """Return what a method takes to the target in words."""
    if name not in found.index or found.loc[name, "reached"] < found.loc[name, "runs"]:
        return NOTHING
    return f"{found.loc[name, 'step mean']:.0f} steps, {spelled(found.loc[name, 'seconds mean'])} s"


def costs(content: Row) -> pd.DataFrame:
    """Return the cost of a step over SGD's: a row a method, a column a width."""
    rows = pd.DataFrame(content.get("costs", []))
    if rows.empty:
        return rows
    found = rows.pivot(index="method", columns="width", values="milliseconds").astype(float)
    return in_order(found / found.loc["SGD"])


def costs_in_words(content: Row) -> pd.DataFrame:
    found = costs(content)
    cells = found.map(_ratio).rename(columns=str)
    return cells.rename_axis(columns=None).reset_index()


def shown(content: Row) -> Iterator[tuple[str, pd.DataFrame]]:
    if len(found := winners(content)):
        yield "The fewest, of those that always arrive", found
    for task in tasks_of(content):
        if len(found := summary(content, task)):
            yield f"{task.name}, to {task.goal}", cells_of(found)
    if len(costs(content)):
        yield "A step over SGD's, by width", costs_in_words(content)


def raw(found: dict[str, Row]) -> str:
    """Return all runs of all machines as CSV, with the numbers that the search chose."""
    runs = [{"machine": machine} | row for machine, content in found.items() for row in content.get("runs", [])]
    return pd.json_normalize(runs).to_csv(index=False)


# --- Page

INTRODUCTION = """---
description: Steps and seconds to a target on eight usual networks, for K-FAC beside SGD, AdamW, Muon, Shampoo and SOAP.
---
# K-FAC among other optimizers
"""
METHOD = """## What is measured

`make study-kfac` measures, and this page is made from its result file by `make docs-figures`. Do not edit it.

{tasks}

Fashion-MNIST is that of Debian's package `{package}`; the other data come with Python and scikit-learn. Of the samples
that do not train, the first thousand or so judge. Learning rates are constant. Float32. K-FAC stands before SGD without
momentum, takes in curvature at every step, has relative damping, and clips steps to an RMS of {clip}; rank {rank}.
Factors that are too small for the rank get the strategy that `report()` names.

{methods}

**Budget.** Every method has three numbers to be searched and {trials} trials on each task, at the same {trials} points
of a Latin hypercube, mapped evenly in the logarithm to the ranges above. A trial trains on a part of the training
samples, from a seed that no measured run has, and is judged by the rest of them. It ends at the target, after half the
seconds of a run, or when it has taken as many steps as the best one before it. The fewest steps are chosen; where no
trial arrived, the best score. A task that follows another takes its numbers, and where that is said three rates: the
other's times the ratio of the widths to the power 0, ½ and 1; the best power is kept by the tasks that follow it.

**Targets** were set before the run, by hand. They are scores that untuned AdamW and sketched B-KFAC reach from seed 0,
which no measured run has, well before the time is over. So they are early ones, which favours methods that start fast.

**Runs.** {seeds} seeds of networks and batches, the same for all methods, which take turns. A run ends at the target,
or after the steps and the seconds above: a method with expensive steps may not arrive in time. Only the steps are
timed, the first one included; the target is looked for at steps about a sixth apart. Figures are means over the runs
that arrived, with the least and the largest. Kept is what the factors take, with what the optimizer keeps.

**Cost of a step.** An MLP 784-w-w-10, batches of w / 8, medians of a few steps; of methods that renew something now and
then, the mean of a period. kfac-pytorch is in no package index, and is not compared.
"""


def page(found: dict[str, Row]) -> str:
    """Return ``docs/kfac-study.md``, from the content of the files by the names of the machines' folders."""
    sections = [section for machine, content in found.items() for section in _of_machine(content, machine)]
    return "\n".join([INTRODUCTION, *(sections or ["Nothing has been measured yet.\n", method_of(asdict(USUAL))])])


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
    ours = means(content)
    ours = ours[ours.index.isin(OWN)].sort_values(["tasks", "seconds"], ascending=[False, True])
    if ours.empty:
        return f"{first} No K-FAC can be compared with {BASE}: they never both arrived."
    row = ours.iloc[0]
    return (
        f"{first} {ours.index[0]}, the fastest K-FAC, takes {row['step']:.2f} times the steps of {BASE} and"
        f" {row['seconds']:.2f} times its seconds: geometric means over the {row['tasks']:.0f} tasks where both arrive."
    )


def _of_machine(content: Row, machine: str) -> Iterator[str]:
    yield f"{answer(content)}\n"
    yield pages.picture("kfac-study", machine, "Seconds over steps to the target, as multiples of AdamW's")
    yield pages.picture("kfac-cost", machine, "Cost of a step over SGD's against the width")
    yield f"{place(content['facts'])}. {pages.provenance(content['facts'], 'kfac-study.json')}"
    yield "All runs: [kfac-study.csv](kfac-study.csv).\n"
    took_part = {row["method"] for row in content.get("runs", [])}
    if absent := [method.name for method in METHODS if method.package != "torch" and method.name not in took_part]:
        yield f"Not installed there, and left out: {', '.join(absent)}.\n"
    if len(best := winners(content)):
        yield f"## The fewest steps and seconds\n\n{pages.markdown(best)}"
    for task in tasks_of(content):
        yield f"## {task.name}, to {task.goal}\n"
        found = summary(content, task)
        if found.empty:
            yield "No run was made.\n"
            continue
        cells = cells_of(found)
        yield pages.markdown(cells.head(MOST_ROWS))
        if rest := [f"{row['method']} ({row['reached by']})" for row in cells[MOST_ROWS:].to_dict("records")]:
            yield f"Further down, or not there in time: {', '.join(rest)}.\n"
        if failed := [row for row in content["runs"] if row["task"] == task.name and row["failure"]]:
            yield f"Failed: {'; '.join('{method}, seed {seed}: {failure}'.format(**row) for row in failed)}.\n"
    if len(costs(content)):
        yield f"## A step over SGD's, by width\n\n{pages.markdown(costs_in_words(content))}"
    yield method_of(content["settings"])


def method_of(settings: Row) -> str:
    tasks = []
    for task in (Task(**row) for row in settings["tasks"]):
        words = task.network.words.format(width=task.width)
        line = f"- **{task.name}**: {words}, batches of {task.batch}, to {task.goal} in at most {task.steps} steps"
        line += f" and {task.seconds:g} s"
        if task.follows:
            line += f"; it follows {task.follows}" + (", and tries three rates" if task.rates else "")
        tasks.append(f"{line}.")
    rows = []
    for method in METHODS:
        ranges = "; ".join(f"{name} {low:g} to {high:g}" for name, (low, high) in method.ranges.items())
        rows.append([method.name, method.words.format(**settings), ranges])
    table = pages.table(["method", "what it is", "ranges of the search"], rows)
    given = {**settings, "tasks": "\n".join(tasks), "seeds": len(settings["seeds"]), "methods": table}
    return METHOD.format(package=PACKAGE, ema=DECAY, **given)


def readme(content: Row, machine: str) -> str:
    """Return the picture of README, and a sentence for the narrowest and for the two widest networks."""
    folder, tasks = f"docs/{pages.PICTURES}/{machine}/kfac-width", by_width(content)
    searched = ", ".join(str(task.width) for task in tasks if not task.follows)
    said = []
    for task in (*tasks[:1], *tasks[1:][-2:]):
        found = summary(content, task)
        each = "; ".join(f"{name} {taken(found, name)}" for name in (BASE, "K-FAC", SKETCHED))
        said.append(f"Width {task.width}, to {task.goal}: {each}.")
    return (
        f'<picture>\n  <source media="(prefers-color-scheme: dark)" srcset="{folder}-dark.png">\n'
        '  <img alt="Steps and seconds to a target against the width of the network (kfac-study.json)"'
        f' src="{folder}-light.png" width="480">\n</picture>\n\n'
        f"An MLP on Fashion-MNIST. B-KFAC is K-FAC on Brand's update. {' '.join(said)} Every method had the same budget"
        f" of trials at width {searched}, from where its rate is scaled; {NOTHING}: a run did not arrive in time"
        " (`kfac-study.json`). `make study-kfac`: [other networks, where others win](docs/kfac-study.md)."
    )


def by_width(content: Row) -> list[Task]:
    """Return the MLPs, the narrowest first."""
    return sorted((task for task in tasks_of(content) if task.kind == "mlp"), key=lambda task: task.width)


# --- Pictures

# Okabe and Ito's palette, which colour-blind readers tell apart, with lighter ones for dark pages; greys for the
# methods that are no K-FAC.
COLOURS = {
    "SGD": ("#a0a0a0", "#7d828c"),
    "AdamW": ("#5c5c5c", "#b4b8c2"),
    "Muon": ("#7f6000", "#ffd966"),
    "Shampoo": ("#4c1130", "#d5a6bd"),
    "SOAP": ("#274e13", "#b6d7a8"),
    "SOAP, every step": ("#6aa84f", "#93c47d"),
    "K-FAC": ("#000000", "#ffffff"),
    "RS-KFAC": ("#e69f00", "#f0b840"),
    "SRE-KFAC": ("#56b4e9", "#8accf2"),
    "B-KFAC": ("#0072b2", "#3d9be0"),
    "B-KFAC, sketched": ("#4a3fb5", "#a79bff"),
    "B-R-KFAC": ("#009e73", "#2fd3a5"),
    "B-KFAC-C": ("#cc79a7", "#e49cc8"),
    "SINGD": ("#d55e00", "#ff8f40"),
    "asdfghjkl": ("#990000", "#e06666"),
}
# Those of the picture in README.
IN_README = ("SGD", "AdamW", "Muon", "SOAP", "K-FAC", "B-KFAC", "B-KFAC, sketched")


def draw(content: Row, theme: Theme) -> Figure:
    """Draw seconds over steps to the target, as multiples of AdamW's: small dots are tasks, large ones their mean."""
    figure, (axis,) = pictures.panels([6.0], content, "geometric means over the tasks where both always arrive", theme)
    about = "large: mean of the tasks, in brackets how many; small: each task"
    pictures.titled(axis, "To the target, as multiples of AdamW's", about, theme)
    each = ratios(content)
    for name, row in means(content).iterrows():
        colour, own = theme.colour(*COLOURS[str(name)]), each[each["method"] == name]
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
    pictures.titled(axis, "Cost of a step over SGD's", "against the width of the hidden layers", theme)
    _lines(axis, costs(content), theme)
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
        pictures.titled(axis, f"{unit.capitalize()} to {goal}", "against the width of the hidden layers", theme)
        none = pd.Series(dtype=float)
        table = pd.DataFrame({width: of.get(f"{part} mean", none) for width, of in found.items()})
        _lines(axis, table.reindex(IN_README), theme)
        axis.set_ylabel(unit)
    pictures.legend(axes[-1], 3)
    return figure


def _lines(axis: Axes, table: pd.DataFrame, theme: Theme) -> None:
    """Draw a line a row against the widths of the columns."""
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
