"""The command line, as a user sees it."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import brandla
from brandla.cli import main
from brandla.demo.commands import app
from brandla_kernels import OPS


def test_no_command_lists_the_commands_and_an_option_prints_the_version(capsys):
    main([])
    shown = capsys.readouterr().out
    assert "info" in shown
    assert "demo" in shown
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"brandla {brandla.__version__}\n"


def test_info_names_the_backend_of_every_op(capsys):
    main(["info"])
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    backends = {words[0]: words[1:3] for words in lines if words and words[0] in OPS}
    assert backends == {name: ["torch", "(1)"] for name in OPS}
    reason = OPS["project"].implementation("cpu")[1]
    assert f"(1) {reason}" in shown
    main(["info", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["brandla"] == brandla.__version__
    assert facts["ops"] == {name: {"cpu": {"backend": "torch", "reason": reason}} for name in OPS}


@pytest.mark.parametrize("arguments", [["infos"], ["info", "--jason"], ["info", "x"], ["--verbose"]])
def test_unknown_words_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert arguments[-1] in capsys.readouterr().err


def test_only_the_demo_needs_its_extra():
    # numpy is not hidden: torch itself warns if it is absent, before any code of brandla runs.
    hidden = "dict.fromkeys(('typer', 'rich', 'matplotlib', 'sklearn', 'pandas'))"
    program = f"import sys; sys.modules.update({hidden}); from brandla.cli import main; main(['info']); main(['demo'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Backend of each op" in done.stdout
    assert done.stderr == (
        "brandla demo: matplotlib, pandas, rich, sklearn, typer not installed: pip install 'brandla[demo]'\n"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "abacus"], "torch cannot use 'abacus'"),
        (["--seeds", "0"], "--seeds"),
        (["--output", __file__], "--output"),
        (["--output", f"{__file__}/below"], "--output"),
    ],
)
def test_a_bad_option_is_refused_before_anything_runs(options, words):
    answer = CliRunner(env={"COLUMNS": "80", "TERM": "dumb"}).invoke(app, options)
    assert answer.exit_code == 2
    assert words in answer.output
