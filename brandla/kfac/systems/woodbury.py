"""The empirical natural gradient of a batch, layer by layer, by a solve of order N for N samples."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from brandla import _check
from brandla.kfac.systems.form import due
from brandla.kfac.systems.samples import Samples
from brandla.kfac.systems.schedule import Schedule, at
from brandla.kfac.systems.strategy import Curvature, StateCurvature, Strategy
from brandla.kfac.values import Gradient, Now, Rows, Shape, add_scaled, inner_product, scaled


@dataclass(frozen=True)
class Woodbury(Strategy):
    """The exact natural gradient of the batch: (F + λI)⁻¹ ∂W with F = N Σ v vᵀ, v the gradients of N samples.

    With K = N VᵀV (N × N) the step is (∂W − N V (λI + K)⁻¹ Vᵀ ∂W) / λ. If ∂W is V 1, the pair of this step's rows, the
    step is V (λI + K)⁻¹ 1: the γ scaled sample by sample. λ is relative to the largest eigenvalue of F. K takes 2 (N
    T)² (d_out + d_in) operations for T positions, or 2N (N + T) d_out d_in if that is less. The state is the rows of a
    batch and N² numbers, without factors. Layers of every kind are supported.

    Parameters
    ----------
    every
        Steps between batches whose rows and inverse are kept: a number, or a function of the step. SENG: 50 to 200.
    features
        Make K from this many inputs and outputs, drawn for each batch. None for all. SENG: 256.
    positions
        Reduce each sample's γ to this many positions: the leading singular vectors over its positions. None for all.
        SENG: 16.
    fixed_after
        FNGD: after this many batches, use their mean coefficients (λI + K)⁻¹ 1 and form no K. A coefficient belongs to
        a place in the order of ‖v‖, relative to the number of samples. None for never.

    Notes
    -----
    A non-finite batch does not change the state, unless its size differs: then zeros are kept, and the step is ∂W / λ.
    SENG and FNGD were not read in full. Three choices are not from the papers: only K is sketched, the kept rows and
    inverse belong to one batch, and coefficients have places in an order (``docs/kfac.md``).

    References
    ----------
    M. Yang, D. Xu, Z. Wen, M. Chen, P. Xu, "Sketchy empirical natural gradient methods for deep learning", arXiv
    2006.05924 (SENG). X. Ou, C. Zhu, X. Huang, Y. Liu, "Inverse-free fast natural gradient descent method for deep
    learning", arXiv 2403.03473 (FNGD).

    Examples
    --------
    >>> import torch
    >>> from brandla.kfac import KFAC, Woodbury
    >>> preconditioner = KFAC(torch.nn.Linear(20, 10), Woodbury())
    """

    every: Schedule[int] = 1
    features: int | None = None
    positions: int | None = None
    fixed_after: int | None = None

    def __post_init__(self) -> None:
        _check.count("Woodbury", "every", at(self.every, 0), 1)
        for name in ("features", "positions", "fixed_after"):
            if getattr(self, name) is not None:
                _check.count("Woodbury", name, getattr(self, name), 1)

    def curvature(self, shape: Shape) -> Curvature:
        return SampleCurvature(shape, self)


@dataclass
class SampleCurvature(StateCurvature):
    """The samples of one batch, the Cholesky factor of λI + K, and the mean coefficients of the batches so far."""

    strategy: Woodbury
    # The γ of the kept samples. It identifies a gradient that is the pair of these samples.
    _source: ref[Tensor] | None = field(default=None, init=False)

    def absorb(self, rows: Rows, now: Now) -> None:
        """Keep the rows of a batch, if due, and factorise λI + K."""
        if not due(self.state, now.step, self.strategy.every):
            return
        # If `KFAC.curvature` gave no number of terms, each sample is one term.
        uses = rows.uses if rows.per_term else rows.uses // rows.positions
        samples = Samples.of(rows)._replace(uses=uses)
        if self.strategy.positions is not None:
            samples = samples.fewer_positions(self.strategy.positions, now.seed)
        new = {"inputs": samples.inputs, "gradients": samples.gradients}
        if not self._is_fixed:
            most = self.strategy.features
            gram = (samples if most is None else samples.some_features(most, now.seed)).gram()
            shift, _ = now.damping.of_matrix(gram)
            gram.diagonal().add_(shift)
            new |= {"factor": torch.linalg.cholesky_ex(gram).L, "shift": shift}
        for name, part in new.items():
            old = self.state.get(name)
            can_stay = isinstance(old, Tensor) and old.shape == part.shape
            self.state[name] = torch.where(now.finite, part, self.state[name]) if can_stay else part
        self.state |= {"uses": samples.uses, "positions": samples.positions}
        self._source = ref(rows.gradients) if samples.gradients is rows.gradients else None
        if self.strategy.fixed_after is not None and not self._is_fixed:
            self._average(samples, now)

    def solve(self, gradient: Gradient, now: Now) -> Gradient:
        """Return the step: the pair of these rows with γ scaled, or else ∂W / λ plus a combination of the v."""
        samples = Samples(*(self.state[name] for name in Samples._fields))
        source = None if self._source is None else self._source()
        pair = gradient if isinstance(gradient, tuple) else None
        if pair and source is not None and (pair[0].shape, pair[0].data_ptr()) == (source.mT.shape, source.data_ptr()):
            weights = self._coefficients(samples).repeat_interleave(samples.positions)
            return pair[0] * weights, pair[1]
        if self._is_fixed:
            rate = self.state["rate"]
            coefficients = (self._coefficients(samples) - rate) / samples.uses**0.5
        else:
            rate = 1 / self.state["shift"]
            products = samples.products(gradient)
            coefficients = -rate * self._solved(products)
            if self.strategy.features is not None:
                # With K from some features the step might go uphill, so ⟨step, ∂W⟩ may lose at most ‖∂W‖² / λ.
                lost = -(products @ coefficients).clamp_max(-torch.finfo(coefficients.dtype).tiny)
                coefficients = coefficients * (rate * inner_product(gradient, gradient) / lost).clamp_max(1)
        return add_scaled(scaled(gradient, rate), 1.0, samples.combined(coefficients, self.shape.d_in))

    def widest_pair(self, entries: int) -> int:
        """Accept every pair: its γ are only scaled, but a matrix takes two products with all samples."""
        return sys.maxsize

    def sizes(self, state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        groups, d_out, d_in = self.shape[:3]
        count = state["gradients"].shape[-2]
        inputs = (count,) if self.shape.one_hot else (*groups, count, d_in)
        return {"inputs": inputs, "gradients": (*groups, count, 1 if self.shape.single else d_out)}

    @property
    def _is_fixed(self) -> bool:
        """Whether the coefficients are the means of earlier batches."""
        most = self.strategy.fixed_after
        return most is not None and bool(self.state.get("batches", 0) >= most)

    def _solved(self, right: Tensor) -> Tensor:
        """Return (λI + K)⁻¹ times a vector."""
        factor = self.state["factor"]
        return torch.cholesky_solve(right.to(factor.dtype)[:, None], factor)[:, 0]

    def _coefficients(self, samples: Samples) -> Tensor:
        """Return (λI + K)⁻¹ 1, or its mean over earlier batches, which is kept in the order of ‖v‖."""
        if not self._is_fixed:
            return self._solved(torch.ones_like(self.state["factor"][0]))
        by_norm = _resampled(self.state["table"], samples.number)
        return torch.empty_like(by_norm).index_copy_(0, samples.squares().argsort(), by_norm)

    def _average(self, samples: Samples, now: Now) -> None:
        by_norm = self._coefficients(samples)[samples.squares().argsort()]
        if "batches" not in self.state:
            self.state |= {"batches": 0, "table": torch.zeros_like(by_norm), "rate": torch.zeros_like(by_norm[0])}
        batches, table, rate = (self.state[name] for name in ("batches", "table", "rate"))
        weight = now.finite.to(by_norm.dtype) / (batches + 1)
        self.state["table"] = table + weight * (_resampled(by_norm, len(table)) - table)
        self.state["rate"] = rate + weight * (1 / self.state["shift"] - rate)
        self.state["batches"] = batches + 1
        if self._is_fixed:
            del self.state["factor"], self.state["shift"]


def _resampled(values: Tensor, count: int) -> Tensor:
    """Return ``count`` of the values at even distances."""
    return values[torch.arange(count, device=values.device) * len(values) // count]
