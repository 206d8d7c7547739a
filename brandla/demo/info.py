"""``brandla info``: versions, devices, and which backend serves which op."""

from __future__ import annotations

from typing import Any

import torch

from brandla.demo import machine
from brandla_kernels import OPS
from brandla_kernels._targets import AMD, NVIDIA, architecture, in_words


def facts() -> dict[str, Any]:
    """Return versions, devices, and for each op and device the backend and the reason for it."""
    found = machine.facts()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    gpus = range(torch.cuda.device_count())
    return {
        **found.pop("versions"),
        **found,
        "kernels": [in_words(architecture(gpu)) for gpu in gpus] or f"for {', '.join(NVIDIA + AMD)}",
        "ops": {
            name: {at: dict(zip(("backend", "reason"), op.implementation(at), strict=True)) for at in devices}
            for name, op in sorted(OPS.items())
        },
    }


def as_text() -> str:
    """Return everything as text: the facts, then a line an op; the reasons, which many ops share, are numbered."""
    found = facts()
    ops, reasons = found.pop("ops"), dict[str, int]()
    words = {name: ", ".join(value) or "none" if isinstance(value, list) else value for name, value in found.items()}
    lines = [f"{name} {value}" for name, value in words.items()]
    lines += ["", "Backend of each op", f"{'op':24}" + "".join(f"{at:14}" for at in next(iter(ops.values())))]
    for name, served in ops.items():
        numbers = [reasons.setdefault(one["reason"], len(reasons) + 1) for one in served.values()]
        cells = [f"{one['backend']} ({number})" for one, number in zip(served.values(), numbers, strict=True)]
        lines.append(f"{name:24}" + "".join(f"{cell:14}" for cell in cells))
    lines += [f"({number}) {reason}" for reason, number in reasons.items()]
    return "\n".join(line.rstrip() for line in lines)
