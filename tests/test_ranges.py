"""Named ranges of the public functions, which a profiler shows and no other caller notices."""

import inspect
import pickle
import typing

import pytest
import torch
from torch.autograd import profiler as autograd_profiler
from torch.profiler import ProfilerActivity, profile

import brandla
from brandla import grouped
from brandla.kfac import KFAC, Brand
from calls import ALL, new_arguments

X = new_arguments()
EIGH, COLUMNS = X.eigh, X.columns

# The sizes that a range must show, and the functions, each at its first call in calls.py.
SIZES = {
    "n=40 r=6 k=4": "eigh_update eigh_update_ root_update root_update_ eigh_downdate",
    "n=40 r=6 m=40": "eigh_refresh",
    "n=40 k=4": "orthonormalize",
    "m=40 r=6 n=9 k=4": "svd_update svd_append",
    "n=40 r=3": "randomized_eigh",
    "m=40 n=9 r=3": "randomized_svd",
    "n=40 r=6 m=4": "damped_solve damped_power",
    "n=40 r=6": "damped_logdet",
    "p=40 a=6 q=9 b=3": "kron_damped_solve kron_damped_power kron_damped_logdet",
    "problems=2 n=40 r=6 k=4": "grouped.root_update",
}
FUNCTIONS = [
    getattr(module, name)
    for module in (brandla, grouped)
    for name in module.__all__
    if inspect.isfunction(getattr(module, name))
]
# Functions that start or name something, and compute nothing.
WITHOUT_RANGE = {"backend", "centre", "checked", "keep_dtype", "track"}


def profiled():
    # Without acc_events torch warns that it drops the events of earlier starts, though there is only one start.
    return profile(activities=[ProfilerActivity.CPU], acc_events=True)


def names_of(function, *args, **kwargs):
    with profiled() as profiler:
        function(*args, **kwargs)
    return [event.name for event in profiler.events() if event.name.startswith("brandla::")]


@pytest.mark.parametrize(
    ("function", "sizes"), [(function, sizes) for sizes, functions in SIZES.items() for function in functions.split()]
)
def test_a_call_is_a_range_with_its_sizes(function, sizes):
    call = next(call for name, call in ALL.items() if name.partition(",")[0] == function)
    assert names_of(call, new_arguments())[0] == f"brandla::{function} {sizes}"


def test_every_public_function_that_computes_is_a_range():
    without = {function.__name__ for function in FUNCTIONS if not hasattr(function, "__wrapped__")}
    generators = {name for name in WITHOUT_RANGE if hasattr(getattr(brandla, name), "__wrapped__")}
    assert without | generators == WITHOUT_RANGE


def test_ranges_show_keyword_arguments_batches_vectors_and_lists():
    batch = brandla.LowRankEigh(*(part.expand(3, *part.shape) for part in EIGH))
    solve = brandla.damped_solve
    assert names_of(solve, rhs=COLUMNS, damping=0.1, lowrank=EIGH) == ["brandla::damped_solve n=40 r=6 m=4"]
    assert names_of(solve, batch, COLUMNS.expand(3, 40, 4), 0.1) == ["brandla::damped_solve batch=3 n=40 r=6 m=4"]
    assert names_of(solve, EIGH, COLUMNS[:, 0], 0.1) == ["brandla::damped_solve n=40 r=6"]
    for function, factor in ((brandla.eigh_update, EIGH), (brandla.root_update, X.root)):
        name = f"brandla::{function.__name__} n=40 r=6 k=4"
        assert names_of(function, brandla.track(factor), COLUMNS) == [name]
    listed = names_of(grouped.damped_solve, [EIGH] * 2, [COLUMNS] * 2, 0.1)
    assert listed[0] == "brandla::grouped.damped_solve problems=2 n=40 r=6 m=4"


def test_a_step_of_kfac_is_a_range_around_the_ranges_of_its_factors():
    model = torch.nn.Linear(20, 15)
    preconditioner = KFAC(model, Brand(rank=4))
    model(torch.randn(8, 20)).square().mean().backward()
    first, *others = names_of(preconditioner.step)
    assert first == "brandla::KFAC.step"
    assert "brandla::grouped.root_update problems=2 n=21 r=4 k=8" in others


@pytest.mark.parametrize("arguments", [(), (None, None), (EIGH, "columns"), (EIGH,)])
def test_bad_input_raises_the_same_error_under_a_profiler(arguments):
    with pytest.raises((TypeError, ValueError)) as without:
        brandla.eigh_update(*arguments)
    with profiled(), pytest.raises((TypeError, ValueError)) as under:
        brandla.eigh_update(*arguments)
    assert (type(under.value), str(under.value)) == (type(without.value), str(without.value))


def test_ranges_enclose_the_calls_of_torch_and_need_a_profiler(monkeypatch):
    with profiled() as profiler:
        brandla.damped_solve(EIGH, COLUMNS, 0.1)
    (solve,) = [event for event in profiler.events() if event.name.startswith("brandla::damped_solve")]
    assert any(child.name.startswith("aten::") for child in solve.cpu_children)
    names = []
    monkeypatch.setattr(autograd_profiler, "record_function", names.append)
    brandla.damped_solve(EIGH, COLUMNS, 0.1)
    assert names == []


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: f"{function.__module__}.{function.__name__}")
def test_the_decorator_keeps_documentation_signature_types_and_pickling(function):
    plain = inspect.unwrap(function)
    assert function.__doc__ == plain.__doc__
    assert inspect.signature(function) == inspect.signature(plain)
    assert typing.get_type_hints(function) == typing.get_type_hints(plain)
    assert pickle.loads(pickle.dumps(function)) is function


def test_a_profiler_does_not_enter_a_compiled_graph():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(lambda rhs: brandla.damped_solve(EIGH, rhs, 0.1), fullgraph=True, backend=counter)
    expected = compiled(COLUMNS)
    with profiled():
        torch.testing.assert_close(compiled(COLUMNS), expected)
    assert counter.frame_count == 1
