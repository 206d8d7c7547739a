"""What a result was measured on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch

from brandla.demo.machine import cpu_name, linear_algebra

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "brandla")
# Named where they are installed.
OPTIONAL = ("fbpca", "cupy")

# What a figure depends on; the results themselves and the pages made of them are left out.
SOURCES = ("brandla", "kernels", "bench", "tests/oracles.py", "constraints.txt", ":(exclude)bench/results")


def facts(quick: bool) -> dict[str, Any]:
    """Return machine, versions, threads, date and, in a git checkout, the commit and whether the sources differ."""
    blas, lapack = linear_algebra()
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "blas": blas,
        "lapack": lapack,
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in _installed()},
        "commit": _git("rev-parse", "HEAD"),
        "modified": _is_modified(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "quick": quick,
    }


def slug(machine: dict[str, Any]) -> str:
    """Return the folder name of a machine: its processor and its cores."""
    name = re.sub(r"[^a-z0-9]+", "-", machine["cpu"].lower()).strip("-")
    return f"{name}-{machine['cores']}-cores"


def in_words(machine: dict[str, Any]) -> str:
    """Return the facts in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads; {versions}; {commit_of(machine)}"


def commit_of(machine: dict[str, Any]) -> str:
    """Return the commit in words."""
    if machine["commit"] is None:
        return "no commit"
    return f"commit {machine['commit'][:12]}" + (" with uncommitted changes" if machine["modified"] else "")


def _installed() -> tuple[str, ...]:
    # Builds of cupy are named after the version of CUDA that they are for; the module has one name.
    known = metadata.packages_distributions()
    return PACKAGES + tuple(known[name][0] for name in OPTIONAL if util.find_spec(name) and name in known)


def _is_modified() -> bool | None:
    changes = _git("status", "--porcelain", "--", *SOURCES)
    return None if changes is None else bool(changes)


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
