"""What every rank does in the tests of row-sharded factors: the same call sharded and whole, and how they compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import brandla
import builders
import oracles

UPDATES = {str(update): update for update in builders.SYMMETRIC_UPDATES}
STREAMS = ("slow", "fast", "repeated-8", "zeros-between")
# (n, r, k). Shards of one size; uneven ones; an empty one among four; r + k >= n, also with empty shards among four and
# among two; fewer local rows than columns of U.
SIZES = ((64, 8, 4), (37, 6, 5), (5, 2, 1), (8, 5, 4), (3, 2, 2), (1, 1, 1), (33, 12, 3))


class Messages(TorchDispatchMode):
    """Record every collective: its name, and how many numbers the largest tensor in it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented
        if "c10d" in func.namespace:
            leaves = torch.utils._pytree.tree_leaves(args)
            sizes = [leaf.numel() for leaf in leaves if isinstance(leaf, Tensor)]
            self.seen.append((func.overloadpacket.__name__, max(sizes, default=0)))
        return func(*args, **(kwargs or {}))


def mesh_of_all() -> DeviceMesh:
    return init_device_mesh("cpu", (distributed.get_world_size(),))


def on_rows(mesh: DeviceMesh, matrix: Tensor, dim: int = -2) -> Tensor:
    # Every rank has the whole, so none is sent. A shard may lie in its memory.
    return distribute_tensor(matrix.detach().clone(), mesh, [Shard(dim % matrix.ndim)], src_data_rank=None)


def on_all(mesh: DeviceMesh, small: Tensor) -> Tensor:
    return distribute_tensor(small.detach().clone(), mesh, [Replicate()], src_data_rank=None)


def sharded(mesh: DeviceMesh, factor: Any, *, replicate: bool = False) -> Any:
    """Return a factor with its tall matrix sharded, and small ones as plain tensors or as replicated DTensors."""
    small = (lambda part: on_all(mesh, part)) if replicate else (lambda part: part.clone())
    if isinstance(factor, brandla.LowRankSVD):
        return brandla.LowRankSVD(on_rows(mesh, factor.U), small(factor.S), small(factor.Vh))
    if isinstance(factor, brandla.LowRankRoot):
        return brandla.LowRankRoot(on_rows(mesh, factor.root), small(factor.gram))
    return brandla.LowRankEigh(small(factor.eigenvalues), on_rows(mesh, factor.eigenvectors))


def small_of(factor: Any) -> Tensor:
    """Return d or S, whole."""
    return whole(factor.gram if isinstance(factor, brandla.LowRankRoot) else factor.eigenvalues)


def whole(tree: Any) -> Any:
    """Return the same with every DTensor gathered."""
    return torch.utils._pytree.tree_map(lambda part: part.full_tensor() if isinstance(part, DTensor) else part, tree)


def pointers_of(factor: Any) -> list[int]:
    return [(part.to_local() if isinstance(part, DTensor) else part).data_ptr() for part in factor]


def agree(actual: Tensor, expected: Tensor, dtype: torch.dtype, label: object, scale: float | None = None) -> None:
    """Compare by what rounding explains of n·ε·‖·‖, `oracles.THRESHOLD` times."""
    actual = whole(actual)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return
    matrices = (1, -1, 1) if expected.ndim < 2 else (-1, *expected.shape[-2:])
    for one, other in zip(actual.reshape(matrices), expected.reshape(matrices), strict=True):
        ratio = oracles.difference_ratio(one, other, dtype, scale)
        assert ratio < oracles.THRESHOLD, (label, ratio)


def same_kind(result: Any, argument: Any, label: object) -> None:
    """Check that what comes out is a DTensor with the placements of what went in, or no DTensor."""
    for one, other in zip(result, argument, strict=True):
        assert isinstance(one, DTensor) == isinstance(other, DTensor), label
        if isinstance(one, DTensor):
            assert one.placements == other.placements, label
            assert one.device_mesh == other.device_mesh, label


def batches(stream: str, n: int, k: int, dtype: torch.dtype) -> list[Tensor]:
    # Streams need at least 16 rows; a smaller one has the first of them.
    return [columns[:n].contiguous() for columns in oracles.batches(stream, max(n, 32), k, 5, dtype=dtype)]


def assert_factor(many: Any, one: Any, dtype: torch.dtype, label: object) -> None:
    """Compare a sharded factor, tracked or not, with a whole one: the matrix, and what its form promises."""
    if isinstance(one, brandla.Tracked):
        scale = one.lowrank.n * max(float(one.trace), float(one.error_bound))
        agree(many.error_bound, one.error_bound, dtype, label, scale=scale)
        agree(many.trace, one.trace, dtype, label, scale=scale)
        many, one = many.lowrank, one.lowrank
    agree(many.dense(), one.dense(), dtype, label)
    tall = whole(builders.tall_of(many))
    if isinstance(one, brandla.LowRankEigh):
        assert oracles.orthonormality_ratio(tall, whole(many.eigenvalues)) < oracles.THRESHOLD, label
    else:
        agree(many.gram, (tall.double().mT @ tall.double()).to(dtype), dtype, label)


def update_streams(name: str, dtype: torch.dtype) -> list[Tensor]:
    """Update sharded and whole factors side by side, on every stream and size; return all small parts."""
    mesh, update, small_parts = mesh_of_all(), UPDATES[name], []
    for index in range(2 * len(SIZES)):
        # Each size with two streams, each stream with three or four sizes; and small parts of both kinds.
        (n, r, k), stream = SIZES[index // 2], STREAMS[index % 4]
        replicate = index // 4 % 2 == 1
        label = (name, dtype, n, r, k, stream)
        one = brandla.track(update.factor.zeros(n, r, dtype=dtype))
        many = brandla.track(sharded(mesh, one.lowrank, replicate=replicate))
        data = batches(stream, n, k, dtype)
        for step in range(len(data) + 1):
            inside_the_span = builders.tall_of(one.lowrank) @ torch.ones(r, k, dtype=dtype) / k
            columns = data[step] if step < len(data) else inside_the_span
            before = many
            one = update(one, columns, decay=0.9, weight=0.1)
            many = update(many, on_rows(mesh, columns), decay=0.9, weight=0.1)
            same_kind(many.lowrank, before.lowrank, label)
            agree(many.lowrank.dense(), one.lowrank.dense(), dtype, label)
        assert_factor(many, one, dtype, label)
        small_parts += [small_of(many.lowrank), *map(whole, many[1:])]
        if isinstance(one.lowrank, brandla.LowRankRoot):
            eigh = many.lowrank.to_eigh()
            same_kind(eigh[::-1], many.lowrank, label)
            assert_factor(eigh, one.lowrank.to_eigh(), dtype, label)
            small_parts.append(small_of(eigh))
    return small_parts


def other_forms_of_updates(dtype: torch.dtype) -> list[Tensor]:
    """In place, grouped, of a batch, with a rank, with tensors for numbers, with nothing to add."""
    mesh, n, r, k = mesh_of_all(), 37, 6, 5
    small_parts = []
    for name, update in UPDATES.items():
        factor, columns = update.make(n, r, dtype=dtype), builders.make_columns(n, k, dtype=dtype)
        expected = update(factor, columns, decay=0.9, weight=0.1)
        spread = on_rows(mesh, columns)

        for replicate in (False, True):
            target = sharded(mesh, factor, replicate=replicate)
            pointers = pointers_of(target)
            result = update.in_place(brandla.track(target), spread, decay=0.9, weight=0.1)
            assert result.lowrank is target
            assert pointers_of(target) == pointers
            assert_factor(target, expected, dtype, (name, "in place"))
            small_parts.append(small_of(target))

        half = update(factor, columns.bfloat16().to(dtype), decay=0.9, weight=0.1)
        if dtype == torch.float32:
            result = update(sharded(mesh, factor), on_rows(mesh, columns.bfloat16()), decay=0.9, weight=0.1)
            assert_factor(result, half, dtype, (name, "half-precision columns"))

        other = update.make(20, r, dtype=dtype, seed=9)
        factors = [sharded(mesh, factor), other, sharded(mesh, other, replicate=True)]
        second = builders.make_columns(20, k, dtype=dtype)
        results = update.grouped(factors, [spread, second, on_rows(mesh, second)], decay=0.9, weight=[0.1, 1.0, 1.0])
        plain = update(other, second, decay=0.9)
        for result, reference in zip(results, [expected, plain, plain], strict=True):
            assert_factor(result, reference, dtype, (name, "grouped"))

        for size in (1, k + r):
            rank = brandla.Rank(size, tol=1e-3)
            result = update(sharded(mesh, factor), spread, rank=rank)
            assert_factor(result, update(factor, columns, rank=rank), dtype, (name, "rank", size))
        result = update(sharded(mesh, factor), on_rows(mesh, columns[:, :0]), decay=0.5)
        agree(result.dense(), 0.5 * factor.dense(), dtype, (name, "no columns"))

        poisoned = columns.clone()
        poisoned[n - 1, 0] = torch.nan
        result = update(sharded(mesh, factor), on_rows(mesh, poisoned))
        assert builders.values_of(whole(result)).isnan().all()
        assert builders.tall_of(whole(result)).isnan().all()

        batch = update.make(n, r, dtype=dtype, batch_shape=(2,))
        data = builders.make_columns(n, k, dtype=dtype, batch_shape=(2,))
        decay = torch.tensor([0.5, 0.9], dtype=dtype)
        expected = update(batch, data, decay=decay)
        for numbers in (decay, on_all(mesh, decay)):
            result = update(sharded(mesh, batch), on_rows(mesh, data), decay=numbers)
            agree(result.dense(), expected.dense(), dtype, (name, "batch"))
    factor, data = builders.make_eigh(n, r, dtype=dtype), builders.make_columns(n, k, dtype=dtype, scale=0.1)
    many = sharded(mesh, factor, replicate=True)
    result = brandla.eigh_downdate(many, on_rows(mesh, data))
    same_kind(result, many, "eigh_downdate")
    agree(result.dense(), brandla.eigh_downdate(factor, data).dense(), dtype, "eigh_downdate")
    options = {"decay": 0.9, "shrink": True}
    root, columns = builders.make_root(n, r, dtype=dtype), builders.make_columns(n, k, dtype=dtype)
    result = brandla.root_update(sharded(mesh, root), on_rows(mesh, columns), **options)
    assert_factor(result, brandla.root_update(root, columns, **options), dtype, "shrink")
    return small_parts


def grouped_updates(dtype: torch.dtype) -> list[Tensor]:
    """Classes of factors that are updated together: their small matrices travel in the messages of one factor."""
    mesh, r, k = mesh_of_all(), 6, 5
    small_parts = []
    for name, update in UPDATES.items():
        # Of the last, r + k is above n.
        sizes = (37, 20, 64, 9)
        factors = [brandla.track(update.make(n, r, dtype=dtype, seed=n)) for n in sizes]
        columns = [builders.make_columns(n, k, dtype=dtype, seed=n) for n in sizes]
        expected = [update(*pair, decay=0.9) for pair in zip(factors, columns, strict=True)]
        for replicate in (False, True):
            own = [brandla.track(sharded(mesh, factor.lowrank, replicate=replicate)) for factor in factors]
            spread = [on_rows(mesh, part) for part in columns]
            with Messages() as recorder:
                results = update.grouped(own, spread, decay=0.9)
            # C and G; and what the polish of an orthonormal form needs.
            assert len(recorder.seen) == 1 + update.is_orthonormal, recorder.seen
            for result, before, reference in zip(results, own, expected, strict=True):
                same_kind(result.lowrank, before.lowrank, name)
                assert_factor(result, reference, dtype, name)
                small_parts += [small_of(result.lowrank)]
    return small_parts


def svd_streams(dtype: torch.dtype) -> list[Tensor]:
    """Append to and update sharded decompositions and whole ones side by side."""
    mesh, small_parts = mesh_of_all(), []
    for n, r, k in SIZES:
        for centred in (False, True):
            one: Any = brandla.LowRankSVD.zeros(n, 0, r, dtype=dtype)
            many: Any = brandla.LowRankSVD.zeros(n, 0, r, dtype=dtype, mesh=mesh)
            if centred:
                one, many = brandla.centre(one), brandla.centre(many)
            for columns in batches("slow", n, k, dtype):
                one = brandla.svd_append(one, columns, decay=0.9)
                many = brandla.svd_append(many, on_rows(mesh, columns), decay=0.9)
            label = ("svd_append", dtype, n, r, k, centred)
            if centred:
                agree(many.mean, one.mean, dtype, label)
                agree(many.weight, one.weight, dtype, label)
                small_parts.append(many.weight)
                one, many = one.svd, many.svd
            assert isinstance(many.U, DTensor), label
            gram = (one.U * one.S.square()) @ one.U.mT
            spread = whole(many.U)
            agree((spread * many.S.square()) @ spread.mT, gram, dtype, label)
            agree(many.dense(), one.dense(), dtype, label)
            small_parts += [many.S, many.Vh]
    small_parts += nearly_dependent_columns(mesh, dtype)
    batch = builders.make_svd(37, 21, 6, dtype=dtype, batch_shape=(2,))
    columns = builders.make_columns(37, 4, dtype=dtype, batch_shape=(2,))
    result = brandla.svd_append(sharded(mesh, batch), on_rows(mesh, columns), decay=0.9)
    agree(result.dense(), brandla.svd_append(batch, columns, decay=0.9).dense(), dtype, "batch")
    svd = builders.make_svd(37, 21, 6, dtype=dtype)
    left, right = builders.make_columns(37, 4, dtype=dtype), builders.make_columns(21, 4, dtype=dtype, seed=3)
    expected = brandla.svd_update(svd, left, right, decay=0.9).dense()
    on_left = brandla.LowRankSVD(on_rows(mesh, svd.U), svd.S, svd.Vh)
    on_right = brandla.LowRankSVD(svd.U, svd.S, on_rows(mesh, svd.Vh, -1))
    on_both = brandla.LowRankSVD(on_left.U, on_all(mesh, svd.S), on_right.Vh)
    cases = [(on_left, on_rows(mesh, left), right), (on_right, left, on_rows(mesh, right))]
    for factor, *sides in [*cases, (on_both, on_rows(mesh, left), on_rows(mesh, right))]:
        result = brandla.svd_update(factor, *sides, decay=0.9)
        same_kind(result, factor, "svd_update")
        agree(result.dense(), expected, dtype, "svd_update")
    return small_parts


def nearly_dependent_columns(mesh: DeviceMesh, dtype: torch.dtype) -> list[Tensor]:
    """Append columns whose last directions are weak where a process holds fewer rows than the panel has columns."""
    small_parts = []
    for n, r, k, weak in ((12, 4, 4, 8.0), (12, 6, 10, 64.0), (7, 4, 4, 4e3), (3, 0, 8, 16.0), (64, 6, 10, 64.0)):
        svd = builders.make_svd(n, 20, r, "slow", dtype=dtype)
        few = oracles.gaussian(n, 2, seed=1) @ oracles.gaussian(2, k, seed=2)
        columns = (few + weak * torch.finfo(dtype).eps * oracles.gaussian(n, k, seed=3)).to(dtype)
        result = brandla.svd_append(sharded(mesh, svd), on_rows(mesh, columns), rank=min(n, r + k))
        label = ("dependent columns", dtype, n, r, k)
        assert oracles.orthonormality_ratio(whole(result.U), result.S) < oracles.THRESHOLD, label
        assert oracles.orthonormality_ratio(result.Vh.mT, result.S) < oracles.THRESHOLD, label
        agree(result.dense(), torch.cat([svd.dense(), columns], dim=1), dtype, label)
        small_parts.append(result.S)
    return small_parts


def damped_applications(dtype: torch.dtype) -> list[Tensor]:
    """Every damped function, on blocks and vectors, with every tail, for both kinds of factor."""
    mesh = mesh_of_all()
    for n, r, k in SIZES:
        for make in (builders.make_eigh, builders.make_root):
            factor, rhs = make(n, r, dtype=dtype), builders.make_columns(n, k, dtype=dtype)
            for tail in (0.0, 0.01, torch.tensor(0.01, dtype=dtype), "smallest", "mean"):
                for data, dim in ((rhs, -2), (rhs[:, 0], -1)):
                    label = (dtype, n, r, k, make.__name__, tail, dim)
                    spread = on_rows(mesh, data, dim)
                    many = sharded(mesh, factor)
                    if tail == "mean":
                        trace = brandla.track(factor).trace + 0.5
                        one, many = (brandla.Tracked(each, 0 * trace, trace) for each in (factor, many))
                    else:
                        one = factor
                    solved = brandla.damped_solve(many, spread, 0.1, tail=tail)
                    same_kind([solved], [spread], label)
                    agree(solved, brandla.damped_solve(one, data, 0.1, tail=tail), dtype, label)
                    damping = torch.tensor(0.1, dtype=dtype)
                    powered = brandla.damped_power(many, spread, damping, -0.5, tail=tail)
                    agree(powered, brandla.damped_power(one, data, damping, -0.5, tail=tail), dtype, label)
    eighs = [builders.make_eigh(n, 6, dtype=dtype) for n in (37, 20)]
    blocks = [builders.make_columns(n, 3, dtype=dtype) for n in (37, 20)]
    mixed = [sharded(mesh, eighs[0], replicate=True), eighs[1]]
    for function, options in ((brandla.grouped.damped_solve, (0.1,)), (brandla.grouped.damped_power, (0.1, -0.25))):
        expected = function(eighs, blocks, *options)
        for one, other in zip(function(mixed, [on_rows(mesh, blocks[0]), blocks[1]], *options), expected, strict=True):
            agree(one, other, dtype, "grouped")
    batch = builders.make_eigh(37, 6, dtype=dtype, batch_shape=(2,))
    expected = brandla.damped_solve(batch, blocks[0], 0.1)
    agree(brandla.damped_solve(sharded(mesh, batch), on_rows(mesh, blocks[0]), 0.1), expected, dtype, "broadcast")
    return []


def kron_applications(dtype: torch.dtype) -> list[Tensor]:
    """Pairs with either side sharded, and one matrix sharded on its rows."""
    mesh, p, q, k = mesh_of_all(), 37, 22, 3
    left, right = builders.make_eigh(p, 6, dtype=dtype), builders.make_root(q, 4, dtype=dtype)
    pair = builders.make_columns(p, k, dtype=dtype), builders.make_columns(q, k, dtype=dtype, seed=4)
    matrix = pair[0] @ pair[1].mT
    options = {"left_tail": 0.01, "right_tail": "smallest"}
    expected_pair = brandla.kron_damped_solve(left, right, pair, 0.1, 0.2, **options)
    expected = brandla.kron_damped_solve(left, right, matrix, 0.1, 0.2, **options)
    on_left, on_right = sharded(mesh, left), sharded(mesh, right, replicate=True)
    spread = on_rows(mesh, pair[0]), on_rows(mesh, pair[1])
    for sides, data in (
        ((on_left, on_right), spread),
        ((on_left, right), (spread[0], pair[1])),
        ((left, on_right), (pair[0], spread[1])),
    ):
        result = brandla.kron_damped_solve(*sides, data, 0.1, 0.2, **options)
        same_kind(result, data, "pair")
        for one, other in zip(result, expected_pair, strict=True):
            agree(one, other, dtype, "pair")
        (again,) = brandla.grouped.kron_damped_solve([sides[0]], [sides[1]], [data], 0.1, 0.2, **options)
        for one, other in zip(again, expected_pair, strict=True):
            agree(one, other, dtype, "grouped pair")
    result = brandla.kron_damped_solve(on_left, right, on_rows(mesh, matrix), 0.1, 0.2, **options)
    same_kind([result], [spread[0]], "matrix")
    agree(result, expected, dtype, "matrix")
    return []


def gradients() -> list[Tensor]:
    """Gradients of damped applications, which every process has of its own rows, and whole of what is small."""
    mesh, dtype, n = mesh_of_all(), torch.float64, 37
    weights = builders.make_columns(n, 3, seed=8)
    right, other = builders.make_eigh(3, 2, seed=5), builders.make_columns(n, 3, seed=6)
    small_parts = []
    for make in (builders.make_eigh, builders.make_root):
        for call in (
            lambda factor, rhs, damping: brandla.damped_solve(factor, rhs, damping, tail=0.01),
            lambda factor, rhs, damping: brandla.kron_damped_solve(factor, right, rhs, damping, 0.2),
        ):
            factor, damping = make(n, 6), torch.tensor(0.1, dtype=dtype)
            leaves = [part.clone().requires_grad_() for part in (*factor, other, damping)]
            loss = (call(type(factor)(*leaves[:2]), leaves[2], leaves[3]) * weights).sum()
            # Of a solve with a root and no tail S is all that counts beside F.
            expected = torch.autograd.grad(loss, leaves)
            own = [*sharded(mesh, factor), on_rows(mesh, other), damping.clone()]
            own = [part.requires_grad_() for part in own]
            result = call(type(factor)(*own[:2]), own[2], own[3])
            (result.to_local() * on_rows(mesh, weights).to_local()).sum().backward()
            for part, gradient in zip(own, expected, strict=True):
                agree(part.grad, gradient, dtype, call)
            small_parts += [part.grad for part in own if not isinstance(part, DTensor)]
    return small_parts


def messages(n: int, r: int, k: int, dtype: torch.dtype) -> dict[str, list[tuple[str, int]]]:
    """Return every collective of each function on tall matrices of n rows."""
    mesh = mesh_of_all()
    eigh, root = builders.make_eigh(n, r, dtype=dtype), builders.make_root(n, r, dtype=dtype)
    svd = builders.make_svd(n, 2 * r, r, dtype=dtype)
    columns = on_rows(mesh, builders.make_columns(n, k, dtype=dtype))
    # Columns almost inside the span of U.
    hard = on_rows(mesh, eigh.eigenvectors[:, :k] + 1e-5 * builders.make_columns(n, k, dtype=dtype))
    eigh, root, svd = (sharded(mesh, factor) for factor in (eigh, root, svd))
    calls: dict[str, Callable[[], Any]] = {
        "eigh_update": lambda: brandla.eigh_update(eigh, columns),
        "eigh_update, inside the span": lambda: brandla.eigh_update(eigh, hard),
        "eigh_downdate": lambda: brandla.eigh_downdate(eigh, columns),
        "root_update": lambda: brandla.root_update(root, columns),
        "root_update, cholesky": lambda: brandla.root_update(root, columns, compress="cholesky"),
        "root_update, tracked": lambda: brandla.root_update(brandla.track(root), hard),
        "to_eigh": root.to_eigh,
        "svd_append": lambda: brandla.svd_append(svd, columns),
        "damped_solve": lambda: brandla.damped_solve(eigh, columns, 0.1),
        "damped_solve of a root": lambda: brandla.damped_solve(root, columns, 0.1),
        "damped_power": lambda: brandla.damped_power(root, columns, 0.1, -0.5),
        "kron_damped_solve": lambda: brandla.kron_damped_solve(eigh, root, (columns, columns), 0.1, 0.1),
        "eigh_update_": lambda: brandla.eigh_update_(eigh, columns),
        "root_update_": lambda: brandla.root_update_(root, columns),
    }
    seen = {}
    for name, call in calls.items():
        with Messages() as recorder:
            call()
        seen[name] = recorder.seen
    return seen


def zeros() -> list[str]:
    """Start streams over a mesh."""
    mesh, n = mesh_of_all(), 37
    for make in (
        lambda **where: brandla.LowRankEigh.zeros(n, 4, batch_shape=(2,), **where),
        lambda **where: brandla.LowRankRoot.zeros(n, 4, dtype=torch.float64, **where),
        lambda **where: brandla.LowRankSVD.zeros(n, 5, 4, **where),
    ):
        factor = make(mesh=mesh)
        for one, other in zip(factor, make(), strict=True):
            assert torch.equal(whole(one), other)
            assert one.dtype == other.dtype
        assert sum(isinstance(part, DTensor) for part in factor) == 1
        assert not factor.dense().any()
        assert factor.is_finite().all()
    for replicate in (False, True):
        root = sharded(mesh, builders.make_root(n, 4), replicate=replicate)
        agree(root.largest_eigenvalue(), whole(root).largest_eigenvalue(), torch.float64, "largest")
        agree(brandla.track(root).trace, whole(root).gram.trace(), torch.float64, "trace")
        eigh = sharded(mesh, builders.make_eigh(n, 4), replicate=replicate)
        agree(eigh.largest_eigenvalue(), torch.tensor(1.0, dtype=torch.float64), torch.float64, "largest")
        back = brandla.LowRankRoot.from_eigh(eigh)
        same_kind(back, root, "from_eigh")
        agree(back.dense(), eigh.dense(), torch.float64, "from_eigh")
    return []


def refusals() -> dict[str, str]:
    """Return the error of each call that must be refused, in words."""
    mesh = mesh_of_all()
    n, r, k = 37, 4, 3
    plain, data = builders.make_eigh(n, r), builders.make_columns(n, k)
    factor, columns = sharded(mesh, plain), on_rows(mesh, data)
    square = init_device_mesh("cpu", (1, distributed.get_world_size()), mesh_dim_names=("outer", "inner"))
    vectors = plain.eigenvectors
    copied = brandla.LowRankEigh(plain.eigenvalues, on_all(mesh, vectors))
    two = brandla.LowRankEigh(plain.eigenvalues, distribute_tensor(vectors, square, [Replicate(), Shard(0)]))
    split_values = brandla.LowRankEigh(distribute_tensor(plain.eigenvalues, mesh, [Shard(0)]), factor.eigenvectors)
    root = sharded(mesh, builders.make_root(n, r))
    sharded_gram = brandla.LowRankRoot(root.root, distribute_tensor(root.gram, mesh, [Shard(0)]))
    backwards = DeviceMesh("cpu", list(reversed(range(distributed.get_world_size()))))
    # All rows on rank 0: a DTensor can be told so, but distribute_tensor lays none out like that.
    rows = n if distributed.get_rank() == 0 else 0
    piled = DTensor.from_local(data[:rows], mesh, [Shard(0)], run_check=False, shape=data.shape, stride=(k, 1))
    poisoned = data.clone()
    poisoned[n - 1, 0] = torch.nan
    svd, square_matrix = builders.make_svd(n, 8, r), on_rows(mesh, data @ data.mT)
    calls: dict[str, Callable[[], Any]] = {
        "replicated basis": lambda: brandla.eigh_update(copied, columns),
        "columns on all": lambda: brandla.eigh_update(factor, on_all(mesh, data)),
        "columns on columns": lambda: brandla.eigh_update(factor, distribute_tensor(data, mesh, [Shard(1)])),
        "two dimensions": lambda: brandla.eigh_update_(two, columns),
        "plain columns": lambda: brandla.root_update(brandla.LowRankRoot.from_eigh(factor), data),
        "replicated F": lambda: brandla.root_update(root._replace(root=on_all(mesh, root.root.full_tensor())), columns),
        "replicated U": lambda: brandla.LowRankRoot.from_eigh(copied),
        "sharded S": lambda: brandla.root_update(sharded_gram, columns),
        "plain local columns": lambda: brandla.eigh_update(factor, columns.to_local()),
        "plain basis": lambda: brandla.eigh_update(plain, columns),
        "plain rhs": lambda: brandla.damped_solve(factor, data, 0.1),
        "plain P": lambda: brandla.kron_damped_solve(factor, factor, (data, columns), 0.1, 0.1),
        "sharded values": lambda: brandla.eigh_update(split_values, columns),
        "another mesh": lambda: brandla.eigh_update(factor, on_rows(backwards, data)),
        "another layout": lambda: brandla.eigh_update(factor, piled),
        "sharded right of a matrix": lambda: brandla.kron_damped_solve(factor, factor, square_matrix, 1, 1),
        "sharded Vh": lambda: brandla.svd_append(
            brandla.LowRankSVD(on_rows(mesh, svd.U), svd.S, on_rows(mesh, svd.Vh, -1)), columns
        ),
        "replicated number for a plain factor": lambda: brandla.eigh_update(
            plain, data, decay=on_all(mesh, torch.tensor(0.5, dtype=torch.float64))
        ),
        "rank": lambda: brandla.eigh_update(factor, columns, rank=r + k + 1),
        "device and mesh": lambda: brandla.LowRankEigh.zeros(n, r, device="cpu", mesh=mesh),
        "zeros over two dimensions": lambda: brandla.LowRankEigh.zeros(n, r, mesh=square),
        "a panel": lambda: brandla.orthonormalize(columns),
        "a basis to refresh": lambda: brandla.eigh_refresh(factor, data),
        "a matrix to sketch": lambda: brandla.randomized_eigh(square_matrix, r),
        "not finite": lambda: brandla.eigh_update(factor, on_rows(mesh, poisoned)),
    }
    errors = {}
    for name, call in calls.items():
        try:
            with brandla.checked():
                call()
        except (ValueError, TypeError) as error:
            errors[name] = f"{type(error).__name__}: {error}"
        else:
            errors[name] = "none"
    return errors
