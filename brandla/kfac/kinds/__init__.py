"""Kinds of modules: how calls become rows and gradients a matrix, one type of module a file."""

from brandla.kfac.kinds.attention import AttentionKind
from brandla.kfac.kinds.conv import ConvKind
from brandla.kfac.kinds.conv_transpose import ConvTransposeKind
from brandla.kfac.kinds.embedding import EmbeddingKind
from brandla.kfac.kinds.kind import Kind, Record, Uses
from brandla.kfac.kinds.linear import LinearKind
from brandla.kfac.kinds.norm import NormKind

__all__ = ["KINDS", "Kind", "Record", "Uses"]

KINDS: tuple[type[Kind], ...] = (
    LinearKind,
    ConvKind,
    ConvTransposeKind,
    EmbeddingKind,
    AttentionKind,
    NormKind,
)
