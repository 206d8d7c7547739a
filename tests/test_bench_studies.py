"""The studies: a short run writes a file and tables, pages are made of them, and Ctrl-C keeps what was measured."""

import json
import re
import shutil
import signal
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from bench import report
from bench.frame import pictures, results
from bench.frame.study import INTERRUPTED, Study, command, sweep
from bench.studies import accuracy, defaults, expand_reduce, forms, kfac_images, roofline, scaling, streams
from brandla_kernels import OPS

LAYOUT = pictures.ConstrainedLayoutEngine
STUDIES = (scaling, roofline, accuracy, kfac_images)
# Dense decompositions take most of the time of a short run, and no test depends on their width.
NARROW = replace(accuracy.QUICK, widths=(48, 64), rank=8, batch=24)


def run(module, *options):
    """Run a study's command at toy sizes."""
    app = module.app if hasattr(module, "app") else command(module.STUDY, module.__doc__)
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["--quick", *options])


def measured(module, folder, *options):
    """Run a study at toy sizes, and return the contents of the folder's files."""
    answer = run(module, "--out", str(folder), *options)
    assert answer.exit_code == 0, answer.output
    assert "Written:" in answer.output
    return results.read(folder)


@pytest.fixture(scope="module", autouse=True)
def _coarse_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "DOTS", 30)
        patch.setattr(accuracy, "QUICK", NARROW)
        patch.setitem(accuracy.STUDY.sizes, "quick", NARROW)
        patch.setitem(scaling.STUDY.sizes, "quick", replace(scaling.TOY, r=(4,), k=(4,)))
        # The layout takes most of the time of a picture, so only one picture is drawn with it.
        patch.setattr(pictures, "ConstrainedLayoutEngine", lambda **options: None)
        yield


@pytest.fixture(scope="module")
def short_runs(tmp_path_factory):
    """Run studies at toy sizes, and return the folder of their files."""
    folder = tmp_path_factory.mktemp("results")
    for module in STUDIES:
        options = ["--only", "regression"] if module is kfac_images else []
        measured(module, folder / "toy", *options)
    return folder


def test_a_short_run_measures_everything_and_draws_it(short_runs):
    found = results.read(short_runs / "toy")
    assert set(found) == {"scaling", "roofline", "accuracy", "kfac-study"}
    for study in found.values():
        assert study["facts"]["quick"]
        assert study["facts"]["interrupted"] is False
    assert {row["method"] for row in found["scaling"]["rows"] if row["axis"] == "n"} == set(scaling.METHODS)
    assert {row["op"] for row in found["roofline"]["rows"]} == set(OPS)
    assert all(row["of_ceiling"][0] > 0 for row in found["roofline"]["rows"])
    assert {row["when"] for row in found["roofline"]["ceilings"]} == {"before", "after"}
    runs, settings = found["kfac-study"]["runs"], kfac_images.QUICK
    assert len(runs) == sum(method.installed for method in kfac_images.METHODS) * len(settings.seeds)
    assert all(row["failure"] is None for row in (*runs, *found["kfac-study"]["trials"]))


def test_no_tracker_is_better_than_the_best_of_its_rank(short_runs):
    """The norms are those of the Eckart–Young theorem."""
    rows = accuracy.settled(results.read(short_runs / "toy")["accuracy"])
    measures = [name for name in accuracy.MEASURES if name.endswith(("spectral", "trace"))]
    best = rows[rows["tracker"] == accuracy.BEST].set_index(["width", "seed", "step"])[measures]
    for tracker, own in rows.groupby("tracker"):
        assert (own.set_index(["width", "seed", "step"])[measures] >= best * (1 - 1e-4)).all(axis=None), tracker


def test_blocks_quotes_pictures_and_tables_are_made_of_the_files_and_checked(short_runs, tmp_path):
    docs = tmp_path / "docs"
    shutil.copytree(report.ROOT / "docs", docs, ignore=shutil.ignore_patterns("measured", "*.csv"))

    def invoke(*more):
        return CliRunner().invoke(report.app, ["--results", str(short_runs), "--docs", str(docs), *more])

    answer = invoke()
    assert answer.exit_code == 0, answer.output
    drawn = {path.name.removesuffix("-light.png") for path in (docs / "measured" / "toy").glob("*-light.png")}
    assert drawn == {"updates", "ops", "accuracy", "kfac-study", "kfac-cost", "kfac-width"}
    for name in report.QUESTIONS:
        question = report.PAGES[name]
        text = (docs / "measurements" / f"{name}.md").read_text(encoding="utf-8")
        assert ("Nothing has been measured yet." not in text) == (name in drawn)
        assert all(f"`{study}.json`" in text and "its figures mean nothing" in text for study in question.studies[:1])\
            or name not in drawn  # fmt: skip
    cells = pd.read_csv(docs / "measurements" / "toy-scaling-rows.csv")
    rows = results.read(short_runs / "toy")["scaling"]["rows"]
    assert cells["seconds"].tolist() == [row["seconds"][0] for row in rows]
    assert "## [What does an update cost?](../measurements/updates.md)" in (docs / "measurements/index.md").read_text()
    assert all(f"| {method.name} |" in (docs / "kfac-study.md").read_text("utf-8") for method in kfac_images.METHODS)
    # A figure that no file has leaves a dash.
    assert "; best_over_trace -->– |" in (docs / "choose.md").read_text(encoding="utf-8")
    assert invoke("--check").exit_code == 0
    # A picture of other figures does not pass, nor does a page that was edited.
    other = results.read(short_runs / "toy")["scaling"]
    other["rows"][0]["seconds"][0] *= 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "ConstrainedLayoutEngine", LAYOUT)
        pictures.write("updates", other, docs / "measured" / "toy", scaling.draw)
    assert "updates-light.png is not what" in invoke("--check").stderr
    page = docs / "measurements" / "accuracy.md"
    page.write_text(page.read_text(encoding="utf-8").replace("At width", "In width"), encoding="utf-8")
    answer = invoke("--check")
    assert (answer.exit_code, "accuracy.md is not what" in answer.stderr) == (1, True)


@pytest.mark.parametrize("part", [slice(0, 0), slice(0, 1), slice(0, None, 3), slice(1, None, 2)])
@pytest.mark.parametrize("name", [name for name in report.QUESTIONS if name != "gpu"])
def test_a_question_is_answered_from_a_part_of_a_file(name, part):
    (found,) = report.machines_of(results.FOLDER).values()
    cut = {
        study: {key: rows[part] if isinstance(rows, list) else rows for key, rows in content.items()}
        | {"facts": content["facts"] | {"interrupted": "rows"}}
        for study, content in found.items()
    }
    text, question = "\n".join(report.page_parts(name, {"some-machine": cut})), report.PAGES[name]
    assert "**Interrupted**" in text
    assert f"some-machine-{question.studies[0]}-" in text or part == slice(0, 0)
    answer = question.answer(cut[question.studies[0]])
    assert (report.TOO_LITTLE in text) == (answer == "")
    assert not re.search(r"\bnan\b|\binf\b", text)
    if answer:
        assert all(draw(cut[question.studies[0]], pictures.THEMES[0]).axes for _, draw in question.drawn.values())


@pytest.mark.parametrize("name", report.QUESTIONS)
def test_an_answer_has_two_sentences_and_a_table_ten_rows_at_most(name):
    for found in report.machines_of(results.FOLDER).values():
        question = report.PAGES[name]
        if question.studies[0] in found:
            answer = question.answer(found[question.studies[0]])
            assert len(re.findall(r"\.(?= [A-Z`]|$)", answer)) == 2
            text = "\n".join(report.page_parts(name, {"some-machine": found}))
            assert 3 <= text.split("All figures")[0].count("\n| ") <= 12


def test_without_a_result_the_pages_say_so_and_a_run_is_short_or_long(tmp_path):
    for page in (*(report.page_parts(name, {}) for name in report.PAGES), report.overview({})):
        assert "Nothing has been measured yet." in "\n".join(page)
    assert run(scaling, "--full", "--out", str(tmp_path)).exit_code == 2
    assert run(kfac_images, "--only", "cats", "--out", str(tmp_path)).exit_code == 2
    assert not list(tmp_path.iterdir())


@dataclass
class Toy:
    seeds: int = 3


def toy(measured, stop=None):
    """Return the command of a study that notes which pieces it measures; Ctrl-C comes halfway through ``stop``."""

    def measure(seed):
        measured.append(seed)
        yield {"step": 1}
        if seed == stop:
            signal.raise_signal(signal.SIGINT)
        yield {"step": 2}

    def pieces(settings, device, tables):
        return sweep("runs", ("seed",), [(seed,) for seed in range(settings.seeds)], measure)

    return SimpleNamespace(app=command(Study("toy", {"quick": Toy()}, pieces), "A study."))


def test_ctrl_c_ends_with_a_file_that_says_so_and_a_run_resumes_it_if_nothing_has_changed(tmp_path):
    def kept():
        found = results.read(tmp_path)["toy"]
        return found["facts"]["interrupted"], [(row["seed"], row["step"]) for row in found["runs"]]

    measured, to = [], ("--out", str(tmp_path))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    answer = run(toy(measured, stop=1), *to)
    signal.signal(signal.SIGINT, before)
    assert (answer.exit_code, "--resume goes on" in answer.output) == (INTERRUPTED, True)
    assert kept() == ("runs: seed 1", [(0, 1), (0, 2), (1, 1)])
    assert run(toy(measured), "--resume", *to).exit_code == 0
    assert kept() == (False, [(seed, step) for seed in range(3) for step in (1, 2)])
    assert measured == [0, 1, 1, 2]
    found = results.read(tmp_path)["toy"]
    for part, change, words in (
        ("settings", {"seeds": 7}, "other settings"),
        ("facts", {"commit": "another"}, "other versions"),
    ):
        other = found | {part: found[part] | change}
        (tmp_path / "toy.json").write_text(json.dumps(other), encoding="utf-8")
        answer = run(toy(measured), "--resume", *to)
        assert (answer.exit_code, words in answer.output) == (2, True)


@pytest.mark.parametrize(
    ("module", "tables"), [(streams, ("losses", "right_vectors", "dying_out")), (forms, ("losses", "streams"))]
)
def test_studies_of_figures_alone_are_tabulated(module, tables):
    pieces = list(module.pieces(True, None, {}))
    chosen = [next(piece for piece in pieces if piece.table == table) for table in tables]
    rows = {piece.table: [{**piece.key, **row} for row in piece.measure()] for piece in chosen}
    shown = dict(module.STUDY.shown(rows))
    assert set(tables) <= set(shown)
    text = "".join(cells.to_string() for cells in shown.values())
    assert all(str(value) in text for piece in chosen for value in piece.key.values() if module is forms)


def test_exponents_are_fitted_to_the_rows_of_a_method():
    shared = {"axis": "n", "method": "torch.linalg.eigh", "r": 1, "k": 1}
    rows = [
        {**shared, "n": n, "seconds": [1e-9 * n**3] * 3, "held_bytes": n**2, "peak_bytes": 3 * n**2}
        for n in (512, 1024, 2048, 4096, 8192, 16384)
    ]
    fits = scaling.exponents({"rows": rows})["exponents"]
    windows = [(of, *window) for window in (("all", 512), ("larger half", 4096)) for of in ("time", "memory")]
    assert [(fit["quantity"], fit["window"], fit["sizes"][0]) for fit in fits] == windows
    assert [fit["exponent"].value for fit in fits] == pytest.approx([3, 2, 3, 2])


def test_defaults_are_compared_and_a_run_goes_on(tmp_path, monkeypatch):
    """The run has two of the tasks, a transformer and a regression."""
    tasks = {name: defaults.TASKS[name] for name in ("letters transformer", "diabetes MLP")}
    monkeypatch.setattr(defaults, "TASKS", tasks)
    for options in ([], ["--resume"]):
        content = measured(defaults, tmp_path / "toy", *options)["defaults"]
    assert len(content["runs"]) == len(tasks) * len(defaults.METHODS)
    assert all(row["loss"] is not None for row in content["runs"])
    assert "| letters transformer |" in "".join(report.page_parts("defaults", {"toy": {"defaults": content}}))


def test_expand_and_reduce_are_compared(tmp_path):
    content = measured(expand_reduce, tmp_path / "toy")["expand-reduce"]
    assert all(look["loss"] is not None for row in content["runs"] for look in row["looks"])
    text = "".join(report.page_parts("expand-reduce", {"toy": {"expand-reduce": content}}))
    assert [task for task, *_ in expand_reduce.courses(content)] == content["settings"]["tasks"]
    for task, looks, target in expand_reduce.courses(content):
        assert f"#### {task['name']}, to " in text
        found = expand_reduce.summary(looks, target)
        assert set(found.index) == set(expand_reduce.METHODS) - (
            {"K-FAC, reduce"} if task["network"] == "nodes" else set()
        )
    assert len(expand_reduce.draw(content, pictures.THEMES[0]).axes) == len(content["settings"]["tasks"])


def test_a_graph_of_pixels_is_that_of_the_dense_adjacency():
    """The test averages the features of every bright pixel's neighbours."""
    torch.manual_seed(0)
    model, images = expand_reduce.Graphs(16, 8), torch.randn(3, 16)
    place = torch.arange(16)
    rows, columns = place // 4, place % 4
    near = ((rows[:, None] - rows).abs() <= 1) & ((columns[:, None] - columns).abs() <= 1) & ~torch.eye(16, dtype=bool)
    for image, found in zip(images, model(images), strict=True):
        bright = image > 0
        edges = near[bright][:, bright].float()
        one_hot = torch.nn.functional.one_hot
        nodes = torch.cat([image[:, None], one_hot(rows, 4), one_hot(columns, 4)], 1)[bright]
        for layer in model.layers:
            means = edges @ nodes / edges.sum(1, keepdim=True).clamp_min(1)
            nodes = layer.linear(torch.cat([nodes, means], 1)).relu()
        torch.testing.assert_close(model.head(nodes.mean(0)), found)
