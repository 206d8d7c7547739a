"""What the study has measured so far, and its file."""

from __future__ import annotations

import json
from collections import namedtuple
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.accuracy.settings import Settings
from bench.accuracy.trackers import Costs, Tracker
from bench.accuracy.truth import Errors, Step
from bench.frame import results

STUDY = "accuracy"


@dataclass
class Run:
    """One width from one seed: after each of ``steps``, errors by tracker, factor and measure."""

    width: int
    seed: int
    finished: bool = False
    steps: list[int] = field(default_factory=list)
    errors: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=dict)

    def note(self, tracker: str, of: str, measured: Errors | Step) -> None:
        """Add the errors of one tracker: of one of its factors, or of its "step"."""
        kept = self.errors.setdefault(tracker, {}).setdefault(of, {})
        for measure, value in measured._asdict().items():
            kept.setdefault(measure, []).append(value)

    def cut(self) -> None:
        """Drop what an interruption has left of a step that was not measured whole."""
        whole = len(self.steps)
        for tracker in self.errors.values():
            for kept in tracker.values():
                for values in kept.values():
                    del values[whole:]


@dataclass
class Record:
    """The whole study."""

    settings: Settings
    costs: dict[int, Costs] = field(default_factory=dict)
    trackers: dict[int, list[Tracker]] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    interrupted: bool = False
    seconds: float = 0.0

    def missing(self) -> list[tuple[int, int]]:
        """Return the width and seed of each run that has not been finished, in order."""
        done = {(run.width, run.seed) for run in self.runs if run.finished}
        pairs = [(width, seed) for width in self.settings.widths for seed in self.settings.seeds]
        return [pair for pair in pairs if pair not in done]

    def content(self) -> dict[str, Any]:
        """Return what the result file keeps."""
        return {
            "settings": asdict(self.settings),
            "costs": {str(width): costs._asdict() for width, costs in self.costs.items()},
            "trackers": {
                str(width): [asdict(one) | {"milliseconds": one.cost(self.costs[width])} for one in chosen]
                for width, chosen in self.trackers.items()
            },
            "runs": [asdict(run) for run in self.runs],
            "interrupted": self.interrupted,
            "seconds": self.seconds,
        }

    def write(self, machine: dict[str, Any], folder: Path | None) -> Path:
        """Write the file, whole or not at all, and return its path."""
        return results.write(STUDY, machine, self.content(), folder)


def read(path: Path) -> tuple[dict[str, Any], Record]:
    """Return the facts of a file and its study."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["facts"], of_content(content)


def of_content(content: dict[str, Any]) -> Record:
    """Return the study that a file's content holds."""
    settings = {name: tuple(v) if isinstance(v, list) else v for name, v in content["settings"].items()}
    keep = ("name", "update", "renewal", "period")
    return Record(
        Settings(**settings),
        {int(width): _costs(pieces) for width, pieces in content["costs"].items()},
        {
            int(width): [Tracker(**{name: one[name] for name in keep}) for one in chosen]
            for width, chosen in content["trackers"].items()
        },
        [Run(**run) for run in content["runs"]],
        content["interrupted"],
        content["seconds"],
    )


def _costs(pieces: dict[str, float]) -> Any:
    """Return costs under the names that the file has: one of an earlier commit may time other pieces."""
    return namedtuple("Costs", pieces)(**pieces)
