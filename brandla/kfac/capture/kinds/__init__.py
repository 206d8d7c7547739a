"""Kinds of modules: how calls become rows and gradients a matrix, one type of module a file."""

from brandla.kfac.capture.kinds.attention import AttentionKind
from brandla.kfac.capture.kinds.conv import ConvKind
from brandla.kfac.capture.kinds.conv_transpose import ConvTransposeKind
from brandla.kfac.capture.kinds.embedding import EmbeddingKind
from brandla.kfac.capture.kinds.kind import Kind, Record, Uses
from brandla.kfac.capture.kinds.linear import LinearKind
from brandla.kfac.capture.kinds.norm import NormKind

__all__ = ["KINDS", "Kind", "Record", "Uses"]

KINDS: tuple[type[Kind], ...] = (
    LinearKind,
    ConvKind,
    ConvTransposeKind,
    EmbeddingKind,
    AttentionKind,
    NormKind,
)
