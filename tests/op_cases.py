"""The ops under test: operands of every layout, the formula of each op, and the error that rounding explains."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from brandla_kernels import OPS, signs
from brandla_kernels._grouped import _padded
from oracles import symmetrised

Device = torch.device | str

# How a matrix of m × n normal numbers, or a (2, 2) batch of them, lies in memory.
LAYOUTS: dict[str, Callable[[Callable[..., Tensor], int, int], Tensor]] = {
    "plain": lambda normal, m, n: normal(m, n),
    "transposed": lambda normal, m, n: normal(n, m).mT,
    "strided": lambda normal, m, n: normal(2 * m, 3 * n)[::2, ::3],
    # The NaN around the matrix must not be read.
    "embedded": lambda normal, m, n: torch.nn.functional.pad(normal(m, n), [1] * 4, value=torch.nan)[1:-1, 1:-1],
    "repeated row": lambda normal, m, n: normal(1, n).expand(m, n),
    "batched": lambda normal, m, n: normal(2, 2, m, n),
    "batched, with gaps": lambda normal, m, n: normal(4, 2, m, n)[::2],
    "batched, permuted": lambda normal, m, n: normal(2, 2, m, n).transpose(0, 1),
    "batched, one for all": lambda normal, m, n: normal(m, n).expand(2, 2, m, n),
    "batched, one for some": lambda normal, m, n: normal(2, 1, m, n).expand(2, 2, m, n),
}


def matrix(rows: int, columns: int, layout: str, dtype: torch.dtype, seed: int, device: Device = "cpu") -> Tensor:
    """Return a normal matrix, or a (2, 2) batch of them, that lies in memory as ``layout`` says."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return LAYOUTS[layout](normal, rows, columns)


def writable(layout: str) -> str:
    """Return a layout like ``layout`` in which no two entries share memory: one that can be written to."""
    if layout.startswith("repeated"):
        return "plain"
    return "batched" if "one for" in layout else layout


def definite(square: Tensor) -> Tensor:
    """Return a well-conditioned positive definite matrix, M Mᵀ/m + I."""
    order = square.shape[-1]
    return square @ square.mT / max(order, 1) + torch.eye(order, dtype=square.dtype, device=square.device)


def op_of(case: str) -> str:
    """Return the name of the op that a case calls."""
    return case.partition(",")[0]


def operands(
    case: str, n: int, r: int, k: int, layout: str, dtype: torch.dtype, device: Device = "cpu", half: Any = None
) -> tuple[Any, ...]:
    """Return new arguments for the op of a case; ``half`` is the dtype of its data, if it takes any."""

    def new(rows: int, columns: int, seed: int, layout: str = layout) -> Tensor:
        return matrix(rows, columns, layout, dtype, seed, device)

    def number(seed: int) -> Tensor:
        return new(1, 1, seed)[..., 0, 0]

    def vector(rank: int, seed: int) -> Tensor:
        return new(rank, 1, seed)[..., 0]

    def shift(seed: int) -> tuple[Tensor, Tensor]:
        return number(seed).square() + 0.5, number(seed + 20).square()

    q = min(2, k)
    basis, columns, other, block = new(n, r, 0), new(n, k, 1), new(k, q, 8), new(n, k, 11)
    makers: dict[str, Callable[[], tuple[Any, ...]]] = {
        "project": lambda: (basis, columns),
        "gram": lambda: (columns,),
        "rounded_gram": lambda: (columns,),
        "cross_gram": lambda: (basis, columns),
        "rotate": lambda: (basis, columns, new(r, r + 1, 3), new(k, r + 1, 4)),
        "rotate_": lambda: (new(n, r, 0, writable(layout)), columns, new(r, r, 3), new(k, r, 4)),
        "gram_ema_": lambda: (symmetrised(new(n, n, 5, writable(layout))), columns, 0.9, 0.25),
        "damped_apply": lambda: (basis, vector(r, 6), number(7), columns),
        "damped_apply, matrix": lambda: (basis, symmetrised(new(r, r, 6)), number(7), columns),
        "kron_damped_apply": lambda: (
            *(basis, vector(r, 6), number(7)),
            *(other, symmetrised(new(q, q, 9)), number(10), block),
        ),
        "kron_damped_apply, diagonals": lambda: (
            *(basis, vector(r, 6), number(7)),
            *(other, vector(q, 9), number(10), block),
        ),
        "damped_inverse": lambda: (basis, vector(r, 6).square(), *shift(7), columns),
        "damped_inverse, matrix": lambda: (basis, definite(new(r, r, 6)), *shift(7), columns),
        "kron_damped_inverse": lambda: (
            *(basis, definite(new(r, r, 6)), *shift(7)),
            *(other, vector(q, 9).square(), *shift(10), block),
        ),
        "pair_damped_inverse": lambda: (
            *(basis, vector(r, 6).square(), *shift(7)),
            *(other, definite(new(q, q, 9)), *shift(10)),
            *(new(n, r + 1, 11), new(k, r + 1, 12)),
        ),
        "cholesky_inverse_core": lambda: ((panel := columns.double()).mT @ panel, panel.norm(dim=-2), 1e-10),
        "root_core": lambda: root_core_operands(basis, columns),
        "eigh_core": lambda: eigh_core_operands(basis, columns),
        "eigh_rotation": lambda: _rotation_operands(columns),
        "sketch": lambda: (columns, torch.tensor(7, device=device), r + 1),
    }
    data = {operand.position for operand in OPS[op_of(case)].signature.operands if operand.kind == "Data"}
    return tuple(part.to(half) if half and place in data else part for place, part in enumerate(makers[case]()))


def eigh_core_operands(root: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
    """Return arguments of `eigh_core` from F and A, with ρ = .9 and w = .25."""
    gram, cross, own, decay, weight, *_ = root_core_operands(root, columns)
    return cross, own, gram, decay, weight


def _rotation_operands(columns: Tensor) -> tuple[Any, ...]:
    """Return arguments of `eigh_rotation` from a definite core, for all columns but one, of unit length."""
    k = columns.shape[-1]
    core = columns.mT @ columns + torch.eye(k, dtype=columns.dtype, device=columns.device)
    levels, vectors = torch.linalg.eigh(core)
    return levels, vectors, 1 + levels.double(), 2 + levels.double().sum(-1), max(k - 1, 0), 0.0, True


def root_core_operands(root: Tensor, columns: Tensor) -> tuple[Any, ...]:
    """Return arguments of `root_core` from F and A: ρ = .9, w = .25, the rank of F, no tolerance, all measured."""
    wide, new = root.double(), columns.double()
    r, batch = root.shape[-1], root.shape[:-2]
    decay, weight = (torch.full(batch, number, dtype=torch.float64, device=root.device) for number in (0.9, 0.25))
    rank = min(max(r, 1), r + columns.shape[-1])
    return ((wide.mT @ wide).to(root.dtype), wide.mT @ new, new.mT @ new, decay, weight, rank, 0.0, True)


def grouped(case: str, problems: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Return the arguments of the grouped op: lists, and stacks padded with zeros."""
    gathered: list[Any] = list(problems[0])
    for operand in OPS[op_of(case)].signature.operands:
        parts = [arguments[operand.position] for arguments in problems]
        gathered[operand.position] = parts if operand.listed else _padded(parts)
    return tuple(gathered)


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
    """Return the arguments of a damped inverse with Z and β, in float64, in place of d or S, λ and τ."""
    sides = {"damped_inverse": 1, "pair_damped_inverse": 2, "kron_damped_inverse": 2}.get(op_of(case), 0)
    applied = [part for side in range(sides) for part in inverse_coefficients(*arguments[4 * side : 4 * side + 4])]
    return (*applied, *arguments[4 * sides :])


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
    "sketch": lambda X, seed, width, problem=0: (
        X @ signs(seed.long(), X.shape[-1], width, batch_shape=X.shape[:-2], problem=problem, dtype=X.dtype),
    ),
}
VARIANTS = ("damped_apply, matrix", "kron_damped_apply, diagonals", "damped_inverse, matrix")
CASES = tuple(case for name in FORMULAS for case in (name, *(case for case in VARIANTS if op_of(case) == name)))


def exact(case: str, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Return the results of the op by its formula, in float64."""
    arguments = with_coefficients(case, arguments)
    return FORMULAS[op_of(case)](*(part.double() if isinstance(part, Tensor) else part for part in arguments))


def run(call: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Call an op and return its results, or the tensor that it overwrote."""
    result = call(*arguments)
    if result is None:
        return (arguments[0],)
    return result if isinstance(result, tuple) else (result,)


def assert_computes(case: str, results: Any, arguments: Any) -> None:
    """Check results, entry by entry, against the formula in float64.

    A sum of m products, in any order, is within m·ε/2 of the exact one, relative to the sum of the absolute values: the
    formula with every term made positive. The errors of nested sums add up; here the lengths of all sums together are
    at most 3 (the sum of all sizes), and products of three TF32 terms are good to 4ε. Formula and op may both be in
    float64: another factor of two.
    """
    tensors = [part for part in arguments if isinstance(part, Tensor)]
    precision = max(torch.finfo(torch.promote_types(part.dtype, torch.float32)).eps for part in tensors)
    if case == "gram":
        precision = torch.finfo(torch.float64).eps
    lengths = sum({size for part in tensors for size in part.shape[-2:]}) + 8
    given = with_coefficients(case, arguments)
    positive = [part.double().abs() if isinstance(part, Tensor) else part for part in given]
    # The signs of a sketch are no terms: a row sum bounds all of them.
    sizes = (positive[0].sum(-1, keepdim=True),) if case == "sketch" else FORMULAS[op_of(case)](*positive)
    for got, wanted, terms in zip(results, exact(case, arguments), sizes, strict=True):
        assert got.shape == wanted.shape
        # A NaN fails the comparison.
        assert ((got.double() - wanted).abs() <= 3 * lengths * precision * terms).all()
