"""Joins the rows of several processes into one batch, compressed if fewer rows suffice or a limit requires it."""

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
    """The numbers of a layer's rows in one process, and whether it had to leave the layer to the optimizer."""

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
    """The inputs or output gradients of a layer: the number of rows that each process sends, and the number kept.

    Each use has ``draws`` gradients, the first of all uses before the second. Each process's γ has one of ``weights``.
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
        """Whether the rows are one-hot, given by indices."""
        return self.shape.one_hot and self.name == "inputs"

    def empty(self, count: int, device: torch.device | str) -> Tensor:
        """Return empty memory for ``count`` rows, or an outline on the device ``"meta"``."""
        if self.is_index:
            return torch.empty(count, dtype=torch.int64, device=device)
        return torch.empty(*self.shape.groups, count, self.width, dtype=self.shape.dtype, device=device)


def parts_of(layer: Layer, shares: Sequence[Share], limit: int | None, *, from_curvature: bool) -> Iterator[Part]:
    """Yield the parts of a layer that are sent: inputs and gradients, if a factor is made of them.

    The γ are gradients of each process's loss, or come from the curvature of its terms (``from_curvature``).
    """
    curvature, shape = layer.curvature, layer.shape
    # The loss is the mean of W losses, so its gradients have γ times 1/W. For its curvature, N Σ γ γᵀ must be the mean
    # of the N_w Σ γ γᵀ of the processes, so γ is multiplied by √(N_w / (N W)).
    world, uses = len(shares), sum(share.uses for share in shares)
    weights = [math.sqrt(share.uses / (uses * world)) if from_curvature else 1 / world for share in shares]
    # Other curvatures, and solves that read rows, need the pairs of single uses as they are.
    by_factor = isinstance(curvature, Kronecker) and not layer.strategy.reads_rows
    factors = dict(curvature.factors()) if by_factor else {}
    for name, side in SIDES.items():
        if (by_factor and side not in factors) or (shape.single and name == "gradients"):
            continue
        counts = [share.gradients if name == "gradients" else share.inputs for share in shares]
        sent, kept, draws = counts, sum(counts), 1
        if by_factor and not (shape.one_hot and name == "inputs"):
            n, kept = factors[side].n, kept if limit is None else min(limit, kept)
            # n rows hold all of AᵀA. Compression to n rows pays off if they are less than half.
            sent = [min(kept, n) if count > min(kept, 2 * n) else count for count in counts]
            kept = sum(sent) if sum(sent) <= kept else min(kept, n)
        elif name == "gradients" or shape.single:
            # In single layers the inputs are the same rows as the gradients, so draws repeat both.
            rows = [(share.gradients, share.uses if shape.single else share.inputs) for share in shares if share.uses]
            draws = max(gradients // inputs for gradients, inputs in rows)
        yield Part(layer, name, shape, sent, kept, draws, weights)


def rows_to_send(part: Part, rows: Rows | None, rank: int, seed: int) -> Tensor:
    """Return the rows that this process sends: its own, or fewer with the same sum of outer products."""
    if rows is None:
        return part.empty(part.sent[rank], part.shape.device)
    sent: Tensor = getattr(rows, part.name)
    if part.is_index:
        return sent.long()
    if part.name == "gradients" or part.shape.single:
        sent = sent * part.weights[rank]
    return compressed(sent.to(part.shape.dtype), part.sent[rank], seed)


def joined_rows(
    shares: Mapping[Layer, Sequence[Share]], parts: Sequence[Part], pieces: Sequence[list[Tensor] | None], seed: int
) -> dict[Layer, Rows]:
    """Return the rows of all processes as one batch. Parts that this process does not receive have no rows."""
    joined: dict[tuple[Layer, Name], Tensor] = {}
    for part, received in zip(parts, pieces, strict=True):
        if received is None:
            found = part.empty(0, part.shape.device)
        elif part.is_index:
            found = torch.cat(received)
        else:
            by_draw = [piece.unflatten(-2, (part.draws, piece.shape[-2] // part.draws)) for piece in received]
            found = compressed(torch.cat(by_draw, dim=-2).flatten(-3, -2), part.kept, seed)
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


def compressed(rows: Tensor, count: int, seed: int) -> Tensor:
    """Return ``count`` ≤ n rows B of length n with BᵀB ≈ AᵀA in place of A (..., k, n): equal if ``count`` is n.

    The rows are the leading right singular vectors times their singular values. So BᵀB is nearly the best matrix of
    rank ``count``, and AᵀA − BᵀB is positive semi-definite.
    """
    if rows.shape[-2] <= count:
        return rows
    generator = torch.Generator(rows.device).manual_seed(seed)
    svd = randomized_svd(rows.mT, count, generator=generator)
    return (svd.U * svd.S[..., None, :]).mT
