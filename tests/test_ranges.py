"""Named ranges of the public functions: what a profiler sees, and what nobody else does."""

from __future__ import annotations

import inspect
import pickle
import typing
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import profiler as autograd_profiler
from torch.profiler import ProfilerActivity, profile

import brandla
from brandla import grouped
from brandla.kfac import KFAC, Brand
from calls import given

X = given()
EIGH, COLUMNS = X.eigh, X.columns

# A call of each public function, and the range that it must show as.
CALLS: dict[str, Callable[[], Any]] = {
    "eigh_update n=40 r=6 k=4": lambda: brandla.eigh_update(EIGH, COLUMNS),
    "eigh_update_ n=40 r=6 k=4": lambda: brandla.eigh_update_(given().eigh, COLUMNS),
    "root_update n=40 r=6 k=4": lambda: brandla.root_update(X.root, COLUMNS),
    "root_update_ n=40 r=6 k=4": lambda: brandla.root_update_(given().root, COLUMNS),
    "eigh_downdate n=40 r=6 k=4": lambda: brandla.eigh_downdate(EIGH, COLUMNS),
    "eigh_refresh n=40 r=6 m=9": lambda: brandla.eigh_refresh(EIGH, X.block),
    "orthonormalize n=40 k=4": lambda: brandla.orthonormalize(COLUMNS),
    "svd_update m=40 r=6 n=9 k=4": lambda: brandla.svd_update(X.svd, COLUMNS, X.small_columns),
    "svd_append m=40 r=6 n=9 k=4": lambda: brandla.svd_append(X.svd, COLUMNS),
    "randomized_eigh n=40 r=6": lambda: brandla.randomized_eigh(X.square, 6),
    "randomized_svd m=40 n=9 r=6": lambda: brandla.randomized_svd(X.block, 6),
    "damped_solve n=40 r=6 m=4": lambda: brandla.damped_solve(EIGH, COLUMNS, 0.1),
    "damped_power n=40 r=6 m=4": lambda: brandla.damped_power(EIGH, COLUMNS, 0.1, -0.5),
    "kron_damped_solve p=40 a=6 q=9 b=3": lambda: brandla.kron_damped_solve(EIGH, X.small, X.block, 0.1, 0.1),
    "damped_logdet n=40 r=6": lambda: brandla.damped_logdet(EIGH, 0.1),
    "kron_damped_power p=40 a=6 q=9 b=3": lambda: brandla.kron_damped_power(EIGH, X.small, X.block, 0.1, -1),
    "kron_damped_logdet p=40 a=6 q=9 b=3": lambda: brandla.kron_damped_logdet(EIGH, X.small, 0.1),
    "grouped.eigh_update problems=2 n=40 r=6 k=4": lambda: grouped.eigh_update([EIGH] * 2, [COLUMNS] * 2),
    "grouped.root_update problems=2 n=40 r=6 k=4": lambda: grouped.root_update([X.root] * 2, [COLUMNS] * 2),
    "grouped.damped_solve problems=2 n=40 r=6 m=4": lambda: grouped.damped_solve([EIGH] * 2, [COLUMNS] * 2, 0.1),
    "grouped.randomized_eigh problems=2 n=40 r=6": lambda: grouped.randomized_eigh([X.square] * 2, 6),
}
FUNCTIONS = [
    getattr(module, name)
    for module in (brandla, grouped)
    for name in module.__all__
    if inspect.isfunction(getattr(module, name))
]
# What starts or names something, and computes nothing.
WITHOUT_RANGE = {"backend", "centre", "checked", "keep_dtype", "track"}


def profiled() -> profile:
    # With acc_events torch keeps events over several starts; without, it warns of that, though there is but one.
    return profile(activities=[ProfilerActivity.CPU], acc_events=True)


def names_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[str]:
    with profiled() as profiler:
        function(*args, **kwargs)
    return [event.name for event in profiler.events() if event.name.startswith("brandla::")]


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_a_range_with_its_sizes(name: str):
    assert names_of(CALLS[name])[0] == f"brandla::{name}"


def test_every_public_function_that_computes_is_a_range():
    without = {function.__name__ for function in FUNCTIONS if not hasattr(function, "__wrapped__")}
    generators = {name for name in WITHOUT_RANGE if hasattr(getattr(brandla, name), "__wrapped__")}
    assert without | generators == WITHOUT_RANGE


def test_arguments_by_keyword_a_batch_and_a_vector_are_named_too():
    batch = brandla.LowRankEigh(*(part.expand(3, *part.shape) for part in EIGH))
    solve = brandla.damped_solve
    assert names_of(solve, rhs=COLUMNS, damping=0.1, lowrank=EIGH) == ["brandla::damped_solve n=40 r=6 m=4"]
    assert names_of(solve, batch, COLUMNS.expand(3, 40, 4), 0.1) == ["brandla::damped_solve batch=3 n=40 r=6 m=4"]
    assert names_of(solve, EIGH, COLUMNS[:, 0], 0.1) == ["brandla::damped_solve n=40 r=6"]
    for function, factor in ((brandla.eigh_update, EIGH), (brandla.root_update, X.root)):
        name = f"brandla::{function.__name__} n=40 r=6 k=4"
        assert names_of(function, brandla.track(factor), COLUMNS) == [name]


def test_a_step_of_kfac_is_a_range_that_holds_those_of_its_factors():
    model = torch.nn.Linear(20, 15)
    preconditioner = KFAC(model, Brand(rank=4))
    model(torch.randn(8, 20)).square().mean().backward()
    first, *others = names_of(preconditioner.step)
    assert first == "brandla::KFAC.step"
    assert "brandla::grouped.root_update problems=2 n=21 r=4 k=8" in others


def test_ranges_hold_the_calls_of_torch():
    with profiled() as profiler:
        brandla.damped_solve(EIGH, COLUMNS, 0.1)
    (solve,) = [event for event in profiler.events() if event.name.startswith("brandla::damped_solve")]
    assert any(child.name.startswith("aten::") for child in solve.cpu_children)


@pytest.mark.parametrize("arguments", [(), (None, None), (EIGH, "columns"), (EIGH,)])
def test_bad_input_fails_under_a_profiler_as_it_does_without(arguments: tuple[Any, ...]):
    with pytest.raises((TypeError, ValueError)) as without:
        brandla.eigh_update(*arguments)
    with profiled(), pytest.raises((TypeError, ValueError)) as under:
        brandla.eigh_update(*arguments)
    assert (type(under.value), str(under.value)) == (type(without.value), str(without.value))


def test_without_a_profiler_no_range_is_made(monkeypatch: pytest.MonkeyPatch):
    made: list[str] = []
    monkeypatch.setattr(autograd_profiler, "record_function", made.append)
    brandla.damped_solve(EIGH, COLUMNS, 0.1)
    assert made == []


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: f"{function.__module__}.{function.__name__}")
def test_functions_stay_what_they_were(function: Callable[..., Any]):
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
