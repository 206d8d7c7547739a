"""How many kernels a call asks a GPU for: the budgets, and the rules of counting."""

import pytest
import torch

triton = pytest.importorskip("triton")


import brandla  # noqa: E402
from bench import launches  # noqa: E402
from bench.launches import BUDGETS, Counts, counts_of  # noqa: E402
from calls import WITHOUT_WAITING, new_arguments  # noqa: E402

pytestmark = pytest.mark.skipif(bool(triton.knobs.runtime.interpret), reason="the interpreter has tests of its own")

# Calls that take more than their budget at present, in kernels of Triton and of torch. If you bring a count down, lower
# it here; if the budget is met, delete it.
AT_PRESENT = {
    "root_update, cholesky, tracked": (4, 6),
    # One launch of Triton more than the budget, and for one factor one kernel of torch less.
    "eigh_update": (9, 7),
}
# The same for one factor, for functions that take the factors of a list in turn.
ALONE = {
    "damped_logdet, root": (0, 16),
    "damped_logdet, eigh": (0, 7),
    "damped_solve, root, diagonal": (5, 15),
    "kron_damped_power, eigh": (0, 31),
    "kron_damped_logdet, eigh": (0, 19),
    "eigh_refresh": (15, 87),
    "eigh_downdate": (8, 27),
    "eigh_update_": (9, 7),
    "root_update": (5, 6),
}
# The same for a list of 8. Its wide matrices have n/2 columns; those with 512 to 1023 columns are taken together.
LISTS = {"eigh_refresh": (24, 91), "kron_damped_power, eigh": (8, 33), "kron_damped_power, root": (14, 71)}
# The same for a step of K-FAC: the sum of both kinds, by system and network.
_NETWORKS = ("MLP, 1 layer", "MLP, 3 layers", "MLP, 12 layers", "transformer", "MLP, 48 layers")
STEPS_AT_PRESENT = {
    "Brand": dict(zip(_NETWORKS, (38, 44, 71, 140, 179), strict=True)),
    "Brand, by eigh": dict(zip(_NETWORKS, (48, 54, 81, 150, 189), strict=True)),
    "Brand, orthonormal": dict(zip(_NETWORKS, (52, 58, 85, 153, 193), strict=True)),
}

# The most calls of Python functions in a call whose launches are recorded: the host's time, whatever else the machine
# does. A few are torch's own, and their number differs among its versions.
PYTHON_CALLS = {"project": 15, "damped_solve, root": 55, "damped_solve, eigh": 55, "root_update, cholesky": 72}
# The same for each further factor of a list.
FOR_EACH_FACTOR = {"damped_solve, root": 2, "damped_solve, eigh": 2, "root_update, cholesky": 3}
# The same for each further layer of a K-FAC step.
FOR_EACH_LAYER = 105


def limits():
    """Yield calls and forms with the most kernels of Triton and torch; no call that overwrites takes lists."""
    for name, budget in BUDGETS.items():
        allowed = tuple(map(max, budget, AT_PRESENT.get(name, budget)))
        overwrites = name.partition(",")[0].endswith("_")
        yield from ((name, form, allowed) for form in launches.FORMS if form != "grouped" or not overwrites)
    yield from ((name, "single", allowed) for name, allowed in ALONE.items())
    yield from ((name, "grouped, wide", allowed) for name, allowed in LISTS.items())


@pytest.mark.parametrize(("name", "form", "allowed"), [*limits()])
def test_a_call_asks_for_no_more_kernels_than_its_limit(name, form, allowed, monkeypatch):
    if "wide" in form:
        monkeypatch.setattr(launches, "N", 1100)
    counts = counts_of(launches.call_of(name, form.partition(",")[0]))
    assert counts.triton <= allowed[0]
    assert counts.torch <= allowed[1]


@pytest.mark.parametrize("name", PYTHON_CALLS)
def test_a_call_takes_no_more_calls_of_python_than_its_limit(name):
    assert launches.python_calls(launches.call_of(name, "single")) <= PYTHON_CALLS[name]


def test_the_time_of_the_host_is_the_sum_of_its_parts():
    whole, *parts = list(launches.host_times(launches.call_of("damped_solve, root", "grouped")).values())[:-1]
    assert sum(parts) == pytest.approx(whole, abs=0.5)
    assert parts[launches.HOST_PARTS.index("tables") - 1] > 0


@pytest.mark.parametrize("name", FOR_EACH_FACTOR)
def test_each_factor_of_a_list_takes_no_more_calls_of_python_than_its_limit(name, monkeypatch):
    calls = []
    for listed in (2, 10):
        monkeypatch.setattr(launches, "LISTED", listed)
        calls.append(launches.python_calls(launches.call_of(name, "grouped")))
    assert calls[1] - calls[0] <= 8 * FOR_EACH_FACTOR[name]


def test_each_layer_of_a_step_takes_no_more_calls_of_python_than_its_limit():
    brand = launches.STRATEGIES["Brand"]
    few, many = (launches.step_times(launches.mlp(layers), brand, rounds=0)["Python calls"] for layers in (4, 12))
    assert many - few <= 8 * FOR_EACH_LAYER


@pytest.mark.parametrize("network", launches.NETWORKS)
@pytest.mark.parametrize("strategy", STEPS_AT_PRESENT)
def test_a_step_of_kfac_asks_for_no_more_kernels_than_its_limit_and_brand_never_waits(strategy, network):
    counts = launches.step_counts(launches.NETWORKS[network](), launches.STRATEGIES[strategy])
    assert counts.kernels <= STEPS_AT_PRESENT[strategy][network]
    assert counts.waits == 0 or strategy != "Brand"


@pytest.mark.parametrize(
    "name",
    [
        *("root_update, cholesky", "root_update, cholesky, tracked", "eigh_update", "eigh_refresh"),
        *("damped_solve, root", "damped_solve, eigh", "kron_damped_solve, W, eigh"),
        "kron_damped_solve, W, root and eigh",
    ],
)
def test_a_list_asks_for_as_many_kernels_whatever_its_length(name, monkeypatch):
    found = set()
    monkeypatch.setattr(launches, "N", 1100)
    for listed in (2, 5):
        monkeypatch.setattr(launches, "LISTED", listed)
        found.add(counts_of(launches.call_of(name, "grouped")))
    assert len(found) == 1


@pytest.mark.parametrize("name", WITHOUT_WAITING)
def test_a_call_that_promises_never_to_wait_does_not(name):
    x = new_arguments()
    assert counts_of(lambda: WITHOUT_WAITING[name](x)).waits == 0


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
def test_what_is_counted(call, counts):
    x = torch.ones(4, 3)
    assert counts_of(lambda: call(x)) == counts


def test_values_are_those_of_the_torch_form():
    """Tensors that a recorded kernel leaves unwritten reach no later branch, nor the factor that is overwritten."""
    root, columns = launches.root(200, ()), launches.columns(200, ())
    found = []
    for way in (counts_of, lambda call: call()):
        copy = type(root)(*(part.clone() for part in root))
        way(lambda copy=copy: brandla.root_update_(copy, columns, **launches.NO_EIGH))
        found.append(copy.dense())
    torch.testing.assert_close(*found, rtol=0, atol=1e-4 * float(found[1].abs().max()))
