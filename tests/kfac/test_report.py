"""The report shows each factor's strategy, memory and error bound. Warnings name each mistake of a loop once."""

import re
import warnings

import pytest
import torch
from torch import nn

from brandla.kfac import EKFAC, KBFGS, KFAC, Brand, BrandCorrected, BrandRandomized, Exact, InverseFree, Woodbury
from kfac.networks import batch, loss_of, mlp, stepped
from kfac.systems import tensors


def reported(model, preconditioner, batches):
    for inputs in batches:
        stepped(model, preconditioner, model(inputs).square().mean())
    return preconditioner.report()


@pytest.mark.filterwarnings("error:KFAC")
def test_the_report_shows_the_strategy_of_each_factor_and_why():
    model = nn.Sequential(nn.Linear(10, 200), nn.ReLU(), nn.PReLU(200), nn.Linear(200, 300))
    preconditioner = KFAC(model, Brand(8))
    assert preconditioner.report().factors[0].strategy.startswith("Exact(")
    with pytest.warns(UserWarning, match="too small for the strategy"):
        reported(model, preconditioner, [torch.randn(16, 10)])
    # A second warning would be an error.
    report = reported(model, preconditioner, [torch.randn(16, 10)])
    rows = {(row.layer, row.side): row for row in report.factors}
    assert report.unsupported == {"2": "PReLU is not known"}
    small, large = rows["0", "input"], rows["3", "output"]
    assert small.strategy.startswith("Exact(")
    assert small.reason == "rank 8 takes no less memory than the matrix of order n = 11"
    assert large.strategy.startswith("Brand(")
    assert (large.rank, large.n, large.reason) == (8, 300, "")
    largest = float(preconditioner._layers[1].curvature.output.largest())
    assert large.relative_error_bound == pytest.approx(large.error_bound / largest)
    assert 0 < large.relative_error_bound < 10
    assert "error bound / d₁" in str(report)
    assert f"  {large.relative_error_bound:.2e}  " in str(report)
    assert "left to the optimizer:\n  2: PReLU is not known" in str(report)
    assert report.dense_bytes == 4 * (11**2 + 200**2 + 201**2 + 300**2)
    assert report.captured_bytes == 4 * 16 * (10 + 200 + 200 + 300)
    assert re.search(r"factors: .* KiB, dense: .* KiB; captured in the last step: 44.4 KiB", str(report))


@pytest.mark.parametrize("strategy", [Brand(8), BrandRandomized(8), BrandCorrected(8), EKFAC()], ids=repr)
def test_the_report_names_the_chosen_strategy(strategy):
    """Also if a batch is larger than a factor."""
    layer = nn.Linear(100, 90, bias=False)
    report = reported(layer, KFAC(layer, strategy), [torch.randn(950, 100)])
    assert {row.strategy for row in report.factors} == {str(strategy)}


def test_the_report_shows_groups_and_kinds():
    model = nn.Sequential(nn.Embedding(9, 6), nn.LayerNorm(6), nn.Conv1d(6, 6, 1, groups=3))
    report = reported(model, KFAC(model, Brand(3)), [torch.randint(9, (4, 6))])
    rows = {(row.layer, row.side): row for row in report.factors}
    assert {key: row.strategy.partition("(")[0] for key, row in rows.items()} == {
        ("0", "input"): "Diagonal",
        ("0", "output"): "Brand",
        ("1", "input"): "Blocks",
        ("2", "input"): "Exact",
        ("2", "output"): "Exact",
    }
    # 9 frequencies, 6 blocks of 2 × 2, and for each factor the sum of its weights.
    assert rows["0", "input"].bytes == 4 * (9 + 1)
    assert rows["1", "input"].bytes == 4 * (6 * 4 + 1)
    assert rows["1", "input"].dense_bytes == 4 * 6 * 4
    assert rows["2", "input"].dense_bytes == 4 * 3 * 9


# The bytes on each side of a Linear with 150 inputs and 100 outputs, after a batch of 4 in float32.
BYTES = {
    "brand": (Brand(8), {"input": 4 * (8 * 150 + 8 * 8 + 3), "output": 4 * (8 * 100 + 8 * 8 + 3)}),
    "brand-eigh": (Brand(8, form="eigh"), {"input": 4 * (8 * 150 + 8 + 3), "output": 4 * (8 * 100 + 8 + 3)}),
    # K and the direction have n numbers each, and the direction's weight is one.
    "diagonal": (InverseFree("diagonal", variant="ikfac"), {"input": 4 * (2 * 150 + 1), "output": 4 * (2 * 100 + 1)}),
    # H_G is in float64. Until a second pass, the means of the step and their weight are kept beside s and y.
    "k-bfgs": (KBFGS(), {"input": 4 * (2 * 150**2 + 1), "output": 8 * 100**2 + 4 * (4 * 100 + 1)}),
    "woodbury": (Woodbury(), {"beside": 4 * (4 * (150 + 100) + 4 * 4 + 1)}),
}


@pytest.mark.parametrize(("strategy", "expected"), BYTES.values(), ids=BYTES)
def test_the_report_has_the_memory_of_each_side(strategy, expected):
    layer = nn.Linear(150, 100, bias=False)
    preconditioner = KFAC(layer, strategy)
    report = reported(layer, preconditioner, [torch.randn(4, 150)])
    assert {row.side: row.bytes for row in report.factors} == expected
    assert report.bytes == sum(part.nbytes for part in tensors(preconditioner))
    for row in report.factors:
        n, dense = {"input": (150, 4 * 150**2), "output": (100, 4 * 100**2), "beside": (100 * 150, 0)}[row.side]
        assert (row.n, row.dense_bytes, row.strategy) == (n, dense, str(strategy))
        assert (row.error_bound is None) == (not isinstance(strategy, Brand))
        assert row.reason == {InverseFree: "Diagonal()", KBFGS: "BFGS"}.get(type(strategy), "")


def test_repr_shows_strategies_options_and_step():
    text = repr(KFAC(mlp(10, 20, 4), Brand(6), damping=lambda step: 0.1))
    assert text.startswith("KFAC(2 Brand(")
    assert "clip=0.07" in text
    assert text.endswith("step 0)")
    assert "0x" not in text


@pytest.mark.parametrize("method", ["eigh", "cholesky"])
def test_a_relative_bound_is_the_largest_of_a_batch_and_0_without_data(method):
    """One of three groups gets no data, and one small data. This one has a small bound, but the largest over d₁."""
    torch.manual_seed(0)
    layer = nn.Conv1d(6, 3, 1, groups=3, bias=False, dtype=torch.float64)
    batches = [torch.randn(8, 6, 1, dtype=torch.float64) for _ in range(3)]
    for inputs in batches:
        inputs[:, 2:4] = 0
        inputs[:, 4:] *= 1e-3
    batches[1] = batches[0]
    batches[2][:, :2] = batches[0][:, :2]
    # The factorisation is of the first two batches, so up to there the bound is rounding alone.
    preconditioner = KFAC(layer, Exact(inverse_every=10, method=method))
    assert all(row.error_bound < 1e-13 for row in reported(layer, preconditioner, batches[:2]).factors)
    (row,) = (row for row in reported(layer, preconditioner, batches[2:]).factors if row.side == "input")
    sums = [torch.einsum("sik,sjk->ij", inputs[:, 4:], inputs[:, 4:]) / 8 for inputs in batches]
    average = (0.95**2 * sums[0] + 0.95 * sums[1] + sums[2]) / (1 + 0.95 + 0.95**2)
    expected = torch.linalg.matrix_norm(average - sums[0]) / torch.linalg.eigvalsh(sums[0])[-1]
    # With Cholesky, the largest eigenvalue is estimated from below.
    most = 1 if method == "eigh" else 1 / 0.7
    assert 1 - 1e-9 < row.relative_error_bound / expected.item() < most + 1e-9
    assert row.error_bound < 1e-4
    assert row.relative_error_bound > 1e-2


# --- Mistakes of a training loop


def warned(backward, *, late=False, zero=False, **options):
    """Return the warnings of a training loop of a small network."""
    model = mlp(10, 12, 4, dtype=torch.float32)
    optimizer, preconditioner = torch.optim.SGD(model.parameters(), 0.01), KFAC(model, Exact(), **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(13):
            model.zero_grad()
            backward(model, step)
            if zero:
                model.zero_grad()
            for act in (optimizer.step, preconditioner.step) if late else (preconditioner.step, optimizer.step):
                act()
    return [str(warning.message) for warning in caught]


def loss(model, step):
    return loss_of(model, batch(32, 10, 4, step, torch.float32))


def plain(model, step):
    loss(model, step).backward()


def accumulated(model, step):
    for part in range(2):
        (loss(model, step + part) / 2).backward()


def summed(model, step):
    (32 * loss(model, step)).backward()


def scaled(model, step):
    """Scale and unscale as a GradScaler does, without giving it to the preconditioner."""
    (1024 * loss(model, step)).backward()
    for parameter in model.parameters():
        parameter.grad.data.div_(1024)


def of_derivatives(model, step):
    inputs = batch(32, 10, 4, step, torch.float32)[0].requires_grad_()
    outputs = model[2](model[0](inputs).tanh())
    (slope,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
    (outputs.square().mean() + 10 * (slope - 1).square().mean()).backward()


def broken(model, step):
    (loss(model, step) * (float("nan") if step > 1 else 1)).backward()


@pytest.mark.parametrize("backward", [plain, accumulated], ids=lambda own: str(own.__name__))
@pytest.mark.parametrize(
    "options",
    [{}, {"sharing": "reduce"}, {"gradient": "pair"}, {"application": "two-sided"}, {"factor_every": 4}],
    ids=str,
)
def test_a_correct_loop_gets_no_warning(backward, options):
    assert warned(backward, **options) == []


@pytest.mark.parametrize(
    ("backward", "options", "message"),
    [
        (plain, {"late": True}, "call preconditioner.step() before optimizer.step()"),
        (plain, {"zero": True}, "step() found no gradient 3 times in a row"),
        (summed, {}, "if the loss is a sum, divide it"),
        (scaled, {}, "the product of the captured rows is 1024 times the gradient"),
        (of_derivatives, {}, "only part of the gradient of 0"),
        (broken, {}, "a batch was skipped"),
    ],
    ids=["late", "nothing", "sum", "scaler", "derivatives", "not-finite"],
)
def test_a_mistake_gets_one_warning(backward, options, message):
    (found,) = warned(backward, **options)
    assert found.startswith("KFAC: ")
    assert message in found
