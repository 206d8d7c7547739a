"""Accuracy of the two forms of Brand's update, for ``docs/updates.md``. ``make study-forms`` takes three minutes."""

from collections.abc import Iterator
from itertools import product
from statistics import fmean
from typing import Any

import torch

import brandla
from bench.benches.problems import DECAY, WEIGHT, defect
from bench.frame.study import Piece, Row, Study, Tables, command, sweep
from bench.gpu.cases import relative_error
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


def solves(name: str) -> Iterator[Row]:
    """Yield the errors of damped solves after float32 updates beside float64 ones, and the error of truncation."""
    # With the stream's own seed, the right-hand sides would lie in its leading directions.
    rhs, matrix = gaussian(N, 32, seed=1), torch.zeros(N, N, dtype=torch.float64)
    exact = brandla.LowRankEigh.zeros(N, RANK, dtype=torch.float64)
    root, eigh = brandla.LowRankRoot.zeros(N, RANK), brandla.LowRankEigh.zeros(N, RANK)
    for columns in batches(name, N, COLUMNS, UPDATES, dtype=torch.float32):
        matrix = updated(matrix, columns, DECAY, WEIGHT)
        exact = brandla.eigh_update(exact, columns.double(), **OPTIONS)
        root, eigh = brandla.root_update(root, columns, **OPTIONS), brandla.eigh_update(eigh, columns, **OPTIONS)
    for damping in SHIFTS:
        shift = damping * float(torch.linalg.matrix_norm(matrix, 2))
        truncated = brandla.damped_solve(exact, rhs, shift)
        solved = torch.linalg.solve(matrix + shift * torch.eye(N, dtype=torch.float64), rhs)
        found = {"root": brandla.damped_solve(root, rhs.float(), shift)}
        found |= {"eigh": brandla.damped_solve(eigh, rhs.float(), shift)}
        errors = {form: relative_error([solution], [truncated]) for form, solution in found.items()}
        yield {"λ/d₁": damping, **errors, "truncation": relative_error([truncated], [solved])}


def losses(case: str) -> Iterator[Row]:
    """Yield the trace left out by compress="cholesky" over that by the best choice, on random problems."""
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
        # A single LR step, in the order [F, A].
        factor = torch.linalg.cholesky(core + 1e-14 * core.trace() * torch.eye(len(core), dtype=core.dtype))
        one_step = torch.linalg.qr(core @ factor[:, factor.square().sum(0).topk(rank).indices]).Q
        best = torch.linalg.eigvalsh(core)[:k].sum()
        left_out = [core.trace() - (kept.mT @ core @ kept).trace() for kept in (two_steps, one_step)]
        ratios.append(torch.stack(left_out) / best)
    yield dict(zip(("two steps", "one step"), torch.stack(ratios).mean(0).tolist(), strict=True))


def traces(name: str) -> Iterator[Row]:
    """Yield the mean and worst trace left out by compress="cholesky" over that by "eigh", over a float32 stream."""
    roots = {way: brandla.LowRankRoot.zeros(128, 24) for way in ("eigh", "cholesky")}
    trace, ratios = 0.0, []
    for columns in batches(name, 128, 16, 100, dtype=torch.float32):
        trace = DECAY * trace + WEIGHT * float(columns.double().square().sum())
        roots = {way: brandla.root_update(root, columns, compress=way, **OPTIONS) for way, root in roots.items()}
        lost = {way: trace - float(factor.root.double().square().sum()) for way, factor in roots.items()}
        if lost["eigh"] > 3e-6 * trace:
            ratios.append(lost["cholesky"] / lost["eigh"])
    yield {"steps": len(ratios), "mean": fmean(ratios or [0.0]), "worst": max(ratios, default=0.0)}


def long_products(k: int) -> Iterator[Row]:
    """Yield errors of C and G over their largest entries, at a large n in float32: by one product, and in slabs."""
    left, right = (gaussian(1_000_000, k, seed=seed).float() + 0.5 for seed in (0, 1))
    exact = left.double().mT @ right.double(), right.double().mT @ right.double()
    error = lambda found, true: float((found - true).abs().max() / true.abs().max())
    for way, grams in (("one product", (left.mT @ right, right.mT @ right)), ("slabs", cross_gram(left, right))):
        yield {"way": way, **dict(zip("CG", map(error, grams, exact), strict=True))}


def tails(exponent: float) -> Iterator[Row]:
    """Yield the relative Frobenius error of a tracked root's damped inverse at λ = .03 d₁, for each tail."""
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
    exact = torch.linalg.inv(matrix + shift * identity)
    for tail in (0.0, "smallest", "mean"):
        inverse = brandla.damped_solve(root, identity, shift, tail=tail)
        yield {"tail": str(tail), "error": relative_error([inverse], [exact])}


def carried_gram(name: str, decay: float) -> Iterator[Row]:
    """Yield ‖FᵀF − S‖₂/d₁ after many float32 updates."""
    root = brandla.LowRankRoot.zeros(N, RANK)
    for columns in batches(name, N, COLUMNS, UPDATES, dtype=torch.float32):
        root = brandla.root_update(root, columns, decay=decay, weight=WEIGHT)
    yield {"error": defect(root)}


LOST = ("slow", "medium", "graded", "flat", "clustered", "repeated-8", "switch", "switch-20x-smaller")


def pieces(quick: bool, device: Device, tables: Tables) -> list[Piece]:
    """Return all pieces; in a short run only the first piece of each table."""
    found = [
        *sweep("solves", ("stream",), product(("slow", "medium", "fast")), solves),
        *sweep("carried", ("stream", "ρ"), product(("slow", "fast"), (DECAY, 1.0)), carried_gram),
        *sweep("losses", ("n, r, k, new columns",), product(CASES), losses),
        *sweep("streams", ("stream",), product(LOST), traces),
        *sweep("long", ("k",), product((4, 8, 16, 32)), long_products),
        *sweep("tails", ("exponent of deviations",), product((0.25, 0.5, 1.0)), tails),
    ]
    return list({piece.table: piece for piece in reversed(found)}.values()) if quick else found


STUDY = Study("forms", {"quick": True, "usual": False}, pieces, threads=1)

if __name__ == "__main__":
    command(STUDY, __doc__)()
