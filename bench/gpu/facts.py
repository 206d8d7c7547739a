"""What the figures of a GPU were measured on."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from importlib import metadata, util
from typing import Any

from bench.frame.facts import commit_of, gpu_facts
from brandla.demo import machine


def facts(dry: bool, commit: str | None = None) -> dict[str, Any]:
    """Return machine, GPU, driver, versions, date and commit; ``commit`` serves where the checkout has no history."""
    found = machine.facts()
    versions = found["versions"] | {name: _version(name) for name in ("scipy", "pytest")}
    return found | {
        "versions": versions,
        "commit": found.get("commit", commit),
        "modified": found.get("modified"),
        "gpu": None if dry else gpu_facts(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "quick": dry,
    }


def slug(found: dict[str, Any]) -> str:
    """Return the folder name of a GPU."""
    name = found["gpu"]["name"] if found["gpu"] else "dry run"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def in_words(found: dict[str, Any]) -> str:
    """Return the facts in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    return f"{_device(found)}; {found['cpu']}, {found['cores']} cores; {versions}; {commit_of(found)}; {found['date']}"


def _device(found: dict[str, Any]) -> str:
    gpu = found["gpu"]
    if gpu is None:
        return "no GPU"
    return f"{gpu['name']} ({gpu['architecture']}), driver {gpu['driver_version']}, CUDA {gpu['cuda'] or gpu['hip']}"


def _version(name: str) -> str | None:
    return metadata.version(name) if util.find_spec(name) else None
