"""Write the figures of the documentation from the result files: answers, tables, pictures, CSV files, quotes.

Run by ``make docs-figures``. The prose of a page is written by hand; what stands between its marks is made anew, and so
is a number behind a mark of its own. ``--check`` writes nothing and fails where a file is not what the results say.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pandas as pd
import typer

from bench.benches import bench_kfac, cases
from bench.benches.problems import UPDATES
from bench.frame import pages, pictures, results
from bench.frame.facts import ROOT, commit_of, place
from bench.frame.figures import spelled
from bench.frame.pages import markdown
from bench.frame.pictures import bars
from bench.frame.study import application
from bench.gpu import frame
from bench.studies import accuracy, defaults, expand_reduce, kfac_images, kfac_page, roofline, scaling, streams
from brandla.demo import summary

Row = dict[str, Any]
Machines = dict[str, dict[str, Row]]

# Folder of the pages with a question each, and of the CSV files.
FOLDER = "measurements"
NOTHING, TOO_LITTLE = "Nothing has been measured yet.\n", "Too little has been measured to answer."
# Columns of result files that are the project's own aims.
TARGETS = ["at_most", "at_least", "met", "budget"]
# Rows of a table on a page; the CSV files have all.
MOST = 10
# What a block on a page is, up to the next end; and a number, behind the file, the table, the row and the column of it.
BLOCK = re.compile(r"(<!-- figures: (.+?) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
QUOTE = re.compile(r"(<!-- ([\w-]+)\.json (\w+): (.+?); ([^;]+?) -->)(–|\d[\d.e-]*\d|\d)")

LINK = re.compile(r"\]\((?!https?:|#)")


class Question(NamedTuple):
    """What answers a question from the first of its studies; all of them have CSV files on its page."""

    title: str
    answer: Callable[[Row], str]
    draw: pictures.Draw
    table: Callable[[Row], pd.DataFrame]
    studies: tuple[str, ...]


def asked(title: str, module: Any, *studies: str) -> Question:
    """Return the question that a module answers from the first of the studies."""
    draw = getattr(module, "draw", None) or partial(bars, module.chart, f"{studies[0]}.json")
    return Question(title, module.answer, draw, module.table, studies)


def of_functions(title: str, names: str | tuple[str, ...], *others: str) -> Question:
    """Return the question about functions whose names begin so."""
    answer, table, chart = (partial(each, names) for each in (cases.answer, cases.table, cases.chart))
    return Question(title, answer, partial(bars, chart, "functions.json"), table, ("functions", *others))


# What further studies have to show on the page of K-FAC.
SECTIONS: dict[str, Callable[[Row, str], Iterator[str]]] = {
    "defaults": defaults.section,
    "expand-reduce": expand_reduce.section,
}
# By page.
QUESTIONS = {
    "updates": asked("What does an update cost?", scaling, "scaling", "updates", "functions"),
    "randomized": of_functions("How fast is a randomized decomposition?", "randomized", "updates"),
    "applications": of_functions("What does a damped application cost?", ("damped", "kron_damped"), "scaling"),
    "kfac": asked("What does a step of K-FAC cost?", bench_kfac, "kfac", "demo", *SECTIONS),
    "ops": asked("How close do the ops come to the machine's ceilings?", roofline, "roofline", "ops", "launches"),
    "gpu": asked("How close do the kernels come to a GPU's ceilings?", roofline, "gpu"),
    "streams": asked("How accurate are the updates?", streams, "streams", "forms"),
    "accuracy": asked("How close are low-rank factors to exact ones in training?", accuracy, "accuracy"),
}
PAGES_OF_THEIR_OWN = {"kfac-study": kfac_page.page}
# Pictures, with their study: those of studies, and of questions.
DRAWN = {each.STUDY.name: (each.STUDY.name, each.STUDY.draw) for each in (kfac_images, expand_reduce)}
DRAWN |= {"kfac-cost": ("kfac-study", kfac_page.draw_costs), "kfac-width": ("kfac-study", kfac_page.draw_widths)}
DRAWN |= {name: (each.studies[0], each.draw) for name, each in QUESTIONS.items()}


def machines_of(folder: Path) -> Machines:
    found = {path.name: results.read(path) for path in sorted(folder.glob("*")) if path.is_dir()}
    for studies in found.values():
        if "gpu" in studies:
            studies["gpu"] = frame.roofline(studies["gpu"])
    return found


# --- Blocks of pages. Their links are as seen from docs/.


def of_question(name: str, machines: Machines) -> Iterator[str]:
    """Yield answer, picture, table and files, for each machine on which the question was measured."""
    question = QUESTIONS[name]
    measured = {machine: found for machine, found in machines.items() if question.studies[0] in found}
    for machine, found in measured.items():
        study = question.studies[0]
        if len(measured) > 1:
            yield f"## {place(found[study]['facts'])}\n"
        said = answered(name, found)
        yield said
        if TOO_LITTLE not in said:
            yield pages.picture(name, machine, f"{question.title} ({study}.json)")
        cells = question.table(found[study])
        if len(cells):
            of = f"{MOST} of {len(cells)} rows of" if len(cells) > MOST else "From"
            yield f"{markdown(cells.head(MOST))}\n{of} `{study}.json`.\n"
        present = [other for other in question.studies if other in found]
        for other in filter(SECTIONS.__contains__, present):
            yield from SECTIONS[other](found[other], machine)
            yield ""
        yield "All figures, with what they were measured on:\n"
        for other in present:
            links = [f"[{table}]({csv_of(machine, other, table)})" for table in tables(other, found[other])]
            yield f"- {pages.provenance(found[other]['facts'], f'{other}.json')} CSV: {', '.join(links) or 'none'}."
    if not measured:
        yield NOTHING


def answered(name: str, found: dict[str, Row]) -> str:
    content = found[QUESTIONS[name].studies[0]]
    return f"{QUESTIONS[name].answer(content) or TOO_LITTLE}{pages.caveats(content['facts'])}\n"


def overview(machines: Machines) -> Iterator[str]:
    """Yield all questions with their answers on the first machine that has one."""
    for name, question in QUESTIONS.items():
        study = question.studies[0]
        measured = [found for found in machines.values() if study in found][:1]
        yield f"## [{question.title}]({FOLDER}/{name}.md)\n"
        yield from (f"{answered(name, found)}\n`{study}.json`, {machine_of(found[study])}.\n" for found in measured)
        yield from [] if measured else [NOTHING]


def machine_of(content: Row) -> str:
    facts = content["facts"]
    return f"{place(facts)}, {facts['threads']} threads, torch {facts['versions']['torch']}, {commit_of(facts)}"


def demo(machines: Machines) -> Iterator[str]:
    """Yield the table of ``docs/start/first-kfac.md``: B-KFAC beside what people use."""
    for content in (content for content in contents("demo", machines) if content.get("runs")):
        trained = summary.training(content).set_index("method")
        trained = trained.loc[trained.index.intersection(["AdamW", "K-FAC", "B-KFAC"])].reset_index()
        settings, target = content["settings"], f"{100 * content['settings']['target']:g} %"
        names = {"accuracy, %": "test accuracy, %", "steps": f"steps to {target}", "memory": "memory / dense factors"}
        yield (
            f"`make demo` on digits, a network of width {settings['width']}, where a step of K-FAC is"
            f" expensive beside the network's own ({machine_of(content)}; `demo.json`):\n"
        )
        yield markdown(trained[["method", "accuracy, %", "steps", "seconds", "memory"]].rename(columns=names))


def among_optimizers(machines: Machines) -> Iterator[str]:
    """Yield the second picture of README."""
    for machine, found in [each for each in machines.items() if "kfac-study" in each[1]][:1]:
        yield kfac_page.readme(found["kfac-study"], machine)


def by_width(machines: Machines) -> Iterator[str]:
    """Yield the table of ``docs/switch-on.md``: a row a width and batch, a column a system, the quickest in bold."""
    for content in contents("kfac", machines):
        rows = bench_kfac.of_group(content, "a step by width")
        rows = rows.join(rows["case"].str.extract("(?P<layers>.*?): (?P<system>.*)"))
        values = rows.pivot_table("value", "layers", "system", sort=False)
        cells = values.map(spelled)
        yield markdown(cells.where(values.ne(values.min(axis=1), axis=0), "**" + cells + "**").reset_index())
        yield f"`make bench-kfac`, {machine_of(content)} (`kfac.json`)."


def times(machines: Machines) -> Iterator[str]:
    """Yield the table of ``docs/choose.md``: the sizes at which all was measured."""
    for content in contents("scaling", machines):
        cells = scaling.milliseconds(content, [*UPDATES, "damped_solve", "Cholesky solve", "torch.linalg.eigh"])
        yield markdown(cells[cells.ne("–").all(axis=1)].rename(columns="`{}`".format).reset_index())
        yield f"`make study-scaling`, {machine_of(content)} (`scaling.json`).{pages.caveats(content['facts'])}"


def contents(study: str, machines: Machines) -> list[Row]:
    """Return the file of the first machine that has it."""
    return [found[study] for found in machines.values() if study in found][:1]


# By mark.
BLOCKS: dict[str, Callable[[Machines], Iterator[str]]] = {
    "overview": overview,
    "demo": demo,
    "among optimizers": among_optimizers,
    "by width": by_width,
    "times": times,
    "clips": lambda machines: map(defaults.guide, contents("defaults", machines)),
}
BLOCKS |= {name: partial(of_question, name) for name in QUESTIONS}


def made(match: re.Match[str], machines: Machines, above: str) -> str:
    """Return a block made anew, on a page that is so far below docs/."""
    text = "\n".join(BLOCKS[match[2]](machines)).strip() or NOTHING.strip()
    return f"{match[1]}\n{LINK.sub(f']({above}', text)}\n\n{match[3]}"


def quoted(match: re.Match[str], machines: Machines) -> str:
    """Return a mark with its number: the largest of the column in the rows that have these entries."""
    mark, study, table, entries, column, _ = match.groups()
    wanted = [entry.partition("=")[::2] for entry in entries.split("; ")]
    rows = [row for content in contents(study, machines) for row in content.get(table, [])]
    values = [row[column] for row in rows if all(str(row.get(name)) == value for name, value in wanted)]
    values = [value[0] if isinstance(value, list) else value for value in values if value is not None]
    return mark + (f"{float(f'{max(values):.3g}'):g}" if values else "–")


# --- CSV files


def tables(study: str, content: Row) -> dict[str, pd.DataFrame]:
    """Return the tables of a result file."""
    if study == "demo":
        summaries = {"tracking": summary.tracking, "runs": summary.training}
        return {name: summarize(content) for name, summarize in summaries.items() if content.get(name)}
    return {name: flat(rows) for name, rows in content.items() if isinstance(rows, list) and rows}


def flat(rows: list[Row]) -> pd.DataFrame:
    """Return rows with an interval as three columns, without the project's aims."""
    cells, parts = pd.json_normalize(rows).drop(columns=TARGETS, errors="ignore"), []
    for name, column in cells.items():
        lists = column[column.map(lambda cell: isinstance(cell, list))]
        triples = len(lists) > 0 and lists.map(len).eq(3).all()
        names = [name, f"{name} low", f"{name} high"]
        parts.append(pd.DataFrame(lists.tolist(), lists.index, names) if triples else column)
    return pd.concat(parts, axis=1)


def csv_of(machine: str, study: str, table: str) -> str:
    return f"{FOLDER}/{machine}-{study}-{table}.csv"


# --- The command


def texts(machines: Machines, docs: Path) -> Iterator[tuple[Path, str]]:
    """Yield every page and CSV file with what it has to say; README lies beside the folder of the pages."""
    for path in filter(Path.exists, (docs.parent / "README.md", *docs.rglob("*.md"))):
        above = "../" * (len(path.relative_to(docs).parts) - 1) if docs in path.parents else ""
        block = partial(made, machines=machines, above=above)
        text = BLOCK.sub(block, path.read_text(encoding="utf-8"))
        yield path, QUOTE.sub(partial(quoted, machines=machines), text)
    for study, write in PAGES_OF_THEIR_OWN.items():
        yield docs / f"{study}.md", write({name: found[study] for name, found in machines.items() if study in found})
    if found := {name: studies["kfac-study"] for name, studies in machines.items() if "kfac-study" in studies}:
        yield docs / "kfac-study.csv", kfac_page.raw(found)
    for study in {study for question in QUESTIONS.values() for study in question.studies}:
        for machine, found in machines.items():
            for name, cells in tables(study, found[study]).items() if study in found else ():
                yield docs / csv_of(machine, study, name), cells.to_csv(index=False, lineterminator="\n")


def drawn(machines: Machines, docs: Path) -> Iterator[tuple[str, Row, Path, pictures.Draw]]:
    """Yield the pictures: name, content, folder, and what draws them where there is something to show."""
    for machine, found in machines.items():
        for name, (study, draw) in DRAWN.items():
            shows = QUESTIONS[name].answer if name in QUESTIONS else lambda content: content.get("runs")
            if draw and study in found and shows(found[study]):
                yield name, found[study], docs / pages.PICTURES / machine, draw


app = application(__doc__)


@app.command(help=__doc__)
def main(
    folder: Annotated[Path, typer.Option("--results", help="Folder with one folder a machine.")] = results.FOLDER,
    docs: Annotated[Path, typer.Option(help="Folder of the pages.")] = ROOT / "docs",
    check: Annotated[bool, typer.Option("--check", help="Fail where a file is not what the results say.")] = False,
) -> None:
    machines = machines_of(folder)
    wanted = dict(texts(machines, docs))
    changed = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    left_over = [path for path in (docs / FOLDER).glob("*.csv") if path not in wanted]
    old = [each for each in drawn(machines, docs) if pictures.stale(*each[:3])]
    if check:
        for path in [*changed, *left_over, *(pictures.path(name, pictures.THEMES[0], at) for name, _, at, _ in old)]:
            typer.echo(f"{path.name} is not what the result files say: run make docs-figures", err=True)
            raise typer.Exit(1)
    for path in left_over:
        path.unlink()
    for path in changed:
        path.write_text(wanted[path], encoding="utf-8")
    for each in old:
        pictures.write(*each)


if __name__ == "__main__":
    app()
