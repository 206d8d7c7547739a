"""``brandla info``: versions, devices, and which backend serves which op."""

from __future__ import annotations

import json
import os
import platform
from typing import Any

import torch

import brandla
from brandla.demo import machine
from brandla_kernels import OPS
from brandla_kernels._targets import AMD, NVIDIA, architecture, in_words


def as_json() -> str:
    """Return everything as JSON: versions, devices, and for each op and device the backend and the reason for it."""
    return json.dumps(_facts(), indent=2, ensure_ascii=False)


def as_text() -> str:
    """Return everything as text: the facts, then a line an op; the reasons, which many ops share, are numbered."""
    facts = _facts()
    ops = facts.pop("ops")
    lines = [f"{name:8}{', '.join(value) if isinstance(value, list) else value}" for name, value in facts.items()]
    devices = list(next(iter(ops.values())))
    lines += ["", "Backend of each op", f"{'op':24}" + "".join(f"{device:14}" for device in devices)]
    reasons: dict[str, int] = {}
    for name, served in ops.items():
        numbered = [
            f"{one['backend']} ({reasons.setdefault(one['reason'], len(reasons) + 1)})" for one in served.values()
        ]
        lines.append(f"{name:24}" + "".join(f"{cell:14}" for cell in numbered))
    lines += [f"({number}) {reason}" for reason, number in reasons.items()]
    return "\n".join(line.rstrip() for line in lines)


def _facts() -> dict[str, Any]:
    blas, lapack = machine.linear_algebra()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    gpus = range(torch.cuda.device_count())
    return {
        "brandla": brandla.__version__,
        "Python": platform.python_version(),
        "torch": f"{torch.__version__}, BLAS {blas}, LAPACK {lapack}, {torch.get_num_threads()} threads",
        "triton": machine.versions()["triton"] or "not installed",
        "CPU": f"{machine.cpu_name()}, {os.cpu_count()} cores",
        "GPU": machine.gpu_names() or "none that torch sees",
        "kernels": [in_words(architecture(gpu)) for gpu in gpus] or f"for {', '.join(NVIDIA + AMD)}",
        "ops": {name: {device: _served(name, device) for device in devices} for name in sorted(OPS)},
    }


def _served(name: str, device: str) -> dict[str, str]:
    backend, reason = OPS[name].implementation(device)
    return {"backend": backend, "reason": reason}
