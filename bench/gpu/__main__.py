"""The command line: which sections, in which time, written where."""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.frame import results
from bench.gpu import ceilings, facts, graph, grouped, ops, profiles, report, sanitizer, tests, tune, updates
from bench.gpu.device import Device, Gpu, Stub
from bench.gpu.findings import Bench, Deadline, Findings
from bench.gpu.sizes import FULL, TOY
from brandla.demo.frame import plain

STUDY = "gpu"
# Seconds kept for the end; and those past the limit after which a call that hangs is ended, with a traceback.
RESERVE, PATIENCE = 8.0, 30.0
NOT_DONE = {"figures": [], "tables": {}, "notes": [], "skipped": [], "failures": [], "seconds": 0.0}


class Section(NamedTuple):
    """A section, the seconds without which it is not begun, and the most it may take."""

    run: Callable[[Bench, Findings, Deadline], None]
    least: float
    most: float


SECTIONS = {
    "tests": Section(tests.run, 20, 150),
    "sanitizer": Section(sanitizer.run, 15, 45),
    "ceilings": Section(ceilings.run, 5, 20),
    "ops": Section(ops.run, 15, 120),
    "updates": Section(updates.run, 15, 60),
    "graph": Section(graph.run, 8, 25),
    "grouped": Section(grouped.run, 10, 30),
    "profile": Section(profiles.run, 15, 45),
    "tune": Section(tune.run, 15, 600),
}


@dataclass
class Record:
    """What is written after every section."""

    machine: dict[str, Any]
    folder: Path | None
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)

    def keep(self, name: str, section: dict[str, Any]) -> None:
        """Take up a section, and write everything anew."""
        self.sections[name] = plain(section)
        if self.folder is not None:
            results.write(STUDY, self.machine, {"sections": self.sections}, self.folder)
            (self.folder / f"{STUDY}.txt").write_text(report.text(self.machine, self.sections), encoding="utf-8")

    def take_up(self) -> None:
        """Go on with a record that another process has begun."""
        if self.folder is not None:
            self.sections = json.loads((self.folder / f"{STUDY}.json").read_text(encoding="utf-8"))["sections"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections asked for; return 1 if any failed, 2 where they cannot run."""
    options = _parser().parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("python -m bench.gpu: torch sees no GPU; --dry-run takes the same path on the CPU", file=sys.stderr)
        return 2
    time_left = Deadline(60 * options.minutes - RESERVE)
    device = Stub() if options.dry_run else Gpu()
    machine = facts.facts(options.dry_run, options.commit)
    record = Record(machine, _folder(options, machine))
    if options.continued:
        record.take_up()
    console = report.console()
    console.print(report.heading(machine))
    if not options.dry_run:
        faulthandler.dump_traceback_later(60 * options.minutes + PATIENCE, exit=True)
    try:
        broken = _run(options.only, Bench(device, TOY if options.dry_run else FULL), record, time_left, console)
    finally:
        faulthandler.cancel_dump_traceback_later()
    if broken:
        return _go_on(options, broken, time_left, record)
    console.print(report.verdict(machine, record.sections))
    if record.folder is not None:
        console.print(f"written: {STUDY}.json and {STUDY}.txt in {record.folder}")
    return int(any(section["status"] == "failed" for section in record.sections.values()))


def _run(names: list[str], bench: Bench, record: Record, time_left: Deadline, console: Any) -> list[str]:
    """Run sections in order; where one breaks the device, return the ones left."""
    for place, name in enumerate(names):
        record.keep(name, NOT_DONE | {"status": "started"})
        found = _section(name, bench, time_left)
        record.keep(name, found.record())
        console.print(report.section(name, record.sections[name], bench.device.dry))
        if not _answers(bench.device):
            return names[place + 1 :]
    return []


def _section(name: str, bench: Bench, time_left: Deadline) -> Findings:
    section, found, start = SECTIONS[name], Findings(), time.monotonic()
    if time_left.left() < section.least:
        found.skipped.append(f"{time_left.left():.0f} s left, {section.least:.0f} s wanted")
        return found
    try:
        section.run(bench, found, time_left.within(section.most))
    except Exception as error:
        found.failures.append({"case": name, "error": str(error)[:200], "traceback": traceback.format_exc()})
    found.seconds = time.monotonic() - start
    return found


def _answers(device: Device) -> bool:
    try:
        device.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def _go_on(options: argparse.Namespace, names: list[str], time_left: Deadline, record: Record) -> int:
    """Run what is left in a new process: an access out of bounds leaves nothing usable in this one."""
    minutes = (time_left.left() + RESERVE) / 60
    command = [sys.executable, "-m", "bench.gpu", "--only", ",".join(names), "--minutes", f"{minutes:.3f}"]
    command += ["--out", str(record.folder), "--continued"]
    command += ["--commit", options.commit] if options.commit else []
    return subprocess.run(command, check=False).returncode or 1


def _folder(options: argparse.Namespace, machine: dict[str, Any]) -> Path | None:
    if options.out or options.dry_run:
        return Path(options.out) if options.out else None
    return Path(os.environ["OUT"]) if os.environ.get("OUT") else results.FOLDER / facts.slug(machine)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Tests and measurements on a GPU.")
    parser.add_argument("--dry-run", action="store_true", help="take the same path on the CPU; measures nothing")
    parser.add_argument("--only", type=_names, default=list(SECTIONS), help=f"sections, of {','.join(SECTIONS)}")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything (9)")
    parser.add_argument("--out", help="folder for the results ($OUT, else bench/results/<GPU>)")
    parser.add_argument("--commit", help="commit to record where the checkout has no history")
    parser.add_argument("--continued", action="store_true", help=argparse.SUPPRESS)
    return parser


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in SECTIONS]
    if unknown or not names:
        message = f"unknown section {', '.join(unknown) or repr(text)}; choose from {', '.join(SECTIONS)}"
        raise argparse.ArgumentTypeError(message)
    return names


if __name__ == "__main__":
    sys.exit(main())
