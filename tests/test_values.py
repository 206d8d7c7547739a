"""The values: constructed, converted, saved, moved, printed, multiplied, kept by optimizers, refused."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

import brandla
import oracles
from brandla.lowrank import stacked
from builders import assert_equals, assert_factor, assert_same, dense, make_columns, make_eigh, make_root, make_svd


def make_centred(**options):
    batch_shape = options.get("batch_shape", ())
    start = brandla.centre(brandla.LowRankSVD.zeros(20, 0, 5, **options))
    return brandla.svd_append(start, make_columns(20, 9, batch_shape=batch_shape).to(start.dtype))


MAKERS = {
    "LowRankEigh": lambda **options: make_eigh(20, 5, **options),
    "LowRankRoot": lambda **options: make_root(20, 5, **options),
    "LowRankSVD": lambda **options: make_svd(20, 14, 5, **options),
    "Tracked": lambda **options: brandla.track(make_root(20, 5, **options)),
    "Centred": make_centred,
}
MATRICES = pytest.mark.parametrize("name", ["LowRankEigh", "LowRankRoot", "LowRankSVD"])


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


@pytest.mark.parametrize("batch_shape", [(), (2,), (2, 3)], ids=str)
@MATRICES
def test_a_value_is_the_product_of_its_parts(name, batch_shape, dtype):
    value = MAKERS[name](dtype=dtype, batch_shape=batch_shape)
    whole, expected = value.dense(), dense(value)
    assert (whole.dtype, whole.shape, value.shape) == (dtype, expected.shape, expected.shape)
    assert whole.shape[:-2] == batch_shape
    differences = (whole.double() - expected).flatten(0, -3) if batch_shape else [whole.double() - expected]
    assert max(map(oracles.spectral_norm, differences)) <= oracles.tolerance(20, dtype)
    rows = value.shape[-1]
    for block in (make_columns(rows, 3, batch_shape=batch_shape), make_columns(rows, 3)[:, 0]):
        torch.testing.assert_close(value @ block.to(dtype), (expected @ block).to(dtype))
    with pytest.raises(ValueError, match=rf"^{name} @: the tensor must have {rows} rows; got shape \(3,\)"):
        value @ torch.ones(3, dtype=dtype)
    if name != "LowRankSVD":
        torch.testing.assert_close(value.trace(), whole.diagonal(dim1=-2, dim2=-1).sum(-1))


@pytest.mark.parametrize("batch_shape", [(), (2, 0)], ids=str)
@pytest.mark.parametrize("rank", [0, 1, 7])
def test_zeros_has_the_shapes_and_is_the_zero_matrix(batch_shape, rank, dtype):
    options = {"batch_shape": batch_shape, "dtype": dtype}
    eigh = brandla.LowRankEigh.zeros(7, rank, **options)
    root = brandla.LowRankRoot.zeros(7, rank, **options)
    svd = brandla.LowRankSVD.zeros(7, 9, rank, **options)
    shapes = [tuple(part.shape) for part in (*eigh, *root, *svd)]
    expected = [(rank,), (7, rank), (7, rank), (rank, rank), (7, rank), (rank,), (rank, 9)]
    assert shapes == [(*batch_shape, *shape) for shape in expected]
    assert {part.dtype for part in (*eigh, *root, *svd)} == {dtype}
    assert not any(value.dense().any() for value in (eigh, root, svd))
    assert (eigh.n, eigh.rank, root.n, root.rank, svd.rank) == (7, rank, 7, rank, rank)
    assert brandla.LowRankEigh.zeros(5, 2).eigenvalues.dtype == torch.get_default_dtype()


@pytest.mark.parametrize("spectrum", oracles.SPECTRA)
def test_a_root_converts_to_eigenvectors_and_back(spectrum, dtype):
    root = make_root(20, 5, spectrum, dtype=dtype)
    eigh = root.to_eigh()
    back = brandla.LowRankRoot.from_eigh(eigh)
    assert eigh.eigenvectors.dtype == dtype
    assert_factor(eigh, 20, 5)
    assert torch.equal(back.gram, torch.diag(eigh.eigenvalues))
    assert_factor(back, 20, 5)
    # Values up to 8 ε·d₁ become 0.
    slack = 2 * oracles.rounding(20, dtype, oracles.spectral_norm(dense(root)))
    for value in (eigh, back):
        assert oracles.spectral_norm(dense(value) - dense(root)) <= slack


def test_a_root_has_no_more_eigenvectors_than_its_rank_and_its_rows(dtype):
    dependent = oracles.gaussian(20, 2, seed=0).to(dtype) @ torch.tensor([[1, 0, 2, 0], [0, 1, 1, 0]], dtype=dtype)
    for columns, rank, most in ((dependent, 2, 4), (oracles.gaussian(4, 7, seed=0).to(dtype), 4, 4)):
        root = brandla.LowRankRoot(columns, columns.mT @ columns)
        eigh = root.to_eigh()
        in_use = [True] * rank + [False] * (most - rank)
        assert (eigh.eigenvalues > 0).tolist() == in_use
        assert eigh.eigenvectors.any(-2).tolist() == in_use
        assert_equals(eigh, dense(root))


@pytest.mark.parametrize("spectrum", oracles.SPECTRA)
def test_largest_eigenvalue_is_a_near_lower_bound_and_exact_for_a_diagonal(spectrum, dtype):
    eigh, full = make_eigh(20, 5, spectrum, dtype=dtype), make_root(20, 5, spectrum, dtype=dtype)
    diagonal = make_root(20, 5, spectrum, dtype=dtype, diagonal=True)
    largest = float(oracles.SPECTRA[spectrum](5)[0])
    rounding = 8 * oracles.epsilon(dtype) * largest
    assert abs(float(diagonal.largest_eigenvalue()) - float(eigh.largest_eigenvalue())) <= rounding
    # The best of r unit vectors has a squared product of at least 1/r with the leading eigenvector.
    assert largest / 5**0.5 - rounding <= float(full.largest_eigenvalue()) <= largest + rounding
    for factor in (brandla.LowRankEigh, brandla.LowRankRoot):
        assert factor.zeros(7, 0, batch_shape=(2,)).largest_eigenvalue().tolist() == [0, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@MATRICES
def test_is_finite_shows_which_batch_entry_is_non_finite(name, bad):
    value = MAKERS[name](batch_shape=(2, 2))
    assert value.is_finite().all()
    value[0 if name == "LowRankEigh" else 1][1, 0] = bad
    assert value.is_finite().tolist() == [[True, True], [False, True]]


# --- Saved, moved, printed


def saved(value, _):
    stream = io.BytesIO()
    torch.save(value, stream)
    return torch.load(io.BytesIO(stream.getvalue()))


def checkpointed(value, path):
    state = {"value": value}
    dcp.save(state, checkpoint_id=path, no_dist=True)
    state = tree_map(torch.zeros_like, state)
    dcp.load(state, checkpoint_id=path, no_dist=True)
    return state["value"]


COPIES = {
    "saved": saved,
    "checkpointed": checkpointed,
    "pickled": lambda value, _: pickle.loads(pickle.dumps(value)),
    "copied": lambda value, _: copy.deepcopy(value),
}


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("copied", COPIES)
def test_values_and_lists_of_values_come_back_unchanged(make, copied, tmp_path):
    values = {"one": make(), "several": [make(batch_shape=(2,)), make(dtype=torch.float32)]}
    assert_same(COPIES[copied](values, tmp_path), values)


def two_optimizers(dtype, value):
    """Return an optimizer that keeps a value for its parameter, of this dtype, and another without state."""
    weight = torch.zeros(20, dtype=dtype)
    first, second = (torch.optim.SGD([weight]) for _ in range(2))
    first.state[weight]["value"] = value
    return first, second


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_an_optimizer_that_keeps_dtypes_loads_its_state_to_the_bit(dtype, tmp_path):
    values = [make(dtype=torch.float32) for make in MAKERS.values()]
    first, second = two_optimizers(dtype, {"several": values, "deeper": [{"stream": make_centred()}]})
    brandla.keep_dtype(second)
    second.load_state_dict(saved(first.state_dict(), tmp_path))
    assert_same(second.state_dict()["state"], first.state_dict()["state"])


def test_any_optimizer_loads_values_in_the_dtype_of_the_parameter():
    values = [MAKERS[name](dtype=torch.float32) for name in ("LowRankEigh", "LowRankRoot", "LowRankSVD", "Tracked")]
    first, second = two_optimizers(torch.float32, values)
    second.load_state_dict(first.state_dict())
    assert_same(second.state_dict()["state"], first.state_dict()["state"])


@pytest.mark.parametrize(("name", "dtype"), [("LowRankEigh", torch.bfloat16), ("Centred", torch.float32)])
def test_an_optimizer_that_would_round_a_value_names_the_remedy(name, dtype):
    first, second = two_optimizers(dtype, MAKERS[name](dtype=torch.float32))
    with pytest.raises(TypeError, match=rf"^{name}: .*float64; got .*; .*brandla.keep_dtype\(optimizer\)"):
        second.load_state_dict(first.state_dict())
    assert not second.state


def test_values_move_between_dtypes_and_devices(make):
    value = make(dtype=torch.float64, batch_shape=(2,))
    single = value.to(torch.float32)
    assert (single.dtype, value.to(dtype=torch.float32, device="meta").device.type) == (torch.float32, "meta")
    assert_same(single.to(torch.float64).to(torch.float32), single)
    sums = [part for name, part in zip(value._fields, single, strict=True) if name in ("mean", "weight", "scatter")]
    assert all(part.dtype == torch.float64 for part in sums)
    with pytest.raises(TypeError, match=r"\.to: .* must be float32 or float64, since half precision .*; got bfloat16"):
        value.to(torch.bfloat16)


def test_rows_are_appended_to_the_transpose(dtype):
    svd, rows = make_svd(20, 14, 5, dtype=dtype), make_columns(14, 3, dtype=dtype).mT
    assert_same(svd.mT.mT, svd)
    longer = brandla.svd_append(svd.mT, rows.mT, rank=8).mT
    torch.testing.assert_close(longer.dense(), torch.cat([svd.dense(), rows]))


def test_a_value_prints_in_one_line():
    eigh = brandla.LowRankEigh(torch.tensor([7.75, 0.4]), torch.eye(512, 2))
    assert repr(eigh) == "LowRankEigh(n=512, rank=2, float32, cpu, eigenvalues 7.75 … 0.4)"
    assert repr(eigh.to("meta")) == "LowRankEigh(n=512, rank=2, float32, meta)"
    assert repr(make_svd(20, 14, 5, batch_shape=(3,))) == "LowRankSVD(batch (3,), m=20, n=14, rank=5, float64, cpu)"
    assert repr(brandla.track(eigh)) == f"Tracked({eigh!r}, error bound 0, trace 8.15)"
    stream = brandla.centre(brandla.LowRankSVD.zeros(3, 0, 0))
    assert repr(stream).endswith("m=3, n=0, rank=0, float32, cpu), weight 0)")
    assert repr(brandla.LowRankRoot.zeros(3, 1)) == "LowRankRoot(n=3, rank=1, float32, cpu, diagonal of gram 0 … 0)"
    assert repr(brandla.LowRankEigh(torch.ones(1), torch.ones(1))).endswith("eigenvectors=tensor([1.]))")
    assert repr(brandla.LowRankEigh(0, None)) == "LowRankEigh(eigenvalues=0, eigenvectors=None)"
    lines = []
    torch.vmap(lambda eigh: (lines.append(repr(eigh)), eigh.dense())[1])(make_eigh(20, 5, batch_shape=(3,)))
    with FakeTensorMode() as mode:
        lines.append(repr(tree_map(mode.from_tensor, make_eigh(20, 5))))
    assert lines == ["LowRankEigh(n=20, rank=5, float64, cpu)"] * 2


def test_the_arithmetic_of_tuples_is_refused(make):
    value = make()
    for call in (lambda: value + value, lambda: 2 * value, lambda: value * 2, lambda: sum([value])):
        with pytest.raises(TypeError, match=rf"^{type(value).__name__}: \+ and \* are not .*(update|merge|svd_append)"):
            call()
    assert next(iter(value)) is value[0]
    assert type(value._replace(**{value._fields[0]: value[0]})) is type(value)


def test_unbound_tensors_are_stacked_without_a_copy():
    whole = torch.arange(12.0).view(3, 2, 2)
    parts = whole.unbind()
    assert stacked(parts).data_ptr() == whole.data_ptr()
    for others in (parts[::-1], parts[:2], [*parts[:2], parts[2].clone()], [part.mT for part in parts]):
        copy = stacked(list(others))
        assert torch.equal(copy, torch.stack(list(others)))
        assert copy.data_ptr() != whole.data_ptr()
    # A view of the unbound tensor would lose the gradient of a part that requires one.
    parts[1].requires_grad_()
    stacked(parts).sum().backward()
    assert torch.equal(parts[1].grad, torch.ones(2, 2))
