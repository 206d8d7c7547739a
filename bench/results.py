"""Result files: one folder a machine, one JSON a study."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from bench.facts import ROOT, slug

FOLDER = ROOT / "bench" / "results"

# Short runs show that everything works. Their figures mean nothing and are kept out of version control.
QUICK_FOLDER = ROOT / ".benchmarks" / "quick"


def write(study: str, machine: dict[str, Any], content: dict[str, Any], folder: Path | None = None) -> Path:
    """Write a study's figures beside its machine's facts, whole or not at all, and return the path.

    ``folder`` is that of the machine's processor unless another is named.
    """
    folder = folder or folder_of(slug(machine), machine["quick"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{study}.json"
    unfinished = path.with_suffix(".part")
    text = json.dumps(plain({"schema": 1, "facts": machine, **content}), indent=1, allow_nan=False, ensure_ascii=False)
    unfinished.write_text(text + "\n", encoding="utf-8")
    os.replace(unfinished, path)
    return path


def folder_of(machine: str, quick: bool) -> Path:
    """Return the folder of a machine's results."""
    return (QUICK_FOLDER if quick else FOLDER) / machine


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the studies of one machine by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def plain(value: Any) -> Any:
    """Return what JSON takes: floats of five digits, None for what is not a number."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value
