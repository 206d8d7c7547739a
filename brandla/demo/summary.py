"""The tables and the picture of a run, derived from its rows. The tables are at most 80 columns wide."""

from __future__ import annotations

from collections.abc import Iterator
from math import floor
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import style
from matplotlib.figure import Figure

from brandla.demo.frame import Row

NORMS = ("trace", "frobenius", "spectral")
NO_VALUE = "–"
# An error below this, relative to the norm of M, is float32 rounding, so a ratio to it means nothing.
_NOISE = 1e-6
# Rounding in float32 may add this much to an error, relative to ‖M‖₂, beyond the running bound.
_SLACK = 4e-7


def tracked_errors(content: Row) -> pd.DataFrame:
    """Return the rows of the tracked factors, with the ratios of their errors to the best possible errors."""
    rows = pd.DataFrame(content.get("tracking", []))
    if rows.empty:
        return rows
    rows = rows.dropna(subset="bound")
    for norm in NORMS:
        best = rows[f"best {norm}"]
        rows[f"{norm} ratio"] = (rows[norm] / best).where(best > _NOISE * rows[f"whole {norm}"])
    bounded = rows["spectral"] > _NOISE * rows["whole spectral"]
    beyond = rows["spectral"] > rows["bound"] + _SLACK * rows["whole spectral"]
    return rows.assign(bound_ratio=(rows["bound"] / rows["spectral"]).where(bounded), broken=bounded & beyond)


def tracking_table(content: Row) -> pd.DataFrame:
    """Return a row for each tracked factor: medians over the steps, and the worst in brackets."""
    rows = []
    for (update, rank), factor in tracked_errors(content).groupby(["method", "rank"], sort=False):
        cells = {"update": update, "rank": f"{rank:.0f}"}
        for norm, name in zip(NORMS, ("trace", "Frobenius", "spectral"), strict=True):
            ratio = factor[f"{norm} ratio"].dropna()
            cells[name] = f"{ratio.median():.2f} ({ratio.max():.2f})" if len(ratio) else NO_VALUE
        within, bound = (factor["trace ratio"].dropna() <= 1.1).mean(), factor["bound_ratio"].median()
        # Rounded down, so that 100 % means every step.
        cells["≤ 1.1"] = NO_VALUE if np.isnan(within) else f"{floor(100 * within)} %"
        broken = " broken" if factor["broken"].any() else ""
        cells["bound"] = NO_VALUE if np.isnan(bound) else f"{bound:.1f} ×{broken}"
        cells["ms"] = f"{after_warmup(factor, content)['milliseconds'].median():.1f}"
        rows.append(cells)
    return pd.DataFrame(rows)


def reference_times(content: Row) -> pd.Series:
    """Return median milliseconds of the calls that are timed beside the updates. NaN: every call failed."""
    rows = after_warmup(pd.DataFrame(content["tracking"]), content)
    rows = rows[rows["bound"].isna()]
    rank = rows["rank"].map(lambda rank: f" ({rank:.0f})" if rank > 0 else "")
    return rows.groupby(rows["method"] + rank.astype(str), sort=False)["milliseconds"].median()


def after_warmup(rows: pd.DataFrame, content: Row) -> pd.DataFrame:
    """Return the rows after the warm-up, or all rows if there are no later ones."""
    later = rows[rows["step"] > content["settings"]["warmup"]]
    return later if len(later) else rows


def training_table(content: Row) -> pd.DataFrame:
    """Return a row for each method: accuracies at the end, steps and seconds to the target, and times of a step."""
    target, warmup, rows = content["settings"]["target"], content["settings"]["warmup"], []
    all_runs = [run for run in content.get("runs", []) if run["milliseconds"]]
    for method in dict.fromkeys(run["method"] for run in all_runs):
        runs = [run for run in all_runs if run["method"] == method]
        ends = 100 * np.array([run["evaluations"][-1]["accuracy"] for run in runs if run["finished"]])
        firsts = (next((at for at in run["evaluations"] if at["accuracy"] >= target), None) for run in runs)
        reached = pd.DataFrame([at for at in firsts if at], columns=["step", "seconds"])
        missed, means = "*" if len(reached) < len(runs) else "", reached.mean()
        times = [ms for run in runs for ms in run["milliseconds"][warmup:] or run["milliseconds"]]
        median, p99 = np.percentile(times, [50, 99])
        memory = pd.DataFrame(next((run["memory"] for run in runs if run["memory"]), []))
        cells = {
            "method": method,
            "rate": f"{runs[0]['rate']:.2g}",
            "accuracy, %": f"{ends.mean():.1f} ({ends.min():.1f}–{ends.max():.1f})" if len(ends) else NO_VALUE,
            "steps": f"{means['step']:.0f}{missed}" if len(reached) else "never",
            "seconds": f"{means['seconds']:.2f}{missed}" if len(reached) else "never",
            "median": _milliseconds(median),
            "p99": _milliseconds(p99),
            "ratio": f"{p99 / median:.1f}",
            "memory": f"{memory['bytes'].sum() / memory['dense_bytes'].sum():.2f}" if len(memory) else "",
        }
        rows.append(cells)
    return pd.DataFrame(rows)


def tables(content: Row) -> Iterator[tuple[str, pd.DataFrame, str]]:
    """Yield title, table and note of each part that has been measured."""
    settings = content["settings"]
    if len(rows := tracked_errors(content)):
        sizes = f"n = {settings['width'] + 1}, {settings['batch']} columns a step"
        references = "; ".join(f"{name} {_milliseconds(value)}" for name, value in reference_times(content).items())
        yield (
            f"Tracked error / best rank-r error, {rows['step'].nunique()} steps, {sizes}",
            tracking_table(content),
            "In each norm: median over the steps (worst). ≤ 1.1: share of the steps within 10 % of the best in the "
            "trace norm. bound: running bound / spectral error, median. ms: median of an update. Beside it, in ms, the "
            f"update of a dense average, and its decompositions (rank): {references or NO_VALUE}.",
        )
    if len(cells := training_table(content)):
        yield (
            f"Training, {settings['steps']} steps, rank {settings['rank']}, {len(settings['seeds'])} seed(s)",
            cells.drop(columns="ratio"),
            f"accuracy: test, at the end, mean (lowest–highest). steps, seconds: until {100 * settings['target']:g} %, "
            f"mean; *: of the runs that reached it. median, p99: ms of a step, without the first "
            f"{settings['warmup']} of a run. memory: of the factors over the memory of dense factors.",
        )


def _milliseconds(value: float) -> str:
    if np.isnan(value):
        return NO_VALUE
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def draw(content: Row, path: Path) -> bool:
    """Draw the tracked errors over steps, and the test error over seconds. Return False if nothing was measured."""
    rows, settings, facts = tracked_errors(content), content["settings"], content["facts"]
    if rows.empty:
        return False
    figure = Figure(figsize=(9, 10), dpi=110, layout="constrained")
    with style.context("tableau-colorblind10"):
        above, below = figure.subplots(2)
    rank, target = settings["headline_rank"], 100 * settings["target"]
    ratios = rows[rows["rank"] == rank].pivot(index="step", columns="method", values="trace ratio")
    above.plot(ratios.index, ratios, label=list(ratios))
    above.axhspan(1, 1.1, alpha=0.1, linewidth=0, label="within 10 % of the best")
    above.set(title=f"Error of a layer's tracked input factor / best rank-{rank} error, trace norm", xlabel="step")
    runs = pd.DataFrame(content.get("runs", []), columns=["method", "evaluations"])
    for method, of_method in runs[runs["evaluations"].astype(bool)].groupby("method", sort=False):
        means = pd.DataFrame(of_method["evaluations"].explode().tolist()).groupby("step").mean()
        # A logarithmic axis has no place for 0.
        below.plot(means["seconds"], (100 - 100 * means["accuracy"]).clip(lower=0.1), label=method)
    below.axhline(100 - target, color="grey", linestyle="--", label=f"{target:g} % accuracy")
    below.set(title="Training on digits: test error, %", xlabel="seconds, mean over seeds", xscale="log", yscale="log")
    for axis in (below.xaxis, below.yaxis):
        axis.set_major_formatter("{x:g}")
    below.yaxis.set_minor_formatter("{x:g}")
    for axes in (above, below):
        axes.legend(ncols=2, fontsize=9)
    place = facts["gpus"][0] if settings["device"] != "cpu" and facts["gpus"] else facts["cpu"]
    about = f"{place}, {facts['threads']} threads, torch {facts['versions']['torch']}"
    figure.supxlabel(about + ("; interrupted" if facts["interrupted"] else ""), fontsize=9)
    figure.savefig(path)
    return True
