"""The command line of the study; run by ``make study-accuracy``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.accuracy import figures, page, record, tables
from bench.accuracy.record import Record
from bench.accuracy.settings import FULL, QUICK
from bench.accuracy.study import run_all, total
from bench.frame import results
from bench.frame.facts import commit_of, facts, slug
from bench.frame.study import INTERRUPTED
from brandla.demo.meter import Meter

WIDTH = 150


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study; write the result file, the tables and the pictures."""
    options = _parser().parse_args(arguments)
    console, begin = Console(highlight=False), time.monotonic()
    settings = QUICK if options.quick else FULL
    if options.quick:
        # A short run leaves room for what else the machine does.
        torch.set_num_threads(1)
    machine = facts(options.quick)
    folder = options.out or (results.QUICK_FOLDER if options.quick else results.FOLDER) / slug(machine)
    study = Record(settings)
    if options.resume:
        try:
            study = _taken_up(study, machine, folder / f"{record.STUDY}.json")
        except ValueError as error:
            print(f"python -m bench.accuracy: {error}", file=sys.stderr)
            return 2
    with Meter(console, total(study)) as meter:
        run_all(study, meter)
    study.seconds += time.monotonic() - begin
    path = study.write(machine, folder)
    # Wider than a narrow terminal, so that nothing is cut.
    wide = Console(highlight=False, width=max(console.width, WIDTH))
    for table in tables.of(study):
        wide.print(table)
    console.print(*tables.verdict(study), sep="\n")
    # The committed pictures are those of the documentation.
    drawn = figures.draw(study, machine, folder if options.quick or options.out else page.PAGE.parent)
    for written in (path, *drawn):
        console.print(f"written: {written}", soft_wrap=True)
    if study.interrupted:
        console.print("interrupted: the file holds what was measured, and says so; --resume goes on")
    return INTERRUPTED if study.interrupted else 0


def _taken_up(study: Record, machine: dict[str, Any], path: Path) -> Record:
    """Return the study that a file has begun, if it is this one."""
    if not path.exists():
        return study
    before, begun = record.read(path)
    if begun.settings != study.settings:
        message = f"--resume: {path.name} has other settings; move it away"
        raise ValueError(message)
    same = ("commit", "modified", "cpu", "threads", "versions")
    if any(before[name] != machine[name] for name in same):
        message = f"--resume: {path.name} is of {commit_of(before)}, another machine or other versions; move it away"
        raise ValueError(message)
    return begun


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description="Errors of each tracker.")
    parser.add_argument("--quick", action="store_true", help="few steps: shows that the study runs, measures nothing")
    parser.add_argument("--resume", action="store_true", help="go on with the runs that an interrupted file lacks")
    parser.add_argument("--out", type=Path, help="folder for file and pictures (bench/results/<machine>, docs)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
