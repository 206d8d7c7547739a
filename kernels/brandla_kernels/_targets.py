"""The GPU architectures that the kernels are tiled and compiled for, and which of them lends its tiles to another."""

from __future__ import annotations

from functools import cache

import torch

NVIDIA = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
AMD = ("gfx90a", "gfx942", "gfx950")
# Architectures whose float64 runs at a sixty-fourth of the rate of float32.
WEAK_FLOAT64 = ("sm_86", "sm_89", "sm_120")
# Early steppings of gfx942.
_STEPPINGS = {"gfx940": "gfx942", "gfx941": "gfx942"}


@cache
def nearest(arch: str) -> str | None:
    """Return the architecture whose tiles ``arch`` takes; None if there are no kernels for it.

    For NVIDIA this is the newest listed one up to ``arch``. AMD's others differ too much from the listed ones: gfx11
    and gfx12 have no matrix units for float32 and float64, and the kernels would spill kilobytes per thread there.
    """
    if arch.startswith("sm_"):
        older = [listed for listed in NVIDIA if int(listed[3:]) <= int(arch[3:])]
        return older[-1] if older else None
    arch = _STEPPINGS.get(arch, arch)
    return arch if arch in AMD else None


@cache
def architecture(index: int) -> str:
    """Return the architecture of a CUDA or ROCm device."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def in_words(arch: str) -> str:
    """Say what runs on an architecture."""
    tiles = nearest(arch)
    if tiles is None:
        return f"{arch}: no kernels, torch forms"
    return f"{arch}: compiled for it" if tiles == arch else f"{arch}: tiles of {tiles}, the nearest compiled for"
