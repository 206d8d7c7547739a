"""The ops under test: operands of every layout, the formula of each op, and the error that rounding explains."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from brandla_kernels import OPS, signs
from brandla_kernels._grouped import _own_arguments
from builders import unchanged

# n, r, k.
SIZES = {
    "usual": (37, 5, 3),
    "empty basis": (11, 0, 4),
    "no columns": (11, 3, 0),
    "one": (1, 1, 1),
    "wide": (5, 4, 150),
}

# How a matrix of m × n normal numbers, or a (2, 2) batch of them, lies in memory.
LAYOUTS: dict[str, Callable[[Callable[..., Tensor], int, int], Tensor]] = {
    "plain": lambda normal, m, n: normal(m, n),
    "transposed": lambda normal, m, n: normal(n, m).mT,
    "strided": lambda normal, m, n: normal(2 * m, 3 * n)[::2, ::3],
    # What lies around it must not be read.
    "embedded": lambda normal, m, n: torch.nn.functional.pad(normal(m, n), [1] * 4, value=torch.nan)[1:-1, 1:-1],
    "repeated row": lambda normal, m, n: normal(1, n).expand(m, n),
    "repeated column": lambda normal, m, n: normal(m, 1).expand(m, n),
    "batched": lambda normal, m, n: normal(2, 2, m, n),
    "batched, transposed": lambda normal, m, n: normal(2, 2, n, m).mT,
    "batched, with gaps": lambda normal, m, n: normal(4, 2, m, n)[::2],
    "batched, permuted": lambda normal, m, n: normal(2, 2, m, n).transpose(0, 1),
    "batched, one for all": lambda normal, m, n: normal(m, n).expand(2, 2, m, n),
    "batched, one for some": lambda normal, m, n: normal(2, 1, m, n).expand(2, 2, m, n),
}


def matrix(
    rows: int, columns: int, layout: str, dtype: torch.dtype, seed: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Return a normal matrix, or a (2, 2) batch of them, that lies in memory as ``layout`` says."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return LAYOUTS[layout](normal, rows, columns)


def written(layout: str) -> str:
    """Return a layout like ``layout`` in which no two entries share memory: one that can be written to."""
    if layout.startswith("repeated"):
        return "plain"
    return "batched" if "one for" in layout else layout


def symmetric(square: Tensor) -> Tensor:
    """Return M + Mᵀ."""
    return square + square.mT


def definite(square: Tensor) -> Tensor:
    """Return a well-conditioned positive definite matrix, M Mᵀ/m + I."""
    order = square.shape[-1]
    return square @ square.mT / max(order, 1) + torch.eye(order, dtype=square.dtype, device=square.device)


def op_of(case: str) -> str:
    """Return the name of the op that a case calls."""
    return case.partition(",")[0]


def operands(
    case: str, n: int, r: int, k: int, layout: str, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Any, ...]:
    """Return arguments for the op of a case, new at every call."""

    def new(rows: int, columns: int, seed: int, layout: str = layout) -> Tensor:
        return matrix(rows, columns, layout, dtype, seed, device)

    def number(seed: int) -> Tensor:
        return new(1, 1, seed)[..., 0, 0]

    def vector(rank: int, seed: int) -> Tensor:
        return new(rank, 1, seed)[..., 0]

    def values(rank: int, seed: int) -> Tensor:
        return vector(rank, seed).square()

    def shift(seed: int) -> tuple[Tensor, Tensor]:
        return number(seed).square() + 0.5, number(seed + 20).square()

    q = min(2, k)
    basis, columns, other, block = new(n, r, 0), new(n, k, 1), new(k, q, 8), new(n, k, 11)
    table: dict[str, Callable[[], tuple[Any, ...]]] = {
        "project": lambda: (basis, columns),
        "gram": lambda: (columns,),
        "rounded_gram": lambda: (columns,),
        "cross_gram": lambda: (basis, columns),
        "rotate": lambda: (basis, columns, new(r, r + 1, 3), new(k, r + 1, 4)),
        "rotate_": lambda: (new(n, r, 0, written(layout)), columns, new(r, r, 3), new(k, r, 4)),
        "gram_ema_": lambda: (symmetric(new(n, n, 5, written(layout))), columns, 0.9, 0.25),
        "damped_apply": lambda: (basis, vector(r, 6), number(7), columns),
        "damped_apply, matrix": lambda: (basis, symmetric(new(r, r, 6)), number(7), columns),
        "kron_damped_apply": lambda: (
            *(basis, vector(r, 6), number(7)),
            *(other, symmetric(new(q, q, 9)), number(10), block),
        ),
        "kron_damped_apply, diagonals": lambda: (
            *(basis, vector(r, 6), number(7)),
            *(other, vector(q, 9), number(10), block),
        ),
        "damped_inverse": lambda: (basis, values(r, 6), *shift(7), columns),
        "damped_inverse, matrix": lambda: (basis, definite(new(r, r, 6)), *shift(7), columns),
        "kron_damped_inverse": lambda: (
            *(basis, definite(new(r, r, 6)), *shift(7)),
            *(other, values(q, 9), *shift(10), block),
        ),
        "pair_damped_inverse": lambda: (
            *(basis, values(r, 6), *shift(7)),
            *(other, definite(new(q, q, 9)), *shift(10)),
            *(new(n, r + 1, 11), new(k, r + 1, 12)),
        ),
        "cholesky_inverse_core": lambda: _core_operands(columns),
        "root_core": lambda: root_core_operands(basis, columns),
        "eigh_core": lambda: eigh_core_operands(basis, columns),
        "eigh_rotation": lambda: _rotation_operands(columns),
        "sketch": lambda: (columns, torch.tensor(7, device=device), r + 1),
    }
    return table[case]()


def _core_operands(columns: Tensor) -> tuple[Tensor, Tensor, float]:
    panel = columns.double()
    return panel.mT @ panel, panel.square().sum(-2).sqrt(), 1e-10


def eigh_core_operands(root: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
    """Return what `eigh_core` takes of F and A, for ρ = .9 and w = .25."""
    gram, cross, own, decay, weight, *_ = root_core_operands(root, columns)
    return cross, own, gram, decay, weight


def _rotation_operands(columns: Tensor) -> tuple[Any, ...]:
    """Return what `eigh_rotation` takes of a definite core, for all columns but one, of unit length."""
    k = columns.shape[-1]
    core = columns.mT @ columns + torch.eye(k, dtype=columns.dtype, device=columns.device)
    levels, vectors = torch.linalg.eigh(core)
    return levels, vectors, 1 + levels.double(), 2 + levels.double().sum(-1), max(k - 1, 0), 0.0, True


def root_core_operands(root: Tensor, columns: Tensor) -> tuple[Any, ...]:
    """Return what `root_core` takes of F and A, for ρ = .9, w = .25, the rank of F, no tolerance and all measured."""
    wide, new = root.double(), columns.double()
    r, batch = root.shape[-1], root.shape[:-2]
    decay, weight = (torch.full(batch, number, dtype=torch.float64, device=root.device) for number in (0.9, 0.25))
    rank = min(max(r, 1), r + columns.shape[-1])
    return ((wide.mT @ wide).to(root.dtype), wide.mT @ new, new.mT @ new, decay, weight, rank, 0.0, True)


def half_precision_data(case: str, arguments: tuple[Any, ...], half: torch.dtype) -> tuple[Any, ...]:
    """Return the arguments with what the op takes in half precision in ``half``."""
    data = {operand.position for operand in OPS[op_of(case)].signature.operands if operand.kind == "Data"}
    return tuple(value.to(half) if position in data else value for position, value in enumerate(arguments))


def grouped(case: str, problems: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Return the arguments of the grouped op: lists, and stacks padded with zeros."""
    together: list[Any] = list(problems[0])
    for operand in OPS[op_of(case)].signature.operands:
        parts = [arguments[operand.position] for arguments in problems]
        together[operand.position] = parts if operand.listed else _stack(parts)
    return tuple(together)


def _stack(parts: list[Tensor]) -> Tensor:
    largest = [max(sizes) for sizes in zip(*(part.shape for part in parts), strict=True)]
    stack = parts[0].new_zeros(len(parts), *largest)
    for entry, part in zip(stack, parts, strict=True):
        entry[tuple(map(slice, part.shape))] = part
    return stack


def problems_of(case: str, arguments: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Take the arguments of a grouped op apart into those of each problem."""
    signature = OPS[op_of(case)].signature
    sizes = signature.grouped_sizes(arguments)
    return [tuple(_own_arguments(signature, arguments, problem, own)) for problem, own in enumerate(sizes)]


def of_problem(results: tuple[Any, ...], problem: int, expected: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the results of one problem of a grouped op, without what stacks are padded with."""
    return tuple(part[problem][tuple(map(slice, own.shape))] for part, own in zip(results, expected, strict=True))


def shifted(basis: Tensor, middle: Tensor, scale: Tensor) -> Tensor:
    """Return β (I + U Z Uᵀ), dense."""
    inner = torch.diag_embed(middle) if middle.ndim < basis.ndim else middle
    identity = torch.eye(basis.shape[-2], dtype=basis.dtype, device=basis.device)
    return scale[..., None, None] * (identity + basis @ inner @ basis.mT)


def inverse_coefficients(basis: Tensor, small: Tensor, damping: Tensor, tail: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, Z and β of a damped inverse in float64, for eigenvalues or for S."""
    small, damping, tail = small.double(), damping.double()[..., None], tail.double()[..., None]
    scale = 1 / (tail + damping)[..., 0]
    if small.ndim < basis.ndim:
        return basis, (tail - small) / (small + damping), scale
    identity = torch.eye(small.shape[-1], dtype=small.dtype, device=small.device)
    return basis, -torch.linalg.inv(small + damping[..., None] * identity), scale


def with_coefficients(case: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments with Z and β, in float64, in place of what they are computed from."""
    sides = {"damped_inverse": 1, "pair_damped_inverse": 2, "kron_damped_inverse": 2}.get(op_of(case), 0)
    given = [part for side in range(sides) for part in inverse_coefficients(*arguments[4 * side : 4 * side + 4])]
    return (*given, *arguments[4 * sides :])


def random_signs(matrix: Tensor, seed: Tensor | None, width: int, problem: int = 0) -> Tensor:
    """Return Ω in float64, or without a seed the absolute values of its entries."""
    batch_shape, n = matrix.shape[:-2], matrix.shape[-1]
    if seed is None:
        return matrix.new_ones(*batch_shape, n, width)
    return signs(seed.long(), n, width, batch_shape=batch_shape, problem=problem, dtype=torch.float64)


FORMULAS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "project": lambda U, A: (U.mT @ A,),
    "gram": lambda P: (P.mT @ P,),
    "rounded_gram": lambda P: (P.mT @ P,),
    "cross_gram": lambda F, A: (F.mT @ A, A.mT @ A),
    "rotate": lambda U, P, V, W: (U @ V + P @ W,),
    "rotate_": lambda U, P, V, W: (U @ V + P @ W,),
    "gram_ema_": lambda M, A, decay, weight: (decay * M + weight * A @ A.mT,),
    "damped_apply": lambda U, H, b, V: (shifted(U, H, b) @ V,),
    "kron_damped_apply": lambda U, H, b, V, K, c, W: (shifted(U, H, b) @ W @ shifted(V, K, c),),
    "damped_inverse": lambda U, H, b, V: (shifted(U, H, b) @ V,),
    "kron_damped_inverse": lambda U, H, b, V, K, c, W: (shifted(U, H, b) @ W @ shifted(V, K, c),),
    "pair_damped_inverse": lambda U, H, b, V, K, c, P, Q: (shifted(U, H, b) @ P, shifted(V, K, c) @ Q),
    "sketch": lambda X, *drawn: (X @ random_signs(X, *drawn),),
}
VARIANTS = ("damped_apply, matrix", "kron_damped_apply, diagonals", "damped_inverse, matrix")
CASES = tuple(case for name in FORMULAS for case in (name, *(one for one in VARIANTS if op_of(one) == name)))


def exact(case: str, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Return the results of the op by its formula, in float64."""
    arguments = with_coefficients(case, arguments)
    return FORMULAS[op_of(case)](*(part.double() if isinstance(part, Tensor) else part for part in arguments))


def magnitude(case: str, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Return the formula with every term of every sum made positive: what rounding errors are relative to."""
    given = with_coefficients(case, arguments)
    positive = [part.double().abs() if isinstance(part, Tensor) else part for part in given]
    if op_of(case) == "sketch":
        positive[1] = None
    return FORMULAS[op_of(case)](*positive)


def run(call: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Call an op and return its results; for one that returns nothing, what it overwrote."""
    result = call(*arguments)
    if result is None:
        return (arguments[0],)
    return result if isinstance(result, tuple) else (result,)


def assert_computes(case: str, results: Any, arguments: Any, expected: Any | None = None) -> None:
    """Check results, entry by entry, against the formula in float64.

    A sum of m products, in any order, is within m·ε/2 of the exact one, relative to the sum of the absolute values, and
    the errors of nested sums add up; here the lengths of all sums together are at most 3 (the sum of all sizes), and
    products of three TF32 terms are good to 4ε. Formula and op may both be in float64: another factor of two.
    """
    tensors = [part for part in arguments if isinstance(part, Tensor)]
    precision = max(torch.finfo(torch.promote_types(part.dtype, torch.float32)).eps for part in tensors)
    if case == "gram":
        precision = torch.finfo(torch.float64).eps
    lengths = sum({size for part in tensors for size in part.shape[-2:]}) + 8
    expected = exact(case, arguments) if expected is None else expected
    assert len(results) == len(expected)
    for got, wanted, terms in zip(results, expected, magnitude(case, arguments), strict=True):
        assert got.shape == wanted.shape
        # A NaN is no small error.
        assert ((got.double() - wanted).abs() <= 3 * lengths * precision * terms).all()


def assert_op(case: str, new: Callable[[], tuple[Any, ...]], around: Any = None) -> None:
    """Check an op against its formula, and that it leaves its inputs alone."""
    arguments = new()
    overwrites = op_of(case).endswith("_")
    with unchanged(arguments[1:] if overwrites else arguments), around or nullcontext():
        results = run(OPS[op_of(case)], arguments)
    assert_computes(case, results, new() if overwrites else arguments)


def assert_spoils_its_own(case: str, device: torch.device | str = "cpu") -> None:
    """Check that what is not finite in one problem of a batch shows in its results, and in those of no other."""
    op, new = OPS[op_of(case)], partial(operands, case, 9, 3, 2, "batched", torch.float32, device)
    data = {operand.position for operand in op.signature.operands if operand.kind == "Data"}
    clean = run(op, new())
    for position, value in [*((place, torch.inf) for place in data), *enumerate([torch.nan] * len(new()))]:
        arguments = new()
        if isinstance(arguments[position], Tensor) and arguments[position].is_floating_point():
            arguments[position][1, 1].view(-1)[-1] = value
            results = run(op, arguments)
            assert not all(part[1, 1].isfinite().all() for part in results)
            for part, expected in zip(results, clean, strict=True):
                part[1, 1] = expected[1, 1]
                torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-5)


def grouped_operands(
    case: str, sizes: Any, layouts: Any, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Any, ...]:
    """Return arguments of the grouped op, for problems of these sizes in these layouts, taken in turn."""
    problems = [operands(case, *size, layouts[index % len(layouts)], dtype, device) for index, size in enumerate(sizes)]
    return grouped(case, problems)


def assert_grouped(case: str, new: Callable[[], tuple[Any, ...]]) -> None:
    """Check a grouped op problem by problem, and the zeros that stacks are padded with."""
    arguments = new()
    overwrites = op_of(case).endswith("_")
    with unchanged(arguments[1:] if overwrites else arguments):
        results = run(OPS[op_of(case)], arguments)
    for problem, own in enumerate(problems_of(case, new() if overwrites else arguments)):
        expected = exact(case, own)
        assert_computes(case, of_problem(results, problem, expected), own, expected)
        for result, part in zip(results, expected, strict=True):
            assert isinstance(result, Tensor) or result[problem].shape == part.shape
            padding = result[problem].clone()
            padding[tuple(map(slice, part.shape))] = 0
            assert not padding.any()
