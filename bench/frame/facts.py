"""The machine, the versions and the commit that a result was measured with."""

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
    state = machine.output_of("nvidia-smi", f"--query-gpu={','.join(STATE)}", "--format=csv,noheader", "--id=0")
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


def machine_name(about: dict[str, Any]) -> str:
    return about["gpu"]["name"] if about.get("gpu") else f"{about['cpu']}, {about['cores']} cores"


def short_facts(about: dict[str, Any]) -> str:
    return f"{machine_name(about)}, {about['threads']} threads, torch {about['versions']['torch']}, {commit_of(about)}"


def facts_text(about: dict[str, Any]) -> str:
    words = [f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads"]
    if gpu := about.get("gpu"):
        driver = f"driver {gpu['driver_version']}, CUDA {gpu['cuda'] or gpu['hip']}"
        words.insert(0, f"{gpu['name']} ({gpu['architecture']}), {driver}")
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    return "; ".join([*words, versions, commit_of(about), about["date"]])


def commit_of(about: dict[str, Any]) -> str:
    if not about.get("commit"):
        return "no commit"
    return f"commit {about['commit'][:12]}" + (" with uncommitted changes" if about["modified"] else "")
