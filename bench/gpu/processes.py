"""Commands with a time limit, whose children end with them."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from bench.frame.facts import ROOT

KEPT = 4000


class Finished(NamedTuple):
    """How a command ended: its exit status, None for one that was stopped, and what it printed."""

    status: int | None
    output: str

    @property
    def tail(self) -> str:
        """The end of the output."""
        return self.output[-KEPT:]


def run(command: Sequence[str], seconds: float, extra: Mapping[str, str] | None = None) -> Finished:
    """Run a command from the checkout, with both packages on the path, for at most this long."""
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | dict(extra or {})
    # A file and not a pipe: a grandchild that outlives its parent would keep a pipe open.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status: int | None = process.wait(timeout=max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return Finished(status, output.read())
