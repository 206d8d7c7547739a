"""Structures of inverse-free factors; ``STRUCTURES`` gives each by its name."""

from brandla.kfac.systems.structures.blocks import BlockDiagonal, Dense, Diagonal, Triangular
from brandla.kfac.systems.structures.hierarchical import Hierarchical
from brandla.kfac.systems.structures.structure import Member, Structure
from brandla.kfac.systems.structures.toeplitz import Toeplitz

__all__ = [
    "STRUCTURES",
    "BlockDiagonal",
    "Dense",
    "Diagonal",
    "Hierarchical",
    "Member",
    "Structure",
    "Toeplitz",
    "Triangular",
]

STRUCTURES: dict[str, Structure] = {
    "dense": Dense(),
    "diagonal": Diagonal(),
    "block-diagonal": BlockDiagonal(),
    "triangular": Triangular(),
    "hierarchical": Hierarchical(),
    "toeplitz": Toeplitz(),
}
