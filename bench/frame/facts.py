"""What a result was measured on."""

from pathlib import Path
from typing import Any

import torch

from brandla.demo import machine

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "triton", "numpy", "scipy", "scikit-learn", "fbpca")
# The sources that a figure depends on: not the results themselves, nor the pages made of them.
SOURCES = ("brandla", "kernels", "bench", "tests/oracles.py", "constraints.txt", ":(exclude)bench/results")
STATE = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")


def facts(quick: bool, *, gpu: bool = False) -> dict[str, Any]:
    """Return machine, versions, threads, date, commit, whether the sources differ from it, and a measured GPU."""
    return machine.facts(PACKAGES, SOURCES) | ({"gpu": gpu_facts()} if gpu else {}) | {"quick": quick}


def gpu_facts() -> dict[str, Any]:
    """Return the GPU's properties and its state; the state is None where nvidia-smi does not answer."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    state = machine.said("nvidia-smi", f"--query-gpu={','.join(STATE)}", "--format=csv,noheader", "--id=0")
    return {
        "name": properties.name,
        "architecture": getattr(properties, "gcnArchName", f"sm_{properties.major}{properties.minor}"),
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cache_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        **(dict(zip(STATE, state.splitlines()[0].split(", "), strict=False)) if state else dict.fromkeys(STATE)),
    }


def machine_name(found: dict[str, Any]) -> str:
    return found["gpu"]["name"] if found.get("gpu") else f"{found['cpu']}, {found['cores']} cores"


def short_facts(found: dict[str, Any]) -> str:
    return f"{machine_name(found)}, {found['threads']} threads, torch {found['versions']['torch']}, {commit_of(found)}"


def facts_text(found: dict[str, Any]) -> str:
    words = [f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads"]
    if gpu := found.get("gpu"):
        driver = f"driver {gpu['driver_version']}, CUDA {gpu['cuda'] or gpu['hip']}"
        words.insert(0, f"{gpu['name']} ({gpu['architecture']}), {driver}")
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    return "; ".join([*words, versions, commit_of(found), found["date"]])


def commit_of(found: dict[str, Any]) -> str:
    if not found.get("commit"):
        return "no commit"
    return f"commit {found['commit'][:12]}" + (" with uncommitted changes" if found["modified"] else "")
