"""FOOF: gradient descent on neurons, the input factor alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from brandla import _check
from brandla.kfac import kronecker
from brandla.kfac.factor import FactorStrategy
from brandla.kfac.kronecker import Kronecker
from brandla.kfac.strategy import Curvature, Now, Problem, Rows, Shape, Strategy


@dataclass(frozen=True)
class Foof(Strategy):
    """FOOF: the step ∂W (A + λI)⁻¹, in half the memory and time of the K-FAC system that keeps A.

    The gradient of a layer with no input factor, such as the scale and shift of a normalisation, is left as it is.

    Parameters
    ----------
    inner
        The system that keeps A: any of those that keep each factor by itself.

    References
    ----------
    F. Benzing, "Gradient descent on neurons and its link to approximate second-order optimization", ICML 2022,
    arXiv 2201.12250.
    """

    inner: FactorStrategy

    def __post_init__(self) -> None:
        check_inner(self, self.inner, FactorStrategy, "a strategy of factors such as Brand(rank=128)")

    def curvature(self, shape: Shape) -> Curvature:
        """Return A alone."""
        both = Kronecker.of(shape, self.inner)
        return Kronecker(None if shape.single else both.input, None, shape.single)

    def absorb(self, curvatures: Sequence[Curvature], rows: Sequence[Rows], now: Now) -> None:
        """Take in the inputs of all layers together."""
        kronecker.absorb(cast(Sequence[Kronecker], curvatures), rows, now)

    def solve(self, problems: Sequence[Problem], now: Now) -> list[Any]:
        """Solve for all layers together."""
        return kronecker.solve(problems, now.damping)


def check_inner(strategy: Strategy, inner: object, kind: type[Any], wanted: str) -> None:
    """Check that a strategy wraps an instance of ``kind``."""
    if not isinstance(inner, kind):
        got = inner.__name__ if isinstance(inner, type) else type(inner).__name__
        _check.fail_type(type(strategy).__name__, f"inner must be {wanted}; got {got}")
