"""The command line of ``make gpu``: the stages, their order, time and processes."""

import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from io import StringIO
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console

from bench.frame import results
from bench.frame.study import machine_of
from bench.gpu import frame, functions, ops, programs, tune
from bench.gpu.device import Gpu, Stub
from bench.gpu.frame import Findings
from brandla_kernels import OPS

STUDY = "gpu"
# Seconds kept for the end; the fewest for a stage; and those past its end after which a stage's process is killed.
RESERVE, LEAST, PATIENCE = 8.0, 5.0, 15.0
POLL = 0.5
# The server has imported everything and never touched the GPU, so a process forked from it starts in milliseconds.
CONTEXT: Any = multiprocessing.get_context("forkserver")
# If an import looks for a GPU, it must not touch one: no fork could use the GPU then.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
PRELOADED = ["triton", *(f"bench.gpu.{name}" for name in ("ops", "functions", "programs", "tune"))]


class Stage(NamedTuple):
    """A stage, the most seconds for it, and its cases if each has a process of its own, ``together`` at a time."""

    run: Callable[[Findings], None]
    most: float
    cases: Callable[[bool], list[str]] | None = None
    together: int = 1


STAGES = {
    "smoke": Stage(ops.smoke, 90, lambda dry: list(OPS), together=12),
    "ceilings": Stage(ops.ceilings, 20),
    "graph": Stage(functions.graphs, 90),
    "profile": Stage(functions.profile, 80),
    "core": Stage(ops.core, 40),
    "ops": Stage(ops.run, 110),
    "tests": Stage(programs.tests, 130, programs.cases, together=5),
    "sanitizer": Stage(programs.sanitize, 45),
    "tune": Stage(tune.run, 600),
}
app = typer.Typer(add_completion=False)


@app.command()
def main(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="take the same path on the CPU; measures nothing")] = False,
    only: Annotated[str, typer.Option(help="stages to run")] = ",".join(STAGES),
    minutes: Annotated[float, typer.Option(help="time for everything")] = 9.0,
    out: Annotated[Path | None, typer.Option(help="folder for the results ($OUT, else bench/results/<GPU>)")] = None,
    commit: Annotated[str | None, typer.Option(help="commit to record where the checkout has no history")] = None,
) -> None:
    """Test and measure on a GPU; the exit status is 1 if anything failed, 2 where nothing can run."""
    end = time.monotonic() + 60 * minutes - RESERVE
    names = [name.strip() for name in only.split(",")]
    if unknown := ", ".join(name for name in names if name not in STAGES):
        message = f"unknown stage {unknown!r}; choose from {', '.join(STAGES)}"
        raise typer.BadParameter(message)
    if not dry_run and not torch.cuda.is_available():
        print("python -m bench.gpu: torch sees no GPU; --dry-run takes the same path on the CPU", file=sys.stderr)
        raise typer.Exit(2)
    machine = machine_of(Stub() if dry_run else Gpu())
    machine["commit"] = machine["commit"] or commit
    with TemporaryDirectory() as scratch:
        folder = out or Path(scratch if dry_run else os.environ.get("OUT") or results.folder_of(machine))
        folder.mkdir(parents=True, exist_ok=True)
        # On SIGTERM this process ends its own processes too.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        sections = Run(machine, folder, end).stages(names)
    raise typer.Exit(int(any(section["status"] == "failed" for section in sections.values())))


class Run:
    """One run: the processes of the stages, their time, and the report, written anew whenever the record has grown."""

    def __init__(self, machine: dict[str, Any], folder: Path, end: float) -> None:
        self.machine, self.folder, self.end, self.dry = machine, folder, end, machine["quick"]
        self.path = folder / f"{STUDY}.jsonl"
        self.path.unlink(missing_ok=True)
        CONTEXT.set_forkserver_preload(PRELOADED)

    def stages(self, names: list[str]) -> dict[str, dict[str, Any]]:
        console = Console(width=frame.WIDTH, highlight=False)
        console.print(frame.heading(self.machine))
        for name in names:
            frame.write(self.path, name, "asked")
        for name in names:
            start = time.monotonic()
            seconds = self.end - start if self.dry else min(STAGES[name].most, self.end - start)
            if seconds < LEAST:
                frame.write(self.path, name, "skipped", f"{max(seconds, 0):.0f} s left, {LEAST:.0f} s wanted")
            else:
                self._stage(name, start + seconds)
            frame.write(self.path, name, "seconds", time.monotonic() - start)
            sections = self.report()
            console.print(frame.section(name, sections[name], self.dry))
        console.print(frame.verdict(self.machine, sections))
        console.print(f"written: {STUDY}.json, {STUDY}.txt and {STUDY}.jsonl in {self.folder}", soft_wrap=True)
        return sections

    def report(self) -> dict[str, dict[str, Any]]:
        sections = frame.sections(self.path)
        unfinished = {name: each["status"] for name, each in sections.items() if each["status"] != "done"}
        # The page reads ops and ceilings from the same tables as those of the roofline study.
        stages = {"rows": "ops", "ceilings": "ceilings"}
        tables = {name: sections.get(stage, {}).get("tables", {}).get(name, []) for name, stage in stages.items()}
        facts = self.machine | {"interrupted": ", ".join(map(": ".join, unfinished.items())) or False}
        results.write(STUDY, facts, {"sections": sections, **tables}, self.folder)
        text, parts = StringIO(), [frame.section(name, sections[name], self.dry) for name in sections]
        whole = (frame.heading(self.machine), *parts, frame.verdict(self.machine, sections))
        Console(width=frame.WIDTH, file=text, highlight=False).print(*whole, sep="\n")
        (self.folder / f"{STUDY}.txt").write_text(text.getvalue(), encoding="utf-8")
        return sections

    def _stage(self, name: str, end: float) -> None:
        """Run the processes of a stage. If one dies, another goes on after the case that it died in."""
        run, _, cases, together = STAGES[name]
        waiting = deque(cases(self.dry) if cases else [None])
        running: dict[Any, str | None] = {}
        reported = 0
        # At the toy sizes of a dry run, threads that wait for each other's cores would take a thousand times as long.
        threads = 1 if self.dry else max(1, (os.cpu_count() or 1) // together)
        with TemporaryDirectory() as logs:
            try:
                while waiting or running:
                    while waiting and len(running) < together:
                        case = waiting.popleft()
                        about = (run, self.dry, threads, Path(logs), self.path, name, end - time.monotonic(), case)
                        process = CONTEXT.Process(target=frame.run_stage, args=about)
                        process.start()
                        running[process] = case
                    wait([process.sentinel for process in running], timeout=POLL)
                    for process in list(running):
                        if not process.is_alive() or time.monotonic() >= end + PATIENCE:
                            case = running.pop(process)
                            if self._failed(name, process, case, Path(logs)) and time.monotonic() < end - LEAST:
                                waiting.append(case)
                    if reported != (reported := self.path.stat().st_size):
                        self.report()
            finally:
                for process in running:
                    _stop(process)

    def _failed(self, name: str, process: Any, case: str | None, logs: Path) -> bool:
        """Record the failure of a process, if it failed; return whether another process may have cases left."""
        _stop(process)
        if process.exitcode == 0:
            return False
        # The last case that began, if it did not end.
        marks = [mark for stage, *mark in frame.records(self.path) if stage == name and mark[0] in ("begin", "end")]
        last = case or next((value for kind, value in marks[-1:] if kind == "begin"), None)
        recorded = frame.sections(self.path)[name]["failures"]
        if last is None or all(failure["case"] != last for failure in recorded):
            log = logs / str(process.pid)
            # The trace of a crash comes first. A list of all loaded compiled modules follows.
            trace = log.read_text("utf-8", "replace").partition("Extension modules")[0] if log.exists() else ""
            half = frame.LONGEST // 2
            trace = trace if len(trace) <= 2 * half else f"{trace[:half]}\n…\n{trace[-half:]}"
            error = f"the process ended with status {process.exitcode}"
            frame.write(self.path, name, "failures", {"case": last or name, "error": error, "traceback": trace})
        if last is not None:
            frame.write(self.path, name, "end", last)
        return case is None and last is not None


def _stop(process: Any) -> None:
    """End a process: by SIGTERM, so that it ends its own processes too, and by force if it does not react."""
    process.terminate()
    process.join(3)
    process.kill()
    process.join()


if __name__ == "__main__":
    app()
