"""Kinds of modules: how calls become rows and gradients a matrix, one family of modules a file."""

from __future__ import annotations

from torch import nn

from brandla.kfac.capture.kinds.attention import AttentionKind
from brandla.kfac.capture.kinds.conv import ConvKind, ConvTransposeKind
from brandla.kfac.capture.kinds.inside import used_inside
from brandla.kfac.capture.kinds.kind import Kind, own_forward
from brandla.kfac.capture.kinds.like import of_map, registered
from brandla.kfac.capture.kinds.linear import BagKind, BilinearKind, EmbeddingKind, LinearKind
from brandla.kfac.capture.kinds.norm import NormKind
from brandla.kfac.capture.kinds.recurrent import CellKind

_FAMILIES: tuple[type[Kind], ...] = (
    LinearKind,
    ConvKind,
    ConvTransposeKind,
    EmbeddingKind,
    AttentionKind,
    NormKind,
    BilinearKind,
    BagKind,
    CellKind,
)


def kinds_of(module: nn.Module) -> list[Kind] | str | None:
    """Return the weights of a module, or why they are left to the optimizer; None if nothing is known of it.

    What a user has registered comes first, then the types of torch; of others it is found out what they compute.
    """
    found = registered(module)
    for family in _FAMILIES:
        found = family.of(module) if found is None else found
    if found is not None and found != own_forward(module):
        return found
    if not any(True for _ in module.parameters(recurse=False)):
        return found
    return of_map(module) or used_inside(module) or found
