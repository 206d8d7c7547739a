"""The progress bar, and the way a run is stopped: between two pieces of work, never inside one."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Meter:
    """Shows how much of ``total`` is done; inside its ``with`` block, Ctrl-C is raised by the next :meth:`advance`.

    A second Ctrl-C is raised at once.

    Parameters
    ----------
    console
        Where to draw. A console that is no terminal gets one line a stage, and no bar.
    total
        Cost of the whole run, in the unit of :meth:`advance`.
    """

    def __init__(self, console: Console, total: float) -> None:
        self._console = console
        self._stopping = False
        self._previous: Any = None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=total)

    def __enter__(self) -> Meter:
        # Handlers can be set in the main thread alone; elsewhere no Ctrl-C arrives.
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._request_stop)
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def stage(self, description: str) -> None:
        """Say what is being done."""
        self._progress.update(self._task, description=description)
        if not self._console.is_terminal:
            self._console.print(description, highlight=False)

    def advance(self, cost: float = 1.0) -> None:
        """Count a finished piece of work.

        Raises
        ------
        KeyboardInterrupt
            If Ctrl-C was pressed since the block was entered.
        """
        if self._stopping:
            raise KeyboardInterrupt
        self._progress.advance(self._task, cost)

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._progress.update(self._task, description="stopping")
