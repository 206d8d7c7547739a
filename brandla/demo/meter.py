"""The progress bar, and the way a run is stopped: between two pieces of work, never inside one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Meter:
    """How much is done of a run; a console that is no terminal gets one line a stage, and no bar."""

    def __init__(self, console: Console, progress: Progress, total: float) -> None:
        self._console, self._progress = console, progress
        self._task = progress.add_task("starting", total=total)
        self.stopping = False

    def stage(self, description: str) -> None:
        """Say what is being done."""
        self._progress.update(self._task, description=description)
        if not self._console.is_terminal:
            self._console.print(description, highlight=False)

    def advance(self, cost: float = 1.0) -> None:
        """Count a finished piece of work; raise KeyboardInterrupt if Ctrl-C was pressed since the run began."""
        if self.stopping:
            raise KeyboardInterrupt
        self._progress.advance(self._task, cost)


@contextmanager
def metered(console: Console, total: float) -> Iterator[Meter]:
    """Show a bar for a run of this cost; Ctrl-C is raised by the next ``advance``, a second one at once."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), TaskProgressColumn(), TimeElapsedColumn())
    left = (TextColumn("left"), TimeRemainingColumn())
    quiet = not console.is_terminal
    with Progress(*columns, *left, console=console, expand=True, transient=True, disable=quiet) as progress:
        meter = Meter(console, progress, total)

        def stop(number: int, frame: FrameType | None) -> None:
            meter.stopping = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
            meter.stage("stopping")

        with _handling(stop):
            yield meter


@contextmanager
def _handling(stop: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    # Handlers can be set in the main thread alone; elsewhere no Ctrl-C arrives.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
