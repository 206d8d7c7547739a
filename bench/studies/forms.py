"""Accuracy of the two forms of Brand's update: the figures of ``docs/updates.md``.

``python -m bench.studies.forms`` measures them in three minutes, with one thread.
"""

from collections.abc import Iterator
from itertools import product
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

import brandla
from bench.benches.problems import DECAY, WEIGHT, defect
from bench.frame.study import Piece, Row, Study, Tables, command, each
from bench.gpu.device import Device
from brandla_kernels import cross_gram
from brandla_kernels.root_core import compressed
from tests.oracles import batches, gaussian, orthonormal, power_law, updated

OPTIONS: dict[str, Any] = {"decay": DECAY, "weight": WEIGHT}
N, RANK, COLUMNS, UPDATES = 256, 64, 16, 1000
SHIFTS = (3e-2, 1e-4, 1e-6)
DRAWS = 40
# n, r, k, and the size of the new columns.
CASES = {
    "60, 12, 8, 0.3 times as large": (60, 12, 8, 0.3),
    "60, 12, 8, as the old ones": (60, 12, 8, 1.0),
    "60, 12, 8, 100 times as large": (60, 12, 8, 100.0),
    "512, 96, 64, as the old ones": (512, 96, 64, 1.0),
}


def relative(found: Tensor, wanted: Tensor) -> float:
    """Return ‖X̂ − X‖_F / ‖X‖_F."""
    return float(torch.linalg.matrix_norm(found.double() - wanted) / torch.linalg.matrix_norm(wanted))


def solves(name: str) -> Iterator[Row]:
    """Yield errors of damped solves after float32 updates beside float64's, and what truncation itself costs."""
    # With the seed of the stream, right-hand sides would lie in its leading directions.
    rhs, matrix = gaussian(N, 32, seed=1), torch.zeros(N, N, dtype=torch.float64)
    exact = brandla.LowRankEigh.zeros(N, RANK, dtype=torch.float64)
    root, eigh = brandla.LowRankRoot.zeros(N, RANK), brandla.LowRankEigh.zeros(N, RANK)
    for given in batches(name, N, COLUMNS, UPDATES, dtype=torch.float32):
        matrix = updated(matrix, given, DECAY, WEIGHT)
        exact = brandla.eigh_update(exact, given.double(), **OPTIONS)
        root, eigh = brandla.root_update(root, given, **OPTIONS), brandla.eigh_update(eigh, given, **OPTIONS)
    for damping in SHIFTS:
        shift = damping * float(torch.linalg.matrix_norm(matrix, 2))
        wanted = brandla.damped_solve(exact, rhs, shift)
        errors = [relative(brandla.damped_solve(each, rhs.float(), shift), wanted) for each in (root, eigh)]
        truncation = relative(wanted, torch.linalg.solve(matrix + shift * torch.eye(N, dtype=torch.float64), rhs))
        yield {"λ/d₁": damping, "root": errors[0], "eigh": errors[1], "truncation": truncation}


def losses(case: str) -> Iterator[Row]:
    """Yield what compress="cholesky" leaves out of the trace over what the best choice does, on random problems."""
    n, rank, k, size = CASES[case]
    lengths = power_law(0.25)(n) if n > 100 else torch.logspace(0, -2, n, dtype=torch.float64)
    ratios = []
    for draw in range(DRAWS):
        mixing = orthonormal(n, n, draw) * lengths
        old = mixing @ gaussian(n, 2 * rank, seed=3 * draw + 1) / (2 * rank) ** 0.5
        new = size * mixing @ gaussian(n, k, seed=3 * draw + 2) / k**0.5
        root = torch.linalg.svd(old, full_matrices=False)
        panel = torch.cat([root.U[:, :rank] * root.S[:rank], new], -1)
        core = panel.mT @ panel
        two_steps = compressed(core, rank, torch.float64, 0.0, measure=False).rotation
        # One LR step in the order [F, A].
        factor = torch.linalg.cholesky(core + 1e-14 * core.trace() * torch.eye(len(core), dtype=core.dtype))
        one_step = torch.linalg.qr(core @ factor[:, factor.square().sum(0).topk(rank).indices]).Q
        best = torch.linalg.eigvalsh(core)[:k].sum()
        left_out = [core.trace() - (kept.mT @ core @ kept).trace() for kept in (two_steps, one_step)]
        ratios.append(torch.stack(left_out) / best)
    yield dict(zip(("two steps", "one step"), torch.stack(ratios).mean(0).tolist(), strict=True))


def traces(name: str) -> Iterator[Row]:
    """Yield the trace left out by compress="cholesky" over that by "eigh", over a float32 stream: mean and worst."""
    factors = {way: brandla.LowRankRoot.zeros(128, 24) for way in ("eigh", "cholesky")}
    trace, ratios = 0.0, []
    for given in batches(name, 128, 16, 100, dtype=torch.float32):
        trace = DECAY * trace + WEIGHT * float(given.double().square().sum())
        factors = {way: brandla.root_update(each, given, compress=way, **OPTIONS) for way, each in factors.items()}
        lost = {way: trace - float(each.root.double().square().sum()) for way, each in factors.items()}
        if lost["eigh"] > 3e-6 * trace:
            ratios.append(lost["cholesky"] / lost["eigh"])
    yield {"steps": len(ratios), "mean": fmean(ratios or [0.0]), "worst": max(ratios, default=0.0)}


def long(k: int) -> Iterator[Row]:
    """Yield errors of C and G at a large n in float32, relative to the largest entry: by one product, and in slabs."""
    left, right = (gaussian(1_000_000, k, seed=seed).float() + 0.5 for seed in (0, 1))
    exact = left.double().mT @ right.double(), right.double().mT @ right.double()
    for way, found in (("one product", (left.mT @ right, right.mT @ right)), ("slabs", cross_gram(left, right))):
        errors = (float((own - true).abs().max() / true.abs().max()) for own, true in zip(found, exact, strict=True))
        yield {"way": way, **dict(zip("CG", errors, strict=True))}


def tails(exponent: float) -> Iterator[Row]:
    """Yield the error of a damped inverse (Frobenius, relative) of a tracked root at λ = .03 d₁, by tail."""
    n, k = 512, 64
    root = brandla.track(brandla.LowRankRoot.zeros(n, 64, dtype=torch.float64))
    matrix = torch.zeros(n, n, dtype=torch.float64)
    mixing = orthonormal(n, n, 0) * power_law(exponent)(n)
    for step in range(100):
        columns = mixing @ gaussian(n, k, seed=step) / k**0.5
        root = brandla.root_update(root, columns, **OPTIONS)
        matrix = updated(matrix, columns, DECAY, WEIGHT)
    identity = torch.eye(n, dtype=torch.float64)
    shift = 0.03 * float(torch.linalg.matrix_norm(matrix, 2))
    truth = torch.linalg.inv(matrix + shift * identity)
    for tail in (0.0, "smallest", "mean"):
        yield {"tail": str(tail), "error": relative(brandla.damped_solve(root, identity, shift, tail=tail), truth)}


def carried(name: str, decay: float) -> Iterator[Row]:
    """Yield ‖FᵀF − S‖₂/d₁ after many float32 updates."""
    root = brandla.LowRankRoot.zeros(N, RANK)
    for given in batches(name, N, COLUMNS, UPDATES, dtype=torch.float32):
        root = brandla.root_update(root, given, decay=decay, weight=WEIGHT)
    yield {"error": defect(root)}


LOST = ("slow", "medium", "graded", "flat", "clustered", "repeated-8", "switch", "switch-20x-smaller")


def pieces(quick: bool, device: Device, tables: Tables) -> list[Piece]:
    """Return all pieces; of each table the first one alone in a short run."""
    found = [
        *each("solves", ("stream",), product(("slow", "medium", "fast")), solves),
        *each("carried", ("stream", "ρ"), product(("slow", "fast"), (DECAY, 1.0)), carried),
        *each("losses", ("n, r, k, new columns",), product(CASES), losses),
        *each("streams", ("stream",), product(LOST), traces),
        *each("long", ("k",), product((4, 8, 16, 32)), long),
        *each("tails", ("exponent of deviations",), product((0.25, 0.5, 1.0)), tails),
    ]
    return list({piece.table: piece for piece in reversed(found)}.values()) if quick else found


STUDY = Study("forms", {"quick": True, "usual": False}, pieces, threads=1)

if __name__ == "__main__":
    command(STUDY, __doc__)()
