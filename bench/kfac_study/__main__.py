"""The command line of the study; run by ``make study-kfac``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from threadpoolctl import threadpool_limits

from bench import study as studies
from bench.benches.cpu import device_of
from bench.kfac_study import figures, page, summary, tables
from bench.kfac_study.images import FOLDER, UnusableError, check
from bench.kfac_study.record import STUDY, Record
from bench.kfac_study.settings import FASHION, FULL, QUICK, USUAL, Settings
from bench.kfac_study.study import run_all, total
from bench.pages import PICTURES
from bench.study import INTERRUPTED
from brandla.demo.meter import Meter

UNUSABLE, WIDTH = 2, 230


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study; write the result file, the tables and the pictures."""
    options = _parser().parse_args(arguments)
    console = Console(highlight=False)
    chosen = studies.Options(options.quick, options.full, options.out)
    start, device = studies.prepare(chosen.quick), device_of(chosen.quick)
    record = Record(_settings(options))
    try:
        if any(task.images == FASHION for task in record.settings.tasks):
            check(options.data)
        with Meter(console, total(record.settings)) as meter, threadpool_limits(torch.get_num_threads()):
            run_all(record, options.data, str(device.tensors), meter)
    except UnusableError as error:
        print(f"python -m bench.kfac_study: {error}", file=sys.stderr)
        return UNUSABLE
    _show(record, console)
    path = studies.keep(STUDY, record.content(), device, chosen, start, console)
    # The committed pictures are those of the documentation.
    committed = not (chosen.quick or chosen.out)
    folder = page.PAGE.parent / PICTURES / path.parent.name if committed else path.parent
    for drawn in figures.write(json.loads(path.read_text(encoding="utf-8")), folder):
        console.print(f"Drawn: {drawn}", soft_wrap=True)
    return INTERRUPTED if record.interrupted else 0


def _show(record: Record, console: Console) -> None:
    # Wider than a narrow terminal, so that nothing is cut.
    wide = Console(highlight=False, width=max(console.width, WIDTH))
    for table in tables.of(record):
        wide.print(table)
    for task in record.settings.tasks:
        if summary.methods(record, task.name):
            console.print(f"{task.name}:", *tables.verdict(record, task), sep="\n  ", soft_wrap=True)


def _settings(options: argparse.Namespace) -> Settings:
    settings = QUICK if options.quick else FULL if options.full else USUAL
    if options.only is None:
        return settings
    return replace(settings, tasks=tuple(task for task in settings.tasks if task.images == options.only))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.kfac_study", description="K-FAC to an accuracy.")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="few steps: shows that the study runs, measures nothing")
    length.add_argument("--full", action="store_true", help="larger networks and longer runs, for a GPU")
    parser.add_argument("--only", choices=sorted({task.images for task in USUAL.tasks}), help="these images alone")
    parser.add_argument("--data", type=Path, default=FOLDER, help="folder of Fashion-MNIST's four files (%(default)s)")
    parser.add_argument("--out", type=Path, help="folder for file and pictures (bench/results/<machine>, docs)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
