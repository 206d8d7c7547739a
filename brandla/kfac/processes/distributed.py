"""Replicas of a model: their processes exchange rows and factors, so that all of them take the same step.

The loss is the mean over processes of their own losses, as DistributedDataParallel averages gradients. So all rows of
all processes are rows of one batch, with γ multiplied by what makes it that of the mean (``docs/many-machines.md``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

from torch import Tensor, distributed

from brandla.kfac.capture.layer import Layer, by_strategy
from brandla.kfac.capture.mask import Mask
from brandla.kfac.processes.exchange import SIDES, Part, Share, assembled, outgoing, parts_of, uses_of
from brandla.kfac.processes.messages import Ranks
from brandla.kfac.systems.factor import Factor
from brandla.kfac.systems.kronecker import Kronecker
from brandla.kfac.values import Noted, Now, Rows

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
        mask = mask.agreed(finite)
        clean = {
            layer: _of_terms(layer, rows, of_all * rows.uses / uses_of(shares[layer]))
            for layer, rows in mask.rows(own).items()
            if layer in shares
        }
        parts = [
            part
            for layer, of_ranks in shares.items()
            for part in parts_of(layer, of_ranks, self._most, of_terms=self._of_terms)
        ]
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
        by_rank = self._ranks.to_all(sent, [[part.outline(rank) for part in parts] for rank in range(self.world)])
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
        self._published: dict[Unit, dict[str, Noted]] = {}
        self._index = {layer: index for index, layer in enumerate(layers)}

    def absorb(self, rows: Mapping[Layer, Rows], now: Now) -> None:
        """Take in the rows of this process's factors, and publish the changes."""
        for strategy, members in by_strategy(rows):
            # Factors are fed together: one that belongs elsewhere has no rows here.
            if strategy.reads_rows or all(isinstance(layer.curvature, Kronecker) for layer in members):
                strategy.absorb([layer.curvature for layer in members], [rows[layer] for layer in members], now)
                continue
            for index, layer in enumerate(members):
                if isinstance(layer.curvature, Kronecker) or self._is_here((self._index[layer], "")):
                    strategy.absorb([layer.curvature], [rows[layer]], now._replace(seed=now.seed + index))
        if rows:
            self._publish(rows)

    @contextmanager
    def complete(self) -> Iterator[None]:
        """Hold all of every curvature: all processes must come here, and have the memory."""
        factors = {unit: factor for unit in self._owners if (factor := self._factor(unit)) is not None}
        kept = {unit: factor.state for unit, factor in factors.items()}
        own = {unit: dict(state) for unit, state in kept.items() if self._is_here(unit)}
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
            [[part.outline(rank) for part in wanted[self.rank]] for rank in range(self.world)],
        )
        received = dict(zip(map(id, wanted[self.rank]), map(list, zip(*by_rank, strict=True)), strict=True))
        return [received.get(id(part)) for part in parts]

    def _owners_of(self, parts: Sequence[Part]) -> list[int | None]:
        """Give units that are new their owners, and return those of the parts; None stands for all processes."""
        units = [self._unit(part) for part in parts]
        costs: dict[Unit, float] = {}
        for unit, part in zip(units, parts, strict=True):
            if unit is not None and unit not in self._owners:
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
        """Send the changes of this process's units to all, and store those that come in."""
        due = {self._index[layer] for layer in rows}
        own = {
            unit: self._changed(unit) for unit, owner in self._owners.items() if unit[0] in due and owner == self.rank
        }
        for published in self._ranks.publish(own):
            for unit, state in published.items():
                layer, factor = self._layers[unit[0]], self._factor(unit)
                if factor is None:
                    layer.curvature = layer.curvature.loaded(state, layer.name)
                else:
                    factor.state.update(state)
                    if self._is_here(unit):
                        sent = factor.strategy.solving(factor.state).items()
                        self._published[unit] = {key: Noted(part) for key, part in sent if isinstance(part, Tensor)}

    def _changed(self, unit: Unit) -> dict[str, Any]:
        """Return the parts that others do not have yet: for a factor, tensors that were replaced or written to."""
        factor = self._factor(unit)
        if factor is None:
            return self._layers[unit[0]].curvature.state_dict()
        known = self._published.get(unit, {})
        return {
            name: part
            for name, part in factor.strategy.solving(factor.state).items()
            if not (isinstance(part, Tensor) and name in known and known[name].is_still(part))
        }

    def _unit(self, part: Part) -> Unit | None:
        """Return the unit that takes a part in; None for all processes."""
        if part.layer.strategy.reads_rows:
            return None
        if not isinstance(part.layer.curvature, Kronecker):
            return self._index[part.layer], ""
        return self._index[part.layer], SIDES[part.name]

    def _factor(self, unit: Unit) -> Factor | None:
        index, side = unit
        # mypy does not see that a side that is named is one of the two.
        return dict(self._layers[index].curvature.factors())[side] if side else None  # type: ignore[index]

    def _is_here(self, unit: Unit) -> bool:
        return self._owners.get(unit) == self.rank


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
    """Give rows the scale of so many terms, where that is told; second passes compare γ as they are."""
    untold = not isinstance(number, Tensor) and number == 0
    return rows if untold or layer.strategy.takes_second_pass else rows.of_loss_terms(number)
