"""Write ``docs/accuracy.md`` from the result file. ``--check`` writes nothing and fails where the page is not its."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import pages
from bench.accuracy import record, summary, tables
from bench.accuracy.record import Record
from bench.accuracy.settings import FULL
from bench.frame.facts import ROOT, commit_of
from bench.frame.pages import table

PAGE = ROOT / "docs" / "accuracy.md"

INTRODUCTION = """# Accuracy over a training run

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


def page(folder: Path) -> str:
    """Return the page for all machines under a folder."""
    sections = [
        section for path in sorted(folder.glob(f"*/{record.STUDY}.json")) for section in of_file(*record.read(path))
    ]
    return "\n".join([INTRODUCTION, *(sections or ["Nothing has been measured yet.\n", method(Record(FULL))])])


def of_file(machine: dict[str, Any], study: Record) -> Iterator[str]:
    """Yield the sections of one result file."""
    yield f"## {machine['cpu']}, {machine['cores']} cores\n"
    yield provenance(machine, study)
    yield "\n".join([*(f"- {line}" for line in tables.verdict(study)), ""])
    yield why(study)
    yield "![Errors over the steps, and errors over cost](accuracy-light.png#only-light)"
    yield "![Errors over the steps, and errors over cost](accuracy-dark.png#only-dark)\n"
    for width in summary.widths(study):
        yield f"### Width {width}\n"
        yield table(["tracker", *tables.headings()], tables.rows(study, width))
    yield method(study)


def provenance(machine: dict[str, Any], study: Record) -> str:
    """Say where the figures come from, and what is missing."""
    count = {width: summary.seeds(study, width) for width in summary.widths(study)}
    seeds = ", ".join(f"{number} seed{'s' if number > 1 else ''} at width {width}" for width, number in count.items())
    words = f"{seeds}; threads: {machine['threads']}, torch {machine['versions']['torch']}, {commit_of(machine)}."
    short = " A short run: its figures mean nothing." if machine["quick"] else ""
    left = " **Interrupted**: what is not named here was not measured." if study.interrupted else ""
    return f"{words}{short}{left}\n"


def why(study: Record) -> str:
    """Say what the quotients are at the steps at which RS has just been renewed, and at the others."""
    lines = ["The step's error over that of the best rank r, at the steps that renew RS and at the others (medians):\n"]
    headings = ["width", "RS renewed every", "RS, renewed", "B-R, at the same steps", "RS, not renewed", "B-R"]
    rows = []
    for width in summary.widths(study):
        r_s = next(one for one in study.trackers[width] if one.name == "RS")
        quotients = (
            summary.over_best_at(study, width, name, ("step", "error"), r_s, renewed)
            for renewed in (True, False)
            for name in ("RS", "B-R")
        )
        spelled = ["–" if one is None else f"{one:.2f}" for one in quotients]
        rows.append([str(width), f"{r_s.period} steps", *spelled])
    return "\n".join([*lines, table(headings, rows)])


def method(study: Record) -> str:
    """Return what was measured in words."""
    settings = study.settings
    part = {0.5: "half"}.get(settings.fraction, f"{100 * settings.fraction:g} %")
    return METHOD.format(part=part, **{name: getattr(settings, name) for name in settings.__dataclass_fields__})


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page, or check it."""
    pages.main("bench.accuracy.page", PAGE, lambda folder, output: {output: page(folder)}, arguments=arguments)


if __name__ == "__main__":
    main()
