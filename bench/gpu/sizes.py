"""The sizes of every section: those of a measurement, and those that only show that the code runs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, islice


@dataclass(frozen=True)
class Sizes:
    """What a run measures. Tuples are in order of importance: what comes late is left out when time runs out."""

    copy: int  # bytes
    product: int  # order of the square products that give the ceilings
    rows: tuple[int, ...]  # n of the ops
    ranks: tuple[int, ...]  # r = k of the ops
    other_dtypes: tuple[int, int]  # n, r of the ops in other dtypes and under torch.compile
    compiled: int  # ops compared with torch.compile
    most_square: int  # n above which an n × n matrix is left out
    width: int  # most columns of the W of kron_damped_apply
    cores: int  # matrices in a batch of cholesky_inverse_core and root_core
    judged_rows: int  # n and r from which on an op is held to its ceiling
    judged_rank: int
    update: tuple[int, int, int]  # n, r, k
    solve: tuple[int, int, int]  # n, r, right-hand sides
    kron: tuple[int, int]  # order of W, r
    randomized: tuple[int, int]  # n, rank
    gram: tuple[int, int]  # n, k
    steps: int  # updates from zero to the steady state of a stream
    graph: tuple[int, int, int]
    group: tuple[int, ...]  # n of each factor
    group_rank: int
    group_columns: int
    tuned: tuple[tuple[int, int], ...]  # n, r
    seconds: float  # time spent on one timing


def _mixed(sizes: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Return ``count`` sizes in turn; every third is one larger, as a layer with a bias has it."""
    return tuple(n + (i % 3 == 0) for i, n in enumerate(islice(cycle(sizes), count)))


FULL = Sizes(
    copy=2**31,
    product=8192,
    rows=(16384, 65536, 4096),
    ranks=(256, 128, 64),
    other_dtypes=(16384, 256),
    compiled=100,
    most_square=16384,
    width=4096,
    cores=32,
    judged_rows=16384,
    judged_rank=256,
    update=(4096, 256, 256),
    solve=(16384, 256, 256),
    kron=(4096, 256),
    randomized=(8192, 256),
    gram=(8192, 8192),
    steps=30,
    graph=(4096, 256, 256),
    group=_mixed((512, 1024, 2048, 4096, 8191), 64),
    group_rank=128,
    group_columns=64,
    tuned=((16384, 256), (16384, 64), (4096, 128), (65536, 256)),
    seconds=0.15,
)

TOY = Sizes(
    copy=2**16,
    product=32,
    rows=(48, 24),
    ranks=(8,),
    other_dtypes=(48, 8),
    compiled=2,
    most_square=48,
    width=16,
    cores=3,
    judged_rows=48,
    judged_rank=8,
    update=(64, 8, 8),
    solve=(64, 8, 8),
    kron=(48, 8),
    randomized=(64, 8),
    gram=(48, 16),
    steps=10,
    graph=(64, 8, 8),
    group=_mixed((24, 48), 4),
    group_rank=6,
    group_columns=4,
    tuned=((48, 8),),
    seconds=0.0,
)
