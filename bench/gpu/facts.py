"""What the figures of a GPU were measured on."""

from __future__ import annotations

import re
import subprocess
from datetime import UTC, datetime
from importlib import metadata, util
from typing import Any

import torch

from bench.facts import commit_of
from brandla.demo import machine

STATE = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")


def facts(dry: bool, commit: str | None = None) -> dict[str, Any]:
    """Return machine, GPU, driver, versions, date and commit; ``commit`` serves where the checkout has no history."""
    found = machine.facts()
    versions = found["versions"] | {name: _version(name) for name in ("scipy", "pytest")}
    return found | {
        "versions": versions,
        "commit": found.get("commit", commit),
        "modified": found.get("modified"),
        "gpu": None if dry else _gpu(),
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


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "architecture": getattr(properties, "gcnArchName", f"sm_{properties.major}{properties.minor}"),
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cache_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        **_state(),
    }


def _state() -> dict[str, str | None]:
    """Return what nvidia-smi says of the GPU, as it is found; None where it does not."""
    command = ["nvidia-smi", f"--query-gpu={','.join(STATE)}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return dict.fromkeys(STATE)
    return dict(zip(STATE, (value.strip() for value in answer.splitlines()[0].split(",")), strict=False))


def _version(name: str) -> str | None:
    return metadata.version(name) if util.find_spec(name) else None
