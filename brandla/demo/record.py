"""The JSON of all figures."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from brandla.demo.results import Results
from brandla.demo.summary import summarize_memory, summarize_tracking, summarize_training

SCHEMA = 1

_NUMBERS = re.compile(r"\[[-+.,\deE\snul]+\]")


def record(results: Results) -> dict[str, Any]:
    """Return all figures as JSON takes them: numbers of six digits, None for what is not a number."""
    tree = {"schema": SCHEMA, **asdict(results)}
    if results.tracking is not None:
        summary = summarize_tracking(results.tracking, results.settings)
        tree["tracking"]["summary"] = [asdict(one) for one in summary]
    tree["training"]["summary"] = [asdict(one) for one in summarize_training(results.training, results.settings)]
    tree["training"]["memory_summary"] = [asdict(one) for one in summarize_memory(results.training)]
    plain = _plain(tree)
    assert isinstance(plain, dict)
    return plain


def write(results: Results, path: Path) -> None:
    """Write the figures to ``path``, whole or not at all."""
    unfinished = path.with_name(path.name + ".part")
    text = json.dumps(record(results), indent=1, allow_nan=False)
    unfinished.write_text(_NUMBERS.sub(_on_one_line, text) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def _on_one_line(numbers: re.Match[str]) -> str:
    return "[" + " ".join(numbers.group()[1:-1].split()) + "]"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
