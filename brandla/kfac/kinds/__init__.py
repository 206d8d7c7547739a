"""Kinds of modules: how calls become rows and gradients a matrix, one type of module a file."""

from brandla.kfac.kinds.kind import Kind, Uses
from brandla.kfac.kinds.linear import LinearKind

__all__ = ["KINDS", "Kind", "LinearKind", "Uses"]

KINDS: tuple[type[Kind], ...] = (LinearKind,)
