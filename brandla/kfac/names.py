"""Names of modules, the same for a model and for one with submodules under torch.compile."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

# What torch.compile calls the module that it wraps.
_WRAPPED = "_orig_mod"


def named_modules(model: nn.Module, *, aliases: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Go through the modules of a model, those that hold others first; a wrapper has the name of what it wraps.

    A module that is in several places has the name of the first, and with ``aliases`` all of them.
    """
    for name, module in model.named_modules(remove_duplicate=not aliases):
        yield ".".join(part for part in name.split(".") if part != _WRAPPED), module
