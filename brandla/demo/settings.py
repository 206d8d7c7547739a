"""What a run of the demo measures, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on besides the machine."""

    device: str = "cpu"
    quick: bool = False
    width: int = 512
    batch: int = 128
    decay: float = 0.95
    warmup: int = 5  # steps whose times are left out

    # Tracking: the decompositions to compare with are timed at every so many steps.
    ranks: tuple[int, ...] = (32, 64, 128)
    headline_rank: int = 64
    tracking_steps: int = 200
    reference_every: int = 12
    tracking_rate: float = 1e-3
    tracking_seed: int = 0

    # Training: the search has a seed that no measured run has, and tries so many rates over each method's decade.
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 100
    search_seed: int = 1000
    search_steps: int = 50
    trials: int = 4
    evaluate_every: int = 2
    rank: int = 64
    damping: float = 0.03
    clip: float = 0.07
    inverse_every: int = 10
    target: float = 0.97

    @property
    def order(self) -> int:
        """Order n of the tracked factor: the layer's inputs, and 1 for the bias."""
        return self.width + 1


def make_settings(device: str, *, quick: bool = False, seeds: int | None = None) -> Settings:
    """Return the settings of the full demo or of the quick one, with ``seeds`` runs of each method."""
    runs = tuple(range(seeds or (1 if quick else 3)))
    if quick:
        short = {"tracking_steps": 60, "reference_every": 10, "steps": 40, "search_steps": 12, "trials": 2}
        return Settings(device, quick=True, ranks=(64,), seeds=runs, **short)
    return Settings(device, seeds=runs)
