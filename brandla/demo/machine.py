"""What the figures were measured on."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import brandla

PACKAGES = ("torch", "triton", "numpy", "scikit-learn", "matplotlib")
SOURCES = ("brandla", "kernels")


def facts(packages: Sequence[str] = PACKAGES, sources: Sequence[str] = SOURCES) -> dict[str, Any]:
    """Return CPU, GPUs, versions, threads, load, date, and the commit of the sources."""
    built = dict(re.findall(r"\b(BLAS|LAPACK)_INFO=(\w+)", torch.__config__.show()))
    versions = {"brandla": brandla.__version__, "python": platform.python_version()}
    # The processor's name, as far as the system tells it.
    about = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.*\S)", about.read_text(encoding="utf-8") if about.exists() else "")
    return {
        "cpu": named[1] if named else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "platform": platform.platform(),
        "versions": versions | {name: version(name) for name in packages},
        **{part.lower(): built.get(part, "unknown") for part in ("BLAS", "LAPACK")},
        "threads": torch.get_num_threads(),
        # How many programs wanted to run in the last minute, on average, where the system says.
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **commit(sources),
    }


def version(package: str) -> str | None:
    """Return the version of a package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown" if importlib.util.find_spec(package) else None


def commit(sources: Sequence[str] = SOURCES) -> dict[str, Any]:
    """Return commit and whether the sources differ from it; None where this package is not tracked by git."""
    git = ("git", "-C", str(Path(__file__).parents[2]))
    # A virtual environment may lie inside somebody else's repository, whose commit would mean nothing here.
    tracked = said(*git, "ls-files", "--error-unmatch", "brandla/demo/machine.py")
    revision = None if tracked is None else said(*git, "rev-parse", "HEAD")
    changes = None if revision is None else said(*git, "status", "--porcelain", "--", *sources)
    return {"commit": revision, "modified": None if changes is None else bool(changes)}


def said(*command: str) -> str | None:
    """Return what a command printed; None where there is no such command, or it failed."""
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    return None
