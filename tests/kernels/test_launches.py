"""How many kernels a call asks a GPU for: the budgets, and what is counted at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from bench.counting import Counts, counts_of  # noqa: E402

import brandla  # noqa: E402
from bench import launches  # noqa: E402

pytestmark = pytest.mark.skipif(bool(triton.knobs.runtime.interpret), reason="the interpreter has tests of its own")


@pytest.mark.parametrize("form", launches.FORMS)
@pytest.mark.parametrize("name", launches.LIMITS)
def test_a_call_asks_for_no_more_kernels_than_its_limit(name: str, form: str):
    call, limit = launches.FUNCTIONS[name].call(form), launches.LIMITS[name]
    if call is None:
        # Nothing that overwrites has a form for lists.
        assert name.partition(",")[0].endswith("_")
        return
    counts = counts_of(call)
    assert counts.triton <= limit.triton
    assert counts.torch <= limit.torch


@pytest.mark.parametrize("network", launches.NETWORKS)
@pytest.mark.parametrize("strategy", launches.STEPS_AT_PRESENT)
def test_a_step_of_kfac_asks_for_no_more_kernels_than_its_limit(strategy: str, network: str):
    model = launches.NETWORKS[network]()
    counts = launches.step_counts(model, launches.strategies()[strategy], "sm_90")
    budget = launches.kfac_budget(launches.linear_layers(model))
    assert counts.kernels <= max(budget, launches.STEPS_AT_PRESENT[strategy][network])


@pytest.mark.parametrize(
    "name",
    ["root_update, cholesky", "root_update, cholesky, tracked", "damped_solve, eigh", "kron_damped_solve, W, eigh"],
)
def test_a_list_asks_for_as_many_kernels_whatever_its_length(name: str, monkeypatch: pytest.MonkeyPatch):
    found = set()
    for listed in (2, 5):
        monkeypatch.setattr(launches, "LISTED", listed)
        found.add(counts_of(launches.FUNCTIONS[name].call("grouped")))
    assert len(found) == 1


def test_nothing_waits_where_the_docs_say_so():
    for name in ("root_update, cholesky", "root_update_, cholesky", "damped_solve, eigh", "orthonormalize"):
        assert counts_of(launches.FUNCTIONS[name].call("single")).waits == 0


@pytest.mark.parametrize(
    ("call", "counts"),
    [
        (lambda x: x.mT[1:].unsqueeze(0).reshape(-1), Counts(torch=1)),
        (lambda x: torch.empty_like(x).detach().view(-1), Counts()),
        (lambda x: x[:0] * 2, Counts()),
        (lambda x: x.add_(1), Counts(torch=1)),
        (lambda x: torch._foreach_add([x, x], 1), Counts(torch=1)),
        (lambda x: x.sum().item(), Counts(torch=1, waits=1)),
        (lambda x: x + torch.tensor([1.0, 2.0, 3.0]), Counts(torch=1, uploads=1)),
    ],
    ids=["view", "allocation", "empty", "in place", "list", "read", "upload"],
)
def test_what_is_counted(call: Any, counts: Counts):
    x = torch.ones(4, 3)
    assert counts_of(lambda: call(x)) == counts


def test_values_are_those_of_the_torch_form():
    """What a kernel would leave unwritten reaches no later branch, nor the factor that is overwritten."""
    case = launches.FUNCTIONS["root_update_, cholesky"]
    (root, columns), found = case.arguments(200, ()), {}
    for way in ("counted", "plain"):
        copy = type(root)(*(part.clone() for part in root))

        def call(copy: Any = copy) -> Tensor:
            return brandla.root_update_(copy, columns, **case.options).dense()

        if way == "counted":
            counts_of(call)
        else:
            call()
        found[way] = copy.dense()
    torch.testing.assert_close(found["counted"], found["plain"], rtol=0, atol=1e-4 * float(found["plain"].abs().max()))
