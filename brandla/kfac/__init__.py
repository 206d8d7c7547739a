"""K-FAC on brandla's functions: one preconditioner, and a strategy for each system of the family."""

from brandla.kfac.adaptive import Adaptive
from brandla.kfac.applications.evidence import evidence
from brandla.kfac.applications.forward_laplacian import Columns, forward_laplacian
from brandla.kfac.applications.pinn import PINN
from brandla.kfac.capture.kinds.like import register
from brandla.kfac.preconditioner import KFAC
from brandla.kfac.report import FactorReport, Report
from brandla.kfac.state import read_state
from brandla.kfac.systems import structures as structures
from brandla.kfac.systems.brand import Brand
from brandla.kfac.systems.brand_dense import BrandCorrected, BrandRandomized
from brandla.kfac.systems.cg import ConjugateGradient
from brandla.kfac.systems.ekfac import EKFAC
from brandla.kfac.systems.exact import Exact, Randomized
from brandla.kfac.systems.foof import Foof
from brandla.kfac.systems.inverse_free import InverseFree
from brandla.kfac.systems.kbfgs import KBFGS
from brandla.kfac.systems.schedule import ErrorBound
from brandla.kfac.systems.strategy import Strategy
from brandla.kfac.systems.two_level import TwoLevel
from brandla.kfac.systems.woodbury import Woodbury

__all__ = [
    "EKFAC",
    "KBFGS",
    "KFAC",
    "PINN",
    "Adaptive",
    "Brand",
    "BrandCorrected",
    "BrandRandomized",
    "Columns",
    "ConjugateGradient",
    "ErrorBound",
    "Exact",
    "FactorReport",
    "Foof",
    "InverseFree",
    "Randomized",
    "Report",
    "Strategy",
    "TwoLevel",
    "Woodbury",
    "evidence",
    "forward_laplacian",
    "read_state",
    "register",
]


def __dir__() -> list[str]:
    return __all__
