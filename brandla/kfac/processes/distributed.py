"""Replicas of a model: their processes exchange rows and factors, so that all of them take the same step.

The loss is the mean over processes of their own losses, as DistributedDataParallel averages gradients. So all rows of
all processes are rows of one batch, with γ multiplied by what makes it that of the mean (``docs/many-machines.md``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, distributed

from brandla.kfac.capture.layer import Layer, by_strategy
from brandla.kfac.capture.mask import Mask
from brandla.kfac.processes.exchange import SIDES, Part, Share, assembled, outgoing, parts_of
from brandla.kfac.processes.messages import Ranks
from brandla.kfac.systems.factor import Factor
from brandla.kfac.systems.kronecker import Kronecker
from brandla.kfac.values import Now, Rows, Version

Mode: TypeAlias = Literal["gather", "split"]
# A factor, by its layer's place in the model and its side; or all of a layer's curvature, whose side is "".
Unit: TypeAlias = tuple[int, str]


class Replicas:
    """The processes that hold the model, and who of them takes in which rows: here one process, which takes in its own.

    ``several`` says whether every process has a batch of its own, so that a gradient is not that of the rows captured
    here. ``rank`` is this process among them, and ``world`` their number.
    """

    several = False
    rank = 0
    world = 1

    def exchange(
        self, own: Mapping[Layer, Rows], mask: Mask, seed: int, told: Tensor | float
    ) -> tuple[Mask, dict[Layer, Rows]]:
        """Return whether everything is finite everywhere, and the rows, or zeros, that this process is to take in.

        ``told`` is how many terms this process's loss is a mean of, where rows are its gradients; 0 if that is unknown.
        """
        return mask, {layer: _of_terms(layer, rows, told) for layer, rows in mask.rows(own).items()}

    def absorb(self, rows: Mapping[Layer, Rows], now: Now) -> None:
        """Take rows into the curvatures, those of one strategy together, so that all processes can solve with them."""
        for strategy, members in by_strategy(rows):
            strategy.absorb([layer.curvature for layer in members], [rows[layer] for layer in members], now)

    def mean(self, number: Tensor) -> Tensor:
        """Return the mean over the processes of a 0-dim tensor."""
        return number

    @contextmanager
    def complete(self) -> Iterator[None]:
        """Hold all of every curvature for the time being."""
        yield


class Gather(Replicas):
    """Every process takes in the rows of all: their factors are equal without ever being compared."""

    several = True

    def __init__(self, layers: Sequence[Layer], ranks: Ranks, most: int | None, *, of_terms: bool) -> None:
        self.rank, self.world = ranks.rank, ranks.world
        self._layers = layers
        self._ranks = ranks
        self._most = most
        self._of_terms = of_terms

    def exchange(
        self, own: Mapping[Layer, Rows], mask: Mask, seed: int, told: Tensor | float
    ) -> tuple[Mask, dict[Layer, Rows]]:
        """Count the rows and terms of all processes, then send the rows to where they are taken in."""
        finite, of_all, shares = self._census(own, mask.finite, told)
        mask = Mask(torch.full_like(mask.finite, finite), finite)
        clean: dict[Layer, Rows] = {}
        for layer, found in mask.rows(own).items():
            if layer in shares:
                uses = sum(share.uses for share in shares[layer])
                clean[layer] = _of_terms(layer, found, of_all * found.uses / uses)
        by_layer = [parts_of(layer, each, self._most, of_terms=self._of_terms) for layer, each in shares.items()]
        parts = list(chain(*by_layer))
        if not parts:
            return mask, {}
        rows = assembled(shares, parts, self._sent(parts, clean, seed), seed)
        if self._of_terms or of_all:
            rows = {layer: found._replace(counted=True) for layer, found in rows.items()}
        return mask, rows

    def mean(self, number: Tensor) -> Tensor:
        return self._ranks.mean(number)

    def _census(
        self, own: Mapping[Layer, Rows], finite: Tensor, told: Tensor | float
    ) -> tuple[bool, float, dict[Layer, list[Share]]]:
        """Say whether all rows are finite, how many terms all losses are means of, and how many rows each process has.

        A layer that one process cannot precondition is left alone by all.
        """
        shares = [Share.of(own.get(layer), refused=bool(layer.capture.refusal)) for layer in self._layers]
        everyone = self._ranks.numbers((finite, told), [number for share in shares for number in share])
        width = len(Share._fields)
        found: dict[Layer, list[Share]] = {}
        for index, layer in enumerate(self._layers):
            start = 2 + index * width
            of_ranks = [Share(*map(int, numbers[start : start + width])) for numbers in everyone]
            if any(share.refused for share in of_ranks):
                layer.capture.refusal = layer.capture.refusal or "another process cannot precondition it"
            elif any(share.uses for share in of_ranks):
                found[layer] = of_ranks
        return all(numbers[0] for numbers in everyone), sum(numbers[1] for numbers in everyone), found

    def _sent(self, parts: Sequence[Part], own: Mapping[Layer, Rows], seed: int) -> list[list[Tensor] | None]:
        """Send the parts, and return those received from every process; None for a part taken in elsewhere."""
        sent = [outgoing(part, own.get(part.layer), self.rank, seed) for part in parts]
        outlines = [[part.empty(part.sent[rank], "meta") for part in parts] for rank in range(self.world)]
        by_rank = self._ranks.to_all(sent, outlines)
        return [list(pieces) for pieces in zip(*by_rank, strict=True)]


class Split(Gather):
    """Each factor belongs to one process, which alone takes in rows for it, and sends all others what solving reads.

    When they see their first data, factors go to the process that has least to do, the most expensive first. A
    curvature that is no pair of factors belongs to one process as a whole. Where the solve of a strategy reads the rows
    of the step, its curvatures belong to all.
    """

    def __init__(self, layers: Sequence[Layer], ranks: Ranks, most: int | None, *, of_terms: bool) -> None:
        super().__init__(layers, ranks, most, of_terms=of_terms)
        self._owners: dict[Unit, int] = {}
        self._loads = [0.0] * ranks.world
        self._published: dict[Unit, dict[str, Version]] = {}
        self._index = {layer: index for index, layer in enumerate(layers)}

    def absorb(self, rows: Mapping[Layer, Rows], now: Now) -> None:
        """Take in the rows of this process's factors, and publish the changes."""
        for strategy, members in by_strategy(rows):
            # Factors are fed together: one that belongs elsewhere has no rows here.
            if strategy.reads_rows or all(isinstance(layer.curvature, Kronecker) for layer in members):
                strategy.absorb([layer.curvature for layer in members], [rows[layer] for layer in members], now)
                continue
            for index, layer in enumerate(members):
                if isinstance(layer.curvature, Kronecker) or self._owners.get((self._index[layer], "")) == self.rank:
                    strategy.absorb([layer.curvature], [rows[layer]], now._replace(seed=now.seed + index))
        if rows:
            self._publish(rows)

    @contextmanager
    def complete(self) -> Iterator[None]:
        """Hold all of every curvature: all processes must come here, and have the memory."""
        factors = {unit: factor for unit in self._owners if (factor := self._factor(unit)) is not None}
        kept = {unit: factor.state for unit, factor in factors.items()}
        own = {unit: dict(state) for unit, state in kept.items() if self._owners[unit] == self.rank}
        try:
            for published in self._ranks.publish(own):
                for unit, state in published.items():
                    factors[unit].state = state
            yield
        finally:
            for unit, state in kept.items():
                factors[unit].state = state

    def _sent(self, parts: Sequence[Part], own: Mapping[Layer, Rows], seed: int) -> list[list[Tensor] | None]:
        owners = self._owners_of(parts)
        wanted = [
            [part for part, owner in zip(parts, owners, strict=True) if owner in (rank, None)]
            for rank in range(self.world)
        ]
        sent = {id(part): outgoing(part, own.get(part.layer), self.rank, seed) for part in parts}
        by_rank = self._ranks.to_each(
            [[sent[id(part)] for part in those] for those in wanted],
            [[part.empty(part.sent[rank], "meta") for part in wanted[self.rank]] for rank in range(self.world)],
        )
        received = dict(zip(map(id, wanted[self.rank]), map(list, zip(*by_rank, strict=True)), strict=True))
        return [received.get(id(part)) for part in parts]

    def _owners_of(self, parts: Sequence[Part]) -> list[int | None]:
        """Give units that are new their owners, and return those of the parts; None stands for all processes."""
        units: list[Unit | None] = []
        costs: dict[Unit, float] = {}
        for part in parts:
            is_pair = isinstance(part.layer.curvature, Kronecker)
            unit: Unit = self._index[part.layer], SIDES[part.name] if is_pair else ""
            units.append(None if part.layer.strategy.reads_rows else unit)
            if units[-1] is not None and unit not in self._owners:
                costs[unit] = costs.get(unit, 0.0) + self._cost(unit, part)
        for unit in sorted(costs, key=lambda unit: (-costs[unit], unit)):
            owner = self._loads.index(min(self._loads))
            self._owners[unit] = owner
            self._loads[owner] += costs[unit]
            factor = self._factor(unit)
            # One that was continued from a checkpoint, and belongs to another process.
            if factor is not None and factor.started and owner != self.rank:
                factor.state = factor.strategy.solving(factor.state)
        return [None if unit is None else self._owners[unit] for unit in units]

    def _cost(self, unit: Unit, part: Part) -> float:
        """Estimate the flops of a step with the part: k columns against a matrix, and its decomposition."""
        factor = self._factor(unit)
        if factor is None:
            return float(part.kept + part.width) * part.width**2
        # Of n × n numbers that is n²(k + n), of n × r numbers n r (k + r), and of vectors their length.
        vectors = len(factor.shape.groups) + 1
        return float(
            sum(own.numel() * (own.shape[-1] + part.kept if own.ndim > vectors else 1) for own in factor.outline())
        )

    def _publish(self, rows: Mapping[Layer, Rows]) -> None:
        """Send the changes of this process's units to all, and store those that come in.

        Of a factor they are the tensors that were replaced or written to.
        """
        due = {self._index[layer] for layer in rows}
        own: dict[Unit, dict[str, Any]] = {}
        for unit in (unit for unit, owner in self._owners.items() if unit[0] in due and owner == self.rank):
            factor, known = self._factor(unit), self._published.get(unit, {})
            if factor is None:
                own[unit] = self._layers[unit[0]].curvature.state_dict()
            else:
                found = factor.strategy.solving(factor.state).items()
                own[unit] = {name: part for name, part in found if not (name in known and known[name].matches(part))}
        for published in self._ranks.publish(own):
            for unit, state in published.items():
                layer, factor = self._layers[unit[0]], self._factor(unit)
                if factor is None:
                    layer.curvature = layer.curvature.loaded(state, layer.name)
                else:
                    factor.state.update(state)
                    if self._owners[unit] == self.rank:
                        sent = factor.strategy.solving(factor.state).items()
                        self._published[unit] = {key: Version(part) for key, part in sent if isinstance(part, Tensor)}

    def _factor(self, unit: Unit) -> Factor | None:
        index, side = unit
        # mypy does not see that a side that is named is one of the two.
        return dict(self._layers[index].curvature.factors())[side] if side else None  # type: ignore[index]


def replicas(
    layers: Sequence[Layer], mode: Mode, group: distributed.ProcessGroup | None, most: int | None, *, of_terms: bool
) -> Replicas:
    """Return the processes of a group, or of all if None; this one alone where there is no group.

    Rows are of the gradients of the processes' losses, or of the curvature of their terms (``of_terms``).
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size(group) == 1:
        return Replicas()
    ranks = Ranks(group, layers[0].kind.weight.device)
    kind = Gather if mode == "gather" else Split
    return kind(layers, ranks, most, of_terms=of_terms)


def _of_terms(layer: Layer, rows: Rows, number: Tensor | float) -> Rows:
    """Have N Σ γ γᵀ be M Σ γ γᵀ for a mean of M terms, padding or not, where M is told.

    Second passes compare γ as they are.
    """
    if layer.strategy.takes_second_pass or (not isinstance(number, Tensor) and number == 0):
        return rows
    uses = rows.uses if rows.share is None else rows.uses * rows.share
    return rows.of_terms((uses / number) ** 0.5)
