"""Low-rank eigen- and singular value decompositions that keep up with a stream, and their damped inverses.

The updates and the decompositions return new tensors, which share no memory with their arguments. Functions whose names
end in an underscore write over their first argument. Wrong shapes and values raise a ValueError, and wrong dtypes and
types a TypeError, before anything is computed.
"""

from brandla import grouped
from brandla._check import checked
from brandla._value import keep_dtype
from brandla.brand import eigh_downdate, eigh_update, eigh_update_
from brandla.damped import damped_logdet, damped_power, damped_solve
from brandla.kron import kron_damped_logdet, kron_damped_power, kron_damped_solve
from brandla.lowrank import Centred, LowRankEigh, LowRankRoot, LowRankSVD, Rank, Tracked, centre, track
from brandla.orthonormal import orthonormalize
from brandla.randomized import randomized_eigh, randomized_svd
from brandla.refresh import eigh_refresh
from brandla.root import root_update, root_update_
from brandla.svd import merge, svd_append, svd_update
from brandla_kernels import backend

__version__ = "0.1.0"

__all__ = [
    "Centred",
    "LowRankEigh",
    "LowRankRoot",
    "LowRankSVD",
    "Rank",
    "Tracked",
    "backend",
    "centre",
    "checked",
    "damped_logdet",
    "damped_power",
    "damped_solve",
    "eigh_downdate",
    "eigh_refresh",
    "eigh_update",
    "eigh_update_",
    "grouped",
    "keep_dtype",
    "kron_damped_logdet",
    "kron_damped_power",
    "kron_damped_solve",
    "merge",
    "orthonormalize",
    "randomized_eigh",
    "randomized_svd",
    "root_update",
    "root_update_",
    "svd_append",
    "svd_update",
    "track",
]


def __dir__() -> list[str]:
    return __all__
