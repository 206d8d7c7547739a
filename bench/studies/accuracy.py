"""How far each way of keeping a factor's decomposition is from the factor, over a training run, at equal cost.

Run by ``make study-accuracy``. A run is a width and a seed.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.frame import pages, pictures
from bench.frame.facts import place
from bench.frame.pictures import Theme
from bench.frame.study import Piece, Row, Study, Tables, command
from bench.gpu.device import Device
from bench.studies import accuracy_parts as parts
from bench.studies.accuracy_parts import BEST, FACTORS, Settings
from brandla.demo.frame import Tick
from tests.oracles import updated

USUAL = Settings()
QUICK = Settings(widths=(192, 256), seeds=(0,), steps=14, measure_every=3, batch=48, rank=12, warmup=6, repeats=3)
# Columns that a factor has seen before its updates are timed.
SEEN = 20
# What is measured, by the names of the result file, and in words.
MEASURES = {
    "inputs inverse": "inverse of A",
    "gradients inverse": "inverse of G",
    "step error": "step",
    "step angle": "angle of the step",
    "inputs spectral": "‖Â − A‖₂",
    "gradients spectral": "‖Ĝ − G‖₂",
    "inputs trace": "trace of A left out",
    "gradients trace": "trace of G left out",
}
# Errors of B-R over those of RS: what the study is to answer.
QUESTION = ("B-R", "RS")


def pieces(settings: Settings, device: Device) -> list[Piece]:
    """Return the costs at each width, and its runs; widths are in order, so that an end in between leaves all seeds."""

    def costs(width: int) -> Piece:
        return Piece("trackers", {"width": width}, 0.1, lambda *_: timed(settings, width))

    def run(width: int, seed: int) -> Piece:
        key = {"width": width, "seed": seed}
        return Piece("runs", key, width**2 / 512**2, lambda tables, tick: measured(settings, width, seed, tables, tick))

    return [piece for width in settings.widths for piece in (costs(width), *(run(width, s) for s in settings.seeds))]


def timed(settings: Settings, width: int) -> Iterator[Row]:
    """Yield the trackers with their costs: once for all seeds."""
    stream = islice(parts.observations(settings, width, settings.seeds[0]), min(SEEN, settings.steps))
    costs = parts.measure_costs(settings, [one.columns["inputs"] for one in stream])
    for one in parts.trackers(settings, costs):
        yield {**vars(one), "milliseconds": one.cost(costs)}


def measured(settings: Settings, width: int, seed: int, tables: Tables, tick: Tick) -> Iterator[Row]:
    """Yield the errors of every tracker after each of the steps that are looked at."""
    keep = ("name", "update", "renewal", "period")
    rows = [row for row in tables["trackers"] if row["width"] == width]
    chosen = [parts.Tracker(**{name: row[name] for name in keep}) for row in rows]
    sizes = {"inputs": width + 1, "gradients": width}
    truths = {name: torch.zeros(sizes[name], sizes[name], dtype=torch.float64) for name in FACTORS}
    kept = {name: parts.Kept(settings, sizes[name], seed, chosen) for name in FACTORS}
    for one in parts.observations(settings, width, seed):
        for name in FACTORS:
            truths[name] = updated(truths[name], one.columns[name], settings.decay, 1 - settings.decay)
            kept[name].absorb(one.step, one.columns[name])
        if one.step in settings.measured:
            exact = {name: parts.Decomposed(truths[name], settings) for name in FACTORS}
            candidates = {BEST: {name: exact[name].best(settings.rank) for name in FACTORS}}
            candidates |= {each.name: {name: kept[name].factors[each.name] for name in FACTORS} for each in chosen}
            for tracker, factors in candidates.items():
                yield {"step": one.step, "tracker": tracker, **errors(exact, factors, one.gradient)}
        tick(1 / settings.steps)


def errors(exact: dict[str, parts.Decomposed], factors: dict[str, Any], gradient: Any) -> Row:
    """Return the errors of both factors, and of the step taken by them."""
    of_each = {name: exact[name].errors(factors[name])._asdict() for name in FACTORS}
    found = {f"{name} {measure}": value for name, own in of_each.items() for measure, value in own.items()}
    both = ("gradients", "inputs")
    step = parts.step_errors(gradient, tuple(exact[name] for name in both), tuple(factors[name] for name in both))
    return found | {"step error": step.error, "step angle": step.angle}


# --- Summaries: medians over the steps after the warm-up, and their mean and range over the seeds


def settled(content: Row) -> pd.DataFrame:
    """Return the errors after the warm-up: of whole runs, or of what there is where a width has none."""
    runs = pd.DataFrame(content.get("runs", []), columns=["width", "seed", "step", "tracker", *MEASURES])
    last = runs.groupby(["width", "seed"])["step"].transform("max")
    whole = last == runs.groupby("width")["step"].transform("max")
    return runs[whole & (runs["step"] > content["settings"]["warmup"])]


def quotients(content: Row, tracker: str, base: str) -> pd.DataFrame:
    """Return one tracker's errors over another's, by width, seed and step."""
    runs = settled(content).set_index(["width", "seed", "step"])
    measures = list(MEASURES)
    return runs.loc[runs["tracker"] == tracker, measures] / runs.loc[runs["tracker"] == base, measures]


def shown(content: Row) -> Iterator[tuple[str, pd.DataFrame]]:
    medians = settled(content).groupby(["width", "seed", "tracker"])[list(MEASURES)].median()
    means = medians.groupby(["width", "tracker"]).mean()
    about = pd.DataFrame(content.get("trackers", []))
    for width in means.index.unique("width"):
        cells = (100 * means.loc[width]).map("{:.2g} %".format).rename(columns=MEASURES)
        cells[MEASURES["step angle"]] = means.loc[width, "step angle"].map("{:.2g}°".format)
        own = about[about["width"] == width].set_index("name")
        cells.insert(0, "ms a step", own["milliseconds"].map("{:.3g}".format))
        cells.insert(0, "renewed every", own["period"].where(own["renewal"].notna()).map("{:.0f}".format, "ignore"))
        cells.loc[own.index, "renewed every"] = cells.loc[own.index, "renewed every"].fillna("never")
        ordered = cells.reindex([BEST, *own.index]).fillna("").reset_index(names="tracker")
        yield f"Width {width}", ordered


def verdict(content: Row) -> Iterator[str]:
    """Yield the answer, width by width: error of B-R over that of RS at equal cost."""
    found = quotients(content, *QUESTION)
    spread = found.groupby(["width", "seed"]).median().groupby("width").agg(["mean", "min", "max"])
    below = (found < 1).groupby("width").mean()
    for width in spread.index:
        said = (
            "{} {:.2f} ({:.2f} to {:.2f}), below in {:.0f} % of the steps".format(
                words, *spread.loc[width, measure], 100 * below.loc[width, measure]
            )
            for measure, words in list(MEASURES.items())[:4]
        )
        yield f"- width {width}: error of {QUESTION[0]} over that of {QUESTION[1]} at equal cost: {'; '.join(said)}."


# --- Page and picture

INTRODUCTION = """---
description: How far low-rank factors are from the exact ones while a network learns, tracker by tracker, at equal cost.
---
# Accuracy over a training run

How far is a factor that is kept at low rank from the factor it stands for, while a network learns, and what does that
cost? `make study-accuracy` measures it, and this page is made from its result file by `make docs-figures`. Do not edit
it.
"""

METHOD = """## What is measured

AdamW trains the MLP 64-w-w-10 on scikit-learn's digits, {steps} steps of {batch} samples. The factors are those of
K-FAC for the middle layer: the running mean M ← ρM + (1 − ρ)AAᵀ, ρ = {decay}, of its inputs (A, with a row of ones for
the bias) and of the gradients of its outputs (G). Each tracker keeps rank r = {rank}, in float32:

| tracker | at every step | now and then |
|---|---|---|
| B | `eigh_update` | |
| B, root | `root_update` | |
| B, no eigh | `root_update`, `compress="cholesky"` | |
| B-R | `eigh_update`, dense average | overwritten by `randomized_svd` of the average, every {overwrite_every} steps |
| B-C | `eigh_update`, dense average | `ritz_correct` of {part} of its columns, at random |
| RS | dense average | `randomized_svd` of the average |
| SRE | dense average | `randomized_eigh` of the average |

Oversampling {oversample}, {power_iterations} power iterations. **Equal cost** is equal time: each piece is timed in
turn with the others on the machine and width of the study (medians of {repeats} calls), and B-C, RS and SRE are renewed
as often as the time of a step of B-R pays for. The three B cost less than that: they need no dense average.
RS and SRE come once more with the period of B-R.

The truth is M in float64 with a dense eigendecomposition, looked at every {measure_every} steps, at every age of a
renewal. "Best rank r" is its own truncation, which nothing of that rank can beat in ‖M̂ − M‖. λ is {damping} times the
largest eigenvalue of M, for all. Errors are relative: of (M̂ + λI)⁻¹ and of the step (G + λI)⁻¹ ∂W (A + λI)⁻¹ in
the Frobenius norm, ‖M̂ − M‖₂, and the part of the trace that lies outside the basis. Tables show medians over the steps
after the first {warmup}, as means over the seeds.
"""


def page(found: dict[str, Row]) -> str:
    """Return ``docs/accuracy.md``, from the content of the files by the names of the machines' folders."""
    sections = [section for machine, content in found.items() for section in _of_machine(content, machine)]
    return "\n".join([INTRODUCTION, *(sections or ["Nothing has been measured yet.\n", _method(vars(USUAL))])])


def _of_machine(content: Row, machine: str) -> Iterator[str]:
    facts = content["facts"]
    seeds = settled(content).groupby("width")["seed"].nunique()
    count = ", ".join(f"{number} seed{'s' if number > 1 else ''} at width {width}" for width, number in seeds.items())
    yield f"## {place(facts)}\n"
    yield f"{count}; {pages.provenance(facts, 'accuracy.json')}\n"
    yield "\n".join([*verdict(content), ""])
    yield "The step's error over that of the best rank r, at the steps that renew RS and at the others (medians):\n"
    yield pages.markdown(_at_renewals(content))
    yield pages.picture(STUDY.name, machine, "Errors over the steps, and errors over cost")
    for title, cells in shown(content):
        yield f"### {title}\n"
        yield pages.markdown(cells)
    yield _method(content["settings"])


def _at_renewals(content: Row) -> pd.DataFrame:
    """Return the step's error over the best one where RS has just been renewed, and where not, by width."""
    rows = []
    periods = pd.DataFrame(content["trackers"]).query("name == 'RS'").set_index("width")["period"]
    found = {name: quotients(content, name, BEST)["step error"] for name in QUESTION}
    for width in found["RS"].index.unique("width"):
        row = {"width": width, "RS renewed every": f"{periods[width]} steps"}
        for when, renewed in (("at renewals", True), ("between them", False)):
            for name in reversed(QUESTION):
                own = found[name].loc[width]
                due = own.index.get_level_values("step") % periods[width] == 1
                median = own[due == renewed].median()
                row[f"{name}, {when}"] = "–" if pd.isna(median) else f"{median:.2f}"
        rows.append(row)
    return pd.DataFrame(rows)


def _method(settings: Row) -> str:
    part = {0.5: "half"}.get(settings["fraction"], f"{100 * settings['fraction']:g} %")
    return METHOD.format(part=part, **settings)


# Okabe and Ito's palette, which colour-blind readers tell apart.
COLOURS = {
    "B": ("#0072b2", "#3d9be0"),
    "B, root": ("#56b4e9", "#8accf2"),
    "B, no eigh": ("#8a8a8a", "#b4b8c2"),
    "B-R": ("#009e73", "#2fd3a5"),
    "B-C": ("#cc79a7", "#e49cc8"),
    "RS": ("#d55e00", "#ff8f40"),
    "SRE": ("#e69f00", "#f0b840"),
}


def draw(content: Row, theme: Theme) -> Figure:
    """Draw the step's error at each width, those of the inverses at the largest, and what the step's error costs."""
    runs, settings = settled(content), content["settings"]
    widths = sorted(runs["width"].unique())
    courses = [(width, "step error", "Error of the step") for width in widths]
    courses += [(widths[-1], f"{name} inverse", f"Error of the {MEASURES[f'{name} inverse']}") for name in FACTORS]
    seeds = runs["seed"].nunique()
    words = f"Mean and range of {seeds} seed{'s' if seeds > 1 else ''}; λ = {settings['damping']:g} of the largest"
    heights = (3.6, *[2.6] * (len(courses) - 1), 3.2)
    figure, axes = pictures.panels(heights, content, f"{words} eigenvalue", theme)
    for axis, (width, measure, title) in zip(axes, courses, strict=False):
        below = f"relative; width {width}, rank {settings['rank']}, {settings['batch']} new columns a step"
        pictures.titled(axis, title, below, theme)
        _draw_course(axis, pd.DataFrame(content["runs"]).query("width == @width"), measure, theme)
    axes[len(courses) - 1].set_xlabel("training step")
    pictures.legend(axes[0], 4)
    pictures.titled(axes[-1], "What the step's error costs", f"width {widths[-1]}; dashed: the best of the rank", theme)
    _draw_costs(axes[-1], content, widths[-1], theme)
    return figure


def _draw_course(axis: Axes, runs: pd.DataFrame, measure: str, theme: Theme) -> None:
    for name in (BEST, *COLOURS):
        over = runs[runs["tracker"] == name].groupby("step")[measure].agg(["mean", "min", "max"])
        colour = theme.faint if name == BEST else theme.colour(*COLOURS[name])
        style: Row = {"linestyle": "--", "linewidth": 2} if name == BEST else {"linewidth": 1.6}
        if len(over):
            axis.plot(over.index, over["mean"], color=colour, label=name, **style)
            axis.fill_between(over.index, over["min"], over["max"], color=colour, alpha=0.13, linewidth=0)
    pictures.logarithmic(
        axis.yaxis, lambda value: f"{100 * value:g} %", subs=(1, 2, 5) if "inverse" in measure else (1, 3)
    )


def _draw_costs(axis: Axes, content: Row, width: int, theme: Theme) -> None:
    medians = settled(content).query("width == @width").groupby(["tracker", "seed"])["step error"].median()
    over = medians.groupby("tracker").agg(["mean", "min", "max"])
    axis.axhline(over.loc[BEST, "mean"], color=theme.faint, linestyle="--")
    for row in content["trackers"]:
        if row["width"] == width and row["name"] in over.index:
            family = max((name for name in COLOURS if row["name"].startswith(name)), key=len)
            mean, low, high = over.loc[row["name"]]
            colour = theme.colour(*COLOURS[family])
            face = colour if row["name"] == family else theme.background
            range_ = [[mean - low], [high - mean]]
            style = {"marker": "o", "color": colour, "markerfacecolor": face, "capsize": 2}
            axis.errorbar(row["milliseconds"], mean, yerr=range_, **style)
            place = (row["milliseconds"], mean)
            # Two that cost nearly the same are told apart by one name above and one below.
            offset = (6, 5) if row["update"] == "brand" or row["name"].startswith("SRE") else (6, -11)
            axis.annotate(row["name"], place, offset, textcoords="offset points", fontsize=8.5, color=colour)
    pictures.logarithmic(axis.yaxis, lambda value: f"{100 * value:g} %", subs=(1, 3))
    axis.set_xlim(0, 1.25 * axis.get_xlim()[1])
    axis.set_xlabel("ms a step and factor")


STUDY = Study("accuracy", {"quick": QUICK, "usual": USUAL}, pieces, shown, draw=draw)

if __name__ == "__main__":
    command(STUDY, __doc__)()
