"""The ops under brandla, one per file: torch form, registration as ``torch.ops.brandla.*``, cost in flops and bytes."""

from brandla_kernels import tall
from brandla_kernels._op import (
    OPS,
    Backend,
    Cost,
    Op,
    backend,
    has_values,
    is_mapped,
    number_of,
    reads_are_free,
    without_autocast,
)
from brandla_kernels._signature import overlaps_itself
from brandla_kernels.cholesky_inverse_core import cholesky_inverse_core, live_columns
from brandla_kernels.cross_gram import cross_gram
from brandla_kernels.damped_apply import damped_apply
from brandla_kernels.damped_inverse import (
    damped_cholesky,
    damped_gram_inverse,
    damped_inverse,
    kron_damped_inverse,
    pair_damped_inverse,
)
from brandla_kernels.eigh_core import eigh_core
from brandla_kernels.eigh_rotation import eigh_rotation
from brandla_kernels.gram import gram, rounded_gram
from brandla_kernels.gram_ema import gram_ema_
from brandla_kernels.kron_damped_apply import kron_damped_apply
from brandla_kernels.project import project
from brandla_kernels.root_core import root_core, without_denormals
from brandla_kernels.rotate import rotate, rotate_
from brandla_kernels.sketch import signs, sketch
from brandla_kernels.tall import Tall, subtract_product

__all__ = [
    "OPS",
    "Backend",
    "Cost",
    "Op",
    "Tall",
    "backend",
    "cholesky_inverse_core",
    "cross_gram",
    "damped_apply",
    "damped_cholesky",
    "damped_gram_inverse",
    "damped_inverse",
    "eigh_core",
    "eigh_rotation",
    "gram",
    "gram_ema_",
    "has_values",
    "is_mapped",
    "kron_damped_apply",
    "kron_damped_inverse",
    "live_columns",
    "number_of",
    "overlaps_itself",
    "pair_damped_inverse",
    "project",
    "reads_are_free",
    "root_core",
    "rotate",
    "rotate_",
    "rounded_gram",
    "signs",
    "sketch",
    "subtract_product",
    "tall",
    "without_autocast",
    "without_denormals",
]
