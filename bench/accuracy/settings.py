"""What the study runs over, and the short version that shows that it runs."""

from __future__ import annotations

from dataclasses import dataclass

# What a factor is the running mean of.
FACTORS = ("inputs", "gradients")


@dataclass(frozen=True)
class Settings:
    """One study. A run is a width and a seed; the widths are in order, so that an end in between leaves all seeds."""

    widths: tuple[int, ...] = (512, 1024, 2048)
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 300
    # A prime that divides no period of a renewal, so that every age of a decomposition is looked at.
    measure_every: int = 23
    batch: int = 128  # k
    rank: int = 64  # r
    learning_rate: float = 1e-3
    decay: float = 0.95  # ρ
    damping: float = 0.03  # λ over the largest eigenvalue of the true factor
    oversample: int = 10
    power_iterations: int = 3
    overwrite_every: int = 20  # steps between two overwrites of B-R
    fraction: float = 0.5  # of its columns that B-C corrects
    warmup: int = 40  # steps until the average has forgotten its start, 2/(1 − ρ); summaries begin after it
    repeats: int = 15  # of the calls that are timed for the costs

    @property
    def measured(self) -> list[int]:
        """Steps after which the trackers are compared with the truth."""
        return list(range(self.measure_every, self.steps + 1, self.measure_every))


FULL = Settings()
QUICK = Settings(widths=(192, 256), seeds=(0,), steps=14, measure_every=3, batch=48, rank=12, warmup=6, repeats=3)
