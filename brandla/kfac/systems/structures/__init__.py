"""Structures of inverse-free factors, one a file; ``STRUCTURES`` gives each by its name."""

from brandla.kfac.systems.structures.block_diagonal import BlockDiagonal
from brandla.kfac.systems.structures.dense import Dense
from brandla.kfac.systems.structures.diagonal import Diagonal
from brandla.kfac.systems.structures.hierarchical import Hierarchical
from brandla.kfac.systems.structures.structure import Member, Structure
from brandla.kfac.systems.structures.toeplitz import Toeplitz
from brandla.kfac.systems.structures.triangular import Triangular

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
