"""Write the figures of the documentation from the result files: answers, tables, pictures, CSV files, quotes.

Run by ``make docs-figures``. The prose of a page is written by hand. The blocks between its marks, and the numbers
behind marks of their own, are made anew. ``--check`` writes nothing, and fails if a file is not what the results say.
"""

import re
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pandas as pd
import typer

from bench.benches import bench_kfac
from bench.benches.bench_functions import Functions
from bench.benches.problems import UPDATES
from bench.frame import pages, pictures, results
from bench.frame.facts import ROOT, machine_name, short_facts
from bench.frame.figures import Row, formatted
from bench.frame.pages import markdown
from bench.frame.pictures import bars
from bench.frame.study import new_app
from bench.studies import accuracy, defaults, expand_reduce, kfac_page, roofline, scaling, streams
from brandla.demo import summary

Machines = dict[str, dict[str, Row]]

FOLDER = "measurements"  # folder of the CSV files and of the pages that answer one question each
NOTHING, TOO_LITTLE = "Nothing has been measured yet.\n", "Too little has been measured to answer."
TARGETS = ["at_most", "at_least", "met", "budget"]  # columns of result files with the project's own targets
MOST = 10  # the most rows of a table on a page; the CSV files have all
# A block on a page, up to the next end; and a number behind its file, table, row and column.
BLOCK = re.compile(r"(<!-- figures: (.+?) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
QUOTE = re.compile(r"(<!-- ([\w-]+)\.json (\w+): (.+?); ([^;]+?) -->)(–|\d[\d.e-]*\d|\d)")
LINK = re.compile(r"\]\((?!https?:|#)")


class Page(NamedTuple):
    """A page, or a part of one. It shows the first of its studies, and links the CSV files of all of them."""

    studies: tuple[str, ...]
    shown: Callable[[Row], Iterable[tuple[str, pd.DataFrame]]]
    drawn: Mapping[str, tuple[str, pictures.Draw]] = {}  # by the pictures' names: their words, and functions that draw
    answer: Callable[[Row], str] = lambda content: ""
    question: str = ""  # that the answer is for
    heading: str = ""  # mark of the headings above the tables

    def has_pictures(self, content: Row) -> bool:
        """Return whether enough was measured for pictures."""
        return bool(self.answer(content) if self.question else content.get("runs"))

    def answer_text(self, content: Row) -> str:
        answer = self.answer(content) or TOO_LITTLE * bool(self.question)
        return f"{answer}{pages.caveats(content['facts'])}\n"


def question_page(name: str, question: str, module: Any, *studies: str) -> Page:
    """Return the page of a question that a module answers from the first study."""
    draw = getattr(module, "draw", None) or partial(bars, module.chart, f"{studies[0]}.json")

    def shown(content: Row) -> Iterator[tuple[str, pd.DataFrame]]:
        if len(cells := module.table(content)):
            yield f"{min(MOST, len(cells))} of {len(cells)} rows of `{studies[0]}.json`:", cells.head(MOST)

    return Page(studies, shown, {name: (f"{question} ({studies[0]}.json)", draw)}, module.answer, question)


RANDOMIZED, DAMPED = Functions(("randomized",)), Functions(("damped", "kron_damped"))
QUESTIONS = {
    "updates": ("What does an update cost?", scaling, "scaling", "updates", "functions"),
    "randomized": ("How fast is a randomized decomposition?", RANDOMIZED, "functions", "updates"),
    "applications": ("What does a damped application cost?", DAMPED, "functions", "scaling"),
    "kfac": ("What does a step of K-FAC cost?", bench_kfac, "kfac", "demo"),
    "ops": ("How close do the ops come to the machine's ceilings?", roofline, "roofline", "ops", "launches"),
    "gpu": ("How close do the kernels come to a GPU's ceilings?", roofline, "gpu"),
    "streams": ("How accurate are the updates?", streams, "streams", "forms"),
    "accuracy": ("How close are low-rank factors to exact ones in training?", accuracy, "accuracy"),
}
COURSES = ("Test accuracy against steps, a panel for each task", expand_reduce.draw)
OF_KFAC = {
    "kfac-study": ("Seconds over steps to the target, as multiples of AdamW's", kfac_page.draw),
    "kfac-cost": ("Cost of a step over SGD's against the width", kfac_page.draw_costs),
    "kfac-width": ("Steps and seconds to a target against the width", kfac_page.draw_widths),
}
PAGES = {
    **{name: question_page(name, *about) for name, about in QUESTIONS.items()},
    "defaults": Page(("defaults",), defaults.shown, heading="####"),
    "expand-reduce": Page(("expand-reduce",), expand_reduce.shown, {"expand-reduce": COURSES}, heading="####"),
    "kfac-study": Page(("kfac-study",), kfac_page.shown, OF_KFAC, kfac_page.answer, heading="##"),
}


def machines_of(folder: Path) -> Machines:
    return {path.name: results.read(path) for path in sorted(folder.glob("*")) if path.is_dir()}


# --- Blocks of pages, with links relative to docs/


def page_parts(name: str, machines: Machines) -> Iterator[str]:
    """Yield answer, pictures, tables and files for each machine that has the page's first study."""
    page = PAGES[name]
    measured = {machine: studies for machine, studies in machines.items() if page.studies[0] in studies}
    for machine, studies in measured.items():
        content = studies[page.studies[0]]
        if len(measured) > 1:
            yield f"## {machine_name(content['facts'])}\n"
        yield page.answer_text(content)
        if page.has_pictures(content):
            yield from (pages.picture(drawn, machine, words) for drawn, (words, _) in page.drawn.items())
        for title, cells in [*page.shown(content), *(settings_of(content) if page.heading else [])]:
            yield f"{page.heading} {title}".strip() + f"\n\n{markdown(cells)}"
        yield "All figures, with what they were measured on:\n"
        for study in [study for study in page.studies if study in studies]:
            links = [f"[{table}]({csv_of(machine, study, table)})" for table in tables(study, studies[study])]
            yield f"- {pages.provenance(studies[study]['facts'], f'{study}.json')} CSV: {', '.join(links) or 'none'}."
    if not measured:
        yield NOTHING


def settings_of(content: Row) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield a table of a study's settings, and one of its tasks."""
    settings = [setting for setting in content["settings"].items() if setting[0] != "tasks"]
    yield "The settings", pd.DataFrame(settings, columns=["setting", "value"])
    if "tasks" in content["settings"]:
        yield "The tasks", pd.DataFrame(content["settings"]["tasks"])


def overview(machines: Machines) -> Iterator[str]:
    """Yield each question with its answer, from the first machine that has the study."""
    studies = ChainMap(*machines.values())
    for name in QUESTIONS:
        page, study = PAGES[name], PAGES[name].studies[0]
        yield f"## [{page.question}]({FOLDER}/{name}.md)\n"
        if study in studies:
            yield f"{page.answer_text(studies[study])}\n`{study}.json`, {short_facts(studies[study]['facts'])}.\n"
        else:
            yield NOTHING


# --- Blocks with one table of one study


def demo(content: Row) -> pd.DataFrame:
    """Return B-KFAC beside the usual methods."""
    trained = summary.training_table(content).query("method in ['AdamW', 'K-FAC', 'B-KFAC']")
    target = f"steps to {100 * content['settings']['target']:g} %"
    names = {"accuracy, %": "test accuracy, %", "steps": target, "memory": "memory / dense factors"}
    return trained[["method", "accuracy, %", "steps", "seconds", "memory"]].rename(columns=names)


def by_width(content: Row) -> pd.DataFrame:
    """Return a row for each width and batch, a column for each system, and the quickest in bold."""
    rows = bench_kfac.group_figures(content, "a step by width")
    rows = rows.join(rows["case"].str.extract("(?P<layers>.*?): (?P<system>.*)"))
    values = rows.pivot_table("value", "layers", "system", sort=False)
    cells = values.map(formatted)
    return cells.where(values.ne(values.min(axis=1), axis=0), "**" + cells + "**").reset_index()


def times(content: Row) -> pd.DataFrame:
    """Return the milliseconds at the sizes at which all methods were measured."""
    cells = scaling.milliseconds(content, [*UPDATES, "damped_solve", "Cholesky solve", "torch.linalg.eigh"])
    return cells[cells.ne("–").all(axis=1)].rename(columns="`{}`".format).reset_index()


# By the mark of the block: the target of make, the study, and the function that makes the table.
TABLES: dict[str, tuple[str, str, Callable[[Row], pd.DataFrame]]] = {
    "demo": ("demo", "demo", demo),
    "among optimizers": ("study-kfac", "kfac-study", kfac_page.readme),
    "by width": ("bench-kfac", "kfac", by_width),
    "times": ("study-scaling", "scaling", times),
}


def table_parts(name: str, machines: Machines) -> Iterator[str]:
    """Yield a table of the first machine that has the study."""
    target, study, table = TABLES[name]
    if content := ChainMap(*machines.values()).get(study):
        yield markdown(table(content))
        yield f"`make {target}`, {short_facts(content['facts'])} (`{study}.json`).{pages.caveats(content['facts'])}"


def quoted(match: re.Match[str], machines: Machines) -> str:
    """Return a mark with its number: the largest of the column in the rows with these entries."""
    mark, study, table, entries, column, _ = match.groups()
    wanted = [entry.partition("=")[::2] for entry in entries.split("; ")]
    rows = ChainMap(*machines.values()).get(study, {}).get(table, [])
    values = [row[column] for row in rows if all(str(row.get(name)) == value for name, value in wanted)]
    values = [value[0] if isinstance(value, list) else value for value in values if value is not None]
    return mark + (f"{float(f'{max(values):.3g}'):g}" if values else "–")


# --- CSV files


def tables(study: str, content: Row) -> dict[str, pd.DataFrame]:
    """Return the tables of a result file."""
    if study == "demo":
        summaries = {"tracking": summary.tracking_table, "runs": summary.training_table}
        return {name: summarize(content) for name, summarize in summaries.items() if content.get(name)}
    return {name: flat(rows) for name, rows in content.items() if isinstance(rows, list) and rows}


def flat(rows: list[Row]) -> pd.DataFrame:
    """Return rows with each interval as three columns, without the project's targets."""
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


def wanted_texts(machines: Machines, docs: Path) -> Iterator[tuple[Path, str]]:
    """Yield every page and CSV file with its text; README lies beside the folder of the pages."""
    for path in filter(Path.exists, (docs.parent / "README.md", *docs.rglob("*.md"))):
        above = "../" * (len(path.relative_to(docs).parts) - 1) if docs in path.parents else ""

        def block(match: re.Match[str], above: str = above) -> str:
            name, parts_of = match[2], page_parts if match[2] in PAGES else table_parts
            parts = overview(machines) if name == "overview" else parts_of(name, machines)
            text = "\n".join(parts).strip() or NOTHING.strip()
            return f"{match[1]}\n{LINK.sub(f']({above}', text)}\n\n{match[3]}"

        text = BLOCK.sub(block, path.read_text(encoding="utf-8"))
        yield path, QUOTE.sub(partial(quoted, machines=machines), text)
    for study in {study for page in PAGES.values() for study in page.studies}:
        for machine, studies in machines.items():
            for name, cells in tables(study, studies[study]).items() if study in studies else ():
                yield docs / csv_of(machine, study, name), cells.to_csv(index=False, lineterminator="\n")


def outdated(machines: Machines, docs: Path) -> Iterator[tuple[Path, Callable[[], Any]]]:
    """Yield every file that is not what the results say, and a function that mends it."""
    wanted = dict(wanted_texts(machines, docs))
    for path, text in wanted.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            yield path, partial(path.write_text, text, encoding="utf-8")
    yield from ((path, path.unlink) for path in list((docs / FOLDER).glob("*.csv")) if path not in wanted)
    for (machine, studies), page in product(machines.items(), PAGES.values()):
        content, at = studies.get(page.studies[0], {}), docs / pages.PICTURES / machine
        for name, (_, draw) in page.drawn.items() if content and page.has_pictures(content) else ():
            if pictures.stale(name, content, at):
                yield pictures.path(name, pictures.THEMES[0], at), partial(pictures.write, name, content, at, draw)


app = new_app(__doc__)


@app.command(help=__doc__)
def main(
    folder: Annotated[Path, typer.Option("--results", help="Folder with one folder a machine.")] = results.FOLDER,
    docs: Annotated[Path, typer.Option(help="Folder of the pages.")] = ROOT / "docs",
    check: Annotated[bool, typer.Option("--check", help="Fail where a file is not what the results say.")] = False,
) -> None:
    for path, mend in outdated(machines_of(folder), docs):
        if check:
            typer.echo(f"{path.name} is not what the result files say: run make docs-figures", err=True)
            raise typer.Exit(1)
        mend()


if __name__ == "__main__":
    app()
