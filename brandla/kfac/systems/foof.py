"""FOOF: gradient descent on neurons, with the input factor alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from brandla.kfac.systems.kronecker import FactorStrategy, Kronecker, KroneckerStrategy
from brandla.kfac.systems.strategy import Curvature, check_inner
from brandla.kfac.values import Shape


@dataclass(frozen=True)
class Foof(KroneckerStrategy):
    """FOOF: the step ∂W (A + λI)⁻¹, in half the memory and time of the K-FAC system that keeps A.

    A layer without an input factor, such as the scale and shift of a normalisation, keeps its gradient.

    Parameters
    ----------
    inner
        The system that keeps A: any system that keeps each factor by itself.

    References
    ----------
    F. Benzing, "Gradient descent on neurons and its link to approximate second-order optimization", ICML 2022,
    arXiv 2201.12250.

    Examples
    --------
    >>> import torch
    >>> from brandla.kfac import KFAC, Foof, Brand
    >>> preconditioner = KFAC(torch.nn.Linear(20, 10), Foof(Brand(rank=4)))
    """

    measures_length: ClassVar[bool] = False

    inner: FactorStrategy

    def __post_init__(self) -> None:
        check_inner(self, self.inner, FactorStrategy, "a strategy of factors such as Brand(rank=128)")

    def curvature(self, shape: Shape) -> Curvature:
        return Kronecker(None if shape.single else Kronecker.of(shape, self.inner).input, None)
