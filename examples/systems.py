"""Every K-FAC system of the library as the examples use it, with its learning rate."""

from __future__ import annotations

import typer

from brandla.kfac import (
    EKFAC,
    KBFGS,
    Brand,
    BrandCorrected,
    BrandRandomized,
    ConjugateGradient,
    Exact,
    Foof,
    InverseFree,
    Randomized,
    Strategy,
    TwoLevel,
    Woodbury,
)

RANK = 32

SYSTEMS: dict[str, tuple[Strategy | None, float]] = {
    "AdamW": (None, 0.003),
    "K-FAC": (Exact(), 0.1),
    "K-FAC, Cholesky": (Exact(method="cholesky"), 0.1),
    "EK-FAC": (EKFAC(), 0.1),
    "RS-KFAC": (Randomized(RANK, method="svd"), 0.1),
    "SRE-KFAC": (Randomized(RANK), 0.1),
    "B-KFAC": (Brand(RANK), 0.1),
    "B-KFAC, orthonormal": (Brand(RANK, form="eigh"), 0.1),
    "B-KFAC, no eigh": (Brand(RANK, compress="cholesky"), 0.1),
    "B-R-KFAC": (BrandRandomized(RANK), 0.1),
    "B-KFAC-C": (BrandCorrected(RANK), 0.1),
    "IKFAC": (InverseFree(variant="ikfac"), 0.1),
    "SINGD": (InverseFree(), 0.1),
    "SINGD, hierarchical": (InverseFree("hierarchical"), 0.1),
    "FOOF": (Foof(Brand(RANK)), 0.1),
    "CG-FAC": (ConjugateGradient(), 0.1),
    "K-BFGS": (KBFGS(), 0.1),
    "natural gradient": (Woodbury(), 0.1),
    "SENG": (Woodbury(every=10, features=256, positions=16), 0.1),
    "FNGD": (Woodbury(fixed_after=20), 0.1),
    "two-level B-KFAC": (TwoLevel(Brand(RANK)), 0.1),
}


def select_systems(system: str) -> list[tuple[str, Strategy | None, float]]:
    """Return the system of a name, or all systems, with their rates."""
    if system != "all" and system not in SYSTEMS:
        message = f"system must be all or one of {', '.join(SYSTEMS)}; got {system}"
        raise typer.BadParameter(message)
    return [(name, strategy, rate) for name, (strategy, rate) in SYSTEMS.items() if system in ("all", name)]
