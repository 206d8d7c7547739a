"""K-FAC on brandla's functions: one loop, and a strategy for each system of the family."""

from brandla.kfac.adaptive import ErrorBound
from brandla.kfac.brand import Brand
from brandla.kfac.brand_corrected import BrandCorrected
from brandla.kfac.brand_randomized import BrandRandomized
from brandla.kfac.cg import ConjugateGradient
from brandla.kfac.ekfac import EKFAC
from brandla.kfac.exact import Exact
from brandla.kfac.foof import Foof
from brandla.kfac.inverse_free import InverseFree
from brandla.kfac.preconditioner import KFAC
from brandla.kfac.randomized import Randomized
from brandla.kfac.report import FactorReport, Report
from brandla.kfac.state import read_state
from brandla.kfac.strategy import Strategy
from brandla.kfac.two_level import TwoLevel

__all__ = [
    "EKFAC",
    "KFAC",
    "Brand",
    "BrandCorrected",
    "BrandRandomized",
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
    "read_state",
]
