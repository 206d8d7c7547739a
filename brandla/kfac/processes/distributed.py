"""Replicas of a model: their processes exchange rows and factors, so that all of them take the same step.

The loss is the mean of the processes' losses, as DistributedDataParallel averages gradients. So the rows of all
processes are rows of one batch, with γ scaled to the gradient of the mean (``docs/many-machines.md``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, distributed

from brandla.kfac.capture.finite import FiniteCheck
from brandla.kfac.capture.layer import Layer, by_strategy
from brandla.kfac.processes.exchange import SIDES, Part, Share, joined_rows, parts_of, rows_to_send
from brandla.kfac.processes.messages import Ranks
from brandla.kfac.systems.factor import Factor
from brandla.kfac.systems.kronecker import Kronecker
from brandla.kfac.values import Now, Rows, Version

Mode: TypeAlias = Literal["gather", "split"]
# A factor, by its layer's index in the model and its side, or all of a layer's curvature, with the side "".
Unit: TypeAlias = tuple[int, str]
Group: TypeAlias = "distributed.ProcessGroup | None"


class Replicas:
    """The processes that hold the model, and the rows that each of them takes in: here one process and its own rows.

    ``rank`` is the number of this process, and ``world`` the number of processes. If they are ``several``, each has its
    own batch, and a gradient does not come from the rows captured here alone.
    """

    several = False
    rank = 0
    world = 1

    def exchange(
        self, own: Mapping[Layer, Rows], check: FiniteCheck, seed: int, terms: Tensor | float
    ) -> tuple[FiniteCheck, dict[Layer, Rows]]:
        """Return whether the data of all processes are finite, and the rows, or zeros, that this process takes in.

        If rows are gradients of this process's loss, ``terms`` is the number of terms in its mean; 0 if it is unknown.
        """
        return check, {layer: _scaled_to_terms(layer, rows, terms) for layer, rows in check.rows(own).items()}

    def absorb(self, rows: Mapping[Layer, Rows], now: Now) -> None:
        """Take rows into the curvatures, those of one strategy together, so that all processes can solve with them."""
        for strategy, members in by_strategy(rows):
            strategy.absorb([layer.curvature for layer in members], [rows[layer] for layer in members], now)

    def mean(self, number: Tensor) -> Tensor:
        """Return the mean over the processes of a 0-dim tensor."""
        return number

    @contextmanager
    def complete(self) -> Iterator[None]:
        """Give this process the whole state of every curvature inside the block."""
        yield


class Gather(Replicas):
    """Every process takes in the rows of all, so their factors are equal without a comparison."""

    several = True

    def __init__(self, layers: Sequence[Layer], ranks: Ranks, columns: int | None, *, from_curvature: bool) -> None:
        self.rank, self.world = ranks.rank, ranks.world
        self._layers = layers
        self._ranks = ranks
        self._columns = columns
        self._from_curvature = from_curvature

    def exchange(
        self, own: Mapping[Layer, Rows], check: FiniteCheck, seed: int, terms: Tensor | float
    ) -> tuple[FiniteCheck, dict[Layer, Rows]]:
        """Count the rows and terms of all processes, then send the rows to the processes that take them in."""
        finite, all_terms, shares = self._counted(own, check.finite, terms)
        check = FiniteCheck(torch.full_like(check.finite, finite), finite)
        clean: dict[Layer, Rows] = {}
        for layer, rows in check.rows(own).items():
            if layer in shares:
                uses = sum(share.uses for share in shares[layer])
                clean[layer] = _scaled_to_terms(layer, rows, all_terms * rows.uses / uses)
        parts: list[Part] = []
        for layer, of_ranks in shares.items():
            parts += parts_of(layer, of_ranks, self._columns, from_curvature=self._from_curvature)
        if not parts:
            return check, {}
        joined = joined_rows(shares, parts, self._exchanged(parts, clean, seed), seed)
        if self._from_curvature or all_terms:
            joined = {layer: rows._replace(per_term=True) for layer, rows in joined.items()}
        return check, joined

    def mean(self, number: Tensor) -> Tensor:
        return self._ranks.mean(number)

    def _counted(
        self, own: Mapping[Layer, Rows], finite: Tensor, terms: Tensor | float
    ) -> tuple[bool, float, dict[Layer, list[Share]]]:
        """Return whether all rows are finite, the number of terms of all losses, and the shares of each process.

        If one process cannot precondition a layer, no process does.
        """
        shares = [Share.of(own.get(layer), refused=bool(layer.capture.refusal)) for layer in self._layers]
        everyone = self._ranks.numbers((finite, terms), [number for share in shares for number in share])
        width = len(Share._fields)
        by_layer: dict[Layer, list[Share]] = {}
        for index, layer in enumerate(self._layers):
            start = 2 + index * width
            of_ranks = [Share(*map(int, numbers[start : start + width])) for numbers in everyone]
            if any(share.refused for share in of_ranks):
                layer.capture.refusal = layer.capture.refusal or "another process cannot precondition it"
            elif any(share.uses for share in of_ranks):
                by_layer[layer] = of_ranks
        return all(numbers[0] for numbers in everyone), sum(numbers[1] for numbers in everyone), by_layer

    def _exchanged(self, parts: Sequence[Part], own: Mapping[Layer, Rows], seed: int) -> list[list[Tensor] | None]:
        """Send the parts, and return those received from every process; None for a part that belongs elsewhere."""
        sent = [rows_to_send(part, own.get(part.layer), self.rank, seed) for part in parts]
        outlines = [[part.empty(part.sent[rank], "meta") for part in parts] for rank in range(self.world)]
        by_rank = self._ranks.all_gather(sent, outlines)
        return [list(pieces) for pieces in zip(*by_rank, strict=True)]


class Split(Gather):
    """Each factor belongs to one process, which alone takes in its rows. It sends the tensors that solves read to all.

    At their first data, the most expensive factors go first, each to the process with the least work. A curvature that
    is not a pair of factors belongs to one process as a whole. If the solve of a strategy reads the rows of the step,
    its curvatures belong to all.
    """

    def __init__(self, layers: Sequence[Layer], ranks: Ranks, columns: int | None, *, from_curvature: bool) -> None:
        super().__init__(layers, ranks, columns, from_curvature=from_curvature)
        self._owners: dict[Unit, int] = {}
        self._loads = [0.0] * ranks.world
        self._published: dict[Unit, dict[str, Version]] = {}
        self._index = {layer: index for index, layer in enumerate(layers)}

    def absorb(self, rows: Mapping[Layer, Rows], now: Now) -> None:
        """Take in the rows of this process's factors, and publish the changes."""
        for strategy, members in by_strategy(rows):
            # Factors absorb together: those that belong elsewhere have no rows here.
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
        """Give this process the whole state of every curvature. All processes must call this, and have the memory."""
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

    def _exchanged(self, parts: Sequence[Part], own: Mapping[Layer, Rows], seed: int) -> list[list[Tensor] | None]:
        owners = self._owners_of(parts)
        wanted = [
            [part for part, owner in zip(parts, owners, strict=True) if owner in (rank, None)]
            for rank in range(self.world)
        ]
        sent = {id(part): rows_to_send(part, own.get(part.layer), self.rank, seed) for part in parts}
        by_rank = self._ranks.all_to_all(
            [[sent[id(part)] for part in for_rank] for for_rank in wanted],
            [[part.empty(part.sent[rank], "meta") for part in wanted[self.rank]] for rank in range(self.world)],
        )
        received = dict(zip(map(id, wanted[self.rank]), map(list, zip(*by_rank, strict=True)), strict=True))
        return [received.get(id(part)) for part in parts]

    def _owners_of(self, parts: Sequence[Part]) -> list[int | None]:
        """Assign owners to new units, and return the owners of the parts; None means all processes."""
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
            # After a checkpoint is loaded, every process has all of a factor. Only the owner keeps it.
            if factor is not None and factor.started and owner != self.rank:
                factor.state = factor.form.solving(factor.state)
        return [None if unit is None else self._owners[unit] for unit in units]

    def _cost(self, unit: Unit, part: Part) -> float:
        """Estimate the flops of a step: k columns times each matrix of the factor, and its decomposition."""
        factor = self._factor(unit)
        if factor is None:
            return float(part.kept + part.width) * part.width**2
        # n²(k + n) for an n × n matrix, n r (k + r) for an n × r matrix, and the length of a vector.
        flops, vector_ndim = 0, len(factor.shape.groups) + 1
        for tensor in factor.outline():
            flops += tensor.numel() * (tensor.shape[-1] + part.kept if tensor.ndim > vector_ndim else 1)
        return float(flops)

    def _publish(self, rows: Mapping[Layer, Rows]) -> None:
        """Send the changes of this process's units to all, and store the changes of the others.

        The changes of a factor are the tensors that were replaced or written to.
        """
        due = {self._index[layer] for layer in rows}
        own: dict[Unit, dict[str, Any]] = {}
        for unit in (unit for unit, owner in self._owners.items() if unit[0] in due and owner == self.rank):
            factor, last = self._factor(unit), self._published.get(unit, {})
            if factor is None:
                own[unit] = self._layers[unit[0]].curvature.state_dict()
            else:
                parts = factor.form.solving(factor.state).items()
                own[unit] = {name: part for name, part in parts if not (name in last and last[name].matches(part))}
        for published in self._ranks.publish(own):
            for unit, state in published.items():
                layer, factor = self._layers[unit[0]], self._factor(unit)
                if factor is None:
                    layer.curvature = layer.curvature.loaded(state, layer.name)
                else:
                    factor.state.update(state)
                    if self._owners[unit] == self.rank:
                        sent = factor.form.solving(factor.state).items()
                        self._published[unit] = {key: Version(part) for key, part in sent if isinstance(part, Tensor)}

    def _factor(self, unit: Unit) -> Factor | None:
        index, side = unit
        # mypy does not see that a non-empty side is one of the two.
        return dict(self._layers[index].curvature.factors())[side] if side else None  # type: ignore[index]


def replicas(
    layers: Sequence[Layer], mode: Mode, group: Group, columns: int | None, *, from_curvature: bool
) -> Replicas:
    """Return the processes of a group, or all if it is None; this one alone if it has no others or torch has no group.

    The rows are gradients of the processes' losses, or come from the curvature of their terms (``from_curvature``).
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size(group) == 1:
        return Replicas()
    ranks = Ranks(group, layers[0].kind.weight.device)
    kind = Gather if mode == "gather" else Split
    return kind(layers, ranks, columns, from_curvature=from_curvature)


def _scaled_to_terms(layer: Layer, rows: Rows, number: Tensor | float) -> Rows:
    """Scale γ so that N Σ γ γᵀ becomes M Σ γ γᵀ for a mean of M terms, with or without padding, if M is known.

    Strategies with a second pass need γ unscaled, since that pass compares γ.
    """
    if layer.strategy.takes_second_pass or (not isinstance(number, Tensor) and number == 0):
        return rows
    uses = rows.uses if rows.share is None else rows.uses * rows.share
    return rows.of_terms((uses / number) ** 0.5)
