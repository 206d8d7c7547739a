"""Structures of inverse-free factors, one a file; ``STRUCTURES`` gives each by its name."""

from brandla.kfac.structures.block_diagonal import BlockDiagonal
from brandla.kfac.structures.dense import Dense
from brandla.kfac.structures.diagonal import Diagonal
from brandla.kfac.structures.hierarchical import Hierarchical
from brandla.kfac.structures.structure import Member, Structure
from brandla.kfac.structures.toeplitz import Toeplitz
from brandla.kfac.structures.triangular import Triangular

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
