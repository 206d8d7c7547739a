"""Whether anything got worse: the result files here against the last committed ones of the same kind of machine.

Run by ``make bench-compare`` after a study has been run anew. Absolute times do not carry from run to run, so ratios
alone are compared: of each figure to a reference of its own run (the GEMMs of an update, a product, the ceilings). A
regression is a figure that is worse by more than the noise and whose 95 % interval does not meet the old one. The exit
code is then 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from bench import results
from bench.facts import ROOT, commit_of
from bench.figures import spelled
from bench.timing import Interval

# Changes that are none. Figures and references of `updates` are timed in turn, many times; those of `scaling` in turn,
# fewer times, and small calls are more in the hands of the machine than GEMMs; the ceilings of `roofline` once for all
# ops, the products around a case of `functions` and `ops` before and after it.
NOISE = {"updates": 0.1, "scaling": 0.3, "roofline": 0.3, "functions": 0.3, "ops": 0.3}
# Methods whose times are not ours to watch.
PEERS = ("torch.", "Cholesky")
# An exponent below this says that nothing grew; such numbers are not divided by one another.
MEANINGFUL = 0.5
Row = dict[str, Any]


class Ratio(NamedTuple):
    """A figure over the reference of its own run."""

    interval: Interval
    more_is_better: bool


class Change(NamedTuple):
    """A figure of two runs: how many times as good the new one is, and whether that is a regression."""

    study: str
    case: str
    old: Interval
    new: Interval
    factor: float
    regression: bool


# ---------------------------------------------------------------------------------------------------------------------
# The ratios of a study
# ---------------------------------------------------------------------------------------------------------------------


def of_updates(study: Row) -> Iterator[tuple[str, Ratio]]:
    """Yield the figures in which times of one run are divided by one another."""
    for row in study["figures"]:
        if row.get("unit") in ("×", ""):
            interval = Interval(row["value"], row.get("low", row["value"]), row.get("high", row["value"]))
            more = "at_least" in row or row["case"].endswith("times faster")
            yield f"{row['group']}: {row['case']}", Ratio(interval, more)


def of_scaling(study: Row) -> Iterator[tuple[str, Ratio]]:
    """Yield all times over the GEMMs of an update, all memory over the factor and its columns, and the exponents."""
    own = lambda rows: (row for row in rows if not row["method"].startswith(PEERS))
    for row in own(study["rows"]):
        case = f"{row['method']}, growth with {row['axis']}: n {row['n']}, r {row['r']}, k {row['k']}"
        yield case, Ratio(Interval(*row["over_reference"]), more_is_better=False)
        memory = (row["held_bytes"] + row["peak_bytes"]) / (4 * row["n"] * (row["r"] + row["k"]))
        yield f"memory of {case}", Ratio(Interval(memory, memory, memory), more_is_better=False)
    for fit in own(study["exponents"]):
        words = f"{fit['method']}: exponent of {fit['quantity']} in {fit['axis']}, {fit['window']} sizes"
        if fit["exponent"][1] is not None and fit["exponent"][0] > MEANINGFUL:
            yield words, Ratio(Interval(*fit["exponent"]), more_is_better=False)


def of_roofline(study: Row) -> Iterator[tuple[str, Ratio]]:
    """Yield the parts of the ceilings."""
    for row in study["rows"]:
        yield f"{row['op']}, {row['case']}", Ratio(Interval(*row["of_ceiling"]), more_is_better=True)


def of_cases(study: Row) -> Iterator[tuple[str, Ratio]]:
    """Yield the library's times over those of a product around them."""
    for row in study["rows"]:
        if row["by"].startswith("brandla"):
            yield f"{row['by']}: {row['group']}", Ratio(Interval(*row["over_reference"]), more_is_better=False)


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


def changes(name: str, old: Row, new: Row, noise: float) -> Iterator[Change]:
    """Yield the change of every figure that both runs have."""
    before, after = dict(RATIOS[name](old)), dict(RATIOS[name](new))
    for case, ratio in before.items():
        if case in after:
            yield _change(name, case, ratio, after[case], noise)


def _change(name: str, case: str, old: Ratio, new: Ratio, noise: float) -> Change:
    factor = new.interval.value / old.interval.value
    apart = new.interval.high < old.interval.low
    if not old.more_is_better:
        factor = 1 / factor
        apart = new.interval.low > old.interval.high
    return Change(name, case, old.interval, new.interval, factor, apart and factor < 1 / (1 + noise))


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
    parser.add_argument("--noise", type=float, help="change that is none, in place of that of each study (0.1: 10 %%)")
    chosen = parser.parse_args(arguments)
    console, found = Console(highlight=False), []
    for machine, name, old, new in pairs(chosen.new, chosen.old):
        reason = why_not(old, new)
        if old is None or reason is not None:
            console.print(f"{machine}, {name}: {reason}")
            continue
        noise = NOISE[name] if chosen.noise is None else chosen.noise
        own = list(changes(name, old, new, noise))
        runs = f"{commit_of(old['facts'])} and {commit_of(new['facts'])}"
        console.print(f"{machine}, {name}: {len(own)} ratios of {runs}; noise {100 * noise:g} %")
        found.extend(own)
    worse = [one for one in found if one.regression]
    if found:
        console.print(table(sorted(found, key=lambda one: one.factor), worse))
    console.print(f"{len(worse)} of {len(found)} ratios got worse.")
    return 1 if worse else 0


SHOWN = 8


def table(found: Sequence[Change], worse: Sequence[Change]) -> Table:
    """Return the regressions and the largest changes either way."""
    shown = Table("study", "case", "old", "new", "times as good", "", title="Ratios, the worst change first")
    ends = [*worse, *(one for one in (*found[:SHOWN], *found[-SHOWN:]) if one not in worse)]
    for one in sorted(dict.fromkeys(ends), key=lambda one: one.factor):
        mark = "[red]regression[/red]" if one.regression else ""
        intervals = (f"{spelled(run.value)} ({spelled(run.low)} to {spelled(run.high)})" for run in (one.old, one.new))
        shown.add_row(one.study, one.case, *intervals, f"{one.factor:.2f}", mark)
    return shown


if __name__ == "__main__":
    sys.exit(main())
