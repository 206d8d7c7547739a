"""Ahead-of-time compilation of recorded launches, and what the machine code shows: no GPU is needed.

`recording` collects what a call of an op would start on a target; `compile_for` compiles each such launch for it with
the specialisation Triton would choose at run time, and reads registers, spills and instructions off the result.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from brandla_kernels._kernels.launch import Launch, Target

TARGETS: dict[str, GPUTarget] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}

_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
_MATRIX_INSTRUCTIONS = re.compile(r"\b(wgmma\.mma_async\S*|tcgen05\.mma\S*|mma\.sync\S*|v_mfma_\w+)")


@dataclass(frozen=True)
class Compiled:
    """What one launch compiled to."""

    launch: Launch
    target: str
    registers: int
    spills: int
    shared_bytes: int
    matrix_instructions: tuple[str, ...]
    assembly: str

    @property
    def threads(self) -> int:
        """Threads of a program."""
        return int(self.launch.config.num_warps * TARGETS[self.target].warp_size)


def target_named(name: str) -> Target:
    """Return the target that launches are recorded for."""
    return Target(TARGETS[name].backend, name)


def compile_for(target: str, launch: Launch) -> Compiled:
    """Compile ``launch`` for ``target``, a key of `TARGETS`."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    given = dict(launch.arguments) | dict(launch.config.blocks)
    declared = {parameter.name: parameter.is_constexpr for parameter in launch.kernel.params}
    for position, (name, is_constant) in enumerate(declared.items()):
        signature[name] = _specialize(given[name], (position,), is_constant, constants, attributes)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.config.num_warps, "num_stages": launch.config.num_stages}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    registers, spills = _registers(compiled, text)
    found = tuple(sorted(set(_MATRIX_INSTRUCTIONS.findall(text))))
    return Compiled(launch, target, registers, spills, int(compiled.metadata.shared), found, text)


def _specialize(
    value: Any, path: tuple[int, ...], is_constant: bool, constants: dict[Any, Any], attributes: dict[Any, Any]
) -> Any:
    """Return the type of an argument, noting constants and alignment under its ``path``, as Triton's launcher does."""
    if is_constant or value is None:
        constants[path] = value
        return "constexpr"
    if isinstance(value, tuple):
        return tuple(_specialize(part, (*path, i), False, constants, attributes) for i, part in enumerate(value))
    if isinstance(value, Tensor):
        if value.data_ptr() % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return _POINTERS[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        if value == 1:
            constants[path] = 1
            return "constexpr"
        if value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    message = f"argument {path} of a kernel must be a tensor, a number or a tuple; got {type(value).__name__}"
    raise TypeError(message)


def _registers(compiled: Any, text: str) -> tuple[int, int]:
    if "cubin" in compiled.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = subprocess.run(
                [str(_cuobjdump()), "-res-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        registers = re.search(r"REG:(\d+)", usage)
        stack = re.search(r"STACK:(\d+)", usage)
        local = re.search(r"LOCAL:(\d+)", usage)
        return int(registers[1]) if registers else 0, int(stack[1] if stack else 0) + int(local[1] if local else 0)
    registers = re.search(r"\.vgpr_count:\s+(\d+)", text)
    spills = re.search(r"\.vgpr_spill_count:\s+(\d+)", text)
    return int(registers[1]) if registers else 0, int(spills[1]) if spills else 0


def _cuobjdump() -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
