"""``refine``: Q = P T, and in the same pass UᵀQ and QᵀQ: the second projection of a two-pass Gram–Schmidt.

U is (..., n, r), P and Q are (..., n, k), T is (..., k, k). T makes the columns of P nearly orthonormal; what Q still
shares with U, and how far it is from orthonormal, come out as the small matrices UᵀQ (..., r, k) and QᵀQ (..., k, k,
in float64, of products rounded to the dtype of Q: nearly orthonormal columns ask for no more), so that the correction
never has to be applied to the tall matrix by itself.
"""

from __future__ import annotations

from torch import Tensor

from brandla_kernels._op import Cost, op
from brandla_kernels._signature import Matrices
from brandla_kernels.gram import gram_gradient, rounded_gram


def cost(n: int, r: int, k: int, itemsize: int = 4) -> Cost:
    """Work of one call."""
    flops = 2 * n * k * k + 2 * n * r * k + 2 * n * k * k
    return Cost(flops=flops, bytes=itemsize * (n * r + 2 * n * k + r * k) + 8 * k * k)


@op(
    "refine(Tall[n,r] basis, Tall[n,k] panel, Small[k,k] transform) -> (Tall[n,k], Small[r,k], Small[k,k])",
    cost,
)
def refine(basis: Tensor, panel: Tensor, transform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``Q = panel @ transform``, ``basis.mT @ Q`` and the Gram matrix of ``Q``."""
    refined = panel @ transform
    return refined, basis.mT @ refined, rounded_gram(refined)


@refine.triton
def _launch(basis: Matrices, panel: Matrices, transform: Tensor) -> tuple[Matrices, Tensor, Tensor]:
    from brandla_kernels._kernels.inner_product import inner_product
    from brandla_kernels._kernels.tall_product import Term, tall_product_and_gram

    refined, gram = tall_product_and_gram([Term(panel, transform)], as_wide_as=panel, exact=False)
    return refined, inner_product(basis, refined), gram


@refine.gradient
def _gradient(
    inputs: tuple[Tensor, Tensor, Tensor], gradients: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    basis, panel, transform = inputs
    refined = panel @ transform
    gradient = gradients[0] + basis @ gradients[1] + gram_gradient(refined, gradients[2])
    return refined @ gradients[1].mT, gradient @ transform.mT, panel.mT @ gradient
