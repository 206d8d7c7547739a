"""The machine and the software on which figures are measured."""

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
    libraries = dict(re.findall(r"\b(BLAS|LAPACK)_INFO=(\w+)", torch.__config__.show()))
    versions = {"brandla": brandla.__version__, "python": platform.python_version()}
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.*\S)", cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else "")
    return {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "platform": platform.platform(),
        "versions": versions | {name: version(name) for name in packages},
        **{name.lower(): libraries.get(name, "unknown") for name in ("BLAS", "LAPACK")},
        "threads": torch.get_num_threads(),
        # The mean number of programs that wanted to run in the last minute, if the system tells it.
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **commit(sources),
    }


def version(package: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown" if importlib.util.find_spec(package) else None


def commit(sources: Sequence[str] = SOURCES) -> dict[str, Any]:
    """Return the commit, and whether the sources differ from it; None for both if git does not track this package."""
    git = ("git", "-C", str(Path(__file__).parents[2]))
    # A virtual environment may lie inside another repository, whose commit would mean nothing here.
    tracked = output_of(*git, "ls-files", "--error-unmatch", "brandla/demo/machine.py")
    revision = None if tracked is None else output_of(*git, "rev-parse", "HEAD")
    changes = None if revision is None else output_of(*git, "status", "--porcelain", "--", *sources)
    return {"commit": revision, "modified": None if changes is None else bool(changes)}


def output_of(*command: str) -> str | None:
    """Return what a command printed, or None if there is no such command or it failed."""
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    return None
