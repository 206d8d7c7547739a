"""The K-FAC loop: capture, absorb, refresh, precondition. Everything that differs between systems is a strategy."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from brandla import _check
from brandla.kfac.brand import Brand
from brandla.kfac.capture import Recorder
from brandla.kfac.clip import clipping
from brandla.kfac.find import find_layers
from brandla.kfac.layer import Layer, Sharing
from brandla.kfac.options import ByModule, Options, Schedule, sharings, strategies
from brandla.kfac.report import Report, describe
from brandla.kfac.strategy import Curvature, Damping, Gradient, Now, Problem, Rows, Scale, Strategy
from brandla_kernels import reads_are_free

_FORMAT = 2
_DEFAULT = Brand(rank=128)


class KFAC:
    """Precondition the gradients of a model's layers: ∂W ← (G + λ_G I)⁻¹ ∂W (A + λ_A I)⁻¹.

    Use it between ``loss.backward()`` and ``optimizer.step()``; every other parameter is left to the optimizer.

    Parameters
    ----------
    model
        Any module. Modules that share a weight are one layer, with the bias of the first.
    inverse
        The system: `Exact`, `Randomized`, `Brand`, `BrandRandomized`, `BrandCorrected`. One for all layers, or a
        mapping from module names, which holds for all that they contain; ``""`` names the model.
    damping
        λ > 0, relative to the largest eigenvalue of each factor, or absolute by ``damping_scale``.
    clip
        Bound on the length of the step as ``clip_by`` measures it; None for no clipping.
    decay
        ρ of the factors' exponential average, in [0, 1); normalised so that the first batches count fully.
    factor_every
        Take data into the factors at every so many steps. ``damping``, ``clip``, ``decay`` and ``factor_every`` are
        numbers, or functions of the step's number (from 0).
    sharing
        For inputs with dimensions between the first and the last: ``"expand"`` treats positions as samples,
        ``"reduce"`` averages inputs and sums gradients over them first. One for all layers, or a mapping from module
        names.
    damping_scale
        ``"relative"`` or ``"absolute"``.
    clip_by
        ``"rms"``: the root mean square of the entries of each layer's step. ``"kl"``: Σ ⟨step, ∂W⟩ over all layers.
    application
        ``"auto"`` applies the factors to the pair of inputs and output gradients, whose cost is linear in the layer's
        size, wherever the gradient is exactly that pair and the pair is thin; ``"two-sided"`` always applies them to
        the gradient.
    seed
        Fixes the random starts of randomized decompositions.

    Raises
    ------
    ValueError, TypeError
        For options out of range, and for a model with no layer to precondition.

    Notes
    -----
    The loss is taken to be a mean over samples (and positions, for ``"expand"``); a sum scales G only. Whether the
    pair is the whole gradient is told from the gradient's history, and compared once in a layer's life with one
    read-back. A batch with a non-finite value anywhere is skipped: factors stay as they are and all gradients of the
    model become 0, on the device.

    Examples
    --------
    >>> import torch, brandla.kfac
    >>> model = torch.nn.Linear(20, 5)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> preconditioner = brandla.kfac.KFAC(model, inverse=brandla.kfac.Brand(rank=4))
    >>> model(torch.randn(8, 20)).square().mean().backward()
    >>> preconditioner.step()
    >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        inverse: ByModule[Strategy] = _DEFAULT,
        *,
        damping: Schedule[float] = 0.03,
        clip: Schedule[float | None] = 0.07,
        decay: Schedule[float] = 0.95,
        factor_every: Schedule[int] = 1,
        sharing: ByModule[Sharing] = "expand",
        damping_scale: Scale = "relative",
        clip_by: Literal["rms", "kl"] = "rms",
        application: Literal["auto", "two-sided"] = "auto",
        seed: int = 0,
    ) -> None:
        by_name = strategies(model, inverse, _DEFAULT)
        self.options = Options(damping, clip, decay, factor_every, damping_scale, clip_by, application, seed)
        self._model = model
        self._recorder = Recorder()
        self._steps = 0
        self._warned = False
        self._skipped: Tensor | None = None
        self._layers, self._unsupported = find_layers(model, by_name, sharings(model, sharing), self._recorder)

    @torch.no_grad()
    def step(self) -> None:
        """Take in what was captured since the last step, and overwrite the gradients of the layers that have one.

        Raises
        ------
        RuntimeError
            In a process group of more than one process, whose replicas would drift apart.
        """
        _check_single_process()
        layers = [layer for layer in self._layers if layer.has_gradient]
        if layers:
            self._step(layers)
        for layer in self._layers:
            layer.capture.clear()
        self._steps += 1
        self._choose_captures()
        self._warn_of_substitutes()

    def report(self) -> Report:
        """Say what each factor got and why, its rank, its error bound and its memory beside the dense factor's."""
        skipped = 0 if self._skipped is None else int(self._skipped)
        return describe(self._layers, self._unsupported, skipped)

    def remove(self) -> None:
        """Take every hook off the model."""
        for layer in self._layers:
            layer.capture.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return all that a bit-equal continuation needs: numbers, strings and tensors, by layer name.

        Data captured since the last step is not in it: save between a step and the next backward pass.
        """
        layers = {
            layer.name: {"curvature": layer.curvature.state_dict(), "linear": layer.linear} for layer in self._layers
        }
        return {"format": _FORMAT, "steps": self._steps, "layers": layers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``, which must come from the same layers and strategy.

        Raises
        ------
        ValueError
            If it does not; nothing is changed then.
        """
        curvatures = self._loaded(state)
        for layer, curvature in zip(self._layers, curvatures, strict=True):
            layer.curvature = curvature
            layer.linear = state["layers"][layer.name]["linear"]
            layer.capture.clear()
        self._steps = int(state["steps"])
        self._choose_captures()

    def _step(self, layers: list[Layer]) -> None:
        now_options = self.options.at(self._steps)
        absorbing = {
            layer: rows
            for layer in layers
            if (self._steps % now_options.factor_every == 0 or not layer.curvature.started)
            and (rows := layer.rows("loss", None)) is not None
        }
        mask = _Mask.of([*_parts(absorbing.values()), *_gradients(self._model)])
        absorbing = {layer: mask.rows(rows) for layer, rows in absorbing.items()}
        damping = Damping(now_options.damping, self.options.damping_scale)
        # Seeds are apart for every step and factor, and the same when training continues from a checkpoint.
        seed = (self.options.seed * 1_000_003 + self._steps) * 65_537
        now = Now(self._steps, seed, now_options.decay, damping, mask.finite)
        for strategy, members in _by_strategy(absorbing).items():
            strategy.absorb([layer.curvature for layer in members], [absorbing[layer] for layer in members], now)
        self._precondition([layer for layer in layers if layer.curvature.started], absorbing, now, now_options.clip)
        mask.clear(self._model)
        self._skipped = ~mask.finite + (0 if self._skipped is None else self._skipped)

    def _precondition(self, layers: list[Layer], rows: Mapping[Layer, Rows], now: Now, clip: float | None) -> None:
        auto = self.options.application == "auto"
        gradients: dict[Layer, Gradient] = {}
        steps: dict[Layer, Gradient] = {}
        for layer in layers:
            pair = layer.pair(rows.get(layer)) if auto else None
            gradients[layer] = layer.gradient() if pair is None else pair
        for strategy, members in _by_strategy(layers).items():
            problems = [Problem(layer.curvature, gradients[layer], rows.get(layer)) for layer in members]
            steps |= dict(zip(members, strategy.solve(problems, now), strict=True))
        factors = clipping([steps[layer] for layer in layers], list(gradients.values()), clip, self.options.clip_by)
        for layer, factor in zip(layers, factors, strict=True):
            layer.write(steps[layer], factor)

    def _loaded(self, state: Mapping[str, Any]) -> list[Curvature]:
        """Build the curvatures that ``state`` describes, or raise before anything is changed."""
        function = "KFAC.load_state_dict"
        if state.get("format") != _FORMAT:
            _check.fail_value(function, f"the state must have format {_FORMAT}; got {state.get('format')!r}")
        saved = state["layers"]
        names = [layer.name for layer in self._layers]
        if sorted(saved) != sorted(names):
            missing, extra = sorted(set(names) - set(saved)), sorted(set(saved) - set(names))
            _check.fail_value(function, f"the state must be of the same layers; missing {missing}, unexpected {extra}")
        return [layer.curvature.loaded(saved[layer.name]["curvature"], layer.name) for layer in self._layers]

    def _choose_captures(self) -> None:
        """Capture in the next passes only where the data will be used."""
        every = self.options.at(self._steps).factor_every
        for layer in self._layers:
            wanted = self._steps % every == 0 or not layer.curvature.started
            layer.capture.enabled = wanted or (self.options.application == "auto" and layer.linear is not False)

    def _warn_of_substitutes(self) -> None:
        if self._warned:
            return
        replaced = [
            f"{layer.name} ({side}): {factor.reason}"
            for layer in self._layers
            for side, factor in layer.curvature.factors()
            if factor.reason
        ]
        if replaced:
            self._warned = True
            warnings.warn(
                "KFAC: some factors are too small for the strategy and got another, see report(): "
                + "; ".join(replaced),
                stacklevel=3,
            )


class _Mask(NamedTuple):
    """Whether everything of a step is finite, and what becomes of it if not; a device is not waited for."""

    finite: Tensor
    known_finite: bool

    @classmethod
    def of(cls, parts: list[Tensor]) -> _Mask:
        """Look at all parts once."""
        finite = nn.utils.get_total_norm(parts, float("inf")).isfinite()
        return cls(finite, reads_are_free(finite) and bool(finite))

    def rows(self, rows: Rows) -> Rows:
        """Return the rows, or zeros."""
        if self.known_finite:
            return rows
        inputs = rows.inputs if not rows.inputs.is_floating_point() else self._or_zero(rows.inputs)
        return rows._replace(inputs=inputs, gradients=self._or_zero(rows.gradients))

    def clear(self, model: nn.Module) -> None:
        """Make all gradients of the model 0 unless finite."""
        if not self.known_finite:
            for gradient in _gradients(model):
                gradient.masked_fill_(~self.finite, 0)

    def _or_zero(self, part: Tensor) -> Tensor:
        return torch.where(self.finite, part, 0)


def _parts(rows: Iterable[Rows]) -> Iterable[Tensor]:
    for inputs, gradients, *_ in rows:
        if inputs.is_floating_point():
            yield inputs
        yield gradients


def _gradients(model: nn.Module) -> Iterable[Tensor]:
    return (parameter.grad for parameter in model.parameters() if parameter.grad is not None)


def _by_strategy(layers: Iterable[Layer]) -> dict[Strategy, list[Layer]]:
    members: dict[Strategy, list[Layer]] = {}
    for layer in layers:
        members.setdefault(layer.strategy, []).append(layer)
    return members


def _check_single_process() -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        world = distributed.get_world_size()
        message = (
            "KFAC.step: factors are built from one process's batches, so the process group must have 1 process;"
            f" got {world}; precondition in one process, or train with the optimizer alone"
        )
        raise RuntimeError(message)
