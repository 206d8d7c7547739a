"""Whether anything got worse: the result files here against the last committed ones of the same kind of machine.

Run by ``make bench-compare`` after a study has been run anew. Absolute times differ from run to run, so only ratios are
compared: each figure over a reference of its own run (the GEMMs of an update, a product, the ceilings). A regression is
a figure that is worse by more than its noise, which follows from the scatter of both runs. The exit code is then 1.

The noise of a change, in logarithms, is three times √Σs², where s is the interquartile range of each separate
measurement: the calls and the reference, in the old run and in the new one. For normal scatter this is four deviations,
even if all calls of a run are off together by as much as one of them is by itself.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer
from rich.console import Console

from bench.frame import pages, results
from bench.frame.facts import ROOT, commit_of
from bench.frame.study import Row, new_app
from brandla.demo import machine

RANGES = 3
# Smaller changes are of no interest. Figures without scatter, such as memory, have this noise, and five digits.
LEAST = 0.01
CALLS = 250  # calls behind an interval of `updates`, whose file does not tell: most have no more
PEERS = ("torch.", "Cholesky")  # methods of other libraries, whose times are not watched
MEANINGFUL = 0.5  # smaller exponents mean that nothing grew, and are not compared
SHOWN = 8  # changes that are shown at either end, in addition to the regressions
# A case, its figure over the reference of its own run, √Σs² of the interquartile ranges of the logarithms of both, and
# whether a larger figure is better.
COLUMNS = ["case", "value", "scatter", "more"]
Ratios = Iterator[tuple[str, float, float, bool]]


def interquartile(interval: Sequence[float], count: int = 0) -> float:
    """Return the interquartile range of the logarithms of samples, from the 95 % interval of their median.

    The interval of `median_interval` spans the middle 1.96/√count of the samples. For few samples it is wider than the
    interquartile range, and replaces it.
    """
    _, low, high = interval
    return math.log(high / low) * max(1.0, math.sqrt(count) / (2 * 1.96))


# --- The ratios of a study


def of_updates(study: Row) -> Ratios:
    """Yield the figures that are ratios of times of one run."""
    for row in study["figures"]:
        if row.get("unit") in ("×", ""):
            interval = (row["value"], row.get("low", row["value"]), row.get("high", row["value"]))
            more = "at_least" in row or row["case"].endswith("times faster")
            yield f"{row['group']}: {row['case']}", row["value"], interquartile(interval, CALLS), more


def of_scaling(study: Row) -> Ratios:
    """Yield all times over the GEMMs of an update, all memory over the factor and its columns, and the exponents."""
    ours = lambda rows: (row for row in rows if not row["method"].startswith(PEERS))
    for row in ours(study["rows"]):
        case = f"{row['method']}, growth with {row['axis']}: n {row['n']}, r {row['r']}, k {row['k']}"
        # A ratio of times taken in turn has the scatter of both.
        yield case, row["over_reference"][0], interquartile(row["over_reference"], row["rounds"]), False
        memory = (row["held_bytes"] + row["peak_bytes"]) / (4 * row["n"] * (row["r"] + row["k"]))
        yield f"memory of {case}", memory, 0.0, False
    for fit in ours(study["exponents"]):
        value, low, _ = fit["exponent"]
        if low is not None and low > 0 and value > MEANINGFUL:
            words = f"{fit['method']}: exponent of {fit['quantity']} in {fit['axis']}, {fit['window']} sizes"
            yield words, value, interquartile(fit["exponent"]), False


def of_roofline(study: Row) -> Ratios:
    """Yield the parts of the ceilings. A ceiling's scatter spans its intervals from before and after the ops."""
    for row in study["rows"]:
        bound = row["bound_by"].split(maxsplit=1)[0]
        rates = [rate for level in study["ceilings"] if level["ceiling"] == bound for rate in level["per_second"]]
        scatter = math.hypot(interquartile(row["of_ceiling"], row["rounds"]), math.log(max(rates) / min(rates)))
        yield f"{row['op']}, {row['case']}", row["of_ceiling"][0], scatter, True


def of_cases(study: Row) -> Ratios:
    """Yield the library's times over those of a product before and after them."""
    for row in study["rows"]:
        if row["by"].startswith("brandla"):
            calls = interquartile(row["over_reference"], row["rounds"])
            scatter = math.hypot(calls, interquartile(row["reference"], row["reference_rounds"]))
            yield f"{row['by']}: {row['group']}", row["over_reference"][0], scatter, False


RATIOS = {"updates": of_updates, "scaling": of_scaling, "roofline": of_roofline, "functions": of_cases, "ops": of_cases}


# --- Two runs


def changes(name: str, old: Row, new: Row, least: float) -> pd.DataFrame:
    """Return a row for each figure of both runs, with the factor by which the new one is better, and the noise."""
    table = lambda run: pd.DataFrame(RATIOS[name](run), columns=COLUMNS).drop_duplicates("case", keep="last")
    both = table(old).merge(table(new), on=["case", "more"], suffixes=("_old", "_new"))
    quotient = both["value_new"] / both["value_old"]
    noise = np.expm1(RANGES * np.hypot(both["scatter_old"], both["scatter_new"])).clip(lower=least)
    factor = quotient.where(both["more"].astype(bool), 1 / quotient)
    cells = {"study": name, "case": both["case"], "old": both["value_old"], "new": both["value_new"]}
    return pd.DataFrame(cells | {"factor": factor, "noise": noise, "regression": factor < 1 / (1 + noise)})


app = new_app(__doc__)


@app.command(help=__doc__)
def main(
    new: Annotated[Path, typer.Option(help="Folder with one folder a machine.")] = results.FOLDER,
    old: Annotated[Path | None, typer.Option(help="Another such folder, in place of what is committed.")] = None,
    least: Annotated[float, typer.Option(help="Smallest change that is told (0.1: 10 %).")] = LEAST,
) -> None:
    console, compared = Console(highlight=False), []
    studies = [(path.name, *study) for path in sorted(new.glob("*")) for study in results.read(path).items()]
    for folder, name, after in studies:
        if name not in RATIOS:
            continue
        if old is None:
            file = (results.FOLDER / folder / f"{name}.json").relative_to(ROOT).as_posix()
            before = json.loads(machine.output_of("git", "-C", str(ROOT), "show", f"HEAD:{file}") or "null")
        else:
            before = results.read(old / folder).get(name)
        if before is None:
            words = "nothing is committed for this kind of machine"
        elif before == after:
            words = "not measured anew: the file is the committed one"
        elif before["facts"]["quick"] != after["facts"]["quick"]:
            words = "one of the runs is a short one, whose figures mean nothing"
        else:
            compared.append(ratios := changes(name, before, after, least))
            words = f"{len(ratios)} ratios of {commit_of(before['facts'])} and {commit_of(after['facts'])}"
            words += f"; median noise {100 * ratios['noise'].median():.2g} %" if len(ratios) else ""
        console.print(f"{folder}, {name}: {words}")
    cells = pd.concat(compared) if compared else pd.DataFrame(columns=["factor", "regression"])
    cells = cells.sort_values("factor", kind="stable", ignore_index=True)
    worse = cells["regression"].astype(bool)
    # The regressions, and the largest changes either way.
    ends = cells[worse | (cells.index < SHOWN) | (cells.index >= len(cells) - SHOWN)]
    if len(ends):
        shown = ends.rename(columns={"factor": "times as good"}).round({"times as good": 2, "noise": 3})
        pages.show(console, shown, "Ratios, the worst change first", list(worse[ends.index]))
    console.print(f"{worse.sum()} of {len(cells)} ratios got worse.")
    raise typer.Exit(1 if worse.any() else 0)


if __name__ == "__main__":
    app()
