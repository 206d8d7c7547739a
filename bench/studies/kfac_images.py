"""Steps and seconds to an accuracy on real images: every K-FAC beside other optimizers, tuned at an equal budget.

Run by ``make study-kfac``. For each task a search for every method, then every method from every seed.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bench.frame import pages, pictures
from bench.frame.facts import place
from bench.frame.figures import spelled
from bench.frame.images import DIGITS, FASHION, FOLDER, PACKAGE, PARTS, Images, UnusableError, check, judge, load
from bench.frame.pictures import Theme
from bench.frame.study import Full, Out, Piece, Quick, Resume, Row, Study, application, conduct, settings_of
from bench.gpu.device import Device
from bench.studies.kfac_methods import DECAY, FULL, METHODS, QUICK, USUAL, Method, Settings, Task, points
from brandla.demo import data
from brandla.demo.data import Split
from brandla.demo.frame import Tick
from brandla.demo.training import Trainer, follow

# What the others are compared with.
BASE = "AdamW"
NOTHING = "–"


def pieces(settings: Settings, device: Device, folder: Path = FOLDER) -> list[Piece]:
    """Return the search of each task, and its runs.

    They go seed by seed, so that what slows the machine for a while meets all methods, and an early end has all.
    """
    where = str(device.tensors)
    images = cache(lambda name: load(name, folder, where, settings.most_images))
    cube, found = points(settings), []

    def piece(table: str, task: Task, method: Method, name: str, value: int, steps: int, measure: Any) -> Piece:
        key = {"task": task.name, "method": method.name, name: value}
        call = lambda tables, tick: measure(task, method, value, settings, images(task.images), tables, tick)
        return Piece(table, key, method.cost * task.cost * steps, call)

    for task in settings.tasks:
        for method in METHODS:
            trial = partial(tried, cube=cube)
            found += [piece("trials", task, method, "point", at, task.search_steps, trial) for at in range(len(cube))]
        for seed in settings.seeds:
            found += [piece("runs", task, method, "seed", seed, task.steps, measured) for method in METHODS]
    return found


def trainer_of(task: Task, method: Method, numbers: Row, images: Images, settings: Settings, seed: int) -> Trainer:
    """Return the network of a seed with what trains it by these numbers."""
    pixels = images.training.images
    return method.trainer(task.model(pixels.shape[1], str(pixels.device), seed), numbers, settings, seed)


def tried(task, method, point, settings, images, tables, tick, cube) -> Iterator[Row]:
    """Yield the score of a trial: its mean accuracy on the images that validate, 0 if it failed."""
    run: Row = {"numbers": method.numbers(cube[point])}
    trainer = trainer_of(task, method, run["numbers"], images, settings, settings.search_seed)
    train(run, trainer, task, images[2:], task.search_steps, settings.search_seed, tick)
    looks = [look["accuracy"] for look in run.pop("evaluations")]
    yield run | {"score": sum(looks) / len(looks) if run["finished"] else 0.0}


def measured(task, method, seed, settings, images, tables, tick) -> Iterator[Row]:
    """Yield a run with the numbers of the best trial, and the bytes that it keeps beside weights and gradients."""
    own = [row for row in tables["trials"] if (row["task"], row["method"]) == (task.name, method.name)]
    run: Row = {"numbers": max(own, key=lambda row: row["score"])["numbers"]}
    trainer = trainer_of(task, method, run["numbers"], images, settings, seed)
    try:
        train(run, trainer, task, images[:2], task.steps, seed, tick)
    finally:
        yield run | kept_bytes(trainer)


def train(
    run: Row, trainer: Trainer, task: Task, parts: tuple[Split, Split], steps: int, seed: int, tick: Tick
) -> None:
    """Train for ``steps`` steps on the first part, judged by the second; of the times, two percentiles are kept."""

    def judged(model: nn.Module) -> float:
        accuracy, loss = judge(model, parts[1])
        if not math.isfinite(loss):
            message = "diverged: the loss is not finite"
            raise RuntimeError(message)
        return accuracy

    try:
        stream = data.batches(parts[0], task.batch, steps, seed)
        for _ in follow(run, trainer, stream, judged, task.evaluate_every):
            tick(1 / steps)
    finally:
        times = run["milliseconds"]
        run["milliseconds"] = np.percentile(times, [50, 99]).tolist() if times else None


def kept_bytes(trainer: Trainer) -> Row:
    """Return what the factors take, and what the optimizer keeps."""
    states = tree_leaves([list(state.values()) for state in trainer.optimizer.state.values()])
    kept = sum(value.numel() * value.element_size() for value in states if isinstance(value, Tensor))
    factors = 0 if trainer.preconditioner is None else trainer.preconditioner.report().bytes
    return {"factor_bytes": factors, "optimizer_bytes": kept}


# --- Summaries: means with least and largest over the seeds


def runs_of(content: Row, task: Row) -> pd.DataFrame:
    """Return the runs of a task that ended by themselves, or where a method has none, what an interruption left.

    ``step`` and ``seconds`` are those of the first look that found the target, NaN where none did.
    """
    runs = [row for row in content.get("runs", []) if row["task"] == task["name"]]
    runs = [row for row in runs if row["evaluations"] or row["failure"]]
    if not runs:
        return pd.DataFrame()
    looks = [[at for at in row["evaluations"] if at["accuracy"] >= task["target"]][:1] for row in runs]
    found = pd.DataFrame(runs).assign(
        **{part: [look[0][part] if look else math.nan for look in looks] for part in ("step", "seconds")},
        accuracy=[row["evaluations"][-1]["accuracy"] if row["finished"] else math.nan for row in runs],
        median=[row["milliseconds"][0] if row["milliseconds"] else math.nan for row in runs],
        late=[row["milliseconds"][1] if row["milliseconds"] else math.nan for row in runs],
    )
    ended = found["finished"] | found["failure"].notna()
    return found[ended | ~ended.groupby(found["method"]).transform("any")]


def summary(content: Row, task: Row) -> pd.DataFrame:
    """Return a row a method: runs, those that reached the target, and mean, least and largest of each figure."""
    runs = runs_of(content, task)
    if runs.empty:
        return runs
    by = runs.groupby("method", sort=False)
    parts = {part: by[part].agg(["mean", "min", "max"]) for part in ("step", "seconds", "accuracy", "median", "late")}
    found = pd.concat([part.add_prefix(f"{name} ") for name, part in parts.items()], axis=1)
    found["runs"], found["reached"] = by.size(), by["step"].count()
    found[["factors", "optimizer"]] = by[["factor_bytes", "optimizer_bytes"]].first()
    return found.reindex([method.name for method in METHODS if method.name in found.index])


def over_base(found: pd.DataFrame, part: str) -> pd.Series:
    """Return means over that of AdamW, where every run of both reached the target."""
    means = found[f"{part} mean"].where(found["reached"] == found["runs"])
    return means / means.get(BASE, math.nan)


def shown(content: Row) -> Iterator[tuple[str, pd.DataFrame]]:
    for task in content["settings"]["tasks"]:
        found, target = summary(content, task), percent(task["target"])
        if len(found):
            columns = {
                "method": found.index,
                f"steps to {target}": ranged(found, "step", "{:.0f}".format),
                f"steps × {BASE}": over_base(found, "step").map(_ratio),
                f"seconds to {target}": ranged(found, "seconds", spelled),
                f"seconds × {BASE}": over_base(found, "seconds").map(_ratio),
                "reached by": found["reached"].astype(str) + " of " + found["runs"].astype(str),
                "accuracy after all steps": ranged(found, "accuracy", lambda share: f"{100 * share:.1f}", " %"),
                "median ms a step": ranged(found, "median", spelled),
                "99th percentile": ranged(found, "late", spelled),
                "factors, MB": found["factors"].map(_megabytes),
                "optimizer, MB": found["optimizer"].map(_megabytes),
            }
            yield f"{task['name']}, to {target}", pd.DataFrame({name: list(cells) for name, cells in columns.items()})


def ranged(found: pd.DataFrame, part: str, words: Callable[[float], str], unit: str = "") -> list[str]:
    """Return means with their ranges."""
    cells = []
    for row in found[[f"{part} mean", f"{part} min", f"{part} max"]].to_numpy().tolist():
        mean, low, high = map(words, row) if row[0] == row[0] else [NOTHING] * 3
        cells.append(NOTHING if mean == NOTHING else f"{mean}{unit}" + (f" ({low} to {high})" if low != high else ""))
    return cells


def _ratio(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{value:.2f}"


def _megabytes(count: float) -> str:
    return NOTHING if math.isnan(count) else spelled(count / 1e6) if count else "0"


def percent(share: float) -> str:
    return f"{100 * share:g} %"


def verdict(content: Row, task: Row) -> Iterator[str]:
    """Yield the answers of a task: what won, what lost, and what failed."""
    found, target = summary(content, task), percent(task["target"])
    whole = found[found["reached"] == found["runs"]]
    for part, name, unit in (("step", "Steps", ""), ("seconds", "Seconds", " s")):
        ranked = whole[f"{part} mean"].sort_values(kind="stable")
        if words := ", ".join(f"{method} {spelled(value)}{unit}" for method, value in ranked.items()):
            yield f"- {name} to {target}, the fewest first, where every run arrived: {words}."
    slower = over_base(found, "seconds")
    if len(slower := slower[slower > 1]):
        yield f"- Slower than {BASE} in seconds: {', '.join(slower.index)}."
    missed = found[found["reached"] < found["runs"]]
    words = ", ".join(f"{name} ({runs - by} of {runs})" for name, runs, by in missed[["runs", "reached"]].to_records())
    yield f"- Runs that did not reach it: {words}." if words else "- Every run reached it."
    failed = [row for row in content["runs"] if row["task"] == task["name"] and row["failure"]]
    words = "; ".join(f"{row['method']}, seed {row['seed']}: {row['failure']}" for row in failed)
    yield f"- Runs that failed: {words}." if words else "- No run failed."
    search = searched(content, task)
    of_each = zip(search["method"], search["failed trials"], strict=True)
    words = ", ".join(f"{method} {count}" for method, count in of_each if count != "0")
    yield f"- Trials of the search that failed: {words}." if words else "- No trial of the search failed."


def searched(content: Row, task: Row) -> pd.DataFrame:
    """Return what was chosen for each method, among what."""
    rows = []
    trials = pd.DataFrame([row for row in content.get("trials", []) if row["task"] == task["name"]])
    for method in METHODS:
        own = trials[trials["method"] == method.name].sort_values("score", ascending=False, kind="stable")
        if len(own):
            scores = own["score"].iloc[[0, len(own) // 2, -1]]
            done = len(own) == content["settings"]["trials"]
            row = {"method": method.name}
            row["ranges"] = "; ".join(f"{name} {low:g} to {high:g}" for name, (low, high) in method.ranges.items())
            row["chosen"] = "; ".join(f"{name} {value:g}" for name, value in own["numbers"].iloc[0].items() if done)
            row["best, middle and worst mean accuracy"] = ", ".join(f"{100 * score:.1f} %" for score in scores)
            rows.append(row | {"failed trials": str(own["failure"].notna().sum())})
    return pd.DataFrame(rows)


# --- Page

INTRODUCTION = """---
description: Steps and seconds to an accuracy on Fashion-MNIST and digits: K-FAC systems beside SGD, AdamW and others.
---
# K-FAC on real images

How many steps, and how many seconds, does each K-FAC take to a stated accuracy, beside SGD and AdamW? `make
study-kfac` measures it, and this page is made from its result file by `make docs-figures`. Do not edit it. Winners and
losers are listed alike.
"""
METHOD = """## What is measured

{tasks}

Fashion-MNIST is that of Debian's package `{package}`; the digits come with scikit-learn. Pixels are less their mean,
over their deviation. Learning rates are constant. Float32.

**Systems**, all by `brandla.kfac.KFAC` in front of SGD without momentum, curvature taken at every step, relative
damping, `sharing="reduce"`, steps clipped to an RMS of {clip}; rank {rank}:

| method | strategy |
|---|---|
| K-FAC | `Exact`, renewed every {renew_every} steps |
| RS-KFAC, SRE-KFAC | `Randomized`, `"svd"` and `"eigh"`, renewed every {renew_every} steps |
| B-KFAC | `Brand` |
| B-KFAC, sketched | `Brand` with `sketch` of half the rank: batches brought down to so many columns by random signs |
| B-R-KFAC | `BrandRandomized`, overwritten every {overwrite_every} steps |
| B-KFAC-C | `BrandCorrected`, corrected every {renew_every} steps |
| SINGD | `InverseFree`, dense, moved every {singd_every} steps; `decay` {ema} |

Factors that are too small for the rank get the strategy that `report()` names.

**Budget.** Every method has three numbers to be searched, and {trials} trials on each task: the same {trials} points
of a scrambled Sobol sequence in the unit cube, mapped evenly in the logarithm to the ranges above, so that each number
takes a value in each of {trials} equal parts of its range. A trial is a shorter run on a part of the training images,
from a seed that no measured run has; the trial of the best mean accuracy on the rest of them (one in {parts} images
of Fashion-MNIST, a fifth of the digits) is chosen. A trial that fails counts as 0. Targets, ranges and all other
options are fixed in the settings of the study.

**Runs.** {seeds} seeds, of networks and batches, the same for all methods; the methods take turns. Accuracy is that on
all test images, looked at every few steps; only the steps are timed, and the first look at or above the target
counts. Figures are means over the seeds with the least and the largest; steps and seconds are over the runs that
reached the target. Methods are ranked, and divided by AdamW's figure, where every run of both reached it. Step times
are those of all steps, the first one included. Memory is that of the factors, decompositions included, and of the
optimizer's own state.
"""


def page(found: dict[str, Row]) -> str:
    """Return ``docs/kfac-study.md``, from the content of the files by the names of the machines' folders."""
    sections = [section for machine, content in found.items() for section in _of_machine(content, machine)]
    return "\n".join([INTRODUCTION, *(sections or ["Nothing has been measured yet.\n", method_of(asdict(USUAL))])])


def _of_machine(content: Row, machine: str) -> Iterator[str]:
    yield f"## {place(content['facts'])}\n"
    yield f"{pages.provenance(content['facts'], 'kfac-study.json')}\n"
    tables = dict(shown(content))
    if tables:
        yield pages.picture(STUDY.name, machine, "Accuracy against steps and seconds, and seconds to the target")
    for task in content["settings"]["tasks"]:
        title = f"{task['name']}, to {percent(task['target'])}"
        yield f"### {title}\n"
        if title in tables:
            yield "\n".join([*verdict(content, task), ""])
            yield pages.markdown(tables[title])
        else:
            yield "No run was made.\n"
        if len(cells := searched(content, task)):
            yield "The search:\n"
            yield pages.markdown(cells)
    yield method_of(content["settings"])


def method_of(settings: Row) -> str:
    networks = {
        "mlp": "an MLP with two hidden layers of {width}",
        "conv": "convolutions of {width} and {twice} channels, and two Linear layers",
    }
    line = (
        "- **{name}**: {words}, {steps} steps of {batch} images, to {goal}; trials of {search_steps} steps;"
        " looked at every {evaluate_every} steps."
    )
    tasks = []
    for task in settings["tasks"]:
        words = networks[task["network"]].format(width=task["width"], twice=2 * task["width"])
        tasks.append(line.format(words=words, goal=percent(task["target"]), **task))
    given = {**settings, "tasks": "\n".join(tasks), "seeds": len(settings["seeds"])}
    return METHOD.format(package=PACKAGE, parts=PARTS, ema=DECAY, **given)


# --- Picture

# Okabe and Ito's palette, which colour-blind readers tell apart, with lighter ones for dark pages; greys for the
# methods that are no K-FAC.
COLOURS = {
    "SGD": ("#a0a0a0", "#7d828c"),
    "AdamW": ("#5c5c5c", "#b4b8c2"),
    "Muon": ("#7f6000", "#ffd966"),
    "Shampoo": ("#4c1130", "#d5a6bd"),
    "SOAP": ("#274e13", "#b6d7a8"),
    "K-FAC": ("#000000", "#ffffff"),
    "RS-KFAC": ("#e69f00", "#f0b840"),
    "SRE-KFAC": ("#56b4e9", "#8accf2"),
    "B-KFAC": ("#0072b2", "#3d9be0"),
    "B-KFAC, sketched": ("#4a3fb5", "#a79bff"),
    "B-R-KFAC": ("#009e73", "#2fd3a5"),
    "B-KFAC-C": ("#cc79a7", "#e49cc8"),
    "SINGD": ("#d55e00", "#ff8f40"),
}
ACCURACIES = (0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995)


def draw(content: Row, theme: Theme) -> Figure:
    """Draw three panels a task: accuracy against steps and against seconds, and the seconds to the target."""
    tasks = [task for task in content["settings"]["tasks"] if len(runs_of(content, task))]
    words = f"{content['settings']['trials']} trials of each method beforehand; mean and range of the seeds"
    figure, axes = pictures.panels([4.4, 3.4, 3.8] * len(tasks), content, words, theme)
    for task, (by_step, by_second, to_target) in zip(tasks, np.reshape(np.array(axes), (-1, 3)), strict=True):
        about = f"{task['network']} of width {task['width']}, batches of {task['batch']}"
        pictures.titled(by_step, f"{task['name']}: test accuracy", about, theme)
        pictures.titled(by_second, "… against time", "seconds of the steps alone, mean of the seeds", theme)
        below = "bar: mean; dots: seeds; steps in brackets"
        pictures.titled(to_target, f"Seconds to {percent(task['target'])}", below, theme)
        for axis, against in ((by_step, "step"), (by_second, "seconds")):
            _draw_course(axis, runs_of(content, task), task["target"], against, theme)
            axis.set_xlabel(f"training {against}" if against == "step" else against)
        pictures.legend(by_step, 4)
        _draw_target(to_target, content, task, theme)
    return figure


def _draw_course(axis: Axes, runs: pd.DataFrame, target: float, against: str, theme: Theme) -> None:
    heights = [_height(target)]
    for name, own in runs.groupby("method", sort=False):
        looks = pd.DataFrame(own["evaluations"].explode().dropna().tolist())
        if looks.empty:
            continue
        found = looks.groupby("step").agg(
            seconds=("seconds", "mean"), mean=("accuracy", "mean"), low=("accuracy", "min"), high=("accuracy", "max")
        )
        colour, low, high = theme.colour(*COLOURS[str(name)]), _height(found["low"]), _height(found["high"])
        across = found.index if against == "step" else found["seconds"]
        style = (0, (4, 1.5)) if name in ("SGD", "AdamW", "Muon", "Shampoo", "SOAP") else "-"
        axis.plot(across, _height(found["mean"]), color=colour, linewidth=1.7, linestyle=style, label=name)
        axis.fill_between(across, low, high, color=colour, alpha=0.13, linewidth=0)
        heights += [np.quantile(low, 0.05), high.max()]
    axis.axhline(_height(target), color=theme.text, linewidth=1, linestyle=":")
    first, last = axis.get_xlim()
    pictures.logarithmic(axis.xaxis, subs=(1, 2, 5) if last < 200 * max(first, 1e-9) else (1, 3))
    low, high = min(heights), max(heights)
    axis.set_ylim(low - 0.03 * (high - low), high + 0.06 * (high - low))
    axis.yaxis.set_major_locator(FixedLocator(list(map(_height, ACCURACIES))))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(round(1 - 10**-value, 4))))


def _height(accuracy: Any) -> Any:
    """Return −log₁₀ of the error, which spreads what is nearly right; 0.05 % stands for none."""
    return -np.log10(np.maximum(1 - accuracy, 5e-4))


def _draw_target(axis: Axes, content: Row, task: Row, theme: Theme) -> None:
    # Those that did not always arrive come last: their means are over their better runs alone.
    found, runs = summary(content, task), runs_of(content, task)
    found = found.assign(missed=found["runs"] - found["reached"], mean=found["seconds mean"])
    found = found.sort_values(["missed", "mean"])
    most = np.nanmax([*found["seconds max"], 1e-9])
    for at, (name, row) in enumerate(found.iterrows()):
        colour, mean = theme.colour(*COLOURS[str(name)]), row["mean"]
        seconds = runs.loc[runs["method"] == name, "seconds"].dropna()
        axis.plot([0, 0 if math.isnan(mean) else mean], [at, at], color=colour, linewidth=5, alpha=0.45)
        axis.plot(seconds, [at] * len(seconds), "o", color=colour, markersize=6, markeredgecolor=theme.background)
        reached, count = int(row["reached"]), int(row["runs"])
        words = f"{spelled(mean)} s ({row['step mean']:.0f})" if reached else "not reached"
        words += f", {reached} of {count} runs" if 0 < reached < count else ""
        axis.text(max([0, *seconds]) + 0.03 * most, at, words, va="center", fontsize=9)
    axis.set_yticks(range(len(found)), found.index)
    axis.set(ylim=(len(found) - 0.5, -0.5), xlim=(0, 1.5 * most), xlabel="seconds")


STUDY = Study("kfac-study", {"quick": QUICK, "usual": USUAL, "full": FULL}, pieces, shown, draw=draw)
app = application(__doc__)


@app.command(help=__doc__)
def main(
    quick: Quick = False,
    full: Full = False,
    resume: Resume = False,
    out: Out = None,
    only: Annotated[str | None, typer.Option(help=f"These images alone: {DIGITS} or {FASHION}.")] = None,
    folder: Annotated[Path, typer.Option("--data", help="Folder of Fashion-MNIST's four files.")] = FOLDER,
) -> None:
    """Take the tasks that are wanted, with the images that they need."""
    settings = settings_of(STUDY, quick=quick, full=full)
    tasks = tuple(task for task in settings.tasks if only in (None, task.images))
    if not tasks:
        message = f"no images are called {only!r}: name {DIGITS} or {FASHION}"
        raise typer.BadParameter(message, param_hint="--only")
    try:
        if any(task.images == FASHION for task in tasks):
            check(folder)
        study = replace(STUDY, pieces=partial(pieces, folder=folder))
        conduct(study, replace(settings, tasks=tasks), quick=quick, full=full, resume=resume, out=out)
    except UnusableError as error:
        typer.echo(f"study-kfac: {error}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    app()
