"""Result files: one folder a machine, one JSON a study."""

import json
import re
from pathlib import Path
from typing import Any

from bench.frame.facts import ROOT, machine_name
from brandla.demo import frame

FOLDER = ROOT / "bench" / "results"
# Short runs only show that everything works. Their figures mean nothing and stay out of version control.
QUICK_FOLDER = ROOT / ".benchmarks" / "quick"


def write(study: str, machine: dict[str, Any], content: dict[str, Any], folder: Path | None = None) -> Path:
    """Write a study's facts and figures, whole or not at all, to the machine's folder or another; return the path."""
    path = (folder or folder_of(machine)) / f"{study}.json"
    frame.write({"schema": 1, "facts": machine, **content}, path)
    return path


def folder_of(machine: dict[str, Any]) -> Path:
    """Return the folder of a machine's results."""
    name = re.sub(r"[^a-z0-9]+", "-", machine_name(machine).lower()).strip("-")
    return (QUICK_FOLDER if machine["quick"] else FOLDER) / name


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the studies in a machine's folder by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
