"""Ahead-of-time compilation of recorded launches, and what the machine code shows: no GPU is needed.

`recording` collects the launches of a call of an op on a target. `compile_for` compiles such a launch with the
specialisation Triton would choose at run time, and reads registers, spills and instructions off the result. `faults`
lists what must not be.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from brandla_kernels._kernels.launch import Launch, Target, product_precision
from brandla_kernels._targets import AMD, NVIDIA

TARGETS: dict[str, GPUTarget] = {
    **{name: GPUTarget("cuda", int(name.removeprefix("sm_")), 32) for name in NVIDIA},
    **{name: GPUTarget("hip", name, 64) for name in AMD},
}


class Limits(NamedTuple):
    """Resources that programs share on one multiprocessor (compute unit), and the most that one program may take."""

    warps: int
    programs: int
    registers: int  # 32 bits each
    registers_granule: int  # allocated to a warp in multiples of this
    shared_bytes: int
    shared_bytes_program: int
    shared_bytes_reserved: int  # of each program, by the driver
    tensor_memory: int  # columns


# CUDA C++ programming guide, "Technical specifications per compute capability" and "Occupancy calculator"; AMD CDNA 2,
# CDNA 3 and CDNA 4 instruction set references, on registers and LDS. A compute unit has 4 SIMDs with 512 registers of
# 64 lanes each for up to 8 waves, vector and accumulation registers together.
LIMITS = {
    "sm_80": Limits(64, 32, 65536, 256, 164 << 10, 163 << 10, 1 << 10, 0),
    "sm_86": Limits(48, 16, 65536, 256, 100 << 10, 99 << 10, 1 << 10, 0),
    "sm_89": Limits(48, 24, 65536, 256, 100 << 10, 99 << 10, 1 << 10, 0),
    "sm_90": Limits(64, 32, 65536, 256, 228 << 10, 227 << 10, 1 << 10, 0),
    "sm_100": Limits(64, 32, 65536, 256, 228 << 10, 227 << 10, 1 << 10, 512),
    "sm_120": Limits(48, 24, 65536, 256, 100 << 10, 99 << 10, 1 << 10, 0),
    "gfx90a": Limits(32, 32, 4 * 512 * 64, 8 * 64, 64 << 10, 64 << 10, 0, 0),
    "gfx942": Limits(32, 32, 4 * 512 * 64, 8 * 64, 64 << 10, 64 << 10, 0, 0),
    "gfx950": Limits(32, 32, 4 * 512 * 64, 8 * 64, 160 << 10, 160 << 10, 0, 0),
}

_MATRIX_INSTRUCTIONS = re.compile(r"\b(wgmma\.mma_async\S*|tcgen05\.mma\S*|mma\.sync\S*|v_mfma_\w+|v_smfmac_\w+)")
_DOT = re.compile(r"= tt\.dot .*?(?:inputPrecision = (\w+) )?: tensor<[\dx]+x(\w+)>")
# Patterns in the names of matrix instructions, by the type of the matrices.
_INSTRUCTIONS_OF = {
    "f64": re.compile(r"f64"),
    "f32": re.compile(r"tf32|_f32$|x\d+f32$"),
    "bf16": re.compile(r"bf16|kind::f16"),
    "f16": re.compile(r"\.f16\.|kind::f16|[x_]\d*_?f16$"),
}
# On NVIDIA, Triton 3.7 gives a float64 tl.dot matrix instructions on sm_80 and sm_90 only; the tcgen05 of sm_100 has no
# float64 either. Elsewhere tl.dot becomes fused multiply-adds, at the rate of the float64 units.
_WITHOUT_MATRIX_INSTRUCTIONS = {(name, "f64") for name in ("sm_86", "sm_89", "sm_100", "sm_120")}


class Product(NamedTuple):
    """A ``tl.dot`` of a kernel: type of the matrices ("f32"), and the precision asked for ("ieee", "tf32x3")."""

    dtype: str
    precision: str


@dataclass(frozen=True)
class Compiled:
    """The result of compiling one launch."""

    launch: Launch
    target: str
    registers: int  # of a thread
    spills: int  # bytes of a thread in memory
    shared_bytes: int
    tensor_memory: int  # columns
    products: tuple[Product, ...]
    matrix_instructions: tuple[str, ...]
    intermediate: str  # Triton's own IR, before any lowering
    assembly: str

    @property
    def programs(self) -> int:
        """Programs that fit on a multiprocessor (compute unit) at once."""
        limits, warps = LIMITS[self.target], self.launch.config.num_warps
        lanes = TARGETS[self.target].warp_size
        warp_registers = triton.cdiv(self.registers * lanes, limits.registers_granule) * limits.registers_granule
        bounds = (
            limits.programs,
            limits.warps // warps,
            limits.registers // max(warp_registers * warps, 1),
            limits.shared_bytes // max(self.shared_bytes + limits.shared_bytes_reserved, 1),
            limits.tensor_memory // self.tensor_memory if self.tensor_memory else limits.programs,
        )
        return int(min(bounds))

    @property
    def occupancy(self) -> float:
        """Resident warps, as a fraction of the most that could be."""
        return self.programs * self.launch.config.num_warps / LIMITS[self.target].warps


def faults(compiled: Compiled) -> list[str]:
    """List in words what no kernel may show: spills, TF32, products off the matrix units, too much shared memory."""
    found = []
    if compiled.spills:
        found.append(f"{compiled.spills} bytes of registers spilled")
    if compiled.programs == 0 or compiled.shared_bytes > LIMITS[compiled.target].shared_bytes_program:
        # Triton compiles a program that takes too much tensor memory to an empty one.
        found.append(
            f"a program does not fit: {compiled.shared_bytes} bytes of shared memory,"
            f" {compiled.tensor_memory} columns of tensor memory"
        )
    accurate = {product_precision(target_named(compiled.target), torch.float32), "bf16x6"}
    for dtype, precision in sorted(set(compiled.products)):
        if dtype == "f32" and precision not in accurate:
            found.append(f"float32 products in {precision}")
        pattern = _INSTRUCTIONS_OF["bf16" if precision.startswith("bf16") else dtype]
        on_matrix_units = any(pattern.search(name) for name in compiled.matrix_instructions)
        if not on_matrix_units and (compiled.target, dtype) not in _WITHOUT_MATRIX_INSTRUCTIONS:
            found.append(f"no matrix instruction for {dtype} products")
    return found


def target_named(name: str) -> Target:
    """Return the target that launches are recorded for."""
    return Target(TARGETS[name].backend, name)


def compile_for(target: str, launch: Launch) -> Compiled:
    """Compile ``launch`` for ``target``, a key of `TARGETS`."""
    signature, constants, attributes = specialization(target, launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=TARGETS[target], options=launch.config.options)
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    registers, spills = _registers(compiled, text)
    return Compiled(
        launch=launch,
        target=target,
        registers=registers,
        spills=spills,
        shared_bytes=int(compiled.metadata.shared),
        tensor_memory=int(getattr(compiled.metadata, "tmem_size", 0) or 0),
        products=tuple(Product(dtype, precision or "ieee") for precision, dtype in _DOT.findall(compiled.asm["ttir"])),
        matrix_instructions=tuple(sorted(set(_MATRIX_INSTRUCTIONS.findall(text)))),
        intermediate=compiled.asm["ttir"],
        assembly=text,
    )


def specialization(target: str, launch: Launch) -> tuple[Any, Any, Any]:
    """Return what Triton specialises a launch on: types of the arguments, constants, and facts about pointers."""
    kernel, backend = launch.kernel, make_backend(TARGETS[target])
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialized, options = bind(**launch.all_arguments, **launch.config.options)
    _, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialized, options)
    return signature, constants, attributes


def _registers(compiled: Any, text: str) -> tuple[int, int]:
    """Return the registers of a thread, and the bytes of its own memory, which holds spilled registers."""
    if "cubin" not in compiled.asm:
        spilled = 4 * _number_in(r"\.vgpr_spill_count:\s+(\d+)", text)
        private = _number_in(r"\.private_segment_fixed_size:\s+(\d+)", text)
        return _number_in(r"\.vgpr_count:\s+(\d+)", text), max(spilled, private)
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [str(cuobjdump), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return _number_in(r"REG:(\d+)", usage), _number_in(r"STACK:(\d+)", usage) + _number_in(r"LOCAL:(\d+)", usage)


def _number_in(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        message = f"the compiler's output has no {pattern!r}"
        raise RuntimeError(message)
    return int(found[1])
