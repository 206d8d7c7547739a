"""Write ``docs/kfac-study.md`` and its pictures from the result files.

``--check`` writes nothing, and fails where page or pictures are not theirs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import pages, study_pages
from bench.facts import ROOT, commit_of
from bench.kfac_study import figures, summary, tables
from bench.kfac_study.images import PACKAGE, PARTS
from bench.kfac_study.methods import DECAY
from bench.kfac_study.record import STUDY, Record, of_content
from bench.kfac_study.settings import USUAL, Task
from bench.pages import table

PAGE = ROOT / "docs" / "kfac-study.md"
INTRODUCTION = """# K-FAC on real images

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
| SINGD | `InverseFree`, dense, moved every {singd_every} steps; `decay` {decay} |

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


def page(folder: Path) -> str:
    """Return the page for all machines under a folder."""
    paths = sorted(folder.glob(f"*/{STUDY}.json"))
    sections = [section for path in paths for section in of_file(_read(path), path.parent.name)]
    return "\n".join([INTRODUCTION, *(sections or ["Nothing has been measured yet.\n", *method(Record(USUAL))])])


def of_file(study: dict[str, Any], machine: str) -> Iterator[str]:
    """Yield the sections of one result file, which is in the folder of this name."""
    record, facts = of_content(study), study["facts"]
    place = facts["gpu"]["name"] if facts.get("gpu") else f"{facts['cpu']}, {facts['cores']} cores"
    yield f"## {place}\n"
    yield provenance(facts)
    if any(summary.methods(record, task.name) for task in record.settings.tasks):
        yield study_pages.picture(STUDY, machine, "Accuracy against steps and seconds, and seconds to the target")
    for task in record.settings.tasks:
        yield f"### {task.name}, to {tables.percent(task.target)}\n"
        if rows := list(tables.rows(record, task)):
            yield "\n".join([*(f"- {line}" for line in tables.verdict(record, task)), ""])
            yield table(tables.headings(task), rows)
        else:
            yield "No run was made.\n"
        if rows := list(tables.search_rows(record, task)):
            yield "The search:\n"
            headings = ["method", "ranges", "chosen", "best, middle and worst mean accuracy", "trials that failed"]
            yield table(headings, rows)
    yield from method(record)


def provenance(facts: dict[str, Any]) -> str:
    """Say where the figures come from, and what is missing."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    words = f"Threads: {facts['threads']}; {versions}; {commit_of(facts)}; {facts['date']};"
    words += f" {facts['seconds']:.0f} s in all."
    short = " A short run: its figures mean nothing." if facts["quick"] else ""
    left = " **Interrupted**: runs are missing." if facts["interrupted"] else ""
    return f"{words}{short}{left}\n"


def method(record: Record) -> Iterator[str]:
    """Yield what is measured, in words."""
    settings = record.settings
    names = ("clip", "rank", "renew_every", "overwrite_every", "singd_every", "trials")
    yield METHOD.format(
        tasks="\n".join(f"- {of_task(task)}" for task in settings.tasks),
        package=PACKAGE,
        parts=PARTS,
        decay=DECAY,
        seeds=len(settings.seeds),
        **{name: getattr(settings, name) for name in names},
    )


def of_task(task: Task) -> str:
    """Return a task in words."""
    network = (
        f"an MLP with two hidden layers of {task.width}"
        if task.network == "mlp"
        else f"convolutions of {task.width} and {2 * task.width} channels, and two Linear layers"
    )
    return (
        f"**{task.name}**: {network}, {task.steps} steps of {task.batch} images, to {tables.percent(task.target)};"
        f" trials of {task.search_steps} steps; looked at every {task.evaluate_every} steps."
    )


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def drawn(folder: Path, target: Path, *, check: bool) -> Iterator[Path]:
    """Yield the pictures that do not show what the result files say, drawn anew unless this is a check."""
    for path in sorted(folder.glob(f"*/{STUDY}.json")):
        study, place = _read(path), target / path.parent.name
        stale = figures.stale(study, place)
        if stale and not check:
            figures.write(study, place)
        yield from stale


def main(arguments: Sequence[str] | None = None) -> None:
    """Write page and pictures, or check them."""
    pages.main("bench.kfac_study.page", PAGE, lambda folder, output: {output: page(folder)}, drawn, arguments)


if __name__ == "__main__":
    main()
