"""K-FAC on brandla's functions: one loop, and a strategy for each system of the family."""

from brandla.kfac.brand import Brand
from brandla.kfac.brand_corrected import BrandCorrected
from brandla.kfac.brand_randomized import BrandRandomized
from brandla.kfac.exact import Exact
from brandla.kfac.preconditioner import KFAC
from brandla.kfac.randomized import Randomized
from brandla.kfac.report import FactorReport, Report
from brandla.kfac.strategy import Strategy

__all__ = [
    "KFAC",
    "Brand",
    "BrandCorrected",
    "BrandRandomized",
    "Exact",
    "FactorReport",
    "Randomized",
    "Report",
    "Strategy",
]
