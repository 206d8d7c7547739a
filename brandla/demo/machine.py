"""What the figures were measured on."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
from collections.abc import Sequence
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
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "gpus": gpu_names(),
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


def cpu_name() -> str:
    """Return the processor's name, as far as the system tells it."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8").splitlines() if about.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def gpu_names() -> list[str]:
    """Return the names of the GPUs that torch sees."""
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


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
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
