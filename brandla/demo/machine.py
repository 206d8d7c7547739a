"""What the figures were measured on."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import brandla

PACKAGES = ("torch", "triton", "numpy", "scikit-learn", "matplotlib")


def facts(packages: tuple[str, ...] = PACKAGES) -> dict[str, Any]:
    """Return CPU, GPUs, versions, threads, load, date and, in a git checkout of brandla, the commit."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "gpus": gpu_names(),
        "platform": platform.platform(),
        "versions": {"brandla": brandla.__version__, "python": platform.python_version(), **versions(packages)},
        "blas": linear_algebra()[0],
        "lapack": linear_algebra()[1],
        "threads": torch.get_num_threads(),
        "load": load(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **commit(),
    }


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    """Return the versions of the packages that matter here; None for one that is not installed."""
    return {name: _version(name) for name in packages}


def cpu_name() -> str:
    """Return the processor's name, as far as the system tells it."""
    description = Path("/proc/cpuinfo")
    if description.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", description.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found.group(1)
    return platform.processor() or platform.machine()


def gpu_names() -> list[str]:
    """Return the names of the GPUs that torch sees."""
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def load() -> float | None:
    """Return how many programs wanted to run in the last minute, on average, where the system says."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def linear_algebra() -> tuple[str, str]:
    """Return the BLAS and the LAPACK that torch was built with."""
    built = torch.__config__.show()
    found = [re.search(rf"{part}_INFO=(\w+)", built) for part in ("BLAS", "LAPACK")]
    blas, lapack = (match.group(1) if match else "unknown" for match in found)
    return blas, lapack


def commit() -> dict[str, Any]:
    """Return commit and whether files differ from it, where this package is tracked by git; empty elsewhere."""
    # A virtual environment may lie inside somebody else's repository, whose commit would mean nothing here.
    if _git("ls-files", "--error-unmatch", "machine.py") is None:
        return {}
    revision = _git("rev-parse", "HEAD")
    if revision is None:
        return {}
    # The code alone: a result file that was written before makes no other program.
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", "..", "../../kernels")
    return {"commit": revision, "modified": bool(changes)}


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown" if importlib.util.find_spec(name) else None
