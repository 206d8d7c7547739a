"""``brandla info``: versions, devices, and which backend serves which op."""

from __future__ import annotations

from typing import Any

import torch

from brandla.demo import machine
from brandla_kernels import OPS
from brandla_kernels._targets import AMD, NVIDIA, architecture, in_words


def facts() -> dict[str, Any]:
    """Return versions, devices, and the backend of each op on each device with the reason for it."""
    about = machine.facts()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    gpus = range(torch.cuda.device_count())
    return {
        **about.pop("versions"),
        **about,
        "kernels": [in_words(architecture(gpu)) for gpu in gpus] or f"for {', '.join(NVIDIA + AMD)}",
        "ops": {
            name: {at: dict(zip(("backend", "reason"), op.implementation(at), strict=True)) for at in devices}
            for name, op in sorted(OPS.items())
        },
    }


def as_text() -> str:
    """Return all facts as text, then a line for each op. The reasons, which many ops share, are numbered below."""
    about = facts()
    ops, numbers = about.pop("ops"), dict[str, int]()
    texts = {name: ", ".join(value) or "none" if isinstance(value, list) else value for name, value in about.items()}
    lines = [f"{name} {text}" for name, text in texts.items()]
    lines += ["", "Backend of each op", f"{'op':24}" + "".join(f"{device:14}" for device in next(iter(ops.values())))]
    for name, devices in ops.items():
        cells = []
        for served in devices.values():
            number = numbers.setdefault(served["reason"], len(numbers) + 1)
            cells.append(f"{served['backend']} ({number})")
        lines.append(f"{name:24}" + "".join(f"{cell:14}" for cell in cells))
    lines += [f"({number}) {reason}" for reason, number in numbers.items()]
    return "\n".join(line.rstrip() for line in lines)
