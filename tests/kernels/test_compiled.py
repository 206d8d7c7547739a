"""Kernels compiled ahead of time: no spills, products on matrix units, no TF32. `make kernels` checks all that ship."""

import re
from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")

from brandla_kernels import OPS  # noqa: E402
from brandla_kernels._kernels.ahead import TARGETS, Product, compile_for, faults, target_named  # noqa: E402
from brandla_kernels._kernels.launch import Config, recording  # noqa: E402
from brandla_kernels._kernels.shipped import DTYPES, LAYOUTS, specializations  # noqa: E402
from brandla_kernels._targets import WEAK_FLOAT64  # noqa: E402

pytestmark = pytest.mark.skipif(bool(triton.knobs.runtime.interpret), reason="the interpreter compiles nothing")

ROWS, LIST, RAGGED_LIST = (
    next(replace(layout, widths=(128,)) for layout in LAYOUTS if layout.name == name)
    for name in ("rows", "list", "ragged list")
)


@pytest.fixture(scope="module", autouse=True)
def _empty_cache(tmp_path_factory):
    """Start from an empty cache, so that every kernel is compiled now."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def representative(target, layout, dtypes):
    """Return one specialisation for each kernel, type of products and path: full tiles, and the most operands."""
    found = {}
    for case in specializations(target, layouts=(layout,), dtypes=dtypes):
        if case.launch.name == "root_core_kernel":
            # The slowest to compile. The test of small problems covers it, in the same tiles.
            continue
        given = case.launch.arguments
        name = case.launch.name, *(given.get(constant) for constant in ("COMPUTE", "PRECISION", "TERMS", "SYMMETRIC"))
        tensors = sum(isinstance(value, torch.Tensor) for value in given.values())
        work = sum(case.launch.config.blocks.values()), tensors
        if name not in found or work > found[name][0]:
            found[name] = work, case
    return {str(name): case for name, (_, case) in found.items()}


def launches(target, name, *arguments):
    """Record the launches of a call of an op."""
    with recording(target_named(target)) as recorded:
        OPS[name].launch(*arguments)
    return recorded


def tall(columns, dtype=torch.float32):
    return torch.zeros(512, columns, dtype=dtype)


def empty(*shape):
    return torch.empty(2, *shape, dtype=torch.float64)


def root_core(r, k, rank, tol):
    return (empty(r, r).float(), empty(r, k), empty(k, k), empty(), empty(), rank, tol, True)


WIDE, DOUBLE = tall(128), tall(128, torch.float64)
DAMPED = (WIDE, WIDE[:128], torch.zeros(()), torch.zeros(()), WIDE)


@pytest.mark.parametrize(
    ("target", "layout", "dtypes"),
    [("sm_90", ROWS, DTYPES[:2]), ("gfx942", RAGGED_LIST, DTYPES[:1])],
    ids=["sm_90", "gfx942"],
)
def test_kernels_compile_without_fault(target, layout, dtypes):
    cases = representative(target, layout, dtypes)
    found = {name: faults(compile_for(target, case.launch)) for name, case in cases.items()}
    if triton.__version__.startswith("3.6.") and target == "sm_90":
        # Later versions spill nothing there (docs/kernels.md).
        found = {name: [] if wrong == ["16 bytes of registers spilled"] else wrong for name, wrong in found.items()}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize(
    ("target", "op", "arguments", "dtype"),
    [
        # The widest product, on the targets that the test above leaves out.
        *(
            (target, "rotate", (WIDE, WIDE, WIDE[:128], WIDE[:128]), "f32")
            for target in TARGETS
            if target not in ("sm_90", "gfx942")
        ),
        # Products that spill with the tiles of other targets.
        ("sm_86", "gram_ema_", (DOUBLE[:128], torch.zeros(128, 1024).double(), 0.5, 0.5), "f64"),
        ("sm_86", "damped_apply", (DOUBLE, DOUBLE[0], DOUBLE[0, 0], DOUBLE), "f64"),
        ("sm_120", "project", (WIDE, WIDE.bfloat16()), "f32"),
        # Small problems, in the dtype that the target takes.
        ("sm_86", "damped_inverse", DAMPED, "f32"),
        ("sm_86", "root_core", root_core(20, 12, 32, 0.0), "f32"),
        ("sm_90", "root_core", root_core(128, 64, 128, 0.1), "f64"),
        ("gfx942", "root_core", root_core(128, 64, 128, 0.1), "f64"),
        ("sm_90", "cholesky_inverse_core", (empty(31, 31), empty(31), 1e-12), "f64"),
        ("gfx942", "cholesky_inverse_core", (empty(256, 256), empty(256), 1e-12), "f64"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_all_launches_of_an_op_compile_without_fault(target, op, arguments, dtype):
    found = [compile_for(target, launch) for launch in launches(target, op, *arguments)]
    assert found
    assert not any(map(faults, found))
    assert {product.dtype for compiled in found for product in compiled.products} == {dtype}
    assert all(dtype in name for compiled in found for name in compiled.matrix_instructions)


@pytest.mark.parametrize("target", TARGETS)
def test_gram_matrices_are_summed_in_float64(target):
    compiled = compile_for(target, launches(target, "gram", tall(64))[0])
    assert Product("f64", "ieee") in compiled.products
    assert faults(compiled) == []
    # The targets without matrix instructions for these are the one exception.
    if target == "sm_86":
        elsewhere = replace(compiled, target="sm_90", matrix_instructions=())
        assert faults(elsewhere) == ["no matrix instruction for f64 products"]


@pytest.mark.parametrize("target", TARGETS)
def test_cores_of_float32_are_in_float32_where_float64_is_slow(target):
    (launch,) = launches(target, "root_core", *root_core(20, 12, 32, 0.0))
    project, *_ = launches(target, "damped_inverse", *DAMPED)
    weak = target in WEAK_FLOAT64
    assert launch.work.flops.keys() == {32 if weak else 64}
    assert project.arguments["work1_ptr"].dtype == (torch.float32 if weak else torch.float64)


def test_every_op_with_a_kernel_is_among_what_ships():
    shipped = specializations("sm_90", layouts=(ROWS, LIST))
    assert {op for case in shipped for op in case.ops} == {name for name, op in OPS.items() if op.launch is not None}
    listed = {op for case in shipped for op in case.ops if case.layout.listed}
    assert listed == {name for name, op in OPS.items() if op.launch is not None and op.signature.lists}


# --- Faults are seen


def product(target, **constants):
    """Return a launch that ships; other constants make it a wrong kernel."""
    launch = launches(target, "project", tall(64), tall(64))[0]
    assert constants.keys() <= launch.arguments.keys()
    return launch._replace(arguments=dict(launch.arguments) | constants)


@pytest.fixture(scope="module")
def shipped():
    return compile_for("sm_90", product("sm_90"))


def test_tf32_and_products_off_the_matrix_units_are_seen():
    assert "float32 products in tf32" in faults(compile_for("sm_90", product("sm_90", PRECISION="tf32")))
    off = compile_for("sm_90", product("sm_90", PRECISION="ieee"))
    assert "no matrix instruction for f32 products" in faults(off)


def test_three_products_of_tf32_are_three():
    """The machine code does as many products as Triton's IR asks for."""
    right, wrong = (compile_for("sm_80", product("sm_80", PRECISION=words)) for words in ("tf32x3", "tf32"))
    counts = [len(re.findall(r"mma\.sync\S*tf32", compiled.assembly)) for compiled in (right, wrong)]
    assert counts[0] == 3 * counts[1] > 0


@pytest.mark.parametrize(("target", "rows", "warps"), [("sm_90", 128, 4), ("gfx942", 256, 2)])
def test_spills_are_seen(target, rows, warps):
    """A tile of sums takes more registers than a thread can have, or all: 256 of at most 255, and 512 of 512."""
    config = Config({"BLOCK_R": rows, "BLOCK_K": 256, "BLOCK_N": 16}, warps, 1)
    assert any("spilled" in fault for fault in faults(compile_for(target, product(target)._replace(config=config))))


@pytest.mark.parametrize(
    ("target", "memory"),
    [
        ("gfx942", {"shared_bytes": 65 << 10}),
        ("sm_89", {"shared_bytes": 100 << 10}),
        ("sm_100", {"tensor_memory": 513}),
    ],
    ids=str,
)
def test_too_much_memory_is_seen(target, memory, shipped):
    fitting, too_large = (faults(replace(shipped, target=target, **own)) for own in ({}, memory))
    assert [fault for fault in too_large if fault not in fitting and "does not fit" in fault]


# --- Memory


# Loads of 16 bytes at once by one thread, which aligned rows allow.
LOADS_16_BYTES = re.compile(r"cp\.async\.cg\.\S+ .*0x10|ld\.global\S*\.v4\.|(?:global|buffer)_load_dwordx4")


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_aligned_matrices_of_a_list_are_loaded_16_bytes_at_once(target, transposed):
    def listed(columns):
        matrices = [torch.zeros(512, columns), torch.zeros(256, columns)]
        return [matrix.mT.contiguous().mT for matrix in matrices] if transposed else matrices

    aligned, ragged = (
        compile_for(target, launches(target, "project", listed(columns), listed(columns))[0]) for columns in (32, 31)
    )
    assert LOADS_16_BYTES.search(aligned.assembly)
    # Columns of 512 and 256 rows are aligned however many there are.
    assert bool(LOADS_16_BYTES.search(ragged.assembly)) == transposed


def test_update_of_float32_holds_no_tile_in_float64():
    """ρ and w are float64: a tile that they widen takes twice the registers, and spills with some Triton versions."""
    found = launches("sm_90", "gram_ema_", torch.zeros(128, 128), WIDE.mT.contiguous(), 0.9, 0.1)
    found += launches("sm_90", "gram_ema_", torch.zeros(4096, 4096), torch.zeros(4096, 64), 0.9, 0.1)
    # Two kernels of a split sum, and one of a sum in one piece.
    assert len(found) == 3
    for launch in found:
        assert not re.search(r"tensor<\d+x\d+xf64>", compile_for("sm_90", launch).intermediate)


@pytest.mark.parametrize(
    ("target", "registers", "warps", "shared", "programs"),
    [
        ("sm_90", 128, 8, 0, 2),  # 65536 registers / (128 registers · 32 lanes · 8 warps)
        ("sm_90", 32, 4, 98 << 10, 2),  # 228 KB / (98 KB + 1 KB that the driver takes)
        ("sm_80", 32, 4, 0, 16),  # 64 warps / 4 warps
        ("sm_120", 32, 4, 0, 12),  # 48 warps / 4 warps
        # Each of 4 SIMDs has 512 registers a lane: 4 waves of 128, and a program of 4 waves has one on each.
        ("gfx942", 128, 4, 0, 4),
        ("gfx942", 128, 4, 33 << 10, 1),
    ],
)
def test_occupancy_is_what_the_scarcest_resource_leaves(target, registers, warps, shared, programs, shipped):
    launch = shipped.launch._replace(config=shipped.launch.config._replace(num_warps=warps))
    compiled = replace(shipped, target=target, launch=launch, registers=registers, shared_bytes=shared, tensor_memory=0)
    assert compiled.programs == programs
    assert compiled.occupancy == programs * warps / {"sm_80": 64, "sm_90": 64, "sm_120": 48, "gfx942": 32}[target]
