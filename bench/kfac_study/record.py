"""What the study has measured so far, and how its file says it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from bench.kfac_study.methods import Numbers
from bench.kfac_study.settings import Settings, Task
from brandla.demo.results import Evaluation

STUDY = "kfac-study"


@dataclass
class Run:
    """A method trained on a task from one seed, as a trial of the search or to be measured.

    ``milliseconds`` are the median and the 99th percentile of the steps; ``score`` is a trial's mean accuracy, 0 if
    it failed.
    """

    task: str
    method: str
    seed: int
    numbers: Numbers
    evaluations: list[Evaluation] = field(default_factory=list)
    milliseconds: tuple[float, float] | None = None
    finished: bool = False
    failure: str | None = None
    score: float | None = None

    def reached(self, target: float) -> Evaluation | None:
        """Return the first look that found the target."""
        return next((at for at in self.evaluations if at.accuracy >= target), None)

    def judge(self) -> None:
        """Score a trial that has ended by itself, and keep no more of it."""
        looks = [at.accuracy for at in self.evaluations]
        self.score = sum(looks) / len(looks) if self.finished else 0.0
        self.evaluations = []


@dataclass
class Memory:
    """Bytes that a method keeps beside weights and gradients."""

    task: str
    method: str
    factors: int
    optimizer: int


@dataclass
class Record:
    """The whole study."""

    settings: Settings
    trials: list[Run] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    interrupted: bool = False

    def tried(self, task: str, method: str) -> list[Run]:
        """Return the trials of a method that ended by themselves, the best first."""
        own = [run for run in self.trials if (run.task, run.method) == (task, method) and run.score is not None]
        return sorted(own, key=lambda run: -(run.score or 0.0))

    def chosen(self, task: str, method: str) -> Run | None:
        """Return the best trial of a method whose trials have all been made; None before that."""
        tried = self.tried(task, method)
        return tried[0] if len(tried) == self.settings.trials else None

    def of(self, task: str, method: str) -> list[Run]:
        """Return the runs of a method that have been judged at all."""
        return [
            run for run in self.runs if (run.task, run.method) == (task, method) and (run.evaluations or run.failure)
        ]

    def kept(self, task: str, method: str) -> Memory | None:
        """Return what a method keeps."""
        return next((one for one in self.memory if (one.task, one.method) == (task, method)), None)

    def content(self) -> dict[str, Any]:
        """Return what the result file keeps."""
        return asdict(self)


def of_content(content: dict[str, Any]) -> Record:
    """Return the study that a file's content holds."""
    given = content["settings"]
    tasks = tuple(Task(**task) for task in given["tasks"])
    settings = Settings(**given | {"tasks": tasks, "seeds": tuple(given["seeds"])})
    trials, runs = ([_run(run) for run in content[part]] for part in ("trials", "runs"))
    interrupted = content["facts"]["interrupted"]
    return Record(settings, trials, runs, [Memory(**one) for one in content["memory"]], interrupted)


def _run(content: dict[str, Any]) -> Run:
    times = content["milliseconds"]
    looks = [Evaluation(**at) for at in content["evaluations"]]
    return Run(**content | {"evaluations": looks, "milliseconds": None if times is None else tuple(times)})
