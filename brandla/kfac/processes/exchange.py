"""Rows of several processes as those of one batch, with fewer columns where that is enough or has to be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from brandla.kfac.capture.layer import Layer
from brandla.kfac.systems.kronecker import Kronecker
from brandla.kfac.values import Rows, Shape, Side
from brandla.randomized import randomized_svd

Name = Literal["inputs", "gradients"]
SIDES: dict[Name, Side] = {"inputs": "input", "gradients": "output"}


class Share(NamedTuple):
    """How much of a layer's rows one process has, and whether it had to leave the layer to the optimizer."""

    inputs: int
    gradients: int
    uses: int
    positions: int
    refused: int

    @classmethod
    def of(cls, rows: Rows | None, *, refused: bool) -> Share:
        if rows is None:
            return cls(0, 0, 0, 0, int(refused))
        inputs = rows.inputs.shape[-2] if rows.inputs.is_floating_point() else len(rows.inputs)
        return cls(inputs, rows.gradients.shape[-2], rows.uses, rows.positions, int(refused))


class Part(NamedTuple):
    """Inputs or output gradients of a layer: rows sent by each process, and how many are kept of all together.

    ``draws`` gradients of every use come one after the other, all uses of the first before those of the second. The γ
    of each process are multiplied by its one of ``weights``.
    """

    layer: Layer
    name: Name
    shape: Shape
    sent: list[int]
    kept: int
    draws: int
    weights: list[float]

    @property
    def width(self) -> int:
        return self.shape.d_out if self.name == "gradients" else self.shape.d_in

    @property
    def is_index(self) -> bool:
        """Whether the rows are given by the places of their ones."""
        return self.shape.one_hot and self.name == "inputs"

    def empty(self, count: int, device: torch.device | str) -> Tensor:
        """Return memory for so many rows; none on the device ``"meta"``."""
        if self.is_index:
            return torch.empty(count, dtype=torch.int64, device=device)
        return torch.empty(*self.shape.groups, count, self.width, dtype=self.shape.dtype, device=device)


def parts_of(layer: Layer, shares: Sequence[Share], most: int | None, *, of_terms: bool) -> Iterator[Part]:
    """Go through the parts of a layer that are sent: inputs and gradients, if a factor is made of them.

    The γ are those of each process's own loss, or those of the curvature of its terms (``of_terms``).
    """
    curvature, shape = layer.curvature, layer.shape
    # They make W losses one, their mean: γ times 1/W for its gradients. For its curvature N Σ γ γᵀ has to be the mean
    # of the N_w Σ γ γᵀ of the processes: √(N_w / (N W)).
    world, uses = len(shares), sum(share.uses for share in shares)
    weights = [math.sqrt(share.uses / (uses * world)) if of_terms else 1 / world for share in shares]
    # Other curvatures, and solves that read rows, need the pairs of single uses as they are.
    by_factor = isinstance(curvature, Kronecker) and not layer.strategy.reads_rows
    factors = dict(curvature.factors()) if by_factor else {}
    for name, side in SIDES.items():
        if (by_factor and side not in factors) or (shape.single and name == "gradients"):
            continue
        counts = [share.gradients if name == "gradients" else share.inputs for share in shares]
        sent, kept, draws = counts, sum(counts), 1
        if by_factor and not (shape.one_hot and name == "inputs"):
            n, kept = factors[side].n, kept if most is None else min(most, kept)
            # n columns hold all of A Aᵀ: worth finding where they are less than half.
            sent = [min(kept, n) if count > min(kept, 2 * n) else count for count in counts]
            kept = sum(sent) if sum(sent) <= kept else min(kept, n)
        elif name == "gradients" or shape.single:
            # The gradients of single layers are rows of both.
            rows = [(own.gradients, own.uses if shape.single else own.inputs) for own in shares if own.uses]
            draws = max(gradients // inputs for gradients, inputs in rows)
        yield Part(layer, name, shape, sent, kept, draws, weights)


def outgoing(part: Part, rows: Rows | None, rank: int, seed: int) -> Tensor:
    """Return the rows that this process sends: its own, or fewer with the same sum of outer products."""
    if rows is None:
        return part.empty(part.sent[rank], part.shape.device)
    own: Tensor = getattr(rows, part.name)
    if part.is_index:
        return own.long()
    if part.name == "gradients" or part.shape.single:
        own = own * part.weights[rank]
    return fewer(own.to(part.shape.dtype), part.sent[rank], seed)


def assembled(
    shares: Mapping[Layer, Sequence[Share]], parts: Sequence[Part], pieces: Sequence[list[Tensor] | None], seed: int
) -> dict[Layer, Rows]:
    """Return the rows of all processes as one batch; parts that did not come here have no rows."""
    joined: dict[tuple[Layer, Name], Tensor] = {}
    for part, own in zip(parts, pieces, strict=True):
        if own is None or part.is_index:
            found = part.empty(0, part.shape.device) if own is None else torch.cat(own)
        else:
            by_draw = [piece.unflatten(-2, (part.draws, piece.shape[-2] // part.draws)) for piece in own]
            found = fewer(torch.cat(by_draw, dim=-2).flatten(-3, -2), part.kept, seed)
        joined[part.layer, part.name] = found
    rows = {}
    for layer, of_ranks in shares.items():
        shape = layer.shape
        empty = torch.empty(*shape.groups, 0, 0, dtype=shape.dtype, device=shape.device)
        inputs = joined.get((layer, "inputs"), empty)
        gradients = inputs if shape.single else joined.get((layer, "gradients"), empty)
        positions = {share.positions for share in of_ranks if share.uses}
        position_count, uses = positions.pop() if len(positions) == 1 else 1, sum(share.uses for share in of_ranks)
        rows[layer] = Rows(inputs, gradients, uses, position_count, shape.single)
    return rows


def fewer(rows: Tensor, count: int, seed: int) -> Tensor:
    """Return ``count`` rows B of length n, at most n, in place of A (..., k, n) with BᵀB ≈ AᵀA: all of it if n.

    They are the leading right singular vectors times their values, so BᵀB is nearly the best of rank ``count``, and
    never more than AᵀA.
    """
    if rows.shape[-2] <= count:
        return rows
    generator = torch.Generator(rows.device).manual_seed(seed)
    svd = randomized_svd(rows.mT, count, generator=generator)
    return (svd.U * svd.S[..., None, :]).mT
