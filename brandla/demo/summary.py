"""The figures that tables and picture state, derived from the rows of a run; the tables are at most 80 columns wide."""

from __future__ import annotations

from collections.abc import Iterator
from math import floor

import numpy as np
import pandas as pd

from brandla.demo.frame import Row

NORMS = ("trace", "frobenius", "spectral")
UPDATES = ("root_update", "eigh_update")
NOTHING = "–"
# Below this, relative to the norm of M, an error is float32's rounding and a ratio to it means nothing.
_NOISE = 1e-6
# What rounding in float32 may add to an error that the running bound covers, relative to ‖M‖₂.
_SLACK = 4e-7


def tracked(content: Row) -> pd.DataFrame:
    """Return the rows of the tracked factors, with the ratios of their errors to the best possible ones."""
    rows = pd.DataFrame(content.get("tracking", []))
    if rows.empty:
        return rows
    rows = rows.dropna(subset="bound")
    ratios = {norm: rows[norm] / rows[f"best {norm}"] for norm in NORMS}
    resolved = {norm: rows[f"best {norm}"] > _NOISE * rows[f"whole {norm}"] for norm in NORMS}
    bounded = rows["spectral"] > _NOISE * rows["whole spectral"]
    slack = _SLACK * rows["whole spectral"]
    return rows.assign(
        **{f"{norm} ratio": ratios[norm].where(resolved[norm]) for norm in NORMS},
        over=(rows["bound"] / rows["spectral"]).where(bounded),
        broken=bounded & (rows["spectral"] > rows["bound"] + slack),
    )


def tracking(content: Row) -> pd.DataFrame:
    """Return a row for each tracked factor: medians over the steps, the worst in brackets."""
    rows = []
    for (update, rank), own in tracked(content).groupby(["method", "rank"], sort=False):
        cells = {"update": update, "rank": f"{rank:.0f}"}
        for norm, name in zip(NORMS, ("trace", "Frobenius", "spectral"), strict=True):
            ratio = own[f"{norm} ratio"].dropna()
            cells[name] = f"{ratio.median():.2f} ({ratio.max():.2f})" if len(ratio) else NOTHING
        within = (own["trace ratio"].dropna() <= 1.1).mean()
        # Rounded down: 100 % means every step.
        cells["≤ 1.1"] = NOTHING if np.isnan(within) else f"{floor(100 * within)} %"
        over = own["over"].median()
        cells["bound"] = NOTHING if np.isnan(over) else f"{over:.1f} ×" + (" broken" if own["broken"].any() else "")
        cells["ms"] = f"{settled(own, content)['milliseconds'].median():.1f}"
        rows.append(cells)
    return pd.DataFrame(rows)


def settled(rows: pd.DataFrame, content: Row) -> pd.DataFrame:
    """Return rows after the warm-up, or all where there are no more."""
    found = rows[rows["step"] > content["settings"]["warmup"]]
    return found if len(found) else rows


def times(content: Row) -> pd.DataFrame:
    """Return median milliseconds by method and rank; a rank that does not matter is 0, a failed call is left out."""
    rows = settled(pd.DataFrame(content["tracking"]), content).fillna({"rank": 0})
    return rows.groupby(["method", "rank"], sort=False)["milliseconds"].agg(["median", "count", "size"])


def training(content: Row) -> pd.DataFrame:
    """Return a row for each method: accuracies at the end, steps and seconds to the target, and times of a step."""
    settings, rows = content["settings"], []
    for method, runs in _by_method(content):
        ends = [run["evaluations"][-1]["accuracy"] for run in runs if run["finished"]]
        looks = [next((at for at in run["evaluations"] if at["accuracy"] >= settings["target"]), None) for run in runs]
        arrived = [at for at in looks if at]
        missed = "*" if len(arrived) < len(runs) else ""
        found = [took for run in runs for took in run["milliseconds"][settings["warmup"] :] or run["milliseconds"]]
        median, late = np.percentile(found, [50, 99])
        memory = next((run["memory"] for run in runs if run["memory"]), None)
        reached = {part: f"{np.mean([at[part] for at in arrived]):{form}}{missed}" if arrived else "never"
                   for part, form in (("step", ".0f"), ("seconds", ".2f"))}  # fmt: skip
        rows.append(
            {
                "method": method,
                "rate": f"{runs[0]['rate']:.2g}",
                "accuracy, %": _range(ends),
                "steps": reached["step"],
                "seconds": reached["seconds"],
                "median": _milliseconds(median),
                "p99": _milliseconds(late),
                "ratio": f"{late / median:.1f}",
                "memory": "" if memory is None else f"{_total(memory, 'bytes') / _total(memory, 'dense_bytes'):.2f}",
            }
        )
    return pd.DataFrame(rows)


def memory(content: Row) -> pd.DataFrame:
    """Return a row for each K-FAC method: what its largest factor and all of them take, and of the dense ones'."""
    rows = []
    for method, runs in _by_method(content):
        for factors in [run["memory"] for run in runs if run["memory"]][:1]:
            largest = max(factors, key=lambda factor: factor["n"])
            cells = {"KiB": method}
            for name, part in ((f"one factor, n = {largest['n']}", [largest]), ("all factors", factors)):
                size, dense = _total(part, "bytes"), _total(part, "dense_bytes")
                cells |= {name: f"{size / 1024:.0f}", f"{name}: of dense": f"{size / dense:.0%}"}
            rows.append(cells)
    return pd.DataFrame(rows)


def tables(content: Row) -> Iterator[tuple[str, pd.DataFrame, str]]:
    """Yield title, table and note of each part that has been measured."""
    settings = content["settings"]
    if len(rows := tracked(content)):
        n, columns = settings["width"] + 1, settings["batch"]
        yield (
            f"Tracked error / best rank-r error, {rows['step'].nunique()} steps, n = {n}, {columns} columns a step",
            tracking(content).drop(columns="ms"),
            "In each norm: median over the steps (worst). ≤ 1.1: share of the steps within 10 % of the best in the "
            "trace norm. bound: running bound / spectral error, median. Largest ‖UᵀU − I‖₂ of any step: "
            f"{rows['orthogonality'].max():.1e}.",
        )
        yield (
            f"Time per update, n = {n}, {columns} columns",
            _times(content),
            "The decompositions are of the dense average, whose own update comes on top.",
        )
    if len(cells := training(content)):
        missed = cells["steps"].str.endswith("*").any()
        yield (
            f"Training, {settings['steps']} steps, rank {settings['rank']}, {len(settings['seeds'])} seed(s)",
            cells.drop(columns="memory"),
            f"accuracy: test, at the end, mean (lowest–highest). steps, seconds: until {100 * settings['target']:g} %, "
            f"mean. median, p99: ms of a step, without the first {settings['warmup']} of a run; ratio: p99 / median."
            + (" *: mean of the runs that got there; not all did." if missed else ""),
        )
    if len(cells := memory(content)):
        named = cells.rename(columns=lambda name: "of dense" if name.endswith(": of dense") else name)
        yield "Memory of the factors", named, "of dense: share of what the dense n × n matrices alone would take."


def _times(content: Row) -> pd.DataFrame:
    """Return a row a method and a column a rank."""
    found, rows = times(content), []
    for method in found.index.unique("method"):
        own = found.loc[method]
        failed = int((own["size"] - own["count"]).max())
        cells = {"ms, median": f"{method}, failed {failed} times" if failed else method}
        for rank in content["settings"]["ranks"]:
            cells[f"rank {rank}"] = _milliseconds(own["median"].get(rank, own["median"].get(0)))
        rows.append(cells)
    return pd.DataFrame(rows)


def _total(factors: list[Row], key: str) -> int:
    return sum(factor[key] for factor in factors)


def _by_method(content: Row) -> Iterator[tuple[str, list[Row]]]:
    runs = [run for run in content.get("runs", []) if run["milliseconds"]]
    for method in dict.fromkeys(run["method"] for run in runs):
        yield method, [run for run in runs if run["method"] == method]


def _range(accuracies: list[float]) -> str:
    if not accuracies:
        return NOTHING
    mean, low, high = (100 * value for value in (np.mean(accuracies), min(accuracies), max(accuracies)))
    return f"{mean:.1f} ({low:.1f}–{high:.1f})"


def _milliseconds(value: float | None) -> str:
    if value is None or np.isnan(value):
        return NOTHING
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
