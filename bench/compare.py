"""Whether anything got worse: the result files here against the last committed ones of the same kind of machine.

Run by ``make bench-compare`` after a study has been run anew. Absolute times do not carry from run to run, so ratios
alone are compared: of each figure to a reference of its own run (the GEMMs of an update, a product, the ceilings). A
regression is a figure that is worse by more than its noise, which follows from the scatter of what both runs measured
for it. The exit code is then 1.

The noise of a change, in logarithms, is three times √Σs², with s the interquartile range of each thing that was
measured on its own: the calls and the reference, in the old run and in the new one. Of normal scatter that is four
deviations, even if all calls of a run are off together by as much as one of them is by itself.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from bench.benches.timing import Interval
from bench.frame import results
from bench.frame.facts import ROOT, commit_of
from bench.frame.figures import spelled

RANGES = 3
# A change below this is of no interest, and figures without scatter, such as memory, are written with five digits.
LEAST = 0.01
# Calls behind an interval of `updates`, which does not say: most have no more.
CALLS = 250
# Methods whose times are not ours to watch.
PEERS = ("torch.", "Cholesky")
# An exponent below this says that nothing grew; such numbers are not divided by one another.
MEANINGFUL = 0.5
Row = dict[str, Any]


class Ratio(NamedTuple):
    """A figure over the reference of its own run, and the interquartile ranges of the logarithms of both."""

    value: float
    ranges: tuple[float, ...]
    more_is_better: bool


class Change(NamedTuple):
    """A figure of two runs: how many times as good the new one is, and whether that is a regression."""

    study: str
    case: str
    old: float
    new: float
    factor: float
    noise: float

    @property
    def regression(self) -> bool:
        """Whether it got worse by more than the noise."""
        return self.factor < 1 / (1 + self.noise)


def interquartile(interval: Sequence[float], count: int = 0) -> float:
    """Return the interquartile range of the logarithms of samples, from the 95 % interval of their median.

    Of ``count`` samples that interval holds the part 1.96/√count in the middle, as `of_median` takes it; where they
    are few the interval is the wider of the two, and is taken for the range.
    """
    _, low, high = interval
    return math.log(high / low) * max(1.0, math.sqrt(count) / (2 * 1.96))


# ---------------------------------------------------------------------------------------------------------------------
# The ratios of a study
# ---------------------------------------------------------------------------------------------------------------------


def of_updates(study: Row) -> Iterator[tuple[str, Ratio]]:
    """Yield the figures in which times of one run are divided by one another."""
    for row in study["figures"]:
        if row.get("unit") in ("×", ""):
            interval = Interval(row["value"], row.get("low", row["value"]), row.get("high", row["value"]))
            more = "at_least" in row or row["case"].endswith("times faster")
            yield f"{row['group']}: {row['case']}", Ratio(interval.value, (interquartile(interval, CALLS),), more)


def of_scaling(study: Row) -> Iterator[tuple[str, Ratio]]:
    """Yield all times over the GEMMs of an update, all memory over the factor and its columns, and the exponents."""
    own = lambda rows: (row for row in rows if not row["method"].startswith(PEERS))
    for row in own(study["rows"]):
        case = f"{row['method']}, growth with {row['axis']}: n {row['n']}, r {row['r']}, k {row['k']}"
        # Quotients of times taken in turn: their scatter is that of both.
        scatter = interquartile(row["over_reference"], row["rounds"])
        yield case, Ratio(row["over_reference"][0], (scatter,), more_is_better=False)
        memory = (row["held_bytes"] + row["peak_bytes"]) / (4 * row["n"] * (row["r"] + row["k"]))
        yield f"memory of {case}", Ratio(memory, (), more_is_better=False)
    for fit in own(study["exponents"]):
        words = f"{fit['method']}: exponent of {fit['quantity']} in {fit['axis']}, {fit['window']} sizes"
        value, low, _ = fit["exponent"]
        if low is not None and low > 0 and value > MEANINGFUL:
            yield words, Ratio(value, (interquartile(fit["exponent"]),), more_is_better=False)


def of_roofline(study: Row) -> Iterator[tuple[str, Ratio]]:
    """Yield the parts of the ceilings."""
    for row in study["rows"]:
        scatter = (interquartile(row["of_ceiling"], row["rounds"]), ceiling_range(study["ceilings"], row["bound_by"]))
        yield f"{row['op']}, {row['case']}", Ratio(row["of_ceiling"][0], scatter, more_is_better=True)


def ceiling_range(ceilings: Sequence[Row], bound_by: str) -> float:
    """Return how far apart the ends of a ceiling's intervals are, before and after the ops, in logarithms."""
    rates = [rate for row in ceilings if row["ceiling"] == bound_by.split(maxsplit=1)[0] for rate in row["per_second"]]
    return math.log(max(rates) / min(rates))


def of_cases(study: Row) -> Iterator[tuple[str, Ratio]]:
    """Yield the library's times over those of a product around them."""
    for row in study["rows"]:
        if row["by"].startswith("brandla"):
            calls = interquartile(row["over_reference"], row["rounds"])
            scatter = (calls, interquartile(row["reference"], row["reference_rounds"]))
            yield f"{row['by']}: {row['group']}", Ratio(row["over_reference"][0], scatter, more_is_better=False)


RATIOS: dict[str, Callable[[Row], Iterator[tuple[str, Ratio]]]] = {
    "updates": of_updates,
    "scaling": of_scaling,
    "roofline": of_roofline,
    "functions": of_cases,
    "ops": of_cases,
}


# ---------------------------------------------------------------------------------------------------------------------
# Two runs
# ---------------------------------------------------------------------------------------------------------------------


def changes(name: str, old: Row, new: Row, least: float) -> Iterator[Change]:
    """Yield the change of every figure that both runs have."""
    before, after = dict(RATIOS[name](old)), dict(RATIOS[name](new))
    for case, ratio in before.items():
        if case in after:
            yield _change(name, case, ratio, after[case], least)


def _change(name: str, case: str, old: Ratio, new: Ratio, least: float) -> Change:
    quotient = new.value / old.value
    noise = math.expm1(RANGES * math.hypot(*old.ranges, *new.ranges))
    return Change(name, case, old.value, new.value, quotient if old.more_is_better else 1 / quotient, max(noise, least))


def committed(path: Path) -> Row | None:
    """Return the last committed version of a result file."""
    command = ["git", "-C", str(ROOT), "show", f"HEAD:{path.relative_to(ROOT).as_posix()}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    return json.loads(done.stdout) if done.returncode == 0 else None


def pairs(folder: Path, old: Path | None) -> Iterator[tuple[str, str, Row | None, Row]]:
    """Yield machine, study, the old and the new content of every result file that can be compared."""
    for path in sorted(folder.glob("*/*.json")):
        if path.stem in RATIOS:
            new = json.loads(path.read_text(encoding="utf-8"))
            place = Path(path.parent.name, path.name)
            before = committed(results.FOLDER / place) if old is None else _read(old / place)
            yield path.parent.name, path.stem, before, new


def _read(path: Path) -> Row | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def why_not(old: Row | None, new: Row) -> str | None:
    """Return why two runs cannot be compared."""
    if old is None:
        return "nothing is committed for this kind of machine"
    if old == new:
        return "not measured anew: the file is the committed one"
    if old["facts"]["quick"] != new["facts"]["quick"]:
        return "one of the runs is a short one, whose figures mean nothing"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare all result files, print what changed, and return 1 if anything got worse."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("--new", type=Path, default=results.FOLDER, help="folder with one folder a machine")
    parser.add_argument("--old", type=Path, help="another such folder, in place of what is committed")
    parser.add_argument("--least", type=float, default=LEAST, help="smallest change that is told (0.1: 10 %%)")
    chosen = parser.parse_args(arguments)
    console, found = Console(highlight=False), []
    for machine, name, old, new in pairs(chosen.new, chosen.old):
        reason = why_not(old, new)
        if old is None or reason is not None:
            console.print(f"{machine}, {name}: {reason}")
            continue
        own = list(changes(name, old, new, chosen.least))
        runs = f"{commit_of(old['facts'])} and {commit_of(new['facts'])}"
        console.print(f"{machine}, {name}: {len(own)} ratios of {runs}{noise_of(own)}")
        found.extend(own)
    worse = [one for one in found if one.regression]
    if found:
        console.print(table(sorted(found, key=lambda one: one.factor), worse))
    console.print(f"{len(worse)} of {len(found)} ratios got worse.")
    return 1 if worse else 0


SHOWN = 8


def noise_of(found: Sequence[Change]) -> str:
    """Say how large the noise is, where there is any."""
    return f"; noise {100 * median(one.noise for one in found):.2g} % in the middle" if found else ""


def table(found: Sequence[Change], worse: Sequence[Change]) -> Table:
    """Return the regressions and the largest changes either way."""
    shown = Table("study", "case", "old", "new", "times as good", "noise", "", title="Ratios, the worst change first")
    ends = [*worse, *(one for one in (*found[:SHOWN], *found[-SHOWN:]) if one not in worse)]
    for one in sorted(dict.fromkeys(ends), key=lambda one: one.factor):
        mark = "[red]regression[/red]" if one.regression else ""
        values = (spelled(one.old), spelled(one.new), f"{one.factor:.2f}", f"{100 * one.noise:.2g} %")
        shown.add_row(one.study, one.case, *values, mark)
    return shown


if __name__ == "__main__":
    sys.exit(main())
