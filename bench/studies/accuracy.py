"""How far each way of keeping a factor's decomposition is from the factor, over a training run, at equal cost.

Run by ``make study-accuracy``. A run is a width and a seed.
"""

from collections.abc import Iterator
from functools import partial
from itertools import islice

import pandas as pd
import torch
from matplotlib.figure import Figure

from bench.frame import pictures
from bench.frame.pictures import THEMES, Theme
from bench.frame.study import Piece, Row, Study, Tables, command
from bench.gpu.device import Device
from bench.studies import accuracy_parts as parts
from bench.studies.accuracy_parts import BEST, FACTORS, Settings
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


def pieces(settings: Settings, _: Device, tables: Tables) -> Iterator[Piece]:
    """Yield the costs at each width, and its runs; widths are in order, so that an end in between leaves all seeds."""
    for width in settings.widths:
        yield Piece("trackers", {"width": width}, partial(timed, settings, width), 0.1)
        for seed in settings.seeds:
            measure = partial(measured, settings, width, seed, tables)
            yield Piece("runs", {"width": width, "seed": seed}, measure, width**2 / 512**2, 10 * len(settings.measured))


def timed(settings: Settings, width: int) -> Iterator[Row]:
    """Yield the trackers with their costs: once for all seeds."""
    stream = islice(parts.observations(settings, width, settings.seeds[0]), min(SEEN, settings.steps))
    costs = parts.measure_costs(settings, [one.columns["inputs"] for one in stream])
    for one in parts.trackers(settings, costs):
        yield {**vars(one), "milliseconds": one.cost(costs)}


def measured(settings: Settings, width: int, seed: int, tables: Tables) -> Iterator[Row]:
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
                row: Row = {"step": one.step, "tracker": tracker}
                for name in FACTORS:
                    row |= {f"{name} {of}": value for of, value in exact[name].errors(factors[name]).items()}
                yield row | parts.step_errors(one.gradient, exact, factors)


# --- Summaries: medians over the steps after the warm-up, and their mean and range over the seeds


def settled(content: Row) -> pd.DataFrame:
    """Return the errors after the warm-up: of whole runs, or of what there is where a width has none."""
    runs = pd.DataFrame(content.get("runs", []), columns=["width", "seed", "step", "tracker", *MEASURES])
    last = runs.groupby(["width", "seed"])["step"].transform("max")
    whole = last == runs.groupby("width")["step"].transform("max")
    return runs[whole & (runs["step"] > content["settings"]["warmup"])]


def shown(content: Row) -> Iterator[tuple[str, pd.DataFrame]]:
    medians = settled(content).groupby(["width", "seed", "tracker"])[list(MEASURES)].median()
    means = medians.groupby(["width", "tracker"]).mean()
    about = pd.DataFrame(content.get("trackers", []))
    for width in means.index.unique("width"):
        cells = (100 * means.loc[width]).map("{:.2g} %".format).rename(columns=MEASURES)
        cells[MEASURES["step angle"]] = means.loc[width, "step angle"].map("{:.2g}°".format)
        own = about[(about["width"] == width) & about["name"].isin(cells.index)].set_index("name")
        cells.insert(0, "ms per step", own["milliseconds"].map("{:.3g}".format))
        every = own["period"].map("{:.0f}".format).where(own["renewal"].notna(), "never")
        cells.insert(0, "renewed every", every)
        yield f"Width {width}", cells.reindex([BEST, *own.index]).astype(object).fillna("").reset_index(names="tracker")


# --- The page

COLUMNS = ["tracker", "renewed every", "ms per step", "inverse of A", "inverse of G", "step", "angle of the step"]


def answer(content: Row) -> str:
    """Return the step's error of B-R over that of RS at equal cost, at the largest width."""
    by_tracker = settled(content).pivot(index=["width", "seed", "step"], columns="tracker", values="step error")
    found = by_tracker.reindex(columns=list(QUESTION)).dropna()
    if found.empty:
        return ""
    width = found.index.unique("width").max()
    own = (found[QUESTION[0]] / found[QUESTION[1]]).loc[width]
    seeds = own.groupby("seed").median()
    return (
        f"At width {width} and equal cost the step of {QUESTION[0]} has {seeds.mean():.2f} ({seeds.min():.2f} to"
        f" {seeds.max():.2f}) times the error of {QUESTION[1]}. It has less error in {100 * (own < 1).mean():.0f} % of"
        " the steps."
    )


def table(content: Row) -> pd.DataFrame:
    """Return the errors of every tracker at the largest width."""
    return ([cells for _, cells in shown(content)] or [pd.DataFrame(columns=COLUMNS)])[-1][COLUMNS]


SHOWN = ("B", "RS", "B-R", "B-C", "SRE", "B, root", "B, no eigh")
COLOURS = {BEST: tuple(theme.faint for theme in THEMES)} | dict(zip(SHOWN, pictures.PALETTE, strict=False))


def draw(content: Row, theme: Theme) -> Figure:
    """Draw the step's error at the largest width."""
    settings, width = content["settings"], settled(content)["width"].max()
    runs = pd.DataFrame(content["runs"]).query("width == @width")
    words = f"accuracy.json; mean and range over {runs['seed'].nunique()} seeds"
    below = f"width {width}, rank {settings['rank']}, {settings['batch']} columns a step"
    about = ("Relative error of the step", below, 4.6)
    figure, (axis,) = pictures.panels(content, words, theme, about, width=pictures.NARROW)
    errors = runs.pivot(index=["step", "seed"], columns="tracker", values="step error")
    pictures.curves(axis, errors[[name for name in COLOURS if name in errors]], COLOURS, theme, SHOWN, linewidth=1.6)
    pictures.logarithmic(axis.yaxis, lambda value: f"{100 * value:g} %", subs=(1, 3))
    axis.set_xlabel("training step")
    pictures.legend(axis, 3)
    return figure


STUDY = Study("accuracy", {"quick": QUICK, "usual": USUAL}, pieces, shown)

if __name__ == "__main__":
    command(STUDY, __doc__)()
