"""Which weights of a model are preconditioned, and which modules are left to the optimizer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from brandla import _check
from brandla.kfac.capture import Recorder
from brandla.kfac.kinds import KINDS
from brandla.kfac.layer import Layer, Sharing
from brandla.kfac.options import of_module
from brandla.kfac.strategy import Strategy


def find_layers(
    model: nn.Module, inverse: Mapping[str, Strategy], sharing: Mapping[str, Sharing], recorder: Recorder
) -> tuple[list[Layer], list[str]]:
    """Return the layers of a model, and the names of modules and parameters that are left to the optimizer."""
    layers: dict[int, Layer] = {}
    left: list[str] = []
    for name, module in model.named_modules():
        kinds = [kind for family in KINDS for kind in family.of(module)]
        for kind in kinds:
            known = layers.get(id(kind.weight))
            if known is None:
                label = name or "(model)"
                layers[id(kind.weight)] = Layer(
                    label, kind, of_module(inverse, name), of_module(sharing, name), recorder
                )
            elif type(known.kind) is type(kind):
                known.capture.attach(kind)
                if kind.bias is not None and kind.bias is not known.kind.bias:
                    left.append(f"{name}.bias")
        if not kinds and any(True for _ in module.parameters(recurse=False)):
            left.append(name or "(model)")
    if not layers:
        kinds_of_modules = sorted({type(module).__name__ for module in model.modules()})
        _check.fail_value(
            "KFAC",
            "the model must have an nn.Linear or another layer that can be preconditioned; got modules of type "
            f"{', '.join(kinds_of_modules)}; train it with the optimizer alone",
        )
    return list(layers.values()), left
