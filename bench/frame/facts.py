"""What a result was measured on."""

from pathlib import Path
from typing import Any

import torch

from brandla.demo import machine

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "triton", "numpy", "scipy", "scikit-learn", "fbpca")
# What a figure depends on; the results themselves and the pages made of them are left out.
SOURCES = ("brandla", "kernels", "bench", "tests/oracles.py", "constraints.txt", ":(exclude)bench/results")
STATE = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")


def facts(quick: bool, *, gpu: bool = False) -> dict[str, Any]:
    """Return machine, GPU where it is measured, versions, threads, date, the commit and whether the sources differ."""
    return machine.facts(PACKAGES, SOURCES) | ({"gpu": gpu_facts()} if gpu else {}) | {"quick": quick}


def gpu_facts() -> dict[str, Any]:
    """Return the GPU, with its state as nvidia-smi says it; None where it does not."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    said = machine.output_of("nvidia-smi", f"--query-gpu={','.join(STATE)}", "--format=csv,noheader", "--id=0")
    return {
        "name": properties.name,
        "architecture": getattr(properties, "gcnArchName", f"sm_{properties.major}{properties.minor}"),
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cache_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        **(dict(zip(STATE, said.splitlines()[0].split(", "), strict=False)) if said else dict.fromkeys(STATE)),
    }


def place(found: dict[str, Any]) -> str:
    return found["gpu"]["name"] if found.get("gpu") else f"{found['cpu']}, {found['cores']} cores"


def shortly(found: dict[str, Any]) -> str:
    return f"{place(found)}, {found['threads']} threads, torch {found['versions']['torch']}, {commit_of(found)}"


def in_words(found: dict[str, Any]) -> str:
    gpu, words = found.get("gpu"), []
    if gpu:
        driver = f"driver {gpu['driver_version']}, CUDA {gpu['cuda'] or gpu['hip']}"
        words = [f"{gpu['name']} ({gpu['architecture']}), {driver}"]
    about = f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads"
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    return "; ".join([*words, about, versions, commit_of(found), found["date"]])


def commit_of(found: dict[str, Any]) -> str:
    if not found.get("commit"):
        return "no commit"
    return f"commit {found['commit'][:12]}" + (" with uncommitted changes" if found["modified"] else "")
