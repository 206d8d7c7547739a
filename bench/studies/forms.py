"""Accuracy of the two forms of Brand's update: the tables of ``docs/updates.md``.

``PYTHONPATH=tests python -m bench.forms`` prints them in three minutes, with one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

import brandla
from brandla.root import Compress
from brandla_kernels import cross_gram
from brandla_kernels.root_core import compressed
from oracles import STREAMS, gaussian, orthonormal, power_law

DECAY = 0.95
OPTIONS: dict[str, Any] = {"decay": DECAY, "weight": 1 - DECAY}
N, RANK, COLUMNS, UPDATES = 256, 64, 16, 1000
SHIFTS = (3e-2, 1e-4, 1e-6)
WORDS = {"slow": "i^−½", "medium": "i^−3/2", "fast": "i^−3"}
DRAWS = 40
EPSILON = torch.finfo(torch.float32).eps


def solves() -> Iterator[list[str]]:
    """Yield the error of a damped solve after float32 updates: root, eigh, and what truncation itself costs."""
    for name, words in WORDS.items():
        root = brandla.LowRankRoot.zeros(N, RANK)
        eigh = brandla.LowRankEigh.zeros(N, RANK)
        exact = torch.zeros(N, RANK, dtype=torch.float64)
        matrix = torch.zeros(N, N, dtype=torch.float64)
        for columns in islice(STREAMS[name](N, COLUMNS, 0), UPDATES):
            given = columns.float()
            root = brandla.root_update(root, given, **OPTIONS)
            eigh = brandla.eigh_update(eigh, given, **OPTIONS)
            exact = _truncated(exact, given.double())
            matrix = DECAY * matrix + (1 - DECAY) * given.double() @ given.double().mT
        largest = float(torch.linalg.matrix_norm(exact, 2)) ** 2
        rhs = gaussian(N, 32, seed=1)
        for shift in SHIFTS:
            identity = shift * largest * torch.eye(N, dtype=torch.float64)
            truth = torch.linalg.solve(exact @ exact.mT + identity, rhs)
            whole = torch.linalg.solve(matrix + identity, rhs)
            found = (brandla.damped_solve(factor, rhs.float(), shift * largest) for factor in (root, eigh))
            errors = [_distance(each.double(), truth) for each in found]
            yield [words, f"{shift:.0e}", *(f"{error:.1e}" for error in (*errors, _distance(truth, whole)))]


def losses() -> Iterator[list[str]]:
    """Yield what compress="cholesky" leaves out of the trace over what the best choice does, on random problems."""
    cases = (
        ("small", 60, 12, 8, 0.3),
        ("alike", 60, 12, 8, 1.0),
        ("large", 60, 12, 8, 100.0),
        ("alike", 512, 96, 64, 1.0),
    )
    for words, n, rank, k, size in cases:
        lengths = power_law(0.25)(n) if n > 100 else torch.logspace(0, -2, n, dtype=torch.float64)
        ratios = []
        for draw in range(DRAWS):
            mixing = orthonormal(n, n, draw) * lengths
            old = mixing @ gaussian(n, 2 * rank, seed=3 * draw + 1) / (2 * rank) ** 0.5
            root = torch.linalg.svd(old, full_matrices=False)
            panel = torch.cat(
                [root.U[:, :rank] * root.S[:rank], size * mixing @ gaussian(n, k, seed=3 * draw + 2) / k**0.5], -1
            )
            core = panel.mT @ panel
            best = float(torch.linalg.eigvalsh(core)[:k].sum())
            ratios.append([_left_out(core, rank) / best, _left_out_by_one_step(core, rank) / best])
        means = torch.tensor(ratios).mean(0).tolist()
        yield [f"{n}, {rank}, {k}", words, *(f"{mean:.3f}" for mean in means)]


def streams() -> Iterator[list[str]]:
    """Yield the trace left out by compress="cholesky" over that by "eigh", over a float32 stream: mean and worst."""
    for name in ("slow", "medium", "graded", "flat", "clustered", "repeated-8", "switch", "switch-20x-smaller"):
        ways: tuple[Compress, Compress] = ("eigh", "cholesky")
        factors = {way: brandla.LowRankRoot.zeros(128, 24) for way in ways}
        trace, ratios = 0.0, []
        for columns in islice(STREAMS[name](128, 16, 0), 100):
            given = columns.float()
            trace = DECAY * trace + (1 - DECAY) * float(given.double().square().sum())
            factors = {way: brandla.root_update(each, given, compress=way, **OPTIONS) for way, each in factors.items()}
            lost = {way: trace - float(each.root.double().square().sum()) for way, each in factors.items()}
            if lost["eigh"] > 3e-6 * trace:
                ratios.append(lost["cholesky"] / lost["eigh"])
        yield [
            name,
            str(len(ratios)),
            *(f"{value:.3f}" for value in (sum(ratios) / max(len(ratios), 1), max(ratios, default=0))),
        ]


def bases() -> Iterator[list[str]]:
    """Yield ‖UᵀU − I‖₂ in ε over float32 updates of U, polished where the probes ask for it: median and worst."""
    for name in ("slow", "medium", "fast", "flat", "graded", "rank-16", "repeated-8", "switch"):
        eigh, found = brandla.LowRankEigh.zeros(300, 48), []
        for columns in islice(STREAMS[name](300, 24, 0), 150):
            eigh = brandla.eigh_update(eigh, columns.float(), **OPTIONS)
            found.append(_unorthonormal(eigh) / EPSILON)
        yield [name, f"{sorted(found)[75]:.1f}", f"{max(found):.1f}"]


def long() -> Iterator[list[str]]:
    """Yield errors of C and G at a large n in float32, relative to the largest entry: by one product, and in slabs."""
    n = 1_000_000
    for k in (4, 8, 16, 32):
        left, right = (gaussian(n, k, seed=seed).float() + 0.5 for seed in (0, 1))
        cross, own = left.double().mT @ right.double(), right.double().mT @ right.double()
        pairs = ((left.mT @ right, right.mT @ right), cross_gram(left, right))
        yield [
            str(k),
            *(
                f"{_largest(c - cross) / _largest(cross):.0e}, {_largest(g - own) / _largest(own):.0e}"
                for c, g in pairs
            ),
        ]


def long_basis() -> Iterator[list[str]]:
    """Yield ‖UᵀU − I‖₂ in ε at a large n after ten updates."""
    for n in (65_536, 1_000_000):
        lead, eigh = gaussian(n, 16, seed=0).float(), brandla.LowRankEigh.zeros(n, 16)
        for step in range(10):
            columns = lead @ gaussian(16, 16, seed=step).float() + 0.05 * gaussian(n, 16, seed=100 + step).float()
            eigh = brandla.eigh_update(eigh, columns, **OPTIONS)
        yield [f"{n:,}", f"{_unorthonormal(eigh) / EPSILON:.1f}"]


def tails() -> Iterator[list[str]]:
    """Yield the error of a damped inverse (Frobenius, relative) of a tracked root at λ = .03 d₁, by tail."""
    n, k = 512, 64
    for exponent in (0.25, 0.5, 1.0):
        root = brandla.track(brandla.LowRankRoot.zeros(n, 64, dtype=torch.float64))
        matrix = torch.zeros(n, n, dtype=torch.float64)
        mixing = orthonormal(n, n, 0) * power_law(exponent)(n)
        for step in range(100):
            columns = mixing @ gaussian(n, k, seed=step) / k**0.5
            root = brandla.root_update(root, columns, **OPTIONS)
            matrix = DECAY * matrix + (1 - DECAY) * columns @ columns.mT
        identity = torch.eye(n, dtype=torch.float64)
        shift = 0.03 * float(torch.linalg.matrix_norm(matrix, 2))
        truth = torch.linalg.inv(matrix + shift * identity)
        found = (brandla.damped_solve(root, identity, shift, tail=tail) for tail in (0.0, "smallest", "mean"))
        yield [f"i^−{exponent}", *(f"{_distance(each, truth):.3f}" for each in found)]


def carried() -> Iterator[list[str]]:
    """Yield ‖FᵀF − S‖₂/d₁ after many float32 updates at ρ = .95 and at ρ = 1."""
    for name in ("slow", "fast"):
        found = []
        for decay in (DECAY, 1.0):
            root = brandla.LowRankRoot.zeros(N, RANK)
            for columns in islice(STREAMS[name](N, COLUMNS, 0), UPDATES):
                root = brandla.root_update(root, columns.float(), decay=decay, weight=1 - DECAY)
            inner = root.root.double().mT @ root.root.double()
            error = torch.linalg.matrix_norm(inner - root.gram, 2) / torch.linalg.matrix_norm(inner, 2)
            found.append(f"{float(error):.0e}")
        yield [WORDS[name], *found]


def _truncated(root: Tensor, columns: Tensor) -> Tensor:
    """Return Brand's truncated update of F Fᵀ by a singular value decomposition of [√ρ F, √w A]."""
    panel = torch.cat([DECAY**0.5 * root, (1 - DECAY) ** 0.5 * columns], dim=-1)
    vectors, values, _ = torch.linalg.svd(panel, full_matrices=False)
    leading: Tensor = vectors[:, :RANK] * values[:RANK]
    return leading


def _largest(matrix: Tensor) -> float:
    return float(matrix.abs().max())


def _distance(found: Tensor, truth: Tensor) -> float:
    return float(torch.linalg.matrix_norm(found - truth) / torch.linalg.matrix_norm(truth))


def _unorthonormal(eigh: brandla.LowRankEigh) -> float:
    """Return ‖UᵀU − I‖₂, I without the zero columns of U."""
    vectors = eigh.eigenvectors.double()
    inner = vectors.mT @ vectors
    return float(torch.linalg.matrix_norm(inner - torch.diag((inner.diagonal() > 0).double()), 2))


def _left_out(core: Tensor, rank: int) -> float:
    rotation = compressed(core, rank, torch.float64, 0.0, measure=False).rotation
    return float(core.trace() - (rotation.mT @ core @ rotation).trace())


def _left_out_by_one_step(core: Tensor, rank: int) -> float:
    """Return the same for one LR step in the order [F, A]."""
    factor = torch.linalg.cholesky(core + 1e-14 * core.trace() * torch.eye(core.shape[-1], dtype=core.dtype)).mT
    chosen = factor.square().sum(-1).topk(rank).indices
    rotation = torch.linalg.qr(core @ factor.mT[:, chosen]).Q
    return float(core.trace() - (rotation.mT @ core @ rotation).trace())


TABLES: dict[str, tuple[str, Callable[[], Iterator[list[str]]]]] = {
    "Damped solve": ("stream | λ/d₁ | root | eigh | truncation", solves),
    "Gram matrix carried": ("stream | ρ = .95 | ρ = 1", carried),
    "One update": ("n, r, k | columns | two steps | one step", losses),
    "Streams": ("stream | steps | mean | worst", streams),
    "Basis": ("stream | median | worst", bases),
    "Large n": ("k | C, G by one product | C, G in slabs", long),
    "Basis at large n": ("n | of U", long_basis),
    "Tail": ("spectrum of deviations | 0 | smallest | mean", tails),
}


def main() -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    for title, (heads, rows) in TABLES.items():
        print(f"\n{title}: {heads}")
        for row in rows():
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
