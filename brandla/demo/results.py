"""What the demo measures, filled in as it goes, so that an interrupted run keeps what it has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from brandla.demo.settings import Settings
from brandla.kfac import FactorReport


@dataclass
class Errors:
    """Sizes of a matrix, or of the errors of a factor, step by step.

    ``spectral`` is ‖·‖₂, ``frobenius`` ‖·‖_F, and ``trace`` the trace norm, the sum of the absolute eigenvalues.
    """

    spectral: list[float] = field(default_factory=list)
    frobenius: list[float] = field(default_factory=list)
    trace: list[float] = field(default_factory=list)


@dataclass
class Tracker:
    """One tracked factor; ``milliseconds`` has one entry for every update, from the first."""

    update: str
    rank: int
    errors: Errors = field(default_factory=Errors)
    bound: list[float] = field(default_factory=list)
    orthogonality: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)


@dataclass
class Reference:
    """A decomposition of the dense average, timed now and then; ``failures`` counts those that raised."""

    name: str
    rank: int | None
    milliseconds: list[float] = field(default_factory=list)
    failures: int = 0


@dataclass
class Tracking:
    """The tracking study. Entry i of a list of norms belongs to ``steps[i]``."""

    n: int
    columns: int
    steps: list[int] = field(default_factory=list)
    norms: Errors = field(default_factory=Errors)
    best: dict[int, Errors] = field(default_factory=dict)
    trackers: list[Tracker] = field(default_factory=list)
    references: list[Reference] = field(default_factory=list)


@dataclass
class Trial:
    """One rate of a search: its score is the mean validation accuracy over the trial."""

    rate: float
    score: float


@dataclass
class Search:
    """The search for one method's learning rate."""

    method: str
    trials: list[Trial] = field(default_factory=list)
    chosen: float | None = None
    at_edge: bool = False


@dataclass
class Evaluation:
    """Test accuracy after ``step`` steps, which took ``seconds`` without the evaluations."""

    step: int
    seconds: float
    accuracy: float


@dataclass
class Run:
    """One method trained from one seed."""

    method: str
    seed: int
    rate: float
    milliseconds: list[float] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    finished: bool = False
    failure: str | None = None


@dataclass
class Training:
    """The training study; ``memory`` is what ``report()`` said of each K-FAC method's factors."""

    searches: list[Search] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    memory: dict[str, list[FactorReport]] = field(default_factory=dict)


@dataclass
class Results:
    """All of a run."""

    machine: dict[str, Any]
    settings: Settings
    tracking: Tracking | None = None
    training: Training = field(default_factory=Training)
    interrupted: bool = False
    seconds: float = 0.0
