"""The K-FAC loop: capture, absorb, refresh, precondition. Everything that differs between systems is a strategy."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from brandla import _check
from brandla.kfac.brand import Brand
from brandla.kfac.capture import Sharing
from brandla.kfac.layer import Factor, Layer, Scale
from brandla.kfac.report import Report, describe
from brandla.kfac.strategy import Strategy

_FORMAT = 1
_DEFAULT = Brand(rank=128)


class KFAC:
    """Precondition the gradients of a model's Linear layers: ∂W ← (G + λ_G I)⁻¹ ∂W (A + λ_A I)⁻¹.

    Use it between ``loss.backward()`` and ``optimizer.step()``; every other parameter is left to the optimizer.

    Parameters
    ----------
    model
        Any module; its ``nn.Linear`` layers with a trainable weight are preconditioned. Modules that share a weight are
        one layer, with the bias of the first.
    inverse
        The system: `Exact`, `Randomized`, `Brand`, `BrandRandomized`,
        `BrandCorrected`.
    damping
        λ > 0, relative to the largest eigenvalue of each factor, or absolute by ``damping_scale``.
    clip
        Largest RMS of the entries of a layer's step; None for no clipping.
    decay
        ρ of the factors' exponential average, in [0, 1); normalised so that the first batches count fully.
    factor_every
        Take data into the factors at every so many steps.
    sharing
        For inputs with dimensions between the first and the last: ``"expand"`` treats positions as samples,
        ``"reduce"`` averages inputs and sums gradients over them first. One for all layers, or a mapping from module
        names.
    damping_scale
        ``"relative"`` or ``"absolute"``.
    application
        ``"auto"`` applies the factors to the pair of inputs and output gradients, whose cost is linear in the layer's
        size, wherever the gradient is exactly that pair and the pair is thin; ``"two-sided"`` always applies them to
        the gradient.
    seed
        Fixes the random starts of randomized decompositions.

    Raises
    ------
    ValueError, TypeError
        For options out of range, and for a model with no Linear layer to precondition.

    Notes
    -----
    The loss is taken to be a mean over samples (and positions, for ``"expand"``); a sum scales G only. Whether the
    pair is the whole gradient is told from the gradient's history, and compared once in a layer's life with one
    read-back.

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
        inverse: Strategy = _DEFAULT,
        *,
        damping: float = 0.03,
        clip: float | None = 0.07,
        decay: float = 0.95,
        factor_every: int = 1,
        sharing: Sharing | Mapping[str, Sharing] = "expand",
        damping_scale: Scale = "relative",
        application: Literal["auto", "two-sided"] = "auto",
        seed: int = 0,
    ) -> None:
        _check_options(inverse, damping, clip, decay, factor_every, damping_scale, application, seed)
        self.damping = damping
        self.clip = clip
        self.decay = decay
        self.factor_every = factor_every
        self.damping_scale = damping_scale
        self.application = application
        self.seed = seed
        self._steps = 0
        self._warned = False
        rule = _sharing_rule(model, sharing)
        self._layers, self._unsupported = _find_layers(model, inverse, rule)

    @torch.no_grad()
    def step(self) -> None:
        """Take in what was captured since the last step, and overwrite the gradients of the layers that have one.

        Raises
        ------
        RuntimeError
            In a process group of more than one process, whose replicas would drift apart.
        """
        _check_single_process()
        for index, layer in enumerate(self._layers):
            # Rows of a step that was broken off would be stale.
            layer.forget_rows()
            if layer.weight.grad is not None:
                self._step_layer(index, layer)
            layer.forget_rows()
            layer.capture.clear()
        self._steps += 1
        self._choose_captures()
        self._warn_of_substitutes()

    def report(self) -> Report:
        """Say what each factor got and why, its rank, its error bound and its memory beside the dense factor's."""
        return describe(self._layers, self._unsupported)

    def remove(self) -> None:
        """Take every hook off the model."""
        for layer in self._layers:
            layer.capture.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return all that a bit-equal continuation needs: numbers, strings and tensors, by layer name.

        Pairs captured since the last step are not in it: save between a step and the next backward pass.
        """
        layers = {
            layer.name: {
                "input": _factor_state(layer.input),
                "output": _factor_state(layer.output),
                "linear": layer.linear,
            }
            for layer in self._layers
        }
        return {"format": _FORMAT, "steps": self._steps, "layers": layers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``, which must come from the same layers and strategy.

        Raises
        ------
        ValueError
            If it does not; nothing is changed then.
        """
        loaded = _check_state(self._layers, state)
        for layer, (factors, linear) in zip(self._layers, loaded, strict=True):
            layer.input, layer.output = factors
            layer.linear = linear
            layer.capture.clear()
        self._steps = int(state["steps"])
        self._choose_captures()

    def _step_layer(self, index: int, layer: Layer) -> None:
        if layer.capture.pairs and (not layer.started or self._steps % self.factor_every == 0):
            layer.absorb(self.decay)
        if not layer.started:
            return
        for side, factor in enumerate((layer.input, layer.output)):
            factor.strategy.refresh(factor.state, self._steps, self._seed_of(2 * index + side))
        layer.step(self.damping, self.damping_scale, self.clip, may_be_linear=self.application == "auto")

    def _choose_captures(self) -> None:
        """Capture in the next passes only where the data will be used."""
        for layer in self._layers:
            wanted = self._steps % self.factor_every == 0 or not layer.started
            layer.capture.enabled = wanted or (self.application == "auto" and layer.linear is not False)

    def _seed_of(self, factor: int) -> int:
        # Apart for every step and factor, and the same when training continues from a checkpoint.
        return (self.seed * 1_000_003 + self._steps) * 65_537 + factor

    def _warn_of_substitutes(self) -> None:
        if self._warned:
            return
        replaced = [
            f"{layer.name} ({side}): {factor.reason}"
            for layer in self._layers
            for side, factor in (("input", layer.input), ("output", layer.output))
            if factor.reason
        ]
        if replaced:
            self._warned = True
            warnings.warn(
                "KFAC: some factors are too small for the strategy and got another, see report(): "
                + "; ".join(replaced),
                stacklevel=3,
            )


def _check_single_process() -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        world = distributed.get_world_size()
        message = (
            "KFAC.step: factors are built from one process's batches, so the process group must have 1 process;"
            f" got {world}; precondition in one process, or train with the optimizer alone"
        )
        raise RuntimeError(message)


def _find_layers(model: nn.Module, inverse: Strategy, rule: Mapping[str, Sharing]) -> tuple[list[Layer], list[str]]:
    layers: dict[int, Layer] = {}
    unsupported: list[str] = []
    linear = [(name, module) for name, module in model.named_modules() if _is_supported(module)]
    for name, module in linear:
        known = layers.get(id(module.weight))
        if known is None:
            layers[id(module.weight)] = Layer(name or "(model)", module, inverse, rule.get(name, rule[""]))
        else:
            known.capture.attach(module)
            if module.bias is not None and module.bias is not known.bias:
                unsupported.append(f"{name}.bias")
    supported = {id(module) for _, module in linear}
    for name, module in model.named_modules():
        trainable = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        if trainable and id(module) not in supported:
            unsupported.append(name or "(model)")
    if not layers:
        kinds = sorted({type(module).__name__ for module in model.modules()})
        _check.fail_value(
            "KFAC",
            "the model must have an nn.Linear with a trainable weight; got modules of type "
            f"{', '.join(kinds)}; train it with the optimizer alone",
        )
    return list(layers.values()), unsupported


def _is_supported(module: nn.Module) -> bool:
    # MultiheadAttention reads its projections' weights without calling them, so no input of theirs is ever seen.
    return (
        isinstance(module, nn.Linear)
        and not isinstance(module, NonDynamicallyQuantizableLinear)
        and not isinstance(module.weight, nn.parameter.UninitializedParameter)
        and module.weight.requires_grad
    )


def _sharing_rule(model: nn.Module, sharing: Sharing | Mapping[str, Sharing]) -> dict[str, Sharing]:
    """Return a mapping from module names to sharing, with the default under the empty name."""
    rule: dict[str, Any] = {"": "expand", **sharing} if isinstance(sharing, Mapping) else {"": sharing}
    names = {name for name, _ in model.named_modules()}
    for name, value in rule.items():
        if value not in ("expand", "reduce"):
            _check.fail_value("KFAC", f"sharing must be 'expand' or 'reduce'; got {value!r}")
        if name not in names:
            _check.fail_value("KFAC", f"sharing must name modules of the model; it has no module {name!r}")
    return cast(dict[str, Sharing], rule)


def _check_options(
    inverse: Strategy,
    damping: float,
    clip: float | None,
    decay: float,
    factor_every: int,
    damping_scale: str,
    application: str,
    seed: int,
) -> None:
    if not isinstance(inverse, Strategy):
        kind = inverse.__name__ if isinstance(inverse, type) else type(inverse).__name__
        _check.fail_type("KFAC", f"inverse must be a strategy such as Brand(rank=128); got {kind}")
    if not 0 < damping < float("inf"):
        _check.fail_value("KFAC", f"damping must be finite and > 0; got {damping}")
    if clip is not None and not 0 < clip < float("inf"):
        _check.fail_value("KFAC", f"clip must be finite and > 0, or None; got {clip}")
    if not 0 <= decay < 1:
        _check.fail_value("KFAC", f"decay must be in [0, 1); got {decay}")
    _check.count("KFAC", "factor_every", factor_every, 1)
    _check.count("KFAC", "seed", seed, 0)
    if damping_scale not in ("relative", "absolute"):
        _check.fail_value("KFAC", f"damping_scale must be 'relative' or 'absolute'; got {damping_scale!r}")
    if application not in ("auto", "two-sided"):
        _check.fail_value("KFAC", f"application must be 'auto' or 'two-sided'; got {application!r}")


def _factor_state(factor: Factor) -> dict[str, Any]:
    state = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in factor.state.items()}
    return {"strategy": repr(factor.strategy), "reason": factor.reason, "count": factor.count, "state": state}


def _check_state(layers: list[Layer], state: Mapping[str, Any]) -> list[tuple[tuple[Factor, Factor], bool | None]]:
    """Build the factors that ``state`` describes, or raise before anything is changed."""
    function = "KFAC.load_state_dict"
    if state.get("format") != _FORMAT:
        _check.fail_value(function, f"the state must have format {_FORMAT}; got {state.get('format')!r}")
    saved = state["layers"]
    names = [layer.name for layer in layers]
    if sorted(saved) != sorted(names):
        missing, extra = sorted(set(names) - set(saved)), sorted(set(saved) - set(names))
        _check.fail_value(function, f"the state must be of the same layers; missing {missing}, unexpected {extra}")
    return [
        (
            (
                _load_factor(layer, "input", layer.input, saved[layer.name]),
                _load_factor(layer, "output", layer.output, saved[layer.name]),
            ),
            saved[layer.name]["linear"],
        )
        for layer in layers
    ]


def _load_factor(layer: Layer, side: str, factor: Factor, saved: Mapping[str, Any]) -> Factor:
    function = "KFAC.load_state_dict"
    entry = saved[side]
    count = int(entry["count"])
    loaded = Factor(factor.n, factor.asked, reason=entry["reason"], count=count)
    if count == 0:
        return loaded
    loaded.strategy = _strategy_named(factor, entry, f"{layer.name} ({side})")
    expected = loaded.strategy.start(factor.n, layer.dtype, layer.weight.device)
    for name, value in entry["state"].items():
        template = expected.get(name)
        if not isinstance(value, torch.Tensor):
            loaded.state[name] = value
            continue
        if not isinstance(template, torch.Tensor) or template.shape != value.shape:
            wanted = tuple(template.shape) if isinstance(template, torch.Tensor) else "nothing"
            _check.fail_value(
                function, f"{layer.name} ({side}): {name} must have shape {wanted}; got {tuple(value.shape)}"
            )
        loaded.state[name] = value.to(device=template.device, dtype=template.dtype, copy=True)
    return loaded


def _strategy_named(factor: Factor, entry: Mapping[str, Any], where: str) -> Strategy:
    """Find the strategy that was saved: the one asked for, or one it gives way to."""
    candidates = [factor.asked]
    replacement = factor.asked.substitute(factor.n, factor.n)
    if replacement is not None:
        candidates.append(replacement[0])
    for candidate in candidates:
        if repr(candidate) == entry["strategy"]:
            return candidate
    rule = f"the strategy must be {candidates[0]!r}, as in this preconditioner"
    _check.fail_value("KFAC.load_state_dict", f"{where}: {rule}; the state has {entry['strategy']}")
