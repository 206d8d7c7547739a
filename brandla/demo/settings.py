"""What a run of the demo measures, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrackingSettings:
    """Size of the tracking study."""

    ranks: tuple[int, ...] = (32, 64, 128)
    headline_rank: int = 64
    steps: int = 200
    # The decompositions to compare with are timed at every so many steps.
    reference_every: int = 12
    warmup: int = 5
    learning_rate: float = 1e-3
    seed: int = 0


@dataclass(frozen=True)
class TrainingSettings:
    """Size of the training study."""

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 100
    search_seed: int = 1000
    search_steps: int = 50
    # Rates tried for each method, spread over its decade.
    trials: int = 4
    evaluate_every: int = 2
    warmup: int = 5
    rank: int = 64
    damping: float = 0.03
    clip: float = 0.07
    inverse_every: int = 10
    target: float = 0.97


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on besides the machine."""

    device: str = "cpu"
    quick: bool = False
    width: int = 512
    batch: int = 128
    decay: float = 0.95
    tracking: TrackingSettings = TrackingSettings()
    training: TrainingSettings = TrainingSettings()


def make_settings(device: str, *, quick: bool = False, seeds: int | None = None) -> Settings:
    """Return the settings of the full demo or of the quick one, with ``seeds`` runs of each method."""
    if quick:
        return Settings(
            device=device,
            quick=True,
            tracking=TrackingSettings(ranks=(64,), steps=60, reference_every=10),
            training=TrainingSettings(seeds=tuple(range(seeds or 1)), steps=40, search_steps=12, trials=2),
        )
    return Settings(device=device, training=TrainingSettings(seeds=tuple(range(seeds or 3))))
