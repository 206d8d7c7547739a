"""One side of an inverse-free curvature: K of a structure, with K Kᵀ close to the inverse of a factor never formed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from brandla import _check
from brandla.kfac.systems.structures import Member, Structure
from brandla.kfac.values import Now, Shape


class RowBatch(NamedTuple):
    """M = scale · XᵀX of rows X (*groups, N, n)."""

    rows: Tensor
    scale: float

    def start(self) -> Tensor:
        """Return the longest row: M does not map it to 0, unless M is 0."""
        longest = self.rows.square().sum(-1).argmax(-1)
        return self.rows.take_along_dim(longest[..., None, None], -2).squeeze(-2)

    def times(self, vector: Tensor) -> Tensor:
        """Return scale · Xᵀ(X v)."""
        image: Tensor = self.rows.mT @ (self.rows @ vector[..., None])
        return self.scale * image.squeeze(-1)

    def mean_eigenvalue(self) -> Tensor:
        """Return tr M / n, shape (*groups,)."""
        return self.scale * self.rows.square().sum((-2, -1)) / self.rows.shape[-1]

    def seen_by(self, structure: Structure, root: Member) -> Member:
        """Return Π(KᵀMK), from the Gram matrix of X K."""
        return structure.combine((self.scale, structure.gram(structure.times(self.rows, root))))


class CountBatch(NamedTuple):
    """M = diag(f) of one-hot rows, for the frequencies f (n,) of each place; its structure is diagonal."""

    frequencies: Tensor

    @classmethod
    def of(cls, indices: Tensor, scale: float, n: int, dtype: torch.dtype) -> CountBatch:
        """Count indices (N,), −1 being a row of zeros, ``scale`` for each."""
        shares = scale * (indices >= 0).to(dtype)
        return cls(shares.new_zeros(n).index_add_(0, indices.clamp(min=0), shares))

    def start(self) -> Tensor:
        return self.frequencies

    def times(self, vector: Tensor) -> Tensor:
        return self.frequencies * vector

    def mean_eigenvalue(self) -> Tensor:
        return self.frequencies.mean(-1)

    def seen_by(self, structure: Structure, root: Member) -> Member:
        """Return Π(KᵀMK) = K² f."""
        return (root[0].square() * self.frequencies,)


# The factor M of one batch, as what it is multiplied by.
Batch: TypeAlias = RowBatch | CountBatch


class Move(NamedTuple):
    """The direction of K's step: m = ½ (``curvature`` · ``seen`` + ``damping`` · ``own`` − I), numbers (*groups,)."""

    seen: Member  # Π(KᵀMK)
    own: Member  # Π(KᵀK)
    curvature: Tensor | float
    damping: Tensor


@dataclass
class InverseRoot:
    """K and its momentum, with a running estimate of the largest eigenvalue of M.

    ``direction`` / ``total`` is the exponential average of M_t v_t, M_t being the factors of batches and v_t the
    direction before each: a power iteration along the stream, whose length estimates the largest eigenvalue from below.
    """

    n: int
    structure: Structure
    root: Member
    momentum: Member
    direction: Tensor
    total: Tensor

    @classmethod
    def start(cls, n: int, structure: Structure, shape: Shape, *, with_momentum: bool) -> InverseRoot:
        """Begin with K = I."""
        of = shape.groups, shape.dtype, shape.device
        identity = structure.identity(n, *of)
        momentum = tuple(torch.zeros_like(part) for part in identity) if with_momentum else ()
        direction = torch.zeros(*shape.groups, n, dtype=shape.dtype, device=shape.device)
        return cls(n, structure, identity, momentum, direction, direction.new_zeros(()))

    def largest(self) -> Tensor:
        """Estimate the largest eigenvalue of M, shape (*groups,); 0 before any data but zeros."""
        length = _length(self.direction)
        return length / torch.where(self.total > 0, self.total, 1)

    def observe(self, batch: Batch, now: Now) -> None:
        """Take a batch into the estimate of the largest eigenvalue."""
        known = (self.largest() > 0)[..., None]
        start = torch.where(known, self.direction, batch.start())
        length = _length(start)[..., None]
        unit = start / torch.where(length > 0, length, 1)
        weight = (1 - now.decay) * now.finite.to(start.dtype)
        self.direction = (1 - weight) * self.direction + weight * batch.times(unit)
        self.total = (1 - weight) * self.total + weight

    def restart(self, where: Tensor, length: Tensor) -> None:
        """K ← ``length`` · I in the groups ``where``."""
        identity = self.structure.identity(self.n, (), length.dtype, length.device)
        self.root = self.structure.combine(
            ((~where).to(length.dtype), self.root), (torch.where(where, length, 0), identity)
        )

    def look(self, batch: Batch) -> tuple[Member, Member]:
        """Return Π(KᵀMK) and Π(KᵀK)."""
        return batch.seen_by(self.structure, self.root), self.structure.own_gram(self.root)

    def move(self, towards: Move, rate: float, decay: float, finite: Tensor) -> None:
        """m̄ ← ``decay`` · m̄ + m and K ← K − β K m̄, β at most ``rate`` and 1 / ‖m̄‖_F; nothing unless finite."""
        structure = self.structure
        finite = finite.to(self.total.dtype)
        half = 0.5 * finite
        terms = [
            (half * towards.curvature, towards.seen),
            (half * towards.damping, towards.own),
            (-half, structure.identity(self.n, (), self.total.dtype, self.total.device)),
        ]
        if self.momentum:
            terms.append((1 - finite * (1 - decay), self.momentum))
        momentum = structure.combine(*terms)
        if self.momentum:
            self.momentum = momentum
        length = structure.squared_norm(momentum).sqrt()
        beta = finite * rate / (rate * length).clamp(min=1)
        self.root = structure.combine((1, self.root), (-beta, structure.product(self.root, momentum)))

    def apply(self, rows: Tensor) -> Tensor:
        """Return X K Kᵀ for rows X (*groups, N, n)."""
        return self.structure.times_transposed(self.structure.times(rows, self.root), self.root)

    def tensors(self) -> tuple[Tensor, ...]:
        return *self.root, *self.momentum, self.direction, self.total

    def state_dict(self) -> dict[str, Any]:
        return {
            "structure": repr(self.structure),
            "root": _saved(self.root),
            "momentum": _saved(self.momentum),
            "direction": self.direction.clone(),
            "total": self.total.clone(),
        }

    def loaded(self, state: dict[str, Any], where: str) -> InverseRoot:
        if state["structure"] != repr(self.structure):
            rule = f"{where}: the structure must be {self.structure!r}; the state has {state['structure']}"
            _check.fail_value("KFAC.load_state_dict", rule)
        return InverseRoot(
            self.n,
            self.structure,
            _loaded(self.root, _parts(state["root"]), f"{where}: root"),
            _loaded(self.momentum, _parts(state["momentum"]), f"{where}: momentum"),
            *_loaded((self.direction, self.total), (state["direction"], state["total"]), f"{where}: estimate"),
        )


def _length(vectors: Tensor) -> Tensor:
    """Return lengths along the last dimension, also where squares overflow or vanish: of M v, data to the fourth."""
    largest = vectors.abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 0, largest, 1)
    length: Tensor = torch.linalg.vector_norm(vectors / scale, dim=-1) * scale.squeeze(-1)
    return length


def _saved(member: Member) -> dict[str, Tensor]:
    """Return copies by number: torch.distributed.checkpoint gives no lists back."""
    return {str(index): part.clone() for index, part in enumerate(member)}


def _parts(saved: Mapping[str, Tensor]) -> list[Tensor]:
    return [saved[str(index)] for index in range(len(saved))]


def _loaded(templates: Sequence[Tensor], saved: Sequence[Tensor], where: str) -> Member:
    wanted, shapes = ([tuple(part.shape) for part in parts] for parts in (templates, saved))
    if wanted != shapes:
        _check.fail_value("KFAC.load_state_dict", f"{where} must have shapes {wanted}; got {shapes}")
    return tuple(
        part.to(device=template.device, dtype=template.dtype, copy=True)
        for template, part in zip(templates, saved, strict=True)
    )
