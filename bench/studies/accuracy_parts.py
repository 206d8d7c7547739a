"""What the accuracy study compares: the ways of keeping a factor with their costs, and the factor itself in float64.

A factor is M ← ρM + wAAᵀ. The dense average, which all but the three B keep, is the same for all and kept once.
``docs/measurements/accuracy.md`` lists the trackers.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

import brandla
from bench.benches import problems, timing
from brandla.correction import ritz_correct
from brandla.demo import data
from brandla.demo.studies import observed
from brandla_kernels import gram_ema_

Factor = brandla.LowRankEigh | brandla.LowRankRoot
FACTORS = ("inputs", "gradients")
# Each with the kind of factor that it keeps.
UPDATES = {
    "brand": problems.UPDATES["eigh_update"],
    "root": problems.UPDATES["root_update"],
    "cholesky": problems.UPDATES["root_update, cholesky"],
}
BEST = "best rank r"
# ‖M − M̂‖₂ comes from Lanczos' iteration, whose eigenvalue is right to the square of this.
LANCZOS = 1e-3


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


Costs = dict[str, float]  # milliseconds of each move, for one factor: "average", the updates and the renewals


@dataclass(frozen=True)
class Tracker:
    """A way of keeping a factor: an update at every step or none, and a renewal every ``period`` steps or none."""

    name: str
    update: str | None
    renewal: str | None
    period: int

    def cost(self, costs: Costs) -> float:
        """Milliseconds of a step, the dense average included where it is needed."""
        renewed = (costs["average"] + costs[self.renewal] / self.period) if self.renewal else 0.0
        return renewed + (costs[self.update] if self.update else 0.0)

    def due(self, step: int) -> bool:
        """Say whether this step, of those counted from 1, ends with a renewal."""
        return self.renewal is not None and (step - 1) % self.period == 0


def trackers(settings: Settings, costs: Costs) -> list[Tracker]:
    """Return all trackers: B-R as it is set, and B-C, RS and SRE renewed as often as its cost pays for.

    RS and SRE come once more with the period of B-R.
    """
    every = settings.overwrite_every
    b_r = Tracker("B-R", "brand", "svd", every)
    to_spend = b_r.cost(costs) - costs["average"]
    # The shortest period that costs no more than this a step.
    period = lambda renewal, left: max(1, math.ceil(costs[renewal] / left))
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


class Kept:
    """The dense average of one factor, and what every tracker keeps of it."""

    def __init__(self, settings: Settings, n: int, seed: int, chosen: list[Tracker]) -> None:
        self._settings, self._trackers = settings, chosen
        self._generator = torch.Generator().manual_seed(seed)
        self._dense = torch.zeros(n, n)
        self.factors: dict[str, Any] = {
            one.name: UPDATES[one.update or "brand"][1].zeros(n, settings.rank) for one in chosen
        }

    def moves(self, columns: Tensor) -> dict[str, Callable[[Any], Any]]:
        """Return what may be done with new columns, each a function from a factor to the next.

        They are taken into the dense average and into a factor; the average is decomposed as RS or SRE does; and a
        random part of the columns of a factor is corrected.
        """
        settings, dense, generator = self._settings, self._dense, self._generator
        average = {"decay": settings.decay, "weight": 1 - settings.decay}
        options = {"oversample": settings.oversample, "power_iterations": settings.power_iterations}
        decomposed = lambda decompose: decompose(dense, settings.rank, generator=generator, **options)
        count = math.ceil(settings.fraction * settings.rank)
        chosen = lambda: torch.randperm(settings.rank, generator=generator)[:count]

        def by_svd(_: Any) -> Factor:
            found = decomposed(brandla.randomized_svd)
            return brandla.LowRankEigh(found.S, found.U)

        return {
            "average": lambda _: gram_ema_(dense, columns, **average),
            **{name: partial(update, columns=columns, **average) for name, (update, _) in UPDATES.items()},
            "svd": by_svd,
            "eigh": lambda _: decomposed(brandla.randomized_eigh),
            "correction": lambda factor: ritz_correct(factor, dense, chosen()),
        }

    def absorb(self, step: int, columns: Tensor) -> None:
        moves = self.moves(columns)
        moves["average"](None)
        for one in self._trackers:
            for move in filter(None, (one.update, one.renewal if one.due(step) else None)):
                self.factors[one.name] = moves[move](self.factors[one.name])


def measure_costs(settings: Settings, stream: list[Tensor]) -> Costs:
    """Time every move, in turn, on a factor that has seen all but the last of some columns (n, k)."""
    kept = Kept(settings, len(stream[-1]), 0, [Tracker("eigh", "brand", None, 0), Tracker("root", "root", None, 0)])
    for step, columns in enumerate(stream[:-1], start=1):
        kept.absorb(step, columns)
    of = lambda move: kept.factors["root" if move in ("root", "cholesky") else "eigh"]
    pieces = {name: partial(move, of(name)) for name, move in kept.moves(stream[-1]).items()}
    seconds = timing.alternating(pieces, settings.repeats)
    return {name: 1e3 * timing.of_median(times).value for name, times in seconds.items()}


class Observation(NamedTuple):
    """One step of the middle Linear: the columns that come to either factor, and the gradient of its weights."""

    step: int
    columns: dict[str, Tensor]  # "inputs" (width + 1, k) with the bias' ones last, "gradients" (width, k), over √k
    gradient: Tensor  # (width, width + 1)


def observations(settings: Settings, width: int, seed: int) -> Iterator[Observation]:
    """Train 64-width-width-10 with AdamW, and yield what every step shows."""
    model = data.seeded(seed, data.mlp, 64, width, width, 10)
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate)
    stream = data.batches(data.load("cpu").training, settings.batch, settings.steps, seed)
    for step, batch in enumerate(stream, start=1):
        inputs, gradients = observed(model, optimizer, batch)
        yield Observation(step, {"inputs": inputs, "gradients": gradients}, gradients @ inputs.mT)


class Decomposed:
    """M with its eigenpairs, and its damped inverse; λ is relative to its largest eigenvalue, whatever the tracker."""

    def __init__(self, matrix: Tensor, settings: Settings) -> None:
        values, vectors = torch.linalg.eigh(matrix)
        self.matrix, self.values, self.vectors = matrix, values.flip(0).clamp_min(0), vectors.flip(1)
        self.damping = settings.damping * float(self.values[0])
        self.inverse = (self.vectors / (self.values + self.damping)) @ self.vectors.mT

    def best(self, rank: int) -> brandla.LowRankEigh:
        """Return the best approximation of this rank, in float64."""
        return brandla.LowRankEigh(self.values[:rank], self.vectors[:, :rank])

    def errors(self, factor: Factor) -> dict[str, float]:
        """Return the relative errors of a tracker's factor.

        Of its damped inverse in the Frobenius norm, of itself in the spectral norm, and tr((I − UUᵀ) M) / tr M, what
        its basis does not hold.
        """
        values, vectors = eigenpairs(factor)
        # M̂ + λI inverted by its eigenvalues, and U taken as orthonormal, as brandla.damped_solve does.
        inverse = (vectors * (1 / (values + self.damping) - 1 / self.damping)) @ vectors.mT
        inverse.diagonal().add_(1 / self.damping)
        difference = (vectors * values) @ vectors.mT - self.matrix
        matvec = lambda x: (difference @ torch.from_numpy(x).view(-1)).numpy()
        operator = LinearOperator(difference.shape, matvec=matvec, dtype="float64")
        start = torch.randn(len(difference), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        (largest,) = eigsh(operator, k=1, which="LM", tol=LANCZOS, v0=start.numpy(), return_eigenvectors=False)
        outside = self.values.sum() - (vectors * (self.matrix @ vectors)).sum()
        error = torch.linalg.matrix_norm(inverse - self.inverse) / torch.linalg.matrix_norm(self.inverse)
        return {
            "inverse": float(error),
            "spectral": abs(float(largest)) / float(self.values[0]),
            "trace": float(outside / self.values.sum()),
        }


def eigenpairs(factor: Factor) -> brandla.LowRankEigh:
    """Return d and U in float64."""
    wide = type(factor)(*(part.double() for part in factor))
    return wide.to_eigh() if isinstance(wide, brandla.LowRankRoot) else wide


def step_errors(gradient: Tensor, exact: dict[str, Decomposed], factors: dict[str, Factor]) -> dict[str, float]:
    """Return how far (Γ̂ + λI)⁻¹ ∂W (Â + λI)⁻¹ is from the step of the true factors, relative, and the degrees between.

    Both are in float64.
    """
    sides, wide = ("gradients", "inputs"), gradient.double()
    right = exact["gradients"].inverse @ wide @ exact["inputs"].inverse
    pairs, dampings = [eigenpairs(factors[side]) for side in sides], [exact[side].damping for side in sides]
    taken = brandla.kron_damped_solve(*pairs, wide, *dampings)
    size, own = torch.linalg.matrix_norm(right), torch.linalg.matrix_norm(taken)
    cosine = ((right * taken).sum() / (size * own)).clamp(-1, 1)
    error, angle = torch.linalg.matrix_norm(taken - right) / size, torch.rad2deg(torch.acos(cosine))
    return {"step error": float(error), "step angle": float(angle)}
