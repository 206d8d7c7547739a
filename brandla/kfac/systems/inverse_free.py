"""IKFAC and SINGD: roots of inverse factors, updated by products alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import reduce
from operator import mul
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from brandla import _check
from brandla.kfac.systems.form import State, restored, tensors_of
from brandla.kfac.systems.schedule import Schedule, at
from brandla.kfac.systems.strategy import Curvature, Kept, Strategy
from brandla.kfac.systems.structures import STRUCTURES, Diagonal, Member, Structure
from brandla.kfac.values import Gradient, Now, Rows, Shape, Side


@dataclass(frozen=True)
class InverseFree(Strategy):
    """IKFAC and SINGD: K and C with K Kᵀ ≈ A⁻¹ and C Cᵀ ≈ G⁻¹, damped, and the step C Cᵀ ∂W K Kᵀ.

    No eigendecomposition, no Cholesky factor, no host sync, and neither A nor G is formed. Every
    ``preconditioner_every`` steps, with A and G of the batch of that step and H_K = KᵀAK, H_C = CᵀGC,

    - ``"singd"``: m_K ← α m_K + ½ (tr(H_C)/d_out · H_K + λ tr(CᵀC)/d_out · KᵀK − I), and m_C likewise;
    - ``"ikfac"``: m_K = ½ (H_K + λ_A KᵀK − I), and m_C likewise with λ_G;

    projected to the structure, then K ← K − β K m_K and C ← C − β C m_C.

    Parameters
    ----------
    structure
        The structure of K and C: ``"dense"``, ``"diagonal"``, ``"block-diagonal"``, ``"triangular"``,
        ``"hierarchical"``, ``"toeplitz"``, or one of `brandla.kfac.systems.structures`, such as ``BlockDiagonal(64)``.
        The input side of an embedding is exactly diagonal and always has the diagonal structure.
    variant
        ``"singd"`` or ``"ikfac"``.
    rate
        β > 0. It replaces 1 − ``decay``: in IKFAC, to O(β²), K Kᵀ moves as the damped inverse of an exponential average
        with weight β.
    momentum
        α of ``"singd"``, in [0, 1); IKFAC has none.
    preconditioner_every
        Steps between updates, or a function of the step.

    Notes
    -----
    Relative damping is λ_A = damping · d₁(A) and λ_G = damping · d₁(G), with the largest eigenvalues d₁. SINGD takes λ
    = λ_A λ_G: the value of (A + λ_A I) ⊗ (G + λ_G I) in directions without curvature. One power iteration per update
    estimates d₁ from below, along the stream of batches, averaged with the ``decay`` of `KFAC`.

    K and C start as the multiples of I at which tr m = 0 for the first batch that is not zero, so a factor's scale has
    no effect. β is reduced if ‖β m‖_F > 1 (``docs/inverse_free.md``).

    References
    ----------
    W. Lin and others, "Structured inverse-free natural gradient descent", ICML 2024, arXiv 2312.05705.

    Examples
    --------
    >>> import torch
    >>> from brandla.kfac import KFAC, InverseFree
    >>> preconditioner = KFAC(torch.nn.Linear(20, 10), InverseFree("diagonal"))
    """

    structure: str | Structure = "dense"
    _: KW_ONLY
    variant: Literal["singd", "ikfac"] = "singd"
    rate: float = 0.01
    momentum: float = 0.5
    preconditioner_every: Schedule[int] = 10

    def __post_init__(self) -> None:
        if isinstance(self.structure, str) and self.structure not in STRUCTURES:
            names = ", ".join(map(repr, STRUCTURES))
            _check.fail_value("InverseFree", f"structure must be one of {names}; got {self.structure!r}")
        if not isinstance(self.structure, (str, Structure)):
            kind = type(self.structure).__name__
            _check.fail_type("InverseFree", f"structure must be a name or a Structure; got {kind}")
        _check.choice("InverseFree", "variant", self.variant, ("singd", "ikfac"))
        if not 0 < self.rate < float("inf"):
            _check.fail_value("InverseFree", f"rate must be finite and > 0; got {self.rate}")
        if not 0 <= self.momentum < 1:
            _check.fail_value("InverseFree", f"momentum must be in [0, 1); got {self.momentum}")
        _check.count("InverseFree", "preconditioner_every", at(self.preconditioner_every, 0), 1)

    def curvature(self, shape: Shape) -> InverseFreeCurvature:
        chosen = STRUCTURES[self.structure] if isinstance(self.structure, str) else self.structure
        input = self._side(shape.d_in, Diagonal() if shape.one_hot else chosen, shape)
        return InverseFreeCurvature(self, input, None if shape.single else self._side(shape.d_out, chosen, shape))

    def _side(self, n: int, structure: Structure, shape: Shape) -> InverseRoot:
        """Return the root of one side before any data, K = I."""
        identity = structure.identity(n, shape.groups, shape.dtype, shape.device)
        momentum = tuple(torch.zeros_like(part) for part in identity) if self.variant == "singd" else ()
        direction = torch.zeros(*shape.groups, n, dtype=shape.dtype, device=shape.device)
        return InverseRoot(n, structure, identity, momentum, direction, direction.new_zeros(()))


@dataclass
class InverseFreeCurvature(Curvature):
    """K for the inputs and C for the output gradients; a ``single`` layer has no C."""

    strategy: InverseFree
    input: InverseRoot
    output: InverseRoot | None
    renewed: int | None = None

    @property
    def started(self) -> bool:
        return self.renewed is not None

    def absorb(self, rows: Rows, now: Now) -> None:
        """Update K and C, if due. In SINGD, traces of each side scale the curvature and damping of the other."""
        if self.renewed is not None and now.step - self.renewed < at(self.strategy.preconditioner_every, now.step):
            return
        self.renewed = now.step
        sides = list(zip(self.sides.values(), self._batches(rows), strict=True))
        # SINGD has one damping and one scale for both sides, IKFAC has them for each side.
        for group in [sides] if self.strategy.variant == "singd" else [[own] for own in sides]:
            before = reduce(mul, [side.largest() for side, _ in group])
            for side, batch in group:
                side.observe(batch, now)
            damping = reduce(mul, [now.damping.of(side.largest()) for side, _ in group])
            mean = reduce(mul, [batch.mean_eigenvalue() for _, batch in group])
            # If M was 0 so far, K starts as the multiple of I at which tr m = 0.
            start = (before == 0) & now.finite, (mean + damping).pow(-0.5 / len(group))
            for side, _ in group:
                side.restart(*start)
            curvatures = [batch.projected(side.structure, side.root) for side, batch in group]
            grams = [side.structure.own_gram(side.root) for side, _ in group]
            weights: list[tuple[Tensor | float, Tensor]] = [(1.0, damping)]
            if len(group) == 2:
                traces = [
                    [side.structure.trace(part) / side.n for part in parts]
                    for (side, _), *parts in zip(group, curvatures, grams, strict=True)
                ]
                weights = [(of_curvature, damping * of_gram) for of_curvature, of_gram in reversed(traces)]
            options = self.strategy.rate, self.strategy.momentum, now.finite
            for (side, _), (weight, shift), curvature, gram in zip(group, weights, curvatures, grams, strict=True):
                side.move([(weight, curvature), (shift, gram)], *options)

    def solve(self, gradient: Gradient, now: Now) -> Gradient:
        """Return C Cᵀ ∂W K Kᵀ."""
        left = self.input.apply(gradient) if isinstance(gradient, Tensor) else gradient[0]
        if self.output is not None:
            left = self.output.apply(left.mT).mT
        return left if isinstance(gradient, Tensor) else (left, self.input.apply(gradient[1].mT).mT)

    def widest_pair(self, entries: int) -> int | None:
        """Compare the flops of a pair, including its product, with the flops of a matrix."""
        if self.output is None:
            return None
        d_in, d_out = self.input.n, self.output.n
        by_row, by_column = 2 * self.input.structure.flops(d_in), 2 * self.output.structure.flops(d_out)
        return (d_out * by_row + d_in * by_column) // (by_row + by_column + 2 * entries)

    def kept(self) -> Iterator[Kept]:
        for side, root in self.sides.items():
            yield side, repr(root.structure), tensors_of(root.parts())

    def parts(self) -> State:
        return {**{side: root.parts() for side, root in self.sides.items()}, "renewed": self.renewed}

    def loaded(self, state: dict[str, Any], where: str) -> InverseFreeCurvature:
        roots = self.sides.items()
        sides: dict[str, Any] = {side: root.loaded(state[side], f"{where} ({side})") for side, root in roots}
        return replace(self, **sides, renewed=state["renewed"])

    @property
    def sides(self) -> dict[Side, InverseRoot]:
        return {"input": self.input} if self.output is None else {"input": self.input, "output": self.output}

    def _batches(self, rows: Rows) -> list[Batch]:
        """Return A and G of the rows, as `Kronecker` defines them."""
        dtype, indices = self.input.direction.dtype, rows.inputs
        if self.output is None:
            return [Batch(rows.inputs.to(dtype), rows.uses)]
        G = Batch(rows.gradients.to(dtype), rows.uses)
        if indices.is_floating_point():
            return [Batch(rows.inputs.to(dtype), 1 / rows.uses), G]
        # The index −1 is a row of zeros.
        shares = (indices >= 0).to(dtype) / rows.uses
        frequencies = shares.new_zeros(self.input.n).index_add_(0, indices.clamp(min=0), shares)
        return [Batch(frequencies.sqrt()[None], 1.0, frequencies), G]


class Batch(NamedTuple):
    """The factor M = scale · XᵀX of one batch, given by its rows X (*groups, N, n).

    For one-hot rows, M = diag(``diagonal``) and X is the one row √``diagonal``, with the same trace and diagonal.
    """

    rows: Tensor
    scale: float
    diagonal: Tensor | None = None

    def mean_eigenvalue(self) -> Tensor:
        """Return tr M / n, shape (*groups,)."""
        return self.scale * self.rows.square().sum((-2, -1)) / self.rows.shape[-1]

    def projected(self, structure: Structure, root: Member) -> Member:
        """Return Π(KᵀMK), from the Gram matrix of X K."""
        return structure.combine((self.scale, structure.gram(structure.times(self.rows, root))))


@dataclass
class InverseRoot:
    """One side: K with its structure and momentum. K Kᵀ approximates the inverse of a factor M that is never formed.

    ``direction`` / ``total`` is the exponential average of M_t v_t, where M_t is the factor of batch t and v_t the
    direction before it: a power iteration over the stream, whose length estimates the largest eigenvalue from below.
    """

    n: int
    structure: Structure
    root: Member
    momentum: Member
    direction: Tensor
    total: Tensor

    def largest(self) -> Tensor:
        """Estimate the largest eigenvalue of M, shape (*groups,); 0 as long as all data was zero."""
        return _norms(self.direction) / torch.where(self.total > 0, self.total, 1)

    def observe(self, batch: Batch, now: Now) -> None:
        """Take a batch into the estimate of the largest eigenvalue."""
        rows, scale, diagonal = batch
        # The iteration starts at the longest row: M does not map it to 0, unless M is 0.
        longest = rows.square().sum(-1).argmax(-1)[..., None, None]
        first = rows.take_along_dim(longest, -2).squeeze(-2) if diagonal is None else diagonal
        start = torch.where((self.largest() > 0)[..., None], self.direction, first)
        length = _norms(start)[..., None]
        unit = start / torch.where(length > 0, length, 1)
        image = scale * (rows.mT @ (rows @ unit[..., None])).squeeze(-1) if diagonal is None else diagonal * unit
        weight = (1 - now.decay) * now.finite.to(start.dtype)
        self.direction = (1 - weight) * self.direction + weight * image
        self.total = (1 - weight) * self.total + weight

    def restart(self, where: Tensor, length: Tensor) -> None:
        """Set K ← ``length`` · I in the groups ``where``."""
        identity = self.structure.identity(self.n, (), length.dtype, length.device)
        self.root = self.structure.combine(
            ((~where).to(length.dtype), self.root), (torch.where(where, length, 0), identity)
        )

    def move(self, terms: Sequence[tuple[Tensor | float, Member]], rate: float, decay: float, finite: Tensor) -> None:
        """Set m̄ ← ``decay`` · m̄ + m and K ← K − β K m̄, if finite, with β = min(``rate``, 1 / ‖m̄‖_F).

        m = ½ (Σ c S − I) over the (c, S) of ``terms``, numbers (*groups,) and members.
        """
        structure = self.structure
        finite = finite.to(self.total.dtype)
        half = 0.5 * finite
        identity = structure.identity(self.n, (), self.total.dtype, self.total.device)
        summands = [*((half * by, part) for by, part in terms), (-half, identity)]
        if self.momentum:
            summands.append((1 - finite * (1 - decay), self.momentum))
        momentum = structure.combine(*summands)
        if self.momentum:
            self.momentum = momentum
        length = structure.squared_norm(momentum).sqrt()
        beta = finite * rate / (rate * length).clamp(min=1)
        self.root = structure.combine((1, self.root), (-beta, structure.product(self.root, momentum)))

    def apply(self, rows: Tensor) -> Tensor:
        """Return X K Kᵀ for rows X (*groups, N, n)."""
        return self.structure.times_transposed(self.structure.times(rows, self.root), self.root)

    def parts(self) -> State:
        # Keys are numbers: torch.distributed.checkpoint does not restore lists.
        root, momentum = (
            {str(index): part for index, part in enumerate(member)} for member in (self.root, self.momentum)
        )
        estimate = {"direction": self.direction, "total": self.total}
        return {"structure": repr(self.structure), "root": root, "momentum": momentum, **estimate}

    def loaded(self, state: dict[str, Any], where: str) -> InverseRoot:
        if state["structure"] != repr(self.structure):
            rule = f"{where}: the structure must be {self.structure!r}; the state has {state['structure']}"
            _check.fail_value("KFAC.load_state_dict", rule)
        parts: dict[str, Any] = {}
        for name, like in self.parts().items():
            if isinstance(like, dict):
                parts[name] = tuple(restored(state[name][key], part, f"{where}: {name}") for key, part in like.items())
            elif isinstance(like, Tensor):
                parts[name] = restored(state[name], like, f"{where}: {name}")
        return replace(self, **parts)


def _norms(vectors: Tensor) -> Tensor:
    """Return norms along the last dimension with no overflow or underflow: ‖M v‖² has the data's fourth power."""
    largest = vectors.abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 0, largest, 1)
    return cast(Tensor, torch.linalg.vector_norm(vectors / scale, dim=-1) * scale.squeeze(-1))
