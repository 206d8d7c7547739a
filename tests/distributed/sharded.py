"""Every rank's part in the tests of row-sharded factors: it makes the same calls sharded and whole, and compares."""

import re
from functools import cache, partial

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import brandla
import builders
import oracles
from calls import ALL, new_arguments
from distributed.processes import refusal, whole

UPDATES = {str(update): update for update in builders.SYMMETRIC_UPDATES}
STREAMS = ("slow", "fast", "repeated-8", "zeros-between")
# (n, r, k): equal shards; uneven ones; an empty one among four; r + k >= n, also with empty shards among four and among
# two; fewer local rows than columns of U.
SIZES = ((64, 8, 4), (37, 6, 5), (5, 2, 1), (8, 5, 4), (3, 2, 2), (1, 1, 1), (33, 12, 3))
TAILS = (0.0, 0.01, torch.tensor(0.01), "smallest", "mean")
# Calls whose factors may be sharded. The diagonal must be None, and `right` is whole if only U is sharded.
OF_FACTORS = (
    *("eigh_up", "eigh_down", "root_", "svd_", "damped_", "kron_damped_solve", "to_", "from_", "dense", "traces"),
    *("is_finite", "largest_eigenvalue", "grouped.root_update"),
)
CALLS = [name for name in ALL if name.startswith(OF_FACTORS) and "diagonal" not in name]
CALLS.remove("svd_update, wide")

# All small parts that were compared. They decide branches, so they must have the same bits on every rank.
SMALL = []


def small_parts(function, *arguments):
    """Run a check on this rank, and return the small parts that it compared."""
    function(*arguments)
    return SMALL


class Messages(TorchDispatchMode):
    """Record every collective: its name, and how many numbers the largest tensor in it holds."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented
        if "c10d" in func.namespace:
            sizes = [leaf.numel() for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            self.seen.append((func.overloadpacket.__name__, max(sizes, default=0)))
        return func(*args, **(kwargs or {}))


@cache
def mesh_of_all():
    return init_device_mesh("cpu", (distributed.get_world_size(),))


def spread(matrix, *placement, mesh=None):
    # Every rank has the whole matrix, so nothing is sent. A shard may be a view of it.
    return distribute_tensor(matrix.detach().clone(), mesh or mesh_of_all(), placement, src_data_rank=None)


def on_rows(matrix, dim=-2):
    return spread(matrix, Shard(dim % matrix.ndim))


def on_all(small):
    return spread(small, Replicate())


def sharded(factor, *, replicate=False):
    """Return a factor with its tall matrix sharded, and small ones as plain tensors or as replicated DTensors."""
    if isinstance(factor, brandla.Tracked):
        return brandla.track(sharded(factor.lowrank, replicate=replicate))
    small = on_all if replicate else Tensor.clone
    tall = {brandla.LowRankSVD: "U", brandla.LowRankRoot: "root", brandla.LowRankEigh: "eigenvectors"}[type(factor)]
    parts = factor._asdict()
    return factor._replace(**{name: (on_rows if name == tall else small)(part) for name, part in parts.items()})


def agree(actual, expected, label, scale=None):
    """Check that the difference is below `oracles.THRESHOLD` times n·ε·‖·‖, which rounding explains."""
    actual = whole(actual)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return
    matrices = (1, -1, 1) if expected.ndim < 2 else (-1, *expected.shape[-2:])
    for one, other in zip(actual.reshape(matrices), expected.reshape(matrices), strict=True):
        ratio = oracles.difference_ratio(one, other, expected.dtype, scale)
        assert ratio < oracles.THRESHOLD, (label, ratio)


def is_spread(part):
    return isinstance(part, DTensor) and part.placements[0].is_shard()


def compare(many, one, label):
    """Compare the result of sharded arguments with that of whole ones: the matrices, and orthonormality."""
    SMALL.extend(whole([part for part in tree_leaves(many) if not is_spread(part)]))
    if isinstance(one, Tensor):
        agree(many, one, label)
    elif isinstance(one, brandla.Tracked):
        scale = one.lowrank.n * float(torch.maximum(one.trace, one.error_bound).max())
        agree(many.error_bound, one.error_bound, label, scale)
        agree(many.trace, one.trace, label, scale)
        compare(many.lowrank, one.lowrank, label)
    elif isinstance(one, brandla.LowRankSVD):
        agree(many.dense(), one.dense(), label)
        # A centred stream keeps no right side.
        left, right = (value.U * value.S.unsqueeze(-2) for value in (whole(many), one))
        agree(left @ left.mT, right @ right.mT, label)
    elif isinstance(one, brandla.LowRankEigh | brandla.LowRankRoot):
        agree(many.dense(), one.dense(), label)
        assert builders.defect(whole(many)) < oracles.ORTHONORMAL * oracles.epsilon(one.dtype), label
    else:
        for parts in zip(many, one, strict=True):
            compare(*parts, label)


def check(call, *arguments, label=None):
    """Return the result of a call with sharded arguments, after comparing it with that of whole ones."""
    result = call(*arguments)
    compare(result, call(*whole(arguments)), label or call)
    return result


def same_kind(result, argument, label):
    """Check that each result is a DTensor with the placements of its argument, or that neither is one."""
    for one, other in zip(result, argument, strict=True):
        assert isinstance(one, DTensor) == isinstance(other, DTensor), label
        if isinstance(one, DTensor):
            assert one.placements == other.placements, label
            assert one.device_mesh == other.device_mesh, label


def batches(stream, n, k, dtype):
    # Streams need at least 16 rows. A smaller one takes the first rows of a larger one.
    return [columns[:n].contiguous() for columns in oracles.batches(stream, max(n, 32), k, 5, dtype=dtype)]


def update_streams(name, dtype):
    """Update sharded and whole factors side by side, at every size."""
    update = partial(UPDATES[name], decay=0.9, weight=0.1)
    for index, (n, r, k) in enumerate(SIZES):
        # With two and four processes, each size gets different streams, and small parts of both kinds.
        stream = STREAMS[(index + distributed.get_world_size()) % 4]
        label = (name, dtype, n, r, k, stream)
        one = brandla.track(UPDATES[name].factor.zeros(n, r, dtype=dtype))
        many = sharded(one, replicate=(index + distributed.get_world_size() // 2) % 2 == 1)
        data = batches(stream, n, k, dtype)
        for step in range(len(data) + 1):
            inside_the_span = builders.tall_of(one.lowrank) @ torch.ones(r, k, dtype=dtype) / k
            columns = data[step] if step < len(data) else inside_the_span
            before, one, many = many, update(one, columns), update(many, on_rows(columns))
            same_kind(many.lowrank, before.lowrank, label)
            agree(many.lowrank.dense(), one.lowrank.dense(), label)
        compare(many, one, label)
        if isinstance(one.lowrank, brandla.LowRankRoot):
            eigh = many.lowrank.to_eigh()
            same_kind(eigh[::-1], many.lowrank, label)
            compare(eigh, one.lowrank.to_eigh(), label)
        rhs = on_rows(columns)
        for tail in TAILS:
            same_kind([check(partial(brandla.damped_solve, tail=tail), many, rhs, 0.1, label=label)], [rhs], label)
            check(partial(brandla.damped_power, tail=tail), many, rhs, torch.tensor(0.1), -0.5, label=label)


def every_call(dtype):
    """Two processes take a batch with plain small parts, four take one problem; also calls that overwrite in place."""
    is_pair, n = distributed.get_world_size() == 2, 37
    options = {"dtype": dtype, "batch_shape": (2,) if is_pair else ()}
    for name in CALLS:
        one = new_arguments(**options, n=n)
        # Shard the arguments of the larger order.
        factors = {name: sharded(getattr(one, name), replicate=not is_pair) for name in ("eigh", "root", "one_eigh")}
        data = {name: on_rows(getattr(one, name)) for name in ("columns", "block", "square")}
        many = one._replace(**factors, **data, svd=sharded(one.svd))
        if not is_pair and not name.startswith("kron"):
            many = many._replace(number=on_all(one.number))
        compare(ALL[name](many), ALL[name](one), name)
        compare(many, one, name)
    for kind, *sizes in ((brandla.LowRankEigh, n, 4), (brandla.LowRankRoot, n, 4), (brandla.LowRankSVD, n, 5, 4)):
        factor = kind.zeros(*sizes, **options, mesh=mesh_of_all())
        compare(factor, kind.zeros(*sizes, **options), kind)
        assert [is_spread(part) for part in factor].count(True) == 1, kind


def lists(dtype):
    """Update factors together: their small matrices share the messages of one factor.

    Sharded factors may be mixed with plain ones. Non-finite data on one rank make all of a factor NaN.
    """
    r, k, weights = 6, 5, [0.1, 1.0, 1.0, 0.5]
    for name, update in UPDATES.items():
        # For the last size, r + k is above n.
        sizes = (37, 20, 64, 9)
        factors = [brandla.track(update.make(n, r, dtype=dtype, seed=n)) for n in sizes]
        columns = [builders.make_columns(n, k, dtype=dtype, seed=n) for n in sizes]
        each = zip(factors, columns, weights, strict=True)
        expected = [update(factor, new, decay=0.9, weight=weight) for factor, new, weight in each]
        for replicate, plain in ((False, ()), (True, ()), (False, (1, 3))):
            own = [old if i in plain else sharded(old, replicate=replicate) for i, old in enumerate(factors)]
            data = [new if i in plain else on_rows(new) for i, new in enumerate(columns)]
            with Messages() as recorder:
                results = update.grouped(own, data, decay=0.9, weight=weights)
            # One message for C and G, and one more for the polish of an orthonormal form.
            assert len(recorder.seen) == 1 + (update.factor is brandla.LowRankEigh), recorder.seen
            compare(results, expected, name)
            for result, before in zip(results, own, strict=True):
                same_kind(result.lowrank, before.lowrank, name)
        check(brandla.grouped.damped_solve, own, data, 0.1, label=name)
        check(brandla.grouped.damped_power, own, data, 0.1, -0.25, label=name)
        columns[0][-1, 0] = torch.nan
        result = whole(update(own[0], on_rows(columns[0]))).lowrank
        assert builders.values_of(result).isnan().all()
        assert builders.tall_of(result).isnan().all()


def svd_streams(dtype):
    """Append to sharded decompositions and whole ones side by side."""
    for n, r, k in SIZES:
        for centred in (False, True):
            label = ("svd_append", dtype, n, r, k, centred)
            one = brandla.LowRankSVD.zeros(n, 0, r, dtype=dtype)
            many = brandla.LowRankSVD.zeros(n, 0, r, dtype=dtype, mesh=mesh_of_all())
            if centred:
                one, many = brandla.centre(one), brandla.centre(many)
            for columns in batches("slow", n, k, dtype):
                one = brandla.svd_append(one, columns, decay=0.9)
                many = brandla.svd_append(many, on_rows(columns), decay=0.9)
            compare(many, one, label)
            assert is_spread((many.svd if centred else many).U), label


def nearly_dependent_columns(dtype):
    """Append columns with weak last directions to shards that have fewer rows than the panel has columns."""
    for n, r, k, weak in ((12, 4, 4, 8.0), (12, 6, 10, 64.0), (7, 4, 4, 4e3), (3, 0, 8, 16.0), (64, 6, 10, 64.0)):
        svd = builders.make_svd(n, 20, r, "slow", dtype=dtype)
        few = oracles.gaussian(n, 2, seed=1) @ oracles.gaussian(2, k, seed=2)
        columns = (few + weak * torch.finfo(dtype).eps * oracles.gaussian(n, k, seed=3)).to(dtype)
        result = brandla.svd_append(sharded(svd), on_rows(columns), rank=min(n, r + k))
        label = ("dependent columns", dtype, n, r, k)
        assert oracles.orthonormality_ratio(whole(result.U), result.S) < oracles.THRESHOLD, label
        assert oracles.orthonormality_ratio(result.Vh.mT, result.S) < oracles.THRESHOLD, label
        agree(result.dense(), torch.cat([svd.dense(), columns], dim=1), label)


def two_sides(dtype):
    """Functions of two sides, with the left one sharded, the right one, or both."""
    p, q, k = 37, 22, 3
    svd, P, Q = builders.make_svd(p, q, 6, dtype=dtype), *(builders.make_columns(n, k, dtype=dtype) for n in (p, q))
    left, right = builders.make_eigh(p, 6, dtype=dtype), builders.make_root(q, 4, dtype=dtype)
    options = {"left_tail": 0.01, "right_tail": "smallest"}
    for on_left, on_right in ((True, False), (False, True), (True, True)):
        data = on_rows(P) if on_left else P, on_rows(Q) if on_right else Q
        old = sharded(svd) if on_left else svd
        old = old._replace(Vh=on_rows(svd.Vh, -1)) if on_right else old
        old = old._replace(S=on_all(svd.S)) if on_left and on_right else old
        same_kind(check(partial(brandla.svd_update, decay=0.9), old, *data), old, "svd_update")
        sides = sharded(left) if on_left else left, sharded(right, replicate=True) if on_right else right
        result = check(partial(brandla.kron_damped_solve, **options), *sides, data, 0.1, 0.2)
        same_kind(result, data, "pair")
        (again,) = brandla.grouped.kron_damped_solve(*([side] for side in sides), [data], 0.1, 0.2, **options)
        compare(again, whole(result), "grouped pair")


def gradients():
    """Compare gradients of damped applications: each process has those of its rows, and all of the small parts."""
    n = 37
    weights = builders.make_columns(n, 3, seed=8)
    right, other = builders.make_eigh(3, 2, seed=5), builders.make_columns(n, 3, seed=6)
    for make in (builders.make_eigh, builders.make_root):
        for call in (
            lambda factor, rhs, damping: brandla.damped_solve(factor, rhs, damping, tail=0.01),
            lambda factor, rhs, damping: brandla.kron_damped_solve(factor, right, rhs, damping, 0.2),
        ):
            factor, damping = make(n, 6), torch.tensor(0.1, dtype=torch.float64)
            leaves = [part.clone().requires_grad_() for part in (*factor, other, damping)]
            loss = (call(type(factor)(*leaves[:2]), leaves[2], leaves[3]) * weights).sum()
            # A solve with a root and no tail reads only S besides F.
            expected = torch.autograd.grad(loss, leaves)
            own = [part.requires_grad_() for part in (*sharded(factor), on_rows(other), damping.clone())]
            result = call(type(factor)(*own[:2]), own[2], own[3])
            (result.to_local() * on_rows(weights).to_local()).sum().backward()
            compare([part.grad for part in own], expected, call)


def messages(dtype):
    """Check the numbers in every collective of each function on tall matrices of n rows: none grows with n."""
    n, r, k = 1600, 12, 8
    eigh, root = builders.make_eigh(n, r, dtype=dtype), builders.make_root(n, r, dtype=dtype)
    svd = builders.make_svd(n, 2 * r, r, dtype=dtype)
    columns = on_rows(builders.make_columns(n, k, dtype=dtype))
    # Columns almost inside the span of U.
    hard = on_rows(eigh.eigenvectors[:, :k] + 1e-5 * builders.make_columns(n, k, dtype=dtype))
    eigh, root, svd = map(sharded, (eigh, root, svd))
    # C and G together; UᵀA; H of the polish.
    both, projected, inner = (r + k) * k, r * k, r * r
    # The Gram matrix of the panel and H; or the triangles of the processes, one below the other.
    of_panel = [(r + k) ** 2, inner] if dtype == torch.float32 else [2 * (r + k) ** 2]
    calls = [
        ([both, inner], brandla.eigh_update, eigh, columns),
        ([both, inner], brandla.eigh_update, eigh, hard),
        ([projected, inner], brandla.eigh_downdate, eigh, columns),
        ([both], brandla.root_update, root, columns),
        ([both], partial(brandla.root_update, compress="cholesky"), root, columns),
        ([both], brandla.root_update, brandla.track(root), hard),
        ([inner, inner], root.to_eigh),
        (of_panel, brandla.svd_append, svd, columns),
        ([projected], brandla.damped_solve, eigh, columns, 0.1),
        ([projected], brandla.damped_solve, root, columns, 0.1),
        ([projected], brandla.damped_power, root, columns, 0.1, -0.5),
        ([projected, projected], brandla.kron_damped_solve, eigh, root, (columns, columns), 0.1, 0.1),
        ([both, inner], brandla.eigh_update_, eigh, columns),
        ([both], brandla.root_update_, root, columns),
    ]
    for sizes, *call in calls:
        with Messages() as recorder:
            partial(*call)()
        assert recorder.seen == [("allreduce_", size) for size in sizes], call[0]


def refusals():
    """Check the message of each call that must be refused."""
    mesh, ranks = mesh_of_all(), distributed.get_world_size()
    n, r, k = 37, 4, 3
    plain, data = builders.make_eigh(n, r), builders.make_columns(n, k)
    factor, root, svd = map(sharded, (plain, builders.make_root(n, r), builders.make_svd(n, 8, r)))
    columns, square = on_rows(data), on_rows(data @ data.mT)
    two_dimensions = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("outer", "inner"))
    copied = plain._replace(eigenvectors=on_all(plain.eigenvectors))
    two = plain._replace(eigenvectors=spread(plain.eigenvectors, Replicate(), Shard(0), mesh=two_dimensions))
    split_values = factor._replace(eigenvalues=spread(plain.eigenvalues, Shard(0)))
    whole_root = root._replace(root=on_all(whole(root.root)))
    sharded_gram = root._replace(gram=spread(root.gram, Shard(0)))
    split_svd = svd._replace(Vh=on_rows(svd.Vh, -1))
    reversed_ranks = spread(data, Shard(0), mesh=DeviceMesh("cpu", list(reversed(range(ranks)))))
    # All rows are on rank 0. DTensor.from_local can describe this layout, but distribute_tensor never makes it.
    rows = n if distributed.get_rank() == 0 else 0
    piled = DTensor.from_local(data[:rows], mesh, [Shard(0)], run_check=False, shape=data.shape, stride=(k, 1))
    poisoned = data.clone()
    poisoned[n - 1, 0] = torch.nan
    half = on_all(torch.tensor(0.5, dtype=torch.float64))
    shard, small = r"must be sharded on its rows, \[Shard\(0\)\]; got \[", r"must be a plain tensor or \[Replicate"
    spread_out, plain_one = "must be a DTensor sharded on its rows", "must be a plain tensor"
    one_dimension = "must lie on a device mesh of one dimension"
    update, root_update, solve = brandla.eigh_update, brandla.root_update, brandla.kron_damped_solve
    zeros = partial(brandla.LowRankEigh.zeros, n, r)
    # A message, a function and its bad arguments: wrong layouts first, then tensors of the wrong kind.
    layouts = [
        (f"eigh_update: eigh.eigenvectors {shard}Repl.*redistribute\\(pl", update, copied, columns),
        (f"eigh_update: columns {shard}Repl", update, factor, on_all(data)),
        (f"eigh_update: columns {shard}Shard", update, factor, on_rows(data, 1)),
        (f"eigh_update_: eigh.eigenvectors {one_dimension}; got Dev", brandla.eigh_update_, two, columns),
        (f"root_update: root.root {shard}Repl.*redistribute\\(pl", root_update, whole_root, columns),
        (f"LowRankRoot.from_eigh: eigh.eigenvectors {shard}Repl", brandla.LowRankRoot.from_eigh, copied),
        (f"root_update: root.gram {small}", root_update, sharded_gram, columns),
        (f"eigh_update: eigh.eigenvalues {small}", update, split_values, columns),
        (f"svd_append: svd.Vh {small}", brandla.svd_append, split_svd, columns),
        (r"eigh_update: columns must lie on the device mesh .* \[0, 1\]; got \[1, 0\]", update, factor, reversed_ranks),
        (r"eigh_update: columns must hold rows \d+ to \d+ in this process, .* 37 rows; got", update, factor, piled),
        ("kron_damped_solve: right must hold plain tensors where matrix is one W", solve, factor, factor, square, 1, 1),
        (r"eigh_update: rank must be between 0 and 7 = min\(n, r \+ k\)", partial(update, rank=8), factor, columns),
        ("LowRankEigh.zeros: device must be left out beside a mesh", partial(zeros, device="cpu", mesh=mesh)),
        (f"LowRankEigh.zeros: mesh {one_dimension}", partial(zeros, mesh=two_dimensions)),
        ("eigh_update: columns must be finite; got 1 NaN or infinite entries", update, factor, on_rows(poisoned)),
    ]
    kinds = [
        (f"root_update: columns {spread_out}, .*; got a Tensor", root_update, root, data),
        (f"eigh_update: columns {spread_out}", update, factor, columns.to_local()),
        (f"damped_solve: rhs {spread_out}", brandla.damped_solve, factor, data, 0.1),
        (f"kron_damped_solve: P {spread_out}", solve, factor, factor, (data, columns), 0.1, 0.1),
        (f"eigh_update: columns {plain_one}, .*; got a DTensor; take its .full_tensor", update, plain, columns),
        (f"eigh_update: decay {plain_one}", partial(update, decay=half), plain, data),
        (f"orthonormalize: panel {plain_one}", brandla.orthonormalize, columns),
        (f"eigh_refresh: eigh.eigenvectors {plain_one}", brandla.eigh_refresh, factor, data),
        (f"randomized_eigh: matrix {plain_one} or a linear operator; got a DTens", brandla.randomized_eigh, square, r),
    ]
    errors = []
    with brandla.checked():
        for kind, calls in (("ValueError", layouts), ("TypeError", kinds)):
            errors += [(f"{kind}: {rule}", refusal(partial(*call))) for rule, *call in calls]
    assert [pair for pair in errors if not re.match(*pair)] == []
