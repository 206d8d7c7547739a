"""The command line, as a user meets it."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import brandla
from brandla.cli import main
from brandla.demo.commands import app
from brandla_kernels import OPS

COMMAND = [sys.executable, "-m", "brandla"]
INTERRUPTED = 130
CURSOR_SHOWN, CURSOR_HIDDEN = b"\x1b[?25h", b"\x1b[?25l"


@pytest.fixture
def runner():
    return CliRunner(env={"COLUMNS": "80", "TERM": "dumb"})


def test_no_command_shows_the_commands_and_an_option_the_version(capsys):
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
    served = {words[0]: words[1:3] for words in lines if words and words[0] in OPS}
    assert served == {name: ["torch", "(1)"] for name in OPS}
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
    # Not numpy: torch itself warns of its absence, before anything of brandla runs.
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
def test_bad_option_is_refused_before_anything_runs(runner, options, words):
    answer = runner.invoke(app, options)
    assert answer.exit_code == 2
    assert words in answer.output


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_interrupt_keeps_what_was_measured_and_leaves_a_clean_terminal(tmp_path):
    import pty

    ours, theirs = pty.openpty()
    arguments = [*COMMAND, "demo", "--quick", "--device", "cpu", "--output", str(tmp_path)]
    environment = {**os.environ, "TERM": "xterm-256color"}
    # A shell lets what it runs in the background ignore Ctrl-C, and so its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(arguments, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        signal.signal(signal.SIGINT, before)
        os.close(theirs)
        shown = b""
        # Once a row is there.
        while not re.search(rb"tracking[^%]*[1-9]\d*%", shown):
            shown += os.read(ours, 4096)
        process.send_signal(signal.SIGINT)
        shown += read_to_the_end(ours)
    os.close(ours)
    assert process.returncode == INTERRUPTED
    assert b"Traceback" not in shown
    assert b"Tracked error" in shown
    assert b"Interrupted" in shown
    assert shown.rfind(CURSOR_SHOWN) > shown.rfind(CURSOR_HIDDEN) > -1
    assert json.loads((tmp_path / "demo.json").read_text())["facts"]["interrupted"]


def read_to_the_end(terminal):
    """Read a pseudo-terminal until its other end is closed, which Linux reports as an error."""
    chunks = []
    try:
        while chunk := os.read(terminal, 4096):
            chunks.append(chunk)
    except OSError:
        pass
    return b"".join(chunks)
