"""The documentation runs and prints what it shows: README.md, docs/, and the examples in docstrings."""

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from typer.testing import CliRunner

import brandla
import brandla.kfac
import brandla_kernels
from bench import report
from brandla.kfac.capture.kinds import like

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
# A block, and its output if the page shows it. Other people's code, in blocks marked "py", does not run.
BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n+```output\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
README_LINES = 13

pytestmark = [
    pytest.mark.filterwarnings("ignore:KFAC. some factors are too small"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


@pytest.fixture(autouse=True)
def _own_kinds_and_randomness(monkeypatch):
    # Kinds that the examples register are forgotten after the test.
    monkeypatch.setattr(like, "_REGISTERED", {})
    # The examples draw from the global generator, which other tests may have seeded for themselves.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def blocks(page):
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def name_of(page):
    return str(page.relative_to(ROOT))


def modules():
    """Return every module of the packages; importing a ``__main__`` would run the command line."""
    found = [
        module.name
        for package in (brandla, brandla_kernels)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    ]
    return [name for name in ("brandla", "brandla_kernels", *found) if not name.endswith("__main__")]


def run_benchmarks(namespace):
    """Call the benchmarks that a block defines once for each parameter, without timing, and count the calls."""
    functions = [value for name, value in namespace.items() if name.startswith("test_")]
    calls = [(one, *mark.args) for one in functions for mark in one.pytestmark]
    for function, name, values in calls:
        for value in values:
            function(benchmark=lambda call, *args, **kwargs: call(*args, **kwargs), **{name: value})
    return len(calls)


@pytest.mark.parametrize("index", range(len(blocks(ROOT / "README.md"))))
def test_each_example_of_the_readme_runs_by_itself(index):
    source, _ = blocks(ROOT / "README.md")[index]
    namespace = {"__name__": "readme"}
    exec(compile(source, "README.md", "exec"), namespace)
    assert ("benchmark" in source) == (run_benchmarks(namespace) > 0)
    assert len([line for line in source.splitlines() if line.strip()]) <= README_LINES


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_examples_of_a_page_run_in_their_order_and_print_what_is_shown(page):
    namespace = {"__name__": page.stem}
    for source, shown in blocks(page):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(source, str(page), "exec"), namespace)
        if shown:
            assert printed.getvalue() == shown
    run_benchmarks(namespace)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_is_written_as_the_site_takes_it(page, formulas):
    """It describes itself, is in the navigation, shows an output behind the code that prints it; formulas are MathML.

    Markdown takes a line that begins with a quoted figure for a block of its own, and ends the paragraph before it.
    """
    text = page.read_text(encoding="utf-8")
    assert re.match(r"---\ndescription: (\"|(?!.*: )).{30,160}\n", text)
    assert f" {page.relative_to(ROOT / 'docs')}\n" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert text.count("```output\n") == sum(bool(shown) for _, shown in blocks(page))
    assert not re.search(r"^\s*<!-- [\w-]+\.json ", text, re.MULTILINE)
    for source in re.findall(r"^```formula\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        shown = "".join(ElementTree.fromstring(formulas["fence"](source)).itertext())
        assert not re.search(r"[ᵀ⁻⁺¹²₀₁ᵢⱼ_{}\u0302]", shown)


@pytest.fixture(scope="module")
def formulas():
    return runpy.run_path(str(ROOT / "docs/_tools/formulas.py"))


def test_scripts_in_sentences_are_lowered_and_raised_and_code_stays(formulas):
    shown = formulas["on_page_content"](
        "<p>‖M‖_F², λ_G, n^0.89. <code>gram_ema_ x_y^2</code> root_update d_{r+1}^(−½)</p>"
    )
    code = "<code>gram_ema_ x_y^2</code> root_update"
    wanted = f"‖M‖<sub>F</sub>², λ<sub>G</sub>, n<sup>0.89</sup>. {code} d<sub>r+1</sub><sup>−½</sup>"
    assert shown == f"<p>{wanted}</p>"
    assert formulas["on_page_markdown"]("M̂_{τ}, `M̂_x` and M̂_a") == r"M̂\_{τ}, `M̂_x` and M̂\_a"


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings_give_what_they_say(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=name_of)
def test_links_and_pictures_exist_and_those_of_measurements_name_their_file(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"(?<!!)\[[^\]]*\]\(([^)#:\s]+)(?:#[^)]*)?\)", text)
    pictures = re.findall(r"!\[([^\]]*)\]\(([^)#\s]+)", text) + re.findall(r'<img alt="([^"]*)" src="([^"]*)"', text)
    targets = links + [target for _, target in pictures]
    assert [target for target in targets if not (page.parent / target).exists()] == []
    measured = [words for words, target in pictures if "measured/" in target]
    assert all(".json" in words for words in measured) or page.stem in text.partition(".json")[0]


@pytest.mark.parametrize(("page", "package"), [("api", brandla), ("api-kfac", brandla.kfac)])
def test_every_public_name_is_in_the_reference_and_has_an_example(page, package):
    text = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")
    named = re.findall(r"^(?:        - |::: [\w.]+\.)(\w+)$", text, re.MULTILINE)
    assert set(package.__all__) - set(named) <= {"grouped"}
    # A system of one's own takes a page, and the columns of a Laplacian come from the function that makes them.
    without = {"Strategy", "Columns"} if package is brandla.kfac else set()
    assert {name for name in package.__all__ if ">>>" not in (getattr(package, name).__doc__ or "")} == without


def test_pages_that_the_code_refers_to_exist():
    sources = [path for folder in ("brandla", "kernels") for path in (ROOT / folder).rglob("*.py")]
    named = {page for path in sources for page in re.findall(r"docs/[\w/-]+\.md", path.read_text(encoding="utf-8"))}
    assert named
    assert {page for page in named if not (ROOT / page).exists()} == set()


def test_figures_of_the_documentation_are_those_of_the_result_files():
    """Blocks, quotes, pictures and CSV files are generated: an edit by hand, or a new result file alone, shows here."""
    done = CliRunner().invoke(report.app, ["--check"])
    assert done.exit_code == 0, done.stderr
