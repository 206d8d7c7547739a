"""What the study runs over: the usual sizes, those for a GPU, and the short version that shows that it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DIGITS, FASHION = "digits", "fashion-mnist"


@dataclass(frozen=True)
class Task:
    """Images, a network that learns them, and how long it may.

    Parameters
    ----------
    name
        As in the result file and in ``--only``.
    images
        ``"digits"`` or ``"fashion-mnist"``.
    network
        ``"mlp"``: pixels-width-width-10. ``"conv"``: two convolutions of ``width`` and 2 · ``width`` channels.
    batch, steps, search_steps
        Samples of a step; steps of a run, and of a trial of the search.
    evaluate_every
        Steps between two looks at the accuracy.
    target
        Accuracy on the test images that steps and seconds are counted to.
    cost
        Of a step, beside those of other tasks, for the progress bar.
    """

    name: str
    images: Literal["digits", "fashion-mnist"]
    network: Literal["mlp", "conv"]
    width: int
    batch: int
    steps: int
    search_steps: int
    evaluate_every: int
    target: float
    cost: float = 1.0


@dataclass(frozen=True)
class Settings:
    """One study. Every method has ``trials`` trials a task, at the same points of its ranges."""

    tasks: tuple[Task, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    trials: int = 8
    # Of the trials' points, networks and batches: none of the seeds that are measured.
    search_seed: int = 1000
    rank: int = 64
    clip: float = 0.07
    # Steps between renewals of K-FAC, RS-KFAC, SRE-KFAC and B-KFAC-C, and between overwrites of B-R-KFAC.
    renew_every: int = 10
    overwrite_every: int = 50
    # SINGD takes in no data between its updates, and is given more of them.
    singd_every: int = 5
    # Of each part of a set, the first so many images are taken; None for all.
    most_images: int | None = None

    def task(self, name: str) -> Task:
        """Return the task of this name."""
        return next(task for task in self.tasks if task.name == name)


USUAL = Settings(
    (
        Task(FASHION, FASHION, "mlp", 512, 128, 300, 100, 10, 0.85, cost=1.4),
        Task(DIGITS, DIGITS, "mlp", 512, 128, 100, 50, 2, 0.97),
    )
)
FULL = Settings(
    (
        Task(FASHION, FASHION, "mlp", 2048, 512, 2000, 500, 20, 0.88, cost=4),
        Task("fashion-mnist-conv", FASHION, "conv", 32, 128, 2000, 500, 20, 0.90, cost=4),
        Task(DIGITS, DIGITS, "mlp", 1024, 128, 200, 100, 2, 0.97),
    ),
    seeds=(0, 1, 2, 3, 4),
    trials=16,
    rank=128,
)
QUICK = Settings(
    (
        Task(FASHION, FASHION, "mlp", 48, 16, 4, 2, 2, 0.3),
        Task("fashion-mnist-conv", FASHION, "conv", 4, 16, 3, 2, 2, 0.3),
        Task(DIGITS, DIGITS, "mlp", 48, 16, 8, 4, 2, 0.3),
    ),
    seeds=(0, 1),
    trials=2,
    rank=8,
    renew_every=3,
    overwrite_every=4,
    singd_every=2,
    most_images=256,
)
