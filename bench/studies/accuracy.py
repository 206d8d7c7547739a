"""The error of each way to track a factor's decomposition over a training run, at equal cost.

Run by ``make study-accuracy``. A run is a width and a seed. A factor is M ← ρM + wAAᵀ. All trackers but the three B
need the dense average, which is kept once for all. ``docs/measurements/accuracy.md`` lists the trackers.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from statistics import median
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy.sparse.linalg import eigsh
from torch import Tensor

import brandla
from bench.benches import problems, timing
from bench.frame import pictures
from bench.frame.pictures import THEMES, Theme
from bench.frame.study import Piece, Row, Study, Tables, command
from bench.gpu.device import Device
from brandla.demo import data
from brandla.demo.studies import observe_step
from brandla.refresh import ritz_correct
from brandla_kernels import gram_ema_
from tests.oracles import gaussian, updated

Factor = brandla.LowRankEigh | brandla.LowRankRoot
FACTORS = ("inputs", "gradients")
# Each update with the kind of factor that it keeps.
UPDATES = dict(zip(("root", "cholesky", "brand"), problems.UPDATES.values(), strict=True))
BEST = "best rank r"


@dataclass(frozen=True)
class Settings:
    """The settings of the study."""

    widths: tuple[int, ...] = (512, 1024, 2048)
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 300
    # A prime that divides no period of a renewal, so that decompositions of every age are measured.
    measure_every: int = 23
    batch: int = 128  # k
    rank: int = 64  # r
    learning_rate: float = 1e-3
    decay: float = 0.95  # ρ
    damping: float = 0.03  # λ over the largest eigenvalue of the true factor
    oversample: int = 10
    power_iterations: int = 3
    overwrite_every: int = 20  # steps between two overwrites of B-R
    fraction: float = 0.5  # of the columns that B-C corrects
    warmup: int = 40  # steps until the average has forgotten its start, 2/(1 − ρ); summaries leave them out
    repeats: int = 15  # of the calls that are timed for the costs


USUAL = Settings()
QUICK = Settings(widths=(192, 256), seeds=(0,), steps=14, measure_every=3, batch=48, rank=12, warmup=6, repeats=3)
SEEN = 20  # batches that a factor has taken in before its updates are timed
# The measures by their names in the result file, and their words.
MEASURES = {
    "inputs inverse": "inverse of A",
    "gradients inverse": "inverse of G",
    "step error": "step",
    "step angle": "angle of the step",
    "inputs spectral": "‖Â − A‖₂",
    "gradients spectral": "‖Ĝ − G‖₂",
    "inputs trace": "trace of A left out",
    "gradients trace": "trace of G left out",
}


def pieces(settings: Settings, _: Device, tables: Tables) -> Iterator[Piece]:
    """Yield the costs and the runs width by width, so that an early end leaves whole widths with all seeds."""
    rows = 10 * (settings.steps // settings.measure_every)
    for width in settings.widths:
        yield Piece("trackers", {"width": width}, partial(tracker_costs, settings, width), 0.1)
        for seed in settings.seeds:
            measure = partial(tracker_errors, settings, width, seed, tables)
            yield Piece("runs", {"width": width, "seed": seed}, measure, width**2 / 512**2, rows)


def tracker_costs(settings: Settings, width: int) -> Iterator[Row]:
    """Yield the trackers with their costs, once for all seeds."""
    observed = islice(observations(settings, width, settings.seeds[0]), min(SEEN, settings.steps))
    *batches, last = (columns["inputs"] for columns, _ in observed)
    # Every move is timed in turn, with the last batch, on a factor that has taken in the others.
    two_forms = [Tracker("eigh", "brand", None, 0), Tracker("root", "root", None, 0)]
    factor = TrackedFactor(settings, len(last), 0, two_forms)
    for step, columns in enumerate(batches, start=1):
        factor.absorb(step, columns)
    kept_by = lambda move: factor.factors["root" if move in ("root", "cholesky") else "eigh"]
    moves = {name: partial(move, kept_by(name)) for name, move in factor.moves(last).items()}
    costs = {name: 1e3 * median(times) for name, times in timing.alternating(moves, settings.repeats).items()}
    for tracker in trackers(settings, costs):
        yield {**vars(tracker), "milliseconds": tracker.cost(costs)}


def tracker_errors(settings: Settings, width: int, seed: int, tables: Tables) -> Iterator[Row]:
    """Yield the errors of every tracker at every ``measure_every``-th step."""
    rows = [row for row in tables["trackers"] if row["width"] == width]
    chosen = [Tracker(row["name"], row["update"], row["renewal"], row["period"]) for row in rows]
    truths = {"inputs": torch.zeros(width + 1, width + 1).double(), "gradients": torch.zeros(width, width).double()}
    sides = {side: TrackedFactor(settings, len(truth), seed, chosen) for side, truth in truths.items()}
    for step, (columns, gradient) in enumerate(observations(settings, width, seed), start=1):
        for side in FACTORS:
            truths[side] = updated(truths[side], columns[side], settings.decay, 1 - settings.decay)
            sides[side].absorb(step, columns[side])
        if step % settings.measure_every:
            continue
        exact = {side: Decomposed(truth, settings) for side, truth in truths.items()}
        tracked = {side: {BEST: exact[side].best(settings.rank)} | sides[side].factors for side in FACTORS}
        for tracker in tracked["inputs"]:
            factors, row = {side: tracked[side][tracker] for side in FACTORS}, {"step": step, "tracker": tracker}
            for side in FACTORS:
                row |= {f"{side} {of}": value for of, value in exact[side].errors(factors[side]).items()}
            yield row | step_errors(gradient, exact, factors)


# --- The trackers and their costs


@dataclass(frozen=True)
class Tracker:
    """A way to track a factor: perhaps an update at every step, perhaps a renewal every ``period`` steps."""

    name: str
    update: str | None
    renewal: str | None
    period: int

    def cost(self, costs: dict[str, float]) -> float:
        """Return the milliseconds of a step from those of each move; a renewal needs the dense average."""
        renewed = (costs["average"] + costs[self.renewal] / self.period) if self.renewal else 0.0
        return renewed + (costs[self.update] if self.update else 0.0)

    def due(self, step: int) -> bool:
        """Return whether a step, counted from 1, ends with a renewal."""
        return self.renewal is not None and (step - 1) % self.period == 0


def trackers(settings: Settings, costs: dict[str, float]) -> list[Tracker]:
    """Return all trackers. B-C, RS and SRE renew as often as B-R's cost allows; RS and SRE also as often as B-R."""
    every = settings.overwrite_every
    b_r = Tracker("B-R", "brand", "svd", every)
    to_spend = b_r.cost(costs) - costs["average"]
    # The shortest period with which renewals cost at most so much a step.
    period = lambda renewal, most: max(1, math.ceil(costs[renewal] / most))
    return [
        Tracker("B", "brand", None, 0),
        Tracker("B, root", "root", None, 0),
        Tracker("B, no eigh", "cholesky", None, 0),
        b_r,
        Tracker("B-C", "brand", "correction", period("correction", to_spend - costs["brand"])),
        Tracker("RS", None, "svd", period("svd", to_spend)),
        Tracker("SRE", None, "eigh", period("eigh", to_spend)),
        Tracker(f"RS every {every}", None, "svd", every),
        Tracker(f"SRE every {every}", None, "eigh", every),
    ]


class TrackedFactor:
    """The dense average of one factor, and the factors that the trackers keep."""

    def __init__(self, settings: Settings, n: int, seed: int, chosen: list[Tracker]) -> None:
        self._settings, self._trackers = settings, chosen
        self._generator = torch.Generator().manual_seed(seed)
        self._dense = torch.zeros(n, n)
        kinds = {tracker.name: UPDATES[tracker.update or "brand"][1] for tracker in chosen}
        self.factors: dict[str, Any] = {name: kind.zeros(n, settings.rank) for name, kind in kinds.items()}

    def moves(self, columns: Tensor) -> dict[str, Callable[[Any], Any]]:
        """Return the moves that new columns allow, each a function from a factor to the next one."""
        settings, dense, random = self._settings, self._dense, {"generator": self._generator}
        average = {"decay": settings.decay, "weight": 1 - settings.decay}
        sketched = random | {"oversample": settings.oversample, "power_iterations": settings.power_iterations}
        # A correction takes a random part of a factor's columns.
        chosen = lambda: torch.randperm(settings.rank, **random)[: math.ceil(settings.fraction * settings.rank)]
        eigh_of = lambda svd: brandla.LowRankEigh(svd.S, svd.U)
        return {
            "average": lambda _: gram_ema_(dense, columns, **average),
            **{name: partial(update, columns=columns, **average) for name, (update, _) in UPDATES.items()},
            "svd": lambda _: eigh_of(brandla.randomized_svd(dense, settings.rank, **sketched)),
            "eigh": lambda _: brandla.randomized_eigh(dense, settings.rank, **sketched),
            "correction": lambda factor: ritz_correct(factor, dense, chosen()),
        }

    def absorb(self, step: int, columns: Tensor) -> None:
        moves = self.moves(columns)
        moves["average"](None)
        for tracker in self._trackers:
            for move in filter(None, (tracker.update, tracker.renewal if tracker.due(step) else None)):
                self.factors[tracker.name] = moves[move](self.factors[tracker.name])


def observations(settings: Settings, width: int, seed: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Train 64-width-width-10 with AdamW; yield the new columns of both factors of the middle Linear at every step.

    They are "inputs" (width + 1, k), whose last row of ones is for the bias, and "gradients" (width, k), both over √k.
    The gradient of the layer's weights (width, width + 1) comes with them.
    """
    model = data.seeded(seed, data.mlp, 64, width, width, 10)
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate)
    for batch in data.batches(data.load("cpu").training, settings.batch, settings.steps, seed):
        inputs, gradients = observe_step(model, optimizer, batch)
        yield {"inputs": inputs, "gradients": gradients}, gradients @ inputs.mT


class Decomposed:
    """M with its eigenpairs and its damped inverse. λ is relative to M's largest eigenvalue, for all trackers."""

    def __init__(self, matrix: Tensor, settings: Settings) -> None:
        values, vectors = torch.linalg.eigh(matrix)
        self.matrix, self.values, self.vectors = matrix, values.flip(0).clamp_min(0), vectors.flip(1)
        self.damping = settings.damping * float(self.values[0])
        self.inverse = (self.vectors / (self.values + self.damping)) @ self.vectors.mT

    def best(self, rank: int) -> brandla.LowRankEigh:
        """Return the best approximation of this rank, in float64."""
        return brandla.LowRankEigh(self.values[:rank], self.vectors[:, :rank])

    def errors(self, factor: Factor) -> dict[str, float]:
        """Return the relative errors of damped inverse (Frobenius) and factor (spectral), and the trace left out."""
        eigh, n = eigh_in_float64(factor), len(self.matrix)
        inverse = brandla.damped_solve(eigh, torch.eye(n, dtype=torch.float64), self.damping)
        difference, start = (eigh.dense() - self.matrix).numpy(), gaussian(n, seed=0).numpy()
        # Lanczos' iteration finds the eigenvalue to the square of the tolerance.
        (largest,) = eigsh(difference, k=1, which="LM", tol=1e-3, v0=start, return_eigenvectors=False)
        outside = self.values.sum() - (eigh.eigenvectors * (self.matrix @ eigh.eigenvectors)).sum()
        return {
            "inverse": float((inverse - self.inverse).norm() / self.inverse.norm()),
            "spectral": abs(float(largest)) / float(self.values[0]),
            "trace": float(outside / self.values.sum()),
        }


def eigh_in_float64(factor: Factor) -> brandla.LowRankEigh:
    """Return a factor as eigenpairs in float64."""
    double = factor.to(torch.float64)
    return double.to_eigh() if isinstance(double, brandla.LowRankRoot) else double


def step_errors(gradient: Tensor, exact: dict[str, Decomposed], factors: dict[str, Factor]) -> dict[str, float]:
    """Return the relative error of (Γ̂ + λI)⁻¹ ∂W (Â + λI)⁻¹ beside the true factors' step, and the degrees between."""
    (inputs, gradients), gradient = (exact[side] for side in FACTORS), gradient.double()
    true = gradients.inverse @ gradient @ inputs.inverse
    right, left = (eigh_in_float64(factors[side]) for side in FACTORS)
    found = brandla.kron_damped_solve(left, right, gradient, gradients.damping, inputs.damping)
    cosine = ((true * found).sum() / (true.norm() * found.norm())).clamp(-1, 1)
    error, angle = (found - true).norm() / true.norm(), torch.rad2deg(torch.acos(cosine))
    return {"step error": float(error), "step angle": float(angle)}


# --- Summaries: medians over the steps after the warm-up, and their mean and range over the seeds


def settled(content: Row) -> pd.DataFrame:
    """Return the errors after the warm-up of the longest runs of each width: whole ones if there are any."""
    runs = pd.DataFrame(content.get("runs", []), columns=["width", "seed", "step", "tracker", *MEASURES])
    last = runs.groupby(["width", "seed"])["step"].transform("max")
    whole = last == runs.groupby("width")["step"].transform("max")
    return runs[whole & (runs["step"] > content["settings"]["warmup"])]


def shown(content: Row) -> Iterator[tuple[str, pd.DataFrame]]:
    medians = settled(content).groupby(["width", "seed", "tracker"])[list(MEASURES)].median()
    means = medians.groupby(["width", "tracker"]).mean()
    costs = pd.DataFrame(content.get("trackers", []))
    for width in means.index.unique("width"):
        cells = (100 * means.loc[width]).map("{:.2g} %".format).rename(columns=MEASURES)
        cells[MEASURES["step angle"]] = means.loc[width, "step angle"].map("{:.2g}°".format)
        of_width = costs[(costs["width"] == width) & costs["name"].isin(cells.index)].set_index("name")
        cells.insert(0, "ms per step", of_width["milliseconds"].map("{:.3g}".format))
        every = of_width["period"].map("{:.0f}".format).where(of_width["renewal"].notna(), "never")
        cells.insert(0, "renewed every", every)
        cells = cells.reindex([BEST, *of_width.index]).astype(object).fillna("")
        yield f"Width {width}", cells.reset_index(names="tracker")


# --- The page

COLUMNS = ["tracker", "renewed every", "ms per step", "inverse of A", "inverse of G", "step", "angle of the step"]


def answer(content: Row) -> str:
    """Return the ratio of the step errors of B-R and RS at equal cost, at the largest width."""
    by_tracker = settled(content).pivot(index=["width", "seed", "step"], columns="tracker", values="step error")
    errors = by_tracker.reindex(columns=["B-R", "RS"]).dropna()
    if errors.empty:
        return ""
    width = errors.index.unique("width").max()
    ratios = (errors["B-R"] / errors["RS"]).loc[width]
    seeds = ratios.groupby("seed").median()
    return (
        f"At width {width} and equal cost the step of B-R has {seeds.mean():.2f} ({seeds.min():.2f} to"
        f" {seeds.max():.2f}) times the error of RS."
        f" It has less error in {100 * (ratios < 1).mean():.0f} % of the steps."
    )


def table(content: Row) -> pd.DataFrame:
    """Return the errors of every tracker at the largest width."""
    return ([cells for _, cells in shown(content)] or [pd.DataFrame(columns=COLUMNS)])[-1][COLUMNS]


SHOWN = ("B", "RS", "B-R", "B-C", "SRE", "B, root", "B, no eigh")
COLOURS = {BEST: tuple(theme.faint for theme in THEMES)} | dict(zip(SHOWN, pictures.PALETTE, strict=False))


def draw(content: Row, theme: Theme) -> Figure:
    """Draw the error of the step at the largest width."""
    settings, width = content["settings"], settled(content)["width"].max()
    runs = pd.DataFrame(content["runs"]).query("width == @width")
    words = f"accuracy.json; mean and range over {runs['seed'].nunique()} seeds"
    below = f"width {width}, rank {settings['rank']}, {settings['batch']} columns a step"
    about = ("Relative error of the step", below, 4.6)
    figure, (axis,) = pictures.panels(content, words, theme, about, width=pictures.NARROW)
    errors = runs.pivot(index=["step", "seed"], columns="tracker", values="step error")
    pictures.curves(axis, errors[[name for name in COLOURS if name in errors]], COLOURS, theme, SHOWN, linewidth=1.6)
    pictures.logarithmic(axis.yaxis, lambda value: f"{100 * value:g} %", subs=(1, 3))
    axis.set_xlabel("training step")
    pictures.legend(axis, 3)
    return figure


STUDY = Study("accuracy", {"quick": QUICK, "usual": USUAL}, pieces, shown)

if __name__ == "__main__":
    command(STUDY, __doc__)()
